"""What several scenes share: trees, clouds, eyes."""

from __future__ import annotations

from brush import Canvas, Point, mirrored, smooth


def pine(c: Canvas, x: float, foot: float, height: float, fill: tuple[str, ...], snow: str = "") -> None:
    """A fir tree of four tiers, with snow on its branches if a colour is given."""
    if snow:
        c.line([(x, foot - height * 0.2), (x, foot)], height * 0.06, "#4a3b3f")
    for tier in range(4):
        low, high = foot - height * (0.1 + 0.19 * tier), foot - height * (0.46 + 0.18 * tier)
        half = height * (0.25 - 0.048 * tier)
        right: list[Point] = [
            (x, high),
            (x + half * 0.42, low - (low - high) * 0.35),
            (x + half, low - height * 0.01),
            (x + half * 0.5, low + height * 0.012),
            (x, low + height * 0.03),
        ]
        c.shape(smooth(mirrored(right, x), steps=6), fill)
        if snow:
            cap: list[Point] = [
                (x, high),
                (x + half * 0.42, low - (low - high) * 0.38),
                (x + half * 0.8, low - height * 0.03),
                (x + half * 0.4, low - (low - high) * 0.28),
                (x + half * 0.2, low - (low - high) * 0.42),
            ]
            c.shape(smooth(mirrored([*cap, (x, low - (low - high) * 0.34)], x), steps=6), snow, alpha=0.92)


def cloud(c: Canvas, x: float, y: float, size: float, fill: tuple[str, str], alpha: float = 0.95) -> None:
    """A cloud of soft balls on a flat foot."""
    for dx, dy, r in (
        (-1.1, 0.05, 0.42),
        (-0.5, -0.25, 0.6),
        (0.2, -0.38, 0.72),
        (0.85, -0.08, 0.52),
        (1.35, 0.12, 0.34),
    ):
        c.oval(x + dx * size, y + dy * size, r * size, r * size * 0.86, fill, alpha=alpha, blur=size * 0.05)
    c.oval(x, y + size * 0.24, size * 1.6, size * 0.24, fill[1], alpha=alpha, blur=size * 0.06)


def eyes(c: Canvas, x: float, y: float, apart: float, size: float, colour: str = "#2b1d1a") -> None:
    """Two shining eyes."""
    for side in (-1, 1):
        at = x + side * apart
        c.oval(at, y, size * 0.86, size, colour)
        c.oval(at + size * 0.28, y - size * 0.36, size * 0.32, size * 0.34, "#ffffff")
        c.oval(at - size * 0.3, y + size * 0.4, size * 0.16, size * 0.16, "#ffffff", alpha=0.7)
