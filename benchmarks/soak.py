"""A story of a hundred thousand tokens with a picture every 300: is memory flat, and is the cache where it should be?

After every stretch, a picture and what is told after it, this compares with formulas that know nothing of how the cache
works, only how many tokens went by and where the pictures were:

- what each slot holds: the first tokens, the anchors of the pictures that were kept, and the newest tokens;
- the rotations that the next token's query gets, in extended precision;
- the process's anonymous memory, by the statistics of `seed-story certify`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from seed_story.cache import EMPTY, Positions, SinkCache
from seed_story.certificate import FIRST_PAGE, FLAT, LEAST_PAGES, MOST_PAGES, Finding, memory_finding
from seed_story.certify import drawn_picture, warm_up
from seed_story.cli import whole
from seed_story.config import CacheConfig, LlamaConfig, rope_frequencies
from seed_story.device import cpu_model
from seed_story.errors import SeedStoryError, UsageError
from seed_story.output import exit_code, prepare, table, write, write_json
from seed_story.policies import FIRST_AND_LAST, MULTIMODAL_SINK, POLICIES
from seed_story.resident import Resident, resident
from seed_story.story import SEEDStory, Story

ROTATION_BOUND = 1e-7
"""Of a cosine: half a float32's last digit below 1 is 6e-8."""
_READ = "And so they went on together, and the path led up the hill and down again. "


def expected_slots(config: CacheConfig, count: int, pictures: Sequence[range]) -> Positions:
    """What every slot holds after `count` tokens, int64 `[slots]`, by closed formulas; see `SinkCache`.

    Args:
        pictures: the tokens of all pictures so far; each has as many as its anchors that are no sinks.
    """
    slots = np.arange(config.slots)
    newest = count - 1 - (count - 1 - slots + config.kept - config.sinks) % config.ring
    held = np.where(slots < config.sinks, np.where(slots < count, slots, EMPTY), EMPTY)
    held = np.where((slots >= config.kept) & (newest >= config.sinks), newest, held)
    for number, picture in enumerate(gone(config, count, pictures)):
        stay = config.picture_eviction == FIRST_AND_LAST  # the first picture keeps the first group
        turns = config.pictures - stay
        if number >= config.pictures and not turns:
            break
        group = number if number < config.pictures else stay + (number - stay) % turns
        first = config.sinks + group * config.picture_anchors
        anchors = [*picture[: config.picture_begin], *picture[len(picture) - config.picture_end :]]
        held[first : first + config.picture_anchors] = anchors
    return np.asarray(held, np.int64)


def gone(config: CacheConfig, count: int, pictures: Sequence[range]) -> list[range]:
    """What of the pictures has left the ring after `count` tokens and is no sink, where the policy promotes any."""
    rest = [range(max(picture.start, config.sinks), picture.stop) for picture in pictures]
    return [picture for picture in rest if picture.start + config.ring <= count] if config.pictures else []


def expected_angles(
    llama: LlamaConfig, config: CacheConfig, count: int, pictures: Sequence[range]
) -> np.ndarray[Any, np.dtype[np.longdouble]]:
    """Radians `[2, head_dim / 2]` that the next token's query is turned by: for the ring, and for the kept slots."""
    left = gone(config, count, pictures)
    first_seen = max(count - config.ring + 1, config.sinks, *(picture.stop for picture in left[-1:]))
    kept = config.sinks + min(len(left), config.pictures) * config.picture_anchors
    places = np.array([count, kept + count - first_seen], np.longdouble)
    return np.asarray(places[:, None] * np.array(rope_frequencies(llama), np.longdouble))


def rotation_error(cache: SinkCache, angles: np.ndarray[Any, np.dtype[np.longdouble]]) -> float:
    """How far the cosines and sines are off that the cache gives to the next token."""
    half = angles.shape[1]
    inputs = {"cos": np.zeros((1, 2, 2 * half), np.float32), "sin": np.zeros((1, 2, 2 * half), np.float32),
              "mask": np.zeros((1, cache.config.slots + 1), np.float32)}  # fmt: skip
    cache.fill(inputs, 1)
    cos, sin = np.cos(angles), np.sin(angles)
    wrong = [inputs["cos"][0] - np.tile(cos, 2), inputs["sin"][0] - np.concatenate([-sin, sin], axis=1)]
    return float(max(np.abs(each).max() for each in wrong))


class Soak:
    """One long session, a stretch at a time.

    Attributes:
        pictures: the tokens of each picture, the two around it included.
        rotation_error: the worst so far.
    """

    def __init__(self, model: SEEDStory, config: CacheConfig, *, read: int, seed: int = 0) -> None:
        self._model, self._config, self._read = model, config, read
        self._story: Story = model.begin(seed=seed, policy=config)
        self._ended = 0  # end tokens: read like others, but not told
        self.pictures: list[range] = []
        self.rotation_error = 0.0

    @property
    def count(self) -> int:
        """Tokens of the story: all that was given and told, the one that is still to be read included."""
        return self._story.stats.prompt_tokens + self._story.stats.tokens + self._ended

    def stretch(self, tokens: int) -> None:
        """A picture, a text to read, and telling, until there are so many tokens more; then everything is compared.

        Raises:
            SeedStoryError: the cache isn't where it should be.
        """
        begin = self.count
        self._story.add_picture(drawn_picture(len(self.pictures)))
        self.pictures.append(range(begin, self.count))
        self._story.add_text("\n")
        while self.count - begin < self._read:
            self._story.add_text(_READ)
        end = max(begin + tokens, self.count + 1)  # the first stretch has the prompt's words, too
        while self.count < end:
            for _ in self._story.tell(max_tokens=end - self.count):
                pass
            self._ended += self._story.finished
        self.check()

    def check(self) -> None:
        """Compares the cache with the formulas."""
        cache, count = self._model.decoder.cache, self.count - 1  # the last one is told, and not read yet
        if cache.position != count:
            raise SeedStoryError("the cache has lost count", got=cache.position, expected=count)
        expected = expected_slots(self._config, count, self.pictures)
        wrong = np.flatnonzero(cache.slot_positions != expected)
        if len(wrong):
            raise SeedStoryError(f"{len(wrong)} slots hold other tokens after {count}",
                                 got=f"token {cache.slot_positions[wrong[0]]} in slot {wrong[0]}",
                                 expected=expected[wrong[0]])  # fmt: skip
        angles = expected_angles(self._model.bundle.manifest.story.llama, self._config, count, self.pictures)
        self.rotation_error = max(self.rotation_error, rotation_error(cache, angles))


def soak(
    model: SEEDStory,
    config: CacheConfig,
    *,
    tokens: int,
    every: int,
    read: int,
    memory: Callable[[], Resident | None] = resident,
) -> dict[str, Any]:
    """Runs it.

    Returns:
        The figures; `verdict` is PASS when memory is flat and no rotation is off by more than `ROTATION_BOUND`.

    Raises:
        UsageError: too few or too many stretches to judge, or a stretch that its picture and text don't leave room in.
        SeedStoryError: the cache isn't where it should be, or memory can't be read here.
    """
    stretches = -(-tokens // every)
    if not LEAST_PAGES <= stretches <= MOST_PAGES:
        raise UsageError("the number of stretches is impossible", got=f"{tokens} tokens, {every} each",
                         expected=f"{LEAST_PAGES} to {MOST_PAGES} stretches")  # fmt: skip
    size = model.bundle.manifest.story.picture_tokens
    least = size + read + len(model.tokenizer.encode(_READ)) + 2
    if every < least:
        raise UsageError("a stretch is too short", got=f"{every} tokens", expected=f"{least} or more")
    warm_up(model)
    run, held, started = Soak(model, config, read=read), list[float](), time.perf_counter()
    for _ in tqdm(range(stretches), desc="soak", unit="stretch"):
        run.stretch(every)
        found = memory()
        if found is None:
            raise SeedStoryError("this process's memory can't be read", expected="/proc/self/smaps_rollup")
        held.append(found.private_mib)
    finding = memory_finding("private memory", np.array(held))
    return _result(run, finding, held, time.perf_counter() - started)


def _result(run: Soak, finding: Finding, held: Sequence[float], seconds: float) -> dict[str, Any]:
    fine = finding.outcome == FLAT and run.rotation_error <= ROTATION_BOUND
    return {
        "verdict": "PASS" if fine else "FAIL",
        "tokens": run.count,
        "told": run._story.stats.tokens,
        "pictures": len(run.pictures),
        "seconds": round(seconds),
        "worst_rotation_error": run.rotation_error,
        "private_mib": [round(held[FIRST_PAGE - 1], 3), round(held[-1], 3)],
        "memory": {**asdict(finding), "outcome": finding.outcome},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and prints a table, then one line of JSON; the exit code is 1 for FAIL."""
    prepare()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--bundle", default="build/story", metavar="DIR", help="the bundle's folder (default: %(default)s)")
    add("--tokens", type=whole(1), default=100_000, metavar="N", help="of the whole story (default: %(default)s)")
    add("--every", type=whole(1), default=300, metavar="N", help="tokens from picture to picture (default: 300)")
    add("--read", type=whole(0), default=0, metavar="N",
        help="of these, the picture included, read and not told: faster (default: what must be)")  # fmt: skip
    add("--policy", choices=POLICIES, default=MULTIMODAL_SINK, help="what the cache keeps (default: %(default)s)")
    add("--threads", type=whole(1), metavar="N", help="CPU threads (default: the fast cores, at most four)")
    args = parser.parse_args(argv)
    return exit_code(lambda: _run(args), "soak")


def _run(args: argparse.Namespace) -> int:
    with SEEDStory(args.bundle, threads=args.threads) as model:
        config = model.cache.under(args.policy)
        found = soak(model, config, tokens=args.tokens, every=args.every, read=args.read)
        found |= {"policy": args.policy, "cpu": cpu_model(), "threads": model.threads}
    rows = [(name.replace("_", " "), str(value)) for name, value in found.items() if name != "memory"]
    memory = found["memory"]
    rows.append(("memory", f"{memory['change']:+.3f} MiB [{memory['low']:+.3f}, {memory['high']:+.3f}]"))
    write(table(rows))
    write_json(found)
    return 0 if found["verdict"] == "PASS" else 1


if __name__ == "__main__":
    sys.exit(main())
