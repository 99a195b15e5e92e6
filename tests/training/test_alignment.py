"""Stage 1: its loss against a loop over queries in NumPy, its batches, and that it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.layers import numpy_of
from model.qformer import QFormer, summarize
from seed_story.config import QFormerConfig, VisionConfig
from tests.compare import assert_close
from tests.training.fakes import Features, byte_story_tokenizer
from training.alignment import Alignment, WordLoss
from training.discriminant import Classifier
from training.loop import train
from training.names import NameTable, name_table
from training.pictures import Labelled
from training.task import Schedule

WIDTH, SIZE = 2, 24
QUERIES = 9  # one more than the slots take
NAMES = ("ox", "bee", "cat", "fog", "sea", "w")
EMBEDDINGS = np.random.default_rng(3).standard_normal((320, SIZE)).astype(np.float32) + 0.5
LABELLED = [
    Labelled(Path("a.png"), ("ox", "bee", "cat"), "sea"),
    Labelled(Path("b.png"), ("bee",), "fog"),
    Labelled(Path("c.png"), ("cat", "w"), "sea"),
    Labelled(Path("d.png"), ("w", "ox", "bee", "cat"), "fog"),  # a fourth thing has no slot
    Labelled(Path("e.png"), (), "sea"),
]


@pytest.fixture(scope="module")
def table() -> NameTable:
    return name_table(NAMES, byte_story_tokenizer(), QUERIES)


def labels_of(table: NameTable) -> np.ndarray:
    return np.stack([table.label(one.things, one.place) for one in LABELLED])


def reference(said: np.ndarray, labels: np.ndarray, words: np.ndarray) -> np.ndarray:
    """The loss as its docstrings tell it, in float64: one picture, one order and one query after the other."""
    mean = words.mean(0)
    spread = np.mean((words - mean) ** 2)
    losses = []
    for picture, label in zip(said.astype(np.float64), labels, strict=True):
        of_orders = []
        for order in ((0, 1, 2, 3), (0, 2, 1, 3)):  # the main thing and the place have their slots
            total = weights = 0.0
            for slot, source in enumerate(order):
                for place in range(WIDTH):
                    query, wanted = picture[slot * WIDTH + place], label[source * WIDTH + place]
                    cosines = [
                        (query - mean) @ (word - mean) / np.linalg.norm(query - mean) / np.linalg.norm(word - mean)
                        for word in words
                    ]
                    scores = 16 * np.array(cosines)
                    entropy = np.log(np.exp(scores).sum()) - scores[wanted]
                    away = np.mean((query - words[wanted]) ** 2) / spread
                    weight = (2 if slot == 0 else 1) * (0.15 if wanted == 0 else 1)
                    total, weights = total + weight * (entropy + away / 2), weights + weight
            of_orders.append(total / weights)
        losses.append(min(of_orders))
    return np.array(losses)


def wanted_words(table: NameTable) -> np.ndarray:
    """Exactly what the labels ask for, and something in the free query: float32 `[pictures, 9, SIZE]`."""
    words = EMBEDDINGS[table.token_ids][labels_of(table)]
    return np.concatenate([words, np.ones((len(words), 1, SIZE), np.float32)], axis=1)


def slots(said: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """The same words with their slots in another order."""
    return said[:, [*(slot * WIDTH + place for slot in order for place in range(WIDTH)), 8]]


def test_word_loss_equals_the_reference(table: NameTable) -> None:
    said = np.random.default_rng(1).standard_normal((5, 9, SIZE)).astype(np.float32)
    said[2] = slots(wanted_words(table), (0, 2, 1, 3))[2] + 0.1 * said[2]  # whose second order is the better one
    words = EMBEDDINGS[table.token_ids].astype(np.float64)
    got = WordLoss(table, EMBEDDINGS)(said, labels_of(table))
    assert_close(got, reference(said, labels_of(table), words), "numpy_reference")


def test_any_other_word_costs_more_than_the_wanted_one(table: NameTable) -> None:
    loss, labels, best = WordLoss(table, EMBEDDINGS), labels_of(table), wanted_words(table)
    least = np.asarray(loss(best, labels))
    for query in range(8):
        for index, token in enumerate(table.token_ids):
            said = best.copy()
            said[:, query] = EMBEDDINGS[token]
            other = labels[:, query] != index
            assert (np.asarray(loss(said, labels))[other] > least[other] + 1e-3).all(), (query, index)


def test_a_word_of_the_wrong_size_costs_more(table: NameTable) -> None:
    """Its direction is right; only the distance tells."""
    loss, labels, best = WordLoss(table, EMBEDDINGS), labels_of(table), wanted_words(table)
    mean = EMBEDDINGS[table.token_ids].mean(0)
    for factor in (0.5, 3):
        assert (np.asarray(loss(mean + factor * (best - mean), labels)) > np.asarray(loss(best, labels))).all()


def test_only_the_two_lesser_things_may_change_places(table: NameTable) -> None:
    loss, labels, best = WordLoss(table, EMBEDDINGS), labels_of(table), wanted_words(table)
    least = np.asarray(loss(best, labels))
    assert_close(loss(slots(best, (0, 2, 1, 3)), labels), least, "same_maths")
    for order in ((1, 0, 2, 3), (0, 1, 3, 2), (3, 1, 2, 0)):
        assert (np.asarray(loss(slots(best, order), labels))[:4] > least[:4] + 0.1).all(), order


def test_queries_beyond_the_slots_are_free(table: NameTable) -> None:
    loss, labels, said = WordLoss(table, EMBEDDINGS), labels_of(table), wanted_words(table)
    before = np.asarray(loss(said, labels))
    said[:, 8] = 100
    np.testing.assert_array_equal(np.asarray(loss(said, labels)), before)


def test_first_words_are_the_nearest(table: NameTable) -> None:
    np.testing.assert_array_equal(
        np.asarray(WordLoss(table, EMBEDDINGS).first_words(wanted_words(table)))[:, :8], labels_of(table)
    )


def alignment(table: NameTable, *, batch_size: int = 3, seed: int = 0) -> Alignment:
    config = replace(QFormerConfig.tiny(), num_queries=8, memory_names=table.memory_size)
    return Alignment(LABELLED, features(), QFormer(config, seed=2), table, EMBEDDINGS, batch_size=batch_size, seed=seed)


def features() -> Features:
    config = VisionConfig.tiny()
    return Features(config.feature_layer, config.tokens, config.hidden_size)


def test_every_picture_comes_once_an_epoch(table: NameTable) -> None:
    rows = np.concatenate([alignment(table).chosen(step) for step in range(10)])
    epochs = rows.reshape(6, 5)
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = np.concatenate([alignment(table, seed=1).chosen(step) for step in range(10)])
    assert (other != rows).any()


def test_batch_depends_on_the_step_alone(table: NameTable) -> None:
    """Not on what was asked before, as a training that goes on must see."""
    in_order, task = [alignment(table).batch(step) for step in range(7)], alignment(table)
    for step in (6, 2, 2, 0, 5, 1):
        again = task.batch(step)
        for name, values in in_order[step].items():
            np.testing.assert_array_equal(again[name], values)


def test_batch_holds_the_chosen_pictures(table: NameTable) -> None:
    task = alignment(table)
    batch, rows = task.batch(4), task.chosen(4)
    assert batch["summary"].shape == (3, 1, 48)
    for row, index in enumerate(rows):
        seen = features()[[LABELLED[index].picture]][0].astype(np.float32)
        expected = np.concatenate([seen[0], seen[1:].mean(0), seen[1:].max(0)])
        assert_close(batch["summary"][row, 0], expected, "same_maths")
        np.testing.assert_array_equal(batch["labels"][row], labels_of(table)[index])
        assert LABELLED[index].picture.name in task.describe(4)


def test_loss_is_the_mean_of_the_pictures_losses(table: NameTable) -> None:
    """Of what the Q-Former says from the summary, the patches closed; noise and dropout come in training only."""
    task = alignment(table)
    task.prepare()
    rows = task.chosen(0)
    hidden = features()[[LABELLED[row].picture for row in rows]].astype(np.float32)
    embeddings = task.network(hidden)
    batch = task.batch(0)
    expected = np.asarray(task.words(embeddings, batch["labels"])).mean()
    assert_close(task.loss(batch, False)["loss"], expected, "same_maths")


def test_only_the_slots_that_begin_with_nothing_learn(table: NameTable) -> None:
    task = alignment(table)
    found = {v.path: task.learning_rate_factor(v) for v in task.network.trainable_variables}
    fast = {v.path for scores in task.network.memory.scores[1:3] for v in scores.trainable_variables}
    assert len(fast) == 4 and {path for path, factor in found.items() if factor == 1} == fast
    assert {found[path] for path in found.keys() - fast} == {0}


def test_prepared_summaries_tell_pictures_apart(table: NameTable) -> None:
    task, same = alignment(table), alignment(table)
    task.prepare()
    same.prepare()
    qformer = task.network
    assert_close(qformer.summary_projection.weight, numpy_of(same.network.summary_projection.weight), "exact")
    summaries = summarize(features()[[one.picture for one in LABELLED]].astype(np.float32))
    points = np.asarray(qformer.summary_projection(qformer.summary_norm(summaries)))[:, 0]
    apart = np.linalg.norm(points[:, None] - points[None], axis=-1)[~np.eye(5, dtype=bool)]
    assert apart.min() > 0.5


def words_of_memory(table: NameTable, name: str) -> np.ndarray:
    """The embeddings of a name's tokens, filled up with the filler's: `[WIDTH, SIZE]`."""
    return EMBEDDINGS[table.token_ids[table.names[name] if name else [0, 0]]]


def test_memory_begins_with_the_names_and_says_the_nearest(table: NameTable) -> None:
    """Without what was recognized: the nearest class mean; here each picture's own, but for the two by the sea."""
    task = alignment(table)
    task.prepare()
    memory = task.network.memory
    held = np.asarray(memory.values.weight).T.reshape(table.memory_size, WIDTH, SIZE)
    assert_close(held[0], EMBEDDINGS[table.token_ids[[0, 0]]], "exact")  # nothing: fillers
    for name in NAMES:
        assert_close(held[table.memory_row(name)], words_of_memory(table, name), "exact")
    summaries = summarize(features()[[one.picture for one in LABELLED]].astype(np.float32))
    start = task.network.summary_projection(task.network.summary_norm(summaries))
    said = np.asarray(memory(start)).reshape(len(LABELLED), 4, WIDTH, SIZE)
    assert_close(task.network.read(summaries), said.reshape(len(LABELLED), -1, SIZE), "exact")  # and nothing else
    for picture, one in zip(said, LABELLED, strict=True):
        for slot, name in ((0, one.main), (3, one.place)):
            distances = {n: np.linalg.norm(picture[slot] - words_of_memory(table, n)) for n in ("", *NAMES)}
            assert min(distances, key=lambda n: distances[n]) == name


def test_memory_takes_over_what_was_recognized(table: NameTable) -> None:
    rng, task = np.random.default_rng(6), alignment(table)
    before = numpy_of(task.network.summary_projection.weight)
    size = task.network.config.hidden_size
    things, places = (
        Classifier(
            names, rng.standard_normal((len(names), size)).astype(np.float32), rng.random(len(names), np.float32)
        )
        for names in (("w", "ox"), ("sea", "fog", "bee"))
    )
    task.prepare([things, places])
    assert_close(task.network.summary_projection.weight, before, "exact")
    start = rng.standard_normal((7, 1, size)).astype(np.float32)
    for slot, known in ((0, things), (3, places)):
        scores = np.asarray(task.network.memory.scores[slot](start))[:, 0]
        rows = [table.memory_row(name) for name in known.names]
        assert_close(scores[:, rows], start[:, 0] @ known.weight.T + known.bias, "same_maths")
        others = np.delete(scores, rows, axis=1)
        assert_close(others, np.full(others.shape, known.bias.min() - 20), "same_maths")


def test_it_learns_to_name(table: NameTable, tmp_path: Path) -> None:
    """The two lesser things; the main one and the place are known from the beginning, and stay so."""
    task = alignment(table, batch_size=5)
    task.prepare()
    memory = task.network.memory
    batch, before = task.batch(0), numpy_of(memory.scores[0].weight)
    assert train(task, tmp_path, Schedule(steps=120, learning_rate=5e-2)).finished
    said = np.asarray(task.words.first_words(task.network.read(batch["summary"])))
    for row, labels in zip(said, batch["labels"], strict=True):
        assert row.tolist() in [labels[_slots(order)].tolist() for order in ((0, 1, 2, 3), (0, 2, 1, 3))]
    assert_close(memory.scores[0].weight, before, "exact")
    assert all(not np.any(numpy_of(layer.cross_scale.lambda1)) for layer in task.network.layers)  # still closed


def _slots(order: Sequence[int]) -> list[int]:
    return [slot * WIDTH + place for slot in order for place in range(WIDTH)]


def test_name_says_what_must_not_change(table: NameTable) -> None:
    assert len({alignment(table).name, alignment(table, seed=1).name, alignment(table, batch_size=2).name}) == 3
