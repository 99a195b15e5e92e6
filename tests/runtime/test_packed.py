"""Packed weights: made once, whole or not at all, and never another graph's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from seed_story import packed
from seed_story.bundle import Bundle, graph_file
from seed_story.contract import DECODER
from seed_story.files import CACHE_VARIABLE
from seed_story.packed import packed_path, packed_weights
from seed_story.sampling import SamplingConfig
from seed_story.story import SEEDStory


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "packed"


def kept(folder: Path) -> list[str]:
    """The packed files there are, each with its digest, and nothing else."""
    names = sorted(path.name for path in folder.iterdir())
    packed_names = [name for name in names if name.endswith(".xnnpack")]
    assert sorted([*packed_names, *(name.replace(".xnnpack", ".sha256") for name in packed_names)]) == names
    return packed_names


def test_a_new_file_gets_its_name_at_the_end(folder: Path) -> None:
    with packed_weights("abc") as path:
        assert path is not None and path.parent == folder
        assert path != packed_path("abc")
        path.write_bytes(b"packed")
        assert not packed_path("abc").exists()
    assert packed_path("abc").read_bytes() == b"packed"
    assert kept(folder) == [packed_path("abc").name]


def test_a_made_file_is_used_as_it_is() -> None:
    with packed_weights("abc") as path:
        assert path is not None
        path.write_bytes(b"packed")
    with packed_weights("abc") as path:
        assert path == packed_path("abc")
    assert packed_path("abc").read_bytes() == b"packed"


def test_an_engine_that_makes_none(folder: Path) -> None:
    with packed_weights("abc"):
        pass
    assert list(folder.iterdir()) == []


def test_a_failed_load_leaves_nothing(folder: Path) -> None:
    with pytest.raises(RuntimeError), packed_weights("abc") as path:
        assert path is not None
        path.write_bytes(b"half")
        raise RuntimeError
    assert list(folder.iterdir()) == []


def test_a_disk_that_fills_up_is_no_obstacle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed, "file_sha256", full)
    with packed_weights("abc") as path:
        assert path is not None
        path.write_bytes(b"packed")
    assert list(folder.iterdir()) == []


def test_the_oldest_are_forgotten_when_there_is_too_much(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "MOST_BYTES", 25)
    for age, name in enumerate("abcd"):
        with packed_weights(name) as path:
            assert path is not None
            path.write_bytes(b"ten bytes." if name != "d" else b"x" * 30)
        os.utime(packed_path(name), (age, age))
        expected = {"a": "a", "b": "ab", "c": "bc", "d": "d"}[name]
        assert kept(folder) == sorted(packed_path(one).name for one in expected)


def test_what_a_killed_load_left_is_not_built_upon(folder: Path) -> None:
    folder.mkdir(parents=True)
    packed_path("abc").with_suffix(f".{os.getpid()}.part").write_bytes(b"half")
    with packed_weights("abc") as path:
        assert path is not None and not path.exists()


def test_no_place_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    with packed_weights("abc") as path:
        assert path is None


def test_another_graph_machine_or_engine_gets_another_file(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {packed_path("abc"), packed_path("abd")}
    with monkeypatch.context() as context:
        context.setattr(packed, "_cpu", lambda: "flags: none")
        paths.add(packed_path("abc"))
    with monkeypatch.context() as context:
        context.setattr(packed.metadata, "version", lambda _: "0.0.0")
        paths.add(packed_path("abc"))
    with monkeypatch.context() as context:
        context.setattr(packed.platform, "machine", lambda: "pdp11")
        paths.add(packed_path("abc"))
    assert len(paths) == 5
    assert packed_path("abc") in paths


@pytest.mark.parametrize("writable", [True, False])
def test_the_story_is_the_same_packed_and_not(
    loud_bundle: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    if not writable:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file"))
    stories = []
    for _ in range(2):  # the first load packs, the second maps
        with SEEDStory(loud_bundle, threads=1) as model:
            stories.append(model("Once", max_tokens=50, sampling=SamplingConfig.greedy()))
    assert stories[0] == stories[1]
    name = packed_path(Bundle.open(loud_bundle).manifest.files[graph_file(DECODER)][0])
    assert name.is_file() == writable
    if writable:
        assert kept(folder) == [name.name]


# Several loads, and a file that something happened to

_TELL = """
import json, sys
from seed_story.story import SEEDStory
with SEEDStory(sys.argv[1], threads=1) as model:
    text = model("Once upon a time,", max_tokens=40)
    with open("/proc/self/maps") as maps:
        print(json.dumps([text, any(".xnnpack" in line for line in maps)]))
"""


def start(bundle: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _TELL, str(bundle)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=dict(os.environ))  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[str, bool]:
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    text, mapped = json.loads(out)
    return text, mapped


def decoder_file(bundle: Path) -> Path:
    return packed_path(Bundle.open(bundle).manifest.files[graph_file(DECODER)][0])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_a_second_load_maps_the_file_that_the_first_made(loud_bundle: Path, folder: Path) -> None:
    first, _ = finish(start(loud_bundle))
    final = decoder_file(loud_bundle)
    assert kept(folder) == [final.name]
    before = final.stat()
    content = final.read_bytes()
    second, mapped = finish(start(loud_bundle))
    after = final.stat()
    assert mapped, "the second load packed its own weights"
    assert (second, final.read_bytes()) == (first, content)
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_two_processes_that_load_at_once(loud_bundle: Path, folder: Path) -> None:
    both = [start(loud_bundle), start(loud_bundle)]
    (first, _), (second, _) = map(finish, both)
    assert first == second
    assert kept(folder) == [decoder_file(loud_bundle).name]


def test_two_threads_make_two_parts(folder: Path) -> None:
    """Also two containers that share a cache folder: each one's process has the number 1."""
    parts: list[Path | None] = []
    meet = threading.Barrier(2)

    def load(content: bytes) -> None:
        with packed_weights("ab") as part:
            parts.append(part)
            assert part is not None
            part.write_bytes(content)
            meet.wait(timeout=10)
            assert part.read_bytes() == content

    threads = [threading.Thread(target=load, args=(content,)) for content in (b"one", b"two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(parts)) == 2
    assert kept(folder) == [packed_path("ab").name]
    assert packed_path("ab").read_bytes() in (b"one", b"two")


@pytest.mark.parametrize("damage", ["empty", "garbage", "cut", "one bit", "no digest"])
def test_a_damaged_file_is_made_anew(damage: str, loud_bundle: Path, folder: Path) -> None:
    with SEEDStory(loud_bundle, threads=1) as model:
        expected = model("Hello", max_tokens=20)
    final = decoder_file(loud_bundle)
    good = final.read_bytes()
    final.unlink()  # not in place: this process may still map it
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 64
    final.write_bytes({"empty": b"", "garbage": b"x" * 1000, "cut": good[: len(good) // 2], "one bit": flipped,
                       "no digest": good}[damage])  # fmt: skip
    if damage == "no digest":
        final.with_suffix(".sha256").unlink()
    with SEEDStory(loud_bundle, threads=1) as model:
        assert model("Hello", max_tokens=20) == expected
    assert kept(folder) == [final.name]
    assert final.read_bytes() == good


def test_no_home_folder_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for variable in ("SEED_STORY_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with packed_weights("ab") as part:
        assert part is None
