"""Hugging Face folders: single and sharded, every kind of float, and what can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from model.sources.huggingface import hf_folder, read_hf, read_safetensors
from seed_story.errors import ConfigError, DownloadError, WeightsError

VALUES = torch.arange(12, dtype=torch.float32).reshape(3, 4) / 7 - 0.8


def folder_with(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors, folder / "model.safetensors")
    return folder


def shard(folder: Path) -> Path:
    folder_with(folder, ignored=VALUES)
    (folder / "model.safetensors").unlink()
    save_file({"a": VALUES, "b": VALUES + 1}, folder / "model-00001-of-00002.safetensors")
    save_file({"c": VALUES + 2}, folder / "model-00002-of-00002.safetensors")
    places = {"a": "model-00001-of-00002.safetensors", "b": "model-00001-of-00002.safetensors",
              "c": "model-00002-of-00002.safetensors"}  # fmt: skip
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_float_becomes_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    config, read = read_hf(folder_with(tmp_path, a=VALUES.to(dtype), b=torch.ones((), dtype=dtype)))
    assert config == {"model_type": "llama"}
    assert set(read) == {"a", "b"}
    assert read["a"].dtype == np.float32
    assert read.shape("a") == (3, 4)
    assert read["b"].shape == ()
    np.testing.assert_array_equal(read["a"], VALUES.to(dtype).float().numpy())


def test_shards(tmp_path: Path) -> None:
    _, read = read_hf(shard(tmp_path))
    assert sorted(read) == ["a", "b", "c"]
    np.testing.assert_array_equal(read["c"], (VALUES + 2).numpy())
    np.testing.assert_array_equal(read["b"], (VALUES + 1).numpy())


def test_a_shard_is_missing_or_wrong(tmp_path: Path) -> None:
    second = shard(tmp_path) / "model-00002-of-00002.safetensors"
    save_file({"other": VALUES}, second)
    with pytest.raises(WeightsError, match=r"aren't in the shards.*'c'"):
        read_hf(tmp_path)
    save_file({"c": VALUES, "extra": VALUES.clone()}, second)
    with pytest.raises(WeightsError, match=r"doesn't name.*'extra'"):
        read_hf(tmp_path)
    second.unlink()
    with pytest.raises(WeightsError, match="no file"):
        read_hf(tmp_path)


def test_an_index_may_not_leave_its_folder(tmp_path: Path) -> None:
    (shard(tmp_path) / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(WeightsError, match="outside"):
        read_hf(tmp_path)


def test_whole_numbers_are_not_weights(tmp_path: Path) -> None:
    _, read = read_hf(folder_with(tmp_path, a=torch.ones(2, dtype=torch.int64)))
    with pytest.raises(WeightsError, match="I64"):
        read["a"]


@pytest.mark.parametrize("keep", [0, 4, 8, 30, -1])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    path = folder_with(tmp_path, a=VALUES) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="isn't a whole safetensors file"):
        read_hf(tmp_path)


def test_a_file_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"PK\3\4" * 100)
    with pytest.raises(WeightsError, match="isn't a whole safetensors file"):
        read_safetensors(tmp_path / "a.safetensors")


def test_folders_without_the_parts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json"):
        read_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="expected an object"):
        read_hf(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match="no safetensors"):
        read_hf(tmp_path)


@pytest.mark.parametrize("name", ["owner/no-such-model", "not a valid id!", "./missing/folder"])
def test_without_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DownloadError, match="local folder"):
        hf_folder(name)
