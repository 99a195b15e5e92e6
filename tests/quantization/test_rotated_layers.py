"""A rotated bundle is taken apart beside a rotated float reference, its float16 rotations included."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.export import ExportOptions, export_bundle
from export.learned_rotation import ROTATION_FILE, write_rotation
from model.story_source import StorySource
from quantization.__main__ import main
from quantization.fidelity import row_cosines
from quantization.locate import step_inputs
from quantization.passages import picture_cosines
from quantization.quantize import quantize_graph
from quantization.recipe import load_recipe
from quantization.reference import export_command, is_float, is_rotated
from quantization.sensitivity import sensitivity
from quantization.surgery import OpenGraph, Runner
from seed_story.bundle import MANIFEST, Bundle, graph_file
from seed_story.config import CacheConfig, LlamaConfig
from seed_story.contract import Steps
from seed_story.files import file_sha256
from seed_story.image import load_and_preprocess_image
from seed_story.story import SEEDStory
from tests.export.tiny_decoders import random_rotation
from tests.loud import int8_of_min_max, loud_source
from training.data import read_stories

TEXT = "Once upon a time, a fox hid in a log. " * 3
OPTIONS = ExportOptions(CacheConfig(slots=32, sinks=2), Steps((4, 8), (8,)), force=True)
INT8 = int8_of_min_max()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> StorySource:
    """With a rotation of its own, which isn't its own inverse."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_rotation(random_rotation(LlamaConfig.tiny().hidden_size), folder / ROTATION_FILE)
    return replace(loud_source(), checkpoint=folder)


@pytest.fixture(scope="module")
def rotated(source: StorySource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`loud_bundle`, rotated."""
    recipe = load_recipe("float32-rotated")
    return export_bundle(source, recipe, tmp_path_factory.mktemp("r") / "float", OPTIONS).path


@pytest.fixture(scope="module")
def int8(source: StorySource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the recipe `int8`."""
    return export_bundle(source, INT8, tmp_path_factory.mktemp("r") / "int8", OPTIONS).path


@pytest.fixture(scope="module")
def int8_rotations(source: StorySource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but its rotations are int8 as well: one of them is used by several operations."""
    graphs = {**INT8.graphs, "decoder": INT8.graphs["decoder"][:-1]}
    recipe = replace(INT8, graphs=graphs)
    return export_bundle(source, recipe, tmp_path_factory.mktemp("r") / "all", OPTIONS).path


def planted(bundle: Path, folder: Path, weight: str) -> Path:
    """A copy in which one of the decoder's matrices is reversed: row for row, and from last to first."""
    shutil.copytree(bundle, folder)
    file = folder / graph_file("decoder")
    opened = OpenGraph(file, "prefill_8")
    matrix = next(one for one in opened.matrices() if one.name == weight)
    old = opened.content(matrix.w).tobytes()
    data = file.read_bytes()
    assert data.count(old) == 1 and len(old) > 100
    kind = np.float16 if weight in ("down_rotation", "rotated_norm") else np.int8
    file.write_bytes(data.replace(old, np.frombuffer(old, kind)[::-1].tobytes()))
    values = json.loads((folder / MANIFEST).read_text())
    values["files"][file.name]["sha256"] = file_sha256(file)
    (folder / MANIFEST).write_text(json.dumps(values))
    return folder


def report(capsys: pytest.CaptureFixture[str], bundle: Path, reference: Path, data: Path, what: str) -> dict[str, Any]:
    arguments = ("report", bundle, "--reference", reference, "--data", data, what, "--json", "--threads", "1")
    assert main([*map(str, arguments)]) == 0
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1])["bundles"][0])


@pytest.mark.parametrize("weight", ["layers_1_o", "rotated_norm", "down_rotation"])
def test_a_planted_matrix_is_named_and_ranked_first(
    rotated: Path, int8: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], weight: str
) -> None:
    bad = planted(int8, tmp_path / "bad", weight)
    found = report(capsys, bad, rotated, held_out, "--locate")["first_bad"]
    assert (found["graph"], found["matrix"]) == ("decoder", weight)
    costs = report(capsys, bad, rotated, held_out, "--sensitivity")["sensitivity"]
    costs = [cost for cost in costs if cost["graph"] == "decoder"]
    assert costs[0]["matrix"] == weight
    assert costs[0]["cost"] > 10 * costs[1]["cost"]


def test_a_good_one_has_no_bad_matrix(
    rotated: Path, int8: Path, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`down_rotation` is read before each `down`: once for each layer, but its cost is one."""
    found = report(capsys, int8, rotated, held_out, "--locate")
    assert found["first_bad"] is None
    own = {one["matrix"]: one["own"] for one in found["matrices"] if one["graph"] == "decoder"}
    assert {"broad", "narrowing", "down_rotation", "down_rotation_1", "rotated_norm", "layers_1_down"} <= set(own)
    assert len(own) == len([one for one in found["matrices"] if one["graph"] == "decoder"]) == 14
    assert all(1e-6 < own[name] < 1e-3 for name in own if "rotat" in name), "float16"
    costs = report(capsys, int8, rotated, held_out, "--sensitivity")["sensitivity"]
    names = [one["matrix"] for one in costs if one["graph"] == "decoder"]
    assert sorted(names) == sorted({*own} - {"down_rotation_1"})


@pytest.mark.parametrize("weight", ["down_rotation", "layers_0_down"])
@pytest.mark.parametrize("bundle", ["int8", "int8_rotations"])
def test_a_cost_is_that_of_the_quantizer_alone(
    rotated: Path, held_out: Path, tmp_path: Path, request: pytest.FixtureRequest, bundle: str, weight: str
) -> None:
    """litert-quantizer is told to quantize one matrix only, at every place where it is used."""
    pictures = [page.picture for page in read_stories(held_out / "test.jsonl")[0].pages]
    with SEEDStory(rotated, threads=1) as truth, SEEDStory(request.getfixturevalue(bundle), threads=1) as model:
        costs = {one.matrix: one.cost for one in sensitivity(truth, model, pictures, [TEXT])}
        ids = truth.tokenizer.encode(TEXT)
        pieces = [step_inputs(truth, ids[at : at + 4], 4) for at in range(0, len(ids) - 3, 4)][:32]
    OpenGraph(rotated / "decoder.tflite", "prefill_4").write(tmp_path / "float.tflite")
    shutil.copy(tmp_path / "float.tflite", tmp_path / "source.tflite")
    half = weight == "down_rotation" and bundle == "int8"
    entry = {**INT8.graphs["decoder"][-1 if half else 0], "regex": f"/{weight}/"}
    quantize_graph(tmp_path / "source.tflite", tmp_path / "one.tflite", [entry])
    runs = [Runner(tmp_path / name, 1) for name in ("float.tflite", "one.tflite")]
    kl = []
    for piece in pieces:
        p, q = (run(piece)["logits"][0].astype(np.float64) for run in runs)
        p, q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (p, q))
        kl.append((np.exp(p) * (p - q)).sum())
    assert np.mean(kl) > 1e-10
    assert costs[weight] == pytest.approx(np.mean(kl), rel=1e-2 if half else 1e-3)


def test_pictures_are_compared_in_the_models_channels(rotated: Path, loud_bundle: Path, held_out: Path) -> None:
    """Two float bundles see the same, though one of them says it in turned channels."""
    pictures = [page.picture for page in read_stories(held_out / "test.jsonl")[0].pages]
    with SEEDStory(loud_bundle, threads=1) as plain, SEEDStory(rotated, threads=1) as turned:
        for reference, bundle in ((plain, turned), (turned, plain)):
            (found,) = picture_cosines(reference, [bundle], pictures)
            assert found["vit"]["least"] > 0.9999 and found["qformer"]["least"] > 0.9999
        pixels = load_and_preprocess_image(pictures[0], plain.bundle.manifest.story.vision.image_size)
        assert row_cosines(turned.vision.embeddings(pixels), plain.vision.embeddings(pixels)).max() < 0.9


def test_the_other_kind_of_reference_is_refused(
    rotated: Path, int8: Path, loud_bundle: Path, loud_int8: Path, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [(int8, loud_bundle, "float32-rotated"), (loud_int8, rotated, "float32")]
    for bundle, reference, recipe in cases:
        for what in ("--locate", "--sensitivity"):
            assert main(["report", str(bundle), "--reference", str(reference), "--data", str(held_out), what]) == 2
            out, err = capsys.readouterr()
            command = f"python -m export --model tiny --recipe {recipe} --slots 32 --sinks 2 --prefill 4 8 --begin 8"
            assert out == "" and f"{command} --out build/{recipe} " in err and f"--reference build/{recipe}" in err


def test_a_command_repeats_the_bundles_options(rotated: Path) -> None:
    manifest = Bundle.open(rotated).manifest
    plain = replace(manifest, cache=CacheConfig(), steps=Steps())
    assert export_command(plain, "float32") == "python -m export --model tiny --recipe float32 --out build/float32"
    kept = replace(
        plain, cache=CacheConfig(64, anchors=12, picture_eviction="first-and-last"), steps=Steps(attention=False)
    )
    assert export_command(kept, "mine") == (
        "python -m export --model tiny --recipe mine --slots 64 --policy multimodal-sink --pictures 2 "
        "--picture-begin 2 --picture-end 4 --picture-eviction first-and-last --no-attention --out build/mine"
    )


def test_what_is_a_reference_is_read_from_the_graphs(
    rotated: Path, int8: Path, loud_bundle: Path, loud_int8: Path, tmp_path: Path
) -> None:
    """Not from the recipe's name, which anybody may give to anything."""
    kinds = {path: (is_float(Bundle.open(path)), is_rotated(Bundle.open(path)))
             for path in (rotated, int8, loud_bundle, loud_int8)}  # fmt: skip
    assert list(kinds.values()) == [(True, True), (False, True), (True, False), (False, False)]
    shutil.copytree(loud_bundle, tmp_path / "half")
    shutil.copy(loud_int8 / "qformer.tflite", tmp_path / "half")
    values = json.loads((tmp_path / "half" / MANIFEST).read_text())
    file = tmp_path / "half" / "qformer.tflite"
    values["files"][file.name] = {"sha256": file_sha256(file), "bytes": file.stat().st_size}
    (tmp_path / "half" / MANIFEST).write_text(json.dumps(values))
    assert not is_float(Bundle.open(tmp_path / "half"))


def test_there_is_room_for_the_scales_of_a_large_vocabulary(rotated: Path, int8: Path, tmp_path: Path) -> None:
    """They lie in the flatbuffer, which is written before they are there: 49,152 words' in SmolLM2."""
    opened, given = (OpenGraph(bundle / "decoder.tflite", "prefill_4") for bundle in (rotated, int8))
    mine, theirs = (next(one for one in graph.matrices() if one.name == "embed_tokens") for graph in (opened, given))
    opened.transplant(mine, given, theirs)()
    opened.write(tmp_path / "graph.tflite")
    scaling = given.graph.tensors[theirs.w].quantization
    scaling.scale, scaling.zeroPoint = np.ones(49152, np.float32), np.zeros(49152, np.int64)
    opened.transplant(mine, given, theirs)
    opened.rewrite(tmp_path / "graph.tflite")
    again = OpenGraph(tmp_path / "graph.tflite", "prefill_4")
    assert len(again.graph.tensors[mine.w].quantization.scale) == 49152
    assert again.content(mine.w).tobytes() == given.content(theirs.w).tobytes()


def test_a_matrix_is_replaced_wherever_it_is_used_and_put_back(rotated: Path, int8_rotations: Path) -> None:
    opened, given = (OpenGraph(bundle / "decoder.tflite", "prefill_4") for bundle in (rotated, int8_rotations))
    uses = [one for one in opened.matrices() if one.name.startswith("down_rotation")]
    theirs = next(one for one in given.matrices() if one.name == "down_rotation")
    tensor, before = opened.graph.tensors[uses[0].w], [(one.op.opcodeIndex, one.op.builtinOptions) for one in uses]
    kind = tensor.type
    undo = opened.transplant(uses[0], given, theirs)
    assert len(uses) == 2 and tensor.type == given.graph.tensors[theirs.w].type != kind
    for one in uses:
        code = opened.model.operatorCodes[one.op.opcodeIndex]
        assert code.version == given.model.operatorCodes[theirs.op.opcodeIndex].version
        assert one.op.builtinOptions is theirs.op.builtinOptions
    undo()
    assert tensor.type == kind
    assert [(one.op.opcodeIndex, one.op.builtinOptions) for one in uses] == before
