from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig as HfConfig
from transformers import LlamaForCausalLM

from model import llama
from model.layers import RMSNorm, named_variables
from model.llama import Geometry, Llama, rope_tables
from model.weights import load_weights
from seed_story.config import LlamaConfig
from tests.compare import assert_close

SMALL = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "attn_implementation": "eager",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,  # so low, and the context so short, that all three bands are met
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "one head per key": {"num_key_value_heads": 6},
    "one key for all": {"num_key_value_heads": 1},
    "wider heads": {"head_dim": 10},
    "other epsilon": {"rms_norm_eps": 1e-2},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "llama3": {"rope_parameters": LLAMA3},
}


@pytest.fixture
def pair(scatter, published):
    def make(**changes):
        model = scatter(LlamaForCausalLM(HfConfig(**{**SMALL, **changes})))
        tensors, config = published(model)
        network = Llama(LlamaConfig.from_hf(config))
        load_weights(network, tensors, ignore=llama.IGNORED)
        return model, network

    return make


def ids(batch: int = 2, length: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50, (batch, length))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(pair, kind: str) -> None:
    model, network = pair(**KINDS[kind])
    assert_close(network(network.embed(ids())), model(torch.from_numpy(ids())).logits, "network")


def test_every_kind_of_scaling_changes_the_logits(pair) -> None:
    """Without this, a scaling that both sides ignore would pass the test above."""
    logits = []
    for kind in ("grouped", "theta", "linear", "llama3"):
        _, network = pair(**KINDS[kind])
        logits.append(np.asarray(network(network.embed(ids()))))
    for a in range(4):
        for b in range(a):
            assert np.abs(logits[a] - logits[b]).max() > 1e-2


def test_tied_head_has_no_weight_of_its_own(pair) -> None:
    _, tied = pair(tie_word_embeddings=True)
    _, untied = pair()
    assert set(named_variables(untied)) - set(named_variables(tied)) == {"lm_head.weight"}


def test_layers_equal_transformers(pair) -> None:
    model, network = pair(rms_norm_eps=1e-3)
    x = np.random.default_rng(0).standard_normal((2, 9, 24)).astype(np.float32)
    theirs, ours = model.model.layers[1], network.model.layers[1]
    rotations = model.model.rotary_emb(torch.from_numpy(x), torch.arange(9)[None])
    causal = torch.full((9, 9), -1e9).triu(1)[None, None]
    geometry = Geometry(*rope_tables(network.config, range(9)), np.tri(9, dtype=bool))
    tx = torch.from_numpy(x)
    assert_close(ours.mlp(x), theirs.mlp(tx), "network")
    assert_close(ours.input_layernorm(x), theirs.input_layernorm(tx), "layer")
    expected = theirs.self_attn(tx, position_embeddings=rotations, attention_mask=causal)[0]
    assert_close(ours.self_attn(x, geometry=geometry), expected, "network")
    expected = theirs(tx, position_embeddings=rotations, attention_mask=causal)
    assert_close(ours(x, geometry=geometry), expected, "network")


def test_rms_norm_is_its_formula() -> None:
    x = np.random.default_rng(0).standard_normal((3, 24)).astype(np.float32)
    norm = RMSNorm(24, 0.5)
    assert_close(norm(x), x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 0.5), "layer")


@pytest.mark.parametrize("kind", ["grouped", "linear", "llama3"])
def test_rope_tables_equal_transformers(pair, kind: str) -> None:
    model, network = pair(**KINDS[kind])
    cos, sin = model.model.rotary_emb(torch.zeros(1, 1, 24), torch.arange(128)[None])
    ours = rope_tables(network.config, range(128))
    assert_close(ours[0], cos[0], "rope")
    assert_close(ours[1], sin[0], "rope")


def test_rope_is_exact_far_out() -> None:
    """At a million tokens float32 angles are off by whole degrees; these must not be."""
    config = LlamaConfig.tiny()
    cos, _ = rope_tables(config, [1_000_003])
    turns = np.array([1_000_003 * 10_000.0 ** (-i / 4) for i in range(4)], np.longdouble)
    assert_close(cos[0, :4], np.cos(turns), "layer")


def test_future_tokens_change_nothing(pair) -> None:
    _, network = pair()
    changed = ids().copy()
    changed[:, 20:] = (changed[:, 20:] + 1) % 50
    before, after = (np.asarray(network(network.embed(tokens))) for tokens in (ids(), changed))
    assert_close(after[:, :20], before[:, :20], "same_maths")
    assert np.abs(after[:, 20] - before[:, 20]).max() > 1e-2


@pytest.mark.parametrize("per_row", [False, True])
def test_mask_is_added_to_causality(pair, per_row: bool) -> None:
    """A window of 5 and the first token, against transformers with the same additive mask."""
    model, network = pair()
    index = np.arange(40)
    window = (index[:, None] - index < 5) | (index == 0)  # says nothing about the future
    rows = np.stack([window, np.ones_like(window)])
    causal = rows & np.tri(40, dtype=bool) if per_row else (window & np.tri(40, dtype=bool))[None]
    additive = torch.from_numpy(np.where(causal, 0, np.finfo(np.float32).min).astype(np.float32))[:, None]
    expected = model(torch.from_numpy(ids()), attention_mask=additive.expand(2, -1, -1, -1)).logits
    got = network(network.embed(ids()), mask=rows if per_row else window)
    assert_close(got, expected, "network")


@pytest.mark.parametrize("per_row", [False, True])
def test_positions_equal_transformers(pair, per_row: bool) -> None:
    model, network = pair()
    positions = np.cumsum(np.random.default_rng(3).integers(0, 3, (2, 40)), axis=1) % 64
    positions = positions if per_row else positions[0]
    shared = torch.from_numpy(np.broadcast_to(positions, (2, 40)).copy())
    every = torch.full((40, 40), torch.finfo(torch.float32).min).triu(1).expand(2, 1, -1, -1)
    expected = model(torch.from_numpy(ids()), position_ids=shared, attention_mask=every).logits
    assert_close(network(network.embed(ids()), positions=positions), expected, "network")


def test_longer_than_max_position(pair) -> None:
    model, network = pair()
    long = ids(1, 100)
    assert_close(network(network.embed(long)), model(torch.from_numpy(long)).logits, "network")
