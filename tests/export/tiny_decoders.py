"""Tiny float32 decoders, exported in seconds, of which every one has another kind of LLaMA inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from export import decoder_step
from export.balance import Balance
from export.decoder_graph import write_skeleton
from export.decoder_weights import broad_directions, skeleton_weight, weight_shapes
from export.flatbuffer import fill_skeleton
from export.rotation import rotated_weight
from model.sources.random import random_llama
from seed_story import cache as cache_module
from seed_story.backends import open_graph
from seed_story.config import CacheConfig, LlamaConfig, RopeScaling
from seed_story.contract import Steps
from seed_story.decoder import Decoder
from tests.reference.streaming_llama import Gallery, StreamingLlama

SIZES, BEGINS = (4, 8), (8,)
"""N of the prefill graphs, beside decode's 1, and of those that begin."""

VERIFY = 4
"""K of the decoders that verify guesses."""

SINK_ROWS = {"gqa": 5, "mha": 8, "mqa": 5}
"""Of the int8 caches: as many as the greediest policy of the tests needs; the others leave some empty."""

_TINY = LlamaConfig.tiny()
VARIANTS: dict[str, tuple[LlamaConfig, int]] = {
    "gqa": (_TINY, 12),
    "mha": (
        replace(
            _TINY,
            num_heads=4,
            num_kv_heads=4,
            tie_word_embeddings=False,
            rms_norm_eps=0.05,
            rope_scaling=RopeScaling("linear", 3.0),
        ),
        20,
    ),
    "mqa": (
        replace(
            _TINY,
            num_layers=3,
            num_heads=3,
            num_kv_heads=1,
            head_dim=16,
            rope_theta=100.0,
            rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 64),
        ),
        10,
    ),
}
"""Configuration and slots, by name; heads * head_dim is never the width, and the head is tied or not."""


def loud_llama(config: LlamaConfig, seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    """Random weights large enough for attention to be sharp and for every gain to be far from one.

    With a fresh network's deviation of 0.02 all tokens get nearly equal attention, and no mistake of a
    rotation or of the mask would show in the logits.
    """
    made = {}
    for name, weight in random_llama(config, seed).items():
        if weight.ndim == 1:
            made[name] = 1 + (weight - 1) * 15
        else:
            made[name] = weight * (20 if "q_proj" in name or "k_proj" in name else 12)
    return made


def gallery_of(cache: CacheConfig) -> Gallery:
    """What the reference keeps of pictures when the cache has this geometry."""
    eviction = cache.picture_eviction
    decay = cache_module.MASS_DECAY if eviction == "attention-mass" else None
    return Gallery(cache.pictures, cache.picture_begin, cache.picture_end, eviction == "first-and-last", decay)


def random_rotation(size: int) -> npt.NDArray[np.float64]:
    """Of no use, and not its own inverse."""
    return np.asarray(np.linalg.qr(np.random.default_rng(9).normal(size=(size, size)))[0])


def random_balance(config: LlamaConfig) -> Balance:
    """Of no use, and far from one that changes nothing."""
    random = np.random.default_rng(5)
    broad = broad_directions(config)
    directions, _ = np.linalg.qr(random.normal(size=(config.hidden_size, broad)))
    scales = random.uniform(0.3, 3, (config.num_layers, config.intermediate_size))
    values, _ = np.linalg.qr(random.normal(size=(config.num_layers, config.num_kv_heads, *[config.head_dim] * 2)))
    values *= random.uniform(0.5, 2, values.shape[:-1])[..., None]
    return Balance(random_rotation(config.hidden_size), directions, random.uniform(0.2, 1, broad), scales, values)


@dataclass(frozen=True)
class TinyDecoder:
    """A decoder on disk and all that went into it."""

    config: LlamaConfig
    slots: int
    weights: dict[str, npt.NDArray[np.float32]]
    skeleton: bytes
    path: Path
    sink_rows: int | None = None
    verify: int = 0
    rotated: bool = False

    def make(self, name: str) -> npt.NDArray[np.float32]:
        """One of the skeleton's weights."""
        if self.rotated:
            return rotated_weight(self.config, self.weights, random_balance(self.config), name)
        return skeleton_weight(self.config, self.weights, name)

    def open(self, cache: CacheConfig, sizes: Sequence[int] = SIZES, attention: bool = True) -> Decoder:
        """On the device's engine; close it."""
        graph = open_graph(self.path, threads=1)
        steps = Steps(tuple(sizes), BEGINS, attention, self.verify)
        return Decoder(graph, self.config, cache, steps, self.sink_rows)

    def reference(self, cache: CacheConfig) -> StreamingLlama:
        """The same model by other means."""
        return StreamingLlama(self.config, self.weights, cache.sinks, cache.ring, gallery_of(cache))

    def embeddings(self, count: int, seed: int = 1) -> npt.NDArray[np.float32]:
        """Random, and of no token: as a picture's are."""
        random = np.random.default_rng(seed)
        return random.normal(0, 0.5, (count, self.config.hidden_size)).astype(np.float32)

    def turned(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Embeddings `[n, hidden]` as a rotated one takes them."""
        return (rows @ random_rotation(self.config.hidden_size).T).astype(np.float32)


def export_tiny(
    config: LlamaConfig,
    slots: int,
    folder: Path,
    *,
    rotated: bool = False,
    sink_rows: int | None = None,
    verify: int = 0,
) -> TinyDecoder:
    """Exports to `folder`, which is empty; `begin_N` in parts of three queries, three and two."""
    weights, steps = loud_llama(config), Steps(SIZES, BEGINS, verify=verify)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder_step, "AT_ONCE", 3)
        skeleton = write_skeleton(config, slots, steps, folder / "saved_model", rotated=rotated, sink_rows=sink_rows)
    made = TinyDecoder(config, slots, weights, skeleton, folder / "decoder.tflite", sink_rows, verify, rotated)
    fill_skeleton(skeleton, weight_shapes(config, rotated=rotated), made.make, made.path)
    return made
