"""`python -m export.learn_rotation`: from a data set and a checkpoint to the rotation that its rotated exports take."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from export.source_arguments import add_source_arguments, source_of
from model.backend import use_tensorflow
from quantization.recipe import CALIBRATION
from seed_story.cli import whole
from seed_story.errors import SeedStoryError
from seed_story.output import exit_code
from seed_story.quiet import quiet_stderr

_HELD_OUT = 10
"""The last tenth of the rows, of other stories than the others, is what the figures are of."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and learns; returns the exit code: 130 when it was interrupted, with nothing written."""
    args = _parser().parse_args(argv)
    use_tensorflow()
    return exit_code(lambda: _learn(args), "learn_rotation", "stopped; nothing was written")


def _learn(args: argparse.Namespace) -> int:
    with quiet_stderr():  # it reports on accelerators that it doesn't find, whatever its log level
        from tqdm import tqdm

        from export.decoder_weights import head_name
        from export.learned_rotation import ROTATION_FILE, write_rotation
        from export.rotation_learning import learn_rotation, squared_range, stream_rows
    source = source_of(args)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with tqdm(total=2 * source.model.config.llama.num_layers + 1, desc="reading stories", unit="matrix") as bar:
            rows, fixed = stream_rows(source, args.calibration, args.tokens, bar.update)
        split = {name: len(found) - len(found) // _HELD_OUT for name, found in rows.items()}
        taught = {name: found[: split[name]] for name, found in rows.items()}
        with tqdm(total=args.steps, desc="rotation", unit="step") as bar:
            learned = learn_rotation(taught, head_name(source.model.config.llama), args.steps, bar.update)
        write_rotation(learned @ fixed, args.out / ROTATION_FILE)
    except OSError as error:
        raise SeedStoryError("the rotation can't be written", got=error) from error
    print("The square of rows' ranges, beside the fixed rotation's, in stories that weren't learned from:")
    for kind, names in {"qkv": "_qkv", "gate_up": "_gate_up", "head": head_name(source.model.config.llama)}.items():
        kept = [(one @ learned.T, one) for name in rows if name.endswith(names) for one in [rows[name][split[name] :]]]
        ratios = [squared_range(after) / squared_range(before) for after, before in kept if len(before)]
        print(f"  {kind}: {sum(ratios) / len(ratios):.3f}" if ratios else f"  {kind}: too few rows")
    print(f"Wrote {args.out / ROTATION_FILE}\nPut it into the checkpoint's folder, or give it to `python -m export "
          "--rotation`, and rotated exports use it; learn the scales again after it.")  # fmt: skip
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.learn_rotation", description="Learns what a decoder's residual stream is turned by."
    )
    add_source_arguments(parser)
    parser.add_argument("--calibration", type=Path, metavar="FOLDER", default=CALIBRATION,
                        help="training stories: a folder with stories.jsonl or a data set's train.jsonl, and its "
                        "pictures (default: the project's own)")  # fmt: skip
    parser.add_argument("--tokens", type=whole(1), default=32768, help="of these stories (default: %(default)s)")
    parser.add_argument("--steps", type=whole(1), default=4000, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/rotation"), help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
