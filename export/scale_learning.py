"""Learns the scales of a decoder's rounded matrices, so that it tells as the float decoder does.

The codes stay as GPTQ chose them, and each scale may change a little: few numbers to learn, and no rounding in the way
of their gradients (EfficientQAT, arXiv 2407.11062: end-to-end training of quantization parameters). What is brought
down is the Kullback-Leibler divergence from the float decoder at the words of training stories with their pictures, or
without any where the Q-Former is untrained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from export.decoder_graph import write_skeleton
from export.decoder_step import DecoderStep
from export.decoder_weights import TABLE, head_name
from export.learned_rotation import rotation_of
from export.learned_scales import file_name, write_scales
from export.lesson import Lesson
from export.rounding import Reading, gptq_grids, rounded_weights
from model.layers import Module, Tensor, numpy_of
from model.llama import rope_tables
from model.qformer import QFormer
from model.rotation import Doubles
from model.story_source import StorySource
from model.weights import fingerprint
from quantization.gptq import Floats, Grid
from quantization.recipe import Recipe
from seed_story.config import CacheConfig, LlamaConfig
from seed_story.contract import (
    MASKED,
    PREFILL_SIZES,
    Signature,
    Steps,
    TensorSpec,
    decoder_step,
    key_cache,
    value_cache,
)
from seed_story.errors import UsageError
from training.data import IGNORE, StoryEncoder, check_pictures, chunks, read_stories, text_encoders, training_file
from training.features import FeatureStore
from training.loop import planned, train
from training.recipe import data_fingerprint
from training.story_batches import StoryBatches, with_pictures
from training.task import Batch, Schedule

_PLACEHOLDER = 1000  # steps of a schedule whose length is measured first
_SLOTS = 8  # of the cache that a graph reads; all of them empty


class LearnedScales(Module):
    """By how much the scales of some matrices change: each is multiplied by one plus a variable `[outputs, groups]`.

    Args:
        matrices: by name, float32 `[outputs, inputs]`, rounded to their grids.
        grids: of these and perhaps of others.
    """

    def __init__(self, matrices: Mapping[str, Floats], grids: Mapping[str, Grid]) -> None:
        super().__init__()
        self._grouped = {}
        self.changes = {}
        for name, matrix in matrices.items():
            outputs, inputs = matrix.shape
            block = grids[name].block or inputs
            self._grouped[name] = tf.constant(matrix.reshape(outputs, -1, block))
            self.changes[name] = self.parameter(name, np.zeros((outputs, inputs // block), np.float32))

    def matrix(self, name: str) -> Tensor:
        """A matrix with its present scales, float32 `[outputs, inputs]`."""
        grouped = self._grouped[name]
        return tf.reshape(grouped * (1 + self.changes[name][..., None]), [grouped.shape[0], -1])


class ScaleLearning:
    """The task: see the top of this file.

    Args:
        stories: what is read; their pictures as the whole ViT sees them.
        qformer: of the float model; it gives the pictures' embeddings, and isn't changed.
        exact: the float decoder's weights, in the names of `weight_shapes`.
        rounded: those of them that are rounded.
        grids: of the matrices whose scales are learned.
        turn: what pictures' embeddings are turned by for a rotated decoder, `[hidden, hidden]`.
    """

    def __init__(
        self,
        stories: StoryBatches,
        qformer: QFormer,
        llama: LlamaConfig,
        exact: Mapping[str, Floats],
        rounded: Mapping[str, Floats],
        grids: Mapping[str, Grid],
        turn: Doubles | None,
        *,
        name: str,
    ) -> None:
        self.name = f"scales of {name}, {stories.name}"
        self._stories, self._qformer, self._llama, self._turn = stories, qformer, llama, turn
        self._rope = rope_tables(llama, range(llama.max_position))
        self._exact = {key: tf.constant(value) for key, value in exact.items()}
        self._rounded = {key: tf.constant(value) for key, value in rounded.items() if key not in grids}
        self.network = LearnedScales({key: rounded[key] for key in grids}, grids)

    def batch(self, step: int) -> Batch:  # noqa: D102
        made = self._stories[step]
        packed = made.packed
        cos, sin = (table[packed.positions] for table in self._rope)
        return {
            "ids": packed.ids, "targets": packed.labels, "mask": packed.mask, "picture_index": packed.picture_index,
            "hidden": made.hidden, "cos": cos, "sin": sin,
        }  # fmt: skip

    def describe(self, step: int) -> str:  # noqa: D102
        return self._stories.describe(step)

    def loss(self, batch: Mapping[str, Tensor], training: bool) -> Mapping[str, Tensor]:  # noqa: D102
        pictures = self._qformer(tf.cast(batch["hidden"], tf.float32))
        learned = {name: self.network.matrix(name) for name in self.network.changes}
        rows = [{name: value[row] for name, value in batch.items() if name != "hidden"}
                for row in range(batch["ids"].shape[0])]  # fmt: skip
        found = [self._row_loss(row, pictures, {**self._exact, **self._rounded, **learned}) for row in rows]
        lost, agreed, words = (tf.add_n(values) for values in zip(*found, strict=True))
        words = tf.maximum(words, 1.0)
        return {"loss": lost / words, "top1": agreed / words}

    def _row_loss(
        self, row: Mapping[str, Tensor], pictures: Tensor, weights: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of a row's learned words: the sum of their divergences, how many first choices agree, and their number."""
        at = tf.not_equal(row["targets"], IGNORE)
        exact, mine = (tf.boolean_mask(self._logits(row, pictures, w), at) for w in (self._exact, weights))
        expected, got = tf.stop_gradient(tf.nn.log_softmax(exact)), tf.nn.log_softmax(mine)
        agreed = tf.cast(tf.argmax(exact, -1) == tf.argmax(mine, -1), tf.float32)
        lost = tf.reduce_sum(tf.exp(expected) * (expected - got))
        return lost, tf.reduce_sum(agreed), tf.reduce_sum(tf.cast(at, tf.float32))

    def _logits(self, row: Mapping[str, Tensor], pictures: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What the exported graph would say after each token of a row of t: logits `[t, vocab]`."""
        size, llama = row["ids"].shape[0], self._llama
        text = tf.gather(weights[TABLE], tf.maximum(row["ids"], 0))
        shown = tf.gather(tf.reshape(pictures, [-1, llama.hidden_size]), row["picture_index"])
        if self._turn is not None:
            shown = tf.matmul(shown, self._turn.astype(np.float32), transpose_b=True)
        causal = tf.linalg.band_part(tf.ones([size, size], tf.bool), -1, 0)
        mask = tf.where(tf.logical_and(row["mask"], causal), 0.0, MASKED)
        signs = np.repeat(np.array([-1, 1], np.float32), llama.head_dim // 2)
        empty = tf.zeros([llama.num_kv_heads, _SLOTS, llama.head_dim])
        inputs = {
            "embeddings": tf.where((row["ids"] < 0)[:, None], shown, text),
            "cos": tf.repeat(row["cos"][:, None], 2, 1),
            "sin": tf.repeat((row["sin"] * signs)[:, None], 2, 1),
            "region": tf.zeros([2, _SLOTS]),
            "mask": tf.concat([tf.fill([size, _SLOTS], MASKED), mask], 1),
            **{cache(i): empty for cache in (key_cache, value_cache) for i in range(llama.num_layers)},
            **weights,
        }
        return DecoderStep(llama, _SLOTS, _all_logits(llama, size))(inputs)["logits"]


def _all_logits(llama: LlamaConfig, size: int) -> Signature:
    """A prefill that gives the logits of all its tokens."""
    plain = decoder_step(llama, _SLOTS, size)
    return Signature(plain.name, plain.inputs, (TensorSpec("logits", (size, llama.vocab_size)), *plain.outputs[1:]))


def learn_scales(source: StorySource, recipe: Recipe, lesson: Lesson) -> Path | None:
    """Learns the scales of the layers' rounded matrices, or goes on; the file with them, or None if it was stopped.

    Raises:
        UsageError: the recipe names no learned scales.
        SeedStoryError: see `rounded_weights` and `training.loop.train`.
    """
    if recipe.scales is None:
        raise UsageError(f"the recipe {recipe.name} takes no learned scales", got='no "scales"',
                         expected="their name in the recipe, as in int4.json")  # fmt: skip
    for network in (source.model.vision, source.model.qformer, source.model.llama):
        network.trainable = False
    task = _task(source, recipe, lesson)
    schedule = Schedule(_PLACEHOLDER, lesson.learning_rate, weight_decay=0.0)
    if not train(task, lesson.out, planned(task, lesson.out, schedule, lesson.minutes)).finished:
        return None
    file = lesson.out / file_name(recipe.scales)
    write_scales({name: numpy_of(change) for name, change in task.network.changes.items()}, file)
    return file


def _task(source: StorySource, recipe: Recipe, lesson: Lesson) -> ScaleLearning:
    model, llama = source.model, source.model.config.llama
    file = training_file(lesson.data)
    stories = [chunk for story in read_stories(file) for chunk in chunks(story)]
    queries = model.config.qformer.num_queries
    store = FeatureStore(lesson.out / "features", lesson.data, model.vision, model.config.vision.feature_layer)
    if source.qformer_trained:
        check_pictures(stories)
        store.fill([page.picture for story in stories for page in story.pages])
        ways = with_pictures(StoryEncoder(source.tokenizer, source.prompt, queries))
    else:
        told, asked = text_encoders(source.tokenizer, source.prompt, queries)
        ways = [(asked, "none", 0.5), (told, "none", 0.5)]
    batches = StoryBatches(stories, ways, store, queries, length=lesson.length, rows=lesson.rows,
                           seed=lesson.seed)  # fmt: skip
    exact, rounded = _both(source, recipe, lesson)
    grids = {name: grid for name, grid in gptq_grids(llama, recipe).items() if name != head_name(llama)}
    turn = rotation_of(source, recipe)
    known = fingerprint(model)
    if turn is not None:
        known += f", turned {sha256(turn.astype(np.float32).tobytes()).hexdigest()}"
    return ScaleLearning(batches, model.qformer, llama, exact, rounded, grids, turn,
                         name=f"{recipe.name}, {known}, data {data_fingerprint([file])}")  # fmt: skip


def _both(source: StorySource, recipe: Recipe, lesson: Lesson) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """The decoder's weights, exact and rounded, as an export of the usual sizes has them."""
    llama, cache, size = source.model.config.llama, CacheConfig(), max(PREFILL_SIZES)
    untaught = replace(recipe, scales=None)  # without those that were learned before
    with tempfile.TemporaryDirectory(dir=lesson.out, prefix="work.") as folder:
        work = Path(folder)
        skeleton = write_skeleton(llama, cache.slots, Steps((size,), ()), work / "skeleton", rotated=recipe.rotated,
                                  sink_rows=cache.sink_rows(recipe.cache))  # fmt: skip
        reading = Reading(source, untaught, skeleton, cache, size, lesson.calibration, work)
        with tqdm(total=len(gptq_grids(llama, recipe)), desc="rounding", unit="matrix") as bar:
            make = rounded_weights(reading, bar.update)
            rounded = {name: make(name) for name in reading.shapes}
    return {name: reading.exact(name) for name in reading.shapes}, rounded
