from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from model.layers import named_variables
from model.story_model import PICTURE, StoryModel
from seed_story.config import StoryConfig
from seed_story.errors import UsageError
from tests.compare import assert_close

Q = StoryConfig.tiny().qformer.num_queries


@pytest.fixture(scope="module")
def model() -> StoryModel:
    made = StoryModel(StoryConfig.tiny())
    rng = np.random.default_rng(0)
    for variable in named_variables(made.qformer).values():  # so that pictures differ
        variable.assign(rng.normal(0.1, 0.4, variable.shape))
    return made


def pictures(batch: int, n: int) -> np.ndarray:
    return np.random.default_rng(1).random((batch, n, 28, 28, 3), np.float32)


def story(*parts: object) -> list[int]:
    return [i for part in parts for i in (part if isinstance(part, list) else [PICTURE] * Q)]


def test_pictures_take_their_places_in_order(model: StoryModel) -> None:
    frames = pictures(2, 2)
    ids = np.array([story([3, 1], None, [4], None, [5]), story(None, None, [9, 8, 7, 6])])
    got = np.asarray(model.embed_story(ids, frames))
    for row in range(2):
        first, second = (np.asarray(model.qformer(model.vision(frames[row, n][None])))[0] for n in range(2))
        text = np.asarray(model.llama.embed(np.maximum(ids, 0)))[row]
        order = iter([*first, *second])
        expected = np.stack([next(order) if i < 0 else text[at] for at, i in enumerate(ids[row])])
        assert_close(got[row], expected, "same_maths")
    assert np.abs(first - second).max() > 1e-3


def test_a_place_is_never_looked_up(model: StoryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras wraps a negative id around to the last row, so that the result alone doesn't show it."""
    seen, embed = [], model.llama.embed
    monkeypatch.setattr(model.llama, "embed", lambda ids: seen.append(np.asarray(ids)) or embed(ids))
    model.embed_story(np.array([story([3, 1], None)]), pictures(1, 1))
    assert seen[0].tolist() == [[3, 1] + [0] * Q]


def test_call_is_the_decoder_on_the_embedded_story(model: StoryModel) -> None:
    ids, frames = np.array([story([3, 1], None, [4])]), pictures(1, 1)
    expected = model.llama(model.embed_story(ids, frames))
    assert expected.shape == (1, ids.shape[1], model.config.llama.vocab_size)
    assert_close(model(ids, frames), expected, "same_maths")


def test_text_alone(model: StoryModel) -> None:
    ids = np.array([[3, 1, 319]])
    assert_close(model(ids), model.llama(model.llama.embed(ids)), "same_maths")


def test_mask_and_positions_reach_the_decoder(model: StoryModel) -> None:
    ids = np.array([[3, 1, 7, 9]])
    mask, positions = np.eye(4, dtype=bool), np.array([5, 6, 9, 11])
    expected = model.llama(model.llama.embed(ids), mask=mask, positions=positions)
    assert_close(model(ids, mask=mask, positions=positions), expected, "same_maths")
    assert np.abs(np.asarray(expected) - np.asarray(model(ids))).max() > 1e-4


def test_a_picture_more_than_the_places_goes_unread(model: StoryModel) -> None:
    ids, frames = np.array([story([3], None)]), pictures(1, 2)
    assert_close(model(ids, frames), model(ids, frames[:, :1]), "same_maths")


@pytest.mark.parametrize("n", [0, 1])
def test_a_place_without_a_picture_is_refused(model: StoryModel, n: int) -> None:
    ids, frames = np.array([story([3], None, None)]), pictures(1, n) if n else None
    for call in (model, model.embed_story):
        with pytest.raises(UsageError, match=f"got {2 * Q}; expected at most {n * Q}"):
            call(ids, frames)


@pytest.mark.parametrize("n", [0, 1])
def test_a_place_without_a_picture_is_nan_in_a_graph(model: StoryModel, n: int) -> None:
    ids, frames = np.array([story([3], None, None)]), pictures(1, n) if n else None
    got = np.asarray(tf.function(lambda t: model.embed_story(t, frames))(tf.constant(ids)))
    bad = np.isnan(got).all(axis=-1)[0]
    assert bad.tolist() == [False] + [False] * (n * Q) + [True] * ((2 - n) * Q)
    assert np.isfinite(got[0, ~bad]).all()


def test_traced_with_open_shapes_equals_eager(model: StoryModel) -> None:
    ids, frames = np.array([story([3, 1], None, [4])] * 2), pictures(2, 1)
    signature = [tf.TensorSpec((None, None), tf.int64), tf.TensorSpec((None, 1, 28, 28, 3))]
    traced = tf.function(model, input_signature=signature)
    assert_close(traced(ids, frames), model(ids, frames), "same_maths")


def test_trains_every_part_that_is_not_frozen(model: StoryModel) -> None:
    ids, frames = np.array([story([3, 1], None, [4, 5, 6])]), pictures(1, 1)
    with tf.GradientTape() as tape:
        logits = model(ids, frames, training=True)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(ids[:, -3:], logits[:, -4:-1]))
    variables = model.trainable_variables
    gradients = tape.gradient(loss, [v.value for v in variables])
    assert all(g is not None for g in gradients)
    names = {id(v): name for name, v in named_variables(model).items()}
    parts = {names[id(v)].split(".")[0] for v in variables}
    assert parts == {"vision", "qformer", "llama"}
    vision = {n for n in (names[id(v)] for v in variables) if n.startswith("vision.")}
    assert vision and all(name.startswith("vision.encoder.layer.1.") for name in vision)


_ELSEWHERE = """
import sys, numpy as np, keras
from seed_story.config import StoryConfig
from model.story_model import StoryModel
story = np.load(sys.argv[1])
assert keras.backend.backend() == "torch"
logits = StoryModel(StoryConfig.tiny())(story["ids"], story["pictures"])
np.save(sys.argv[2], keras.ops.convert_to_numpy(logits))
"""


def test_another_backend_computes_the_same_from_the_same_seed(tmp_path: Path) -> None:
    ids, frames = np.array([story([3, 1], None, [4, 5, 6])]), pictures(1, 1)
    given, got = tmp_path / "story.npz", tmp_path / "logits.npy"
    np.savez(given, ids=ids, pictures=frames)
    environment = {**os.environ, "KERAS_BACKEND": "torch", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", _ELSEWHERE, str(given), str(got)]
    subprocess.run(command, env=environment, check=True, timeout=120)
    assert_close(np.load(got), StoryModel(StoryConfig.tiny())(ids, frames), "backend")


def test_names_are_those_of_the_parts(model: StoryModel) -> None:
    names = named_variables(model)
    parts = [named_variables(part) for part in (model.vision, model.qformer, model.llama)]
    assert len(names) == sum(map(len, parts))
    assert {"vision.layernorm.bias", "qformer.query_tokens", "llama.model.norm.weight"} <= set(names)
