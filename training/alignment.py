"""Stage 1: the Q-Former learns to say what is in a picture in the decoder's own words, without running the decoder.

Each query's embedding is scored against the decoder's token embeddings, as in a classifier over words: cosine
cross-entropy, and the distance to the wanted embedding itself, so that the decoder can read what comes out. Which
query says what is fixed (`training.names`): first the main thing, last the place. Two things of about the same size
may come in either order, as in set prediction (DETR, arXiv 2005.12872).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from keras import ops

from model.layers import FloatArray, Module, Tensor
from model.qformer import QFormer, summarize
from training.features import FeatureStore
from training.names import SLOTS, THINGS, NameTable
from training.task import Batch

_SHARPNESS = 16.0
"""Cosines are multiplied by it before the softmax."""
_DISTANCE_WEIGHT = 0.5
_FILLER_WEIGHT = 0.15
"""Most queries have nothing to say; those that have, count more."""
_MAIN_WEIGHT = 2.0
_LEAST_VARIANCE = 1e-12  # where nothing differs within a class, as when each has one picture
_SHRINKAGE = 0.1
"""Of the scatter within a class towards a multiple of the identity: few rows estimate many directions."""
_COMPUTED_FACTOR = 0.1
_READ = 256  # pictures whose features are in memory at once


@dataclass(frozen=True)
class Labelled:
    """A picture and the names of what it shows.

    Args:
        things: the main one first.
    """

    picture: Path
    things: tuple[str, ...]
    place: str

    @property
    def main(self) -> str:
        """The name of the main thing; of the place, where there is nothing else."""
        return (*self.things, self.place)[0]


class WordLoss(Module):
    """How far a picture's embeddings are from the words that name what it shows.

    Args:
        table: the words.
        token_embeddings: the decoder's table, float32 `[vocab_size, llm_size]`.

    Attributes:
        width: queries that have something to say.
    """

    def __init__(self, table: NameTable, token_embeddings: FloatArray) -> None:
        super().__init__()
        self.width = SLOTS * table.width
        wanted = np.asarray(token_embeddings, np.float32)[table.token_ids]
        self._mean = wanted.mean(0)
        self._wanted = wanted
        self._directions = _unit(wanted - self._mean)
        self._size = float(np.square(wanted - self._mean).mean())
        self._orders = np.array([_slot_order(order, table.width) for order in _orders()])  # [orders, queries]
        self._weights = np.full(self.width, 1.0, np.float32)
        self._weights[: table.width] = _MAIN_WEIGHT

    def call(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of each picture, `[b]`.

        Args:
            embeddings: `[b, num_queries, llm_size]`; queries beyond `SLOTS * width` are free.
            labels: int `[b, SLOTS * width]`, of `NameTable.label`.
        """
        said = embeddings[:, : labels.shape[1]]
        logits = _SHARPNESS * self._cosines(said)
        costs = []
        for order in self._orders:
            wanted = ops.take(labels, order, axis=1)
            words = ops.sparse_categorical_crossentropy(wanted, logits, from_logits=True)
            away = ops.mean(ops.square(said - ops.take(self._wanted, wanted, axis=0)), axis=-1) / self._size
            weights = self._weights * ops.where(wanted == 0, _FILLER_WEIGHT, 1.0)
            costs.append(ops.sum(weights * (words + _DISTANCE_WEIGHT * away), axis=1) / ops.sum(weights, axis=1))
        return ops.min(ops.stack(costs), axis=0)

    def first_words(self, embeddings: Tensor) -> Tensor:
        """The index of the word that each query is nearest to, int `[b, num_queries]`."""
        return ops.argmax(self._cosines(embeddings), axis=-1)

    def _cosines(self, embeddings: Tensor) -> Tensor:
        """Between each query and each word, `[b, queries, words]`, both seen from the words' mean."""
        return ops.matmul(_unit_tensor(embeddings - self._mean), self._directions.T)


class Alignment:
    """The task of stage 1 on a frozen ViT: from each picture's summary to words.

    The patches themselves stay closed to the queries (Layer Scale 0) until stage 2: attention to them learns the
    training set's drawings by heart (docs/decisions/0004).

    Args:
        store: the ViT's features.
    """

    def __init__(
        self,
        pictures: Sequence[Labelled],
        store: FeatureStore,
        qformer: QFormer,
        table: NameTable,
        token_embeddings: FloatArray,
        *,
        name: str = "alignment",
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        self.name = f"{name}, seed {seed}, {len(pictures)} pictures, {batch_size} a batch"
        self._pictures, self._batch_size, self._seed, self._qformer = list(pictures), batch_size, seed, qformer
        self._labels = np.stack([table.label(p.things, p.place) for p in pictures])
        self._summaries = summaries([p.picture for p in pictures], store)
        self.words = WordLoss(table, token_embeddings)
        self.network = qformer

    def prepare(self, *, recognized: bool = False) -> None:
        """Closes the attention to patches, and gives the summary projection Fisher's directions to begin with.

        Args:
            recognized: the projection has learned better ones already (`training.recognition`) and keeps them.
        """
        for layer in self._qformer.layers:
            layer.cross_scale.lambda1.assign(np.zeros(layer.cross_scale.lambda1.shape, np.float32))
        if recognized:
            return
        rows = ops.convert_to_numpy(self._qformer.summary_norm(self._summaries))[:, 0]
        weight, bias = discriminant(rows, [one.main for one in self._pictures], self._qformer.config.hidden_size)
        projection = self._qformer.summary_projection
        assert projection.bias is not None
        projection.weight.assign(weight)
        projection.bias.assign(bias)

    def chosen(self, step: int) -> npt.NDArray[np.int64]:
        """Indices of a step's pictures: every picture once before any comes again."""
        return shuffled(self._seed, step, self._batch_size, len(self._pictures))

    def batch(self, step: int) -> Batch:  # noqa: D102
        rows = self.chosen(step)
        return {"summary": self._summaries[rows], "labels": self._labels[rows]}

    def loss(self, batch: Mapping[str, Tensor], training: bool) -> Mapping[str, Tensor]:  # noqa: D102
        embeddings = self._qformer.read(batch["summary"])
        main = ops.equal(self.words.first_words(embeddings)[:, 0], batch["labels"][:, 0])
        return {
            "loss": ops.mean(self.words(embeddings, batch["labels"])),
            "main_named": ops.mean(ops.cast(main, "float32")),
        }

    def describe(self, step: int) -> str:  # noqa: D102
        return "pictures " + ", ".join(self._pictures[row].picture.name for row in self.chosen(step))

    def learning_rate_factor(self, variable: Any) -> float:
        """The projection that `prepare` computed learns more slowly than the rest."""
        computed = self._qformer.summary_projection.trainable_variables
        return _COMPUTED_FACTOR if any(variable is v for v in computed) else 1.0


def summaries(pictures: Sequence[Path], store: FeatureStore) -> FloatArray:
    """Of pictures whose features are in a store, as `model.qformer.summarize` has them: `[n, 1, summary]`."""
    parts = []
    for start in range(0, len(pictures), _READ):
        features = store[pictures[start : start + _READ]].astype(np.float32)
        parts.append(ops.convert_to_numpy(summarize(ops.convert_to_tensor(features))))
    return np.concatenate(parts)


def discriminant(rows: FloatArray, classes: Sequence[str], size: int) -> tuple[FloatArray, FloatArray]:
    """Linear discriminant analysis (Fisher 1936): a map in which what differs within a class has unit variance.

    Args:
        rows: `[n, inputs]`.
        classes: of each row.
        size: of the output: the directions in which the classes' means differ most; the rest is zero.

    Returns:
        weight `[size, inputs]` and bias `[size]` of the map, float32.
    """
    data = rows.astype(np.float64)
    names, owner = np.unique(np.asarray(classes), return_inverse=True)
    means = np.stack([data[owner == index].mean(0) for index in range(len(names))])
    inside = data - means[owner]
    scatter = inside.T @ inside / len(data)
    scatter += _SHRINKAGE * np.trace(scatter) / len(scatter) * np.eye(len(scatter))
    values, vectors = np.linalg.eigh(scatter)
    whiten = vectors / np.sqrt(np.maximum(values, _LEAST_VARIANCE))  # columns
    centre = means.mean(0)
    _, _, directions = np.linalg.svd((means - centre) @ whiten, full_matrices=False)
    weight = np.zeros((size, data.shape[1]))
    found = directions[:size] @ whiten.T
    weight[: len(found)] = found
    weight /= max(float(np.std((data - centre) @ weight.T)), 1e-9)  # as large as what the queries bring
    return weight.astype(np.float32), (-weight @ centre).astype(np.float32)


def _orders() -> list[tuple[int, ...]]:
    """All orders of the slots in which the first and the last keep their places."""
    return [(0, *middle, THINGS) for middle in itertools.permutations(range(1, THINGS))]


def _slot_order(order: Sequence[int], width: int) -> list[int]:
    return [slot * width + place for slot in order for place in range(width)]


def shuffled(seed: int, step: int, batch_size: int, count: int) -> npt.NDArray[np.int64]:
    """The rows of a step's batch: all `count` once, in an order of their own, before any comes again."""
    first = step * batch_size
    return np.array([_order(seed, at // count, count)[at % count] for at in range(first, first + batch_size)])


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def _unit(rows: FloatArray) -> FloatArray:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.float32)


def _unit_tensor(rows: Tensor) -> Tensor:
    return rows * ops.rsqrt(ops.sum(ops.square(rows), axis=-1, keepdims=True) + 1e-6)
