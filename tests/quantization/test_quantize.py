"""One graph through `litert-quantizer`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from quantization.gptq import without_gptq
from quantization.quantize import quantize_graph
from quantization.recipe import load_recipe
from seed_story.backends import open_graph
from seed_story.bundle import Bundle
from seed_story.contract import qformer_signatures
from seed_story.errors import ExportError


@pytest.fixture
def graph(loud_bundle: Path, tmp_path: Path) -> Path:
    shutil.copy(loud_bundle / "qformer.tflite", tmp_path / "float.tflite")
    return tmp_path / "float.tflite"


def test_no_entries_leave_the_graph_as_it_is(graph: Path, tmp_path: Path) -> None:
    data = graph.read_bytes()
    quantize_graph(graph, tmp_path / "out.tflite", [])
    assert (tmp_path / "out.tflite").read_bytes() == data
    assert not graph.exists()


@pytest.mark.parametrize(("recipe", "cosine"), [("float16", 0.99999), ("int8", 0.99)])
def test_smaller_and_nearly_the_same(
    loud_bundle: Path, graph: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], recipe: str, cosine: float
) -> None:
    before = graph.stat().st_size
    quantize_graph(graph, tmp_path / "out.tflite", without_gptq(load_recipe(recipe).graphs["qformer"]))
    assert not graph.exists()
    assert (tmp_path / "out.tflite").stat().st_size < before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.tflite"]
    assert capfd.readouterr().out == ""

    story = Bundle.open(loud_bundle).manifest.story
    entry = qformer_signatures(story.qformer, story.vision.tokens)[0]
    x = np.random.default_rng(0).normal(size=entry.inputs[0].shape)
    results = []
    for path in (loud_bundle / "qformer.tflite", tmp_path / "out.tflite"):
        opened = open_graph(path, threads=1)
        bound = opened.bind(entry)
        bound.inputs["features"][:] = x
        bound.run()
        results.append(bound.outputs["image_embeddings"].astype(np.float64).ravel())
        opened.close()
    exact, rounded = results
    assert exact @ rounded / np.linalg.norm(exact) / np.linalg.norm(rounded) > cosine
    assert not np.array_equal(exact, rounded)


@pytest.mark.parametrize(
    "entry",
    [
        {"regex": ".*", "operation": "NO_SUCH_OPERATION", "algorithm_key": "min_max_uniform_quantize", "op_config": {}},
        {"regex": ".*", "operation": "FULLY_CONNECTED", "algorithm_key": "no_such_algorithm", "op_config": {}},
        {"regex": ".*"},
    ],
)
def test_entries_that_the_quantizer_refuses(graph: Path, tmp_path: Path, entry: dict[str, object]) -> None:
    with pytest.raises(ExportError, match=r"float\.tflite") as caught:
        quantize_graph(graph, tmp_path / "out.tflite", [entry])
    assert caught.value.got is not None and caught.value.hint
    assert not (tmp_path / "out.tflite").exists()
