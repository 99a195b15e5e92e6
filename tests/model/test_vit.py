from __future__ import annotations

from dataclasses import replace

import keras
import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from model import vit
from model.layers import LayerNorm, LayerScale, Linear, named_variables
from model.vit import VisionTransformer, bicubic_matrix
from model.weights import load_weights
from seed_story.config import VisionConfig
from seed_story.errors import ConfigError
from tests.compare import assert_close

SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


def pixels(size: int, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).random((batch, size, size, 3), np.float32)


def torch_pixels(config: VisionConfig, images: np.ndarray) -> torch.Tensor:
    normalised = (images - np.float32(config.image_mean)) / np.float32(config.image_std)
    return torch.from_numpy(normalised.transpose(0, 3, 1, 2).copy())


def dinov2(scatter, published, trained: int = 70, **changes):
    """A random Dinov2Model stored for `trained` pixels, and the same network here for 56 pixels."""
    model = scatter(Dinov2Model(Dinov2Config(**SMALL, image_size=trained, mlp_ratio=2)))
    tensors, config = published(model)
    network = VisionTransformer(replace(VisionConfig.from_hf(config, image_size=56), **changes))
    load_weights(network, tensors, ignore=vit.IGNORED)
    return model, network


@pytest.mark.parametrize("trained", [56, 70, 42], ids=["same grid", "shrunk grid", "grown grid"])
def test_dinov2_equals_transformers(scatter, published, trained: int) -> None:
    model, network = dinov2(scatter, published, trained)
    images = pixels(56)
    expected = model(torch_pixels(network.config, images)).last_hidden_state
    assert network(images).shape == (2, network.config.tokens, 24)
    assert_close(network(images), expected, "network")


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_features_are_the_output_of_block_number_feature_layer(scatter, published, layer: int) -> None:
    model, network = dinov2(scatter, published, feature_layer=layer, final_norm=False)
    images = pixels(56)
    states = model(torch_pixels(network.config, images), output_hidden_states=True).hidden_states
    assert_close(network(images), states[layer], "network")  # [0] is the embedding


def test_final_norm_applies_to_any_block(scatter, published) -> None:
    model, network = dinov2(scatter, published, feature_layer=2, final_norm=True)
    images = pixels(56)
    states = model(torch_pixels(network.config, images), output_hidden_states=True).hidden_states
    assert_close(network(images), model.layernorm(states[2]), "network")


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("split", [0, 1, 2])
def test_hidden_and_features_are_the_two_parts_of_a_call(scatter, published, split: int, final_norm: bool) -> None:
    model, network = dinov2(scatter, published, feature_layer=2, final_norm=final_norm)  # of 3 blocks
    images = pixels(56)
    hidden = network.hidden(images, split)
    states = model(torch_pixels(network.config, images), output_hidden_states=True).hidden_states
    assert_close(hidden, states[split], "network")
    assert_close(network.features(hidden, split), network(images), "same_maths")


@pytest.mark.parametrize("size", [32, 48])
def test_plain_vit_equals_transformers(scatter, published, size: int) -> None:
    settings = ViTConfig(**SMALL, image_size=32, patch_size=8, intermediate_size=40)
    model = scatter(ViTModel(settings))
    tensors, config = published(model)
    network = VisionTransformer(VisionConfig.from_hf(config, image_size=size))
    load_weights(network, tensors, ignore=vit.IGNORED)
    images = pixels(size)
    theirs = model(torch_pixels(network.config, images), interpolate_pos_encoding=True).last_hidden_state
    assert_close(network(images), theirs, "network")


def test_names_are_exactly_those_of_the_published_files(scatter, published) -> None:
    for model, extra in (
        (Dinov2Model(Dinov2Config(**SMALL, image_size=42)), {"embeddings.mask_token"}),
        (ViTModel(ViTConfig(**SMALL, image_size=32)), {"pooler.dense.weight", "pooler.dense.bias"}),
    ):
        tensors, config = published(model)
        network = VisionTransformer(VisionConfig.from_hf(config), seed=None)
        assert set(tensors) - set(named_variables(network)) == extra
        assert set(named_variables(network)) <= set(tensors)


@pytest.mark.parametrize(("stored", "wanted"), [(37, 16), (37, 37), (3, 2), (5, 11), (1, 4), (14, 16)])
def test_bicubic_matrix_is_torch_interpolate(stored: int, wanted: int) -> None:
    grid = np.random.default_rng(0).standard_normal((stored, stored)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(grid)[None, None], size=(wanted, wanted), mode="bicubic", align_corners=False
    )
    matrix = bicubic_matrix(stored, wanted)
    assert_close(matrix @ grid @ matrix.T, theirs[0, 0], "resize")


def test_layers_equal_torch() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 24)).astype(np.float32) * 3
    linear, theirs = Linear(24, 7, np.random.default_rng(0)), torch.nn.Linear(24, 7)
    load_weights(linear, {name: value.detach().numpy() for name, value in theirs.named_parameters()})
    assert_close(linear(x), theirs(torch.from_numpy(x)), "layer")

    norm, theirs = LayerNorm(24, 1e-3), torch.nn.LayerNorm(24, eps=1e-3)
    torch.nn.init.normal_(theirs.weight), torch.nn.init.normal_(theirs.bias)
    load_weights(norm, {name: value.detach().numpy() for name, value in theirs.named_parameters()})
    assert_close(norm(x), theirs(torch.from_numpy(x)), "layer")
    assert_close(norm(x * 1e-3), theirs(torch.from_numpy(x * 1e-3)), "layer")  # where the epsilon counts

    assert_close(LayerScale(24, 0.25)(x), x * 0.25, "exact")


@pytest.mark.parametrize("kind", ["dinov2", "vit"])
def test_a_block_equals_transformers(scatter, published, kind: str) -> None:
    if kind == "dinov2":
        model = scatter(Dinov2Model(Dinov2Config(**SMALL, image_size=42)))
        theirs = model.encoder.layer[1]
    else:
        model = scatter(ViTModel(ViTConfig(**SMALL, image_size=32, intermediate_size=40)))
        theirs = model.layers[1]
    tensors, config = published(model)
    network = VisionTransformer(VisionConfig.from_hf(config))
    load_weights(network, tensors, ignore=vit.IGNORED)
    x = np.random.default_rng(0).standard_normal((2, 5, 24)).astype(np.float32)
    assert_close(network.encoder.layer[1](x), theirs(torch.from_numpy(x)), "network")


def trainable_blocks(network: VisionTransformer) -> list[int]:
    blocks = network.encoder.layer
    owned = {id(v) for block in blocks for v in block.weights}
    assert all(id(v) in owned for v in network.trainable_weights), "something beside the blocks is trainable"
    everything = {id(v) for v in network.trainable_weights}
    return [i for i, block in enumerate(blocks) if all(id(v) in everything for v in block.weights)]


def test_only_the_last_computed_blocks_are_trainable() -> None:
    network = VisionTransformer(VisionConfig.tiny())  # 3 blocks, 2 computed, 1 trainable
    assert trainable_blocks(network) == [1]
    for n, expected in ((2, [0, 1]), (0, []), (1, [1])):
        network.set_trainable_blocks(n)
        assert trainable_blocks(network) == expected
    assert len(network.trainable_weights) == len(network.encoder.layer[1].weights)
    with pytest.raises(ConfigError, match="got 3; expected 0 to 2"):
        network.set_trainable_blocks(3)


def test_seeds_repeat_and_differ() -> None:
    images = pixels(28)
    first, again, other = (VisionTransformer(VisionConfig.tiny(), seed)(images) for seed in (0, 0, 1))
    assert_close(first, again, "exact")
    assert float(keras.ops.max(keras.ops.abs(first - other))) > 1e-3
