"""The decoder: LLaMA (arXiv 2302.13971) with grouped-query attention (arXiv 2305.13245).

Weight names are those of Hugging Face's `LlamaForCausalLM`. The rotary embedding (arXiv 2104.09864) is in the
half-split form of the Hugging Face checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from keras import ops
from numpy.typing import ArrayLike

from model.layers import (
    Embedding,
    FloatArray,
    Linear,
    Module,
    RMSNorm,
    Rng,
    Tensor,
    attend,
    generator,
    merge_heads,
    split_heads,
    split_queries,
)
from seed_story.config import CacheConfig, LlamaConfig, rope_frequencies

IGNORED = ("*.rotary_emb.inv_freq",)
"""What old files hold beyond the network: it follows from the configuration."""


def rope_tables(config: LlamaConfig, positions: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Cosine and sine of every position's angles, computed in float64.

    Args:
        positions: ints of any shape `[...]`.

    Returns:
        Two float32 arrays `[..., head_dim]`; the second half repeats the first.
    """
    angles = np.asarray(positions, np.float64)[..., None] * np.asarray(rope_frequencies(config))
    angles = np.concatenate([angles, angles], axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `x`, `[b, heads, t, d]`; channel i turns with channel i + d/2.

    Args:
        cos, sin: broadcastable to `x`.
    """
    left, right = ops.split(x, 2, axis=-1)
    return x * cos + ops.concatenate([-right, left], axis=-1) * sin


@dataclass(frozen=True)
class Geometry:
    """Where every token stands and whom it may see; the same for all layers.

    Args:
        cos, sin: rotation by absolute position, `[t, d]` (or `[b, 1, t, d]`).
        allowed: boolean `[t, t]` (or `[b, 1, t, t]`), True where a row may look.
        kept: with a bounded cache, 1.0 for the tokens that stay for ever, float32 `[t, 1]`; else None.
        inside: with a bounded cache, cos and sin by each token's place inside the cache.
    """

    cos: Tensor
    sin: Tensor
    allowed: Tensor
    kept: Tensor | None = None
    inside: tuple[Tensor, Tensor] | None = None


class Attention(Module):
    """Causal self-attention in which `group` query heads share one key and value head."""

    def __init__(self, config: LlamaConfig, rng: Rng) -> None:
        super().__init__()
        self.config = config
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width, rng, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_width, rng, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_width, rng, bias=False)
        self.o_proj = Linear(width, config.hidden_size, rng, bias=False)

    def call(self, x: Tensor, geometry: Geometry) -> Tensor:  # noqa: D102
        plain = split_queries(self.q_proj(x), self.config.num_heads)
        q = rotate(plain, geometry.cos, geometry.sin)
        k = rotate(split_heads(self.k_proj(x), self.config.num_kv_heads), geometry.cos, geometry.sin)
        v = split_heads(self.v_proj(x), self.config.num_kv_heads)
        if geometry.kept is not None and geometry.inside is not None:
            # Two rotations of q, and each key in the half that answers to its own: one of them scores it.
            q = ops.concatenate([q, rotate(plain, *geometry.inside)], axis=-1)
            k = ops.concatenate([k * (1 - geometry.kept), k * geometry.kept], axis=-1)
        k, v = (ops.repeat(kv, self.config.group, axis=1) for kv in (k, v))
        return self.o_proj(merge_heads(attend(q, k, v, geometry.allowed)))


class Mlp(Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, rng: Rng) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, rng, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, rng, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, rng, bias=False)

    def call(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.down_proj(ops.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: LlamaConfig, rng: Rng) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rng)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Mlp(config, rng)

    def call(self, x: Tensor, geometry: Geometry) -> Tensor:  # noqa: D102
        x = x + self.self_attn(self.input_layernorm(x), geometry=geometry)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(Module):
    """Everything but the head: embeddings `[b, t, d]` to hidden states `[b, t, d]`."""

    def __init__(self, config: LlamaConfig, rng: Rng) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, rng)
        self.layers = [Block(config, rng) for _ in range(config.num_layers)]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def call(self, x: Tensor, geometry: Geometry) -> Tensor:  # noqa: D102
        for layer in self.layers:
            x = layer(x, geometry=geometry)
        return self.norm(x)


class Llama(Module):
    """The decoder over a whole sequence, without a cache. Equals `transformers`' LlamaForCausalLM.

    Args:
        seed: of the initial weights; None for zeros, when weights are about to be loaded.
    """

    def __init__(self, config: LlamaConfig, seed: int | None = 0) -> None:
        super().__init__()
        rng = generator(seed)
        self.config = config
        self.model = Body(config, rng)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, rng, bias=False)

    def embed(self, token_ids: Tensor) -> Tensor:
        """Token ids, int `[b, t]` in `[0, vocab_size)`, to embeddings, float32 `[b, t, hidden_size]`."""
        return self.model.embed_tokens(token_ids)

    def call(
        self,
        embeddings: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CacheConfig | None = None,
    ) -> Tensor:
        """The logits after every position, float32 `[b, t, vocab_size]`; the arguments are `hidden`'s."""
        return self.head(self.hidden(embeddings, mask, positions, cache))

    def hidden(
        self,
        embeddings: Tensor,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: CacheConfig | None = None,
    ) -> Tensor:
        """The normalised hidden states, float32 `[b, t, hidden_size]`.

        Args:
            embeddings: float32 `[b, t, hidden_size]`.
            mask: boolean `[t, t]` or `[b, t, t]`, True where a row may look; causality is added to it.
            positions: int `[t]` or `[b, t]` in `[0, max_position)`; by default 0, 1, 2 ... without a limit.
            cache: as if the story ran through a cache of this geometry: every token sees the sinks and the
                ring's newest tokens, at their places inside the cache (StreamingLLM, arXiv 2309.17453). Alone,
                without `mask` and `positions`, and for a `t` that is known.
        """
        length = ops.shape(embeddings)[1]
        if cache is not None:
            return self.model(embeddings, geometry=_streaming_geometry(self.config, cache, length))
        return self.model(embeddings, geometry=Geometry(*self._rotations(length, positions), _allowed(length, mask)))

    def head(self, hidden: Tensor) -> Tensor:
        """Normalised hidden states `[..., hidden_size]` to logits `[..., vocab_size]`."""
        return ops.matmul(hidden, ops.transpose(self.head_weight))

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix, `[vocab_size, hidden_size]`: its own, or the embeddings' table."""
        return (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight

    def _rotations(self, length: int | Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin `[t, d]`, or `[b, 1, t, d]` for positions that differ by row."""
        if positions is None and isinstance(length, int):
            cos, sin = rope_tables(self.config, range(length))
            return ops.convert_to_tensor(cos), ops.convert_to_tensor(sin)
        if positions is None:
            positions = ops.arange(length)
        tables = rope_tables(self.config, range(self.config.max_position))
        cos, sin = (ops.take(ops.convert_to_tensor(table), positions, axis=0) for table in tables)
        if len(positions.shape) == 2:
            cos, sin = cos[:, None], sin[:, None]
        return cos, sin


def _allowed(length: int | Tensor, mask: Tensor | None) -> Tensor:
    """Who may look at whom: boolean `[t, t]`, or `[b, 1, t, t]` for a mask per row of the batch."""
    index = ops.arange(length)
    causal = index[:, None] >= index[None, :]
    if mask is None:
        return causal
    mask = ops.cast(mask, "bool")
    return ops.logical_and(causal, mask if len(mask.shape) == 2 else mask[:, None])


def _streaming_geometry(config: LlamaConfig, cache: CacheConfig, length: int) -> Geometry:
    index = np.arange(length)
    kept = index < cache.sinks
    age = index[:, None] - index[None, :]
    allowed = (age >= 0) & (kept[None, :] | (age < cache.ring))
    inside = rope_tables(config, np.minimum(index, cache.sinks + cache.ring - 1))
    arrays = (*rope_tables(config, index), allowed, kept[:, None].astype(np.float32), *inside)
    cos, sin, allowed, stays, *places = (ops.convert_to_tensor(array) for array in arrays)
    return Geometry(cos, sin, allowed, stays, inside=(places[0], places[1]))
