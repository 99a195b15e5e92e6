"""Learns what a decoder's residual stream is turned by, so that its rows are narrow.

The engine rounds each row that a matrix of integers reads to 255 steps of the row's range. Any rotation leaves a row
as long as it is, and a fixed one makes it as wide as a row of noise: six times its root mean square. But rows aren't
noise, and of all rotations one is the best for them (SpinQuant, arXiv 2405.16406, learns it by the whole network's
loss). Here the square of the range is what is brought down, since that is what the rounding costs: by descent along
the orthogonal matrices (Cayley's transform), of the rows that the float decoder's matrices read in training stories.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from export.decoder_graph import write_skeleton
from export.decoder_weights import head_name
from export.hessians import FIRST
from export.rotation import balanced_inputs
from export.rounding import Reading
from model.rotation import Doubles, nearest_rotation
from model.story_source import StorySource
from quantization.recipe import load_recipe
from quantization.reference import ROTATED
from seed_story.config import CacheConfig
from seed_story.contract import PREFILL_SIZES, Steps

Floats = npt.NDArray[np.float32]

_KEPT = 8192
"""Rows of each matrix, if so many tokens are read; and those that stories' first ones count for (`FIRST`)."""
_HEAD = 0.15
"""Of the rows of a batch: the head's share of what rounding rows costs (docs/quantization.md)."""
_GROUPS, _ROWS = 20, 50
"""Of a batch: matrices, and rows of each."""
_SHARPNESS = 4.0
"""Of the smooth maximum that stands for a row's: rows have a root mean square of one."""
_RATE, _MOMENTUM, _DECAY = 0.006, 0.9, 0.99


def stream_rows(
    source: StorySource, calibration: Path, tokens: int, tick: Callable[[int], object] = lambda _: None
) -> tuple[dict[str, Floats], Doubles]:
    """What the balanced decoder's matrices read of the stream that the fixed rotation turns.

    Args:
        calibration: a folder of training stories; see `calibration_stories`.
        tokens: to be read of them, pictures' embeddings included.
        tick: told 1 before the rows of each such matrix.

    Returns:
        By the names of `qkv`, `gate_up` and the head: rows of a root mean square of one, in the stories' order,
        `[n, hidden]`; and the rotation, `[hidden, hidden]`.

    Raises:
        UsageError, PictureError: the folder or a picture can't be read.
    """
    llama, cache, size = source.model.config.llama, CacheConfig(), max(PREFILL_SIZES)
    recipe, head = load_recipe(ROTATED), head_name(llama)
    kept: dict[str, list[Floats]] = {}
    draws: dict[str, np.random.Generator] = {}

    def keep(name: str, rows: Floats, start: int) -> None:
        if name.endswith(("_qkv", "_gate_up")) or name == head:
            if name not in kept:
                tick(1)
            times = np.ones(len(rows))
            times[0] = 1 if start else FIRST
            wanted = times * min(_KEPT / tokens, 1)
            draw = draws.setdefault(name, np.random.default_rng(0)).random(len(rows))  # the same tokens of each
            kept.setdefault(name, []).append(np.repeat(rows, np.floor(wanted + draw).astype(int), axis=0))

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        skeleton = write_skeleton(llama, cache.slots, Steps((size,), ()), work / "skeleton", rotated=True)
        plain = replace(source, learned=None, rotation=None)  # whose rotation is the fixed one
        reading = Reading(plain, recipe, skeleton, cache, size, calibration, work, tokens, keep)
        balance = reading.balance
        assert balance is not None
    found = {}
    for name in [*kept]:
        rows = balanced_inputs(llama, balance, name, np.concatenate(kept.pop(name)))
        rows /= np.sqrt(np.mean(np.square(rows), axis=1, keepdims=True))
        found[name] = rows.astype(np.float32)
    return found, balance.turn


def learn_rotation(
    rows: Mapping[str, Floats], head: str, steps: int, tick: Callable[[int], object] = lambda _: None
) -> Doubles:
    """A rotation that makes rows narrow, float64 `[hidden, hidden]`: of rows x it makes `x @ rotation.T`.

    Args:
        rows: by matrix, `[n, hidden]`; each of a root mean square of one.
        head: the name of the one that counts for more than the others.
        steps: of descent.
        tick: told 1 after each step.
    """
    random, names = np.random.default_rng(0), [*rows]
    share = np.array([_HEAD if name == head else (1 - _HEAD) / max(len(names) - 1, 1) for name in names])
    size = rows[names[0]].shape[1]
    one, turn = np.eye(size, dtype=np.float32), np.eye(size, dtype=np.float32)
    mean, square = np.zeros_like(one), 0.0
    for step in range(steps):
        batch = np.concatenate([random.choice(rows[names[i]], _ROWS)
                                for i in random.choice(len(names), _GROUPS, p=share / share.sum())])  # fmt: skip
        slope = _slope(batch @ turn.T).T @ batch @ turn.T
        slope -= slope.T  # what is left of it along the orthogonal matrices
        mean = _MOMENTUM * mean + (1 - _MOMENTUM) * slope
        square = _DECAY * square + (1 - _DECAY) * float(np.mean(np.square(slope)))
        rate = _RATE * 0.5 * (1 + np.cos(np.pi * step / steps)) / (1 - _MOMENTUM ** (step + 1))
        half = (0.5 * rate / np.sqrt(square / (1 - _DECAY ** (step + 1)) + 1e-30) * mean).astype(np.float32)
        turn = np.linalg.solve(one + half, (one - half) @ turn)
        tick(1)
    return nearest_rotation(turn)


def squared_range(rows: npt.NDArray[np.floating]) -> float:
    """The mean square of the ranges that the engine rounds rows by: zero is in all of them."""
    return float(np.mean(np.square(np.maximum(rows.max(1), 0) - np.minimum(rows.min(1), 0))))


def _slope(rows: Floats) -> Floats:
    """The gradient of the mean square of the rows' smooth ranges, `[n, hidden]`."""
    ends, slopes = [], []
    for sign in (_SHARPNESS, -_SHARPNESS):
        top = (sign * rows).max(1, keepdims=True)
        weights = np.exp(sign * rows - top)
        total = weights.sum(1, keepdims=True)
        ends.append((top + np.log(total)) / _SHARPNESS)
        slopes.append(weights / total)
    return np.asarray(2 / len(rows) * (ends[0] + ends[1]) * (slopes[0] - slopes[1]))
