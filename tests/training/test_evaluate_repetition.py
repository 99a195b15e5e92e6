from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from seed_story.story import SEEDStory
from tests.training.held_out import draw
from training.evaluation.items import PictureItem, story_seed
from training.evaluation.repetition import ToldStory, distinct, has_loop, longest_repeat, repetition, to_markdown


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [("a b a b c", 1, 3 / 5), ("a b a b c", 2, 3 / 4), ("a b a b c", 3, 1.0), ("a a a a", 2, 1 / 3), ("a", 2, 1.0)],
)
def test_distinct(text: str, n: int, expected: float) -> None:
    assert distinct(text.split(), n) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "length"),
    [("a b c", 0), ("a b a", 1), ("a b c x a b c y", 3), ("a a a a", 3), ("a b a b a b", 4), ("", 0)],
)
def test_longest_repeat(text: str, length: int) -> None:
    assert longest_repeat(text.split()) == length


def fresh(count: int, mark: str) -> list[str]:
    return [f"{mark}{n}" for n in range(count)]


def test_four_words_four_times_are_a_loop() -> None:
    def times(count: int, words: str) -> list[str]:
        return [word for turn in range(count) for word in (*words.split(), f"x{turn}")]

    assert has_loop(times(4, "the fox ran home"))
    assert not has_loop(times(3, "the fox ran home"))
    assert not has_loop(times(9, "the fox ran"))


def test_a_long_run_twice_is_a_loop() -> None:
    run = fresh(13, "r")
    assert has_loop([*run, *fresh(30, "a"), *run])
    assert not has_loop([*run[:12], *fresh(30, "a"), *run[:12]])
    assert not has_loop(fresh(100, "a"))


@pytest.fixture(scope="module")
def model(loud_bundle: Path) -> Iterator[SEEDStory]:
    with SEEDStory(loud_bundle, threads=1) as made:
        yield made


def test_stories_are_the_runtimes_own(model: SEEDStory, tmp_path: Path) -> None:
    items = [PictureItem(f"p{n}", draw(tmp_path / f"{n}.png", n), "noise", ("noise",)) for n in range(2)]
    report, stories = repetition(model, items, tokens=40, seed=7)
    for item, story in zip(items, stories, strict=True):
        assert story.text == model((item.image, "Once upon a time,"), max_tokens=40, seed=story_seed(7, item.id))
        assert (story.tokens, story.ended) == (40, False)
    assert stories[0].text != stories[1].text
    assert report["stories"] == 2 and report["mean_tokens"] == 40 and report["ended_share"] == 0


def test_the_report_sums_up_its_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    item = PictureItem("a", Path("a.png"), "fox", ("fox",))
    queue = iter([
        ToldStory(item, "A b. a B c", tokens=9, ended=True),
        ToldStory(item, "the fox ran home " * 6, tokens=31, ended=False),
        ToldStory(item, "caf\ufffd " + " ".join(fresh(8, "w")), tokens=20, ended=False),
        ToldStory(item, "One", tokens=4, ended=True),
    ])  # fmt: skip
    monkeypatch.setattr("training.evaluation.repetition._tell", lambda *_: next(queue))
    report, stories = repetition(None, [item] * 4, tokens=50)
    assert len(stories) == report["stories"] == 4
    assert report["distinct_1"] == pytest.approx((3 / 5 + 4 / 24 + 1 + 1) / 4)
    assert report["distinct_2"] == pytest.approx((3 / 4 + 4 / 23 + 1 + 1) / 4)
    assert report["distinct_3"] == pytest.approx((1 + 4 / 22 + 1 + 1) / 4)
    assert (report["loop_share"], report["broken_character_share"], report["ended_share"]) == (0.25, 0.25, 0.5)
    assert (report["mean_words"], report["mean_tokens"]) == ((5 + 24 + 9 + 1) / 4, 16)
    assert (report["longest_repeat_words"], report["mean_longest_repeat_words"]) == (20, (2 + 20) / 4)
    low, high = report["loop_share_interval"]
    assert 0 <= low < 0.25 < high <= 1


def test_markdown_is_unedited_and_relative(tmp_path: Path) -> None:
    text = 'Once, *it* said\n\n"# no\ufffd"  '
    story = ToldStory(PictureItem("a", tmp_path / "data" / "a b.png", "sea lion", ("sea lion",)), text, 3, True)
    got = to_markdown([story, story], tmp_path / "docs")
    block = f"![../data/a b.png](<../data/a b.png>)\n\n{text}\n"
    assert got == f"## 1. sea lion\n\n{block}\n## 2. sea lion\n\n{block}"
