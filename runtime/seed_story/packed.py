"""Where an engine keeps its own form of a graph's weights, so that the next load maps it instead of making it."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import secrets
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from seed_story.checked import checked_sha256
from seed_story.errors import UsageError
from seed_story.files import cache_dir, file_sha256, whole_file

MOST_BYTES = 2_000_000_000
"""That packed weights may take in the cache folder, beside the newest: a dozen bundles of the default size."""


def _cpu() -> str:
    """What the packed form depends on of this machine: its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def packed_path(graph_sha256: str) -> Path:
    """The file for a graph on this machine with this engine: another of any gets another file."""
    try:
        version = metadata.version("ai-edge-litert")
    except metadata.PackageNotFoundError:
        version = "unknown"
    key = hashlib.sha256(f"{graph_sha256} {version} {platform.machine()} {_cpu()}".encode()).hexdigest()
    return cache_dir() / "packed" / f"{key[:32]}.xnnpack"


def _digest_file(packed: Path) -> Path:
    return packed.with_suffix(".sha256")


def _is_whole(packed: Path) -> bool:
    """Whether a file is what an engine once made: it would believe any weights in it."""
    try:
        return checked_sha256(packed) == _digest_file(packed).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False


def _forget_oldest(newest: Path) -> None:
    """Deletes what was packed longest ago, until the folder is small enough; who maps a file still keeps it."""
    files = sorted(newest.parent.glob("*.xnnpack"), key=lambda path: path.stat().st_mtime_ns)
    held = sum(path.stat().st_size for path in files)
    for path in files:
        if held <= MOST_BYTES or path == newest:
            break
        held -= path.stat().st_size
        path.unlink(missing_ok=True)
        _digest_file(path).unlink(missing_ok=True)


@contextlib.contextmanager
def packed_weights(graph_sha256: str) -> Iterator[Path | None]:
    """A path to load with; a file that this load makes gets its final name only when the load is over.

    Yields None where there is no cache folder, or it can't be written to: the engine then packs anew at every load.
    """
    try:
        final = packed_path(graph_sha256)
        found = _is_whole(final)
        made = final.with_suffix(f".{secrets.token_hex(8)}.part")  # not the process's number: 1 in every container
        if not found:
            final.parent.mkdir(parents=True, exist_ok=True)
            final.unlink(missing_ok=True)  # damaged
            made.touch()
            made.unlink()
    except (OSError, UsageError):  # UsageError: the user has no home folder
        yield None
        return
    if found:
        yield final
        return
    try:
        yield made
        if not made.is_file():
            return
        with contextlib.suppress(OSError):  # a full disk: the next load packs again
            with whole_file(_digest_file(final)) as part:
                part.write_text(file_sha256(made))
            made.replace(final)
            _forget_oldest(final)
    finally:
        made.unlink(missing_ok=True)
