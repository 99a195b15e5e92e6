from __future__ import annotations

import numpy as np
import pytest

from tests.compare import assert_close


def test_reports_max_mean_and_the_worst_index() -> None:
    got = np.zeros((2, 3))
    got[1, 2], got[0, 0] = 0.4, 0.2
    with pytest.raises(AssertionError, match=r"max 0.4 over 1e-05, mean 0.1, at \(1, 2\): got 0.4"):
        assert_close(got, np.zeros((2, 3)), "network")


def test_is_relative_for_large_values_only() -> None:
    assert_close([1000.005], [1000.0], "network")
    for got, expected in ((1000.02, 1000.0), (2e-5, 0.0), (1.00002, 1.0)):
        with pytest.raises(AssertionError):
            assert_close([got], [expected], "network")


@pytest.mark.parametrize(
    ("got", "expected"),
    [([np.nan], [0.0]), ([0.0, np.inf], [0.0, 0.0]), ([np.nan], [np.nan]), ([0.0], [[0.0]]), ([], [])],
    ids=["nan", "inf", "both nan", "shape", "empty"],
)
def test_never_passes_by_accident(got: list[float], expected: list[float]) -> None:
    with pytest.raises(AssertionError):
        assert_close(got, expected, "network")
