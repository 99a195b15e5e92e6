"""GPTQ against the method's textbook form, and against what min-max makes of its result."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from litert_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor as tensors
from litert_quantizer.qtyping import QuantGranularity, UniformQuantParams

from quantization.gptq import Grid, gptq, grid_of, without_gptq
from seed_story.errors import ConfigError, ExportError

Floats = npt.NDArray[Any]

GRIDS = [Grid(8), Grid(4), Grid(4, 32), Grid(4, 64)]


def material(outputs: int = 24, inputs: int = 192, seed: int = 0) -> tuple[Floats, Floats]:
    """Weights, and the Hessian of inputs that hang together, as a network's do."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(600, 40)) @ rng.normal(size=(40, inputs)) + 0.3 * rng.normal(size=(600, inputs))
    return rng.normal(size=(outputs, inputs)).astype(np.float32), (x.T @ x).astype(np.float32)


def nearest(weights: Floats, grid: Grid) -> Floats:
    scales = np.repeat(grid.scales(weights, np.ones(weights.shape[1])), grid.block or weights.shape[1], axis=1)
    return np.clip(np.round(weights / scales), -grid.top, grid.top) * scales


def cost(weights: Floats, rounded: Floats, hessian: Floats) -> float:
    error = (weights - rounded).astype(np.float64)
    return float(np.einsum("oi,ij,oj->", error, hessian, error))


def textbook(weights: Floats, hessian: Floats, grid: Grid) -> Floats:
    """Optimal brain quantization of one row after another, arXiv 2208.11580: the inverse shrinks with every column."""
    damped = hessian.astype(np.float64) + 0.01 * np.diag(hessian).mean() * np.eye(len(hessian))
    columns, block = weights.shape[1], grid.block or weights.shape[1]
    scales, rows = grid.scales(weights, np.diag(hessian)).astype(np.float64), []
    for row, scale in zip(weights.astype(np.float64), scales, strict=True):
        left, inverse, done = row.copy(), np.linalg.inv(damped), np.empty(columns)
        for column in range(columns):
            group = column // block
            code = np.clip(np.round(left[column] / scale[group]), -grid.top, grid.top)
            if column == group * block + np.abs(row[group * block : (group + 1) * block]).argmax():
                code = np.sign(row[column]) * grid.top
            done[column] = code * scale[group]
            error = (left[column] - done[column]) / inverse[column, column]
            left[column + 1 :] -= error * inverse[column, column + 1 :]
            inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        rows.append(done)
    return np.array(rows)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_is_the_textbook_s_method(grid: Grid) -> None:
    weights, hessian = material()
    codes = [each / np.repeat(grid.scales(weights, np.diag(hessian)), grid.block or 192, axis=1)
             for each in (gptq(weights, hessian, grid), textbook(weights, hessian, grid))]  # fmt: skip
    off = np.abs(codes[0] - codes[1])
    assert (off > 0.5).mean() < 0.01  # a tie that float32 and float64 break otherwise, and what follows from it


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_products_change_less_than_with_the_nearest_codes(grid: Grid) -> None:
    weights, hessian = material()
    assert cost(weights, gptq(weights, hessian, grid), hessian) < 0.5 * cost(weights, nearest(weights, grid), hessian)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_min_max_finds_the_same_values(grid: Grid) -> None:
    rounded = gptq(*material(), grid)
    groups = rounded.reshape(len(rounded), -1, grid.block or rounded.shape[1])
    kind = QuantGranularity[f"BLOCKWISE_{grid.block}" if grid.block else "CHANNELWISE"]
    low, high = groups.min(-1), groups.max(-1)
    zero, scale = tensors.tensor_zp_scale_from_min_max(low, high, grid.bits, True, kind)
    params = UniformQuantParams(grid.bits, 0, scale[..., None], zero[..., None].astype(np.int32))
    codes = tensors.uniform_quantize(groups, params)
    np.testing.assert_allclose(codes * scale[..., None], groups, rtol=1e-5, atol=0)


def test_zeros_stay_zeros() -> None:
    _, hessian = material()
    assert not gptq(np.zeros((3, 192), np.float32), hessian, Grid(4, 32)).any()
    weights, _ = material()
    assert np.isfinite(gptq(weights, np.zeros_like(hessian), Grid(8))).all()  # inputs that never came


def test_blocks_must_fill_the_rows() -> None:
    weights, hessian = material(inputs=48)
    with pytest.raises(ConfigError, match="48 inputs"):
        gptq(weights, hessian, Grid(4, 32))


@pytest.mark.parametrize("wrong", [np.nan, -50.0], ids=["not finite", "negative"])
def test_a_hessian_that_cannot_be_one_is_refused(wrong: float) -> None:
    weights, hessian = material()
    hessian[7, 7] = wrong * np.diag(hessian).mean()
    with pytest.raises(ExportError, match="can't round a matrix by what it is given"):
        gptq(weights, hessian, Grid(8))


def entry(regex: str, algorithm: str = "GPTQ", **weights: Any) -> dict[str, Any]:
    config = {"num_bits": 4, "symmetric": True, "granularity": "BLOCKWISE_32", "dtype": "INT", **weights}
    return {"regex": regex, "operation": "FULLY_CONNECTED", "algorithm_key": algorithm,
            "op_config": {"weight_tensor_config": config}}  # fmt: skip


def test_the_last_entry_that_matches_counts() -> None:
    plain = entry(".*", "min_max_uniform_quantize", num_bits=8)
    entries = [entry(".*"), entry("_down/", num_bits=8, granularity="CHANNELWISE"), {**plain, "regex": "layers_2_"}]
    assert grid_of(entries, "decode/layers_1_qkv/product") == Grid(4, 32)
    assert grid_of(entries, "decode/layers_1_down/product") == Grid(8)
    assert grid_of(entries, "decode/layers_2_down/product") is None
    assert grid_of([], "decode/layers_2_down/product") is None
    assert [each["algorithm_key"] for each in without_gptq(entries)] == ["min_max_uniform_quantize"] * 3
    assert entries[0]["algorithm_key"] == "GPTQ"


@pytest.mark.parametrize("wrong", [{"symmetric": False}, {"granularity": "TENSORWISE"}], ids=str)
def test_other_grids_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="symmetric rows or blocks"):
        grid_of([entry(".*", **wrong)], "decode/layers_1_qkv/product")
