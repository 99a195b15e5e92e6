"""Backgrounds: one function a place, each drawing anew every time, in flat shapes and gradients."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

Rng = np.random.Generator
Colour = tuple[int, int, int]

SIDE = 224
"""Of a page's picture, in pixels."""


def draw_place(place: str, rng: Rng) -> Image.Image:
    """The background of a place, RGB, `SIDE` pixels square; raises KeyError for a place that isn't in `PLACES`."""
    picture = PLACES[place](rng)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2))) if rng.random() < 0.4 else picture


def _jitter(colour: Colour, rng: Rng, spread: int = 24) -> Colour:
    r, g, b = (int(np.clip(c + rng.integers(-spread, spread + 1), 0, 255)) for c in colour)
    return r, g, b


def _gradient(top: Colour, bottom: Colour) -> Image.Image:
    ramp = np.linspace(0, 1, SIDE)[:, None, None]
    rows = (1 - ramp) * np.array(top) + ramp * np.array(bottom)
    return Image.fromarray(np.broadcast_to(rows, (SIDE, SIDE, 3)).astype(np.uint8))


def _sky(rng: Rng) -> Image.Image:
    skies: list[tuple[Colour, Colour]] = [
        ((120, 190, 245), (215, 238, 252)), ((90, 160, 230), (190, 220, 245)), ((250, 190, 140), (255, 230, 190)),
        ((170, 185, 205), (215, 222, 230)), ((130, 120, 190), (245, 180, 170)),
    ]  # fmt: skip
    top, bottom = skies[int(rng.choice(len(skies), p=[0.4, 0.25, 0.12, 0.13, 0.1]))]
    return _gradient(_jitter(top, rng), _jitter(bottom, rng))


def _ridge(draw: ImageDraw.ImageDraw, level: float, height: float, colour: Colour, rng: Rng, waves: int = 3) -> None:
    """A hilly horizon: everything below a sum of sines at `level` (0 is the top), filled."""
    x = np.linspace(0, 1, 57)
    line = sum(np.sin(2 * np.pi * (rng.uniform(0.4, waves) * x + rng.random())) / (k + 1) for k in range(waves))
    y = SIDE * (level + height * np.asarray(line) / 2)
    draw.polygon([(0, SIDE), *zip(SIDE * x, y, strict=True), (SIDE, SIDE)], fill=colour)


def _clouds(draw: ImageDraw.ImageDraw, rng: Rng, most: int = 4) -> None:
    for _ in range(rng.integers(0, most)):
        x, y, size = rng.uniform(0, SIDE), rng.uniform(5, 70), rng.uniform(8, 18)
        for dx in (-1.0, 0.0, 1.0):
            r = size * (1.2 if dx == 0 else 0.8)
            draw.ellipse((x + dx * size - r, y - r * 0.7, x + dx * size + r, y + r * 0.7), fill=(250, 250, 252))


def _tree(draw: ImageDraw.ImageDraw, x: float, ground: float, size: float, rng: Rng) -> None:
    leaf = _jitter((60, 130, 65), rng)
    draw.rectangle((x - size * 0.07, ground - size * 0.4, x + size * 0.07, ground), fill=_jitter((110, 80, 50), rng))
    if rng.random() < 0.5:
        for k in range(3):
            w, top = size * (0.34 - 0.08 * k), ground - size * (0.6 + 0.22 * k)
            base = ground - size * (0.25 + 0.22 * k)
            draw.polygon([(x - w, base), (x + w, base), (x, top)], fill=leaf)
    else:
        draw.ellipse((x - size * 0.32, ground - size, x + size * 0.32, ground - size * 0.3), fill=leaf)


def _meadow(rng: Rng) -> Image.Image:
    picture = _sky(rng)
    draw = ImageDraw.Draw(picture)
    _clouds(draw, rng)
    level = rng.uniform(0.45, 0.7)
    _ridge(draw, level, 0.08, _jitter((135, 190, 100), rng), rng)
    _ridge(draw, level + 0.12, 0.06, _jitter((105, 175, 80), rng), rng)
    for _ in range(rng.integers(0, 30)):
        x, y = rng.uniform(0, SIDE), SIDE * rng.uniform(level + 0.15, 1)
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=_jitter((245, 220, 120), rng, 60))
    return picture


def _forest(rng: Rng) -> Image.Image:
    picture = _gradient(_jitter((150, 195, 165), rng), _jitter((95, 140, 90), rng))
    draw = ImageDraw.Draw(picture)
    level = rng.uniform(0.55, 0.75)
    for _ in range(rng.integers(8, 16)):
        _tree(draw, rng.uniform(0, SIDE), SIDE * (level + rng.uniform(-0.03, 0.05)), rng.uniform(70, 150), rng)
    _ridge(draw, level + 0.04, 0.04, _jitter((85, 120, 60), rng), rng)
    return picture


def _beach(rng: Rng) -> Image.Image:
    picture = _sky(rng)
    draw = ImageDraw.Draw(picture)
    _clouds(draw, rng)
    sea, sand = rng.uniform(0.35, 0.5), rng.uniform(0.58, 0.72)
    draw.rectangle((0, SIDE * sea, SIDE, SIDE), fill=_jitter((60, 150, 200), rng))
    _ridge(draw, sand, 0.05, _jitter((240, 215, 160), rng), rng)
    return picture


def _sea(rng: Rng) -> Image.Image:
    picture = _sky(rng)
    draw = ImageDraw.Draw(picture)
    _clouds(draw, rng)
    level = rng.uniform(0.3, 0.55)
    for k in range(4):
        _ridge(draw, level + 0.14 * k, 0.03, _jitter((50, 130 - 12 * k, 190 - 10 * k), rng, 12), rng, 6)
    return picture


def _mountains(rng: Rng) -> Image.Image:
    picture = _sky(rng)
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(2, 5)):
        x, w, top, base = rng.uniform(0, SIDE), rng.uniform(60, 120), SIDE * rng.uniform(0.15, 0.4), SIDE * 0.75
        draw.polygon([(x - w, base), (x, top), (x + w, base)], fill=_jitter((130, 130, 145), rng))
        if rng.random() < 0.7:
            edge = top + (base - top) * 0.25
            draw.polygon([(x - w * 0.25, edge), (x, top), (x + w * 0.25, edge)], fill=(245, 248, 252))
    _ridge(draw, rng.uniform(0.62, 0.75), 0.06, _jitter((110, 150, 95), rng), rng)
    return picture


def _snow(rng: Rng) -> Image.Image:
    picture = _gradient(_jitter((165, 195, 225), rng), _jitter((220, 232, 245), rng, 12))
    draw = ImageDraw.Draw(picture)
    level = rng.uniform(0.5, 0.7)
    for _ in range(rng.integers(0, 6)):
        _tree(draw, rng.uniform(0, SIDE), SIDE * level, rng.uniform(40, 90), rng)
    _ridge(draw, level, 0.05, _jitter((242, 246, 250), rng, 6), rng)
    for _ in range(rng.integers(10, 60)):
        x, y, r = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(0.8, 2.2)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(255, 255, 255))
    return picture


def _desert(rng: Rng) -> Image.Image:
    picture = _gradient(_jitter((140, 195, 235), rng), _jitter((250, 225, 180), rng))
    draw = ImageDraw.Draw(picture)
    level = rng.uniform(0.5, 0.65)
    _ridge(draw, level, 0.1, _jitter((225, 175, 110), rng), rng)
    _ridge(draw, level + 0.15, 0.08, _jitter((235, 190, 125), rng), rng)
    return picture


def _street(rng: Rng) -> Image.Image:
    picture = _sky(rng)
    draw = ImageDraw.Draw(picture)
    level, x = SIDE * rng.uniform(0.6, 0.72), 0.0
    while x < SIDE:
        w, h = rng.uniform(30, 60), rng.uniform(60, 130)
        draw.rectangle((x, level - h, x + w, level), fill=_jitter((185, 150, 130), rng, 45))
        for wy in np.arange(level - h + 8, level - 12, 20):
            for wx in np.arange(x + 6, x + w - 8, 15):
                draw.rectangle((wx, wy, wx + 7, wy + 10), fill=_jitter((225, 235, 245), rng, 20))
        x += w
    draw.rectangle((0, level, SIDE, SIDE), fill=_jitter((120, 122, 128), rng))
    draw.rectangle((0, level, SIDE, level + 8), fill=_jitter((175, 172, 168), rng))
    return picture


def _room(rng: Rng, wall: Colour = (225, 205, 180)) -> Image.Image:
    picture = Image.new("RGB", (SIDE, SIDE), _jitter(wall, rng, 40))
    draw = ImageDraw.Draw(picture)
    level = SIDE * rng.uniform(0.62, 0.75)
    draw.rectangle((0, level, SIDE, SIDE), fill=_jitter((165, 120, 80), rng, 30))
    draw.rectangle((0, level - 5, SIDE, level), fill=_jitter((240, 235, 225), rng, 10))
    if rng.random() < 0.6:
        x, y, s = rng.uniform(10, SIDE - 80), rng.uniform(15, 40), rng.uniform(45, 65)
        draw.rectangle((x, y, x + s, y + s), fill=_jitter((170, 210, 240), rng), outline=(250, 250, 248), width=4)
        draw.line((x + s / 2, y, x + s / 2, y + s), fill=(250, 250, 248), width=3)
    return picture


def _kitchen(rng: Rng) -> Image.Image:
    picture = _room(rng, (215, 228, 225))
    draw = ImageDraw.Draw(picture)
    top = SIDE * rng.uniform(0.68, 0.78)
    draw.rectangle((0, top, SIDE, SIDE), fill=_jitter((190, 150, 105), rng))
    draw.rectangle((0, top, SIDE, top + 7), fill=_jitter((235, 225, 210), rng, 12))
    for x in range(0, SIDE, int(rng.integers(18, 34))):
        draw.line((x, 0, x, top), fill=_jitter((200, 214, 210), rng, 6))
    return picture


def _garden(rng: Rng) -> Image.Image:
    picture = _meadow(rng)
    draw = ImageDraw.Draw(picture)
    level, colour = SIDE * rng.uniform(0.5, 0.62), _jitter((235, 230, 215), rng, 20)
    for slat in range(2, SIDE, int(rng.integers(14, 22))):
        draw.rectangle((slat, level - 26, slat + 7, level + 14), fill=colour)
    draw.rectangle((0, level - 14, SIDE, level - 8), fill=colour)
    for _ in range(rng.integers(6, 20)):
        x, y = rng.uniform(0, SIDE), rng.uniform(level + 20, SIDE)
        draw.line((x, y, x, y + 9), fill=(70, 130, 60), width=2)
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=_jitter((225, 110, 130), rng, 60))
    return picture


def _night_sky(rng: Rng) -> Image.Image:
    picture = _gradient(_jitter((14, 18, 50), rng, 12), _jitter((45, 50, 100), rng, 18))
    draw = ImageDraw.Draw(picture)
    for _ in range(rng.integers(20, 90)):
        x, y, r = rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(0.5, 1.6)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=_jitter((245, 240, 210), rng, 12))
    if rng.random() < 0.4:
        _ridge(draw, rng.uniform(0.75, 0.9), 0.06, _jitter((25, 30, 45), rng, 10), rng)
    return picture


def _open_sky(rng: Rng) -> Image.Image:
    picture = _sky(rng)
    _clouds(ImageDraw.Draw(picture), rng, 9)
    return picture


def _river(rng: Rng) -> Image.Image:
    picture = _meadow(rng)
    draw = ImageDraw.Draw(picture)
    x, w = rng.uniform(60, 160), rng.uniform(40, 80)
    bend = rng.uniform(-70, 70)
    draw.polygon([(x, SIDE * 0.6), (x + w * 0.3, SIDE * 0.6), (x + bend + w, SIDE), (x + bend - w, SIDE)],
                 fill=_jitter((85, 160, 210), rng))  # fmt: skip
    return picture


def _farm(rng: Rng) -> Image.Image:
    picture = _meadow(rng)
    draw = ImageDraw.Draw(picture)
    x, y, w, h = rng.uniform(5, 130), SIDE * rng.uniform(0.5, 0.6), rng.uniform(55, 85), rng.uniform(38, 55)
    colour = _jitter((175, 60, 50), rng, 20)
    draw.rectangle((x, y - h, x + w, y + 6), fill=colour)
    draw.polygon([(x - 6, y - h), (x + w / 2, y - h - 28), (x + w + 6, y - h)], fill=_jitter((90, 75, 70), rng, 14))
    draw.rectangle((x + w * 0.35, y - h * 0.55, x + w * 0.65, y + 6), fill=(245, 240, 230))
    for fx in range(0, SIDE, 26):
        draw.rectangle((fx, y + 8, fx + 4, y + 26), fill=_jitter((150, 115, 80), rng, 8))
    draw.rectangle((0, y + 12, SIDE, y + 16), fill=(150, 115, 80))
    return picture


def _plain(rng: Rng) -> Image.Image:
    """White, one colour, two, stripes or dots, or a blurred mottle like the ground of a photograph."""
    kind = rng.random()
    colour = _jitter((200, 200, 200), rng, 55)
    if kind < 0.3:
        return Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    if kind < 0.55:
        return Image.new("RGB", (SIDE, SIDE), colour)
    if kind < 0.7:
        return _gradient(colour, _jitter((200, 200, 200), rng, 55))
    size = int(rng.integers(3, 12))
    base: npt.NDArray[np.float64] = rng.uniform(30, 235, 3) + rng.normal(0, rng.uniform(8, 40), (size, size, 3))
    mottle = Image.fromarray(np.clip(base, 0, 255).astype(np.uint8))
    return mottle.resize((SIDE, SIDE), Image.Resampling.BICUBIC)


PLACES: dict[str, Callable[[Rng], Image.Image]] = {
    "meadow": _meadow, "forest": _forest, "beach": _beach, "sea": _sea, "mountains": _mountains, "snow": _snow,
    "desert": _desert, "street": _street, "room": _room, "kitchen": _kitchen, "garden": _garden,
    "night sky": _night_sky, "sky": _open_sky, "river": _river, "farm": _farm, "plain": _plain,
}  # fmt: skip
"""By the names that the narrator knows."""
