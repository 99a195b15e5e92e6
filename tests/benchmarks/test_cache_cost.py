"""What the benchmark of the cache's cost counts: the cache's calls, a promotion a picture, and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import cache as benchmark
from benchmarks.cache import Case, Clock, cases_of, main, turn
from benchmarks.spread import quartiles, spread
from seed_story.cache import SinkCache
from seed_story.config import CacheConfig
from seed_story.contract import DECODE_ATTENTION
from seed_story.story import SEEDStory

SINK = CacheConfig(32, 2, 6, 1, 2)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[SEEDStory]:
    with SEEDStory(tiny_bundle, threads=1) as made:
        yield made


def test_every_policy_takes_its_turn_with_and_without_pictures() -> None:
    policies = ["window", "text-sink", "multimodal-sink"]
    for attention in (False, True):
        cases = cases_of(CacheConfig(), 100, attention=attention)
        policies += ["multimodal-sink"] * attention
        assert [(case.config.policy, case.every) for case in cases] == [
            (policy, every) for every in (0, 100) for policy in policies]  # fmt: skip
        assert [case.config.needs_attention for case in cases[:4]] == [False] * 3 + [attention]


def test_dearer_steps_are_counted(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    answering = model.decoder.signatures[DECODE_ATTENTION]
    run = type(answering).run

    def slow(self: Any) -> None:
        if self is answering:
            time.sleep(0.05)
        run(self)

    monkeypatch.setattr(type(answering), "run", slow)
    monkeypatch.setattr("seed_story.cache.ATTENTION_EVERY", 4)
    *_, asking = cases_of(SINK, 20, attention=True)
    turn(model.decoder, asking, model.decoder.embed([1]), 40, 6)
    assert 0.9 * 50_000 / 4 < asking.graph_us[0] < 2 * 50_000 / 4


def test_a_turn_promotes_as_many_pictures_as_it_shows(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    evicted: list[range] = []
    evict = SinkCache._evict
    monkeypatch.setattr(SinkCache, "_evict", lambda self, one: (evicted.append(one.tokens), evict(self, one))[1])
    row, case = model.decoder.embed([1]), Case("any", SINK, every=20)
    turn(model.decoder, case, row, 100, 6)  # with those of the beginning, which isn't timed
    for _ in range(2):
        evicted.clear()
        turn(model.decoder, case, row, 100, 6)
        assert [len(picture) for picture in evicted] == [6] * 5
    assert len(case.host_us) == len(case.step_ms) == 3
    plain = Case("plain", SINK)
    evicted.clear()
    turn(model.decoder, plain, row, 100, 6)
    assert evicted == []


def test_turns_go_on_where_the_case_was(model: SEEDStory) -> None:
    row, cases = model.decoder.embed([1]), cases_of(SINK, 20, attention=False)[:3]
    for _ in range(2):
        for case in cases:
            turn(model.decoder, case, row, 10, 6)
    assert [case.state.values["position"] for case in cases if case.state] == [32 + 1 + 20] * 3


def test_the_clock_counts_the_cache_s_work_and_no_sleep(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, fill = Clock(), SinkCache.fill
    model.begin()
    row = model.decoder.embed([1])

    def busy(self: SinkCache, *args: Any) -> None:
        until = time.thread_time() + 0.01
        while time.thread_time() < until:
            pass
        time.sleep(0.05)
        fill(self, *args)

    monkeypatch.setattr(SinkCache, "fill", busy)
    with clock.on(model.decoder.cache):
        model.decoder.feed(row)
    counted = clock.us
    assert 10_000 <= counted < 40_000
    model.decoder.feed(row)
    assert clock.us == counted, "nothing counts outside"


@pytest.mark.parametrize(("bound", "verdict", "code"), [(1e9, "PASS", 0), (-1e9, "FAIL", 1)])
def test_the_command(
    tiny_bundle: Path,
    bound: float,
    verdict: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(benchmark, "SHARE_BOUND_PERCENT", bound)
    options = ["--every", "20", "--tokens", "20", "--rounds", "3", "--threads", "1"]
    assert main(["--bundle", str(tiny_bundle), *options]) == code
    *shown, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert (found["verdict"], found["slots"], found["rounds"]) == (verdict, 32, 3)
    assert len(found["cases"]) == 8 and found["cases"]["window"]["share_percent"] == [0, 0, 0]
    assert all(row["host_us"][1] > 0 and row["step_ms"][1] > 0 for row in found["cases"].values())
    assert shown[-1].startswith(verdict) and len(shown) == 10


def test_quartiles() -> None:
    assert quartiles(np.array([4.0, 1.0, 3.0, 2.0, 5.0])) == [2.0, 3.0, 4.0]
    assert spread([2.0, 3.0, 4.0], 1) == "3.0 [2.0, 4.0]"
