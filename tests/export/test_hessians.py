"""What GPTQ is told of a matrix's inputs, against NumPy's own norm of the rows that the decoder was fed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from export.decoder_graph import weight_shapes
from export.hessians import decoder_hessians
from export.rotation import rotation_matrix
from seed_story.cache import SinkCache
from seed_story.config import CacheConfig, LlamaConfig
from tests.export.tiny_decoders import TinyDecoder, export_tiny

CONFIG = LlamaConfig.tiny()
CACHE = CacheConfig(slots=12, sinks=2)
LENGTHS = (13, 21)
"""Of two stories: each ends inside a chunk, and both outgrow the cache."""


@pytest.fixture(scope="module", params=[(False, None), (True, None), (True, 2)], ids=["plain", "rotated", "int8 cache"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyDecoder, bool]:
    rotated, sink_rows = request.param
    made = export_tiny(CONFIG, CACHE.slots, tmp_path_factory.mktemp("h"), rotated=rotated, sink_rows=sink_rows)
    return made, rotated


def hessians(tiny: TinyDecoder, sizes: tuple[int, ...], names: list[str]) -> dict[str, npt.NDArray[np.float32]]:
    stories = (tiny.embeddings(count, seed) for seed, count in enumerate(LENGTHS))
    ticks: list[int] = []
    cache = SinkCache(CONFIG, CACHE, tiny.sink_rows)
    found = decoder_hessians(tiny.path, CONFIG, cache, sizes, stories, names, threads=1, tick=ticks.append)
    assert sum(ticks) == sum(LENGTHS)
    return found


def test_the_first_matrix_is_given_the_normed_rows(tiny: tuple[TinyDecoder, bool]) -> None:
    decoder, rotated = tiny
    rows = np.concatenate([decoder.embeddings(count, seed) for seed, count in enumerate(LENGTHS)]).astype(np.float64)
    rows /= np.sqrt((rows**2).mean(1, keepdims=True) + CONFIG.rms_norm_eps)
    if rotated:
        rows = rows @ rotation_matrix(CONFIG.hidden_size)
    expected = rows.T @ rows
    found = hessians(decoder, (4, 8), ["layers_0_qkv"])["layers_0_qkv"]
    assert list(decoder.path.parent.glob("recorder*")) == []
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_chunks_make_no_difference(tiny: tuple[TinyDecoder, bool]) -> None:
    """So what is read before is in the cache: the last matrices depend on all of it."""
    decoder, _ = tiny
    names = [name for name in weight_shapes(CONFIG) if name.startswith("layers_")]
    by_eight, by_one = hessians(decoder, (8,), names), hessians(decoder, (), names)
    assert list(by_eight) and sorted(by_eight) == sorted(by_one) == sorted(names)
    for name, shape in weight_shapes(CONFIG).items():
        if name in names:
            assert by_eight[name].shape == (shape[1], shape[1])
            limit = 2e-2 if decoder.sink_rows else 1e-4  # an int8 cache reads a chunk's own tokens unrounded
            assert np.abs(by_eight[name] - by_one[name]).max() < limit * np.abs(by_one[name]).max(), name
