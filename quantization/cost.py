"""What a bundle costs on this machine: disk, time to load, memory, and speed beside others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from seed_story.errors import SeedStoryError
from seed_story.measure import peak_rss_mib
from seed_story.resident import resident
from seed_story.story import SEEDStory
from seed_story.yardstick import BEGINNING

STARTS = 3
"""Processes started to measure loading and memory."""
ROUNDS, STEPS = 10, 16
"""Rounds of decoding, and steps of each."""
_TOLD = 64  # tokens that a started process tells


def footprint(bundle: Path, picture: Path, *, threads: int) -> dict[str, Any]:
    """Loads a bundle and begins a story in processes of their own.

    Returns:
        `load_s`, the median time to open the bundle and tell the first token about a picture; `peak_mib`, the most
        memory in RAM; `private_mib`, what of it is the process's own at the end. Null where it can't be read.

    Raises:
        SeedStoryError: a process failed.
    """
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join(filter(None, (str(root), str(root / "runtime"), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "quantization.cost", str(bundle), str(picture), str(threads)]
    answers = []
    for _ in range(STARTS):
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", check=False, env={**os.environ, "PYTHONPATH": path}
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise SeedStoryError(f"{bundle} can't be measured in a process of its own", got=last)
        answers.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: _median([answer[name] for answer in answers]) for name in answers[0]}


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.median(known)) if known else None


def speeds(models: Sequence[SEEDStory], *, rounds: int = ROUNDS, steps: int = STEPS) -> list[dict[str, Any]]:
    """Decoding and prefill of every model in turns, so that a machine whose speed drifts drifts for all.

    Each round reads as many random tokens as the cache has slots, then decodes.

    Returns:
        For each model, tokens a second: `[first quartile, median, third quartile]` over rounds; and the same of its
        decoding's ratio to the first model's, round by round.
    """
    rng = np.random.default_rng(0)
    decode, prefill = np.zeros((2, rounds + 1, len(models)))
    for turn in tqdm(range(rounds + 1), desc="speed", unit="round"):
        for column, model in enumerate(models):
            vocab = min(model.tokenizer.vocab_size, model.bundle.manifest.story.llama.vocab_size)
            ids = rng.integers(0, vocab, model.cache.slots).tolist()
            model.begin()
            rows = model.decoder.embed(ids)
            started = time.perf_counter()
            model.decoder.feed(rows)
            prefill[turn, column] = len(ids) / (time.perf_counter() - started)
            decode[turn, column] = 1 / np.median([_step_s(model, token) for token in ids[:steps]])
    decode, prefill = decode[1:], prefill[1:]  # the first round warms up
    return [
        {
            "decode_tokens_per_second": _quartiles(decode[:, column]),
            "prefill_tokens_per_second": _quartiles(prefill[:, column]),
            "decode_ratio": _quartiles(decode[:, column] / decode[:, 0]),
        }
        for column in range(len(models))
    ]


def _step_s(model: SEEDStory, token_id: int) -> float:
    started = time.perf_counter()
    model.decoder.step(token_id)
    return time.perf_counter() - started


def _quartiles(values: npt.NDArray[np.float64]) -> list[float]:
    return [float(quartile) for quartile in np.percentile(values, (25, 50, 75))]


def main(bundle: str, picture: str, threads: str) -> None:
    """The process of `footprint`: prints its figures as JSON."""
    started = time.perf_counter()
    with SEEDStory(bundle, threads=int(threads)) as model:
        story = model.begin().add_picture(picture).add_text(BEGINNING)
        tokens = story.tell(max_tokens=_TOLD)
        next(tokens, None)
        load_s = time.perf_counter() - started
        for _ in tokens:
            pass
        held = resident()
        figures = {"load_s": load_s, "peak_mib": peak_rss_mib(), "private_mib": held and held.private_mib}
        print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
