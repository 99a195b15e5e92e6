"""Decode and prefill beside llama.cpp, on the same weights and machine, interleaved in one run.

`make bench-peers`. Every round gives each engine the same tokens, one engine after the other, so that a machine whose
speed drifts drifts for all. Ratios are taken round by round; medians and quartiles are over rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.spread import quartiles, spread
from seed_story.device import cpu_model
from seed_story.files import cache_dir

_KINDS = ("decode", "prefill")
_WORKERS = Path(__file__).parent / "workers"


class Worker:
    """One engine in a process of its own."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        hello = self._read()
        self.engine, self.version = str(hello["engine"]), str(hello["version"])

    def run(self, tokens: Sequence[int], steps: int) -> dict[str, Any]:
        """Does one job; see `benchmarks/workers/__init__.py`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"tokens": list(tokens), "steps": steps}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended: {self._process.args!r}")
        return dict(json.loads(line))


def measure(workers: Sequence[Worker], *, depth: int, steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Runs all workers in turn; gives each engine's medians and its ratios to the first one's.

    Args:
        depth: tokens in the cache before the measured steps.
        steps: single tokens decoded in a round; their median is the round's figure.
        rounds: after one that isn't counted.
    """
    rng = np.random.default_rng(0)
    decode = np.zeros((rounds + 1, len(workers)))
    prefill = np.zeros_like(decode)
    peak = [0.0] * len(workers)
    for index in range(rounds + 1):
        tokens = rng.integers(100, 40_000, depth).tolist()
        for column, worker in enumerate(workers):
            answer = worker.run(tokens, steps)
            prefill[index, column] = depth / answer["prefill_s"]
            decode[index, column] = 1 / np.median(answer["step_s"])
            peak[column] = answer["peak_rss_mib"]
        print(f"round {index} of {rounds}", file=sys.stderr)
    decode, prefill = decode[1:], prefill[1:]
    return {
        worker.engine: {
            "version": worker.version,
            "decode_tokens_per_second": quartiles(decode[:, column]),
            "prefill_tokens_per_second": quartiles(prefill[:, column]),
            "decode_ratio": quartiles(decode[:, 0] / decode[:, column]),
            "prefill_ratio": quartiles(prefill[:, 0] / prefill[:, column]),
            "peak_rss_mib": round(peak[column]),
        }
        for column, worker in enumerate(workers)
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and prints a table, then one line of JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--bundle", default="build/story")
    parser.add_argument("--gguf", required=True, help="the file that the bundle was made from")
    parser.add_argument("--llama-python", required=True, help="the Python of a venv with llama-cpp-python")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--depth", type=int, default=512)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args(argv)
    threads = str(args.threads)
    q8_0 = str(cache_dir() / "benchmarks" / f"{Path(args.gguf).stem}.Q8_0.gguf")
    Path(q8_0).parent.mkdir(parents=True, exist_ok=True)
    llama = [args.llama_python, str(_WORKERS / "llama_cpp_worker.py"), args.gguf, threads]
    ours = [sys.executable, "-m", "benchmarks.workers.seed_story_worker", args.bundle, threads]
    workers = [Worker(ours), Worker([*llama, q8_0]), Worker(llama)]
    figures = measure(workers, depth=args.depth, steps=args.steps, rounds=args.rounds)
    for worker in workers:
        worker.close()
    print(f"{cpu_model()}, {threads} threads, depth {args.depth}, {args.rounds} rounds: median [quartiles]")
    for engine, row in figures.items():
        speeds = "  ".join(f"{kind} {spread(row[f'{kind}_tokens_per_second'], 1)}" for kind in _KINDS)
        ratios = "  ".join(f"{kind} x {spread(row[f'{kind}_ratio'], 2)}" for kind in _KINDS)
        print(f"{engine:40} tokens/s: {speeds}  ours: {ratios}  peak {row['peak_rss_mib']} MiB")
    print(json.dumps({"cpu": cpu_model(), "threads": args.threads, "depth": args.depth, "engines": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
