"""What every source needs in the user's cache folder: the folder itself, an intact file, a lock."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seed_story.errors import DownloadError
from seed_story.files import CACHE_VARIABLE, file_sha256

CHUNK = 1 << 20  # bytes read at a time


def make_folder(folder: Path) -> Path:
    """Creates `folder` with its parents.

    Raises:
        DownloadError: it can't be created; the message names the variable that moves the cache.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"the folder {folder} can't be created",
            got=error.strerror,
            hint=f"Set {CACHE_VARIABLE} to a folder that you can write to.",
        ) from error
    return folder


def is_intact(path: Path, sha256: str | None) -> bool:
    """Whether `path` is a file with that sha256; with None, whether it is a file at all."""
    return path.is_file() and (sha256 is None or file_sha256(path) == sha256)


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`'s behalf, among processes and threads; waits for whoever has it.

    The lock is an advisory `flock` (Linux, macOS, WSL) on the hidden file `.NAME.lock` beside `path`: the
    kernel drops it when its holder dies, so that nothing stale remains. The empty file stays.
    """
    make_folder(path.parent)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that is fetching {path.name}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
