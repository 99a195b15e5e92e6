"""Packed and padded rows: every example once, none sees another, and the loss is as if it were alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.layers import named_variables
from model.story_model import StoryModel
from model.tokenizer_files import add_picture_tokens, byte_tokenizer
from seed_story.bundle import Prompt
from seed_story.config import StoryConfig
from seed_story.errors import UsageError
from tests.compare import assert_close
from tests.training.stories import story
from training.data import IGNORE, PICTURE, Example, StoryEncoder
from training.packing import Batch, batch, pack

QUERIES = StoryConfig.tiny().qformer.num_queries
LENGTH = 24


def example(name: int, text: int, pictures: int = 0, queries: int = 2) -> Example:
    """`text` tokens, all of them `name`, then pictures; the labels tell the positions apart."""
    ids = np.array([name] * text + [PICTURE] * pictures * queries, np.int32)
    paths = tuple(Path(f"{name}-{n}") for n in range(pictures))
    return Example(ids, 1000 * name + np.arange(len(ids), dtype=np.int32), paths)


@st.composite
def many_examples(draw: st.DrawFn) -> list[Example]:
    sizes = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 6)), min_size=1, max_size=20))
    return [example(name, text, pictures) for name, (text, pictures) in enumerate(sizes, 1)]


@given(many_examples())
@settings(max_examples=100, deadline=None)
def test_every_example_stands_once_in_a_row_of_its_own_places(examples: list[Example]) -> None:
    rows = pack(examples, LENGTH, num_queries=2)
    assert sorted(id(e) for row in rows for e in row) == sorted(map(id, examples))
    assert all(0 < sum(len(e.ids) for e in row) <= LENGTH for row in rows)
    # first fit: no row could have taken the first example of a later one
    for n, row in enumerate(rows):
        for later in rows[n + 1 :]:
            assert sum(len(e.ids) for e in row) + len(later[0].ids) > LENGTH
    made = batch(rows, LENGTH, num_queries=2)
    for e in examples:
        wanted = np.isin(made.labels, e.labels)
        row, at = np.nonzero(wanted)
        assert made.labels[wanted].tolist() == e.labels.tolist()
        assert len(set(row)) == 1 and at.tolist() == list(range(at[0], at[0] + len(e.ids)))
        assert made.ids[wanted].tolist() == e.ids.tolist()
        assert made.positions[wanted].tolist() == list(range(len(e.ids)))
        for r, t in zip(row, at, strict=True):
            assert np.flatnonzero(made.mask[r, t]).tolist() == at.tolist()
        shown = made.picture_index[wanted & (made.ids < 0)]
        expected = [(made.pictures.index(path), j) for path in e.pictures for j in range(2)]
        assert [divmod(int(i), 2) for i in shown] == expected
    check_padding(made, len(examples), sum(len(e.ids) for e in examples))


def check_padding(made: Batch, examples: int, used: int) -> None:
    padding = made.labels == IGNORE
    assert padding.sum() == padding.size - used
    assert not made.ids[padding].any() and not made.positions[padding].any()
    assert not made.picture_index[made.ids >= 0].any()
    rows, at = np.nonzero(padding)
    assert (made.mask[rows, at] == np.eye(LENGTH, dtype=bool)[at]).all()
    assert len(made.pictures) * 2 == (made.ids < 0).sum()
    dtypes = [array.dtype for array in (made.ids, made.labels, made.positions, made.picture_index, made.mask)]
    assert dtypes == [np.int32] * 4 + [np.bool_]


def test_first_fit_in_the_order_given() -> None:
    sizes = [14, 13, 9, 10, 2]
    rows = pack([example(n, size) for n, size in enumerate(sizes, 1)], LENGTH, num_queries=2)
    assert [[len(e.ids) for e in row] for row in rows] == [[14, 9], [13, 10], [2]]


def test_what_does_not_fit_is_refused() -> None:
    long, odd = example(1, LENGTH + 1), Example(*(np.zeros(3, np.int32),) * 2, (Path("a"),))
    with pytest.raises(UsageError, match=r"got 25 tokens; expected at most 24.*encode_within"):
        pack([long], LENGTH, num_queries=2)
    with pytest.raises(UsageError, match="too long"):
        batch([[example(1, 14), example(2, 11)]], LENGTH, num_queries=2)
    for call in (lambda: pack([odd], LENGTH, 2), lambda: batch([[odd]], LENGTH, 2)):
        with pytest.raises(UsageError, match="got 0 places; expected 1 pictures of 2"):
            call()
    with pytest.raises(UsageError, match="no row"):
        batch([], LENGTH, num_queries=2)


# The loss


@pytest.fixture(scope="module")
def model() -> StoryModel:
    made = StoryModel(StoryConfig.tiny())
    rng = np.random.default_rng(0)
    for variable in named_variables(made).values():  # loud enough that a wrong look shows
        if len(variable.shape) > 1:
            variable.assign(rng.normal(0, 0.3, variable.shape))
    return made


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    prompt = Prompt("<|im_start|>u", "!<|im_end|>", ("<|im_end|>",))
    encoder = StoryEncoder(add_picture_tokens(byte_tokenizer(), 320)[0], prompt, QUERIES)
    told = [story("A fox ran.", "It slept.", "End.", name="a"), story("A cat.", "A red dog.", name="b"), story("Hi.")]
    return [encoder.encode(s, shown) for s in told for shown in ("all", "first", "none")]


def pixels(paths: tuple[Path, ...]) -> np.ndarray:
    """Another picture for every path."""
    frames = [np.random.default_rng(list(str(path).encode())).random((28, 28, 3), np.float32) for path in paths]
    return np.reshape(frames, (len(paths), 28, 28, 3)).astype(np.float32)


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The cross-entropy of each learned label, in order, float64."""
    logits, labels = np.asarray(logits, np.float64)[labels != IGNORE], labels[labels != IGNORE]
    peak = logits.max(-1, keepdims=True)
    normal = peak[:, 0] + np.log(np.exp(logits - peak).sum(-1))
    return normal - logits[np.arange(len(labels)), labels]


def alone(model: StoryModel, e: Example) -> np.ndarray:
    """By the whole model, which fills places itself, from an example without padding."""
    pictures = pixels(e.pictures)[None] if e.pictures else None
    return losses(model(e.ids[None], pictures), e.labels[None])


def batched(model: StoryModel, made: Batch) -> np.ndarray:
    """As a trainer does it: pictures once, gathered by `picture_index`."""
    text = np.asarray(model.llama.embed(np.maximum(made.ids, 0)))
    embeddings = text
    if made.pictures:
        flat = np.asarray(model.qformer(model.vision(pixels(made.pictures)))).reshape(-1, text.shape[-1])
        embeddings = np.where((made.ids < 0)[..., None], flat[made.picture_index], text)
    return losses(model.llama(embeddings, mask=made.mask, positions=made.positions), made.labels)


@pytest.mark.parametrize("extra", [0, 1, 40])
def test_loss_does_not_depend_on_padding(model: StoryModel, examples: list[Example], extra: int) -> None:
    for e in examples[:4]:
        assert_close(batched(model, batch([[e]], len(e.ids) + extra, QUERIES)), alone(model, e), "same_maths")


def test_loss_does_not_depend_on_packing(model: StoryModel, examples: list[Example]) -> None:
    rows = pack(examples, 120, QUERIES)
    assert 1 < len(rows) < len(examples) and max(map(len, rows)) > 1
    expected = np.concatenate([alone(model, e) for row in rows for e in row])
    assert_close(batched(model, batch(rows, 120, QUERIES)), expected, "same_maths")


def test_the_pictures_of_these_losses_matter(model: StoryModel, examples: list[Example]) -> None:
    """Else the tests above could not tell a picture from another's."""
    made = batch([[examples[0]]], len(examples[0].ids), QUERIES)
    swapped = Batch(made.ids, made.labels, made.mask, made.positions, made.pictures[::-1], made.picture_index)
    assert np.abs(batched(model, made) - batched(model, swapped)).max() > 1e-3
