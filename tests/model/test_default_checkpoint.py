"""The checkpoint in this repository: small enough, complete, and of the preset that it is for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from export.decoder_weights import weight_shapes
from export.learned_rotation import ROTATION_FILE, read_rotation
from export.learned_scales import file_name, read_scales
from export.rounding import gptq_grids
from model.layers import named_variables
from model.presets import SEED_STORY_135M as PRESET
from model.rotation import rotation_matrix
from model.story_source import CHECKPOINTS, LORA_FILE, PRETRAINED, QFORMER_FILE, VISION_FILE, read_qformer
from model.vit import VisionTransformer
from model.weights import read_safetensors
from quantization.recipe import load_recipe

FOLDER = CHECKPOINTS / PRESET.name
LIMIT_MB = 44


def test_it_is_small_enough() -> None:
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.safetensors")) <= LIMIT_MB * 1e6


def test_it_says_its_licence_and_what_it_was_learned_from() -> None:
    assert (FOLDER / "LICENSE").read_text(encoding="utf-8").splitlines()[0] == "Apache-2.0"
    about = json.loads((FOLDER / "training.json").read_text(encoding="utf-8"))
    assert about["model"] == PRESET.name and all(stage["finished"] for stage in about["stages"].values())
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(file.name in card for file in FOLDER.rglob("*.safetensors"))


@pytest.mark.parametrize("folder", [FOLDER, FOLDER / PRETRAINED], ids=["trained", "pretrained"])
def test_what_exports_learned_fits_the_decoder(folder: Path) -> None:
    llama, recipe = PRESET.story.llama, load_recipe("int4")
    assert recipe.scales is not None
    turn = read_rotation(folder / ROTATION_FILE, llama.hidden_size)
    assert np.abs(turn - rotation_matrix(llama.hidden_size)).max() > 0.1  # not the fixed one
    shapes = weight_shapes(llama, rotated=True)
    changes = read_scales(folder / file_name(recipe.scales), gptq_grids(llama, recipe), shapes)
    assert len(changes) == 4 * llama.num_layers and all(np.abs(change).max() > 0.01 for change in changes.values())


def test_the_qformer_loads_with_its_memory() -> None:
    network = read_qformer(PRESET.story.qformer, FOLDER / QFORMER_FILE)
    assert network.memory is not None and network.config.memory_names > 300
    assert all(np.isfinite(np.asarray(variable)).all() for variable in network.trainable_variables)


def test_the_blocks_are_the_eyes_last() -> None:
    names = {name: v.shape for name, v in named_variables(VisionTransformer(PRESET.story.vision, seed=None)).items()}
    found = read_safetensors(FOLDER / VISION_FILE)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: shape for name, shape in names.items() if re.match(r"encoder\.layer\.(7|8|9|10)\.", name)
    }


def test_lora_changes_every_linear_layer_of_the_decoders_blocks() -> None:
    found = read_safetensors(FOLDER / LORA_FILE)
    layers = {name.rpartition(".")[0] for name in found}
    linears = (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))
    assert layers == {f"model.layers.{n}.{linear}" for n in range(PRESET.story.llama.num_layers) for linear in linears}
    assert all(np.abs(tensor).max() > 0 for tensor in found.values())
