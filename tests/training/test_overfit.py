"""A handful of stories learned by heart, and told by the runtime out of an exported bundle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from export.export import ExportOptions, export_bundle
from model import presets
from model.presets import Preset, Tensors
from model.story_source import load_source
from quantization.recipe import load_recipe
from seed_story.config import CacheConfig, StoryConfig
from seed_story.contract import Steps
from seed_story.sampling import SamplingConfig
from seed_story.story import SEEDStory
from tests.training.storybooks import write_stories
from training import loop
from training.recipe import Recipe
from training.stages import train_model

BEGINNING = "See, "
STORIES = [
    [("hen", f"{BEGINNING}a hen sang."), ("bee", "A bee heard it.")],
    [("cat", f"{BEGINNING}cats!"), ("fox", "Two met a fox.")],
    [("pig", f"{BEGINNING}pigs in mud.")],
    [("owl", f"{BEGINNING}old owls.")],
]
STEPS = {"alignment": 150, "storytelling": 300}
BLIND = len(STORIES) * math.log(len(STORIES)) / sum(len(text) + 1 for pages in STORIES for _, text in pages)
"""What a token costs at least, in nat, if the stories are known but not which one the picture asks for."""
QFORMER = {"num_queries": 8, "hidden_size": 32, "llm_size": 64, "dropout": 0.0, "layer_scale_init": 1.0}
LLAMA = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "head_dim": 16, "max_position": 192}


class Ready(Preset):
    """Its random decoder is as loud as one that was trained before: attention can tell tokens apart."""

    def load_decoder(self) -> Tensors:
        return {name: value * (1 if "norm" in name else 5) for name, value in super().load_decoder().items()}


@pytest.fixture(scope="module")
def small() -> Iterator[str]:
    """A preset with somewhat more room than the tiny one, under which no story of bytes could be learned quickly."""
    tiny = StoryConfig.tiny()
    llama = replace(tiny.llama, tie_word_embeddings=True, **LLAMA)
    story = replace(tiny, llama=llama, qformer=replace(tiny.qformer, **QFORMER))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "small", Ready("small", "for this test", story))  # type: ignore[arg-type]
        yield "small"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("data") / "book", STORIES)


@pytest.fixture(scope="module")
def checkpoint(small: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("overfit")
    recipe = Recipe(decoder="full", vision_blocks=0, align_rate=3e-3, story_rate=4e-3, rows=4, length=128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "steps_for_minutes", lambda task, *_: STEPS[task.name.split(",")[0]])
        assert train_model(small, data, out, recipe)
    return out / "checkpoint"


@pytest.fixture(scope="module")
def bundle(small: str, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def export(name: str) -> Path:
        recipe = load_recipe(name)
        # The gate reads a text that this decoder has never seen a byte of; it is measured here, not judged.
        loose = {"decoder_mean_kl_nat": 100.0, "decoder_top1": 0.0}
        source = load_source(small, checkpoint=checkpoint)
        options = ExportOptions(CacheConfig(slots=192, sinks=4), Steps((16, 64), (64,)))
        out = tmp_path_factory.mktemp("bundles") / name
        return export_bundle(source, replace(recipe, bounds={**recipe.bounds, **loose}), out, options).path

    return export


def test_the_loss_falls_to_nearly_nothing(checkpoint: Path) -> None:
    about = json.loads((checkpoint / "training.json").read_text())
    assert about["stages"]["story"]["losses"]["next_token"] < 0.01 < BLIND / 4


@pytest.mark.parametrize("recipe", ["float32", "int8"])
def test_runtime_tells_the_story_of_the_picture(bundle: Callable[[str], Path], data: Path, recipe: str) -> None:
    """They all begin with the same words: only the picture says which one it is."""
    with SEEDStory(bundle(recipe), threads=1) as model:
        for number, pages in enumerate(STORIES):
            story = model.begin(sampling=SamplingConfig.greedy())
            story.add_picture(data / f"{number}_0.png").add_text(BEGINNING)
            told = "".join(story.tell(max_tokens=100))
            assert BEGINNING + told == " ".join(caption for _, caption in pages)
            assert story.finished
