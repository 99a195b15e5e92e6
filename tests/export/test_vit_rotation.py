"""The turned vision transformer is the same function, and its rows have no loud channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from export.network_graphs import write_vit
from export.vit_rotation import stream_rotation
from model.layers import named_variables
from model.vit import VisionTransformer
from quantization.surgery import OpenGraph, Runner
from seed_story.config import VisionConfig
from seed_story.contract import ENCODE
from tests.compare import assert_close
from tests.export.test_decoder_file import operators

DINOV2 = VisionConfig(image_size=28, hidden_size=96, intermediate_size=128, num_layers=3, num_heads=2,
                      pretrained_grid=3, feature_layer=2, layer_scale=True, trainable_blocks=1)  # fmt: skip
CONFIGS = {"dinov2": DINOV2, "dinov2, normed": replace(DINOV2, final_norm=True),
           "vit": replace(DINOV2, layer_scale=False, final_norm=True)}  # fmt: skip


def loud_vit(config: VisionConfig) -> VisionTransformer:
    """No gain, bias or Layer Scale is one or zero, and one channel of the stream is loud."""
    network, random = VisionTransformer(config, seed=1), np.random.default_rng(0)
    for name, variable in named_variables(network).items():
        value = random.normal(0, 0.3, variable.shape) + (name.endswith("lambda1") or "norm" in name)
        if name.startswith("embeddings") and name.endswith(("bias", "token", "embeddings")):
            value[..., 7] += 30
        variable.assign(value)
    return network


@pytest.mark.parametrize("size", [2, 24, 384])
def test_rotation_leaves_the_mean_and_the_length_of_a_row(size: int) -> None:
    turn, rows = stream_rotation(size), np.random.default_rng(0).normal(size=(5, size))
    np.testing.assert_allclose(turn @ turn.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose((rows @ turn.T).mean(1), rows.mean(1), atol=1e-12)
    assert size < 24 or np.abs(turn[:, 5]).max() < 4 / np.sqrt(size)


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_those_of_the_network(name: str, tmp_path: Path) -> None:
    """One product more than the plain graph, and rows without outliers behind its norms."""
    config = CONFIGS[name]
    network, pixels = loud_vit(config), np.random.default_rng(0).random((1, 28, 28, 3), np.float32)
    files = [tmp_path / "plain.tflite", tmp_path / "turned.tflite"]
    crests = []
    for rotated, file in enumerate(files):
        file.write_bytes(write_vit(network, tmp_path / str(rotated), rotated=bool(rotated)))
        graph = OpenGraph(file, ENCODE)
        read = graph.add_output(graph.matrices()[0].x)
        graph.write(tmp_path / "open.tflite")
        found = Runner(tmp_path / "open.tflite", 1)({"image": pixels})
        assert_close(found["features"], np.asarray(network(pixels)), "network")
        rows = found[read].reshape(-1, config.hidden_size)
        crests.append(np.median(np.ptp(rows, axis=1) / rows.std(1)))
    assert crests[1] < 0.75 * crests[0]
    plain, turned = (Counter(operators(schema.ModelT.InitFromPackedBuf(bytearray(f.read_bytes()), 0), ENCODE))
                     for f in files)  # fmt: skip
    assert turned - plain == Counter(FULLY_CONNECTED=1)
    assert not config.final_norm or plain - turned <= Counter(MUL=1, ADD=1)


def test_recipe_keeps_both_ends_in_half_precision(export_tiny: Callable[[str], Path]) -> None:
    """A turned patch has no channels that are fine because they are quiet, and features are what all else reads."""
    model = schema.ModelT.InitFromPackedBuf(bytearray((export_tiny("int8") / "vit.tflite").read_bytes()), 0)
    tensors, operator = model.subgraphs[0].tensors, schema.BuiltinOperator
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    ops = [(codes[op.opcodeIndex], op) for op in model.subgraphs[0].operators]
    halves = {int(op.outputs[0]) for code, op in ops
              if code == operator.DEQUANTIZE and tensors[op.inputs[0]].type == schema.TensorType.FLOAT16}  # fmt: skip
    products = [op for code, op in ops if code in (operator.CONV_2D, operator.FULLY_CONNECTED)]
    in_half = [int(op.inputs[1]) in halves for op in products]
    assert in_half == [True, *[False] * (len(products) - 2), True]
