"""What several folders of tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

# A shell starts its background jobs with Ctrl-C ignored, and their children inherit that: here it always works.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def export_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Exports the tiny preset (random weights, a tokenizer of bytes) with a recipe; once for each recipe."""
    made: dict[str, Path] = {}

    def export(recipe: str) -> Path:
        if recipe not in made:
            from export.export import ExportOptions, export_bundle
            from model.story_source import load_source
            from quantization.recipe import load_recipe
            from seed_story.config import CacheConfig
            from seed_story.contract import Steps

            options = ExportOptions(CacheConfig(slots=32, sinks=2), Steps((4, 8), (8,)))
            out = tmp_path_factory.mktemp("bundles") / recipe
            made[recipe] = export_bundle(load_source("tiny"), load_recipe(recipe), out, options).path
        return made[recipe]

    return export


@pytest.fixture(scope="session")
def tiny_bundle(export_tiny: Callable[[str], Path]) -> Path:
    """A tiny float32 bundle; don't change it, copy it."""
    return export_tiny("float32")


@pytest.fixture(scope="session")
def loud_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 bundle of `tests.loud`, with 32 slots; don't change it, copy it."""
    from export.export import ExportOptions, export_bundle
    from quantization.recipe import load_recipe
    from seed_story.config import CacheConfig
    from seed_story.contract import Steps
    from tests.loud import loud_source

    options = ExportOptions(CacheConfig(slots=32, sinks=2), Steps((4, 8), (8,)))
    out = tmp_path_factory.mktemp("bundles") / "loud"
    return export_bundle(loud_source(), load_recipe("float32"), out, options).path


@pytest.fixture(scope="session")
def loud_int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of `loud_bundle` in plain int8 (the same matrices), forced past a bound that no int8 keeps."""
    from export.export import ExportOptions, export_bundle
    from seed_story.config import CacheConfig
    from seed_story.contract import Steps
    from tests.loud import int8_of_min_max, loud_source

    options = ExportOptions(CacheConfig(slots=32, sinks=2), Steps((4, 8), (8,)), force=True)
    recipe = int8_of_min_max()
    recipe = replace(recipe, rotated=False, bounds={**recipe.bounds, "decoder_mean_kl_nat": 1e-9})
    out = tmp_path_factory.mktemp("bundles") / "loud-int8"
    return export_bundle(loud_source(), recipe, out, options).path


@pytest.fixture(scope="session")
def loud_int8_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float32 graphs of `loud_bundle` with an int8 cache, whose policy keeps two pictures."""
    from export.export import ExportOptions, export_bundle
    from quantization.recipe import load_recipe
    from seed_story.config import CacheConfig
    from seed_story.contract import Steps
    from tests.loud import loud_source

    options = ExportOptions(CacheConfig(32, 2, 6, 1, 2), Steps((4, 8), (8,)), force=True)
    out = tmp_path_factory.mktemp("bundles") / "loud-int8-cache"
    return export_bundle(loud_source(), replace(load_recipe("float32"), cache="int8"), out, options).path


@pytest.fixture(scope="session")
def verifying_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The bundle of `loud_bundle` or `loud_int8` with `verify_4`, and a policy that keeps pictures; each once."""
    made: dict[str, Path] = {}

    def export(kind: str) -> Path:
        if kind not in made:
            from export.export import ExportOptions, export_bundle
            from quantization.recipe import load_recipe
            from seed_story.config import CacheConfig
            from seed_story.contract import Steps
            from tests.loud import int8_of_min_max, loud_source

            recipe = load_recipe("float32") if kind == "float32" else int8_of_min_max()
            options = ExportOptions(CacheConfig(32, 2, 6, 1, 2), Steps((4, 8), (8,), verify=4), force=True)
            out = tmp_path_factory.mktemp("bundles") / f"verifying-{kind}"
            made[kind] = export_bundle(loud_source(), recipe, out, options).path
        return made[kind]

    return export


@pytest.fixture(scope="session")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four held-out stories and some pictures."""
    from tests.training.held_out import storybook

    return storybook(tmp_path_factory.mktemp("data"), stories=4, pages=3)
