"""Writes a bundle so that at any moment there is the old one, the new one, or none: never half of one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from seed_story.bundle import MANIFEST, Manifest
from seed_story.errors import ExportError
from seed_story.files import file_sha256

_PART = ".part"


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` to build the bundle in; becomes `out` when the block ends well, and is removed otherwise.

    Raises:
        ExportError: `out` is something else than a bundle, or can't be written.
    """
    out = Path(os.path.realpath(out))  # a link stays one, and a rename stays on one disk
    part = out.parent / f".{out.name}.{os.getpid()}{_PART}"
    try:
        _check_target(out)
        _remove_left_behind(out)
        part.mkdir(parents=True)
        yield part
        _sync(part)
        _replace(part, out)
    except OSError as error:
        raise ExportError(f"the bundle can't be written to {out}", got=error.strerror or error,
                          hint="Free some space, or choose another folder with OUT=.") from error  # fmt: skip
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_room(out: Path, need: int) -> None:
    """Before minutes are spent: whether the disk of `out` has room for an export.

    Args:
        need: bytes, at the moment when most is there.

    Raises:
        ExportError: it hasn't.
    """
    folder = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < need:
        raise ExportError(f"{folder} has too little room for this export", got=f"{free / 1e9:.1f} GB free",
                          expected=f"{need / 1e9:.1f} GB",
                          hint="Free some space, or choose another folder with OUT=.")  # fmt: skip


def _check_target(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and not _is_bundle(out):
        raise ExportError(f"{out} isn't a bundle, so it won't be replaced", got="a folder with other files",
                          expected="a bundle, an empty folder, or nothing", hint="Choose another folder.")  # fmt: skip
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file", expected="a folder, or nothing", hint="Choose another path.")


def _is_bundle(out: Path) -> bool:
    """Whether a bundle was here, whole or not; web pages have a file of the same name."""
    manifest = out / MANIFEST
    return manifest.is_file() and b'"schema_version"' in manifest.read_bytes()


def _remove_left_behind(out: Path) -> None:
    """Removes what killed exports left; a bundle that one of them had moved away comes back."""
    if not out.parent.is_dir():
        return
    name = re.compile(rf"\.{re.escape(out.name)}\.(\d+)(\.old)?{re.escape(_PART)}")
    for left in sorted(out.parent.iterdir()):
        match = name.fullmatch(left.name)
        if match is None or _is_running(int(match[1])):
            continue
        if match[2] and not out.exists():
            left.rename(out)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _replace(part: Path, out: Path) -> None:
    old = part.with_name(part.name.removesuffix(_PART) + f".old{_PART}")
    if out.exists():
        out.rename(old)
    try:
        part.rename(out)
    except BaseException:
        if not out.exists() and old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def file_entries(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file of a folder: its sha256 and its size in bytes."""
    return {p.name: (file_sha256(p), p.stat().st_size) for p in sorted(folder.iterdir()) if p.name != MANIFEST}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json`, the last file of a bundle."""
    text = json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
