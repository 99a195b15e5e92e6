"""The decoder's weights for its graphs: as they are, and as a recipe rounds them by GPTQ and learned scales."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.balance import Balance, balance_of
from export.decoder_weights import TABLE, head_name, skeleton_weight, weight_shapes
from export.hessians import FIRST, TOKENS, Make, See, decoder_hessians, story_rows
from export.learned_rotation import rotation_of
from export.learned_scales import read_scales, rescaled, scales_file
from export.rotation import balanced_inputs, rotated_weight
from model.layers import named_variables, numpy_of
from model.rotation import Doubles
from model.story_source import StorySource
from quantization.gptq import Floats, Grid, gptq, grid_of
from quantization.recipe import Recipe
from seed_story.cache import SinkCache
from seed_story.config import CacheConfig, LlamaConfig
from seed_story.contract import DECODE, DECODER
from seed_story.errors import ConfigError
from seed_story.threads import default_threads

_LAYER = re.compile(r"layers_\d+_")


class _Values(dict[str, Any]):
    """Variables as arrays, one at a time."""

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        return np.asarray(numpy_of(super().__getitem__(name)), np.float32)


@dataclass(frozen=True)
class Reading:
    """A decoder that reads the calibration stories, once, when it is first asked what its matrices are given.

    Args:
        skeleton: of the recipe's graphs.
        cache: that the stories are read with.
        size: N of the prefill that reads them, or 1.
        calibration: the folder of these stories.
        work: a folder for a layer's graph, and for as many numbers as the weights have.
        tokens: of the stories that are read.
        see: as in `decoder_hessians`: what the matrices are given that are turned, but not balanced.

    Raises:
        UsageError, PictureError: the calibration folder or a picture can't be read.
    """

    source: StorySource
    recipe: Recipe
    skeleton: bytes
    cache: CacheConfig
    size: int
    calibration: Path
    work: Path
    tokens: int = TOKENS
    see: See = lambda name, rows, start: None

    @property
    def llama(self) -> LlamaConfig:
        """The decoder's sizes."""
        return self.source.model.config.llama

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the skeleton's weights."""
        return weight_shapes(self.llama, rotated=self.recipe.rotated)

    @functools.cached_property
    def exact(self) -> Make:
        """The float weights in the names of `weight_shapes`, turned and balanced if the recipe says so."""
        if self.balance is None:
            return self._unbalanced
        return functools.partial(rotated_weight, self.llama, self._values, self.balance)

    def take_hessian(self, name: str) -> npt.NDArray[Any]:
        """The sum of `x^T x` over all inputs x of an exact matrix, `[inputs, inputs]`; to be asked for once.

        A story's first token counts `FIRST` times.
        """
        balance, (files, firsts) = self.balance, self._moments
        moment: npt.NDArray[Any] = np.load(files[name])
        first: npt.NDArray[Any] = np.stack(firsts[name])
        files[name].unlink()
        if balance is not None:
            for _ in range(2):  # first its rows, then its columns
                moment = balanced_inputs(self.llama, balance, name, moment).T
            first = balanced_inputs(self.llama, balance, name, first)
        return np.asarray(moment + (FIRST - 1) * first.T @ first)

    @functools.cached_property
    def _values(self) -> _Values:
        return _Values(named_variables(self.source.model.llama))

    @functools.cached_property
    def _unbalanced(self) -> Make:
        if self._turn is not None:
            return functools.partial(rotated_weight, self.llama, self._values, Balance.none(self.llama, self._turn))
        return functools.partial(skeleton_weight, self.llama, self._values)

    @functools.cached_property
    def balance(self) -> Balance | None:
        """Of a decoder that is rotated."""
        if self._turn is None:
            return None
        files, _ = self._moments
        layers = (name for name in files if _LAYER.match(name))
        moments = ((name, self._unbalanced(name), np.load(files[name])) for name in layers)
        return balance_of(self.llama, self._turn, moments)

    @functools.cached_property
    def _turn(self) -> Doubles | None:
        return rotation_of(self.source, self.recipe)

    @functools.cached_property
    def _moments(self) -> tuple[dict[str, Path], dict[str, list[Floats]]]:
        """Of the matrices' inputs: files with their sums of `x^T x`, and what the stories' first tokens give."""
        rows, turn = story_rows(self.source, self.calibration, self.tokens), self._turn
        memory = SinkCache(replace(self.llama, num_layers=1), self.cache, self.cache.sink_rows(self.recipe.cache))
        firsts: dict[str, list[Floats]] = {}

        def see(name: str, rows: Floats, start: int) -> None:
            if start == 0:
                firsts.setdefault(name, []).append(rows[0].copy())
            self.see(name, rows, start)

        found = decoder_hessians(
            self.skeleton, self.shapes, self._unbalanced, self.llama, memory, self.size,
            (row if turn is None else np.asarray(row @ turn.T, np.float32) for row in rows),
            threads=default_threads(), work=self.work, see=see,
        )  # fmt: skip
        files = {}
        for name, moment in found:
            files[name] = self.work / f"{name}.npy"
            np.save(files[name], moment)
        return files, firsts


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


def rounded_weights(reading: Reading, tick: Callable[[int], object]) -> Make:
    """The weights, those of `gptq_grids` rounded; these are to be asked for once each.

    Args:
        tick: told 1 for each matrix that was rounded.

    Raises:
        WeightsError: the checkpoint's learned scales aren't this recipe's.
        UsageError, PictureError: see `Reading`.
    """
    recipe, exact, grids = reading.recipe, reading.exact, gptq_grids(reading.llama, reading.recipe)
    file = scales_file(recipe, reading.source)
    changes: Mapping[str, Floats] = read_scales(file, grids, reading.shapes) if file else {}

    def made(name: str) -> Floats:
        if name not in grids:
            return exact(name)
        tick(1)
        rounded = gptq(exact(name), reading.take_hessian(name), grids[name])
        return rescaled(rounded, grids[name], changes[name]) if name in changes else rounded

    return made


def _is_calibrated(llama: LlamaConfig, name: str) -> bool:
    """Whether a matrix is one of `decoder_hessians`."""
    return bool(_LAYER.match(name)) or name == head_name(llama)
