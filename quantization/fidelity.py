"""How far a bundle's choices are from the float reference's, token for token, on the same pictures and text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from training.evaluation.bootstrap import Interval, Sums, by_cluster, difference_interval, mean_interval
from training.evaluation.bootstrap import quantile_interval as of_quantile

Floats = npt.NDArray[np.float64]

_TOP = 5


class Place(NamedTuple):
    """Where a token stands.

    Args:
        story: its story's id; tokens of one story are no independent witnesses.
        page: from 1, counted from the beginning of all that the cache was given.
        after_eviction: whether the cache has begun to forget.
    """

    story: str
    page: int
    after_eviction: bool


class Divergence(NamedTuple):
    """A bundle beside the reference at one token.

    Args:
        kl: Kullback-Leibler divergence of the bundle's distribution from the reference's, nat.
        nats, reference_nats: what the text's own token costs under each.
        top1: 1 where both would choose the same token, else 0.
        top5: the share of the reference's five likeliest tokens that are among the bundle's five.
    """

    kl: float
    nats: float
    reference_nats: float
    top1: float
    top5: float


def log_softmax(logits: npt.NDArray[np.float32]) -> Floats:
    """Log-probabilities, float64 `[vocab]`."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


def kl_nat(expected: Floats, got: Floats) -> float:
    """The Kullback-Leibler divergence of `got` from `expected`, log-probabilities `[vocab]` both, nat."""
    return float((np.exp(expected) * (expected - got)).sum())


def divergence(expected: Floats, got: Floats, token_id: int) -> Divergence:
    """Compares log-probabilities, `[vocab]` both.

    Args:
        expected: the reference's.
        token_id: the text's own token.
    """
    few = min(_TOP, len(expected))
    first, second = (set(np.argpartition(scores, -few)[-few:].tolist()) for scores in (expected, got))
    return Divergence(
        kl_nat(expected, got),
        -float(got[token_id]),
        -float(expected[token_id]),
        float(expected.argmax() == got.argmax()),
        len(first & second) / few,
    )


def figures(places: Sequence[Place], found: Sequence[Divergence], *, seed: int = 0) -> dict[str, Any]:
    """What a report says of some tokens.

    Returns:
        Means and quantiles, each with its bootstrap interval over stories (95 %; null for fewer than two stories),
        and the number of tokens and stories that they come from.
    """
    stories = [place.story for place in places]
    kl = [one.kl for one in found]
    made: dict[str, Any] = {"tokens": len(found), "stories": len(set(stories))}
    mine, theirs = (
        by_cluster(zip(stories, nats, strict=True))
        for nats in ([one.nats for one in found], [one.reference_nats for one in found])
    )
    made["perplexity_ratio"] = math.exp(mine.mean - theirs.mean)
    made["perplexity_ratio_interval"] = _each(math.exp, difference_interval(mine, theirs, seed=seed))
    for name, field in (("mean_kl", "kl"), ("top1_agreement", "top1"), ("top5_agreement", "top5")):
        sums: Sums = by_cluster((s, getattr(one, field)) for s, one in zip(stories, found, strict=True))
        made[name], made[f"{name}_interval"] = sums.mean, mean_interval(sums, seed=seed)
    for name, quantile in (("median_kl", 0.5), ("p99_kl", 0.99)):
        made[name] = float(np.quantile(kl, quantile))
        made[f"{name}_interval"] = of_quantile(zip(stories, kl, strict=True), quantile, seed=seed)
    return made


def _each(change: Callable[[float], float], interval: Interval | None) -> Interval | None:
    return None if interval is None else [change(end) for end in interval]


def all_figures(places: Sequence[Place], found: Sequence[Divergence], *, seed: int = 0) -> dict[str, Any]:
    """`figures` of all tokens; of those before and after the cache began to forget; and of each page."""

    def part(chosen: Callable[[Place], bool]) -> dict[str, Any] | None:
        kept = [(place, one) for place, one in zip(places, found, strict=True) if chosen(place)]
        return figures([p for p, _ in kept], [one for _, one in kept], seed=seed) if kept else None

    pages = sorted({place.page for place in places})
    return {
        **figures(places, found, seed=seed),
        "before_eviction": part(lambda place: not place.after_eviction),
        "after_eviction": part(lambda place: place.after_eviction),
        "per_page": {str(page): part(lambda place, page=page: place.page == page) for page in pages},  # type: ignore[misc]
    }


def row_cosines(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> Floats:
    """Cosines of the vectors along the last axis, float64 `[n]`; NaN stays NaN."""
    a, b = (rows.reshape(-1, rows.shape[-1]).astype(np.float64) for rows in (got, expected))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.asarray((a * b).sum(1) / np.maximum(norms, 1e-30))
