"""GPTQ for a graph of one signature, such as the pictures' are: by what its matrices are given of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantization.gptq import GPTQ, Floats, gptq, grid_of
from quantization.quantize import Samples
from quantization.surgery import Matrix, OpenGraph, Runner


def round_graph(path: Path, entries: Sequence[dict[str, Any]], samples: Callable[[], Samples], *, threads: int) -> None:
    """Rounds the matrices of a float32 `.tflite` for which entries ask for GPTQ, and writes the file anew if any do.

    Args:
        entries: a recipe's for this graph; an operator has the name of what it puts out.
        samples: makes what the graph is fed, inputs of its only signature.

    Raises:
        ConfigError: an entry asks for GPTQ of something else than symmetric rows or blocks, or blocks don't fit.
    """
    if not any(entry["algorithm_key"] == GPTQ for entry in entries):
        return
    ((signature, inputs),) = samples().items()
    graph = OpenGraph(path, signature)
    names = [tensor.name.decode() for tensor in graph.graph.tensors]
    wanted = [(m, grid) for m in graph.matrices() if (grid := grid_of(entries, names[m.y]))]
    part = path.with_suffix(".part")
    hessians = _hessians(path, signature, [m for m, _ in wanted], inputs, part, threads)
    for (matrix, grid), hessian in zip(wanted, hessians, strict=True):
        weights = graph.constant(matrix.w)
        assert weights is not None
        rounded = gptq(weights, hessian, grid)
        graph.contents[graph.graph.tensors[matrix.w].buffer] = np.frombuffer(rounded.tobytes(), np.uint8)
    graph.write(part)
    part.replace(path)


def _hessians(
    path: Path,
    signature: str,
    matrices: Sequence[Matrix],
    inputs: Sequence[Mapping[str, npt.NDArray[Any]]],
    part: Path,
    threads: int,
) -> list[Floats]:
    """The sum of `x^T x` over all inputs x of each matrix, float32 `[inputs, inputs]`.

    Args:
        part: a file to be overwritten.
    """
    watched = OpenGraph(path, signature)
    outputs = [watched.add_output(matrix.x) for matrix in matrices]
    watched.write(part)
    run = Runner(part, threads)
    sums: dict[str, Floats] = {}  # by name: queries, keys and values are given the same
    for sample in inputs:
        found = run(sample)
        for name in dict.fromkeys(outputs):
            x = np.asarray(found[name], np.float32).reshape(-1, found[name].shape[-1])
            sums[name] = sums[name] + x.T @ x if name in sums else x.T @ x
    return [sums[name] for name in outputs]
