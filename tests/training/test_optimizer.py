from __future__ import annotations

import keras
import numpy as np
import pytest
import torch

from model.layers import numpy_of
from tests.compare import assert_close
from training.optimizer import BETAS, EPSILON, AdamW
from training.task import Schedule

SHAPES = {"weight": (3, 4), "low": (4, 2), "bias": (4,)}
FACTORS = {"weight": 1.0, "low": 0.1, "bias": 1.0}


def made(schedule: Schedule) -> tuple[dict[str, keras.Variable], AdamW]:
    rng = np.random.default_rng(0)
    variables = {
        name: keras.Variable(rng.standard_normal(shape).astype(np.float32), name=name) for name, shape in SHAPES.items()
    }
    return variables, AdamW(schedule, list(variables.values()), lambda variable: FACTORS[variable.name])


def gradients(step: int, size: float = 1.0) -> list[np.ndarray]:
    """Of about `size`, none near zero: there Keras's epsilon, which isn't bias-corrected, differs from torch's."""
    rng = np.random.default_rng(step)
    return [
        (size * rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)).astype(np.float32)
        for shape in SHAPES.values()
    ]


def momentums(optimizer: AdamW) -> list[np.ndarray]:
    return [numpy_of(v) for v in optimizer.variables if v.name.endswith("_momentum")]


def test_steps_like_torch_adamw() -> None:
    schedule = Schedule(steps=20, learning_rate=1e-2, weight_decay=0.5, clip_norm=1e9)
    variables, optimizer = made(schedule)
    theirs = {name: torch.nn.Parameter(torch.tensor(numpy_of(v))) for name, v in variables.items()}
    for step in range(10):
        rate = schedule.learning_rate_at(step)
        groups = [
            {"params": [p], "lr": rate * FACTORS[name], "weight_decay": 0.5 if p.ndim > 1 else 0.0}
            for name, p in theirs.items()
        ]
        if step == 0:
            reference = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON)
        for group, new in zip(reference.param_groups, groups, strict=True):
            group["lr"] = new["lr"]
        for parameter, gradient in zip(theirs.values(), gradients(step), strict=True):
            parameter.grad = torch.tensor(gradient)
        reference.step()
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients(step)], list(variables.values()))
    for name, variable in variables.items():
        assert_close(numpy_of(variable), theirs[name], "layer")


@pytest.mark.parametrize("size", [0.01, 10.0])
def test_clips_the_global_norm(size: float) -> None:
    variables, optimizer = made(Schedule(steps=10, learning_rate=1e-2, clip_norm=0.7))
    optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients(0, size)], list(variables.values()))
    norm = np.sqrt(sum(np.sum(np.square(g.astype(np.float64))) for g in gradients(0, size)))
    assert (norm > 0.7) == (size > 1)
    assert_close(numpy_of(optimizer.gradient_norm), np.array(norm), "numpy_reference")
    for got, gradient in zip(momentums(optimizer), gradients(0, size), strict=True):
        assert_close(got, (1 - BETAS[0]) * gradient * min(1.0, 0.7 / norm), "numpy_reference")


def test_clips_the_mean_of_accumulated_gradients() -> None:
    variables, optimizer = made(Schedule(steps=10, learning_rate=1e-2, clip_norm=0.7, accumulate=2))
    before = [numpy_of(v) for v in variables.values()]
    for step in range(2):
        assert all(np.array_equal(numpy_of(v), b) for v, b in zip(variables.values(), before, strict=True))
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients(step)], list(variables.values()))
    mean = [(a + b) / 2 for a, b in zip(gradients(0), gradients(1), strict=True)]
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in mean))
    for got, gradient in zip(momentums(optimizer), mean, strict=True):
        assert_close(got, (1 - BETAS[0]) * gradient * 0.7 / norm, "numpy_reference")


def test_a_tables_gradient_counts_repeated_rows_together() -> None:
    import tensorflow as tf

    table = keras.Variable(np.zeros((3, 1), np.float32))
    optimizer = AdamW(Schedule(steps=10, learning_rate=1e-2), [table], lambda variable: 1.0)
    rows = tf.IndexedSlices(tf.constant([[1.0], [1.0]]), tf.constant([2, 2]), tf.constant([3, 1]))
    optimizer.apply([rows], [table])
    assert numpy_of(optimizer.gradient_norm) == 2.0  # not the root of 2
