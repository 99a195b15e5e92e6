"""`python -m quantization`: what quantized bundles keep of the float reference, and what they cost."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_story.cli import whole
from seed_story.errors import UsageError
from seed_story.output import exit_code, prepare, write, write_json

if TYPE_CHECKING:
    from quantization.report import Material
    from seed_story.bundle import Bundle


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, 1 (failed), 2 (wrong usage), 130 (interrupted)."""
    prepare()
    args = build_parser().parse_args(argv)
    return exit_code(lambda: int(args.run(args)), "quantization", "interrupted; nothing was written")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(prog="python -m quantization", description="Measures quantized bundles.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    text = "compares bundles with the float32 bundle of the same weights"
    report = commands.add_parser("report", help=text, description=f"{text[0].upper()}{text[1:]}.")
    _add_report(report)
    return parser


def _add_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundles", nargs="+", type=Path, metavar="BUNDLE", help="a bundle's folder")
    add("--reference", type=Path, default=Path("build/float32"), metavar="DIR",
        help="the float32 bundle of the same weights (default: %(default)s)")  # fmt: skip
    add("--data", type=Path, default=Path("build/storybook"), metavar="DIR",
        help="held-out stories and pictures: test.jsonl, grounding.jsonl (default: %(default)s)")  # fmt: skip
    add("--tokens", type=whole(1), default=4000, metavar="N", help="compare at N tokens of stories (default: 4000)")
    add("--pictures", type=whole(1), default=200, metavar="N", help="compare N pictures' features (default: 200)")
    add("--told", type=whole(1), default=40, metavar="N", help="tell about N pictures (default: 40)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of subsets, stories and intervals (default: 0)")
    add("--threads", type=whole(1), metavar="N", help="CPU threads (default: the fast cores, at most four)")
    add("--plot", type=Path, default=Path("quality.png"), metavar="FILE", help="the plot (default: %(default)s)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--sensitivity", action="store_true",
                         help="instead: rank matrices by what each costs when it alone is quantized")  # fmt: skip
    instead.add_argument("--locate", action="store_true",
                         help="instead: name the first matrix that leaves the reference")  # fmt: skip
    add("--json", action="store_true", dest="as_json", help="print one JSON object as the last line")
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> int:
    from quantization.render import located, ranking, save_pareto, to_markdown
    from quantization.report import Plan, make_report, take_apart
    from seed_story.bundle import Bundle
    from seed_story.chart import check_plot

    check_plot(args.plot)
    plan = Plan(args.tokens, args.pictures, args.told, args.seed, args.threads)
    material, reference = _material(args.data), _reference(args.reference)
    bundles = [Bundle.open(path) for path in args.bundles]
    made: dict[str, Any]
    if args.sensitivity or args.locate:
        made = {"bundles": take_apart(reference, bundles, material, plan, ranked=args.sensitivity)}
        write((ranking if args.sensitivity else located)(made["bundles"]))
    else:
        made = make_report(reference, bundles, material, plan)
        write(to_markdown(made))
        save_pareto(args.plot, made)
    if args.as_json:
        write_json(made)
    return 0


def _reference(path: Path) -> Bundle:
    from seed_story.bundle import Bundle

    if not path.is_dir():
        raise UsageError("there is no float reference", got=path, expected="a float32 bundle",
                         hint="Make one: python -m export --recipe float32 --out build/float32")  # fmt: skip
    return Bundle.open(path)


def _material(folder: Path) -> Material:
    from quantization.report import Material
    from training.data import read_stories
    from training.evaluation.items import held_out_stories, read_items

    return Material(read_stories(held_out_stories(folder)), read_items(folder / "grounding.jsonl"))


if __name__ == "__main__":
    sys.exit(main())
