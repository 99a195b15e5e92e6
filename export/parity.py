"""The parity gate: every graph of a bundle against the Keras model, on the same inputs, through the real runtime.

- `vit_cosine_min`, `qformer_cosine_min`: the least cosine between a graph's output and the reference's, over every
  feature or query of a few pictures.
- The decoder is teacher-forced through its prefills and then step by step, well past the end of the cache, against the
  reference with the same attention sinks. KL divergence is from the reference's next-token distribution, in nat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from keras import ops

from model.rotation import Doubles
from model.story_model import StoryModel
from quantization.fidelity import kl_nat, log_softmax, row_cosines
from quantization.recipe import Recipe
from seed_story.config import CacheConfig
from seed_story.contract import Steps
from seed_story.decoder import Decoder
from seed_story.errors import ParityError
from seed_story.vision import Vision

Floats = npt.NDArray[np.float32]

STORY = Path(__file__).parent / "parity_story.txt"
PICTURES = 4
STEPS = 512
"""Tokens that are decoded one by one, after the prefills."""
_PAST_END = 64
"""The least number of them that come after the cache has wrapped."""


@dataclass(frozen=True)
class Parity:
    """The gate's figures.

    Args:
        decoder_mean_kl_nat, decoder_p99_kl_nat, decoder_max_logit_difference: over all compared positions.
        decoder_top1: share of positions at which both would choose the same token.
        decoder_perplexity_ratio: the graph's perplexity on the text's own tokens divided by the reference's: `exp` of
            the mean difference of losses. On some 500 tokens it has noise of a percent and may be below 1.
        decoder_mean_kl_after_eviction_nat: over the positions at which the cache had wrapped.
        decoder_positions: how many positions were compared.
    """

    vit_cosine_min: float
    qformer_cosine_min: float
    decoder_mean_kl_nat: float
    decoder_p99_kl_nat: float
    decoder_max_logit_difference: float
    decoder_top1: float
    decoder_perplexity_ratio: float
    decoder_mean_kl_after_eviction_nat: float
    decoder_positions: int

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def check(
    parity: Parity, recipe: Recipe, *, force: bool = False, unlearned: bool = False
) -> dict[str, dict[str, float]]:
    """The gate.

    Args:
        force: let a bundle through that misses a bound; not one whose figures are no numbers.
        unlearned: whether the recipe asks for learned scales that there aren't.

    Returns:
        The missed bounds, for the manifest: figure to `got` and `bound`. Empty unless forced.

    Raises:
        ParityError: a figure is outside its recipe's bound (NaN always is).
    """
    missed: dict[str, dict[str, float]] = {}
    learn = "Learn this recipe's scales for the checkpoint (python -m export.learn_scales). " if unlearned else ""
    for figure, bound in recipe.bounds.items():
        value = getattr(parity, figure)
        least = not figure.endswith(("_nat", "_ratio"))
        if value >= bound if least else value <= bound:
            continue
        if not (force and math.isfinite(value)):
            raise ParityError(
                f"the {recipe.name} graphs stray from the reference: {figure}",
                got=f"{value:.6g}",
                expected=f"{'at least' if least else 'at most'} {bound:g}",
                hint=f"Nothing was written. {learn}Try the recipe float32 to see whether quantization is at fault"
                + (", or write it marked as such with --force." if math.isfinite(value) else "."),
            )
        missed[figure] = {"got": value, "bound": bound}
    return missed


def parity_pictures(size: int) -> Floats:
    """Pictures for the gate, float32 `[PICTURES, size, size, 3]`: smooth noise, the same every time."""
    rng = np.random.default_rng(20240711)
    waves = rng.integers(1, 12, (PICTURES, 3, 4, 2)).astype(np.float64)
    phases = rng.uniform(0, 2 * np.pi, (PICTURES, 3, 4))
    y, x = np.mgrid[0:size, 0:size] / size
    turns = waves[..., 0, None, None] * x + waves[..., 1, None, None] * y
    mixed = np.sin(2 * np.pi * turns + phases[..., None, None]).mean(2)  # [pictures, 3, size, size]
    return np.ascontiguousarray((0.5 + 0.5 * mixed).transpose(0, 2, 3, 1).astype(np.float32))


def measure_vision(model: StoryModel, vision: Vision, turn: Doubles | None = None) -> tuple[float, float]:
    """The least cosines of the ViT's and of the Q-Former's output, which a rotated decoder wants turned."""
    cosines = []
    for picture in parity_pictures(model.config.vision.image_size):
        features = ops.convert_to_numpy(model.vision(picture[None]))
        embeddings = ops.convert_to_numpy(model.qformer(features))[0]
        cosines.append((
            row_cosines(vision.features(picture[None]), features).min(),
            row_cosines(vision.embeddings(picture[None]), embeddings if turn is None else embeddings @ turn.T).min(),
        ))  # fmt: skip
    vit, qformer = np.min(cosines, axis=0)  # NumPy's minimum keeps a NaN, Python's may lose it
    return float(vit), float(qformer)


def chunk_lengths(sizes: Iterable[int], cache: CacheConfig) -> list[int]:
    """Chunks that use graphs of these sizes once each, a few tokens short of full where that leaves any."""
    return [min(max(1, size - 3), cache.ring) for size in sorted(sizes)]


def decoder_tokens(steps: Steps, cache: CacheConfig, ids: list[int]) -> list[int]:
    """As many of the story's tokens as the gate needs; the story repeats if it is too short.

    They fill all prefills, then STEPS steps, and pass the end of the cache by at least _PAST_END.
    """
    need = max(sum(chunk_lengths(steps.prefill, cache)) + STEPS, cache.slots + _PAST_END)
    return (ids * (need // len(ids) + 1))[:need]


def measure_decoder(
    model: StoryModel, decoder: Decoder, ids: list[int], tick: Callable[[int], object]
) -> dict[str, float | int]:
    """Teacher-forced logits of graph and reference; see `Parity` for the figures.

    The story begins once with each of the graphs that begin one, and then goes through all others to its end.

    Args:
        ids: of `decoder_tokens`.
        tick: told how many tokens the graph has read since the last call.
    """
    cache, steps = decoder.cache.config, decoder.steps
    reference = reference_log_probabilities(model, ids, cache)
    kl, agree, furthest, places, lost = [], [], [], [], []
    begins, chunks = chunk_lengths(steps.begin, cache), chunk_lengths(steps.prefill, cache)
    ends = np.cumsum([*chunks, *[1] * (len(ids) - sum(chunks))])
    for start, end in [*((0, end) for end in begins), *zip([0, *ends[:-1]], ends, strict=True)]:
        if start == 0:
            decoder.reset(cache)
        logits = decoder.feed(decoder.embed(ids[start:end]))
        mine, theirs = log_softmax(logits), reference(int(end) - 1)
        kl.append(kl_nat(theirs, mine))
        agree.append(int(mine.argmax()) == int(theirs.argmax()))
        offset = np.median(mine - theirs)
        furthest.append(float(np.abs(mine - theirs - offset).max()))
        places.append(int(end) - 1)
        lost += [theirs[token] - mine[token] for token in ids[end : end + 1]]  # the last one has no successor
        tick(int(end - start))
    evicted = [k for k, place in zip(kl, places, strict=True) if place >= cache.slots]
    return {
        "decoder_mean_kl_nat": float(np.mean(kl)),
        "decoder_p99_kl_nat": float(np.percentile(kl, 99)),
        "decoder_max_logit_difference": float(np.max(furthest)),
        "decoder_top1": float(np.mean(agree)),
        "decoder_perplexity_ratio": float(np.exp(np.mean(lost))),
        "decoder_mean_kl_after_eviction_nat": float(np.mean(evicted)),
        "decoder_positions": len(kl),
    }


def reference_log_probabilities(
    model: StoryModel, ids: list[int], cache: CacheConfig
) -> Callable[[int], npt.NDArray[np.float64]]:
    """The Keras model over the whole text; gives a position's log-probabilities, float64 `[vocab]`, when asked."""
    embeddings = model.llama.embed(np.array([ids]))
    hidden = model.llama.hidden(embeddings, cache=cache)
    head = ops.transpose(model.llama.head_weight)  # once: a copy for each position took a tenth of an export

    def at(position: int) -> npt.NDArray[np.float64]:
        return log_softmax(ops.convert_to_numpy(ops.matmul(hidden[0, position : position + 1], head))[0])

    return at
