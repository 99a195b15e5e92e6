"""How well the model foretells the words of held-out stories, with their pictures and without.

Teacher-forced through the bundle's decoder, one token a step, in the layout that `training.data.StoryEncoder` shares
with the runtime. Only captions count: no template, no end of the story, and no token of white space alone, because a
caption follows a picture with a line break and another caption with a space. Losses are in nats a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from seed_story.backends.base import Array
from seed_story.image import load_and_preprocess_image
from seed_story.story import SEEDStory
from training.data import IGNORE, Example, Ids, Shown, StoryEncoder, StoryRecord, check_pictures
from training.evaluation.bootstrap import Sums, difference_interval, mean_interval

Floats = npt.NDArray[np.float64]
Look = Callable[[Path], Array]
"""A picture's file to its embeddings, `[queries, hidden]`."""


def perplexity(model: SEEDStory, stories: Sequence[StoryRecord], *, pages: int, seed: int = 0) -> dict[str, Any]:
    """Loss and perplexity a token of the stories' first `pages` pages.

    Returns:
        The report; `blind_` is without pictures, `gain` how many nats a token the pictures save. Intervals are
        bootstrapped over stories, 95 %.

    Raises:
        PictureError: a picture is missing or can't be read.
    """
    stories = cut(stories, pages)
    check_pictures(stories)
    encoder, look = encoder_of(model), looker(model)
    losses: dict[Shown, list[Floats]] = {"all": [], "none": []}
    for story in tqdm(stories, desc="perplexity", unit="story"):
        for shown, found in losses.items():
            example = encoder.encode(story, shown, ends=False)
            found.append(token_losses(model, example, list(map(look, example.pictures))))
    seen, blind = (sums_of(losses[shown]) for shown in ("all", "none"))
    report = {"stories": len(stories), "tokens": int(seen.counts.sum()), **_figures("", seen, seed)}
    report |= _figures("blind_", blind, seed)
    report["gain"] = blind.mean - seen.mean
    report["gain_interval"] = difference_interval(blind, seen, seed=seed)
    return report


def _figures(prefix: str, sums: Sums, seed: int) -> dict[str, Any]:
    interval = mean_interval(sums, seed=seed)
    return {
        f"{prefix}loss": sums.mean,
        f"{prefix}loss_interval": interval,
        f"{prefix}perplexity": float(np.exp(sums.mean)),
        f"{prefix}perplexity_interval": interval and [float(np.exp(end)) for end in interval],
    }


def cut(stories: Sequence[StoryRecord], pages: int) -> list[StoryRecord]:
    """The stories' first pages."""
    return [replace(story, pages=story.pages[:pages]) for story in stories]


def encoder_of(model: SEEDStory) -> StoryEncoder:
    """What lays out stories as this bundle reads them."""
    manifest = model.bundle.manifest
    return StoryEncoder(model.tokenizer, manifest.prompt, manifest.story.qformer.num_queries)


def looker(model: SEEDStory) -> Look:
    """Reads pictures and remembers their embeddings: a recurring picture is looked at once."""
    size, known = model.bundle.manifest.story.vision.image_size, dict[Path, Array]()

    def look(picture: Path) -> Array:
        if picture not in known:
            known[picture] = model.vision.embeddings(load_and_preprocess_image(picture, size))
        return known[picture]

    return look


def token_losses(model: SEEDStory, example: Example, pictures: Sequence[Array]) -> Floats:
    """The loss of each counted token of one story, nats, float64 `[counted]`; arguments as `forced_logits` has them."""
    forced = forced_logits(model, example, pictures)
    return np.array([_nats(logits, int(example.labels[at])) for at, logits in forced], np.float64)


def forced_logits(model: SEEDStory, example: Example, pictures: Sequence[Array]) -> Iterator[tuple[int, Array]]:
    """Reads one story as it stands; what the model foretells at each counted position.

    Args:
        pictures: embeddings `[queries, hidden]` for the places of each picture, in order.

    Yields:
        A position of `example`, and the logits of the token after it, float32 `[vocab]`: a view that the next
        overwrites.
    """
    model.begin()  # empties the cache
    laid = lay_out(model, example, pictures)
    yield from _foretold(model, laid, range(laid.end))


@dataclass(frozen=True)
class Laid:
    """A story as the decoder is fed it.

    Args:
        rows: float32 `[t, hidden]`.
        labels: int32 `[t]`, the token that follows each row; `IGNORE` where its loss doesn't count.
        pictures: the rows of each, the two tokens around it included.
    """

    rows: Array
    labels: Ids
    pictures: tuple[range, ...]

    @property
    def end(self) -> int:
        """One past the last row that has a loss: what comes after it need not be read."""
        return int(np.flatnonzero(self.labels != IGNORE)[-1]) + 1


def lay_out(model: SEEDStory, example: Example, pictures: Sequence[Array]) -> Laid:
    """One story with embeddings `[queries, hidden]` for the places of each picture, in order."""
    places = example.ids < 0
    rows = model.decoder.embed(np.where(places, 0, example.ids).tolist())
    if places.any():
        rows[places] = np.concatenate(pictures)
    begins = np.flatnonzero(np.diff(places.astype(np.int8)) == 1).tolist()  # the tokens before the embeddings
    size = model.bundle.manifest.story.picture_tokens
    labels = np.where(counted(model, example), example.labels, np.int32(IGNORE))
    return Laid(rows, labels, tuple(range(begin, begin + size) for begin in begins))


def losses_in(model: SEEDStory, laid: Laid, rows: range) -> Floats:
    """Feeds `rows`, which come next and begin and end outside of pictures; gives the losses that count among them."""
    losses, start = [], rows.start
    for at, logits in _foretold(model, laid, rows):
        losses.append(_nats(logits, int(laid.labels[at])))
        start = at + 1
    if start < rows.stop:
        feed_rows(model, laid, range(start, rows.stop))
    return np.array(losses, np.float64)


def _foretold(model: SEEDStory, laid: Laid, rows: range) -> Iterator[tuple[int, Array]]:
    """Feeds `rows` up to the last whose label counts; yields each of those and the logits after it."""
    start = rows.start
    for at in (rows.start + np.flatnonzero(laid.labels[rows.start : rows.stop] != IGNORE)).tolist():
        yield at, feed_rows(model, laid, range(start, at + 1))
        start = at + 1


def feed_rows(model: SEEDStory, laid: Laid, rows: range) -> Array:
    """Feeds `rows`, which come next and begin and end outside of pictures; gives the logits after the last one."""
    shown = [range(p.start - rows.start, p.stop - rows.start) for p in laid.pictures if p.start in rows]
    return model.decoder.feed(laid.rows[rows.start : rows.stop], shown)


def counted(model: SEEDStory, example: Example) -> npt.NDArray[np.bool_]:
    """Where a label counts, bool `[t]`: captions, without tokens of white space alone."""
    byte_strings = (b"" if label == IGNORE else model.tokenizer.token_bytes(label) for label in example.labels.tolist())
    return np.array([bool(piece.strip()) for piece in byte_strings])


def sums_of(losses: Sequence[Floats]) -> Sums:
    """Of each story's losses."""
    return Sums(np.array([one.sum() for one in losses]), np.array([len(one) for one in losses], np.float64))


def _nats(logits: Array, token_id: int) -> float:
    """The token's negative log-probability."""
    wide = logits.astype(np.float64)
    best = wide.max()
    return float(best + np.log(np.exp(wide - best).sum()) - wide[token_id])
