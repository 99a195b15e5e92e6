"""Scatter charts with Pillow: the device wheel has no plotting library."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from seed_story.errors import SeedStoryError, UsageError
from seed_story.files import whole_file

INK, PALE, GRID, PAPER = "#1f2430", "#5b6472", "#e3e6eb", "#ffffff"
BLUE, ORANGE, GREEN, RED, PURPLE, BAND = "#1f5fa8", "#d9730d", "#1a7f45", "#c0262d", "#7b3fa0", "#e2f2e6"

_LEFT, _RIGHT, _TOP, _BOTTOM = 130, 40, 84, 74  # px around the axes: room for the words
_DOT = 4  # px, radius
_MARGIN = 0.04
_ASIDE = 14  # px, from one series' points to the next one's, where points have intervals
_FONT, _SMALL = 24, 20  # px

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Dots:
    """A series: points, and a line fitted to them if there is one.

    Args:
        y: `[n]`, one for each x of the panel.
        line: two points `(x, y)`.
        interval: y from and to, of where the line may end.
        spans: `[n, 2]`, y from and to of each point; the points are then joined, and stand beside other series' points.
    """

    name: str
    colour: str
    y: NDArray[np.float64]
    line: tuple[tuple[float, float], tuple[float, float]] | None = None
    interval: tuple[float, float] | None = None
    spans: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Panel:
    """One chart.

    Args:
        x: `[n]`.
        labels: words beside the points of the first series, one for each; none by default.
        band: y from and to, what is allowed; None for no band.
        legend: whether to name the series.
    """

    title: str
    x_name: str
    y_name: str
    x: NDArray[np.float64]
    series: Sequence[Dots]
    band: tuple[float, float] | None = None
    labels: Sequence[str] = ()
    legend: bool = True

    def limits(self) -> tuple[float, float]:
        """The y axis: the band, the lines, and all but the wildest points."""
        ends = [edge for dots in self.series for edge in np.percentile(dots.y, (2, 98))]
        ends += [y for dots in self.series for _, y in dots.line or ()]
        ends += [y for dots in self.series for y in dots.interval or ()]
        ends += [float(edge(dots.spans)) for dots in self.series if dots.spans is not None for edge in (np.min, np.max)]
        ends += self.band or ()
        low, high = min(ends), max(ends)
        room = 0.12 * (high - low) or 0.5 * abs(high) or 1
        return low - room, high + room

    def extent(self) -> tuple[float, float]:
        """The x axis: from the first point to the last, a little more for intervals and labels; around the only one."""
        low, high = float(self.x.min()), float(self.x.max())
        if low == high:
            return low - (abs(low) or 1) / 2, low + (abs(low) or 1) / 2
        roomy = bool(self.labels) or any(dots.spans is not None for dots in self.series)
        more = _MARGIN * (high - low) if roomy else 0.0
        return low - more, high + more


def check_plot(file: Path) -> None:
    """Finds out whether a plot can be written to `file`, before the minutes that its figures take.

    Raises:
        UsageError: the name isn't a PNG's, or there is no such folder.
        SeedStoryError: nothing can be written there.
    """
    if file.suffix.lower() != ".png":
        raise UsageError("the plot is a PNG file", got=file, expected="a name that ends with .png")
    if not file.parent.is_dir():
        raise UsageError("the folder of the plot doesn't exist", got=file.parent, expected="a folder")
    if file.is_dir():
        raise UsageError("the plot's name is a folder's", got=file, expected="a file")
    if not os.access(file.parent, os.W_OK):
        raise _unwritable(file, "no permission to write to its folder")


def save_image(file: Path, image: Image.Image) -> None:
    """Writes a PNG whole or not at all.

    Raises:
        SeedStoryError: it can't be written.
    """
    try:
        with whole_file(file) as hidden:
            image.save(hidden, format="PNG")
    except OSError as error:
        raise _unwritable(file, error.strerror or error) from error


def _unwritable(file: Path, got: object) -> SeedStoryError:
    return SeedStoryError(f"the plot {file} can't be written", got=got, hint="Give another --plot.")


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font."""
    try:
        return ImageFont.load_default(size)
    except (ImportError, OSError):  # a Pillow built without FreeType has one size only
        return ImageFont.load_default()


def draw_panel(image: Image.Image, box: Box, panel: Panel) -> None:
    """Draws a chart, its words included, into `box` (left, top, right, bottom; pixels)."""
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = box[0] + _LEFT, box[1] + _TOP, box[2] - _RIGHT, box[3] - _BOTTOM
    low, high = panel.limits()
    x_low, x_high = panel.extent()

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        return left + across * (right - left), bottom - (y - low) / (high - low) * (bottom - top)

    if panel.band:
        draw.rectangle((left, place(x_low, panel.band[1])[1], right, place(x_low, panel.band[0])[1]), fill=BAND)
    _axes(draw, (left, top, right, bottom), panel, place)
    for index, dots in enumerate(panel.series):
        later = len(panel.series) - 1 - index
        joined = dots.spans is not None
        radius = _DOT + (2 if joined else 3 * later)  # what lies below still shows
        aside = _ASIDE * ((len(panel.series) - 1) / 2 - later) if joined else 0.0
        if joined:
            _join(draw, dots, panel.x, place, aside)
        for x, y in zip(panel.x.tolist(), dots.y.tolist(), strict=True):
            shown = min(max(y, low), high)
            beyond = int(y > shown) - int(y < shown)
            across, height = place(x, shown)
            _dot(draw, (across + aside, height), dots.colour, radius, beyond=beyond)
        if dots.line:
            draw.line([place(*dots.line[0]), place(*dots.line[1])], fill=dots.colour, width=4)
        for end in dots.interval or ():
            x, y = place(x_high, end)
            draw.line([(x - 12, y), (x + 12, y)], fill=dots.colour, width=4)
            draw.line([(x, y), place(x_high, sum(dots.interval or ()) / 2)], fill=dots.colour, width=4)
    for label, x, y in zip(panel.labels, panel.x.tolist(), panel.series[0].y.tolist(), strict=False):
        across, height = place(x, y)
        before = across > (left + right) / 2  # towards the middle, where there is room
        side = -3 * _DOT if before else 3 * _DOT
        draw.text((across + side, height), label, font=font(_SMALL), fill=INK, anchor="rm" if before else "lm")
    if panel.legend:
        _legend(draw, right, box[1] + 44, panel)


def _join(
    draw: ImageDraw.ImageDraw,
    dots: Dots,
    across: NDArray[np.float64],
    place: Callable[[float, float], tuple[float, float]],
    aside: float,
) -> None:
    """A line through the points, and each one's interval, some pixels `aside`."""
    assert dots.spans is not None

    def at(x: float, y: float) -> tuple[float, float]:
        right, height = place(x, y)
        return right + aside, height

    draw.line([at(x, y) for x, y in zip(across.tolist(), dots.y.tolist(), strict=True)], fill=dots.colour, width=2)
    for x, (low, high) in zip(across.tolist(), dots.spans.tolist(), strict=True):
        draw.line([at(x, low), at(x, high)], fill=dots.colour, width=2)


def _dot(draw: ImageDraw.ImageDraw, at: tuple[float, float], colour: str, radius: int, *, beyond: int) -> None:
    """A point; a triangle at the edge, towards it, for one that is beyond."""
    x, y = at
    if beyond:
        draw.polygon([(x, y - 8 * beyond), (x - 6, y), (x + 6, y)], fill=colour)
    else:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def _axes(
    draw: ImageDraw.ImageDraw, box: Box, panel: Panel, place: Callable[[float, float], tuple[float, float]]
) -> None:
    left, top, right, bottom = box
    draw.text((left - 90, top - 72), panel.title, font=font(_FONT), fill=INK)
    draw.text((left - 90, top - 30), panel.y_name, font=font(_SMALL), fill=PALE)
    draw.text(((left + right) / 2, bottom + 56), panel.x_name, font=font(_SMALL), fill=PALE, anchor="ms")
    values, digits = ticks(*panel.limits())
    for value in values:
        height = place(0, value)[1]
        draw.line((left, height, right, height), fill=PALE if value == 0 else GRID, width=2)
        draw.text((left - 12, height), f"{value:.{digits}f}", font=font(_SMALL), fill=INK, anchor="rm")
    for value in ticks(*panel.extent())[0]:
        across = place(value, 0)[0]
        draw.line((across, bottom, across, bottom + 8), fill=INK, width=2)
        draw.text((across, bottom + 30), f"{value:g}", font=font(_SMALL), fill=INK, anchor="ms")
    draw.rectangle((left, top, right, bottom), outline=INK, width=2)


def _legend(draw: ImageDraw.ImageDraw, right: float, middle: float, panel: Panel) -> None:
    """Names from the right edge leftwards."""
    for dots in reversed(panel.series):
        draw.text((right, middle), dots.name, font=font(_SMALL), fill=INK, anchor="rm")
        right -= draw.textlength(dots.name, font=font(_SMALL)) + 16
        _dot(draw, (right, middle), dots.colour, _DOT + 2, beyond=0)
        right -= 32


def ticks(low: float, high: float, most: int = 8) -> tuple[list[float], int]:
    """Round numbers between two others, at most about `most` of them, and the decimals that they need."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)], max(0, -math.floor(math.log10(step) + 1e-9))
