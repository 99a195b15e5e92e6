"""How much stories repeat themselves, told at length by the runtime's default sampling.

All figures count words, as `training.evaluation.naming.words_of` has them, beginning included. Definitions:

- distinct-n (Li et al., arXiv 1510.03055): different n-grams over all n-grams, story by story, then the mean.
- longest repeat: the longest run of words that stands at two places of a story; the two may overlap.
- loop: a story in which a 4-gram stands more than three times, or whose longest repeat is over 12 words.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from seed_story.story import SEEDStory
from training.evaluation.bootstrap import Sums, mean_interval
from training.evaluation.grounding import BEGINNING
from training.evaluation.items import PictureItem, story_seed
from training.evaluation.naming import words_of

LOOP_GRAM, LOOP_TIMES, LOOP_WORDS = 4, 3, 12
_LOOP = f"some {LOOP_GRAM} words stand more than {LOOP_TIMES} times, or a run of over {LOOP_WORDS} words stands twice"
_BROKEN = "\ufffd"


@dataclass(frozen=True)
class ToldStory:
    """One story.

    Args:
        tokens: told after the beginning.
        ended: whether the model ended it by itself.
    """

    item: PictureItem
    text: str
    tokens: int
    ended: bool


def repetition(
    model: SEEDStory, items: Sequence[PictureItem], *, tokens: int, seed: int = 0
) -> tuple[dict[str, Any], list[ToldStory]]:
    """Tells a story of up to `tokens` tokens to each picture and measures how it repeats itself.

    Returns:
        The report, and the stories. Shares and means are over stories, with intervals of 95 %.
    """
    stories = [_tell(model, item, tokens, seed) for item in tqdm(items, desc="repetition", unit="story")]
    texts = [words_of(story.text) for story in stories]
    repeats = [longest_repeat(words) for words in texts]
    figures: dict[str, Sequence[float]] = {
        **{f"distinct_{n}": [distinct(words, n) for words in texts] for n in (1, 2, 3)},
        "loop_share": [has_loop(words) for words in texts],
        "broken_character_share": [_BROKEN in story.text for story in stories],
        "ended_share": [story.ended for story in stories],
        "mean_words": [len(words) for words in texts],
        "mean_tokens": [story.tokens for story in stories],
        "mean_longest_repeat_words": repeats,
    }
    report: dict[str, Any] = {"stories": len(stories), "loop": _LOOP, "longest_repeat_words": max(repeats)}
    for name, values in figures.items():
        sums = Sums(np.asarray(values, np.float64), np.ones(len(values)))
        report[name], report[f"{name}_interval"] = sums.mean, mean_interval(sums, seed=seed)
    return report, stories


def _tell(model: SEEDStory, item: PictureItem, tokens: int, seed: int) -> ToldStory:
    story = model.begin(seed=story_seed(seed, item.id)).add_picture(item.image).add_text(BEGINNING)
    for _ in story.tell(max_tokens=tokens):
        pass
    return ToldStory(item, story.given + story.told, story.stats.tokens, story.finished)


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` consecutive words, in order."""
    return [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]


def distinct(words: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams; 1 for a text too short to have one."""
    found = ngrams(words, n)
    return len(set(found)) / len(found) if found else 1.0


def longest_repeat(words: Sequence[str]) -> int:
    """The length of the longest run of words that stands at two places; 0 if no word comes twice."""
    size = 0
    while len(set(found := ngrams(words, size + 1))) < len(found):
        size += 1
    return size


def has_loop(words: Sequence[str]) -> bool:
    """Whether the text goes round in circles; see the top of the file."""
    most = max(Counter(ngrams(words, LOOP_GRAM)).values(), default=0)
    return most > LOOP_TIMES or longest_repeat(words) > LOOP_WORDS


def to_markdown(stories: Sequence[ToldStory], folder: Path) -> str:
    """The stories with their pictures, unedited.

    Args:
        folder: where the text will lie; the pictures' paths are relative to it.
    """
    parts = []
    for number, story in enumerate(stories, 1):
        path = Path(os.path.relpath(story.item.image, folder)).as_posix()
        parts.append(f"## {number}. {story.item.concept}\n\n![{path}](<{path}>)\n\n{story.text}\n")
    return "\n".join(parts)
