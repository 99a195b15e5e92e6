"""A graph opened up: its matrices found, swapped or laid bare, and the result run.

Only one signature is kept. Contents lie behind the flatbuffer, where they stay when the flatbuffer is written anew
(schema.fbs, `Buffer.offset`): so swapping a matrix costs no second copy of the others.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from seed_story.errors import UsageError
from seed_story.quiet import quiet_stderr

Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 64
_SLACK = 1 << 24  # bytes: a flatbuffer written anew may be longer by the scales of a head, 12 bytes a word
_FLOATS = {schema.TensorType.FLOAT32: np.float32, schema.TensorType.FLOAT16: np.float16}
_SMALL = 256  # bytes: what stays in the flatbuffer, where the converter's shapes and axes are


@dataclass(frozen=True)
class Matrix:
    """A FULLY_CONNECTED operation: `y = x w^T + b`.

    Args:
        name: of its weights, without the signature; later uses of the same weights are counted, `name_1` and so on.
        op: the operation, and the numbers of its tensors: x, w, b (-1 for none) and y. Weights that are stored in
            float16 and dequantized before they are used are meant as they are stored.
    """

    name: str
    op: Any
    x: int
    w: int
    b: int
    y: int


class OpenGraph:
    """One signature of a `.tflite` file.

    Raises:
        UsageError: it has no such signature.
    """

    def __init__(self, path: Path, signature: str) -> None:
        self._file: Bytes = np.memmap(path, np.uint8, "r")
        self.model = schema.ModelT.InitFromPackedBuf(self._file, 0)
        found = [s for s in self.model.signatureDefs if s.signatureKey.decode() == signature]
        if not found:
            raise UsageError(f"{path} has no signature {signature}")
        self._key = signature
        self.signature, self.graph = found[0], self.model.subgraphs[found[0].subgraphIndex]
        self.model.signatureDefs, self.model.subgraphs, self.signature.subgraphIndex = [self.signature], [self.graph], 0
        self.contents: dict[int, Bytes] = {}
        for number, buffer in enumerate(self.model.buffers):
            if buffer.offset > 1:
                self.contents[number] = self._file[buffer.offset : buffer.offset + buffer.size]
            elif buffer.data is not None and len(buffer.data) > _SMALL:
                self.contents[number] = np.asarray(buffer.data, np.uint8)
                buffer.data = None
        self._base = 0
        self._adopted: dict[tuple[int, int], int] = {}

    def matrices(self) -> list[Matrix]:
        """In the order in which they are computed."""
        codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in self.model.operatorCodes]
        made: list[Matrix] = []
        uses, stored = Counter[int](), dict[int, int]()
        for op in self.graph.operators:
            if codes[op.opcodeIndex] == schema.BuiltinOperator.DEQUANTIZE:
                stored[int(op.outputs[0])] = int(op.inputs[0])
            elif codes[op.opcodeIndex] == schema.BuiltinOperator.FULLY_CONNECTED:
                x, w, b = (*map(int, op.inputs), -1)[:3]
                w = stored.get(w, w)
                name = self.graph.tensors[w].name.decode().split(";")[0].removeprefix(f"{self._key}/")
                made.append(Matrix(f"{name}_{uses[w]}" if uses[w] else name, op, x, w, b, int(op.outputs[0])))
                uses[w] += 1
        return made

    def constant(self, tensor: int) -> npt.NDArray[Any] | None:
        """A float32 or float16 tensor's value, float32; None if it has none, or is of another type."""
        found = self.graph.tensors[tensor]
        data = self.content(tensor)
        if found.type not in _FLOATS or not len(data):
            return None
        return np.frombuffer(data.tobytes(), _FLOATS[found.type]).reshape(found.shape).astype(np.float32, copy=False)

    def content(self, tensor: int) -> Bytes:
        """A tensor's constant as it is stored; empty if it has none."""
        number = self.graph.tensors[tensor].buffer
        kept = self.model.buffers[number].data
        return self.contents.get(number, np.empty(0, np.uint8) if kept is None else np.asarray(kept, np.uint8))

    def real(self, tensor: int, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """What a tensor's values stand for, float32: those of a fully integer graph are scaled."""
        scaling = self.graph.tensors[tensor].quantization
        if values.dtype.kind == "f" or scaling is None or scaling.scale is None:
            return np.asarray(values, np.float32)
        return np.asarray((values.astype(np.float32) - scaling.zeroPoint[0]) * scaling.scale[0], np.float32)

    def add_output(self, tensor: int) -> str:
        """Makes a tensor an output; its name among the signature's outputs."""
        for entry in self.signature.outputs:
            if entry.tensorIndex == tensor:
                return str(entry.name.decode())
        name = f"tensor_{tensor}"
        self.signature.outputs.append(schema.TensorMapT(name=name.encode(), tensorIndex=tensor))
        self.graph.outputs = np.append(self.graph.outputs, np.int32(tensor))
        return name

    def transplant(self, mine: Matrix, other: OpenGraph, theirs: Matrix) -> Callable[[], None]:
        """Puts another graph's matrix, in its number format, in the place of one of this graph's, wherever it is used.

        One that is stored in float16 is put there as float32 of the same values, which is what DEQUANTIZE makes of it.
        Contents are added once: `write` comes after the first transplant of all, `rewrite` after each further one.

        Returns:
            What undoes it.
        """
        tensor, ops = self.graph.tensors[mine.w], [one.op for one in self.matrices() if one.w == mine.w]
        before = {name: getattr(tensor, name) for name in ("type", "buffer", "quantization")}
        ops_before = [(op.opcodeIndex, op.builtinOptions) for op in ops]
        count, given = len(self.graph.tensors), other.graph.tensors[theirs.w]
        half = given.type == schema.TensorType.FLOAT16
        tensor.type, tensor.buffer = schema.TensorType.FLOAT32 if half else given.type, self._adopt(other, theirs.w)
        tensor.quantization = None if half else self._scaling(other, given.quantization)
        self.model.operatorCodes.append(other.model.operatorCodes[theirs.op.opcodeIndex])
        for op in ops:
            op.opcodeIndex, op.builtinOptions = len(self.model.operatorCodes) - 1, theirs.op.builtinOptions

        def undo() -> None:
            for op, (code, options) in zip(ops, ops_before, strict=True):
                op.opcodeIndex, op.builtinOptions = code, options
            for name, value in before.items():
                setattr(tensor, name, value)
            self.model.operatorCodes.pop()
            del self.graph.tensors[count:]

        return undo

    def _adopt(self, other: OpenGraph, tensor: int, *, widen: bool = True) -> int:
        """The number here of the buffer of another graph's tensor; float16 becomes float32, if it is to `widen`."""
        key = (id(other), other.graph.tensors[tensor].buffer)
        if key not in self._adopted:
            half = widen and other.graph.tensors[tensor].type == schema.TensorType.FLOAT16
            wide = other.constant(tensor) if half else None
            content = other.content(tensor) if wide is None else np.frombuffer(wide.tobytes(), np.uint8)
            self._adopted[key] = self._add_contents(content)
        return self._adopted[key]

    def _scaling(self, other: OpenGraph, scaling: Any) -> Any:
        """Another graph's scales; those of blocks are a tensor of their own."""
        if scaling is None or scaling.detailsType != schema.QuantizationDetails.BlockwiseQuantization:
            return scaling
        made, details = copy.copy(scaling), copy.copy(scaling.details)
        scales = copy.copy(other.graph.tensors[details.scales])
        scales.buffer = self._adopt(other, details.scales, widen=False)
        self.graph.tensors.append(scales)
        details.scales, made.details = len(self.graph.tensors) - 1, details
        return made

    def _add_contents(self, data: Bytes) -> int:
        self.model.buffers.append(schema.BufferT())
        self.contents[len(self.model.buffers) - 1] = data
        return len(self.model.buffers) - 1

    def write(self, path: Path) -> None:
        """Writes the graph with all contents, and room for `rewrite`."""
        self._place(1 << 20)  # any: numbers take the same room whatever they are
        self._base = self._place(len(self._pack()) + _SLACK)
        with path.open("wb") as file:
            file.write(self._pack())
            for number, data in self.contents.items():
                file.seek(self.model.buffers[number].offset)
                file.write(np.ascontiguousarray(data).data)
            file.write(b"\0" * _ALIGNMENT)

    def rewrite(self, path: Path) -> None:
        """Writes only what changed since `write`: everything but contents."""
        head = self._pack()
        assert len(head) <= self._base
        with path.open("r+b") as file:
            file.write(head)

    def _place(self, base: int) -> int:
        base = position = base + -base % _ALIGNMENT
        for number, data in self.contents.items():
            self.model.buffers[number].offset, self.model.buffers[number].size = position, data.nbytes
            position += data.nbytes + -data.nbytes % _ALIGNMENT
        return base

    def _pack(self) -> bytes:
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


class Runner:
    """The only signature of a file, loaded."""

    def __init__(self, path: Path, threads: int) -> None:
        with quiet_stderr():
            self._interpreter = Interpreter(str(path), num_threads=threads)
            (name,) = self._interpreter.get_signature_list()
            self._run = self._interpreter.get_signature_runner(name)

    def __call__(self, inputs: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Computes all outputs."""
        with quiet_stderr():
            return dict(self._run(**inputs))
