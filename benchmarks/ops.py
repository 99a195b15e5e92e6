"""Where a decoder signature's time goes, operator by operator: LiteRT's own profiler, summed over operators of a kind.

LiteRT's Python wrapper has no way to it, its C API has: this compiles the graph a second time with the profiler on, and
runs it on the tensors of the first. The profiler counts whole microseconds and rounds down, so what is made of many
small operators is told too low; `unaccounted` is the rest of the wall clock, the profiler's own cost included.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from seed_story.backends.litert import CApi, LiteRtSignature, c_api
from seed_story.bundle import graph_file
from seed_story.cli import whole
from seed_story.contract import DECODE, DECODER
from seed_story.device import cpu_model
from seed_story.errors import UsageError
from seed_story.output import exit_code, prepare, table, write, write_json
from seed_story.quiet import quiet_stderr
from seed_story.story import SEEDStory
from seed_story.telling import versions

_CPU = 1  # kLiteRtHwAcceleratorCpu
_ROW = re.compile(r"^\s+(\S.*?)\s{2,}[\d.]+\s+[\d.]+\s+([\d.]+)\s+[\d.]+%\s+[\d.]+%\s+[\d.]+\s+\d+\s+\[.*\]:\d+$")
_NOTHING = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)

Totals = dict[str, tuple[float, int]]
"""Kind of operator to milliseconds a run, and how many there are."""


def parse(summary: str) -> Totals:
    """The profiler's text, its table in order of running, summed by kind; the most time first."""
    milliseconds, count = dict[str, float](), Counter[str]()
    for line in summary.partition("= Top by")[0].splitlines():
        if row := _ROW.match(line):
            milliseconds[row[1]] = milliseconds.get(row[1], 0.0) + float(row[2])
            count[row[1]] += 1
    return {kind: (spent, count[kind]) for kind, spent in sorted(milliseconds.items(), key=lambda item: -item[1])}


@contextmanager
def _profiled(api: CApi, file: Path, threads: int) -> Iterator[ctypes.c_void_p]:
    """A compiled model with a profiler."""

    def make(function: str, *arguments: Any) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        api.call(function, *arguments, ctypes.byref(made))
        return made

    environment = make("LiteRtCreateEnvironment", 0, None)
    model = make("LiteRtCreateModelFromFile", environment, str(file).encode())
    options = make("LiteRtCreateOptions")
    api.call("LiteRtSetOptionsHardwareAccelerators", options, _CPU)
    texts = {"runtime_options_string": "enable_profiling = true\n", "xnnpack": f"num_threads = {threads}\n"}
    payloads = {name.encode(): ctypes.create_string_buffer(text.encode()) for name, text in texts.items()}
    for name, payload in payloads.items():
        api.call("LiteRtAddOpaqueOptions", options, make("LiteRtCreateOpaqueOptions", name, payload, _NOTHING))
    compiled = make("LiteRtCreateCompiledModel", environment, model, options)
    try:
        yield compiled
    finally:
        api.library.LiteRtDestroyCompiledModel(compiled)
        api.library.LiteRtDestroyModel(model)
        api.library.LiteRtDestroyEnvironment(environment)


def profile(file: Path, index: int, signature: LiteRtSignature, *, threads: int, runs: int) -> tuple[Totals, float]:
    """Runs a signature with the profiler on.

    Args:
        file: the `.tflite` that `signature` was bound from.
        index: the signature's number in it.
        runs: after some that aren't counted.

    Returns:
        What `parse` gives, and the milliseconds of a run by the clock.

    Raises:
        BackendError: this version of LiteRT has another C API.
    """
    api = c_api()
    ins, outs = ((ctypes.c_void_p * len(side))(*side) for side in signature.addresses)
    with quiet_stderr(), _profiled(api, file, threads) as compiled:
        profiler, text = ctypes.c_void_p(), ctypes.c_char_p()
        api.call("LiteRtCompiledModelGetProfiler", compiled, ctypes.byref(profiler))

        def run(times: int) -> float:
            started = time.perf_counter()
            for _ in range(times):
                api.call("LiteRtRunCompiledModel", compiled, ctypes.c_size_t(index), ctypes.c_size_t(len(ins)), ins,
                         ctypes.c_size_t(len(outs)), outs)  # fmt: skip
            return 1e3 * (time.perf_counter() - started) / times

        run(3)
        api.call("LiteRtStartProfiler", profiler)
        spent_ms = run(runs)
        api.call("LiteRtStopProfiler", profiler)
        api.call("LiteRtGetProfileSummary", profiler, compiled, ctypes.byref(text))
        return parse((text.value or b"").decode()), spent_ms


def _run(args: argparse.Namespace) -> int:
    with SEEDStory(args.bundle, threads=args.threads) as model:
        decoder, bundle = model.decoder, model.bundle
        entries = decoder.signatures
        if args.signature not in entries:
            raise UsageError("the decoder has no such signature", got=args.signature, expected=", ".join(entries))
        vocab = bundle.manifest.story.llama.vocab_size
        decoder.feed(decoder.embed(np.random.default_rng(0).integers(0, vocab, model.cache.slots).tolist()))
        signature = entries[args.signature]
        assert isinstance(signature, LiteRtSignature)
        found, run_ms = profile(bundle.file(graph_file(DECODER)), signature.index, signature,
                                threads=model.threads, runs=args.runs)  # fmt: skip
    rest_ms = run_ms - sum(spent for spent, _ in found.values())
    rows = [*found.items(), ("unaccounted", (rest_ms, 0))]
    write(f"{cpu_model()}, {model.threads} threads, {args.signature}: {run_ms:.2f} ms, {args.runs} runs\n")
    write(table([(f"{spent:8.3f} ms {100 * spent / run_ms:5.1f} %", f"{count or '':4} {kind}")
                 for kind, (spent, count) in rows]) + "\n")  # fmt: skip
    write_json({"cpu": cpu_model(), "threads": model.threads, "signature": args.signature, "run_ms": run_ms,
                "operators": {kind: {"ms": spent, "count": count} for kind, (spent, count) in rows},
                "versions": versions()})  # fmt: skip
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and prints a table, then one line of JSON."""
    prepare()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--bundle", default="build/story", metavar="DIR", help="the bundle's folder (default: %(default)s)")
    add("--signature", default=DECODE, metavar="NAME", help="such as prefill_64 (default: %(default)s)")
    add("--runs", type=whole(1), default=50, metavar="N", help="how many (default: %(default)s)")
    add("--threads", type=whole(1), metavar="N", help="CPU threads (default: the fast cores, at most four)")
    args = parser.parse_args(argv)
    return exit_code(lambda: _run(args), "ops")


if __name__ == "__main__":
    sys.exit(main())
