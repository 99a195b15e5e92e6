"""What queries and keys are rotated by at a position: cosines and sines, computed in float64 and remembered."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

_BLOCK = 64  # positions that are computed at once
_KEPT = 16  # of these blocks: a prompt's and those of the last steps, 0.5 MB with heads of 64


class Rotations:
    """Cosines and sines of all positions there are; a step looks them up, for each NumPy call of its own costs 2 µs.

    Args:
        frequencies: float64 `[head_dim / 2]`, radians a token, of `rope_frequencies`.
    """

    def __init__(self, frequencies: npt.NDArray[np.float64]) -> None:
        self._frequencies = frequencies
        self._block = functools.lru_cache(maxsize=_KEPT)(self._computed)

    def at(self, position: int) -> npt.NDArray[np.float32]:
        """`[2, head_dim]`: the cosines, and the sines, of which the first half is negated, as the graphs want them."""
        row: npt.NDArray[np.float32] = self._block(position // _BLOCK)[position % _BLOCK]
        return row

    def _computed(self, block: int) -> npt.NDArray[np.float32]:
        angles = np.multiply.outer(np.arange(_BLOCK) + float(block * _BLOCK), self._frequencies)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.stack([np.tile(cos, 2), np.concatenate([-sin, sin], axis=1)], axis=1).astype(np.float32)
