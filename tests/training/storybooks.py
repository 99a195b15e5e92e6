"""Data sets of a few drawn pictures, for tests of whole trainings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from model.weights import read_safetensors

COLOURS = {"ox": "red", "bee": "gold", "cat": "black", "fox": "orange", "pig": "pink", "owl": "navy", "hen": "white"}
GROUNDS = dict(zip(COLOURS, ("green", "black", "white", "blue", "brown", "yellow", "red"), strict=True))


def draw(file: Path, name: str) -> None:
    """A blot of the name's colour, at a place of its own, on a ground of its own."""
    image = Image.new("RGB", (32, 32), GROUNDS[name])
    at = 2 + 3 * list(COLOURS).index(name)
    ImageDraw.Draw(image).ellipse((at % 16, at // 2, at % 16 + 14, at // 2 + 16), fill=COLOURS[name])
    image.save(file)


def write_stories(folder: Path, stories: Sequence[Sequence[tuple[str, str]]], *, labels: bool = True) -> Path:
    """A data set: a story is a list of pages, `(name, caption)`, each with a picture of that name."""
    folder.mkdir()
    with (folder / "train.jsonl").open("w", encoding="utf-8") as lines:
        for number, pages in enumerate(stories):
            images = [f"{number}_{page}.png" for page in range(len(pages))]
            for image, (name, _) in zip(images, pages, strict=True):
                draw(folder / image, name)
            line = {"id": number, "images": images, "captions": [caption for _, caption in pages]}
            if labels:
                line |= {"things": [[name] for name, _ in pages], "place": ["sea"] * len(pages)}
            lines.write(json.dumps(line) + "\n")
    return folder


def tensors(checkpoint: Path) -> dict[str, tuple[str, bytes]]:
    """Every number of a checkpoint, by file and name."""
    return {
        f"{file.name}: {name}": (str(values.dtype), values.tobytes())
        for file in sorted(checkpoint.glob("*.safetensors"))
        for name, values in read_safetensors(file).items()
    }
