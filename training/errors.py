"""What can end a training."""

from __future__ import annotations

from seed_story.errors import SeedStoryError


class TrainingError(SeedStoryError):
    """A training that can't go on: a loss that isn't a number, a checkpoint of another training."""
