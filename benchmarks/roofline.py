"""The least time a decode step can take: the bytes it must read, over how fast this machine reads memory.

Every weight of the graph and every key and value of the cache is needed once a token, and none of it stays in a CPU's
caches until the next one (a machine whose last cache holds it all has no such bound).
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from seed_story.bundle import Bundle, graph_file
from seed_story.contract import DECODE, DECODER, cache_specs

PROBE_BYTES = 512 << 20
"""Far more than any cache."""


def read_bandwidth_gb_s(threads: int, rounds: int = 8) -> float:
    """How fast so many threads together read memory, 10^9 bytes a second: the best of some rounds of a dot product."""
    parts = np.array_split(np.ones(PROBE_BYTES // 4, np.float32), threads)

    def read(part: npt.NDArray[np.float32]) -> None:
        np.dot(part, part)

    best_s = np.inf
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            started = time.perf_counter()
            list(pool.map(read, parts))
            best_s = min(best_s, time.perf_counter() - started)
    return PROBE_BYTES / best_s / 1e9


def decode_bytes(bundle: Bundle) -> dict[str, int]:
    """What a decode step must read: `weights`, each constant of its graph once, and `cache`, all keys and values."""
    manifest = bundle.manifest
    specs = cache_specs(manifest.story.llama, manifest.cache.slots, manifest.sink_rows)
    return {
        "weights": weight_bytes(bundle.file(graph_file(DECODER)), DECODE),
        "cache": sum(int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize for spec in specs),
    }


def weight_bytes(file: Path, signature: str) -> int:
    """Bytes of the constants that a signature's graph uses, each once.

    Args:
        file: a `.tflite`, whose buffers may lie in the flatbuffer or behind it.
    """
    model = schema.Model.GetRootAs(np.memmap(file, np.uint8, "r"), 0)
    entries = [model.SignatureDefs(i) for i in range(model.SignatureDefsLength())]
    (entry,) = (entry for entry in entries if entry.SignatureKey().decode() == signature)
    graph = model.Subgraphs(entry.SubgraphIndex())
    buffers = {graph.Tensors(i).Buffer() for i in range(graph.TensorsLength())}
    return sum(max(model.Buffers(i).Size(), model.Buffers(i).DataLength()) for i in buffers)
