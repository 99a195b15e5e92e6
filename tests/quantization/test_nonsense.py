"""What a user's own recipe may get wrong beyond its fields: each is told as an error, none ends in a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantization.quantize import quantize_graph
from quantization.recipe import BOUNDS, FOLDER, load_recipe
from seed_story.errors import ConfigError, ExportError, UsageError

ENTRY = load_recipe("int8").graphs["decoder"][0]


@pytest.mark.parametrize("bound", ["NaN", "Infinity", "-Infinity"])
def test_a_bound_that_is_no_number(tmp_path: Path, bound: str) -> None:
    values = json.loads((FOLDER / "int8.json").read_text(encoding="utf-8"))
    values["bounds"] = {figure: {"bound": 12345} for figure in BOUNDS}
    (tmp_path / "mine.json").write_text(json.dumps(values).replace("12345", bound))
    with pytest.raises(ConfigError, match="a bound isn't a number"):
        load_recipe(tmp_path / "mine.json")


@pytest.mark.parametrize("name", ["../recipes/int8", "int8 ", ""])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(UsageError, match="no such recipe"):
        load_recipe(name)


@pytest.mark.parametrize("entries", [["int8"], [{**ENTRY, "regex": "("}], [{"regex": ".*"}]])
@pytest.mark.parametrize("data", [b"", b"not a graph at all, but long enough to be looked at" * 9])
def test_entries_and_graphs_of_nonsense(tmp_path: Path, entries: list, data: bytes) -> None:  # type: ignore[type-arg]
    (tmp_path / "raw.tflite").write_bytes(data)
    for given in (entries, [ENTRY]):
        with pytest.raises(ExportError, match="can't be quantized"):
            quantize_graph(tmp_path / "raw.tflite", tmp_path / "decoder.tflite", given)
    assert not (tmp_path / "decoder.tflite").exists()
