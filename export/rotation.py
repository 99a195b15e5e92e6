"""Turns the residual stream of the decoder, so that no channel of it stands out.

A row that is quantized to int8 as a whole is as coarse as its largest channel demands, and in a LLaMA a few channels
are ten times as large as the rest. Without its gain, RMSNorm commutes with an orthogonal matrix, so the stream can be
turned by one, and every matrix that reads or writes it takes the turn into its weights (QuaRot, arXiv 2404.00456,
section 4): the same function in exact arithmetic, at one small product a step.

What `down` reads is turned too, in blocks and by the graph itself, since SwiGLU commutes with nothing.

Then it is balanced (`export/balance.py`). Of each broad direction only a share stays among the stream's channels, and
what the share lacks to the same length goes to a channel of its own, behind them: no sum of squares changes, so RMSNorm
is as it was. What reads the stream reads the first channels only, and makes up for the shares in its weights. Values
are kept in other coordinates, and `up` makes multiples; `o` and `down` take these back.

What passes between a bundle's graphs is turned as well: the table's rows are, and the last matrices of the Q-Former's
graph turn a picture's embeddings (`export/network_graphs.py`), so that no step has to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from export.balance import Balance
from export.decoder_weights import (
    BROAD,
    DOWN_ROTATION,
    HEAD,
    NARROWING,
    NORM,
    ROTATED_NORM,
    TABLE,
    down_block,
    skeleton_weight,
)
from model.rotation import Doubles, in_blocks, rotation_matrix
from seed_story.config import LlamaConfig


def rotated_weight(
    config: LlamaConfig, weights: Mapping[str, Any], balance: Balance, name: str
) -> npt.NDArray[np.float32]:
    """One of the rotated skeleton's weights; see `decoder_weights.skeleton_weight`.

    Args:
        name: one of `weight_shapes(config, rotated=True)`.
    """
    turn, small = balance.turn, rotation_matrix(down_block(config))
    if name == DOWN_ROTATION:
        return small.astype(np.float32)
    if name == BROAD:
        return balance.directions.T.astype(np.float32)
    if name == NARROWING:
        return _narrowing(balance).astype(np.float32)
    if name == ROTATED_NORM:
        gain = skeleton_weight(config, weights, NORM).astype(np.float64)
        return _reading(turn * gain @ turn.T, balance).astype(np.float32)
    made = skeleton_weight(config, weights, name).astype(np.float64)
    if name in (TABLE, HEAD):
        return (made @ turn.T).astype(np.float32)
    _, layer, kind = name.split("_", 2)
    scales, values = balance.scales[int(layer)], balance.values[int(layer)]
    if kind == "qkv":
        mine = made[-values.shape[0] * values.shape[1] :]
        mine[:] = (values @ mine.reshape(*values.shape[:2], -1)).reshape(mine.shape)
    if kind == "o":
        by_head = made.reshape(len(made), len(values), config.group, -1)
        made = np.einsum("ovgi,vij->ovgj", by_head, np.linalg.inv(values)).reshape(made.shape)
    if kind == "gate_up":
        made[len(scales) :] *= scales[:, None]
    if kind == "down":
        made = in_blocks(made / scales, small)
    reads = kind in ("qkv", "gate_up")  # the others write to the stream
    return (_reading(made @ turn.T, balance) if reads else _writing(turn @ made, balance)).astype(np.float32)


def balanced_inputs(config: LlamaConfig, balance: Balance, name: str, rows: npt.NDArray[Any]) -> Doubles:
    """What one of a balanced decoder's matrices is given, where that of an unbalanced one is given `rows`.

    Args:
        name: of a layer's matrix, or of the head, which is given the same.
        rows: in the turned channels, but those of `down` as they are before their turn, `[n, inputs]`.

    Returns:
        `[n, inputs]`.
    """
    made = rows.astype(np.float64)
    if name in (TABLE, HEAD):
        return made
    _, layer, kind = name.split("_", 2)
    if kind == "o":
        values = balance.values[int(layer)]
        by_head = made.reshape(len(made), len(values), config.group, -1)
        made = np.einsum("nvgj,vij->nvgi", by_head, values).reshape(made.shape)
    if kind == "down":
        made = in_blocks(made * balance.scales[int(layer)], rotation_matrix(down_block(config)))
    if kind in ("qkv", "gate_up"):
        made += (made @ balance.directions) * (balance.shares - 1) @ balance.directions.T
    return made


def _narrowing(balance: Balance) -> Doubles:
    """What a row's broad directions add to its channels, and to those behind them: `[hidden + r, r]`."""
    aside = np.diag(np.sqrt(1 - balance.shares**2))
    return np.concatenate([balance.directions * (balance.shares - 1), aside])


def _reading(matrix: Doubles, balance: Balance) -> Doubles:
    """What reads `[..., hidden]` channels of the narrowed stream, of what reads the turned one."""
    size, broad = balance.directions.shape
    wide = (matrix @ balance.directions) * (1 / balance.shares - 1) @ balance.directions.T
    return (matrix + wide) * math.sqrt(size / (size + broad))  # the mean of squares is one over more channels


def _writing(matrix: Doubles, balance: Balance) -> Doubles:
    """What writes all `[hidden + r, ...]` channels of the narrowed stream, of what writes the turned one."""
    widened = np.pad(matrix, ((0, len(balance.shares)), (0, 0)))
    return widened + _narrowing(balance) @ (balance.directions.T @ matrix)
