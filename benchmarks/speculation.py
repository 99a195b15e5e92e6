"""What speculation gives: stories told with and without it, in turns of some tokens, so that a busy machine hits both.

Every picture begins a story, told greedily and by default sampling. Both tellings come to one text, or the run fails.

- `speed`: how many times faster the telling that speculates is, over the whole story.
- `right`: the share of the guesses that came true.
- `tokens_per_run`: tokens told for each run of the decoder.
- `verify_cost`: time of a run that tests guesses, in single steps of the same round, at the end of a story.
- `decode_cost`: with `--beside`, time of a single step in that of a bundle exported without `--verify`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.spread import quartiles, spread
from seed_story.cli import DEFAULT_PROMPT, whole
from seed_story.device import cpu_model
from seed_story.errors import UsageError
from seed_story.output import exit_code, prepare, write, write_json
from seed_story.sampling import SamplingConfig
from seed_story.session import Story
from seed_story.story import SEEDStory

SAMPLINGS = {"greedy": SamplingConfig.greedy(), "default": SamplingConfig()}
_GO_ON = "\nThe next morning,"


def measure(
    models: Sequence[SEEDStory], pictures: Sequence[Path], *, tokens: int, turn: int
) -> dict[str, dict[str, list[float]]]:
    """Quartiles over the pictures, by sampling.

    Args:
        models: the same bundle twice: one model tells without speculation, the other with it.
        tokens, turn: of each story, and of each turn.

    Raises:
        UsageError: speculation changed a story.
    """
    found: dict[str, dict[str, list[float]]] = {}
    with tqdm(total=len(SAMPLINGS) * len(pictures), desc="speculation", unit="story") as bar:
        for name, sampling in SAMPLINGS.items():
            rows = []
            for seed, picture in enumerate(pictures):
                rows.append(_compare(models, picture, sampling, seed, tokens, turn))
                bar.update(1)
            found[name] = {key: quartiles(np.array([row[key] for row in rows])) for key in rows[0]}
    return found


def _compare(
    models: Sequence[SEEDStory], picture: Path, sampling: SamplingConfig, seed: int, tokens: int, turn: int
) -> dict[str, float]:
    stories = [
        model.begin(seed=seed, sampling=sampling, speculate=speculate).add_picture(picture).add_text(DEFAULT_PROMPT)
        for model, speculate in zip(models, (False, True), strict=True)
    ]
    for number, end in enumerate(range(turn, tokens + 1, turn)):
        for story in stories[:: 1 if number % 2 else -1]:
            _tell_until(story, end)
    plain, ahead = stories
    if plain.told != ahead.told:
        raise UsageError(f"speculation changed the story of {picture.name}", got=ahead.told, expected=plain.told)
    stats = ahead.stats
    return {
        "speed": plain.stats.decode_ms / stats.decode_ms,
        "tokens_per_run": stats.steps / stats.runs,
        "right": stats.guessed_right / max(stats.guessed, 1),
        "tokens_per_second": stats.decode_tokens_per_second or 0.0,
        "plain_tokens_per_second": plain.stats.decode_tokens_per_second or 0.0,
    }


def _tell_until(story: Story, tokens: int) -> None:
    while story.stats.tokens < tokens:
        for _ in story.tell(max_tokens=tokens - story.stats.tokens):
            pass
        if story.finished:
            story.add_text(_GO_ON)


def costs(model: SEEDStory, beside: SEEDStory | None, rounds: int) -> dict[str, list[float]]:
    """`verify_cost` and `decode_cost`, quartiles over the rounds, in turns."""
    one = _stepper(model, 0)
    calls = {"verify_cost": _stepper(model, model.bundle.manifest.steps.verify - 1)}
    if beside:
        calls["decode_cost"] = _stepper(beside, 0)
    times = {name: np.empty(rounds) for name in calls}
    for index in range(rounds):
        base = one()
        for name, call in calls.items():
            times[name][index] = call() / base
    if beside:
        times["decode_cost"] = 1 / times["decode_cost"]
    return {name: quartiles(values) for name, values in times.items()}


def _stepper(model: SEEDStory, guesses: int) -> Callable[[], float]:
    """Seconds of a run at the beginning of a block, after 600 tokens; every run at the same place."""
    model.begin()
    decoder = model.decoder
    rows = decoder.embed(range(600, 1200))
    decoder.feed(rows)
    state = decoder.cache.state()

    def run() -> float:
        decoder.restore(state)
        started = time.perf_counter()
        decoder.feed(rows[:1], (), lambda most: [*range(min(most, guesses))])
        return time.perf_counter() - started

    run()
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and prints a table, then one line of JSON."""
    prepare()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--bundle", default="build/story", metavar="DIR", help="exported with --verify (default: %(default)s)")
    add("--beside", metavar="DIR", help="another bundle, exported without, for the cost of a single step")
    add("--picture", type=Path, nargs="+", required=True, metavar="FILE", help="one for each story")
    add("--tokens", type=whole(1), default=256, metavar="N", help="of a story (default: %(default)s)")
    add("--turn", type=whole(1), default=16, metavar="N", help="tokens of a turn (default: %(default)s)")
    add("--rounds", type=whole(2), default=100, metavar="N", help="of the costs (default: %(default)s)")
    add("--threads", type=whole(1), metavar="N", help="CPU threads (default: the fast cores, at most four)")
    args = parser.parse_args(argv)
    return exit_code(lambda: _run(args), "speculation")


def _run(args: argparse.Namespace) -> int:
    with ExitStack() as stack:

        def opened(bundle: str) -> SEEDStory:
            return stack.enter_context(SEEDStory(bundle, threads=args.threads))

        models = [opened(args.bundle), opened(args.bundle)]
        found = measure(models, args.picture, tokens=args.tokens, turn=args.turn)
        cost = costs(models[0], opened(args.beside) if args.beside else None, args.rounds)
        verify, threads = models[0].bundle.manifest.steps.verify, models[0].threads
    write(f"{cpu_model()}, {threads} threads, {len(args.picture)} stories of {args.tokens} tokens, verify_{verify}: "
          "median [quartiles]\n")  # fmt: skip
    for name, row in found.items():
        write(f"{name:8} {spread(row['speed'], 2)} times as fast: {spread(row['tokens_per_second'], 1)} tokens/s, "
              f"without {spread(row['plain_tokens_per_second'], 1)}; {spread(row['tokens_per_run'], 2)} tokens a run, "
              f"of the guesses {spread(row['right'], 2)} right\n")  # fmt: skip
    for name, values in cost.items():
        write(f"{name:12} {spread(values, 2)}\n")
    write_json({"cpu": cpu_model(), "threads": threads, "verify": verify, "tokens": args.tokens, **found, **cost})
    return 0


if __name__ == "__main__":
    sys.exit(main())
