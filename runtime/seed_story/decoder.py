"""The decoder loop: any number of embeddings in, the logits of the last one out, through graphs of fixed sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from seed_story.backends import Graph, GraphSignature
from seed_story.backends.base import Array, aligned_zeros
from seed_story.cache import SinkCache
from seed_story.config import CacheConfig, LlamaConfig
from seed_story.contract import (
    DECODE,
    DECODE_ATTENTION,
    EMBED,
    Signature,
    Steps,
    begin_name,
    decoder_signatures,
    prefill_name,
    verify_name,
)
from seed_story.errors import ConfigError, UsageError
from seed_story.policies import ATTENTION_MASS
from seed_story.snapshot import State

_CALL_COST, _BEGIN_COST, _SCORES_COST = 20, 0.6, 1 / 2500
"""What a call costs beyond its tokens, in tokens; what one that reads no cache costs beside one that does; and by how
much more with each of its tokens, all of which it scores. Measured with two x86-64 cores (19 to 30; of 64 tokens 0.55
to 0.64, of 512 0.77 to 0.80)."""

_NEW = ("k", "v")
"""The outputs that go into the cache."""

_EXPORT_HINT = "Export the bundle again, without --no-attention."

Guess = Callable[[int], Sequence[int]]
"""Gives the ids of tokens that may follow the one that is fed: at most so many, or none."""


def next_chunk(left: int, sizes: Sequence[int], most: int, begins: Collection[int] = ()) -> tuple[int, int]:
    """Which graph to call next, and with how many tokens: the one that spends least a token, or a better beginning.

    Args:
        left: tokens still to be fed, at least 1.
        sizes: N of the graphs there are; 1 is among them.
        most: tokens that one call may take.
        begins: N of the graphs that read no cache, if there is nothing in it yet.

    Returns:
        N of the graph, and how many of the tokens to give it.
    """

    def thriftiest(left: int) -> int:
        return max(sizes, key=lambda size: min(size, left, most) / (size + _CALL_COST))

    def cost(left: int) -> int:
        spent = 0
        while left > 0:
            size = thriftiest(left)
            spent, left = spent + size + _CALL_COST, left - min(size, most)
        return spent

    def cost_of_beginning(size: int) -> float:
        return (size + _CALL_COST) * (_BEGIN_COST + size * _SCORES_COST) + cost(left - min(size, most))

    best = min(begins, key=cost_of_beginning, default=None)
    size = best if best and cost_of_beginning(best) < cost(left) else thriftiest(left)
    return size, min(size, left, most)


class Signatures(Mapping[str, GraphSignature]):
    """All that a decoder's graph can run, by name; each prepared when it is first looked up, as many never are.

    The new keys and values of all lie in the same memory: each run's are stored, or forgotten, before the next.

    Args:
        memory: inputs that all share.
    """

    def __init__(self, graph: Graph, signatures: Sequence[Signature], memory: Mapping[str, Array]) -> None:
        self._graph, self._memory = graph, memory
        self._wanted = {signature.name: signature for signature in signatures}
        self._bound: dict[str, GraphSignature] = {}
        most = max(math.prod(spec.shape) for s in signatures for spec in s.outputs if spec.name in _NEW)
        self._new = {name: aligned_zeros((most,)) for name in _NEW}

    def __getitem__(self, name: str) -> GraphSignature:
        if name not in self._bound:
            signature = self._wanted[name]
            new = {spec.name: self._new[spec.name][: math.prod(spec.shape)].reshape(spec.shape)
                   for spec in signature.outputs if spec.name in _NEW}  # fmt: skip
            self._bound[name] = self._graph.bind(signature, {**self._memory, **new})
        return self._bound[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)


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
        steps: which signatures the graph has.
        sink_rows: see `SinkCache`.

    Attributes:
        signatures: see `Signatures`; what looks one up may raise ContractError, where the graph's isn't the contract's.
        steps: those beside `embed` and `decode`, in short.
        runs: how often it ran so far.

    Raises:
        ConfigError: the cache's policy needs `decode_attention`, and there is none.
    """

    def __init__(
        self, graph: Graph, llama: LlamaConfig, cache: CacheConfig, steps: Steps, sink_rows: int | None = None
    ) -> None:
        self._graph, self._llama = graph, llama
        self.cache = SinkCache(llama, cache, sink_rows, steps.verify)
        memory = {**self.cache.memory(), **(self.cache.block.memory() if self.cache.block else {})}
        signatures = decoder_signatures(llama, cache.slots, steps, sink_rows)
        self.signatures = Signatures(graph, signatures, memory)
        self.steps = steps
        self._ahead: _Ahead | None = None
        self.runs = 0
        self._check(cache)

    def embed(self, token_ids: Sequence[int]) -> Array:
        """Token ids to embeddings, float32 `[len(token_ids), hidden]`."""
        rows, graph = np.empty((len(token_ids), self._llama.hidden_size), np.float32), self.signatures[EMBED]
        for row, token_id in zip(rows, token_ids, strict=True):
            graph.inputs["token"][0] = token_id
            graph.run()
            row[:] = graph.outputs["embeddings"][0]
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
        if cache.needs_attention and not self.steps.attention:
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
            begins = () if self.cache.position else self.steps.begin
            size, count = next_chunk(len(embeddings), (*self.steps.prefill, 1), self.cache.max_chunk, begins)
            name = self._single() if size == 1 else begin_name(size) if size in begins else prefill_name(size)
            logits = self._step(self.signatures[name], embeddings[:count])
            embeddings = embeddings[count:]
        return logits

    def _single(self) -> str:
        return DECODE_ATTENTION if self.steps.attention and self.cache.asks_attention else DECODE

    def _next(self, embedding: Array, guess: Guess | None) -> Array:
        """Feeds one embedding, `[1, hidden]`, which may have been computed ahead."""
        ahead = self._ahead
        if ahead is None or not np.array_equal(ahead.graph.inputs["embeddings"][ahead.row], embedding[0]):
            most = self.cache.max_ahead - 1
            ids = guess(most) if guess and most else ()
            if not ids or not self.steps.verify:
                return self._step(self.signatures[self._single()], embedding)
            graph = self.signatures[verify_name(self.steps.verify)]
            rows = self._run(graph, np.concatenate([embedding, self.embed(ids)]))
            ahead = _Ahead(graph, rows.start, rows.stop)
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
        if not self.steps.attention:
            raise ConfigError("this decoder can't tell its attention", got=f"no signature {DECODE_ATTENTION!r}",
                              hint=_EXPORT_HINT)  # fmt: skip
        self._step(self.signatures[DECODE_ATTENTION], embedding)
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
        if "attention" in graph.outputs:
            self._looked = self.cache.by_slot(graph.outputs["attention"][0])
            self.cache.observe(self._looked)
        self.cache.store(graph.outputs["k"], graph.outputs["v"], len(embeddings))
        return np.asarray(graph.outputs["logits"][0])

    def close(self) -> None:
        """Frees the graph."""
        self._graph.close()
