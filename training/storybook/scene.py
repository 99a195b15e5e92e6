"""A page's picture: drawings set into a place, in changing sizes, positions and light."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from training.storybook.places import SIDE, Rng, draw_place

MAIN_SIZE = (0.5, 0.92)
"""Longer side of the main thing, as a share of the picture's."""
_ALONE_SIZE = (0.55, 0.98)
_OTHER_SIZE = (0.24, 0.42)
_TRIES = 30


def compose(things: Sequence[Image.Image], place: str, rng: Rng) -> Image.Image:
    """A picture, RGB, `SIDE` pixels square, of one or more RGBA drawings; the first is the largest."""
    picture = draw_place(place, rng)
    taken: list[tuple[float, float, float, float]] = []
    for index, drawing in enumerate(things):
        low, high = _OTHER_SIZE if index else (_ALONE_SIZE if len(things) == 1 else MAIN_SIZE)
        sprite = _vary(drawing, SIDE * rng.uniform(low, high), rng)
        x, y = _spot(sprite.size, taken, index, len(things), rng)
        taken.append((x, y, x + sprite.width, y + sprite.height))
        if rng.random() < 0.35:
            shadow = Image.new("RGBA", sprite.size, (20, 20, 30, 255))
            shadow.putalpha(sprite.getchannel("A").point(lambda a: a // 3).filter(ImageFilter.GaussianBlur(4)))
            picture.paste(shadow, (int(x) + 4, int(y) + 5), shadow)
        picture.paste(sprite, (int(x), int(y)), sprite)
    return _light(picture, rng)


def coloured(icon: Image.Image, rng: Rng) -> Image.Image:
    """An icon that is all black, RGBA, in a colour of its own, mostly a dark one; any other as it is."""
    if any(channel.getextrema()[1] for channel in icon.split()[:3]):
        return icon
    value = rng.uniform(0, 0.25) if rng.random() < 0.25 else rng.uniform(0.15, 0.8)
    colour = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 1), value))
    painted = Image.new("RGBA", icon.size, tuple(int(c) for c in 255 * colour))
    painted.putalpha(icon.getchannel("A"))
    return painted


def _vary(drawing: Image.Image, side: float, rng: Rng) -> Image.Image:
    scale = side / max(drawing.size)
    stretch = rng.uniform(0.92, 1.08)
    size = (max(1, round(drawing.width * scale * stretch)), max(1, round(drawing.height * scale)))
    sprite = drawing.resize(size, Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        sprite = sprite.rotate(rng.uniform(-14, 14), Image.Resampling.BICUBIC, expand=True)
    return sprite


def _spot(
    size: tuple[int, int], taken: Sequence[tuple[float, float, float, float]], index: int, count: int, rng: Rng
) -> tuple[float, float]:
    """A place for a sprite: the main one near the middle, the others where they cover least of what is there."""
    width, height = size
    room_x, room_y = SIDE - width, SIDE - height
    if index == 0:
        spread = 0.3 if count == 1 else 0.5
        x, y = rng.uniform(0.5 - spread, 0.5 + spread), rng.uniform(0.35, 0.95)
        return x * room_x, y * room_y
    spots = [(rng.uniform(0, 1) * room_x, rng.uniform(0.1, 1) * room_y) for _ in range(_TRIES)]
    return min(spots, key=lambda spot: _covered((*spot, spot[0] + width, spot[1] + height), taken))


def _covered(box: tuple[float, float, float, float], taken: Sequence[tuple[float, float, float, float]]) -> float:
    """Pixels of `box` that lie over other boxes."""
    total = 0.0
    for other in taken:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        total += max(0.0, width) * max(0.0, height)
    return total


def _light(picture: Image.Image, rng: Rng) -> Image.Image:
    """The same scene in another light, print or focus."""
    for enhance, spread in ((ImageEnhance.Brightness, 0.2), (ImageEnhance.Contrast, 0.2), (ImageEnhance.Color, 0.3)):
        picture = enhance(picture).enhance(rng.uniform(1 - spread, 1 + spread))
    chance = rng.random()
    if chance < 0.08:
        picture = picture.convert("L").convert("RGB")
    elif chance < 0.25:
        warm = np.array([rng.uniform(0.85, 1.1), 1.0, rng.uniform(0.85, 1.1)])
        picture = Image.fromarray(np.clip(np.asarray(picture) * warm, 0, 255).astype(np.uint8))
    if rng.random() < 0.15:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.2)))
    return picture
