"""Held-out stories through a reference and through bundles, token by token and in step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from quantization.fidelity import Divergence, Place, divergence, log_softmax, row_cosines
from quantization.reference import is_rotated
from seed_story.contract import QFORMER, VIT
from seed_story.image import load_and_preprocess_image
from seed_story.story import SEEDStory
from training.data import Example, StoryEncoder, StoryRecord
from training.evaluation.bootstrap import by_cluster, mean_interval
from training.evaluation.perplexity import encoder_of, forced_logits, looker

PAST_THE_CACHE = 2
"""A passage has so many times the tokens that the cache has slots: half of them come after the first eviction."""


def passages(stories: Sequence[StoryRecord], encoder: StoryEncoder, tokens: int) -> Iterator[list[StoryRecord]]:
    """Stories in rows, each of at least `tokens` tokens but the last, which are to be read as one story."""
    row: list[StoryRecord] = []
    for story in stories:
        row.append(story)
        if len(encoder.encode(joined(row), ends=False).ids) >= tokens:
            yield row
            row = []
    if row:
        yield row


def joined(row: Sequence[StoryRecord]) -> StoryRecord:
    """Several stories as one, page after page."""
    return replace(row[0], pages=tuple(page for story in row for page in story.pages))


def page_of(example: Example) -> npt.NDArray[np.int64]:
    """The page that each token belongs to, from 0, int64 `[t]`; a page begins with its picture."""
    places = (example.ids < 0).astype(np.int8)
    return np.asarray(np.maximum(np.cumsum(np.diff(places, prepend=0) == 1) - 1, 0))


def walk(
    reference: SEEDStory, bundles: Sequence[SEEDStory], stories: Sequence[StoryRecord], *, tokens: int
) -> tuple[list[Place], list[list[Divergence]]]:
    """Teacher-forces all models through the same passages.

    Each model sees the pictures with its own eyes, and reads one token a call, as it does when it tells.

    Args:
        tokens: stop after so many compared tokens: words of captions, as `training.evaluation.perplexity` counts.

    Returns:
        The tokens' places, and for each bundle its divergences there.
    """
    models, encoder, slots = [reference, *bundles], encoder_of(reference), reference.cache.slots
    looks = [looker(model) for model in models]
    places: list[Place] = []
    found: list[list[Divergence]] = [[] for _ in bundles]
    with tqdm(total=tokens, desc="held-out stories", unit="token") as bar:
        for row in passages(stories, encoder, PAST_THE_CACHE * slots):
            example, owners = encoder.encode(joined(row), ends=False), [s.id for s in row for _ in s.pages]
            pages = page_of(example).tolist()
            seen = [list(map(look, example.pictures)) for look in looks]
            forced = [forced_logits(model, example, eyes) for model, eyes in zip(models, seen, strict=True)]
            for (at, truth), *others in zip(*forced, strict=True):
                expected = log_softmax(truth)
                places.append(Place(owners[pages[at]], pages[at] + 1, at >= slots))
                for mine, (_, logits) in zip(found, others, strict=True):
                    mine.append(divergence(expected, log_softmax(logits), int(example.labels[at])))
                bar.update(1)
                if len(places) == tokens:
                    return places, found
    return places, found


def picture_cosines(
    reference: SEEDStory, bundles: Sequence[SEEDStory], pictures: Sequence[Path], *, seed: int = 0
) -> list[dict[str, Any]]:
    """How near the bundles' features and embeddings of pictures are to the reference's, by graph.

    The Q-Former reads its own bundle's features, so its figures are those of both graphs. A cosine is taken for each
    feature or query; embeddings are turned to the reference's channels before, if a decoder is rotated.

    Returns:
        For each bundle, by graph: the `mean` of all cosines with its interval over pictures, the mean of the
        `worst_picture`, and the least of all.
    """
    size = reference.bundle.manifest.story.vision.image_size
    rows: list[dict[str, list[npt.NDArray[np.float64]]]] = [{VIT: [], QFORMER: []} for _ in bundles]
    turns = [_turn(model, reference) for model in bundles]
    for picture in tqdm(pictures, desc="pictures", unit="picture"):
        pixels = load_and_preprocess_image(picture, size)
        features = reference.vision.features(pixels).copy()
        embeddings = reference.vision.embeddings(pixels).copy()
        for found, model, turn in zip(rows, bundles, turns, strict=True):
            found[VIT].append(row_cosines(model.vision.features(pixels), features))
            found[QFORMER].append(row_cosines(model.vision.embeddings(pixels) @ turn, embeddings))
    return [{graph: _cosines(values, seed) for graph, values in found.items()} for found in rows]


def _turn(model: SEEDStory, reference: SEEDStory) -> npt.NDArray[np.float32]:
    """What turns a model's embeddings to the reference's channels, `[hidden, hidden]`.

    If one of them is rotated, the rotation that brings the tokens' rows nearest to each other (Procrustes' problem).
    """
    llama = model.bundle.manifest.story.llama
    if not (is_rotated(model.bundle) or is_rotated(reference.bundle)):
        return np.eye(llama.hidden_size, dtype=np.float32)
    mine, theirs = (one.decoder.embed(range(llama.vocab_size)) for one in (model, reference))
    left, _, right = np.linalg.svd(mine.T @ theirs)
    return np.asarray(left @ right)


def _cosines(values: Sequence[npt.NDArray[np.float64]], seed: int) -> dict[str, Any]:
    sums = by_cluster((number, float(cosine)) for number, one in enumerate(values) for cosine in one)
    return {
        "pictures": len(values),
        "mean": sums.mean,
        "mean_interval": mean_interval(sums, seed=seed),
        "worst_picture": float(np.min([one.mean() for one in values])),
        "least": float(np.min(np.concatenate(values))),
    }
