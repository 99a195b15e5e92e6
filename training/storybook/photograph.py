"""Drawings made to look like photographs: bent, rounded, lit from one side, textured, in duller colours.

A network that learned from flat drawings alone knows things by their outlines and palettes, which no photograph has
(compare "stylized" training pictures, arXiv 1811.12231). Nothing here is a photograph.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, ImageOps
from scipy.ndimage import gaussian_filter

from training.storybook.places import SIDE, Rng

Plane = npt.NDArray[np.float64]

_LUMINANCE = (0.299, 0.587, 0.114)
_WHITE_GROUND = 0.5
"""Share of pictures on white, as cut-outs are."""
_SIZE = (0.6, 1.08)
"""Longer side of the thing, as a share of the picture's: photographs cut off an ear now and then."""
_BENDS = 4
"""Cells a side of the grid that a drawing is bent by."""


def photograph(drawing: Image.Image, rng: Rng) -> Image.Image:
    """A picture, RGB, `SIDE` pixels square, of one RGBA drawing that might be a solid thing before a camera."""
    bent = _bent(drawing, rng) if rng.random() < 0.7 else ImageOps.expand(drawing, 1)
    if rng.random() < 0.7:
        bent = bent.filter(ImageFilter.MedianFilter(int(rng.choice([3, 5]))))  # thin outlines go
    thing = _solid(bent, rng)
    thing = thing.crop(thing.getchannel("A").getbbox())
    scale = SIDE * rng.uniform(*_SIZE) / max(thing.size)
    size = (max(1, round(thing.width * scale)), max(1, round(thing.height * scale)))
    thing = thing.resize(size, Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.4:
        thing = thing.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
    picture = Image.new("RGB", (SIDE, SIDE), "white") if rng.random() < _WHITE_GROUND else _ground(rng)
    left, top = (int(rng.uniform(0.3, 0.7) * (SIDE - side)) for side in thing.size)
    picture.paste(thing, (left, top), thing)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.3))) if rng.random() < 0.3 else picture


def _bent(drawing: Image.Image, rng: Rng) -> Image.Image:
    """The drawing stretched, and bent smoothly: real things have other proportions."""
    width, height = max(8, round(drawing.width * np.exp(rng.uniform(-0.3, 0.3)))), drawing.height
    margin = max(_BENDS, max(width, height) // 10)
    sheet = Image.new("RGBA", (width + 2 * margin, height + 2 * margin))
    sheet.paste(drawing.resize((width, height), Image.Resampling.BICUBIC), (margin, margin))
    x, y = (np.linspace(0, side, _BENDS + 1) for side in sheet.size)
    moved = np.stack(np.meshgrid(x, y), axis=-1) + rng.normal(0, 0.04 * max(sheet.size), (_BENDS + 1, _BENDS + 1, 2))
    cells = []
    for row in range(_BENDS):
        for column in range(_BENDS):
            box = (int(x[column]), int(y[row]), int(x[column + 1]), int(y[row + 1]))
            corners = ((row, column), (row + 1, column), (row + 1, column + 1), (row, column + 1))
            cells.append((box, tuple(float(v) for corner in corners for v in moved[corner])))
    return sheet.transform(sheet.size, Image.Transform.MESH, cells, Image.Resampling.BILINEAR)


def _solid(drawing: Image.Image, rng: Rng) -> Image.Image:
    """The drawing in duller colours, rounded, lit and textured; RGBA."""
    pixels = np.asarray(drawing, np.float64) / 255
    alpha, colours = pixels[..., 3], _duller(pixels[..., :3], rng)
    colours *= _light(alpha, colours @ _LUMINANCE, rng)[..., None]
    grain = _noise(alpha.shape, rng, int(rng.integers(4, 7)), np.exp(rng.uniform(0, 1.6)))
    colours *= np.exp(rng.uniform(0.03, 0.22) * grain)[..., None]
    colours += rng.uniform(0, 0.05) * _noise(alpha.shape, rng, 5)[..., None] * rng.normal(size=3)
    return Image.fromarray((255 * np.dstack([np.clip(colours, 0, 1), alpha])).astype(np.uint8))


def _duller(colours: Plane, rng: Rng) -> Plane:
    """Less saturated, now and then tinted, and in another exposure."""
    grey = (colours @ _LUMINANCE)[..., None]
    colours = grey + rng.uniform(0.15, 1) * (colours - grey)
    if rng.random() < 0.4:  # mostly towards brown: fur, wood, bread
        colours = colours * rng.uniform((0.7, 0.65, 0.4), (1.2, 1.05, 1.0))
    return np.asarray(np.clip(colours, 0.02, 1) ** np.exp(rng.uniform(-0.2, 0.6)))


def _light(alpha: Plane, grey: Plane, rng: Rng) -> Plane:
    """What falls on a body that is thickest in the middle of its outline, and on what is bright (Lambert's law)."""
    radius = max(alpha.shape) / rng.uniform(12, 30)
    height = np.sqrt(np.clip(2 * gaussian_filter(alpha, radius) - 1, 0, 1) * alpha + 1e-3)
    height += rng.uniform(0, 0.25) * gaussian_filter(grey * alpha, max(1.0, radius / 4))
    slope_y, slope_x = np.gradient(height * radius * rng.uniform(0.8, 2))
    turn = rng.uniform(-np.pi, np.pi) if rng.random() < 0.3 else rng.uniform(-2.6, -0.5)  # mostly from above
    rise = rng.uniform(0.5, 1.2)
    facing = np.sin(rise) - np.cos(rise) * (np.cos(turn) * slope_x + np.sin(turn) * slope_y)
    facing /= np.sqrt(1 + slope_x**2 + slope_y**2)
    around = rng.uniform(0.3, 0.6)
    return np.asarray(around + (1 - around) * np.clip(facing, 0, 1.3) / np.sin(rise))


def _noise(shape: tuple[int, ...], rng: Rng, octaves: int, stretch: float = 1.0) -> Plane:
    """Clouds of several sizes, of unit variance; `stretch` draws them out in one direction, as hair."""
    side = 2 * max(shape)
    clouds = np.zeros((side, side), np.float32)
    for octave in range(octaves):
        cells = 2 ** (octave + 2)
        coarse = rng.normal(size=(max(2, int(cells / stretch)), cells)).astype(np.float32)
        clouds += 0.6**octave * np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
    turned = Image.fromarray(clouds).rotate(rng.uniform(0, 180), Image.Resampling.BILINEAR)
    top, left = ((side - extent) // 2 for extent in shape)
    noise = np.asarray(turned, np.float64)[top : top + shape[0], left : left + shape[1]]
    return np.asarray(noise / max(float(noise.std()), 1e-6))


def _ground(rng: Rng) -> Image.Image:
    """A blurred ground of one colour and its neighbours."""
    shades = (
        rng.uniform(40, 210, 3) + rng.uniform(8, 45) * _noise((SIDE, SIDE), rng, int(rng.integers(3, 7)))[..., None]
    )
    shades = shades + rng.uniform(0, 20) * _noise((SIDE, SIDE), rng, 3)[..., None] * rng.normal(size=3)
    picture = Image.fromarray(np.clip(shades, 0, 255).astype(np.uint8))
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 4)))
