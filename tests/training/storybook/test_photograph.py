"""Drawings made to look like photographs: their form, and what of a drawing they keep and lose."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from training.storybook import photograph as photographing
from training.storybook.photograph import photograph
from training.storybook.places import SIDE


def disc(colour: tuple[int, int, int] = (200, 120, 40)) -> Image.Image:
    picture = Image.new("RGBA", (200, 120))
    ImageDraw.Draw(picture).ellipse((0, 0, 199, 119), fill=(*colour, 255))
    return picture


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("seed", range(12))
def test_a_seed_decides_all_of_a_square_picture(seed: int) -> None:
    picture = photograph(disc(), rng(seed))
    assert (picture.mode, picture.size) == ("RGB", (SIDE, SIDE))
    assert picture.tobytes() == photograph(disc(), rng(seed)).tobytes() != photograph(disc(), rng(seed + 1)).tobytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 3)])
def test_the_smallest_drawings(size: tuple[int, int]) -> None:
    for seed in range(6):
        assert photograph(Image.new("RGBA", size, "red"), rng(seed)).size == (SIDE, SIDE)


def test_an_empty_drawing_is_only_ground() -> None:
    assert photograph(Image.new("RGBA", (50, 50)), rng(0)).size == (SIDE, SIDE)


def test_the_thing_is_large_and_on_white_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(photographing, "_WHITE_GROUND", 1.0)
    for seed in range(20):
        dark = np.asarray(photograph(disc((60, 40, 30)), rng(seed)).convert("L")) < 200
        rows, columns = np.nonzero(dark)
        assert 0.5 * SIDE < max(np.ptp(rows), np.ptp(columns)) < SIDE
    monkeypatch.setattr(photographing, "_WHITE_GROUND", 0.5)
    white = [photograph(disc(), rng(seed)).getpixel((0, 0)) == (255, 255, 255) for seed in range(60)]
    assert 0.3 < np.mean(white) < 0.7


def test_light_falls_on_one_side_of_a_body_and_texture_on_all_of_it() -> None:
    """A flat drawing has one brightness; a photograph of the thing has a range, and its middle isn't smooth."""
    for seed in range(8):
        solid = photographing._solid(disc(), rng(seed))
        inside = np.asarray(solid.convert("L"), np.float64)[20:100, 30:170]
        assert inside.std() > 4, seed
        assert np.abs(np.diff(inside, axis=1)).mean() > 0.2, seed
        np.testing.assert_array_equal(np.asarray(solid.getchannel("A")), np.asarray(disc().getchannel("A")))


def test_bodies_are_round_and_mostly_lit_from_above() -> None:
    """The light is mostly from above: then the upper half of a ball is brighter than the lower one."""
    alpha = np.asarray(disc().getchannel("A"), np.float64) / 255
    upper_brighter = []
    for seed in range(40):
        light = photographing._light(alpha, np.zeros_like(alpha), rng(seed))
        upper_brighter.append(light[:60][alpha[:60] > 0].mean() > light[60:][alpha[60:] > 0].mean())
    assert 0.7 < np.mean(upper_brighter) < 1


def test_bending_moves_the_outline_and_keeps_the_thing() -> None:
    bent = photographing._bent(disc(), rng(3))
    covered = np.asarray(bent.getchannel("A"), np.float64).sum() / 255
    assert 0.5 < covered / (np.pi * 100 * 60) < 2
    assert bent.size != disc().size
