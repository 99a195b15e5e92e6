"""A story model, loaded from a bundle: it begins stories, restores them, and holds the memory that they use."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from seed_story.backends import open_graph
from seed_story.bundle import TOKENIZER, Bundle, graph_file
from seed_story.config import CacheConfig
from seed_story.contract import BEGIN_PICTURE, DECODER, END_PICTURE, QFORMER, VIT
from seed_story.decoder import Decoder
from seed_story.drafts import PromptLookup, pays
from seed_story.errors import BundleError, ConfigError, UsageError
from seed_story.image import Picture
from seed_story.packed import packed_weights
from seed_story.sampling import Sampler, SamplingConfig
from seed_story.session import DEFAULT_MAX_TOKENS, DEFAULT_PAGE_TOKENS, Pixels, Story
from seed_story.snapshot import read_snapshot
from seed_story.stats import StoryStats
from seed_story.threads import default_threads
from seed_story.tokenizer import StoryTokenizer
from seed_story.vision import Vision

__all__ = ["DEFAULT_MAX_TOKENS", "Beginning", "Pixels", "SEEDStory", "Story", "StoryStats"]

Beginning = str | Pixels | Path | Sequence["str | Pixels | Path"]
"""What `SEEDStory(...)` takes: text (str), a picture (pixels, or a Path to one), or several of them in order."""


class SEEDStory:
    """A story model. One story and its forks use its memory, in turns; `begin` starts the next.

    Args:
        bundle: the bundle's folder, or an opened `Bundle`; by default see `Bundle.open`.
        threads: CPU threads of a call; by default see `default_threads`.
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
        self.decoder = Decoder(
            graph,
            manifest.story.llama,
            manifest.cache,
            manifest.steps,
            manifest.sink_rows,
        )
        vit, qformer = graph_file(VIT), graph_file(QFORMER)
        self.vision = Vision(
            (self.bundle.file(vit), self.bundle.file(qformer)),
            manifest.story,
            backend=backend,
            threads=self.threads,
            sha256=(manifest.files[vit][0], manifest.files[qformer][0]),
        )
        self._story: Story | None = None  # whose the cache is now
        self._stories: weakref.WeakSet[Story] = weakref.WeakSet()  # it and its forks

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
        self,
        *,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        policy: str | CacheConfig | None = None,
        speculate: bool | None = None,
    ) -> Story:
        """Starts a story; the one before it ends.

        Args:
            seed: the same seed, pictures and text give the same story on the same machine.
            sampling: how tokens are chosen; by default `SamplingConfig()`.
            policy: what the cache keeps when it is full: a name of `seed_story.policies.POLICIES`, or a geometry of as
                many slots, such as `model.cache.under("multimodal-sink", picture_eviction="first-and-last")`; by
                default the bundle's.
            speculate: whether to guess what comes, and let one run of the decoder test several guesses
                (`seed_story.drafts`). It changes the time that a story takes, and no choice. By default where it pays
                (`seed_story.drafts.pays`: when greedy, not by default sampling) and the bundle has a `verify_K`.

        Raises:
            ConfigError: there is no such policy, or this model's pictures or the bundle's graphs don't fit it; or it
                has no `verify_K` to speculate with.
            UsageError: a geometry of another number of slots.
        """
        cache = self.cache.under(policy) if isinstance(policy, str) else policy or self.cache
        cache.check_picture(self.bundle.manifest.story.picture_tokens)
        self.decoder.reset(cache)
        self._end_all()
        config = sampling or SamplingConfig()
        lookup = PromptLookup() if self._speculates(speculate, config) else None
        vocab_size = self.bundle.manifest.story.llama.vocab_size
        beyond = range(self.tokenizer.vocab_size, vocab_size)
        suppressed = (self.tokenizer.control_ids | set(beyond)) - self._end_ids
        self._story = Story(self, Sampler(config, seed, vocab_size, suppressed), lookup)
        self._stories.add(self._story)
        return self._story

    def _speculates(self, wanted: bool | None, sampling: SamplingConfig) -> bool:
        able = bool(self.bundle.manifest.steps.verify)
        if wanted and not able:
            raise ConfigError("this bundle can't speculate", got="no signature 'verify_K'",
                              hint="Export the bundle again, with --verify 8.")  # fmt: skip
        return able and pays(sampling) if wanted is None else wanted

    def restore(self, path: str | os.PathLike[str]) -> Story:
        """Goes on with a story where `Story.snapshot` left it, to the same tokens; the one before it ends.

        Raises:
            SnapshotError: it is missing, damaged, of another version, or of another bundle.
        """
        story = Story.from_state(self, read_snapshot(path, self.identity))
        self._end_all()
        self._stories.add(story)
        self.activate(story)
        return story

    @property
    def identity(self) -> dict[str, str]:
        """What a snapshot's bundle must agree in: the sha256 of the decoder and of the tokenizer."""
        return {name: self.bundle.manifest.files[name][0] for name in (graph_file(DECODER), TOKENIZER)}

    def activate(self, story: Story) -> None:
        """Gives a story the cache. The one that has it keeps a copy of what is in it for its next turn."""
        if self._story is story:
            return
        if self._story is not None and not self._story.ended:
            self._story.put_away(self.decoder.cache.state())
        self.decoder.restore(story.take_out())
        self._story = story

    def add_fork(self, story: Story) -> None:
        """Counts a story among those that share the memory until the next `begin`."""
        self._stories.add(story)

    def _end_all(self) -> None:
        for story in self._stories:
            story.ended = True
        self._stories.clear()

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

    def tell_pages(
        self,
        picture: Picture | Pixels,
        beginning: str,
        *,
        pages: int,
        page_tokens: int = DEFAULT_PAGE_TOKENS,
        seed: int = 0,
        sampling: SamplingConfig | None = None,
        policy: str | CacheConfig | None = None,
    ) -> Iterator[str]:
        """Tells a story of a picture page by page: `for page in model.tell_pages(picture, "Once", pages=25)`.

        Args:
            beginning: the first page begins with it.
            pages, page_tokens: see `Story.tell_pages`; the others are `begin`'s.

        Raises:
            UsageError: an impossible number of pages or tokens.
        """
        story = self.begin(seed=seed, sampling=sampling, policy=policy).add_picture(picture).add_text(beginning)
        return story.tell_pages(pages, page_tokens)

    def close(self) -> None:
        """Frees the graphs; the model can't be used afterwards."""
        self.decoder.close()
        self.vision.close()

    def __enter__(self) -> SEEDStory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
