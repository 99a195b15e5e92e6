"""This project's own speed and memory, part by part, on the machine at hand; `make bench`.

Each round measures every part once, so that a machine whose speed drifts drifts for all; figures are medians and
quartiles over the rounds. The decoder's depth is the number of tokens before those measured.

- Roofline: the bytes that a decode step must read over the memory's read bandwidth (`benchmarks/roofline.py`), and how
  much of that speed a step reaches.
- Host: what a token of a told story takes outside the graphs: sampling, the cache, the tokenizer, the stream.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.roofline import decode_bytes, read_bandwidth_gb_s
from benchmarks.spread import quartiles, spread
from benchmarks.starts import PROMPT_TOKENS, cold_start, start
from seed_story.certify import drawn_picture
from seed_story.cli import whole
from seed_story.decoder import Decoder
from seed_story.device import cpu_model
from seed_story.output import exit_code, prepare, table, write, write_json
from seed_story.story import SEEDStory
from seed_story.telling import versions

PREFILLS = (32, 128, 512)
STEPS = 24
"""Single tokens of a decode figure, and tokens told of a host figure."""
WRAPS = 5

Samples = dict[str, list[float]]


def prefill_s(decoder: Decoder, tokens: Sequence[int]) -> float:
    """Seconds that an empty cache takes to read so many tokens."""
    decoder.cache.reset()
    embeddings = decoder.embed(tokens)
    started = time.perf_counter()
    decoder.feed(embeddings)
    return time.perf_counter() - started


def step_ms(decoder: Decoder, tokens: Sequence[int]) -> float:
    """Milliseconds of one step, from token id to logits: the median over these tokens."""
    times = []
    for token in tokens:
        started = time.perf_counter()
        decoder.step(token)
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times))


def picture_ms(model: SEEDStory, number: int) -> float:
    """Milliseconds from prepared pixels to embeddings, of a picture that was never seen."""
    size = model.bundle.manifest.story.vision.image_size
    pixels = np.full((1, size, size, 3), number / 1000, np.float32)
    started = time.perf_counter()
    model.vision.embeddings(pixels)
    return 1e3 * (time.perf_counter() - started)


class GraphClock:
    """Seconds that a decoder's graphs ran."""

    def __init__(self) -> None:
        self.s = 0.0

    @contextmanager
    def on(self, decoder: Decoder) -> Iterator[None]:
        """Counts while it is open."""
        for graph in decoder.signatures.values():
            graph.run = self._timed(graph.run)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for graph in decoder.signatures.values():
                del graph.run

    def _timed(self, run: Callable[[], None]) -> Callable[[], None]:
        def timed() -> None:
            started = time.perf_counter()
            run()
            self.s += time.perf_counter() - started

        return timed


def host_share(model: SEEDStory) -> tuple[float, float]:
    """Of a token that a story tells: microseconds outside the graphs, and their percentage of the whole token."""
    clock, story = GraphClock(), model.begin(seed=1)
    story.add_picture(drawn_picture(0)).add_text("Once upon a time,")
    deque(story.tell(max_tokens=1), maxlen=0)  # reads the prompt
    with clock.on(model.decoder):
        started = time.perf_counter()
        deque(story.tell(max_tokens=STEPS), maxlen=0)
        spent_s = time.perf_counter() - started
    host_s = spent_s - clock.s
    return 1e6 * host_s / (story.stats.tokens - 1), 100 * host_s / spent_s


def measure(model: SEEDStory, rounds: int) -> Samples:
    """Every part of the running model, in every round; the first isn't counted."""
    decoder, rng = model.decoder, np.random.default_rng(0)
    vocab = model.bundle.manifest.story.llama.vocab_size
    ring = decoder.cache.config.ring
    found: Samples = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    for number in tqdm(range(rounds + 1), desc="bench", unit="round"):
        model.begin()
        for size in PREFILLS:
            note(f"prefill_{size}_tokens_per_second", size / prefill_s(decoder, rng.integers(0, vocab, size).tolist()))
        tokens = rng.integers(0, vocab, STEPS).tolist()
        note("decode_at_512_ms", step_ms(decoder, tokens))
        decoder.feed(decoder.embed(rng.integers(0, vocab, WRAPS * ring).tolist()))
        note(f"decode_after_{WRAPS}_wraps_ms", step_ms(decoder, tokens))
        decoder.cache.reset()
        note("decode_at_0_ms", step_ms(decoder, tokens))
        note("picture_ms", picture_ms(model, number))
        host_us, percent = host_share(model)
        note("host_us_per_token", host_us)
        note("host_percent", percent)
    return {name: values[1:] for name, values in found.items()}


def starts(bundle: Path, threads: int, rounds: int) -> Samples:
    """New processes: from their start to a first token, packed weights at hand or not, and what memory that took."""
    start(bundle, threads)  # packs, if nobody has
    found: Samples = {"cold_first_token_s": [cold_start(bundle, threads)["first_token_s"] for _ in range(3)]}
    for _ in tqdm(range(rounds), desc="starts", unit="process"):
        for name, value in start(bundle, threads).items():
            found.setdefault(f"warm_{name}", []).append(value)
    return found


def _run(args: argparse.Namespace) -> int:
    with SEEDStory(args.bundle, threads=args.threads) as model:
        bundle, threads = model.bundle, model.threads
        needed = decode_bytes(bundle)
        bandwidth = read_bandwidth_gb_s(threads)
        found = measure(model, args.rounds)
    found |= starts(bundle.path, threads, args.rounds)
    bandwidth = max(bandwidth, read_bandwidth_gb_s(threads))
    figures = {name: quartiles(np.array(values)) for name, values in found.items() if None not in values}
    floor_ms = sum(needed.values()) / bandwidth / 1e6
    percent = 100 * floor_ms / figures["decode_at_512_ms"][1]
    about = {"cpu": cpu_model(), "threads": threads, "bundle": bundle.manifest.name, "recipe": bundle.manifest.recipe,
             "slots": bundle.manifest.cache.slots, "rounds": args.rounds}  # fmt: skip
    roofline = {"bytes": needed, "read_bandwidth_gb_s": round(bandwidth, 1), "floor_ms": round(floor_ms, 3),
                "percent_reached": round(percent, 1)}  # fmt: skip
    write(", ".join(f"{name} {value}" for name, value in about.items()) + ": median [quartiles]\n")
    write(table([(name, spread(row, 3 if name.endswith("_s") else 2)) for name, row in figures.items()]) + "\n")
    write(f"a decode step must read {needed['weights'] / 1e6:.1f} MB of weights and {needed['cache'] / 1e6:.1f} MB of "
          f"cache: at {bandwidth:.1f} GB/s {floor_ms:.2f} ms, {percent:.0f} % of what it takes\n")  # fmt: skip
    write_json({**about, "prompt_tokens": PROMPT_TOKENS, "figures": figures, "roofline": roofline,
                "versions": versions()})  # fmt: skip
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and prints a table, then one line of JSON."""
    prepare()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--bundle", default="build/story", metavar="DIR", help="the bundle's folder (default: %(default)s)")
    add("--rounds", type=whole(2), default=20, metavar="N", help="how many (default: %(default)s)")
    add("--threads", type=whole(1), metavar="N", help="CPU threads (default: the fast cores, at most four)")
    args = parser.parse_args(argv)
    return exit_code(lambda: _run(args), "bench")


if __name__ == "__main__":
    sys.exit(main())
