"""Stories that outgrow the cache: what is read, in which order, with whose pictures; and what the figures say of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seed_story.config import CacheConfig
from seed_story.errors import UsageError
from seed_story.story import SEEDStory
from tests.training.held_out import draw, write_lines
from training.data import StoryRecord, read_stories
from training.evaluate import main
from training.evaluation.length import (
    Cache,
    PageScore,
    PageTold,
    Plan,
    Reading,
    cache_of,
    dense_cache,
    measure,
    score,
    scored_pages,
    tell,
)
from training.evaluation.length_report import markdown, plot, report
from training.evaluation.perplexity import encoder_of, looker, token_losses

PAGES = 6
THINGS = ("fox", "owl", "hen")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stories of six short pages, longer than the 32 slots of the cache."""
    folder = tmp_path_factory.mktemp("long")
    rows = []
    for n, thing in enumerate(THINGS):
        images = [f"pictures/s{n}_{page}.png" for page in range(PAGES)]
        for page, image in enumerate(images):
            draw(folder / image, 100 * n + page)
        captions = [f"{thing} {'abcdef'[page]}." for page in range(PAGES)]
        rows.append({"id": f"s{n}", "images": images, "captions": captions, "things": [[thing]] * PAGES,
                     "place": ["sea"] * PAGES})  # fmt: skip
    write_lines(folder / "test.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def stories(data: Path) -> list[StoryRecord]:
    return read_stories(data / "test.jsonl")


@pytest.fixture(scope="module")
def model(loud_bundle: Path) -> Iterator[SEEDStory]:
    with SEEDStory(loud_bundle, threads=1) as made:
        yield made


ANCHORS = CacheConfig(32, 2, 6, 1, 2)


@pytest.mark.parametrize("config", [ANCHORS, ANCHORS.under("window"), ANCHORS.under("text-sink")], ids=str)
def test_scores_are_the_losses_of_whole_stories(
    model: SEEDStory, stories: list[StoryRecord], config: CacheConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is what `token_losses`, which knows no pages, says when it is given the same pictures at the same places."""
    story, other = stories[:2]
    look, encoder = looker(model), encoder_of(model)
    found = score(Cache("any", model, config), story, other, [3, 5, 6], look)
    assert [one.page for one in found] == [3, 5, 6]
    begin = model.begin
    monkeypatch.setattr(model, "begin", lambda **_: begin(policy=config))
    mine = [look(page.picture) for page in story.pages]
    theirs = [look(page.picture) for page in other.pages]

    def losses(page: int, pictures: list[Any]) -> np.ndarray:
        """Of page `page` alone, which is the last of so many."""
        cut = replace(story, pages=story.pages[:page])
        every = token_losses(model, encoder.encode(cut, ends=False), pictures[:page])
        return every[-len(story.pages[0].caption.replace(" ", "")) :]  # a byte a token, and spaces don't count

    for one in found:
        own = [*mine[: one.page - 1], theirs[one.page - 1]]
        assert one.tokens == len("fox.a")
        assert one.loss == pytest.approx(losses(one.page, mine).sum(), rel=1e-4)
        assert one.other_own == pytest.approx(losses(one.page, own).sum(), rel=1e-4)
        assert one.other_first == pytest.approx(losses(one.page, [theirs[0], *mine[1:]]).sum(), rel=1e-4)
        assert abs(one.other_own - one.loss) > 1e-3


def test_what_a_cache_has_forgotten_makes_no_difference(model: SEEDStory, stories: list[StoryRecord]) -> None:
    """The first picture, with six pages in a window of 32 slots: it is out of sight for all that is in sight."""
    look, differences = looker(model), {}
    first = replace(ANCHORS, picture_eviction="first-and-last")
    for name, config in (("window", ANCHORS.under("window")), ("anchors", first)):
        (last,) = score(Cache(name, model, config), stories[0], stories[1], [6], look)
        differences[name] = abs(last.other_first - last.loss)
    assert differences["anchors"] > 10 * differences["window"]


def test_the_model_tells_a_page_to_each_picture(model: SEEDStory, stories: list[StoryRecord]) -> None:
    story = stories[0]
    things = {page.picture: ("fox", "log") for page in story.pages[1:]}
    cache = Cache("any", model, ANCHORS)
    pages = tell(cache, story, 3, things, seed=1)
    assert [page.page for page in pages] == [1, 2, 3]
    assert all(page.text for page in pages) and pages[0].text.startswith("Once upon a time,")
    assert [page.names_own for page in pages] == [None, False, False]
    assert pages == tell(cache, story, 3, things, seed=1) != tell(cache, story, 3, things, seed=2)


def test_scored_pages() -> None:
    assert scored_pages([10, 3], 2) == [2, 3, 9, 10]
    assert scored_pages([1, 2], 5) == [1, 2]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("window", CacheConfig(32, 0)),
        ("multimodal-sink", CacheConfig(32, 2, 6, 2, 4)),
        ("multimodal-sink:1+0", CacheConfig(32, 2, 4, 1, 0)),
        ("multimodal-sink:0+2:first-and-last", CacheConfig(32, 2, 4, 0, 2, "first-and-last")),
    ],
)
def test_caches_have_the_same_slots(model: SEEDStory, spec: str, expected: CacheConfig) -> None:
    assert cache_of(model, spec) == Cache(spec, model, expected)


IMPOSSIBLE = ("sinks", "window:2+4", "multimodal-sink:2", "multimodal-sink:a+b", "multimodal-sink:1+1:newest",
              "multimodal-sink:1+1:oldest:x", "multimodal-sink:4+3")  # fmt: skip


@pytest.mark.parametrize("spec", IMPOSSIBLE)
def test_impossible_caches(model: SEEDStory, spec: str) -> None:
    with pytest.raises(UsageError, match="a cache isn't possible"):
        cache_of(model, spec)


def test_a_dense_cache_must_hold_the_story(model: SEEDStory, stories: list[StoryRecord]) -> None:
    with pytest.raises(UsageError, match="--slots"):
        dense_cache(model, stories, 3)


def test_a_stopped_run_goes_on(model: SEEDStory, stories: list[StoryRecord], tmp_path: Path) -> None:
    caches, plan, file = [cache_of(model, "window")], Plan((2,), 1, told=1), tmp_path / "readings.jsonl"
    whole = measure(caches, stories, plan, {}, file)
    assert [(one.story, bool(one.scores), bool(one.told)) for one in whole] == [
        ("s0", True, False), ("s1", True, False), ("s2", True, False), ("s0", False, True)]  # fmt: skip
    text = file.read_text()
    file.write_text("".join(text.splitlines(keepends=True)[:2]))
    assert measure(caches, stories, plan, {}, file) == whole
    assert file.read_text() == text
    more = [*caches, cache_of(model, "text-sink")]
    assert len(measure(more, stories, plan, {}, file)) == 2 * len(whole)
    assert measure(caches, stories, plan, {}, file) == whole, "what another run read isn't told"
    text = file.read_text()
    with pytest.raises(UsageError, match="other settings"):
        measure(caches, stories, replace(plan, span=2), {}, file)
    file.write_text(text + "{")
    with pytest.raises(UsageError, match="damaged"):
        measure(caches, stories, plan, {}, file)


# --------------------------------------------------------------------------------
# What the readings say


def reading(cache: str, story: str, *scores: tuple[int, int, float, float, float]) -> Reading:
    return Reading(cache, story, tuple(PageScore(*one) for one in scores))


TOLD = (PageTold(1, "A fox ran. A fox ran.", True, True), PageTold(2, "So it hid.", False, True))
READINGS = [
    reading("text-sink", "a", (1, 2, 4.0, 5.0, 4.5), (2, 2, 2.0, 2.0, 3.0)),
    reading("text-sink", "b", (1, 6, 6.0, 9.0, 6.0), (2, 1, 3.0, 3.0, 3.0)),
    reading("window", "a", (1, 2, 8.0, 8.0, 8.0), (2, 2, 9.0, 9.0, 9.0)),
    reading("window", "b", (1, 6, 14.0, 14.0, 14.0), (2, 1, 8.0, 8.0, 8.0)),
    reading("multimodal-sink", "b", (1, 6, 5.0, 9.0, 6.0), (2, 1, 2.0, 3.0, 3.0)),
    reading("multimodal-sink", "a", (1, 2, 5.0, 5.0, 4.5), (2, 2, 1.0, 2.0, 3.0)),
    Reading("window", "a", told=TOLD),
]
PLAN = Plan((1, 2), span=1)


def test_figures_by_hand() -> None:
    found = report(READINGS, PLAN)["caches"]
    at = found["text-sink"]["1"]
    assert (at["stories"], at["tokens"]) == (2, 8)
    assert at["loss"] == (4 + 6) / 8 and at["perplexity"] == pytest.approx(math.exp(10 / 8))
    assert at["loss_interval"] == pytest.approx([1.0, 2.0])  # the mean of either story alone
    assert at["own_picture"] == (1 + 3) / 8 and at["first_picture"] == 0.5 / 8
    assert found["window"]["1"]["minus_text_sink"] == (22 - 10) / 8
    assert found["window"]["2"]["minus_text_sink"] == (17 - 5) / 3
    assert found["text-sink"]["2"]["minus_text_sink"] == 0


def test_told_figures_by_hand() -> None:
    at = report(READINGS, PLAN)["caches"]["window"]
    assert at["1"]["told_distinct_2"] == 3 / 5  # a fox, fox ran, ran a, and two of them again
    assert at["1"]["told_longest_repeat_words"] == 3
    assert (at["2"]["told_names_own"], at["2"]["told_names_first"]) == (0.5, 1.0)
    assert "told_stories" not in report(READINGS[:-1], PLAN)["caches"]["window"]["1"]


def test_the_verdict_needs_intervals_on_one_side() -> None:
    found = report(READINGS, PLAN)
    assert found["text_sink_below_window"] == {"1": "yes", "2": "yes"}
    assert found["multimodal_sink_at_most_text_sink"] == {"1": "unclear", "2": "yes"}
    worse = [
        replace(one, cache={"window": "text-sink", "text-sink": "window"}.get(one.cache, one.cache)) for one in READINGS
    ]
    assert report(worse, PLAN)["text_sink_below_window"] == {"1": "no", "2": "no"}


def test_the_table_and_the_plot() -> None:
    found = report(READINGS, PLAN)
    table = markdown(found)
    assert "| text-sink | 3.49 [2.72, 7.39] | 5.29 [2.72, 20.09] |" in table
    assert "Told: distinct-2" in table and "| text-sink | none | none |" in table
    image = plot(found, "a caption")
    colours = {colour for _, colour in image.getcolors(1 << 24) or []}
    for shown in ((0xC0, 0x26, 0x2D), (0xD9, 0x73, 0x0D), (0x1F, 0x5F, 0xA8)):
        assert shown in colours
    assert "distinct" not in markdown(report(READINGS[:-1], PLAN))


# --------------------------------------------------------------------------------
# On the command line


def run(bundle: Path, data: Path, out: Path, *options: str) -> int:
    common = ["--bundle", str(bundle), "--data", str(data), "--threads", "1", "--out", str(out)]
    return main(["length", *common, *options])


def test_the_command(loud_bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--pages", "3,5", "--told", "1", "--caches", "window,text-sink,multimodal-sink:1+2", "--json")
    assert run(loud_bundle, data, tmp_path, *options) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["metric"], found["slots"], found["lengths"], found["span"]) == ("length", 32, [3, 5], 2)
    assert list(found["caches"]) == ["window", "text-sink", "multimodal-sink:1+2"]
    assert found["caches"]["window"]["5"]["tokens"] == 3 * 2 * 5
    assert found == json.loads((tmp_path / "length.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "length.json",
        "length.md",
        "length.png",
        "readings.jsonl",
    ]
    assert run(loud_bundle, data, tmp_path, *options[:-1]) == 0  # from the readings, as a table
    assert "minus text sink" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--pages", "7"), "too short"),
        (("--caches", "sinks"), "a cache isn't possible"),
        (("--dense", "nowhere"), "there is no such bundle"),
        (("--pages", "3", "--dense", "LOUD"), "the dense bundle's cache is too small"),
    ],
)
def test_mistakes(
    loud_bundle: Path,
    data: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(loud_bundle) if option == "LOUD" else option for option in options]
    assert run(loud_bundle, data, tmp_path, *given) in (1, 2)
    assert said in capsys.readouterr().err.splitlines()[-1]
