"""`python -m training.evaluate`: measures an exported bundle through the device's own runtime. Needs no TensorFlow.

Each command is one metric and one file of `training.evaluation`, where it is defined.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_story.cli import whole
from seed_story.errors import SeedStoryError, UsageError
from seed_story.output import exit_code, prepare, write, write_json
from seed_story.policies import POLICIES

if TYPE_CHECKING:
    from seed_story.story import SEEDStory
    from training.data import StoryRecord
    from training.evaluation.items import PictureItem


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one metric and prints its report.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        The exit code: 0, 1 (failed), 2 (wrong usage), 130 (interrupted) or 141 (nobody reads the output).
    """
    prepare()
    args = build_parser().parse_args(argv)
    return exit_code(lambda: _run(args), "evaluate", "interrupted; nothing was written")


def _run(args: argparse.Namespace) -> int:
    report = args.run(args)
    if args.as_json:
        write_json(report)
    else:
        write(args.render(report))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all metrics."""
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate", description="Measures an exported bundle on held-out pictures and stories."
    )
    parser.set_defaults(render=_lines)
    commands = parser.add_subparsers(title="metrics", required=True, metavar="METRIC")

    def command(name: str, run: Any, text: str, *, limit: int | None = None) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        _add_common(made, limit)
        made.set_defaults(run=run, metric=name)
        return made

    grounding = command("grounding", _grounding, "whether the first two sentences name what the picture shows")
    grounding.add_argument(
        "--beginning", default="Once upon a time,", help="how the stories begin (default: %(default)r)"
    )
    grounding.add_argument("--details", type=Path, metavar="FILE", help="write one JSON line a picture to this file")
    perplexity = command("perplexity", _perplexity, "the loss on held-out stories, with and without their pictures")
    shuffled = command("shuffled", _shuffled, "how much the loss rises with another story's pictures")
    repetition = command("repetition", _repetition, "how much the stories repeat themselves", limit=20)
    repetition.add_argument(
        "--tokens", type=whole(1), default=200, metavar="N", help="a story's most (default: %(default)s)"
    )
    repetition.add_argument("--out", type=Path, metavar="FILE.md", help="write the stories, unedited, to this file")
    looked_at = command("attention", _attention, "what a story's words look at, and the cache's budget that follows")
    looked_at.set_defaults(render=_attention_table)
    length = command("length", _length, "how a story goes on that outgrows its cache, under several caches")
    _add_length(length)
    own = "your own pictures: a folder (fox_2.jpg shows a fox) or a JSONL like grounding.jsonl"
    for each in (grounding, repetition):
        each.add_argument("--pictures", type=Path, metavar="PATH", help=own)
    for each in (perplexity, shuffled):
        each.add_argument("--pages", type=whole(1), default=3, metavar="N",
                          help="cut stories after this many pages (default: %(default)s)")  # fmt: skip
    return parser


def _add_length(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dense", metavar="DIR", help="the same model exported with more slots than a story has tokens (--slots 4096)")
    add("--caches", type=_list(str), metavar="LIST", default=list(POLICIES),
        help="what to compare, POLICY or POLICY:BEGIN+END:EVICTION, with commas (default: every policy)")  # fmt: skip
    add("--pages", type=_list(whole(1)), default=[10, 20, 30, 50], metavar="LIST",
        help="lengths of the story at which it is looked at (default: 10,20,30,50)")  # fmt: skip
    add("--span", type=whole(1), default=2, metavar="N", help="score N pages up to each (default: %(default)s)")
    add("--told", type=whole(0), default=3, metavar="N", help="let the model tell N stories itself (default: 3)")
    add("--out", type=Path, default=Path("build/length"), metavar="DIR",
        help="length.md, length.json, length.png, and readings.jsonl, from which a stopped run goes on "
        "(default: %(default)s)")  # fmt: skip


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """An argparse type: values with commas between them."""
    return lambda text: [kind(part) for part in text.split(",")]


def _add_common(parser: argparse.ArgumentParser, limit: int | None) -> None:
    add = parser.add_argument
    add("--bundle", default="build/story", metavar="DIR", help="the exported bundle (default: %(default)s)")
    add("--data", type=Path, default=Path("build/storybook"), metavar="DIR", help="the data (default: %(default)s)")
    add("--limit", type=whole(1), default=limit, metavar="N", help=f"use at most N of them (default: {limit or 'all'})")
    add(
        "--seed",
        type=whole(0),
        default=0,
        metavar="N",
        help="of the subset, the stories and the intervals (default: 0)",
    )
    add("--threads", type=whole(1), metavar="N", help="CPU threads (default: the fast cores, at most four)")
    add("--json", action="store_true", dest="as_json", help="print one JSON object instead of a table")


def _open(args: argparse.Namespace) -> SEEDStory:
    from seed_story.story import SEEDStory

    return SEEDStory(args.bundle, threads=args.threads)


def _report(args: argparse.Namespace, model: SEEDStory, figures: dict[str, Any]) -> dict[str, Any]:
    manifest = model.bundle.manifest
    return {"metric": args.metric, "bundle": manifest.name, "recipe": manifest.recipe, "seed": args.seed, **figures}


def _items(args: argparse.Namespace) -> list[PictureItem]:
    from training.evaluation.items import read_items, subset

    items = read_items(args.pictures or args.data / "grounding.jsonl")
    return subset(items, args.limit, args.seed, key=lambda item: item.split)


def _stories(args: argparse.Namespace) -> list[StoryRecord]:
    from training.data import read_stories
    from training.evaluation.items import held_out_stories, subset

    return subset(read_stories(held_out_stories(args.data)), args.limit, args.seed)


def _grounding(args: argparse.Namespace) -> dict[str, Any]:
    from training.evaluation.grounding import grounding

    items = _items(args)
    _check_folder(args.details)
    with _open(args) as model:
        figures, told = grounding(model, items, beginning=args.beginning, seed=args.seed)
        if args.details:
            _write_file(args.details, (json.dumps(one.to_dict(), ensure_ascii=False) + "\n" for one in told))
        return _report(args, model, figures)


def _perplexity(args: argparse.Namespace) -> dict[str, Any]:
    from training.evaluation.perplexity import perplexity

    stories = _stories(args)
    with _open(args) as model:
        return _report(args, model, perplexity(model, stories, pages=args.pages, seed=args.seed))


def _shuffled(args: argparse.Namespace) -> dict[str, Any]:
    from training.evaluation.shuffled import shuffled

    stories = _stories(args)
    with _open(args) as model:
        return _report(args, model, shuffled(model, stories, pages=args.pages, seed=args.seed))


def _repetition(args: argparse.Namespace) -> dict[str, Any]:
    from training.evaluation.repetition import repetition, to_markdown

    items = _items(args)
    _check_folder(args.out)
    with _open(args) as model:
        figures, stories = repetition(model, items, tokens=args.tokens, seed=args.seed)
        if args.out:
            _write_file(args.out, [to_markdown(stories, args.out.parent)])
        return _report(args, model, figures)


def _attention(args: argparse.Namespace) -> dict[str, Any]:
    from training.evaluation.attention import attention

    stories = _stories(args)
    with _open(args) as model:
        return _report(args, model, attention(model, stories))


def _lines(report: dict[str, Any]) -> str:
    from training.evaluation.report import lines

    return lines(report)


def _attention_table(report: dict[str, Any]) -> str:
    from training.evaluation.attention import to_table

    return to_table(report)


def _length(args: argparse.Namespace) -> dict[str, Any]:
    from contextlib import ExitStack

    from seed_story.device import cpu_model
    from seed_story.story import SEEDStory
    from training.data import read_stories
    from training.evaluation.items import held_out_stories
    from training.evaluation.length import Plan, cache_of, dense_cache, measure
    from training.evaluation.length_report import markdown, plot, report
    from training.names import read_labels

    file = held_out_stories(args.data)
    stories, things = read_stories(file), {picture: of for picture, (of, _) in read_labels(file).items()}
    plan = Plan(tuple(sorted(set(args.pages))), args.span, args.limit, args.told, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        model = stack.enter_context(_open(args))
        caches = [cache_of(model, spec) for spec in args.caches]
        if args.dense:
            dense = stack.enter_context(SEEDStory(args.dense, threads=args.threads))
            caches.append(dense_cache(dense, stories, max(plan.lengths)))
        readings = measure(caches, stories, plan, things, args.out / "readings.jsonl")
        found = _report(args, model, {"cpu": cpu_model(), "slots": model.cache.slots, **report(readings, plan)})
    caption = f"{found['bundle']} {found['recipe']}, {found['slots']} slots; {found['cpu']}"
    _write_file(args.out / "length.json", [json.dumps(found, indent=1), "\n"])
    _write_file(args.out / "length.md", [markdown(found)])
    _write_whole(args.out / "length.png", lambda hidden: plot(found, caption).save(hidden, format="PNG"))
    return found


def _check_folder(file: Path | None) -> None:
    """Before the minutes that the stories take."""
    if file is not None and not file.parent.is_dir():
        raise UsageError("the folder to write to doesn't exist", got=file.parent, expected="a folder")


def _write_file(file: Path, parts: Iterable[str]) -> None:
    """All or nothing."""
    _write_whole(file, lambda hidden: hidden.write_text("".join(parts), encoding="utf-8"))


def _write_whole(file: Path, write_to: Callable[[Path], object]) -> None:
    """All or nothing."""
    from seed_story.files import whole_file

    try:
        with whole_file(file) as hidden:
            write_to(hidden)
    except OSError as error:
        raise SeedStoryError(f"{file} can't be written", got=error.strerror or error) from error


if __name__ == "__main__":
    sys.exit(main())
