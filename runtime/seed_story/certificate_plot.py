"""The certificate as a picture: time and memory page by page, the fitted lines, and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from seed_story.certificate import (
    FIRST_PAGE,
    MEMORY_BOUND_MIB,
    PASS,
    TIME_BOUND_PERCENT,
    WINDOW,
    Finding,
    Page,
    theil_sen,
    verdict,
)
from seed_story.chart import BLUE, GREEN, INK, ORANGE, PALE, PAPER, RED, Dots, Panel, draw_panel, font, save_image

_WIDTH, _HEAD, _PANEL = 1600, 330, 430  # px


def save_plot(file: Path, pages: Sequence[Page], findings: Sequence[Finding], caption: Sequence[str]) -> None:
    """Draws it, and writes it whole or not at all.

    Args:
        caption: lines about what was measured.

    Raises:
        SeedStoryError: it can't be written.
    """
    save_image(file, plot(pages, findings, caption))


def plot(pages: Sequence[Page], findings: Sequence[Finding], caption: Sequence[str]) -> Image.Image:
    """The picture, RGB."""
    panels = [_time_panel(pages, findings[0]), _raw_panel(pages), _memory_panel(pages)]
    image = Image.new("RGB", (_WIDTH, _HEAD + _PANEL * len(panels)), PAPER)
    _head(ImageDraw.Draw(image), findings, caption)
    for index, panel in enumerate(panels):
        top = _HEAD + index * _PANEL
        draw_panel(image, (0, top, _WIDTH, top + _PANEL), panel)
    return image


def _head(draw: ImageDraw.ImageDraw, findings: Sequence[Finding], caption: Sequence[str]) -> None:
    decided, _ = verdict(findings)
    draw.text((40, 30), decided, font=font(72), fill=GREEN if decided == PASS else RED)
    draw.text((270, 38), "Does the story cost the same on every page?", font=font(36), fill=INK)
    for index, line in enumerate(caption):
        draw.text((270, 92 + 28 * index), line, font=font(20), fill=PALE)
    for index, finding in enumerate(findings):
        line = f"{finding.name}: {finding.text()}: {finding.outcome}"
        draw.text((40, 190 + 32 * index), line, font=font(24), fill=INK)


def _column(pages: Sequence[Page], name: str) -> NDArray[np.float64]:
    return np.array([getattr(page, name) for page in pages], np.float64)


def _fit(values: NDArray[np.float64]) -> tuple[float, float]:
    """Of the Theil-Sen line through the pages that count: its values on page 5 and on the last page."""
    counted = values[FIRST_PAGE - 1 :]
    steps = np.arange(len(counted))
    slope = float(theil_sen(counted))
    level = float(np.median(counted - slope * steps))
    return level, level + slope * (len(counted) - 1)


def _dots(name: str, colour: str, pages: Sequence[Page], values: NDArray[np.float64]) -> Dots:
    first, last = _fit(values)
    return Dots(name, colour, values, ((FIRST_PAGE, first), (len(pages), last)))


def _time_panel(pages: Sequence[Page], trend: Finding) -> Panel:
    ratios = _column(pages, "ratio")
    level, _ = _fit(ratios)
    dots = _dots("page; Theil-Sen line and the interval of its end", BLUE, pages, 100 * (ratios / level - 1))
    return Panel(
        f"Time per token beside a short story's (green: within {TIME_BOUND_PERCENT:g} % of page {FIRST_PAGE})",
        "page",
        f"change since page {FIRST_PAGE}, %",
        _column(pages, "page"),
        [replace(dots, interval=(trend.low, trend.high))],
        (-TIME_BOUND_PERCENT, TIME_BOUND_PERCENT),
    )


def _raw_panel(pages: Sequence[Page]) -> Panel:
    return Panel(
        "Time per token as it was, the machine's noise included (lower quartile of each page)",
        "page",
        "ms per token",
        _column(pages, "page"),
        [
            _dots("this story", BLUE, pages, _column(pages, "ms_per_token")),
            _dots("short story", ORANGE, pages, _column(pages, "short_ms_per_token")),
        ],
    )


def _memory_panel(pages: Sequence[Page]) -> Panel:
    series = []
    for name, colour, column in (("resident", BLUE, "resident_mib"), ("private", ORANGE, "private_mib")):
        values = _column(pages, column)
        start = np.median(values[FIRST_PAGE - 1 : FIRST_PAGE - 1 + WINDOW])
        series.append(_dots(name, colour, pages, values - start))
    return Panel(
        f"Memory (green: within {MEMORY_BOUND_MIB:g} MiB of page {FIRST_PAGE}; less is allowed)",
        "page",
        f"change since page {FIRST_PAGE}, MiB",
        _column(pages, "page"),
        series,
        (-MEMORY_BOUND_MIB, MEMORY_BOUND_MIB),
    )
