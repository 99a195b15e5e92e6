"""What GPTQ is told of a matrix's inputs, against NumPy's own norm of the rows that the decoder was fed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from ai_edge_litert.interpreter import Interpreter

from export.decoder_weights import weight_shapes
from export.flatbuffer import with_constants
from export.hessians import Make, See, decoder_hessians
from export.layer_graph import write_layer
from model.rotation import in_blocks
from quantization.locate import chunk_inputs
from quantization.surgery import OpenGraph, Runner
from seed_story.cache import SinkCache
from seed_story.config import CacheConfig, LlamaConfig
from tests.export.tiny_decoders import TinyDecoder, export_tiny, random_balance

CONFIG = LlamaConfig.tiny()
CACHE = CacheConfig(slots=12, sinks=2)
KINDS = ("qkv", "o", "gate_up", "down")
LENGTHS = (13, 21)
"""Of two stories: each ends inside a chunk, and both outgrow the cache."""


@pytest.fixture(scope="module", params=[(False, None), (True, None), (True, 2)], ids=["plain", "rotated", "int8 cache"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyDecoder:
    rotated, sink_rows = request.param
    return export_tiny(CONFIG, CACHE.slots, tmp_path_factory.mktemp("h"), rotated=rotated, sink_rows=sink_rows)


def hessians(
    decoder: TinyDecoder,
    size: int,
    folder: Path,
    lengths: Sequence[int] = LENGTHS,
    make: Make | None = None,
    see: See = lambda name, rows, start: None,
) -> dict[str, npt.NDArray[np.float32]]:
    found = decoder_hessians(
        decoder.skeleton,
        weight_shapes(CONFIG, rotated=decoder.rotated),
        make or decoder.make,
        CONFIG,
        SinkCache(replace(CONFIG, num_layers=1), CACHE, decoder.sink_rows),
        size,
        (decoder.embeddings(count, seed) for seed, count in enumerate(lengths)),
        threads=1,
        work=folder,
        see=see,
    )
    made = dict(found)
    assert list(folder.iterdir()) == []
    return made


def test_the_first_matrix_is_given_the_normed_rows(decoder: TinyDecoder, tmp_path: Path) -> None:
    rows = np.concatenate([decoder.embeddings(count, seed) for seed, count in enumerate(LENGTHS)]).astype(np.float64)
    rows /= np.sqrt((rows**2).mean(1, keepdims=True) + CONFIG.rms_norm_eps)
    if decoder.rotated:
        balance, size = random_balance(CONFIG), CONFIG.hidden_size
        for direction, share in zip(balance.directions.T, balance.shares, strict=True):
            rows -= np.outer(rows @ direction, direction) * (1 - share)
        rows *= np.sqrt((size + len(balance.shares)) / size)
    expected = rows.T @ rows
    found = hessians(decoder, 8, tmp_path)["layers_0_qkv"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_layer_by_layer_is_the_same_as_all_at_once(decoder: TinyDecoder, tmp_path: Path) -> None:
    """The whole decoder, opened up: bit for bit, since the same kernels read the same numbers."""
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
                if decoder.rotated and name.endswith("_down"):
                    x = in_blocks(x, decoder.make("down_rotation"))
                expected[name] = expected[name] + x.T @ x
    (tmp_path / "work").mkdir()
    found = hessians(decoder, 8, tmp_path / "work")
    assert list(found) == [*outputs, "embed_tokens"]
    for name, total in expected.items():
        np.testing.assert_array_equal(found[name], total, name)


def test_what_is_summed_is_told_story_by_story(decoder: TinyDecoder, tmp_path: Path) -> None:
    """In chunks of eight, and the head's at once; where each begins in its story is told with it."""
    told: dict[str, list[tuple[int, npt.NDArray[np.float32]]]] = {}
    found = hessians(decoder, 8, tmp_path, see=lambda *one: told.setdefault(one[0], []).append((one[2], one[1])))
    for name, total in found.items():
        starts = [0, 0] if name == "embed_tokens" else [0, 8, 0, 8, 16]
        assert [start for start, _ in told[name]] == starts
        rows = np.concatenate([rows for _, rows in told[name]])
        assert len(rows) == sum(LENGTHS)
        np.testing.assert_allclose(rows.T @ rows, total, rtol=1e-4, atol=1e-4 * np.abs(total).max())


def test_what_is_huge_in_few_channels_leaves_the_others_their_digits(tmp_path: Path) -> None:
    """What a rotated `down` reads, of a decoder with a channel 3,000 times as loud: positive, once each is as loud."""
    rotated = export_tiny(CONFIG, CACHE.slots, tmp_path, rotated=True)

    def make(name: str) -> npt.NDArray[np.float32]:
        made = rotated.make(name).copy()
        if name == "layers_0_gate_up":
            made[CONFIG.intermediate_size + 5] *= 3000
        return made

    (tmp_path / "work").mkdir()
    found = hessians(rotated, 8, tmp_path / "work", (200, 200), make)["layers_0_down"]
    scale = 1 / np.sqrt(np.diag(found).astype(np.float64))
    assert np.linalg.eigvalsh(scale[:, None] * found * scale).min() > 0


def test_the_head_is_given_what_comes_of_all_layers(decoder: TinyDecoder, tmp_path: Path) -> None:
    """Of every token, where a prefill has logits of its last one only: so the single step says what to expect."""
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
    found = hessians(decoder, 1, tmp_path / "work")["embed_tokens"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_chunks_make_no_difference(decoder: TinyDecoder, tmp_path: Path) -> None:
    """So what is read before is in the cache: the last matrices depend on all of it."""
    by_eight, by_one = (hessians(decoder, size, tmp_path) for size in (8, 1))
    for name, expected in by_one.items():
        limit = 2e-2 if decoder.sink_rows else 1e-4  # an int8 cache reads a chunk's own tokens unrounded
        assert np.abs(by_eight[name] - expected).max() < limit * np.abs(expected).max(), name


def test_a_layers_graph_has_nothing_of_other_layers(decoder: TinyDecoder, tmp_path: Path) -> None:
    made = []

    def make(name: str) -> npt.NDArray[np.float32]:
        made.append(name)
        return np.zeros(shapes[name], np.float32)

    shapes = weight_shapes(CONFIG, rotated=decoder.rotated)
    write_layer(*with_constants(decoder.skeleton, shapes), shapes, make, "decode", 1, tmp_path / "layer.tflite")
    assert [name for name in made if name.startswith("layers_")] == [f"layers_1_{k}" for k in KINDS]
    assert not {"embed_tokens", "norm", "rotated_norm"} & set(made)
    runner = Interpreter(str(tmp_path / "layer.tflite")).get_signature_runner("decode")
    given = {name for name in runner.get_input_details() if name.startswith("kv_cache")}
    assert {name[:12] for name in given} == {"kv_cache_k_0", "kv_cache_v_0"}
    assert {*runner.get_output_details()} == {"embeddings", "k", "v", *(f"layers_1_{k}" for k in KINDS)}
