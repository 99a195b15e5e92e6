"""The one way in which tests compare arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.bounds import BOUNDS


def assert_close(got: Any, expected: Any, bound_name: str) -> None:
    """Fails when shapes differ, a value isn't finite, or the worst difference is over the named bound."""
    bound = BOUNDS[bound_name]
    got, expected = (_array(side) for side in (got, expected))
    assert got.shape == expected.shape, f"got shape {got.shape}, expected {expected.shape}"
    assert got.size, "nothing to compare"
    assert np.isfinite(expected).all(), "the expected values aren't all finite"
    difference = np.abs(got - expected)
    worst = np.unravel_index(int(np.argmax(difference)), difference.shape)  # argmax finds a NaN first
    limit = bound * max(1.0, float(np.abs(expected).max()))
    assert difference[worst] <= limit, (
        f"{bound_name}: max {difference[worst]:.3g} over {limit:.3g}, mean {difference.mean():.3g}, "
        f"at {tuple(int(i) for i in worst)}: got {got[worst]:.6g}, expected {expected[worst]:.6g}"
    )


def _array(side: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    if hasattr(side, "detach"):
        side = side.detach().numpy()
    return np.asarray(side, np.float64)
