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
    named = {graph.graph.tensors[m.y].name.decode(): m for m in graph.matrices()}
    grids = {m.w: grid for name, m in named.items() if (grid := grid_of(entries, name))}
    wanted = [m for m in named.values() if m.w in grids]
    part = path.with_suffix(".part")
    for matrix, hessian in zip(wanted, _hessians(path, signature, wanted, inputs, part, threads), strict=True):
        weights = graph.constant(matrix.w)
        assert weights is not None
        rounded = gptq(weights, hessian, grids[matrix.w])
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
    sums: list[Floats] = []
    for sample in inputs:
        found = run(sample)
        rows = [np.asarray(found[name], np.float32).reshape(-1, found[name].shape[-1]) for name in outputs]
        products = [x.T @ x for x in rows]
        sums = [total + product for total, product in zip(sums, products, strict=True)] if sums else products
    return sums
