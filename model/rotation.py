"""The orthogonal matrix that turns a residual stream, unless a better one was learned for it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


@lru_cache(maxsize=4)
def rotation_matrix(size: int) -> Doubles:
    """A discrete Hartley transform with signs: orthogonal and symmetric, so its own inverse; float64 `[size, size]`.

    Unlike Hadamard's matrices it exists for every size. No entry is above `sqrt(2 / size)`. The signs, the same every
    time, keep what is alike in all channels from gathering in the first.
    """
    index = np.arange(size)
    angle = 2 * np.pi * (np.outer(index, index) % size) / size
    signs = np.random.default_rng(0).choice([-1.0, 1.0], size)
    return np.asarray(signs[:, None] * (np.cos(angle) + np.sin(angle)) / np.sqrt(size) * signs)


def nearest_rotation(matrix: npt.NDArray[Any]) -> Doubles:
    """The orthogonal matrix nearest to one that has lost a few digits of being one (two of Newton's steps)."""
    made = matrix.astype(np.float64)
    for _ in range(2):
        made = 1.5 * made - 0.5 * made @ made.T @ made
    return np.asarray(made)


def in_blocks(rows: npt.NDArray[Any], turn: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Rows `[n, inputs]` of which every block of channels is turned by a matrix `[block, block]`."""
    return np.asarray((rows.reshape(len(rows), -1, len(turn)) @ turn).reshape(rows.shape))
