"""Draws the example pictures, our own work: `python demo_app/pictures/draw.py [FOLDER]`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from brush import Canvas
from scenes.bear import bear
from scenes.boat import boat
from scenes.cat import cat
from scenes.fox import fox
from scenes.house import house

SCENES: dict[str, Callable[[], Canvas]] = {"fox": fox, "boat": boat, "bear": bear, "house": house, "cat": cat}


def main(argv: list[str]) -> int:
    """Draws every scene into the folder given, by default the one this file is in."""
    folder = Path(argv[0]) if argv else Path(__file__).parent
    for name, scene in SCENES.items():
        path = folder / f"{name}.jpg"
        scene().finished().save(path, quality=88, optimize=True, subsampling="4:2:0")
        print(f"{path}: {path.stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
