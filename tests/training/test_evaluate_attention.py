"""What words look at: told by hand, and counted in a real bundle's stories."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from export.__main__ import _cache, _parser
from seed_story.story import SEEDStory
from tests.training.held_out import storybook
from training.data import read_stories
from training.evaluate import main
from training.evaluation.attention import KINDS, NEWEST, Tally, attention, propose
from training.evaluation.perplexity import counted, encoder_of


@pytest.fixture(scope="module")
def model(loud_bundle: Path) -> Iterator[SEEDStory]:
    with SEEDStory(loud_bundle, threads=1) as made:
        yield made


def tally(picture: list[float], first: list[float], text: float = 0.001) -> Tally:
    """One token that sees a story of sinks, one picture, and text; `picture` and `first` are their masses."""
    made = Tally(len(picture), sinks=2)
    weights = np.array([*first, *[text] * 40, *picture, *[text] * 50])
    places = np.full(len(weights), -1)
    begin = len(first) + 40
    places[begin : begin + len(picture)] = np.arange(len(picture))
    made.add(np.arange(len(weights)), places, weights)
    made.pictures = 3
    return made


PICTURE = [0.01, 0.02, 0.03, 0.04, 0.05, 0.0, 0.06, 0.07, 0.08, 0.09, 0.1]


def test_kinds_by_hand() -> None:
    made = tally(PICTURE, [0.2, 0.1, 0.03, 0, 0, 0, 0, 0])
    mass, count = dict(zip(KINDS, made.mass, strict=True)), dict(zip(KINDS, made.count, strict=True))
    assert mass == pytest.approx({
        "text sinks": 0.3, "begin of picture": 0.01, "first of picture": 0.14, "middle of picture": 0.0,
        "last of picture": 0.3, "end of picture": 0.1, "newest text": 0.016, "other text": 0.03 + 74 * 0.001,
    })  # fmt: skip
    assert list(count.values()) == [2, 1, 4, 1, 4, 1, NEWEST, 80]


@pytest.mark.parametrize(
    ("picture", "sinks", "expected"),
    [
        ([0, 0, 0, 0, 0, 0.5], [0.4, 0.1, 0, 0, 0, 0, 0, 0], (2, 0, 1, 3)),  # the end alone, of all three pictures
        ([0.3, 0, 0, 0, 0.2, 0.5], [0, 0, 0, 0, 0, 0, 0, 0], (1, 1, 2, 3)),
        ([0.3, 0.3, 0.3, 0.31, 0.31, 0.31], [0.1] * 8, (8, 0, 4, 3)),  # a third picture rather than whole ones
        ([0.0009] * 6, [0.1] * 8, (8, 0, 0, 0)),  # text of the same age gets more
    ],
)
def test_what_is_proposed(picture: list[float], sinks: list[float], expected: tuple[int, ...]) -> None:
    proposal = propose(96, tally(picture, sinks))  # 12 slots for anchors
    found = tuple(proposal[name] for name in ("sinks", "picture_begin", "picture_end", "pictures"))
    assert found == expected


def test_the_exporter_takes_the_flags() -> None:
    text_only = _cache(_parser().parse_args(propose(96, tally([0] * 6, [0.1] * 8))["flags"].split()))
    assert (text_only.policy, text_only.sinks) == ("text-sink", 8)
    proposal = propose(96, tally([0.3, 0, 0, 0, 0.2, 0.5], [0.1, 0, 0, 0, 0, 0, 0, 0]))
    cache = _cache(_parser().parse_args(proposal["flags"].split()))
    made = (cache.slots, cache.sinks, cache.picture_begin, cache.picture_end, cache.pictures)
    assert made == (96, *(proposal[name] for name in ("sinks", "picture_begin", "picture_end", "pictures")))


def test_a_real_bundle(model: SEEDStory, tmp_path: Path) -> None:
    """Every word of every caption is asked, and its masses are 1, of as many tokens as the cache shows."""
    stories = read_stories(storybook(tmp_path) / "test.jsonl")
    report = attention(model, stories)
    examples = [encoder_of(model).encode(story, ends=False) for story in stories]
    asked = [np.flatnonzero(counted(model, example)) for example in examples]
    assert report["words"] == sum(map(len, asked)) > 20
    kinds = report["kinds"].values()
    assert sum(kind["total"] for kind in kinds) == pytest.approx(1, abs=1e-5)
    # The bundle's policy is text-sink: 2 sinks and the 30 newest tokens, whatever they are.
    visible = np.mean([min(at + 1, 32) for places in asked for at in places])
    assert sum(kind["tokens"] for kind in kinds) == pytest.approx(visible)
    assert report["kinds"]["text sinks"]["tokens"] == 2


def test_the_command(loud_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = storybook(tmp_path)
    command = ["attention", "--bundle", str(loud_bundle), "--data", str(data), "--limit", "1", "--threads", "1"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert all(kind in text for kind in KINDS)
    assert "python -m export --slots 32 " in text
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["metric"] == "attention"
    assert report["proposal"]["flags"] in text
