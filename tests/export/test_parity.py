"""The gate sees what is wrong with a graph, and lets nothing doubtful through."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import torch

from export.parity import (
    STEPS,
    STORY,
    Parity,
    check,
    chunk_lengths,
    decoder_tokens,
    measure_decoder,
    measure_vision,
    parity_pictures,
)
from model.layers import named_variables, numpy_of
from model.story_model import StoryModel
from quantization.recipe import Recipe, load_recipe
from seed_story.config import CacheConfig
from seed_story.contract import Steps
from seed_story.errors import ParityError
from seed_story.story import SEEDStory
from seed_story.vision import Vision
from tests.loud import loud_source
from tests.reference.streaming_llama import StreamingLlama

GOOD = Parity(1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 500)
RECIPE = Recipe("ours", "", {}, {
    "vit_cosine_min": 0.9, "qformer_cosine_min": 0.8, "decoder_mean_kl_nat": 0.01, "decoder_top1": 0.7,
    "decoder_perplexity_ratio": 1.02,
})  # fmt: skip


@pytest.mark.parametrize("figure", RECIPE.bounds)
def test_directions_of_the_bounds(figure: str) -> None:
    """A cosine and an agreement are least values, a divergence and a ratio greatest; the bound itself passes."""
    bound, most = RECIPE.bounds[figure], figure in ("decoder_mean_kl_nat", "decoder_perplexity_ratio")
    better, worse = (bound / 2, bound * 2) if most else (1.0, bound / 2)
    for value in (bound, better):
        check(replace(GOOD, **{figure: value}), RECIPE)
    for value in (worse, math.nan, math.inf if most else -math.inf):
        with pytest.raises(ParityError, match=figure) as caught:
            check(replace(GOOD, **{figure: value}), RECIPE)
        assert caught.value.got == f"{value:.6g}"
        assert f"{bound:g}" in str(caught.value.expected)
        assert ("at most" in str(caught.value.expected)) == most
        assert "Nothing was written" in caught.value.hint


def test_force_lets_a_miss_through_and_says_which() -> None:
    """But no figure that isn't a number: such graphs compute nonsense."""
    bad = replace(GOOD, decoder_mean_kl_nat=0.02, decoder_top1=0.6)
    assert check(bad, RECIPE, force=True) == {
        "decoder_mean_kl_nat": {"got": 0.02, "bound": 0.01},
        "decoder_top1": {"got": 0.6, "bound": 0.7},
    }
    assert check(GOOD, RECIPE, force=True) == check(GOOD, RECIPE) == {}
    with pytest.raises(ParityError, match="decoder_mean_kl_nat") as caught:
        check(bad, RECIPE)
    assert "--force" in caught.value.hint
    for nonsense in (math.nan, math.inf):
        with pytest.raises(ParityError, match="decoder_mean_kl_nat") as caught:
            check(replace(bad, decoder_mean_kl_nat=nonsense), RECIPE, force=True)
        assert "--force" not in caught.value.hint


@pytest.fixture(scope="module")
def told(loud_bundle: Path) -> Iterator[SEEDStory]:
    with SEEDStory(loud_bundle, threads=1) as model:
        yield model


def story_ids(told: SEEDStory) -> list[int]:
    decoder = told.decoder
    return decoder_tokens(decoder.steps, decoder.cache.config, told.tokenizer.encode(STORY.read_text(encoding="utf-8")))


def figures(told: SEEDStory, model: StoryModel) -> Parity:
    decoder = told.decoder
    decoder.cache.reset()
    ids = story_ids(told)
    seen: list[int] = []
    measured = measure_decoder(model, decoder, ids, seen.append)
    assert sum(seen) == len(ids) + sum(chunk_lengths(decoder.steps.begin, decoder.cache.config))
    assert decoder.cache.position == len(ids)
    return Parity(*measure_vision(model, told.vision), **measured)  # type: ignore[arg-type]


def test_what_a_recipe_lacks_is_told() -> None:
    bad = replace(GOOD, decoder_mean_kl_nat=RECIPE.bounds["decoder_mean_kl_nat"] * 2)
    for unlearned in (True, False):
        with pytest.raises(ParityError) as caught:
            check(bad, RECIPE, unlearned=unlearned)
        assert ("export.learn_scales" in str(caught.value)) == unlearned


def test_whole_graphs_pass_by_far(told: SEEDStory) -> None:
    parity = figures(told, loud_source().model)
    check(parity, load_recipe("float32"))
    assert parity.decoder_mean_kl_nat < 1e-9
    assert parity.decoder_top1 == 1
    assert parity.decoder_perplexity_ratio == pytest.approx(1, abs=1e-5)
    steps = told.bundle.manifest.steps
    assert parity.decoder_positions == STEPS + len(steps.begin) + len(steps.prefill) >= 256
    assert parity.to_dict()["decoder_positions"] == parity.decoder_positions


def variable(model: keras.Layer, name: str) -> keras.Variable:
    return named_variables(model)[name]


def swap_layers(model: StoryModel) -> None:
    for name, one in named_variables(model.llama).items():
        if name.startswith("model.layers.0."):
            other = variable(model.llama, name.replace("layers.0.", "layers.1."))
            first, second = numpy_of(one).copy(), numpy_of(other).copy()
            one.assign(second)
            other.assign(first)


def scale(name: str, factor: float) -> Callable[[StoryModel], None]:
    def change(model: StoryModel) -> None:
        weight = variable(model.llama, name)
        weight.assign(numpy_of(weight) * factor)

    return change


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps: enough to see what is badly wrong, three times past the end."""
    monkeypatch.setattr("export.parity.STEPS", 96)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "damage",
    [
        swap_layers,
        scale("model.layers.0.self_attn.q_proj.weight", 1.1),
        scale("model.layers.1.self_attn.k_proj.weight", 0.9),
        scale("model.layers.0.mlp.up_proj.weight", 1.1),
        scale("model.layers.1.input_layernorm.weight", 1.1),
        scale("model.norm.weight", 1.1),
        scale("model.embed_tokens.weight", 1.1),
    ],
    ids=["layers swapped", "q", "k", "up", "gain", "last gain", "table"],
)
def test_damaged_decoder_is_found(told: SEEDStory, damage: Callable[[StoryModel], None]) -> None:
    model = loud_source().model
    damage(model)
    parity = figures(told, model)
    assert parity.decoder_mean_kl_nat > 10 * load_recipe("float32").bounds["decoder_mean_kl_nat"]
    with pytest.raises(ParityError, match="decoder_mean_kl_nat"):
        check(parity, load_recipe("float32"))


@pytest.mark.usefixtures("short")
def test_perplexity_ratio_is_that_of_torch(told: SEEDStory) -> None:
    """Cross entropy on the text's own tokens, of the graph's and of the plain reference's logits, past the end."""
    source = loud_source()
    scale("model.layers.0.mlp.up_proj.weight", 1.1)(source.model)
    measured = figures(told, source.model)
    decoder = told.decoder
    ids, steps = story_ids(told), decoder.steps
    begins, chunks = (chunk_lengths(sizes, decoder.cache.config) for sizes in (steps.begin, steps.prefill))
    ends = [sum(chunks[: n + 1]) for n in range(len(chunks))] + list(range(sum(chunks) + 1, len(ids)))
    mine = []
    for a, b in [*((0, end) for end in begins), *itertools.pairwise([0, *ends])]:
        if a == 0:
            decoder.cache.reset()
        mine.append(decoder.feed(decoder.embed(ids[a:b])).copy())
    ends = [*begins, *ends]
    weights = {name: numpy_of(one) for name, one in named_variables(source.model.llama).items()}
    cache, llama = decoder.cache.config, source.model.config.llama
    rows = weights["model.embed_tokens.weight"][ids]
    theirs = StreamingLlama(llama, weights, cache.sinks, cache.ring).feed(rows)[np.array(ends) - 1]
    assert ends[-1] > 2 * cache.slots
    labels = torch.tensor(ids)[ends]
    ours, truth = (
        torch.nn.functional.cross_entropy(torch.tensor(np.array(logits), dtype=torch.float64), labels)
        for logits in (mine, theirs)
    )
    expected = float(torch.exp(ours - truth))
    assert abs(expected - 1) > 1e-3
    assert measured.decoder_perplexity_ratio == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("short")
def test_damage_of_the_graph_that_begins_is_found(told: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A `begin_N` whose first token sees all others; nothing else is wrong."""
    fill = told.decoder.cache.fill

    def careless(inputs: dict[str, np.ndarray], count: int) -> slice:
        rows = fill(inputs, count)
        if "region" not in inputs:
            inputs["mask"][rows, rows] = 0
        return rows

    monkeypatch.setattr(told.decoder.cache, "fill", careless)
    with pytest.raises(ParityError, match="decoder_mean_kl_nat"):
        check(figures(told, loud_source().model), load_recipe("float32"))


@pytest.mark.usefixtures("short")
def test_damage_that_shows_past_the_end_only_is_found(told: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that forgets its sinks once it is full."""
    cache = told.decoder.cache
    fill = cache.fill

    def forgetful(inputs: dict[str, np.ndarray], count: int) -> slice:
        rows = fill(inputs, count)
        if cache.position >= cache.config.slots:
            inputs["mask"][:, : cache.config.sinks] = -1e9
        return rows

    monkeypatch.setattr(cache, "fill", forgetful)
    parity = figures(told, loud_source().model)
    assert parity.decoder_mean_kl_after_eviction_nat > 1e-4
    with pytest.raises(ParityError, match="decoder_mean_kl_nat"):
        check(parity, load_recipe("float32"))


@pytest.mark.usefixtures("short")
def test_nan_in_a_graph_fails(told: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = told.decoder.feed
    calls = iter(range(10_000))
    monkeypatch.setattr(told.decoder, "feed", lambda rows: feed(rows) * (np.nan if next(calls) == 60 else 1))
    with pytest.raises(ParityError, match="nan"):
        check(figures(told, loud_source().model), load_recipe("int8"))


@pytest.mark.parametrize("part", ["vision", "qformer"])
def test_damaged_picture_graph_is_found(told: SEEDStory, part: str) -> None:
    model = loud_source().model
    name = "encoder.layer.0.mlp.fc1.weight" if part == "vision" else None
    weights = named_variables(getattr(model, part))
    damaged = weights[name] if name else next(w for w in weights.values() if len(w.shape) == 2)
    damaged.assign(-numpy_of(damaged))
    vit, qformer = measure_vision(model, told.vision)
    bounds = load_recipe("float32").bounds
    if part == "vision":
        assert vit < bounds["vit_cosine_min"]
    else:
        assert vit >= bounds["vit_cosine_min"]
    assert qformer < bounds["qformer_cosine_min"]


def test_nan_in_a_picture_graph_fails(told: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = Vision.embeddings
    monkeypatch.setattr(Vision, "embeddings", lambda self, pixels: embeddings(self, pixels) * np.nan)
    vit, qformer = measure_vision(loud_source().model, told.vision)
    assert vit > 0.99 and math.isnan(qformer)


def test_pictures_are_pictures() -> None:
    pictures = parity_pictures(28)
    assert pictures.dtype == np.float32 and pictures.shape[1:] == (28, 28, 3) and len(pictures) >= 3
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert pictures.std(axis=(1, 2)).min() > 0.1
    np.testing.assert_array_equal(pictures, parity_pictures(28))


@pytest.mark.parametrize(
    ("slots", "sinks", "sizes"),
    [(32, 2, (4, 8)), (512, 4, (16, 64, 128)), (4096, 4, (16,)), (12, 11, (128,)), (2048, 4, ())],
)
def test_enough_tokens_whatever_the_cache(slots: int, sinks: int, sizes: tuple[int, ...]) -> None:
    cache, steps = CacheConfig(slots, sinks), Steps(sizes)
    chunks = chunk_lengths(sizes, cache)
    assert all(1 <= n <= min(size, slots - sinks) for n, size in zip(chunks, sorted(sizes), strict=True))
    for length in (1, 700, 10_000):
        ids = decoder_tokens(steps, cache, list(range(length)))
        assert len(ids) >= slots + 64
        assert len(ids) - sum(chunks) >= STEPS >= 256
        assert ids[:length] == list(range(length))[: len(ids)]


def test_the_story_needs_no_repeating() -> None:
    assert len(STORY.read_text(encoding="utf-8")) > 4 * 800
