from __future__ import annotations

import numpy as np
import pytest

from training.evaluation.bootstrap import (
    Sums,
    by_cluster,
    crossed_interval,
    difference_interval,
    mean_interval,
    quantile_interval,
)

Z = 1.959964
"""The normal distribution's 97.5 % quantile."""
NEARLY = 0.08
"""2,000 resamples place a 95 % border within some 4 % of the half-width; twice that is allowed."""


def assert_half_width(interval: list[float] | None, centre: float, half: float) -> None:
    assert interval is not None
    low, high = interval
    assert (high - low) / 2 == pytest.approx(half, rel=NEARLY)
    assert (high + low) / 2 == pytest.approx(centre, abs=NEARLY * half)


def singles(values: np.ndarray) -> Sums:
    return Sums(values.astype(float), np.ones(len(values)))


def test_of_a_share_it_is_the_binomial_normal_one() -> None:
    values = np.repeat([1, 0], [300, 700])
    assert_half_width(mean_interval(singles(values)), 0.3, Z * np.sqrt(0.3 * 0.7 / 1000))


def test_of_a_mean_it_is_the_standard_error() -> None:
    values = np.random.default_rng(4).normal(5, 2, 400)
    assert_half_width(mean_interval(singles(values)), values.mean(), Z * values.std() / 20)


def test_clusters_that_agree_count_once() -> None:
    """Ten equal values a cluster: as wide as with one value each."""
    chosen = np.random.default_rng(1).random(100) < 0.4
    sums = by_cluster((cluster, float(value)) for cluster, value in enumerate(chosen) for _ in range(10))
    share = chosen.mean()
    assert sums.mean == pytest.approx(share)
    assert_half_width(mean_interval(sums), share, Z * np.sqrt(share * (1 - share) / 100))


def test_of_a_ratio_it_is_the_delta_method() -> None:
    rng = np.random.default_rng(2)
    counts = rng.integers(20, 60, 300).astype(float)
    totals = counts * rng.normal(2, 0.3, 300)
    sums = Sums(totals, counts)
    residual = totals - sums.mean * counts
    assert sums.mean == pytest.approx(totals.sum() / counts.sum())
    assert_half_width(mean_interval(sums), sums.mean, Z * residual.std() / counts.mean() / np.sqrt(300))


def test_a_difference_is_paired() -> None:
    """Two noisy measurements that differ by nearly a constant: the noise they share cancels."""
    rng = np.random.default_rng(3)
    noise, small = rng.normal(0, 10, 400), rng.normal(0, 0.1, 400)
    got = difference_interval(singles(noise + 1 + small), singles(noise))
    assert_half_width(got, 1 + small.mean(), Z * small.std() / 20)


def test_crossed_resamples_rows_and_columns() -> None:
    """Effects of rows and columns that add up: so do their variances."""
    rng = np.random.default_rng(5)
    rows, columns = rng.normal(0, 1, 60), rng.normal(0, 2, 200)
    table = rows[:, None] + columns
    half = Z * np.sqrt(rows.var() / 60 + columns.var() / 200)
    assert_half_width(crossed_interval(table), table.mean(), half)


def test_of_a_quantile_it_is_the_order_statistics_one() -> None:
    """The rank of the median has the binomial's deviation: ranks n/2 -+ z sqrt(n)/2 (Efron and Tibshirani)."""
    values = np.sort(np.random.default_rng(6).normal(size=400))
    half = round(Z * np.sqrt(400) / 2)
    low, high = quantile_interval(enumerate(values.tolist()), 0.5) or (0, 0)
    assert values[200 - half - 5] <= low <= values[200 - half + 4]
    assert values[200 + half - 5] <= high <= values[200 + half + 4]
    twice = [(cluster, value) for cluster, value in enumerate(values.tolist()) for _ in range(3)]
    assert quantile_interval(twice, 0.5) == pytest.approx([low, high])


def test_of_a_quantile_clusters_bring_all_their_values() -> None:
    """Drawn are a and a, a and b, or b and b: the 0.9 quantiles are 10, 10 and 3."""
    values = [("a", 10.0), ("b", 1.0), ("b", 2.0), ("b", 3.0)]
    assert quantile_interval(values, 0.9) == [3.0, 10.0]


def test_nothing_to_resample() -> None:
    one = singles(np.ones(1))
    assert mean_interval(one) is None and difference_interval(one, one) is None
    assert quantile_interval([(0, 1.0), (0, 2.0)], 0.5) is None
    assert crossed_interval(np.ones((1, 9))) is None and crossed_interval(np.ones((9, 1))) is None


def test_the_seed_decides() -> None:
    sums = singles(np.random.default_rng(0).normal(size=30))
    assert mean_interval(sums, seed=1) == mean_interval(sums, seed=1) != mean_interval(sums, seed=2)
