"""Which of a decoder's matrices a recipe rounds by GPTQ."""

from __future__ import annotations

from dataclasses import replace

import pytest

from export.rounding import gptq_grids
from quantization.recipe import load_recipe
from seed_story.config import LlamaConfig


@pytest.mark.parametrize(("tied", "head"), [(True, "embed_tokens"), (False, "lm_head")])
def test_the_head_is_rounded_whatever_its_name(tied: bool, head: str) -> None:
    """A table that is no head is only looked up, and no concern of GPTQ."""
    llama = replace(LlamaConfig.tiny(), tie_word_embeddings=tied)
    layers = {f"layers_{i}_{kind}" for i in range(llama.num_layers) for kind in ("qkv", "o", "gate_up", "down")}
    assert set(gptq_grids(llama, load_recipe("int8"))) == {*layers, head}
