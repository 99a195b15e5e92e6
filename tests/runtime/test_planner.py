"""Any mix of pictures, prompts and generation through the decoder loop, against what should be visible, told by rule.

The graph is a fake that computes nothing: it notes what each row of a chunk may look at and at which distance, from
the very inputs that a real one reads. A value is its token's number, and a key the rotation that the token was given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from seed_story.backends.base import Array
from seed_story.cache import ATTENTION_EVERY
from seed_story.config import CacheConfig, LlamaConfig, kept_limit
from seed_story.contract import EMBED, MASKED, Signature, Steps
from seed_story.decoder import Decoder
from seed_story.errors import ConfigError, UsageError
from seed_story.policies import PICTURE_EVICTIONS
from tests.export.tiny_decoders import gallery_of
from tests.reference.streaming_llama import seen

LLAMA = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1,
                    head_dim=4, rope_theta=1e12)  # fmt: skip
TURN = 1e-6  # radians that the slower pair of channels turns a token: never once around, in these stories


def looks(token: int, seen: Sequence[float] | Array) -> Array:
    """How much a token looks at those that it sees: something uneven, different for each, 1 in all."""
    weights = 1 + (np.asarray(seen, np.float64) * 7919 + token * 104_729) % 101
    return weights / weights.sum()


class Recorder:
    """A signature whose `run` notes what each token of the chunk sees, far to near: tokens and distances.

    `decode_attention` also notes who was asked, and answers by `looks`.
    """

    def __init__(self, signature: Signature, memory: Mapping[str, Array], graph: FakeGraph) -> None:
        self.inputs = {s.name: memory.get(s.name, np.zeros(s.shape, s.dtype)) for s in signature.inputs}
        self.outputs = {s.name: np.zeros(s.shape, s.dtype) for s in signature.outputs}
        self._log, self._asked, self._graph = graph.log, graph.asked, graph

    def run(self) -> None:
        if "mask" not in self.inputs:
            self.outputs["embeddings"][0, 0] = self.inputs["token"][0]
            return
        cos, sin, mask = (self.inputs[name] for name in ("cos", "sin", "mask"))
        tokens = self.inputs["embeddings"][:, 0]
        new, cached = self.outputs["k"][0, 0], "region" in self.inputs  # else of `begin_N`
        new[:, 1], new[:, 3] = cos[:, 0, 1], sin[:, 0, 3]
        self.outputs["v"][0, 0, :, 0] = tokens
        own, keys = tokens, new
        if "place" in self.inputs:
            place = self.inputs["place"]
            own = self.inputs["block_v"][0, 0, :, 0] + place[:, 0] * tokens
            keys = self.inputs["block_k"][0, 0] + place * new
        whose, rotation = own, np.zeros(len(own), int)  # of the query, for each key
        if cached:
            whose = np.concatenate([self.inputs["kv_cache_v_0"][0, :, 0], own])
            keys = np.concatenate([self.inputs["kv_cache_k_0"][0], keys])
            ring, kept = self.inputs["region"]
            np.testing.assert_array_equal(ring + kept, 1)
            rotation = np.concatenate([kept, rotation]).astype(int)
        places = np.arctan2(sin[:, :, 3], cos[:, :, 3]) / TURN
        distances = places[:, rotation] - np.arctan2(keys[:, 3], keys[:, 1]) / TURN
        for token, open_, row in zip(tokens, mask == 0, distances, strict=True):
            if open_.any():  # else padding
                order = np.argsort(-row[open_])
                self._graph.rows += 1
                self._log[int(token)] = (whose[open_][order], row[open_][order])
        assert ((mask == 0) | (mask == np.float32(MASKED))).all()
        if "attention" in self.outputs:
            self._asked.append(int(tokens[0]))
            self.outputs["attention"][0] = 0
            self.outputs["attention"][0, mask[0] == 0] = looks(int(tokens[0]), whose[mask[0] == 0])


class FakeGraph:
    def __init__(self) -> None:
        self.log: dict[int, tuple[Array, Array]] = {}  # what was computed last for each token
        self.asked: list[int] = []
        self.rows = 0
        self.bound: list[str] = []

    def bind(self, signature: Signature, memory: Mapping[str, Array] | None = None) -> Recorder:
        assert signature.name == EMBED or memory
        self.bound.append(signature.name)
        return Recorder(signature, memory or {}, self)

    def close(self) -> None:
        pass


def follow(
    config: CacheConfig,
    sizes: Sequence[int],
    feeds: Sequence[Sequence[tuple[str, int]]],
    verify: int = 0,
    wrong: int = 3,
) -> int:
    """Feeds a story of `("text", n)` and `("picture", n)`, a list a call; checks every token. Gives their number.

    Args:
        verify: K of a `verify_K`; each call of one token then guesses what comes.
        wrong: one guess of so many is.
    """
    graph = FakeGraph()
    decoder = Decoder(graph, LLAMA, config, Steps(tuple(sizes), tuple(sizes[-1:]), verify=verify))
    pictures: list[range] = []
    told, alone = 0, []
    for parts in feeds:
        begin, mine = told, []
        for kind, count in parts:
            if kind == "picture":
                mine.append(range(told - begin, told - begin + count))
                pictures.append(range(told, told + count))
            told += count
        rows = np.zeros((told - begin, LLAMA.hidden_size), np.float32)
        rows[:, 0] = np.arange(begin, told)
        decoder.feed(
            rows,
            mine,
            lambda most: [t if t % wrong else 10**6 + t for t in range(told, told + most)],  # noqa: B023
        )
        assert decoder.cache.position == told
        alone += [begin] if told == begin + 1 and begin % ATTENTION_EVERY == 0 else []
    log = [graph.log[token] for token in range(told)]
    assert verify or len(graph.log) == graph.rows == told, "every token goes through the graph once"
    assert all(token % ATTENTION_EVERY == 0 for token in graph.asked)
    assert set(graph.asked) >= set(alone) if config.needs_attention else not graph.asked
    attention: dict[int, dict[int, float]] = {}
    asked = set(graph.asked)
    for token, (got, distances) in enumerate(log):
        expected = seen(token, config.sinks, config.ring, pictures, gallery_of(config), attention)
        if token in asked:
            attention[token] = dict(zip(expected, looks(token, expected).tolist(), strict=True))
        assert len(expected) <= config.slots
        assert got.tolist() == expected, f"what token {token} sees"
        exact = np.arange(len(expected))[::-1]
        assert np.abs(distances - exact).max() < 0.1, f"from where token {token} sees it"
    return told


@st.composite
def geometries(draw: st.DrawFn) -> tuple[CacheConfig, int]:
    """A cache, and the tokens of a picture that fits it."""
    begin, end, room = draw(st.integers(0, 3)), draw(st.integers(0, 4)), draw(st.integers(0, 4))
    size = draw(st.integers(max(2, begin + end), 10))
    ring, sinks = draw(st.integers(size, 24)), draw(st.integers(0, 5))
    anchors = room * (begin + end)
    eviction = draw(st.sampled_from(PICTURE_EVICTIONS))
    config = CacheConfig(sinks + anchors + ring, sinks, anchors, begin, end, eviction)
    assume(config.kept <= kept_limit(config.slots))
    return config, size


part = st.one_of(st.just(("picture", 0)), st.tuples(st.just("text"), st.integers(1, 40)))
call = st.one_of(st.lists(part, min_size=1, max_size=4), st.just([("text", 1)]))
telling = st.integers(1, 20).map(lambda count: [[("text", 1)]] * count)
calls_made = st.lists(st.one_of(call.map(lambda one: [one]), telling), min_size=1, max_size=8).map(
    lambda parts: [*chain.from_iterable(parts)]
)


@settings(max_examples=300, deadline=None)
@given(geometries(), st.sampled_from([(4, 8), (16, 64, 128), ()]), calls_made)
@example((CacheConfig(20, 2, 6, 1, 2), 5), (4, 8), [[("picture", 0)] * 12, [("text", 40)]])  # nothing but pictures
@example((CacheConfig(20, 9, 6, 1, 2), 5), (4, 8), [[("text", 6), ("picture", 0)], [("text", 90)]])  # among the sinks
@example((CacheConfig(20, 2, 3, 1, 2, "first-and-last"), 5), (4, 8), [[("picture", 0), ("text", 9)] * 5])
@example((CacheConfig(30, 2, 9, 1, 2, "attention-mass"), 5), (4, 8),
         [*[[("picture", 0)], *[[("text", 1)]] * 20] * 9])  # fmt: skip
@example((CacheConfig(13, 2, 6, 1, 2), 5), (4, 8), [[("picture", 0), ("text", 1)] * 9])  # the ring holds one picture
def test_every_token_sees_what_it_should(
    geometry: tuple[CacheConfig, int], sizes: tuple[int, ...], calls: list[list[tuple[str, int]]]
) -> None:
    config, size = geometry
    follow(config, sizes, [[(kind, count or size) for kind, count in parts] for parts in calls])


@settings(max_examples=300, deadline=None)
@given(geometries(), st.integers(2, 6), st.integers(2, 9), calls_made)
def test_every_token_sees_what_it_should_though_others_were_guessed(
    geometry: tuple[CacheConfig, int], verify: int, wrong: int, calls: list[list[tuple[str, int]]]
) -> None:
    """Where tokens come one by one, each has a guess of what follows it: right ones, wrong ones, pictures too."""
    config, size = geometry
    feeds = [[(kind, count or size) for kind, count in parts] for parts in calls]
    follow(config, (4, 8), feeds, min(verify, config.ring), wrong)


@pytest.mark.parametrize("eviction", PICTURE_EVICTIONS)
def test_the_default_geometry_for_many_turns_of_its_ring(eviction: str) -> None:
    """18 tokens a picture, prompts longer than the cache, and single tokens for more than a turn of the ring."""
    config = CacheConfig().under("multimodal-sink", picture_eviction=eviction)
    assert (config.slots, config.sinks, config.pictures, config.picture_anchors) == (512, 4, 10, 6)
    page = [[("picture", 18), ("text", 70)], *[[("text", 1)]] * 40]
    long = [
        [("text", 1300)],
        [("picture", 18)] * 20,
        [("text", 1), ("picture", 18), ("text", 600)],
        *[[("text", 1)]] * 99,
    ]
    assert follow(config, (16, 64, 128), [*page * 8, *long]) > 5 * config.ring


def test_the_attention_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the mass forgotten, or never gathered, the test above would fail."""
    config = CacheConfig().under("multimodal-sink", picture_eviction="attention-mass")
    page = [[("picture", 18), ("text", 70)], *[[("text", 1)]] * 40]
    monkeypatch.setattr("seed_story.cache.SinkCache.observe", lambda *_: None)
    with pytest.raises(AssertionError, match="what token"):
        follow(config, (16, 64, 128), page * 24)


@pytest.mark.slow
def test_a_hundred_thousand_tokens_with_a_picture_every_300() -> None:
    """Nothing grows, and every hundredth token sees what it should, from where it should."""
    config = CacheConfig().under("multimodal-sink", picture_eviction="first-and-last")
    graph = FakeGraph()
    decoder = Decoder(graph, LLAMA, config, Steps())
    cache = decoder.cache
    before = [(array.ctypes.data, array.nbytes) for array in (*cache.memory().values(), cache.slot_positions)]
    pictures: list[range] = []
    for page in range(100_000 // 300):
        begin = page * 300
        pictures.append(range(begin, begin + 18))
        rows = np.zeros((300, LLAMA.hidden_size), np.float32)
        rows[:, 0] = begin + np.arange(300)
        decoder.feed(rows[:60], [range(18)])
        for row in rows[60:]:
            decoder.feed(row[None])
        for token in range(begin, begin + 300, 100):
            got, distances = graph.log[token]
            assert got.tolist() == seen(token, config.sinks, config.ring, pictures, gallery_of(config))
            assert np.abs(distances - np.arange(len(got))[::-1]).max() < 0.1
        graph.log.clear()
        assert len(cache._pictures) <= 3
    after = [(array.ctypes.data, array.nbytes) for array in (*cache.memory().values(), cache.slot_positions)]
    assert after == before
    assert cache.position == 99_900


def test_tokens_leave_a_chunk_at_a_time_where_no_picture_is_pushed_out() -> None:
    """A picture costs one cut, when it leaves, and no more: the graphs are as busy as without it."""
    graph = FakeGraph()
    decoder = Decoder(graph, LLAMA, CacheConfig(60, 2, 6, 2, 4), Steps((16,), ()))
    calls: list[int] = []
    step = decoder._step
    decoder._step = lambda g, rows: (calls.append(len(rows)), step(g, rows))[1]  # type: ignore[method-assign,assignment]
    decoder.feed(np.zeros((10 + 18 + 172, 4), np.float32), [range(10, 28)])
    assert sum(calls) == 200
    assert len(calls) == -(-62 // 16) + -(-138 // 16)  # it leaves when 10 + the ring's 52 tokens are read


def test_what_is_never_used_is_never_prepared() -> None:
    """Each signature costs memory and milliseconds, which an engine takes when it is bound."""
    graph = FakeGraph()
    decoder = Decoder(graph, LLAMA, CacheConfig(), Steps(verify=8))
    assert graph.bound == []
    decoder.embed([1])
    decoder.feed(np.zeros((40, 4), np.float32))
    for _ in range(3):
        decoder.feed(np.zeros((1, 4), np.float32))
    assert graph.bound == ["embed", "begin_64", "decode"]
    assert len(decoder.signatures) == len([*decoder.signatures.values()]) == 9


@pytest.mark.parametrize("rows", [range(3, 7), range(8, 14)])
def test_a_picture_elsewhere_is_refused(rows: range) -> None:
    decoder = Decoder(FakeGraph(), LLAMA, CacheConfig(30, 2, 6, 1, 2), Steps((4,), (4,)))
    decoder.feed(np.zeros((9, 4), np.float32), [range(0, 5)])
    with pytest.raises(UsageError, match="picture"):
        decoder.feed(np.zeros((12, 4), np.float32), [range(2, 8), rows, range(9, 14)])


@pytest.mark.parametrize("tokens", [2, 23])
def test_a_picture_that_does_not_fit_is_refused(tokens: int) -> None:
    decoder = Decoder(FakeGraph(), LLAMA, CacheConfig(30, 2, 6, 1, 2), Steps((4,), (4,)))
    with pytest.raises(ConfigError, match="3 anchors to 22 ring slots"):
        decoder.feed(np.zeros((40, 4), np.float32), [range(0, tokens)])
    assert decoder.cache.position == 0
