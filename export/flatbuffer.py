"""Puts weights into a converted skeleton, one at a time, straight into the file.

A `.tflite` may keep its buffers behind the flatbuffer proper, at absolute offsets (schema.fbs, `Buffer.offset`). So a
model of any size, past flatbuffers' own 2 GB too, is written in the memory of its largest matrix, and a matrix that
several signatures use is stored once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from quantization.model_file import write_model
from seed_story.errors import ExportError

_EMBEDDINGS = b"embeddings"
_UNSET = 1  # a placeholder that makes the packer write the field, to be overwritten in place


def fill_skeleton(
    skeleton: bytes,
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], npt.NDArray[np.float32]],
    path: Path,
) -> None:
    """Writes `path`: the skeleton with its weight inputs turned into constants.

    Args:
        skeleton: a model in which some signature inputs are weights.
        shapes: these inputs' names and shapes.
        make: gives a weight, float32; called once for each, in order.

    Raises:
        ExportError: the skeleton lacks one of the weights, or `make` gives another shape.
    """
    model, buffers = with_constants(skeleton, shapes)
    write_weights(path, model, buffers, shapes, make)


def with_constants(skeleton: bytes, names: Collection[str]) -> tuple[schema.ModelT, dict[str, int]]:
    """The skeleton with its weight inputs turned into constants, and each one's buffer, which is empty as yet.

    Raises:
        ExportError: the skeleton lacks one of the weights.
    """
    model = schema.ModelT.InitFromPackedBuf(bytearray(skeleton), 0)
    buffers = _make_constants(model, names)
    _use_embedding_lookup(model)
    _use_dequantize(model)
    _read_cache_late(model)
    _name_products(model, set(buffers.values()))
    return model, buffers


def write_weights(
    path: Path,
    model: schema.ModelT,
    buffers: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], npt.NDArray[np.float32]],
) -> None:
    """Writes a model of `with_constants`, and into these of its buffers their weights; see `fill_skeleton`."""
    write_model(path, model, flatbuffers.Builder(1 << 20), _contents(buffers, shapes, make))


def _contents(
    buffers: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], npt.NDArray[np.float32]],
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    for name, buffer in buffers.items():
        weight = np.ascontiguousarray(make(name), np.float32)
        if weight.shape != shapes[name]:
            raise ExportError(f"the weight {name} has another shape", got=weight.shape, expected=shapes[name])
        yield buffer, weight


def _make_constants(model: schema.ModelT, names: Collection[str]) -> dict[str, int]:
    """Turns signature inputs into constants; gives the buffer of each."""
    buffers: dict[str, int] = {}
    for signature in model.signatureDefs:
        graph = model.subgraphs[signature.subgraphIndex]
        read = {int(index) for op in graph.operators for index in op.inputs}
        inputs = []
        for entry in signature.inputs:
            name = entry.name.decode()
            if name not in names:
                inputs.append(entry)
                continue
            if name not in buffers:
                buffers[name] = len(model.buffers)
                model.buffers.append(schema.BufferT(offset=_UNSET, size=_UNSET))
            tensor = graph.tensors[entry.tensorIndex]
            # One that nothing reads would stay float32 when the quantizer changes the buffer: no engine opens that.
            tensor.buffer = buffers[name] if entry.tensorIndex in read else 0
            tensor.name = f"{signature.signatureKey.decode()}/{name}".encode()  # the quantizer wants unique names
        signature.inputs = inputs
        left = {entry.tensorIndex for entry in inputs}
        graph.inputs = np.array([index for index in graph.inputs if index in left], np.int32)
    missing = sorted(set(names) - set(buffers))
    if missing:
        raise ExportError("the converted graph lacks weights", got=f"none called {missing[:10]}")
    return {name: buffers[name] for name in names}


def _name_products(model: schema.ModelT, weights: Collection[int]) -> None:
    """Calls what an operator makes of a weight `<weight's name>/product`: recipes find operators by that name.

    Names are unique: a weight's later products in a graph are counted, `product_1` and so on.
    """
    for graph in model.subgraphs:
        uses: Counter[bytes] = Counter()
        for op in graph.operators:
            for index in op.inputs:
                weight = graph.tensors[index]
                if weight.buffer in weights:
                    count = b"_%d" % uses[weight.name] if uses[weight.name] else b""
                    graph.tensors[op.outputs[0]].name = weight.name + b"/product" + count
                    uses[weight.name] += 1


def _use_embedding_lookup(model: schema.ModelT) -> None:
    """GATHER of whole rows becomes EMBEDDING_LOOKUP, the form of it that reads quantized rows."""
    gather, lookup = schema.BuiltinOperator.GATHER, schema.BuiltinOperator.EMBEDDING_LOOKUP
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    if gather not in codes:
        return
    code = schema.OperatorCodeT(builtinCode=lookup, deprecatedBuiltinCode=lookup, version=1)
    model.operatorCodes.append(code)
    for graph in model.subgraphs:
        for op in graph.operators:
            if codes[op.opcodeIndex] == gather:
                table, rows = op.inputs
                op.opcodeIndex = len(model.operatorCodes) - 1
                op.inputs = np.array([rows, table], np.int32)
                op.builtinOptionsType, op.builtinOptions = schema.BuiltinOptions.NONE, None


def _use_dequantize(model: schema.ModelT) -> None:
    """CAST of int8 becomes DEQUANTIZE by a scale of one: XNNPACK computes it, where a CAST would split its graph."""
    cast, dequantize = schema.BuiltinOperator.CAST, schema.BuiltinOperator.DEQUANTIZE
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    for graph in model.subgraphs:
        for op in graph.operators:
            source = graph.tensors[op.inputs[0]] if len(op.inputs) else None
            if codes[op.opcodeIndex] != cast or source is None or source.type != schema.TensorType.INT8:
                continue
            if dequantize not in codes:
                codes.append(dequantize)
                made = schema.OperatorCodeT(builtinCode=dequantize, deprecatedBuiltinCode=dequantize, version=2)
                model.operatorCodes.append(made)
            op.opcodeIndex = codes.index(dequantize)
            op.builtinOptionsType, op.builtinOptions = schema.BuiltinOptions.NONE, None
            source.quantization = schema.QuantizationParametersT(scale=[1.0], zeroPoint=[0])


def _read_cache_late(model: schema.ModelT) -> None:
    """Moves what doesn't depend on a step's embeddings to where it is first used.

    The converter puts it at the beginning: every layer's keys and values of an int8 cache would be floats at once.
    """
    for signature in model.signatureDefs:
        graph = model.subgraphs[signature.subgraphIndex]
        given = [entry.tensorIndex for entry in signature.inputs if entry.name == _EMBEDDINGS]
        if not given or all(graph.tensors[i].type != schema.TensorType.INT8 for i in graph.inputs):
            continue
        makers, follows = dict[int, int](), set(given)
        for number, op in enumerate(graph.operators):
            makers |= dict.fromkeys(map(int, op.outputs), number)
            if follows.intersection(map(int, op.inputs)):
                follows.update(map(int, op.outputs))
        graph.operators = _late(graph.operators, makers, follows)


def _late(operators: Sequence[Any], makers: Mapping[int, int], follows: set[int]) -> list[Any]:
    """The operators, those that make none of the tensors in `follows` as late as they can be."""
    ordered: list[Any] = []
    placed: set[int] = set()

    def place(number: int) -> None:
        for tensor in map(int, operators[number].inputs):
            if tensor in makers and makers[tensor] not in placed:
                place(makers[tensor])
        placed.add(number)
        ordered.append(operators[number])

    late = {number for number, op in enumerate(operators) if follows.isdisjoint(map(int, op.outputs))}
    for number in sorted(range(len(operators)), key=late.__contains__):  # what follows first, all in order
        if number not in placed:
            place(number)
    return ordered
