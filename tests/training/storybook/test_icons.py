"""Icons are found by the names of things, whatever stands behind to say how they are drawn."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from training.storybook.icons import icons_of
from training.storybook.scene import coloured


@pytest.mark.parametrize(
    ("icons", "found"),
    [
        (["cat", "caterpillar", "black-cat", "cat-tongue"], [("cat", "cat")]),
        (["hot-air-balloon-outline", "air-balloon"], [("hot air balloon", "hot-air-balloon-outline")]),
        (["fox-head", "fox-2-fill"], [("fox", "fox-2-fill"), ("fox", "fox-head")]),
        (["cat-thin", "cat", "cat-fill", "cat-line"], [("cat", "cat-fill"), ("cat", "cat")]),  # the two boldest
        (["face", "face-fill"], [("face", "face-fill"), ("face", "face")]),  # a manner that is the whole name
        ([], []),
    ],
)
def test_names(icons: list[str], found: list[tuple[str, str]]) -> None:
    assert list(icons_of(icons, ["cat", "fox", "hot air balloon", "face"])) == found


def test_a_black_icon_gets_a_colour_and_keeps_its_shape() -> None:
    alpha = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    icon = Image.merge("RGBA", (*(Image.new("L", (16, 16)) for _ in range(3)), alpha))
    painted = [coloured(icon, np.random.default_rng(seed)) for seed in range(8)]
    assert all(np.array_equal(np.asarray(one.getchannel("A")), np.asarray(alpha)) for one in painted)
    assert len({one.getpixel((3, 3))[:3] for one in painted}) == 8
    assert all(len(one.convert("RGB").getcolors()) == 1 for one in painted)


def test_a_coloured_icon_keeps_its_colours() -> None:
    icon = Image.new("RGBA", (4, 4), (0, 0, 9, 255))
    assert coloured(icon, np.random.default_rng(0)) is icon
