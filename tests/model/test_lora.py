"""LoRA against its formula, and the decoder with LoRA against the one that it is merged into."""

from __future__ import annotations

import numpy as np
import pytest
from keras import ops

from model.layers import Linear, named_variables, numpy_of
from model.llama import Llama
from model.lora import LoraLinear, add_lora, lora_tensors, merge_lora
from seed_story.config import LlamaConfig
from seed_story.errors import WeightsError
from tests.compare import assert_close

RANK = 3
LINEARS = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
NAMES = [f"model.layers.{block}.{linear}.{half}" for block in range(2) for linear in LINEARS
         for half in ("lora_down", "lora_up")]  # fmt: skip


def logits(llama: Llama) -> np.ndarray:
    ids = np.random.default_rng(5).integers(0, 320, (2, 11))
    return np.asarray(ops.convert_to_numpy(llama(llama.embed(ids))))


def values_of(llama: Llama) -> dict[str, np.ndarray]:
    return {name: numpy_of(variable) for name, variable in named_variables(llama).items()}


def loud(llama: Llama) -> Llama:
    """Large random matrices, so that a lost or swapped one shows."""
    rng = np.random.default_rng(6)
    for name, variable in named_variables(llama).items():
        if name.endswith(("lora_down", "lora_up")):
            variable.assign(rng.normal(0, 0.3, variable.shape))
    return llama


@pytest.fixture
def adapted() -> Llama:
    llama = Llama(LlamaConfig.tiny())
    add_lora(llama, RANK)
    return loud(llama)


def test_layer_equals_the_formula() -> None:
    rng = np.random.default_rng(1)
    base = Linear(5, 7, rng, bias=False)
    layer = LoraLinear(base, 2, rng)
    weight, down, up, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((7, 5), (2, 5), (7, 2), (3, 5)))
    for variable, value in ((layer.weight, weight), (layer.lora_down, down), (layer.lora_up, up)):
        variable.assign(value)
    expected = x.astype(np.float64) @ (weight.astype(np.float64) + up.astype(np.float64) @ down).T
    assert_close(layer(x), expected, "layer")


def test_fresh_lora_changes_nothing() -> None:
    plain, adapted = Llama(LlamaConfig.tiny()), Llama(LlamaConfig.tiny())
    add_lora(adapted, RANK)
    assert_close(logits(adapted), logits(plain), "exact")
    assert all(np.abs(values).max() > 0 for name, values in lora_tensors(adapted).items() if name.endswith("down"))


def test_every_linear_layer_of_the_blocks_gets_a_pair(adapted: Llama) -> None:
    tensors = lora_tensors(adapted)
    assert sorted(tensors) == sorted(NAMES)
    assert tensors["model.layers.1.mlp.down_proj.lora_down"].shape == (RANK, 48)
    assert tensors["model.layers.1.mlp.down_proj.lora_up"].shape == (24, RANK)


def test_only_the_pairs_are_trainable(adapted: Llama) -> None:
    named = named_variables(adapted)
    assert [name for name, variable in named.items() if variable.trainable] == sorted(NAMES, key=list(named).index)
    assert {id(v) for v in adapted.trainable_variables} == {id(named[name]) for name in NAMES}


def test_seed_decides_the_first_values() -> None:
    def first(seed: int) -> np.ndarray:
        llama = Llama(LlamaConfig.tiny())
        add_lora(llama, RANK, seed)
        return lora_tensors(llama)[NAMES[0]]

    np.testing.assert_array_equal(first(1), first(1))
    assert np.abs(first(1) - first(2)).max() > 0.01


def test_merged_decoder_says_the_same(adapted: Llama) -> None:
    plain = Llama(LlamaConfig.tiny())
    before = logits(plain)
    merge_lora(plain, lora_tensors(adapted))
    assert_close(logits(plain), logits(adapted), "network")
    assert np.abs(logits(plain) - before).max() > 0.1
    assert sorted(named_variables(plain)) == sorted(named_variables(Llama(LlamaConfig.tiny())))


def test_float16_is_added_in_float32(adapted: Llama) -> None:
    """The product of two halves is exact in float32: nothing is rounded a second time."""
    plain = Llama(LlamaConfig.tiny())
    before, halves = values_of(plain), {n: v.astype(np.float16) for n, v in lora_tensors(adapted).items()}
    merge_lora(plain, halves)
    for name, value in values_of(plain).items():
        stem = name.removesuffix(".weight")
        expected = before[name].astype(np.float64)
        if f"{stem}.lora_up" in halves:
            expected = expected + halves[f"{stem}.lora_up"].astype(np.float64) @ halves[f"{stem}.lora_down"].astype(
                float
            )
        assert_close(value, expected, "same_maths")


UNFIT = {
    "half a pair": lambda t: t.pop(NAMES[1]),
    "the other half": lambda t: t.pop(NAMES[0]),
    "an unknown layer": lambda t: t.update({"model.layers.9.mlp.up_proj.lora_up": t[NAMES[1]],
                                            "model.layers.9.mlp.up_proj.lora_down": t[NAMES[0]]}),
    "another kind of tensor": lambda t: t.update({"model.norm.weight": np.ones(24, np.float32)}),
    "another rank": lambda t: t.update({NAMES[0]: np.ones((RANK + 1, 24), np.float32)}),
    "another width": lambda t: t.update({NAMES[0]: np.ones((RANK, 25), np.float32)}),
    "another height": lambda t: t.update({NAMES[1]: np.ones((47, RANK), np.float32)}),
    "a vector": lambda t: t.update({NAMES[1]: np.ones(48, np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_unfit_tensors_change_nothing(adapted: Llama, kind: str) -> None:
    plain = Llama(LlamaConfig.tiny())
    before, tensors = values_of(plain), lora_tensors(adapted)
    UNFIT[kind](tensors)
    with pytest.raises(WeightsError, match="LoRA weights"):
        merge_lora(plain, dict(reversed(tensors.items())))  # the unfit one comes last
    for name, value in values_of(plain).items():
        np.testing.assert_array_equal(value, before[name])
