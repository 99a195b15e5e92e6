"""What a recipe's scales are learned from, and how long: one dial, as in training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quantization.recipe import CALIBRATION
from seed_story.errors import UsageError
from training.data import training_file


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """How a recipe's scales are learned.

    Args:
        data: a folder with train.jsonl in StoryStream's form.
        out: where the training's checkpoints and logs, the pictures' features and the result go.
        minutes: of learning, without the features and the rounding that come before it.
        calibration: what the matrices are rounded by; as an export is given it.
        rows, length: of a batch of stories, in rows of tokens.
        seed: of the stories' order.

    Raises:
        UsageError: a value is impossible, or there is no data set.
    """

    data: Path
    out: Path
    minutes: float = 40.0
    calibration: Path = CALIBRATION
    rows: int = 4
    length: int = 256
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise UsageError("minutes is impossible", got=self.minutes, expected="a positive number")
        if self.rows < 1 or self.length < 1:
            raise UsageError("a batch is impossible", got=f"{self.rows} rows of {self.length} tokens",
                             expected="one of each at least")  # fmt: skip
        training_file(self.data)
