"""What a story's words look at: the attention mass of each kind of token, and the cache's budget that follows from it.

As SEED-Story's table 5 (arXiv 2407.08683), but on the user's own model and stories: teacher-forced through the bundle's
decoder, in the layout that the runtime shares, and asked wherever it foretells a word of a caption.
Mass is the softmax's weight, its mean over layers and heads; the masses of one question sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from seed_story.cache import EMPTY
from seed_story.config import CacheConfig
from seed_story.output import table
from seed_story.policies import MULTIMODAL_SINK, TEXT_SINK
from seed_story.story import SEEDStory
from training.data import IGNORE, Example, StoryRecord, check_pictures
from training.evaluation.perplexity import Look, encoder_of, feed_rows, lay_out, looker

Floats = npt.NDArray[np.float64]

SINK_PLACES = 8
"""The most text sinks that are proposed: StreamingLLM (arXiv 2309.17453) found no gain beyond four."""
EDGE = 4
"""A picture's embeddings that count as its first, and as its last."""
NEWEST = 16
"""The newest text, about a sentence, the asked token included: it stays in any cache."""

KINDS = ("text sinks", "begin of picture", "first of picture", "middle of picture", "last of picture",
         "end of picture", "newest text", "other text")  # fmt: skip
_SINKS, _BEGIN, _FIRST, _MIDDLE, _LAST, _END, _NEWEST, _OTHER = range(len(KINDS))


def attention(model: SEEDStory, stories: Sequence[StoryRecord]) -> dict[str, Any]:
    """The mass per kind of token, and the budget that it proposes.

    Returns:
        The report. `kinds` has, by kind: `total`, the mean mass of all that a word sees of it; `tokens`, how many these
        are in the mean; `per_token`, the one divided by the other. `proposal` is `propose`'s.

    Raises:
        ConfigError: the bundle has no `decode_attention`.
        PictureError: a picture is missing or can't be read.
    """
    check_pictures(stories)
    encoder, look = encoder_of(model), looker(model)
    tally = Tally(model.bundle.manifest.story.picture_tokens, model.cache.sinks)
    for story in tqdm(stories, desc="attention", unit="story"):
        measure_story(model, encoder.encode(story, ends=False), look, tally)
    kinds = {
        name: {"total": total / tally.asked, "tokens": count / tally.asked, "per_token": total / max(count, 1)}
        for name, total, count in zip(KINDS, tally.mass.tolist(), tally.count.tolist(), strict=True)
    }
    report = {"stories": len(stories), "words": tally.asked, "kinds": kinds}
    return {**report, "proposal": propose(model.cache.slots, tally)}


class Tally:
    """What was measured so far.

    Args:
        picture_tokens: of a picture, the two around it included.
        sinks: how many of a story's first tokens count as text sinks.

    Attributes:
        asked: how many tokens were asked.
        mass, count: by kind, float64 `[kinds]`: mass, and how many tokens it is of.
        first: the same of each of the story's first tokens, float64 `[2, SINK_PLACES]`.
        place: and of each place of a picture, where it is no sink, float64 `[2, picture_tokens]`.
        pictures: the most of a story.
    """

    def __init__(self, picture_tokens: int, sinks: int) -> None:
        self.picture_tokens, self.sinks = picture_tokens, sinks
        self.asked = self.pictures = 0
        self.mass, self.count = np.zeros((2, len(KINDS)))
        self.first, self.place = np.zeros((2, SINK_PLACES)), np.zeros((2, picture_tokens))

    def add(self, positions: npt.NDArray[np.int64], places: npt.NDArray[np.int64], weights: Floats) -> None:
        """Counts what one token looked at.

        Args:
            positions: of the tokens that it sees, itself the last, int64 `[n]`.
            places: where in a picture each of the story's tokens is, or -1, int64 `[t]`.
            weights: its attention, float64 `[n]`.
        """
        self.asked += 1
        where = places[positions]
        kinds = self._kinds(positions, where)
        self.mass += np.bincount(kinds, weights, len(KINDS))
        self.count += np.bincount(kinds, minlength=len(KINDS))
        anchors = (where >= 0) & (positions >= self.sinks)  # what is a sink is looked at as one
        for sums, chosen, at in ((self.first, positions < SINK_PLACES, positions), (self.place, anchors, where)):
            size = sums.shape[1]
            sums += [np.bincount(at[chosen], weights[chosen], size), np.bincount(at[chosen], minlength=size)]

    def _kinds(self, positions: npt.NDArray[np.int64], where: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        text = np.where(positions > positions[-1] - NEWEST, _NEWEST, _OTHER)
        last = self.picture_tokens - 1
        edges = [where < 0, where == 0, where == last, where <= EDGE, where >= last - EDGE]
        kinds = np.select(edges, [text, _BEGIN, _END, _FIRST, _LAST], _MIDDLE)
        return np.where(positions < self.sinks, _SINKS, kinds)


def measure_story(model: SEEDStory, example: Example, look: Look, tally: Tally) -> None:
    """Feeds one story token by token, and asks the words of its captions."""
    model.begin()  # empties the cache
    laid, decoder = lay_out(model, example, [look(picture) for picture in example.pictures]), model.decoder
    places = np.full(len(laid.rows), -1, np.int64)
    for picture in laid.pictures:
        places[picture] = np.arange(len(picture))
    tally.pictures = max(tally.pictures, len(laid.pictures))
    start = 0
    for at in np.flatnonzero(laid.labels != IGNORE).tolist():
        if start < at:
            feed_rows(model, laid, range(start, at))
        held = decoder.cache.slot_positions.copy()
        weights = decoder.attend(laid.rows[at : at + 1]).astype(np.float64)
        seen = np.append((held != EMPTY) & (weights[:-1] > 0), True)  # a hidden slot's weight is exactly 0
        tally.add(np.append(held, at)[seen], places, weights[seen])
        start = at + 1


def propose(slots: int, tally: Tally) -> dict[str, Any]:
    """The budget that catches most: a slot is worth what its token gets beyond a token of other text.

    That is what it displaces. As many text sinks as that pays for, at least one; then, in as many slots as
    `--policy multimodal-sink` takes, the first and last tokens of as many pictures (no more than a story has) as
    together get most; none, if no tokens of a picture are worth their slots.

    Returns:
        `sinks`, `picture_begin`, `picture_end`, `pictures`, and `flags`, which `python -m export` takes.
    """
    text = tally.mass[_OTHER] / max(tally.count[_OTHER], 1)
    first, place = (sums[0] / np.maximum(sums[1], 1) - text for sums in (tally.first, tally.place))
    sinks = 1 + int(np.argmax(np.cumsum(first)))
    room = CacheConfig(slots).under(MULTIMODAL_SINK).anchors
    best, gain = (0, 1, 1), -np.inf
    for begin in range(len(place) + 1):
        for end in range(max(0, 1 - begin), len(place) - begin + 1):
            pictures = min(room // (begin + end), max(1, tally.pictures))
            caught = pictures * float(place[:begin].sum() + place[len(place) - end :].sum())
            if pictures and caught > gain:
                best, gain = (begin, end, pictures), caught
    begin, end, pictures = best if gain > 0 else (0, 0, 0)
    flags = f"--slots {slots} --sinks {sinks} --policy "
    if pictures:
        flags += f"{MULTIMODAL_SINK} --pictures {pictures} --picture-begin {begin} --picture-end {end}"
    else:
        flags += TEXT_SINK
    return {"sinks": sinks, "picture_begin": begin, "picture_end": end, "pictures": pictures, "flags": flags}


def to_table(report: dict[str, Any]) -> str:
    """The report for a reader."""
    rows = [("kind", f"{'total %':>8}{'tokens':>9}{'% a token':>11}")]
    for name, kind in report["kinds"].items():
        total, each = 100 * kind["total"], 100 * kind["per_token"]
        rows.append((name, f"{total:8.2f}{kind['tokens']:9.1f}{each:11.4f}"))
    rows += [("words asked", f"{report['words']} of {report['stories']} stories")]
    return table([*rows, ("proposed", f"python -m export {report['proposal']['flags']}")])
