"""Stage 2: picture to story, end to end, through the decoder (SEED-Story, arXiv 2407.08683, section 3).

The loss is the next token's cross-entropy on captions. Beside it, the distance between the next picture's features
and what the decoder foresees of it; and, where the data names what is in a picture, stage 1's loss, so that the
queries stay words that the decoder knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from model.layers import Module, Tensor
from model.llama import Llama
from model.picture_head import PictureHead, cosine_distance
from model.qformer import QFormer, pool_patches
from model.vit import VisionTransformer
from training.alignment import WordLoss
from training.data import IGNORE, StoryEncoder, StoryRecord
from training.features import FeatureStore
from training.story_batches import StoryBatches, with_pictures
from training.task import Batch

_FORESEEN_POOL = 4
_FORESEEN_WEIGHT = 0.1


def foreseen_pool(grid: int) -> int:
    """The next picture is foreseen as its class token and the means of squares of so many patches a side.

    Four, or the most that divides a grid of fewer patches.
    """
    return math.gcd(grid, _FORESEEN_POOL)


@dataclass(frozen=True)
class Networks:
    """What stage 2 trains or runs through; which of their variables are trainable is set before."""

    vision: VisionTransformer
    qformer: QFormer
    llama: Llama
    head: PictureHead


class _Parts(Module):
    """Several networks as one."""

    def __init__(self, networks: Sequence[keras.Layer]) -> None:
        super().__init__()
        self.networks = list(networks)


class Storytelling:
    """The task of stage 2.

    Args:
        stories: chunks, such as `training.data.chunks` makes.
        words: stage 1's loss; None where no picture has a label.
        labels: what is in a picture, of `NameTable.label`; pictures without one are told about all the same.
        length: tokens a row, shared by whole examples; a story that is longer loses its last pages.
        rows: a batch.
        factors: learning-rate factors by network; 1 where there is none.
    """

    def __init__(
        self,
        stories: Sequence[StoryRecord],
        encoder: StoryEncoder,
        store: FeatureStore,
        networks: Networks,
        words: WordLoss | None,
        labels: Mapping[Path, npt.NDArray[np.int32]],
        *,
        name: str = "storytelling",
        length: int = 256,
        rows: int = 4,
        seed: int = 0,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        self._batches = StoryBatches(stories, with_pictures(encoder), store, networks.qformer.config.num_queries,
                                     length=length, rows=rows, seed=seed)  # fmt: skip
        self.name = f"{name}, {self._batches.name}"
        self._store, self._networks, self._words, self._labels = store, networks, words, labels
        self._runs_vision = store.end < networks.vision.config.feature_layer
        self._factors = dict(factors or {})
        parts = [networks.qformer, networks.llama, networks.head]
        self.network = _Parts([networks.vision, *parts] if self._runs_vision else parts)

    def batch(self, step: int) -> Batch:  # noqa: D102
        made, room = self._batches[step], self._batches.room
        packed = made.packed
        pictures = len(packed.pictures)
        labels, named = self._labelled(packed.pictures)
        begins, foreseen = np.zeros(room, np.int32), np.zeros(room, np.float32)
        flat = packed.ids.reshape(-1) < 0
        begins[:pictures] = np.flatnonzero(flat)[:: self._batches.queries] - 1
        foreseen[:pictures] = [number > 0 for row in made.examples for e in row for number in range(len(e.pictures))]
        return {
            "ids": packed.ids, "targets": packed.labels, "mask": packed.mask, "positions": packed.positions,
            "picture_index": packed.picture_index, "hidden": made.hidden, "labels": labels, "named": named,
            "begins": begins, "foreseen": foreseen,
        }  # fmt: skip

    def _labelled(self, pictures: Sequence[Path]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The pictures' labels, and which of them have one."""
        room = self._batches.room
        labels = np.zeros((room, self._words.width if self._words else 1), np.int32)
        named = np.zeros(room, np.float32)
        for row, picture in enumerate(pictures):
            if (label := self._labels.get(picture)) is not None:
                labels[row], named[row] = label, 1
        return labels, named

    def loss(self, batch: Mapping[str, Tensor], training: bool) -> Mapping[str, Tensor]:  # noqa: D102
        net = self._networks
        hidden = ops.cast(batch["hidden"], "float32")
        features = net.vision.features(hidden, self._store.end) if self._runs_vision else hidden
        queries = net.qformer(features, training=training)  # [pictures, num_queries, llm_size]
        states = net.llama.hidden(self._embeddings(batch, queries), batch["mask"], batch["positions"])
        told = self._next_token(states, batch["targets"])
        words = _mean(self._words(queries, batch["labels"]), batch["named"]) if self._words else ops.zeros(())
        at = ops.take(ops.reshape(states, (-1, states.shape[-1])), batch["begins"], axis=0)
        seen = ops.stop_gradient(pool_patches(features, foreseen_pool(net.vision.config.grid)))
        foreseen = _mean(cosine_distance(net.head(at), seen), batch["foreseen"])
        loss = told + words + _FORESEEN_WEIGHT * foreseen
        return {"loss": loss, "next_token": told, "words": words, "next_picture": foreseen}

    def _embeddings(self, batch: Mapping[str, Tensor], queries: Tensor) -> Tensor:
        ids = batch["ids"]
        text = self._networks.llama.embed(ops.maximum(ids, 0))
        flat = ops.reshape(queries, (-1, queries.shape[-1]))
        return ops.where((ids < 0)[..., None], ops.take(flat, batch["picture_index"], axis=0), text)

    def _next_token(self, states: Tensor, targets: Tensor) -> Tensor:
        learned = ops.cast(ops.not_equal(targets, IGNORE), "float32")
        logits = self._networks.llama.head(states)
        costs = ops.sparse_categorical_crossentropy(ops.maximum(targets, 0), logits, from_logits=True)
        return _mean(costs, learned)

    def describe(self, step: int) -> str:  # noqa: D102
        return self._batches.describe(step)

    def learning_rate_factor(self, variable: Any) -> float:
        """The factor of the network that a variable belongs to."""
        for name, factor in self._factors.items():
            if any(variable is v for v in getattr(self._networks, name).trainable_variables):
                return factor
        return 1.0


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean of the values that count; 0 if none does."""
    return ops.sum(values * weights) / ops.maximum(ops.sum(weights), 1.0)
