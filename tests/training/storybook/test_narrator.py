"""The narrator's text: true to its plan, grammatical, varied, and made of every pattern."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from seed_story.errors import ConfigError
from training.storybook.concepts import Concept
from training.storybook.grammar import indefinite, is_plural, pronouns_of
from training.storybook.narrator import PLACES, Plan, Scene, narrate, narrate_chapters
from training.storybook.sentences import Pattern, load_sentences, read_patterns

CONCEPTS = [
    Concept(name, "", group, article)
    for name, group, article in [
        ("fox", "animal", "a"),
        ("owl", "animal", "an"),
        ("doctor", "person", "a"),
        ("queen", "person", "a"),
        ("Santa", "person", ""),
        ("apple", "food", "an"),
        ("rice", "food", "some"),
        ("grapes", "food", "some"),
        ("train", "vehicle", "a"),
        ("hot air balloon", "vehicle", "a"),
        ("sailing boat", "vehicle", "a"),
        ("castle", "place", "a"),
        ("oak tree", "plant", "an"),
        ("sun", "weather", "the"),
        ("rainbow", "weather", "a"),
        ("umbrella", "thing", "an"),
        ("pair of skis", "thing", "a"),
        ("teddy bear", "thing", "a"),
    ]
]
DOCTOR = CONCEPTS[2]
# The word that names a place, where it isn't the place itself; "plain" may go by any name.
PLACE_WORD = {"mountains": "mountain", "night sky": "night sky"}


@dataclass(frozen=True)
class Told:
    plans: list[Plan]
    stories: list[list[str]]
    used: Counter[str]
    """How often each pattern was used."""


def random_plan(rng: np.random.Generator) -> Plan:
    """A hero who is in five pages out of six, and up to two others on each page, now and then the same ones."""
    cast = [CONCEPTS[i] for i in rng.permutation(len(CONCEPTS))[: rng.integers(2, 8)]]
    hero, others = cast[0], cast[1:]
    scenes = []
    place = ""
    for page in range(rng.integers(1, 13)):
        place = place if place and rng.random() < 0.3 else PLACES[rng.integers(len(PLACES))]
        heroes = [hero] if page == 0 or rng.random() < 5 / 6 else []
        company = [others[i] for i in rng.permutation(len(others))[: rng.integers(0 if heroes else 1, 3)]]
        scenes.append(Scene((*heroes, *company), place))
    return Plan(tuple(scenes))


@pytest.fixture(scope="module")
def told() -> Told:
    used: Counter[str] = Counter()
    fill = Pattern.fill

    def counted(self: Pattern, values: dict[str, str]) -> str:
        used[self.text] += 1
        return fill(self, values)

    rng = np.random.default_rng(7)
    plans = [random_plan(rng) for _ in range(3000)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pattern, "fill", counted)
        stories = [narrate(plan, rng) for plan in plans]
    return Told(plans, stories, used)


def captions(told: Told) -> list[tuple[Scene, str]]:
    return [
        (scene, text)
        for plan, story in zip(told.plans, told.stories, strict=True)
        for scene, text in zip(plan.scenes, story, strict=True)
    ]


def sentences_of(text: str) -> list[str]:
    return re.split(r'(?<=[.!?])(?:"(?= [A-Z]))? ', text)


def sentence_patterns() -> list[str]:
    skipped = ("places", "openings", "transitions", "words")
    return [
        pattern.text
        for file, sections in load_sentences().items()
        for section, patterns in sections.items()
        for pattern in patterns
        if file not in skipped and section != "heroes"
    ]


def names(concept: Concept, text: str) -> bool:
    return re.search(rf"\b{re.escape(concept.name)}\b", text, re.IGNORECASE) is not None


def test_there_are_at_least_350_distinct_patterns_and_each_is_used(told: Told) -> None:
    patterns = sentence_patterns()
    assert len(set(patterns)) >= 350
    assert [text for text, times in Counter(patterns).items() if times > 1] == []
    assert [text for text in patterns if not told.used[text]] == []


def test_no_two_patterns_differ_in_one_word_only() -> None:
    gaps: dict[tuple[str, ...], str] = {}
    for text in sentence_patterns():
        words = text.lower().split()
        for index in range(len(words)):
            gap = (*words[:index], "", *words[index + 1 :])
            assert gap not in gaps, (text, gaps[gap])
            gaps[gap] = text


def test_every_thing_of_a_scene_is_named_in_its_caption(told: Told) -> None:
    missing = [(thing.name, text) for scene, text in captions(told) for thing in scene.things if not names(thing, text)]
    assert missing == []


def test_most_captions_name_their_place(told: Told) -> None:
    placed = [
        PLACE_WORD.get(scene.place, scene.place) in text for scene, text in captions(told) if scene.place != "plain"
    ]
    assert np.mean(placed) > 0.85


def test_the_hero_is_named_in_the_first_two_sentences_and_nearly_always_in_the_first(told: Told) -> None:
    first = []
    for plan, story in zip(told.plans, told.stories, strict=True):
        hero, sentences = plan.scenes[0].things[0], sentences_of(story[0])
        assert names(hero, " ".join(sentences[:2])), story[0]
        first.append(names(hero, sentences[0]))
    assert np.mean(first) > 0.95


def test_more_than_half_of_the_stories_begin_once_upon_a_time_and_the_others_differ(told: Told) -> None:
    openings = Counter(story[0].split(",")[0] for story in told.stories)
    assert 0.5 <= openings["Once upon a time"] / len(told.stories) <= 0.75
    assert len(openings) > 20


def test_articles_and_slots_and_spaces(told: Told) -> None:
    wrong = re.compile(
        r"[{}]|  |\ba [aeio]|\ban [^aeiou]|\b(?:a|an|the|some) (?:a|an|the|some) |\b(?:a|an|the|some) Santa"
        r"|there was (?:the sun|Santa),? (?:that|who)\b"
        r"|\b(?:a|an) (?:rice|grapes|sun)\b|grapes was|(?:rice|skis) were|,,|\.\.|[^\x20-\x7e]| [,.!?]"
    )
    assert [text for _, text in captions(told) if wrong.search(text)] == []


def test_sentences_begin_with_a_capital_and_end_with_a_stop(told: Told) -> None:
    for _, text in captions(told):
        assert re.search(r'[.!?]"?$', text), text
        for sentence in re.split(r'(?<=[.!?]) (?=[A-Za-z"])', text):
            assert re.match(r'"?[A-Z]', sentence), text


def test_captions_have_25_words_at_least_and_nearly_always_60_at_most(told: Told) -> None:
    lengths = np.array([len(text.split()) for _, text in captions(told)])
    assert lengths.min() >= 25
    assert lengths.max() <= 70
    assert np.mean(lengths <= 60) > 0.99


def test_no_sentence_pattern_comes_twice_in_a_story_of_six_pages() -> None:
    rng = np.random.default_rng(3)
    fox, owl = CONCEPTS[:2]
    for _ in range(200):
        scenes = [Scene((fox, owl), PLACES[rng.integers(len(PLACES))]) for _ in range(6)]
        sentences = [sentence for text in narrate(Plan(tuple(scenes)), rng) for sentence in sentences_of(text)]
        assert len(sentences) == len(set(sentences))


def test_persons_without_a_gender_in_their_name_get_no_pronoun(monkeypatch: pytest.MonkeyPatch) -> None:
    used: set[str] = set()
    fill = Pattern.fill

    def noted(self: Pattern, values: dict[str, str]) -> str:
        used.update(self.slots)
        return fill(self, values)

    monkeypatch.setattr(Pattern, "fill", noted)
    rng = np.random.default_rng(5)
    plan = Plan(tuple(Scene((DOCTOR,), place) for place in PLACES[:6]))
    for _ in range(100):
        assert not re.search(r"\b(he|him|his|she|hers?)\b", " ".join(narrate(plan, rng)), re.IGNORECASE)
    assert "his" not in used  # "the doctor made the doctor's way"


@pytest.mark.parametrize(
    "name, group, article, pronoun, plural, first",
    [
        ("fox", "animal", "a", "it", False, "an old fox"),
        ("queen", "person", "a", "she", False, "an old queen"),
        ("policeman", "person", "a", "he", False, "an old policeman"),
        ("robot", "person", "a", "it", False, "an old robot"),
        ("doctor", "person", "a", None, False, "an old doctor"),
        ("sun", "weather", "the", "it", False, "the sun"),
        ("rice", "food", "some", "it", False, "some rice"),
        ("grapes", "food", "some", "they", True, "some grapes"),
        ("pair of skis", "thing", "a", "it", False, "an old pair of skis"),
        ("Santa", "person", "", "he", False, "Santa"),
    ],
)
def test_grammar_of_each_sort_of_name(
    name: str, group: str, article: str, pronoun: str | None, plural: bool, first: str
) -> None:
    concept = Concept(name, "", group, article)
    pronouns = pronouns_of(concept)
    assert (pronouns.he if pronouns else None) == pronoun
    assert is_plural(concept) == plural
    assert indefinite(concept, "old") == first


def test_the_same_state_of_the_generator_tells_the_same_story() -> None:
    plan = random_plan(np.random.default_rng(1))
    assert narrate(plan, np.random.default_rng(2)) == narrate(plan, np.random.default_rng(2))
    assert narrate(plan, np.random.default_rng(2)) != narrate(plan, np.random.default_rng(3))


def test_random_plans_give_distinct_texts(told: Told) -> None:
    texts = {" ".join(story) for story in told.stories}
    assert len(texts) >= 0.99 * len(told.stories)


@pytest.mark.parametrize(
    "line, complaint",
    [("{The_heroine} slept.", "unknown slot"), ("The {the_hero slept.", "brace"), ("{} slept.", "brace")],
)
def test_a_bad_slot_names_file_and_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "moods.txt"
    path.write_text(f"# a comment\n[acting]\n{{name}} slept.\n{line}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"moods\.txt, line 4: .*{complaint}"):
        read_patterns(path)


def test_a_pattern_before_the_first_section_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "moods.txt"
    path.write_text("{name} slept.\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"moods\.txt, line 1: a pattern before"):
        read_patterns(path)


def chapters_of(rng: np.random.Generator, count: int = 5, pages: int = 10) -> list[Plan]:
    """The first page of each chapter shows the hero; most others do."""
    fox, owl = CONCEPTS[:2]
    return [
        Plan(tuple(Scene((fox,) if page == 0 or rng.random() < 0.8 else (owl,), PLACES[rng.integers(len(PLACES))])
                   for page in range(pages)))
        for _ in range(count)
    ]  # fmt: skip


def told_in_chapters(chapters: list[Plan], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """The captions, and the patterns that they were filled from."""
    used: list[str] = []
    fill = Pattern.fill
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pattern, "fill", lambda self, values: (used.append(self.text), fill(self, values))[1])
        return narrate_chapters(chapters, rng), used


def test_a_story_in_chapters_begins_once_and_keeps_its_hero() -> None:
    rng = np.random.default_rng(4)
    begins = {pattern.text for patterns in load_sentences()["beginnings"].values() for pattern in patterns}
    for _ in range(20):
        chapters = chapters_of(rng)
        captions, used = told_in_chapters(chapters, rng)
        assert len(captions) == 50
        assert [text in begins for text in used] == [True] + [False] * (len(used) - 1)
        names_of = {name for text in captions for name in re.findall(r"fox (?:named|called) (\w+)", text)}
        assert len(names_of) <= 1
        for scene, text in zip((s for c in chapters for s in c.scenes), captions, strict=True):
            assert names(scene.things[0], text)


def test_every_chapter_has_a_plot_of_its_own() -> None:
    plots = {name: {p.text for part in ("wish", "try", "turn", "end") for p in sections[part]}
             for name, sections in load_sentences().items() if name.startswith("plot_")}  # fmt: skip
    _, used = told_in_chapters(chapters_of(np.random.default_rng(6)), np.random.default_rng(6))
    of = [name for text in used for name, texts in plots.items() if text in texts]
    runs = [name for at, name in enumerate(of) if at == 0 or of[at - 1] != name]
    assert len(runs) == len(set(runs)) == 5


def test_one_chapter_is_the_plain_story() -> None:
    plan = random_plan(np.random.default_rng(1))
    assert narrate_chapters([plan], np.random.default_rng(2)) == narrate(plan, np.random.default_rng(2))
