"""Small stories, written by hand in the form of StoryStream's lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.data import Page, StoryRecord

CAPTIONS = (
    "Once upon a time, there was a fox.",
    "Soon, Pim met 7 bears in the park.",
    "The end was near; everyone said “good night”.",
)
FIRST_LINE: dict[str, Any] = {
    "id": 102,
    "images": ["000258/000258_keyframe_0-19-49-688.jpg", "000258/000258_keyframe_0-19-52-608.jpg"],
    "captions": list(CAPTIONS[:2]),
    "orders": [0, 1],
}


def story(*captions: str, name: str = "s") -> StoryRecord:
    captions = captions or CAPTIONS
    return StoryRecord(name, tuple(Page(Path(f"{name}{n}.jpg"), text, n) for n, text in enumerate(captions)))


def write(file: Path, *lines: Any) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file
