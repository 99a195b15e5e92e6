"""`python -m export.learn_scales`: from a data set and a checkpoint to the scales that a recipe's export takes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.lesson import Lesson
from export.source_arguments import add_source_arguments, source_of
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
    file = learn_scales(source_of(args, recipe), recipe, lesson)
    if file is None:
        raise KeyboardInterrupt  # which the training has taken, to save what it had
    print(f"Wrote {file}\nPut it into the checkpoint's folder, or give it to `python -m export --scales`, and exports "
          f"by {recipe.name} use it.")  # fmt: skip
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.learn_scales", description="Learns the scales of a decoder's rounded matrices."
    )
    add_source_arguments(parser, "rotation")
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
