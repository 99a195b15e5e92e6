"""Learning scales: with the tiny model, a 4-bit recipe and a data set of a few drawn pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from export.__main__ import main as export_main
from export.decoder_weights import weight_shapes
from export.export import ExportOptions, export_bundle
from export.learn_rotation import main as learn_rotation_main
from export.learn_scales import main
from export.learned_rotation import ROTATION_FILE, write_rotation
from export.learned_scales import read_scales
from export.lesson import Lesson
from export.rounding import gptq_grids
from export.scale_learning import ScaleLearning, _task, learn_scales
from model.story_source import StorySource, load_source
from quantization.fidelity import log_softmax
from quantization.recipe import FOLDER, Recipe, load_recipe
from quantization.surgery import OpenGraph
from seed_story.bundle import Bundle, graph_file
from seed_story.config import CacheConfig
from seed_story.contract import DECODE, DECODER, Steps
from seed_story.errors import UsageError
from seed_story.tokenizer import StoryTokenizer
from tests.compare import assert_close
from tests.export.tiny_decoders import random_rotation
from tests.model.own_decoder import llama_folder
from tests.training.storybooks import write_stories
from training import loop
from training.data import IGNORE

STORIES = [
    [("ox", "An ox."), ("bee", "A bee.")],
    [("cat", "A cat."), ("fox", "A fox."), ("ox", "The ox.")],
    [("owl", "An owl sat on a tree.")],
]
STEPS = 60
OPTIONS = ExportOptions(CacheConfig(32, 2), Steps((4,), ()))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """`int8`, with four bits a row for the layers' matrices."""
    base = load_recipe("int8")
    four = [{**entry, "op_config": {**entry["op_config"], "weight_tensor_config": {"num_bits": 4, "symmetric": True,
             "granularity": "CHANNELWISE", "dtype": "INT"}}, "regex": r"/layers_\d+_(qkv|o|gate_up|down)/"}
            for entry in base.graphs[DECODER] if entry["algorithm_key"] == "GPTQ"]  # fmt: skip
    bounds = {figure: 9.0 if figure.endswith(("_nat", "_ratio")) else 0.0 for figure in base.bounds}
    return replace(base, name="four", graphs={**base.graphs, DECODER: [*base.graphs[DECODER], *four]}, bounds=bounds,
                   scales="four")  # fmt: skip


@pytest.fixture(scope="module")
def lesson(tmp_path_factory: pytest.TempPathFactory) -> Lesson:
    folder = tmp_path_factory.mktemp("lesson")
    data = write_stories(folder / "book", STORIES)
    return Lesson(data=data, out=folder / "out", rows=2, length=128, learning_rate=5e-3)


@pytest.fixture(scope="module")
def source() -> StorySource:
    """As if its pictures said something."""
    return replace(load_source("tiny"), qformer_trained=True)


@pytest.fixture(scope="module")
def task(source: StorySource, recipe: Recipe, lesson: Lesson) -> ScaleLearning:
    return _task(source, recipe, lesson)


@pytest.mark.parametrize("turned", [False, True], ids=["fixed rotation", "learned rotation"])
def test_exact_weights_give_the_logits_of_the_float_model(
    task: ScaleLearning, source: StorySource, recipe: Recipe, lesson: Lesson, tmp_path: Path, turned: bool
) -> None:
    """Pictures, several stories in a row, padding and all; with another rotation it is another task."""
    if turned:
        write_rotation(random_rotation(source.model.config.llama.hidden_size), tmp_path / ROTATION_FILE)
        fixed, task = task, _task(replace(source, learned=tmp_path), recipe, lesson)
        assert task.name != fixed.name
    batch, model = task.batch(0), source.model
    made = task._stories[0].packed
    assert made.pictures and (made.positions[:, 1:] == 0).any()
    pictures = model.qformer(tf.cast(batch["hidden"], tf.float32))
    text = model.llama.embed(np.maximum(made.ids, 0))
    shown = tf.gather(tf.reshape(pictures, [-1, text.shape[-1]]), made.picture_index)
    rows = tf.where((made.ids < 0)[..., None], shown, text)
    expected = model.llama(rows, made.mask, made.positions)
    for row in range(len(made.ids)):
        one = {name: tf.constant(values[row]) for name, values in batch.items() if name != "hidden"}
        assert_close(task._logits(one, pictures, task._exact), expected[row], "decoder_graph")


def test_the_loss_is_the_divergence_at_the_words(task: ScaleLearning) -> None:
    rng = np.random.default_rng(0)
    for change in task.network.changes.values():
        change.assign(rng.uniform(-0.9, 0.9, change.shape))
    batch = {name: tf.constant(values) for name, values in task.batch(1).items()}
    pictures = task._qformer(tf.cast(batch["hidden"], tf.float32))
    changed = task._exact | task._rounded | {name: task.network.matrix(name) for name in task.network.changes}
    lost: list[npt.NDArray[np.float64]] = []
    for row in range(batch["ids"].shape[0]):
        one = {name: values[row] for name, values in batch.items() if name != "hidden"}
        logits = (task._logits(one, pictures, weights).numpy() for weights in (task._exact, changed))
        expected, got = (np.array([log_softmax(x) for x in rows]) for rows in logits)
        lost.append((np.exp(expected) * (expected - got)).sum(-1)[one["targets"].numpy() != IGNORE])
    losses = task.loss(batch, training=True)
    for change in task.network.changes.values():
        change.assign(np.zeros(change.shape))
    assert losses["loss"] > 1e-4
    np.testing.assert_allclose(losses["loss"], np.concatenate(lost).mean(), rtol=1e-3)
    assert 0 <= losses["top1"] <= 1


@pytest.fixture(scope="module")
def learned(source: StorySource, recipe: Recipe, lesson: Lesson) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "steps_for_minutes", lambda *_: STEPS)
        file = learn_scales(source, recipe, lesson)
    assert file == lesson.out / "scales-four.safetensors"
    return file


def test_what_is_learned_brings_the_divergence_down(
    task: ScaleLearning, learned: Path, source: StorySource, recipe: Recipe
) -> None:
    llama = source.model.config.llama
    found = read_scales(learned, gptq_grids(llama, recipe), weight_shapes(llama, rotated=recipe.rotated))
    assert sorted(found) == sorted(name for name in gptq_grids(llama, recipe) if name.startswith("layers"))

    def loss() -> float:
        return float(np.mean([task.loss(task.batch(step), training=False)["loss"] for step in range(3)]))

    before = loss()
    for name, change in task.network.changes.items():
        change.assign(found[name])
    after = loss()
    for change in task.network.changes.values():
        change.assign(np.zeros(change.shape))
    assert after < 0.7 * before


def test_an_export_takes_them_from_the_checkpoint(
    learned: Path, source: StorySource, recipe: Recipe, tmp_path: Path
) -> None:
    with_file = replace(source, learned=learned.parent)
    bundles = [export_bundle(one, recipe, tmp_path / name, OPTIONS) for one, name in ((source, "a"), (with_file, "b"))]
    before, after = (matrices(bundle) for bundle in bundles)
    llama = source.model.config.llama
    changes = read_scales(learned, gptq_grids(llama, recipe), weight_shapes(llama, rotated=recipe.rotated))
    for name, change in changes.items():
        np.testing.assert_array_equal(before[name][0], after[name][0])
        np.testing.assert_allclose(after[name][1], before[name][1] * (1 + change[:, 0]), rtol=1e-5)


def matrices(bundle: Bundle) -> dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]]:
    """Codes, as they are stored, and scales of the decoder's matrices."""
    graph = OpenGraph(bundle.path / graph_file(DECODER), DECODE)
    return {
        matrix.name: (np.array(graph.content(matrix.w)), np.array(graph.graph.tensors[matrix.w].quantization.scale))
        for matrix in graph.matrices()
        if graph.graph.tensors[matrix.w].quantization is not None
    }


def test_a_recipe_without_their_name_learns_none(source: StorySource, lesson: Lesson) -> None:
    with pytest.raises(UsageError, match="int8 takes no learned scales"):
        learn_scales(source, load_recipe("int8"), lesson)


@pytest.mark.parametrize("minutes", [0, -1, float("nan")])
def test_impossible_minutes(lesson: Lesson, minutes: float) -> None:
    with pytest.raises(UsageError, match="minutes is impossible"):
        replace(lesson, minutes=minutes)


def test_without_a_trained_eye_stories_are_text_alone(source: StorySource, recipe: Recipe, lesson: Lesson) -> None:
    """Half of them asked for by the prompt; and no picture is looked for."""
    data = write_stories(lesson.out / "book", [[("ox", "An ox.")], *[[("bee", f"Bee {n}.")] for n in range(9)]])
    for picture in data.glob("*.png"):
        picture.unlink()
    task = _task(replace(source, qformer_trained=False), recipe, replace(lesson, data=data))
    examples = [example for step in range(4) for row in task._stories[step].examples for example in row]
    assert len(examples) > 9 and not any(example.pictures or (example.ids < 0).any() for example in examples)
    opening = StoryTokenizer(source.tokenizer).encode_template(source.prompt.opening)[0]
    assert 0.2 < np.mean([example.ids[0] == opening for example in examples]) < 0.8


def test_impossible_batches(lesson: Lesson) -> None:
    for wrong in ({"rows": 0}, {"length": 0}):
        with pytest.raises(UsageError, match="a batch is impossible"):
            replace(lesson, **wrong)


# --------------------------------------------------------------------------------
# The command


def test_the_command_writes_the_file(
    recipe: Recipe, lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = []

    def steps(task: ScaleLearning, *_: object) -> int:
        batches.append(task.batch(0))
        return 2

    monkeypatch.setattr(loop, "steps_for_minutes", steps)
    values = json.loads((FOLDER / "int8.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**values, "scales": "mine"}))
    out = tmp_path / "out"
    command = [
        "--model",
        "tiny",
        "--recipe",
        str(tmp_path / "mine.json"),
        "--data",
        str(lesson.data),
        "--out",
        str(out),
    ]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith(f"Wrote {out / 'scales-mine.safetensors'}\n")
    assert batches[0]["ids"].shape == (Lesson.rows, Lesson.length)
    written = (out / "scales-mine.safetensors").read_bytes()
    assert main(command) == 0  # it is finished: nothing is learned again
    assert (out / "scales-mine.safetensors").read_bytes() == written


def test_a_decoder_of_the_users_own_learns(
    lesson: Lesson, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rotation, then its scales, then an export by both."""
    monkeypatch.setattr(loop, "steps_for_minutes", lambda *_: 2)
    values = json.loads((FOLDER / "int8.json").read_text())
    for name, bound in values["bounds"].items():
        bound["bound"] = 9 if name.endswith(("_nat", "_ratio")) else 0
    (tmp_path / "mine.json").write_text(json.dumps({**values, "name": "mine", "scales": "mine"}))
    own = ["--model", "tiny", "--llama", str(llama_folder(tmp_path / "llama"))]
    by = [*own, "--recipe", str(tmp_path / "mine.json"), "--rotation", str(tmp_path / ROTATION_FILE)]
    assert learn_rotation_main([*own, "--tokens", "300", "--steps", "2", "--out", str(tmp_path)]) == 0
    assert main([*by, "--data", str(lesson.data), "--out", str(tmp_path)]) == 0
    assert "or give it to `python -m export --scales`" in capsys.readouterr().out
    scales, sizes = tmp_path / "scales-mine.safetensors", ["--slots", "32", "--prefill", "4"]
    found = []
    for name, given in (("with", ["--scales", str(scales)]), ("without", [])):
        assert export_main([*by, *given, *sizes, "--out", str(tmp_path / name)]) == 0
        assert ("There are no learned scales" in capsys.readouterr().out) == (not given)
        found.append(matrices(Bundle.open(tmp_path / name))["layers_1_o"])
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert (found[0][1] != found[1][1]).any()


def test_an_export_without_them_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads((FOLDER / "float32.json").read_text())
    (tmp_path / "mine.json").write_text(json.dumps({**values, "scales": "mine"}))
    command = ["--model", "tiny", "--slots", "32", "--prefill", "4", "--out", str(tmp_path / "story"), "--recipe"]
    assert export_main([*command, str(tmp_path / "mine.json")]) == 0
    assert "There are no learned scales for this recipe" in capsys.readouterr().out
    assert export_main([*command, "float32"]) == 0
    assert "learned scales" not in capsys.readouterr().out


def test_the_command_refuses(tmp_path: Path, lesson: Lesson, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path)]) == 2
    assert "there is no data set" in capsys.readouterr().err
    assert main(["--data", str(lesson.data), "--model", "tiny", "--recipe", "int8", "--out", str(tmp_path)]) == 2
    assert "takes no learned scales" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
