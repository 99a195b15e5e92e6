"""Runs `litert-quantizer` on one graph."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from quantization.sharing import share_vectors
from seed_story.errors import ExportError

Samples = Mapping[str, Sequence[Mapping[str, npt.NDArray[Any]]]]
"""Signature to inputs by name, as many as there are."""

_REFUSALS = (ValueError, RuntimeError, KeyError, TypeError, IndexError, struct.error, re.error)
"""What the quantizer raises for a recipe or a graph that it can't read."""


def is_static(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a recipe's entries give activations a scale of their own, so that an integer graph comes of it."""
    return any("activation_tensor_config" in (entry.get("op_config") or {}) for entry in entries)


def quantize_graph(
    source: Path, target: Path, entries: Sequence[dict[str, Any]], samples: Callable[[], Samples] | None = None
) -> None:
    """Writes `target`: `source` quantized; with no entries, moved as it is.

    Args:
        source: a float32 `.tflite`; mapped into memory, so its size doesn't count.
        entries: `litert-quantizer`'s recipe.
        samples: makes what the graph is calibrated with; called only if the recipe needs it.

    Raises:
        ExportError: the quantizer refuses the graph or the recipe, or the recipe needs samples and has none.
    """
    if not entries:
        shutil.move(source, target)
        return
    from litert_quantizer import quantizer  # seconds to import, so only where it is needed

    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):  # its own bars
            warnings.simplefilter("ignore", UserWarning)  # that it keeps all tensors: calibrating is what that is for
            tool = quantizer.Quantizer(str(source), quantization_recipe=list(entries))
            found = _calibrate(tool, samples() if samples else {}) if tool.need_calibration else None
            tool.quantize(found, str(target), enable_progress_bar=False, enable_progress_report=False)
        if not target.is_file():  # it leaves small models to the caller
            tool._result.export_model(str(target))
    except _REFUSALS as error:
        raise ExportError(f"{source.name} can't be quantized", got=error, hint="Check the recipe.") from error
    source.unlink()  # first: of a big model there may be no room for a third file
    share_vectors(target)


def _calibrate(tool: Any, samples: Samples) -> dict[str, Any]:
    """The least and greatest value of every tensor over all samples.

    `Quantizer.calibrate` would average each sample's range instead, which cuts off what only some pictures have. A
    sixteen-bit scale has room for the whole range: of the Q-Former's embeddings, the average lost half a percent.
    """
    if not any(samples.values()):
        raise ExportError("the recipe needs samples to calibrate with", got="none", expected="inputs of a signature")
    from litert_quantizer import calibrator
    from litert_quantizer.utils import qsv_utils

    watcher = calibrator.Calibrator(tool._float_model_buffer, qsv_update_func=qsv_utils.min_max_update)
    watcher.calibrate(samples, tool._recipe_manager)
    return dict(watcher.get_model_qsvs())
