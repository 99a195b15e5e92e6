"""Writes the data set: pictures, stories in StoryStream's form, the questions of the grounding test, and sources.

    pictures/            JPEG, 224 pixels square
    train.jsonl          stories of trained drawings; valid.jsonl: other stories of them, test.jsonl: of kept drawings
    cards.jsonl          flash cards, one picture a line, to recognize: an icon of a trained thing in a place, or a
                         trained drawing that was made to look like a photograph
    names.json           by name, the other words for it: synonyms, and the next more general word
    grounding.jsonl      one picture a line, with the words that count as naming its main thing
    sources.json         every drawing's package, version, licence and credit

A story's line has StoryStream's `id`, `images`, `captions` and `orders`; whether its last page ends it (`complete`);
and for each page what its picture shows: `things` (the main one first) and `place`.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from seed_story.errors import UsageError
from training.storybook.concepts import Concept, load_concepts
from training.storybook.drawings import Drawing, render_drawings
from training.storybook.narrator import PLACES, Plan, Scene, narrate, narrate_chapters
from training.storybook.packages import ICONS, PACKAGES
from training.storybook.photograph import photograph
from training.storybook.scene import coloured, compose
from training.storybook.splits import Splits, split_drawings, trained_icons

Rng = np.random.Generator

_STORIES = {"valid": 60, "test": 60}
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10)
_LENGTH_SHARES = (0.52, 0.08, 0.08, 0.08, 0.08, 0.08, 0.05, 0.03)
_HERO_STAYS = 0.75
_BEGUN_PAGES = 6


@dataclass(frozen=True)
class Size:
    """How large a data set is; the splits that aren't for training don't grow.

    Args:
        stories: for training.
        icons: at most so many flash cards of icons.
        photographs: flash cards of drawings that were made to look like photographs.
    """

    stories: int
    icons: int
    photographs: int


SIZES = {"tiny": Size(40, 40, 40), "small": Size(800, 800, 800), "full": Size(3000, 10_000, 6500)}


class _Deck:
    """Draws concepts in shuffled rounds, so that each comes up equally often."""

    def __init__(self, names: Sequence[str], rng: Rng) -> None:
        self._names, self._rng, self._left = list(names), rng, list[str]()

    def draw(self, without: Sequence[str] = (), wanted: Callable[[str], bool] = lambda _: True) -> str:
        for _ in range(2):
            for index, name in enumerate(self._left):
                if name not in without and wanted(name):
                    return self._left.pop(index)
            self._left += [self._names[i] for i in self._rng.permutation(len(self._names))]
        return next(name for name in self._left if name not in without)


def build(out: Path, size: str = "full", *, seed: int = 0) -> dict[str, int]:
    """Writes the data set into the new folder `out`; gives how many lines each file has.

    Args:
        size: a key of `SIZES`.
        seed: the same seed gives the same data set, to the byte, with the same versions of Pillow and NumPy.

    Raises:
        UsageError: `out` is there already, or there is no such size.
        DownloadError: a package can't be had.
    """
    if size not in SIZES:
        raise UsageError("there is no such size", got=size, expected=" or ".join(SIZES))
    with _new_folder(out) as part:
        concepts = load_concepts()
        drawings, icons = render_drawings(concepts), render_drawings(concepts, ICONS)
        splits = split_drawings(concepts, drawings)
        writer = _Writer(part, {c.name: c for c in concepts})
        counts = {}
        for number, (name, stories) in enumerate({"train": SIZES[size].stories, **_STORIES}.items()):
            pool = splits.picture if name == "test" else splits.train
            lines = writer.stories(name, pool, stories, [seed, number])
            counts[name] = _write_lines(part / f"{name}.jsonl", tqdm(lines, total=stories, desc=name, unit="story"))
        lines = itertools.chain(
            writer.icons(trained_icons(icons, splits), SIZES[size].icons, np.random.default_rng([seed, 8])),
            writer.photographs(splits.train, SIZES[size].photographs, np.random.default_rng([seed, 7])),
        )
        counts["cards"] = _write_lines(part / "cards.jsonl", tqdm(lines, desc="cards", unit="card"))
        also = {concept.name: concept.also for concept in concepts if concept.also}
        (part / "names.json").write_text(json.dumps(also, indent=1), encoding="utf-8")
        questions = tqdm(writer.questions(splits, np.random.default_rng([seed, 9])), desc="grounding", unit="picture")
        counts["grounding"] = _write_lines(part / "grounding.jsonl", questions)
        (part / "sources.json").write_text(json.dumps(_sources([*drawings, *icons]), indent=1), encoding="utf-8")
    return counts


def build_long(out: Path, stories: int, pages: int, *, seed: int = 0) -> int:
    """Writes `stories` long stories of kept drawings into the new folder `out`, as `test.jsonl`; gives their number.

    A hero and a friend recur in chapters of at most ten pages, each with a plot of its own. The sentence patterns are
    those of the training stories; drawings and scenes are not.

    Raises:
        UsageError: `out` is there already.
        DownloadError: a package can't be had.
    """
    with _new_folder(out) as part:
        concepts = load_concepts()
        drawings = render_drawings(concepts)
        pool = split_drawings(concepts, drawings).picture
        lines = _Writer(part, {c.name: c for c in concepts}).long_stories(
            pool, stories, pages, [seed, len(_STORIES) + 1]
        )
        count = _write_lines(part / "test.jsonl", tqdm(lines, total=stories, desc="long", unit="story"))
        (part / "sources.json").write_text(json.dumps(_sources(drawings), indent=1), encoding="utf-8")
    return count


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out`, pictures and all, when nothing was raised.

    Raises:
        UsageError: `out` is there already.
    """
    if out.exists():
        raise UsageError("the data set's folder is there already", got=out, hint="Remove it, or choose another --out.")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "pictures").mkdir(parents=True)
    yield part
    part.replace(out)


def _write_lines(path: Path, lines: Iterator[Mapping[str, Any]]) -> int:
    with path.open("w", encoding="utf-8") as file:
        return sum(1 for line in lines if file.write(json.dumps(line) + "\n"))


class _Writer:
    """Draws and tells."""

    def __init__(self, folder: Path, concepts: Mapping[str, Concept]) -> None:
        self._folder, self._concepts = folder, concepts

    def stories(
        self, split: str, pool: Mapping[str, list[Drawing]], count: int, seed: Sequence[int]
    ) -> Iterator[Mapping[str, Any]]:
        rng = np.random.default_rng(seed)
        heroes, others = _Deck(list(pool), rng), _Deck(list(pool), rng)
        for number in range(count):
            told = self._plan(heroes, others, rng)
            # One page begins a longer story: a model that ends after every page tells no stories.
            complete = len(told.scenes) > 1
            plan = told if complete else Plan(told.scenes * _BEGUN_PAGES)
            words = np.random.default_rng([*seed, number])  # its own, so that new words change no picture
            captions = narrate(plan, words)[: len(told.scenes)]
            yield self._line(f"{split}-{number:05d}", told.scenes, captions, pool, rng, complete=complete)

    def long_stories(
        self, pool: Mapping[str, list[Drawing]], count: int, pages: int, seed: Sequence[int]
    ) -> Iterator[Mapping[str, Any]]:
        """Stories of chapters about one hero, each as long as the longest story of the other files."""
        rng = np.random.default_rng(seed)
        heroes, others = _Deck(list(pool), rng), _Deck(list(pool), rng)
        for number in range(count):
            hero = heroes.draw()
            friend = others.draw((hero,))
            lengths = [min(max(_LENGTHS), pages - begun) for begun in range(0, pages, max(_LENGTHS))]
            chapters = [Plan(self._scenes(hero, friend, length, others, rng)) for length in lengths]
            captions = narrate_chapters(chapters, np.random.default_rng([*seed, number]))
            scenes = [scene for chapter in chapters for scene in chapter.scenes]
            yield self._line(f"long-{number:05d}", scenes, captions, pool, rng, complete=True)

    def _line(
        self,
        name: str,
        scenes: Sequence[Scene],
        captions: list[str],
        pool: Mapping[str, list[Drawing]],
        rng: Rng,
        *,
        complete: bool,
    ) -> Mapping[str, Any]:
        """Draws a story's pictures, in which a thing keeps its drawing; gives its line."""
        cast = {name: _pick(pool[name], rng) for scene in scenes for name in (t.name for t in scene.things)}
        images = [self._draw(f"{name}-{page:02d}", [cast[t.name] for t in scene.things], scene.place, rng)
                  for page, scene in enumerate(scenes)]  # fmt: skip
        return {
            "id": name,
            "images": images,
            "captions": captions,
            "orders": list(range(len(images))),
            "complete": complete,
            "things": [[thing.name for thing in scene.things] for scene in scenes],
            "place": [scene.place for scene in scenes],
        }

    def icons(self, pool: Mapping[str, list[Drawing]], most: int, rng: Rng) -> Iterator[Mapping[str, Any]]:
        """A flash card for each icon, or for `most` of them."""
        icons = [icon for found in pool.values() for icon in found]
        for number, row in enumerate(rng.permutation(len(icons))[:most]):
            icon, place = icons[row], _place(rng)
            name = f"card-{number:05d}"
            yield self._card(name, icon.concept, self._draw(name, [icon], place, rng), place)

    def photographs(self, pool: Mapping[str, list[Drawing]], count: int, rng: Rng) -> Iterator[Mapping[str, Any]]:
        """`count` flash cards of drawings made to look like photographs, each drawing as often as any other."""
        drawings = [drawing for found in pool.values() for drawing in found]
        order = rng.permutation(len(drawings))
        for number in range(count):
            drawing, name = drawings[order[number % len(order)]], f"photograph-{number:05d}"
            yield self._card(name, drawing.concept, self._photograph(name, drawing, rng), "plain")

    def _card(self, name: str, concept: str, image: str, place: str) -> Mapping[str, Any]:
        """A line of StoryStream's form with a page of a few words."""
        return {
            "id": name,
            "images": [image],
            "captions": [f"This is {self._concepts[concept].phrase}."],
            "orders": [0],
            "things": [[concept]],
            "place": [place],
        }

    def questions(self, splits: Splits, rng: Rng) -> Iterator[Mapping[str, Any]]:
        """One picture for each kept concept and split; half of them with a smaller second thing beside it."""
        for split in ("picture", "style", "concept"):
            pool: Mapping[str, list[Drawing]] = getattr(splits, split)
            for name, drawings in pool.items():
                shown = [_pick(drawings, rng)]
                if rng.random() < 0.5:
                    other = list(pool)[int(rng.integers(len(pool)))]
                    shown += [_pick(pool[other], rng)] if other != name else []
                place = PLACES[int(rng.integers(len(PLACES)))]
                slug = f"{split}-{name.lower().replace(' ', '_')}"
                yield {
                    "id": slug,
                    "image": self._draw(f"grounding-{slug}", shown, place, rng),
                    "concept": name,
                    "accepted": list(self._concepts[name].accepted),
                    "split": split,
                    "group": self._concepts[name].group,
                    "style": shown[0].style,
                }

    def _plan(self, heroes: _Deck, others: _Deck, rng: Rng) -> Plan:
        hero = heroes.draw()
        friend = others.draw((hero,))
        return Plan(self._scenes(hero, friend, None, others, rng))

    def _scenes(self, hero: str, friend: str, pages: int | None, others: _Deck, rng: Rng) -> tuple[Scene, ...]:
        """What the pages show, of which the hero is on the first; None for any number of them."""
        scenes, place = [], _place(rng)
        for page in range(pages or int(rng.choice(_LENGTHS, p=_LENGTH_SHARES))):
            cast = [hero] if page == 0 or rng.random() < _HERO_STAYS else []
            while len(cast) < 1 + int(rng.choice(3, p=(0.45, 0.4, 0.15))):
                stays = friend not in cast and rng.random() < 0.3
                cast.append(friend if stays else others.draw(cast))
            if rng.random() < 0.4:
                place = _place(rng)
            scenes.append(Scene(tuple(self._concepts[name] for name in cast), place))
        return tuple(scenes)

    def _draw(self, name: str, shown: Sequence[Drawing], place: str, rng: Rng) -> str:
        picture = compose([coloured(d.open(), rng) if d.style in ICONS else d.open() for d in shown], place, rng)
        return self._save(name, picture, rng)

    def _photograph(self, name: str, shown: Drawing, rng: Rng) -> str:
        return self._save(name, photograph(shown.open(), rng), rng)

    def _save(self, name: str, picture: Image.Image, rng: Rng) -> str:
        file = f"pictures/{name}.jpg"
        picture.save(self._folder / file, quality=int(rng.integers(80, 96)))
        return file


def _place(rng: Rng) -> str:
    """A plain ground a third of the time."""
    return "plain" if rng.random() < 0.3 else PLACES[int(rng.integers(len(PLACES) - 1))]


def _pick(drawings: Sequence[Drawing], rng: Rng) -> Drawing:
    return drawings[int(rng.integers(len(drawings)))]


def _sources(drawings: Sequence[Drawing]) -> dict[str, Any]:
    packages = {
        style: {"package": p.name, "version": p.version, "registry": p.kind, "licence": p.licence, "credit": p.credit}
        for style, p in (PACKAGES | ICONS).items()
    }
    return {"packages": packages, "drawings": [[d.style, d.source, d.concept] for d in drawings]}
