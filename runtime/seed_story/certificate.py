"""Is a long story's series of figures flat? The statistics of `seed-story certify`, on numbers alone.

**Time.** The series is, for each page, the ratio of the story's time a token to that of a short story told beside it
(`certify.py`), so that what slows the whole machine is out of it before anything is fitted. On its logarithm:

- *trend*: the Theil-Sen line, the median of the slopes of all pairs of pages, from page 5 to the last page. Nearly a
  third of the pages may be wild before it moves (Sen, 1968).
- *ends*: the median of the last fifth of these pages against that of the first fifth. A line is blind to a jump on the
  last pages; this isn't.

Each gets a 99 % interval from a block bootstrap: residuals are put together anew in blocks of neighbouring pages, as
noise comes in bursts (Künsch, 1989), and what the two figures make of such noise alone is how wrong they may be. It is
widened by Student's t for as many blocks as there are, since few of them tell little about the noise.

What no statistics can tell from a drift is a machine that gets slower for good halfway: that is what the division by
the short story is for. And a jump on the last few pages alone is not seen; tell more pages.

**Memory.** A counter, not a sample: no model of noise, no fit. The interval runs from the least to the greatest
difference between one of the last five pages and one of the first five counted. A peak in between doesn't matter, and
no leak beyond the bound passes.

PASS takes every interval inside its bound. One that lies outside is a finding; one that straddles the bound fails
too, as too noisy to tell: noise can cost a certificate, never earn one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float64]

FIRST_PAGE = 5
"""The page that the last one is compared with; those before it warm caches and allocators up."""

TIME_BOUND_PERCENT = 3.0
MEMORY_BOUND_MIB = 1.0
WINDOW = 5
"""Pages at either end that memory is compared over."""

LEAST_PAGES, MOST_PAGES = 20, 1000
"""Below, the bootstrap has too few blocks to be believed; above, the pairs of pages are too many for a device."""

PASS, FAIL = "PASS", "FAIL"
FLAT, DRIFT, UNCLEAR = "flat", "drift", "unclear"

_CONFIDENCE, _NORMAL = 0.99, 2.5758  # and the normal distribution's quantile for it, two-sided
_RESAMPLES = 1000
_QUARTILE = 0.25
_MOST_NUMBERS = 250_000  # at a time, about: 2 MB, which the processor's cache holds


@dataclass(frozen=True)
class Page:
    """What one page took.

    Args:
        page: from 1 on.
        picture: whether it showed one.
        reading_ms: its picture and text, up to its first token.
        ms_per_token: the lower quartile of its further tokens.
        short_ms_per_token: the same of the short story beside it.
        ratio: the one by the other.
        resident_mib, private_mib: memory after it, see `Resident`.
    """

    page: int
    picture: bool
    reading_ms: float
    ms_per_token: float
    short_ms_per_token: float
    ratio: float
    resident_mib: float
    private_mib: float


@dataclass(frozen=True)
class Finding:
    """How much one figure changed from page 5 to the last page.

    Args:
        name: which figure.
        unit: of the numbers here.
        change: the estimate.
        low, high: its interval.
        bound: how much is allowed.
        slope: by the Theil-Sen line, a page.
        two_sided: whether a decrease counts as well.
    """

    name: str
    unit: str
    change: float
    low: float
    high: float
    bound: float
    slope: float
    two_sided: bool

    @property
    def outcome(self) -> str:
        """FLAT: the interval is inside the bound; DRIFT: outside; UNCLEAR: on both sides."""
        floor = -self.bound if self.two_sided else -math.inf
        if floor <= self.low and self.high <= self.bound:
            return FLAT
        return DRIFT if self.low > self.bound or self.high < floor else UNCLEAR

    def text(self) -> str:
        """The change, its interval and the bound, for a reader."""
        sign = "+-" if self.two_sided else "+"
        interval = f"[{self.low:+.2f}, {self.high:+.2f}]"
        return f"{self.change:+.2f} {self.unit} {interval}, allowed {sign}{self.bound:g} {self.unit}"


def verdict(findings: Sequence[Finding]) -> tuple[str, str]:
    """PASS or FAIL, and why; drifts are named before what is too noisy."""
    drifts = [f"{f.name} changes: {f.text()}" for f in findings if f.outcome == DRIFT]
    unclear = [f"{f.name} is too noisy: {f.text()}; needs more pages" for f in findings if f.outcome == UNCLEAR]
    if reasons := drifts + unclear:
        return FAIL, "; ".join(reasons)
    return PASS, "every interval lies inside its bound"


def per_token(times_ms: Series) -> Series:
    """What a token of a page costs, from its tokens' times `[..., tokens]`: the lower quartile.

    Noise only ever adds time, so the faster tokens tell the cost; a median would lie between the quiet and the
    disturbed ones on a machine that is busy half of the time. What slows fewer than three quarters isn't seen.
    """
    return np.asarray(np.quantile(times_ms, _QUARTILE, axis=-1))


def time_findings(ratios: Series, *, seed: int = 0) -> list[Finding]:
    """Trend and ends of the time a token.

    Args:
        ratios: `[pages]` from page 1 on, above 0: the story's time a token by that of the short story beside it.
        seed: of the bootstrap.

    Raises:
        ValueError: too few pages, or a ratio that is none.
    """
    values = _counted(ratios)
    if not (values > 0).all():
        raise ValueError("a ratio of times isn't above 0")
    logs = np.log(values)
    slope = float(theil_sen(logs))
    line = slope * np.arange(len(logs))
    residuals = logs - line - np.median(logs - line)
    figures: dict[str, Callable[[Series], Series]] = {
        "time per token, trend": lambda series: theil_sen(series) * (series.shape[-1] - 1),
        "time per token, ends": _ends,
    }
    noises = _resampled(residuals, np.random.default_rng(seed))
    return [_time_finding(name, figure, logs, slope, noises) for name, figure in figures.items()]


def _time_finding(name: str, figure: Callable[[Series], Series], logs: Series, slope: float, noises: Series) -> Finding:
    """The figure, and around it what it makes of noise alone (the basic bootstrap)."""
    parts = np.array_split(noises, 1 + noises.size * len(logs) // _MOST_NUMBERS)
    errors = np.concatenate([figure(part) for part in parts])
    below, above = np.quantile(errors, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    found, wider = float(figure(logs)), _student(len(logs) // _block(len(logs)) - 1) / _NORMAL
    change, low, high = (_percent(log) for log in (found, found - wider * above, found - wider * below))
    return Finding(name, "%", change, low, high, TIME_BOUND_PERCENT, _percent(slope), two_sided=True)


def memory_finding(name: str, mib: Series) -> Finding:
    """Growth of a memory figure.

    Args:
        mib: `[pages]` from page 1 on, MiB.

    Raises:
        ValueError: too few pages, or a figure that is none.
    """
    values = _counted(mib)
    first, last = values[:WINDOW], values[-WINDOW:]
    return Finding(
        name,
        "MiB",
        float(np.median(last) - np.median(first)),
        float(last.min() - first.max()),
        float(last.max() - first.min()),
        MEMORY_BOUND_MIB,
        float(theil_sen(values)),
        two_sided=False,
    )


def theil_sen(series: Series) -> Series:
    """The median slope of all pairs, a step: `[..., n]` to `[...]`."""
    earlier, later = np.triu_indices(series.shape[-1], 1)
    slopes = (series[..., later] - series[..., earlier]) / (later - earlier)
    return np.asarray(np.median(slopes, axis=-1))


def _counted(series: Series) -> Series:
    """The pages that count."""
    values = np.asarray(series, np.float64)
    if len(values) < LEAST_PAGES or not np.isfinite(values).all():
        raise ValueError(f"expected {LEAST_PAGES} or more finite figures")
    return values[FIRST_PAGE - 1 :]


def _ends(series: Series) -> Series:
    window = series.shape[-1] // 5
    last, first = series[..., -window:], series[..., :window]
    return np.asarray(np.median(last, axis=-1) - np.median(first, axis=-1))


def _resampled(residuals: Series, rng: np.random.Generator) -> Series:
    """`[_RESAMPLES, n]` from `[n]`: blocks from random places, the end joined to the beginning."""
    count, length = len(residuals), _block(len(residuals))
    starts = rng.integers(0, count, (_RESAMPLES, -(-count // length), 1))
    places = (starts + np.arange(length)).reshape(_RESAMPLES, -1)[:, :count] % count
    return np.asarray(residuals[places])


def _block(count: int) -> int:
    """Pages in a block."""
    return round(math.sqrt(count))


def _student(freedom: int) -> float:
    """The quantile of Student's t for `_CONFIDENCE` (Abramowitz and Stegun, 26.7.5)."""
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _percent(log: float) -> float:
    return 100 * math.expm1(log)
