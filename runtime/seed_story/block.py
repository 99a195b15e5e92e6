"""The newest tokens that came one by one, kept beside the cache until there are K of them.

Why: `verify_K` must come to the very bits that `decode` comes to token by token, or a guess that comes true would leave
other keys and values behind, and in time another story. An engine's products are the same for a row whatever rows stand
beside it, but a sum of floats depends on its order. So both graphs read the tokens of the block under way in the same
columns, behind all slots, whether they came before or in this very run. Blocks begin where tokens begin to come one by
one, and after each K of them: guesses or not.
"""

from __future__ import annotations

from collections.abc import Mapping

from seed_story.backends.base import Array, aligned_zeros
from seed_story.config import LlamaConfig
from seed_story.contract import BLOCK_K, BLOCK_V


class Block:
    """Keys and values of the block's tokens; they are in the ring as well.

    Args:
        llama: sizes of the decoder.
        size: K.

    Attributes:
        keys, values: float32 `[layers, kv_heads, K, head_dim]`; zeros where no token came yet.
        begin: the absolute position of the block's first token.
        count: how many of its tokens have come, below K.
    """

    def __init__(self, llama: LlamaConfig, size: int) -> None:
        shape = (llama.num_layers, llama.num_kv_heads, size, llama.head_dim)
        self.keys, self.values = aligned_zeros(shape), aligned_zeros(shape)
        self.size, self.begin, self.count = size, 0, 0

    def memory(self) -> dict[str, Array]:
        """The graph inputs that live here, by contract name."""
        return {BLOCK_K: self.keys, BLOCK_V: self.values}

    def restart(self, begin: int) -> None:
        """An empty block from this position on. Zeros, since the graph adds a token's key to what is in its place."""
        self.keys.fill(0)
        self.values.fill(0)
        self.begin, self.count = begin, 0

    def put(self, key: Array, value: Array) -> None:
        """Adds a token, `[layers, kv_heads, head_dim]`; the next block begins after its last one."""
        self.keys[:, :, self.count], self.values[:, :, self.count] = key, value
        self.count += 1
        if self.count == self.size:
            self.restart(self.begin + self.size)

    def state(self) -> dict[str, Array]:
        """A copy of the tokens that have come, for `restore`."""
        return {name: array[:, :, : self.count].copy() for name, array in self.memory().items()}

    def restore(self, position: int, held: Mapping[str, Array]) -> None:
        """The inverse of `state`, where the next token will get this position."""
        count = held[BLOCK_K].shape[2]
        self.restart(position - count)
        for name, array in self.memory().items():
            array[:, :, :count] = held[name]
        self.count = count
