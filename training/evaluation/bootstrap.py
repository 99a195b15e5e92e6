"""Percentile bootstrap intervals (Efron and Tibshirani, "An Introduction to the Bootstrap", chapter 13).

What is resampled are clusters, not single values: two pictures of a fox, or two tokens of a story, are no independent
witnesses. A figure at the end of its range, such as 0 of 50, gets an interval of no width: the method's known limit.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Interval = list[float]
"""`[low, high]`."""
Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95


class Sums(NamedTuple):
    """The sum and the number of each cluster's values, float64 `[clusters]` both; every number is above 0."""

    totals: Floats
    counts: Floats

    @property
    def mean(self) -> float:
        """Over all values of all clusters."""
        return float(self.totals.sum() / self.counts.sum())


def by_cluster(values: Iterable[tuple[Hashable, float]]) -> Sums:
    """Sums up values that stand beside the name of their cluster."""
    kept: dict[Hashable, list[float]] = {}
    for cluster, value in values:
        kept.setdefault(cluster, []).append(value)
    return Sums(np.array([sum(v) for v in kept.values()], np.float64), np.array([len(v) for v in kept.values()], float))


def mean_interval(sums: Sums, *, seed: int = 0) -> Interval | None:
    """The interval of `sums.mean`; None for fewer than two clusters, which say nothing about their spread."""
    if len(sums.totals) < 2:
        return None
    return _percentiles(_means(sums, _draws(len(sums.totals), np.random.default_rng(seed))))


def difference_interval(first: Sums, second: Sums, *, seed: int = 0) -> Interval | None:
    """The interval of `first.mean - second.mean`, two measurements of the same clusters, resampled together."""
    if len(first.totals) < 2:
        return None
    drawn = _draws(len(first.totals), np.random.default_rng(seed))
    return _percentiles(_means(first, drawn) - _means(second, drawn))


def quantile_interval(values: Iterable[tuple[Hashable, float]], quantile: float, *, seed: int = 0) -> Interval | None:
    """The interval of a quantile (0 to 1) of values that stand beside the name of their cluster.

    Returns:
        None for fewer than two clusters.
    """
    pairs = list(values)
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(cluster for cluster, _ in pairs))}
    if len(numbers) < 2:
        return None
    found = np.array([value for _, value in pairs], np.float64)
    order = np.argsort(found)
    owners = np.array([numbers[cluster] for cluster, _ in pairs])[order]
    reached = np.cumsum(_draws(len(numbers), np.random.default_rng(seed))[:, owners], axis=1)  # [resamples, values]
    return _percentiles(found[order][np.argmax(reached >= quantile * reached[:, -1:], axis=1)])


def crossed_interval(table: npt.ArrayLike, *, seed: int = 0) -> Interval | None:
    """The interval of a table's mean when its rows and its columns were both drawn by chance: both are resampled.

    Args:
        table: `[rows, columns]`.

    Returns:
        None for a table with fewer than two rows or columns.
    """
    table = np.asarray(table, np.float64)
    if min(table.shape) < 2:
        return None
    rng = np.random.default_rng(seed)
    rows, columns = (_draws(size, rng) for size in table.shape)
    return _percentiles(((rows @ table) * columns).sum(axis=1) / table.size)


def _draws(size: int, rng: np.random.Generator) -> Floats:
    """How often each of `size` things was drawn, in each of `RESAMPLES` draws with replacement."""
    return rng.multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(np.float64)


def _means(sums: Sums, drawn: Floats) -> Floats:
    return np.asarray((drawn @ sums.totals) / (drawn @ sums.counts))


def _percentiles(statistics: Floats) -> Interval:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(statistics, (tail, 100 - tail))
    return [float(low), float(high)]
