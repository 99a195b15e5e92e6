"""Which of a decoder's matrices a recipe rounds by GPTQ, and by what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.rounding import gptq_grids, rounded_weights
from model.rotation import rotation_matrix
from model.story_source import load_source
from quantization.recipe import CALIBRATION, load_recipe
from seed_story.config import CacheConfig, LlamaConfig


@pytest.mark.parametrize(("tied", "head"), [(True, "embed_tokens"), (False, "lm_head")])
def test_the_head_is_rounded_whatever_its_name(tied: bool, head: str) -> None:
    """A table that is no head is only looked up, and no concern of GPTQ."""
    llama = replace(LlamaConfig.tiny(), tie_word_embeddings=tied)
    layers = {f"layers_{i}_{kind}" for i in range(llama.num_layers) for kind in ("qkv", "o", "gate_up", "down")}
    assert set(gptq_grids(llama, load_recipe("int8"))) == {*layers, head}


def test_a_rotated_decoder_is_calibrated_with_turned_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own rows of the calibration stories, in the channels that its graph reads."""
    given: list[list[np.ndarray]] = []

    def watched(*args: Any, **_: Any) -> Any:
        given.append([np.array(row) for row in args[6]])
        return iter(())

    monkeypatch.setattr("export.rounding.decoder_hessians", watched)
    source, int8 = load_source("tiny"), load_recipe("int8")
    for rotated in (False, True):
        recipe = replace(int8, rotated=rotated)
        rounded_weights(source, recipe, b"", CacheConfig(), 16, CALIBRATION, tick=lambda _: None, work=tmp_path)
    plain, turned = (np.concatenate(rows) for rows in given)
    np.testing.assert_allclose(turned, plain @ rotation_matrix(plain.shape[1]), atol=1e-5)
    assert np.abs(turned - plain).max() > 0.1 * np.abs(plain).max()
