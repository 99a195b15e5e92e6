"""Smooth shapes, gradients, glows and soft shadows over Pillow, painted large and scaled down."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from PIL import Image, ImageColor, ImageDraw, ImageFilter

Point = tuple[float, float]
Fill = str | tuple[str, ...]
"""One colour, or a gradient from the top to the bottom of the shape."""

WIDTH, HEIGHT = 640, 480
SCALE = 4  # painted four times as large: scaling down smooths every edge


def smooth(points: Sequence[Point], *, closed: bool = True, steps: int = 12) -> list[Point]:
    """A Catmull-Rom curve through the points."""
    count = len(points)
    curve: list[Point] = []
    for i in range(count if closed else count - 1):
        near = [points[(i + j) % count if closed else min(max(i + j, 0), count - 1)] for j in (-1, 0, 1, 2)]
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = near
        for step in range(steps):
            t = step / steps
            w = (-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
            curve.append(
                (
                    (w[0] * ax + w[1] * bx + w[2] * cx + w[3] * dx) / 2,
                    (w[0] * ay + w[1] * by + w[2] * cy + w[3] * dy) / 2,
                )
            )
    return curve if closed else [*curve, points[-1]]


def mirrored(points: Sequence[Point], axis: float) -> list[Point]:
    """The half to the right of a vertical axis, listed from top to bottom, and its mirror image."""
    return [*points, *((2 * axis - x, y) for x, y in reversed(points) if x != axis)]


def flipped(points: Sequence[Point], axis: float) -> list[Point]:
    """The mirror image alone."""
    return [(2 * axis - x, y) for x, y in points]


def oval(x: float, y: float, rx: float, ry: float, angle: float = 0) -> list[Point]:
    """An ellipse, turned clockwise by `angle` degrees."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turns = [math.tau * i / 72 for i in range(72)]
    return [
        (x + rx * math.cos(t) * c - ry * math.sin(t) * s, y + rx * math.cos(t) * s + ry * math.sin(t) * c)
        for t in turns
    ]


def gradient(size: tuple[int, int], colours: Sequence[str]) -> Image.Image:
    """Colours from top to bottom, evenly spaced."""
    strip = Image.new("RGB", (1, 256))
    stops = [ImageColor.getrgb(colour) for colour in colours]
    for y in range(256):
        place = y / 255 * (len(stops) - 1)
        low = min(int(place), len(stops) - 2)
        a, b, t = stops[low], stops[low + 1], place - low
        strip.putpixel((0, y), tuple(round(p + (q - p) * t) for p, q in zip(a[:3], b[:3], strict=True)))
    return strip.resize(size, Image.Resampling.BICUBIC)


class Canvas:
    """A picture in the making. Coordinates are those of the finished picture, 640 x 480."""

    def __init__(self, *background: str) -> None:
        self.image = gradient((WIDTH * SCALE, HEIGHT * SCALE), background)

    def shape(self, points: Sequence[Point], fill: Fill, *, alpha: float = 1, blur: float = 0) -> None:
        """Fills a polygon; `blur` softens its edge, in pixels."""
        margin = math.ceil(3 * blur) + 1
        left, top = (math.floor(min(p[i] for p in points)) - margin for i in (0, 1))
        right, bottom = (math.ceil(max(p[i] for p in points)) + margin for i in (0, 1))
        size = ((right - left) * SCALE, (bottom - top) * SCALE)
        mask = Image.new("L", size)
        moved = [((x - left) * SCALE, (y - top) * SCALE) for x, y in points]
        ImageDraw.Draw(mask).polygon(moved, fill=round(255 * alpha))
        if blur:
            mask = mask.filter(ImageFilter.GaussianBlur(blur * SCALE))
        colours = (fill, fill) if isinstance(fill, str) else fill
        self.image.paste(gradient(size, colours), (left * SCALE, top * SCALE), mask)

    def blob(self, points: Sequence[Point], fill: Fill, *, alpha: float = 1, blur: float = 0) -> None:
        """Fills a smooth closed curve through the points."""
        self.shape(smooth(points), fill, alpha=alpha, blur=blur)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Fill, angle: float = 0, alpha: float = 1,
             blur: float = 0) -> None:  # fmt: skip
        """Fills an ellipse."""
        self.shape(oval(x, y, rx, ry, angle), fill, alpha=alpha, blur=blur)

    def line(self, points: Sequence[Point], width: float, colour: str, *, alpha: float = 1) -> None:
        """A smooth line with round ends."""
        curve = smooth(points, closed=False)
        reach = math.ceil(width) + 1
        left, top = (math.floor(min(p[i] for p in curve)) - reach for i in (0, 1))
        right, bottom = (math.ceil(max(p[i] for p in curve)) + reach for i in (0, 1))
        mask = Image.new("L", ((right - left) * SCALE, (bottom - top) * SCALE))
        draw, radius = ImageDraw.Draw(mask), width * SCALE / 2
        moved = [((x - left) * SCALE, (y - top) * SCALE) for x, y in curve]
        draw.line(moved, fill=round(255 * alpha), width=max(1, round(2 * radius)), joint="curve")
        for x, y in (moved[0], moved[-1]):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=round(255 * alpha))
        self.image.paste(Image.new("RGB", mask.size, colour), (left * SCALE, top * SCALE), mask)

    def glow(self, x: float, y: float, radius: float, colour: str, strength: float = 1) -> None:
        """Light that fades out from a point."""
        side = round(2 * radius * SCALE)
        fall = Image.radial_gradient("L").point([round(max(0, 1 - i / 181) ** 2 * 255 * strength) for i in range(256)])
        corner = (round((x - radius) * SCALE), round((y - radius) * SCALE))
        mask = fall.resize((side, side), Image.Resampling.BICUBIC)
        self.image.paste(Image.new("RGB", (side, side), colour), corner, mask)

    def dots(self, seed: int, count: int, box: tuple[float, float, float, float], size: tuple[float, float],
             colour: str, *, blur: float = 0) -> None:  # fmt: skip
        """Scatters round dots (stars, snow) over a box, the same ones for the same seed."""
        dice = random.Random(seed)
        for _ in range(count):
            x, y = dice.uniform(box[0], box[2]), dice.uniform(box[1], box[3])
            radius = size[0] + (size[1] - size[0]) * dice.random() ** 3
            self.oval(x, y, radius, radius, colour, alpha=dice.uniform(0.35, 1), blur=blur)

    def finished(self) -> Image.Image:
        """The picture at its own size, with a breath of paper grain against banding."""
        small = self.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
        grain = Image.frombytes("L", small.size, random.Random(0).randbytes(WIDTH * HEIGHT))
        return Image.blend(small, Image.merge("RGB", (grain,) * 3), 0.018)
