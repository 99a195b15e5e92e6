"""Inference engines behind one interface: one file each, and `open_graph` to choose."""

from __future__ import annotations

from pathlib import Path

from seed_story.backends.base import Graph, GraphSignature
from seed_story.errors import UsageError

__all__ = ["BACKENDS", "Graph", "GraphSignature", "open_graph"]

BACKENDS = ("litert",)
"""The names that `open_graph` takes."""


def open_graph(path: Path, *, backend: str = "litert", threads: int, packed: Path | None = None) -> Graph:
    """Loads a graph.

    Args:
        path: a `.tflite` file.
        threads: CPU threads of one call.
        packed: where the engine may keep its own form of the weights, to load faster next time.

    Raises:
        UsageError: there is no such backend.
        BackendError: the engine isn't installed, or refuses the file.
    """
    if backend == "litert":
        from seed_story.backends.litert import LiteRtGraph  # an engine is imported only when it is used

        return LiteRtGraph(path, threads=threads, packed=packed)
    raise UsageError("there is no such backend", got=backend, expected=" or ".join(BACKENDS))
