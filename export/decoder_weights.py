"""The decoder's weights as its graphs take them: their names, their shapes, and how a checkpoint's become these."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from seed_story.config import LlamaConfig

Weights = Mapping[str, Any]  # name to variable or array, in the names of LlamaForCausalLM

TABLE, NORM, HEAD = "embed_tokens", "norm", "lm_head"
BROAD, NARROWING, ROTATED_NORM, DOWN_ROTATION = "broad", "narrowing", "rotated_norm", "down_rotation"
"""Only of a rotated decoder: the broad directions of its stream and what narrows them, the last gain between two turns,
and what turns the input of `down`, block by block."""
_BROAD = 16
"""Directions: one has half of what sixteen give, and sixty-four a tenth more (docs/decisions/0012-balanced.md)."""
_DOWN_BLOCK = 128
"""Channels of a block, or the largest power of two below that divides the width: more spread better and cost more."""


def matrix(layer: int, kind: str) -> str:
    """The skeleton's name of a layer's matrix: kind is qkv, o, gate_up or down."""
    return f"layers_{layer}_{kind}"


def weight_shapes(config: LlamaConfig, *, rotated: bool = False) -> dict[str, tuple[int, ...]]:
    """The skeleton's weights, by name: matrices `[outputs, inputs]`, those of the layers in order, and the head last.

    Args:
        rotated: whether the residual stream is turned; see `export/rotation.py`.
    """
    d, f, heads = config.hidden_size, config.intermediate_size, config.num_heads + 2 * config.num_kv_heads
    block, broad = down_block(config), broad_directions(config)
    stream = d + broad if rotated else d
    shapes: dict[str, tuple[int, ...]] = (
        {BROAD: (broad, d), NARROWING: (stream, broad), ROTATED_NORM: (d, d), DOWN_ROTATION: (block, block)}
        if rotated
        else {NORM: (d,)}
    )
    for i in range(config.num_layers):
        shapes[matrix(i, "qkv")] = (heads * config.head_dim, d)
        shapes[matrix(i, "o")] = (stream, config.num_heads * config.head_dim)
        shapes[matrix(i, "gate_up")] = (2 * f, d)
        shapes[matrix(i, "down")] = (stream, f)
    shapes |= dict.fromkeys((TABLE, head_name(config)), (config.vocab_size, d))
    return shapes


def broad_directions(config: LlamaConfig) -> int:
    """How many directions of a rotated decoder's stream are narrowed."""
    return min(_BROAD, config.hidden_size)


def down_block(config: LlamaConfig) -> int:
    """Channels that are turned with each other before a rotated decoder's `down`."""
    return math.gcd(config.intermediate_size, _DOWN_BLOCK)


def head_name(config: LlamaConfig) -> str:
    """The skeleton's name of what makes logits, its last weight: the table itself where they are tied."""
    return TABLE if config.tie_word_embeddings else HEAD


def skeleton_weight(config: LlamaConfig, weights: Weights, name: str) -> npt.NDArray[np.float32]:
    """One of the skeleton's weights, made from the checkpoint's when it is asked for.

    Args:
        weights: in the names of `LlamaForCausalLM`.
        name: one of `weight_shapes`.
    """

    def get(key: str) -> npt.NDArray[np.float32]:
        return np.asarray(weights[key], np.float32)

    if name in (TABLE, NORM):
        return get(f"model.{name}.weight")
    if name == HEAD:
        return get("lm_head.weight")
    _, layer, kind = name.split("_", 2)
    block = f"model.layers.{layer}"
    if kind == "o":
        return get(f"{block}.self_attn.o_proj.weight")
    if kind == "down":
        return get(f"{block}.mlp.down_proj.weight")
    if kind == "gate_up":
        gate_up = [get(f"{block}.mlp.{part}_proj.weight") for part in ("gate", "up")]
        return np.concatenate(gate_up) * get(f"{block}.post_attention_layernorm.weight")
    kv, width = config.num_kv_heads, config.head_dim
    q, k, v = (get(f"{block}.self_attn.{part}_proj.weight") for part in ("q", "k", "v"))
    q = q.reshape(kv, config.group * width, -1) * np.float32(width**-0.5)
    qk = np.concatenate([q, k.reshape(kv, width, -1)], axis=1).reshape(-1, q.shape[-1])
    return np.concatenate([qk, v]) * get(f"{block}.input_layernorm.weight")
