"""Impossible calls of the story session, and what they say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from seed_story.errors import BackendError, PromptError, UsageError
from seed_story.story import SEEDStory
from seed_story.threads import default_threads
from tests.runtime.storytelling import GREEDY, Spy, layout, pixels, told


@pytest.mark.parametrize("count", [0, -1])
def test_max_tokens_is_checked_at_the_call(model: SEEDStory, count: int) -> None:
    story = model.begin().add_text("Once")
    with pytest.raises(UsageError, match="max_tokens") as caught:
        story.tell(max_tokens=count)
    assert (caught.value.got, caught.value.expected) == (count, "1 or more")
    assert told(story, 1) is not None


def test_empty_text(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(model, monkeypatch)
    story = model.begin()
    with pytest.raises(PromptError, match="empty") as caught:
        story.add_text("")
    assert caught.value.got == "''" and caught.value.expected
    story.add_picture(pixels(0.5)).add_text("Once")  # the failed call didn't take the request's place
    list(story.tell(max_tokens=1))
    prompt = model.bundle.manifest.prompt
    assert layout(model, spy.rows) == f"{prompt.opening}[picture]{prompt.request}Once"
    with pytest.raises(PromptError):
        model("")


@pytest.mark.parametrize("bad", ["\ud800", None, 5])
def test_text_that_is_no_text(model: SEEDStory, bad: Any) -> None:
    story = model.begin()
    with pytest.raises(PromptError):
        story.add_text(bad)
    assert story.given == ""


def test_a_new_story_ends_the_old_one(model: SEEDStory) -> None:
    old = model.begin(sampling=GREEDY).add_text("Once")
    pieces = old.tell(max_tokens=50)
    next(pieces)
    new = model.begin(sampling=GREEDY)
    assert old.ended and not new.ended
    for use in (
        lambda: old.add_text("x"),
        lambda: old.add_picture(pixels()),
        lambda: old.tell(),
        lambda: next(pieces),  # a generator that was under way, too
    ):
        with pytest.raises(UsageError, match="ended") as caught:
            use()
        assert "second SEEDStory" in caught.value.hint
    expected = model("Twice", max_tokens=40, sampling=GREEDY)
    assert "Twice" + told(model.begin(sampling=GREEDY).add_text("Twice"), 40) == expected


@pytest.mark.parametrize("threads", [0, -1])
def test_impossible_threads(loud_bundle: Path, threads: int) -> None:
    with pytest.raises(UsageError, match="threads") as caught:
        SEEDStory(loud_bundle, threads=threads)
    assert caught.value.got == threads


def test_default_threads() -> None:
    assert 1 <= default_threads() <= 4
    assert default_threads() <= len(os.sched_getaffinity(0))


def test_unknown_backend(loud_bundle: Path) -> None:
    with pytest.raises(UsageError, match="abacus"):
        SEEDStory(loud_bundle, backend="abacus")


@pytest.mark.parametrize("seed", [-1, 1.5, "one", True])
def test_impossible_seed(model: SEEDStory, seed: Any) -> None:
    with pytest.raises(UsageError, match="seed"):
        model.begin(seed=seed)


def test_closed_model_says_so(loud_bundle: Path) -> None:
    model = SEEDStory(loud_bundle, threads=1)
    story = model.begin().add_text("Once")
    list(story.tell(max_tokens=2))
    model.close()
    model.close()
    for use in (
        lambda: list(story.tell(max_tokens=2)),
        lambda: story.add_text("x"),
        lambda: story.add_picture(pixels()),
        lambda: model.begin(),
        lambda: model("Once"),
    ):
        with pytest.raises(BackendError, match="closed"):
            use()
    with pytest.raises(BackendError, match="closed"):
        model.vision.embeddings(pixels())
    assert model.vision._graphs == [], "a picture loaded its graphs again"


def test_with_closes(loud_bundle: Path) -> None:
    with SEEDStory(loud_bundle, threads=1) as model:
        model("Once", max_tokens=1)
    with pytest.raises(BackendError, match="closed"):
        model.begin()
