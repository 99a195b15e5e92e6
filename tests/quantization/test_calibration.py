"""Calibrated activations: where the samples come from, what they decide, and that no float is left inside a graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from export.__main__ import main
from export.integer_ops import with_integer_ops
from quantization import calibration
from quantization.calibration import calibration_pictures
from quantization.gptq import without_gptq
from quantization.quantize import is_static, quantize_graph
from quantization.recipe import CALIBRATION, load_recipe, recipe_names
from seed_story.bundle import Bundle
from seed_story.contract import QFORMER, VIT, qformer_signatures
from seed_story.errors import ExportError, PictureError, UsageError

STATIC = load_recipe("int8-static")
ENTRIES = without_gptq(STATIC.graphs[QFORMER])
NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
INTEGERS = {schema.TensorType.INT8, schema.TensorType.INT16, schema.TensorType.INT32, schema.TensorType.INT64}


def opened(path: Path) -> tuple[Any, list[str]]:
    """A file's only subgraph, and its operators' names."""
    model = schema.ModelT.InitFromPackedBuf(bytearray(path.read_bytes()), 0)
    codes = [NAMES[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
    (graph,) = model.subgraphs
    return graph, [codes[op.opcodeIndex] for op in graph.operators]


def input_scale(path: Path) -> float:
    """The step that the graph's input is rounded to."""
    graph, names = opened(path)
    return float(graph.tensors[graph.operators[names.index("QUANTIZE")].outputs[0]].quantization.scale[0])


@pytest.mark.parametrize("name", [VIT, QFORMER])
def test_no_float_between_the_borders(export_tiny: Callable[[str], Path], name: str) -> None:
    graph, names = opened(export_tiny("int8-static") / f"{name}.tflite")
    first, last = graph.operators[0], graph.operators[-1]
    assert (names[0], names[-1]) == ("QUANTIZE", "DEQUANTIZE")
    assert first.inputs.tolist() == graph.inputs.tolist() and last.outputs.tolist() == graph.outputs.tolist()
    inside = [first.outputs, *(part for op in graph.operators[1:-1] for part in (op.inputs, op.outputs)), last.inputs]
    kinds = {graph.tensors[index].type for part in inside for index in part if index >= 0}
    assert kinds <= INTEGERS and {schema.TensorType.INT8, schema.TensorType.INT16} <= kinds
    assert "DEQUANTIZE" not in names[:-1]


def test_matrices_have_eight_bits_each(export_tiny: Callable[[str], Path]) -> None:
    for name in (VIT, QFORMER):
        graph, names = opened(export_tiny("int8-static") / f"{name}.tflite")
        products = [op for op, kind in zip(graph.operators, names, strict=True) if kind == "FULLY_CONNECTED"]
        assert {graph.tensors[op.inputs[1]].type for op in products} == {schema.TensorType.INT8}
        read = [graph.tensors[op.inputs[0]].type for op in products]
        assert {schema.TensorType.INT8, schema.TensorType.INT16} == set(read)  # the recipe's two kinds of activations


def test_the_decoder_is_that_of_int8() -> None:
    assert STATIC.graphs["decoder"] == load_recipe("int8").graphs["decoder"]
    assert STATIC.rotated == load_recipe("int8").rotated
    assert [name for name in recipe_names() if is_static(load_recipe(name).graphs[VIT])] == ["int8-static"]
    assert not is_static(STATIC.graphs["decoder"])


@pytest.fixture
def graph(loud_bundle: Path, tmp_path: Path) -> Path:
    """A float Q-Former, ready for integers."""
    path = tmp_path / "float.tflite"
    path.write_bytes(with_integer_ops((loud_bundle / "qformer.tflite").read_bytes()))
    return path


def features(bundle: Path, *sizes: float) -> list[dict[str, np.ndarray]]:
    """Made-up features, of which the largest is exactly so large."""
    story = Bundle.open(bundle).manifest.story
    shape = qformer_signatures(story.qformer, story.vision.tokens)[0].inputs[0].shape
    found = np.random.default_rng(0).uniform(-1, 1, (len(sizes), *shape)).astype(np.float32)
    found /= np.abs(found).max(axis=(1, 2, 3), keepdims=True)
    return [{"features": one * np.float32(size)} for one, size in zip(found, sizes, strict=True)]


@pytest.mark.parametrize("sizes", [(1.0,), (1.0, 4.0, 2.0)])
def test_a_fine_scale_holds_half_as_much_again_as_the_largest_of_all_samples(
    loud_bundle: Path, graph: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], sizes: tuple[float, ...]
) -> None:
    samples = {"project": features(loud_bundle, *sizes)}
    quantize_graph(graph, tmp_path / "out.tflite", ENTRIES, lambda: samples)
    assert input_scale(tmp_path / "out.tflite") == pytest.approx(1.5 * max(sizes) / 32767, rel=1e-4)
    assert not graph.exists()
    assert capfd.readouterr().out == ""


def test_a_coarse_scale_has_no_room_to_spare(
    loud_bundle: Path, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what an operator of 8 bits reads or makes; a softmax's scale is fixed, whatever its bits."""
    scales = []
    for room in (1.0, 1.5):
        monkeypatch.setattr("quantization.quantize._HEADROOM", room)
        copied, made = tmp_path / "copy.tflite", tmp_path / f"{room}.tflite"
        shutil.copy(graph, copied)
        quantize_graph(copied, made, ENTRIES, lambda: {"project": features(loud_bundle, 1.0)})
        scales.append(activation_scales(made))
    tight, roomy = scales
    ratios = {name: (kind, scale / tight[name][1]) for name, (kind, scale) in roomy.items()}
    assert {round(ratio, 3) for kind, ratio in ratios.values() if kind == schema.TensorType.INT8} == {1.0}
    assert {round(ratio, 3) for kind, ratio in ratios.values() if kind == schema.TensorType.INT16} == {1.0, 1.5}


def activation_scales(path: Path) -> dict[bytes, tuple[int, float]]:
    """Type and scale of what the operators make, by name."""
    graph, _ = opened(path)
    made = [graph.tensors[i] for op in graph.operators[:-1] for i in op.outputs]
    return {t.name: (t.type, float(t.quantization.scale[0])) for t in made}


@pytest.mark.parametrize("samples", [None, dict, lambda: {"project": []}], ids=["none", "no signature", "no inputs"])
def test_samples_are_needed(graph: Path, tmp_path: Path, samples: Any) -> None:
    with pytest.raises(ExportError, match="samples"):
        quantize_graph(graph, tmp_path / "out.tflite", ENTRIES, samples)
    assert not (tmp_path / "out.tflite").exists()


def test_samples_are_made_only_when_they_are_needed(graph: Path, tmp_path: Path) -> None:
    entries = without_gptq(load_recipe("int8").graphs[QFORMER])
    quantize_graph(graph, tmp_path / "out.tflite", entries, lambda: pytest.fail("made"))


def test_own_pictures_are_each_read_once() -> None:
    pictures = calibration_pictures(CALIBRATION, 28)
    assert len(pictures) == len(list((CALIBRATION / "pictures").iterdir())) == 96
    assert all(one.shape == (1, 28, 28, 3) and one.dtype == np.float32 for one in pictures)
    assert 0 <= np.min(pictures) < np.max(pictures) <= 1


def test_of_very_many_pictures_the_first_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    first = calibration_pictures(CALIBRATION, 28)[:5]
    monkeypatch.setattr(calibration, "MOST_PICTURES", 5)
    np.testing.assert_array_equal(calibration_pictures(CALIBRATION, 28), first)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one story of one picture, told twice."""
    made = tmp_path / "mine"
    (made / "pictures").mkdir(parents=True)
    shutil.copy(next((CALIBRATION / "pictures").iterdir()), made / "pictures" / "one.jpg")
    line = json.dumps({"id": "1", "images": ["pictures/one.jpg"], "captions": ["A fox."]})
    (made / "stories.jsonl").write_text(f"{line}\n{line}\n")
    return made


def test_another_folder(folder: Path) -> None:
    assert len(calibration_pictures(folder, 28)) == 1


def test_what_is_wrong_with_a_folder_is_said(folder: Path) -> None:
    with pytest.raises(UsageError, match="nothing to calibrate with") as caught:
        calibration_pictures(folder / "none", 28)
    assert caught.value.got == folder / "none" and caught.value.expected and caught.value.hint
    (folder / "pictures" / "one.jpg").unlink()
    with pytest.raises(PictureError, match=r"one\.jpg"):
        calibration_pictures(folder, 28)
    (folder / "stories.jsonl").write_text("")
    with pytest.raises(UsageError, match="no story"):
        calibration_pictures(folder, 28)


def test_an_export_reads_the_folder_that_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, none = tmp_path / "bundle", tmp_path / "none"
    given = ["--model", "tiny", "--recipe", "int8-static", "--calibration", str(none), "--out", str(out)]
    assert main(given) == UsageError.exit_code
    assert f"nothing to calibrate with; got {none}" in capsys.readouterr().err
    assert not out.exists()
