"""What a Q-Former's queries are to say of a picture: the tokens of names, in a fixed order of slots."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from seed_story.tokenizer import StoryTokenizer

if TYPE_CHECKING:
    from model.layers import FloatArray  # which imports Keras

THINGS = 3
"""Slots for things, the main one first; one more, the last, is for the place."""
SLOTS = THINGS + 1
FILLER = ","
"""The word in every place that no name fills."""
_WORTH_OF_A_KIND = 0.8
"""What "bird" is worth, said of an owl: where "owl" is less likely than this among birds, "bird" it is."""


Labels = dict[Path, tuple[tuple[str, ...], str]]
"""Pictures, and what each shows: its things, the main one first, and its place."""


@dataclass(frozen=True)
class NameTable:
    """The tokens that occur in names, and every name as indices into them.

    Args:
        token_ids: int32 `[tokens]`; index 0 is the filler's.
        names: by name, int32 `[width]`, filled up with 0.
        width: queries a slot.
        also: by name, other words for it: synonyms, and the next more general word.
    """

    token_ids: npt.NDArray[np.int32]
    names: dict[str, npt.NDArray[np.int32]]
    width: int
    also: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def label(self, things: Sequence[str], place: str) -> npt.NDArray[np.int32]:
        """What the queries should say of a picture: indices `[SLOTS * width]`; raises KeyError for an unknown name."""
        slots = np.zeros((SLOTS, self.width), np.int32)
        for slot, name in enumerate(things[:THINGS]):
            slots[slot] = self.names[name]
        slots[THINGS] = self.names[place]
        return slots.reshape(-1)

    @property
    def memory_size(self) -> int:
        """Names that a Q-Former's memory needs: these, and one for nothing."""
        return 1 + len(self.names)

    def memory_row(self, name: str) -> int:
        """Where the memory has a name; row 0 is for nothing, whose name is empty."""
        return 1 + list(self.names).index(name) if name else 0

    def worth(self) -> FloatArray:
        """What it is worth to say one name (row) of a thing with another (column), `[memory_size, memory_size]`."""
        worth = np.eye(self.memory_size, dtype=np.float32)
        for name in self.names:
            for word in filter(self.names.__contains__, self.also.get(name, ())):
                worth[self.memory_row(word), self.memory_row(name)] = _WORTH_OF_A_KIND
        return worth

    def embeddings(self, token_embeddings: FloatArray) -> FloatArray:
        """The memory's values: the tokens of each name end to end, `[memory_size, width * llm_size]`."""
        rows = np.stack([np.zeros(self.width, np.int32), *self.names.values()])
        return np.asarray(token_embeddings[self.token_ids[rows]], np.float32).reshape(len(rows), -1)


def name_table(
    names: Sequence[str], tokenizer: StoryTokenizer, num_queries: int, also: Mapping[str, Sequence[str]] | None = None
) -> NameTable:
    """The table of some names, as words in the middle of a text; a name of more tokens than fit loses its last.

    Args:
        also: by name, other words for it; those that two or more of the names share are in the table as well.
    """
    width, also = num_queries // SLOTS, also or {}
    shared = Counter(word for name in dict.fromkeys(names) for word in also.get(name, ()))
    kinds = [word for word, count in shared.items() if count > 1]
    ids = {FILLER: tokenizer.encode(FILLER)[0]}
    spelled = {name: tokenizer.encode(f" {name}")[:width] for name in dict.fromkeys([*names, *kinds])}
    order = list(dict.fromkeys([ids[FILLER], *(i for tokens in spelled.values() for i in tokens)]))
    index = {token: i for i, token in enumerate(order)}
    table = {
        name: np.array([index[i] for i in tokens] + [0] * (width - len(tokens)), np.int32)
        for name, tokens in spelled.items()
    }
    return NameTable(np.array(order, np.int32), table, width, also)


def read_labels(file: Path) -> Labels:
    """What each picture of a StoryStream file shows, `(things, place)`, where its lines say so.

    The storybook's lines do, in `things` and `place` (one entry a picture); published ones don't.
    """
    found = {}
    for line in filter(str.strip, file.read_text(encoding="utf-8").splitlines()):
        story = json.loads(line)
        for image, things, place in zip(story["images"], story.get("things", ()), story.get("place", ()), strict=False):
            found[file.parent / image] = (tuple(things), str(place))
    return found
