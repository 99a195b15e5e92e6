"""The decoder's weights for its graphs: as they are, and as a recipe rounds them by GPTQ and learned scales."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.balance import Balance, Moment, balance_of, own_products
from export.decoder_weights import TABLE, head_name, skeleton_weight, weight_shapes
from export.hessians import Make, Products, all_products, decoder_hessians, story_rows
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


@dataclass(frozen=True)
class Reading:
    """How a decoder reads the calibration stories.

    Args:
        skeleton: of the recipe's graphs.
        cache: that the stories are read with.
        size: N of the prefill that reads them, or 1.
        calibration: the folder of these stories.
        work: a folder for a layer's graph.
    """

    source: StorySource
    recipe: Recipe
    skeleton: bytes
    cache: CacheConfig
    size: int
    calibration: Path
    work: Path

    @property
    def llama(self) -> LlamaConfig:
        """The decoder's sizes."""
        return self.source.model.config.llama

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the skeleton's weights."""
        return weight_shapes(self.llama, rotated=self.recipe.rotated)

    @functools.cached_property
    def _rows(self) -> list[Floats]:
        rows = story_rows(self.source, StoryTokenizer(self.source.tokenizer), self.calibration)
        return [turned(row) if self.recipe.rotated else row for row in rows]

    def moments(self, make: Make, products: Products = all_products) -> Iterator[Moment]:
        """What the decoder's matrices, made by `make`, are given; see `decoder_hessians`.

        Raises:
            UsageError, PictureError: the calibration folder or a picture can't be read.
        """
        memory = SinkCache(replace(self.llama, num_layers=1), self.cache, self.cache.sink_rows(self.recipe.cache))
        return decoder_hessians(self.skeleton, self.shapes, make, self.llama, memory, self.size, self._rows,
                                threads=default_threads(), work=self.work, products=products)  # fmt: skip


def exact_weights(reading: Reading) -> Make:
    """The float weights in the names of `weight_shapes`, turned and balanced if the recipe says so.

    Raises:
        UsageError, PictureError: see `Reading.moments`.
    """
    llama, values = reading.llama, _Values(named_variables(reading.source.model.llama))
    if not reading.recipe.rotated:
        return functools.partial(skeleton_weight, llama, values)
    unbalanced = functools.partial(rotated_weight, llama, values, Balance.none(llama))
    layers = itertools.islice(reading.moments(unbalanced, functools.partial(own_products, llama)), 4 * llama.num_layers)
    return functools.partial(rotated_weight, llama, values, balance_of(llama, layers))


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


def rounded_weights(reading: Reading, exact: Make, tick: Callable[[int], object]) -> Make:
    """The weights, those of `gptq_grids` rounded; they must be asked for in the order of `weight_shapes`, once each.

    Args:
        exact: of `exact_weights`.
        tick: told 1 for each matrix that was rounded.

    Raises:
        WeightsError: the checkpoint's learned scales aren't this recipe's.
        UsageError, PictureError: see `Reading.moments`.
    """
    llama, recipe = reading.llama, reading.recipe
    grids = gptq_grids(llama, recipe)
    file = scales_file(recipe, reading.source.checkpoint)
    changes: Mapping[str, Floats] = read_scales(file, grids, reading.shapes) if file else {}
    found = reading.moments(exact)

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
