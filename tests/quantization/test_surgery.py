"""A matrix in another graph's number format computes what it computes there."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from quantization.quantize import quantize_graph
from quantization.surgery import OpenGraph, Runner
from tests.loud import int8_of_min_max

SIGNATURE = "product"


@pytest.fixture
def float_graph(tmp_path: Path) -> Path:
    """Rows `[4, 64]` by a matrix `[8, 64]`."""
    matrix = tf.constant(np.random.default_rng(0).normal(size=(8, 64)), tf.float32)

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([4, 64], tf.float32, "x")])  # type: ignore[untyped-decorator]
    def product(x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.matmul(x, matrix, transpose_b=True)}

    tf.saved_model.save(tf.Module(), str(tmp_path / "saved"), signatures={SIGNATURE: product})
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved"), signature_keys=[SIGNATURE])
    path = tmp_path / "float.tflite"
    path.write_bytes(converter.convert())
    return path


@pytest.mark.parametrize(("bits", "granularity"), [(8, "CHANNELWISE"), (4, "CHANNELWISE"), (4, "BLOCKWISE_32")])
def test_a_transplanted_matrix(float_graph: Path, tmp_path: Path, bits: int, granularity: str) -> None:
    """Blocks have their scales in a tensor of their own, as float16."""
    entry = copy.deepcopy(int8_of_min_max().graphs["decoder"][0])
    entry["op_config"]["weight_tensor_config"] |= {"num_bits": bits, "granularity": granularity}
    quantized, made = tmp_path / "quantized.tflite", tmp_path / "made.tflite"
    shutil.copy(float_graph, tmp_path / "source.tflite")
    quantize_graph(tmp_path / "source.tflite", quantized, [entry])
    opened, given = OpenGraph(float_graph, SIGNATURE), OpenGraph(quantized, SIGNATURE)
    opened.transplant(opened.matrices()[0], given, given.matrices()[0])
    opened.write(made)
    x = {"x": np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)}
    plain, expected, got = (Runner(path, 1)(x)["y"] for path in (float_graph, quantized, made))
    np.testing.assert_array_equal(got, expected)
    assert 0.98 < np.corrcoef(got.ravel(), plain.ravel())[0, 1] < 1 - 1e-9
