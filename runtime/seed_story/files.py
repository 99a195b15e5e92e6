"""Files that outlive the process: the user's cache folder and the hashes that vouch for what lies there."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from seed_story.errors import UsageError

CACHE_VARIABLE = "SEED_STORY_CACHE"


def cache_dir() -> Path:
    """The user's cache folder; it need not exist yet.

    `$SEED_STORY_CACHE` if set, else `$XDG_CACHE_HOME/seed-story`, else `~/.cache/seed-story`. A relative
    `XDG_CACHE_HOME` is ignored, as the XDG base directory specification asks.

    Raises:
        UsageError: there is no home folder.
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():
        return xdg / "seed-story"
    try:
        return Path.home() / ".cache" / "seed-story"
    except RuntimeError as error:  # no HOME, and no entry for this user
        raise UsageError("the user has no home folder", hint=f"Set {CACHE_VARIABLE} to a folder.") from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A hidden name beside `path` to write to, which becomes `path` when nothing was raised, and is gone otherwise."""
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        yield hidden
        hidden.replace(path)
    finally:
        hidden.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
