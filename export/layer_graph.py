"""One layer of the decoder as a graph of its own: so a big model is calibrated in the memory of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema

from export.decoder_weights import matrix
from export.flatbuffer import write_weights
from seed_story.contract import key_cache, scales_of, sinks_of, value_cache

EMBEDDINGS, KEYS, VALUES = "embeddings", "k", "v"


def layer_matrices(layer: int) -> list[str]:
    """The names of a layer's matrices, in the order of `weight_shapes`."""
    return [matrix(layer, kind) for kind in ("qkv", "o", "gate_up", "down")]


def write_layer(
    whole: schema.ModelT,
    buffers: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[str], npt.NDArray[np.float32]],
    signature: str,
    layer: int,
    path: Path,
) -> None:
    """Writes `path`: what a signature computes in one layer.

    Inputs are the signature's, with the residual stream before the layer as `embeddings` and its cache as layer 0's.
    Outputs are the stream after it, also `embeddings`, its new `k` and `v`, `[kv_heads, N, head_dim]`, and what each
    matrix is given, by the matrix's name.

    Args:
        whole, buffers: of `with_constants`, for all layers; neither is changed.
        shapes, make: as in `fill_skeleton`; only the layer's weights are made.
    """
    model, (kept,) = copy(whole), (copy(s) for s in whole.signatureDefs if s.signatureKey.decode() == signature)
    graph, model.buffers = copy(whole.subgraphs[kept.subgraphIndex]), list(whole.buffers)
    model.signatureDefs, model.subgraphs, kept.subgraphIndex = [kept], [graph], 0
    made = {entry.name.decode(): entry.tensorIndex for entry in kept.outputs}
    stream = {EMBEDDINGS: _after(graph, signature, layer)}
    stream |= {name: int(_maker(graph, made[name]).inputs[layer]) for name in (KEYS, VALUES)}
    given = {entry.name.decode(): entry.tensorIndex for entry in kept.inputs}
    if layer:
        given[EMBEDDINGS] = _after(graph, signature, layer - 1)
    matrices = set(layer_matrices(layer))
    reads = {name: int(op.inputs[0]) for op in graph.operators for name in matrices & _weights(graph, op, signature)}
    _cut(graph, given.values(), [*stream.values(), *reads.values()])
    _sign(kept, graph, {_as_first(name, layer): tensor for name, tensor in given.items()}, {**stream, **reads})
    write_weights(path, model, _used(model, graph, buffers), shapes, make)


def _after(graph: Any, signature: str, layer: int) -> int:
    """The residual stream after a layer: the sum that takes up what `down` puts out."""
    name = f"{signature}/{matrix(layer, 'down')}/product".encode()
    (op,) = (op for op in graph.operators if any(i >= 0 and graph.tensors[i].name == name for i in op.inputs))
    return int(op.outputs[0])


def _maker(graph: Any, tensor: int) -> Any:
    (op,) = (op for op in graph.operators if tensor in op.outputs)
    return op


def _weights(graph: Any, op: Any, signature: str) -> set[str]:
    """The names of an operator's inputs, as weights have them."""
    return {graph.tensors[i].name.decode().removeprefix(f"{signature}/") for i in op.inputs if i >= 0}


def _cut(graph: Any, given: Any, wanted: Sequence[int]) -> None:
    """Leaves only the operators that make the wanted tensors of the given ones."""
    needed, ends = set(wanted), set(given)
    operators = []
    for op in reversed(graph.operators):
        outputs = {int(i) for i in op.outputs}
        if outputs & needed and not outputs & ends:
            operators.append(op)
            needed |= {int(i) for i in op.inputs}
    graph.operators = operators[::-1]


def _as_first(name: str, layer: int) -> str:
    """A cache input's name if its layer were the first."""
    for cache in (key_cache, value_cache):
        for part in (str, scales_of, sinks_of):
            if name == part(cache(layer)):
                return part(cache(0))
    return name


def _sign(signature: Any, graph: Any, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> None:
    """Writes the signature anew, with those of the inputs that an operator reads."""
    read = {int(i) for op in graph.operators for i in op.inputs}
    inputs = {name: tensor for name, tensor in inputs.items() if tensor in read}
    for side, tensors in (("inputs", inputs), ("outputs", outputs)):
        setattr(graph, side, np.array(list(tensors.values()), np.int32))
        entries = [schema.TensorMapT(name=name.encode(), tensorIndex=tensor) for name, tensor in tensors.items()]
        setattr(signature, side, entries)


def _used(model: schema.ModelT, graph: Any, buffers: Mapping[str, int]) -> dict[str, int]:
    """The weights that operators read; others' tensors and buffers become empty."""
    read = {graph.tensors[i].buffer for op in graph.operators for i in op.inputs if i >= 0}
    for buffer in set(buffers.values()) - read:
        model.buffers[buffer] = schema.BufferT()
    return {name: buffer for name, buffer in buffers.items() if buffer in read}
