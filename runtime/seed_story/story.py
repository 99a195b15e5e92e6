"""A story session: pictures and text in, streamed text out, in memory that doesn't grow with the story."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seed_story.backends import open_graph
from seed_story.backends.base import Array
from seed_story.bundle import TOKENIZER, Bundle, graph_file
from seed_story.config import CacheConfig
from seed_story.contract import BEGIN_PICTURE, DECODER, END_PICTURE, QFORMER, VIT
from seed_story.decoder import Decoder
from seed_story.errors import BundleError, PictureError, PromptError, UsageError
from seed_story.image import Picture, load_and_preprocess_image
from seed_story.packed import packed_weights
from seed_story.sampling import Sampler, SamplingConfig
from seed_story.stop import StopMatcher
from seed_story.tokenizer import StoryTokenizer
from seed_story.vision import Vision

Pixels = npt.NDArray[np.float32]
Beginning = str | Pixels | Path | Sequence["str | Pixels | Path"]
"""What `SEEDStory(...)` takes: text (str), a picture (pixels, or a Path to one), or several of them in order."""

DEFAULT_MAX_TOKENS = 256
_MOST_THREADS = 4  # more rarely helps a decoder that is bound by memory


def default_threads() -> int:
    """CPU threads of one graph call: the CPUs this process may use, at most four."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_THREADS, allowed)


@dataclass
class StoryStats:
    """What a session has done so far. Times are wall clock.

    Args:
        prompt_tokens: slots that pictures and given text took, control tokens included.
        tokens: tokens told.
        steps: calls of the decoder with one token.
        picture_ms, prefill_ms, decode_ms: spent on pictures, on reading the prompt, and on telling.
        time_to_first_token_ms: pictures, reading, and the first choice, without pauses between the calls.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    picture_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    time_to_first_token_ms: float | None = None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Single steps a second, with sampling and all else that a token costs; None before there is one."""
        return self.steps / self.decode_ms * 1e3 if self.steps else None


class SEEDStory:
    """A story model, loaded from a bundle. One story at a time uses its memory; `begin` starts the next.

    Args:
        bundle: the bundle's folder, or an opened `Bundle`; by default see `Bundle.open`.
        threads: CPU threads of a call; by default all CPUs up to four.
        backend: the inference engine, one of `seed_story.backends.BACKENDS`.

    Raises:
        BundleError: the bundle is missing, damaged, or of another version.
        BackendError: the engine is missing or refuses the graphs.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str] | Bundle | None = None,
        *,
        threads: int | None = None,
        backend: str = "litert",
    ) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        self.threads = default_threads() if threads is None else threads
        if self.threads < 1:
            raise UsageError("threads is impossible", got=threads, expected="1 or more")
        manifest = self.bundle.manifest
        self.tokenizer = StoryTokenizer(self.bundle.file(TOKENIZER))
        self._end_ids = frozenset(map(self._special_id, manifest.prompt.end_tokens))
        self._picture_ids = [self._special_id(name) for name in (BEGIN_PICTURE, END_PICTURE)]
        file = graph_file(DECODER)
        with packed_weights(manifest.files[file][0]) as packed:
            graph = open_graph(self.bundle.file(file), backend=backend, threads=self.threads, packed=packed)
        self.decoder = Decoder(graph, manifest.story.llama, manifest.cache, manifest.prefill_sizes)
        paths = (self.bundle.file(graph_file(VIT)), self.bundle.file(graph_file(QFORMER)))
        self.vision = Vision(paths, manifest.story, backend=backend, threads=self.threads)
        self._story: Story | None = None

    def _special_id(self, name: str) -> int:
        found, promised = self.tokenizer.token_id(name), self.bundle.manifest.special_tokens.get(name)
        if found != promised:
            raise BundleError(f"the tokenizer has {name} elsewhere", got=found, expected=promised)
        return found

    @property
    def cache(self) -> CacheConfig:
        """The geometry of the cache, as the bundle has it."""
        return self.bundle.manifest.cache

    def begin(
        self, *, seed: int = 0, sampling: SamplingConfig | None = None, policy: str | CacheConfig | None = None
    ) -> Story:
        """Starts a story; the one before it ends.

        Args:
            seed: the same seed, pictures and text give the same story on the same machine.
            sampling: how tokens are chosen; by default `SamplingConfig()`.
            policy: what the cache keeps when it is full: a name of `seed_story.config.POLICIES`, or a geometry of as
                many slots, such as `model.cache.under("multimodal-sink", picture_eviction="first-and-last")`; by
                default the bundle's.

        Raises:
            ConfigError: there is no such policy, or this model's pictures don't fit it.
            UsageError: a geometry of another number of slots.
        """
        cache = self.cache.under(policy) if isinstance(policy, str) else policy or self.cache
        cache.check_picture(self.bundle.manifest.story.picture_tokens)
        self.decoder.cache.reset(cache)
        if self._story is not None:
            self._story.ended = True
        config = sampling or SamplingConfig()
        vocab_size = self.bundle.manifest.story.llama.vocab_size
        beyond = range(self.tokenizer.vocab_size, vocab_size)
        suppressed = (self.tokenizer.control_ids | set(beyond)) - self._end_ids
        self._story = Story(self, Sampler(config, seed, vocab_size, suppressed))
        return self._story

    def __call__(
        self,
        beginning: Beginning,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
    ) -> str:
        """Tells a story at once.

        Args:
            beginning: pictures and text in the order in which they stand in the story, for example
                `(load_and_preprocess_image("example.jpg"), "Once upon a time,")`.

        Returns:
            The text of the beginning and its continuation.
        """
        story = self.begin(seed=seed, sampling=sampling)
        parts = [beginning] if isinstance(beginning, (str, Path, np.ndarray)) else beginning
        for part in parts:
            story.add_text(part) if isinstance(part, str) else story.add_picture(part)
        return story.given + "".join(story.tell(max_tokens=max_tokens))

    def close(self) -> None:
        """Frees the graphs; the model can't be used afterwards."""
        self.decoder.close()
        self.vision.close()

    def __enter__(self) -> SEEDStory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Story:
    """One story under way; made by `SEEDStory.begin`.

    Attributes:
        given: the text that was added so far.
        told: the text that the model told so far.
        finished: whether the model came to an end by itself, or to a stop string, at the last `tell`.
        ended: whether another story took the model's memory.
        stats: counts and times.
    """

    def __init__(self, model: SEEDStory, sampler: Sampler) -> None:
        self._model, self._sampler = model, sampler
        self.given, self.told = "", ""
        self.finished = self.ended = False
        self.stats = StoryStats()
        self._pending: list[Array] = []
        self._pictures: list[range] = []  # which rows of what is pending
        self._requested = False
        self._stream, self._stop = model.tokenizer.stream(), StopMatcher(sampler.config.stop)
        self._add_template(model.bundle.manifest.prompt.opening)

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
        self.told += self._stop.flush()  # what an early leave held back; half a character is never shown
        self._stream = self._model.tokenizer.stream()
        for token_id in ids:
            self._sampler.accept(token_id)
        self.given += text
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
                self.told += piece
                yield piece
            if self.finished:
                return
        rest = ""
        if self.finished:  # else the next tell() may bring what a character lacks
            rest, _ = self._stop.push(self._stream.flush())
            self._stream = self._model.tokenizer.stream()
        if rest := rest + self._stop.flush():
            self.told += rest
            yield rest

    def _tokens(self, max_tokens: int) -> Iterator[int]:
        """Samples tokens; the last one is left pending, so that the next call reads it first."""
        for _ in range(max_tokens):
            self._check_open()
            started = time.perf_counter()
            embeddings = np.concatenate(self._pending) if len(self._pending) > 1 else self._pending[0]
            token_id = self._sampler.sample(self._model.decoder.feed(embeddings, self._pictures))
            self._pending, self._pictures = [self._model.decoder.embed([token_id])], []
            self.finished = token_id in self._model._end_ids
            if not self.finished:
                self._sampler.accept(token_id)
                self.stats.tokens += 1
            self._count(1e3 * (time.perf_counter() - started), rows=len(embeddings))
            if self.finished:
                return
            yield token_id

    def _count(self, spent_ms: float, rows: int) -> None:
        stats = self.stats
        if rows == 1:
            stats.decode_ms += spent_ms
            stats.steps += 1
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
