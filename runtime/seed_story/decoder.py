"""The decoder loop: any number of embeddings in, the logits of the last one out, through graphs of fixed sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from seed_story.backends import Graph, GraphSignature
from seed_story.backends.base import Array
from seed_story.cache import SinkCache
from seed_story.config import CacheConfig, LlamaConfig
from seed_story.contract import DECODE_ATTENTION, EMBED, decoder_signatures, prefill_name, verify_name
from seed_story.errors import ConfigError, UsageError
from seed_story.policies import ATTENTION_MASS
from seed_story.snapshot import State

_CALL_COST = 8
"""What a call costs beyond its tokens, in tokens; measured on two x86-64 cores, and not sensitive."""

_EXPORT_HINT = "Export the bundle again, without --no-attention."

Guess = Callable[[int], Sequence[int]]
"""Gives the ids of tokens that may follow the one that is fed: at most so many, or none."""


def next_chunk(left: int, sizes: Sequence[int], most: int) -> tuple[int, int]:
    """Which graph to call next, and with how many tokens: the one that spends least a token.

    Args:
        left: tokens still to be fed, at least 1.
        sizes: N of the graphs there are; 1 is among them.
        most: tokens that one call may take.

    Returns:
        N of the graph, and how many of the tokens to give it.
    """

    def use(size: int) -> float:
        return min(size, left, most) / (size + _CALL_COST)

    size = max(sizes, key=use)
    return size, min(size, left, most)


@dataclass
class _Ahead:
    """What `verify_K` computed for tokens that may come; none of it is in the cache.

    Args:
        row: of the graph, for the token that may come next.
        end: the row behind the last of them.
    """

    graph: GraphSignature
    row: int
    end: int


class Decoder:
    """The LLaMA graph and its cache.

    Args:
        graph: `decoder.tflite`, loaded; this object owns it from now on.
        attention: whether the graph has `decode_attention`.
        sink_rows: see `SinkCache`.
        verify: K of the graph's `verify_K`; 0 where there is none.

    Attributes:
        signatures: all that the graph can run, by name.
        runs: how often it ran so far.

    Raises:
        ConfigError: the cache's policy needs `decode_attention`, and there is none.
    """

    def __init__(
        self,
        graph: Graph,
        llama: LlamaConfig,
        cache: CacheConfig,
        prefill_sizes: Sequence[int],
        attention: bool = False,
        sink_rows: int | None = None,
        verify: int = 0,
    ) -> None:
        self._graph, self._llama = graph, llama
        self.cache = SinkCache(llama, cache, sink_rows, verify)
        memory = {**self.cache.memory(), **(self.cache.block.memory() if self.cache.block else {})}
        embed, *steps = decoder_signatures(llama, cache.slots, prefill_sizes, attention, sink_rows, verify)
        assert embed.name == EMBED
        self._embed = graph.bind(embed)
        bound = {step.name: graph.bind(step, memory) for step in steps}
        self._steps: dict[int, GraphSignature] = {size: bound[prefill_name(size)] for size in (*prefill_sizes, 1)}
        self.signatures = {EMBED: self._embed, **bound}
        self._verify = bound.get(verify_name(verify))
        self._attention = bound.get(DECODE_ATTENTION)
        self._ahead: _Ahead | None = None
        self.runs = 0
        self._check(cache)

    @property
    def sizes(self) -> tuple[int, ...]:
        """N of the graphs there are, 1 among them."""
        return tuple(self._steps)

    def embed(self, token_ids: Sequence[int]) -> Array:
        """Token ids to embeddings, float32 `[len(token_ids), hidden]`."""
        rows = np.empty((len(token_ids), self._llama.hidden_size), np.float32)
        for row, token_id in zip(rows, token_ids, strict=True):
            self._embed.inputs["token"][0] = token_id
            self._embed.run()
            row[:] = self._embed.outputs["embeddings"][0]
        return rows

    def reset(self, cache: CacheConfig) -> None:
        """Forgets everything, and keeps what `cache` says from now on.

        Raises:
            ConfigError: its policy needs `decode_attention`, and there is none; or it has no room for what is kept.
            UsageError: another number of slots.
        """
        self._check(cache)
        self._ahead = None
        self.cache.reset(cache)

    def restore(self, state: State) -> None:
        """Goes on where the cache was when it gave this `state`; see `SinkCache.restore`."""
        self._ahead = None
        self.cache.restore(state)

    def _check(self, cache: CacheConfig) -> None:
        if cache.needs_attention and self._attention is None:
            raise ConfigError(f"the picture eviction {ATTENTION_MASS} needs a decoder that tells its attention",
                              got=f"no signature {DECODE_ATTENTION!r}", expected="a bundle that has it",
                              hint=_EXPORT_HINT)  # fmt: skip

    def feed(self, embeddings: Array, pictures: Sequence[range] = (), guess: Guess | None = None) -> Array:
        """Continues the sequence by `embeddings`, float32 `[n, hidden]`, n >= 1.

        Args:
            pictures: which rows are pictures, oldest first, the two tokens around each included.
            guess: where one embedding is fed, what may follow it: computed in the same run, if there is a `verify_K`,
                and used if it is what the next call feeds. Until then it is no part of the sequence.

        Returns:
            The logits after the last one, float32 `[vocab]`: a view that the next call overwrites.

        Raises:
            UsageError: there are no embeddings, or pictures elsewhere.
            ConfigError: a picture doesn't fit the cache.
        """
        if not len(embeddings):
            raise UsageError("there is nothing to feed", got=embeddings.shape, expected="at least one embedding")
        if pictures and pictures[-1].stop > len(embeddings):
            raise UsageError("a picture isn't among the embeddings", got=pictures[-1],
                             expected=f"rows below {len(embeddings)}")  # fmt: skip
        begin = self.cache.position
        for rows in pictures:
            self.cache.expect_picture(range(begin + rows.start, begin + rows.stop))
        if len(embeddings) == 1 and not pictures:
            return self._next(embeddings, guess)
        while len(embeddings):
            size, count = next_chunk(len(embeddings), self.sizes, self.cache.max_chunk)
            logits = self._step(self._single() if size == 1 else self._steps[size], embeddings[:count])
            embeddings = embeddings[count:]
        return logits

    def _single(self) -> GraphSignature:
        return self._attention if self._attention and self.cache.asks_attention else self._steps[1]

    def _next(self, embedding: Array, guess: Guess | None) -> Array:
        """Feeds one embedding, `[1, hidden]`, which may have been computed ahead."""
        ahead = self._ahead
        if ahead is None or not np.array_equal(ahead.graph.inputs["embeddings"][ahead.row], embedding[0]):
            most = self.cache.max_ahead - 1
            ids = guess(most) if guess and most else ()
            if not ids or self._verify is None:
                return self._step(self._single(), embedding)
            rows = self._run(self._verify, np.concatenate([embedding, self.embed(ids)]))
            ahead = _Ahead(self._verify, rows.start, rows.stop)
        row, outputs = ahead.row, ahead.graph.outputs
        self.cache.store(outputs["k"][:, :, row : row + 1], outputs["v"][:, :, row : row + 1], 1)
        ahead.row += 1
        self._ahead = ahead if ahead.row < ahead.end else None
        return np.asarray(outputs["logits"][row])

    def step(self, token_id: int) -> Array:
        """Continues the sequence by one token; see `feed`."""
        return self.feed(self.embed([token_id]))

    def attend(self, embedding: Array) -> Array:
        """Continues the sequence by one embedding, float32 `[1, hidden]`, to learn what it looks at.

        Returns:
            float32 `[slots + 1]`, which the next such call may overwrite: how much it looks at what was in each slot
            of the cache before this call, and at itself. The mean over layers and heads; the sum is 1.

        Raises:
            ConfigError: the graph has no `decode_attention`.
        """
        if self._attention is None:
            raise ConfigError("this decoder can't tell its attention", got=f"no signature {DECODE_ATTENTION!r}",
                              hint=_EXPORT_HINT)  # fmt: skip
        self._step(self._attention, embedding)
        return self._looked

    def _run(self, graph: GraphSignature, embeddings: Array) -> slice:
        """Runs a graph with the next tokens; gives their rows."""
        rows = self.cache.fill(graph.inputs, len(embeddings))
        graph.inputs["embeddings"].fill(0)  # what an earlier chunk left could be a NaN
        graph.inputs["embeddings"][rows] = embeddings
        graph.run()
        self.runs += 1
        return rows

    def _step(self, graph: GraphSignature, embeddings: Array) -> Array:
        self._ahead = None
        self._run(graph, embeddings)
        if graph is self._attention:
            self._looked = self.cache.by_slot(graph.outputs["attention"][0])
            self.cache.observe(self._looked)
        self.cache.store(graph.outputs["k"], graph.outputs["v"], len(embeddings))
        return np.asarray(graph.outputs["logits"][0])

    def close(self) -> None:
        """Frees the graph."""
        self._graph.close()
