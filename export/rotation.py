"""Turns the residual stream of the decoder, so that no channel of it stands out.

A row that is quantized to int8 as a whole is as coarse as its largest channel demands, and in a LLaMA a few channels
are ten times as large as the rest. Without its gain, RMSNorm commutes with an orthogonal matrix, so the stream can be
turned by one, and every matrix that reads or writes it takes the turn into its weights (QuaRot, arXiv 2404.00456,
section 4): the same function in exact arithmetic, at one small product a step. Values are not turned: what `o` reads
costs next to nothing (docs/quantization.md).

What `down` reads is turned too, in blocks and by the graph itself, since SwiGLU commutes with nothing.

What passes between a bundle's graphs is turned as well: the table's rows are, and the last matrices of the Q-Former's
graph turn a picture's embeddings (`export/network_graphs.py`), so that no step has to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from export.decoder_weights import (
    DOWN_ROTATION,
    HEAD,
    NORM,
    ROTATED_NORM,
    TABLE,
    skeleton_weight,
    weight_shapes,
)
from model.rotation import rotation_matrix
from seed_story.config import LlamaConfig


def rotated_weight(config: LlamaConfig, weights: Mapping[str, Any], name: str) -> npt.NDArray[np.float32]:
    """One of the rotated skeleton's weights; see `decoder_weights.skeleton_weight`.

    Args:
        name: one of `weight_shapes(config, rotated=True)`.
    """
    turn = rotation_matrix(config.hidden_size)
    small = rotation_matrix(weight_shapes(config, rotated=True)[DOWN_ROTATION][0])
    if name == DOWN_ROTATION:
        return small.astype(np.float32)
    if name == ROTATED_NORM:
        gain = skeleton_weight(config, weights, NORM).astype(np.float64)
        return (turn * gain @ turn).astype(np.float32)
    matrix = skeleton_weight(config, weights, name).astype(np.float64)
    if name.endswith("_down"):
        matrix = (matrix.reshape(len(matrix), -1, len(small)) @ small).reshape(matrix.shape)
    reads = name in (TABLE, HEAD) or name.endswith(("_qkv", "_gate_up"))  # the others write to the stream
    return (matrix @ turn if reads else turn @ matrix).astype(np.float32)
