"""Runs `litert-quantizer` on one graph."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import shutil
import struct
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from quantization.recipe import entry_of
from quantization.sharing import share_vectors
from seed_story.errors import ExportError

Samples = Mapping[str, Sequence[Mapping[str, npt.NDArray[Any]]]]
"""Signature to inputs by name, as many as there are."""

_HEADROOM = 1.5
"""By how much the range of activations of 16 bits is widened, which costs half a bit of them. Of 824 held-out pictures,
one had a name's score 8 % beyond those of the calibration pictures, and cut off there it was another name's."""

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
            _muted_log(),
        ):  # its own bars
            warnings.simplefilter("ignore", UserWarning)  # that it keeps all tensors: calibrating is what that is for
            tool = quantizer.Quantizer(str(source), quantization_recipe=list(entries))
            found = _calibrate(tool, samples() if samples else {}) if tool.need_calibration else None
            if found is not None:
                _widen(found, _coarse(source, entries))
            tool.quantize(found, str(target), enable_progress_bar=False, enable_progress_report=False)
        if not target.is_file():  # it leaves small models to the caller
            tool._result.export_model(str(target))
    except _REFUSALS as error:
        raise ExportError(f"{source.name} can't be quantized", got=error, hint="Check the recipe.") from error
    source.unlink()  # first: of a big model there may be no room for a third file
    share_vectors(target)


@contextlib.contextmanager
def _muted_log() -> Iterator[None]:
    """Without its warnings that a buffer is written again: all signatures share it, and write the same."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


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


def _widen(ranges: dict[str, Any], coarse: Collection[str]) -> None:
    """Gives the ranges of all tensors but some headroom."""
    for name, found in ranges.items():
        if name not in coarse and "min" in found:
            found["min"], found["max"] = found["min"] * _HEADROOM, found["max"] * _HEADROOM


def _coarse(source: Path, entries: Sequence[dict[str, Any]]) -> set[str]:
    """The tensors that an operator with activations of 8 bits reads or makes: they have no bit to spare."""
    kinds = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
    model = schema.ModelT.InitFromPackedBuf(source.read_bytes(), 0)
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in model.operatorCodes]
    found: set[str] = set()
    for graph in model.subgraphs:
        names = [tensor.name.decode() for tensor in graph.tensors]
        for op in reversed(graph.operators):
            kind, made = kinds[codes[op.opcodeIndex]], [names[i] for i in op.outputs]
            reshaped = kind in ("RESHAPE", "TRANSPOSE") and not found.isdisjoint(made)  # they have one scale
            if reshaped or _activation_bits(entry_of(entries, kind, ";".join(made))) == 8:
                found |= {names[i] for i in op.inputs if i >= 0} | set(made)
    return found


def _activation_bits(entry: Mapping[str, Any] | None) -> int | None:
    """What a recipe's entry gives activations; None if it doesn't quantize them."""
    config = entry and entry["op_config"].get("activation_tensor_config")
    return config["num_bits"] if config else None
