"""What the readings of `training.evaluation.length` say: figures, a table, a plot.

At each length N, over the pages that were scored up to it:

- loss and perplexity a token, given all the pages before;
- `own_picture`, `first_picture`: nats a token that the right picture saves, against another story's in its place;
- `minus_text_sink`: the loss against that under `text-sink`, on the same tokens.

Of what the model told itself, over the ten pages up to N: distinct-2, and how many pages name the main thing of their
own and of the first picture; over all pages up to N, the longest run of words that stands twice. Intervals are
bootstrapped over stories, 95 %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from seed_story.chart import BLUE, GREEN, INK, ORANGE, PALE, PAPER, PURPLE, RED, Dots, Panel, draw_panel, font
from seed_story.policies import MULTIMODAL_SINK, TEXT_SINK, WINDOW
from training.evaluation.bootstrap import Interval, Sums, difference_interval, mean_interval
from training.evaluation.length import DENSE, PageScore, PageTold, Plan, Reading, scored_pages
from training.evaluation.naming import words_of
from training.evaluation.repetition import distinct, longest_repeat

_LAST = 10  # pages that a told story is looked at over
_WIDTH, _HEAD, _PANEL = 1600, 180, 430  # px
_COLOURS = {DENSE: INK, WINDOW: RED, TEXT_SINK: ORANGE, MULTIMODAL_SINK: BLUE}
_MORE_COLOURS = (GREEN, PURPLE, PALE)
_SCORES: dict[str, Callable[[PageScore], float]] = {
    "loss": lambda score: score.loss,
    "own_picture": lambda score: score.other_own - score.loss,
    "first_picture": lambda score: score.other_first - score.loss,
}


def report(readings: Sequence[Reading], plan: Plan) -> dict[str, Any]:
    """The figures of every cache at every length; see the top of the file."""
    by_cache = {name: [r for r in readings if r.cache == name] for name in dict.fromkeys(r.cache for r in readings)}
    plain = by_cache.get(TEXT_SINK, [])
    figures = {name: {str(length): _at(mine, plain, length, plan) for length in plan.lengths}
               for name, mine in by_cache.items()}  # fmt: skip
    return {"lengths": list(plan.lengths), "span": plan.span, "caches": figures, **verdict(figures)}


def _at(readings: Sequence[Reading], plain: Sequence[Reading], length: int, plan: Plan) -> dict[str, Any]:
    pages, seed = scored_pages([length], plan.span), plan.seed
    told = [reading.told[:length] for reading in readings if reading.told]
    readings, plain = ([reading for reading in of if reading.scores] for of in (readings, plain))
    figures: dict[str, Any] = {"stories": len(readings)}
    for name, value in _SCORES.items():
        sums = _sums(readings, pages, value)
        figures |= {"tokens": int(sums.counts.sum()), name: sums.mean}
        figures[f"{name}_interval"] = mean_interval(sums, seed=seed)
    interval = figures["loss_interval"]
    figures["perplexity"] = float(np.exp(figures["loss"]))
    figures["perplexity_interval"] = interval and [float(np.exp(end)) for end in interval]
    both = {r.story for r in readings} & {r.story for r in plain}
    if both:
        first, second = (_sums([r for r in of if r.story in both], pages, _SCORES["loss"]) for of in (readings, plain))
        figures["minus_text_sink"] = first.mean - second.mean
        figures["minus_text_sink_interval"] = difference_interval(first, second, seed=seed)
    return figures | _told(told, seed)


def _sums(readings: Sequence[Reading], pages: Sequence[int], value: Callable[[PageScore], float]) -> Sums:
    """By story, in the order of their names."""
    scores = [[s for s in r.scores if s.page in pages] for r in sorted(readings, key=lambda reading: reading.story)]
    return Sums(
        np.array([sum(map(value, of)) for of in scores]), np.array([sum(s.tokens for s in of) for of in scores], float)
    )


def _told(stories: Sequence[Sequence[PageTold]], seed: int) -> dict[str, Any]:
    if not stories:
        return {}
    words = [words_of(" ".join(page.text for page in story[-_LAST:])) for story in stories]
    values: dict[str, list[float | None]] = {
        "told_distinct_2": [distinct(each, 2) for each in words],
        "told_longest_repeat_words": [float(longest_repeat(words_of(" ".join(p.text for p in s)))) for s in stories],
        "told_names_own": [_share([page.names_own for page in story[-_LAST:]]) for story in stories],
        "told_names_first": [_share([page.names_first for page in story[-_LAST:]]) for story in stories],
    }
    figures: dict[str, Any] = {"told_stories": len(stories)}
    for name, found in values.items():
        known = [value for value in found if value is not None]
        if known:
            sums = Sums(np.array(known), np.ones(len(known)))
            figures |= {name: sums.mean, f"{name}_interval": mean_interval(sums, seed=seed)}
    return figures


def _share(named: Sequence[bool | None]) -> float | None:
    known = [value for value in named if value is not None]
    return sum(known) / len(known) if known else None


def verdict(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Whether "multimodal sink <= text sink < window" holds at each length: `yes`, `no`, or `unclear`.

    `yes` and `no` take an interval on one side of 0; for "<=" a difference whose interval holds 0 is `unclear`.
    """
    found: dict[str, Any] = {}
    for name, sign, said in (
        (MULTIMODAL_SINK, 1, "multimodal_sink_at_most_text_sink"),
        (WINDOW, -1, "text_sink_below_window"),
    ):
        if name in figures:
            found[said] = {
                length: _side(at.get("minus_text_sink_interval"), sign) for length, at in figures[name].items()
            }
    return found


def _side(interval: Interval | None, sign: int) -> str:
    if interval is None:
        return "unclear"
    low, high = sorted(sign * end for end in interval)
    return "yes" if high < 0 else "no" if low > 0 else "unclear"


def markdown(result: Mapping[str, Any]) -> str:
    """The figures as three tables."""
    lengths = [str(length) for length in result["lengths"]]
    parts = []
    for title, name, digits in (
        ("Perplexity a token", "perplexity", 2),
        ("Loss minus that under text-sink, nats a token", "minus_text_sink", 3),
        ("What the page's own picture saves, nats a token", "own_picture", 3),
        ("What the first picture saves, nats a token", "first_picture", 3),
        ("Told: distinct-2 of the last ten pages", "told_distinct_2", 3),
        ("Told: longest run of words that stands twice", "told_longest_repeat_words", 1),
        ("Told: share of the last ten pages that name their picture's main thing", "told_names_own", 2),
        ("Told: share of the last ten pages that name the first picture's main thing", "told_names_first", 2),
    ):
        rows = [[_cell(at[length], name, digits) for length in lengths] for at in result["caches"].values()]
        if not any("none" not in cell for row in rows for cell in row):
            continue
        head = f"| {title} | {' | '.join(f'{length} pages' for length in lengths)} |\n|---|{'---|' * len(lengths)}\n"
        body = "".join(f"| {cache} | {' | '.join(row)} |\n" for cache, row in zip(result["caches"], rows, strict=True))
        parts.append(head + body)
    return "\n".join(parts)


def _cell(at: Mapping[str, Any], name: str, digits: int) -> str:
    if name not in at:
        return "none"
    interval = at.get(f"{name}_interval")
    return f"{at[name]:.{digits}f}" + (f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else "")


def plot(result: Mapping[str, Any], caption: str) -> Image.Image:
    """The losses, what pictures save, and the told stories' variety by length, RGB."""
    panels = [
        _panel(result, "Held-out pages, given all the pages before", "loss", "nats a token"),
        _panel(result, "What the page's own picture saves", "own_picture", "nats a token"),
        _panel(result, "What the story's first picture saves", "first_picture", "nats a token"),
        _panel(
            result,
            "Told by the model: different pairs of words among all, last ten pages",
            "told_distinct_2",
            "distinct-2",
        ),
    ]
    shown = [panel for panel in panels if panel.series]
    image = Image.new("RGB", (_WIDTH, _HEAD + _PANEL * len(shown)), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((40, 24), "A story that outgrows its cache", font=font(36), fill=INK)
    draw.text((40, 76), caption, font=font(20), fill=PALE)
    across = 40.0
    for name, colour in _colours(result).items():
        draw.ellipse((across, 122, across + 14, 136), fill=colour)
        draw.text((across + 22, 116), name, font=font(20), fill=INK)
        across += 50 + draw.textlength(name, font=font(20))
    for index, panel in enumerate(shown):
        draw_panel(image, (0, _HEAD + index * _PANEL, _WIDTH, _HEAD + (index + 1) * _PANEL), panel)
    return image


def _colours(result: Mapping[str, Any]) -> dict[str, str]:
    more = iter(_MORE_COLOURS * len(result["caches"]))
    return {name: _COLOURS.get(name) or next(more) for name in result["caches"]}


def _panel(result: Mapping[str, Any], title: str, name: str, unit: str) -> Panel:
    series, colours = [], _colours(result)
    for cache, at in result["caches"].items():
        points = list(at.values())
        if all(name in point for point in points):
            y = np.array([point[name] for point in points])
            spans = np.array([point[f"{name}_interval"] or [point[name]] * 2 for point in points])
            series.append(Dots(cache, colours[cache], y, spans=spans))
    return Panel(title, "pages of the story", unit, np.array(result["lengths"], float), series, legend=False)
