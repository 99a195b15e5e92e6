"""Recipes are data: read strictly, by name or from a file."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantization.recipe import BOUNDS, FOLDER, OPTIONAL_BOUNDS, load_recipe, recipe_names
from seed_story.contract import GRAPHS
from seed_story.errors import ConfigError, UsageError


@pytest.mark.parametrize("name", recipe_names())
def test_own_recipes(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.summary
    assert set(recipe.graphs) == set(GRAPHS)
    assert set(BOUNDS) <= set(recipe.bounds) <= {*BOUNDS, *OPTIONAL_BOUNDS}
    values = json.loads((FOLDER / f"{name}.json").read_text())
    assert all(entry["why"] for entry in values["bounds"].values())


def test_bounds_loosen_with_the_bits() -> None:
    order = [load_recipe(name).bounds for name in ("float32", "float16", "int8")]
    for tighter, looser in itertools.pairwise(order):
        for figure in (*BOUNDS, *OPTIONAL_BOUNDS):
            if figure.endswith(("_nat", "_ratio")):
                assert tighter[figure] <= looser[figure]
            else:
                assert tighter[figure] >= looser[figure]


def test_default_bound_is_that_of_the_project() -> None:
    assert load_recipe("int8").bounds["decoder_mean_kl_nat"] <= 0.005


def test_some_bounds_may_be_absent(tmp_path: Path) -> None:
    values = json.loads((FOLDER / "int8.json").read_text())
    for figure in OPTIONAL_BOUNDS:
        values["bounds"].pop(figure)
    (tmp_path / "mine.json").write_text(json.dumps(values))
    assert set(load_recipe(tmp_path / "mine.json").bounds) == set(BOUNDS)
    values["bounds"]["decoder_perplexity_ratio"] = {"bound": 1.5, "why": "x"}
    (tmp_path / "mine.json").write_text(json.dumps(values))
    assert load_recipe(tmp_path / "mine.json").bounds["decoder_perplexity_ratio"] == 1.5


@pytest.mark.parametrize("name", ["nope", "", "int5", "../recipes/int8", "int8 ", "INT8"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(name)
    assert caught.value.exit_code == 2
    assert all(known in str(caught.value) for known in recipe_names())


def test_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text((FOLDER / "int8.json").read_text().replace('"int8"', '"mine"', 1))
    for given in (path, str(path)):
        assert load_recipe(given).name == "mine"
    with pytest.raises(UsageError, match="can't be read"):
        load_recipe(tmp_path / "none.json")


def test_a_decoder_is_rotated_only_on_demand(tmp_path: Path) -> None:
    assert load_recipe("int8").rotated
    assert not load_recipe("float32").rotated
    values = json.loads((FOLDER / "int8.json").read_text())
    del values["rotated"]  # as files from before are
    (tmp_path / "mine.json").write_text(json.dumps(values))
    assert not load_recipe(tmp_path / "mine.json").rotated


def test_an_int8_cache_is_asked_for() -> None:
    """And nothing else of int8 changes by it."""
    plain, coded = load_recipe("int8"), load_recipe("int8-cache8")
    assert (plain.cache, load_recipe("float32").cache, coded.cache) == ("float32", "float32", "int8")
    assert (coded.graphs, coded.rotated) == (plain.graphs, plain.rotated)


def test_own_file_that_extends(tmp_path: Path) -> None:
    """What it says counts, and what it doesn't say is the other's."""
    path, int8 = tmp_path / "mine.json", load_recipe("int8")
    path.write_text(json.dumps({"extends": "int8", "name": "mine", "rotated": False}))
    assert load_recipe(path) == replace(int8, name="mine", rotated=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.pop("name"),
        lambda values: values.pop("graphs"),
        lambda values: values["graphs"].pop("vit"),
        lambda values: values["graphs"].update(decoder=5),
        lambda values: values.pop("bounds"),
        lambda values: values["bounds"].pop("decoder_mean_kl_nat"),
        lambda values: values["bounds"].update(decoder_top1=0.5),
        lambda values: values["bounds"]["decoder_top1"].update(bound="much"),
        lambda values: values["bounds"]["decoder_perplexity_ratio"].pop("bound"),
        lambda values: values.update(rotated="yes"),
        lambda values: values.update(cache="int4"),
        lambda values: values.update(cache=None),
        lambda values: values.update(extends="int5"),
        lambda values: values.update(extends="int8-cache8"),
        lambda values: values.update(extends="../recipes/int8"),
        lambda values: values.update(extends=["int8"]),
    ],
)
def test_damaged_file(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((FOLDER / "int8.json").read_text())
    change(values)
    (tmp_path / "bad.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"bad\.json") as caught:
        load_recipe(tmp_path / "bad.json")
    assert caught.value.expected and caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "\xff"])
def test_file_that_is_no_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        load_recipe(tmp_path / "bad.json")
