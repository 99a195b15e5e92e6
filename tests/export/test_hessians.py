"""What GPTQ is told of a matrix's inputs, against NumPy's own norm of the rows that the decoder was fed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from ai_edge_litert.interpreter import Interpreter

from export.decoder_weights import skeleton_weight, weight_shapes
from export.flatbuffer import with_constants
from export.hessians import decoder_hessians
from export.layer_graph import write_layer
from export.rotation import rotated_weight
from quantization.locate import chunk_inputs
from quantization.surgery import OpenGraph, Runner
from seed_story.cache import SinkCache
from seed_story.config import CacheConfig, LlamaConfig
from tests.export.tiny_decoders import TinyDecoder, export_tiny

CONFIG = LlamaConfig.tiny()
CACHE = CacheConfig(slots=12, sinks=2)
KINDS = ("qkv", "o", "gate_up", "down")
LENGTHS = (13, 21)
"""Of two stories: each ends inside a chunk, and both outgrow the cache."""


@pytest.fixture(scope="module", params=[(False, None), (True, None), (True, 2)], ids=["plain", "rotated", "int8 cache"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyDecoder, bool]:
    rotated, sink_rows = request.param
    made = export_tiny(CONFIG, CACHE.slots, tmp_path_factory.mktemp("h"), rotated=rotated, sink_rows=sink_rows)
    return made, rotated


def hessians(tiny: tuple[TinyDecoder, bool], size: int, folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    decoder, rotated = tiny
    make = rotated_weight if rotated else skeleton_weight
    found = decoder_hessians(
        decoder.skeleton,
        weight_shapes(CONFIG, rotated=rotated),
        lambda name: make(CONFIG, decoder.weights, name),
        CONFIG,
        SinkCache(replace(CONFIG, num_layers=1), CACHE, decoder.sink_rows),
        size,
        (decoder.embeddings(count, seed) for seed, count in enumerate(LENGTHS)),
        threads=1,
        work=folder,
    )
    made = {}
    for name, weights, hessian in found:
        np.testing.assert_array_equal(weights, make(CONFIG, decoder.weights, name))
        made[name] = hessian
    assert list(folder.iterdir()) == []
    return made


def test_the_first_matrix_is_given_the_normed_rows(tiny: tuple[TinyDecoder, bool], tmp_path: Path) -> None:
    decoder, _ = tiny
    rows = np.concatenate([decoder.embeddings(count, seed) for seed, count in enumerate(LENGTHS)]).astype(np.float64)
    rows /= np.sqrt((rows**2).mean(1, keepdims=True) + CONFIG.rms_norm_eps)
    expected = rows.T @ rows
    found = hessians(tiny, 8, tmp_path)["layers_0_qkv"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_layer_by_layer_is_the_same_as_all_at_once(tiny: tuple[TinyDecoder, bool], tmp_path: Path) -> None:
    """The whole decoder, opened up: bit for bit, since the same kernels read the same numbers."""
    decoder, _ = tiny
    opened = OpenGraph(decoder.path, "prefill_8")
    outputs = {one.name: opened.add_output(one.x) for one in opened.matrices() if one.name.startswith("layers_")}
    opened.write(tmp_path / "all.tflite")
    run, cache = Runner(tmp_path / "all.tflite", 1), SinkCache(CONFIG, CACHE, decoder.sink_rows)
    expected = dict.fromkeys(outputs, np.float32(0))
    for seed, count in enumerate(LENGTHS):
        cache.reset()
        for chunk in np.split(decoder.embeddings(count, seed), range(8, count, 8)):
            told = run(chunk_inputs(cache, CONFIG, chunk, 8))
            cache.store(told["k"], told["v"], len(chunk))
            for name, output in outputs.items():
                x = told[output][-len(chunk) :]
                expected[name] = expected[name] + x.T @ x
    (tmp_path / "work").mkdir()
    found = hessians(tiny, 8, tmp_path / "work")
    assert list(found) == [*outputs, "embed_tokens"]
    for name, total in expected.items():
        np.testing.assert_array_equal(found[name], total, name)


def test_the_head_is_given_what_comes_of_all_layers(tiny: tuple[TinyDecoder, bool], tmp_path: Path) -> None:
    """Of every token, where a prefill has logits of its last one only: so the single step says what to expect."""
    decoder, _ = tiny
    opened = OpenGraph(decoder.path, "decode")
    output = opened.add_output(next(one.x for one in opened.matrices() if one.name == "embed_tokens"))
    opened.write(tmp_path / "all.tflite")
    run, cache, rows = Runner(tmp_path / "all.tflite", 1), SinkCache(CONFIG, CACHE, decoder.sink_rows), []
    for seed, count in enumerate(LENGTHS):
        cache.reset()
        for token in np.split(decoder.embeddings(count, seed), count):
            told = run(chunk_inputs(cache, CONFIG, token, 1))
            cache.store(told["k"], told["v"], 1)
            rows.append(told[output].reshape(-1))
    (tmp_path / "work").mkdir()
    expected = np.stack(rows).T @ np.stack(rows)
    found = hessians(tiny, 1, tmp_path / "work")["embed_tokens"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_chunks_make_no_difference(tiny: tuple[TinyDecoder, bool], tmp_path: Path) -> None:
    """So what is read before is in the cache: the last matrices depend on all of it."""
    decoder, _ = tiny
    by_eight, by_one = (hessians(tiny, size, tmp_path) for size in (8, 1))
    for name, expected in by_one.items():
        limit = 2e-2 if decoder.sink_rows else 1e-4  # an int8 cache reads a chunk's own tokens unrounded
        assert np.abs(by_eight[name] - expected).max() < limit * np.abs(expected).max(), name


def test_a_layers_graph_has_nothing_of_other_layers(tiny: tuple[TinyDecoder, bool], tmp_path: Path) -> None:
    decoder, rotated = tiny
    made = []

    def make(name: str) -> npt.NDArray[np.float32]:
        made.append(name)
        return np.zeros(shapes[name], np.float32)

    shapes = weight_shapes(CONFIG, rotated=rotated)
    write_layer(*with_constants(decoder.skeleton, shapes), shapes, make, "decode", 1, tmp_path / "layer.tflite")
    assert [name for name in made if name.startswith("layers_")] == [f"layers_1_{k}" for k in KINDS]
    assert not {"embed_tokens", "norm", "rotated_norm"} & set(made)
    runner = Interpreter(str(tmp_path / "layer.tflite")).get_signature_runner("decode")
    given = {name for name in runner.get_input_details() if name.startswith("kv_cache")}
    assert {name[:12] for name in given} == {"kv_cache_k_0", "kv_cache_v_0"}
    assert {*runner.get_output_details()} == {"embeddings", "k", "v", *(f"layers_1_{k}" for k in KINDS)}
