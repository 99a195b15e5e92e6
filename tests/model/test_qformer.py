from __future__ import annotations

import math
from dataclasses import replace

import keras
import numpy as np
import pytest

from model.layers import named_variables
from model.qformer import QFormer, initial_qformer, pool_patches
from model.weights import load_weights
from seed_story.config import QFormerConfig
from seed_story.errors import ConfigError
from tests.compare import assert_close

TINY = QFormerConfig.tiny()


def features(batch: int = 2, tokens: int = 5) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((batch, tokens, TINY.vision_size)).astype(np.float32)


def scattered(config: QFormerConfig = TINY) -> tuple[QFormer, dict[str, np.ndarray]]:
    """A Q-Former in which every weight is random, gains and Layer Scales too."""
    rng, network = np.random.default_rng(2), QFormer(config)
    variables = named_variables(network)
    weights = {name: rng.normal(0.1, 0.4, v.shape).astype(np.float32) for name, v in variables.items()}
    load_weights(network, weights)
    return network, weights


# The independent reference: the papers' formulas in float64 NumPy, one picture at a time.


def group_norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray, config: QFormerConfig) -> np.ndarray:
    out, width = np.empty_like(x), x.shape[1] // config.groups
    for group in range(config.groups):
        columns = slice(group * width, (group + 1) * width)
        part = x[:, columns]
        out[:, columns] = (part - part.mean()) / math.sqrt(part.var() + config.norm_eps)
    return out * gain + bias


def pooled(picture: np.ndarray, pool: int) -> np.ndarray:
    """The class token and the mean of each square of patches, found by their row and column."""
    grid = math.isqrt(len(picture) - 1)
    rows = [picture[0]]
    for top in range(0, grid, pool):
        for left in range(0, grid, pool):
            square = [picture[1 + (top + i) * grid + left + j] for i in range(pool) for j in range(pool)]
            rows.append(sum(square) / pool**2)
    return np.array(rows)


class Reference:
    def __init__(self, weights: dict[str, np.ndarray], config: QFormerConfig) -> None:
        self.w = {name: value.astype(np.float64) for name, value in weights.items()}
        self.config = config

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return group_norm(x, self.w[f"{name}.gamma"], self.w[f"{name}.beta"], self.config)

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return np.array([self.w[f"{name}.weight"] @ row + self.w[f"{name}.bias"] for row in x])

    def attention(self, name: str, x: np.ndarray, source: np.ndarray) -> np.ndarray:
        inputs = {"query": x, "key": source, "value": source}
        q, k, v = (self.linear(f"{name}.{part}", rows) for part, rows in inputs.items())
        size, out = self.config.hidden_size // self.config.num_heads, np.empty_like(q)
        for start in range(0, self.config.hidden_size, size):
            head = slice(start, start + size)
            for row in range(len(x)):
                weights = np.exp(k[:, head] @ q[row, head] / math.sqrt(size))
                out[row, head] = weights @ v[:, head] / weights.sum()
        return self.linear(f"{name}.dense", out)

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        hidden = self.linear(f"{name}.fc1", x)
        gelu = np.vectorize(lambda h: h * 0.5 * (1 + math.erf(h / math.sqrt(2))))
        return self.linear(f"{name}.fc2", gelu(hidden))

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        picture = picture.astype(np.float64)
        parts = np.concatenate([picture[0], picture[1:].mean(0), picture[1:].max(0)])[None]
        summary = self.linear("summary_projection", self.norm("summary_norm", parts))[0]
        source = self.norm("vision_norm", pooled(picture, self.config.patch_pool))
        x = np.array(
            [summary + t + p for t, p in zip(self.w["query_tokens"][0], self.w["query_positions"][0], strict=True)]
        )
        for index in range(self.config.num_layers):
            at = f"layers.{index}"
            y = self.norm(f"{at}.self_norm", x)
            x = x + self.w[f"{at}.self_scale.lambda1"] * self.attention(f"{at}.self_attention", y, y)
            y = self.norm(f"{at}.cross_norm", x)
            x = x + self.w[f"{at}.cross_scale.lambda1"] * self.attention(f"{at}.cross_attention", y, source)
            y = self.norm(f"{at}.mlp_norm", x)
            x = x + self.w[f"{at}.mlp_scale.lambda1"] * self.mlp(f"{at}.mlp", y)
        out = self.linear("projection", self.norm("norm", x))
        return out + self.memory(summary) if self.config.memory_names else out

    def memory(self, summary: np.ndarray) -> np.ndarray:
        """Each slot's mixture of names, one row of embeddings a query."""
        rows = []
        for slot in range(self.config.memory_slots):
            scores = self.linear(f"memory.scores.{slot}", summary[None])[0]
            likely = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
            shares = (self.w["memory.worth.weight"] @ likely) ** 4
            shares /= shares.sum()
            names = self.w["memory.values.weight"].T.reshape(len(shares), -1, self.config.llm_size)
            rows += list(sum(share * name for share, name in zip(shares, names, strict=True)))
        return np.array(rows)


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_equals_the_numpy_reference(groups: int) -> None:
    config = replace(TINY, groups=groups)
    network, weights = scattered(config)
    expected = np.stack([Reference(weights, config)(picture) for picture in features()])
    assert expected.shape == (2, config.num_queries, config.llm_size)
    assert_close(network(features()), expected, "numpy_reference")


@pytest.mark.parametrize("pool", [1, 2, 4])
def test_equals_the_numpy_reference_with_pooled_patches(pool: int) -> None:
    config = replace(TINY, patch_pool=pool)
    network, weights = scattered(config)
    pictures = features(tokens=17)
    expected = np.stack([Reference(weights, config)(picture) for picture in pictures])
    assert_close(network(pictures), expected, "numpy_reference")


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_equals_the_numpy_reference_with_a_memory_of_names(slots: int) -> None:
    config = replace(TINY, num_queries=8, memory_names=5, memory_slots=slots)
    network, weights = scattered(config)
    expected = np.stack([Reference(weights, config)(picture) for picture in features()])
    assert_close(network(features()), expected, "numpy_reference")


def test_memory_needs_equal_shares_of_the_queries() -> None:
    with pytest.raises(ConfigError, match="memory_slots doesn't divide num_queries; got 3; expected a divisor of 4"):
        replace(TINY, memory_names=5, memory_slots=3)
    assert QFormer(replace(TINY, memory_slots=3)).memory is None


@pytest.mark.parametrize(("grid", "pool"), [(2, 1), (2, 2), (6, 2), (6, 3), (16, 2)])
def test_pool_patches_takes_the_means_of_squares(grid: int, pool: int) -> None:
    pictures = features(tokens=1 + grid**2)
    got = pool_patches(pictures, pool)
    assert got.shape == (2, 1 + (grid // pool) ** 2, TINY.vision_size)
    assert_close(got, np.stack([pooled(picture.astype(np.float64), pool) for picture in pictures]), "same_maths")


@pytest.mark.parametrize(
    ("patches", "pool"), [(5, 2), (9, 2), (8, 2), (16, 3)], ids=["no square", "odd grid", "rectangle", "no multiple"]
)
def test_pool_patches_refuses_what_is_no_square_of_squares(patches: int, pool: int) -> None:
    with pytest.raises(ConfigError, match=f"got {patches}; expected a square, multiple of {pool}"):
        pool_patches(features(tokens=1 + patches), pool)


def test_the_summary_reaches_every_query_by_itself() -> None:
    """Without layers, class token and patches still say what a picture is, but not where anything is in it."""
    network, _ = scattered(replace(TINY, num_layers=0))
    picture, other_class, other_patches = features(), features(), features()
    other_class[:, 0] = -other_class[:, 0]
    other_patches[:, 1:] = -other_patches[:, 1:]
    moved = np.concatenate([picture[:, :1], picture[:, :0:-1]], axis=1)
    still, turned, repainted, same = (np.asarray(network(p)) for p in (picture, other_class, other_patches, moved))
    assert np.abs(turned - still).max(axis=-1).min() > 1e-2
    assert np.abs(repainted - still).max(axis=-1).min() > 1e-2
    assert_close(same, still, "same_maths")


def test_normalizes_by_keras_group_normalization_alone() -> None:
    layers = list(QFormer(TINY)._flatten_layers())
    norms = [layer for layer in layers if "norm" in type(layer).__name__.lower()]
    assert {type(norm) for norm in norms} == {keras.layers.GroupNormalization}
    assert len(norms) == 3 * TINY.num_layers + 3
    assert all(norm.groups == TINY.groups and norm.epsilon == TINY.norm_eps for norm in norms)


def test_a_groups_size_is_normalized_away_over_queries_together() -> None:
    """What only Group Normalization does: scaling all queries changes nothing, scaling one query does."""
    network, weights = scattered(replace(TINY, num_layers=0))

    beside = ("query_positions", "summary_projection.weight", "summary_projection.bias")
    silent = {name: np.zeros_like(weights[name]) for name in beside}

    def with_queries(queries: np.ndarray) -> np.ndarray:
        load_weights(network, {**weights, **silent, "query_tokens": queries})
        return np.asarray(network(features()))

    queries = weights["query_tokens"] * 10
    one = queries.copy()
    one[:, 0] *= 10
    assert np.abs(with_queries(queries * 7) - with_queries(queries)).max() < 1e-3  # the epsilon's share
    assert np.abs(with_queries(one) - with_queries(queries)).max() > 0.1


def test_groups_count() -> None:
    network, weights = scattered(TINY)
    other = QFormer(replace(TINY, groups=2))
    load_weights(other, weights)
    assert np.abs(np.asarray(network(features())) - np.asarray(other(features()))).max() > 1e-2


def test_dropout_acts_only_in_training() -> None:
    network, _ = scattered(replace(TINY, dropout=0.5))
    modes = (False, None, True, True)
    still, again, first, second = (np.asarray(network(features(), training=mode)) for mode in modes)
    assert_close(again, still, "exact")
    assert np.abs(first - still).max() > 1e-2
    assert np.abs(second - first).max() > 1e-2


@pytest.mark.parametrize("branch", ["self_scale", "cross_scale", "mlp_scale", "summary_projection"])
def test_every_branch_is_dropped_out(branch: str) -> None:
    network, weights = scattered(replace(TINY, dropout=0.5))
    branches = ("scale", "summary_projection")
    silent = {n: w * (branch in n) if any(b in n for b in branches) else w for n, w in weights.items()}
    load_weights(network, silent)
    still, dropped = (np.asarray(network(features(), training=mode)) for mode in (False, True))
    assert np.abs(dropped - still).max() > 1e-3


def test_every_weight_of_a_branch_gets_a_gradient() -> None:
    import tensorflow as tf

    network, _ = scattered()
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(network(features(), training=True)))
    variables = network.trainable_variables
    gradients = tape.gradient(loss, [variable.value for variable in variables])
    still = [v.path for v, g in zip(variables, gradients, strict=True) if g is None or not np.any(g)]
    assert not still
    assert len(variables) == len(named_variables(network))


def table(rms: float) -> np.ndarray:
    """Token embeddings of that root mean square, which as in real tables lean to one side."""
    rows = np.random.default_rng(5).standard_normal((500, TINY.llm_size)).astype(np.float32) + 0.4
    return rows * np.float32(rms / np.sqrt((rows**2).mean()))


@pytest.mark.parametrize("rms", [0.05, 1.7])
def test_initial_qformer_has_the_size_of_the_text(rms: float) -> None:
    out = np.asarray(initial_qformer(TINY, table(rms))(features() * 30))
    assert_close(np.sqrt((out**2).mean()) / rms, 1.0, "rms")


def test_initial_qformer_says_the_mean_of_the_text() -> None:
    mean = table(1.0).mean(axis=0)
    out = np.asarray(initial_qformer(TINY, table(1.0))(features()))[0]
    cosines = out @ mean / np.linalg.norm(mean) / np.linalg.norm(out, axis=1)
    assert cosines.min() > 0.98
    assert np.std(out, axis=0).max() > 1e-3  # but the queries aren't all one


def test_initial_qformer_lets_a_picture_move_its_words_by_a_tenth_of_their_size() -> None:
    """A normalised picture is projected to a tenth, so two opposite ones lie at most two tenths apart."""
    network = initial_qformer(TINY, table(1.0))
    difference = np.asarray(network(features() * 30)) - np.asarray(network(-features() * 30))
    assert 0.02 < np.sqrt((difference**2).mean()) < 0.22


def test_initial_qformer_is_reproducible() -> None:
    first, again, other = (named_variables(initial_qformer(TINY, table(1.0), seed)) for seed in (3, 3, 4))
    for name, variable in first.items():
        assert_close(again[name], variable, "exact")
    assert np.any(np.asarray(first["query_tokens"]) != np.asarray(other["query_tokens"]))


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="vision_size isn't a multiple of groups"):
        QFormer(replace(TINY, vision_size=18))
    with pytest.raises(ConfigError, match="no mean direction"):
        initial_qformer(TINY, np.zeros((5, TINY.llm_size), np.float32))
    with pytest.raises(ConfigError, match="another shape"):
        initial_qformer(TINY, np.ones((5, TINY.llm_size + 1), np.float32))
