"""Guesses what a story says next from what it said before (prompt lookup), in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from seed_story.sampling import SamplingConfig

__all__ = ["DRAFT_MEMORY", "PromptLookup", "pays"]

DRAFT_MEMORY = 4096
"""How many tokens back a guess is looked for: microseconds to search, however long the story."""

_SHORTEST, _LONGEST = 2, 8  # of the tokens that must be the same; fewer guess worse than they cost

_WARMEST = 0.5  # temperature; at 0.7 a story is hardly faster, at 1 slower


def pays(sampling: SamplingConfig) -> bool:
    """Whether stories told so are told faster with guesses: cool ones, that nothing keeps from repeating themselves."""
    free = sampling.repetition_penalty == 1 or sampling.repetition_window == 0
    return free and sampling.no_repeat_ngram == 0 and sampling.temperature <= _WARMEST


class PromptLookup:
    """The newest tokens of a story, to find those that followed the same words before.

    Args:
        ids: what was accepted before; the newest `DRAFT_MEMORY` count.
    """

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids = np.empty(2 * DRAFT_MEMORY, np.int32)
        self._end = 0
        for token_id in ids:
            self.accept(token_id)

    def accept(self, token_id: int) -> None:
        """Adds a token, given or told."""
        if self._end == len(self._ids):
            self._ids[:DRAFT_MEMORY] = self._ids[DRAFT_MEMORY:]
            self._end = DRAFT_MEMORY
        self._ids[self._end] = token_id
        self._end += 1

    @property
    def history(self) -> list[int]:
        """The newest tokens, the oldest first: what another one guesses the same from."""
        return [int(token_id) for token_id in self._newest()]

    def guess(self, most: int) -> list[int]:
        """What followed the longest run of tokens that the story ends with now, where it was said last.

        Returns:
            At most `most` tokens; none if too few were the same.
        """
        ids = self._newest()
        ends = np.flatnonzero(ids[:-1] == ids[-1:])  # where the newest token stood before
        same = 1
        while same < _LONGEST:
            further = ends[ends >= same]
            further = further[ids[further - same] == ids[-1 - same]] if len(further) else further
            if not len(further):
                break
            ends, same = further, same + 1
        if not len(ends) or same < _SHORTEST:
            return []
        after = int(ends[-1]) + 1
        return [int(token_id) for token_id in ids[after : after + most]]

    def _newest(self) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return self._ids[max(self._end - DRAFT_MEMORY, 0) : self._end]
