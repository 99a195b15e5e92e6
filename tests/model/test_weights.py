from __future__ import annotations

import stat
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest

from model import weights
from model.layers import named_variables, numpy_of
from model.llama import Llama
from model.qformer import QFormer
from model.weights import load_safetensors, load_weights, save_safetensors, without_prefix
from seed_story.config import LlamaConfig, QFormerConfig
from seed_story.errors import WeightsError
from tests.compare import assert_close

LAST = "model.norm.weight"


@pytest.fixture
def network() -> Llama:
    return Llama(LlamaConfig.tiny())


def values(network: keras.Layer) -> dict[str, np.ndarray]:
    return {name: numpy_of(v) for name, v in named_variables(network).items()}


def other(network: keras.Layer) -> dict[str, np.ndarray]:
    return {name: value + 1 for name, value in values(network).items()}


def test_loads_what_fits(network: Llama) -> None:
    tensors = other(network)
    load_weights(network, tensors)
    for name, value in values(network).items():
        assert_close(value, tensors[name], "exact")


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_floats_become_float32(network: Llama, dtype: type) -> None:
    tensors = {name: value.astype(dtype) for name, value in other(network).items()}
    load_weights(network, tensors)
    assert_close(values(network)[LAST], tensors[LAST].astype(np.float32), "exact")


def damaged(network: Llama, kinds: set[str]) -> dict[str, np.ndarray]:
    tensors = other(network)
    if "missing" in kinds:
        del tensors[LAST]
    if "unused" in kinds:
        tensors["model.extra.weight"] = np.zeros(3, np.float32)
    if "mis-shaped" in kinds:
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].T
    if "not floating-point" in kinds:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.int8)
    return tensors


ALL = {"missing", "unused", "mis-shaped", "not floating-point"}


KINDS = [*({kind} for kind in sorted(ALL)), ALL]


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "+".join(sorted(kinds)))
def test_refuses_and_changes_nothing(network: Llama, kinds: set[str]) -> None:
    before = values(network)
    with pytest.raises(WeightsError) as raised:
        load_weights(network, damaged(network, kinds))
    message = str(raised.value)
    assert {kind for kind in ALL if f"1 {kind}: " in message} == kinds
    says = {
        "missing": "missing: model.norm.weight",
        "unused": "unused: model.extra.weight",
        "mis-shaped": "up_proj.weight is (24, 48), expected (48, 24)",
        "not floating-point": "embed_tokens.weight is int8",
    }
    assert all(says[kind] in message for kind in kinds)
    for name, value in values(network).items():
        assert_close(value, before[name], "exact")


def test_a_transposed_square_is_beyond_shapes_but_a_flat_one_is_not(network: Llama) -> None:
    tensors = other(network)
    tensors[LAST] = tensors[LAST][None]
    with pytest.raises(WeightsError, match=r"model.norm.weight is \(1, 24\), expected \(24,\)"):
        load_weights(network, tensors)


def test_names_the_first_ten(network: Llama) -> None:
    with pytest.raises(WeightsError) as raised:
        load_weights(network, {})
    total, message = len(named_variables(network)), str(raised.value)
    assert f"{total} missing: " in message
    assert f"and {total - 10} more" in message
    assert message.count("model.") == 10


def test_ignore_covers_unused_only(network: Llama) -> None:
    tensors = {**other(network), "model.layers.0.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    with pytest.raises(WeightsError, match="unused"):
        load_weights(network, tensors, ignore=("rotary*",))
    load_weights(network, tensors, ignore=("nothing", "*.rotary_emb.inv_freq"))
    del tensors[LAST]
    with pytest.raises(WeightsError, match=f"1 missing: {LAST}"):
        load_weights(network, tensors, ignore=("*",))


def test_without_prefix() -> None:
    a, b = np.zeros(1), np.ones(1)
    assert without_prefix({"vit.a": a, "classifier.b": b}, "vit.") == {"a": a}
    assert without_prefix({"a": a, "b": b}, "vit.") == {"a": a, "b": b}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "qformer.safetensors"
    saved, loaded = QFormer(QFormerConfig.tiny(), seed=1), QFormer(QFormerConfig.tiny(), seed=2)
    save_safetensors(saved, path)
    load_safetensors(loaded, str(path))
    expected = values(saved)
    for name, value in values(loaded).items():
        assert_close(value, expected[name], "exact")
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "qformer.safetensors"
    path.write_bytes(b"old")

    def fail(tensors: object, scratch: Path) -> None:
        scratch.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_safetensors(QFormer(QFormerConfig.tiny()), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_refuses_a_missing_or_damaged_file(tmp_path: Path) -> None:
    network, path = QFormer(QFormerConfig.tiny()), tmp_path / "qformer.safetensors"
    with pytest.raises(WeightsError, match="no such checkpoint"):
        load_safetensors(network, path)
    save_safetensors(network, path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(WeightsError, match="isn't a whole safetensors file"):
        load_safetensors(network, path)
    path.write_bytes(b"")
    with pytest.raises(WeightsError, match="isn't a whole safetensors file"):
        load_safetensors(network, path)
