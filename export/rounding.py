"""The decoder's weights for its graphs: as they are, and as a recipe rounds them by GPTQ and learned scales."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.decoder_weights import TABLE, head_name, skeleton_weight, weight_shapes
from export.hessians import Make, decoder_hessians, story_rows
from export.learned_scales import read_scales, rescaled, scales_file
from export.rotation import rotated_weight
from model.layers import named_variables, numpy_of
from model.rotation import turned
from model.story_source import StorySource
from quantization.gptq import Floats, Grid, gptq, grid_of
from quantization.recipe import Recipe
from seed_story.cache import SinkCache
from seed_story.config import CacheConfig, LlamaConfig
from seed_story.contract import DECODE, DECODER
from seed_story.errors import ConfigError
from seed_story.threads import default_threads
from seed_story.tokenizer import StoryTokenizer

_LAYER = re.compile(r"layers_\d+_")


class _Values(dict[str, Any]):
    """Variables as arrays, one at a time."""

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        return np.asarray(numpy_of(super().__getitem__(name)), np.float32)


def exact_weights(source: StorySource, recipe: Recipe) -> Make:
    """The float weights, turned if the recipe says so, in the names of `weight_shapes`."""
    make = rotated_weight if recipe.rotated else skeleton_weight
    return functools.partial(make, source.model.config.llama, _Values(named_variables(source.model.llama)))


def gptq_grids(llama: LlamaConfig, recipe: Recipe) -> dict[str, Grid]:
    """The decoder's matrices that a recipe rounds by GPTQ, and to what.

    Raises:
        ConfigError: some are of no layer.
    """
    shapes, entries = weight_shapes(llama, rotated=recipe.rotated), recipe.graphs[DECODER]
    products = [name for name in shapes if name != TABLE or head_name(llama) == TABLE]  # else it is only looked up
    grids = {name: grid for name in products if (grid := grid_of(entries, f"{DECODE}/{name}/product"))}
    if others := sorted(name for name in grids if not _is_calibrated(llama, name)):
        raise ConfigError(f"the recipe {recipe.name} has more rounded by GPTQ than the layers' matrices and the head",
                          got=others, expected="another algorithm for these")  # fmt: skip
    return grids


def rounded_weights(
    source: StorySource,
    recipe: Recipe,
    skeleton: bytes,
    cache: CacheConfig,
    size: int,
    calibration: Path,
    *,
    tick: Callable[[int], object],
    work: Path,
) -> Make:
    """The weights, those of `gptq_grids` rounded; they must be asked for in the order of `weight_shapes`, once each.

    Args:
        skeleton: of this recipe's graphs.
        cache: that the calibration stories are read with.
        size: N of the prefill that reads them, or 1.
        calibration: the folder of these stories.
        tick: told 1 for each matrix that was rounded.
        work: a folder for a layer's graph.

    Raises:
        WeightsError: the checkpoint's learned scales aren't this recipe's.
        UsageError, PictureError: the calibration folder or a picture can't be read.
    """
    llama, exact = source.model.config.llama, exact_weights(source, recipe)
    grids, shapes = gptq_grids(llama, recipe), weight_shapes(llama, rotated=recipe.rotated)
    file = scales_file(recipe, source.checkpoint)
    changes: Mapping[str, Floats] = read_scales(file, grids, shapes) if file else {}
    memory = SinkCache(replace(llama, num_layers=1), cache, cache.sink_rows(recipe.cache))
    rows = story_rows(source, StoryTokenizer(source.tokenizer), calibration)
    if recipe.rotated:
        rows = map(turned, rows)
    found = decoder_hessians(skeleton, shapes, exact, llama, memory, size, rows, threads=default_threads(), work=work)

    def made(name: str) -> Floats:
        if not _is_calibrated(llama, name):
            return exact(name)
        given, weights, hessian = next(found)
        assert given == name
        if name not in grids:
            return weights
        tick(1)
        rounded = gptq(weights, hessian, grids[name])
        return rescaled(rounded, grids[name], changes[name]) if name in changes else rounded

    return made


def _is_calibrated(llama: LlamaConfig, name: str) -> bool:
    """Whether a matrix is one of `decoder_hessians`."""
    return bool(_LAYER.match(name)) or name == head_name(llama)
