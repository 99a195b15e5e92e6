"""Does the model look? The loss of held-out stories must rise when their pictures are another story's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from seed_story.errors import UsageError
from seed_story.story import SEEDStory
from training.data import StoryRecord, check_pictures
from training.evaluation.bootstrap import difference_interval, mean_interval
from training.evaluation.perplexity import Floats, cut, encoder_of, looker, sums_of, token_losses


def shuffled(model: SEEDStory, stories: Sequence[StoryRecord], *, pages: int, seed: int = 0) -> dict[str, Any]:
    """The loss with the right pictures and with another story's; the layout, and so the tokens, are the same.

    Returns:
        The report: nats a token; `difference` is `shuffled_loss - loss`. Intervals are over stories, 95 %.

    Raises:
        UsageError: a story shares pictures with every other, so that there is nothing to swap.
        PictureError: a picture is missing or can't be read.
    """
    stories = cut(stories, pages)
    check_pictures(stories)
    others = partners(stories, seed)
    encoder, look = encoder_of(model), looker(model)
    losses: tuple[list[Floats], list[Floats]] = ([], [])
    for story, other in zip(tqdm(stories, desc="shuffled", unit="story"), others, strict=True):
        example = encoder.encode(story, ends=False)
        theirs = [stories[other].pages[n % len(stories[other].pages)].picture for n in range(len(story.pages))]
        for found, pictures in zip(losses, (example.pictures, theirs), strict=True):
            found.append(token_losses(model, example, list(map(look, pictures))))
    right, wrong = map(sums_of, losses)
    return {
        "stories": len(stories),
        "tokens": int(right.counts.sum()),
        "loss": right.mean,
        "loss_interval": mean_interval(right, seed=seed),
        "shuffled_loss": wrong.mean,
        "shuffled_loss_interval": mean_interval(wrong, seed=seed),
        "difference": wrong.mean - right.mean,
        "difference_interval": difference_interval(wrong, right, seed=seed),
    }


def partners(stories: Sequence[StoryRecord], seed: int) -> list[int]:
    """For each story, another one by chance that has none of its pictures.

    Raises:
        UsageError: a story has no such other.
    """
    rng = np.random.default_rng(seed)
    pictures = [{page.picture for page in story.pages} for story in stories]
    chosen = []
    for story, mine in zip(stories, pictures, strict=True):
        strangers = [n for n, theirs in enumerate(pictures) if mine.isdisjoint(theirs)]
        if not strangers:
            raise UsageError(f"story {story.id} has no pictures to swap", got=f"{len(stories)} stories",
                             expected="another story with other pictures")  # fmt: skip
        chosen.append(int(rng.choice(strangers)))
    return chosen
