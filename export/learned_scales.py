"""Learned changes of the scales of rounded matrices: how they are kept, and how they are applied.

A recipe that names some (`"scales": "int4"`) takes them from the model's file `scales-int4.safetensors`, which
`python -m export.learn_scales` writes. It holds a change of each scale, int8 `[outputs, groups]` by matrix, in steps of
the 127th part of the largest one, `NAME.step`: half of what float16 would take, and finer than bfloat16's scales are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from model.story_source import StorySource
from model.weights import read_safetensors, write_safetensors
from quantization.gptq import Floats, Grid
from quantization.recipe import Recipe
from seed_story.errors import WeightsError

_STEP = ".step"
_TOP = 127


def scales_file(recipe: Recipe, source: StorySource) -> Path | None:
    """The scales that a recipe asks for: the file that the user names, or the model's own.

    None if it asks for none, or there are none: the model's own were learned for its own rotation.
    """
    if recipe.scales is None:
        return None
    if source.scales or source.rotation:
        return source.scales
    return source.learned_file(file_name(recipe.scales))


def lacks_scales(recipe: Recipe, source: StorySource) -> bool:
    """Whether a recipe asks for learned scales that there aren't."""
    return recipe.scales is not None and scales_file(recipe, source) is None


def file_name(scales: str) -> str:
    """What a checkpoint calls its file of these scales."""
    return f"scales-{scales}.safetensors"


def write_scales(changes: Mapping[str, Floats], path: Path) -> None:
    """Keeps changes: a scale is multiplied by one plus its own, `[outputs, groups]` by matrix."""
    tensors: dict[str, npt.NDArray[Any]] = {}
    for name, change in changes.items():
        step = np.float32(max(float(np.abs(change).max()) / _TOP, 1e-9))
        tensors[name] = np.round(change / step).astype(np.int8)
        tensors[name + _STEP] = np.array([step])
    write_safetensors(tensors, path)


def read_scales(path: Path, grids: Mapping[str, Grid], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Floats]:
    """Reads changes of `write_scales`.

    Args:
        grids: what the recipe rounds matrices to.
        shapes: of the matrices, `[outputs, inputs]`.

    Raises:
        WeightsError: the file can't be read, or is of other matrices or blocks.
    """
    tensors = read_safetensors(path)
    made = {}
    for name in (key for key in tensors if not key.endswith(_STEP)):
        found = tensors[name]
        if name not in grids or name + _STEP not in tensors:
            raise WeightsError(
                f"{path.name} isn't of this recipe and model", got=name, expected="matrices that are rounded"
            )
        outputs, inputs = shapes[name]
        wanted = outputs, inputs // (grids[name].block or inputs)
        if found.shape != wanted or found.dtype != np.int8:
            raise WeightsError(f"the learned scales of {name} are others", got=f"{found.dtype} {found.shape}",
                               expected=f"int8 {wanted}", hint="Learn them again for this recipe.")  # fmt: skip
        made[name] = found * tensors[name + _STEP]
    return made


def rescaled(matrix: Floats, grid: Grid, change: Floats) -> Floats:
    """A rounded matrix with other scales and the same codes, so that min-max finds its grid as before.

    Args:
        matrix: float32 `[outputs, inputs]`, of `quantization.gptq.gptq`.
        change: `[outputs, groups]`, of `read_scales`.
    """
    groups = matrix.reshape(*change.shape, -1)
    scales = np.abs(groups).max(-1) / np.float32(grid.top)  # the largest weight of a group has the largest code
    codes = np.round(groups / np.maximum(scales, np.finfo(np.float32).tiny)[..., None])
    changed = scales * (1 + change)
    changed = np.asarray(changed.astype(ml_dtypes.bfloat16) if grid.block else changed, np.float32)
    return np.asarray((codes * changed[..., None]).reshape(matrix.shape), np.float32)
