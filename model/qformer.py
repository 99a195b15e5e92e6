"""The Q-Former: a few learnable queries that read a picture (BLIP-2, arXiv 2301.12597).

SEED-Story (arXiv 2407.08683) puts such queries between a picture and its decoder. This one is pre-norm with
Group Normalization (arXiv 1803.08494) and has a Layer Scale (arXiv 2103.17239) on every residual branch. The
queries start from a summary of the picture, its class token and the mean and the maximum of its patches, and look for
details among the patches. A memory of names, where there is one, adds what the summary calls to mind.
"""

from __future__ import annotations

import math

import keras
import numpy as np
from keras import ops

from model.layers import (
    FloatArray,
    LayerScale,
    Linear,
    Module,
    Rng,
    Tensor,
    attend,
    generator,
    merge_heads,
    normal,
    numpy_of,
    split_heads,
    split_queries,
)
from model.name_memory import NameMemory
from seed_story.config import QFormerConfig
from seed_story.errors import ConfigError

SUMMARIES = 3
"""Vectors that a picture is summed up in: class token, mean and maximum of the patches."""
_INITIAL_SPREAD = 0.1
"""How far an untrained Q-Former's embeddings lie from each other, as a share of their size."""


class Attention(Module):
    """Multi-head attention of `x`, `[b, t, hidden]`, to `source`, `[b, s, source_size]`."""

    def __init__(self, config: QFormerConfig, source_size: int, rng: Rng) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.query = Linear(config.hidden_size, config.hidden_size, rng)
        self.key = Linear(source_size, config.hidden_size, rng)
        self.value = Linear(source_size, config.hidden_size, rng)
        self.dense = Linear(config.hidden_size, config.hidden_size, rng)

    def call(self, x: Tensor, source: Tensor) -> Tensor:  # noqa: D102
        k, v = (split_heads(project(source), self.heads) for project in (self.key, self.value))
        return self.dense(merge_heads(attend(split_queries(self.query(x), self.heads), k, v)))


class Mlp(Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, config: QFormerConfig, rng: Rng) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rng)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rng)

    def call(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.fc2(ops.gelu(self.fc1(x), approximate=False))


class Layer(Module):
    """Queries look at each other, then at the picture, then think."""

    def __init__(self, config: QFormerConfig, rng: Rng) -> None:
        super().__init__()
        size, initial = config.hidden_size, config.layer_scale_init
        self.self_norm = group_norm(config, size)
        self.self_attention = Attention(config, size, rng)
        self.self_scale = LayerScale(size, initial)
        self.cross_norm = group_norm(config, size)
        self.cross_attention = Attention(config, config.vision_size, rng)
        self.cross_scale = LayerScale(size, initial)
        self.mlp_norm = group_norm(config, size)
        self.mlp = Mlp(config, rng)
        self.mlp_scale = LayerScale(size, initial)
        self.dropout = keras.layers.Dropout(config.dropout, seed=_dropout_seed(rng))

    def call(self, x: Tensor, features: Tensor | None) -> Tensor:  # noqa: D102
        y = self.self_norm(x)
        x = x + self.self_scale(self.dropout(self.self_attention(y, y)))
        if features is not None:
            x = x + self.cross_scale(self.dropout(self.cross_attention(self.cross_norm(x), features)))
        return x + self.mlp_scale(self.dropout(self.mlp(self.mlp_norm(x))))


class QFormer(Module):
    """A picture's features to embeddings that a decoder reads like text.

    In: float32 `[b, 1 + grid * grid, vision_size]`, the class token and then the patches of a square grid, row by
    row. Out: float32 `[b, num_queries, llm_size]`. Dropout and noise act only when called with `training=True`.

    Args:
        seed: of the initial weights and of the dropout; None for zeros, when weights are about to be loaded.

    Raises:
        ConfigError: `groups` doesn't divide `vision_size`.
    """

    def __init__(self, config: QFormerConfig, seed: int | None = 0) -> None:
        super().__init__()
        if config.vision_size % config.groups:
            raise ConfigError("vision_size isn't a multiple of groups", got=config.vision_size, expected=config.groups)
        rng = generator(seed)
        size = config.hidden_size
        self.config = config
        self.query_tokens = self.parameter("query_tokens", normal(rng, 1, config.num_queries, size))
        self.query_positions = self.parameter("query_positions", normal(rng, 1, config.num_queries, size))
        self.vision_norm = group_norm(config, config.vision_size)  # BLIP-2's ln_vision: features come in any size
        self.summary_norm = group_norm(config, SUMMARIES * config.vision_size)
        self.summary_projection = Linear(SUMMARIES * config.vision_size, size, rng, name="summary_projection")
        self.summary_noise = keras.layers.GaussianNoise(config.dropout, seed=_dropout_seed(rng))
        self.summary_dropout = keras.layers.Dropout(config.dropout, seed=_dropout_seed(rng))
        self.layers = [Layer(config, rng) for _ in range(config.num_layers)]
        self.norm = group_norm(config, size)
        self.projection = Linear(size, config.llm_size, rng)
        self.memory = NameMemory(config, rng) if config.memory_names else None

    def call(self, features: Tensor) -> Tensor:  # noqa: D102
        return self.read(summarize(features), self.vision_norm(pool_patches(features, self.config.patch_pool)))

    def read(self, summary: Tensor, features: Tensor | None = None) -> Tensor:
        """The embeddings of a picture whose `summarize` is known; without `features`, from that alone."""
        start = self.summary_noise(self.summary_projection(self.summary_norm(summary)))
        start = self.summary_dropout(start)  # [b, 1, hidden]
        x = start + self.query_tokens + self.query_positions  # [b, num_queries, hidden]
        for layer in self.layers:
            x = layer(x, features)
        embeddings = self.projection(self.norm(x))
        return embeddings if self.memory is None else embeddings + self.memory(start)


def summarize(features: Tensor) -> Tensor:
    """Class token, and mean and maximum of the patches, end to end: `[b, 1, SUMMARIES * vision_size]`."""
    patches = features[:, 1:]
    parts = [features[:, :1], ops.mean(patches, axis=1, keepdims=True), ops.max(patches, axis=1, keepdims=True)]
    return ops.concatenate(parts, axis=-1)


def pool_patches(features: Tensor, pool: int) -> Tensor:
    """The class token, and the means of `pool` x `pool` neighbouring patches.

    `[b, 1 + grid * grid, size]` to `[b, 1 + (grid // pool) ** 2, size]`.

    Raises:
        ConfigError: the patches form no square that is a multiple of `pool`.
    """
    if pool == 1:
        return features
    patches, size = features.shape[1] - 1, features.shape[2]
    grid = math.isqrt(patches)
    if grid**2 != patches or grid % pool:
        raise ConfigError("these patches can't be pooled", got=patches, expected=f"a square, multiple of {pool}")
    square = ops.reshape(features[:, 1:], (-1, grid, grid, size))
    means = ops.average_pool(square, pool, strides=pool, data_format="channels_last")
    return ops.concatenate([features[:, :1], ops.reshape(means, (-1, (grid // pool) ** 2, size))], axis=1)


def group_norm(config: QFormerConfig, size: int) -> keras.layers.GroupNormalization:
    """Keras's Group Normalization of `[b, t, size]`: over all rows and the channels of a group together.

    Unlike a Layer Norm it keeps what one query has more of than another.
    """
    norm = keras.layers.GroupNormalization(groups=config.groups, axis=-1, epsilon=config.norm_eps)
    norm.build((None, None, size))
    return norm


def initial_qformer(config: QFormerConfig, token_embeddings: FloatArray, seed: int = 0) -> QFormer:
    """An untrained Q-Former whose embeddings a decoder can read past.

    Its outputs stay close to the mean of the token embeddings, at their ordinary size: the point from which a
    decoder learns least. With SmolLM2-135M sixteen such embeddings changed the cross-entropy of a children's story
    by -0.02 nat, sixteen random directions of the same size by +0.06 (docs/decisions/0003).

    Args:
        token_embeddings: the decoder's table, `[vocab_size, llm_size]`.
        seed: the same seed gives the same weights, on every backend.

    Raises:
        ConfigError: the table is of another width, or has no mean direction.
    """
    if token_embeddings.ndim != 2 or token_embeddings.shape[1] != config.llm_size:
        raise ConfigError("the token embeddings have another shape", got=token_embeddings.shape,
                          expected=f"[vocab_size, {config.llm_size}]")  # fmt: skip
    table = token_embeddings.astype(np.float64)
    rms, mean = np.sqrt(np.mean(np.square(table))), table.mean(axis=0)
    mean_rms = np.sqrt(np.mean(np.square(mean)))
    if not mean_rms > 0:
        raise ConfigError("the token embeddings have no mean direction", got=mean_rms, expected="a positive size")
    qformer = QFormer(config, seed)
    assert qformer.projection.bias is not None
    qformer.projection.bias.assign((mean * rms / mean_rms).astype(np.float32))
    spread = _INITIAL_SPREAD * rms / np.sqrt(config.hidden_size)  # its input has unit variance
    weight = qformer.projection.weight
    weight.assign(weight * np.float32(spread / np.std(numpy_of(weight))))
    return qformer


def _dropout_seed(rng: Rng) -> int:
    return 0 if rng is None else int(rng.integers(2**31))
