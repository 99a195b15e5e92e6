"""Sampling: the same tokens kept, with the same probabilities, as transformers' processors on torch."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from seed_story import ngrams
from seed_story.errors import BackendError, UsageError
from seed_story.ngrams import NgramMemory
from seed_story.sampling import Sampler, SamplingConfig, StopMatcher

VOCAB = 500
PLAIN = {"temperature": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 20},
    {"top_k": VOCAB + 5},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"min_p": 0.05, "temperature": 0.3},
    {"min_p": 0.2, "temperature": 2.0},
    {"top_p": 0.8, "min_p": 0.02},
    {"top_k": 40, "top_p": 0.7},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram": 2},
    {"no_repeat_ngram": 1},
    {"min_p": 0.1, "top_k": 2},
    {"min_p": 0.1, "top_k": 20},
    {"min_p": 0.1, "repetition_penalty": 1.3},
    {"min_p": 0.1, "repetition_penalty": 0.8},
    {"min_p": 0.1, "no_repeat_ngram": 1},
    {
        "temperature": 0.7,
        "top_k": 60,
        "top_p": 0.9,
        "min_p": 0.03,
        "repetition_penalty": 1.2,
        "no_repeat_ngram": 3,
    },
]


def make(seed: int = 0, vocab: int = VOCAB, suppressed: tuple[int, ...] = (), **options: Any) -> Sampler:
    return Sampler(SamplingConfig(**{**PLAIN, **options}), seed, vocab, suppressed)


def distribution(sampler: Sampler, logits: np.ndarray) -> np.ndarray:
    """What `sample` draws from; that it does is tested by counting draws."""
    ids, weights = sampler._few(logits) or sampler._many(logits)
    whole = np.zeros(sampler.vocab_size)
    whole[ids] = weights
    return np.asarray(whole / whole.sum())


def reference(config: SamplingConfig, history: list[int], logits: np.ndarray) -> np.ndarray:
    """The processors in the order of `GenerationMixin._get_logits_processor`."""
    steps: list[Any] = []
    if config.repetition_penalty != 1:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram:
        steps.append(hf.NoRepeatNGramLogitsProcessor(config.no_repeat_ngram))
    if config.temperature != 1:
        steps.append(hf.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(hf.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        steps.append(hf.TopPLogitsWarper(config.top_p))
    if config.min_p:
        steps.append(hf.MinPLogitsWarper(config.min_p))
    scores = torch.from_numpy(logits.copy())[None].double()
    ids = torch.tensor([history], dtype=torch.long)
    for step in steps:
        scores = step(ids, scores)
    return np.asarray(torch.softmax(scores, -1)[0].numpy())


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_distribution_is_that_of_transformers(options: dict[str, Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, VOCAB).astype(np.float32)
    history = rng.integers(0, 40, 120).tolist()
    sampler = make(**options)
    for id_ in history:
        sampler.accept(id_)
    got, want = distribution(sampler, logits), reference(sampler.config, history, logits)
    np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("options", FILTERS, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_ties_are_kept_as_in_transformers(options: dict[str, Any], seed: int) -> None:
    """Borders fall among equals; which of them top-p keeps is free, how many is not."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-3, 4, VOCAB).astype(np.float32)
    history = rng.integers(0, 40, 120).tolist()
    sampler = make(**options)
    for id_ in history:
        sampler.accept(id_)
    got, want = distribution(sampler, logits), reference(sampler.config, history, logits)
    assert abs(int((got > 0).sum()) - int((want > 0).sum())) <= 1  # the border is a sum: float32 against float64
    if sampler.config.top_p == 1:
        np.testing.assert_array_equal(got > 0, want > 0)
    np.testing.assert_allclose(np.sort(got), np.sort(want), atol=0.02 if sampler.config.top_p < 1 else 2e-6)


def test_top_p_keeps_the_lower_ids_among_equals() -> None:
    kept = distribution(make(vocab=10, top_p=0.35), np.zeros(10, np.float32)) > 0
    assert np.flatnonzero(kept).tolist() == [0, 1, 2, 3]
    exactly = distribution(make(vocab=4, top_p=0.5), np.zeros(4, np.float32)) > 0
    assert np.flatnonzero(exactly).tolist() == [0, 1]  # half is reached: no third


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_draws_follow_the_distribution(options: dict[str, Any]) -> None:
    """Chi-square over 4,000 draws: 60 tokens at most, so 150 is beyond any luck."""
    logits = np.random.default_rng(3).normal(0, 1.5, 60).astype(np.float32)
    sampler = make(seed=11, vocab=60, **options)
    for id_ in (1, 2, 1, 3):
        sampler.accept(id_)
    want = distribution(sampler, logits)
    counts = np.bincount([sampler.sample(logits) for _ in range(4000)], minlength=60)
    assert counts[want == 0].sum() == 0
    live = want > 0
    assert ((counts[live] - 4000 * want[live]) ** 2 / (4000 * want[live])).sum() < 150


def test_few_tokens_are_weighed_as_many_are_or_left_to_them() -> None:
    """The two ways to choose agree; the quick one is taken unless something unseen may be better."""
    sure = np.random.default_rng(0).normal(0, 1, VOCAB).astype(np.float32)
    sure[[3, 4, 5, 6]] = 12, 11.5, 11, 9.5
    flat = np.zeros(VOCAB, np.float32)
    again, raised = make(min_p=0.05, repetition_penalty=1.1), make(min_p=0.05, repetition_penalty=0.9)
    again.accept(3)
    for id_ in (3, 6):
        raised.accept(id_)
    cases: list[tuple[Sampler, np.ndarray, list[int] | None]] = [
        (make(min_p=0.05), sure, [3, 4, 5, 6]),
        (make(temperature=0.0), sure, [3]),
        (again, sure, [3, 4, 5, 6]),  # 3 comes to 10.9
        (make(min_p=0.05, top_k=4), sure, [3, 4, 5, 6]),
        (make(min_p=0.05, suppressed=(4,)), sure, [3, 5, 6]),
        (make(min_p=0.05, suppressed=(3,)), sure, None),  # what is near 12 needn't be all that is near 11.5
        (make(min_p=0.05, top_k=3), sure, None),
        (make(min_p=0.05, top_p=0.9), sure, None),
        (raised, sure, None),  # 6 comes from far below
        (make(), sure, None),
        (make(min_p=0.05), flat, None),
    ]
    for sampler, logits, ids in cases:
        few, (many, weights) = sampler._few(logits), sampler._many(logits)
        assert (few[0] if few else None) == ids, sampler.config
        if few and sampler.config.temperature > 0:
            assert many.tolist() == ids
            np.testing.assert_allclose(few[1], weights, rtol=1e-6)
    banned = make(min_p=0.05, no_repeat_ngram=1)
    banned.accept(4)
    few = banned._few(sure)
    assert few and few[0] == [3, 5, 6]
    for id_ in (3, 5, 6):
        banned.accept(id_)
    assert banned._few(sure) is None


def test_repetition_window_forgets() -> None:
    logits = np.random.default_rng(0).normal(0, 3, VOCAB).astype(np.float32)
    history = list(range(100))
    sampler = make(repetition_penalty=2.0, repetition_window=30)
    for id_ in history:
        sampler.accept(id_)
    want = reference(sampler.config, history[-30:], logits)
    np.testing.assert_allclose(distribution(sampler, logits), want, atol=2e-6)
    off = make(repetition_penalty=2.0, repetition_window=0)
    off.accept(3)
    np.testing.assert_allclose(distribution(off, logits), reference(make().config, [], logits), atol=2e-6)


def test_greedy_takes_the_lowest_of_the_best_and_draws_nothing() -> None:
    logits = np.array([1, 5, 5, 0, 5], np.float32)
    sampler = Sampler(SamplingConfig.greedy(), 0, 5)
    before = sampler.state()
    assert [sampler.sample(logits) for _ in range(3)] == [1, 1, 1] and sampler.state() == before
    assert Sampler(SamplingConfig.greedy(), 0, 5, [1]).sample(logits) == 2
    assert SamplingConfig.greedy(stop=["x"]).stop == ("x",)


def test_the_logits_are_left_alone_and_any_float_type_is_read() -> None:
    logits = np.random.default_rng(1).normal(0, 3, VOCAB)
    chosen = set()
    for dtype in (np.float32, np.float64):
        given_: np.ndarray[Any, np.dtype[np.floating[Any]]] = logits.astype(dtype)
        given_.flags.writeable = False
        sampler = make(seed=5, repetition_penalty=1.5, suppressed=(3, 4))
        sampler.accept(7)
        chosen.add(tuple(sampler.sample(given_) for _ in range(20)))
    assert len(chosen) == 1


def test_same_seed_same_tokens_and_a_restored_state_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngrams, "NGRAM_MEMORY", 20)
    table = np.random.default_rng(2).normal(0, 2, (VOCAB, VOCAB)).astype(np.float32)
    options: dict[str, Any] = {
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "repetition_window": 7,
        "no_repeat_ngram": 2,
    }

    def tell(sampler: Sampler, last: int, count: int) -> list[int]:
        story = []
        for _ in range(count):
            last = sampler.sample(table[last])
            sampler.accept(last)
            story.append(last)
        return story

    first, second = make(seed=9, suppressed=(0, 1), **options), make(seed=9, suppressed=(0, 1), **options)
    story = tell(first, 0, 40)
    assert story == tell(second, 0, 40) != tell(make(seed=10, **options), 0, 40)
    copy = Sampler.restore(json.loads(json.dumps(first.state())))
    assert copy.state() == first.state() and copy.config == first.config
    assert tell(copy, story[-1], 40) == tell(first, story[-1], 40)
    assert copy.state() == first.state()


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 4), st.integers(4, 12))
def test_ngrams_equal_a_rescan_of_the_remembered_history(ids: list[int], n: int, memory: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "NGRAM_MEMORY", memory)
        kept = NgramMemory(n)
        for id_ in ids:
            kept.accept(id_)
    window = ids[-memory:]
    prefix = window[len(window) - n + 1 :] if len(window) >= n - 1 else None
    grams = [window[i : i + n] for i in range(len(window) - n + 1)]
    assert sorted(kept.banned()) == sorted({gram[-1] for gram in grams if gram[:-1] == prefix})
    assert len(kept.history) <= memory and sum(map(len, kept._next.values())) <= memory


def test_something_is_always_left() -> None:
    logits = np.array([-np.inf, 2, 1], np.float32)
    sampler = make(vocab=3, no_repeat_ngram=1, min_p=1.0, top_k=1, top_p=0.001)
    for id_ in (0, 1, 2):
        sampler.accept(id_)  # all banned: the ban is lifted rather than failing
    assert sampler.sample(logits) == 1
    assert make(vocab=3, suppressed=(1,), min_p=1.0).sample(logits) == 2
    assert make(vocab=3, suppressed=(1, 2), top_k=1).sample(np.zeros(3, np.float32)) == 0


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e300])
@pytest.mark.parametrize("options", [{}, {"min_p": 0.05}, {"top_p": 0.5}, {"top_k": 2}])
@pytest.mark.filterwarnings("error")
def test_extreme_numbers(temperature: float, options: dict[str, Any]) -> None:
    logits = np.array([3e38, -3e38, 0, 1, -np.inf], np.float32)
    token = make(vocab=5, temperature=temperature, **options).sample(logits)
    assert token == 0 or (temperature > 1 and token != 4)


@pytest.mark.parametrize(
    ("logits", "match"),
    [([0, np.nan, 1], "NaN"), ([0, np.inf, 1], "infinity"), ([-np.inf] * 3, "no token"), ([0, 1], "shape"),
     ([[0, 1, 2]], "shape")],
)  # fmt: skip
def test_bad_logits_are_a_backend_error(logits: list[float], match: str) -> None:
    for sampler in (
        make(vocab=3, suppressed=(1,) if match == "NaN" else ()),
        Sampler(SamplingConfig.greedy(), 0, 3),
    ):
        with pytest.raises(BackendError, match=match):
            sampler.sample(np.array(logits, np.float32))


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -0.1}, {"temperature": np.nan}, {"temperature": "hot"}, {"top_k": -1}, {"top_k": 1.5},
     {"top_k": True}, {"top_p": 0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 2}, {"repetition_penalty": 0},
     {"repetition_penalty": np.inf}, {"repetition_window": -1}, {"no_repeat_ngram": -2}, {"stop": ("a", "")},
     {"stop": (1,)}],
    ids=str,
)  # fmt: skip
def test_impossible_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SamplingConfig(**wrong)


def test_impossible_samplers_and_states() -> None:
    for seed, vocab, suppressed in ((-1, 5, ()), (0, 0, ()), (0, 5, (5,)), (0, 2, (0, 1))):
        with pytest.raises(UsageError):
            make(seed, vocab, suppressed)
    with pytest.raises(UsageError, match="beyond"):
        make().accept(VOCAB)
    good = make().state()
    for key in good:
        with pytest.raises(UsageError):
            Sampler.restore({k: v for k, v in good.items() if k != key})
        with pytest.raises(UsageError):
            Sampler.restore({**good, key: "damaged"})


pieces = st.lists(st.text("ab<>", max_size=4), max_size=20)
stops = st.lists(st.text("ab<>", min_size=1, max_size=5), max_size=3)


@settings(max_examples=400)
@given(pieces, stops)
def test_stop_matcher_equals_find_on_the_joined_text(parts: list[str], stop: list[str]) -> None:
    whole, matcher, shown, stopped = "".join(parts), StopMatcher(stop), "", False
    for part in parts:
        text, stopped = matcher.push(part)
        shown += text
        if stopped:
            break
        held = whole[len(shown) :][: sum(map(len, parts)) - len(shown)]
        assert not any(s in shown for s in stop) and (held or shown == whole)
    shown += matcher.flush()
    found = [(whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole]
    assert stopped == bool(found)
    assert shown == (whole[: min(found)[1]] if found else whole)
    assert (matcher.matched in stop) if found else matcher.matched is None


def test_stop_matcher_holds_back_no_more_than_it_must() -> None:
    matcher = StopMatcher(["THE END", "##"])
    assert matcher.push("bear T") == ("bear ", False)
    assert matcher.push("HE E") == ("", False)
    assert matcher.push("VENING #") == ("THE EVENING ", False)
    assert matcher.push("1 THE EN") == ("#1 ", False)
    assert matcher.push("D, said") == ("", True)
    assert matcher.push("more") == ("", True) and matcher.flush() == "" and matcher.matched == "THE END"
    with pytest.raises(UsageError):
        StopMatcher([""])
