"""The cache of fixed size: attention sinks, a place for picture anchors, and a ring of the newest tokens.

Slots are `[text sinks | picture anchors | ring]`. The token at absolute position p goes

    p <  sinks:  into slot p, for ever
    p >= sinks:  into ring slot kept + (p - sinks) mod ring, over the token that is `ring` older

Every token thus sees the sinks and the `ring` newest tokens, itself included, at the positions they have INSIDE the
cache (StreamingLLM, arXiv 2309.17453, section 3.2). StreamingLLM reaches that by rotating all keys anew at every step.
Here each key is rotated once, and the query twice: at p for the ring, whose keys are rotated at their absolute
positions, and at p's place inside the cache for the kept slots, whose keys are rotated at their slots' indices.
Scores depend on differences of positions only, so the two ways are equal.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from seed_story.backends.base import ALIGNMENT, Array, aligned_zeros
from seed_story.config import CacheConfig, LlamaConfig, rope_frequencies
from seed_story.contract import MASKED, key_cache, value_cache
from seed_story.errors import UsageError

EMPTY = -1
"""The position of a slot that holds nothing yet."""


def _aligned_layers(shape: tuple[int, ...]) -> Array:
    """Zeros `[layers, ...]` of which every layer is C-contiguous and starts where an engine can read it in place."""
    size, step = int(np.prod(shape[1:])), ALIGNMENT // np.dtype(np.float32).itemsize
    return aligned_zeros((shape[0], -(-size // step) * step))[:, :size].reshape(shape)


class SinkCache:
    """Keys, values, and the positions they stand for. Allocated once; no call makes it larger.

    Args:
        llama: sizes of the decoder.
        config: geometry of the slots.

    Attributes:
        keys, values: float32 `[layers, kv_heads, slots, head_dim]`, aligned; the graphs read them in place.
        region: float32 `[2, slots]`: 1 where a slot belongs to the ring (row 0) or is kept (row 1).
        slot_positions: int64 `[slots]`: absolute position of each slot's token, or EMPTY.
        position: the absolute position that the next token will get.
    """

    def __init__(self, llama: LlamaConfig, config: CacheConfig) -> None:
        self.config = config
        shape = (llama.num_layers, llama.num_kv_heads, config.slots, llama.head_dim)
        self.keys, self.values = _aligned_layers(shape), _aligned_layers(shape)
        self.region = aligned_zeros((2, config.slots))
        self.region[0, config.kept :] = 1
        self.region[1, : config.kept] = 1
        self.slot_positions: npt.NDArray[np.int64] = np.full(config.slots, EMPTY, np.int64)
        self.position = 0
        self._frequencies = np.array(rope_frequencies(llama), np.float64)

    @property
    def max_chunk(self) -> int:
        """The most tokens that one `fill` and `store` may take: two of them must not share a ring slot."""
        return self.config.ring

    def memory(self) -> dict[str, Array]:
        """The graph inputs that live here, by contract name."""
        layers = range(len(self.keys))
        return {
            "region": self.region,
            **{key_cache(i): self.keys[i] for i in layers},
            **{value_cache(i): self.values[i] for i in layers},
        }

    def slots_of(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where tokens go: absolute positions `[n]` to slots `[n]`."""
        sinks, kept = self.config.sinks, self.config.kept
        return np.where(positions < sinks, positions, kept + (positions - sinks) % self.config.ring)

    def fill(self, inputs: Mapping[str, Array], count: int) -> None:
        """Writes `cos`, `sin` and `mask` for the next `count` tokens, which are the last rows of the graph's N.

        Args:
            inputs: of a `prefill_N` or `decode` signature; N >= count.

        Raises:
            UsageError: more tokens than `max_chunk` or N, or none.
        """
        size = len(inputs["cos"])
        if not 1 <= count <= min(size, self.max_chunk):
            raise UsageError("a chunk has no such size", got=count, expected=f"1 to {min(size, self.max_chunk)}")
        positions = self.position + np.arange(count)
        self._fill_rotations(inputs["cos"][size - count :], inputs["sin"][size - count :], positions)
        mask = inputs["mask"]
        mask.fill(MASKED)
        self._fill_mask(mask[size - count :, : self.config.slots], self.slot_positions, positions)
        self._fill_mask(mask[size - count :, self.config.slots + size - count :], positions, positions)

    def _fill_rotations(self, cos: Array, sin: Array, positions: npt.NDArray[np.int64]) -> None:
        inside = np.minimum(positions, self.config.slots - self.config.anchors - 1)
        angles = np.stack([positions, inside], axis=1)[..., None] * self._frequencies  # [n, 2, head_dim / 2]
        half = angles.shape[-1]
        cos[..., :half] = cos[..., half:] = np.cos(angles)
        sin[..., half:] = np.sin(angles)
        np.negative(sin[..., half:], out=sin[..., :half])

    def _fill_mask(self, mask: Array, theirs: npt.NDArray[np.int64], mine: npt.NDArray[np.int64]) -> None:
        """Opens `mask` `[n, m]` where token `mine[i]` may see the token at absolute position `theirs[j]`."""
        age = mine[:, None] - theirs[None, :]
        kept = theirs < self.config.sinks
        mask[(theirs != EMPTY) & (age >= 0) & (kept | (age < self.config.ring))] = 0

    def store(self, keys: Array, values: Array, count: int) -> None:
        """Puts the last `count` of a graph's new keys and values, `[layers, kv_heads, N, head_dim]`, in their slots."""
        positions = self.position + np.arange(count)
        slots = self.slots_of(positions)
        if count == 1:  # a plain index: several times cheaper than a list of one
            self.keys[:, :, slots[0]] = keys[:, :, -1]
            self.values[:, :, slots[0]] = values[:, :, -1]
        else:
            self.keys[:, :, slots] = keys[:, :, -count:]
            self.values[:, :, slots] = values[:, :, -count:]
        self.slot_positions[slots] = positions
        self.position += count

    def reset(self) -> None:
        """Forgets everything."""
        self.keys.fill(0)  # a NaN would outlive its story: masked, it is still multiplied, and 0 * NaN is NaN
        self.values.fill(0)
        self.slot_positions.fill(EMPTY)
        self.position = 0
