"""The cache's int8 rows: codes, scales and bytes, each by its definition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from seed_story.backends.base import ALIGNMENT
from seed_story.bundle import MANIFEST, Bundle
from seed_story.cache import SinkCache
from seed_story.config import CacheConfig, LlamaConfig
from seed_story.contract import decoder_step
from seed_story.describe import cache_bytes
from seed_story.errors import BundleError
from seed_story.rows import Rows, quantized
from tests.runtime.paper_bundle import write_paper_bundle

LLAMA = LlamaConfig(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


def test_a_row_is_off_by_half_a_step_at_most() -> None:
    """Rows of every size; the largest value of each is kept all but exactly, and its code is 127."""
    rows = np.random.default_rng(0).normal(size=(3, 2, 50, 8)) * 10.0 ** np.arange(-20, 30)[:, None]
    codes, scales = quantized(rows.astype(np.float32))
    steps = np.abs(rows).max(-1) / 127
    np.testing.assert_allclose(scales, steps, rtol=1e-6)
    off = np.abs(codes * scales.astype(np.float64)[..., None] - rows) / steps[..., None]
    assert 0.49 < off.max() <= 0.5 + 127 * 2e-7  # half a step, and float32's rounding of the value itself
    assert (np.abs(codes.astype(int)).max(-1) == 127).all()


def test_rows_of_zeros() -> None:
    codes, scales = quantized(np.zeros((2, 8), np.float32))
    assert not codes.any()
    assert np.isfinite(scales).all()
    assert (scales > 0).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_broken_row_stays_broken(poison: float) -> None:
    """It isn't taken for a number: what reads it is a NaN, as it would be in float32."""
    row = np.ones((1, 8), np.float32)
    row[0, 3] = poison
    codes, scales = quantized(row)
    with np.errstate(invalid="ignore"):
        assert not np.isfinite(codes * scales[:, None]).all()


def test_one_row_and_many_are_kept_alike() -> None:
    new = np.random.default_rng(1).normal(size=(2, 2, 12, 8)).astype(np.float32)
    one, many = Rows(LLAMA, 12, 5), Rows(LLAMA, 12, 5)
    for rows in (one, many):
        rows.clear(3)
    slots = np.random.default_rng(2).permutation(12)
    for place, slot in enumerate(slots):
        one.put(int(slot), new[:, :, place])
    many.write(slots, new)
    for a, b in zip(one.arrays, many.arrays, strict=True):
        np.testing.assert_array_equal(a, b)
    read = many.read(slots)
    np.testing.assert_array_equal(read[:, :, slots < 3], new[:, :, slots < 3])
    off = np.abs(read - new).max(-1) / np.abs(new).max(-1)
    assert (off[:, :, slots >= 3] > 0).all()
    assert off.max() < 0.51 / 127
    assert not many.codes[:, :, :3].any()  # what is kept is in float32 alone
    assert not many.floats[:, :, 3:].any()


def test_a_quarter_of_the_memory() -> None:
    """A default cache, in bytes: a byte a value, four a row for its scale, and the sinks' float32 rows."""
    llama, config = LlamaConfig(), CacheConfig()
    plain, coded = SinkCache(llama, config), SinkCache(llama, config, config.sink_rows("int8"))
    held = [sum(a.nbytes for rows in (c.keys, c.values) for a in rows.arrays) for c in (plain, coded)]
    heads = 2 * llama.num_layers * llama.num_kv_heads
    assert held[0] == heads * 512 * 64 * 4
    assert held[1] == heads * (512 * (64 + 4) + 4 * 64 * 4)
    assert held[1] / held[0] < 0.274
    assert sum(a.nbytes for a in coded.memory().values()) == held[1]


def test_memory_is_what_the_contract_says_and_aligned() -> None:
    config = CacheConfig(12, 2)
    cache = SinkCache(LLAMA, config, 3)
    memory = cache.memory()
    specs = {spec.name: spec for spec in decoder_step(LLAMA, 12, 4, 3).inputs}
    assert specs.keys() - memory.keys() == {"embeddings", "cos", "sin", "mask"}
    for name, array in memory.items():
        assert (array.shape, array.dtype.name) == (specs[name].shape, specs[name].dtype)
        assert array.flags.c_contiguous
        assert array.ctypes.data % ALIGNMENT == 0
    assert specs["kv_cache_v_1"].dtype == "int8"
    for rows, kind in ((cache.keys, "k"), (cache.values, "v")):
        rows.put(1, np.full((2, 2, 8), 5, np.float32))
        rows.put(7, np.full((2, 2, 8), 254, np.float32))
        assert (memory[f"kv_cache_{kind}_1_sink"][:, 1] == 5).all()
        assert (memory[f"kv_cache_{kind}_1"][:, 7] == 127).all()
        assert (memory[f"kv_cache_{kind}_1_scale"][:, 0, 7] == 2).all()


@pytest.mark.parametrize("size", [1, 2])
def test_the_mask_shows_a_kept_slot_in_its_float32_row_only(size: int) -> None:
    """Spelt out: 2 sinks, then a ring of 3, and one float32 row more than this policy needs."""
    cache = SinkCache(LLAMA, CacheConfig(5, 2), 3)
    new = np.ones((2, 2, 1, 8), np.float32)
    inputs = {spec.name: np.zeros(spec.shape, np.float32) for spec in decoder_step(LLAMA, 5, size, 3).inputs}
    seen = []
    for _ in range(7):
        cache.fill(inputs, 1)
        seen.append("".join("x" if value == 0 else "." for value in inputs["mask"][-1]))
        assert (inputs["mask"][:-1] < 0).all()
        cache.store(new, new, 1)
    assert seen == [
        slots + rows + "." * (size - 1) + "x"
        for slots, rows in (
            (".....", "..."),
            (".....", "x.."),
            (".....", "xx."),
            ("..x..", "xx."),
            ("..xx.", "xx."),
            ("...xx", "xx."),
            ("..x.x", "xx."),
        )
    ]


def test_a_bundle_says_what_its_cache_is(tmp_path: Path) -> None:
    """One from before says nothing, and has float32; a kind that this version doesn't know is refused."""
    coded = Bundle.open(write_paper_bundle(tmp_path / "int8", cache_dtype="int8")).manifest
    assert (coded.cache_dtype, coded.sink_rows) == ("int8", 2)
    llama = coded.story.llama
    assert cache_bytes(coded) == 2 * 2 * 2 * (12 * (llama.head_dim + 4) + 2 * llama.head_dim * 4)
    plain = write_paper_bundle(tmp_path / "plain")
    values = json.loads((plain / MANIFEST).read_text())
    assert values.pop("cache_dtype") == "float32"
    (plain / MANIFEST).write_text(json.dumps(values))
    old = Bundle.open(plain).manifest
    assert (old.cache_dtype, old.sink_rows) == ("float32", None)
    assert cache_bytes(old) == 2 * 2 * 2 * 12 * llama.head_dim * 4
    values["cache_dtype"] = "int4"
    (plain / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(BundleError, match="int4"):
        Bundle.open(plain)
