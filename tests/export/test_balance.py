"""What balances a decoder: found of planted activations, and worth what its formula says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from export.balance import Balance, balance_of
from export.decoder_weights import weight_shapes
from export.rotation import rotated_weight
from model.rotation import rotation_matrix
from seed_story.config import LlamaConfig
from tests.export.tiny_decoders import loud_llama, random_balance, random_rotation

CONFIG = replace(LlamaConfig.tiny(), hidden_size=48, intermediate_size=96)
TURN = random_rotation(48)
Floats = npt.NDArray[np.float32]


def stream(direction: npt.NDArray[np.float64], count: int = 4000) -> npt.NDArray[np.float64]:
    """Rows of which most lies in one direction."""
    random = np.random.default_rng(0)
    return random.normal(size=(count, len(direction))) + 12 * random.normal(1, 0.3, (count, 1)) * direction


@pytest.fixture(scope="module")
def direction() -> npt.NDArray[np.float64]:
    made = np.random.default_rng(1).normal(size=CONFIG.hidden_size)
    return np.asarray(made / np.linalg.norm(made))


@pytest.fixture(scope="module")
def moments(direction: npt.NDArray[np.float64]) -> list[tuple[str, Floats, npt.NDArray[np.float64]]]:
    """A decoder's matrices, and what they are given: one direction is broad, and one channel of `down` is loud."""
    random, weights, none = np.random.default_rng(2), loud_llama(CONFIG), Balance.none(CONFIG, TURN)
    rows = stream(direction)
    hidden = random.normal(size=(4000, CONFIG.intermediate_size))
    hidden[:, 7] *= 100
    attended = random.normal(size=(4000, CONFIG.num_heads, CONFIG.head_dim))
    attended[..., 2] += 9 * attended[..., 5]
    attended = attended.reshape(4000, -1)

    def all_of_them() -> Iterator[tuple[str, Floats, npt.NDArray[np.float64]]]:
        for name in weight_shapes(CONFIG, rotated=True):
            made = rotated_weight(CONFIG, weights, none, name)
            if name.startswith("layers"):
                given = {"o": attended, "down": hidden}.get(name.rsplit("_", 1)[1], rows)
                yield name, made, given.T @ given

    return list(all_of_them())


def test_what_is_broad_is_found(
    moments: list[tuple[str, Floats, npt.NDArray[np.float64]]], direction: npt.NDArray[np.float64]
) -> None:
    found = balance_of(CONFIG, TURN, moments)
    assert abs(found.directions[:, 0] @ direction) > 0.99
    assert found.shares[0] < 0.4 < 0.8 < found.shares[1:].min() and found.shares.max() <= 1
    np.testing.assert_allclose(found.directions.T @ found.directions, np.eye(found.directions.shape[1]), atol=1e-9)
    assert (found.scales[:, 7] < 0.3 * np.median(found.scales, axis=1)).all()


def test_no_other_multiple_costs_less(moments: list[tuple[str, Floats, npt.NDArray[np.float64]]]) -> None:
    """The range of what `down` reads times the size of its weights, in the channels before they are turned."""
    found = balance_of(CONFIG, TURN, moments)
    weights, none = loud_llama(CONFIG), Balance.none(CONFIG, TURN)
    variances = np.ones(CONFIG.intermediate_size)
    variances[7] = 100**2
    for layer in range(CONFIG.num_layers):
        down = rotated_weight(CONFIG, weights, none, f"layers_{layer}_down").reshape(-1, 3, 32) @ rotation_matrix(32)
        squares = (down.reshape(-1, CONFIG.intermediate_size) ** 2).sum(0)

        def cost(scales: npt.NDArray[np.float64], squares: npt.NDArray[np.float64] = squares) -> float:
            return float((scales**2 * variances).sum() * (squares / scales**2).sum())

        least = cost(found.scales[layer])
        assert least < 0.1 * cost(np.ones_like(variances))
        for seed in range(10):
            other = np.exp(np.random.default_rng(seed).normal(0, 0.3, variances.shape))
            assert cost(found.scales[layer] * other) > least


def test_values_are_told_apart_by_head_and_spread(moments: list[tuple[str, Floats, npt.NDArray[np.float64]]]) -> None:
    """Every head's coordinates bring the range of its values times the size of what reads them down by a half."""
    found, none = balance_of(CONFIG, TURN, moments), Balance.none(CONFIG, TURN)
    moment = next(moment for name, _, moment in moments if name == "layers_1_o")
    mine, plain = (rotated_weight(CONFIG, loud_llama(CONFIG), one, "layers_1_o")
                   for one in (replace(none, values=found.values), none))  # fmt: skip
    for head in range(CONFIG.num_kv_heads):
        queries = range(head * CONFIG.group, (head + 1) * CONFIG.group)
        own, made = [slice(q * CONFIG.head_dim, (q + 1) * CONFIG.head_dim) for q in queries], found.values[1, head]
        given = sum(moment[q, q] for q in own)
        sizes = [sum(np.square(weights[:, q]).sum() for q in own) for weights in (mine, plain)]
        assert np.trace(made @ given @ made.T) * sizes[0] < 0.5 * np.trace(given) * sizes[1]


def test_values_leave_no_sign_to_the_machine(moments: list[tuple[str, Floats, npt.NDArray[np.float64]]]) -> None:
    """Scales are learned for one choice of coordinates, so there is one: unmixed, they are symmetric and positive."""
    mix = rotation_matrix(CONFIG.head_dim)
    for made in balance_of(CONFIG, TURN, moments).values.reshape(-1, CONFIG.head_dim, CONFIG.head_dim):
        np.testing.assert_allclose(mix @ made, (mix @ made).T, atol=1e-9 * np.abs(made).max())
        assert np.linalg.eigvalsh(mix @ made).min() > 0


def test_a_channel_that_is_never_used_divides_nothing_by_zero(
    moments: list[tuple[str, Floats, npt.NDArray[np.float64]]],
) -> None:
    dead = [(name, np.zeros_like(weights) if name.endswith("_down") else weights, np.zeros_like(moment)
             if name.endswith("_down") else moment) for name, weights, moment in moments]  # fmt: skip
    assert np.isfinite(balance_of(CONFIG, TURN, moments).scales).all()
    found = balance_of(CONFIG, TURN, dead)
    assert np.isfinite(found.scales).all() and (found.scales > 0).all()


def test_narrowing_keeps_the_length_of_every_row() -> None:
    """What RMSNorm divides by: the sum of squares over all channels, those behind the stream's own included."""
    balance, size = random_balance(CONFIG), CONFIG.hidden_size
    rows = np.random.default_rng(3).normal(size=(9, size))
    broad, narrowing = (rotated_weight(CONFIG, {}, balance, name) for name in ("broad", "narrowing"))
    made = np.pad(rows, ((0, 0), (0, len(broad)))) + rows @ broad.T @ narrowing.T
    np.testing.assert_allclose(np.square(made).sum(1), np.square(rows).sum(1), rtol=1e-5)
    assert np.abs(made[:, :size] - rows).max() > 0.1


def test_rounded_rows_say_more(
    moments: list[tuple[str, Floats, npt.NDArray[np.float64]]], direction: npt.NDArray[np.float64]
) -> None:
    """What a matrix makes of rows rounded to 255 steps of their range: twice as near to the truth, at the least."""
    weights = loud_llama(CONFIG)
    rows = stream(direction, 50)

    def error(balance: Balance) -> float:
        broad, narrowing, reads = (rotated_weight(CONFIG, weights, balance, name).astype(np.float64)
                                   for name in ("broad", "narrowing", "layers_0_gate_up"))  # fmt: skip
        given = (np.pad(rows, ((0, 0), (0, len(broad)))) + rows @ broad.T @ narrowing.T)[:, : rows.shape[1]]
        step = np.ptp(given, axis=1, keepdims=True) / 255
        return float(np.square((np.round(given / step) * step - given) @ reads.T).sum())

    scales = np.ones((CONFIG.num_layers, CONFIG.intermediate_size))
    assert error(replace(balance_of(CONFIG, TURN, moments), scales=scales)) < 0.5 * error(Balance.none(CONFIG, TURN))
