"""Operators that no engine computes in integers, written as ones that every engine does.

The converter fuses and folds as suits floating point. Before a graph is quantized with calibrated activations, this
undoes it where the result would be left in float32. The function stays the same.

    NEG(x)                    -> MUL(x, -1)
    SQUARE(x)                 -> MUL(x, x)
    SQUARED_DIFFERENCE(x, y)  -> MUL(d, d) with d = SUB(x, y)
    L2_NORMALIZATION(x)       -> MUL(x, RSQRT(SUM(MUL(x, x))))
    REDUCE_MAX over an axis   -> MAX_POOL_2D with a window as long as the axis
    FULLY_CONNECTED(x, w, b)  -> ADD(FULLY_CONNECTED(x, w), b) where a row of w is zero: its scale can't hold its bias
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from seed_story.errors import ExportError

_Op = schema.BuiltinOperator
_Options = schema.BuiltinOptions


def with_integer_ops(graph: bytes) -> bytes:
    """The same function, float32 as before, in operators that have integer kernels.

    Args:
        graph: a float32 `.tflite`.

    Raises:
        ExportError: it has a maximum over other axes than a pool can take.
    """
    model = schema.ModelT.InitFromPackedBuf(bytearray(graph), 0)
    for subgraph in model.subgraphs:
        _Rewriter(model, subgraph).run()
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class _Rewriter:
    """Goes through a subgraph's operators once, in order."""

    def __init__(self, model: Any, subgraph: Any) -> None:
        self._model, self._graph = model, subgraph
        self._made: list[Any] = []
        self._differences: dict[tuple[int, int], int] = {}

    def run(self) -> None:
        rules: dict[int, Callable[[Any], None]] = {
            _Op.NEG: self._negative,
            _Op.SQUARE: self._square,
            _Op.SQUARED_DIFFERENCE: self._squared_difference,
            _Op.L2_NORMALIZATION: self._unit_length,
            _Op.REDUCE_MAX: self._greatest,
            _Op.FULLY_CONNECTED: self._fully_connected,
        }
        codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in self._model.operatorCodes]
        for op in self._graph.operators:
            code = codes[op.opcodeIndex]
            if code == _Op.SUB:
                self._differences[int(op.inputs[0]), int(op.inputs[1])] = int(op.outputs[0])
            if code in rules:
                rules[code](op)
            else:
                self._made.append(op)
        self._graph.operators = self._made

    def _negative(self, op: Any) -> None:
        self._mul(int(op.inputs[0]), self._constant("minus_one", np.float32(-1)), op.outputs)

    def _square(self, op: Any) -> None:
        self._mul(int(op.inputs[0]), int(op.inputs[0]), op.outputs)

    def _squared_difference(self, op: Any) -> None:
        pair = int(op.inputs[0]), int(op.inputs[1])
        if pair not in self._differences:
            self._differences[pair] = self._tensor(op, "difference", self._graph.tensors[op.outputs[0]].shape)
            self._add(_Op.SUB, op.inputs, [self._differences[pair]], _Options.SubOptions, schema.SubOptionsT())
        self._mul(self._differences[pair], self._differences[pair], op.outputs)

    def _unit_length(self, op: Any) -> None:
        given = int(op.inputs[0])
        shape = list(self._graph.tensors[given].shape)
        row = [*shape[:-1], 1]
        squares, total, factor = (self._tensor(op, n, s) for n, s in (("squares", shape), ("sum", row), ("rsqrt", row)))
        self._mul(given, given, [squares])
        last = self._constant("last_axis", np.array([len(shape) - 1], np.int32))
        options = schema.ReducerOptionsT(keepDims=True)
        self._add(_Op.SUM, [squares, last], [total], _Options.ReducerOptions, options)
        self._add(_Op.RSQRT, [total], [factor], _Options.NONE, None)
        self._mul(given, factor, op.outputs)

    def _greatest(self, op: Any) -> None:
        given = self._graph.tensors[op.inputs[0]]
        axes = np.frombuffer(bytes(self._model.buffers[self._graph.tensors[op.inputs[1]].buffer].data), np.int32)
        if len(given.shape) != 3 or axes.tolist() not in ([1], [-2]):
            raise ExportError("a maximum has no integer form", got=f"shape {list(given.shape)}, axes {axes.tolist()}",
                              expected="the middle one of three axes")  # fmt: skip
        batch, length, channels = given.shape
        flat = self._tensor(op, "row", [batch, 1, length, channels])
        best = self._tensor(op, "pooled", [batch, 1, 1, channels])
        self._reshape(int(op.inputs[0]), flat)
        options = schema.Pool2DOptionsT()
        options.padding, options.filterHeight, options.filterWidth = schema.Padding.VALID, 1, int(length)
        options.strideH, options.strideW = 1, 1
        self._add(_Op.MAX_POOL_2D, [flat], [best], _Options.Pool2DOptions, options)
        self._reshape(best, int(op.outputs[0]))

    def _fully_connected(self, op: Any) -> None:
        self._made.append(op)
        bias = int(op.inputs[2]) if len(op.inputs) == 3 else -1
        weight = self._floats(int(op.inputs[1]))
        if bias < 0 or weight is None or self._floats(bias) is None or np.all(np.any(weight, axis=1)):
            return
        made = op.outputs
        op.outputs = np.array([self._tensor(op, "product", self._graph.tensors[made[0]].shape)], np.int32)
        op.inputs = np.array([*op.inputs[:2], -1], np.int32)
        self._add(_Op.ADD, [op.outputs[0], bias], made, _Options.AddOptions, schema.AddOptionsT())

    def _floats(self, tensor: int) -> npt.NDArray[np.float32] | None:
        """A constant's values; None if the tensor is none."""
        found = self._graph.tensors[tensor]
        data = self._model.buffers[found.buffer].data
        return None if data is None else np.frombuffer(bytes(data), np.float32).reshape(found.shape)

    def _mul(self, left: int, right: int, outputs: Any) -> None:
        self._add(_Op.MUL, [left, right], outputs, _Options.MulOptions, schema.MulOptionsT())

    def _reshape(self, given: int, made: int) -> None:
        shape = np.asarray(self._graph.tensors[made].shape, np.int32)
        name = f"{self._graph.tensors[made].name.decode()}/shape"
        options = schema.ReshapeOptionsT()
        options.newShape = shape
        self._add(_Op.RESHAPE, [given, self._constant(name, shape)], [made], _Options.ReshapeOptions, options)

    def _add(self, code: int, inputs: Any, outputs: Any, kind: int, options: Any) -> None:
        op = schema.OperatorT()
        op.opcodeIndex = self._opcode(code)
        op.inputs, op.outputs = np.asarray(inputs, np.int32), np.asarray(outputs, np.int32)
        op.builtinOptionsType, op.builtinOptions = kind, options
        self._made.append(op)

    def _opcode(self, code: int) -> int:
        codes = [max(c.builtinCode, c.deprecatedBuiltinCode) for c in self._model.operatorCodes]
        if code not in codes:
            made = schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=code, version=1)
            self._model.operatorCodes.append(made)
            codes.append(code)
        return codes.index(code)

    def _tensor(self, op: Any, part: str, shape: Any) -> int:
        name = self._graph.tensors[op.outputs[0]].name + b"/" + part.encode()
        tensor = schema.TensorT(shape=np.asarray(shape, np.int32), type=schema.TensorType.FLOAT32, name=name, buffer=0)
        self._graph.tensors.append(tensor)
        return len(self._graph.tensors) - 1

    def _constant(self, name: str, value: Any) -> int:
        value = np.asarray(value)
        kind = schema.TensorType.INT32 if value.dtype == np.int32 else schema.TensorType.FLOAT32
        self._model.buffers.append(schema.BufferT(data=np.frombuffer(value.tobytes(), np.uint8)))
        self._graph.tensors.append(schema.TensorT(
            shape=np.asarray(value.shape, np.int32), type=kind, name=f"{name}_{len(self._graph.tensors)}".encode(),
            buffer=len(self._model.buffers) - 1,
        ))  # fmt: skip
        return len(self._graph.tensors) - 1
