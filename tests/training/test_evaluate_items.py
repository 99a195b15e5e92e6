from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from seed_story.errors import PictureError, UsageError
from tests.training.held_out import draw, storybook, write_lines
from training.evaluation.items import PictureItem, read_items, story_seed, subset


def test_reads_the_storybook(tmp_path: Path) -> None:
    items = read_items(storybook(tmp_path) / "grounding.jsonl")
    assert len(items) == 6
    assert items[1] == PictureItem("g1", tmp_path / "pictures/g1.png", "thing 1", ("thing 1",), "style", None)


def test_what_may_be_left_out(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", 0)
    file = write_lines(tmp_path / "own.jsonl", [{"image": "a.png", "concept": "fox", "group": "photo"}])
    assert read_items(file) == [PictureItem("a.png", tmp_path / "a.png", "fox", ("fox",), "picture", "photo")]


def test_a_folder_names_its_concepts(tmp_path: Path) -> None:
    for name in ("fox.jpg", "hot_air_balloon_2.png", "Teddy-Bear (3).PNG", "sea lion 07.webp"):
        draw(tmp_path / "x.png", 0).rename(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    items = read_items(tmp_path)
    assert {item.concept for item in items} == {"fox", "hot air balloon", "teddy bear", "sea lion"}
    assert all(item.accepted == (item.concept,) and item.split == "picture" for item in items)


GOOD = {"id": "a", "image": "a.png", "concept": "fox", "accepted": ["fox"], "split": "picture"}


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("nonsense", "JSONDecodeError"),
        ("[1]", "TypeError"),
        (json.dumps({**GOOD, "accepted": "fox"}), "accepted"),
        (json.dumps({**GOOD, "accepted": ["fox", ""]}), "accepted"),
        (json.dumps({**GOOD, "split": "train"}), "train"),
        (json.dumps({"id": "a", "image": "a.png"}), "concept"),
        (json.dumps({**GOOD, "image": 3}), "TypeError"),
    ],
)
def test_a_line_that_is_no_picture(tmp_path: Path, line: str, part: str) -> None:
    draw(tmp_path / "a.png", 0)
    (tmp_path / "own.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(UsageError, match=r"line 3 of .*own\.jsonl") as caught:
        read_items(tmp_path / "own.jsonl")
    assert part in str(caught.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no pictures"):
        read_items(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="holds no pictures"):
        read_items(tmp_path)
    draw(tmp_path / "12.png", 0)
    with pytest.raises(UsageError, match=r"12\.png"):
        read_items(tmp_path)
    with pytest.raises(PictureError, match="the picture of a is missing"):
        read_items(write_lines(tmp_path / "own.jsonl", [GOOD]))


def test_a_subset_is_even_seeded_and_in_order() -> None:
    items = [(key, n) for key, count in (("a", 50), ("b", 5), ("c", 1)) for n in range(count)]
    got = subset(items, 12, seed=3, key=lambda item: item[0])
    assert Counter(key for key, _ in got) == {"a": 6, "b": 5, "c": 1}
    assert got == sorted(got, key=items.index) == subset(items, 12, seed=3, key=lambda item: item[0])
    assert got != subset(items, 12, seed=4, key=lambda item: item[0])
    assert subset(items, None, 0) == subset(items, 56, 0) == items
    assert len(subset(items, 7, 0)) == len(set(subset(items, 7, 0))) == 7


def test_seeds_differ_by_run_and_by_name() -> None:
    seeds = {story_seed(run, name) for run in range(10) for name in "abc"}
    assert len(seeds) == 30 and min(seeds) >= 0
