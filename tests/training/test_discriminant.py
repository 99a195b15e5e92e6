"""Classifiers in closed form, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compare import assert_close
from training.discriminant import discriminant, nearest_mean


def rows_of_classes(count: int, size: int = 7) -> tuple[np.ndarray, list[str]]:
    """Four classes that lie apart, each spread more along some axes than along others."""
    rng = np.random.default_rng(8)
    middles, classes = rng.normal(0, 3, (4, size)), [f"class {n % 4}" for n in range(4 * count)]
    spread = rng.normal(0, 1, (4 * count, size)) * np.linspace(0.1, 4, size) if count > 1 else 0
    return (np.tile(middles, (count, 1)) + spread + 5).astype(np.float32), classes


def test_discriminant_directions_are_fishers() -> None:
    """They solve the generalized eigenproblem of the scatter between and within classes, here by its definition."""
    rows, classes = rows_of_classes(50)
    weight, bias = discriminant(rows, classes, size=5)
    assert weight.shape == (5, 7) and bias.shape == (5,) and weight.dtype == bias.dtype == np.float32
    groups = [rows[[c == name for c in classes]].astype(np.float64) for name in sorted(set(classes))]
    within = sum((g - g.mean(0)).T @ (g - g.mean(0)) for g in groups) / len(rows)
    within += 0.1 * np.trace(within) / 7 * np.eye(7)
    means = np.array([g.mean(0) for g in groups])
    between = (means - means.mean(0)).T @ (means - means.mean(0))
    values, vectors = np.linalg.eig(np.linalg.solve(within, between))
    best = np.real(vectors[:, np.argsort(-np.real(values))[:3]])  # four means have three directions
    for row, expected in zip(weight[:3].astype(np.float64), best.T, strict=True):
        cosine = row @ expected / np.linalg.norm(row) / np.linalg.norm(expected)
        assert_close(abs(cosine), 1.0, "network")
    inside = weight[:3] @ within @ weight[:3].T
    assert_close(inside / inside[0, 0], np.eye(3), "network")
    assert_close(weight @ means.mean(0) + bias, np.zeros(5), "network")
    assert np.std(rows @ weight.T + bias) == pytest.approx(1, rel=0.05)


def test_discriminant_of_one_row_a_class() -> None:
    """Nothing differs within a class: the classes' own differences are all there is."""
    rows, classes = rows_of_classes(1)
    weight, bias = discriminant(rows, classes, size=5)
    points = rows @ weight.T + bias
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)[~np.eye(4, dtype=bool)]
    assert np.isfinite(weight).all() and apart.min() > 0.5


def test_nearest_mean_scores_fall_evenly_with_the_squared_distance() -> None:
    rows, classes = rows_of_classes(20)
    rows -= rows.mean(0)
    found = nearest_mean(rows, classes)
    assert found.names == ("class 0", "class 1", "class 2", "class 3")
    assert found.weight.dtype == found.bias.dtype == np.float32
    means = np.array([rows[[c == name for c in classes]].mean(0) for name in found.names])
    scores, distances = rows @ found.weight.T + found.bias, np.square(rows[:, None] - means).sum(-1)
    assert (scores.argmax(1) == distances.argmin(1)).all()
    size = np.square(means).sum(1).mean()
    assert_close(scores - scores[:, :1], 8 / size * (distances[:, :1] - distances), "network")
