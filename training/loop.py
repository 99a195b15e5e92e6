"""The training loop: steps, checkpoints, logs; for any task, on any Keras backend."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from tqdm import tqdm

from model.layers import Tensor, numpy_of
from training.checkpoint import FILE_NAME, planned_steps, read_checkpoint, state_variables, write_checkpoint
from training.errors import TrainingError
from training.events import EventLog
from training.interrupt import Interrupt
from training.optimizer import AdamW
from training.task import Batch, Outcome, Schedule, Task

_MEASURED_STEPS = 10
_MEASURED_S = 20.0


class _Objective(keras.Model):  # type: ignore[misc]
    """A task in the form that Keras's trainers of all backends take: its output is the losses."""

    def __init__(self, task: Task) -> None:
        super().__init__(name="objective")
        self.network = task.network
        self._task = task
        self.built = True

    def call(self, batch: Mapping[str, Tensor], training: bool = False) -> dict[str, Tensor]:
        return {name: ops.cast(value, "float32") for name, value in self._task.loss(batch, training).items()}

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Tensor:
        return y_pred["loss"]

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Tensor]:
        return {name: ops.stop_gradient(value) for name, value in y_pred.items()}


class _Learner:
    """A task with its optimizer: takes steps, and knows all the state that they change."""

    def __init__(self, task: Task, schedule: Schedule) -> None:
        self.task = task
        learned = task.network.trainable_variables
        if not learned:
            raise TrainingError("there is nothing to learn", got="a network without trainable variables")
        self.optimizer = AdamW(schedule, learned, getattr(task, "learning_rate_factor", lambda variable: 1.0))
        self.objective = _Objective(task)
        self.objective.compile(optimizer=self.optimizer, jit_compile="auto")  # on CPUs: no XLA
        self.variables = state_variables(task.network, self.optimizer)
        self._form: dict[str, Any] | None = None

    def learn(self, step: int, batch: Batch) -> dict[str, float]:
        """One step; the losses and `gradient_norm`.

        Raises:
            TrainingError: one of them isn't finite, or the batch has another form than the first.
        """
        arrays = {name: np.asarray(values) for name, values in batch.items()}
        form = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
        self._form = self._form or form
        if form != self._form:
            raise TrainingError(f"the batch of step {step} has another form", got=form, expected=self._form)
        losses: dict[str, float] = self.objective.train_on_batch(arrays, return_dict=True)
        values = losses | {"gradient_norm": float(numpy_of(self.optimizer.gradient_norm))}
        if bad := {name: value for name, value in values.items() if not math.isfinite(value)}:
            raise TrainingError(
                f"step {step} isn't finite, trained on {self.task.describe(step)}",
                got=", ".join(f"{name} {value}" for name, value in bad.items()),
                expected="finite numbers",
                hint="The last checkpoint is from before it. Look at that batch, or lower the learning rate.",
            )
        return values


def train(task: Task, out: Path, schedule: Schedule, *, save_every_s: float = 120.0, log_every: int = 10) -> Outcome:
    """Trains a task to the end of its schedule, or until Ctrl-C; goes on from the checkpoint in `out`, if any.

    On a CPU a training that was stopped, and goes on, gives the same bits as one that wasn't. Ctrl-C and SIGTERM
    finish the step and save; a second one stops at once, and leaves the last checkpoint whole, as any crash does.

    Args:
        out: a folder; `checkpoint.safetensors` and TensorBoard's `logs` are written there.
        save_every_s: seconds between two checkpoints.
        log_every: steps between two points in the logs.

    Raises:
        TrainingError: a loss or the gradient isn't finite, or the checkpoint is of another training.
    """
    out.mkdir(parents=True, exist_ok=True)
    _make_deterministic()
    path, fingerprint = out / FILE_NAME, _fingerprint(task, schedule)
    with _precision(task.network, schedule), Interrupt() as interrupt, contextlib.ExitStack() as stack:
        learner = _Learner(task, schedule)
        outcome = read_checkpoint(path, learner.variables, fingerprint) or Outcome(0, False, 0.0)
        if outcome.finished:
            return outcome
        events = stack.enter_context(EventLog(out / "logs", outcome.step))
        bar = stack.enter_context(_progress(schedule, outcome))
        begun, saved = time.monotonic() - outcome.seconds, time.monotonic()
        for step, batch in stack.enter_context(contextlib.closing(_batches(task, outcome.step, schedule.steps))):
            values = learner.learn(step, batch)
            outcome = Outcome(step + 1, step + 1 == schedule.steps, time.monotonic() - begun, values)
            _report(events, bar, outcome, schedule.learning_rate_at(step), log_every)
            stop = outcome.finished or interrupt.asked
            if stop or time.monotonic() - saved >= save_every_s:
                write_checkpoint(path, learner.variables, fingerprint, outcome)
                saved = time.monotonic()
            if stop:
                break
    return outcome


def steps_for_minutes(task: Task, schedule: Schedule, minutes: float) -> int:
    """How many steps of this task fit into `minutes` here, from a few that are measured and undone.

    Ask once, when a training begins: the number is part of its fingerprint (`planned_steps` reads it back).
    The result is at least `schedule.accumulate`, and a multiple of it.
    """
    with _precision(task.network, schedule):
        learner = _Learner(task, replace(schedule, steps=_MEASURED_STEPS * schedule.accumulate))
        before = {name: numpy_of(variable) for name, variable in learner.variables.items()}
        times: list[float] = []
        try:
            with contextlib.closing(_batches(task, 0, _MEASURED_STEPS)) as batches:
                begun = time.monotonic()
                for step, batch in batches:
                    learner.learn(step, batch)
                    times.append(time.monotonic() - begun - sum(times))
                    if len(times) > 2 and sum(times[1:]) > _MEASURED_S:
                        break
        finally:
            for name, variable in learner.variables.items():
                variable.assign(before[name])
    first, rest = times[0], statistics.fmean(times[1:])  # the first one compiles
    steps = int((minutes * 60 - first) / rest)
    return max(steps // schedule.accumulate, 1) * schedule.accumulate


def planned(task: Task, out: Path, schedule: Schedule, minutes: float) -> Schedule:
    """The schedule with the steps that were planned when the training in `out` began, or now: as many as fit."""
    steps = planned_steps(out)
    if steps is None:
        return replace(schedule, steps=steps_for_minutes(task, schedule, minutes))
    print(f"{out.name}: going on with the {steps} steps that were planned when it began", file=sys.stderr)
    return replace(schedule, steps=steps)


def _batches(task: Task, start: int, stop: int) -> Generator[tuple[int, Batch], None, None]:
    """Each step with its batch, which is made while the step before it is being learned."""
    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(task.batch, start)
        for step in range(start, stop):
            batch = following.result()
            if step + 1 < stop:
                following = ahead.submit(task.batch, step + 1)
            yield step, batch


def _progress(schedule: Schedule, outcome: Outcome) -> Any:
    interval = 0.5 if sys.stderr.isatty() else 30.0  # a log file gets few lines
    return tqdm(total=schedule.steps, initial=outcome.step, desc="train", unit="step", mininterval=interval)


def _report(events: EventLog, bar: Any, outcome: Outcome, learning_rate: float, log_every: int) -> None:
    bar.set_postfix(loss=f"{outcome.losses['loss']:.4g}", learning_rate=f"{learning_rate:.2e}", refresh=False)
    bar.update()
    if outcome.step % log_every == 0 or outcome.finished:
        events.scalars(outcome.step, {**outcome.losses, "learning_rate": learning_rate, "seconds": outcome.seconds})


def _fingerprint(task: Task, schedule: Schedule) -> dict[str, Any]:
    """What must stay the same between two runs; random numbers differ between backends."""
    return {"task": task.name, "backend": keras.config.backend(), **asdict(schedule)}


@contextlib.contextmanager
def _precision(network: keras.Layer, schedule: Schedule) -> Iterator[None]:
    """The network computes in bfloat16 inside, if the schedule says so, and as before outside."""
    layers = network._flatten_layers() if schedule.mixed_precision else []  # Keras has no public walk
    before = [(layer, layer.dtype_policy) for layer in layers]
    try:
        for layer, _ in before:
            layer.dtype_policy = keras.DTypePolicy("mixed_bfloat16")
        yield
    finally:
        for layer, policy in before:
            layer.dtype_policy = policy


def _make_deterministic() -> None:
    """The same bits in every run, on CPUs. On accelerators TensorFlow would have to do without XLA for it."""
    if keras.config.backend() == "tensorflow":
        import tensorflow as tf

        if not tf.config.list_physical_devices("GPU"):
            tf.config.experimental.enable_op_determinism()
