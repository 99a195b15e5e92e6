"""The networks with the default model's pretrained weights, against `transformers` on torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from model.llama import Llama
from model.presets import SEED_STORY_135M
from model.sources.wheel import WheelFile
from model.vit import VisionTransformer
from model.weights import load_weights
from seed_story.tokenizer import StoryTokenizer
from tests.compare import assert_close

pytestmark = pytest.mark.weights
TEXT = "Once upon a time, at the edge of a quiet forest, there lived a small red fox called Pim, who was 7."


def cached(file: WheelFile | None) -> Path:
    assert file is not None
    if not file.path.is_file():
        pytest.skip(f"{file.path.name} isn't in the cache: run `make setup`")
    return file.path


def test_llama_equals_transformers() -> None:
    path = cached(SEED_STORY_135M.decoder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()
    ours = Llama(SEED_STORY_135M.story.llama, seed=None)
    load_weights(ours, SEED_STORY_135M.load_decoder())
    ids = np.array([StoryTokenizer(SEED_STORY_135M.load_tokenizer()).encode(TEXT)])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.float().numpy()
    assert_close(ours(ours.embed(ids)), expected, "pretrained_logits")


@pytest.mark.parametrize("layer", [11, 12])
def test_vit_equals_transformers(tmp_path: Path, layer: int) -> None:
    cached(SEED_STORY_135M.vision)
    config, tensors = SEED_STORY_135M.story.vision, SEED_STORY_135M.load_vision()
    save_file(dict(tensors), tmp_path / "model.safetensors")
    transformers.Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    ).save_pretrained(tmp_path)
    theirs = transformers.Dinov2Model.from_pretrained(tmp_path).eval()
    ours = VisionTransformer(config.from_dict({**config.to_dict(), "feature_layer": layer}), seed=None)
    load_weights(ours, tensors)
    pixels = np.random.default_rng(0).random((1, 224, 224, 3)).astype(np.float32)
    normal = (pixels - np.float32(config.image_mean)) / np.float32(config.image_std)
    with torch.no_grad():
        states = theirs(torch.from_numpy(normal.transpose(0, 3, 1, 2).copy()), output_hidden_states=True).hidden_states
    assert_close(ours(pixels), states[layer].numpy(), "pretrained_features")
