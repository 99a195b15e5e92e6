"""Which of a decoder's matrices a recipe rounds by GPTQ, and by what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.decoder_graph import write_skeleton
from export.hessians import FIRST, story_rows
from export.rounding import Reading, gptq_grids, rounded_weights
from model.story_source import load_source
from quantization.calibration import STORIES, calibration_stories
from quantization.recipe import CALIBRATION, Recipe, load_recipe
from quantization.surgery import OpenGraph
from seed_story.config import CacheConfig, LlamaConfig
from seed_story.contract import DECODE, Steps
from seed_story.errors import PictureError
from seed_story.image import load_and_preprocess_image
from tests.compare import assert_close
from training.data import StoryEncoder


@pytest.mark.parametrize(("tied", "head"), [(True, "embed_tokens"), (False, "lm_head")])
def test_the_head_is_rounded_whatever_its_name(tied: bool, head: str) -> None:
    """A table that is no head is only looked up, and no concern of GPTQ."""
    llama = replace(LlamaConfig.tiny(), tie_word_embeddings=tied)
    layers = {f"layers_{i}_{kind}" for i in range(llama.num_layers) for kind in ("qkv", "o", "gate_up", "down")}
    assert set(gptq_grids(llama, load_recipe("int8"))) == {*layers, head}


@pytest.mark.parametrize("trained", [False, True])
def test_an_untrained_eye_is_not_calibrated_with(trained: bool) -> None:
    """What a decoder is given: each story with its pictures, or text alone, of which every other begins unasked."""
    source = replace(load_source("tiny"), qformer_trained=trained)
    queries, folder = source.model.config.qformer.num_queries, CALIBRATION
    encoder = StoryEncoder(source.tokenizer, source.prompt, queries)
    text = source.model.llama.embed
    for number, (rows, story) in enumerate(zip(story_rows(source, folder), calibration_stories(folder), strict=False)):
        example = encoder.encode(story, "all" if trained else "none", ends=False)
        ids, captions = example.ids, " ".join(page.caption for page in story.pages)
        if trained:
            looked = [source.model.qformer(source.model.vision(load_and_preprocess_image(picture, 28)))[0]
                      for picture in example.pictures]  # fmt: skip
            assert_close(rows[ids < 0], np.concatenate(looked), "same_maths")
        elif number % 2 == 0:
            ids = np.array(encoder.tokenizer.encode(captions), np.int32)
        np.testing.assert_array_equal(rows[ids >= 0], text(ids[None, ids >= 0])[0])
        if number == 3:
            return


def test_pictures_that_are_not_shown_need_not_be_there(tmp_path: Path) -> None:
    shutil.copy(CALIBRATION / STORIES, tmp_path)
    source = load_source("tiny")
    assert len(next(story_rows(source, tmp_path)))
    with pytest.raises(PictureError, match="pictures are missing"):
        next(story_rows(replace(source, qformer_trained=True), tmp_path))


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reading]:
    """The tiny decoder, by recipes with and without GPTQ and turned or not, about to read the calibration stories."""
    source, cache, sizes = load_source("tiny"), CacheConfig(), [16]

    def opened(recipe: Recipe) -> Reading:
        work = tmp_path_factory.mktemp("work")
        skeleton = write_skeleton(
            source.model.config.llama, cache.slots, Steps(tuple(sizes), ()), work / "x", rotated=recipe.rotated
        )
        return Reading(source, recipe, skeleton, cache, 16, CALIBRATION, work)

    return opened


def test_a_decoder_is_calibrated_with_the_models_rows(read: Callable[..., Reading]) -> None:
    """The Keras model's, of the calibration stories, normed: in the turned channels, if the recipe turns them.

    The token that every story begins with counts for many.
    """
    int8 = load_recipe("int8")
    plain, turned = (read(replace(int8, rotated=rotated)) for rotated in (False, True))
    source = plain.source
    stories = [rows.astype(np.float64) for rows in story_rows(source, CALIBRATION)]
    for rows in stories:
        rows /= np.sqrt(np.square(rows).mean(1, keepdims=True) + plain.llama.rms_norm_eps)
    rows = np.concatenate([*stories, *[story[:1] for story in stories] * (FIRST - 1)])
    expected = rows.T @ rows
    limit = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(plain.take_hessian("layers_0_qkv"), expected, atol=limit)
    # What a balanced matrix is given is any change of coordinates of it, which its weights undo.
    reads = [one.exact("layers_0_qkv").astype(np.float64) for one in (plain, turned)]
    given = reads[1] @ turned.take_hessian("layers_0_qkv") @ reads[1].T
    kept = len(given) - plain.llama.num_kv_heads * plain.llama.head_dim  # values are in coordinates of their own
    expected = (reads[0] @ expected @ reads[0].T)[:kept, :kept]
    np.testing.assert_allclose(given[:kept, :kept], expected, atol=1e-4 * np.abs(expected).max())


def test_what_is_taken_leaves_no_file(read: Callable[..., Reading]) -> None:
    """An export has room for its weights, not for these and all the moments."""
    reading = read(load_recipe("int8"))
    make = rounded_weights(reading, lambda _: None)
    made = {name: make(name) for name in reading.shapes}
    assert not list(reading.work.glob("*.npy"))
    assert np.unique(made["layers_0_qkv"][0]).size < np.unique(reading.exact("layers_0_qkv")[0]).size


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
