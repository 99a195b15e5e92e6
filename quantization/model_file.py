"""A `.tflite` file with its contents behind the flatbuffer (schema.fbs, `Buffer.offset`), one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import flatbuffers
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

_ALIGNMENT = 64


def write_model(
    path: Path, model: schema.ModelT, builder: flatbuffers.Builder, contents: Iterable[tuple[int, npt.NDArray[Any]]]
) -> None:
    """Writes a model in the memory of its largest content.

    Args:
        builder: an empty one.
        contents: a buffer's number and its C-contiguous content; that buffer's offset and size are set to anything but
            zero, and overwritten in the file.
    """
    builder.Finish(model.Pack(builder), b"TFL3")
    head = bytearray(builder.Output())
    packed, position = schema.Model.GetRootAs(head, 0), len(head)
    with path.open("wb") as file:
        file.write(head)
        for number, content in contents:
            position += -position % _ALIGNMENT
            file.seek(position)
            flatbuffer_utils.update_packed_buffer(packed.Buffers(number), offset=position, size=content.nbytes)
            file.write(content.data)
            position += content.nbytes
        file.seek(0)
        file.write(head)
