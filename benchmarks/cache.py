"""What the cache's policy costs a token: the host's work beside the decoder's, every policy in turn in one run.

Each case tells on, in turns of some tokens, at a depth where the ring has wrapped; what it had is put back before its
next turn, untimed. Pictures are read token by token like all else, so a turn has as many promotions as pictures.

- `host_us`: microseconds a token in `SinkCache.fill`, `store` and `observe`, evictions included; of the thread's CPU
  time, which a busy machine doesn't lengthen. A mean: a promotion is rare, and a median wouldn't see it.
- `step_ms`: milliseconds of a whole decode step, the turn's lower quartile, wall clock.
- `graph_us`: microseconds a token that the steps take longer which also answer what they looked at (`attention-mass`
  asks some): the difference of the two kinds' lower quartiles, spread over all steps.
- `share_percent`: how much more `host_us` is than under `window` in the same round, and `graph_us`, of `window`'s step.

A turn gives one figure of each; what is shown are medians and quartiles over the rounds. The share's median may be 2 %.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.spread import quartiles, spread
from seed_story.cache import SinkCache
from seed_story.cli import whole
from seed_story.config import CacheConfig
from seed_story.decoder import Decoder
from seed_story.device import cpu_model
from seed_story.output import exit_code, prepare, write, write_json
from seed_story.policies import ATTENTION_MASS, MULTIMODAL_SINK, TEXT_SINK, WINDOW
from seed_story.snapshot import State
from seed_story.story import SEEDStory

SHARE_BOUND_PERCENT = 2.0
_PICTURES = "with pictures"
_QUARTILE = 0.25


@dataclass
class Case:
    """A story under one policy.

    Args:
        every: tokens from one picture to the next; 0 for none.
    """

    name: str
    config: CacheConfig
    every: int = 0
    state: State | None = None
    host_us: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    graph_us: list[float] = field(default_factory=list)


def cases_of(cache: CacheConfig, every: int, *, attention: bool) -> list[Case]:
    """Every policy without pictures, and with one every so many tokens; `window` first.

    Args:
        attention: whether the decoder can tell its attention.
    """
    plain = [Case(policy, cache.under(policy)) for policy in (WINDOW, TEXT_SINK, MULTIMODAL_SINK)]
    if attention:
        asking = cache.under(MULTIMODAL_SINK, picture_eviction=ATTENTION_MASS)
        plain.append(Case(f"{MULTIMODAL_SINK} {ATTENTION_MASS}", asking))
    return plain + [Case(f"{case.name} {_PICTURES}", case.config, every) for case in plain]


class Clock:
    """CPU time that the thread spent in a cache's methods since it was asked, µs."""

    _METHODS = ("fill", "store", "observe")

    def __init__(self) -> None:
        self.us = 0.0

    @contextmanager
    def on(self, cache: SinkCache) -> Iterator[None]:
        """Counts while it is open."""
        for name in self._METHODS:
            setattr(cache, name, self._timed(getattr(cache, name)))
        try:
            yield
        finally:
            for name in self._METHODS:
                delattr(cache, name)

    def _timed(self, call: Any) -> Any:
        def timed(*args: Any) -> Any:
            started = time.thread_time_ns()
            answer = call(*args)
            self.us += (time.thread_time_ns() - started) / 1e3
            return answer

        return timed


def turn(decoder: Decoder, case: Case, row: np.ndarray[Any, np.dtype[np.float32]], tokens: int, size: int) -> None:
    """Tells `tokens` tokens of a case and notes its figures.

    Args:
        row: any token's embedding, float32 `[1, hidden]`.
        size: tokens of a picture.
    """
    cache, clock, times_ms, asked = decoder.cache, Clock(), np.empty(tokens), np.zeros(tokens, bool)
    begin(decoder, case, row, size)
    with clock.on(cache):
        for index in range(tokens):
            expect(cache, case, size)
            asked[index] = cache.asks_attention
            started = time.perf_counter()
            decoder.feed(row)
            times_ms[index] = 1e3 * (time.perf_counter() - started)
    case.state = cache.state()
    case.host_us.append(clock.us / tokens)
    plain_ms = float(np.quantile(times_ms[~asked], _QUARTILE))
    case.step_ms.append(plain_ms)
    longer_ms = np.quantile(times_ms[asked], _QUARTILE) - plain_ms if asked.any() else 0.0
    case.graph_us.append(1e3 * float(longer_ms * asked.mean()))


def begin(decoder: Decoder, case: Case, row: np.ndarray[Any, np.dtype[np.float32]], size: int) -> None:
    """Puts back what the case had; at first, tells it past a turn of the ring."""
    cache = decoder.cache
    if case.state is not None:
        cache.restore(case.state)
        return
    cache.reset(case.config)
    while cache.position < case.config.slots + case.every + 1:
        expect(cache, case, size)
        decoder.feed(row)


def expect(cache: SinkCache, case: Case, size: int) -> None:
    """Says that a picture comes, where one does."""
    if case.every and cache.position % case.every == 0:
        cache.expect_picture(range(cache.position, cache.position + size))


def measure(model: SEEDStory, *, every: int, tokens: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Every case in turn, round after round.

    Args:
        every, tokens, rounds: tokens from picture to picture, of a turn, and how many rounds count.

    Returns:
        By case, the quartiles of `host_us`, `step_ms`, `graph_us` and `share_percent`.
    """
    decoder, size = model.decoder, model.bundle.manifest.story.picture_tokens
    model.begin()
    row, cases = decoder.embed([1]), cases_of(model.cache, every, attention=model.bundle.manifest.steps.attention)
    for index in tqdm(range(rounds + 1), desc="cache", unit="round"):  # the first isn't counted
        for case in cases[index % len(cases) :] + cases[: index % len(cases)]:
            turn(decoder, case, row, tokens, size)
    plain = cases[0]
    step_us = 1e3 * np.array(plain.step_ms[1:])
    return {
        case.name: {
            "host_us": quartiles(np.array(case.host_us[1:])),
            "step_ms": quartiles(np.array(case.step_ms[1:])),
            "graph_us": quartiles(np.array(case.graph_us[1:])),
            "share_percent": quartiles(
                100 * (np.array(case.host_us[1:]) - np.array(plain.host_us[1:]) + np.array(case.graph_us[1:])) / step_us
            ),
        }
        for case in cases
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and prints a table, then one line of JSON; the exit code is 1 beyond the bound."""
    prepare()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--bundle", default="build/story", metavar="DIR", help="the bundle's folder (default: %(default)s)")
    add("--every", type=whole(1), default=100, metavar="N", help="tokens from picture to picture (default: 100)")
    add("--tokens", type=whole(1), default=100, metavar="N", help="of a turn (default: %(default)s)")
    add("--rounds", type=whole(2), default=15, metavar="N", help="how many (default: %(default)s)")
    add("--threads", type=whole(1), metavar="N", help="CPU threads (default: the fast cores, at most four)")
    args = parser.parse_args(argv)
    return exit_code(lambda: _run(args), "cache")


def _run(args: argparse.Namespace) -> int:
    with SEEDStory(args.bundle, threads=args.threads) as model:
        found = measure(model, every=args.every, tokens=args.tokens, rounds=args.rounds)
        about = {"cpu": cpu_model(), "threads": model.threads, "slots": model.cache.slots, "picture_every": args.every}
    worst = max(row["share_percent"][1] for name, row in found.items() if name.startswith(MULTIMODAL_SINK))
    verdict = "PASS" if worst <= SHARE_BOUND_PERCENT else "FAIL"
    machine = f"{about['cpu']}, {about['threads']} threads, {about['slots']} slots"
    write(f"{machine}, {args.rounds} rounds: median [quartiles]\n")
    for name, row in found.items():
        write(f"{name:44} host {spread(row['host_us'], 1)} us a token  step {spread(row['step_ms'], 2)} ms  "
              f"more than window {spread(row['share_percent'], 2)} %\n")  # fmt: skip
    write(f"{verdict}: {MULTIMODAL_SINK} adds {worst:.2f} % of a step, allowed {SHARE_BOUND_PERCENT:g} %\n")
    write_json({"verdict": verdict, **about, "rounds": args.rounds, "tokens": args.tokens, "cases": found})
    return 0 if verdict == "PASS" else 1


if __name__ == "__main__":
    sys.exit(main())
