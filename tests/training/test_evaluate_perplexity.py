"""Against the Keras model in float32, on a sequence written out by hand, and against what the runtime feeds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from model.story_model import StoryModel
from seed_story.bundle import MANIFEST
from seed_story.errors import PictureError, UsageError
from seed_story.image import load_and_preprocess_image
from seed_story.story import SEEDStory
from tests.compare import assert_close
from tests.loud import loud_source
from tests.runtime.storytelling import Spy
from tests.training.held_out import CAPTIONS, storybook
from training.data import Page, StoryRecord, read_stories
from training.evaluation.perplexity import encoder_of, looker, perplexity, sums_of, token_losses
from training.evaluation.shuffled import partners, shuffled

QUERIES = 4


@cache
def keras_model() -> StoryModel:
    return loud_source().model


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> list[StoryRecord]:
    return read_stories(storybook(tmp_path_factory.mktemp("data")) / "test.jsonl")


@pytest.fixture(scope="module")
def model(loud_bundle: Path) -> Iterator[SEEDStory]:
    with SEEDStory(loud_bundle, threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def short(loud_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SEEDStory]:
    """With a prompt so short that two pages fit in the 32 slots."""
    folder = tmp_path_factory.mktemp("short") / "bundle"
    shutil.copytree(loud_bundle, folder)
    values = json.loads((folder / MANIFEST).read_text())
    values["prompt"].update(opening="<", request=">")
    (folder / MANIFEST).write_text(json.dumps(values))
    with SEEDStory(folder, threads=1) as made:
        yield made


def reference(model: SEEDStory, story: StoryRecord, pictures: list[Path]) -> np.ndarray:
    """The losses of all bytes of the captions but spaces, from the Keras model; two pages, or none shown."""
    begin, end = (model.tokenizer.token_id(name) for name in ("<|picture|>", "<|/picture|>"))
    place = [begin, *[-1] * QUERIES, end]
    first, second = (list(page.caption.encode()) for page in story.pages)
    if pictures:
        ids = [*b"<", *place, *b">", *first, *place, *b"\n", *second]
        starts = [1 + len(place) + 1, 1 + 2 * len(place) + 1 + len(first) + 1]
    else:
        ids = [*b"<", *b">", *first, *b" ", *second]
        starts = [2, 2 + len(first) + 1]
    assert len(ids) <= 32
    frames = np.stack([load_and_preprocess_image(path, 28)[0] for path in pictures])[None] if pictures else None
    logits = np.asarray(keras_model()(np.array([ids]), frames))[0]
    scores = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), -1)
    spots = [start + n for start, text in zip(starts, (first, second), strict=True) for n in range(len(text))]
    return np.array([-float(scores[spot - 1, ids[spot]]) for spot in spots if ids[spot] != ord(" ")])


def test_losses_are_the_keras_models(short: SEEDStory, stories: list[StoryRecord]) -> None:
    encoder, look = encoder_of(short), looker(short)
    for story in stories:
        shown = [page.picture for page in story.pages]
        seen = token_losses(short, encoder.encode(story, "all", ends=False), list(map(look, shown)))
        blind = token_losses(short, encoder.encode(story, "none", ends=False), [])
        assert len(seen) == len("".join(CAPTIONS[:2]).replace(" ", "")) == len(blind)
        assert_close(seen, reference(short, story, shown), "streaming_reference")
        assert_close(blind, reference(short, story, []), "streaming_reference")


def test_the_report_is_the_mean_of_all_tokens(short: SEEDStory, stories: list[StoryRecord]) -> None:
    report = perplexity(short, stories, pages=2)
    seen = np.concatenate([reference(short, s, [page.picture for page in s.pages]) for s in stories])
    blind = np.concatenate([reference(short, s, []) for s in stories])
    assert (report["stories"], report["tokens"]) == (3, len(seen))
    assert report["loss"] == pytest.approx(seen.mean(), rel=1e-4)
    assert report["blind_loss"] == pytest.approx(blind.mean(), rel=1e-4)
    assert report["perplexity"] == pytest.approx(np.exp(seen.mean()), rel=1e-3)
    assert report["blind_perplexity"] == pytest.approx(np.exp(blind.mean()), rel=1e-3)
    assert report["gain"] == pytest.approx(blind.mean() - seen.mean(), rel=1e-3)
    for name in ("loss", "perplexity", "blind_loss", "blind_perplexity", "gain"):
        low, high = report[f"{name}_interval"]
        assert low <= report[name] <= high


@pytest.mark.parametrize("shown", ["all", "none"])
def test_the_decoder_reads_what_a_story_feeds_it(
    model: SEEDStory, stories: list[StoryRecord], monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    """Past the end of the cache too; the last row is only predicted, not read."""
    example = encoder_of(model).encode(stories[0], shown, ends=False)
    spy = Spy(model, monkeypatch)
    token_losses(model, example, list(map(looker(model), example.pictures)))
    forced, forced_pictures, spy.rows, spy.pictures = spy.rows, spy.pictures, [], []
    story, (first, second) = model.begin(), stories[0].pages
    if shown == "all":
        story.add_picture(first.picture).add_text(first.caption)
        story.add_picture(second.picture).add_text(f"\n{second.caption}")
    else:
        story.add_text(f"{first.caption} {second.caption}")
    list(story.tell(max_tokens=1))
    assert len(forced) > 64
    assert_close(np.stack(forced), np.stack(spy.rows[:-1]), "exact")
    assert forced_pictures == spy.pictures
    assert len(forced_pictures) == (2 if shown == "all" else 0)


def test_pages_cut_the_stories(model: SEEDStory, stories: list[StoryRecord]) -> None:
    one, two, more = (perplexity(model, stories, pages=pages)["tokens"] for pages in (1, 2, 3))
    assert one == 3 * len(CAPTIONS[0].replace(" ", ""))
    assert two == more > one


def test_a_missing_picture(model: SEEDStory, tmp_path: Path) -> None:
    story = StoryRecord("s", (Page(tmp_path / "gone.png", "A fox.", 0),))
    for metric in (perplexity, shuffled):
        with pytest.raises(PictureError, match=r"1 pictures are missing; got .*gone\.png"):
            metric(model, [story, story], pages=1)


def record(name: str, *pictures: str) -> StoryRecord:
    return StoryRecord(name, tuple(Page(Path(picture), "A fox.", n) for n, picture in enumerate(pictures)))


def test_no_story_gets_a_picture_of_its_own() -> None:
    """Stories n and n + 1 share a picture."""
    told = [record(str(n), f"{n}.png", f"{(n + 1) % 9}.png") for n in range(9)]
    everyone = set()
    for seed in range(20):
        chosen = partners(told, seed)
        everyone.add(tuple(chosen))
        for story, other in zip(told, chosen, strict=True):
            mine, theirs = ({page.picture for page in one.pages} for one in (story, told[other]))
            assert not mine & theirs
    assert len(everyone) == 20
    assert partners(told, 3) == partners(told, 3)


@pytest.mark.parametrize("told", [[record("a", "x.png")], [record("a", "x.png"), record("b", "x.png", "y.png")]])
def test_nothing_to_swap(told: list[StoryRecord]) -> None:
    with pytest.raises(UsageError, match="story a has no pictures to swap"):
        partners(told, 0)


def test_the_shuffled_loss_is_of_the_others_pictures(short: SEEDStory, stories: list[StoryRecord]) -> None:
    report = shuffled(short, stories, pages=2, seed=1)
    right = [reference(short, story, [page.picture for page in story.pages]) for story in stories]
    others = partners(stories, 1)
    wrong = [reference(short, story, [page.picture for page in stories[n].pages])
             for story, n in zip(stories, others, strict=True)]  # fmt: skip
    assert report["loss"] == pytest.approx(sums_of(right).mean, rel=1e-4)
    assert report["shuffled_loss"] == pytest.approx(sums_of(wrong).mean, rel=1e-4)
    assert report["difference"] == pytest.approx(report["shuffled_loss"] - report["loss"])
    assert abs(report["difference"]) > 1e-3
    low, high = report["difference_interval"]
    assert low <= report["difference"] <= high


def test_a_shorter_others_pictures_go_round(short: SEEDStory, tmp_path: Path) -> None:
    long = read_stories(storybook(tmp_path / "two", stories=1) / "test.jsonl")[0]
    single = read_stories(storybook(tmp_path / "one", stories=1, pages=1) / "test.jsonl")[0]
    single = StoryRecord("single", single.pages)
    report = shuffled(short, [long, single], pages=2)
    only = single.pages[0].picture
    look, encoder = looker(short), encoder_of(short)
    wrong = [
        token_losses(short, encoder.encode(long, ends=False), [look(only)] * 2),
        token_losses(short, encoder.encode(single, ends=False), [look(long.pages[0].picture)]),
    ]
    assert report["shuffled_loss"] == pytest.approx(sums_of(wrong).mean)
