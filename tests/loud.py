"""A tiny story model whose parts all matter: sharp attention, and pictures that change the story.

The tiny preset's weights are as small as a fresh network's: its logits are nearly those of the last token alone, and
no mistake of a cache, a rotation or a picture would show in its stories.
"""

from __future__ import annotations

from dataclasses import replace

from model.layers import named_variables, numpy_of
from model.qformer import QFormer
from model.story_source import StorySource, load_source
from quantization.gptq import without_gptq
from quantization.recipe import Recipe, load_recipe
from tests.export.tiny_decoders import loud_llama


def loud_source() -> StorySource:
    """The tiny preset, loud, whose stories never end; a new one each time, so that a test may change its weights."""
    source = load_source("tiny")
    model = source.model
    weights = loud_llama(model.config.llama, seed=11)
    for name, variable in named_variables(model.llama).items():
        louder = 3 if "v_proj" in name or "o_proj" in name else 1
        variable.assign(weights[name] * louder)
    model.qformer = QFormer(replace(model.config.qformer, layer_scale_init=1.0), seed=5)
    for variable in named_variables(model.qformer).values():
        values = numpy_of(variable)
        if values.ndim > 1:
            variable.assign(values * 12)
    for name, variable in named_variables(model.vision).items():
        if name.endswith("weight") and len(variable.shape) > 1:
            variable.assign(numpy_of(variable) * 12)
    return replace(source, prompt=replace(source.prompt, end_tokens=()))


def int8_of_min_max() -> Recipe:
    """The recipe `int8` without GPTQ: every code follows from its weight and the row's largest alone."""
    recipe = load_recipe("int8")
    return replace(recipe, graphs={**recipe.graphs, "decoder": without_gptq(recipe.graphs["decoder"])})
