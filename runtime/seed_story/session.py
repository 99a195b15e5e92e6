"""One story under way: pictures and text in, streamed text out, in memory that doesn't grow with the story."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from seed_story.backends.base import Array
from seed_story.drafts import PromptLookup
from seed_story.errors import PictureError, PromptError, UsageError
from seed_story.image import Picture, load_and_preprocess_image
from seed_story.sampling import Sampler
from seed_story.snapshot import State, write_snapshot
from seed_story.stats import StoryStats
from seed_story.stop import StopMatcher

if TYPE_CHECKING:
    from seed_story.story import SEEDStory

Pixels = npt.NDArray[np.float32]

DEFAULT_MAX_TOKENS = 256
DEFAULT_PAGE_TOKENS = 80
PAGES_KEPT = 2
"""Pages that a story can go back to: the beginning of each is kept, with all that the cache held."""

_SENTENCE_ENDS = (".", "!", "?", '."', '!"', '?"', ".\u201d", "!\u201d", "?\u201d")


class Story:
    """One story under way; made by `SEEDStory.begin`, `SEEDStory.restore` and `fork`.

    Attributes:
        page: how many pages were begun.
        finished: whether the model came to an end by itself, or to a stop string, at the last `tell`.
        ended: whether another story took the model's memory.
        stats: counts and times.
    """

    def __init__(self, model: SEEDStory, sampler: Sampler, lookup: PromptLookup | None = None) -> None:
        self._model, self._sampler, self._lookup = model, sampler, lookup
        # UTF-8: a str would be copied as a whole for every piece that comes, and a story may have no end.
        self._given, self._told, self.page = bytearray(), bytearray(), 0
        self.finished = self.ended = False
        self.stats = StoryStats()
        self._pending: list[Array] = []
        self._pictures: list[range] = []  # which rows of what is pending
        self._requested = False
        self._stream, self._stop = model.tokenizer.stream(), StopMatcher(sampler.config.stop)
        self._marks: dict[int, State] = {}  # how the newest pages began, by number
        self._put_away: State | None = None  # what the cache held, while another story has it
        self._add_template(model.bundle.manifest.prompt.opening)

    @property
    def given(self) -> str:
        """The text that was added so far."""
        return self._given.decode()

    @property
    def told(self) -> str:
        """The text that the model told so far."""
        return self._told.decode()

    def add_picture(self, picture: Picture | Pixels) -> Story:
        """Shows the model a picture, at this place of the story.

        Args:
            picture: what `load_and_preprocess_image` gives or takes.

        Raises:
            PictureError: it can't be read, or has another shape.
        """
        self._check_open()
        started = time.perf_counter()
        pixels = self._pixels(picture)
        begin, end = self._model._picture_ids
        embeddings = self._model.vision.embeddings(pixels)
        first = sum(map(len, self._pending))
        self._pictures.append(range(first, first + len(embeddings) + 2))
        self._add_ids([begin])
        self._pending.append(embeddings)
        self.stats.prompt_tokens += len(embeddings)
        self._add_ids([end])
        self.stats.picture_ms += 1e3 * (time.perf_counter() - started)
        return self

    def _pixels(self, picture: Picture | Pixels) -> Pixels:
        size = self._model.bundle.manifest.story.vision.image_size
        if isinstance(picture, np.ndarray) and picture.dtype != np.uint8:
            found, expected = (picture.dtype.name, *picture.shape), ("float32", 1, size, size, 3)
            if found != expected:
                raise PictureError(
                    "the pixels have another form",
                    got=found,
                    expected=expected,
                    hint="Use load_and_preprocess_image().",
                )
            return np.asarray(picture, np.float32)
        return load_and_preprocess_image(picture, size)  # type: ignore[arg-type]

    def add_text(self, text: str) -> Story:
        """Gives the model text to continue. What looks like a control token in it is plain text.

        Raises:
            PromptError: the text is empty, or can't be encoded.
        """
        self._check_open()
        ids = self._model.tokenizer.encode(text)
        if not ids:
            raise PromptError("the text is empty", got=repr(text), expected="some words, such as 'Once upon a time,'")
        self._request()
        self._told += self._stop.flush().encode()  # what an early leave held back; half a character is never shown
        self._stream = self._model.tokenizer.stream()
        for token_id in ids:
            self._accept(token_id)
        self._given += text.encode()
        self._add_ids(ids)
        return self

    def tell(self, *, max_tokens: int = DEFAULT_MAX_TOKENS) -> Iterator[str]:
        """Continues the story, piece by piece; a piece is never half a character.

        It may be called again, and pictures and text may be added in between. Leaving the loop early is fine.

        Args:
            max_tokens: at most so many tokens.

        Raises:
            UsageError: `max_tokens` is below 1, or another story took the model's memory.
        """
        self._check_open()
        if max_tokens < 1:
            raise UsageError("max_tokens is impossible", got=max_tokens, expected="1 or more")
        self._request()
        return self._tell(max_tokens)

    def _tell(self, max_tokens: int) -> Iterator[str]:
        self.finished = False
        if self._stop.matched is not None:
            self._stop = StopMatcher(self._sampler.config.stop)
        for token_id in self._tokens(max_tokens):
            piece, self.finished = self._stop.push(self._stream.push(token_id))
            if piece:
                self._told += piece.encode()
                yield piece
            if self.finished:
                return
        rest = ""
        if self.finished:  # else the next tell() may bring what a character lacks
            rest, _ = self._stop.push(self._stream.flush())
            self._stream = self._model.tokenizer.stream()
        if rest := rest + self._stop.flush():
            self._told += rest.encode()
            yield rest

    def _tokens(self, max_tokens: int) -> Iterator[int]:
        """Samples tokens; the last one is left pending, so that the next call reads it first."""
        for _ in range(max_tokens):
            self._check_open()
            self._model.activate(self)
            started = time.perf_counter()
            embeddings = np.concatenate(self._pending) if len(self._pending) > 1 else self._pending[0]
            runs_before = self._model.decoder.runs
            logits = self._model.decoder.feed(embeddings, self._pictures, self._guess if self._lookup else None)
            token_id = self._sampler.sample(logits)
            self._pending, self._pictures = [self._model.decoder.embed([token_id])], []
            self.finished = token_id in self._model._end_ids
            if not self.finished:
                self._accept(token_id)
                self.stats.tokens += 1
            ran = self._model.decoder.runs > runs_before
            self._count(1e3 * (time.perf_counter() - started), len(embeddings), ran=ran)
            if self.finished:
                return
            yield token_id

    def _accept(self, token_id: int) -> None:
        self._sampler.accept(token_id)
        if self._lookup:
            self._lookup.accept(token_id)

    def _guess(self, most: int) -> list[int]:
        """Guesses are tested by the draw itself, so they change neither the choice nor the random numbers it takes."""
        assert self._lookup
        ids = self._lookup.guess(most)
        self.stats.guessed += len(ids)
        return ids

    def tell_pages(self, pages: int, page_tokens: int = DEFAULT_PAGE_TOKENS) -> Iterator[str]:
        """Tells page by page, until the story comes to its end by itself.

        Args:
            pages: at most so many.
            page_tokens: a page ends with the first sentence that ends after so many tokens, or without one after
                twice as many.

        Raises:
            UsageError: an impossible number of pages or tokens, or another story took the model's memory.
        """
        self._check_open()
        for name, count in (("pages", pages), ("page_tokens", page_tokens)):
            if count < 1:
                raise UsageError(f"{name} is impossible", got=count, expected="1 or more")
        return self._tell_pages(pages, page_tokens)

    def _tell_pages(self, pages: int, page_tokens: int) -> Iterator[str]:
        text, last = "" if self.page else self.given, self.page + pages
        while self.page < last:
            self.turn_page()
            before = self.stats.tokens
            for piece in self.tell(max_tokens=2 * page_tokens):
                text += piece
                if self.stats.tokens - before >= page_tokens and text.rstrip().endswith(_SENTENCE_ENDS):
                    break
            yield text
            if self.finished:
                return
            text = ""

    def turn_page(self) -> Story:
        """Begins a page: `rewind` can go back to here, for the newest `PAGES_KEPT` pages."""
        self._check_open()
        self._marks[self.page + 1] = self.state()
        if len(self._marks) > PAGES_KEPT:
            del self._marks[min(self._marks)]
        self.page += 1
        return self

    def rewind(self, page: int, *, seed: int | None = None) -> Story:
        """Goes back to where a page began: what was told and shown since then is forgotten, and it can be told anew.

        Within `tell_pages` it is the next page that comes.

        Args:
            page: its number, from 1.
            seed: for another continuation; by default the same tokens come again.

        Raises:
            UsageError: a page that isn't kept any more, or never began.
        """
        self._check_open()
        if page not in self._marks:
            raise UsageError("the story can't go back to this page", got=page, expected=sorted(self._marks) or "a page",
                             hint=f"The newest {PAGES_KEPT} pages are kept.")  # fmt: skip
        self._model.activate(self)
        self._restore(self._marks[page])
        self._model.decoder.restore(self.take_out())
        self._marks = {number: mark for number, mark in self._marks.items() if number <= page}
        if seed is not None:
            self._sampler.reseed(seed)
        return self

    def fork(self, *, seed: int | None = None) -> Story:
        """A second story that goes on from here on its own; both may be told, in turns, until the next `begin`.

        It takes as much memory as the used part of the cache; each change of turns copies that.

        Args:
            seed: for another continuation; by default both tell the same.
        """
        self._check_open()
        other = Story.from_state(self._model, self.state())
        if seed is not None:
            other._sampler.reseed(seed)
        self._model.add_fork(other)
        return other

    def snapshot(self, path: str | os.PathLike[str]) -> None:
        """Writes the story to a file, as a whole or not at all; `SEEDStory.restore` goes on with it.

        Raises:
            SnapshotError: the file can't be written; an older one is still there.
            UsageError: another story took the model's memory.
        """
        self._check_open()
        write_snapshot(path, self.state(), self._model.identity)

    def state(self) -> State:
        """A copy of all that decides how the story goes on, the cache included."""
        self._model.activate(self)
        cache = self._model.decoder.cache.state()
        values = {
            "given": self.given,
            "told": self.told,
            "page": self.page,
            "finished": self.finished,
            "requested": self._requested,
            "stats": asdict(self.stats),
            "sampler": self._sampler.state(),
            "stream": self._stream.state(),
            "stop": self._stop.state(),
            "lookup": self._lookup.history if self._lookup else None,
            "pictures": [[rows.start, rows.stop] for rows in self._pictures],
            "cache": cache.values,
        }
        nothing = self._model.decoder.embed([])
        return State(values, {"pending": np.concatenate([nothing, *self._pending]), **cache.arrays})

    @classmethod
    def from_state(cls, model: SEEDStory, state: State) -> Story:
        """A story that goes on from a `state`, once it is given the cache."""
        story = cls(model, Sampler.restore(state.values["sampler"]))
        story._restore(state)
        return story

    def _restore(self, state: State) -> None:
        values = state.values
        arrays = dict(state.arrays)
        self._sampler = Sampler.restore(values["sampler"])
        self._given, self._told = (bytearray(values[name].encode()) for name in ("given", "told"))
        self.page = values["page"]
        self.finished, self._requested = values["finished"], values["requested"]
        self.stats = StoryStats(**values["stats"])
        self._stream = self._model.tokenizer.stream()
        self._stream.restore(values["stream"])
        self._stop = StopMatcher(self._sampler.config.stop)
        self._stop.restore(values["stop"])
        self._pending = [arrays.pop("pending")]
        self._pictures = [range(*rows) for rows in values["pictures"]]
        history = values.get("lookup")  # a snapshot from before there was one has none
        self._lookup = PromptLookup(history) if history is not None else None
        self.put_away(State(values["cache"], arrays))

    def put_away(self, cache: State) -> None:
        """Keeps what the cache held until this story has it again."""
        self._put_away = cache

    def take_out(self) -> State:
        """What the cache shall hold for this story."""
        assert self._put_away is not None
        cache, self._put_away = self._put_away, None
        return cache

    def _count(self, spent_ms: float, rows: int, *, ran: bool) -> None:
        stats = self.stats
        if rows == 1:
            stats.decode_ms += spent_ms
            stats.steps += 1
            stats.guessed_right += not ran
        else:
            stats.prefill_ms += spent_ms
        if stats.time_to_first_token_ms is None:
            stats.time_to_first_token_ms = stats.picture_ms + spent_ms

    def _request(self) -> None:
        """Asks for the story, once: after the pictures that come first, before the first text."""
        if not self._requested:
            self._add_template(self._model.bundle.manifest.prompt.request)
        self._requested = True

    def _add_template(self, text: str) -> None:
        self._add_ids(self._model.tokenizer.encode_template(text))

    def _add_ids(self, ids: Sequence[int]) -> None:
        if ids:
            self._pending.append(self._model.decoder.embed(ids))
            self.stats.prompt_tokens += len(ids)

    def _check_open(self) -> None:
        if self.ended:
            raise UsageError("this story has ended: another one took the model's memory",
                             hint="Tell it before you begin the next, or load a second SEEDStory.")  # fmt: skip
