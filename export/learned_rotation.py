"""The rotation of a decoder's residual stream: the one that the user names, the model's own, or the fixed one.

`python -m export.learn_rotation` learns it and writes `rotation.safetensors`: one matrix, `rotation`, float32 `[hidden,
hidden]`. Every rotated export of the model takes it, and learned scales belong to it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from model.rotation import Doubles, nearest_rotation, rotation_matrix
from model.story_source import StorySource
from model.weights import read_safetensors, write_safetensors
from quantization.recipe import Recipe
from seed_story.errors import WeightsError

ROTATION_FILE = "rotation.safetensors"
_NAME = "rotation"
_FAR = 1e-3


def rotation_of(source: StorySource, recipe: Recipe) -> Doubles | None:
    """What a recipe turns the decoder's residual stream by, orthogonal, float64 `[hidden, hidden]`; None if by nothing.

    Raises:
        WeightsError: the file can't be read, or isn't an orthogonal matrix of this size.
    """
    if not recipe.rotated:
        return None
    size = source.model.config.llama.hidden_size
    file = source.rotation or source.learned_file(ROTATION_FILE)
    return read_rotation(file, size) if file else rotation_matrix(size)


def write_rotation(rotation: Doubles, path: Path) -> None:
    """Keeps a rotation."""
    write_safetensors({_NAME: rotation.astype(np.float32)}, path)


def read_rotation(path: Path, size: int) -> Doubles:
    """Reads what `write_rotation` kept, orthogonal again to the digits of float64.

    Raises:
        WeightsError: the file can't be read, or isn't an orthogonal matrix of this size.
    """
    found = read_safetensors(path).get(_NAME)
    if found is None or found.shape != (size, size):
        raise WeightsError(f"{path.name} isn't of this model", got="none" if found is None else list(found.shape),
                           expected=[size, size], hint="Learn it again for this checkpoint.")  # fmt: skip
    far = np.abs(found @ found.T - np.eye(size)).max()
    if not far < _FAR:
        raise WeightsError(f"{path.name} is no rotation", got=f"a product with itself {far:.2g} from one",
                           expected=f"below {_FAR:g}", hint="Learn it again for this checkpoint.")  # fmt: skip
    return nearest_rotation(found)
