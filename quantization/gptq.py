"""GPTQ: rounds a matrix column by column, and lets the columns still to come make up for each error.

Frantar et al., arXiv 2210.17323, algorithm 1. `litert-quantizer` has an algorithm of this name, but it takes the rows
of the inverse Hessian as they are, where the method needs those of its Cholesky factor: what was rounded must leave
the inverse. So a recipe's entries `"algorithm_key": "GPTQ"` are rounded here, to values that min-max finds the very
same grid for: the largest weight of each group keeps its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from scipy.linalg.lapack import dpotrf, dtrtri

from quantization.recipe import entry_of
from seed_story.errors import ConfigError, ExportError

Floats = npt.NDArray[np.float32]

GPTQ, _MIN_MAX = "GPTQ", "min_max_uniform_quantize"
_DAMPING = 0.01
"""Of the Hessian's mean diagonal, added to all of it (the paper's section 4)."""
_LAZY = 128  # columns after which the rest of the matrix is brought up to date
_TINY = 1e-9  # a scale of zero would divide by it
_SHARES = {8: (1.0,), 4: tuple(np.linspace(1.0, 0.7, 13).tolist())}
"""Of the largest weight, by bits: what is tried as the end of the grid. Few codes are worth clipping for."""


@dataclass(frozen=True)
class Grid:
    """Symmetric integers with a scale for each row, or for each `block` columns of it.

    Args:
        bits: 8 or 4.
        block: columns that share a scale; None for all of a row.
    """

    bits: int
    block: int | None = None

    @property
    def top(self) -> int:
        """The largest code; the least is its negative."""
        return int(2 ** (self.bits - 1) - 1)

    def scales(self, weights: Floats, importance: npt.NDArray[Any]) -> Floats:
        """The scales that lose least, float32 `[outputs, groups]`, if every weight took its nearest code.

        Those of blocks are bfloat16 numbers, as the engine stores them.

        Args:
            weights: float32 `[outputs, inputs]`.
            importance: of each column's squared error, `[inputs]`.
        """
        groups = weights.reshape(len(weights), -1, self.block or weights.shape[1])
        by_column = np.asarray(importance, np.float32).reshape(1, *groups.shape[1:])
        most = np.maximum(np.abs(groups).max(-1), _TINY) / np.float32(self.top)
        best, least = most, np.full(most.shape, np.inf, np.float32)
        for share in _SHARES[self.bits]:
            scales = most * np.float32(share)
            scales = np.asarray(scales.astype(ml_dtypes.bfloat16) if self.block else scales, np.float32)
            codes = np.clip(np.round(groups / scales[..., None]), -self.top, self.top)
            lost = (by_column * np.square(groups - codes * scales[..., None])).sum(-1)
            best, least = np.where(lost < least, scales, best), np.minimum(lost, least)
        return np.asarray(best, np.float32)


def gptq(weights: Floats, hessian: npt.NDArray[Any], grid: Grid) -> Floats:
    """Rounds a matrix so that its products with typical inputs change little.

    Args:
        weights: float32 `[outputs, inputs]`.
        hessian: `[inputs, inputs]`, the sum (or mean) of `x^T x` over typical inputs x.

    Returns:
        float32 `[outputs, inputs]`, every value a code of `grid` times its scale.

    Raises:
        ConfigError: the blocks don't fill the rows.
        ExportError: the Hessian isn't positive.
    """
    if grid.block and weights.shape[1] % grid.block:
        raise ConfigError("a recipe's blocks don't fill the rows of a matrix", got=f"{weights.shape[1]} inputs",
                          expected=f"a multiple of {grid.block}", hint="Use int8, or another granularity.")  # fmt: skip
    # Transposed, so that a column is contiguous.
    rest, rounded = np.ascontiguousarray(weights.T, np.float32), np.empty(weights.T.shape, np.float32)
    columns, block = weights.shape[1], grid.block or weights.shape[1]
    scales = np.ascontiguousarray(grid.scales(weights, np.diag(hessian)).T)  # [groups, outputs]
    starts = np.arange(0, columns, block)
    largest = np.abs(weights).reshape(len(weights), -1, block).argmax(-1) + starts  # [outputs, groups]
    factor = _inverse_factor(hessian)
    for begin in range(0, columns, _LAZY):
        end = min(begin + _LAZY, columns)
        errors = np.empty((end - begin, len(weights)), np.float32)
        for column in range(begin, end):
            scale, value = scales[column // block], rest[column]
            codes = np.clip(np.round(value / scale), -grid.top, grid.top)
            keep = largest[:, column // block] == column
            codes = np.where(keep, np.sign(weights[:, column]) * grid.top, codes)
            rounded[column] = codes * scale
            error = (value - rounded[column]) / factor[column, column]
            rest[column + 1 : end] -= np.outer(factor[column, column + 1 : end], error)
            errors[column - begin] = error
        rest[end:] -= factor[begin:end, end:].T @ errors
    return np.ascontiguousarray(rounded.T)


def _inverse_factor(hessian: npt.NDArray[Any]) -> Floats:
    """The upper Cholesky factor of the damped Hessian's inverse, float32.

    It is the inverse of the factor in H = U U^T, which is that of H from last to first: a third of the work that
    inverting H takes.
    """
    damped = hessian.astype(np.float64)
    damped[np.diag_indices(len(damped))] += _DAMPING * np.mean(np.diag(damped)) + _TINY
    root, failed = dpotrf(damped[::-1, ::-1], lower=1)
    if failed or not np.isfinite(root).all():
        raise ExportError("GPTQ can't round a matrix by what it is given", got="a Hessian that isn't positive",
                          expected="the sum of squares of finite inputs",
                          hint="Are the model's weights whole? A recipe without GPTQ needs no inputs.")  # fmt: skip
    inverse, _ = dtrtri(root, lower=1)
    return np.asarray(inverse[::-1, ::-1], np.float32)


def grid_of(entries: Sequence[dict[str, Any]], scope: str) -> Grid | None:
    """The grid that a recipe's entries round a FULLY_CONNECTED operation to; None if they don't ask for GPTQ.

    Args:
        scope: the operation's name; the last entry whose expression is found in it counts.

    Raises:
        ConfigError: an entry asks for GPTQ of something else than symmetric rows or blocks.
    """
    entry = entry_of(entries, "FULLY_CONNECTED", scope)
    if entry is None or entry["algorithm_key"] != GPTQ:
        return None
    config = entry["op_config"]["weight_tensor_config"]
    granularity, _, block = config["granularity"].partition("_")
    if not config["symmetric"] or granularity not in ("CHANNELWISE", "BLOCKWISE"):
        raise ConfigError(
            "GPTQ rounds symmetric rows or blocks only", got=config, expected="CHANNELWISE or BLOCKWISE_N"
        )
    return Grid(config["num_bits"], int(block) if block else None)


def without_gptq(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries for the quantizer, once the matrices are rounded: min-max finds the grids they were rounded to."""
    return [{**entry, "algorithm_key": _MIN_MAX} if entry["algorithm_key"] == GPTQ else entry for entry in entries]
