"""What is inside an exported decoder's file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from export.decoder_weights import skeleton_weight, weight_shapes
from export.flatbuffer import fill_skeleton
from seed_story.contract import EMBED
from tests.export.tiny_decoders import VARIANTS, TinyDecoder

Tiny = Callable[[str], TinyDecoder]


def operators(model: schema.ModelT, signature: str) -> list[str]:
    (index,) = (s.subgraphIndex for s in model.signatureDefs if s.signatureKey.decode() == signature)
    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    codes = [names[max(c.builtinCode, c.deprecatedBuiltinCode)] for c in model.operatorCodes]
    return [codes[op.opcodeIndex] for op in model.subgraphs[index].operators]


def load(tiny: TinyDecoder) -> schema.ModelT:
    return schema.ModelT.InitFromPackedBuf(bytearray(tiny.path.read_bytes()), 0)


SIGNATURES = ("embed", "begin_8", "prefill_4", "prefill_8", "decode", "decode_attention")
VERIFYING = ("decode", "decode_attention", "verify_4")
"""Those that read the block of tokens beside the cache, where guesses can be verified."""


@pytest.mark.parametrize("name", VARIANTS)
def test_tensors_are_those_of_the_design(tiny_decoder: Tiny, name: str) -> None:
    """Spelt out here, not taken from the contract."""
    tiny = tiny_decoder(name)
    c, slots = tiny.config, tiny.slots
    interpreter = Interpreter(str(tiny.path))
    found = interpreter.get_signature_list()
    assert sorted(found) == sorted(SIGNATURES)
    for signature, n in zip(SIGNATURES[1:], (8, 4, 8, 1, 1), strict=True):
        turns, columns = (1, n) if signature == "begin_8" else (2, slots + n)
        inputs = {
            "embeddings": (n, c.hidden_size),
            "cos": (n, turns, c.head_dim),
            "sin": (n, turns, c.head_dim),
            "mask": (n, columns),
        }
        if signature != "begin_8":
            cache = (c.num_kv_heads, slots, c.head_dim)
            inputs |= {"region": (2, slots)}
            inputs |= {f"kv_cache_{kind}_{i}": cache for kind in "kv" for i in range(c.num_layers)}
        new = (c.num_layers, c.num_kv_heads, n, c.head_dim)
        outputs = {"logits": (1, c.vocab_size), "k": new, "v": new}
        if signature == "decode_attention":
            outputs["attention"] = (1, slots + 1)
        runner = interpreter.get_signature_runner(signature)
        for details, expected in (
            (runner.get_input_details(), inputs),
            (runner.get_output_details(), outputs),
        ):
            assert {k: tuple(d["shape"].tolist()) for k, d in details.items()} == expected
            assert {d["dtype"] for d in details.values()} == {np.float32}
    runner = interpreter.get_signature_runner("embed")
    ((token, token_details),) = runner.get_input_details().items()
    assert (token, token_details["shape"].tolist(), token_details["dtype"]) == ("token", [1], np.int32)
    ((rows, row_details),) = runner.get_output_details().items()
    assert (rows, row_details["shape"].tolist()) == ("embeddings", [1, c.hidden_size])


@pytest.mark.parametrize("name", VARIANTS)
def test_operators_are_those_that_the_engine_is_fast_at(tiny_decoder: Tiny, name: str) -> None:
    tiny = tiny_decoder(name)
    model = load(tiny)
    assert operators(model, EMBED) == ["EMBEDDING_LOOKUP"]
    for signature in SIGNATURES[1:]:
        found = operators(model, signature)
        layers = tiny.config.num_layers
        assert found.count("FULLY_CONNECTED") == 4 * layers + 1, "qkv, o, gate and up, down; and the head"
        # Scores of the cache, or of what may be kept and of all else, or of each of the three parts of a beginning; and
        # the mixture, or mixtures. One own key is no matrix.
        products = {"prefill": 3, "begin": 6}.get(signature.split("_")[0], 2)
        assert found.count("BATCH_MATMUL") == products * layers
        assert found.count("PACK") == 2, "the new keys, the new values"
        assert not {"GATHER", "DYNAMIC_UPDATE_SLICE", "STRIDED_SLICE", "DEQUANTIZE", "CAST", "CUSTOM"} & set(found)
        assert not [op for op in found if op.startswith("BROADCAST")]


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_are_stored_once(tiny_decoder: Tiny, name: str) -> None:
    tiny = tiny_decoder(name)
    shapes = weight_shapes(tiny.config)
    weights = sum(4 * math.prod(shape) for shape in shapes.values())
    size = tiny.path.stat().st_size
    assert weights < size <= weights + len(tiny.skeleton) + 64 * len(shapes) + 2048

    model = load(tiny)
    users: dict[int, set[str]] = {}
    for signature in model.signatureDefs:
        for tensor in model.subgraphs[signature.subgraphIndex].tensors:
            if model.buffers[tensor.buffer].offset:
                graph, weight = tensor.name.decode().split("/")
                assert graph == signature.signatureKey.decode()
                users.setdefault(tensor.buffer, set()).add(weight)
                assert tuple(tensor.shape) == shapes[weight]
    assert sorted(next(iter(names)) for names in users.values() if len(names) == 1) == sorted(shapes)
    constants = sum(len(b.data) for b in model.buffers if b.data is not None and not b.offset)
    assert constants < 2048, "no weight may hide in the skeleton"


def test_products_are_called_after_their_weights(tiny_decoder: Tiny) -> None:
    """Recipes find operators by these names."""
    tiny = tiny_decoder("gqa")
    model = load(tiny)
    names = [tensor.name.decode() for graph in model.subgraphs for tensor in graph.tensors]
    products = [name for name in names if name.endswith("/product")]
    assert len(products) == len(set(products))
    assert {"embed/embed_tokens/product", "decode/embed_tokens/product"} <= set(products)
    for signature in SIGNATURES[1:]:
        for weight in set(weight_shapes(tiny.config)):
            assert f"{signature}/{weight}/product" in products


def first_signature(skeleton: bytes, name: str) -> bytes:
    """The skeleton with a signature's graph as the primary one, which the interpreter's listing is of."""
    model = schema.ModelT.InitFromPackedBuf(bytearray(skeleton), 0)
    (index,) = (s.subgraphIndex for s in model.signatureDefs if s.signatureKey.decode() == name)
    model.subgraphs[0], model.subgraphs[index] = model.subgraphs[index], model.subgraphs[0]
    for signature in model.signatureDefs:
        signature.subgraphIndex = {0: index, index: 0}.get(signature.subgraphIndex, signature.subgraphIndex)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("signature", SIGNATURES[1:])
def test_one_partition_runs_everything_but_pack(tiny_decoder: Tiny, tmp_path: Path, name: str, signature: str) -> None:
    """XNNPACK takes all operators in one piece; only the two PACKs of the outputs run outside."""
    assert partitions_and_the_rest(tiny_decoder(name), signature, tmp_path) == (1, ["PACK", "PACK"])


@pytest.mark.parametrize("signature", VERIFYING)
def test_one_partition_where_guesses_are_verified(
    verifying_decoder: Callable[[str, str], TinyDecoder], tmp_path: Path, signature: str
) -> None:
    tiny = verifying_decoder("gqa", "float32")
    assert partitions_and_the_rest(tiny, signature, tmp_path) == (1, ["PACK", "PACK"])
    found, layers = operators(load(tiny), signature), tiny.config.num_layers
    assert found.count("FULLY_CONNECTED") == 4 * layers + 1
    assert found.count("BATCH_MATMUL") == 4 * layers
    assert not {"GATHER", "DYNAMIC_UPDATE_SLICE", "CAST", "CUSTOM", "SELECT_V2", "SCATTER_ND"} & set(found)
    assert not [op for op in found if op.startswith("BROADCAST")]


def partitions_and_the_rest(tiny: TinyDecoder, signature: str, folder: Path) -> tuple[int, list[str]]:
    """How many pieces the engine's delegate takes of a signature, and the operators that it leaves."""
    path = folder / "decoder.tflite"
    fill_skeleton(
        first_signature(tiny.skeleton, signature),
        weight_shapes(tiny.config),
        lambda weight: skeleton_weight(tiny.config, tiny.weights, weight),
        path,
    )
    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    listed = interpreter._get_ops_details()
    delegates = [op for op in listed if op["op_name"] == "DELEGATE"]
    ops = [op for op in listed if op["op_name"] != "DELEGATE"]
    maker = {int(output): op["index"] for op in ops for output in op["outputs"]}
    inputs_of = {op["index"]: [int(i) for i in op["inputs"]] for op in ops}
    inside: set[int] = set()
    wanted = [int(output) for one in delegates for output in one["outputs"]]
    ends = {int(i) for one in delegates for i in one["inputs"]}
    while wanted:  # back from what the partition gives to what it takes
        tensor = wanted.pop()
        if tensor in maker and tensor not in ends and maker[tensor] not in inside:
            inside.add(maker[tensor])
            wanted += inputs_of[maker[tensor]]
    return len(delegates), [op["op_name"] for op in ops if op["index"] not in inside]
