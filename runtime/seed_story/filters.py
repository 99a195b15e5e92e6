"""Which of all tokens top-k, top-p and min-p leave to choose from, and how probable each is beside the best."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["filtered"]


def filtered(
    scores: NDArray[np.float32],
    best: float,
    *,
    reach: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The kept ids, ascending, and their weights relative to the best token's.

    Args:
        scores: logits `[vocab_size]`.
        best: the greatest of them.
        reach: how far below it a token may be; infinite for any distance.
        temperature, top_k, top_p, min_p: see `SamplingConfig`.
    """
    floor = max(_kth_largest(scores, top_k) if 0 < top_k < len(scores) else -math.inf, best - reach)
    ids = np.flatnonzero(scores >= np.float32(floor)) if floor > -math.inf else np.arange(len(scores))
    weights = scores - np.float32(best) if len(ids) == len(scores) else scores[ids] - np.float32(best)
    np.divide(weights, np.float32(temperature), out=weights)
    np.exp(weights, out=weights)
    if top_p == 1:
        return ids, weights
    kept = _nucleus(weights, top_p, min_p)
    return ids[kept], weights[kept]


def _kth_largest(scores: NDArray[np.float32], k: int) -> float:
    place = len(scores) - k
    return float(np.partition(scores, place)[place])


def _nucleus(weights: NDArray[np.float32], top_p: float, min_p: float) -> NDArray[np.int64]:
    """Places, ascending, that top-p and min-p both keep; the lower place among equals at top-p's border.

    A token stays in top-p when those before it make up less than `top_p`. All those below (1 - top_p) / n of
    the whole together make up less than 1 - top_p: they needn't be sorted. The best weight is 1, so
    `min_p` itself is min-p's threshold.
    """
    total = float(weights.sum(dtype=np.float64))
    places = np.flatnonzero(weights >= max(min_p, min((1 - top_p) * total / len(weights) * 0.999, 1.0)))
    values = weights[places]
    falling = np.sort(values)[::-1]
    before = np.cumsum(falling, dtype=np.float64) - falling
    count = max(1, int(np.searchsorted(before, top_p * total, side="left")))
    border = falling[count - 1]
    equals = np.flatnonzero(values == border)
    keep = values > border
    keep[equals[: count - int(keep.sum())]] = True
    kept: NDArray[np.int64] = places[keep]
    return kept
