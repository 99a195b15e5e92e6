"""Runs `litert-quantizer` on one graph."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantization.sharing import share_vectors
from seed_story.errors import ExportError

_REFUSALS = (ValueError, RuntimeError, KeyError, TypeError, IndexError, struct.error, re.error)
"""What the quantizer raises for a recipe or a graph that it can't read."""


def quantize_graph(source: Path, target: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Writes `target`: `source` quantized; with no entries, moved as it is.

    Args:
        source: a float32 `.tflite`; mapped into memory, so its size doesn't count.
        entries: `litert-quantizer`'s recipe.

    Raises:
        ExportError: the quantizer refuses the graph or the recipe.
    """
    if not entries:
        shutil.move(source, target)
        return
    from litert_quantizer import quantizer  # seconds to import, so only where it is needed

    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):  # its own bars
            tool = quantizer.Quantizer(str(source), quantization_recipe=list(entries))
            tool.quantize(serialize_to_path=str(target), enable_progress_bar=False, enable_progress_report=False)
        if not target.is_file():  # it leaves small models to the caller
            tool._result.export_model(str(target))
    except _REFUSALS as error:
        raise ExportError(f"{source.name} can't be quantized", got=error, hint="Check the recipe.") from error
    share_vectors(target)
    source.unlink()
