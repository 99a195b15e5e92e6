"""Changes of scales: kept, refused, applied."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from export.learned_scales import file_name, lacks_scales, read_scales, rescaled, scales_file, write_scales
from model.story_source import load_source
from model.weights import write_safetensors
from quantization.gptq import Floats, Grid, gptq
from quantization.recipe import load_recipe
from seed_story.errors import WeightsError

RNG = np.random.default_rng(0)
GRIDS = {"a": Grid(4, 32), "b": Grid(8)}
SHAPES = {"a": (6, 64), "b": (5, 16)}
GROUPS = {"a": (6, 2), "b": (5, 1)}


def changes() -> dict[str, Floats]:
    return {name: RNG.uniform(-0.2, 0.2, shape).astype(np.float32) for name, shape in GROUPS.items()}


def test_kept_and_read_back_to_half_a_step(tmp_path: Path) -> None:
    given = changes()
    write_scales(given, tmp_path / "scales.safetensors")
    found = read_scales(tmp_path / "scales.safetensors", GRIDS, SHAPES)
    assert list(found) == list(given)
    for name, change in given.items():
        step = np.abs(change).max() / 127
        assert np.abs(found[name] - change).max() <= step * 0.501


def test_no_change_is_none(tmp_path: Path) -> None:
    write_scales({"b": np.zeros((5, 1), np.float32)}, tmp_path / "scales.safetensors")
    assert not read_scales(tmp_path / "scales.safetensors", GRIDS, SHAPES)["b"].any()


@pytest.mark.parametrize("name", ["a", "b"])
def test_codes_stay_and_scales_change(name: str) -> None:
    """The quantizer looks for the largest weight of a group: it must find the changed scale, and the same codes."""
    grid, (outputs, inputs) = GRIDS[name], SHAPES[name]
    matrix = gptq(RNG.normal(size=(outputs, inputs)).astype(np.float32), np.eye(inputs), grid)
    change = changes()[name]
    groups, others = (m.reshape(*GROUPS[name], -1) for m in (matrix, rescaled(matrix, grid, change)))
    before, after = (np.abs(m).max(-1) / np.float32(grid.top) for m in (groups, others))
    np.testing.assert_allclose(after, before * (1 + change), rtol=2**-8 if grid.block else 1e-6)
    if grid.block:
        np.testing.assert_array_equal(after, after.astype(ml_dtypes.bfloat16).astype(np.float32))
    codes, same = (np.round(m / s[..., None]) for m, s in ((groups, before), (others, after)))
    np.testing.assert_array_equal(codes, same)
    assert np.abs(codes).max() == grid.top


def test_a_group_of_zeros_stays_one() -> None:
    matrix = np.zeros((2, 32), np.float32)
    np.testing.assert_array_equal(rescaled(matrix, Grid(4, 32), np.full((2, 1), 0.1, np.float32)), matrix)


@pytest.mark.parametrize(
    ("grids", "shapes", "said"),
    [
        ({"a": GRIDS["a"]}, SHAPES, r"isn't of this recipe.*got b"),
        (GRIDS | {"a": Grid(4, 16)}, SHAPES, r"scales of a are others.*\(6, 2\).*\(6, 4\)"),
        (GRIDS, SHAPES | {"b": (4, 16)}, r"scales of b are others"),
    ],
)
def test_those_of_another_recipe_are_refused(
    tmp_path: Path, grids: dict[str, Grid], shapes: dict[str, tuple[int, ...]], said: str
) -> None:
    write_scales(changes(), tmp_path / "scales-x.safetensors")
    with pytest.raises(WeightsError, match=said):
        read_scales(tmp_path / "scales-x.safetensors", grids, shapes)


def test_a_file_without_steps_is_refused(tmp_path: Path) -> None:
    write_safetensors({"a": np.zeros((6, 2), np.int8)}, tmp_path / "scales-x.safetensors")
    with pytest.raises(WeightsError, match="isn't of this recipe"):
        read_scales(tmp_path / "scales-x.safetensors", GRIDS, SHAPES)


def test_only_a_recipe_that_asks_for_them_gets_them(tmp_path: Path) -> None:
    recipe, source = load_recipe("int4"), load_source("tiny")
    assert recipe.scales is not None
    trained = replace(source, learned=tmp_path)
    assert scales_file(recipe, trained) is None and lacks_scales(recipe, trained)
    file = tmp_path / file_name(recipe.scales)
    file.touch()
    assert scales_file(recipe, trained) == file and not lacks_scales(recipe, trained)
    assert scales_file(load_recipe("int8"), trained) is None and not lacks_scales(load_recipe("int8"), trained)
    assert scales_file(recipe, source) is None
    turned = replace(trained, rotation=tmp_path / "rotation.safetensors")  # by another than they were learned for
    assert scales_file(recipe, turned) is None and lacks_scales(recipe, turned)
    named = tmp_path / "mine.safetensors"
    assert all(scales_file(recipe, replace(one, scales=named)) == named for one in (source, trained, turned))
