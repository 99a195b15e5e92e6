from __future__ import annotations

import math

import numpy as np
import pytest

from model.layers import named_variables, numpy_of
from model.picture_head import PictureHead, cosine_distance
from tests.compare import assert_close


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8), (2, 3, 4, 8)])
def test_cosine_distance_equals_the_formula(shape: tuple[int, ...]) -> None:
    said, seen = numbers(*shape), numbers(*shape, seed=1)
    expected = []
    for one, other in zip(said.reshape(shape[0], -1, 8), seen.reshape(shape[0], -1, 8), strict=True):
        cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(one, other, strict=True)]
        expected.append(1 - np.mean(cosines))
    assert_close(cosine_distance(said, seen), np.array(expected), "numpy_reference")


def test_cosine_distance_asks_for_the_direction_alone() -> None:
    x = numbers(4, 6, 8)
    assert_close(cosine_distance(x, 7 * x), np.zeros(4), "same_maths")
    assert_close(cosine_distance(x, -x), np.full(4, 2.0), "same_maths")
    assert_close(cosine_distance(np.zeros_like(x), x), np.ones(4), "exact")  # no direction: finite all the same


def test_head_equals_the_numpy_reference() -> None:
    """Each picture has the queries for itself: its own state is added to all of them."""
    head = PictureHead(hidden_size=6, vision_size=9, num_queries=5)
    rng = np.random.default_rng(2)
    weights = {name: rng.standard_normal(variable.shape) for name, variable in named_variables(head).items()}
    for name, variable in named_variables(head).items():
        variable.assign(weights[name])
        weights[name] = numpy_of(variable).astype(np.float64)
    hidden = numbers(3, 6)
    x = weights["queries"] + hidden.astype(np.float64)[:, None]
    x = x @ weights["fc1.weight"].T + weights["fc1.bias"]
    x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    expected = x @ weights["fc2.weight"].T + weights["fc2.bias"]
    assert expected.shape == (3, 5, 9)
    assert_close(head(hidden), expected, "numpy_reference")


def test_seed_decides_the_weights() -> None:
    one, same, other = (numpy_of(PictureHead(6, 9, 5, seed).queries) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
