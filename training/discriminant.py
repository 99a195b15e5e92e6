"""Classifiers in closed form: what a training begins with, so that its first steps aren't spent on guesses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.layers import FloatArray

_LEAST_VARIANCE = 1e-12  # where nothing differs within a class, as when each has one picture
_SHRINKAGE = 0.1
"""Of the scatter within a class towards a multiple of the identity: few rows estimate many directions."""
_SHARPNESS = 16.0
"""By how much a mean row's score for its own class is above that for the mean of all."""


@dataclass(frozen=True)
class Classifier:
    """Scores of classes: `rows @ weight.T + bias`.

    Args:
        names: of the classes.
        weight, bias: float32 `[classes, inputs]` and `[classes]`.
    """

    names: tuple[str, ...]
    weight: FloatArray
    bias: FloatArray


def discriminant(rows: FloatArray, classes: Sequence[str], size: int) -> tuple[FloatArray, FloatArray]:
    """Linear discriminant analysis (Fisher 1936): a map in which what differs within a class has unit variance.

    Args:
        rows: `[n, inputs]`.
        classes: of each row.
        size: of the output: the directions in which the classes' means differ most; the rest is zero.

    Returns:
        weight `[size, inputs]` and bias `[size]` of the map, float32.
    """
    data = rows.astype(np.float64)
    names, owner = np.unique(np.asarray(classes), return_inverse=True)
    means = np.stack([data[owner == index].mean(0) for index in range(len(names))])
    inside = data - means[owner]
    scatter = inside.T @ inside / len(data)
    scatter += _SHRINKAGE * np.trace(scatter) / len(scatter) * np.eye(len(scatter))
    values, vectors = np.linalg.eigh(scatter)
    whiten = vectors / np.sqrt(np.maximum(values, _LEAST_VARIANCE))  # columns
    centre = means.mean(0)
    _, _, directions = np.linalg.svd((means - centre) @ whiten, full_matrices=False)
    weight = np.zeros((size, data.shape[1]))
    found = directions[:size] @ whiten.T
    weight[: len(found)] = found
    weight /= max(float(np.std((data - centre) @ weight.T)), 1e-9)  # as large as what the queries bring
    return weight.astype(np.float32), (-weight @ centre).astype(np.float32)


def nearest_mean(rows: FloatArray, classes: Sequence[str]) -> Classifier:
    """Scores that are highest for the class whose mean is nearest.

    Args:
        rows: `[n, inputs]`.
        classes: of each row.
    """
    names, owner = np.unique(np.asarray(classes), return_inverse=True)
    means = np.stack([rows[owner == index].mean(0) for index in range(len(names))])
    squares = np.square(means).sum(1)
    sharpness = _SHARPNESS / 2 / max(float(squares.mean()), 1e-9)
    weight, bias = 2 * sharpness * means, -sharpness * squares
    return Classifier(tuple(map(str, names)), weight.astype(np.float32), bias.astype(np.float32))
