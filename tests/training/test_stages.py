"""The command from a data set to a checkpoint, with the tiny preset and a few steps."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from safetensors.numpy import load_file

from model.layers import named_variables, numpy_of
from model.story_source import load_source
from tests.training.storybooks import tensors, write_stories
from training import loop
from training.storytelling import Storytelling
from training.train import main

STORIES = [
    [("ox", "An ox."), ("bee", "A bee.")],
    [("cat", "A cat."), ("fox", "A fox."), ("ox", "The ox.")],
    [("pig", "A pig sat.")],
    [("owl", "An owl.")],
]
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("data") / "book", STORIES)


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    """So few that tracing a graph would take longer than all of them; `test_overfit` trains with graphs."""
    tf.config.run_functions_eagerly(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "steps_for_minutes", lambda task, schedule, minutes: STEPS)
        yield
    tf.config.run_functions_eagerly(False)


def run(data: Path, out: Path, *options: object) -> int:
    return main(["--model", "tiny", "--data", str(data), "--out", str(out), *map(str, options)])


LORA = ("--decoder", "lora", "--vision-blocks", 1)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training with LoRA and a trained block; don't change it, copy it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run(data, out, *LORA) == 0
    return out


def test_command_says_where_the_checkpoint_is(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, tmp_path / "out", "--decoder", "frozen", "--vision-blocks", 0) == 0
    assert capsys.readouterr().out == f"Wrote {tmp_path / 'out' / 'checkpoint'}\n"


def test_checkpoint_says_what_it_was_learned_from(finished: Path) -> None:
    about = json.loads((finished / "checkpoint" / "training.json").read_text())
    assert about["model"] == "tiny" and about["recipe"]["decoder"] == "lora" and about["recipe"]["vision_blocks"] == 1
    assert list(about["stages"]) == ["recognition", "alignment", "story"]
    assert all(stage["step"] == STEPS and stage["finished"] for stage in about["stages"].values())
    assert {"next_token", "words", "next_picture", "loss"} <= set(about["stages"]["story"]["losses"])
    assert not list(finished.glob(".*.part"))


@pytest.mark.parametrize("vision_blocks", [0, 1])
@pytest.mark.parametrize("decoder", ["frozen", "lora", "full"])
def test_checkpoint_holds_what_was_trained(
    data: Path, finished: Path, tmp_path: Path, decoder: str, vision_blocks: int
) -> None:
    out = finished
    if (decoder, vision_blocks) != ("lora", 1):
        out = tmp_path / "out"
        assert run(data, out, "--decoder", decoder, "--vision-blocks", vision_blocks) == 0
    folder = out / "checkpoint"
    files = {"qformer", "picture_head"} | {"lora": {"lora"}, "full": {"decoder"}, "frozen": set()}[decoder]
    files |= {"vision"} if vision_blocks else set()
    assert {file.name for file in folder.iterdir()} == {f"{name}.safetensors" for name in files} | {"training.json"}
    assert {dtype for dtype, _ in tensors(folder).values()} == {"float16"}

    trained, plain = load_source("tiny", checkpoint=folder), load_source("tiny", checkpoint="none")
    assert trained.qformer_trained
    changed = {
        part: {name for name, value in values(trained, part).items() if moved(value, values(plain, part).get(name))}
        for part in ("vision", "llama", "qformer")
    }
    assert changed["qformer"]
    assert all(name.startswith("encoder.layer.1.") for name in changed["vision"])  # the tiny features are layer 2's
    assert bool(changed["vision"]) == bool(vision_blocks)
    linears = {name for name in values(plain, "llama") if "proj" in name}
    assert changed["llama"] <= {"frozen": set(), "lora": linears, "full": set(values(plain, "llama"))}[decoder]
    assert bool(changed["llama"]) == (decoder != "frozen")
    assert ("model.embed_tokens.weight" in changed["llama"]) == (decoder == "full")


def values(source: Any, part: str) -> dict[str, np.ndarray]:
    return {name: numpy_of(v) for name, v in named_variables(getattr(source.model, part)).items()}


def moved(value: np.ndarray, before: np.ndarray | None) -> bool:
    """By more than the rounding to float16; what wasn't there before, too."""
    return before is None or not (
        np.array_equal(value, before) or np.array_equal(value, before.astype(np.float16).astype(np.float32))
    )


def test_cards_are_recognized_and_kinds_remembered(data: Path, tmp_path: Path) -> None:
    """Pictures that no story shows take part in recognition alone; words that names share are in the memory."""
    book = shutil.copytree(data, tmp_path / "book")
    write_stories(tmp_path / "cards", [[("hen", "This is a hen.")]])
    (tmp_path / "cards" / "0_0.png").rename(book / "card.png")
    line = json.loads((tmp_path / "cards" / "train.jsonl").read_text())
    (book / "cards.jsonl").write_text(json.dumps({**line, "images": ["card.png"]}) + "\n")
    (book / "names.json").write_text(json.dumps({"hen": ["bird", "chick"], "owl": ["bird"]}))
    assert run(book, tmp_path / "out", *LORA) == 0
    seen = json.loads((tmp_path / "out" / "features" / "after_1.json").read_text())
    assert "card.png" in seen
    later = json.loads((tmp_path / "out" / "recognition" / "features" / "after_2.json").read_text())
    assert "card.png" not in later and set(seen) == {"card.png", *later}
    names = ["", "bee", "cat", "fox", "hen", "owl", "ox", "pig", "sea", "bird"]
    worth = load_file(tmp_path / "out" / "checkpoint" / "qformer.safetensors")["memory.worth.weight"]
    assert worth.shape == (len(names), len(names))
    assert {(names[said], names[of]) for said, of in np.argwhere(worth != np.eye(len(names)))} == {
        ("bird", "hen"), ("bird", "owl")
    }  # fmt: skip


def test_recognition_has_the_last_word_on_the_blocks(finished: Path) -> None:
    """Stage 2 reads the features that they end with, and leaves them alone."""
    learned = load_file(finished / "recognition" / "checkpoint.safetensors")
    plain = values(load_source("tiny", checkpoint="none"), "vision")
    shipped = load_file(finished / "checkpoint" / "vision.safetensors")
    assert shipped
    for name, value in shipped.items():
        expected = 0.7 * learned[f"network.vision.{name}"] + 0.3 * plain[name]
        np.testing.assert_array_equal(value, expected.astype(np.float16), err_msg=name)


def test_without_labels_there_is_one_stage(tmp_path: Path) -> None:
    data = write_stories(tmp_path / "book", STORIES, labels=False)
    assert run(data, tmp_path / "out", "--decoder", "lora", "--vision-blocks", 1) == 0
    about = json.loads((tmp_path / "out" / "checkpoint" / "training.json").read_text())
    assert list(about["stages"]) == ["story"]
    assert about["stages"]["story"]["losses"]["words"] == 0


def test_minutes_become_steps(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured by the loop itself, each stage by its share."""
    from training.loop import steps_for_minutes

    asked = []

    def spied(task: Any, schedule: Any, minutes: float) -> int:
        asked.append(minutes)
        return steps_for_minutes(task, schedule, minutes)

    monkeypatch.setattr(loop, "steps_for_minutes", spied)
    assert run(data, tmp_path / "out", "--decoder", "lora", "--vision-blocks", 1, "--minutes", 1e-4) == 0
    np.testing.assert_allclose(asked, [0.57e-4, 0.03e-4, 0.4e-4])
    about = json.loads((tmp_path / "out" / "checkpoint" / "training.json").read_text())
    assert all(stage["step"] >= 1 for stage in about["stages"].values())


def test_finished_training_is_written_again_and_not_trained(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(out / "checkpoint")
    monkeypatch.setattr("training.loop._Learner.learn", lambda *_: pytest.fail("a step was trained"))
    monkeypatch.setattr(loop, "steps_for_minutes", lambda *_: pytest.fail("the steps were measured again"))
    assert run(data, out, *LORA) == 0
    assert tensors(out / "checkpoint") == tensors(finished / "checkpoint")
    assert (out / "checkpoint/training.json").read_bytes() == (finished / "checkpoint/training.json").read_bytes()


def test_interrupted_training_goes_on_to_the_same_bits(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the last stage, whose networks the stages before have changed."""
    out, batch = tmp_path / "out", Storytelling.batch

    def interrupting(self: Storytelling, step: int) -> Any:
        if step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Storytelling, "batch", interrupting)
        assert run(data, out, *LORA) == 130
    printed = capsys.readouterr()
    assert printed.out == "" and "run the same command again" in printed.err
    assert not (out / "checkpoint").exists()
    assert run(data, out, *LORA) == 0
    assert tensors(out / "checkpoint") == tensors(finished / "checkpoint")


@pytest.mark.parametrize(
    "options",
    [("--decoder", "full", "--vision-blocks", 1), ("--decoder", "lora", "--vision-blocks", 0), (*LORA, "--seed", 1)],
    ids=["another decoder", "another block", "another seed"],
)
def test_another_recipe_is_refused(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...]
) -> None:
    """And leaves what was trained by the first as it is."""
    out = shutil.copytree(finished, tmp_path / "out")
    assert run(data, out, *options) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("train: error: ") and " is of another " in said
    assert tensors(out / "checkpoint") == tensors(finished / "checkpoint")


def test_other_data_are_refused(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    assert run(write_stories(tmp_path / "book", STORIES[:2]), out, *LORA) == 1
    assert " is of another training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "there is no data set"),
        (("--minutes", 0), "minutes is impossible"),
        (("--vision-blocks", -1), "the recipe is impossible"),
    ],
)
def test_users_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], words: str
) -> None:
    assert run(tmp_path / "nowhere", tmp_path / "out", *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("train: error: ") and words in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_missing_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_stories(tmp_path / "book", STORIES)
    (data / "1_2.png").unlink()
    assert run(data, tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "1_2.png" in err and err.startswith("train: error: 1 pictures are missing")
    assert not (tmp_path / "out").exists()
