"""A task that trains in milliseconds, for tests of the loop; and a program that trains it in its own process."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from training.task import Schedule

SCHEDULE = Schedule(steps=12, learning_rate=0.01, accumulate=3)
"""Stopped after 5 steps, it is in the middle of an accumulation."""


def tiny_task(*, dropout: float = 0.5, bad_step: int = -1, step_s: float = 0.0) -> Any:
    """Linear regression of random numbers through a frozen layer, a table, Dropout and a learned layer.

    Args:
        bad_step: the step whose batch holds a NaN.
        step_s: seconds that making a batch takes.
    """
    import keras
    from keras import ops

    from model.layers import Embedding, Linear, Module

    class Network(Module):
        def __init__(self) -> None:
            super().__init__()
            rng = np.random.default_rng(3)
            self.table = Embedding(5, 4, rng)
            self.layers = [Linear(4, 8, rng), Linear(8, 2, rng)]
            self.layers[0].trainable = False
            self.scale = self.parameter("scale", np.ones(2, np.float32))
            self.dropout = keras.layers.Dropout(dropout, seed=1)

        def call(self, ids: Any) -> Any:
            return self.layers[1](self.dropout(ops.tanh(self.layers[0](self.table(ids))))) * self.scale

    class TinyTask:
        name = "tiny"

        def __init__(self) -> None:
            self.network = Network()
            self.traces = 0
            self.computes_in = ""

        def batch(self, step: int) -> Mapping[str, np.ndarray]:
            time.sleep(step_s)
            rng = np.random.default_rng(step)
            wanted = rng.standard_normal((6, 2)).astype(np.float32)
            if step == bad_step:
                wanted[0, 0] = np.nan
            return {"ids": rng.integers(0, 5, 6).astype(np.int32), "wanted": wanted}

        def loss(self, batch: Mapping[str, Any], training: bool) -> Mapping[str, Any]:
            self.traces += 1
            got = self.network(batch["ids"], training=training)
            self.computes_in = keras.backend.standardize_dtype(got.dtype)
            error = ops.mean(ops.square(ops.cast(got, "float32") - batch["wanted"]))
            return {"loss": error, "size": ops.mean(ops.abs(got))}

        def describe(self, step: int) -> str:
            return f"stories {step * 6} to {step * 6 + 5}"

    return TinyTask()


def main() -> None:
    """Trains, and prints the outcome and every learned weight as JSON."""
    from model.layers import named_variables, numpy_of
    from training.loop import train

    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=SCHEDULE.steps)
    parser.add_argument("--dropout", type=float, default=0.5)
    parser.add_argument("--step-s", type=float, default=0.0)
    parser.add_argument("--save-every-s", type=float, default=120.0)
    args = parser.parse_args()
    task = tiny_task(dropout=args.dropout, step_s=args.step_s)
    schedule = Schedule(steps=args.steps, learning_rate=0.01, accumulate=3)
    outcome = train(task, args.out, schedule, save_every_s=args.save_every_s, log_every=1)
    weights = {name: numpy_of(v).ravel().tolist() for name, v in named_variables(task.network).items()}
    print(
        json.dumps({"step": outcome.step, "finished": outcome.finished, "losses": outcome.losses, "weights": weights})
    )


if __name__ == "__main__":
    main()
