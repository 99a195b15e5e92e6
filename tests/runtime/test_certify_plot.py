"""The certificate's picture: every point where it belongs, what is allowed in green, the verdict in its colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageColor

from seed_story.certificate import Page
from seed_story.certificate_plot import plot
from seed_story.certify import judge
from seed_story.chart import BAND, BLUE, GREEN, ORANGE, PAPER, RED, Dots, Panel, draw_panel, ticks

BOX = (0, 0, 1000, 400)


def pages(drift: float = 0.0) -> list[Page]:
    ratios = np.exp(np.random.default_rng(0).normal(0, 0.005, 40)) * (1 + drift * np.arange(40) / 40)
    return [Page(i + 1, i % 3 == 0, 200.0, 15 * r, 15.0, r, 240.0, 100.0) for i, r in enumerate(ratios.tolist())]


def where(image: Image.Image, colour: str) -> np.ndarray:
    """Rows and columns of the pixels of a colour, `[n, 2]`."""
    return np.argwhere((np.asarray(image) == ImageColor.getrgb(colour)).all(axis=-1))


def drawn(y: Sequence[float], band: tuple[float, float] | None = None) -> tuple[Image.Image, Panel]:
    values = np.array(y, np.float64)
    panel = Panel("title", "page", "ms", np.arange(1.0, len(values) + 1), [Dots("a", BLUE, values)], band)
    image = Image.new("RGB", (BOX[2], BOX[3]), PAPER)
    draw_panel(image, BOX, panel)
    return image, panel


@pytest.mark.parametrize(("drift", "colour", "other"), [(0.0, GREEN, RED), (0.1, RED, GREEN)])
def test_the_verdict_has_its_colour(drift: float, colour: str, other: str) -> None:
    image = plot(pages(drift), judge(pages(drift)), ("one", "two", "three"))
    assert len(where(image, colour)) > 500
    assert len(where(image, other)) == 0
    assert len(where(image, BLUE)) > 1000 and len(where(image, ORANGE)) > 1000


def test_points_stand_where_their_values_are() -> None:
    image, panel = drawn([0, 1, 2, 3, 4])
    low, high = panel.limits()
    spots = where(image, BLUE)
    spots = spots[spots[:, 0] > 84 - 8]  # without the legend
    left = spots[spots[:, 1] < 140]
    top, bottom = 84, 400 - 74
    assert left[:, 0].mean() == pytest.approx(bottom - (0 - low) / (high - low) * (bottom - top), abs=1.5)
    right = spots[spots[:, 1] > 950]
    assert right[:, 0].mean() == pytest.approx(bottom - (4 - low) / (high - low) * (bottom - top), abs=1.5)


def test_labels_stand_beside_their_points() -> None:
    _, panel = drawn([0, 1, 2, 3, 4])
    image, named = (Image.new("RGB", (BOX[2], BOX[3]), PAPER) for _ in range(2))
    draw_panel(image, BOX, replace(panel, labels=[" "] * 5))  # there is room for labels where there are any
    draw_panel(named, BOX, replace(panel, labels=["a", "b", "c", "d", "e"]))
    changed = np.argwhere((np.asarray(image) != np.asarray(named)).any(axis=-1))
    assert changed[changed[:, 1] < 200][:, 0].mean() > changed[changed[:, 1] > 850][:, 0].mean() + 100
    assert changed[:, 1].min() > 140 and changed[:, 1].max() < BOX[2] - 40  # within the axes


def test_a_single_point_stands_in_the_middle() -> None:
    for x in (5.0, 0.0, -3.0):
        panel = Panel("title", "MB", "nat", np.array([x]), [Dots("a", BLUE, np.array([1.0]))])
        image = Image.new("RGB", (BOX[2], BOX[3]), PAPER)
        draw_panel(image, BOX, panel)
        spots = where(image, BLUE)
        spots = spots[spots[:, 0] > 84 - 8]
        assert spots[:, 1].mean() == pytest.approx((130 + BOX[2] - 40) / 2, abs=1.5)


def test_the_band_covers_what_is_allowed() -> None:
    image, panel = drawn([0, 1, 0, -1, 0], (-3, 3))
    low, high = panel.limits()
    rows = where(image, BAND)[:, 0]
    scale = (400 - 74 - 84) / (high - low)
    assert rows.max() - rows.min() == pytest.approx(6 * scale, abs=4)  # grid lines lie on the edges


def test_one_wild_page_does_not_flatten_the_others_and_is_still_shown() -> None:
    image, panel = drawn([*np.tile([0.0, 1.0], 60), 1000.0])
    assert panel.limits()[1] < 2
    spots = where(image, BLUE)
    assert len(spots[(spots[:, 1] > 940) & (abs(spots[:, 0] - 84) < 10)]) > 10


def test_flat_series_and_lines_can_be_drawn() -> None:
    image, panel = drawn([5.0] * 6)
    assert panel.limits() == (2.5, 7.5)
    assert len(where(image, BLUE)) > 100


@pytest.mark.parametrize(
    ("low", "high", "values", "digits"),
    [
        (0, 8, [0, 1, 2, 3, 4, 5, 6, 7, 8], 0),
        (-3.7, 3.7, [-3, -2, -1, 0, 1, 2, 3], 0),
        (0.1, 0.5, [0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5], 2),
        (1, 100, [20, 40, 60, 80, 100], 0),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, values: list[float], digits: int) -> None:
    found, decimals = ticks(low, high)
    assert found == pytest.approx(values)
    assert decimals == digits
