"""Names as slots of tokens: who stands where, what fills the rest, and what is cut off."""

from __future__ import annotations

import numpy as np
import pytest

from model.tokenizer_files import byte_tokenizer
from seed_story.tokenizer import StoryTokenizer
from training.names import FILLER, SLOTS, THINGS, NameTable, name_table

NAMES = ("fox", "owl", "hot air balloon", "sun", "sea")


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    return StoryTokenizer(byte_tokenizer())


@pytest.fixture(scope="module")
def table(tokenizer: StoryTokenizer) -> NameTable:
    return name_table(NAMES, tokenizer, num_queries=18)  # 4 a slot, and 2 that no slot has


def said(table: NameTable, tokenizer: StoryTokenizer, *things: str, place: str = "sea") -> list[str]:
    """A label as text, one string a slot."""
    label = table.label(things, place)
    assert (label.dtype, label.shape) == (np.int32, (SLOTS * table.width,))
    slots = table.token_ids[label].reshape(SLOTS, table.width)
    return [tokenizer.decode(slot.tolist()) for slot in slots]


def test_things_come_first_and_the_place_last(table: NameTable, tokenizer: StoryTokenizer) -> None:
    assert (THINGS, SLOTS, FILLER, table.width) == (3, 4, ",", 4)
    assert said(table, tokenizer, "owl", "fox", "sun") == [" owl", " fox", " sun", " sea"]


def test_slots_without_a_thing_hold_the_filler(table: NameTable, tokenizer: StoryTokenizer) -> None:
    assert said(table, tokenizer, "owl") == [" owl", ",,,,", ",,,,", " sea"]
    assert said(table, tokenizer) == [",,,,", ",,,,", ",,,,", " sea"]


def test_a_fourth_thing_is_left_out(table: NameTable, tokenizer: StoryTokenizer) -> None:
    assert said(table, tokenizer, "owl", "fox", "sun", "sea", place="fox") == [" owl", " fox", " sun", " fox"]


@pytest.mark.parametrize(("queries", "expected"), [(16, " hot"), (24, " hot a"), (80, " hot air balloon,,,,")])
def test_a_name_is_cut_off_or_filled_up(tokenizer: StoryTokenizer, queries: int, expected: str) -> None:
    table = name_table(NAMES, tokenizer, queries)
    assert said(table, tokenizer, "hot air balloon")[0] == expected


def test_the_table_holds_each_token_once_and_the_filler_first(tokenizer: StoryTokenizer) -> None:
    table = name_table(("fox", "ox", "fox"), tokenizer, 16)
    assert table.token_ids.dtype == np.int32
    assert [tokenizer.decode([int(i)]) for i in table.token_ids] == [",", " ", "f", "o", "x"]
    assert {name: index.tolist() for name, index in table.names.items()} == {"fox": [1, 2, 3, 4], "ox": [1, 3, 4, 0]}


def test_an_unknown_name_is_an_error(table: NameTable) -> None:
    with pytest.raises(KeyError, match="wolf"):
        table.label(["fox", "wolf"], "sea")
    with pytest.raises(KeyError, match="moon"):
        table.label(["fox"], "moon")


def test_words_that_several_names_share_are_in_the_table(tokenizer: StoryTokenizer) -> None:
    also = {"owl": ("bird",), "hen": ("bird", "chick"), "poodle": ("dog",), "yacht": ("boat",), "canoe": ("boat",)}
    table = name_table(("owl", "hen", "poodle", "dog"), tokenizer, 16, also)
    assert list(table.names) == ["owl", "hen", "poodle", "dog", "bird"]  # no boat was shown, and one chick is no kind
    worth = {(said, of): table.worth()[table.memory_row(said), table.memory_row(of)]
             for said in ("", *table.names) for of in ("", *table.names) if said != of}  # fmt: skip
    kinds = {("bird", "owl"), ("bird", "hen"), ("dog", "poodle")}
    assert {pair for pair, value in worth.items() if value} == kinds
    assert {value for pair, value in worth.items() if pair in kinds} == {np.float32(0.8)}
    assert np.all(np.diag(table.worth()) == 1) and table.worth().shape == (table.memory_size,) * 2
