"""Tells the story of a plan: one caption a page, out of the sentence patterns of `patterns/*.txt`.

A caption is a sentence about the hero and the place, one for each other thing of the scene, and one of the plot, which
runs from a wish over attempts and a turn to the end. The slots of a pattern; a capital first letter gives a capital:

    {ever} {day}        the first words of a story: "once upon a time,"; {day} allows "one day," too
    {then}              the first words of a page: "soon,"
    {new_hero}          the hero as first mentioned: "a little fox named Pip"
    {the_hero}          "the fox", "the little fox"
    {name}              the given name, or {the_hero} if it has none
    {he} {him} {his}    the hero's pronouns: "it", or as a person's name says
    {was} {there_was}   "was" or "were", after the hero and before it
    {a_thing} {the_thing} {thing_was}    another thing of the scene, mentioned first and again, and its verb
    {at} {to} {place}   "in the forest", "into the forest", "the forest"
    {child}             a helper who isn't in the picture: "a child", then "the child"
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from training.storybook.concepts import Concept
from training.storybook.grammar import (
    capitalise,
    definite,
    indefinite,
    is_plural,
    kind_of,
    medium_of,
    pronouns_of,
)
from training.storybook.sentences import Pattern, load_sentences

__all__ = ["PLACES", "Plan", "Scene", "narrate"]

PLACES: tuple[str, ...] = (
    "meadow", "forest", "beach", "sea", "mountains", "snow", "desert", "street",
    "room", "kitchen", "garden", "night sky", "sky", "river", "farm", "plain",
)  # fmt: skip
"""The backgrounds of a page; "plain" is none."""

_MOST_WORDS, _FEWEST_WORDS, _MOST_SENTENCES = 60, 25, 4
_CLASSIC, _CLASSIC_SHARE = "once upon a time,", 0.6
_VILLAGE_PLACES = frozenset(["street", "garden", "farm"])
_HERO_NAMED = {"being": 0.4, "vehicle": 0.25}
_T = TypeVar("_T")


@dataclass(frozen=True)
class Scene:
    """What one page's picture shows.

    Args:
        things: 1 to 3, the main thing first.
        place: one of `PLACES`.
    """

    things: tuple[Concept, ...]
    place: str


@dataclass(frozen=True)
class Plan:
    """The pages of a story in order, 1 to 12. The hero is the main thing of the first, and in most of the others."""

    scenes: tuple[Scene, ...]


def narrate(plan: Plan, rng: np.random.Generator) -> list[str]:
    """The captions of a story, one a page; the same plan and the same state of `rng` give the same text."""
    return narrate_chapters([plan], rng)


def narrate_chapters(chapters: Sequence[Plan], rng: np.random.Generator) -> list[str]:
    """The captions of a story that goes on chapter after chapter, one a page; as `narrate` where there is one chapter.

    The hero is that of the first chapter, keeps name and looks, and lives through another plot in each.
    """
    telling, captions = _Telling(chapters[0], rng), list[str]()
    for number, chapter in enumerate(chapters):
        if number:
            telling.begin_chapter(chapter)
        captions += [telling.caption(index) for index in range(len(chapter.scenes))]
    return captions


class _Page:
    """A caption in the making."""

    def __init__(self, scene: Scene, hero: Concept, *, first: bool, last: bool) -> None:
        self.scene, self.first, self.last = scene, first, last
        self.has_hero = hero in scene.things
        self.focus = hero if self.has_hero else scene.things[0]
        self.others = [thing for thing in scene.things if thing != self.focus]
        self.sentences: list[str] = []

    @property
    def words(self) -> int:
        return sum(len(sentence.split()) for sentence in self.sentences)

    @property
    def full(self) -> bool:
        return len(self.sentences) >= _MOST_SENTENCES

    def room(self) -> int:
        """Words that the next sentence may have, when each thing that isn't mentioned yet and the plot get as many."""
        left = max(1, 2 + len(self.others) - len(self.sentences))
        return (_MOST_WORDS - self.words) // left


class _Telling:
    """One story: who is in it, and what has been said."""

    def __init__(self, plan: Plan, rng: np.random.Generator) -> None:
        self.plan, self.rng, self.lines = plan, rng, load_sentences()
        self.hero = plan.scenes[0].things[0]
        self.kind = kind_of(self.hero)
        self.acts = self.kind in ("being", "vehicle")
        self.pronouns = pronouns_of(self.hero)
        self.adjective = self._adjective(self.hero, 0.75)
        self.given_name = self._given_name()  # "" for none
        self.plots: list[str] = []
        self.plot = self._plot()
        self.helper = self._line("words", "helpers")
        self.helper_known = False
        self.begun = False  # whether this is a later chapter than the first
        self.place = ""  # of the page before
        self.met: set[str] = set()
        self.visited: set[str] = set()
        self.used: set[str] = set()

    def begin_chapter(self, plan: Plan) -> None:
        """The same hero, who knows the things and places of the chapters before; another plot and helper."""
        self.plan, self.plot, self.begun = plan, self._plot(), True
        self.helper, self.helper_known = self._line("words", "helpers"), False

    def caption(self, index: int) -> str:
        """The text of one page. Pages are asked for in order."""
        scenes = self.plan.scenes
        page = _Page(scenes[index], self.hero, first=index == 0 and not self.begun, last=index == len(scenes) - 1)
        self._say(page, self._opening(page), page.focus)
        self.place = page.scene.place
        self.visited.add(self.place)
        for thing in page.others:
            self._say(page, self._meeting(thing, page), thing)
        if page.last and (len(page.sentences) < 2 if page.first else page.words < _FEWEST_WORDS // 2):
            self._say(page, [self._moods(page)])  # before the end, not behind it
        for candidates in self._plot_lines(index, page):
            self._say(page, [candidates])
        while page.words < _FEWEST_WORDS and not page.full:
            self._say(page, [self._moods(page)])
        return " ".join(page.sentences)

    def _opening(self, page: _Page) -> list[Sequence[Pattern]]:
        if page.first:
            return [self.lines["beginnings"][self.kind]]
        if not page.has_hero:
            section = "being" if kind_of(page.focus) == "being" else "object"
            return [self.lines["elsewhere"][section + (" again" if page.focus.name in self.met else "")]]
        section = f"vehicle {medium_of(self.hero)}" if self.kind == "vehicle" else self.kind
        arrivals = self.lines["arrivals"]
        if self.place == page.scene.place:
            return [arrivals["acting here" if self.acts else "still here"], arrivals[section]]
        return [arrivals[section]]

    def _meeting(self, thing: Concept, page: _Page) -> list[Sequence[Pattern]]:
        source, kind = self.lines["again" if thing.name in self.met else "meetings"], kind_of(thing)
        acting_hero = page.has_hero and self.kind == "being"
        if kind == "being" and page.has_hero:
            return [source["being" if self.acts else "being to still"]]
        if kind == "being":
            return [source.get("being together", source["being to still"])]
        section = source.get(kind) or source["object"]
        return [[line for line in section if acting_hero or not line.mentions_hero]]

    def _plot_lines(self, index: int, page: _Page) -> list[Sequence[Pattern]]:
        plot, pages = self.plot, len(self.plan.scenes)
        if pages == 1:
            return [self.lines["endings"]["acting" if self.acts else "still"]]
        if index == 0:
            return [plot["wish"]]
        if page.last:
            return [plot["turn"], plot["end"]] if pages == 2 and len(page.sentences) < 3 else [plot["end"]]
        if not page.has_hero:
            return [self.lines["elsewhere"]["news"]]
        if index == pages - 2:
            return [plot["turn"]]
        if len(page.sentences) >= 3 and pages > 6 and self.rng.random() < 0.5:
            return []
        return [plot["try"]] if self._fresh(plot["try"]) else [self._moods(page)]

    def _moods(self, page: _Page) -> Sequence[Pattern]:
        moods = self.lines["moods"]
        own = moods["acting" if self.acts else "still"] if page.has_hero else ()
        return [*own, *moods["any"]]

    def _say(self, page: _Page, choices: list[Sequence[Pattern]], thing: Concept | None = None) -> None:
        """Adds a sentence from the first of `choices` that has something new to say."""
        fresh = next((left for left in map(self._fresh, choices) if left), None) or list(choices[-1])
        short = [pattern for pattern in fresh if pattern.length <= page.room()]
        pattern = self._one_of(short or sorted(fresh, key=lambda pattern: pattern.length)[:2])
        self.used.add(pattern.text)
        page.sentences.append(capitalise(pattern.fill(self._values(pattern, page, thing or self.hero))))
        if thing is not None:
            self.met.add(thing.name)

    def _fresh(self, patterns: Sequence[Pattern]) -> list[Pattern]:
        """The patterns that fit the hero and weren't used in this story."""
        unfit = set()
        if self.hero.article not in ("a", "an", "some") and not is_plural(self.hero):
            unfit.add("there_was")  # "there was the sun"
        if self.pronouns is None:
            unfit.add("his")  # "the doctor made the doctor's way"
        return [pattern for pattern in patterns if pattern.text not in self.used and not pattern.slots & unfit]

    def _values(self, pattern: Pattern, page: _Page, thing: Concept) -> dict[str, str]:
        """The words for each slot of `pattern`."""
        return {slot: self._value(slot, page, thing) for slot in sorted(pattern.slots)}

    def _value(self, slot: str, page: _Page, thing: Concept) -> str:
        place = page.scene.place
        match slot:
            case "ever" | "day":
                return self._first_words(slot, place)
            case "then":
                return self._next_words(page)
            case "at" | "to":
                again = " again" if place in self.visited else ""
                return self._line("places", f"{place}{again} {slot}")
            case "place":
                return self._line("places", place)
            case "a_thing":
                return indefinite(thing, self._adjective(thing, 0.3 if kind_of(thing) == "being" else 0.0))
            case "the_thing":
                return definite(thing)
            case "thing_was":
                return "were" if is_plural(thing) else "was"
            case "child":
                known, self.helper_known = self.helper_known, True
                return f"the {self.helper.split()[-1]}" if known else f"a {self.helper}"
        return self._hero_value(slot)

    def _hero_value(self, slot: str) -> str:
        the_hero = definite(self.hero, self.adjective if self.rng.random() < 0.4 else "")
        was = "were" if is_plural(self.hero) else "was"
        match slot:
            case "was":
                return was
            case "there_was":
                return f"there {was}"
            case "new_hero":
                called = f" {self._one_of(['named', 'called'])} {self.given_name}" if self.given_name else ""
                return indefinite(self.hero, self.adjective) + called
            case "the_hero":
                return the_hero
            case "name":
                return self.given_name or the_hero
        if self.pronouns is None:
            return self.given_name
        return str(getattr(self.pronouns, slot))

    def _first_words(self, slot: str, place: str) -> str:
        if self.rng.random() < _CLASSIC_SHARE:
            return _CLASSIC
        sections = ["ever"] if slot == "ever" else ["night" if place == "night sky" else "day"]
        if place in _VILLAGE_PLACES and slot == "ever":
            sections.append("village")
        openings = [line.text for section in sections for line in self.lines["openings"][section]]
        return self._one_of(openings)

    def _next_words(self, page: _Page) -> str:
        sections = ["any", "night" if page.scene.place == "night sky" else "morning"]
        if page.last:
            sections = ["last"]
        lines = [line for section in sections for line in self.lines["transitions"][section]]
        line = self._one_of(self._fresh(lines) or lines)
        self.used.add(line.text)
        return line.text

    def _line(self, file: str, section: str) -> str:
        return self._one_of(self.lines[file][section]).text

    def _plot(self) -> dict[str, Sequence[Pattern]]:
        fitting = [
            file
            for file, plot in self.lines.items()
            if file.startswith("plot_") and self.kind in plot["heroes"][0].text.split()
        ]
        chosen = self._one_of([file for file in fitting if file not in self.plots] or fitting)
        self.plots.append(chosen)
        return dict(self.lines[chosen])

    def _given_name(self) -> str:
        """A name for the hero, now and then; always for a person who would have no pronoun either."""
        share = _HERO_NAMED.get(self.kind, 0.0)
        if self.pronouns is not None and (self.rng.random() >= share or self.hero.article not in ("a", "an")):
            return ""
        return self._line("words", f"names {self.pronouns.he}" if self.pronouns else "names")

    def _adjective(self, concept: Concept, share: float) -> str:
        if concept.article not in ("a", "an") or self.rng.random() >= share:
            return ""
        adjectives = self.lines["words"][f"adjectives {kind_of(concept)}"]
        return self._one_of([line.text for line in adjectives if line.text not in concept.name.split()])

    def _one_of(self, choices: Sequence[_T]) -> _T:
        return choices[int(self.rng.integers(len(choices)))]
