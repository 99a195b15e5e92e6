"""Which of a decoder's matrices a recipe rounds by GPTQ, and by what."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.rounding import Reading, gptq_grids
from model.rotation import rotation_matrix
from model.story_source import load_source
from quantization.recipe import CALIBRATION, load_recipe
from quantization.surgery import OpenGraph
from seed_story.config import CacheConfig, LlamaConfig
from seed_story.contract import DECODE


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
        given.append(args[6])
        return iter(())

    monkeypatch.setattr("export.rounding.decoder_hessians", watched)
    source, int8 = load_source("tiny"), load_recipe("int8")
    for rotated in (False, True):
        recipe = replace(int8, rotated=rotated)
        Reading(source, recipe, b"", CacheConfig(), 16, CALIBRATION, tmp_path).moments(np.zeros)
    plain, turned = (np.concatenate(rows) for rows in given)
    np.testing.assert_allclose(turned, plain @ rotation_matrix(plain.shape[1]), atol=1e-5)
    assert np.abs(turned - plain).max() > 0.1 * np.abs(plain).max()


def test_a_rotated_decoder_is_balanced_by_what_it_reads(export_tiny: Callable[[str], Path]) -> None:
    """Its own stories', not the neutral one that it is read with first; and the float function stays the same."""
    bundle = export_tiny("float32-rotated")
    graph = OpenGraph(bundle / "decoder.tflite", DECODE)
    narrowing = next(graph.constant(one.w) for one in graph.matrices() if one.name == "narrowing")
    assert narrowing is not None
    size = LlamaConfig.tiny().hidden_size
    assert np.linalg.norm(narrowing[:size], axis=0).max() > 0.2
    np.testing.assert_allclose((1 - np.linalg.norm(narrowing[:size], axis=0)) ** 2
                               + np.square(np.diag(narrowing[size:])), 1, atol=1e-5)  # fmt: skip
    assert json.loads((bundle / "manifest.json").read_text())["parity"]["decoder_mean_kl_nat"] < 1e-6
