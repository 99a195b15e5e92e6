"""Equal vectors once: the same graph, and what is smaller about it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from quantization import quantize
from quantization.recipe import load_recipe
from quantization.sharing import share_vectors


@pytest.fixture
def quantized(loud_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The decoder as the quantizer writes it."""
    monkeypatch.setattr(quantize, "share_vectors", lambda path: None)
    shutil.copy(loud_bundle / "decoder.tflite", tmp_path / "float.tflite")
    entries = [e for e in load_recipe("int8").graphs["decoder"] if e["algorithm_key"] != "GPTQ"]
    quantize.quantize_graph(tmp_path / "float.tflite", tmp_path / "plain.tflite", entries)
    return tmp_path / "plain.tflite"


def told(path: Path) -> dict[str, dict[str, object]]:
    """What every signature makes of the same inputs."""
    interpreter, random, found = Interpreter(str(path)), np.random.default_rng(0), {}
    for name, tensors in interpreter.get_signature_list().items():
        runner = interpreter.get_signature_runner(name)
        details = runner.get_input_details()
        inputs = {one: random.normal(size=details[one]["shape"]).astype(details[one]["dtype"])
                  for one in sorted(tensors["inputs"])}  # fmt: skip
        found[name] = runner(**{key: np.abs(x) if x.dtype == np.int32 else x for key, x in inputs.items()})
    return found


def packed_twice(path: Path) -> int:
    """Bytes of scales and zero points that stand in the file a second time."""
    packed, seen, twice = schema.Model.GetRootAs(path.read_bytes(), 0), {}, 0
    for graph in map(packed.Subgraphs, range(packed.SubgraphsLength())):
        for tensor in map(graph.Tensors, range(graph.TensorsLength())):
            scaling = tensor.Quantization()
            if scaling is None or not scaling.ScaleLength():
                continue
            for vector, field in ((scaling.ScaleAsNumpy(), 8), (scaling.ZeroPointAsNumpy(), 10)):
                place = scaling._tab.Vector(scaling._tab.Offset(field))
                if seen.setdefault(vector.tobytes(), place) != place:
                    twice += vector.nbytes
    return twice


def empty_tables(path: Path) -> int:
    """Tensors whose quantization is given, but says nothing."""
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    said = [tensor.quantization for graph in model.subgraphs for tensor in graph.tensors if tensor.quantization]
    return sum(one.scale is None and one.details is None for one in said)


def test_the_same_function_in_a_smaller_file(quantized: Path) -> None:
    shared = quantized.with_name("shared.tflite")
    shutil.copy(quantized, shared)
    share_vectors(shared)
    assert packed_twice(quantized) > 0 and packed_twice(shared) == 0
    assert quantized.stat().st_size - shared.stat().st_size >= packed_twice(quantized)
    assert empty_tables(quantized) > 0 and empty_tables(shared) == 0
    assert sorted(path.name for path in quantized.parent.iterdir()) == ["plain.tflite", "shared.tflite"]
    before, after = told(quantized), told(shared)
    assert before.keys() == after.keys() and "decode" in before
    for name, outputs in before.items():
        for output, values in outputs.items():
            np.testing.assert_array_equal(values, after[name][output])
