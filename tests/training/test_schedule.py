from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from keras import ops

from seed_story.errors import UsageError
from tests.compare import assert_close
from training.optimizer import learning_rates
from training.task import Schedule


def formula(step: int, steps: int, warmup: int, final: float) -> float:
    """Goyal et al.'s linear warm-up (arXiv 1706.02677) from 1 / (warmup + 1), then SGDR's cosine (arXiv 1608.03983)."""
    if step <= warmup and warmup:
        return (step + 1) / (warmup + 1)
    return final + (1 - final) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


@pytest.mark.parametrize(("warmup", "warmup_steps"), [(0.0, 0), (0.05, 5), (0.5, 50)])
def test_rises_linearly_and_falls_as_a_cosine(warmup: float, warmup_steps: int) -> None:
    schedule = Schedule(steps=100, learning_rate=3e-4, warmup=warmup, final_share=0.1)
    expected = [formula(step, 100, warmup_steps, 0.1) for step in range(100)]
    said = [schedule.learning_rate_at(step) / 3e-4 for step in range(100)]
    rates = learning_rates(schedule)
    used = [float(ops.convert_to_numpy(rates(step))) / 3e-4 for step in range(100)]
    assert_close(said, expected, "layer")
    assert_close(used, expected, "layer")
    assert np.argmax(used) == warmup_steps
    assert min(used) > 0


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": math.nan}, {"warmup": 1.0}, {"weight_decay": -1.0},
     {"accumulate": 0}, {"clip_norm": 0.0}, {"final_share": 2.0}, {"accumulate": 3}],
)  # fmt: skip
def test_refuses_the_impossible(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Schedule(**{"steps": 10, "learning_rate": 1e-3, **wrong})
