"""Stage 1: the Q-Former learns to say what is in a picture in the decoder's own words, without running the decoder.

Each query's embedding is scored against the decoder's token embeddings, as in a classifier over words: cosine
cross-entropy, and the distance to the wanted embedding itself, so that the decoder can read what comes out. Which
query says what is fixed (`training.names`): first the main thing, last the place. Two things of about the same size
may come in either order, as in set prediction (DETR, arXiv 2005.12872).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from keras import ops

from model.layers import FloatArray, Module, Tensor
from model.qformer import QFormer
from training.discriminant import Classifier, discriminant, nearest_mean
from training.features import FeatureStore
from training.names import SLOTS, THINGS, NameTable
from training.pictures import Labelled, shuffled, summaries
from training.task import Batch

_SHARPNESS = 16.0
"""Cosines are multiplied by it before the softmax."""
_DISTANCE_WEIGHT = 0.5
_FILLER_WEIGHT = 0.15
"""Most queries have nothing to say; those that have, count more."""
_MAIN_WEIGHT = 2.0
_UNLIKELY = 20.0
"""By how much a name that a slot never says scores below the least of the others."""


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
    training set's drawings by heart (docs/decisions/0004). The Q-Former has a memory for the names of the table.

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
        self._table, self._words = table, token_embeddings
        self._labels = np.stack([table.label(p.things, p.place) for p in pictures])
        self._summaries = summaries([p.picture for p in pictures], store)
        self.words = WordLoss(table, token_embeddings)
        self.network = qformer
        assert qformer.memory is not None
        self._memory = qformer.memory
        self._memory.worth.weight.assign(table.worth())  # nothing learns it, so no checkpoint of a training has it

    def prepare(self, recognized: Sequence[Classifier] = ()) -> None:
        """What the first step begins with: the attention to patches closed, and the memory of names filled.

        Args:
            recognized: the main thing and the place, from the summary projection that `training.recognition` trained.
                Without them, both begin as the nearest class mean in the space of Fisher's discriminant.
        """
        qformer = self._qformer
        for layer in qformer.layers:
            layer.cross_scale.lambda1.assign(np.zeros(layer.cross_scale.lambda1.shape, np.float32))
        for variable in qformer.projection.trainable_variables:  # at first, all that is said are names
            variable.assign(np.zeros(variable.shape, np.float32))
        for slot, classifier in zip((0, SLOTS - 1), recognized or self._closed_form(), strict=True):
            self._memory.scores[slot].assign(*self._scores(classifier))
        self._memory.values.weight.assign(self._table.embeddings(self._words).T)

    def _closed_form(self) -> list[Classifier]:
        main, places = ([one.main for one in self._pictures], [one.place for one in self._pictures])
        rows = ops.convert_to_numpy(self._qformer.summary_norm(self._summaries))[:, 0]
        weight, bias = discriminant(rows, main, self._qformer.config.hidden_size)
        self._qformer.summary_projection.assign(weight, bias)
        points = rows @ weight.T + bias
        return [nearest_mean(points, main), nearest_mean(points, places)]

    def _scores(self, classifier: Classifier) -> tuple[FloatArray, FloatArray]:
        """A classifier's weight and bias among all names of the memory; the others are out of the question."""
        rows = [self._table.memory_row(name) for name in classifier.names]
        weight = np.zeros((self._table.memory_size, classifier.weight.shape[1]), np.float32)
        bias = np.full(self._table.memory_size, float(classifier.bias.min()) - _UNLIKELY, np.float32)
        weight[rows], bias[rows] = classifier.weight, classifier.bias
        return weight, bias

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
        """0 for all but the two slots that begin with nothing.

        The pictures of the training set are known by heart after recognition: more of them teach the rest nothing.
        """
        unknown = [v for scores in self._memory.scores[1:-1] for v in scores.trainable_variables]
        return float(any(variable is v for v in unknown))


def _orders() -> list[tuple[int, ...]]:
    """All orders of the slots in which the first and the last keep their places."""
    return [(0, *middle, THINGS) for middle in itertools.permutations(range(1, THINGS))]


def _slot_order(order: Sequence[int], width: int) -> list[int]:
    return [slot * width + place for slot in order for place in range(width)]


def _unit(rows: FloatArray) -> FloatArray:
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), np.float32)


def _unit_tensor(rows: Tensor) -> Tensor:
    return rows * ops.rsqrt(ops.sum(ops.square(rows), axis=-1, keepdims=True) + 1e-6)
