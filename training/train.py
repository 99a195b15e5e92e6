"""`python -m training.train`: from a data set and a preset's pretrained parts to a checkpoint that an export takes."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from model.backend import use_tensorflow
from seed_story.output import exit_code
from seed_story.quiet import quiet_stderr
from training.recipe import DECODERS, Recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and trains; returns the exit code: 130 when it was interrupted, to be gone on with."""
    args = _parser().parse_args(argv)
    use_tensorflow(accelerator=True)
    return exit_code(lambda: _train(args), "train", "stopped; run the same command again to go on from what was saved")


def _train(args: argparse.Namespace) -> int:
    recipe = Recipe(args.minutes, args.decoder, args.vision_blocks, seed=args.seed, mixed_precision=args.bfloat16)
    with quiet_stderr():
        from training.stages import train_model
    # Stage 1 leaves the attention to patches alone on purpose.
    warnings.filterwarnings("ignore", message="Gradients do not exist", category=UserWarning)
    if not train_model(args.model, args.data, args.out, recipe):
        raise KeyboardInterrupt  # which the training has taken, to save what it had
    print(f"Wrote {args.out / 'checkpoint'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Trains a story model.")
    parser.add_argument("--data", type=Path, default=Path("build/storybook"),
                        help="a folder with train.jsonl in StoryStream's form (default: %(default)s)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("build/training"),
                        help="where checkpoints, logs and the result go (default: %(default)s)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=Recipe.minutes,
                        help="how long; the first run turns it into steps (default: %(default)g)")  # fmt: skip
    parser.add_argument("--model", default="seed-story-135m", help="a preset (default: %(default)s)")
    parser.add_argument("--decoder", choices=DECODERS, default=Recipe.decoder, help="(default: %(default)s)")
    parser.add_argument("--vision-blocks", type=int, default=Recipe.vision_blocks, metavar="N",
                        help="last blocks of the ViT that are trained (default: %(default)s)")  # fmt: skip
    parser.add_argument("--bfloat16", action="store_true", help="mixed precision, for accelerators")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
