"""The reference itself: StreamingLLM told plainly, against `transformers`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from seed_story.backends.base import Array
from tests.compare import assert_close
from tests.export.tiny_decoders import VARIANTS, loud_llama
from tests.reference.streaming_llama import Gallery, StreamingLlama


def hugging_face(name: str, layers: int | None = None) -> tuple[transformers.LlamaForCausalLM, dict[str, Array], Any]:
    config, _ = VARIANTS[name]
    config = replace(config, num_layers=layers or config.num_layers)
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if scaling := config.rope_scaling:
        rope.update(rope_type=scaling.kind, factor=scaling.factor)
        if scaling.kind == "llama3":
            rope.update(
                low_freq_factor=scaling.low_freq_factor,
                high_freq_factor=scaling.high_freq_factor,
                original_max_position_embeddings=scaling.original_max_position,
            )
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            max_position_embeddings=config.max_position,
            rope_parameters=rope,
        )
    )
    weights = loud_llama(config, seed=5)
    left = theirs.load_state_dict({n: torch.from_numpy(w) for n, w in weights.items()}, strict=False)
    assert not left.unexpected_keys
    assert left.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    theirs.tie_weights()
    return theirs.eval(), weights, config


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_equals_transformers_while_nothing_is_forgotten(name: str) -> None:
    theirs, weights, config = hugging_face(name)
    x = np.random.default_rng(3).normal(0, 0.5, (30, config.hidden_size)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(inputs_embeds=torch.from_numpy(x)[None]).logits[0]
    assert_close(StreamingLlama(config, weights, 4, 26).feed(x), expected, "decoder_graph")


@pytest.mark.parametrize("name", VARIANTS)
def test_reference_past_capacity_equals_a_fresh_start_on_what_is_kept(name: str) -> None:
    """With one layer a key depends on its own token only: what is kept, told anew, gives the same."""
    theirs, weights, config = hugging_face(name, layers=1)
    x = np.random.default_rng(3).normal(0, 0.5, (25, config.hidden_size)).astype(np.float32)
    ours = StreamingLlama(config, weights, sinks=2, newest=5).feed(x)
    for token in range(len(x)):
        kept = np.concatenate([x[: min(2, token + 1)], x[max(2, token - 4) : token + 1]])
        with torch.no_grad():
            expected = theirs(inputs_embeds=torch.from_numpy(kept)[None]).logits[0, -1]
        assert_close(ours[token], expected, "decoder_graph")


A, B, C = PICTURES = [range(3, 6), range(8, 11), range(12, 15)]
BY_HAND = {  # two sinks, the five newest, and of at most two pictures that left the first and the last token
    7: [0, 1, *A, 6, 7],
    8: [0, 1, 3, 5, 6, 7, 8],
    12: [0, 1, 3, 5, *B, 11, 12],
    13: [0, 1, 3, 5, 8, 10, 11, 12, 13],
    16: [0, 1, 3, 5, 8, 10, *C, 15, 16],
    17: [0, 1, 12, 14, 8, 10, 15, 16, 17],
}


@pytest.mark.parametrize(("keep_first", "last"), [(False, BY_HAND[17]), (True, [0, 1, 3, 5, 12, 14, 15, 16, 17])])
def test_reference_with_pictures_equals_a_fresh_start_on_what_is_kept(keep_first: bool, last: list[int]) -> None:
    theirs, weights, config = hugging_face("gqa", layers=1)
    x = np.random.default_rng(3).normal(0, 0.5, (18, config.hidden_size)).astype(np.float32)
    reference = StreamingLlama(config, weights, 2, 5, Gallery(2, 1, 1, keep_first))
    reference.pictures = PICTURES
    ours = reference.feed(x)
    for token, kept in {**BY_HAND, 17: last}.items():
        assert reference.seen(token) == kept
        with torch.no_grad():
            expected = theirs(inputs_embeds=torch.from_numpy(x[kept])[None]).logits[0, -1]
        assert_close(ours[token], expected, "decoder_graph")
