"""`seed-story certify`: measures what it says, and a story that gets dearer, or memory that grows, can't pass."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seed_story import certify as command
from seed_story.certificate import DRIFT, PASS, Page, verdict
from seed_story.certify import Plan, drawn_picture, judge, measure, warm_up
from seed_story.cli import main
from seed_story.errors import SeedStoryError, UsageError
from seed_story.resident import Resident, resident
from seed_story.story import SEEDStory, Story
from seed_story.yardstick import Yardstick
from tests.runtime.paper_bundle import write_paper_bundle

ROOT = Path(__file__).parents[2]
PLAN = Plan(pages=40, tokens=8, picture_every=3)
HELD = Resident(240.0, 100.0)


class Clock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeStory:
    """A token takes `token_s(n)` seconds, n tokens after the beginning."""

    def __init__(self, clock: Clock, token_s: Callable[[int], float]) -> None:
        self.clock, self.token_s = clock, token_s
        self.seen: list[str] = []
        self.told = 0

    def begin(self, *, seed: int = 0, policy: object = None) -> FakeStory:
        return self

    def add_picture(self, picture: object) -> FakeStory:
        self.seen.append("picture")
        self.clock.now += 0.5
        return self

    def add_text(self, text: str) -> FakeStory:
        self.seen.append(text)
        return self

    def tell(self, *, max_tokens: int) -> Iterator[str]:
        assert max_tokens == 1
        self.clock.now += self.token_s(self.told)
        self.told += 1
        yield "a"


class FakeShort:
    """A short story whose token takes `ms`."""

    def __init__(self, ms: float = 10.0) -> None:
        self.ms, self.begun = ms, 0

    def begin(self) -> None:
        self.begun += 1

    def token_ms(self) -> float:
        return self.ms


def measured(token_s: Callable[[int], float], held: Callable[[], Resident] = lambda: HELD) -> list[Page]:
    clock = Clock()
    return measure(FakeStory(clock, token_s), FakeShort(), PLAN, clock=clock, memory=held)  # type: ignore[arg-type]


# Measuring


def test_a_page_is_measured_token_for_token() -> None:
    clock, short = Clock(), FakeShort()
    story = FakeStory(clock, lambda n: 0.1 if n % 9 == 0 else 0.01 + 0.01 * (n % 9 > 4))
    pages = measure(story, short, PLAN, clock=clock, memory=lambda: HELD)  # type: ignore[arg-type]
    assert len(pages) == short.begun == 40
    assert story.told == 40 * 9  # one that reads, eight that are timed
    assert [p.page for p in pages] == list(range(1, 41))
    assert [p.picture for p in pages[:5]] == [True, False, False, True, False]
    assert story.seen[:6] == ["picture", "Once upon a time,", "\n\n", "\n\n", "picture", "\n\n"]
    assert pages[0].reading_ms == pytest.approx(600)
    assert pages[1].reading_ms == pytest.approx(100)
    assert pages[0].ms_per_token == pytest.approx(10)
    assert (pages[0].short_ms_per_token, pages[0].ratio) == (10, pytest.approx(1))
    assert (pages[0].resident_mib, pages[0].private_mib) == (240, 100)


def test_a_flat_story_passes_and_one_that_gets_dearer_does_not() -> None:
    assert verdict(judge(measured(lambda n: 0.01)))[0] == PASS
    dearer = judge(measured(lambda n: 0.01 * (1 + 0.06 * n / (40 * 9))))
    assert [f.outcome for f in dearer[:2]] == [DRIFT, DRIFT]
    assert dearer[0].change == pytest.approx(100 * 0.06 * 35 / 40, abs=0.4)


@pytest.mark.parametrize("which", [0, 1])
def test_either_memory_that_grows_fails(which: int) -> None:
    count = itertools.count()

    def held() -> Resident:
        leak = 2.4 * next(count) / 40
        return Resident(240 + leak * (which == 0), 100 + leak * (which == 1))

    findings = judge(measured(lambda n: 0.01, held))
    assert [f.outcome == DRIFT for f in findings] == [False, False, which == 0, which == 1]


def test_a_drift_injected_into_the_real_story_fails(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell = Story.tell

    def slower(self: Story, *, max_tokens: int = 1) -> Iterator[str]:
        time.sleep(0.00002 * self.stats.tokens)
        return tell(self, max_tokens=max_tokens)

    monkeypatch.setattr(Story, "tell", slower)
    with SEEDStory(tiny_bundle, threads=1) as model:
        pages = measure(model, FakeShort(), Plan(pages=30, tokens=8, picture_every=3))
    findings = judge(pages)
    assert verdict(findings)[0] != PASS
    assert findings[0].change > 50


def test_warm_up_looks_every_token_up(tiny_bundle: Path) -> None:
    with SEEDStory(tiny_bundle, threads=1) as model:
        seen: set[int] = set()
        embed = model.decoder.embed

        def spied(ids: Any) -> Any:
            seen.update(ids)
            return embed(ids)

        model.decoder.embed = spied  # type: ignore[method-assign]
        warm_up(model)
        assert model.decoder.cache.position >= model.cache.slots
        assert {*model.tokenizer.encode("The quick brown fox, 1 2 3!")} <= seen
        assert len(model.tokenizer._pieces) == model.tokenizer.vocab_size


def test_pictures_take_turns_and_drawn_ones_differ() -> None:
    given = tuple(np.full((1, 4, 4, 3), value, np.float32) for value in (0.0, 1.0))
    plan = Plan(40, 8, 2, given)
    shown = [plan.picture(page) for page in range(1, 8)]
    assert [None if s is None else float(np.asarray(s).max()) for s in shown] == [0, None, 1, None, 0, None, 1]
    assert len({drawn_picture(index).tobytes() for index in range(334)}) == 334


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_resident_memory_is_this_process_own() -> None:
    before = resident()
    block = np.ones(50 * 2**17)  # 50 MiB, written
    after = resident()
    assert before is not None and after is not None
    assert after.total_mib - before.total_mib == pytest.approx(50, abs=2)
    assert after.private_mib - before.private_mib == pytest.approx(50, abs=2)
    assert len(block) and before.private_mib < before.total_mib


def test_resident_memory_elsewhere(tmp_path: Path) -> None:
    assert resident(tmp_path) is None
    rollup = tmp_path / "smaps_rollup"
    rollup.write_text("7f-8f ---p 00000000 00:00 0 [rollup]\nRss: 2048 kB\nAnonymous: 512 kB\nSwap: 256 kB\n")
    assert resident(tmp_path) == Resident(2.0, 0.75)
    rollup.write_text("Rss: 2048 kB\n")
    assert resident(tmp_path) is None


# The short story's process


def test_the_short_story_is_told_by_another_process(tiny_bundle: Path) -> None:
    with Yardstick(tiny_bundle, threads=1, backend="litert") as short:
        short.begin()
        assert all(0 < short.token_ms() < 60_000 for _ in range(3))
        assert short._process.poll() is None
    assert short._process.returncode == -signal.SIGKILL
    with Yardstick(tiny_bundle, threads=1, backend="litert") as short:
        short._process.kill()
        with pytest.raises(SeedStoryError, match="has ended; got Killed"):
            short.token_ms()


def test_the_short_story_s_error_is_told(tmp_path: Path) -> None:
    with pytest.raises(SeedStoryError, match=r"failed; got .*isn't a bundle"):
        Yardstick(tmp_path, threads=1, backend="litert")


# The command


def certify(bundle: object, folder: Path, *arguments: object) -> int:
    return main(["certify", str(bundle), "--plot", str(folder / "plot.png"), *map(str, arguments)])


def test_certificate(tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    drawn_picture(5).save(picture)
    code = certify(tiny_bundle, tmp_path, "--pages", 20, "--tokens", 4, "--threads", 1, "--picture", picture, "--json")
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    found = json.loads(captured.out)
    assert found["verdict"] == ("PASS" if code == 0 else "FAIL")
    assert (found["pages"], found["tokens_per_page"], found["pictures"], found["cache_slots"]) == (20, 4, 7, 32)
    assert [page["page"] for page in found["series"]] == list(range(1, 21))
    assert all(page["ratio"] > 0 and page["resident_mib"] > page["private_mib"] > 1 for page in found["series"])
    assert [f["name"] for f in found["findings"]] == [
        "time per token, trend", "time per token, ends", "resident memory", "private memory"]  # fmt: skip
    assert found["reason"] and found["versions"]["ai-edge-litert"]
    assert all(line.startswith("seed-story: ") for line in captured.err.splitlines())
    with Image.open(found["plot"]) as plot:
        assert plot.format == "PNG" and plot.width >= 1000
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["picture.png", "plot.png"]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of 10 ms and memory that stays, whatever the machine does; the stories are told all the same."""

    def timed(story: Story, *_: object) -> float:
        for _ in story.tell(max_tokens=1):
            pass
        return 10.0

    monkeypatch.setattr(command, "timed_token", timed)
    monkeypatch.setattr(command, "Yardstick", lambda *_, **__: _Entered())
    monkeypatch.setattr(command, "_memory", lambda: HELD)


class _Entered(FakeShort):
    def __enter__(self) -> _Entered:
        return self

    def __exit__(self, *_: object) -> None:
        pass


SHORT = ("--pages", 20, "--tokens", 4, "--threads", 1)


def test_pass_ends_with_0(tiny_bundle: Path, tmp_path: Path, quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert certify(tiny_bundle, tmp_path, *SHORT) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "PASS: every interval lies inside its bound"
    assert any(re.match(r"page 20 +10\.00 ms/token, x 1\.000 of a short story's; 240\.0 MiB", line) for line in lines)
    assert any(line.startswith("time per token, trend  +0.00 % [+0.00, +0.00], allowed +-3 %: flat") for line in lines)


@pytest.mark.parametrize(
    ("policy", "options"), [("multimodal-sink", ["--picture-eviction", "first-and-last"]), ("window", [])]
)
def test_a_policy_is_certified(
    tiny_bundle: Path, tmp_path: Path, quiet: None, policy: str, options: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ran: list[str] = []
    add_picture = Story.add_picture
    monkeypatch.setattr(
        Story,
        "add_picture",
        lambda self, *a: (ran.append(self._model.decoder.cache.config.policy), add_picture(self, *a))[1],
    )
    assert certify(tiny_bundle, tmp_path, *SHORT, "--policy", policy, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["policy"] == policy and set(ran[1:]) == {policy}  # the first is the warm-up's
    assert found["cache"]["picture_eviction"] == (options or ["", "oldest"])[1]
    assert certify(tiny_bundle, tmp_path, *SHORT, "--policy", "window", "--picture-eviction", "oldest") == 2


def test_fail_ends_with_1(
    tiny_bundle: Path, tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    count = itertools.count()
    monkeypatch.setattr(command, "_memory", lambda: Resident(240 + 0.2 * next(count), 100))
    assert certify(tiny_bundle, tmp_path, *SHORT, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "FAIL"
    assert found["reason"].startswith("resident memory changes: +2.20 MiB")
    assert (tmp_path / "plot.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--pages", "19"], 2, "the number of pages is impossible; got 19; expected 20 to 1000"),
        (["--pages", "1001"], 2, "expected 20 to 1000"),
        (["--pages", "20", "--tokens", "1"], 2, "the story is too short to fill a cache of"),
        (["--plot", "plot.jpg"], 2, "the plot is a PNG file; got plot.jpg"),
        (["--plot", "none/plot.png"], 2, "the folder of the plot doesn't exist; got none"),
        (["--plot", "folder.png"], 2, "the plot's name is a folder's"),
        (["--picture", "none.jpg"], 1, "the picture doesn't exist; got none.jpg"),
    ],
)
def test_wrong_inputs_are_found_before_the_graphs_are_loaded(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    paper = write_paper_bundle(tmp_path / "paper")
    assert main(["certify", str(paper), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err and captured.err.count("\n") == 1


def test_no_bundle_and_no_memory_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert certify(tmp_path, tmp_path) == 1
    assert "isn't a bundle" in capsys.readouterr().err
    monkeypatch.setattr(command, "resident", lambda: None)
    assert certify(tmp_path, tmp_path) == 1
    assert "this process's memory can't be read" in capsys.readouterr().err


def test_plot_that_cannot_be_written_leaves_nothing(
    tiny_bundle: Path, tmp_path: Path, quiet: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Image.Image, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert certify(tiny_bundle, tmp_path, *SHORT, "--json") == 1
    captured = capsys.readouterr()
    assert "can't be written; got No space left on device" in captured.err
    assert json.loads(captured.out)["verdict"] == "PASS"
    assert json.loads(captured.out)["plot"] is None
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_no_process_and_no_plot(tiny_bundle: Path, tmp_path: Path) -> None:
    path = os.pathsep.join((str(ROOT / "runtime"), str(ROOT)))
    arguments = ["certify", tiny_bundle, "--pages", 1000, "--plot", tmp_path / "plot.png"]
    process = subprocess.Popen(
        [sys.executable, "-m", "seed_story.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, bufsize=0,
        start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert b"page 10 of 1000" in process.stderr.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to both processes
    out, err = process.communicate(timeout=60)  # returns when the second process has let go of standard error, too
    assert process.returncode == 130
    assert out == b"" and b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_unsafe_plan_is_refused() -> None:
    Plan(20, 4, 3).check(40)
    with pytest.raises(UsageError, match="41 slots 2 times"):
        Plan(20, 4, 3).check(41)
