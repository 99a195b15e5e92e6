"""Stage 2's task: its batches, and its losses against the whole story model, one story at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from model.layers import Module, Tensor, named_variables, numpy_of
from model.llama import Llama
from model.picture_head import PictureHead
from model.qformer import QFormer
from model.story_model import StoryModel
from model.vit import VisionTransformer
from seed_story.bundle import Prompt
from seed_story.config import QFormerConfig, StoryConfig
from seed_story.contract import BEGIN_PICTURE
from seed_story.errors import UsageError
from tests.compare import assert_close
from tests.training.fakes import Features, byte_story_tokenizer
from tests.training.stories import story
from training.alignment import WordLoss
from training.data import IGNORE, StoryEncoder, StoryRecord
from training.names import name_table
from training.storytelling import Networks, Storytelling, foreseen_pool

CONFIG = StoryConfig.tiny()
QUERIES, TOKENS, SIZE = CONFIG.qformer.num_queries, CONFIG.vision.tokens, CONFIG.vision.hidden_size
ENCODER = StoryEncoder(byte_story_tokenizer(), Prompt("<|im_start|>", "\n", ("<|im_end|>",)), QUERIES)
BEGIN = ENCODER.tokenizer.token_id(BEGIN_PICTURE)
STORIES = [story(*(f"{n}: {'la ' * (page + 1)}" for page in range(1 + n % 3)), name=f"tale {n} ") for n in range(9)]
TABLE = name_table(("ox", "bee", "sea"), ENCODER.tokenizer, QUERIES)
LABELS = {page.picture: TABLE.label(("ox", "bee"), "sea") for tale in STORIES[::2] for page in tale.pages}


@pytest.fixture(scope="module", params=[1, 2], ids=["through a vision block", "on features"])
def networks(request: pytest.FixtureRequest) -> tuple[Networks, int]:
    return made_networks(request.param), request.param


def made_networks(end: int) -> Networks:
    vision, llama = VisionTransformer(CONFIG.vision, seed=1), Llama(CONFIG.llama, seed=3)
    vision.set_trainable_blocks(2 - end)
    net = Networks(vision, QFormer(QFormerConfig.tiny(), seed=2), llama, PictureHead(24, SIZE, 2, seed=4))
    for network in (vision, net.qformer, llama, net.head):  # loud, so that every part matters
        for variable in named_variables(network).values():
            if len(variable.shape) > 1:
                variable.assign(numpy_of(variable) * 8)
    return net


def task_of(net: Networks, end: int, stories: list[StoryRecord] = STORIES, **options: Any) -> Storytelling:
    words = WordLoss(TABLE, numpy_of(net.llama.model.embed_tokens.weight))
    store = Features(end, TOKENS, SIZE)
    return Storytelling(stories, ENCODER, store, net, words, LABELS, **{"length": 64, "rows": 2, **options})


class Seen(Module):
    """The ViT for a story model that gets hidden states instead of pixels."""

    def __init__(self, vision: VisionTransformer, end: int) -> None:
        super().__init__()
        self.vision, self.end = vision, end

    def call(self, hidden: Tensor) -> Tensor:
        return self.vision.features(hidden, self.end)


@dataclass
class Told:
    """One example of a batch, cut out of it again."""

    ids: np.ndarray
    targets: np.ndarray
    pictures: list[int]


def examples(batch: Mapping[str, np.ndarray]) -> list[Told]:
    """They begin at position 0 and go on with 1; padding stays at 0."""
    found, picture = [], 0
    for ids, targets, positions in zip(batch["ids"], batch["targets"], batch["positions"], strict=True):
        starts = np.flatnonzero((positions[:-1] == 0) & (positions[1:] == 1))
        for start in starts:
            end = start + 1
            while end < len(positions) and positions[end] == end - start:
                end += 1
            count = int((ids[start:end] == BEGIN).sum())
            found.append(Told(ids[start:end], targets[start:end], [*range(picture, picture + count)]))
            picture += count
    return found


def states_of(one: Told, net: Networks, end: int, hidden: np.ndarray) -> np.ndarray:
    """What the decoder makes of a single story, without batch, mask and padding: float64 `[t, hidden_size]`."""
    model = StoryModel(CONFIG, vision=Seen(net.vision, end), qformer=net.qformer, llama=net.llama)
    pictures = hidden[one.pictures][None].astype(np.float32) if one.pictures else None
    return np.asarray(net.llama.hidden(model.embed_story(one.ids[None], pictures)), np.float64)[0]


def test_next_token_loss_is_that_of_the_story_model(networks: tuple[Networks, int]) -> None:
    net, end = networks
    task, table = task_of(net, end), numpy_of(net.llama.model.embed_tokens.weight).astype(np.float64)
    for step in range(4):
        batch, costs = task.batch(step), []
        for one in examples(batch):
            head = table if net.llama.lm_head is None else numpy_of(net.llama.lm_head.weight)
            logits = states_of(one, net, end, batch["hidden"]) @ head.T
            for row, target in zip(logits, one.targets, strict=True):
                if target != IGNORE:
                    costs.append(np.logaddexp.reduce(row) - row[target])
        assert costs
        assert_close(task.loss(batch, False)["next_token"], np.mean(costs), "network")


def test_next_picture_is_foreseen_where_the_last_text_ended(networks: tuple[Networks, int]) -> None:
    """At the token that begins a picture; only pictures that something was told before."""
    net, end = networks
    task, seen_any = task_of(net, end), False
    for step in range(4):
        batch, distances = task.batch(step), []
        for one in examples(batch):
            states = states_of(one, net, end, batch["hidden"])
            for picture, at in list(zip(one.pictures, np.flatnonzero(one.ids == BEGIN), strict=True))[1:]:
                said = np.asarray(net.head(states[at : at + 1].astype(np.float32)), np.float64)[0]
                features = np.asarray(net.vision.features(batch["hidden"][picture : picture + 1].astype("f4"), end))[0]
                seen = np.stack([features[0], features[1:].mean(0)])  # a grid of 2 pools to one square
                cosines = (said * seen).sum(-1) / np.linalg.norm(said, axis=-1) / np.linalg.norm(seen, axis=-1)
                distances.append(1 - cosines.mean())
        seen_any |= bool(distances)
        assert_close(task.loss(batch, False)["next_picture"], np.mean(distances) if distances else 0.0, "network")
    assert seen_any


def test_words_are_those_of_the_labelled_pictures(networks: tuple[Networks, int]) -> None:
    net, end = networks
    task = task_of(net, end)
    words = WordLoss(TABLE, numpy_of(net.llama.model.embed_tokens.weight))
    for step in range(4):
        batch = task.batch(step)
        named = batch["named"] > 0
        queries = net.qformer(net.vision.features(batch["hidden"].astype(np.float32), end))
        costs = np.asarray(words(queries, batch["labels"]))[named]
        losses = task.loss(batch, False)
        assert_close(losses["words"], costs.mean() if named.any() else 0.0, "same_maths")
        total = losses["next_token"] + losses["words"] + 0.1 * losses["next_picture"]
        assert_close(losses["loss"], total, "same_maths")


def test_labels_belong_to_their_pictures() -> None:
    """Every picture of a labelled story has its label, no other has one."""
    task = task_of(made_networks(2), 2)
    store, named = task._store, 0
    for step in range(6):
        batch = task.batch(step)
        count = int((batch["ids"] == BEGIN).sum())
        for row in range(count):
            path = next(
                p.picture for s in STORIES for p in s.pages if (store[[p.picture]] == batch["hidden"][row]).all()
            )
            assert bool(batch["named"][row]) == (path in LABELS)
            np.testing.assert_array_equal(batch["labels"][row], LABELS.get(path, np.zeros(4)))
            named += path in LABELS
        assert not batch["named"][count:].any() and not batch["hidden"][count:].any()
    assert named


def test_without_labels_nothing_but_the_text_and_the_next_picture_counts() -> None:
    """As in the published StoryStream, whose lines don't say what a picture shows."""
    task = Storytelling(STORIES, ENCODER, Features(2, TOKENS, SIZE), made_networks(2), None, {}, length=64, rows=2)
    losses = {name: float(value) for name, value in task.loss(task.batch(0), True).items()}
    assert losses["words"] == 0 and all(np.isfinite(value) for value in losses.values())
    assert losses["loss"] == pytest.approx(losses["next_token"] + 0.1 * losses["next_picture"], rel=1e-6)


def test_pictures_matter_and_padding_does_not(networks: tuple[Networks, int]) -> None:
    net, end = networks
    task = task_of(net, end)
    step = next(step for step in range(6) if (task.batch(step)["ids"] == BEGIN).any())
    batch = task.batch(step)
    count = int((batch["ids"] == BEGIN).sum())
    before = {name: float(value) for name, value in task.loss(batch, False).items()}
    hidden = batch["hidden"].copy()
    hidden[:count] = -hidden[:count]
    assert abs(float(task.loss({**batch, "hidden": hidden}, False)["next_token"]) - before["next_token"]) > 1e-3
    hidden = batch["hidden"].copy()
    hidden[count:] = 7
    padding = batch["mask"].sum(axis=1) == 1  # seen by itself alone
    ids = np.where(padding, 65, batch["ids"])
    assert (ids != batch["ids"]).any()
    again = task.loss({**batch, "hidden": hidden, "ids": ids}, False)
    assert_close(np.array([float(again[name]) for name in before]), np.array([*before.values()]), "same_maths")


def test_begins_and_foreseen() -> None:
    task, later = task_of(made_networks(2), 2), 0
    for step in range(8):
        batch = task.batch(step)
        flat = batch["ids"].reshape(-1)
        begins = batch["begins"][: int((flat == BEGIN).sum())]
        np.testing.assert_array_equal(begins, np.flatnonzero(flat == BEGIN))
        assert (flat[begins + 1] < 0).all() and (flat[begins + QUERIES] < 0).all()
        expected = [number > 0 for one in examples(batch) for number in range(len(one.pictures))]
        np.testing.assert_array_equal(batch["foreseen"][: len(begins)], expected)
        assert not batch["foreseen"][len(begins) :].any()
        later += sum(expected)
    assert later


def test_batch_depends_on_the_step_alone() -> None:
    """Equal in a fresh task, and whatever was asked before, as a training that goes on must see."""
    net = made_networks(2)
    in_order, task = [task_of(net, 2).batch(step) for step in range(12)], task_of(net, 2)
    for step in (11, 3, 3, 0, 7):
        again = task.batch(step)
        for name, values in in_order[step].items():
            np.testing.assert_array_equal(again[name], values)
            assert again[name].dtype == values.dtype
    other = task_of(net, 2, seed=1)
    assert any((other.batch(step)["ids"] != in_order[step]["ids"]).any() for step in range(3))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 8), min_size=1, max_size=12), st.integers(1, 4), st.integers(16, 120), st.integers(0, 99)
)
def test_an_epoch_tells_every_story_once_in_batches_of_one_form(
    pages: list[int], rows: int, length: int, seed: int
) -> None:
    """However many pictures there are: those of a batch fit in its room."""
    stories = [story(*"x" * count, name=f"tale {n}:") for n, count in enumerate(pages)]
    task = task_of(NETWORKS, 2, stories, rows=rows, length=length, seed=seed)
    told: list[str] = []
    forms, step = set(), 0
    while len(told) < len(stories):
        batch = task.batch(step)
        forms.add(tuple((name, values.shape, str(values.dtype)) for name, values in batch.items()))
        assert batch["ids"].shape == (rows, length)
        named = task.describe(step).removeprefix("stories ").split(", ")
        assert len(named) == len(examples(batch))
        told, step = told + named, step + 1
    assert sorted(told) == sorted(one.id for one in stories)
    forms.add(tuple((name, values.shape, str(values.dtype)) for name, values in task.batch(step).items()))
    assert len(forms) == 1


NETWORKS = made_networks(2)


def test_too_long_first_page() -> None:
    task = task_of(NETWORKS, 2, [*STORIES, story("x" * 80, name="the long one")])
    with pytest.raises(
        UsageError, match=r"first page of story the long one is too long; got 89 tokens; expected at most 64"
    ):
        task.batch(0)


def test_learning_rate_factors() -> None:
    net = made_networks(1)
    task = task_of(net, 1, factors={"qformer": 0.2, "vision": 0.02})
    expected = {id(v): 0.2 for v in net.qformer.trainable_variables}
    expected |= {id(v): 0.02 for v in net.vision.trainable_variables}
    assert len(expected) > len(net.qformer.trainable_variables)
    for variable in task.network.trainable_variables:
        assert task.learning_rate_factor(variable) == expected.get(id(variable), 1.0)


@pytest.mark.parametrize(("grid", "pool"), [(16, 4), (2, 2), (7, 1), (14, 2), (1, 1)])
def test_foreseen_squares_divide_the_grid(grid: int, pool: int) -> None:
    assert foreseen_pool(grid) == pool


def test_network_holds_all_that_the_loss_reads() -> None:
    """The vision transformer only if its blocks are run."""
    for end, runs in ((1, True), (2, False)):
        net = made_networks(end)
        variables = {id(v) for v in task_of(net, end).network.variables}
        assert all((id(v) in variables) == runs for v in net.vision.variables)
        assert all(id(v) in variables for part in (net.qformer, net.llama, net.head) for v in part.variables)


def test_loss_can_be_traced() -> None:
    import tensorflow as tf

    task = task_of(NETWORKS, 2)
    batch = task.batch(0)
    traced = tf.function(lambda values: task.loss(values, False))(
        {k: ops.convert_to_tensor(v) for k, v in batch.items()}
    )
    assert_close(traced["loss"], task.loss(batch, False)["loss"], "same_maths")
