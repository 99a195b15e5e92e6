"""The teacher's stories, with a scripted teacher in the place of a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seed_story.bundle import Bundle, Prompt
from seed_story.errors import SeedStoryError, UsageError
from tests.runtime.paper_bundle import write_paper_bundle
from tests.training.held_out import ScriptedStory, write_lines
from training.data import read_stories
from training.errors import TrainingError
from training.names import read_labels
from training.storybook import __main__ as command
from training.storybook import teacher as teaching
from training.storybook.concepts import Concept
from training.storybook.teacher import (
    MAX_TOKENS,
    PARTIAL,
    SAMPLING,
    TAUGHT,
    BundleTeacher,
    Draft,
    PicturedPage,
    first_pages,
    open_teacher,
    teach,
    with_request,
)

CHAT = Prompt("<|im_start|>user\n", "\nTell of this picture.<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>",))
CASTS = [["fox", "owl"], ["cat"], ["fox"], ["grapes", "cat"], ["sun"], ["cat", "fox", "owl"]]
REST = (
    " that lived beside a wide river with all of its friends. Every evening {things} sat on the bank and told each "
    "other about the day.\n\nOne morning the water was gone. They looked for it all day long, and at last they found "
    "it behind a hill of stones.{seed}"
)


@dataclass
class Scripted:
    """Writes good stories, except where `bad` says otherwise; keeps what it was asked."""

    bad: Callable[[str, int], bool] = lambda request, turn: False
    stop_at: int | None = None
    name: str = "scripted"
    ended: bool = True
    asked: list[tuple[str, str, int]] = field(default_factory=list)

    def write(self, request: str, beginning: str, seed: int) -> Draft:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append((request, beginning, seed))
        if self.bad(request, sum(before[0] == request for before in self.asked)):
            return Draft(f"{beginning}. Sure!", True)
        things = request.partition("shows ")[2].rstrip(".")
        mark = " They " + "".join(chr(97 + int(digit)) for digit in str(seed)) + "."
        return Draft(beginning + REST.format(things=things, seed=mark) + ("" if self.ended else " And th"), self.ended)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Training stories of two pages, and kept ones that nobody may look at."""
    rows = [
        {"id": f"s{n}", "images": [f"pictures/s{n}-0.jpg", f"pictures/s{n}-1.jpg"], "captions": ["A.", "B."],
         "orders": [0, 1], "things": [cast, ["horse"]], "place": ["forest", "sea"]}
        for n, cast in enumerate(CASTS)
    ]  # fmt: skip
    write_lines(tmp_path / "train.jsonl", rows)
    for kept in ("valid", "test", "grounding"):
        (tmp_path / f"{kept}.jsonl").write_text("not to be read\n")
    return tmp_path


def run(teacher: Any, data: Path, count: int = 99, *, seed: int = 0, attempts: int = 4) -> dict[str, Any]:
    return teach(teacher, data, first_pages(data, count, seed), seed=seed, attempts=attempts)


def lines(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / TAUGHT).read_text().splitlines()]


def test_lines_are_stories_of_the_training_pictures(data: Path) -> None:
    report = run(Scripted(), data)
    assert report == {"pictures": 6, "stories": 6, "skipped": 0, "attempts": 6, "rejected": {}}
    stories = read_stories(data / TAUGHT)
    assert [story.id for story in stories] == [f"taught-{n:05d}" for n in range(6)]
    assert [len(story.pages) for story in stories] == [1] * 6
    expected = {data / f"pictures/s{n}-0.jpg": (tuple(cast), "forest") for n, cast in enumerate(CASTS)}
    assert read_labels(data / TAUGHT) == expected
    assert all(line["orders"] == [0] and line["complete"] is True and line["teacher"] == "scripted"
               for line in lines(data))  # fmt: skip
    caption = stories[0].pages[0].caption
    assert caption.startswith("Once upon a time, there was a fox that lived beside a wide river")
    assert " told each other about the day. One morning the water" in caption  # one paragraph
    assert sorted(path.name for path in data.iterdir() if "taught" in path.name) == [TAUGHT]


def test_a_story_that_was_cut_is_not_complete(data: Path) -> None:
    run(Scripted(ended=False), data, 1)
    assert [line["complete"] for line in lines(data)] == [False]
    assert lines(data)[0]["captions"][0].endswith(".")


def test_a_story_that_ended_within_a_sentence_is_not_complete(data: Path) -> None:
    teacher = Scripted()
    write = teacher.write
    teacher.write = lambda *asked: Draft(write(*asked).text + " And then", True)  # type: ignore[method-assign]
    run(teacher, data, 1)
    assert [line["complete"] for line in lines(data)] == [False]
    assert "And then" not in lines(data)[0]["captions"][0]


def test_different_main_things_come_first(data: Path) -> None:
    mains = {page.things[0].name for page in first_pages(data, 4, seed=1)}
    assert mains == {"fox", "cat", "grapes", "sun"}
    chosen = [{page.image for page in first_pages(data, count, seed=1)} for count in range(1, 7)]
    assert all(fewer < more for fewer, more in pairwise(chosen))
    assert len({frozenset(page.image for page in first_pages(data, 2, seed)) for seed in range(9)}) > 1


@pytest.mark.parametrize(
    ("things", "shown", "beginning"),
    [
        ([("fox", "a")], "a fox", "there was a fox"),
        ([("owl", "an"), ("fox", "a")], "an owl and a fox", "there was an owl"),
        ([("cat", "a"), ("rice", "some"), ("sun", "the")], "a cat, some rice and the sun", "there was a cat"),
        ([("grapes", "some")], "some grapes", "there were some grapes"),
        ([("rice", "some")], "some rice", "there was some rice"),
        ([("sun", "the")], "the sun", "the sun"),
        ([("Santa", "")], "Santa", "Santa"),
    ],
)
def test_request_and_beginning(things: list[tuple[str, str]], shown: str, beginning: str) -> None:
    page = PicturedPage("x.jpg", tuple(Concept(name, "", "thing", article) for name, article in things), "sea")
    assert page.request == f"Write a short story for children. The picture shows {shown}."
    assert page.beginning == f"Once upon a time, {beginning}"


def test_attempts_until_a_usable_text(data: Path) -> None:
    def bad(request: str, turn: int) -> bool:
        return turn < 3 if "a cat, a fox" in request else "the sun" in request

    teacher = Scripted(bad)
    report = run(teacher, data, attempts=4)
    assert report == {"pictures": 6, "stories": 5, "skipped": 1, "attempts": 11, "rejected": {"length": 6}}
    assert len(teacher.asked) == 11
    assert len({seed for _, _, seed in teacher.asked}) == 11
    assert [line["images"][0] for line in lines(data)] == [f"pictures/s{n}-0.jpg" for n in (0, 1, 2, 3, 5)]
    assert [line["id"] for line in lines(data)] == [f"taught-{n:05d}" for n in range(5)]


def test_no_usable_text_at_all_is_an_error(data: Path) -> None:
    with pytest.raises(TrainingError, match=r"no usable story; got rejected for {'length': 12}"):
        run(Scripted(lambda request, turn: True), data, attempts=2)
    assert not (data / TAUGHT).exists()


def test_a_text_depends_on_seed_and_picture_only(data: Path) -> None:
    run(Scripted(), data)
    whole = {line["images"][0]: line["captions"] for line in lines(data)}
    (data / TAUGHT).unlink()
    run(Scripted(), data, 2)
    assert len(lines(data)) == 2
    assert all(whole[line["images"][0]] == line["captions"] for line in lines(data))
    (data / TAUGHT).unlink()
    run(Scripted(), data, seed=1)
    assert all(whole[line["images"][0]] != line["captions"] for line in lines(data))


@pytest.mark.parametrize("torn", ["", '{"image": "pictures/s4', '{"image": "pictures/s4-0.jpg", "caption": null}'])
def test_a_stopped_run_goes_on(data: Path, torn: str) -> None:
    def bad(request: str, turn: int) -> bool:
        return turn < 2 and "fox" in request

    expected = run(Scripted(bad), data)
    whole = (data / TAUGHT).read_bytes()
    (data / TAUGHT).unlink()
    with pytest.raises(KeyboardInterrupt):
        run(Scripted(bad, stop_at=5), data)
    assert not (data / TAUGHT).exists()
    with (data / PARTIAL).open("a") as file:
        file.write(torn)
    with pytest.raises(KeyboardInterrupt):
        run(Scripted(bad, stop_at=1), data)
    teacher = Scripted(bad)
    assert run(teacher, data) == expected
    assert (data / TAUGHT).read_bytes() == whole
    assert len(teacher.asked) == expected["attempts"] - 6
    assert not (data / PARTIAL).exists()


@pytest.mark.parametrize("change", ["seed", "attempts", "teacher"])
def test_a_stopped_run_goes_on_with_its_own_settings_only(data: Path, change: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(Scripted(stop_at=2), data)
    before = (data / PARTIAL).read_bytes()
    settings: dict[str, Any] = {"seed": 1} if change == "seed" else {"attempts": 3} if change == "attempts" else {}
    with pytest.raises(UsageError, match="the stopped run had other settings"):
        run(Scripted(name="another" if change == "teacher" else "scripted"), data, **settings)
    assert (data / PARTIAL).read_bytes() == before


@pytest.mark.parametrize("damage", ["{\n", '{"seed": 0}\n[1]\n', '{"seed": 0}\n{"picture": 1}\n'])
def test_a_damaged_file_of_a_stopped_run(data: Path, damage: str) -> None:
    (data / PARTIAL).write_text(damage)
    with pytest.raises(UsageError, match="is damaged"):
        run(Scripted(), data)


def test_a_prompt_gets_another_request() -> None:
    asked = with_request(CHAT, "Write of a fox.")
    assert asked == Prompt(CHAT.opening, "Write of a fox.<|im_end|>\n<|im_start|>assistant\n", CHAT.end_tokens)
    for request in ("", "Tell me a story.", "<|im_end|>"):
        with pytest.raises(UsageError, match="can't be asked"):
            with_request(Prompt("", request, ()), "Write.")


class _Model:
    """In the place of `SEEDStory`: tells the prompt that it is given, as the real one reads it from its bundle."""

    def __init__(self, bundle: Bundle, threads: int | None = None) -> None:
        self.bundle, self.began = bundle, list[tuple[int, Any]]()

    def __enter__(self) -> _Model:
        return self

    def __exit__(self, *_: object) -> None: ...

    def begin(self, *, seed: int, sampling: Any) -> Any:
        self.began.append((seed, sampling))
        told = SimpleNamespace(most=0)

        class Told(ScriptedStory):
            finished = True

            def tell(self, *, max_tokens: int) -> Iterator[str]:
                told.most = max_tokens
                return super().tell(max_tokens=max_tokens)

        self.told = told
        return Told(lambda picture, _: self.bundle.manifest.prompt.request, seed)


def test_a_bundle_is_asked_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "SEEDStory", _Model)
    folder = write_paper_bundle(tmp_path / "bundle", prompt=CHAT, licences={"decoder": "Apache-2.0"})
    with open_teacher(folder) as teacher:
        assert isinstance(teacher, BundleTeacher)
        sha256 = Bundle.open(folder).manifest.files["decoder.tflite"][0]
        assert teacher.name == f"paper, int8, sha256 {sha256[:12]}, Apache-2.0"
        for request in ("Write of a fox.", "Write of an owl."):
            draft = teacher.write(request, "Once", 7)
            assert draft == Draft(f"Once {request}<|im_end|>\n<|im_start|>assistant\n", True)
        model: Any = teacher._model
        assert model.began == [(7, SAMPLING)] * 2
        assert model.told.most == MAX_TOKENS
    assert (SAMPLING.temperature, SAMPLING.min_p, SAMPLING.repetition_penalty) == (0.7, 0.05, 1.15)


def test_a_trained_bundle_is_no_teacher(tmp_path: Path) -> None:
    folder = write_paper_bundle(tmp_path / "bundle", prompt=CHAT, qformer_trained=True)
    with pytest.raises(UsageError, match="has learned from a data set"), open_teacher(folder):
        pass


@pytest.mark.parametrize(
    ("case", "code", "message"),
    [
        ("no data", 2, "there is no data set"),
        ("no bundle", 1, "there is no such bundle"),
        ("no labels", 2, "doesn't say what a picture shows"),
        ("unknown thing", 2, "doesn't say what a picture shows"),
        ("no chat", 2, "the teacher can't be asked"),
    ],
)
def test_errors_are_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, code: int, message: str
) -> None:
    story = {"id": 0, "images": ["a.jpg"], "captions": ["A."]}
    if case == "no labels":
        write_lines(data / "train.jsonl", [story])
    if case == "unknown thing":
        write_lines(data / "train.jsonl", [story | {"things": [["gizmo"]], "place": ["sea"]}])
    folder = tmp_path / "none" if case == "no data" else data
    bundle = tmp_path / "bundle"
    if case != "no bundle":
        write_paper_bundle(bundle)
    assert command.main(["teach", "--data", str(folder), "--bundle", str(bundle)]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"storybook: error: {'' if case in ('no labels', 'unknown thing') else message}")
    assert message in err
    assert err.count("\n") == 1


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, data: Path) -> Callable[..., int]:
    """Runs the command with a scripted teacher."""

    def call(teacher: Scripted, *options: str) -> int:
        class Opened:
            def __enter__(self) -> Scripted:
                return teacher

            def __exit__(self, *_: object) -> None: ...

        monkeypatch.setattr(teaching, "open_teacher", lambda bundle, threads: Opened())
        return command.main(["teach", "--data", str(data), *options])

    return call


def test_the_command_reports(scripted: Any, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scripted(Scripted(lambda request, turn: turn == 1), "--stories", "3", "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out.splitlines()[-1])
    assert report == {"pictures": 3, "stories": 3, "skipped": 0, "attempts": 6, "rejected": {"length": 3}}
    assert "rejected attempts: length 3" in err
    assert scripted(Scripted()) == 2
    assert "the taught stories are there already" in capsys.readouterr().err
    (data / TAUGHT).unlink()
    assert scripted(Scripted()) == 0
    assert capsys.readouterr().out == f"pictures 6, stories 6, skipped 0 -> {data / TAUGHT}\n"


def test_the_command_can_be_interrupted(scripted: Any, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scripted(Scripted(stop_at=2)) == 130
    assert "storybook: interrupted; what was written is kept" in capsys.readouterr().err
    assert not (data / TAUGHT).exists()
    second = Scripted()
    assert scripted(second) == 0
    assert len(second.asked) == 4


def test_a_folder_that_cannot_be_written(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teaching, "_write", full)
    with pytest.raises(SeedStoryError, match="can't be written; got No space left on device"):
        run(Scripted(), data)
    assert (data / PARTIAL).exists()


def test_every_result_is_on_disk_at_once(data: Path) -> None:
    """So that a killed process loses one picture at most."""
    seen = []

    def count(request: str, turn: int) -> bool:
        seen.append(len((data / PARTIAL).read_text().splitlines()))
        return False

    run(Scripted(count), data)
    assert seen == [1, 2, 3, 4, 5, 6]  # the settings stand first
