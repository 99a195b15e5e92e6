"""The statistics of the flat-line certificate: noise may cost a certificate, but never earns one."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from seed_story.certificate import (
    DRIFT,
    FAIL,
    FLAT,
    PASS,
    UNCLEAR,
    Finding,
    _student,
    memory_finding,
    per_token,
    theil_sen,
    time_findings,
    verdict,
)

PAGES, TOKENS = 40, 32
SEEDS = range(200)


def growth(drift: float, shape: str = "line") -> np.ndarray:
    """The factor of a token's time on each page: 1 on page 5, 1 + drift on the last."""
    pages = np.arange(1, PAGES + 1)
    if shape == "step":
        return np.where(pages > 0.8 * PAGES, 1 + drift, 1.0)
    return 1 + drift * np.maximum(pages - 5, 0) / (PAGES - 5)


def busy_machine(rng: np.random.Generator) -> np.ndarray:
    """The factor by which the machine slows each page: it stays at a level for some pages, up to twice as slow."""
    level, levels = 1.0, []
    for _ in range(PAGES):
        if rng.random() < 0.15:
            level = float(np.exp(rng.normal(0, 0.35)))
        levels.append(level)
    return np.array(levels)


def tokens_ms(rng: np.random.Generator, page_factor: np.ndarray, *, bursts: bool) -> np.ndarray:
    """Times of a page's tokens, `[pages, tokens]`: 15 ms, 2 % of noise, and bursts that hit half of some pages."""
    times = 15 * page_factor[:, None] * np.exp(rng.normal(0, 0.02, (PAGES, TOKENS)))
    if bursts:
        hit = (rng.random((PAGES, 1)) < 0.3) & (rng.random((PAGES, TOKENS)) < 0.5)
        times *= 1 + hit * rng.exponential(1.0, (PAGES, TOKENS))
    return times


def ratios(seed: int, drift: float, shape: str = "line", *, bursts: bool = True) -> np.ndarray:
    rng = np.random.default_rng(seed)
    machine = busy_machine(rng)
    own = tokens_ms(rng, machine * growth(drift, shape), bursts=bursts)
    return per_token(own) / per_token(tokens_ms(rng, machine, bursts=bursts))


def verdicts(drift: float, shape: str = "line", *, bursts: bool = True) -> Counter[str]:
    return Counter(verdict(time_findings(ratios(seed, drift, shape, bursts=bursts)))[0] for seed in SEEDS)


# Time


def test_flat_and_quiet_passes() -> None:
    passed = [verdict(time_findings(ratios(seed, 0.0, bursts=False)))[0] == PASS for seed in range(40)]
    assert sum(passed) >= 38


@pytest.mark.parametrize(
    ("drift", "shape", "bursts"),
    [(0.05, "line", True), (0.05, "line", False), (-0.05, "line", True), (0.05, "step", True)],
)
def test_a_drift_of_5_percent_never_passes(drift: float, shape: str, bursts: bool) -> None:
    assert verdicts(drift, shape, bursts=bursts)[PASS] == 0


def test_a_drift_on_a_quiet_machine_is_called_one() -> None:
    for seed in range(20):
        findings = time_findings(ratios(seed, 0.08, bursts=False))
        assert verdict(findings)[0] == FAIL
        assert findings[0].outcome == DRIFT
        assert findings[0].change == pytest.approx(8, abs=1.5)
        assert "time per token, trend changes: +" in verdict(findings)[1]


def test_a_jump_that_the_line_is_blind_to_does_not_pass() -> None:
    series = np.exp(np.random.default_rng(0).normal(0, 0.003, PAGES))
    series[-5:] *= 1.06
    trend, ends = time_findings(series)
    assert (trend.outcome, ends.outcome == FLAT) == (FLAT, False)
    assert ends.change == pytest.approx(6, abs=0.6)


def test_noise_alone_is_not_called_a_drift() -> None:
    called = sum(any(f.outcome == DRIFT for f in time_findings(ratios(seed, 0.0))) for seed in range(100))
    assert called <= 4  # two intervals of 99 %


def test_too_noisy_fails_and_says_so() -> None:
    noise = np.exp(np.random.default_rng(0).normal(0, 0.1, PAGES))
    findings = time_findings(noise)
    assert {f.outcome for f in findings} == {UNCLEAR}
    decided, reason = verdict(findings)
    assert decided == FAIL
    assert "is too noisy" in reason and "needs more pages" in reason


def test_without_the_short_story_a_busy_machine_looks_like_a_drift() -> None:
    """Why there is one: the same flat stories, undivided."""
    rng = np.random.default_rng(0)
    raw = [per_token(tokens_ms(rng, busy_machine(rng), bursts=True)) / 15 for _ in range(50)]
    assert sum(verdict(time_findings(series))[0] == PASS for series in raw) <= 5


def test_intervals_hold_the_truth_as_often_as_they_say_in_noise_that_comes_in_bursts() -> None:
    held = 0
    for seed in range(100):
        rng, noise = np.random.default_rng(seed), np.zeros(PAGES)
        for page in range(1, PAGES):
            noise[page] = 0.4 * noise[page - 1] + rng.normal(0, 0.01)
        trend = time_findings(growth(0.04) * np.exp(noise))[0]
        held += trend.low <= 4 <= trend.high
    assert held >= 96


def test_the_first_four_pages_do_not_count() -> None:
    series = ratios(0, 0.0, bursts=False)
    wild = series.copy()
    wild[:4] = 10
    assert time_findings(wild) == time_findings(series)
    wild[4] = 10
    assert time_findings(wild) != time_findings(series)


def test_the_same_series_gives_the_same_certificate() -> None:
    assert time_findings(ratios(3, 0.02)) == time_findings(ratios(3, 0.02))
    assert time_findings(ratios(3, 0.02)) != time_findings(ratios(3, 0.02), seed=1)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_ratio_is_refused(bad: float) -> None:
    series = np.ones(PAGES)
    series[7] = bad
    with pytest.raises(ValueError):
        time_findings(series)
    with pytest.raises(ValueError):
        time_findings(np.ones(19))


def test_theil_sen_is_the_median_of_all_slopes_and_stands_a_quarter_of_wild_pages() -> None:
    rng = np.random.default_rng(0)
    series = rng.normal(size=(3, 15))
    pairs = list(itertools.combinations(range(15), 2))
    expected = [sorted((row[j] - row[i]) / (j - i) for i, j in pairs) for row in series]
    assert theil_sen(series) == pytest.approx([slopes[52] for slopes in expected])  # 105 pairs
    line = 0.01 * np.arange(80.0)
    line[rng.choice(80, 20, replace=False)] += 50
    assert theil_sen(line) == pytest.approx(0.01, rel=0.1)


def test_a_page_costs_what_its_undisturbed_tokens_cost() -> None:
    times = np.full((2, 40), 10.0)
    times[0, ::2] = 1000
    assert per_token(times) == pytest.approx([10, 10])
    assert per_token(np.arange(1.0, 6)) == 2


@pytest.mark.parametrize(("freedom", "table"), [(3, 5.841), (5, 4.032), (9, 3.250), (30, 2.750), (10**6, 2.576)])
def test_student(freedom: int, table: float) -> None:
    assert _student(freedom) == pytest.approx(table, rel=0.12 if freedom < 5 else 0.03)


# Memory


def memory(mib: np.ndarray) -> Finding:
    return memory_finding("resident memory", mib)


def test_flat_memory_passes() -> None:
    jitter = 240 + 0.05 * np.random.default_rng(0).random(PAGES)
    assert memory(jitter).outcome == FLAT


def test_a_leak_of_2_mib_fails_and_one_of_half_a_mib_does_not() -> None:
    leak = memory(240 + 2 * growth(1.0))
    assert leak.outcome == DRIFT
    assert leak.change == pytest.approx(2 * 31 / 35)
    assert leak.slope == pytest.approx(2 / 35)
    assert memory(240 + 0.5 * growth(1.0)).outcome == FLAT


@pytest.mark.parametrize("mib", [1.05, 1.2])
def test_no_leak_beyond_the_bound_passes(mib: float) -> None:
    assert memory(240 + mib * growth(1.0)).outcome != FLAT


def test_a_peak_on_the_way_does_not_matter_and_a_step_does() -> None:
    series = np.full(PAGES, 240.0)
    series[20:24] = 300
    assert memory(series).outcome == FLAT
    series[30:] = 242
    assert memory(series).outcome == DRIFT


def test_less_memory_is_fine() -> None:
    assert memory(240 - 5 * growth(1.0)).outcome == FLAT


def test_pages_before_the_fifth_may_grow() -> None:
    series = np.full(PAGES, 240.0)
    series[:4] = 200
    assert memory(series).outcome == FLAT
    series[4] = 200
    assert memory(series).outcome != FLAT


# The verdict


def finding(low: float, high: float, *, two_sided: bool = True) -> Finding:
    return Finding("it", "%", (low + high) / 2, low, high, 3.0, 0.0, two_sided)


@pytest.mark.parametrize(
    ("low", "high", "two_sided", "outcome"),
    [
        (-3, 3, True, FLAT),
        (-3.1, 1, True, UNCLEAR),
        (-1, 3.1, True, UNCLEAR),
        (3.1, 5, True, DRIFT),
        (-5, -3.1, True, DRIFT),
        (-9, 9, True, UNCLEAR),
        (-9, 2, False, FLAT),
        (-9, -8, False, FLAT),
        (-9, 4, False, UNCLEAR),
        (4, 5, False, DRIFT),
        (math.nan, math.nan, True, UNCLEAR),
    ],
)
def test_outcomes(low: float, high: float, two_sided: bool, outcome: str) -> None:
    found = finding(low, high, two_sided=two_sided)
    assert found.outcome == outcome
    assert verdict([finding(-1, 1), found])[0] == (PASS if outcome == FLAT else FAIL)


def test_the_reason_names_drifts_first() -> None:
    _, reason = verdict([finding(-9, 9), finding(4, 5)])
    assert reason.startswith("it changes: +4.50 % [+4.00, +5.00], allowed +-3 %; it is too noisy")
