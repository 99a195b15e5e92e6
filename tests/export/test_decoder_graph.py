"""The exported decoder and its cache, driven far past capacity, against StreamingLLM told plainly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from seed_story.backends.base import Array
from seed_story.config import CacheConfig
from seed_story.contract import begin_name, prefill_name
from seed_story.decoder import Decoder, next_chunk
from seed_story.errors import UsageError
from tests.compare import assert_close
from tests.export.tiny_decoders import BEGINS, SIZES, VARIANTS, TinyDecoder
from tests.reference.streaming_llama import StreamingLlama

Tiny = Callable[[str], TinyDecoder]
Open = Callable[..., Decoder]

GEOMETRIES = [
    ("gqa", CacheConfig(12, 2)),
    ("gqa", CacheConfig(12, 0)),
    ("gqa", CacheConfig(12, 2, 3, 1, 2)),  # anchors that nobody fills must change nothing
    ("gqa", CacheConfig(12, 9)),  # a ring smaller than every prefill
    ("gqa", CacheConfig(12, 11)),  # a ring of one
    ("mha", CacheConfig(20, 4)),
    ("mha", CacheConfig(20, 0)),
    ("mqa", CacheConfig(10, 3)),
]
every_geometry = pytest.mark.parametrize(
    ("name", "cache"), GEOMETRIES, ids=[f"{n}-{c.slots}-{c.sinks}-{c.anchors}" for n, c in GEOMETRIES]
)
CACHE = CacheConfig(12, 2)


def length(cache: CacheConfig) -> int:
    """Tokens that fill the cache more than three times, and end in the middle of the ring."""
    return 3 * cache.slots + 5


def feed_in(decoder: Decoder, embeddings: Array, chunks: Sequence[int]) -> list[Array]:
    """The logits after each chunk."""
    assert sum(chunks) == len(embeddings)
    ends = np.cumsum(chunks)
    return [decoder.feed(embeddings[end - n : end]).copy() for n, end in zip(chunks, ends, strict=True)]


# --------------------------------------------------------------------------------
# Logits


@every_geometry
def test_token_by_token(tiny_decoder: Tiny, open_decoder: Open, name: str, cache: CacheConfig) -> None:
    tiny = tiny_decoder(name)
    x = tiny.embeddings(length(cache))
    expected = tiny.reference(cache).feed(x)
    decoder = open_decoder(tiny, cache)
    for token in range(len(x)):
        assert_close(decoder.feed(x[token : token + 1]), expected[token], "decoder_graph")


@every_geometry
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_any_schedule_of_chunks(
    tiny_decoder: Tiny, open_decoder: Open, name: str, cache: CacheConfig, seed: int
) -> None:
    """The same logits as one by one, whatever was told at once: by the reference, and by decode itself."""
    tiny = tiny_decoder(name)
    x = tiny.embeddings(length(cache), seed)
    expected = tiny.reference(cache).feed(x)
    singles = feed_in(open_decoder(tiny, cache), x, [1] * len(x))
    random = np.random.default_rng(seed)
    for sizes in (SIZES, (8,), (4,)):  # with fewer graphs, more padding
        chunks: list[int] = []
        while left := len(x) - sum(chunks):
            chunks.append(min(left, int(random.integers(1, random.choice([3, 10, 18])))))
        decoder = open_decoder(tiny, cache, SIZES)
        decoder.steps = replace(decoder.steps, prefill=sizes)
        for got, end in zip(feed_in(decoder, x, chunks), np.cumsum(chunks), strict=True):
            assert_close(got, expected[end - 1], "decoder_graph")
            assert_close(got, singles[end - 1], "decoder_graph")


@pytest.mark.parametrize("first", [1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13, 24, 41])
@pytest.mark.parametrize("cache", [CACHE, CacheConfig(12, 0)], ids=["sinks", "no-sinks"])
def test_the_first_chunk_of_any_size(tiny_decoder: Tiny, open_decoder: Open, cache: CacheConfig, first: int) -> None:
    """One token; N and one more; the ring's size and one more, the cache's, and more than three of it."""
    tiny = tiny_decoder("gqa")
    x = tiny.embeddings(41, seed=first)
    expected = tiny.reference(cache).feed(x)
    decoder = open_decoder(tiny, cache)
    assert_close(decoder.feed(x[:first]), expected[first - 1], "decoder_graph")
    for token in range(first, min(first + 4, 41)):
        assert_close(decoder.feed(x[token : token + 1]), expected[token], "decoder_graph")


@pytest.mark.parametrize("size", [4, 8])
def test_every_fill_of_a_prefill_graph(tiny_decoder: Tiny, open_decoder: Open, size: int) -> None:
    """1 to N tokens at the end of N rows, at every turn of the ring; the other rows don't matter."""
    tiny = tiny_decoder("gqa")
    for count in range(1, size + 1):
        decoder = open_decoder(tiny, CACHE)
        graph = decoder.signatures[prefill_name(size)]
        x = tiny.embeddings(5 * count + 30, seed=count)
        expected = tiny.reference(CACHE).feed(x)
        for end in range(count, len(x) + 1, count):
            for array in (graph.inputs["embeddings"], graph.inputs["cos"], graph.inputs["sin"]):
                array[: size - count] = 1e3
            assert_close(decoder._step(graph, x[end - count : end]), expected[end - 1], "decoder_graph")


@every_geometry
@pytest.mark.parametrize("count", [1, 3, 8])
def test_a_story_begins_without_a_cache(
    tiny_decoder: Tiny, open_decoder: Open, name: str, cache: CacheConfig, count: int
) -> None:
    """`begin_N` by the reference, whatever lies in the rows before its tokens; what comes next reads what it left."""
    tiny = tiny_decoder(name)
    count = min(count, cache.slots)
    x = tiny.embeddings(count + 20, seed=count)
    expected = tiny.reference(cache).feed(x)
    decoder = open_decoder(tiny, cache)
    graph = decoder.signatures[begin_name(8)]
    assert not any(name.startswith("kv_cache") for name in graph.inputs)
    for array in (graph.inputs["embeddings"], graph.inputs["cos"], graph.inputs["sin"]):
        array[: 8 - count] = 1e3
    assert_close(decoder._step(graph, x[:count]), expected[count - 1], "decoder_graph")
    for token in range(count, len(x)):
        assert_close(decoder.feed(x[token : token + 1]), expected[token], "decoder_graph")
    with pytest.raises(UsageError, match="no token yet"):
        decoder._step(graph, x[:1])


def test_a_graph_that_begins_is_used_when_a_story_begins(tiny_decoder: Tiny, open_decoder: Open) -> None:
    """And only then; and in every story."""
    decoder = open_decoder(tiny_decoder("gqa"), CACHE)
    x = tiny_decoder("gqa").embeddings(24)
    ran: list[str] = []
    for name, graph in decoder.signatures.items():
        run = graph.run
        graph.run = lambda name=name, run=run: (ran.append(name), run())[1]  # type: ignore[method-assign, misc]
    for _ in range(2):
        decoder.feed(x[:16])
        decoder.feed(x[16:])
        decoder.reset(CACHE)
    assert ran == ["begin_8", "prefill_8", "prefill_8"] * 2


def test_tokens_by_their_ids(tiny_decoder: Tiny, open_decoder: Open) -> None:
    tiny = tiny_decoder("mha")
    cache = CacheConfig(20, 4)
    decoder, reference = open_decoder(tiny, cache), tiny.reference(cache)
    table = tiny.weights["model.embed_tokens.weight"]
    ids = [int(i) for i in np.random.default_rng(0).integers(0, len(table), 30)] + [0, len(table) - 1]
    for token_id in ids:
        assert_close(decoder.step(token_id), reference.step(table[token_id]), "decoder_graph")


@pytest.mark.parametrize("name", VARIANTS)
def test_embed_gives_the_tables_rows(tiny_decoder: Tiny, open_decoder: Open, name: str) -> None:
    tiny = tiny_decoder(name)
    table = tiny.weights["model.embed_tokens.weight"]
    ids = [0, 5, 5, len(table) - 1, 77]
    got = open_decoder(tiny, CacheConfig(tiny.slots, 2)).embed(ids)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, table[ids])


# --------------------------------------------------------------------------------
# The cache behind them


def check_slots(decoder: Decoder, reference: StreamingLlama) -> None:
    """Every slot: whose it is, the key rotated at that token's absolute position, and the value."""
    cache, told = decoder.cache, len(reference.keys[0])
    sinks, kept, ring = cache.config.sinks, cache.config.kept, cache.config.ring
    held = {p: p for p in range(min(sinks, told))}  # slot to token
    held |= {kept + (p - sinks) % ring: p for p in range(max(sinks, told - ring), told)}
    for slot in range(cache.config.slots):
        token = held.get(slot, -1)
        assert cache.slot_positions[slot] == token
        for layer in range(len(cache.keys.floats)):
            key, value = cache.keys.floats[layer, :, slot], cache.values.floats[layer, :, slot]
            if token < 0:
                assert not key.any()
                assert not value.any()
            else:
                expected = reference.rotate(reference.keys[layer][token], token)
                assert_close(key, expected, "decoder_graph")
                assert_close(value, reference.values[layer][token], "decoder_graph")


@every_geometry
def test_slot_by_slot(tiny_decoder: Tiny, open_decoder: Open, name: str, cache: CacheConfig) -> None:
    tiny = tiny_decoder(name)
    x = tiny.embeddings(length(cache))
    reference, decoder = tiny.reference(cache), open_decoder(tiny, cache)
    for token in range(len(x)):
        before = (
            decoder.cache.keys.floats.copy(),
            decoder.cache.values.floats.copy(),
            decoder.cache.slot_positions.copy(),
        )
        decoder.feed(x[token : token + 1])
        reference.step(x[token])
        check_slots(decoder, reference)
        (slot,) = np.flatnonzero(decoder.cache.slot_positions != before[2])
        np.testing.assert_array_equal(np.delete(decoder.cache.keys.floats, slot, 2), np.delete(before[0], slot, 2))
        np.testing.assert_array_equal(np.delete(decoder.cache.values.floats, slot, 2), np.delete(before[1], slot, 2))


@every_geometry
def test_slot_by_slot_in_chunks(tiny_decoder: Tiny, open_decoder: Open, name: str, cache: CacheConfig) -> None:
    tiny = tiny_decoder(name)
    x = tiny.embeddings(length(cache))
    reference, decoder = tiny.reference(cache), open_decoder(tiny, cache)
    start = 0
    for count in (1, 2, 7, 5, 3, 9, 8, 4, 11, 6):
        if start < len(x):
            reference.feed(x[start : start + count])
            decoder.feed(x[start : start + count])
            check_slots(decoder, reference)
        start += count


def test_after_a_million_tokens(tiny_decoder: Tiny, open_decoder: Open) -> None:
    """Only differences of positions count: a story moved by a million tokens goes on as if it weren't."""
    tiny = tiny_decoder("gqa")
    x = tiny.embeddings(70)
    reference, decoder = tiny.reference(CACHE), open_decoder(tiny, CACHE)
    expected = reference.feed(x)
    decoder.feed(x[:30])
    cache, moved = decoder.cache, CACHE.ring * 100_000
    for slot in range(CACHE.kept, CACHE.slots):
        token = int(cache.slot_positions[slot])
        for layer in range(tiny.config.num_layers):
            cache.keys.floats[layer, :, slot] = reference.rotate(reference.keys[layer][token], token + moved)
        cache.slot_positions[slot] += moved
    cache.position += moved
    for token in range(30, 50):
        assert_close(decoder.feed(x[token : token + 1]), expected[token], "decoder_graph")
    assert_close(decoder.feed(x[50:57]), expected[56], "decoder_graph")
    assert_close(decoder.feed(x[57:]), expected[69], "decoder_graph")
    assert cache.position == 1_000_070


def addresses(decoder: Decoder) -> list[tuple[int, int]]:
    arrays = [
        decoder.cache.keys.floats,
        decoder.cache.values.floats,
        decoder.cache.region,
        decoder.cache.slot_positions,
    ]
    for graph in decoder.signatures.values():
        arrays += [*graph.inputs.values(), *graph.outputs.values()]
    return [(array.ctypes.data, array.nbytes) for array in arrays]


def test_nothing_grows_and_reset_starts_anew_bit_by_bit(tiny_decoder: Tiny, open_decoder: Open) -> None:
    tiny = tiny_decoder("gqa")
    x = tiny.embeddings(60)
    chunks = [1, 9, 2, 1, 14, 1, 1, 8, 4, 5, 1, 12, 1]
    decoder = open_decoder(tiny, CACHE)
    before = addresses(decoder)
    first = feed_in(decoder, x, chunks)
    assert addresses(decoder) == before
    for _ in range(2):
        decoder.cache.reset()
        again = feed_in(decoder, x, chunks)
        for a, b in zip(first, again, strict=True):
            np.testing.assert_array_equal(a, b)
    assert addresses(decoder) == before


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("chunks", [[9], [7, 2], [1] * 9], ids=["full", "padded", "one-by-one"])
def test_a_poisoned_story_ends_with_reset(
    tiny_decoder: Tiny, open_decoder: Open, poison: float, chunks: list[int]
) -> None:
    """Whatever broke one story, the next one in the same memory is as good as the first."""
    tiny = tiny_decoder("gqa")
    x = tiny.embeddings(9)
    decoder = open_decoder(tiny, CACHE)
    first = feed_in(decoder, x, chunks)
    decoder.cache.reset()
    for size in (9, 8, 4, 1):
        decoder.feed(np.full((size, tiny.config.hidden_size), poison, np.float32))
    decoder.cache.reset()
    for a, b in zip(first, feed_in(decoder, x, chunks), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_of_the_wrong_size_is_refused(tiny_decoder: Tiny, open_decoder: Open) -> None:
    cache = CacheConfig(12, 9)
    decoder = open_decoder(tiny_decoder("gqa"), cache)
    x = tiny_decoder("gqa").embeddings(13)
    decoder.feed(x[:9])
    with pytest.raises(UsageError, match="expected 1 to 3"):
        decoder._step(decoder.signatures[prefill_name(4)], x[9:])  # two tokens would share a slot of the ring
    with pytest.raises(UsageError, match="got 0"):
        decoder.cache.fill(decoder.signatures[prefill_name(4)].inputs, 0)
    assert decoder.cache.position == 9


def test_feeding_nothing_is_refused(tiny_decoder: Tiny, open_decoder: Open) -> None:
    decoder = open_decoder(tiny_decoder("gqa"), CACHE)
    with pytest.raises(UsageError, match="at least one"):
        decoder.feed(tiny_decoder("gqa").embeddings(0))


# --------------------------------------------------------------------------------
# Each part matters: these fail if the tests above couldn't


def test_sinks_are_read(tiny_decoder: Tiny, open_decoder: Open) -> None:
    tiny = tiny_decoder("gqa")
    x = tiny.embeddings(46)
    reference = tiny.reference(CACHE)
    whole = reference.feed(x[:45])
    for layer in range(tiny.config.num_layers):
        for token in range(CACHE.sinks):
            reference.values[layer][token][:] = 0
    without = reference.step(x[45])
    decoder = open_decoder(tiny, CACHE)
    decoder.feed(x[:45])
    kept = decoder.cache.values.floats[:, :, : CACHE.kept].copy()
    decoder.cache.values.floats[:, :, : CACHE.kept] = 0
    assert_close(decoder.feed(x[45:]), without, "decoder_graph")
    fresh = open_decoder(tiny, CACHE)
    fresh.feed(x[:45])
    np.testing.assert_array_equal(fresh.cache.values.floats[:, :, : CACHE.kept], kept)
    assert np.abs(fresh.feed(x[45:]) - without).max() > 0.01 * np.abs(whole).max()


@pytest.mark.parametrize("spoil", ["kept rotation", "ring rotation", "sin", "region", "mask"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_every_input_matters(
    tiny_decoder: Tiny, open_decoder: Open, monkeypatch: pytest.MonkeyPatch, spoil: str, chunk: int
) -> None:
    """A wrong input changes the logits by a thousand bounds: nothing that the cache computes goes unread."""
    tiny = tiny_decoder("gqa")
    x = tiny.embeddings(44)
    honest = feed_in(open_decoder(tiny, CACHE), x, [chunk] * (44 // chunk))
    decoder = open_decoder(tiny, CACHE)
    fill = decoder.cache.fill

    def spoiled(inputs: dict[str, Array], count: int) -> slice:
        rows = fill(inputs, count)
        if "region" not in inputs:  # the first chunk, which reads no cache
            return rows
        if spoil == "kept rotation":
            inputs["cos"][:, 1], inputs["sin"][:, 1] = inputs["cos"][:, 0], inputs["sin"][:, 0]
        elif spoil == "ring rotation":
            inputs["cos"][:, 0], inputs["sin"][:, 0] = inputs["cos"][:, 1], inputs["sin"][:, 1]
        elif spoil == "sin":
            np.abs(inputs["sin"], out=inputs["sin"])
        elif spoil == "region":
            inputs["region"][:] = inputs["region"][::-1].copy()
        else:
            inputs["mask"][:, 0] = -1e9
        return rows

    monkeypatch.setattr(decoder.cache, "fill", spoiled)
    dishonest = feed_in(decoder, x, [chunk] * (44 // chunk))
    assert np.abs(dishonest[-1] - honest[-1]).max() > 1e-2 * np.abs(honest[-1]).max()
    if "rotation" in spoil:  # both rotations are one until the ring wraps
        for early in range(12 // chunk):
            np.testing.assert_array_equal(dishonest[early], honest[early])


def test_attention_is_sharp(tiny_decoder: Tiny) -> None:
    """The random weights are worth testing with: one token more or less in sight shows in the logits."""
    tiny = tiny_decoder("gqa")
    x = tiny.embeddings(40)
    a, b = (StreamingLlama(tiny.config, tiny.weights, 2, newest).feed(x) for newest in (10, 9))
    assert np.abs(a).max() > 1
    assert np.abs(a[-1] - b[-1]).max() > 1e-3 * np.abs(a[-1]).max()


def test_chunks_are_cut_as_the_sizes_of_the_graphs_allow(tiny_decoder: Tiny, open_decoder: Open) -> None:
    """`feed` runs the graphs that `next_chunk` names, each with no more than it can hold."""
    decoder = open_decoder(tiny_decoder("gqa"), CACHE)
    ran: list[tuple[int, int]] = []
    step = decoder._step

    def spy(graph: Any, embeddings: Array) -> Array:
        ran.append((len(graph.inputs["cos"]), len(embeddings)))
        return step(graph, embeddings)

    decoder._step = spy  # type: ignore[method-assign]
    decoder.feed(tiny_decoder("gqa").embeddings(29))
    expected, left = [], 29
    while left:
        expected.append(next_chunk(left, (4, 8, 1), CACHE.ring, () if expected else BEGINS))
        left -= expected[-1][1]
    assert ran == expected
    assert sum(count for _, count in ran) == 29
