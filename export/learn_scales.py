"""`python -m export.learn_scales`: from a data set and a checkpoint to the scales that a recipe's export takes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.lesson import Lesson
from model.backend import use_tensorflow
from quantization.recipe import CALIBRATION, load_recipe, recipe_names
from seed_story.output import exit_code
from seed_story.quiet import quiet_stderr


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and learns; returns the exit code: 130 when it was interrupted, to be gone on with."""
    args = _parser().parse_args(argv)
    use_tensorflow()
    stopped = "stopped; run the same command again to go on from what was saved"
    return exit_code(lambda: _learn(args), "learn_scales", stopped)


def _learn(args: argparse.Namespace) -> int:
    recipe = load_recipe(args.recipe)
    lesson = Lesson(data=args.data, out=args.out, minutes=args.minutes, calibration=args.calibration,
                    seed=args.seed)  # fmt: skip
    with quiet_stderr():  # it reports on accelerators that it doesn't find, whatever its log level
        from export.scale_learning import learn_scales
    file = learn_scales(args.model, args.checkpoint, recipe, lesson)
    if file is None:
        raise KeyboardInterrupt  # which the training has taken, to save what it had
    print(f"Wrote {file}\nPut it into the checkpoint's folder, and exports by {recipe.name} use it.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.learn_scales", description="Learns the scales of a decoder's rounded matrices."
    )
    parser.add_argument("--model", default="seed-story-135m", help="a preset (default: %(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="a folder of trained weights (default: the model's own)")
    parser.add_argument("--recipe", default="int4",
                        help=f"one that names learned scales, of {', '.join(recipe_names())}, or a .json file "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--data", type=Path, default=Path("build/storybook"),
                        help="a folder with train.jsonl in StoryStream's form (default: %(default)s)")  # fmt: skip
    parser.add_argument("--calibration", type=Path, metavar="FOLDER", default=CALIBRATION,
                        help="as an export is given it: the codes must be the same")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("build/scales"),
                        help="where checkpoints, logs, features and the result go (default: %(default)s)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=Lesson.minutes,
                        help="how long; the first run turns it into steps (default: %(default)g)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
