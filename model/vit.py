"""The vision transformer: DINOv2 (arXiv 2304.07193) and the plain ViT (arXiv 2010.11929).

Weight names are those of the published `Dinov2Model` and `ViTModel` files of Hugging Face.
"""

from __future__ import annotations

import math

import numpy as np
from keras import ops

from model.layers import (
    FloatArray,
    LayerNorm,
    LayerScale,
    Linear,
    Module,
    Rng,
    Tensor,
    attend,
    generator,
    merge_heads,
    normal,
    split_heads,
    split_queries,
)
from seed_story.config import VisionConfig
from seed_story.errors import ConfigError

IGNORED = ("embeddings.mask_token", "pooler.dense.*", "classifier.*")
"""What published files hold beyond the network: the pre-training's mask, and the heads."""


class SelfAttention(Module):
    """Every token looks at every token."""

    def __init__(self, config: VisionConfig, rng: Rng) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.query = Linear(config.hidden_size, config.hidden_size, rng)
        self.key = Linear(config.hidden_size, config.hidden_size, rng)
        self.value = Linear(config.hidden_size, config.hidden_size, rng)

    def call(self, x: Tensor) -> Tensor:  # noqa: D102
        k, v = (split_heads(project(x), self.heads) for project in (self.key, self.value))
        return merge_heads(attend(split_queries(self.query(x), self.heads), k, v))


class Dense(Module):
    """A Linear under the name `dense`, as Hugging Face nests it."""

    def __init__(self, inputs: int, outputs: int, rng: Rng) -> None:
        super().__init__()
        self.dense = Linear(inputs, outputs, rng)

    def call(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.dense(x)


class Attention(Module):
    """Self-attention and its output projection."""

    def __init__(self, config: VisionConfig, rng: Rng) -> None:
        super().__init__()
        self.attention = SelfAttention(config, rng)
        self.output_ = Dense(config.hidden_size, config.hidden_size, rng)

    def call(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.output_(self.attention(x))


class Mlp(Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, config: VisionConfig, rng: Rng) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rng)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rng)

    def call(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.fc2(ops.gelu(self.fc1(x), approximate=False))


class Dinov2Block(Module):
    """A pre-norm block with a Layer Scale on both branches."""

    def __init__(self, config: VisionConfig, rng: Rng, name: str) -> None:
        super().__init__(name)
        self.norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config, rng)
        self.layer_scale1 = LayerScale(config.hidden_size, 1.0)
        self.norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = Mlp(config, rng)
        self.layer_scale2 = LayerScale(config.hidden_size, 1.0)

    def call(self, x: Tensor) -> Tensor:  # noqa: D102
        x = x + self.layer_scale1(self.attention(self.norm1(x)))
        return x + self.layer_scale2(self.mlp(self.norm2(x)))


class ViTBlock(Module):
    """The plain pre-norm block."""

    def __init__(self, config: VisionConfig, rng: Rng, name: str) -> None:
        super().__init__(name)
        self.layernorm_before = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config, rng)
        self.layernorm_after = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.intermediate = Dense(config.hidden_size, config.intermediate_size, rng)
        self.output_ = Dense(config.intermediate_size, config.hidden_size, rng)

    def call(self, x: Tensor) -> Tensor:  # noqa: D102
        x = x + self.attention(self.layernorm_before(x))
        hidden = ops.gelu(self.intermediate(self.layernorm_after(x)), approximate=False)
        return x + self.output_(hidden)


class Projection(Module):
    """A convolution whose stride is its kernel's side: one linear map per patch; weight `[out, 3, p, p]`."""

    def __init__(self, config: VisionConfig, rng: Rng) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.weight = self.parameter("weight", normal(rng, config.hidden_size, 3, self.patch, self.patch))
        self.bias = self.parameter("bias", np.zeros(config.hidden_size, np.float32))

    def call(self, pixels: Tensor) -> Tensor:  # noqa: D102
        kernel = ops.transpose(self.weight, (2, 3, 1, 0))
        grid = ops.conv(pixels, kernel, strides=self.patch, padding="valid", data_format="channels_last")
        return grid + self.bias  # [b, grid, grid, hidden]


class PatchEmbeddings(Module):
    """Pixels `[b, s, s, 3]` to patches `[b, grid * grid, hidden]`, row by row."""

    def __init__(self, config: VisionConfig, rng: Rng) -> None:
        super().__init__()
        self.projection = Projection(config, rng)

    def call(self, pixels: Tensor) -> Tensor:  # noqa: D102
        b, rows, columns, hidden = ops.shape(grid := self.projection(pixels))
        return ops.reshape(grid, (b, rows * columns, hidden))


class Embeddings(Module):
    """Patches, a class token before them, and where each of them is."""

    def __init__(self, config: VisionConfig, rng: Rng) -> None:
        super().__init__()
        self.config = config
        stored = config.pretrained_grid**2 + 1
        self.cls_token = self.parameter("cls_token", normal(rng, 1, 1, config.hidden_size))
        self.position_embeddings = self.parameter("position_embeddings", normal(rng, 1, stored, config.hidden_size))
        self.patch_embeddings = PatchEmbeddings(config, rng)

    def call(self, pixels: Tensor) -> Tensor:  # noqa: D102
        patches = self.patch_embeddings(pixels)
        cls = ops.broadcast_to(self.cls_token, (ops.shape(patches)[0], 1, self.config.hidden_size))
        return ops.concatenate([cls, patches], axis=1) + self.positions()

    def positions(self) -> Tensor:
        """`[1, tokens, hidden]`: the stored positions, resized to the picture's grid.

        The resize is linear in the stored grid and separable, so it is two matrix products with a constant: a
        graph with frozen weights folds them away, and holds no resize.
        """
        stored, wanted = self.config.pretrained_grid, self.config.grid
        table = ops.convert_to_tensor(self.position_embeddings)
        if stored == wanted:
            return table
        hidden = self.config.hidden_size
        resize = ops.convert_to_tensor(bicubic_matrix(stored, wanted), dtype="float32")
        rows = ops.matmul(resize, ops.reshape(table[:, 1:], (stored, stored * hidden)))
        grid = ops.matmul(resize, ops.reshape(rows, (wanted, stored, hidden)))
        return ops.concatenate([table[:, :1], ops.reshape(grid, (1, wanted * wanted, hidden))], axis=1)


class Encoder(Module):
    """All blocks; only some of them are computed."""

    def __init__(self, config: VisionConfig, rng: Rng) -> None:
        super().__init__()
        block = Dinov2Block if config.layer_scale else ViTBlock
        self.layer = [block(config, rng, f"block_{i}") for i in range(config.num_layers)]

    def call(self, x: Tensor, first: int, end: int) -> Tensor:
        """Hidden states `[b, tokens, hidden]` through the blocks `first` to `end - 1`."""
        for block in self.layer[first:end]:
            x = block(x)
        return x


class VisionTransformer(Module):
    """A picture's features.

    In: pixels, float32 `[b, image_size, image_size, 3]` in 0..1, not normalised. Out: float32
    `[b, tokens, hidden_size]`, the class token and then the patches row by row, after block `feature_layer`
    and, if `final_norm`, the last LayerNorm. Equals `transformers`' Dinov2Model and ViTModel.

    Args:
        seed: of the initial weights; None for zeros, when weights are about to be loaded.
    """

    def __init__(self, config: VisionConfig, seed: int | None = 0) -> None:
        super().__init__()
        rng = generator(seed)
        self.config = config
        self.embeddings = Embeddings(config, rng)
        self.encoder = Encoder(config, rng)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.set_trainable_blocks(min(config.trainable_blocks, config.feature_layer))

    def call(self, pixels: Tensor) -> Tensor:  # noqa: D102
        return self.features(self.hidden(pixels, 0), first=0)

    def hidden(self, pixels: Tensor, end: int) -> Tensor:
        """The hidden states `[b, tokens, hidden_size]` after the first `end` blocks."""
        mean, std = (np.asarray(v, np.float32) for v in (self.config.image_mean, self.config.image_std))
        return self.encoder(self.embeddings((pixels - mean) / std), first=0, end=end)

    def features(self, hidden: Tensor, first: int) -> Tensor:
        """The features of a picture whose hidden states after `first` blocks are known."""
        features = self.encoder(hidden, first=first, end=self.config.feature_layer)
        return self.layernorm(features) if self.config.final_norm else features

    def set_trainable_blocks(self, n: int) -> None:
        """Freezes all but the last `n` of the computed blocks; raises ConfigError when there aren't `n`."""
        if not 0 <= n <= self.config.feature_layer:
            raise ConfigError("that many blocks can't be trained", got=n, expected=f"0 to {self.config.feature_layer}")
        self.trainable = True  # Keras hands this down to every part, so the exceptions come after it
        self.embeddings.trainable = self.layernorm.trainable = False
        for index, block in enumerate(self.encoder.layer):
            block.trainable = self.config.feature_layer - n <= index < self.config.feature_layer


def bicubic_matrix(stored: int, wanted: int) -> FloatArray:
    """Bicubic resizing of `stored` samples to `wanted`, as a float64 matrix `[wanted, stored]`.

    As torch's `interpolate(mode="bicubic", align_corners=False)`: Keys' kernel with a = -0.75 and no
    anti-aliasing; beyond the border the last sample repeats.
    """
    matrix = np.zeros((wanted, stored))
    for row in range(wanted):
        centre = (row + 0.5) * stored / wanted - 0.5
        first = math.floor(centre) - 1
        for tap in range(first, first + 4):
            matrix[row, min(max(tap, 0), stored - 1)] += _keys(abs(centre - tap))
    return matrix


def _keys(distance: float, a: float = -0.75) -> float:
    d = distance
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0
