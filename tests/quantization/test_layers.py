"""`--locate` names the layer that was corrupted; `--sensitivity` prices a matrix as a graph with it alone does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quantization.__main__ import main
from quantization.locate import Reading, first_bad, locate, step_inputs
from quantization.quantize import quantize_graph
from quantization.recipe import load_recipe
from quantization.sensitivity import sensitivity
from quantization.surgery import OpenGraph, Runner
from seed_story.bundle import MANIFEST, graph_file
from seed_story.errors import UsageError
from seed_story.files import file_sha256
from seed_story.story import SEEDStory
from training.data import read_stories

TEXT = "Once upon a time, a fox hid in a log."


def damaged(
    bundle: Path, folder: Path, graph: str, damage: Callable[[np.ndarray], np.ndarray], nth: int
) -> tuple[Path, str]:
    """A copy of which one matrix's stored bytes are changed, and that matrix's name."""
    shutil.copytree(bundle, folder)
    file = folder / graph_file(graph)
    signature = {"vit": "encode", "qformer": "project", "decoder": "prefill_8"}[graph]
    opened = OpenGraph(file, signature)
    matrix = opened.matrices()[nth]
    old = opened.content(matrix.w).tobytes()
    data = file.read_bytes()
    assert data.count(old) == 1
    made = damage(np.frombuffer(old, np.int8)).tobytes()
    assert len(made) == len(old) > 100
    file.write_bytes(data.replace(old, made))
    values = json.loads((folder / MANIFEST).read_text())
    values["files"][file.name]["sha256"] = file_sha256(file)
    (folder / MANIFEST).write_text(json.dumps(values))
    return folder, matrix.name


def shuffled(values: np.ndarray) -> np.ndarray:
    return np.random.default_rng(0).permutation(values)


@pytest.mark.parametrize(
    ("graph", "nth", "damage"),
    [("decoder", 3, shuffled), ("decoder", 4, np.zeros_like), ("vit", 5, shuffled), ("qformer", 7, np.negative)],
)
def test_the_corrupted_layer_is_named(
    loud_bundle: Path, loud_int8: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    graph: str, nth: int, damage: Callable[[np.ndarray], np.ndarray],
) -> None:  # fmt: skip
    bad, name = damaged(loud_int8, tmp_path / "bad", graph, damage, nth)
    arguments = ("report", bad, "--reference", loud_bundle, "--data", held_out, "--locate", "--json", "--threads", "1")
    assert main([*map(str, arguments)]) == 0
    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])["bundles"][0]["first_bad"]
    assert found["graph"] == graph
    assert found["own"] > 0.5
    if graph == "decoder":  # the picture graphs' names hold numbers that each export counts anew
        assert found["matrix"] == name
        assert f"leaves the reference at decoder, {name}" in out


def test_a_bundle_that_computes_no_numbers(
    loud_bundle: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report sends the user to `--locate`, which names the layer."""

    def unknown(values: np.ndarray) -> np.ndarray:
        return np.full(len(values) // 4, np.nan, np.float32)

    bad, name = damaged(loud_bundle, tmp_path / "bad", "decoder", unknown, 2)
    arguments = ("report", bad, "--reference", loud_bundle, "--data", held_out, "--threads", "1", "--json",
                 "--tokens", "5", "--plot", tmp_path / "plot.png")  # fmt: skip
    assert main([*map(str, arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "computes nonsense; got 5 of 5" in err and "--locate" in err
    assert main([*map(str, arguments), "--locate"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["bundles"][0]["first_bad"]["matrix"] == name
    assert f"leaves the reference at decoder, {name}" in out and "no number" in out


def test_a_good_bundle_has_no_bad_layer(loud_bundle: Path, loud_int8: Path, held_out: Path) -> None:
    picture = read_stories(held_out / "test.jsonl")[0].pages[0].picture
    with SEEDStory(loud_bundle, threads=1) as reference, SEEDStory(loud_int8, threads=1) as model:
        same = locate(reference, reference, picture, TEXT)
        readings = locate(reference, model, picture, TEXT)
    assert first_bad(same) is None and first_bad(readings) is None
    assert max(one.own for one in same) < 1e-5 and max(one.inherited for one in same) == 0
    assert 1e-4 < max(one.own for one in readings) < 0.1
    names = [one.matrix for one in readings if one.graph == "decoder"]
    assert names == [f"layers_{i}_{kind}" for i in range(2) for kind in ("qkv", "o", "gate_up", "down")] + [
        "embed_tokens"
    ]


def test_a_bundle_with_another_kind_of_cache(loud_bundle: Path, loud_int8_cache: Path, held_out: Path) -> None:
    """Its float32 matrices compute what the reference's do: each bundle is given a cache of its own kind."""
    picture = read_stories(held_out / "test.jsonl")[0].pages[0].picture
    with SEEDStory(loud_bundle, threads=1) as reference, SEEDStory(loud_int8_cache, threads=1) as model:
        readings = locate(reference, model, picture, TEXT)
    assert {one.graph for one in readings} == {"vit", "qformer", "decoder"}
    assert max(max(one.own, one.inherited) for one in readings) < 1e-5


def test_the_first_is_named_and_its_heirs_are_not() -> None:
    good, worse, bad = (Reading("decoder", str(own), own, own) for own in (0.01, 0.2, 0.9))
    assert first_bad([good, worse, good, bad, good]) == bad
    assert first_bad([good, worse]) is None
    assert first_bad([Reading("vit", "nan", float("nan"), 0.0), good]) is not None
    assert first_bad([bad] * 5) is None  # a recipe that folds scales into every matrix


def test_a_cost_is_that_of_a_graph_quantized_by_the_quantizer(
    loud_bundle: Path, loud_int8: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """litert-quantizer is told to quantize one matrix only; its graph is run on the same pieces of text."""
    stories = read_stories(held_out / "test.jsonl")
    pictures = [page.picture for story in stories for page in story.pages]
    with SEEDStory(loud_bundle, threads=1) as reference, SEEDStory(loud_int8, threads=1) as model:
        costs = {(c.graph, c.matrix): c for c in sensitivity(reference, model, pictures, [TEXT * 5])}
        ids = reference.tokenizer.encode(TEXT * 5)
        pieces = [step_inputs(reference, ids[at : at + 4], 4) for at in range(0, len(ids) - 3, 4)][:32]
    data = ("--reference", loud_bundle, "--data", held_out, "--threads", "1")
    assert main([*map(str, ("report", loud_int8, *data, "--sensitivity", "--json"))]) == 0
    out = capsys.readouterr().out
    (row,) = json.loads(out.splitlines()[-1])["bundles"]
    assert {(cost["graph"], cost["matrix"]) for cost in row["sensitivity"]} == set(costs)
    assert all(f"| decoder | layers_{i}_down |" in out for i in range(2))
    decoder = [name for graph, name in costs if graph == "decoder"]
    assert len(decoder) == 9 and {"vit", "qformer"} <= {graph for graph, _ in costs}
    assert [costs["decoder", name].cost for name in decoder] == sorted(
        (costs["decoder", name].cost for name in decoder), reverse=True
    )
    opened = OpenGraph(loud_bundle / "decoder.tflite", "prefill_4")
    opened.write(tmp_path / "float.tflite")
    kind = "layers_1_down"
    scope = opened.graph.tensors[next(m.y for m in opened.matrices() if m.name == kind)].name.decode()
    (tmp_path / "source.tflite").write_bytes((tmp_path / "float.tflite").read_bytes())
    entry = next(e for e in load_recipe("int8").graphs["decoder"] if e["operation"] == "FULLY_CONNECTED")
    quantize_graph(tmp_path / "source.tflite", tmp_path / "one.tflite", [{**entry, "regex": f"^{scope};?$"}])
    runs = [Runner(tmp_path / name, 1) for name in ("float.tflite", "one.tflite")]
    kl = []
    for piece in pieces:
        a, b = (run(piece)["logits"][0].astype(np.float64) for run in runs)
        p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (a, b))
        kl.append((np.exp(p) * (p - q)).sum())
    assert np.mean(kl) > 1e-8
    assert costs["decoder", kind].cost == pytest.approx(np.mean(kl), rel=1e-3)
    assert costs["decoder", kind].measured == len(pieces)


def test_a_signature_that_isnt_there(loud_bundle: Path) -> None:
    with pytest.raises(UsageError, match="no signature prefill_99"):
        OpenGraph(loud_bundle / "decoder.tflite", "prefill_99")
