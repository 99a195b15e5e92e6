"""Recognition: its batches and its loss against NumPy, its first classifier, and that the last blocks learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model.layers import named_variables, numpy_of
from model.qformer import QFormer, summarize
from model.vit import VisionTransformer
from seed_story.config import QFormerConfig, VisionConfig
from tests.compare import assert_close
from tests.training.fakes import Features
from training.loop import train
from training.pictures import Labelled
from training.recognition import Recognition
from training.task import Schedule

VISION = VisionConfig.tiny()
LABELLED = [
    Labelled(Path(f"{number}.png"), things, place)
    for number, (things, place) in enumerate(
        [(("ox", "bee"), "sea"), (("bee",), "fog"), (("ox",), "fog"), (("cat", "ox"), "sea"), ((), "sea")]
    )
]
MAIN = ["ox", "bee", "ox", "cat", ""]


def store(end: int) -> Features:
    return Features(end, VISION.tokens, VISION.hidden_size)


@pytest.fixture
def task() -> Recognition:
    vision = VisionTransformer(VISION)
    vision.set_trainable_blocks(1)
    return Recognition(LABELLED, store(VISION.feature_layer - 1), vision, QFormer(QFormerConfig.tiny()), batch_size=4)


def test_batch_is_blends_of_the_same_patches(task: Recognition) -> None:
    for step in range(20):
        batch, rows = task.batch(step), task.chosen(step)
        states = store(0)[[LABELLED[row].picture for row in rows]].astype(np.float32)
        share = batch["share"][:, None, None]
        blends = share * states + (1 - share) * states[[-1, 0, 1, 2]]  # with the picture before in the batch
        kept = [int(np.argmin(np.abs(blends[0] - token).sum(1))) for token in batch["hidden"][0]]
        assert kept[0] == 0 and sorted(set(kept)) == kept  # the class token, and patches in their order
        assert len(kept) == 1 + -(-3 * (VISION.tokens - 1) // 8)
        assert_close(batch["hidden"], blends[:, kept], "same_maths")
        assert (batch["share"] >= 0.5).all() and (batch["share"] <= 1).all()


def test_batches_show_all_patches_in_time(task: Recognition) -> None:
    states = store(0)[[one.picture for one in LABELLED]].astype(np.float32)
    seen = set()
    for step in range(30):
        batch, row = task.batch(step), task.chosen(step)
        share = batch["share"][0]
        blend = share * states[row[0]] + (1 - share) * states[row[-1]]
        seen |= {int(np.argmin(np.abs(blend - token).sum(1))) for token in batch["hidden"][0]}
    assert seen == set(range(VISION.tokens))


def test_batch_depends_on_the_step_alone(task: Recognition) -> None:
    in_order = [task.batch(step) for step in range(4)]
    for step in (3, 0, 2):
        for name, values in task.batch(step).items():
            np.testing.assert_array_equal(values, in_order[step][name])


def test_labels_are_the_main_things_and_the_places(task: Recognition) -> None:
    for step in range(5):
        batch, rows = task.batch(step), task.chosen(step)
        for kind, names in (("thing", MAIN), ("place", [one.place for one in LABELLED])):
            numbers = {name: index for index, name in enumerate(sorted(set(names)))}
            assert batch[kind].tolist() == [numbers[names[row]] for row in rows]


def test_loss_equals_the_reference(task: Recognition) -> None:
    """Cross-entropy with the blended, smoothed distribution, one picture after the other, in float64."""
    task.prepare(store(VISION.feature_layer))
    rng = np.random.default_rng(0)
    task.network.places.weight.assign(rng.standard_normal(task.network.places.weight.shape).astype(np.float32))
    batch = task.batch(1)
    total = 0.0
    scores = task.network(batch["hidden"], first=VISION.feature_layer - 1)
    for kind, weight, logits in zip(("thing", "place"), (1.0, 0.3), scores, strict=True):
        logits = np.asarray(logits, np.float64)
        classes = logits.shape[1]
        for row in range(4):
            wanted = np.full(classes, 0.1 / classes)
            wanted[batch[kind][row]] += 0.9 * batch["share"][row]
            wanted[batch[kind][row - 1]] += 0.9 * (1 - batch["share"][row])
            total -= weight * wanted @ (logits[row] - np.log(np.exp(logits[row]).sum())) / 4
    assert_close(task.loss(batch, False)["loss"], total, "same_maths")


def test_first_scores_are_highest_for_the_nearest_mean(task: Recognition) -> None:
    """In the discriminant's space; what the picture shows, since no class here has two alike."""
    untrained = store(VISION.feature_layer)
    task.prepare(untrained)
    eye = task.network
    summary = eye.norm(summarize(untrained[[one.picture for one in LABELLED]].astype(np.float32)))[:, 0]
    points = np.asarray(eye.projection(summary))
    names = sorted(set(MAIN))
    means = np.stack([points[[main == name for main in MAIN]].mean(0) for name in names])
    nearest = np.linalg.norm(points[:, None] - means, axis=-1).argmin(1)
    scores = np.asarray(eye.things(points))
    assert scores.argmax(1).tolist() == nearest.tolist() == [names.index(main) for main in MAIN]
    distances = np.square(points[:, None] - means).sum(-1)
    slope = (scores - scores[:, :1]) / np.where(distances == distances[:, :1], np.nan, distances - distances[:, :1])
    assert np.nanstd(slope) < 1e-3 * abs(np.nanmean(slope))  # a score falls evenly with the squared distance


def test_pretrained_blocks_learn_more_slowly(task: Recognition) -> None:
    vision = {v.path for v in task.network.vision.trainable_variables}
    factors = {v.path: task.learning_rate_factor(v) for v in task.network.trainable_variables}
    assert vision and {path for path, factor in factors.items() if factor == 0.3} == vision
    assert {factor for path, factor in factors.items() if path not in vision} == {1.0}


def test_it_learns_to_name_through_the_last_blocks_alone(task: Recognition, tmp_path: Path) -> None:
    task.prepare(store(VISION.feature_layer))
    before = {name: numpy_of(v) for name, v in named_variables(task.network.vision).items()}
    assert train(task, tmp_path, Schedule(steps=60, learning_rate=1e-2)).finished
    after = named_variables(task.network.vision)
    changed = {name for name, values in before.items() if (values != numpy_of(after[name])).any()}
    last = f"encoder.layer.{VISION.feature_layer - 1}."
    assert changed and all(name.startswith(last) for name in changed)
    hidden = store(VISION.feature_layer - 1)[[one.picture for one in LABELLED]].astype(np.float32)
    things, places = task.network(hidden, first=VISION.feature_layer - 1)
    assert [sorted(set(MAIN))[index] for index in np.asarray(things).argmax(1)] == MAIN
    sides = [1 if one.place == "sea" else -1 for one in LABELLED]
    margins = np.diff(np.asarray(places))[:, 0] * sides
    # Places count a third, and pictures are blended: one of the five may take longer, which one a processor's sums say.
    assert (margins > 0).sum() >= 4 and margins.mean() > 0.1


def test_it_ends_part_of_the_way_back_to_the_pretrained_blocks(task: Recognition) -> None:
    vision = named_variables(task.network.vision)
    before = {name: numpy_of(v) for name, v in vision.items()}
    moved = {name: v for name, v in vision.items() if v.trainable}
    for variable in moved.values():
        variable.assign_add(np.ones(variable.shape, np.float32))
    task.finish()
    for name, variable in vision.items():
        assert_close(variable, before[name] + (0.7 if name in moved else 0), "same_maths")


def test_name_says_what_must_not_change(task: Recognition) -> None:
    assert "seed 0" in task.name and "5 pictures" in task.name and "4 a batch" in task.name
