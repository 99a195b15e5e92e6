"""Figures against torch's and NumPy's own, and the rules of what is counted where."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from quantization.fidelity import Divergence, Place, all_figures, divergence, figures, log_softmax, row_cosines


def logits(seed: int, size: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


@pytest.mark.parametrize("seed", range(5))
def test_a_divergence_is_torchs(seed: int) -> None:
    first, second = logits(seed), logits(seed) + logits(seed + 100) / 4
    a, b = (torch.log_softmax(torch.tensor(x, dtype=torch.float64), 0) for x in (first, second))
    got = divergence(log_softmax(first), log_softmax(second), 7)
    assert got.kl == pytest.approx(float(torch.nn.functional.kl_div(b, a, log_target=True, reduction="sum")))
    assert (got.nats, got.reference_nats) == pytest.approx((-float(b[7]), -float(a[7])))
    assert got.top1 == float(a.argmax() == b.argmax())
    assert got.top5 == len(set(a.topk(5).indices.tolist()) & set(b.topk(5).indices.tolist())) / 5


def test_large_logits_stay_finite() -> None:
    scores = log_softmax(np.array([1e4, 0, -1e4], np.float32))
    assert np.isfinite(scores).all() and math.exp(scores[0]) == pytest.approx(1)


def test_a_vocabulary_of_three_has_a_top_three() -> None:
    scores = log_softmax(logits(0, 3))
    assert divergence(scores, scores, 0).top5 == 1


def test_a_direction() -> None:
    """KL is from the reference: what only the bundle thinks likely counts little."""
    sure, unsure = np.log([0.98, 0.01, 0.01]), np.log([1 / 3] * 3)
    p = np.exp(sure)
    assert divergence(sure, unsure, 0).kl == pytest.approx(float((p * np.log(3 * p)).sum()))
    assert divergence(unsure, sure, 0).kl == pytest.approx(float((np.log([1 / 3] * 3) - sure).mean()))


PLACES = [Place("a", 1, False), Place("a", 2, False), Place("b", 3, True), Place("b", 3, True)]
FOUND = [
    Divergence(0.1, 2.0, 1.5, 1.0, 1.0),
    Divergence(0.3, 1.0, 1.0, 0.0, 0.8),
    Divergence(0.0, 3.0, 2.5, 1.0, 1.0),
    Divergence(0.2, 0.5, 0.5, 1.0, 0.6),
]


def test_figures_are_over_all_tokens() -> None:
    got = figures(PLACES, FOUND)
    assert (got["tokens"], got["stories"]) == (4, 2)
    assert got["perplexity_ratio"] == pytest.approx(math.exp((0.5 + 0.5) / 4))
    assert got["mean_kl"] == pytest.approx(0.15) and got["median_kl"] == pytest.approx(0.15)
    assert got["p99_kl"] == pytest.approx(np.percentile([0.1, 0.3, 0, 0.2], 99))
    assert (got["top1_agreement"], got["top5_agreement"]) == pytest.approx((0.75, 0.85))
    low, high = got["perplexity_ratio_interval"]  # of two stories, each may be drawn twice
    assert (low, high) == pytest.approx((math.exp(0.25), math.exp(0.25)))
    assert got["mean_kl_interval"] == pytest.approx([0.1, 0.2])


def test_parts() -> None:
    got = all_figures(PLACES, FOUND)
    assert got["tokens"] == 4
    assert got["before_eviction"]["mean_kl"] == pytest.approx(0.2)
    assert got["after_eviction"]["mean_kl"] == pytest.approx(0.1)
    assert {page: one["tokens"] for page, one in got["per_page"].items()} == {"1": 1, "2": 1, "3": 2}
    assert got["per_page"]["2"]["top1_agreement"] == 0
    assert got["per_page"]["2"]["mean_kl_interval"] is None  # one story says nothing about spread
    assert all_figures(PLACES[:2], FOUND[:2])["after_eviction"] is None


def test_cosines() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 1, 4, 8)).astype(np.float32)
    expected = torch.nn.functional.cosine_similarity(torch.tensor(a), torch.tensor(b), dim=-1).flatten().tolist()
    assert row_cosines(a, b) == pytest.approx(expected, rel=1e-5)
    assert np.isnan(row_cosines(a * np.float32(np.nan), b)).all()
