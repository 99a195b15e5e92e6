"""Guesses: where they come from, and what they may not change, which is all but the time that a story takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seed_story.bundle import MANIFEST
from seed_story.drafts import DRAFT_MEMORY, PromptLookup
from seed_story.errors import ConfigError
from seed_story.sampling import SamplingConfig
from seed_story.session import Story
from seed_story.story import SEEDStory
from tests.runtime.storytelling import GREEDY, HOT, drawn, pixels, told

SAMPLINGS = {
    "greedy": GREEDY,
    "default": SamplingConfig(),
    "all-filters": SamplingConfig(temperature=0.9, top_k=60, top_p=0.95, min_p=0.01, no_repeat_ngram=3),
    "hot": HOT,
}

# --------------------------------------------------------------------------------
# Where they come from


def looked_up(ids: Sequence[int], most: int) -> list[int]:
    """The rule told plainly: of the longest match of two to eight tokens the last."""
    for same in range(min(8, len(ids) - 1), 1, -1):
        for end in range(len(ids) - 1, same - 1, -1):
            if ids[end - same : end] == ids[-same:]:
                return list(ids[end : end + most])
    return []


@given(st.lists(st.integers(0, 2), max_size=60), st.integers(0, 9))
def test_a_guess_is_what_followed_the_longest_match(ids: list[int], most: int) -> None:
    lookup = PromptLookup(ids)
    assert lookup.guess(most) == looked_up(ids, most)
    assert lookup.history == ids


def test_memory_is_bounded_and_forgets_the_oldest() -> None:
    lookup = PromptLookup([7, 8, 9])
    held = lookup._ids.nbytes
    for token_id in range(100, 100 + DRAFT_MEMORY - 5):
        lookup.accept(token_id)
    for token_id in (7, 8):
        lookup.accept(token_id)
    assert lookup.guess(1) == [9]
    for token_id in (1, 7, 8):
        lookup.accept(token_id)
    assert lookup.guess(3) == [1, 7, 8]
    for token_id in range(10_000, 10_000 + 3 * DRAFT_MEMORY):
        lookup.accept(token_id)
    assert lookup.history == [*range(10_000 + 2 * DRAFT_MEMORY, 10_000 + 3 * DRAFT_MEMORY)]
    assert lookup._ids.nbytes == held
    for token_id in (100, 101):
        lookup.accept(token_id)
    assert lookup.guess(3) == []


# --------------------------------------------------------------------------------
# What they change


@pytest.fixture(scope="module", params=["float32", "int8"])
def model(request: pytest.FixtureRequest, verifying_bundle: Callable[[str], Path]) -> Iterator[SEEDStory]:
    with SEEDStory(verifying_bundle(request.param), threads=1) as made:
        yield made


def tale(model: SEEDStory, guesser: Callable[[Story, list[int]], Any] | None, **options: Any) -> dict[str, Any]:
    """A story of six turns of the ring with pictures and text in between, and all that it left behind.

    Args:
        guesser: makes the story's `guess`, of it and the list of what it draws.
    """
    story = model.begin(seed=3, speculate=guesser is not None, **options)
    ids = drawn(story)
    if guesser:
        story._lookup.guess = guesser(story, ids)  # type: ignore[union-attr,method-assign]
    text = ""
    for number, count in enumerate((1, 30, 17, 2, 40, 60)):
        story.add_picture(pixels(seed=number)).add_text(f"{number} and then")
        text += told(story, count)
    cache = model.decoder.cache.state()
    assert model.decoder.cache.position > 6 * model.decoder.cache.config.ring
    return {
        "ids": ids,
        "text": text,
        "sampler": story._sampler.state(),
        "cache": cache.values,
        "arrays": cache.arrays,
        "steps": story.stats.steps,
        "runs": story.stats.runs,
    }


def assert_the_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("ids", "text", "sampler", "cache", "steps"):
        assert got[name] == expected[name], name
    for name, array in expected["arrays"].items():
        np.testing.assert_array_equal(got["arrays"][name], array, name)


@pytest.mark.parametrize("policy", ["window", "text-sink", "multimodal-sink", "attention-mass"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_story_is_the_same(model: SEEDStory, sampling: str, policy: str) -> None:
    """With the guesses of the lookup, and with an adversary's: all right, all wrong, right until they are wrong."""
    cache = model.cache.under("multimodal-sink", picture_eviction=policy) if policy == "attention-mass" else policy
    options = {"sampling": SAMPLINGS[sampling], "policy": cache}
    plain = tale(model, None, **options)
    assert plain["runs"] == plain["steps"]
    assert len(set(plain["ids"])) > 10
    assert_the_same(tale(model, lambda story, _: story._lookup.guess, **options), plain)  # type: ignore[union-attr]
    for wrong_after in (0, 2, 99):

        def adversary(_: Story, ids: list[int], wrong_after: int = wrong_after) -> Callable[[int], list[int]]:
            def guess(most: int) -> list[int]:
                true = plain["ids"][len(ids) : len(ids) + most]
                return [t if i < wrong_after else (t + 1) % 256 for i, t in enumerate(true)]

            return guess

        got = tale(model, adversary, **options)
        assert_the_same(got, plain)
        assert (got["runs"] < plain["runs"]) == (wrong_after > 0)


def test_what_is_drawn_after_a_guess_has_the_exact_distribution(verifying_bundle: Callable[[str], Path]) -> None:
    """Of two tokens, the first of which is guessed to be the likeliest, by 3,000 seeds: chi-squared, by the logits.

    The guess is one point, so rejection sampling is: take it with its probability p, else draw from what is left. A
    draw that is compared with it takes it with probability p, and is of what is left otherwise.
    """
    sampling = SamplingConfig(temperature=1.5, min_p=0.0, repetition_penalty=1.0, top_k=5)
    with SEEDStory(verifying_bundle("float32"), threads=1) as model:
        story = model.begin(sampling=sampling, speculate=True).add_text("Once upon")
        told(story, 1)
        mark = story.state()
        suppressed = mark.values["sampler"]["suppressed_ids"]

        def chances(logits: np.ndarray) -> dict[int, float]:
            scores = logits.astype(np.float64)
            scores[suppressed] = -np.inf
            best = np.argsort(scores)[-5:]
            weights = np.exp((scores[best] - scores[best].max()) / 1.5)
            return dict(zip(best.tolist(), (weights / weights.sum()).tolist(), strict=True))

        first = chances(model.decoder.feed(mark.arrays["pending"]).copy())
        assert mark.values["stats"]["guessed_right"] == 0
        guess = max(first, key=lambda i: first[i])
        second = chances(model.decoder.step(guess).copy())
        expected = {(a,): p for a, p in first.items() if a != guess}
        expected |= {(guess, b): first[guess] * p for b, p in second.items()}

        counts = dict.fromkeys(expected, 0)
        seeds = 3000
        for seed in range(seeds):
            again = Story.from_state(model, mark)
            model.add_fork(again)
            model.activate(again)
            again._sampler.reseed(seed)
            ids = drawn(again)
            again._lookup.guess = lambda most: [guess][:most]  # type: ignore[union-attr,method-assign]
            told(again, 2)
            assert again.stats.guessed_right == (ids[0] == guess)
            counts[tuple(ids) if ids[0] == guess else (ids[0],)] += 1
    chi_squared = sum((counts[k] - seeds * p) ** 2 / (seeds * p) for k, p in expected.items())
    assert chi_squared < 23.6  # eight degrees of freedom: of 370 honest draws one is further off


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_leaving_in_the_middle_of_a_guess(model: SEEDStory, count: int, tmp_path: Path) -> None:
    """By the number of tokens, by an early end of the loop, to a snapshot, a fork or another page: always the same."""
    expected = told(model.begin(sampling=GREEDY, speculate=False).add_text("Once"), 80)
    for leave in ("tokens", "break", "snapshot", "fork", "rewind"):
        story = model.begin(sampling=GREEDY).add_text("Once")
        text = ""
        while story.stats.tokens < 80:
            if leave == "rewind":
                mark = len(text)
                story.turn_page()
                told(story, count)
                story.rewind(story.page)
                assert story.told == text[:mark]
            if leave == "break":
                for number, piece in enumerate(story.tell(max_tokens=80 - story.stats.tokens), 1):
                    text += piece
                    if number == count:
                        break
            else:
                text += told(story, min(count, 80 - story.stats.tokens))
            if leave == "snapshot":
                story.snapshot(tmp_path / "a")
                story = model.restore(tmp_path / "a")
            elif leave == "fork":
                other = story.fork()
                told(story, 2)
                story = other
        assert text == expected, leave


def test_a_stop_string_and_an_end_token_within_a_guess(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = model.begin(sampling=GREEDY, speculate=False).add_text("Once")
    ids = drawn(plain)
    text = told(plain, 60)
    for place in range(20, 50):
        stop = text[place : place + 2]
        ends = [
            told(model.begin(sampling=SamplingConfig.greedy(stop=(stop,)), speculate=by).add_text("Once"), 60)
            for by in (False, True)
        ]
        assert ends[0] == ends[1] == text[: text.index(stop)]
    monkeypatch.setattr(model, "_end_ids", frozenset({ids[40]}))
    for speculate in (False, True):
        story = model.begin(sampling=GREEDY, speculate=speculate).add_text("Once")
        told(story, 60)
        assert story.finished
        assert story.stats.tokens == ids.index(ids[40])


# --------------------------------------------------------------------------------
# When


def test_by_default_where_it_pays(model: SEEDStory, loud_bundle: Path) -> None:
    def speculates(by: SEEDStory, **options: Any) -> bool:
        return by.begin(**options)._lookup is not None

    assert speculates(model, sampling=GREEDY)
    assert speculates(model, sampling=SamplingConfig(repetition_penalty=1.0))
    assert speculates(model, sampling=SamplingConfig(repetition_window=0))
    assert not speculates(model)
    assert not speculates(model, sampling=SamplingConfig.greedy(no_repeat_ngram=3))
    assert not speculates(model, sampling=SamplingConfig(temperature=0.0))
    assert not speculates(model, sampling=HOT)
    assert speculates(model, speculate=True)
    assert not speculates(model, sampling=GREEDY, speculate=False)
    with SEEDStory(loud_bundle, threads=1) as unable:
        assert not speculates(unable, sampling=GREEDY)
        with pytest.raises(ConfigError, match=r"can't speculate.*no signature 'verify_K'.*--verify"):
            unable.begin(speculate=True)


def test_a_repetitive_story_takes_fewer_runs(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lookup itself, where the model says the same again and again: three runs in four are spared."""
    said = model.tokenizer.encode("and on and on ") * 20
    story = model.begin(sampling=GREEDY).add_text("It went on ")
    ids = iter(said)
    monkeypatch.setattr(story._sampler, "sample", lambda _: next(ids))
    told(story, len(said))
    stats = story.stats
    assert stats.steps == len(said) - 1
    assert stats.runs < 0.35 * stats.steps
    assert stats.guessed >= stats.guessed_right == stats.steps - stats.runs


def test_a_bundle_from_before_has_none(loud_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(loud_bundle, tmp_path / "old")
    values = json.loads((tmp_path / "old" / MANIFEST).read_text())
    assert values.pop("verify") == 0
    (tmp_path / "old" / MANIFEST).write_text(json.dumps(values))
    with SEEDStory(tmp_path / "old", threads=1) as model:
        assert model.bundle.manifest.steps.verify == 0
        assert told(model.begin(sampling=GREEDY).add_text("Once"), 3) is not None
