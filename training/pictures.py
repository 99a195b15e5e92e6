"""Pictures with names for what they show, in the order in which a training sees them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from keras import ops

from model.layers import FloatArray
from model.qformer import summarize
from training.features import FeatureStore

_READ = 256  # pictures whose features are in memory at once


@dataclass(frozen=True)
class Labelled:
    """A picture and the names of what it shows.

    Args:
        things: the main one first.
    """

    picture: Path
    things: tuple[str, ...]
    place: str

    @property
    def main(self) -> str:
        """The name of the main thing; empty, where there is none."""
        return self.things[0] if self.things else ""


def summaries(pictures: Sequence[Path], store: FeatureStore) -> FloatArray:
    """Of pictures whose features are in a store, as `model.qformer.summarize` has them: `[n, 1, summary]`."""
    parts = []
    for start in range(0, len(pictures), _READ):
        features = store[pictures[start : start + _READ]].astype(np.float32)
        parts.append(ops.convert_to_numpy(summarize(ops.convert_to_tensor(features))))
    return np.concatenate(parts)


def shuffled(seed: int, step: int, batch_size: int, count: int) -> npt.NDArray[np.int64]:
    """The rows of a step's batch: all `count` once, in an order of their own, before any comes again."""
    first = step * batch_size
    return np.array([_order(seed, at // count, count)[at % count] for at in range(first, first + batch_size)])


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)
