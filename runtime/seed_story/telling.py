"""`seed-story tell`: a story to the terminal or into a program."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from seed_story import __version__
from seed_story.bundle import Bundle, Manifest
from seed_story.config import CacheConfig
from seed_story.errors import ConfigError, PromptError, UsageError
from seed_story.image import load_and_preprocess_image
from seed_story.measure import peak_rss_mib
from seed_story.output import INTERRUPTED, note, write, write_json
from seed_story.policies import MULTIMODAL_SINK
from seed_story.sampling import SamplingConfig
from seed_story.story import SEEDStory, Story


def sampling_config(*, greedy: bool, stop: Sequence[str], options: Mapping[str, float | None]) -> SamplingConfig:
    """The sampling that the command line asks for.

    Args:
        options: fields of `SamplingConfig`; None for its default.

    Raises:
        UsageError: a value out of range, or one that `greedy` leaves no room for.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if not greedy:
        return SamplingConfig(stop=tuple(stop), **given)
    ngram = given.pop("no_repeat_ngram", 0)
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"--greedy takes the best token always, so it can't go with {flags}",
                         hint="Leave one of them out.")  # fmt: skip
    return SamplingConfig.greedy(no_repeat_ngram=ngram, stop=tuple(stop))


def cache_config(cache: CacheConfig, policy: str | None, picture_eviction: str | None) -> CacheConfig:
    """The bundle's cache as the command line wants it.

    Raises:
        UsageError: a policy that remembers no pictures, with a picture eviction; or one that this cache can't follow.
    """
    changes = {"picture_eviction": picture_eviction} if picture_eviction else {}
    wanted = policy or cache.policy
    if changes and wanted != MULTIMODAL_SINK:
        raise UsageError("--picture-eviction needs pictures that are kept", got=f"the policy {wanted}",
                         expected=f"--policy {MULTIMODAL_SINK}")  # fmt: skip
    try:
        return cache.under(wanted, **changes) if policy or changes else cache
    except ConfigError as error:
        raise UsageError(f"--policy {wanted} doesn't fit this bundle's cache", got=error) from error


def prompt_from_stdin() -> str:
    """All of standard input, without the newline at its end.

    Raises:
        PromptError: it isn't UTF-8.
    """
    data = sys.stdin.buffer.read() if sys.stdin else b""
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise PromptError("standard input isn't text", got=error, expected="UTF-8") from error


def tell(
    *,
    bundle: str | None,
    images: Sequence[str],
    prompt: str,
    max_tokens: int,
    seed: int,
    threads: int | None,
    backend: str,
    sampling: SamplingConfig,
    as_json: bool,
    policy: str | None = None,
    picture_eviction: str | None = None,
    speculate: bool | None = None,
) -> int:
    """Tells one story: streamed to standard output, or as one JSON object.

    Args:
        images: picture files, shown to the model in this order, before the prompt.
        policy, picture_eviction: what the cache keeps (see `CacheConfig`); by default as the bundle says.
        speculate: see `SEEDStory.begin`.

    Returns:
        The exit code: 0, or `INTERRUPTED` when the user stopped the story.

    Raises:
        SeedStoryError: see `SEEDStory`, `load_and_preprocess_image` and `Story.add_text`.
    """
    opened = Bundle.open(bundle)
    size = opened.manifest.story.vision.image_size
    cache = cache_config(opened.manifest.cache, policy, picture_eviction)
    pictures = [load_and_preprocess_image(image, size) for image in images]
    with SEEDStory(opened, threads=threads, backend=backend) as model:
        story = model.begin(seed=seed, sampling=sampling, policy=cache, speculate=speculate)
        for picture in pictures:
            story.add_picture(picture)
        story.add_text(prompt)
        for line in notes(opened.manifest, cache, pictures=len(pictures), prompt_tokens=story.stats.prompt_tokens):
            note(f"note: {line}")
        interrupted = _stream(story, max_tokens, (lambda _: None) if as_json else write)
        result = summary(model, story, seed=seed, interrupted=interrupted)
    write_json(result) if as_json else _finish(result)
    return INTERRUPTED if interrupted else 0


def _finish(result: Mapping[str, Any]) -> None:
    if not result["text"].endswith("\n"):
        write("\n")
    for line in statistics(result):
        note(line)


def _stream(story: Story, max_tokens: int, show: Callable[[str], None]) -> bool:
    """Shows the whole story, its beginning included; gives whether the user interrupted it."""
    try:
        show(story.given)
        for piece in story.tell(max_tokens=max_tokens):
            show(piece)
    except KeyboardInterrupt:
        return True
    return False


def notes(manifest: Manifest, cache: CacheConfig, *, pictures: int, prompt_tokens: int) -> list[str]:
    """What the user should know before the story begins."""
    lines = []
    if manifest.missed:
        lines.append(f"this bundle misses its recipe's bounds and was written with --force: {manifest.missed}.")
    if pictures and not manifest.qformer_trained:
        lines.append("this bundle's Q-Former isn't trained: the picture doesn't influence the story yet.")
    room = cache.sinks + cache.ring
    kept = f", and {cache.picture_anchors} of each of up to {cache.pictures} pictures" if cache.pictures else ""
    if prompt_tokens > room:
        lines.append(
            f"the beginning takes {prompt_tokens} tokens and the cache holds {room}: the model keeps "
            f"the first {cache.sinks} and the newest {cache.ring}{kept}."
        )
    return lines


def summary(model: SEEDStory, story: Story, *, seed: int, interrupted: bool) -> dict[str, Any]:
    """A story and what it took, as JSON values; None for what isn't known."""
    stats, manifest = story.stats, model.bundle.manifest
    return {
        "text": story.given + story.told,
        "tokens": stats.tokens,
        "prompt_tokens": stats.prompt_tokens,
        "finished": story.finished and not interrupted,
        "interrupted": interrupted,
        "time_to_first_token_ms": stats.time_to_first_token_ms,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
        "picture_ms": stats.picture_ms,
        "prefill_ms": stats.prefill_ms,
        "decode_ms": stats.decode_ms,
        "guessed": stats.guessed,
        "guessed_right": stats.guessed_right,
        "peak_rss_mib": peak_rss_mib(),
        "cache": {"policy": model.decoder.cache.config.policy, **model.decoder.cache.config.to_dict()},
        "seed": seed,
        "threads": model.threads,
        "bundle": str(model.bundle.path),
        "name": manifest.name,
        "recipe": manifest.recipe,
        "qformer_trained": manifest.qformer_trained,
        "missed_bounds": dict(manifest.missed_bounds),
        "versions": versions(),
    }


def versions() -> dict[str, str | None]:
    """Of what runs here; None for what isn't installed."""
    found: dict[str, str | None] = {"seed-story": __version__, "python": platform.python_version()}
    for package in ("ai-edge-litert", "numpy", "pillow", "tokenizers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def statistics(result: Mapping[str, Any]) -> list[str]:
    """A `summary` in two lines for a reader."""

    def figure(name: str, form: str, unit: str) -> str:
        value = result[name]
        return "unavailable" if value is None else f"{value:{form}} {unit}"

    end = "interrupted" if result["interrupted"] else "came to its end" if result["finished"] else "may go on"
    first = figure("time_to_first_token_ms", ".0f", "ms")
    guesses = f"; {result['guessed_right']} of {result['guessed']} guesses came true" if result["guessed"] else ""
    return [
        f"{result['tokens']} tokens after {result['prompt_tokens']} given; first token {first}, "
        f"then {figure('decode_tokens_per_second', '.1f', 'tokens/s')}; the story {end}{guesses}",
        f"peak memory {figure('peak_rss_mib', '.0f', 'MiB')}; {result['name']} {result['recipe']} "
        f"from {result['bundle']}, threads {result['threads']}, seed {result['seed']}",
    ]
