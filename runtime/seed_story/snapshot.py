"""A story on disk: written as a whole or not at all, and refused when one byte of it changed.

A snapshot is `MAGIC`, the sha256 of all that follows, and the body: the length of a JSON object (8 bytes, little
endian), the object, and the bytes of the arrays that it lists, one after the other. Nothing in it is executable.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seed_story.backends.base import Array
from seed_story.errors import SnapshotError
from seed_story.files import whole_file

SNAPSHOT_VERSION = 2
MAGIC = b"seed-story snapshot\n"
_DIGEST, _LENGTH = 32, 8  # bytes
_DTYPES = ("float32", "int64", "int8")
_HINT = "Begin the story again, or restore an older snapshot."


@dataclass(frozen=True)
class State:
    """Something at one moment.

    Args:
        values: fit for JSON.
        arrays: float32, int64 and int8, by name.
    """

    values: Mapping[str, Any]
    arrays: Mapping[str, Array]


def write_snapshot(path: str | os.PathLike[str], state: State, identity: Mapping[str, str]) -> None:
    """Writes a state to a file; the old file, if there is one, is whole until the new one is.

    Args:
        identity: what the bundle that can go on with it must agree in.

    Raises:
        SnapshotError: it can't be written.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in state.arrays.items()}
    values = {
        "version": SNAPSHOT_VERSION,
        "bundle": dict(identity),
        "arrays": {name: [array.dtype.name, *array.shape] for name, array in arrays.items()},
        "state": dict(state.values),
    }
    text = json.dumps(values).encode()
    parts: list[bytes | memoryview] = [
        len(text).to_bytes(_LENGTH, "little"),
        text,
        *(a.data.cast("B") for a in arrays.values() if a.size),
    ]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    final = Path(path)
    try:
        with whole_file(final) as made, made.open("xb") as file:
            file.writelines([MAGIC, digest.digest(), *parts])
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise SnapshotError(f"{final} can't be written", got=error.strerror or error) from error


def read_snapshot(path: str | os.PathLike[str], identity: Mapping[str, str]) -> State:
    """Reads what `write_snapshot` wrote.

    Raises:
        SnapshotError: it is missing, damaged, of another version, or of another bundle.
    """
    try:
        data = memoryview(Path(path).read_bytes())
    except OSError as error:
        raise SnapshotError(f"{path} can't be read", got=error.strerror or error, expected="a snapshot") from error
    start = len(MAGIC) + _DIGEST
    if data[: len(MAGIC)] != MAGIC or len(data) < start + _LENGTH:
        raise SnapshotError(f"{path} isn't a snapshot", got=f"{len(data)} bytes that begin otherwise or end too early",
                            hint=_HINT)  # fmt: skip
    digest, body = data[len(MAGIC) : start], data[start:]
    found = hashlib.sha256(body).digest()
    if found != digest:
        raise SnapshotError(f"{path} is damaged", got=f"sha256 {found.hex()}", expected=digest.hex(), hint=_HINT)
    end = _LENGTH + int.from_bytes(body[:_LENGTH], "little")
    values = json.loads(bytes(body[_LENGTH:end]))
    if values["version"] != SNAPSHOT_VERSION:
        raise SnapshotError(f"{path} has another version", got=values["version"], expected=SNAPSHOT_VERSION,
                            hint="Use the seed-story that wrote it.")  # fmt: skip
    if values["bundle"] != dict(identity):
        raise SnapshotError(f"{path} is of another bundle", got=values["bundle"], expected=dict(identity),
                            hint="Restore it with the bundle that told the story.")  # fmt: skip
    return State(values["state"], _arrays(values["arrays"], body[end:]))


def _arrays(described: Mapping[str, list[Any]], data: memoryview) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for name, (dtype, *shape) in described.items():
        assert dtype in _DTYPES
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(data[:size], dtype).reshape(shape).copy()
        data = data[size:]
    return arrays
