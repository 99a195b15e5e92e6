"""GPTQ of a picture graph: a small vision transformer, rounded by the recipe `int4`, against NumPy and min-max."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from export.network_graphs import write_vit
from model.vit import VisionTransformer
from quantization.gptq import gptq, grid_of, without_gptq
from quantization.graph_rounding import round_graph
from quantization.quantize import Samples, quantize_graph
from quantization.recipe import load_recipe
from quantization.surgery import OpenGraph, Runner
from seed_story.config import VisionConfig
from seed_story.contract import ENCODE, VIT

CONFIG = VisionConfig(
    image_size=28, hidden_size=32, intermediate_size=64, num_layers=12, num_heads=2, pretrained_grid=3
)
ENTRIES = load_recipe("int4").graphs[VIT]
KINDS = 6
"""Matrices of a block: queries, keys, values, what attention puts out, and the two of the MLP."""


@cache
def samples() -> Samples:
    rng = np.random.default_rng(0)
    return {ENCODE: [{"image": rng.random((1, 28, 28, 3), np.float32)} for _ in range(24)]}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    (folder / "float.tflite").write_bytes(write_vit(VisionTransformer(CONFIG, seed=1), folder / "work"))
    return folder / "float.tflite"


@pytest.fixture(scope="module")
def rounded(exact: Path) -> Path:
    path = exact.with_name("rounded.tflite")
    path.write_bytes(exact.read_bytes())
    round_graph(path, ENTRIES, samples, threads=1)
    return path


def scopes(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Weights by what their operators put out."""
    graph, found = OpenGraph(path, ENCODE), {}
    for matrix in graph.matrices():
        weights = graph.constant(matrix.w)
        assert weights is not None
        found[graph.graph.tensors[matrix.y].name.decode()] = weights
    return found


def test_only_the_last_block_that_is_computed_has_eight_bits(exact: Path) -> None:
    grids = [grid_of(ENTRIES, name) for name in scopes(exact)]
    assert len(grids) == KINDS * CONFIG.feature_layer
    assert [grid.bits for grid in grids if grid] == [4] * KINDS * (CONFIG.feature_layer - 1) + [8] * KINDS


def test_the_first_matrices_are_rounded_by_what_they_are_given(exact: Path, rounded: Path) -> None:
    """Queries, keys and values read one tensor, which NumPy is given by another run of the graph."""
    graph = OpenGraph(exact, ENCODE)
    first = graph.matrices()[0]
    name = graph.add_output(first.x)
    graph.write(exact.with_name("watched.tflite"))
    run = Runner(exact.with_name("watched.tflite"), 1)
    rows = np.concatenate([run(one)[name].reshape(-1, CONFIG.hidden_size) for one in samples()[ENCODE]])
    before, after = scopes(exact), scopes(rounded)
    for scope in list(before)[:3]:
        grid = grid_of(ENTRIES, scope)
        assert grid is not None
        expected = gptq(before[scope], rows.astype(np.float64).T @ rows, grid)
        wrong = np.abs(after[scope] - expected) > 1e-6
        assert wrong.mean() < 0.02  # float32 sums may tip a code that is between two


def test_it_loses_less_than_nearest_codes(exact: Path, rounded: Path, tmp_path: Path) -> None:
    def error(source: Path, name: str) -> float:
        copy = tmp_path / f"{name}.float.tflite"
        copy.write_bytes(source.read_bytes())
        quantize_graph(copy, tmp_path / f"{name}.tflite", without_gptq(ENTRIES))
        run, reference = Runner(tmp_path / f"{name}.tflite", 1), Runner(exact, 1)
        pairs = [(run(one)["features"], reference(one)["features"]) for one in samples()[ENCODE]]
        return float(sum(np.square(a - b).sum() for a, b in pairs))

    assert error(rounded, "gptq") < 0.8 * error(exact, "nearest")


def test_entries_without_gptq_leave_the_file_as_it_is(exact: Path, tmp_path: Path) -> None:
    path = tmp_path / "float.tflite"
    path.write_bytes(exact.read_bytes())
    round_graph(
        path, without_gptq(load_recipe("int8").graphs[VIT]), lambda: pytest.fail("nothing is calibrated"), threads=1
    )
    assert path.read_bytes() == exact.read_bytes()
