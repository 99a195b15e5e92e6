"""Weights put into a skeleton: where they lie, that they are whole, and that a mistake is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from export.decoder_weights import skeleton_weight, weight_shapes
from export.flatbuffer import fill_skeleton
from quantization.fidelity import row_cosines
from quantization.gptq import without_gptq
from quantization.quantize import quantize_graph
from quantization.recipe import load_recipe
from seed_story.config import CacheConfig, LlamaConfig
from seed_story.contract import DECODER
from seed_story.errors import ExportError
from tests.export.tiny_decoders import VARIANTS, TinyDecoder, loud_llama

Tiny = Callable[[str], TinyDecoder]
CACHE = CacheConfig(VARIANTS["mha"][1], sinks=2)
SHAPES = {"matrix": (5, 3), "table": (7, 3)}


@pytest.fixture(scope="module")
def skeleton(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Two entry points that share one matrix, and a table to look rows up in."""

    @tf.function(autograph=False)
    def plain(x, matrix):
        return {"y": tf.matmul(x, matrix, transpose_b=True)}

    @tf.function(autograph=False)
    def rows(ids, matrix, table):
        return {"y": tf.matmul(tf.gather(table, ids), matrix, transpose_b=True)}

    specs = {name: tf.TensorSpec(shape, tf.float32, name) for name, shape in SHAPES.items()}
    functions = {
        "plain": plain.get_concrete_function(x=tf.TensorSpec([2, 3], tf.float32, "x"), matrix=specs["matrix"]),
        "rows": rows.get_concrete_function(ids=tf.TensorSpec([4], tf.int32, "ids"), **specs),
    }
    folder = tmp_path_factory.mktemp("skeleton")
    tf.saved_model.save(tf.Module(), str(folder), signatures=functions)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder), signature_keys=list(functions))
    return bytes(converter.convert())


def drawn(name: str) -> np.ndarray:
    return np.random.default_rng(len(name)).normal(size=SHAPES[name]).astype(np.float32)


def test_the_filled_graph_computes_with_the_weights(skeleton: bytes, tmp_path: Path) -> None:
    path = tmp_path / "filled.tflite"
    path.write_bytes(b"an older and longer file" * 1000)
    before = bytes(skeleton)
    fill_skeleton(skeleton, SHAPES, drawn, path)
    assert skeleton == before
    interpreter = Interpreter(str(path))
    assert interpreter.get_signature_list() == {
        "plain": {"inputs": ["x"], "outputs": ["y"]},
        "rows": {"inputs": ["ids"], "outputs": ["y"]},
    }
    x = np.array([[1, 2, 3], [-1, 0.5, 0]], np.float32)
    got = interpreter.get_signature_runner("plain")(x=x)["y"]
    np.testing.assert_allclose(got, x @ drawn("matrix").T, rtol=1e-6)
    ids = np.array([6, 0, 3, 3], np.int32)
    got = interpreter.get_signature_runner("rows")(ids=ids)["y"]
    np.testing.assert_allclose(got, drawn("table")[ids] @ drawn("matrix").T, rtol=1e-5)
    assert path.stat().st_size < len(skeleton) + 1024


def test_each_weight_is_made_once_and_in_order(skeleton: bytes, tmp_path: Path) -> None:
    for shapes in (SHAPES, dict(reversed(SHAPES.items()))):
        made: list[str] = []

        def make(name: str, made: list[str] = made) -> np.ndarray:
            made.append(name)
            return drawn(name)

        fill_skeleton(skeleton, shapes, make, tmp_path / "filled.tflite")
        assert made == list(shapes)


def test_other_layouts_and_types_of_the_same_weight_are_put_in_order(skeleton: bytes, tmp_path: Path) -> None:
    fill_skeleton(skeleton, SHAPES, drawn, tmp_path / "a.tflite")
    fill_skeleton(skeleton, SHAPES, lambda n: np.asfortranarray(drawn(n).astype(np.float64)), tmp_path / "b.tflite")
    assert (tmp_path / "a.tflite").read_bytes() == (tmp_path / "b.tflite").read_bytes()


def test_a_name_that_the_graph_lacks(skeleton: bytes, tmp_path: Path) -> None:
    path = tmp_path / "filled.tflite"
    with pytest.raises(ExportError, match=r"lacks weights.*matrices"):
        fill_skeleton(skeleton, {**SHAPES, "matrices": (5, 3)}, lambda _: pytest.fail("too early"), path)
    assert not path.exists()


@pytest.mark.parametrize("shape", [(3, 5), (5, 4), (15,), (1, 5, 3), (5, 0), ()])
def test_a_weight_of_another_shape(skeleton: bytes, tmp_path: Path, shape: tuple[int, ...]) -> None:
    def make(name: str) -> np.ndarray:
        return drawn(name) if name == "table" else np.zeros(shape, np.float32)

    with pytest.raises(ExportError, match=r"matrix has another shape.*expected \(5, 3\)"):
        fill_skeleton(skeleton, SHAPES, make, tmp_path / "filled.tflite")


def test_a_lookup_takes_the_place_of_gather(skeleton: bytes, tmp_path: Path) -> None:
    path = tmp_path / "filled.tflite"
    fill_skeleton(skeleton, SHAPES, drawn, path)
    model = schema.ModelT.InitFromPackedBuf(bytearray(path.read_bytes()), 0)
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    used = [codes[op.opcodeIndex] for graph in model.subgraphs for op in graph.operators]
    assert schema.BuiltinOperator.GATHER not in used
    assert used.count(schema.BuiltinOperator.EMBEDDING_LOOKUP) == 1


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_lie_whole_and_aligned_behind_the_graph(tiny_decoder: Tiny, name: str) -> None:
    """At multiples of 64 bytes, in order, without overlap, up to the last byte of the file."""
    tiny = tiny_decoder(name)
    data = tiny.path.read_bytes()
    model = schema.ModelT.InitFromPackedBuf(bytearray(data), 0)
    names = {t.buffer: t.name.decode().split("/")[-1] for g in model.subgraphs for t in g.tensors}
    placed = [(b.offset, b.size, names[i]) for i, b in enumerate(model.buffers) if b.offset]
    placed.sort()
    assert [name for _, _, name in placed] == list(weight_shapes(tiny.config))
    end = 0
    for offset, size, weight in placed:
        assert offset % 64 == 0
        assert offset >= end
        assert offset - end < 64 or end == 0
        end = offset + size
        expected = skeleton_weight(tiny.config, tiny.weights, weight)
        assert data[offset:end] == np.ascontiguousarray(expected).tobytes()
    assert end == len(data)


def test_tensor_names_are_unique(tiny_decoder: Tiny) -> None:
    """The quantizer addresses tensors by name."""
    model = schema.ModelT.InitFromPackedBuf(bytearray(tiny_decoder("gqa").path.read_bytes()), 0)
    weights = [t.name for g in model.subgraphs for t in g.tensors if model.buffers[t.buffer].offset]
    assert len(weights) == len(set(weights))


# --------------------------------------------------------------------------------
# What goes in: `skeleton_weight`


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_has_its_shape(name: str) -> None:
    config, _ = VARIANTS[name]
    weights = loud_llama(config)
    shapes = weight_shapes(config)
    assert ("lm_head" in shapes) == (not config.tie_word_embeddings)
    for weight, shape in shapes.items():
        made = skeleton_weight(config, weights, weight)
        assert made.shape == shape
        assert made.dtype == np.float32


def test_every_tensor_of_the_checkpoint_is_used() -> None:
    config = replace(LlamaConfig.tiny(), tie_word_embeddings=False)
    weights, used = loud_llama(config), set()

    class Watched(dict):
        def __getitem__(self, key: str) -> np.ndarray:
            used.add(key)
            return super().__getitem__(key)

    for name in weight_shapes(config):
        skeleton_weight(config, Watched(weights), name)
    assert used == set(weights)


def test_a_checkpoint_that_lacks_a_tensor() -> None:
    config = LlamaConfig.tiny()
    weights = loud_llama(config)
    del weights["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(KeyError, match=r"layers\.1\.self_attn\.k_proj"):
        skeleton_weight(config, weights, "layers_1_qkv")


def test_layers_past_ten_are_told_apart() -> None:
    config = replace(LlamaConfig.tiny(), num_layers=12)
    weights = loud_llama(config)
    np.testing.assert_array_equal(
        skeleton_weight(config, weights, "layers_11_gate_up"),
        np.concatenate([weights[f"model.layers.11.mlp.{part}_proj.weight"] for part in ("gate", "up")])
        * weights["model.layers.11.post_attention_layernorm.weight"],
    )


def test_a_decoder_with_a_head_of_its_own_is_quantized(tiny_decoder: Tiny, tmp_path: Path) -> None:
    """Its steps don't read the table: as a float32 tensor over bytes that are int8, it would keep the file closed."""
    tiny = tiny_decoder("mha")
    assert not tiny.config.tie_word_embeddings
    raw, path = tmp_path / "raw.tflite", tmp_path / "int8.tflite"
    raw.write_bytes(tiny.path.read_bytes())
    quantize_graph(raw, path, without_gptq(load_recipe("int8").graphs[DECODER]))
    logits = []
    for decoder in (replace(tiny, path=path).open(CACHE), tiny.open(CACHE)):
        logits.append(decoder.feed(tiny.embeddings(9)).copy())
        decoder.close()
    assert row_cosines(*(row[None] for row in logits))[0] > 0.95
