from __future__ import annotations

import pytest

from training.evaluation.naming import first_sentences, names, sentence_ends


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("A cat sat.", "cat"),
        ("CATS! Everywhere.", "cat"),
        ("the cat's hat", "cat"),
        ("the cat\u2019s hat", "cat"),
        ("the cats' hats", "cat"),
        ("a fox-like fox", "fox"),
        ("two foxes", "fox"),
        ("a pile of berries", "berry"),
        ("three monkeys", "monkey"),
        ("wolves howled", "wolf"),
        ("sharp knives", "knife"),
        ("potatoes", "potato"),
        ("some children", "child"),
        ("the mice", "mouse"),
        ("two snowmen", "snowman"),
        ("a hot-air balloon", "hot air balloon"),
        ("Hot air\nballoons", "hot-air balloon"),
        ("a T-shirt", "t-shirt"),
        ("a t shirt", "T-shirt"),
        ("une fée", "fée"),
        ("a “fox”", "fox"),
        ("Mother Goose's geese", "goose"),
    ],
)
def test_named(text: str, name: str) -> None:
    assert names(text, [name])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("She had to catch it.", "cat"),
        ("a concatenation", "cat"),
        ("bobcat", "cat"),
        ("a hot balloon", "hot air balloon"),
        ("hot air", "hot air balloon"),
        ("balloon of hot air", "hot air balloon"),
        ("hot airs balloon", "hot air balloon"),
        ("a cates", "cat"),
        ("plaies", "play"),
        ("", "cat"),
        ("a cat", ""),
        ("a cat", "..."),
    ],
)
def test_not_named(text: str, name: str) -> None:
    assert not names(text, [name])


def test_any_accepted_name_will_do() -> None:
    assert names("The vixen slept.", ["fox", "vixen"])
    assert not names("The vixen slept.", ["fox", "wolf"])
    assert not names("The vixen slept.", [])


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three?", ["One.", " Two!", " Three?"]),
        ("Mr. Fox met Mrs. Hen. They spoke.", ["Mr. Fox met Mrs. Hen.", " They spoke."]),
        ("J. R. Bear ran. He hid.", ["J. R. Bear ran.", " He hid."]),
        ("It was I. He left.", ["It was I.", " He left."]),
        ("Well... no. Yes.", ["Well... no.", " Yes."]),
        ("Well… No. Yes.", ["Well…", " No.", " Yes."]),
        ('"Run!" said the fox. They ran.', ['"Run!" said the fox.', " They ran."]),
        ("“Run!” said the fox. They ran.", ["“Run!” said the fox.", " They ran."]),
        ('He said, "Run." "Why?" she asked.', ['He said, "Run."', ' "Why?" she asked.']),
        ("What?! Nothing.", ["What?!", " Nothing."]),
        ("It cost 3.50 in all. Cheap.", ["It cost 3.50 in all.", " Cheap."]),
        ("The Fox\n\nOnce there was one. It ran.", ["The Fox", "\n\nOnce there was one.", " It ran."]),
        ("One.\n\nTwo.", ["One.", "\n\nTwo."]),
        ("(It ran.) It hid.", ["(It ran.)", " It hid."]),
        ("... Then it ran. It hid.", ["... Then it ran.", " It hid."]),
        ("no end", []),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    ends = sentence_ends(text)
    assert [text[start:end] for start, end in zip([0, *ends], ends, strict=False)] == sentences


@pytest.mark.parametrize(
    "text", ["One. It ran.", "One. It ran. ", 'One. It ran."', 'One. It ran." "', "One. 3.", "One. Mr. "]
)
def test_an_end_is_open_until_what_follows_is_known(text: str) -> None:
    assert sentence_ends(text, finished=False) == [4]


def test_an_end_is_sure_once_something_follows() -> None:
    assert sentence_ends("One. It ran. S", finished=False) == [4, 12]
    assert sentence_ends("One. It ran. so", finished=False) == [4]


def test_first_sentences() -> None:
    assert first_sentences("One. Two. Three.", 2) == "One. Two."
    assert first_sentences("One. Two and", 2) == "One. Two and"
    assert first_sentences("", 2) == ""
