"""How a story goes on when it has outgrown the cache, under several caches of the same memory.

Two things are measured, story by story and page by page:

- Held-out pages, given all the pages before (teacher-forced; `training.evaluation.perplexity` says which tokens count).
  Each is read three times: as it is; with another story's picture in the place of its own; and in a story that began
  with another story's first picture. How much the loss rises is how much the page still draws on that picture.
- Pages that the model tells itself, to the pictures of a story, the first of them given "Once upon a time,".

Only a few pages of a story are scored, those that end at the lengths asked for; the others are read in chunks, which
takes a fraction of the time. What the readings say, `training.evaluation.length_report` tells.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from seed_story.bundle import graph_file
from seed_story.config import CacheConfig
from seed_story.contract import DECODER
from seed_story.errors import ConfigError, UsageError
from seed_story.policies import MULTIMODAL_SINK
from seed_story.story import SEEDStory
from training.data import Example, StoryRecord, check_pictures
from training.evaluation.grounding import BEGINNING
from training.evaluation.items import story_seed
from training.evaluation.naming import names
from training.evaluation.perplexity import Floats, Laid, Look, encoder_of, feed_rows, lay_out, looker, losses_in

DENSE = "dense"
PAGE_TOKENS = 30
"""Told on a page at least, up to the end of the sentence; twice as many at most."""

Things = Mapping[Path, tuple[str, ...]]
"""What pictures show, the main thing first."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Args:
        lengths: pages of a story after which it is looked at.
        span: so many pages up to each length are scored.
        stories: at most; None for all.
        told: of so many stories, the model tells one of its own to their pictures.
    """

    lengths: tuple[int, ...] = (10, 20, 30, 50)
    span: int = 2
    stories: int | None = None
    told: int = 3
    seed: int = 0

    def settings(self, model: SEEDStory) -> dict[str, Any]:
        """What two runs must agree in to go into one file; more caches and stories may be added."""
        sha256 = model.bundle.manifest.files[graph_file(DECODER)][0]
        return {"lengths": list(self.lengths), "span": self.span, "seed": self.seed, "decoder_sha256": sha256}


@dataclass(frozen=True)
class Cache:
    """One cache to compare: its name, and the model that runs with it."""

    name: str
    model: SEEDStory
    config: CacheConfig


@dataclass(frozen=True)
class PageScore:
    """Losses of a held-out page, nats, summed over its tokens.

    Args:
        page: from 1 on.
        loss: as the page is; `other_own`, `other_first` with another story's picture in the place of its own, and of
            the story's first.
    """

    page: int
    tokens: int
    loss: float
    other_own: float
    other_first: float


@dataclass(frozen=True)
class PageTold:
    """A page that the model told, and whether it names the main thing of its own picture and of the first.

    None where the data doesn't say what pictures show.
    """

    page: int
    text: str
    names_own: bool | None
    names_first: bool | None


@dataclass(frozen=True)
class Reading:
    """One held-out story that was read under one cache, or one that was told to its pictures."""

    cache: str
    story: str
    scores: tuple[PageScore, ...] = ()
    told: tuple[PageTold, ...] = ()

    def to_json(self) -> str:
        """A line for `read_readings`."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, line: str) -> Reading:
        """The inverse of `to_json`."""
        values: dict[str, Any] = json.loads(line)
        scores = tuple(PageScore(**score) for score in values["scores"])
        return cls(values["cache"], values["story"], scores, tuple(PageTold(**page) for page in values["told"]))


def measure(
    caches: Sequence[Cache],
    stories: Sequence[StoryRecord],
    plan: Plan,
    things: Things,
    file: Path,
) -> list[Reading]:
    """Reads and tells every story under every cache; goes on where a run was stopped.

    Args:
        things: what pictures show; may be empty.
        file: where the readings are kept, a line each.

    Returns:
        Those of these caches and stories: an earlier run into the same file may have read others.

    Raises:
        UsageError: a story is too short or shares pictures with the next; or the stopped run's settings were others.
        PictureError: a picture is missing or can't be read.
    """
    count, pages = plan.stories or len(stories), scored_pages(plan.lengths, plan.span)
    check_stories(stories, pages[-1])
    done = read_readings(file, plan.settings(caches[0].model))
    looks = {id(cache.model): looker(cache.model) for cache in caches}
    known = {(one.cache, one.story, bool(one.told)) for one in done}
    turns = [
        (story, told) for told, most in ((False, count), (True, plan.told)) for story in range(len(stories))[:most]
    ]
    with file.open("a", encoding="utf-8") as lines:
        for index, told in tqdm(turns, desc="length", unit="story"):
            story, other = stories[index], stories[(index + 1) % len(stories)]
            for cache in caches:
                if (cache.name, story.id, told) in known:
                    continue
                if told:
                    reading = Reading(cache.name, story.id, told=tell(cache, story, pages[-1], things, plan.seed))
                else:
                    scores = score(cache, story, other, pages, looks[id(cache.model)])
                    reading = Reading(cache.name, story.id, scores)
                done.append(reading)
                lines.write(reading.to_json())
                lines.flush()
    asked = {(cache.name, stories[index].id, told) for index, told in turns for cache in caches}
    return [one for one in done if (one.cache, one.story, bool(one.told)) in asked]


def check_stories(stories: Sequence[StoryRecord], pages: int) -> None:
    """Raises UsageError unless all have so many pages and no picture of the next one's, PictureError without files."""
    for story, other in zip(stories, [*stories[1:], stories[0]], strict=True):
        if len(story.pages) < pages:
            raise UsageError(f"story {story.id} is too short", got=f"{len(story.pages)} pages", expected=f"{pages}",
                             hint="`python -m training.storybook long` makes them; or give other --pages.")  # fmt: skip
        if {page.picture for page in story.pages} & {page.picture for page in other.pages}:
            raise UsageError(f"story {story.id} has no pictures to swap", got=f"those of {other.id}",
                             expected="two stories at least, with other pictures in each")  # fmt: skip
    check_pictures(stories)


def cache_of(model: SEEDStory, spec: str) -> Cache:
    """A cache of as many slots as the bundle's, from `POLICY[:BEGIN+END[:EVICTION]]`.

    For example `window`, `multimodal-sink`, `multimodal-sink:5+1:first-and-last`; what isn't said is the default.

    Raises:
        UsageError: no such policy, or a geometry that isn't possible.
    """
    policy, *rest = spec.split(":")
    changes: dict[str, Any] = {}
    try:
        if rest:
            begin, end = map(int, rest[0].split("+"))
            anchors = model.cache.usual_anchors(begin, end)
            changes = {"picture_begin": begin, "picture_end": end, "anchors": anchors}
        if rest[1:]:
            (changes["picture_eviction"],) = rest[1:]
        config = model.cache.under(policy, **changes)
        config.check_picture(model.bundle.manifest.story.picture_tokens)
    except (ValueError, ConfigError) as error:
        raise UsageError("a cache isn't possible", got=f"{spec!r}: {error}",
                         expected=f"POLICY or {MULTIMODAL_SINK}:BEGIN+END:EVICTION") from error  # fmt: skip
    return Cache(spec, model, config)


def dense_cache(model: SEEDStory, stories: Sequence[StoryRecord], pages: int) -> Cache:
    """A cache that no story outgrows, of a bundle that was exported with more slots.

    Raises:
        UsageError: one does.
    """
    encoder = encoder_of(model)
    longest = max(len(encoder.encode(story, ends=False).ids) for story in stories)
    told = pages * (2 * PAGE_TOKENS + model.bundle.manifest.story.picture_tokens + 1) + len(encoder.encode(
        replace(stories[0], pages=stories[0].pages[:1]), ends=False).ids)  # fmt: skip
    need = max(longest, told)
    if need > model.cache.slots:
        raise UsageError("the dense bundle's cache is too small", got=f"{model.cache.slots} slots",
                         expected=f"{need}", hint=f"Export it with --slots {need}, or more.")  # fmt: skip
    return Cache(DENSE, model, model.cache)


def scored_pages(lengths: Iterable[int], span: int) -> list[int]:
    """The pages, from 1 on, that are scored: the last `span` of each length."""
    return sorted({page for length in lengths for page in range(max(1, length - span + 1), length + 1)})


def page_rows(laid: Laid, example: Example) -> list[range]:
    """The rows of each page, its picture included; the prompt is the first page's."""
    starts = [0, *(picture.start for picture in laid.pictures[1:])]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], len(example.ids)], strict=True)]


def score(
    cache: Cache, story: StoryRecord, other: StoryRecord, pages: Sequence[int], look: Look
) -> tuple[PageScore, ...]:
    """Reads a held-out story and scores some `pages`, ascending from 1 on; the wrong pictures are those of `other`."""
    model, cut = cache.model, replace(story, pages=story.pages[: pages[-1]])
    example = encoder_of(model).encode(cut, ends=False)
    mine = [look(page.picture) for page in cut.pages]
    theirs = [look(page.picture) for page in other.pages[: pages[-1]]]
    right = lay_out(model, example, mine)
    swapped = lay_out(model, example, theirs)
    begun = lay_out(model, example, [theirs[0], *mine[1:]])
    rows = page_rows(right, example)
    first = {page: losses[0] for page, losses in _read(cache, begun, rows, pages)}
    return tuple(
        PageScore(page, len(losses), float(losses.sum()), float(other_own.sum()), float(first[page].sum()))
        for page, (losses, other_own) in _read(cache, right, rows, pages, instead=swapped)
    )


def _read(
    cache: Cache, laid: Laid, rows: Sequence[range], pages: Sequence[int], instead: Laid | None = None
) -> Iterator[tuple[int, list[Floats]]]:
    """Each scored page's losses; and those of `instead`, read from the same place, if there is one."""
    model = cache.model
    model.begin(policy=cache.config)
    for page, mine in enumerate(rows, 1):
        if page not in pages:
            feed_rows(model, laid, mine)
            continue
        other = []
        if instead is not None:
            state = model.decoder.cache.state()
            other.append(losses_in(model, instead, mine))
            model.decoder.restore(state)
        yield page, [losses_in(model, laid, mine), *other]


def tell(cache: Cache, story: StoryRecord, pages: int, things: Things, seed: int) -> tuple[PageTold, ...]:
    """Lets the model tell a story to the pictures of another, a page to each."""
    pictures = [page.picture for page in story.pages[:pages]]
    model, told = cache.model, list[PageTold]()
    telling = model.begin(seed=story_seed(seed, story.id), policy=cache.config)
    for number, picture in enumerate(pictures, 1):
        telling.add_picture(picture).add_text(BEGINNING if number == 1 else "\n")
        text = "".join(telling.tell_pages(1, PAGE_TOKENS))
        named = [names(text, things[of][:1]) if of in things else None for of in (picture, pictures[0])]
        told.append(PageTold(number, text, *named))
    return tuple(told)


def read_readings(file: Path, settings: Mapping[str, Any]) -> list[Reading]:
    """The readings of a stopped run, or of none; begins the file where there is none.

    Raises:
        UsageError: its settings were others, or it is no such file.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    if not lines:
        file.write_text(json.dumps(dict(settings)) + "\n", encoding="utf-8")
        return []
    hint = f"Remove {file} to begin anew."
    try:
        before, readings = json.loads(lines[0]), [Reading.from_json(line) for line in lines[1:]]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError("the stopped run's file is damaged", got=error, hint=hint) from error
    if before != settings:
        raise UsageError("the stopped run had other settings", got=dict(settings), expected=before, hint=hint)
    return readings
