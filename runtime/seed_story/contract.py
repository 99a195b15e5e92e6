"""The contract between exporter and runtime: every graph's signatures, tensor names, shapes and dtypes.

Both sides import this file and nothing else says these facts. A bundle repeats its contract in the manifest, and
the runtime refuses a bundle whose graphs disagree with what its configuration implies here.

The decoder never owns the cache. Its inputs and outputs, for N tokens, `prefill_N` and `decode` (N = 1):

    embeddings       [N, hidden]                 what the N tokens are, oldest first; a shorter chunk sits at the END;
                                                 of this bundle's own `embed` and Q-Former, whatever their channels mean
    cos, sin         [N, 2, head_dim]            rotation of each token: 0 by its absolute position (it scores the
                                                 ring and its own chunk), 1 by its in-cache position (it scores the
                                                 kept slots); sin's first half is negated
    region           [2, slots]                  1 where a slot belongs to the ring (row 0) or is kept (row 1); only
                                                 the first `config.kept_limit` slots may be kept
    mask             [N, slots + N]              additive; 0 where a token may look, MASKED where it may not
    kv_cache_k_i     [kv_heads, slots, head_dim] layer i's keys, rotated; kv_cache_v_i its values
    -> logits        [1, vocab]                  of the last token
    -> k, v          [layers, kv_heads, N, head_dim]  the new keys (rotated by rotation 0) and values

`begin_N`, which a bundle may have for some N, is `prefill_N` of an empty cache, which it doesn't read:

    cos, sin         [N, 1, head_dim]            by the absolute position, which is the in-cache one
    mask             [N, N]

`decode_attention`, which a bundle may have or not, is `decode` with one more output:

    -> attention     [1, slots + 1]              how much the token looked at each slot and at itself: the softmax's
                                                 weights, their mean over layers and query heads

A bundle that can verify guesses has `verify_K` for one K: `decode` for K tokens, of which the ith is the ith of a block
(`seed_story/block.py`). It, `decode` and `decode_attention` then have K columns for the chunk instead of N, and

    block_k, block_v [layers, kv_heads, K, head_dim] of the block's tokens before these, in their places; else zeros
    place            [K, 1]                      1 where the block's tokens are these, else 0
    mask             [N, slots + K]              the last K columns are the block's
    -> logits        [N, vocab]                  of all N tokens
    -> attention     [1, slots + K]

Where the cache is int8, the kept slots have S float32 rows of their own beside it, and there is no `region`: cos's and
sin's row 0 is for the int8 slots and the chunk, row 1 for the sink rows.

    mask                [N, slots + S + N]          the S columns are those of the sink rows
    kv_cache_k_i        [kv_heads, slots, head_dim] int8; a key is its codes times its scale
    kv_cache_k_i_scale  [kv_heads, 1, slots]        float32
    kv_cache_k_i_sink   [kv_heads, S, head_dim]     float32; likewise kv_cache_v_i, _scale and _sink
    -> attention        [1, slots + S + 1]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from seed_story.config import LlamaConfig, QFormerConfig, StoryConfig, VisionConfig

SCHEMA_VERSION = 1
"""Of the manifest; a runtime reads its own version only."""

VIT, QFORMER, DECODER = "vit", "qformer", "decoder"
GRAPHS = (VIT, QFORMER, DECODER)
ENCODE, PROJECT, EMBED, DECODE, DECODE_ATTENTION = "encode", "project", "embed", "decode", "decode_attention"
PREFILL_SIZES, BEGIN_SIZES = (16, 64, 128), (64, 512)

BEGIN_PICTURE, END_PICTURE = "<|picture|>", "<|/picture|>"
"""The control tokens around a picture's embeddings."""

BLOCK_K, BLOCK_V, PLACE = "block_k", "block_v", "place"
"""What `verify_K` and the `decode` beside it read of the block."""

MASKED = -1.0e9
"""What the mask adds where a token may not look; finite, so that a row of nothing else is no NaN."""


def prefill_name(size: int) -> str:
    """The signature that takes `size` tokens; `decode` takes one."""
    return DECODE if size == 1 else f"prefill_{size}"


def begin_name(size: int) -> str:
    """The signature that takes the first `size` tokens."""
    return f"begin_{size}"


def verify_name(size: int) -> str:
    """The signature that takes the rest of a block of `size` tokens and gives the logits after each of them."""
    return f"verify_{size}"


def key_cache(layer: int) -> str:
    """The name of a layer's key cache, as LiteRT's own runners spell it."""
    return f"kv_cache_k_{layer}"


def value_cache(layer: int) -> str:
    """The name of a layer's value cache."""
    return f"kv_cache_v_{layer}"


def scales_of(cache: str) -> str:
    """The name of the scales of an int8 cache."""
    return f"{cache}_scale"


def sinks_of(cache: str) -> str:
    """The name of the float32 rows beside an int8 cache."""
    return f"{cache}_sink"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a signature."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True)
class Signature:
    """One entry point of a graph."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_dict(self) -> dict[str, Any]:
        """As the manifest says it: name to `[dtype, *shape]`."""
        return {
            side: {spec.name: [spec.dtype, *spec.shape] for spec in specs}
            for side, specs in (("inputs", self.inputs), ("outputs", self.outputs))
        }


def vit_signatures(config: VisionConfig) -> tuple[Signature, ...]:
    """The vision transformer: pixels in 0..1, RGB, to features (class token, then patches)."""
    size = config.image_size
    return (
        Signature(
            ENCODE,
            (TensorSpec("image", (1, size, size, 3)),),
            (TensorSpec("features", (1, config.tokens, config.hidden_size)),),
        ),
    )


def qformer_signatures(config: QFormerConfig, feature_tokens: int) -> tuple[Signature, ...]:
    """The Q-Former: features to embeddings that the decoder reads."""
    return (
        Signature(
            PROJECT,
            (TensorSpec("features", (1, feature_tokens, config.vision_size)),),
            (TensorSpec("image_embeddings", (1, config.num_queries, config.llm_size)),),
        ),
    )


@dataclass(frozen=True)
class Steps:
    """Which signatures a decoder has beside `embed` and `decode`; by default those of the usual bundle.

    Args:
        prefill: N of each `prefill_N`.
        begin: N of each `begin_N`.
        attention: whether there is `decode_attention`.
        verify: K of the `verify_K`; 0 where there is none.
    """

    prefill: tuple[int, ...] = PREFILL_SIZES
    begin: tuple[int, ...] = BEGIN_SIZES
    attention: bool = True
    verify: int = 0


def cache_specs(config: LlamaConfig, slots: int, sink_rows: int | None = None) -> tuple[TensorSpec, ...]:
    """The cache's inputs: all keys, then all values.

    Args:
        sink_rows: float32 rows beside an int8 cache; None for a float32 cache.
    """
    heads, width = config.num_kv_heads, config.head_dim
    names = [name(i) for name in (key_cache, value_cache) for i in range(config.num_layers)]
    if sink_rows is None:
        return tuple(TensorSpec(name, (heads, slots, width)) for name in names)
    return tuple(
        spec
        for name in names
        for spec in (
            TensorSpec(name, (heads, slots, width), "int8"),
            TensorSpec(scales_of(name), (heads, 1, slots)),
            TensorSpec(sinks_of(name), (heads, sink_rows, width)),
        )
    )


def _step_outputs(config: LlamaConfig, size: int) -> tuple[TensorSpec, ...]:
    new = (config.num_layers, config.num_kv_heads, size, config.head_dim)
    return TensorSpec("logits", (1, config.vocab_size)), TensorSpec("k", new), TensorSpec("v", new)


def decoder_step(config: LlamaConfig, slots: int, size: int, sink_rows: int | None = None, block: int = 0) -> Signature:
    """`prefill_N` or `decode`; see the top of this file, and `cache_specs`.

    Args:
        block: K where this is the `decode` beside a `verify_K`, else 0.
    """
    held = (config.num_layers, config.num_kv_heads, block, config.head_dim)
    beside = (TensorSpec(BLOCK_K, held), TensorSpec(BLOCK_V, held), TensorSpec(PLACE, (block, 1))) if block else ()
    region = () if sink_rows is not None else (TensorSpec("region", (2, slots)),)
    return Signature(
        prefill_name(size),
        (
            TensorSpec("embeddings", (size, config.hidden_size)),
            TensorSpec("cos", (size, 2, config.head_dim)),
            TensorSpec("sin", (size, 2, config.head_dim)),
            *region,
            *beside,
            TensorSpec("mask", (size, slots + (sink_rows or 0) + (block or size))),
            *cache_specs(config, slots, sink_rows),
        ),
        _step_outputs(config, size),
    )


def decoder_begin_step(config: LlamaConfig, size: int) -> Signature:
    """`begin_N`; see the top of this file."""
    rotation = (size, 1, config.head_dim)
    return Signature(
        begin_name(size),
        (
            TensorSpec("embeddings", (size, config.hidden_size)),
            TensorSpec("cos", rotation),
            TensorSpec("sin", rotation),
            TensorSpec("mask", (size, size)),
        ),
        _step_outputs(config, size),
    )


def decoder_attention_step(config: LlamaConfig, slots: int, sink_rows: int | None = None, block: int = 0) -> Signature:
    """`decode_attention`; see the top of this file, and `decoder_step`."""
    plain, columns = decoder_step(config, slots, 1, sink_rows, block), slots + (sink_rows or 0) + (block or 1)
    return Signature(DECODE_ATTENTION, plain.inputs, (*plain.outputs, TensorSpec("attention", (1, columns))))


def decoder_verify_step(config: LlamaConfig, slots: int, size: int, sink_rows: int | None = None) -> Signature:
    """`verify_K`; see the top of this file, and `decoder_step`."""
    plain = decoder_step(config, slots, size, sink_rows, block=size)
    logits = TensorSpec("logits", (size, config.vocab_size))
    return Signature(verify_name(size), plain.inputs, (logits, *plain.outputs[1:]))


def decoder_signatures(
    config: LlamaConfig, slots: int, steps: Steps, sink_rows: int | None = None
) -> tuple[Signature, ...]:
    """The decoder's entry points: token to embedding, then all that compute a step."""
    embed = Signature(
        EMBED,
        (TensorSpec("token", (1,), "int32"),),
        (TensorSpec("embeddings", (1, config.hidden_size)),),
    )
    made = [embed]
    made += [decoder_begin_step(config, size) for size in steps.begin]
    made += [decoder_step(config, slots, size, sink_rows) for size in steps.prefill]
    made.append(decoder_step(config, slots, 1, sink_rows, steps.verify))
    if steps.attention:
        made.append(decoder_attention_step(config, slots, sink_rows, steps.verify))
    if steps.verify:
        made.append(decoder_verify_step(config, slots, steps.verify, sink_rows))
    return tuple(made)


def signatures(
    config: StoryConfig, slots: int, steps: Steps, sink_rows: int | None = None
) -> dict[str, tuple[Signature, ...]]:
    """All of a bundle's signatures, by graph."""
    return {
        VIT: vit_signatures(config.vision),
        QFORMER: qformer_signatures(config.qformer, config.vision.tokens),
        DECODER: decoder_signatures(config.llama, slots, steps, sink_rows),
    }
