"""Stories that the decoder itself writes to the training pictures, told in words what they show; filtered.

A small model writes few usable stories and many loops, so that each picture gets several attempts, and
`training.storybook.filters` chooses. The teacher must be the plain decoder: one that learned from the data set would
teach its own patterns back to it.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from seed_story.bundle import Bundle, Prompt, graph_file
from seed_story.contract import DECODER
from seed_story.errors import SeedStoryError, UsageError
from seed_story.sampling import SamplingConfig
from seed_story.story import SEEDStory
from training.data import read_stories, training_file
from training.errors import TrainingError
from training.evaluation.items import story_seed, subset
from training.names import read_labels
from training.storybook.concepts import Concept, load_concepts
from training.storybook.filters import broken_rule, whole_sentences
from training.storybook.grammar import is_plural

TAUGHT, PARTIAL = "taught.jsonl", ".taught.partial.jsonl"
SAMPLING = SamplingConfig(temperature=0.7, min_p=0.05, repetition_penalty=1.15)
"""What loops least with SmolLM2-135M; the runtime's default may change without this."""
MAX_TOKENS = 180  # about 150 words: a draft that goes on is cut, not too long
_EXPORT = "`python -m export --checkpoint none --out build/teacher` makes a teacher."


@dataclass(frozen=True)
class Draft:
    """A text as it was written, its given beginning included; `ended` if its writer ended it by itself."""

    text: str
    ended: bool


class Teacher(Protocol):
    """Whoever writes. The same request, beginning and seed give the same draft."""

    @property
    def name(self) -> str:
        """What wrote, for the data set: model, recipe, hash and licence."""

    def write(self, request: str, beginning: str, seed: int) -> Draft:
        """A story that answers `request` and starts with `beginning`."""


@dataclass(frozen=True)
class PicturedPage:
    """A picture to write about.

    Args:
        image: its path, relative to the data's folder.
        things: what it shows, the main thing first.
        place: where.
    """

    image: str
    things: tuple[Concept, ...]
    place: str

    @property
    def request(self) -> str:
        """The task, in words: the teacher sees no picture."""
        *others, last = [thing.phrase for thing in self.things]
        shown = f"{', '.join(others)} and {last}" if others else last
        return f"Write a short story for children. The picture shows {shown}."

    @property
    def beginning(self) -> str:
        """The first words of the answer, which name the main thing: "Once upon a time, there was a fox"."""
        main = self.things[0]
        if is_plural(main):
            return f"Once upon a time, there were {main.phrase}"
        there_was = "there was " if main.article in ("a", "an", "some") else ""  # not "there was the sun"
        return f"Once upon a time, {there_was}{main.phrase}"


@dataclass(frozen=True)
class _Result:
    """What the attempts at a picture gave: the rules that they broke, and the text that broke none, if there is one."""

    image: str
    rejected: list[str] = field(default_factory=list)
    caption: str | None = None
    complete: bool = False


class BundleTeacher:
    """A bundle's decoder, asked in words."""

    def __init__(self, model: SEEDStory) -> None:
        self._model, self._bundle = model, model.bundle
        manifest = self._bundle.manifest
        sha256 = manifest.files[graph_file(DECODER)][0]
        self.name = f"{manifest.name}, {manifest.recipe}, sha256 {sha256[:12]}, {manifest.licences.get('decoder')}"

    def write(self, request: str, beginning: str, seed: int) -> Draft:
        """See `Teacher`."""
        manifest = self._bundle.manifest
        prompt = with_request(manifest.prompt, request)
        self._model.bundle = replace(self._bundle, manifest=replace(manifest, prompt=prompt))
        story = self._model.begin(seed=seed, sampling=SAMPLING).add_text(beginning)
        for _ in story.tell(max_tokens=MAX_TOKENS):
            pass
        return Draft(story.given + story.told, story.finished)


@contextmanager
def open_teacher(bundle: str | Path, *, threads: int | None = None) -> Iterator[BundleTeacher]:
    """Opens an exported bundle as a teacher.

    Raises:
        BundleError: there is none, or it is damaged.
        UsageError: its decoder may have learned from a data set, or follows no requests.
    """
    opened = Bundle.open(bundle)
    if opened.manifest.qformer_trained:
        raise UsageError("the teacher has learned from a data set", got=f"the bundle {bundle}",
                         expected="the plain decoder", hint=_EXPORT)  # fmt: skip
    with_request(opened.manifest.prompt, "Tell.")
    with SEEDStory(opened, threads=threads) as model:
        yield BundleTeacher(model)


def with_request(prompt: Prompt, request: str) -> Prompt:
    """A chat's prompt with another request in the place of its own, and no line for pictures before it.

    Raises:
        UsageError: the prompt isn't a chat's: no words before a control token.
    """
    words, token, rest = prompt.request.partition("<|")
    if not (words.strip() and token):
        raise UsageError("the teacher can't be asked", got=f"the prompt {prompt.request!r}",
                         expected="a decoder that is tuned for chat")  # fmt: skip
    return replace(prompt, request=request + token + rest)


def first_pages(data: Path, count: int, seed: int) -> list[PicturedPage]:
    """The first pages of at most `count` training stories, drawn by `seed`, as many of each main thing as there are.

    Raises:
        UsageError: there is no data set, its lines don't say what the pictures show, or one shows no concept of ours.
    """
    file = training_file(data)
    pictures = [story.pages[0].picture for story in read_stories(file)]
    labels, concepts = read_labels(file), {concept.name: concept for concept in load_concepts()}
    pages = []
    for picture in pictures:
        things, place = labels.get(picture, ((), ""))
        unknown = [name for name in things if name not in concepts]
        if unknown or not things:
            raise UsageError(f"{file} doesn't say what a picture shows", got=f"{unknown} for {picture.name}",
                             expected="`things` that are storybook concepts")  # fmt: skip
        image = picture.relative_to(data).as_posix()
        pages.append(PicturedPage(image, tuple(concepts[name] for name in things), place))
    return subset(pages, count, seed, key=lambda page: page.things[0].name)


def teach(teacher: Teacher, data: Path, pages: Sequence[PicturedPage], *, seed: int, attempts: int) -> dict[str, Any]:
    """Writes `data / TAUGHT`, a story of one page a line, in the order of `pages`; goes on where a run was stopped.

    A line has StoryStream's keys, the storybook's own (`complete`, `things`, `place`), and `teacher`.

    Args:
        attempts: at each picture; one without a usable text is left out.

    Returns:
        Counts: `pictures`, `stories`, `skipped`, `attempts`, and `rejected`, the attempts by the rule that they broke.

    Raises:
        UsageError: the file is there already, or the stopped run's settings were others.
        TrainingError: no text was usable.
    """
    out, partial = data / TAUGHT, data / PARTIAL
    if out.exists():
        raise UsageError("the taught stories are there already", got=out, hint="Remove the file to write them anew.")
    try:
        results = _resume(partial, {"teacher": teacher.name, "seed": seed, "attempts": attempts})
        with partial.open("a", encoding="utf-8") as file:
            for page in tqdm(pages, desc="teacher", unit="picture"):
                if page.image not in results:
                    results[page.image] = _attempt(teacher, page, seed, attempts)
                    file.write(json.dumps(asdict(results[page.image])) + "\n")
                    file.flush()
        told = [(page, results[page.image]) for page in pages]
        report = _report([result for _, result in told])
        _write(out, [_line(page, result, teacher.name) for page, result in told if result.caption is not None])
        partial.unlink()
    except OSError as error:
        raise SeedStoryError(f"{data} can't be written", got=error.strerror or error) from error
    return report


def _attempt(teacher: Teacher, page: PicturedPage, seed: int, attempts: int) -> _Result:
    """The first usable text. Its seeds depend on the picture alone, not on what was written before."""
    things, rejected = [thing.name for thing in page.things], list[str]()
    for attempt in range(attempts):
        draft = teacher.write(page.request, page.beginning, story_seed(seed, f"{page.image} {attempt}"))
        text = whole_sentences(draft.text, ended=draft.ended)
        reason = broken_rule(text, things)
        if reason is None:
            complete = draft.ended and text.strip() == draft.text.strip()
            return _Result(page.image, rejected, " ".join(text.split()), complete)
        rejected.append(reason)
    return _Result(page.image, rejected)


def _resume(partial: Path, settings: dict[str, Any]) -> dict[str, _Result]:
    """The results of a stopped run, by picture; cuts off a line that it was stopped in, and begins a new file."""
    lines = partial.read_text(encoding="utf-8").splitlines(keepends=True) if partial.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if not whole:
        partial.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return {}
    hint = f"Remove {partial} to begin anew."
    try:
        before, *values = map(json.loads, whole)
        results = {result.image: result for result in (_Result(**value) for value in values)}
    except (ValueError, TypeError) as error:
        raise UsageError("the stopped run's file is damaged", got=error, hint=hint) from error
    if before != settings:
        raise UsageError("the stopped run had other settings", got=settings, expected=before, hint=hint)
    os.truncate(partial, sum(len(line.encode()) for line in whole))
    return results


def _line(page: PicturedPage, result: _Result, teacher: str) -> dict[str, Any]:
    return {
        "images": [page.image],
        "captions": [result.caption],
        "orders": [0],
        "complete": result.complete,
        "things": [[thing.name for thing in page.things]],
        "place": [page.place],
        "teacher": teacher,
    }


def _write(out: Path, lines: Sequence[dict[str, Any]]) -> None:
    """All or nothing: to a hidden name beside the file, then renamed."""
    part = out.with_name(f".{out.name}.part")
    text = "".join(json.dumps({"id": f"taught-{n:05d}"} | line) + "\n" for n, line in enumerate(lines))
    part.write_text(text, encoding="utf-8")
    part.replace(out)


def _report(results: Sequence[_Result]) -> dict[str, Any]:
    rejected = Counter(reason for result in results for reason in result.rejected)
    stories = sum(result.caption is not None for result in results)
    if not stories:
        raise TrainingError("the teacher wrote no usable story", got=f"rejected for {dict(rejected)}",
                            expected="at least one", hint=_EXPORT)  # fmt: skip
    return {
        "pictures": len(results),
        "stories": stories,
        "skipped": len(results) - stories,
        "attempts": stories + rejected.total(),
        "rejected": dict(rejected.most_common()),
    }
