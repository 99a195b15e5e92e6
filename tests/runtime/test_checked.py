"""A hash is remembered only while nobody touches the file."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from seed_story import checked
from seed_story.bundle import Bundle
from seed_story.checked import checked_sha256
from seed_story.errors import BundleError
from seed_story.files import CACHE_VARIABLE, file_sha256
from tests.runtime.paper_bundle import write_paper_bundle

BEFORE, AFTER = b"once upon a time", b"Once upon a time"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "checked"


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Which files were read to be hashed."""
    found: list[Path] = []

    def watched(path: Path) -> str:
        found.append(path)
        return file_sha256(path)

    monkeypatch.setattr(checked, "file_sha256", watched)
    return found


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clock on."""

    def move(seconds: float) -> None:
        now = time.time() + seconds
        monkeypatch.setattr(checked.time, "time", lambda: now)

    return move


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "graph.tflite"
    path.write_bytes(BEFORE)
    return path


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_an_old_file_is_read_once(file: Path, hashed: list[Path], later: Callable[[float], None]) -> None:
    later(10)
    assert [checked_sha256(file) for _ in range(3)] == [sha256(BEFORE)] * 3
    assert hashed == [file]


def test_a_young_file_is_read_every_time(file: Path, hashed: list[Path]) -> None:
    assert [checked_sha256(file) for _ in range(2)] == [sha256(BEFORE)] * 2
    assert hashed == [file, file]


def test_a_touched_file_is_read_again(file: Path, later: Callable[[float], None]) -> None:
    """Of the same size, in place, and with the modification time put back: the change time tells."""
    later(10)
    checked_sha256(file)
    times = file.stat()
    with file.open("r+b") as opened:
        opened.write(AFTER)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_mtime_ns == times.st_mtime_ns
    assert checked_sha256(file) == sha256(AFTER)


def test_another_file_of_that_name_is_read(file: Path, tmp_path: Path, later: Callable[[float], None]) -> None:
    other = tmp_path / "other"
    other.write_bytes(AFTER)
    later(10)
    checked_sha256(file)
    other.replace(file)
    assert checked_sha256(file) == sha256(AFTER)


@pytest.mark.parametrize("note", [b"", b"[]", b"{}", b'{"state": 1}', b"\xff"])
def test_a_damaged_note_is_no_note(file: Path, folder: Path, note: bytes, later: Callable[[float], None]) -> None:
    later(10)
    checked_sha256(file)
    (written,) = folder.iterdir()
    written.write_bytes(note)
    assert checked_sha256(file) == sha256(BEFORE)


def test_no_place_for_notes(file: Path, folder: Path, later: Callable[[float], None]) -> None:
    later(10)
    folder.parent.write_bytes(b"a file where the folder should be")
    assert checked_sha256(file) == sha256(BEFORE)


def test_no_home(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    assert checked_sha256(file) == sha256(BEFORE)


def test_decay_without_a_write_is_found_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: Callable[[float], None]
) -> None:
    paper = write_paper_bundle(tmp_path / "paper")
    later(10)
    Bundle.open(paper)
    frozen = {path: checked._state(path) for path in paper.iterdir()}
    monkeypatch.setattr(checked, "_state", frozen.__getitem__)  # as on a disk that changes a bit by itself
    data = (paper / "vit.tflite").read_bytes()
    (paper / "vit.tflite").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    Bundle.open(paper)
    with pytest.raises(BundleError, match=r"vit\.tflite is damaged"):
        Bundle.open(paper, afresh=True)
