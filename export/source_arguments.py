"""The words of a command line that say which model is meant, and what was learned for its export."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from quantization.recipe import Recipe
from seed_story.errors import UsageError, WeightsError

if TYPE_CHECKING:
    from model.story_source import StorySource

_LEARNED = {
    "rotation": "what recipes that rotate turn the decoder by, of `python -m export.learn_rotation` (default: the "
    "model's own; without one a fixed one)",
    "scales": "what recipes like int4 take, of `python -m export.learn_scales` (default: the model's own, unless "
    "--rotation gives it another rotation)",
}


def add_source_arguments(parser: argparse.ArgumentParser, *learned: str) -> None:
    """Adds the arguments that `source_of` reads.

    Args:
        learned: of `rotation` and `scales`, those that the command takes from a file.
    """
    parser.add_argument("--model", default="seed-story-135m", help="a preset (default: %(default)s)")
    parser.add_argument("--llama", help="another decoder: a .gguf file, or a Hugging Face folder or hub id")
    parser.add_argument("--vision", help="another vision transformer: a Hugging Face folder or hub id")
    parser.add_argument("--checkpoint", help="a folder of trained weights, or none (default: the model's own)")
    for name in learned:
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=_LEARNED[name])


def source_of(args: argparse.Namespace, recipe: Recipe | None = None) -> StorySource:
    """Loads the model that the arguments name.

    Args:
        recipe: what is to be made of it; None if there is none, and so nothing learned is taken.

    Raises:
        UsageError: the recipe doesn't take what was learned.
        WeightsError: a learned file isn't there.
        SeedStoryError: see `load_source`.
    """
    given: dict[str, Path] = {name: file for name in _LEARNED if (file := getattr(args, name, None))}
    taken = {} if recipe is None else {"rotation": recipe.rotated, "scales": recipe.scales is not None}
    for name, file in given.items():
        if not taken.get(name):
            raise UsageError(f"the recipe takes no learned {name}", got=f"--{name} {file}",
                             expected="a recipe that does, such as int4")  # fmt: skip
        if not file.is_file():
            raise WeightsError(f"there is no file with learned {name}", got=file,
                               expected=f"what `python -m export.learn_{name}` writes")  # fmt: skip
    from model.story_source import load_source  # here: it takes Keras's seconds, which --help doesn't need

    source = load_source(args.model, llama=args.llama, vision=args.vision, checkpoint=args.checkpoint)
    return replace(source, rotation=given.get("rotation"), scales=given.get("scales"))
