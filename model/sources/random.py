"""Random weights under the names of `transformers`, for tests: the path of a real checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from model.sources.gguf import llama_shapes
from model.sources.onnx import dinov2_shapes
from seed_story.config import LlamaConfig, VisionConfig

_DEVIATION = 0.02  # transformers' `initializer_range`


def random_llama(config: LlamaConfig, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """float32 tensors of a `LlamaForCausalLM`; the same for the same seed. Shapes as in `llama_shapes`."""
    return _draw(llama_shapes(config), seed)


def random_dinov2(config: VisionConfig, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """float32 tensors of a `Dinov2Model`; the same for the same seed. Shapes as in `dinov2_shapes`."""
    return _draw(dinov2_shapes(config), seed)


def _draw(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, npt.NDArray[np.float32]]:
    """Gains (norms, Layer Scale) near one, so that a swapped pair shows; everything else near zero."""
    random = np.random.default_rng(seed)
    arrays = {}
    for name, shape in shapes.items():
        gain = ("norm" in name and name.endswith("weight")) or "lambda" in name
        arrays[name] = (random.normal(0.0, _DEVIATION, shape) + gain).astype(np.float32)
    return arrays
