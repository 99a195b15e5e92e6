"""Held-out pictures and stories, as the storybook has them, and scripted models in the place of real ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CAPTIONS = ("A fox ran.", "So far.", "It hid in a log.", "The end.")


def draw(file: Path, seed: int) -> Path:
    """A picture of coarse noise, which differs from every other."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).resize((32, 32), Image.Resampling.NEAREST).save(file)
    return file


def write_lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def storybook(folder: Path, *, stories: int = 3, pages: int = 2, things: int = 6) -> Path:
    """`test.jsonl` and `grounding.jsonl` with their pictures; splits take turns."""
    told, asked = [], []
    for n in range(stories):
        images = [f"pictures/s{n}_{page}.png" for page in range(pages)]
        for page, image in enumerate(images):
            draw(folder / image, 100 * n + page)
        told.append({"id": f"s{n}", "images": images, "captions": CAPTIONS[:pages], "orders": list(range(pages))})
    for n in range(things):
        draw(folder / f"pictures/g{n}.png", 1000 + n)
        split = ("picture", "style", "concept")[n % 3]
        asked.append({"id": f"g{n}", "image": f"pictures/g{n}.png", "concept": f"thing {n}",
                      "accepted": [f"thing {n}"], "split": split})  # fmt: skip
    write_lines(folder / "test.jsonl", told)
    write_lines(folder / "grounding.jsonl", asked)
    return folder


class ScriptedStory:
    """Tells what a script says about its picture, a word at a time."""

    def __init__(self, script: Callable[[Path | None, int], str], seed: int) -> None:
        self._script, self._seed, self._picture = script, seed, None
        self.given, self.told, self.words = "", "", 0

    def add_picture(self, picture: Path) -> ScriptedStory:
        self._picture = picture
        return self

    def add_text(self, text: str) -> ScriptedStory:
        self.given += text
        return self

    def tell(self, *, max_tokens: int) -> Iterator[str]:
        for word in self._script(self._picture, self._seed).split(" ")[:max_tokens]:
            self.told += f" {word}"
            self.words += 1
            yield f" {word}"


class ScriptedModel:
    """In the place of `SEEDStory`; keeps its stories and their seeds."""

    def __init__(self, script: Callable[[Path | None, int], str]) -> None:
        self._script = script
        self.stories: list[ScriptedStory] = []
        self.seeds: list[int] = []

    def begin(self, *, seed: int) -> ScriptedStory:
        self.seeds.append(seed)
        self.stories.append(ScriptedStory(self._script, seed))
        return self.stories[-1]
