"""What is trained, how long and how: the contract between the training loop and what it learns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from numpy.typing import NDArray

from seed_story.errors import UsageError

if TYPE_CHECKING:
    import keras

    from model.layers import Tensor

Batch: TypeAlias = Mapping[str, NDArray[Any]]


class Task(Protocol):
    """A network, its loss and its batches.

    A task may also have `learning_rate_factor(variable: keras.Variable) -> float`: by how much the schedule's
    learning rate is multiplied for one variable, 1 without it.
    """

    name: str
    """Part of the checkpoint's fingerprint: name here what must not change, such as the data's hash and the seed."""

    network: keras.Layer
    """Holds ALL variables that the loss reads, already built; the frozen ones have `trainable = False`.

    Its trainable variables are learned. What else changes must be the state of a `keras.random.SeedGenerator` (as in
    Dropout), with a seed: moving averages, as in Batch Normalization, aren't kept in checkpoints.
    """

    def batch(self, step: int) -> Batch:
        """The arrays of step `step`, counted from 0: a pure function, which runs in another thread.

        The same names, dtypes and shapes at every step, each with at least one axis. The loss sees any floating
        dtype as float32; integers and booleans keep theirs.
        """
        ...

    def loss(self, batch: Mapping[str, Tensor], training: bool) -> Mapping[str, Tensor]:
        """Float32 scalars: `loss` is minimized, the others are logged. Traced once where the backend compiles."""
        ...

    def describe(self, step: int) -> str:
        """What that step's batch was made of, such as ids of stories; for error messages."""
        ...


@dataclass(frozen=True)
class Schedule:
    """Length, learning rate and regularization; the defaults are upstream's (`scripts/sft_storystream.sh`).

    Args:
        steps: batches to train on, a multiple of `accumulate`.
        learning_rate: the highest, after warm-up; then it falls as a cosine to `final_share` of itself.
        warmup: share of the steps in which the learning rate rises linearly.
        weight_decay: decoupled (arXiv 1711.05101); only for variables with at least two axes.
        accumulate: batches whose gradients are averaged for one update.
        clip_norm: the largest global norm of an update's gradients.
        mixed_precision: the network computes in bfloat16; weights, optimizer and losses stay float32.
        final_share: the learning rate at the end, as a share of the highest.

    Raises:
        UsageError: a value out of its range.
    """

    steps: int
    learning_rate: float
    warmup: float = 0.05
    weight_decay: float = 0.05
    accumulate: int = 1
    clip_norm: float = 1.0
    mixed_precision: bool = False
    final_share: float = 0.05

    def __post_init__(self) -> None:
        ranges = {
            "steps": (self.steps >= 1, "at least 1"),
            "learning_rate": (self.learning_rate > 0, "a positive number"),
            "warmup": (0 <= self.warmup < 1, "from 0 to below 1"),
            "weight_decay": (self.weight_decay >= 0, "0 or more"),
            "accumulate": (self.accumulate >= 1, "at least 1"),
            "clip_norm": (self.clip_norm > 0, "a positive number"),
            "final_share": (0 <= self.final_share <= 1, "from 0 to 1"),
        }
        for name, (fits, expected) in ranges.items():
            if not (fits and math.isfinite(getattr(self, name))):
                raise UsageError(f"{name} is impossible", got=getattr(self, name), expected=expected)
        if self.steps % self.accumulate:
            raise UsageError("steps isn't a multiple of accumulate", got=self.steps, expected=self.accumulate)

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        return round(self.steps * self.warmup)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return self.learning_rate * (self.final_share + (1 - self.final_share) * cosine)


@dataclass(frozen=True)
class Outcome:
    """Where a training stands.

    Args:
        step: steps done, in all runs.
        finished: whether these were all.
        seconds: spent on them, in all runs.
        losses: of the last step.
    """

    step: int
    finished: bool
    seconds: float
    losses: Mapping[str, float] = field(default_factory=dict)
