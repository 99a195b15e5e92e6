"""How a learned rotation is kept, and that a checkpoint's own is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from export.learned_rotation import ROTATION_FILE, read_rotation, rotation_of, write_rotation
from model.rotation import rotation_matrix
from model.story_source import load_source
from quantization.recipe import load_recipe
from seed_story.errors import WeightsError
from tests.export.tiny_decoders import random_rotation


def test_it_is_orthogonal_after_it_was_kept(tmp_path: Path) -> None:
    turn, file = random_rotation(48), tmp_path / ROTATION_FILE
    write_rotation(turn, file)
    found = read_rotation(file, 48)
    np.testing.assert_allclose(found @ found.T, np.eye(48), atol=1e-14)
    np.testing.assert_allclose(found, turn, atol=1e-6)


def test_the_checkpoints_own_is_taken(tmp_path: Path) -> None:
    source, recipe = replace(load_source("tiny"), learned=tmp_path), load_recipe("int8")
    size = source.model.config.llama.hidden_size
    np.testing.assert_array_equal(rotation_of(source, recipe), rotation_matrix(size))
    write_rotation(random_rotation(size), tmp_path / ROTATION_FILE)
    np.testing.assert_allclose(rotation_of(source, recipe), random_rotation(size), atol=1e-6)
    np.testing.assert_array_equal(rotation_of(replace(source, learned=None), recipe), rotation_matrix(size))
    assert rotation_of(source, replace(recipe, rotated=False)) is None
    other = tmp_path / "other.safetensors"
    write_rotation(random_rotation(size).T, other)
    np.testing.assert_allclose(rotation_of(replace(source, rotation=other), recipe), random_rotation(size).T, atol=1e-6)
    with pytest.raises(WeightsError, match=r"nowhere\.safetensors"):
        rotation_of(replace(source, rotation=tmp_path / "nowhere.safetensors"), recipe)


@pytest.mark.parametrize(
    ("name", "matrix", "words"),
    [
        ("rotation", np.eye(47), "isn't of this model"),
        ("other", np.eye(48), "isn't of this model"),
        ("rotation", 1.01 * np.eye(48), "is no rotation"),
        ("rotation", np.full((48, 48), np.nan), "is no rotation"),
    ],
)
def test_what_is_no_rotation_is_refused(tmp_path: Path, name: str, matrix: np.ndarray, words: str) -> None:
    file = tmp_path / ROTATION_FILE
    save_file({name: matrix.astype(np.float32)}, file)
    with pytest.raises(WeightsError, match=words):
        read_rotation(file, 48)
