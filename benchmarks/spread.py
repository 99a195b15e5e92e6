"""A figure that was measured in many rounds, and how far the rounds lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def quartiles(values: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """First quartile, median, third quartile."""
    return [round(float(q), 3) for q in np.percentile(values, (25, 50, 75))]


def spread(of: Sequence[float], digits: int) -> str:
    """Quartiles for a reader: the median, and the others in brackets."""
    low, median, high = (f"{q:.{digits}f}" for q in of)
    return f"{median} [{low}, {high}]"
