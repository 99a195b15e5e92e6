"""Rows that are rounded several times, each time in another way: the same function, and less rounding in the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from export.dither import dithered
from quantization.quantize import quantize_graph
from quantization.recipe import load_recipe
from seed_story.backends import open_graph
from seed_story.config import CacheConfig
from seed_story.contract import DECODE, DECODER, Signature, TensorSpec
from seed_story.decoder import Decoder
from tests.export.test_decoder_file import load, operators
from tests.export.tiny_decoders import SIZES, VARIANTS, export_tiny

_INPUTS, _OUTPUTS = 576, 320


def _unit_rows(count: int) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(count, _INPUTS))
    return np.asarray(x / np.sqrt((x**2).mean(1, keepdims=True)), np.float32)


def _coded_matrix() -> np.ndarray:
    """Codes of int8 times one scale, the largest of them in each row: quantized as it is."""
    codes = np.random.default_rng(1).integers(-127, 128, (_OUTPUTS, _INPUTS))
    codes[:, 0] = 127
    return np.asarray(codes / 1024, np.float32)


def _in_engine(folder: Path, rows: int) -> np.ndarray:
    """What the engine's int8 product makes of each unit row, `[rows, outputs]`."""
    weight = tf.constant(_coded_matrix())
    module = tf.Module()
    module.run = tf.function(
        lambda x: {"y": dithered(x, weight, rows)}, input_signature=[tf.TensorSpec([1, _INPUTS], name="x")]
    )
    tf.saved_model.save(module, str(folder), signatures={DECODE: module.run})
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder), signature_keys=[DECODE])
    (folder / "float.tflite").write_bytes(converter.convert())
    # Only the general entries: the others are for operators named as a decoder's are.
    quantize_graph(folder / "float.tflite", folder / "int8.tflite", load_recipe("int8").graphs[DECODER][:1])
    graph = open_graph(folder / "int8.tflite", threads=1)
    bound = graph.bind(Signature(DECODE, (TensorSpec("x", (1, _INPUTS)),), (TensorSpec("y", (1, _OUTPUTS)),)))
    made = []
    for row in _unit_rows(20):
        bound.inputs["x"][0] = row
        bound.run()
        made.append(bound.outputs["y"][0].copy())
    graph.close()
    return np.array(made)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_same_product(rows: int) -> None:
    x, weight = _unit_rows(3), _coded_matrix()
    np.testing.assert_allclose(dithered(x, tf.constant(weight), rows), x @ weight.T, atol=2e-5)


def test_engine_rounds_less(tmp_path: Path) -> None:
    """Twice as fine steps have a quarter of the noise's power, four times as fine ones a sixteenth."""
    exact = _unit_rows(20).astype(np.float64) @ _coded_matrix().T.astype(np.float64)
    noise = {rows: np.square(_in_engine(tmp_path / str(rows), rows) - exact).mean() for rows in (1, 2, 4)}
    assert noise[2] < 0.4 * noise[1]
    assert noise[4] < 0.15 * noise[1]


def test_only_steps_of_a_token_are_dithered(tmp_path: Path) -> None:
    """A prefill multiplies as it did: there, more rows would cost as much more."""
    model = load(export_tiny(*VARIANTS["gqa"], tmp_path, rotated=True, dither=4))
    layers = VARIANTS["gqa"][0].num_layers
    means = {name: operators(model, name).count("MEAN") for name in (DECODE, *(f"prefill_{n}" for n in SIZES))}
    plain = min(means.values())
    assert means == {name: plain + (2 * layers if name == DECODE else 0) for name in means}


def test_guesses_come_to_the_same_bits(tmp_path: Path, open_decoder: Callable[..., Decoder]) -> None:
    """`verify_K` beside `decode`, both dithered and in int8."""
    tiny = export_tiny(*VARIANTS["gqa"], tmp_path, rotated=True, verify=5, dither=4)
    coded = tmp_path / "int8.tflite"
    quantize_graph(tiny.path, coded, load_recipe("int8").graphs[DECODER][:1])
    coded.rename(tiny.path)
    ids = np.random.default_rng(3).integers(0, tiny.config.vocab_size, 40).tolist()
    told, runs = [], []
    for ahead in (0, 4):
        decoder = open_decoder(tiny, CacheConfig(tiny.slots, 2))
        told.append(_fed(decoder, ids, ahead))
        runs.append(decoder.runs)
    assert runs[1] < runs[0]
    np.testing.assert_array_equal(told[0], told[1])


def _fed(decoder: Decoder, ids: list[int], ahead: int) -> list[np.ndarray]:
    """The logits after each token; so many that follow are guessed, and right."""
    logits = []
    for i, row in enumerate(decoder.embed(ids)):
        found = decoder.feed(row[None], guess=lambda most, i=i: ids[i + 1 : i + 1 + min(most, ahead)])
        logits.append(found.copy())
    return logits
