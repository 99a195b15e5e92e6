"""The cache and its graph inputs, against definitions told by brute force; no graph runs here."""

from __future__ import annotations

from dataclasses import replace

import mpmath
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from seed_story.backends.base import ALIGNMENT, aligned_zeros
from seed_story.cache import EMPTY, SinkCache
from seed_story.config import CacheConfig, LlamaConfig, RopeScaling
from seed_story.contract import MASKED, decoder_step
from seed_story.decoder import next_chunk
from seed_story.errors import ConfigError, UsageError
from tests.compare import assert_close

LLAMA = LlamaConfig(
    vocab_size=8, hidden_size=4, intermediate_size=4, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4
)
JUNK = -7.0  # what lies in a graph's inputs before they are filled


def graph_inputs(slots: int, size: int, llama: LlamaConfig = LLAMA) -> dict[str, np.ndarray]:
    specs = decoder_step(llama, slots, size).inputs
    return {spec.name: np.full(spec.shape, JUNK, spec.dtype) for spec in specs}


class Shelf:
    """Who is in which slot, by rule, not by arithmetic: sinks stay, a newcomer takes the oldest's place."""

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.sinks: list[int] = []
        self.ring: list[int] = []  # in the order of the slots

    def put(self, token: int) -> None:
        if len(self.sinks) < self.config.sinks:
            self.sinks.append(token)
        elif len(self.ring) < self.config.ring:
            self.ring.append(token)
        else:
            self.ring[self.ring.index(min(self.ring))] = token

    def slots(self) -> list[int]:
        free_sinks = [EMPTY] * (self.config.sinks - len(self.sinks))
        free_ring = [EMPTY] * (self.config.ring - len(self.ring))
        return self.sinks + free_sinks + [EMPTY] * self.config.anchors + self.ring + free_ring


def visible(config: CacheConfig, token: int) -> list[int]:
    """What a token sees: the sinks, and of all later tokens the `ring` newest, itself included."""
    return [t for t in range(token + 1) if t < config.sinks or t > token - config.ring]


geometries = st.builds(
    lambda sinks, anchors, ring: CacheConfig(sinks + anchors + ring, sinks, anchors, 0, anchors),
    st.integers(0, 4),
    st.integers(0, 3),
    st.integers(1, 7),
)
chunks = st.tuples(st.integers(1, 9), st.integers(0, 4))  # tokens, padding
schedules = st.lists(chunks, min_size=1, max_size=14)


@settings(max_examples=150, deadline=None)
@given(geometries, schedules)
@example(CacheConfig(12, 2), [(1, 0)] * 37)
@example(CacheConfig(12, 2), [(9, 3)] * 5)
@example(CacheConfig(5, 4), [(1, 2)] * 14)
def test_slots_and_masks_by_brute_force(config: CacheConfig, schedule: list[tuple[int, int]]) -> None:
    """After every chunk each slot's token, key and value; before it what each mask row lets through."""
    cache, shelf = SinkCache(LLAMA, config), Shelf(config)
    random = np.random.default_rng(0)
    nothing = np.zeros((LLAMA.num_layers, LLAMA.num_kv_heads, LLAMA.head_dim))
    told: list[tuple[np.ndarray, np.ndarray]] = []  # key and value of every token
    for wanted, padding in schedule:
        count = min(wanted, config.ring)
        size = count + padding
        inputs = graph_inputs(config.slots, size)
        cache.fill(inputs, count)
        first, in_slots = len(told), shelf.slots()
        expected = np.full((size, config.slots + size), MASKED)
        for i in range(count):
            for token in visible(config, first + i):
                column = in_slots.index(token) if token < first else config.slots + padding + token - first
                expected[padding + i, column] = 0
        np.testing.assert_array_equal(inputs["mask"], expected)

        shape = (LLAMA.num_layers, LLAMA.num_kv_heads, size, LLAMA.head_dim)
        keys, values = random.normal(size=(2, *shape)).astype(np.float32)
        cache.store(keys, values, count)
        for i in range(count):
            shelf.put(len(told))
            told.append((keys[:, :, padding + i], values[:, :, padding + i]))
        assert cache.slot_positions.tolist() == shelf.slots()
        assert cache.position == len(told)
        for slot, token in enumerate(shelf.slots()):
            key, value = told[token] if token != EMPTY else (nothing, nothing)
            np.testing.assert_array_equal(cache.keys.floats[:, :, slot], key)
            np.testing.assert_array_equal(cache.values.floats[:, :, slot], value)


@pytest.mark.parametrize("sink_rows", [None, 12])
def test_a_lone_token_sees_what_a_chunk_would_let_it_see(sink_rows: int | None) -> None:
    """Its mask is kept from token to token: past pictures that come, leave, are promoted, and make room for others."""
    config = CacheConfig(20, 2, 6, 1, 2)
    cache = SinkCache(LLAMA, config, sink_rows)
    new = np.ones((LLAMA.num_layers, LLAMA.num_kv_heads, 1, LLAMA.head_dim), np.float32)
    for token in range(90):
        if token % 7 == 3 and token % 4:
            cache.expect_picture(range(token, token + 4))
        alone, one_of_two = (np.full((size, cache.columns + size), JUNK, np.float32) for size in (1, 2))
        turns = {name: np.zeros((2, 2, LLAMA.head_dim), np.float32) for name in ("cos", "sin")}
        cache.fill({**{name: turn[:1] for name, turn in turns.items()}, "mask": alone}, 1)
        cache.fill({**turns, "mask": one_of_two}, 1)
        np.testing.assert_array_equal(alone[0, : cache.columns], one_of_two[1, : cache.columns], f"token {token}")
        cache.store(new, new, 1)
    assert (cache.slot_positions[config.sinks : config.kept] != EMPTY).all()


@settings(max_examples=60, deadline=None)
@given(geometries, schedules)
def test_the_second_rotation_is_the_place_inside_the_cache(
    config: CacheConfig, schedule: list[tuple[int, int]]
) -> None:
    cache = SinkCache(LLAMA, config)
    frequencies = [100_000.0 ** (-2 * i / LLAMA.head_dim) for i in range(LLAMA.head_dim // 2)]
    for wanted, padding in schedule:
        count = min(wanted, config.ring)
        inputs = graph_inputs(config.slots, count + padding)
        cache.fill(inputs, count)
        for i in range(count):
            token = cache.position + i
            for row, place in enumerate((token, len(visible(config, token)) - 1)):
                angles = [place * f for f in frequencies]
                cos, sin = inputs["cos"][padding + i, row], inputs["sin"][padding + i, row]
                assert_close(cos, np.cos(angles + angles), "rotation")
                assert_close(sin, [-np.sin(a) for a in angles] + [np.sin(a) for a in angles], "rotation")
        new = aligned_zeros((LLAMA.num_layers, LLAMA.num_kv_heads, count + padding, LLAMA.head_dim))
        cache.store(new, new, count)


@pytest.mark.parametrize("position", [0, 1, 11, 12, 999_999, 1_000_000, 8_388_609])
@pytest.mark.parametrize("scaling", [None, RopeScaling("linear", 4.0)])
def test_rotations_keep_their_precision_for_millions_of_tokens(position: int, scaling: RopeScaling | None) -> None:
    """Against 50 digits. float32 angles would be off by 0.5 radians there, and float32 products by more."""
    llama = LlamaConfig(head_dim=64, num_layers=1, rope_scaling=scaling)
    cache = SinkCache(llama, CacheConfig(512, 4))
    cache.position = position
    inputs = graph_inputs(512, 3, llama)
    cache.fill(inputs, 3)
    with mpmath.workdps(50):
        for i in range(3):
            for row, place in enumerate((position + i, min(position + i, 511))):
                powers = [mpmath.mpf(100_000) ** (-mpmath.mpf(j) / 32) for j in range(32)]
                angles = [place * p / (4 if scaling else 1) for p in powers]
                cos, sin = ([float(f(a)) for a in angles] for f in (mpmath.cos, mpmath.sin))
                assert_close(inputs["cos"][i, row], cos + cos, "rotation")
                assert_close(inputs["sin"][i, row], [-s for s in sin] + sin, "rotation")


@pytest.mark.parametrize("position", [40, 999_999, 8_388_609])
def test_an_anchor_s_key_keeps_its_precision(position: int) -> None:
    """Of a picture that leaves after millions of tokens, against 50 digits: the key turned to its slot's index."""
    llama = replace(LLAMA, head_dim=64)
    cache = SinkCache(llama, CacheConfig(20, 2, 6, 1, 2))
    plain = np.random.default_rng(0).normal(size=(5, 64))  # one head's keys of a picture, not rotated

    def rotated(token: int, place: int) -> list[float]:
        with mpmath.workdps(50):
            turns = [mpmath.expj(place * mpmath.mpf(100_000) ** (-mpmath.mpf(j) / 32)) for j in range(32)]
            pairs = [complex(mpmath.mpc(*plain[token, [j, j + 32]]) * turns[j]) for j in range(32)]
        return [pair.real for pair in pairs] + [pair.imag for pair in pairs]

    cache.position = position
    cache.expect_picture(range(position, position + 5))
    keys = np.zeros((2, 2, 12, 64), np.float32)
    keys[1, 1, :5] = [rotated(i, position + i) for i in range(5)]
    cache.store(keys, keys, 12)
    for slot, token in ((2, 0), (3, 3), (4, 4)):
        assert cache.slot_positions[slot] == position + token
        assert_close(cache.keys.floats[1, 1, slot], rotated(token, slot), "same_maths")


def test_the_slots_of_a_very_late_token() -> None:
    cache = SinkCache(LLAMA, CacheConfig(12, 2))
    late = 2 + 10 * 2**40  # the first ring slot's turn again
    assert cache.slots_of(np.arange(late - 1, late + 11)).tolist() == [11, *range(2, 12), 2]


def test_region_tells_ring_from_kept() -> None:
    cache = SinkCache(LLAMA, CacheConfig(9, 2, 3, 1, 2))
    assert cache.region.tolist() == [[0] * 5 + [1] * 4, [1] * 5 + [0] * 4]
    assert SinkCache(LLAMA, CacheConfig(5, 0)).region.tolist() == [[1] * 5, [0] * 5]


def test_what_is_kept_has_a_limit() -> None:
    """It is refused, and what the cache holds stays."""
    cache = SinkCache(LLAMA, CacheConfig(512, 4))
    cache.store(*[np.ones((2, 2, 3, LLAMA.head_dim), np.float32)] * 2, 3)
    with pytest.raises(ConfigError, match=r"129 kept slots \(text-sink\); expected at most 128.*Keep less"):
        cache.reset(CacheConfig(512, 129))
    assert (cache.position, cache.config.sinks) == (3, 4)
    cache.reset(CacheConfig().under("multimodal-sink"))


def test_memory_is_the_caches_own_and_aligned() -> None:
    llama = LlamaConfig.tiny()
    cache = SinkCache(llama, CacheConfig.tiny())
    memory = cache.memory()
    assert sorted(memory) == ["kv_cache_k_0", "kv_cache_k_1", "kv_cache_v_0", "kv_cache_v_1", "region"]
    for kind, whole in (("k", cache.keys.floats), ("v", cache.values.floats)):
        for i in range(llama.num_layers):
            array = memory[f"kv_cache_{kind}_{i}"]
            assert array.ctypes.data == whole[i].ctypes.data
            assert array.shape == (llama.num_kv_heads, 12, llama.head_dim)
    assert memory["region"] is cache.region
    for array in memory.values():
        assert array.dtype == np.float32
        assert array.flags.c_contiguous
        assert array.ctypes.data % ALIGNMENT == 0


def test_nothing_grows_and_reset_forgets() -> None:
    config = CacheConfig(12, 2)
    cache = SinkCache(LLAMA, config)
    arrays = (cache.keys.floats, cache.values.floats, cache.region, cache.slot_positions)
    before = [(array.ctypes.data, array.nbytes) for array in arrays]
    new = np.ones((LLAMA.num_layers, LLAMA.num_kv_heads, 8, LLAMA.head_dim), np.float32)
    for count in (8, 1, 7, 8, 8, 3, 5):
        cache.store(new, new, count)
    after = (cache.keys.floats, cache.values.floats, cache.region, cache.slot_positions)
    assert all(a is b for a, b in zip(arrays, after, strict=True))
    assert [(array.ctypes.data, array.nbytes) for array in after] == before
    assert cache.position == 40
    cache.reset()
    assert cache.position == 0
    assert (cache.slot_positions == EMPTY).all()
    assert not cache.keys.floats.any()
    assert not cache.values.floats.any()
    fresh, used = graph_inputs(12, 4), graph_inputs(12, 4)
    SinkCache(LLAMA, config).fill(fresh, 3)
    cache.fill(used, 3)
    for name in ("cos", "sin", "mask"):
        np.testing.assert_array_equal(fresh[name], used[name])


@pytest.mark.parametrize(("size", "count"), [(4, 0), (4, -1), (4, 5), (1, 2), (16, 13), (16, 16), (1, 0)])
def test_impossible_chunks_are_refused_and_change_nothing(size: int, count: int) -> None:
    cache = SinkCache(LLAMA, CacheConfig(12, 2))
    inputs = graph_inputs(12, size)
    with pytest.raises(UsageError, match="expected 1 to"):
        cache.fill(inputs, count)
    assert all((array == JUNK).all() for array in inputs.values())
    assert cache.position == 0


def test_the_largest_chunks_are_taken() -> None:
    """An empty cache takes as many tokens as it has slots, one with all its sinks those of the ring."""
    cache = SinkCache(LLAMA, CacheConfig(12, 2))
    assert cache.max_chunk == 12
    cache.fill(graph_inputs(12, 16), 12)
    cache.fill(graph_inputs(12, 4), 4)
    for said, left in ((1, 11), (1, 10), (5, 10)):
        cache.store(*(np.zeros((LLAMA.num_layers, LLAMA.num_kv_heads, said, LLAMA.head_dim), np.float32),) * 2, said)
        assert cache.max_chunk == left


@pytest.mark.parametrize("sizes", [(4, 4), (4, 3, 1), (4, -1), (4, 0, -1)])
def test_impossible_geometries_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        CacheConfig(*sizes)


@given(
    left=st.integers(1, 5000),
    others=st.lists(st.integers(2, 256), max_size=4),
    most=st.integers(1, 600),
)
def test_next_chunk_always_goes_on_and_never_too_far(left: int, others: list[int], most: int) -> None:
    sizes = (*others, 1)
    steps = 0
    while left:
        size, count = next_chunk(left, sizes, most)
        assert size in sizes
        assert 1 <= count <= min(left, most, size)
        assert count == min(left, most, size), "a graph with room to spare while tokens wait"
        left -= count
        steps += 1
        assert steps <= 5000


@given(others=st.lists(st.integers(2, 256), max_size=4), most=st.integers(1, 600))
def test_one_token_never_runs_a_prefill(others: list[int], most: int) -> None:
    assert next_chunk(1, (*others, 1), most) == (1, 1)


def test_an_exact_fit_is_taken() -> None:
    for left in (16, 64, 128):
        assert next_chunk(left, (16, 64, 128, 1), 508) == (left, left)


def test_a_graph_that_reads_no_cache_may_have_room_to_spare() -> None:
    """Half of `begin_64` costs less than two of `prefill_16`, half of `prefill_64` more."""
    assert next_chunk(32, (16, 64, 1), 508) == (16, 16)
    assert next_chunk(32, (16, 64, 1), 508, begins=(64,)) == (64, 32)
    assert next_chunk(8, (16, 64, 1), 508, begins=(64,)) == (16, 8)


def test_a_beginning_is_chosen_by_what_comes_after_it() -> None:
    """A whole beginning may cost more a token than a shorter one, and less than that and the rest."""
    sizes, begins = (16, 64, 128, 1), (64, 512)
    assert next_chunk(128, sizes, 512, begins) == (64, 64)
    assert next_chunk(320, sizes, 512, begins) == (64, 64)
    assert next_chunk(400, sizes, 512, begins) == (512, 400)
    assert next_chunk(2000, sizes, 512, begins) == (512, 512)
    assert next_chunk(2000, sizes, 70, begins) == (64, 64)


@pytest.mark.parametrize("slots", [9, 16])
def test_every_layer_can_be_read_in_place(slots: int) -> None:
    llama = replace(LLAMA, num_layers=3, num_heads=1, num_kv_heads=1, head_dim=8)
    cache = SinkCache(llama, CacheConfig(slots, 2))
    for memory in cache.memory().values():
        assert memory.ctypes.data % ALIGNMENT == 0
        assert memory.flags.c_contiguous
    cache.keys.floats[1] = 1  # what is written into the whole is what a layer reads, and only that layer
    assert [cache.memory()[f"kv_cache_k_{layer}"].sum() for layer in range(3)] == [0, slots * 8, 0]
