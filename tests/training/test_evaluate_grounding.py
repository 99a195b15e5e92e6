"""The metric is the subject here, not a model: stories come from scripts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.held_out import ScriptedModel
from training.evaluation.grounding import BLIND_STORIES, MAX_TOKENS, grounding, opening
from training.evaluation.items import PictureItem

ANIMALS = ("fox", "wolf", "bear", "goose", "berry", "mouse")


def items(count: int = 12, split: str = "picture", group: str | None = None) -> list[PictureItem]:
    names = [ANIMALS[n % len(ANIMALS)] for n in range(count)]
    return [
        PictureItem(f"{split}{n}", Path(f"{name}.png"), name, (name,), split, group) for n, name in enumerate(names)
    ]


def always(picture: Path | None, seed: int) -> str:
    return f"there was a {picture.stem if picture else 'day'}. It ran. It hid."


def never(picture: Path | None, seed: int) -> str:
    return "there was a day. It passed. It was over."


def test_a_model_that_always_names_it() -> None:
    report, told = grounding(ScriptedModel(always), items())
    assert (report["accuracy"], report["blind_accuracy"], report["pictures"]) == (1.0, 0.0, 12)
    assert report["accuracy_interval"] == [1.0, 1.0]
    assert [one.named for one in told] == [True] * 12
    assert told[0].text == "Once upon a time, there was a fox. It ran."


def test_a_model_that_never_does() -> None:
    report, told = grounding(ScriptedModel(never), items())
    assert (report["accuracy"], report["blind_accuracy"]) == (0.0, 0.0)
    assert not any(one.named for one in told)


def test_a_model_that_always_says_the_same() -> None:
    """It is right for a sixth of the pictures, and as often without them."""
    report, _ = grounding(ScriptedModel(lambda picture, seed: "there was a fox. It ran."), items())
    assert report["accuracy"] == report["blind_accuracy"] == pytest.approx(1 / 6)


def test_only_the_first_two_sentences_count() -> None:
    late = ScriptedModel(
        lambda picture, seed: f"it rained. And it rained. A {picture.stem if picture else 'day'} came."
    )
    assert grounding(late, items())[0]["accuracy"] == 0
    second = ScriptedModel(lambda picture, seed: f"it rained. A {picture.stem if picture else 'day'} came.")
    assert grounding(second, items())[0]["accuracy"] == 1


def test_the_beginning_counts() -> None:
    report, _ = grounding(ScriptedModel(never), items(1), beginning="A fox met")
    assert report["accuracy"] == report["blind_accuracy"] == 1


def test_splits_and_groups_are_apart() -> None:
    def script(picture: Path | None, seed: int) -> str:
        return "there was a bear and a wolf." if picture is None else f"there was a {'fox' * (picture.stem == 'fox')}."

    asked = [*items(12), *items(3, "style", "photo"), *items(2, "concept")]
    report, _ = grounding(ScriptedModel(script), asked)
    assert report["accuracy"] == pytest.approx(1 / 6)
    assert report["unseen_style_accuracy"] == pytest.approx(1 / 3)
    assert report["unseen_concept_accuracy"] == pytest.approx(1 / 2)
    assert report["blind_accuracy"] == pytest.approx(2 / 6)
    assert report["pictures"] == 17
    assert report["pictures_by_split"] == {"picture": 12, "style": 3, "concept": 2}
    assert list(report["per_group"]) == ["photo"]
    assert report["per_group"]["photo"]["accuracy"] == pytest.approx(1 / 3)
    for name in ("accuracy", "blind_accuracy", "unseen_style_accuracy", "unseen_concept_accuracy"):
        low, high = report[f"{name}_interval"]
        assert 0 <= low <= report[name] <= high <= 1


def test_a_split_without_pictures_has_no_figure() -> None:
    report, _ = grounding(ScriptedModel(always), items(2, "style"))
    assert report["accuracy"] is None and report["accuracy_interval"] is None
    assert report["blind_accuracy"] is None and report["blind_accuracy_interval"] is None
    assert report["unseen_style_accuracy"] == 1
    assert "per_group" not in report


def test_blind_stories_are_few_different_and_without_pictures() -> None:
    model = ScriptedModel(never)
    report, _ = grounding(model, items(BLIND_STORIES + 20))
    assert report["blind_stories"] == BLIND_STORIES
    assert len(model.stories) == 2 * BLIND_STORIES + 20
    assert [story._picture for story in model.stories].count(None) == BLIND_STORIES
    assert len(set(model.seeds)) == len(model.seeds)


def test_a_picture_keeps_its_seed_whatever_else_is_asked() -> None:
    few, many = ScriptedModel(never), ScriptedModel(never)
    grounding(few, items(9)[5:6])
    grounding(many, items(9))
    assert few.seeds[0] == many.seeds[5]
    other = ScriptedModel(never)
    grounding(other, items(9), seed=1)
    assert set(other.seeds).isdisjoint(many.seeds)


def test_telling_stops_once_two_sentences_are_sure() -> None:
    model = ScriptedModel(lambda picture, seed: "it rained. It poured. " + "And on. " * 100)
    assert opening(model, None, "Once,", 0) == "Once, it rained. It poured."
    assert model.stories[0].words == 5
    endless = ScriptedModel(lambda picture, seed: "and on " * 100)
    opening(endless, None, "Once,", 0)
    assert endless.stories[0].words == MAX_TOKENS
