"""The loud model, quantized, and data to measure it on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.held_out import storybook


@pytest.fixture(scope="session")
def loud_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `loud_bundle` in int8, forced past a bound that no int8 keeps."""
    from export.export import ExportOptions, export_bundle
    from quantization.recipe import load_recipe
    from seed_story.config import CacheConfig
    from tests.loud import loud_source

    options = ExportOptions(CacheConfig(slots=32, sinks=2), prefill_sizes=(4, 8), force=True)
    recipe = load_recipe("int8")
    recipe = replace(recipe, bounds={**recipe.bounds, "decoder_mean_kl_nat": 1e-9})
    out = tmp_path_factory.mktemp("bundles") / "loud-int8"
    return export_bundle(loud_source(), recipe, out, options).path


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return storybook(tmp_path_factory.mktemp("data"), stories=4, pages=3)
