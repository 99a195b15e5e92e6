"""`python -m training.storybook`: writes the data set (`build`), long stories (`long`), and a teacher's (`teach`)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from seed_story.cli import whole
from seed_story.output import exit_code, write_json


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and runs one command; returns the exit code."""
    args = _parser().parse_args(argv)
    return exit_code(lambda: args.run(args), "storybook", f"interrupted; {args.kept}")


def _build(args: argparse.Namespace) -> int:
    from training.storybook.build import build

    counts = build(args.out, args.size, seed=args.seed)
    print(_counts(counts), f"-> {args.out}")
    return 0


def _long(args: argparse.Namespace) -> int:
    from training.storybook.build import build_long

    print(f"test {build_long(args.out, args.stories, args.pages, seed=args.seed)} -> {args.out}")
    return 0


def _teach(args: argparse.Namespace) -> int:
    from training.storybook.teacher import TAUGHT, first_pages, open_teacher, teach

    pages = first_pages(args.data, args.stories, args.seed)
    with open_teacher(args.bundle, threads=args.threads) as teacher:
        report = teach(teacher, args.data, pages, seed=args.seed, attempts=args.attempts)
    rejected = report["rejected"]
    print(f"rejected attempts: {_counts(rejected) or 'none'}", file=sys.stderr)
    if args.as_json:
        write_json(report)
    else:
        print(_counts({key: report[key] for key in ("pictures", "stories", "skipped")}), f"-> {args.data / TAUGHT}")
    return 0


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.storybook", description="The storybook data set.")
    commands = parser.add_subparsers(required=True, metavar="command")
    data = Path("build/storybook")

    build = commands.add_parser("build", help="draw the pictures, tell the stories, write them as StoryStream")
    build.add_argument("--out", type=Path, default=data, help="a new folder (default: %(default)s)")
    build.add_argument("--size", default="full", help="tiny, small or full (default: %(default)s)")
    build.add_argument("--seed", type=int, default=0, help="of everything that is chosen (default: %(default)s)")
    build.set_defaults(run=_build, kept="rendered drawings are kept, the data set isn't there yet")

    long = commands.add_parser("long", help="tell long stories of kept drawings, for `training.evaluate length`")
    add = long.add_argument
    add("--out", type=Path, default=Path("build/storybook-long"), metavar="DIR",
        help="a new folder (default: %(default)s)")  # fmt: skip
    add("--stories", type=whole(1), default=12, metavar="N", help="how many (default: %(default)s)")
    add("--pages", type=whole(1), default=50, metavar="N", help="of each (default: %(default)s)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of everything that is chosen (default: %(default)s)")
    long.set_defaults(run=_long, kept="rendered drawings are kept, the stories aren't there yet")

    teach = commands.add_parser("teach", help="let the plain decoder write stories to training pictures, and filter")
    add = teach.add_argument
    add("--bundle", type=Path, default=Path("build/teacher"), metavar="DIR",
        help="an export with --checkpoint none (default: %(default)s)")  # fmt: skip
    add("--data", type=Path, default=data, metavar="DIR", help="the data set (default: %(default)s)")
    add("--stories", type=whole(1), default=400, metavar="N", help="pictures to write to (default: %(default)s)")
    add("--attempts", type=whole(1), default=4, metavar="N", help="at most, for a picture (default: %(default)s)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the pictures and texts (default: %(default)s)")
    add("--threads", type=whole(1), metavar="N", help="CPU threads (default: the fast cores, at most four)")
    add("--json", action="store_true", dest="as_json", help="print the counts as one JSON object")
    teach.set_defaults(run=_teach, kept="what was written is kept, and the same command goes on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
