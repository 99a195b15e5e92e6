"""By how much a rotated decoder's activations are balanced: found by reading stories.

The engine rounds each row that a matrix of integers reads to 255 steps of the row's range, whatever the channels mean.
What the rounding costs is then the range of the rows times the size of the matrix, so any change of coordinates pays
that makes the rows narrower by more than it makes the matrix larger. Three cost no time (`export/rotation.py` puts them
into the weights):

- The residual stream is broad in a few directions, the same in all layers: half of its energy lies in one, three
  quarters in sixteen. They are narrowed.
- What `down` reads is the product of a gate and of a row of `up`, which may be any multiple of itself.
- What `o` reads are means of values, and the values of a head may be in any coordinates.

The best multiple of a channel with variance p, read by weights whose squares sum to q, is the fourth root of q / p: the
least of `(sum of s^2 p) * (sum of q / s^2)`, by the inequality of Cauchy and Schwarz. Rounded weights gain as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh

from export.decoder_weights import broad_directions, down_block
from model.rotation import Doubles, rotation_matrix
from seed_story.config import LlamaConfig

Moment = tuple[str, npt.NDArray[Any], npt.NDArray[Any]]
"""A matrix's name, its weights `[outputs, inputs]`, and the sum of `x^T x` over its inputs x, `[inputs, inputs]`; those
of `down` as they are before their turn."""

_FLOOR, _TINY = 1e-6, 1e-30
"""Of the mean, and beside it: what a variance or a sum of squares is at least, so that nothing is divided by zero."""


@dataclass(frozen=True)
class Balance:
    """What the residual stream is turned by, what of it is narrowed then, and by how much.

    Args:
        turn: orthogonal, `[hidden, hidden]`; of rows x the channels are `x @ turn.T`.
        directions: of the turned residual stream, orthonormal, `[hidden, r]`.
        shares: of each that stays in the stream, above 0 and at most 1, `[r]`.
        scales: by layer, what each channel is multiplied by that `down` reads, `[layers, intermediate]`.
        values: by layer and key/value head, what values are multiplied by, `[layers, kv_heads, head_dim, head_dim]`.
    """

    turn: Doubles
    directions: Doubles
    shares: Doubles
    scales: Doubles
    values: Doubles

    @classmethod
    def none(cls, config: LlamaConfig, turn: Doubles) -> Balance:
        """The one that only turns."""
        size, broad, layers = config.hidden_size, broad_directions(config), config.num_layers
        values = np.tile(np.eye(config.head_dim), (layers, config.num_kv_heads, 1, 1))
        return cls(turn, np.eye(size)[:, :broad], np.ones(broad), np.ones((layers, config.intermediate_size)), values)


def balance_of(config: LlamaConfig, turn: Doubles, moments: Iterable[Moment]) -> Balance:
    """The balance of a decoder whose matrices and inputs are these, in their turned channels.

    Args:
        turn: what the stream is turned by.
        moments: of the layers' matrices, in order.
    """
    size, small = config.hidden_size, rotation_matrix(down_block(config))
    read, weighed, scales, values = np.zeros((size, size)), np.zeros((size, size)), [], []
    for name, weights, moment in moments:
        if name.endswith(("_qkv", "_gate_up")):
            both = (moment, weights.T @ weights)
            read, weighed = (total + of / np.trace(of) for total, of in zip((read, weighed), both, strict=True))
        elif name.endswith("_down"):
            squares = np.einsum("cii->ci", small @ _grams(weights, len(small)) @ small).reshape(-1)
            scales.append(_multiples(np.diag(moment), squares))
        elif name.endswith("_o"):
            blocks = (_blocks(moment, config.head_dim), _grams(weights, config.head_dim))
            heads = (of.reshape(config.num_kv_heads, config.group, *of.shape[1:]).sum(1) for of in blocks)
            values.append([_coordinates(*head) for head in zip(*heads, strict=True)])
    directions = eigh(read, subset_by_index=(size - broad_directions(config), size - 1))[1][:, ::-1]
    directions *= np.sign(np.take_along_axis(directions, np.abs(directions).argmax(0)[None], 0))  # either would do
    p, q = (np.einsum("ij,ik,kj->j", directions, of, directions) for of in (read, weighed))
    others = max(size - len(p), 1)
    best = _multiples(np.array([*p, (np.trace(read) - p.sum()) / others]),
                      np.array([*q, (np.trace(weighed) - q.sum()) / others]))  # fmt: skip
    return Balance(turn, directions, np.minimum(best[:-1] / best[-1], 1.0), np.stack(scales), np.array(values))


def _blocks(moment: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """Those on the diagonal, `[blocks, size, size]`."""
    return np.stack([moment[i : i + size, i : i + size] for i in range(0, len(moment), size)])


def _grams(weights: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """`w^T w` of every `size` columns, `[blocks, size, size]`."""
    parts = weights.reshape(len(weights), -1, size).transpose(1, 2, 0)
    return np.asarray(parts @ parts.transpose(0, 2, 1))


def _coordinates(moment: Doubles, gram: Doubles) -> Doubles:
    """Of a head's values: multiples of all directions at once, mixed so that none stands out; `[head_dim, head_dim]`.

    What the inequality allows for matrices is the root of their geometric mean. Being symmetric it depends on no
    eigenvector's sign, which another machine may choose otherwise: learned scales belong to these coordinates.
    """
    p, q = (of + (_FLOOR * np.trace(of) / len(of) + _TINY) * np.eye(len(of)) for of in (moment, gram))
    root, back = _power(p, 0.5), _power(p, -0.5)
    return np.asarray(rotation_matrix(len(p)) @ _power(back @ _power(root @ q @ root, 0.5) @ back, 0.5))


def _power(matrix: Doubles, exponent: float) -> Doubles:
    """Of a symmetric matrix with positive eigenvalues."""
    values, axes = eigh(matrix)
    return np.asarray(axes * np.maximum(values, _TINY) ** exponent @ axes.T)


def _multiples(variances: Doubles, squares: Doubles) -> Doubles:
    p, q = (np.maximum(values, _FLOOR * values.mean() + _TINY) for values in (variances, squares))
    return np.asarray((q / p) ** 0.25)
