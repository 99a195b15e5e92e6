"""Is the story about the picture? The share of stories whose first two sentences name what the picture shows.

Every picture gets a story of its own: the picture, the beginning, the runtime's default sampling, a seed that depends
on the picture's id alone. A name counts as `training.evaluation.naming.names` has it. What a model would name without
looking is `blind_accuracy`: stories of the same prompt without a picture, each held against the names of every picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from seed_story.story import SEEDStory
from training.evaluation.bootstrap import Interval, by_cluster, crossed_interval, mean_interval
from training.evaluation.items import SPLITS, PictureItem, story_seed
from training.evaluation.naming import first_sentences, names, sentence_ends

BEGINNING = "Once upon a time,"
SENTENCES = 2
MAX_TOKENS = 60
BLIND_STORIES = 64
"""They don't depend on the pictures, so this many are enough, however many pictures there are."""
_NAMES = dict(zip(SPLITS, ("accuracy", "unseen_style_accuracy", "unseen_concept_accuracy"), strict=True))


@dataclass(frozen=True)
class Told:
    """How the story of one picture began, and whether that names what the picture shows."""

    item: PictureItem
    text: str
    named: bool

    def to_dict(self) -> dict[str, Any]:
        """A line of the details file."""
        item = self.item
        return {"id": item.id, "concept": item.concept, "split": item.split, "named": self.named, "text": self.text}


def opening(model: SEEDStory, picture: Path | None, beginning: str, seed: int) -> str:
    """The first two sentences of a story, its beginning included; fewer if `MAX_TOKENS` tokens don't hold them."""
    story = model.begin(seed=seed)
    if picture is not None:
        story.add_picture(picture)
    story.add_text(beginning)
    for _ in story.tell(max_tokens=MAX_TOKENS):
        if len(sentence_ends(story.given + story.told, finished=False)) >= SENTENCES:
            break
    return first_sentences(story.given + story.told, SENTENCES)


def tell_all(model: SEEDStory, items: Sequence[PictureItem], *, beginning: str, seed: int) -> list[Told]:
    """The opening of every picture's story."""
    told = []
    for item in tqdm(items, desc="with pictures", unit="story"):
        text = opening(model, item.image, beginning, story_seed(seed, item.id))
        told.append(Told(item, text, names(text, item.accepted)))
    return told


def tell_blind(model: SEEDStory, count: int, *, beginning: str, seed: int) -> list[str]:
    """The openings of `count` stories without a picture, each from another seed."""
    turns = tqdm(range(count), desc="without", unit="story")
    return [opening(model, None, beginning, story_seed(seed, f"blind {turn}")) for turn in turns]


def grounding(
    model: SEEDStory, items: Sequence[PictureItem], *, beginning: str = BEGINNING, seed: int = 0
) -> tuple[dict[str, Any], list[Told]]:
    """Measures grounding on `items`; about a second a picture on two CPU cores.

    Returns:
        The report and what was told. In the report, an accuracy is null where no picture is of its split, and its
        interval (bootstrap over concepts, 95 %) is null where there are fewer than two concepts. `per_group`, if any
        item has a group, is over all splits.
    """
    told = tell_all(model, items, beginning=beginning, seed=seed)
    known = [item for item in items if item.split == SPLITS[0]]
    blind = tell_blind(model, min(len(known), BLIND_STORIES), beginning=beginning, seed=seed)
    report: dict[str, Any] = {"pictures": len(items), "blind_stories": len(blind)}
    report["pictures_by_split"] = {split: sum(item.split == split for item in items) for split in SPLITS}
    for split, name in _NAMES.items():
        report[name], report[f"{name}_interval"] = _share([one for one in told if one.item.split == split], seed)
    table = np.array([[names(text, item.accepted) for item in known] for text in blind])
    report["blind_accuracy"] = float(table.mean()) if table.size else None
    report["blind_accuracy_interval"] = crossed_interval(table, seed=seed) if table.size else None
    groups = sorted({item.group for item in items if item.group is not None})
    if groups:
        report["per_group"] = {
            group: _group([one for one in told if one.item.group == group], seed) for group in groups
        }
    return report, told


def _share(told: Sequence[Told], seed: int) -> tuple[float | None, Interval | None]:
    if not told:
        return None, None
    sums = by_cluster((one.item.concept, one.named) for one in told)
    return sums.mean, mean_interval(sums, seed=seed)


def _group(told: Sequence[Told], seed: int) -> dict[str, Any]:
    share, interval = _share(told, seed)
    return {"accuracy": share, "accuracy_interval": interval, "pictures": len(told)}
