"""The decoder with an int8 cache: every row it keeps, and what it computes from them, against the float64 reference.

A row that is kept is off by half a step at most. What a token makes of the rows is exact: so the reference, once it has
checked a row, goes on with what was kept of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as remembered

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from seed_story.backends.base import Array
from seed_story.config import CacheConfig
from seed_story.decoder import Decoder
from seed_story.errors import ConfigError
from tests.compare import assert_close
from tests.export.test_picture_anchors import (  # noqa: F401 - a fixture that this file wants, too
    ATTENTION_MASS,
    CACHES,
    Tale,
    often_and_forgetful,
    reference_of,
    tale,
)
from tests.export.tiny_decoders import SINK_ROWS, VARIANTS, TinyDecoder, export_tiny
from tests.reference.streaming_llama import StreamingLlama

Tiny = Callable[[str], TinyDecoder]
Open = Callable[..., Decoder]


@pytest.fixture(scope="module")
def int8_decoder(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """A variant of `VARIANTS` with an int8 cache, exported when it is first asked for."""

    @remembered
    def exported(name: str) -> TinyDecoder:
        return export_tiny(*VARIANTS[name], tmp_path_factory.mktemp(name), sink_rows=SINK_ROWS[name])

    return exported


class Follower:
    """A reference that reads what the decoder reads, chunk by chunk, and checks what it keeps.

    Attributes:
        logits: the reference's, of every token.
        furthest: the largest difference between a kept value and the reference's, in steps of its row.
    """

    def __init__(self, decoder: Decoder, reference: StreamingLlama, rows: Array) -> None:
        self.decoder, self.reference, self.rows = decoder, reference, rows
        self.logits: list[Array] = []
        self.furthest = 0.0
        self._store = decoder.cache.store
        decoder.cache.store = self.store  # type: ignore[method-assign]

    def store(self, keys: Array, values: Array, count: int) -> None:
        tokens = range(len(self.logits), len(self.logits) + count)
        self.logits += list(self.reference.feed(self.rows[tokens.start : tokens.stop]))
        self._store(keys, values, count)
        for token, slot in zip(tokens, self.decoder.cache.slots_of(np.array(tokens)), strict=True):
            self._settle(token, int(slot))

    def _settle(self, token: int, slot: int) -> None:
        """Compares a token's rows with the reference's, and has it go on with those that were kept."""
        cache, reference = self.decoder.cache, self.reference
        for rows, theirs in ((cache.keys, reference.keys), (cache.values, reference.values)):
            is_key = rows is cache.keys
            for layer, mine in enumerate(rows.read(np.array([slot]))[:, :, 0].astype(np.float64)):
                exact = reference.rotate(theirs[layer][token], token) if is_key else theirs[layer][token]
                if token < cache.config.sinks:
                    assert_close(mine, exact, "decoder_graph")
                    continue
                steps = np.abs(exact).max(-1, keepdims=True) / 127
                self.furthest = max(self.furthest, float((np.abs(mine - exact) / steps).max()))
                theirs[layer][token] = reference.rotate(mine, -token) if is_key else mine


def asked_tokens(decoder: Decoder) -> list[int]:
    """Grows by each token that the decoder asks what it looks at."""
    asked: list[int] = []
    observe = decoder.cache.observe

    def noted(attention: Array) -> None:
        asked.append(decoder.cache.position)
        observe(attention)

    decoder.cache.observe = noted  # type: ignore[method-assign]
    return asked


def follower(decoder: Decoder, tiny: TinyDecoder, cache: CacheConfig, story: Tale) -> Follower:
    reference = reference_of(tiny, cache, story, asked_tokens(decoder))
    return Follower(decoder, reference, story.rows)


@pytest.mark.parametrize("chunked", [False, True], ids=["one-by-one", "chunks"])
@pytest.mark.parametrize("name", CACHES)
def test_a_long_story_with_pictures(int8_decoder: Tiny, open_decoder: Open, name: str, chunked: bool) -> None:
    """Every kept row, and the logits of every token or chunk, past the end of the cache, under every policy."""
    variant, cache, size = CACHES[name]
    tiny = int8_decoder(variant)
    story = tale(tiny, cache, size)
    decoder = open_decoder(tiny, cache)
    following = follower(decoder, tiny, cache, story)
    random, inside = np.random.default_rng(1), {t for p in story.pictures for t in p[1:]}
    cuts = [t for t in range(1, len(story.rows)) if t not in inside and (not chunked or random.random() < 0.2)]
    for begin, end in zip([0, *cuts], [*cuts, len(story.rows)], strict=True):
        pictures = [range(p.start - begin, p.stop - begin) for p in story.pictures if begin <= p.start < end]
        logits = decoder.feed(story.rows[begin:end], pictures)
        assert len(following.logits) == end
        assert_close(logits, following.logits[-1], "decoder_graph")
    # Half a step of rounding, and what float32 is off by before it.
    assert 0.49 < following.furthest < 0.5 + 1e-3


@pytest.mark.parametrize("name", ["oldest", "first-and-last", "more-at-the-end"])
def test_anchors_are_what_was_kept_of_them_in_float32(int8_decoder: Tiny, open_decoder: Open, name: str) -> None:
    """An anchor's key is its int8 row turned to its slot's index, its value a copy; neither is rounded again."""
    variant, cache, size = CACHES[name]
    tiny = int8_decoder(variant)
    story = tale(tiny, cache, size)
    decoder = open_decoder(tiny, cache)
    reference = follower(decoder, tiny, cache, story).reference
    decoder.feed(story.rows, story.pictures)
    held = reference.seen(len(story.rows))[: cache.kept]
    assert decoder.cache.slot_positions[: cache.kept].tolist() == held
    for slot, token in enumerate(held):
        for layer in range(tiny.config.num_layers):
            key, value = (rows.floats[layer, :, slot] for rows in (decoder.cache.keys, decoder.cache.values))
            assert_close(key, reference.rotate(reference.keys[layer][token], slot), "decoder_graph")
            assert_close(value, reference.values[layer][token], "decoder_graph")


def test_attention_is_told_by_slot(int8_decoder: Tiny, open_decoder: Open) -> None:
    tiny = int8_decoder("gqa")
    story = tale(tiny, ATTENTION_MASS, 4)
    decoder = open_decoder(tiny, ATTENTION_MASS)
    reference = follower(decoder, tiny, ATTENTION_MASS, story).reference
    for picture in story.pictures:
        decoder.cache.expect_picture(picture)
    for token, row in enumerate(story.rows):
        positions = decoder.cache.slot_positions.tolist()
        places = {p: slot for slot, p in reversed(list(enumerate(positions)))} | {token: tiny.slots}
        got = decoder.attend(row[None]).copy()
        expected = np.zeros(tiny.slots + 1)
        for seen, weight in reference.attention[token].items():
            expected[places[seen]] = weight
        assert_close(got, expected, "decoder_graph")


def test_what_is_kept_needs_a_float32_row(int8_decoder: Tiny, open_decoder: Open) -> None:
    """A policy that keeps more than there are rows for is refused, and the story that is told goes on."""
    tiny = int8_decoder("gqa")
    decoder = open_decoder(tiny, CacheConfig(12, 5))
    decoder.feed(tiny.embeddings(20))
    with pytest.raises(ConfigError, match=r"6 kept slots \(text-sink\); expected at most 5.*export the bundle"):
        decoder.reset(CacheConfig(12, 6))
    assert decoder.cache.position == 20
    decoder.feed(tiny.embeddings(3))


def test_reset_starts_anew_bit_by_bit_under_any_policy(int8_decoder: Tiny, open_decoder: Open) -> None:
    """After a story that went to NaN, too."""
    tiny = int8_decoder("gqa")
    rows, used = tiny.embeddings(40), open_decoder(tiny, CacheConfig(12, 5))
    for cache in (CacheConfig(12, 2), CacheConfig(12, 0), CacheConfig(12, 5)):
        used.feed(np.full((20, tiny.config.hidden_size), np.nan, np.float32))
        used.reset(cache)
        fresh = open_decoder(tiny, cache)
        for decoder in (used, fresh):
            decoder.feed(rows[:25])
        for row in rows[25:]:
            np.testing.assert_array_equal(used.feed(row[None]), fresh.feed(row[None]))


def test_the_engine_dequantizes(int8_decoder: Tiny) -> None:
    """No CAST, at which XNNPACK would hand over to slower kernels: one DEQUANTIZE for each layer's keys and values."""
    tiny = int8_decoder("gqa")
    model = schema.ModelT.InitFromPackedBuf(bytearray(tiny.path.read_bytes()), 0)
    names = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    for signature in model.signatureDefs:
        graph = model.subgraphs[signature.subgraphIndex]
        codes = [model.operatorCodes[op.opcodeIndex] for op in graph.operators]
        found = [names[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in codes]
        assert not {"CAST", "STRIDED_SLICE"} & set(found)
        cached = not signature.signatureKey.startswith((b"embed", b"begin"))
        expected = 2 * tiny.config.num_layers * cached
        assert found.count("DEQUANTIZE") == expected
        made = {int(op.outputs[0]) for op, name in zip(graph.operators, found, strict=True) if name == "DEQUANTIZE"}
        products = [op for op, name in zip(graph.operators, found, strict=True) if name == "BATCH_MATMUL"]
        assert not any(made & set(map(int, op.inputs)) for op in products), "the engine would keep copies"
        if expected:  # the last layer's rows are read after the first layer is computed, not before
            places = [at for at, name in enumerate(found) if name == "DEQUANTIZE"]
            assert found.index("FULLY_CONNECTED") < places[0] < found.index("SOFTMAX") < places[-1]
