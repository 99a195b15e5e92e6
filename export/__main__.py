"""`python -m export`: writes a bundle."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from seed_story.config import CacheConfig
from seed_story.contract import PREFILL_SIZES
from seed_story.errors import SeedStoryError
from seed_story.policies import MULTIMODAL_SINK, PICTURE_EVICTIONS, POLICIES
from seed_story.quiet import quiet_stderr


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and exports; returns the exit code."""
    args = _parser().parse_args(argv)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow reads it when it is imported
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
    try:
        return _run(args)
    except SeedStoryError as error:
        print(f"export: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nexport: interrupted; nothing was written", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    from quantization.recipe import load_recipe

    recipe = load_recipe(args.recipe)  # before the seconds that TensorFlow takes
    cache = CacheConfig(slots=args.slots, sinks=args.sinks)
    if args.policy:
        changes = {"picture_eviction": args.picture_eviction} if args.policy == MULTIMODAL_SINK else {}
        cache = cache.under(args.policy, **changes)
    with quiet_stderr():  # it reports on accelerators that it doesn't find, whatever its log level
        import tensorflow as tf

        tf.zeros(1)
    from export.export import ExportOptions, export_bundle, summary
    from model.story_source import load_source
    from model.vocabulary import read_corpus, trim_source

    source = load_source(args.model, llama=args.llama, vision=args.vision, checkpoint=args.checkpoint)
    if args.trim_vocabulary:
        source = trim_source(source, read_corpus(args.trim_vocabulary))
    bundle = export_bundle(source, recipe, args.out, ExportOptions(cache, tuple(args.prefill), force=args.force))
    print(summary(bundle))
    if not source.qformer_trained:
        print("The Q-Former is untrained: a picture doesn't influence the story yet.")
    print(f"Wrote {args.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description="Writes a bundle for the device.")
    parser.add_argument("--model", default="seed-story-135m", help="a preset (default: %(default)s)")
    parser.add_argument("--llama", help="another decoder: a .gguf file, or a Hugging Face folder or hub id")
    parser.add_argument("--vision", help="another vision transformer: a Hugging Face folder or hub id")
    parser.add_argument("--checkpoint", help="a folder of trained weights, or none (default: the model's own)")
    parser.add_argument("--recipe", default="int8", help="float32, float16, int8, or a .json file")
    parser.add_argument("--out", type=Path, default=Path("build/story"), help="the bundle's folder")
    parser.add_argument("--slots", type=int, default=512, help="slots of the cache (default: %(default)s)")
    parser.add_argument("--sinks", type=int, default=4, help="of these, attention sinks (default: %(default)s)")
    parser.add_argument(
        "--policy", choices=POLICIES, help="what the cache keeps (default: text-sink; a session may change it)"
    )
    parser.add_argument("--picture-eviction", choices=PICTURE_EVICTIONS, default=PICTURE_EVICTIONS[0],
                        help="with multimodal-sink, whose anchors make room (default: %(default)s)")  # fmt: skip
    parser.add_argument("--prefill", type=int, nargs="+", default=list(PREFILL_SIZES), metavar="N",
                        help="chunk sizes of the prefill graphs (default: 16 64 128)")  # fmt: skip
    parser.add_argument("--trim-vocabulary", type=Path, metavar="CORPUS",
                        help="keep only the tokens that this text file or StoryStream .jsonl uses")  # fmt: skip
    parser.add_argument("--force", action="store_true",
                        help="write the bundle, marked, though it misses its recipe's bounds")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
