"""The default number of threads is that of the fast cores; `doctor --threads` says what each number takes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from seed_story import doctor, threads
from seed_story.bundle import Bundle
from seed_story.cli import main
from seed_story.device import performance_cores
from seed_story.doctor import OK, WARN, check_threads
from seed_story.threads import default_threads


def cores(root: Path, monkeypatch: pytest.MonkeyPatch, *speeds: int, figure: str = "cpu_capacity") -> Path:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(len(speeds))))
    for number, speed in enumerate(speeds):
        file = root / f"sys/devices/system/cpu/cpu{number}" / figure
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{speed}\n")
    return root


@pytest.mark.parametrize(
    ("speeds", "fast", "usual"),
    [
        ((250, 250, 250, 250, 770, 770, 770, 1024), 4, 4),  # a phone: four little, three big, one prime
        ((325, 325, 325, 325, 325, 325, 1024, 1024), 2, 2),
        ((1024,) * 6, 6, 4),  # a Jetson
        ((1024, 512), 2, 2),
        ((1024, 511), 1, 1),
    ],
)
@pytest.mark.parametrize("figure", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
def test_fast_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speeds: tuple[int, ...], fast: int, usual: int, figure: str
) -> None:
    root = cores(tmp_path, monkeypatch, *speeds, figure=figure)
    assert performance_cores(root) == fast
    assert default_threads(root) == usual


def test_capacity_comes_before_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A little core may have a high clock."""
    cores(tmp_path, monkeypatch, 2_000_000, 2_400_000, figure="cpufreq/cpuinfo_max_freq")
    assert performance_cores(cores(tmp_path, monkeypatch, 250, 1024)) == 1


def test_only_cores_that_the_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = cores(tmp_path, monkeypatch, 1024, 250, 250)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 2})
    assert performance_cores(root) == 2


@pytest.mark.parametrize("text", [None, "", "fast"])
def test_where_nothing_says_all_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None) -> None:
    root = cores(tmp_path, monkeypatch, 1024, 250, 250)
    file = root / "sys/devices/system/cpu/cpu1/cpu_capacity"
    file.unlink() if text is None else file.write_text(text)
    assert performance_cores(root) is None
    assert default_threads(root) == 3


def test_doctor_times_the_real_engine(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SEED_STORY_CACHE", str(tmp_path / "cache"))
    assert main(["doctor", "--threads", "--json", "--bundle", str(tiny_bundle)]) == 0
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}["threads"]["data"]
    assert found["default"] == default_threads()
    assert {"1", str(default_threads())} <= found["token_ms"].keys()
    assert min(found["token_ms"].values()) > 0
    assert not (tmp_path / "cache").exists(), "a check must not make folders"
    main(["doctor", "--json", "--bundle", str(tiny_bundle)])
    assert "threads" not in {check["name"] for check in json.loads(capsys.readouterr().out)["checks"]}


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        ({"1": 7.0, "2": 5.0, "4": 4.8}, OK, "7 ms with 1, 5 ms with 2, 4.8 ms with 4"),
        ({"1": 7.0, "2": 5.0, "4": 4.0}, WARN, "--threads 4"),
    ],
)
def test_a_better_number_is_told(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, float], status: str, words: str
) -> None:
    monkeypatch.setattr(doctor, "default_threads", lambda: 2)
    monkeypatch.setattr(doctor, "_apart", lambda *_: (None, found))
    check = check_threads(Bundle.open(tiny_bundle))
    assert check.status == status
    assert words in check.text + check.fix


def test_an_engine_that_crashes_is_told(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_apart", lambda *_: ("crashes: Illegal instruction", None))
    check = check_threads(Bundle.open(tiny_bundle))
    assert (check.status, check.data["token_ms"]) == (WARN, None)
    assert "Illegal instruction" in check.text


def test_main_prints_json(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.environ.get("SEED_STORY_CACHE")
    try:
        threads.main(str(tiny_bundle))
    finally:
        os.environ.pop("SEED_STORY_CACHE") if before is None else os.environ.update(SEED_STORY_CACHE=before)
    assert json.loads(capsys.readouterr().out).keys() >= {"1"}
