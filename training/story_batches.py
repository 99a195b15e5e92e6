"""Batches of stories with their pictures: which are told together, in what order, and how much of them is shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from training.data import Example, Shown, StoryEncoder, StoryRecord
from training.features import FeatureStore
from training.packing import Batch as Packed
from training.packing import batch as pack_batch
from training.packing import pack

SHOWN: dict[Shown, float] = {"all": 0.45, "first": 0.45, "none": 0.1}
"""How often a story is told with all its pictures, the first alone, or none."""
_TOKENS_A_PICTURE = 64  # what a page takes, in the mean: template, places and a caption

Ways = Sequence[tuple[StoryEncoder, Shown, float]]
"""Of telling a story, each with its share."""


def with_pictures(encoder: StoryEncoder) -> Ways:
    """As `SHOWN` says."""
    return [(encoder, shown, share) for shown, share in SHOWN.items()]


@dataclass(frozen=True)
class StoryBatch:
    """Some rows of stories.

    Args:
        examples: row by row.
        packed: the same as arrays.
        hidden: what the ViT's blocks see in their pictures, float16 `[room, tokens, hidden]`; zeros after the last.
    """

    examples: list[list[Example]]
    packed: Packed
    hidden: npt.NDArray[np.float16]


@dataclass
class _Plan:
    """The batches of one epoch: rows of examples, and each batch's stories."""

    batches: list[list[list[Example]]] = field(default_factory=list)
    stories: list[list[str]] = field(default_factory=list)


class StoryBatches:
    """A step's batch, the same whenever it is asked for.

    Args:
        stories: chunks, such as `training.data.chunks` makes.
        ways: of telling them, one drawn for each story and epoch.
        store: of the pictures that are shown.
        queries: places of a picture.
        length: tokens a row, shared by whole examples; a story that is longer loses its last pages.
        rows: a batch.
    """

    def __init__(
        self,
        stories: Sequence[StoryRecord],
        ways: Ways,
        store: FeatureStore,
        queries: int,
        *,
        length: int = 256,
        rows: int = 4,
        seed: int = 0,
    ) -> None:
        self.name = f"seed {seed}, {len(stories)} stories, {rows} rows of {length}"
        self.queries = queries
        self.room = max(rows * length // _TOKENS_A_PICTURE, length // (queries + 2))  # at least one row's
        self._stories, self._ways, self._store = list(stories), ways, store
        self._length, self._rows, self._seed = length, rows, seed
        self._plans: dict[int, _Plan] = {}

    def __getitem__(self, step: int) -> StoryBatch:
        """The batch of step `step`, counted from 0."""
        plan, index = self._find(step)
        rows = plan.batches[index]
        packed = pack_batch(rows, self._length, self.queries)
        stored = self._store[packed.pictures]
        hidden = np.zeros((self.room, *stored.shape[1:]), np.float16)
        hidden[: len(stored)] = stored
        return StoryBatch(rows, packed, hidden)

    def describe(self, step: int) -> str:
        """Which stories that step's batch was made of."""
        plan, index = self._find(step)
        return "stories " + ", ".join(plan.stories[index])

    def _find(self, step: int) -> tuple[_Plan, int]:
        epoch = 0
        while step >= len((plan := self._epoch(epoch)).batches):
            step, epoch = step - len(plan.batches), epoch + 1
        return plan, step

    def _epoch(self, epoch: int) -> _Plan:
        """All stories in a new order, each shown in a way of its own."""
        if epoch in self._plans:
            return self._plans[epoch]
        rng = np.random.default_rng([self._seed, epoch])
        ids: dict[int, str] = {}
        examples = []
        for number in rng.permutation(len(self._stories)):
            story = self._stories[number]
            encoder, shown, _ = self._ways[int(rng.choice(len(self._ways), p=[share for *_, share in self._ways]))]
            examples.append(encoder.encode_within(story, self._length, shown))
            ids[id(examples[-1])] = story.id
        plan = _Plan()
        for group in self._grouped(pack(examples, self._length, self.queries)):
            plan.batches.append(group + [[]] * (self._rows - len(group)))
            plan.stories.append([ids[id(example)] for row in group for example in row])
        self._plans[epoch] = plan
        return plan

    def _grouped(self, rows: Sequence[list[Example]]) -> list[list[list[Example]]]:
        """Rows, as many as a batch has, or fewer where their pictures would be too many."""
        groups: list[list[list[Example]]] = []
        left = 0
        for row in rows:
            pictures = sum(len(example.pictures) for example in row)
            if not groups or len(groups[-1]) == self._rows or pictures > left:
                groups.append([])
                left = self.room
            groups[-1].append(row)
            left -= pictures
        return groups
