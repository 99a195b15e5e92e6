"""At any moment there is the old bundle, the new one, or none: never half of one."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from export import bundle_writer
from export.bundle_writer import file_entries, staged
from seed_story.bundle import MANIFEST
from seed_story.errors import ExportError
from seed_story.files import file_sha256


def write(folder: Path, words: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graph").write_text(words)
    (folder / MANIFEST).write_text(json.dumps({"schema_version": 1}))
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def gone() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("before", ["nothing", "empty", "bundle"])
def test_the_block_ends_well(tmp_path: Path, before: str) -> None:
    out = tmp_path / "a" / "story"
    if before == "empty":
        out.mkdir(parents=True)
    elif before == "bundle":
        (write(out, "old") / "left over").write_text("")
    with staged(out) as part:
        assert part.parent == out.parent  # on the same disk, so that a rename does it
        write(part, "new")
        assert before != "bundle" or (out / "graph").read_text() == "old"
    assert names(out) == ["graph", MANIFEST]
    assert (out / "graph").read_text() == "new"
    assert names(out.parent) == ["story"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [False, True])
def test_the_block_fails(tmp_path: Path, error: type[BaseException], old: bool) -> None:
    out = tmp_path / "story"
    if old:
        write(out, "old")
    with pytest.raises(error), staged(out) as part:
        write(part, "new")
        raise error
    assert names(tmp_path) == (["story"] if old else [])
    assert not old or (out / "graph").read_text() == "old"


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(ExportError, match="photos") as caught, staged(tmp_path / "photos"):
        pytest.fail("it began")
    assert caught.value.hint
    assert names(tmp_path) == ["photos"] and names(tmp_path / "photos") == ["cat.jpg"]


def test_web_page_with_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"start_url": "/"}')
    with pytest.raises(ExportError, match="isn't a bundle"), staged(tmp_path):
        pytest.fail("it began")
    assert names(tmp_path) == [MANIFEST]


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "story").write_text("dear diary")
    with pytest.raises(ExportError, match="is a file"), staged(tmp_path / "story"):
        pytest.fail("it began")
    with pytest.raises(ExportError, match="can't be written"), staged(tmp_path / "story" / "inside"):
        pytest.fail("it began")
    assert (tmp_path / "story").read_text() == "dear diary"
    assert names(tmp_path) == ["story"]


@pytest.mark.parametrize("step", ["mkdir", "fsync", "write", "rename"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    out = write(tmp_path / "story", "old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_: object, **__: object) -> None:
        raise full

    rename = Path.rename
    if step == "mkdir":
        monkeypatch.setattr(Path, "mkdir", fail)
    elif step == "fsync":
        monkeypatch.setattr(bundle_writer.os, "fsync", fail)
    elif step == "rename":  # the old one has been moved away already
        monkeypatch.setattr(
            Path, "rename", lambda self, to: fail() if self.name.endswith(f".{os.getpid()}.part") else rename(self, to)
        )
    with pytest.raises(ExportError, match=os.strerror(errno.ENOSPC)) as caught, staged(out) as part:
        write(part, "new")
        if step == "write":
            raise full
    monkeypatch.undo()
    assert str(out) in caught.value.what and "space" in caught.value.hint
    assert (out / "graph").read_text() == "old"
    assert names(tmp_path) == ["story"]


def test_leftovers_of_killed_exports_go(tmp_path: Path, gone: int) -> None:
    write(tmp_path / f".story.{gone}.part", "half")
    write(tmp_path / f".story.{gone}.old.part", "replaced")
    others = [f".story.{os.getppid()}.part", f".story2.{gone}.part", f".a.story.{gone}.part", ".story.part",
              f".story.more.{gone}.part", f".story.{gone}.part.bak"]  # fmt: skip
    for name in others:
        write(tmp_path / name, "another's")
    write(tmp_path / "story", "old")
    with staged(tmp_path / "story") as part:
        write(part, "new")
    assert names(tmp_path) == sorted([*others, "story"])
    assert (tmp_path / "story" / "graph").read_text() == "new"


def test_killed_between_the_two_renames(tmp_path: Path, gone: int) -> None:
    """The old bundle comes back, even when the export that finds it fails."""
    write(tmp_path / f".story.{gone}.part", "whole, but nobody knows")
    write(tmp_path / f".story.{gone}.old.part", "old")
    with pytest.raises(RuntimeError), staged(tmp_path / "story"):
        raise RuntimeError
    assert names(tmp_path) == ["story"]
    assert (tmp_path / "story" / "graph").read_text() == "old"


def test_names_with_wildcards(tmp_path: Path, gone: int) -> None:
    write(tmp_path / f".[ab]*.{gone}.part", "half")
    write(tmp_path / f".a.{gone}.part", "another's")
    with staged(tmp_path / "[ab]*") as part:
        write(part, "new")
    assert names(tmp_path) == [f".a.{gone}.part", "[ab]*"]


def test_link_to_a_bundle_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "disk" / "story", "old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "story")
    with staged(tmp_path / "link") as part:
        write(part, "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "story" / "graph").read_text() == "new"
    assert names(tmp_path) == ["disk", "link"] and names(tmp_path / "disk") == ["story"]


def test_two_exports_at_once(tmp_path: Path) -> None:
    """The second doesn't take the first one's unfinished folder for a leftover."""
    code = (
        "import sys; from pathlib import Path; from export.bundle_writer import staged\n"
        "with staged(Path(sys.argv[1])) as part:\n"
        "    (part / 'manifest.json').write_text('{\"schema_version\": 2}')"
    )
    out = tmp_path / "story"
    with staged(out) as part:
        write(part, "first")
        subprocess.run([sys.executable, "-c", code, out], check=True, timeout=60,
                       env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
        assert json.loads((out / MANIFEST).read_text()) == {"schema_version": 2}
        assert (part / "graph").read_text() == "first"
    assert (out / "graph").read_text() == "first"
    assert names(tmp_path) == ["story"]


def test_file_entries(tmp_path: Path) -> None:
    write(tmp_path, "abc")
    assert file_entries(tmp_path) == {"graph": (file_sha256(tmp_path / "graph"), 3)}


DYING = """
import os, signal, sys
from pathlib import Path
from export import bundle_writer
from tests.export.test_bundle_writer import write

where, number, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])

def dying(call):
    def called(*args, **kwargs):
        global number
        number -= 1
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return called

with bundle_writer.staged(out) as part:
    write(part, "new")
    write(part / "work.abc" / "vit", "a saved model")
    if where == "block":
        dying(print)()
    os.system(f"rm -r '{part}/work.abc'")
    holder = {"rename": Path, "rmtree": bundle_writer.shutil, "_sync": bundle_writer}[where]
    setattr(holder, where, dying(getattr(holder, where)))
"""
MOMENTS = [("block", 1, "old"), ("_sync", 1, "old"), ("rename", 1, "old"), ("rename", 2, None), ("rmtree", 1, "new")]
"""At which call of what an export is killed, and the bundle that stands there afterwards."""


@pytest.mark.parametrize(("where", "number", "left"), MOMENTS)
def test_an_export_that_is_killed(tmp_path: Path, where: str, number: int, left: str | None) -> None:
    out = write(tmp_path / "story", "old")
    dead = subprocess.run([sys.executable, "-c", DYING, where, str(number), out], check=False, timeout=60,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])})  # fmt: skip
    assert dead.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) > 1 or left is None
    assert out.exists() == (left is not None)
    if left:
        assert (out / "graph").read_text() == left
        assert names(out) == ["graph", MANIFEST]
    with staged(out) as part:  # the next export
        assert (out / "graph").read_text() == (left or "old")
        assert names(tmp_path) == sorted(["story", part.name])
        write(part, "newer")
    assert (out / "graph").read_text() == "newer"
    assert names(tmp_path) == ["story"]
