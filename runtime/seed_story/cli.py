"""The command line: `seed-story tell`, `inspect`, `doctor` and `certify`. Parses, then calls one function.

Everything heavy is imported by the command that needs it, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from seed_story import __version__
from seed_story.output import exit_code, prepare
from seed_story.policies import PICTURE_EVICTIONS, POLICIES

DEFAULT_PROMPT = "Once upon a time,"

# Fields of SamplingConfig: type and meaning; a test holds the defaults in these texts to the real ones.
_SAMPLING: tuple[tuple[str, type[int] | type[float], str], ...] = (
    ("temperature", float, "divides the scores; 0 takes the best token always (default 0.4)"),
    ("top_k", int, "choose among the K best tokens; 0 for all (default 0)"),
    ("top_p", float, "choose among the best tokens that make up this probability (default 1.0)"),
    ("min_p", float, "leave out tokens less than this fraction as probable as the best (default 0.05)"),
    ("repetition_penalty", float, "makes recent tokens less likely; 1 for none (default 1.15)"),
    ("no_repeat_ngram", int, "never repeat a sequence of N tokens; 0 for off (default 0)"),
)


def whole(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number, `least` or more."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number, {least} or more")
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="seed-story", description="Stories from pictures and text, told on this device."
    )
    parser.add_argument("--version", action="version", version=f"seed-story {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_tell(commands.add_parser("tell", help="tell a story", description=_TELL))
    inspect = commands.add_parser("inspect", help="show what a bundle is", description=_INSPECT)
    inspect.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    inspect.set_defaults(run=_inspect)
    doctor = commands.add_parser("doctor", help="check this device", description=_DOCTOR)
    doctor.add_argument("--bundle", metavar="DIR", help="check this bundle, not the default one")
    doctor.add_argument("--threads", action="store_true", help="also time a token by number of threads (some seconds)")
    doctor.set_defaults(run=_doctor)
    certify = commands.add_parser("certify", help="prove that a long story costs no more", description=_CERTIFY)
    _add_certify(certify)
    for command in (inspect, doctor, certify):
        command.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object")
    return parser


_TELL = "Tells a story: to standard output as it comes, its statistics to standard error."
_INSPECT = "Verifies a bundle's files and shows what is in it."
_DOCTOR = "Checks whether stories can be told on this device; exit code 1 when they can't."
_CERTIFY = (
    "Tells a long story beside a short one and judges time per token and memory, the last page against page 5: "
    "PASS (exit code 0) or FAIL (1), with a plot."
)


def _add_tell(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    places = "$SEED_STORY_BUNDLE, build/story, or the one in the cache folder"
    add("--bundle", metavar="DIR", help=f"the bundle's folder (default: {places})")
    add("--image", metavar="FILE", action="append", default=[], dest="images",
        help="a picture to begin with; may be given several times")  # fmt: skip
    add("--prompt", metavar="TEXT", default=DEFAULT_PROMPT,
        help="how the story begins, - for standard input (default: %(default)r)")  # fmt: skip
    add(
        "--max-tokens",
        metavar="N",
        type=whole(1),
        default=256,
        help="tell at most N tokens (default %(default)s)",
    )
    add("--seed", metavar="N", type=whole(0), default=0,
        help="the same seed gives the same story on the same machine (default %(default)s)")  # fmt: skip
    add("--threads", metavar="N", type=whole(1), help="CPU threads (default: the fast cores, at most four)")
    add("--backend", metavar="NAME", default="litert", help="the inference engine (default %(default)s)")
    _add_policy(parser)
    add("--stop", metavar="TEXT", action="append", default=[],
        help="end the story before this text; may be given several times")  # fmt: skip
    add("--greedy", action="store_true", help="the best token always: no chance, no penalty")
    add("--speculate", action=argparse.BooleanOptionalAction,
        help="guess what comes from what was told, and test several guesses in one run of the decoder: the same "
        "story, faster where it repeats itself (default: where it pays, as with --greedy, if the bundle can)",
        )  # fmt: skip
    for name, kind, text in _SAMPLING:
        add(f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X", help=text)
    add("--json", action="store_true", dest="as_json", help="print one JSON object instead of the story")
    parser.set_defaults(run=_tell)


def _add_policy(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--policy", choices=POLICIES, help="what the cache keeps when it is full (default: the bundle's)")
    add("--picture-eviction", choices=PICTURE_EVICTIONS,
        help="whose anchors go when there are too many pictures (default: the bundle's)")  # fmt: skip


def _add_certify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("bundle", metavar="BUNDLE", help="the bundle's folder")
    add("--pages", metavar="N", type=whole(1), default=100, help="tell N pages (default %(default)s)")
    add("--tokens", metavar="N", type=whole(1), default=64, help="tell N tokens a page (default %(default)s)")
    add("--picture", metavar="FILE", action="append", default=[], dest="images",
        help="a picture to show; several take turns (default: drawn ones, no two alike)")  # fmt: skip
    add("--picture-every", metavar="N", type=whole(1), default=3,
        help="show a picture on every Nth page (default %(default)s)")  # fmt: skip
    add("--seed", metavar="N", type=whole(0), default=0, help="of the story (default %(default)s)")
    add("--threads", metavar="N", type=whole(1), help="CPU threads (default: the fast cores, at most four)")
    add("--backend", metavar="NAME", default="litert", help="the inference engine (default %(default)s)")
    _add_policy(parser)
    add("--plot", metavar="FILE", default="certificate.png", help="the plot to write (default %(default)s)")
    parser.set_defaults(run=_certify)


def _tell(args: argparse.Namespace) -> int:
    from seed_story.telling import prompt_from_stdin, sampling_config, tell

    options = {name: getattr(args, name) for name, *_ in _SAMPLING}
    return tell(
        bundle=args.bundle,
        images=args.images,
        sampling=sampling_config(greedy=args.greedy, stop=args.stop, options=options),
        prompt=prompt_from_stdin() if args.prompt == "-" else args.prompt,
        max_tokens=args.max_tokens,
        seed=args.seed,
        threads=args.threads,
        backend=args.backend,
        policy=args.policy,
        picture_eviction=args.picture_eviction,
        speculate=args.speculate,
        as_json=args.as_json,
    )


def _inspect(args: argparse.Namespace) -> int:
    from seed_story.describe import inspect

    return inspect(args.bundle, as_json=args.as_json)


def _doctor(args: argparse.Namespace) -> int:
    from seed_story.doctor import doctor

    return doctor(args.bundle, as_json=args.as_json, threads=args.threads)


def _certify(args: argparse.Namespace) -> int:
    from seed_story.certify import certify

    return certify(
        bundle=args.bundle,
        pages=args.pages,
        tokens=args.tokens,
        images=args.images,
        picture_every=args.picture_every,
        seed=args.seed,
        threads=args.threads,
        backend=args.backend,
        policy=args.policy,
        picture_eviction=args.picture_eviction,
        plot=args.plot,
        as_json=args.as_json,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        The exit code: 0, 1 (failed), 2 (wrong usage), 130 (interrupted) or 141 (nobody reads the output).
    """
    prepare()
    args = build_parser().parse_args(argv)
    return exit_code(lambda: int(args.run(args)), "seed-story")


if __name__ == "__main__":
    sys.exit(main())
