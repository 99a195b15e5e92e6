"""The data set as a whole, of synthetic drawings: its files, its words, and that no kept drawing is trained on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seed_story.errors import UsageError
from tests.training.storybook.synthetic import drawings
from training.data import check_pictures, read_stories
from training.storybook import __main__ as command
from training.storybook import build as building
from training.storybook.build import Size, build, build_long
from training.storybook.concepts import load_concepts
from training.storybook.drawings import Drawing
from training.storybook.narrator import PLACES
from training.storybook.packages import ICONS, PACKAGES
from training.storybook.splits import UNSEEN_STYLE, Splits, split_drawings, trained_icons

NAMES = ("fox", "owl", "cat", "dog", "horse", "castle", "train", "apple", "queen", "rainbow", "llama", "avocado")
STYLES = ("noto", "fxemoji", "emojione", "fluent-flat", UNSEEN_STYLE)
ICON_STYLES = ("phosphor", "fluent-high-contrast")
ICON_CARDS, PHOTOGRAPHS = 9, 70
CARDS = ICON_CARDS + PHOTOGRAPHS
STORIES = {"train": 8, "valid": 3, "test": 4}
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Built:
    """A data set, and what it was made of; `shown` are the drawings in each picture, by its name."""

    folder: Path
    counts: dict[str, int]
    drawings: list[Drawing]
    splits: Splits
    shown: dict[str, list[Drawing]]

    def lines(self, name: str) -> Lines:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """Twelve concepts in five styles, and few stories."""
    rendered = tmp_path_factory.mktemp("rendered")
    made = [*drawings(rendered, NAMES, STYLES), *drawings(rendered, NAMES, ICON_STYLES)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.storybook.drawings.folder", lambda: rendered)
        patch.setattr(building, "render_drawings",
                      lambda concepts, styles=tuple(PACKAGES): [d for d in made if d.style in styles])  # fmt: skip
        patch.setattr(building, "_STORIES", {"valid": STORIES["valid"], "test": STORIES["test"]})
        patch.setitem(building.SIZES, "tiny", Size(STORIES["train"], ICON_CARDS, PHOTOGRAPHS))
        yield patch


@pytest.fixture(scope="module")
def built(small: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Built:
    shown: dict[str, list[Drawing]] = {}
    draw, photograph = building._Writer._draw, building._Writer._photograph

    def noted(self: Any, name: str, things: list[Drawing], place: str, rng: np.random.Generator) -> str:
        file = draw(self, name, things, place, rng)
        shown[file] = list(things)
        return file

    def noted_photograph(self: Any, name: str, thing: Drawing, rng: np.random.Generator) -> str:
        file = photograph(self, name, thing, rng)
        shown[file] = [thing]
        return file

    folder = tmp_path_factory.mktemp("out") / "new" / "storybook"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building._Writer, "_draw", noted)
        patch.setattr(building._Writer, "_photograph", noted_photograph)
        counts = build(folder, "tiny", seed=3)
    concepts = load_concepts()
    made, icons = building.render_drawings(concepts), building.render_drawings(concepts, ICONS)
    return Built(folder, counts, [*made, *icons], split_drawings(concepts, made), shown)


def held(split: dict[str, list[Drawing]]) -> set[Drawing]:
    return {drawing for found in split.values() for drawing in found}


def test_files_and_counts(built: Built) -> None:
    names = sorted(path.name for path in built.folder.iterdir())
    others = ["pictures", "sources.json", "names.json", "grounding.jsonl", "cards.jsonl"]
    assert names == sorted([*others, *(f"{name}.jsonl" for name in STORIES)])
    questions = sum(len(split) for split in (built.splits.picture, built.splits.style, built.splits.concept))
    assert (
        built.counts
        == {**STORIES, "cards": CARDS, "grounding": questions}
        == {name: len(built.lines(name)) for name in built.counts}
    )
    assert [path.name for path in built.folder.parent.iterdir()] == ["storybook"]


@pytest.mark.parametrize("name", STORIES)
def test_stories_are_read_as_storystream(built: Built, name: str) -> None:
    stories = read_stories(built.folder / f"{name}.jsonl")
    check_pictures(stories)
    assert [story.id for story in stories] == [f"{name}-{number:05d}" for number in range(STORIES[name])]
    assert {len(story.pages) for story in stories} <= {1, 2, 3, 4, 5, 6, 8, 10}
    assert all([page.order for page in story.pages] == list(range(len(story.pages))) for story in stories)


def test_every_picture_is_listed_once_and_has_its_size(built: Built) -> None:
    listed = [image for name in (*STORIES, "cards") for line in built.lines(name) for image in line["images"]]
    listed += [line["image"] for line in built.lines("grounding")]
    assert sorted(listed) == sorted(f"pictures/{path.name}" for path in (built.folder / "pictures").iterdir())
    with Image.open(built.folder / listed[0]) as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (224, 224))


@pytest.mark.parametrize("name", STORIES)
def test_a_page_says_what_its_picture_shows(built: Built, name: str) -> None:
    for line in built.lines(name):
        assert len(line["things"]) == len(line["place"]) == len(line["images"])
        for image, things, place, caption in zip(
            line["images"], line["things"], line["place"], line["captions"], strict=True
        ):
            assert [drawing.concept for drawing in built.shown[image]] == things
            assert 1 <= len(things) == len(set(things)) <= 3
            assert place in PLACES
            hero = line["things"][0][0]  # who on later pages may go by a given name
            named = [thing for thing in things if thing != hero or image == line["images"][0]]
            assert all(re.search(rf"\b{thing}\b", caption, re.IGNORECASE) for thing in named), (things, caption)


def test_a_thing_keeps_its_drawing_through_a_story(built: Built) -> None:
    for line in built.lines("train"):
        cast = {drawing for image in line["images"] for drawing in built.shown[image]}
        assert len(cast) == len({drawing.concept for drawing in cast})


def test_no_kept_drawing_is_trained_on(built: Built) -> None:
    used = {name: {d for line in built.lines(name) for i in line["images"] for d in built.shown[i]} for name in STORIES}
    assert used["train"] | used["valid"] <= held(built.splits.train)
    assert used["test"] <= held(built.splits.picture)
    assert not used["test"] & held(built.splits.train)
    assert len(used["train"]) > len(NAMES)


def test_cards_show_icons_of_what_is_trained(built: Built) -> None:
    concepts = {concept.name: concept for concept in load_concepts()}
    icons = [icon for found in trained_icons(building.render_drawings((), ICONS), built.splits).values()
             for icon in found]  # fmt: skip
    kept = {(d.concept, d.style) for d in held(built.splits.picture)}
    assert ("fluent-high-contrast" in {icon.style for icon in icons}) and len(icons) > ICON_CARDS
    assert not [icon for icon in icons if (icon.concept, icon.style.replace("high-contrast", "flat")) in kept]
    for line in built.lines("cards"):
        (thing,) = built.shown[line["images"][0]]
        assert thing in icons or line["id"].startswith("photograph-")
        assert (line["things"], line["captions"]) == (
            [[thing.concept]], [f"This is {concepts[thing.concept].phrase}."]
        )  # fmt: skip
    check_pictures(read_stories(built.folder / "cards.jsonl"))


def test_photographs_are_of_trained_drawings_each_as_often_as_the_others(built: Built) -> None:
    shown = Counter(built.shown[line["images"][0]][0] for line in built.lines("cards")[ICON_CARDS:])
    trained = held(built.splits.train)
    assert shown.total() == PHOTOGRAPHS and shown.keys() == trained
    assert set(shown.values()) == {PHOTOGRAPHS // len(trained), PHOTOGRAPHS // len(trained) + 1}


def test_names_have_the_other_words_for_them(built: Built) -> None:
    also = json.loads((built.folder / "names.json").read_text())
    assert also["fox"] == ["vixen"] and "rainbow" not in also
    assert also == {concept.name: list(concept.also) for concept in load_concepts() if concept.also}


def test_questions_come_from_their_split(built: Built) -> None:
    concepts = {concept.name: concept for concept in load_concepts()}
    for line in built.lines("grounding"):
        main, *others = built.shown[line["image"]]
        split = held(getattr(built.splits, line["split"]))
        assert {main, *others} <= split
        assert not split & held(built.splits.train)
        assert (line["concept"], line["style"]) == (main.concept, main.style)
        assert line["accepted"] == list(concepts[main.concept].accepted)
        assert line["group"] == concepts[main.concept].group
        assert all(other.concept != main.concept for other in others)
    assert {line["split"] for line in built.lines("grounding")} == {"picture", "style", "concept"}
    assert {len(built.shown[line["image"]]) for line in built.lines("grounding")} == {1, 2}


def test_sources_name_every_drawing_and_its_licence(built: Built) -> None:
    sources = json.loads((built.folder / "sources.json").read_text())
    assert sorted(map(tuple, sources["drawings"])) == sorted((d.style, d.source, d.concept) for d in built.drawings)
    for style in (*STYLES, *ICON_STYLES):
        assert all(sources["packages"][style][key] for key in ("package", "version", "registry", "licence", "credit"))


def test_long_stories_of_kept_drawings(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[str, list[Drawing]] = {}

    def noted(self: Any, name: str, things: list[Drawing], place: str, rng: np.random.Generator) -> str:
        shown[f"pictures/{name}.jpg"] = list(things)
        return f"pictures/{name}.jpg"

    monkeypatch.setattr(building._Writer, "_draw", noted)
    out = tmp_path / "long"
    assert command.main(["long", "--out", str(out), "--stories", "3", "--pages", "23", "--seed", "5"]) == 0
    assert capsys.readouterr().out == f"test 3 -> {out}\n"
    stories = read_stories(out / "test.jsonl")
    assert [(story.id, len(story.pages)) for story in stories] == [(f"long-{n:05d}", 23) for n in range(3)]
    kept = held(built.splits.picture)
    for line in map(json.loads, (out / "test.jsonl").read_text().splitlines()):
        cast = {drawing for image in line["images"] for drawing in shown[image]}
        assert cast <= kept and len(cast) == len({drawing.concept for drawing in cast})
        hero = line["things"][0][0]
        assert all(hero in line["things"][page] for page in (0, 10, 20)), "on the first page of each chapter"
        assert [[drawing.concept for drawing in shown[image]] for image in line["images"]] == line["things"]
    assert json.loads((out / "sources.json").read_text())["drawings"]
    build_long(tmp_path / "again", 3, 23, seed=5)
    assert (tmp_path / "again" / "test.jsonl").read_text() == (out / "test.jsonl").read_text()
    with pytest.raises(UsageError, match="is there already"):
        build_long(out, 1, 1)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_seed_gives_the_same_bytes_and_another_seed_others(
    built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same, other = tmp_path / "same", tmp_path / "other"
    assert command.main(["build", "--out", str(same), "--size", "tiny", "--seed", "3"]) == 0
    assert (
        capsys.readouterr().out
        == f"train 8, valid 3, test 4, cards {CARDS}, grounding {built.counts['grounding']} -> {same}\n"
    )
    assert contents(same) == contents(built.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "compose", lambda things, place, rng: Image.new("RGB", (224, 224)))  # the words will do
        build(other, "tiny", seed=4)
    assert (other / "train.jsonl").read_bytes() != (same / "train.jsonl").read_bytes()


def test_refuses_a_folder_that_is_there(built: Built, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in built.folder.iterdir())
    with pytest.raises(UsageError, match="is there already"):
        build(built.folder, "tiny")
    assert command.main(["build", "--out", str(built.folder), "--size", "tiny"]) == 2
    assert "storybook: error: the data set's folder is there already" in capsys.readouterr().err
    assert sorted(path.name for path in built.folder.iterdir()) == before


def test_refuses_an_unknown_size(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="tiny or small or full"):
        build(tmp_path / "out", "huge")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_build_leaves_no_data_set_and_can_be_repeated(
    small: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = iter(range(5))

    def blank(things: Any, place: str, rng: Any) -> Image.Image:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return Image.new("RGB", (224, 224))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "compose", blank)
        assert command.main(["build", "--out", str(tmp_path / "out"), "--size", "tiny"]) == 130
        assert "interrupted" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        left = iter(range(10**6))
        build(tmp_path / "out", "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert len(list((tmp_path / "out" / "pictures").iterdir())) > 5
