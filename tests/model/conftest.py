from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

Published = Callable[[torch.nn.Module], tuple[dict[str, np.ndarray], dict[str, Any]]]


@pytest.fixture
def published(tmp_path: Path) -> Published:
    """The tensors and the configuration of a transformers model as its published files hold them."""

    def publish(model: torch.nn.Module) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        model.save_pretrained(tmp_path)  # type: ignore[operator]
        config = json.loads((tmp_path / "config.json").read_text())
        return load_file(tmp_path / "model.safetensors"), config

    return publish


@pytest.fixture
def scatter() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Gives every weight of a torch model a random value, so that no bias is 0 and no gain is 1."""

    def scattered(model: torch.nn.Module, std: float = 0.2) -> torch.nn.Module:
        random = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=random) * std
                weight.copy_(noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
        return model.eval()

    return scattered
