"""The table of concepts: complete, unambiguous, in good English; and a damaged one is refused by its line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from seed_story.errors import ConfigError
from training.storybook import concepts
from training.storybook.concepts import GROUPS, Concept, load_concepts
from training.storybook.splits import UNSEEN_CONCEPTS

HEADER = "name\tgroup\tarticle\temoji\talso"
# Where the first letter doesn't tell the first sound.
SOUNDS_LIKE_A_CONSONANT = ("unicorn", "unicycle", "uniform", "ukulele", "eucalyptus", "ewe", "one")
SOUNDS_LIKE_A_VOWEL = ("hour", "heir", "honest")


def test_there_are_enough_in_every_group() -> None:
    counts = Counter(concept.group for concept in load_concepts())
    assert sum(counts.values()) >= 300
    assert set(counts) == set(GROUPS)
    assert min(counts.values()) >= 10


def test_names_are_unique_in_stories_and_in_file_names() -> None:
    names = [concept.name.lower().replace(" ", "_") for concept in load_concepts()]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert all(name and name == name.strip("_") for name in names)


def test_articles_fit_the_first_sound() -> None:
    assert {concept.article for concept in load_concepts()} <= {"a", "an", "the", "some", ""}
    wrong = [
        concept.phrase
        for concept in load_concepts()
        if concept.article in ("a", "an") and (concept.article == "an") != begins_with_a_vowel(concept.name)
    ]
    assert wrong == []


def begins_with_a_vowel(name: str) -> bool:
    if name.lower().startswith(SOUNDS_LIKE_A_CONSONANT):
        return False
    return name[0].lower() in "aeiou" or name.lower().startswith(SOUNDS_LIKE_A_VOWEL)


def test_other_words_for_a_concept_are_others() -> None:
    for concept in load_concepts():
        assert concept.name not in concept.also
        assert len(set(concept.accepted)) == len(concept.accepted), concept.name
        assert all(word == word.strip() and word for word in concept.accepted), concept.name


def test_an_emoji_draws_one_concept() -> None:
    drawn = Counter(emoji for concept in load_concepts() for emoji in concept.emoji.split())
    assert [emoji for emoji, count in drawn.items() if count > 1] == []


def test_concepts_that_are_kept_to_test_with_exist() -> None:
    assert set(UNSEEN_CONCEPTS) <= {concept.name for concept in load_concepts()}


def test_words_of_a_concept() -> None:
    fox = Concept("fox", "\U0001f98a", "animal", "a", ("vixen",))
    assert (fox.phrase, fox.accepted) == ("a fox", ("fox", "vixen"))
    assert Concept("Santa", "", "person", "").phrase == "Santa"


def read(monkeypatch: pytest.MonkeyPatch, folder: Path, *lines: str) -> tuple[Concept, ...]:
    table = folder / "concepts.tsv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setattr(concepts, "_TABLE", table)
    return load_concepts.__wrapped__()


def test_reads_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = read(monkeypatch, tmp_path, HEADER, "fox\tanimal\ta\tF G\tvixen,beast", "sun\tweather\tthe\t\t")
    assert found == (Concept("fox", "F G", "animal", "a", ("vixen", "beast")), Concept("sun", "", "weather", "the"))


@pytest.mark.parametrize(
    "line",
    ["owl\tbird\tan\tO\t", "fox\tanimal\ta\tG\t", "owl\tanimal\tan\tO", "owl\tanimal\tan\tO\t\t", ""],
    ids=["unknown group", "there before", "column missing", "column too many", "empty"],
)
def test_refuses_a_bad_line_by_its_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match="line 3, isn't a new concept"):
        read(monkeypatch, tmp_path, HEADER, "fox\tanimal\ta\tF\t", line, "sun\tweather\tthe\t\t")


def test_refuses_other_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has other columns"):
        read(monkeypatch, tmp_path, "name\tgroup", "fox\tanimal")
