"""Hashes of files that nobody has touched since they were computed: hashing a bundle is a fifth of a warm start.

A file counts as untouched while its inode, size, modification time and change time are what they were; every write sets
the change time. What decays on a disk without a write is found by those who hash afresh (`seed-story inspect`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path

from seed_story.errors import UsageError
from seed_story.files import cache_dir, file_sha256, whole_file

SETTLED_S = 3.0
"""A file younger than this isn't remembered: a later write could fall into the same tick of its file system's clock,
which is two seconds on FAT."""


def checked_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, 64 hex digits: the remembered one, or computed and remembered.

    Raises:
        OSError: the file can't be read.
    """
    state = _state(path)
    try:
        note = cache_dir() / "checked" / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]}.json"
    except UsageError:  # the user has no home folder
        return file_sha256(path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text())
        if known["state"] == state:
            return str(known["sha256"])
    digest = file_sha256(path)
    newest_s = max(state[-2:]) / 1e9
    if state == _state(path) and newest_s + SETTLED_S < time.time():
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(note) as part:
                part.write_text(json.dumps({"state": state, "sha256": digest}))
    return digest


def _state(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
