"""Speed beside other engines, on the same weights and machine, interleaved in one run: `make bench-peers`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.peers.files import Workshop
from benchmarks.peers.measure import Result
from benchmarks.peers.report import to_json, to_text
from benchmarks.peers.session import Setting, make_plan, run
from benchmarks.peers.table import CACHE_LENGTH, PEERS, Engine
from benchmarks.roofline import read_bandwidth_gb_s
from quantization.reference import check_reference
from seed_story.bundle import Bundle
from seed_story.cli import whole
from seed_story.device import cpu_model
from seed_story.files import cache_dir
from seed_story.output import exit_code, note, prepare, write, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and prints a table, then one line of JSON."""
    prepare()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    for recipe in ("float32", "int8", "int4"):
        parser.add_argument(f"--{recipe}", type=Path, default=Path(f"build/base-{recipe}"), metavar="BUNDLE",
                            help="made with --checkpoint none (default: %(default)s)")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=[peer.key for peer in PEERS], help="not all peers")
    parser.add_argument("--threads", type=whole(1), default=2)
    parser.add_argument("--depth", type=whole(1), default=512, help=f"at most {CACHE_LENGTH - 64} for LiteRT-LM")
    parser.add_argument("--rounds", type=whole(1), default=20)
    parser.add_argument("--prepare", action="store_true", help="install and make what is needed, and measure nothing")
    parser.add_argument("--venvs", type=Path, default=Path("build/peers"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    return exit_code(lambda: _run(args), "bench-peers", "stopped; what was made stays for the next run")


def _run(args: argparse.Namespace) -> int:
    bundles = {"float32": args.float32, "int8": args.int8, "int4": args.int4}
    opened = {recipe: Bundle.open(path) for recipe, path in bundles.items()}
    check_reference(opened["float32"], [opened["int8"], opened["int4"]])
    peers = [peer for peer in PEERS if not args.only or peer.key in args.only]
    setting = Setting(bundles, threads=args.threads, depth=args.depth, rounds=args.rounds)
    workshop = Workshop(args.venvs.absolute(), cache_dir() / "benchmarks" / "peers", note)
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(peers, setting, workshop, Path(folder))
        if args.prepare:
            write_json({"gaps": to_json(peers, plan.results)["gaps"]})
            return 0
        reads = [read_bandwidth_gb_s(args.threads)]
        run(plan, setting, Path(folder), note)
        reads.append(read_bandwidth_gb_s(args.threads))
    _print(peers, plan.results, setting, [round(read, 1) for read in reads])
    return 0


def _print(peers: Sequence[Engine], results: Mapping[str, Result], setting: Setting, reads: Sequence[float]) -> None:
    """Of `reads`: where a host has put the virtual CPUs decides how fast they read memory, and what is faster."""
    loads = [round(load, 1) for load in os.getloadavg()]
    head = f"{cpu_model()}, {setting.threads} threads, {setting.depth} tokens, {setting.rounds} rounds"
    memory = f"memory read at {reads[0]} GB/s before, {reads[1]} after"
    write(f"{head}: median [quartiles]; load average at the end {loads[1]}, {memory}\n\n{to_text(peers, results)}\n")
    write_json({"cpu": cpu_model(), "threads": setting.threads, "depth": setting.depth, "rounds": setting.rounds,
                "load_average": loads, "read_bandwidth_gb_s": reads, **to_json(peers, results)})  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
