"""Stories on disk, in the format of StoryStream (SEED-Story, arXiv 2407.08683), and as token sequences.

A file is JSONL, a story a line (upstream `StoryStream/README.md`): `id`, `images` (paths below one folder),
`captions` (one a picture) and `orders`. A published story has up to 30 pages; the paper trains on pieces of ten.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from seed_story.bundle import Prompt
from seed_story.contract import BEGIN_PICTURE, END_PICTURE
from seed_story.errors import PictureError, UsageError
from seed_story.tokenizer import StoryTokenizer

Ids = npt.NDArray[np.int32]
Shown = Literal["all", "first", "none"]
"""Which of a story's pictures the model sees."""

PAGES = 10
"""Pages of a chunk, as in the paper."""

PICTURE = -1
"""`model.story_model.PICTURE`, said again so that reading data needs no Keras."""

IGNORE = -100
"""The label of a position at which nothing is learned."""

TRAIN_FILE = "train.jsonl"
"""The stories of a data set that are learned from."""

_NAMED = 10  # missing pictures that an error names


@dataclass(frozen=True)
class Page:
    """A picture, what is told about it, and its place in the story (pages ascend by `order`)."""

    picture: Path
    caption: str
    order: int


@dataclass(frozen=True)
class StoryRecord:
    """A story, or a chunk of one: one page at least; `complete` if its last page ends the story."""

    id: str
    pages: tuple[Page, ...]
    complete: bool = True


@dataclass(frozen=True)
class Example:
    """A story as the decoder reads it.

    Args:
        ids: int32 `[t]`; `PICTURE` in each of the places of a picture.
        labels: int32 `[t]`; the token that should follow each position, `IGNORE` where nothing is learned.
        pictures: in the order of their places.
    """

    ids: Ids
    labels: Ids
    pictures: tuple[Path, ...]


def training_file(data: Path) -> Path:
    """A data set's stories to learn from; raises UsageError if there are none."""
    file = data / TRAIN_FILE
    if not file.is_file():
        raise UsageError("there is no data set", got=str(file), expected=f"{TRAIN_FILE} in StoryStream's form",
                         hint="`python -m training.storybook build` makes one.")  # fmt: skip
    return file


def read_stories(file: Path, pictures: Path | None = None) -> list[StoryRecord]:
    r"""Reads StoryStream's JSONL: the published stories, and the chunks that upstream trains on.

    `orders` may be absent, because upstream's `StoryStream/chunk_data.py` drops it; pages then stand as they are
    listed. Where it is there, pages are sorted by it (upstream writes 0, 1, 2 ... and never reads it). Several
    lines may share an `id`, as the chunks of one story do; other keys are ignored, blank lines skipped, and
    `\` in a path separates folders. Whether the pictures exist, `check_pictures` says.

    Args:
        pictures: the folder that the paths of `images` are relative to; by default the file's own.

    Raises:
        UsageError: the file can't be read or has no story, or a line isn't a story: no JSON object, a field
            missing or of another type, lists of different lengths, an order twice, an empty caption.
    """
    folder = file.parent if pictures is None else pictures
    try:
        with file.open(encoding="utf-8") as lines:
            numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} can't be read", got=error, expected="a JSONL file in UTF-8") from error
    if not numbered:
        raise UsageError(f"{file} has no story", expected="a JSON object on each line")
    return [_story(line, f"{file}, line {number}", folder) for number, line in numbered]


def _story(line: str, where: str, folder: Path) -> StoryRecord:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} isn't JSON", got=error, expected="a JSON object") from error
    if not isinstance(values, dict):
        raise UsageError(f"{where} isn't a story", got=type(values).__name__, expected="a JSON object")
    missing = [key for key in ("id", "images", "captions") if key not in values]
    if missing:
        raise UsageError(f"{where} lacks {' and '.join(missing)}", got=f"the keys {sorted(values)}",
                         expected="id, images, captions (and orders)")  # fmt: skip
    if type(values["id"]) not in (int, str):
        raise UsageError(f"{where}: the id has another type", got=repr(values["id"]), expected="an int or a string")
    images, captions = _list(values, "images", str, where), _list(values, "captions", str, where)
    orders = _list(values, "orders", int, where) if "orders" in values else list(range(len(images)))
    counts = {"images": len(images), "captions": len(captions), "orders": len(orders)}
    if len(set(counts.values())) > 1 or not images:
        got = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise UsageError(f"{where}: the lists don't agree", got=got, expected="as many of each, at least one")
    if len(set(orders)) < len(orders):
        raise UsageError(f"{where}: an order stands twice", got=orders, expected="a different one for each page")
    pages = [
        Page(folder / image.replace("\\", "/"), caption.strip(), order)
        for image, caption, order in zip(images, captions, orders, strict=True)
    ]
    complete = values.get("complete", True)  # ours; every published story ends
    if not isinstance(complete, bool):
        raise UsageError(f"{where}: complete has another type", got=repr(complete), expected="true or false")
    return StoryRecord(str(values["id"]), tuple(sorted(pages, key=lambda page: page.order)), complete)


def _list(values: dict[str, Any], key: str, kind: type, where: str) -> list[Any]:
    """A list of numbers, or of strings that aren't blank."""
    found = values[key]
    if not isinstance(found, list):
        raise UsageError(
            f"{where}: {key} isn't a list", got=type(found).__name__, expected=f"a list of {kind.__name__}"
        )
    for at, item in enumerate(found):
        if type(item) is not kind or (isinstance(item, str) and not item.strip()):
            expected = "an int" if kind is int else "a string that isn't blank"
            raise UsageError(f"{where}: {key}[{at}] is wrong", got=repr(item), expected=expected)
    return found


def check_pictures(stories: Iterable[StoryRecord]) -> None:
    """Raises PictureError, with the first ten names, unless every story's pictures are files."""
    missing = [path for path in dict.fromkeys(_pictures(stories)) if not path.is_file()]
    if missing:
        names = ", ".join(map(str, missing[:_NAMED])) + (" ..." if len(missing) > _NAMED else "")
        raise PictureError(f"{len(missing)} pictures are missing", got=names, expected="a file for each",
                           hint="Give the folder that the paths are relative to; StoryStream itself lacks a few "
                           "pictures: leave their chunks out with complete_stories().")  # fmt: skip


def complete_stories(stories: Iterable[StoryRecord]) -> list[StoryRecord]:
    """Those whose pictures are all there.

    Chunk first: upstream leaves out a chunk with a picture that it can't open, not the whole story
    (`decode_long_story_data` in `src/data/story_telling.py`).
    """
    return [story for story in stories if all(page.picture.is_file() for page in story.pages)]


def _pictures(stories: Iterable[StoryRecord]) -> Iterator[Path]:
    return (page.picture for story in stories for page in story.pages)


def chunks(story: StoryRecord, pages: int = PAGES) -> list[StoryRecord]:
    """A story in pieces of so many consecutive pages; the last may be shorter, and 23 pages give 10, 10 and 3.

    Upstream (`StoryStream/chunk_data.py`) cuts at the same pages, but throws a short last piece away.

    Returns:
        The story itself if it is short enough, else pieces with the ids `ID.0`, `ID.1` ...

    Raises:
        UsageError: `pages` is below 1.
    """
    if pages < 1:
        raise UsageError("a chunk has too few pages", got=pages, expected="1 or more")
    if len(story.pages) <= pages:
        return [story]
    total = len(story.pages)
    return [
        StoryRecord(f"{story.id}.{n}", story.pages[start : start + pages], story.complete and start + pages >= total)
        for n, start in enumerate(range(0, total, pages))
    ]


class StoryEncoder:
    r"""Stories to exactly the sequences that `seed_story.story.Story` feeds the decoder.

    The prompt's opening, the first picture, the request, the first caption; then page after page. A page whose
    picture is shown is the picture, a line break and the caption; one whose picture isn't, a space and the
    caption. Then the first of the prompt's end tokens, if it has any. Captions and the end token are learned;
    the template and the pictures' tokens, which a model never chooses, are not.

    Args:
        tokenizer: with the picture tokens; a `tokenizers.Tokenizer` is taken over and changed.
        num_queries: places that a picture takes between its two tokens.

    Raises:
        BundleError: the tokenizer lacks a picture token or the end token.
    """

    def __init__(self, tokenizer: StoryTokenizer | Tokenizer, prompt: Prompt, num_queries: int) -> None:
        self.tokenizer = tokenizer if isinstance(tokenizer, StoryTokenizer) else StoryTokenizer(tokenizer)
        begin, end = (self.tokenizer.token_id(name) for name in (BEGIN_PICTURE, END_PICTURE))
        self._picture = [begin, *[PICTURE] * num_queries, end]
        self._opening, self._request = map(self.tokenizer.encode_template, (prompt.opening, prompt.request))
        self._end = [self.tokenizer.token_id(name) for name in prompt.end_tokens[:1]]

    def encode(self, story: StoryRecord, pictures: Shown = "all", *, beginning: str = "", ends: bool = True) -> Example:
        """A story as one sequence.

        Args:
            pictures: which are shown. Where all are, nothing is learned of what follows a caption but the last:
                mix them with "first", or the model never learns to go on by itself.
            beginning: what the reader gives of the first caption. It is encoded alone, as the runtime does, and
                isn't learned.
            ends: whether the end token may follow; it does after a complete story.

        Raises:
            UsageError: the first caption doesn't begin with `beginning`, or another `pictures`.
            PromptError: a caption that can't be encoded.
        """
        shown = story.pages[: _count_shown(pictures, len(story.pages))]
        parts = [(self._opening, False), (self._picture if shown else [], False), (self._request, False)]
        for number, text in enumerate(_texts(story, len(shown))):
            given = self._given(story, beginning) if number == 0 else ""
            parts += [(self._picture, False)] if number else []
            parts += [(self.tokenizer.encode(given), False), (self._after(given, text), True)]
        parts.append((self._end if ends and story.complete else [], True))
        return _example(parts, tuple(page.picture for page in shown))

    def encode_within(
        self, story: StoryRecord, length: int, pictures: Shown = "all", *, beginning: str = "", ends: bool = True
    ) -> Example:
        """As many of a story's first pages as fit in `length` tokens; without the end token unless all do.

        The other arguments are `encode`'s.

        Raises:
            UsageError: not even the first page fits; or as `encode`.
            PromptError: a caption that can't be encoded.
        """
        total = len(story.pages)
        for count in range(total, 0, -1):
            part = replace(story, pages=story.pages[:count])
            example = self.encode(part, pictures, beginning=beginning, ends=ends and count == total)
            if len(example.ids) <= length:
                return example
        raise UsageError(f"the first page of story {story.id} is too long", got=f"{len(example.ids)} tokens",
                         expected=f"at most {length}")  # fmt: skip

    def _given(self, story: StoryRecord, beginning: str) -> str:
        if not story.pages[0].caption.startswith(beginning):
            raise UsageError(f"story {story.id} begins in another way", got=repr(story.pages[0].caption[:80]),
                             expected=f"{beginning!r} first")  # fmt: skip
        return beginning

    def _after(self, given: str, text: str) -> list[int]:
        """The tokens that `text` brings after `given`, whose own tokens stay as they are."""
        head, whole = self.tokenizer.encode(given), self.tokenizer.encode(text)
        # SentencePiece puts a space before a text: what follows must not get a second one.
        return whole[len(head) :] if whole[: len(head)] == head else self.tokenizer.encode(text[len(given) :])


def text_encoders(
    tokenizer: StoryTokenizer | Tokenizer, prompt: Prompt, num_queries: int
) -> tuple[StoryEncoder, StoryEncoder]:
    """For a model whose pictures say nothing: of stories that begin as books do, and of those that the prompt asks for.

    Half of the stories belong to each: what a text begins with is what all its other tokens look at.
    """
    told, asked = (StoryEncoder(tokenizer, words, num_queries) for words in (Prompt("", "", ()), prompt))
    return told, asked


def _count_shown(pictures: Shown, pages: int) -> int:
    counts = {"all": pages, "first": 1, "none": 0}
    if pictures not in counts:
        raise UsageError("pictures is unknown", got=repr(pictures), expected=" or ".join(counts))
    return counts[pictures]


def _texts(story: StoryRecord, shown: int) -> list[str]:
    """What is told between the pictures: one text for each that is shown, and one where none is."""
    captions = [page.caption for page in story.pages]
    told = max(shown, 1) - 1  # pages whose text ends before the last picture
    texts = [*captions[:told], " ".join(captions[told:])]
    return [texts[0], *(f"\n{text}" for text in texts[1:])]


def _example(parts: Sequence[tuple[Sequence[int], bool]], pictures: tuple[Path, ...]) -> Example:
    """Joins token sequences; True beside one says that it is learned."""
    ids = np.array([token for tokens, _ in parts for token in tokens], np.int32)
    learned = np.array([choice for tokens, choice in parts for _ in tokens], bool)
    labels = np.full(len(ids), IGNORE, np.int32)
    labels[:-1] = np.where(learned[1:], ids[1:], IGNORE)
    return Example(ids, labels, pictures)
