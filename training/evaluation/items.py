"""The pictures that a story is asked about: what is on them, and by which names."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from seed_story.errors import PictureError, UsageError

SPLITS = ("picture", "style", "concept")
"""What was held out of training: this drawing of a known concept in a known style, its style, or its concept."""
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
_NUMBER = re.compile(r"[\s_-]*\(?\d+\)?$")

T = TypeVar("T")


@dataclass(frozen=True)
class PictureItem:
    """One picture of a known thing.

    Args:
        image: the file.
        concept: the thing's name.
        accepted: the names that count as right, the concept's own among them.
        split: one of `SPLITS`.
        group: a heading of the reader's own, to report apart; None for none.
    """

    id: str
    image: Path
    concept: str
    accepted: tuple[str, ...]
    split: str = "picture"
    group: str | None = None


def story_seed(seed: int, name: str) -> int:
    """A story's seed, from the run's and a name of its own: the same whichever other stories are told."""
    return zlib.crc32(f"{seed} {name}".encode())


def held_out_stories(data: Path) -> Path:
    """The file of a data set's held-out stories.

    Raises:
        UsageError: there is none.
    """
    file = data / "test.jsonl"
    if not file.is_file():
        raise UsageError("there are no held-out stories", got=f"no {file}",
                         hint="Build the data with `python -m training.storybook build`, or give --data.")  # fmt: skip
    return file


def read_items(source: Path) -> list[PictureItem]:
    """Reads pictures from a JSONL file, or from a folder whose file names are the concepts.

    A line of the file is `{"id", "image", "concept", "accepted", "split"}`, and `"group"` if there is one. `image` is
    relative to the file's folder; `accepted` is the concept, and `split` is "picture", where they are left out. In a
    folder, `hot_air_balloon_2.png` shows a hot air balloon.

    Raises:
        UsageError: there is no such file or folder, it holds no picture, or a line isn't of that form.
        PictureError: a picture is missing.
    """
    if not source.exists():
        hint = "Build the data with `python -m training.storybook build`, or give --pictures."
        raise UsageError("there are no pictures", got=source, expected="a JSONL file or a folder", hint=hint)
    items = _from_folder(source) if source.is_dir() else _from_file(source)
    if not items:
        raise UsageError(f"{source} holds no pictures", expected="at least one")
    for item in items:
        if not item.image.is_file():
            raise PictureError(f"the picture of {item.id} is missing", expected=f"a file at {item.image}")
    return items


def _from_folder(folder: Path) -> list[PictureItem]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    concepts = [re.sub(r"[\s_-]+", " ", _NUMBER.sub("", file.stem)).strip().lower() for file in files]
    for file, concept in zip(files, concepts, strict=True):
        if not concept:
            raise UsageError("a file's name must say what is on the picture", got=file.name,
                             expected="a name such as fox_2.jpg")  # fmt: skip
    return [PictureItem(f.name, f, concept, (concept,)) for f, concept in zip(files, concepts, strict=True)]


def _from_file(file: Path) -> list[PictureItem]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} can't be read", got=error, expected="JSON lines in UTF-8") from error
    return [_item(line, file, number) for number, line in enumerate(lines, 1) if line.strip()]


def _item(line: str, file: Path, number: int) -> PictureItem:
    try:
        values: dict[str, Any] = json.loads(line)
        concept, accepted = str(values["concept"]), values.get("accepted") or [values["concept"]]
        if not isinstance(accepted, list) or not all(isinstance(name, str) and name.strip() for name in accepted):
            raise ValueError(f"accepted is {accepted!r}, not a list of names")
        split, group = values.get("split", SPLITS[0]), values.get("group")
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, none of {', '.join(SPLITS)}")
        image = file.parent / values["image"]
        made = PictureItem(str(values.get("id", values["image"])), image, concept, tuple(accepted), split,
                           None if group is None else str(group))  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"line {number} of {file} isn't a picture's", got=f"{type(error).__name__}: {error}",
                             expected='{"id", "image", "concept", "accepted", "split"}') from error  # fmt: skip
    return made


def subset(items: Sequence[T], limit: int | None, seed: int, key: Callable[[T], Hashable] = lambda _: None) -> list[T]:
    """At most `limit` items, drawn by `seed`, as many of each `key` as there are; in the order they came in."""
    if limit is None or limit >= len(items):
        return list(items)
    rank: dict[Hashable, int] = {}
    turns: list[tuple[int, int]] = []
    for place in np.random.default_rng(seed).permutation(len(items)).tolist():
        turn = rank[key(items[place])] = rank.get(key(items[place]), -1) + 1
        turns.append((turn, place))
    turns.sort(key=lambda pair: pair[0])  # a stable sort: one of each key, then the second of each
    return [items[place] for place in sorted(place for _, place in turns[:limit])]
