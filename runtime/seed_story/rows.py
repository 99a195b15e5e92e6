"""What is in the cache's slots, keys or values: float32, or int8 with scales and the kept slots in float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from seed_story.backends.base import ALIGNMENT, Array, aligned_zeros
from seed_story.config import LlamaConfig
from seed_story.contract import scales_of, sinks_of

LEVELS = 127
"""A row's largest value becomes this code; -128 isn't used, so that codes are symmetric."""

_LEAST_SCALE = 1e-30  # of a row of zeros: any number that can be divided by

Slots = npt.NDArray[np.int64]


def _aligned_layers(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
    """Zeros `[layers, ...]` of which every layer is C-contiguous and starts where an engine can read it in place."""
    size, step = int(np.prod(shape[1:])), ALIGNMENT // np.dtype(dtype).itemsize
    return aligned_zeros((shape[0], -(-size // step) * step), dtype)[:, :size].reshape(shape)


def quantized(rows: Array) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Rows `[..., head_dim]` as int8 codes of their shape and scales `[...]`: a row is its codes times its scale.

    The scale is the row's largest magnitude / 127, so each value is off by half a scale at most. A row with a NaN or an
    infinity gets such a scale.
    """
    scales = np.maximum(np.abs(rows).max(-1) / np.float32(LEVELS), np.float32(_LEAST_SCALE))
    with np.errstate(invalid="ignore"):
        return np.rint(rows / scales[..., None]).astype(np.int8), scales


class Rows:
    """Keys, or values, of all slots. Allocated once; the graphs read them in place.

    Args:
        llama: sizes of the decoder.
        slots: how many there are.
        sink_rows: float32 rows for the kept slots beside an int8 cache; None for a float32 cache.

    Attributes:
        floats: float32 `[layers, kv_heads, slots or sink_rows, head_dim]`: all slots, or the kept ones.
        codes: int8 `[layers, kv_heads, slots, head_dim]` of the other slots; times its scale, a row. Of no size in a
            float32 cache.
        scales: float32 `[layers, kv_heads, 1, slots]`, likewise.
    """

    def __init__(self, llama: LlamaConfig, slots: int, sink_rows: int | None = None) -> None:
        layers, heads, width = llama.num_layers, llama.num_kv_heads, llama.head_dim
        coded = 0 if sink_rows is None else slots
        self.floats = _aligned_layers((layers, heads, slots if sink_rows is None else sink_rows, width))
        self.codes = _aligned_layers((layers, heads, coded, width), np.int8)
        self.scales = _aligned_layers((layers, heads, 1, coded))
        self._exact = self.floats.shape[2]  # slots before this one are float32

    @property
    def arrays(self) -> tuple[Array, ...]:
        """All memory there is."""
        return (self.floats, self.codes, self.scales) if self.codes.size else (self.floats,)

    def clear(self, kept: int) -> None:
        """Zeros everywhere: a NaN would outlive its story; masked, it is still multiplied, and 0 * NaN is NaN.

        Args:
            kept: slots that an int8 cache has in float32 from now on.
        """
        for array in self.arrays:
            array.fill(0)
        if self.codes.size:
            self._exact = kept

    def memory(self, layer: int, name: str) -> dict[str, Array]:
        """A layer's graph inputs, by contract name; `name` is `key_cache(layer)` or `value_cache(layer)`."""
        if not self.codes.size:
            return {name: self.floats[layer]}
        return {
            name: self.codes[layer],
            scales_of(name): self.scales[layer],
            sinks_of(name): self.floats[layer],
        }

    def put(self, slot: int, row: Array) -> None:
        """Writes one slot, `[layers, kv_heads, head_dim]`; several times cheaper than `write` with one."""
        if slot < self._exact:
            self.floats[:, :, slot] = row
        else:
            self.codes[:, :, slot], self.scales[:, :, 0, slot] = quantized(row)

    def write(self, slots: Slots, rows: Array) -> None:
        """Writes slots `[n]`, all different: float32 `[layers, kv_heads, n, head_dim]`."""
        exact = slots < self._exact
        self.floats[:, :, slots[exact]] = rows[:, :, exact]
        if not exact.all():
            coded = slots[~exact]
            self.codes[:, :, coded], self.scales[:, :, 0, coded] = quantized(rows[:, :, ~exact])

    def read(self, slots: Slots) -> npt.NDArray[np.float32]:
        """A copy of slots `[n]`, float32 `[layers, kv_heads, n, head_dim]`."""
        exact, shape = slots < self._exact, self.floats.shape
        rows = np.empty((*shape[:2], len(slots), shape[-1]), np.float32)
        rows[:, :, exact] = self.floats[:, :, slots[exact]]
        if not exact.all():
            coded = slots[~exact]
            rows[:, :, ~exact] = self.codes[:, :, coded] * self.scales[:, :, 0, coded, None]
        return rows

    def state(self, slots: Slots) -> dict[str, Array]:
        """A copy of slots `[n]`, bit by bit, for `restore`; the float32 rows have an empty name."""
        exact = slots < self._exact
        held = {"": self.floats[:, :, slots[exact]]}
        if self.codes.size:
            coded = slots[~exact]
            held |= {"_codes": self.codes[:, :, coded], "_scales": self.scales[:, :, :, coded]}
        return held

    def restore(self, slots: Slots, held: Mapping[str, Array]) -> None:
        """The inverse of `state`."""
        exact = slots < self._exact
        self.floats[:, :, slots[exact]] = held[""]
        if self.codes.size:
            coded = slots[~exact]
            self.codes[:, :, coded], self.scales[:, :, :, coded] = held["_codes"], held["_scales"]
