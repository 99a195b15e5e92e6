"""The exported decoder past its cache, with pictures in the story, under every policy, against the plain reference."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pytest

from seed_story.backends.base import Array
from seed_story.cache import EMPTY
from seed_story.config import CacheConfig
from seed_story.decoder import Decoder
from seed_story.errors import ConfigError
from tests.compare import assert_close
from tests.export.tiny_decoders import TinyDecoder
from tests.reference.streaming_llama import StreamingLlama

Tiny = Callable[[str], TinyDecoder]
Open = Callable[..., Decoder]

ANCHORS = CacheConfig(12, 1, 4, 1, 1)  # two pictures of two anchors, and a ring of seven
FIRST_AND_LAST = CacheConfig(12, 1, 4, 1, 1, "first-and-last")
ATTENTION_MASS = CacheConfig(12, 1, 4, 1, 1, "attention-mass")
CACHES = {
    "window": ("gqa", ANCHORS.under("window"), 4),
    "text-sink": ("gqa", ANCHORS.under("text-sink"), 4),
    "oldest": ("gqa", ANCHORS, 4),
    "first-and-last": ("gqa", FIRST_AND_LAST, 4),
    "attention-mass": ("gqa", ATTENTION_MASS, 4),
    "attention-mass-of-three": ("mha", CacheConfig(20, 2, 6, 1, 1, "attention-mass"), 5),
    "more-at-the-end": ("mha", CacheConfig(20, 2, 6, 1, 2), 5),
    "a-ring-of-one-picture": ("mqa", CacheConfig(10, 1, 4, 0, 2), 5),
    "one-picture-for-ever": ("mqa", CacheConfig(10, 0, 2, 1, 1, "first-and-last"), 3),
}
"""The decoder, its cache, and the tokens of a picture."""


@dataclass(frozen=True)
class Tale:
    """A story of which every other stretch is a picture.

    Args:
        rows: float32 `[n, hidden]`.
        pictures: the rows of each.
    """

    rows: Array
    pictures: list[range]


def tale(tiny: TinyDecoder, cache: CacheConfig, size: int) -> Tale:
    """More than five turns of the ring and at least eight pictures; the stretches of text are 0 to 9 tokens long."""
    random = np.random.default_rng(2)
    pictures: list[range] = []
    end = int(random.integers(0, 4))
    while len(pictures) < 8 or end < cache.slots + 5 * cache.ring:
        pictures.append(range(end, end + size))
        end += size + int(random.integers(0, 10))
    return Tale(tiny.embeddings(end + 3), pictures)


@pytest.fixture(autouse=True)
def often_and_forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each second token is asked what it looks at, and the one before counts little more than half."""
    monkeypatch.setattr("seed_story.cache.ATTENTION_EVERY", 2)
    monkeypatch.setattr("seed_story.cache.MASS_DECAY", 0.6)


def reference_of(
    tiny: TinyDecoder, cache: CacheConfig, story: Tale, asked: Container[int] = range(0, 10**9, 2)
) -> StreamingLlama:
    reference = tiny.reference(cache)
    reference.pictures, reference.asked = story.pictures, asked
    return reference


def asked_tokens(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by each token that the decoder asks what it looks at."""
    asked: list[int] = []
    observe = decoder.cache.observe

    def noted(attention: Array) -> None:
        asked.append(decoder.cache.position)
        observe(attention)

    monkeypatch.setattr(decoder.cache, "observe", noted)
    return asked


def feed_in(decoder: Decoder, story: Tale, ends: list[int]) -> list[Array]:
    """The logits after each chunk; a picture stays in one."""
    logits = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        pictures = [range(p.start - begin, p.stop - begin) for p in story.pictures if begin <= p.start < end]
        logits.append(decoder.feed(story.rows[begin:end], pictures).copy())
    return logits


def token_by_token(decoder: Decoder, story: Tale) -> list[Array]:
    """The logits after every token."""
    for picture in story.pictures:
        decoder.cache.expect_picture(picture)
    return [decoder.feed(row[None]).copy() for row in story.rows]


@pytest.mark.parametrize("name", CACHES)
def test_every_token_of_a_long_story_with_pictures(
    tiny_decoder: Tiny, open_decoder: Open, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Logits of each token, one by one; then of chunks that begin and end anywhere but inside a picture."""
    variant, cache, size = CACHES[name]
    tiny = tiny_decoder(variant)
    story = tale(tiny, cache, size)
    assert len(story.rows) > 5 * cache.ring
    assert len(story.pictures) >= 6
    expected = reference_of(tiny, cache, story).feed(story.rows)
    singles = token_by_token(open_decoder(tiny, cache), story)
    assert_close(np.stack(singles), expected, "decoder_graph")

    random = np.random.default_rng(1)
    inside = {t for p in story.pictures for t in p[1:]}
    cuts = [t for t in range(1, len(story.rows)) if t not in inside and random.random() < 0.2]
    ends = [*cuts, len(story.rows)]
    decoder = open_decoder(tiny, cache)
    asked = asked_tokens(decoder, monkeypatch)
    chunks = feed_in(decoder, story, ends)
    if cache.needs_attention:
        assert asked
        assert not any(token % 2 for token in asked)
        expected = reference_of(tiny, cache, story, asked).feed(story.rows)
    for got, end in zip(chunks, ends, strict=True):
        assert_close(got, expected[end - 1], "decoder_graph")


@pytest.mark.parametrize("name", ["oldest", "first-and-last", "more-at-the-end"])
def test_slot_by_slot(tiny_decoder: Tiny, open_decoder: Open, name: str) -> None:
    """Each anchor's key is its un-rotated key turned to its slot's index, its value a copy."""
    variant, cache, size = CACHES[name]
    tiny = tiny_decoder(variant)
    story = tale(tiny, cache, size)
    reference = reference_of(tiny, cache, story)
    reference.feed(story.rows)
    decoder = open_decoder(tiny, cache)
    feed_in(decoder, story, [len(story.rows)])
    held = reference.seen(len(story.rows))[: cache.kept]  # as the next token would see it
    assert decoder.cache.slot_positions[: cache.kept].tolist() == held
    for slot, token in enumerate(held):
        for layer in range(tiny.config.num_layers):
            key, value = (array[layer, :, slot] for array in (decoder.cache.keys.floats, decoder.cache.values.floats))
            assert_close(key, reference.rotate(reference.keys[layer][token], slot), "decoder_graph")
            assert_close(value, reference.values[layer][token], "decoder_graph")


@pytest.mark.parametrize("name", ["text-sink", "attention-mass", "attention-mass-of-three", "a-ring-of-one-picture"])
def test_attention_is_the_references(tiny_decoder: Tiny, open_decoder: Open, name: str) -> None:
    """Of every token, slot by slot: what each visible token gets, and nothing for what is hidden or empty."""
    variant, cache, size = CACHES[name]
    tiny = tiny_decoder(variant)
    story = tale(tiny, cache, size)
    reference = reference_of(tiny, cache, story, asked=range(10**9))
    reference.feed(story.rows)
    decoder = open_decoder(tiny, cache)
    for picture in story.pictures:
        decoder.cache.expect_picture(picture)
    for token, row in enumerate(story.rows):
        positions = decoder.cache.slot_positions.tolist()
        # An anchor's old copy may still lie in the ring, hidden.
        places = {p: slot for slot, p in reversed(list(enumerate(positions)))} | {token: cache.slots}
        expected = np.zeros(cache.slots + 1)
        for seen, weight in reference.attention[token].items():
            expected[places[seen]] = weight
        got = decoder.attend(row[None])
        assert_close(got, expected, "decoder_graph")
        assert abs(got.sum() - 1) < 1e-5


def test_asking_changes_nothing_but_the_answer(tiny_decoder: Tiny, open_decoder: Open) -> None:
    tiny = tiny_decoder("gqa")
    rows = tiny.embeddings(40)
    plain, asked = open_decoder(tiny, ANCHORS), open_decoder(tiny, ANCHORS)
    for row in rows:
        plain.feed(row[None])
        asked.attend(row[None])
    np.testing.assert_array_equal(plain.cache.keys.floats, asked.cache.keys.floats)
    np.testing.assert_array_equal(plain.cache.values.floats, asked.cache.values.floats)
    assert plain.cache.position == asked.cache.position


def test_a_decoder_that_cannot_be_asked(tiny_decoder: Tiny) -> None:
    """It is opened as before there was an answer, and refuses what needs one."""
    tiny = tiny_decoder("gqa")
    with closing(tiny.open(ANCHORS, attention=False)) as decoder:
        decoder.feed(tiny.embeddings(20))
        for refused in (lambda: decoder.reset(ATTENTION_MASS), lambda: decoder.attend(tiny.embeddings(1))):
            with pytest.raises(ConfigError, match=r"no signature 'decode_attention'.*Export the bundle again"):
                refused()
        assert decoder.cache.position == 20
        decoder.reset(ATTENTION_MASS.under("text-sink"))  # which has the name of an eviction, but no use for it


def test_policies_tell_different_stories(tiny_decoder: Tiny) -> None:
    """And so does each detail of them: none of the tests above could pass with another's."""
    tiny = tiny_decoder("gqa")
    story = tale(tiny, ANCHORS, 4)
    others = [ANCHORS.under("window"), ANCHORS.under("text-sink"), FIRST_AND_LAST, CacheConfig(12, 1, 4, 0, 2),
              ATTENTION_MASS]  # fmt: skip
    oldest, *rest = (reference_of(tiny, cache, story).feed(story.rows) for cache in (ANCHORS, *others))
    for other in rest:
        assert np.abs(other[-1] - oldest[-1]).max() > 1e-3 * np.abs(oldest[-1]).max()


@pytest.mark.parametrize("cache", [ANCHORS, FIRST_AND_LAST], ids=["oldest", "first-and-last"])
def test_anchors_are_read(tiny_decoder: Tiny, open_decoder: Open, cache: CacheConfig) -> None:
    """Without them the next token's logits differ, by exactly what the reference says."""
    tiny = tiny_decoder("gqa")
    story = tale(tiny, cache, 4)
    decoder, reference = open_decoder(tiny, cache), reference_of(tiny, cache, story)
    feed_in(decoder, story, [len(story.rows) - 1])
    honest = reference.feed(story.rows)
    region = slice(cache.sinks, cache.kept)
    anchors = decoder.cache.slot_positions[region].copy()
    assert (anchors != EMPTY).all()
    decoder.cache.values.floats[:, :, region] = 0
    without = decoder.feed(story.rows[-1:]).copy()
    assert np.abs(without - honest[-1]).max() > 1e-2 * np.abs(honest[-1]).max()
    for layer in range(tiny.config.num_layers):
        del reference.keys[layer][-1], reference.values[layer][-1]
        for token in anchors:
            reference.values[layer][token][:] = 0
    assert_close(without, reference.step(story.rows[-1]), "decoder_graph")


def test_nothing_grows_and_reset_changes_the_policy(tiny_decoder: Tiny, open_decoder: Open) -> None:
    """One decoder, one memory, every policy: bit by bit what a decoder opened with it computes."""
    tiny = tiny_decoder("gqa")
    decoder = open_decoder(tiny, ANCHORS)
    story = tale(tiny, ANCHORS, 4)
    arrays = [
        decoder.cache.keys.floats,
        decoder.cache.values.floats,
        decoder.cache.region,
        decoder.cache.slot_positions,
    ]
    before = [(array.ctypes.data, array.nbytes) for array in arrays]
    for policy in ("window", "multimodal-sink", "text-sink"):
        cache = ANCHORS.under(policy)
        decoder.cache.reset(cache)
        (got,) = feed_in(decoder, story, [len(story.rows)])
        (fresh,) = feed_in(open_decoder(tiny, cache), story, [len(story.rows)])
        np.testing.assert_array_equal(got, fresh)
    arrays = [
        decoder.cache.keys.floats,
        decoder.cache.values.floats,
        decoder.cache.region,
        decoder.cache.slot_positions,
    ]
    assert [(array.ctypes.data, array.nbytes) for array in arrays] == before


def logits_at(reference: StreamingLlama, rows: Array, tokens: range) -> Array:
    """The reference's logits after `tokens`, `[n, vocab]`, without telling all that came before.

    A token's keys in layer n depend on what the tokens that it sees have in the layers below, and so on: as many hops
    back as there are layers. All others are NaN here, and what needs one would be, too.
    """
    needed = set(tokens)
    for _ in range(reference.config.num_layers):
        needed |= {seen for token in needed for seen in reference.seen(token)}
    nothing = np.full((reference.config.num_kv_heads, reference.config.head_dim), np.nan)
    logits = {}
    for token in sorted(needed):
        for kept in (*reference.keys, *reference.values):
            kept.extend([nothing] * (token - len(kept)))
        logits[token] = reference.step(rows[token])
    return np.stack([logits[token] for token in tokens])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["oldest", "first-and-last", "more-at-the-end"])
def test_logits_after_a_hundred_thousand_tokens(tiny_decoder: Tiny, open_decoder: Open, name: str) -> None:
    """With a picture every 300, the last 300 tokens are what they are by the reference: nothing has drifted."""
    variant, cache, size = CACHES[name]
    tiny = tiny_decoder(variant)
    begins = range(7, 100_000, 300)
    story = Tale(tiny.embeddings(100_000), [range(begin, begin + size) for begin in begins])
    decoder, last = open_decoder(tiny, cache), range(99_700, 100_000)
    feed_in(decoder, story, [*(begin for begin in begins if begin < last.start), last.start])
    with np.errstate(invalid="ignore"):
        expected = logits_at(reference_of(tiny, cache, story), story.rows, last)
    decoder.cache.expect_picture(story.pictures[-1])
    got = np.stack([decoder.feed(row[None]).copy() for row in story.rows[last.start :]])
    assert_close(got, expected, "decoder_graph")
