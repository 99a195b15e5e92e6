"""Turns the residual stream of the vision transformer, so that no channel of it stands out.

LayerNorm without its gain commutes with an orthogonal matrix that leaves the vector of ones as it is: the mean and the
length of a row stay. So the stream can be turned by one, as the decoder's is (`export/rotation.py`), with norms that
need no other form, and every matrix that reads or writes it takes the turn into its weights: behind the norms of DINOv2
the range of a row falls by a half. What comes out is turned back, at one small product a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from model.layers import named_variables, numpy_of
from model.rotation import Doubles, rotation_matrix
from model.vit import VisionTransformer

Floats = npt.NDArray[np.float32]

_QKV = [f"attention.attention.{part}" for part in ("query", "key", "value")]
_READERS: Mapping[bool, Mapping[str, Sequence[str]]] = {
    True: {"norm1": _QKV, "norm2": ["mlp.fc1"]},
    False: {"layernorm_before": _QKV, "layernorm_after": ["intermediate.dense"]},
}
_WRITERS: Mapping[bool, Mapping[str, str | None]] = {
    True: {"attention.output.dense": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"},
    False: {"attention.output.dense": None, "output.dense": None},
}
"""Of a block, by whether it has Layer Scales: norms and what reads them, and what writes the stream and its scale."""


def stream_rotation(size: int) -> Doubles:
    """An orthogonal matrix `[size, size]` that leaves the vector of ones as it is.

    It is `rotation_matrix` after a reflection (Householder's) that puts the ones where that brings them back from.
    """
    turn, ones = rotation_matrix(size), np.ones(size)
    apart = turn.T @ ones - ones
    reflection = np.eye(size) - 2 * np.outer(apart, apart) / (apart @ apart)
    return np.asarray(turn @ reflection)


def rotated_vit(network: VisionTransformer) -> tuple[dict[str, Floats], Floats, Floats]:
    """What a network's variables become, by their paths, and what turns its features back.

    Returns:
        The variables; and a matrix `[hidden, hidden]` and a bias `[hidden]`: features are those of the turned network
        times the matrix, and the bias.
    """
    config, variables = network.config, named_variables(network)
    turn, scaled = stream_rotation(config.hidden_size), config.layer_scale
    values = {name: numpy_of(variable).astype(np.float64) for name, variable in variables.items()}
    for name in ("cls_token", "position_embeddings"):
        values[f"embeddings.{name}"] = values[f"embeddings.{name}"] @ turn.T
    for part in ("weight", "bias"):
        name = f"embeddings.patch_embeddings.projection.{part}"
        values[name] = np.tensordot(turn, values[name], 1)
    for block in (f"encoder.layer.{i}." for i in range(config.num_layers)):
        for norm, readers in _READERS[scaled].items():
            gain, shift = _taken(values, block + norm)
            for reader in readers:
                weight, bias = (block + reader + part for part in (".weight", ".bias"))
                values[bias] = values[bias] + values[weight] @ shift
                values[weight] = values[weight] * gain @ turn.T
        for writer, scale in _WRITERS[scaled].items():
            factor = np.ones(config.hidden_size)
            if scale is not None:
                factor, values[block + scale] = values[block + scale], factor
            weight, bias = (block + writer + part for part in (".weight", ".bias"))
            values[weight], values[bias] = turn * factor @ values[weight], turn @ (factor * values[bias])
    gain, shift = _taken(values, "layernorm") if config.final_norm else (np.ones(len(turn)), np.zeros(len(turn)))
    changed = {variables[name].path: value.astype(np.float32) for name, value in values.items()}
    return changed, (turn * gain).astype(np.float32), shift.astype(np.float32)


def _taken(values: dict[str, Doubles], norm: str) -> tuple[Doubles, Doubles]:
    """A norm's gain and bias, which it has no longer."""
    gain, shift = values[f"{norm}.weight"], values[f"{norm}.bias"]
    values[f"{norm}.weight"], values[f"{norm}.bias"] = np.ones_like(gain), np.zeros_like(shift)
    return gain, shift
