"""Examples of different lengths, several to a row, in batches of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seed_story.errors import UsageError
from training.data import IGNORE, Example

Row = Sequence[Example]


@dataclass(frozen=True)
class Batch:
    """Rows of examples, padded. An example computes in it what it computes alone.

    Args:
        ids: int32 `[b, t]`, as in `Example`; 0 in the padding.
        labels: int32 `[b, t]`, as in `Example`; `IGNORE` in the padding.
        mask: bool `[b, t, t]`, True where a position may look: in its own example; padding, at itself alone.
            `model.llama.Llama` adds causality.
        positions: int32 `[b, t]`, from 0 in each example; 0 in the padding.
        pictures: all of the batch, in the order of their places, row by row.
        picture_index: int32 `[b, t]`; for each place of a picture, its row in the embeddings of `pictures`,
            `[n * num_queries, llm_size]`; 0 elsewhere.
    """

    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_]
    positions: npt.NDArray[np.int32]
    pictures: tuple[Path, ...]
    picture_index: npt.NDArray[np.int32]


def pack(examples: Sequence[Example], length: int, num_queries: int) -> list[list[Example]]:
    """Puts each example into the first row with room for it, so that a shuffled order stays about shuffled.

    Args:
        length: tokens of a row.
        num_queries: places of a picture.

    Raises:
        UsageError: an example is longer than a row (`StoryEncoder.encode_within` shortens it), or its places
            aren't those of its pictures.
    """
    rows: list[list[Example]] = []
    room: list[int] = []
    for example in examples:
        size = _checked_size(example, length, num_queries)
        at = next((n for n, left in enumerate(room) if left >= size), len(rows))
        if at == len(rows):
            rows.append([])
            room.append(length)
        rows[at].append(example)
        room[at] -= size
    return rows


def batch(rows: Sequence[Row], length: int, num_queries: int) -> Batch:
    """Rows, such as `pack` makes, as one batch `[len(rows), length]`.

    Raises:
        UsageError: there is no row, a row is longer than `length`, or an example's places aren't those of its
            pictures.
    """
    if not rows:
        raise UsageError("a batch has no row", got=0, expected="1 or more")
    shape = len(rows), length
    ids, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    labels = np.full(shape, IGNORE, np.int32)
    owner = np.tile(-1 - np.arange(length), (len(rows), 1))  # whose a position is; padding is nobody else's
    for row, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples):
            span = slice(start, start + _checked_size(example, length - start, num_queries))
            ids[row, span], labels[row, span] = example.ids, example.labels
            positions[row, span], owner[row, span] = np.arange(len(example.ids)), number
            start = span.stop
    places = ids < 0
    index = np.zeros(shape, np.int32)
    index[places] = np.arange(places.sum())  # places and pictures run in the same order
    pictures = tuple(path for examples in rows for example in examples for path in example.pictures)
    return Batch(ids, labels, owner[:, :, None] == owner[:, None, :], positions, pictures, index)


def _checked_size(example: Example, room: int, num_queries: int) -> int:
    size, places = len(example.ids), int((example.ids < 0).sum())
    if size > room:
        raise UsageError("an example is too long for its row", got=f"{size} tokens", expected=f"at most {room}",
                         hint="Shorten it with StoryEncoder.encode_within().")  # fmt: skip
    if places != len(example.pictures) * num_queries:
        raise UsageError("an example's places aren't those of its pictures", got=f"{places} places",
                         expected=f"{len(example.pictures)} pictures of {num_queries}")  # fmt: skip
    return size
