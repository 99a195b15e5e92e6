"""Drawings that no package is needed for: random mosaics, each with a difference hash of its own."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from training.storybook.drawings import Drawing


def mosaic(seed: int) -> Image.Image:
    """8 rows of 9 random greys, 4 pixels a side: 64 comparisons, about half of them true."""
    cells = np.random.default_rng(seed).permutation(np.arange(20, 236, 3)).reshape(8, 9).astype(np.uint8)
    grey = np.kron(cells, np.ones((4, 4), np.uint8))
    return Image.fromarray(grey).convert("RGBA")


def drawing(folder: Path, concept: str, style: str, source: str = "", picture: Image.Image | None = None) -> Drawing:
    """One drawing, its PNG written into `folder`; a mosaic that its names decide, unless `picture` is given."""
    source = source or concept
    name = f"{style}-{concept}-{source}.png".replace(" ", "_")
    (picture or mosaic(zlib.crc32(name.encode()))).save(folder / name)
    return Drawing(concept, style, source, name)


def drawings(folder: Path, concepts: Iterable[str], styles: Iterable[str]) -> list[Drawing]:
    """Every concept in every style; two sources each where the style is clip art."""
    styles = tuple(styles)
    return [
        drawing(folder, concept, style, source)
        for concept in concepts
        for style in styles
        for source in (("by_ann", "by_bob") if style == "openclipart" else ("",))
    ]
