"""The rotated decoder is the same function of the same inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema

from export.balance import Balance
from export.decoder_weights import down_block, head_name, weight_shapes
from export.network_graphs import write_qformer
from export.rotation import balanced_inputs, rotated_weight
from model.qformer import QFormer
from model.rotation import in_blocks, rotation_matrix
from seed_story.backends import open_graph
from seed_story.config import CacheConfig, QFormerConfig
from seed_story.contract import PROJECT, qformer_signatures
from seed_story.decoder import Decoder
from tests.compare import assert_close
from tests.export.test_decoder_file import SIGNATURES, load, operators
from tests.export.tiny_decoders import VARIANTS, TinyDecoder, export_tiny, loud_llama, random_balance, random_rotation

Tiny = Callable[..., TinyDecoder]


@pytest.fixture(scope="module")
def rotated_decoder(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    @cache
    def exported(name: str) -> TinyDecoder:
        return export_tiny(*VARIANTS[name], tmp_path_factory.mktemp(name), rotated=True)

    return exported


@pytest.mark.parametrize("size", [1, 2, 24, 45, 576])
def test_rotation_is_its_own_inverse(size: int) -> None:
    turn = rotation_matrix(size)
    assert turn.dtype == np.float64
    np.testing.assert_allclose(turn @ turn.T, np.eye(size), atol=1e-12)
    np.testing.assert_array_equal(turn, turn.T)
    assert np.abs(turn).max() <= np.sqrt(2 / size) + 1e-12


def test_rotation_spreads_what_stands_out_and_what_is_alike() -> None:
    turn = rotation_matrix(576)
    for row in (np.eye(576)[17], np.ones(576) / 24):
        assert np.abs(row @ turn).max() < 5 / 24


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_of_streaming_reference(rotated_decoder: Tiny, open_decoder: Callable[..., Decoder], name: str) -> None:
    """In chunks and one by one, past the end of the cache; the reference has the weights, and rows, as they were."""
    tiny = rotated_decoder(name)
    cache_config = CacheConfig(tiny.slots, 2)
    x = tiny.embeddings(2 * tiny.slots + 5)
    expected = tiny.reference(cache_config).feed(x)
    x = tiny.turned(x)
    decoder = open_decoder(tiny, cache_config)
    end = 0
    for count in (5, 1, 8, *[1] * (len(x) - 14)):
        end += count
        assert_close(decoder.feed(x[end - count : end]), expected[end - 1], "decoder_graph")


@pytest.mark.parametrize("name", VARIANTS)
def test_embed_gives_turned_rows(rotated_decoder: Tiny, open_decoder: Callable[..., Decoder], name: str) -> None:
    tiny = rotated_decoder(name)
    decoder = open_decoder(tiny, CacheConfig(tiny.slots, 2))
    ids = [0, 7, tiny.config.vocab_size - 1]
    expected = torch.nn.functional.embedding(
        torch.tensor(ids), torch.from_numpy(tiny.weights["model.embed_tokens.weight"])
    )
    assert_close(decoder.embed(ids), tiny.turned(expected.numpy()), "decoder_graph")


@pytest.mark.parametrize("memory", [False, True], ids=["plain", "memory"])
def test_a_qformer_turns_its_embeddings(tmp_path: Path, memory: bool) -> None:
    """Those of the Keras network, and of the same size: nothing is added to the graph."""
    names = {"memory_names": 5, "memory_slots": 2} if memory else {}
    config = replace(QFormerConfig.tiny(), **names)
    network = QFormer(config, seed=3)
    for variable in network.trainable_variables:  # biases, too
        variable.assign(np.random.default_rng(len(variable.path)).normal(0, 0.3, variable.shape))
    features = np.random.default_rng(0).normal(size=(1, 5, config.vision_size)).astype(np.float32)
    files = [tmp_path / "plain.tflite", tmp_path / "turned.tflite"]
    turn = random_rotation(config.llm_size)
    for file, one in zip(files, (None, turn), strict=True):
        file.write_bytes(write_qformer(network, 5, tmp_path / file.stem, one))
    graph = open_graph(files[1], threads=1)
    bound = graph.bind(qformer_signatures(config, 5)[0])
    bound.inputs["features"][:] = features
    bound.run()
    assert_close(bound.outputs["image_embeddings"][0], np.asarray(network(features))[0] @ turn.T, "network")
    graph.close()
    kinds = [operators(schema.ModelT.InitFromPackedBuf(bytearray(file.read_bytes()), 0), PROJECT) for file in files]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_operators_are_few_and_cheap(tiny_decoder: Tiny, rotated_decoder: Tiny, name: str) -> None:
    """Into the stream and out of it, in each norm, and before each `down`: nothing that would cut the graph."""
    tiny = rotated_decoder(name)
    plain, rotated, layers = load(tiny_decoder(name)), load(tiny), tiny.config.num_layers
    assert operators(rotated, "embed") == ["EMBEDDING_LOOKUP"]
    for signature in SIGNATURES[1:]:
        found, before = Counter(operators(rotated, signature)), Counter(operators(plain, signature))
        into, turns = Counter(FULLY_CONNECTED=2, PAD=1, ADD=1), Counter(FULLY_CONNECTED=layers, RESHAPE=2 * layers)
        assert found - before == into + turns + Counter(SLICE=2 * layers + 1, FULLY_CONNECTED=1)
        assert before - found == Counter(MUL=1)
    names = [tensor.name for graph in rotated.subgraphs for tensor in graph.tensors]
    products = [name for name in names if b"/product" in name]
    assert len(products) == len(set(products)), "the quantizer wants unique names"


def test_outliers_are_gone() -> None:
    """A table with one loud channel, as those of LLaMAs have: a row's largest entry among its others."""
    config, _ = VARIANTS["gqa"]
    random = np.random.default_rng(0)
    table = random.normal(size=(config.vocab_size, config.hidden_size))
    table[:, 3] *= 50
    weights = {"model.embed_tokens.weight": table.astype(np.float32)}
    none = Balance.none(config, rotation_matrix(config.hidden_size))
    turned = rotated_weight(config, weights, none, "embed_tokens")

    def crest(rows: np.ndarray) -> float:
        return float(np.median(np.abs(rows).max(1) / np.sqrt((rows**2).mean(1))))

    assert crest(turned) < 0.6 * crest(table)


def test_recipe_rounds_rotations_to_half_precision_only(export_tiny: Callable[[str], Path]) -> None:
    data = (export_tiny("int8") / "decoder.tflite").read_bytes()
    model = schema.ModelT.InitFromPackedBuf(bytearray(data), 0)
    types = {tensor.name.decode(): tensor.type for graph in model.subgraphs for tensor in graph.tensors}
    kinds = schema.TensorType
    for signature in SIGNATURES[1:]:
        for weight in ("broad", "narrowing", "rotated_norm", "down_rotation"):
            assert types[f"{signature}/{weight}"] == kinds.FLOAT16
        for weight in ("layers_0_qkv", "layers_1_down", "embed_tokens"):
            assert types[f"{signature}/{weight}"] == kinds.INT8
            assert types[f"{signature}/{weight}/product"] == kinds.FLOAT32


@pytest.mark.parametrize("name", VARIANTS)
def test_a_balanced_matrix_makes_the_same_of_its_inputs(name: str) -> None:
    """The head, and what reads the stream; `o` and `down` as well, in the channels that aren't behind the stream's."""
    config = VARIANTS[name][0]
    weights, balance = loud_llama(config), random_balance(config)
    none = Balance.none(config, balance.turn)
    size = config.hidden_size
    narrowed = rotated_weight(config, weights, balance, "narrowing")[:size].astype(np.float64)
    narrowing = np.eye(size) + narrowed @ balance.directions.T
    for matrix in weight_shapes(config, rotated=True):
        if not matrix.startswith(("layers_1", head_name(config))):
            continue
        plain, made = (rotated_weight(config, weights, one, matrix).astype(np.float64) for one in (none, balance))
        rows = np.random.default_rng(0).normal(size=(7, plain.shape[1]))
        given = in_blocks(rows, rotation_matrix(down_block(config))) if matrix.endswith("_down") else rows
        expected, found = given @ plain.T, balanced_inputs(config, balance, matrix, rows) @ made.T
        if matrix.endswith(("_o", "_down")):
            expected, found = expected[:, :size] @ narrowing.T, found[:, :size]
        if matrix.endswith("_gate_up"):  # `up` makes multiples, which `down` undoes
            expected[:, len(plain) // 2 :] *= balance.scales[1]
        if matrix.endswith("_qkv"):
            values = slice(len(plain) - config.num_kv_heads * config.head_dim, None)
            by_head = expected[:, values].reshape(len(rows), config.num_kv_heads, -1)
            expected[:, values] = np.einsum("nvj,vij->nvi", by_head, balance.values[1]).reshape(len(rows), -1)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), err_msg=matrix)
