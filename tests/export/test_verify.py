"""A decoder that computes ahead: whatever is guessed, the same bits as token by token, and those of the reference.

The guesses are made by adversaries who know the story. XNNPACK's products are the same for a row whatever rows stand
beside it, which these tests check, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import pytest

from seed_story.backends.base import Array
from seed_story.config import CacheConfig
from seed_story.decoder import Decoder, Guess
from seed_story.errors import ConfigError
from tests.compare import assert_close
from tests.export.test_picture_anchors import ANCHORS, ATTENTION_MASS, CACHES, Tale, reference_of, tale
from tests.export.tiny_decoders import TinyDecoder

Tiny = Callable[[str, str], TinyDecoder]


@pytest.fixture(autouse=True)
def often_and_forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fifth token is asked what it looks at, so that blocks are cut short, and a few answers decide."""
    monkeypatch.setattr("seed_story.cache.ATTENTION_EVERY", 5)
    monkeypatch.setattr("seed_story.cache.MASS_DECAY", 0.6)


@dataclass
class Adversary:
    """Guesses what comes, right, wrong, or right for a while."""

    ids: Sequence[int]
    vocab: int
    right: Callable[[], bool]

    def at(self, token: int) -> Guess:
        """What to guess while this token is fed."""

        def guess(most: int) -> list[int]:
            return [t if self.right() else (t + 1) % self.vocab for t in self.ids[token + 1 : token + 1 + most]]

        return guess


_COIN = np.random.default_rng(4)
ADVERSARIES: dict[str, Callable[[], bool]] = {
    "oracle": lambda: True,
    "always-wrong": lambda: False,
    "sometimes-right": lambda: bool(_COIN.random() < 0.7),
}


def in_words(tiny: TinyDecoder, story: Tale) -> tuple[Tale, list[int]]:
    """The story with a token's embedding in each row, and the tokens."""
    ids = np.random.default_rng(7).integers(0, tiny.config.vocab_size, len(story.rows)).tolist()
    rows = np.array(tiny.weights["model.embed_tokens.weight"][ids], np.float32)
    return Tale(rows, story.pictures), ids


def cuts_of(story: Tale) -> Iterator[range]:
    """Single tokens, pictures too, but for a prefill here and there, of text alone."""
    random, inside = np.random.default_rng(3), {t for p in story.pictures for t in p}
    token = 0
    while token < len(story.rows):
        count = int(random.integers(2, 9)) if random.random() < 0.06 else 1
        if inside & set(range(token, token + count)):
            count = 1
        yield range(token, min(token + count, len(story.rows)))
        token += count


def telling(decoder: Decoder, story: Tale, adversary: Adversary | None) -> dict[int, Array]:
    """The logits after each call, by its last token."""
    for picture in story.pictures:
        decoder.cache.expect_picture(picture)
    return {
        rows[-1]: decoder.feed(
            story.rows[rows.start : rows.stop], (), adversary.at(rows[-1]) if adversary and len(rows) == 1 else None
        ).copy()
        for rows in cuts_of(story)
    }


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("name", CACHES)
def test_no_guess_changes_a_bit(verifying_decoder: Tiny, name: str, kind: str) -> None:
    """Logits of every token, and all that the cache holds, far past its end, with pictures that leave it."""
    variant, cache, size = CACHES[name]
    tiny = verifying_decoder(variant, kind)
    story, ids = in_words(tiny, tale(tiny, cache, size))
    with closing(tiny.open(cache)) as plain:
        expected = telling(plain, story, None)
        state = plain.cache.state()
    for adversary, right in ADVERSARIES.items():
        with closing(tiny.open(cache)) as decoder:
            got = telling(decoder, story, Adversary(ids, tiny.config.vocab_size, right))
            assert (decoder.runs < plain.runs) == (adversary != "always-wrong")
            assert got.keys() == expected.keys()
            for token in got:
                np.testing.assert_array_equal(got[token], expected[token], f"{adversary}, after token {token}")
            mine = decoder.cache.state()
        assert mine.values == state.values
        for array in state.arrays:
            np.testing.assert_array_equal(mine.arrays[array], state.arrays[array], array)


@pytest.mark.parametrize("name", CACHES)
def test_every_token_is_that_of_the_reference(verifying_decoder: Tiny, name: str) -> None:
    variant, cache, size = CACHES[name]
    tiny = verifying_decoder(variant, "float32")
    story, ids = in_words(tiny, tale(tiny, cache, size))
    with closing(tiny.open(cache)) as decoder:
        asked: list[int] = []
        observe = decoder.cache.observe
        decoder.cache.observe = lambda a: (asked.append(decoder.cache.position), observe(a))[1]  # type: ignore[method-assign]
        got = telling(decoder, story, Adversary(ids, tiny.config.vocab_size, ADVERSARIES["sometimes-right"]))
    expected = reference_of(tiny, cache, story, asked).feed(story.rows)
    assert bool(asked) == cache.needs_attention
    tokens = [*got]
    assert_close(np.stack([got[token] for token in tokens]), expected[tokens], "decoder_graph")


def test_attention_is_told_by_slot(verifying_decoder: Tiny) -> None:
    """The block's tokens have columns of their own in the answer, and slots of their own in what is told of it."""
    tiny = verifying_decoder("gqa", "float32")
    x = tiny.embeddings(40)
    with closing(tiny.open(ATTENTION_MASS)) as decoder:
        for row in x[:39]:
            decoder.feed(row[None])
        positions = decoder.cache.slot_positions.copy()
        got = decoder.attend(x[39:])
    reference = tiny.reference(ATTENTION_MASS)
    reference.asked = [39]
    reference.feed(x)
    assert got[-1] > 0
    assert got.sum() == pytest.approx(1, abs=1e-5)
    for token, looked in reference.attention[39].items():
        (slot,) = np.flatnonzero(positions == token) if token != 39 else [-1]
        assert got[slot] == pytest.approx(looked, abs=1e-5), f"token {token}"


def test_what_was_computed_ahead_is_dropped(verifying_decoder: Tiny) -> None:
    """By a state that is put back, and by a new story: it stood for another past."""
    tiny = verifying_decoder("gqa", "float32")
    table = np.array(tiny.weights["model.embed_tokens.weight"], np.float32)
    with closing(tiny.open(ANCHORS)) as decoder:
        decoder.feed(table[[1, 2, 3]])
        before = decoder.cache.state()
        expected = decoder.step(6).copy()

        def ahead(change: Callable[[], object]) -> Array:
            decoder.reset(ANCHORS)
            decoder.feed(table[[9, 8, 7]])
            decoder.feed(table[[5]], (), lambda most: [6, 7][:most])
            change()
            return decoder.step(6)

        np.testing.assert_array_equal(ahead(lambda: decoder.restore(before)), expected)
        again = ahead(lambda: (decoder.reset(ANCHORS), decoder.feed(table[[1, 2, 3]])))
        np.testing.assert_array_equal(again, expected)
        runs = decoder.runs
        ahead(lambda: None)
        assert decoder.runs == runs + 2, "else this test would show nothing"


def test_a_ring_smaller_than_a_block_is_refused(verifying_decoder: Tiny) -> None:
    tiny = verifying_decoder("gqa", "float32")
    with pytest.raises(ConfigError, match=r"smaller than the block.*got 3 slots.*expected 4 or more"):
        tiny.open(replace(ANCHORS, sinks=5))
    tiny.open(CacheConfig(12, 8)).close()


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_state_has_the_block(verifying_decoder: Tiny, kind: str) -> None:
    """Whatever was told in between, the next token comes to the same bits as if nothing had been."""
    tiny = verifying_decoder("gqa", kind)
    x = tiny.embeddings(30)
    with closing(tiny.open(ANCHORS)) as decoder:
        decoder.feed(x[:8])
        decoder.feed(x[8:9])
        decoder.feed(x[9:10])
        state = decoder.cache.state()
        expected = [decoder.feed(row[None]).copy() for row in x[10:15]]
        decoder.reset(ANCHORS)
        for row in x[15:]:
            decoder.feed(row[None])
        decoder.restore(state)
        np.testing.assert_array_equal([decoder.feed(row[None]).copy() for row in x[10:15]], expected)
