"""Stores equal vectors of a `.tflite` file once, and nothing where a tensor has nothing to say of quantization.

Every signature has tensors of its own for the weights that all share, and each tensor carries its scales and zero
points: twelve bytes a channel and signature. The format lets tables point to one vector, but its writers do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from quantization.model_file import write_model


class _SharingBuilder(flatbuffers.Builder):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(1 << 20)
        self._known: dict[tuple[str, bytes], Any] = {}

    def CreateNumpyVector(self, x: npt.NDArray[Any]) -> Any:  # noqa: N802
        key = (x.dtype.str, x.tobytes())
        if key not in self._known:
            self._known[key] = super().CreateNumpyVector(x)
        return self._known[key]


def _is_empty(table: schema.QuantizationParametersT) -> bool:
    fields = (table.scale, table.min, table.max, table.details)
    return not any(field is not None and np.size(field) for field in fields)


def share_vectors(path: Path) -> None:
    """Writes a file anew, the same graph with less in it."""
    old = np.memmap(path, np.uint8, "r")
    model = schema.ModelT.InitFromPackedBuf(old, 0)
    for tensor in (tensor for graph in model.subgraphs for tensor in graph.tensors):
        if tensor.quantization is not None and _is_empty(tensor.quantization):
            tensor.quantization = None
    part = path.with_suffix(".part")
    behind = ((number, buffer.offset, buffer.size) for number, buffer in enumerate(model.buffers) if buffer.offset > 1)
    contents = ((number, old[offset : offset + size]) for number, offset, size in behind)
    write_model(part, model, _SharingBuilder(), contents)
    part.replace(path)
