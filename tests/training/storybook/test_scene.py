"""A page's picture: its form, who is the largest in it, and that a seed decides all of it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from training.storybook import narrator, places, scene
from training.storybook.places import SIDE, draw_place
from training.storybook.scene import compose

COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200))


def disc(colour: tuple[int, int, int]) -> Image.Image:
    """As wide when rotated."""
    picture = Image.new("RGBA", (200, 200))
    ImageDraw.Draw(picture).ellipse((0, 0, 199, 199), fill=(*colour, 255))
    return picture


DISCS = [disc(colour) for colour in COLOURS]


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_picture_is_square_and_without_alpha(count: int) -> None:
    picture = compose(DISCS[:count], "meadow", rng(0))
    assert (picture.mode, picture.size) == ("RGB", (224, 224)) == ("RGB", (SIDE, SIDE))


@pytest.fixture
def plain_light(monkeypatch: pytest.MonkeyPatch) -> None:
    """White ground and no change of light, so that a colour tells which thing a pixel belongs to."""
    monkeypatch.setattr(scene, "draw_place", lambda place, rng: Image.new("RGB", (SIDE, SIDE), (255, 255, 255)))
    monkeypatch.setattr(scene, "_light", lambda picture, rng: picture)


def extent(picture: Image.Image, colour: tuple[int, int, int]) -> int:
    """The longer side of the box around all pixels of a colour; 0 if there are none."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(axis=-1))
    return int(max(np.ptp(rows), np.ptp(columns))) + 1 if len(rows) else 0


@pytest.mark.usefixtures("plain_light")
def test_the_main_thing_is_the_largest_and_every_thing_can_be_seen() -> None:
    for seed in range(15):
        picture = compose(DISCS, "meadow", rng(seed))
        main, *others = (extent(picture, colour) for colour in COLOURS)
        assert min(main, *others) > SIDE * 0.15, seed
        assert main > 1.05 * max(others), seed


@pytest.mark.usefixtures("plain_light")
def test_a_thing_alone_is_large() -> None:
    sizes = [extent(compose(DISCS[:1], "meadow", rng(seed)), COLOURS[0]) / SIDE for seed in range(20)]
    assert min(sizes) > 0.5
    assert max(sizes) > 0.85


@pytest.mark.usefixtures("plain_light")
def test_things_change_their_side() -> None:
    half = disc(COLOURS[0])
    half.paste((0, 0, 200, 255), (100, 40, 160, 160))  # blue right of the middle
    sides = set()
    for seed in range(12):
        pixels = np.asarray(compose([half], "meadow", rng(seed)))
        columns = [np.nonzero((pixels == colour).all(axis=-1))[1].mean() for colour in (COLOURS[0], COLOURS[2])]
        sides.add(columns[0] < columns[1])
    assert sides == {True, False}


def test_the_seed_decides_the_picture() -> None:
    first, again, other = (compose(DISCS, "forest", rng(seed)).tobytes() for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("place", narrator.PLACES)
def test_each_place_is_drawn_anew(place: str) -> None:
    first, again, other = (draw_place(place, rng(seed)) for seed in (3, 3, 5))
    assert (first.mode, first.size) == ("RGB", (SIDE, SIDE))
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_places_differ() -> None:
    """Not by chance alone: mean pictures of eight seeds, which lie further apart than mean pictures of one place."""

    def mean(place: str, seeds: range) -> np.ndarray:
        return np.mean([np.asarray(draw_place(place, rng(s)).resize((8, 8)), np.float64) for s in seeds], axis=0)

    drawn = {place: mean(place, range(8)) for place in narrator.PLACES if place != "plain"}
    apart = [np.abs(a - b).mean() for name, a in drawn.items() for other, b in drawn.items() if name < other]
    assert min(apart) > 5


def test_the_painter_and_the_narrator_know_the_same_places() -> None:
    assert tuple(places.PLACES) == narrator.PLACES
    assert narrator.PLACES[-1] == "plain"  # which `build` draws apart from the others
    with pytest.raises(KeyError, match="moon base"):
        draw_place("moon base", rng(0))
