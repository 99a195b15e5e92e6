"""Before stage 1: the ViT's last blocks learn to tell the main things of pictures apart, and the places.

A linear layer over their names stands in for all that comes later, so the eye learns in minutes what it would take the
story's loss hours to teach it (docs/decisions/0005). Against learning drawings by heart, pictures are seen through a
share of their patches, others at every step (PatchDropout, arXiv 2208.07220: cheaper, too), and blended in pairs
(manifold mixup, arXiv 1806.05236).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from keras import ops

from model.layers import Linear, Module, Tensor, numpy_of
from model.qformer import QFormer, summarize
from model.vit import VisionTransformer
from training.discriminant import Classifier, discriminant, nearest_mean
from training.features import FeatureStore
from training.pictures import Labelled, shuffled, summaries
from training.task import Batch

_SEEN = 3 / 8
"""Of a picture's patches, at each step."""
_BLEND = 0.4
"""Parameter of the Beta distribution of a picture's share in a pair: mostly near all or nothing."""
_DROPOUT = 0.3
_SMOOTHING = 0.1
"""Of the labels: a tenth is spread over all names."""
_PLACE_WEIGHT = 0.3
"""Beside the main thing's loss: a place is easier to tell, and fewer stories depend on it."""
_VISION_FACTOR = 0.3
_TRAINED_SHARE = 0.7
"""Of the trained blocks in what recognition ends with; the rest are the pretrained ones."""


class _Eye(Module):
    """From hidden states to scores of things and of places, through what the Q-Former's queries start from."""

    def __init__(self, vision: VisionTransformer, qformer: QFormer, things: int, places: int, seed: int) -> None:
        super().__init__()
        self.vision, self.norm, self.projection = vision, qformer.summary_norm, qformer.summary_projection
        self.dropout = keras.layers.Dropout(_DROPOUT, seed=seed)
        self.things = Linear(qformer.config.hidden_size, things, None)
        self.places = Linear(qformer.config.hidden_size, places, None)

    def call(self, hidden: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Hidden states after `first` blocks, `[b, tokens, hidden]`, to scores `[b, things]` and `[b, places]`."""
        summary = self.norm(summarize(self.vision.features(hidden, first)))[:, 0]
        seen = self.dropout(self.projection(summary))
        return self.things(seen), self.places(seen)


class Recognition:
    """The task of naming a picture's main thing and its place.

    Args:
        store: hidden states after the ViT's frozen blocks.
    """

    def __init__(
        self,
        pictures: Sequence[Labelled],
        store: FeatureStore,
        vision: VisionTransformer,
        qformer: QFormer,
        *,
        name: str = "recognition",
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.name = f"{name}, seed {seed}, {len(pictures)} pictures, {batch_size} a batch"
        self._pictures, self._store, self._batch_size, self._seed = list(pictures), store, batch_size, seed
        self._thing, self._things = _numbered([one.main for one in pictures])
        self._place, self._places = _numbered([one.place for one in pictures])
        patches = vision.config.tokens - 1
        self._patches, self._seen = patches, math.ceil(_SEEN * patches)
        self.network = _Eye(vision, qformer, len(self._things), len(self._places), seed)
        self._pretrained = [(v, numpy_of(v)) for v in vision.trainable_variables]

    def prepare(self, seen: FeatureStore) -> None:
        """Begins with Fisher's discriminant of the untrained blocks' features, and its nearest class mean.

        Args:
            seen: what the untrained blocks make of the pictures.
        """
        eye = self.network
        rows = ops.convert_to_numpy(eye.norm(summaries([one.picture for one in self._pictures], seen)))[:, 0]
        weight, bias = discriminant(rows, [one.main for one in self._pictures], eye.projection.weight.shape[0])
        eye.projection.assign(weight, bias)
        first = nearest_mean(rows @ weight.T + bias, [one.main for one in self._pictures])
        eye.things.assign(first.weight, first.bias)

    def finish(self) -> None:
        """Goes part of the way back to the pretrained blocks, which see more unlike drawings (arXiv 2109.01903)."""
        for variable, before in self._pretrained:
            variable.assign(_TRAINED_SHARE * numpy_of(variable) + (1 - _TRAINED_SHARE) * before)

    def classifiers(self) -> list[Classifier]:
        """What names the main thing, and the place, from the Q-Former's summary projection."""
        eye = self.network
        return [Classifier(names, numpy_of(layer.weight), numpy_of(layer.bias))
                for names, layer in ((self._things, eye.things), (self._places, eye.places))]  # fmt: skip

    def chosen(self, step: int) -> npt.NDArray[np.int64]:
        """Indices of a step's pictures: every picture once before any comes again."""
        return shuffled(self._seed, step, self._batch_size, len(self._pictures))

    def batch(self, step: int) -> Batch:  # noqa: D102
        rows = self.chosen(step)
        states = self._store[[self._pictures[row].picture for row in rows]]
        rng = np.random.default_rng([self._seed, step])
        kept = [0, *(1 + np.sort(rng.permutation(self._patches)[: self._seen]))]
        share = rng.beta(_BLEND, _BLEND, len(rows)).astype(np.float32)
        share = np.maximum(share, 1 - share)  # the batch's own picture has the larger part
        own = states[:, kept].astype(np.float32)
        blend = share[:, None, None] * own + (1 - share)[:, None, None] * np.roll(own, 1, axis=0)
        return {"hidden": blend, "share": share, "thing": self._thing[rows], "place": self._place[rows]}

    def loss(self, batch: Mapping[str, Tensor], training: bool) -> Mapping[str, Tensor]:  # noqa: D102
        things, places = self.network(batch["hidden"], first=self._store.end, training=training)
        named = ops.equal(ops.cast(ops.argmax(things, axis=1), "int32"), batch["thing"])
        loss = _blended(things, batch["thing"], batch["share"])
        loss += _PLACE_WEIGHT * _blended(places, batch["place"], batch["share"])
        return {"loss": loss, "main_named": ops.mean(ops.cast(named, "float32"))}

    def describe(self, step: int) -> str:  # noqa: D102
        return "pictures " + ", ".join(self._pictures[row].picture.name for row in self.chosen(step))

    def learning_rate_factor(self, variable: Any) -> float:
        """The pretrained blocks learn more slowly than what is new."""
        return _VISION_FACTOR if any(variable is v for v in self.network.vision.trainable_variables) else 1.0


def _numbered(names: Sequence[str]) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:
    """Each name as the number of its class, and the classes' names."""
    classes, numbers = np.unique(np.asarray(names), return_inverse=True)
    return numbers.astype(np.int32), tuple(map(str, classes))


def _blended(scores: Tensor, own: Tensor, share: Tensor) -> Tensor:
    """The mean cross-entropy with smoothed labels (arXiv 1512.00567) of blends with the picture before.

    Args:
        scores: `[b, classes]`.
        own: of the picture itself, int `[b]`.
        share: of the picture itself in the blend, `[b]`.
    """
    likely = ops.log_softmax(scores)
    first, second = (ops.take_along_axis(likely, c[:, None], axis=1)[:, 0] for c in (own, ops.roll(own, 1)))
    right = share * first + (1 - share) * second
    return -(1 - _SMOOTHING) * ops.mean(right) - _SMOOTHING * ops.mean(likely)
