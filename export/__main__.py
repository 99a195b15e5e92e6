"""`python -m export`: writes a bundle."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.source_arguments import add_source_arguments, source_of
from model.backend import use_tensorflow
from quantization.recipe import CALIBRATION, load_recipe, recipe_names
from seed_story.cli import whole
from seed_story.config import CacheConfig
from seed_story.contract import BEGIN_SIZES, DECODE_ATTENTION, PREFILL_SIZES, Steps
from seed_story.errors import UsageError
from seed_story.output import exit_code
from seed_story.policies import ATTENTION_MASS, MULTIMODAL_SINK, PICTURE_EVICTIONS, POLICIES, TEXT_SINK
from seed_story.quiet import quiet_stderr


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and exports; returns the exit code."""
    args = _parser().parse_args(argv)
    use_tensorflow()
    return exit_code(lambda: _run(args), "export", "interrupted; nothing was written")


def _run(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.recipe)  # before the seconds that TensorFlow takes
    cache = _cache(args)
    with quiet_stderr():  # it reports on accelerators that it doesn't find, whatever its log level
        import tensorflow as tf

        tf.zeros(1)
    from export.export import ExportOptions, export_bundle, summary
    from export.learned_scales import lacks_scales
    from model.vocabulary import read_corpus, trim_source

    source = source_of(args, recipe)
    if args.trim_vocabulary:
        source = trim_source(source, read_corpus(args.trim_vocabulary))
    begin = [size for size in BEGIN_SIZES if size <= args.slots] if args.begin is None else args.begin
    steps = Steps(tuple(args.prefill), tuple(begin), not args.no_attention, args.verify)
    options = ExportOptions(cache, steps, args.force, args.calibration)
    bundle = export_bundle(source, recipe, args.out, options)
    print(summary(bundle))
    if not source.qformer_trained:
        print("The Q-Former is untrained: a picture doesn't influence the story yet.")
    if lacks_scales(recipe, source):
        print("There are no learned scales for this recipe: `python -m export.learn_scales` learns them.")
    print(f"Wrote {args.out}")
    return 0


def _cache(args: argparse.Namespace) -> CacheConfig:
    names = ("pictures", "picture_begin", "picture_end", "picture_eviction")
    changes = {name: value for name in names if (value := getattr(args, name)) is not None}
    if changes and args.policy != MULTIMODAL_SINK:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changes)
        raise UsageError(f"{flags} needs pictures that are kept", got=f"the policy {args.policy or TEXT_SINK}",
                         expected=f"--policy {MULTIMODAL_SINK}")  # fmt: skip
    cache = CacheConfig(slots=args.slots, sinks=args.sinks)
    if not args.policy:
        return cache
    if pictures := changes.pop("pictures", None):
        sizes = (changes.get(name, getattr(CacheConfig, name)) for name in ("picture_begin", "picture_end"))
        changes["anchors"] = pictures * sum(sizes)
    return cache.under(args.policy, **changes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description="Writes a bundle for the device.")
    add_source_arguments(parser, "rotation", "scales")
    parser.add_argument("--recipe", default="int8", help=f"{', '.join(recipe_names())}, or a .json file")
    parser.add_argument("--calibration", type=Path, metavar="FOLDER", default=CALIBRATION,
                        help="training stories: a folder with stories.jsonl or a data set's train.jsonl, and pictures "
                        "(of very many the first); for recipes that look at what a graph is given "
                        "(default: the project's own)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("build/story"), help="the bundle's folder")
    parser.add_argument("--slots", type=int, default=512, help="slots of the cache (default: %(default)s)")
    parser.add_argument("--sinks", type=int, default=4, help="of these, attention sinks (default: %(default)s)")
    parser.add_argument(
        "--policy", choices=POLICIES, help="what the cache keeps (default: text-sink; a session may change it)"
    )
    kept = {
        "pictures": "with multimodal-sink, how many pictures it remembers (default: as fit in an eighth of the slots)",
        "picture-begin": f"of each, how many of its first tokens (default: {CacheConfig.picture_begin})",
        "picture-end": f"and of its last (default: {CacheConfig.picture_end})",
    }
    for name, text in kept.items():
        parser.add_argument(f"--{name}", type=whole(int(name == "pictures")), metavar="N", help=text)
    parser.add_argument("--picture-eviction", choices=PICTURE_EVICTIONS,
                        help=f"and whose anchors make room (default: {PICTURE_EVICTIONS[0]})")  # fmt: skip
    parser.add_argument("--no-attention", action="store_true",
                        help=f"a smaller decoder without {DECODE_ATTENTION}, which {ATTENTION_MASS} needs")  # fmt: skip
    parser.add_argument("--prefill", type=int, nargs="+", default=list(PREFILL_SIZES), metavar="N",
                        help="chunk sizes of the prefill graphs (default: 16 64 128)")  # fmt: skip
    parser.add_argument("--begin", type=int, nargs="*", metavar="N",
                        help="and of the graphs that read a story's first tokens, which take little more than half "
                        "the time (default: 64 512, if there are as many slots)")  # fmt: skip
    parser.add_argument("--verify", type=whole(2), default=0, metavar="K",
                        help="a decoder that tests K tokens in one run, to speculate with: much faster where a story "
                        "repeats itself, as at temperature 0 (8 is good; default: none)")  # fmt: skip
    parser.add_argument("--trim-vocabulary", type=Path, metavar="CORPUS",
                        help="keep only the tokens that this text file or StoryStream .jsonl uses")  # fmt: skip
    parser.add_argument("--force", action="store_true",
                        help="write the bundle, marked, though it misses its recipe's bounds")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
