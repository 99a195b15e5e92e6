"""A quality report for a reader: Markdown, and a plot of what quality costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seed_story.chart import BLUE, PAPER, Dots, Panel, draw_panel, save_image
from seed_story.contract import QFORMER, VIT

_WIDTH, _PANEL = 1600, 620  # px
_NOTHING = "nothing to measure"
_LEAST_KL = 1e-7  # what the plot's logarithm shows of a bundle that loses nothing

Row = Mapping[str, Any]


def to_markdown(report: Row) -> str:
    """The report as Markdown."""
    reference, bundles = report["reference"], report["bundles"]
    parts = [
        f"# Quality beside {reference['name']} {reference['recipe']}",
        f"{report['cpu']}, {report['threads']} threads, seed {report['seed']}. Intervals are bootstrapped over "
        "stories, pictures or things, 95 %; speeds are medians with quartiles.",
        *(f"**{_name(row)} misses its recipe's bounds and was written with --force.**"
          for row in bundles if row["missed_bounds"]),
        "## Next-token distributions", _words(bundles, None),
        "## Before and after the cache begins to forget", _words(bundles, ("before_eviction", "after_eviction")),
        "## Page by page", _pages(bundles),
        "## Pictures", _pictures(bundles),
        "## Does the story name what is in the picture?", _naming([reference, *bundles]),
        "## Cost", _cost([reference, *bundles]),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(rows[0]), *rest])


def figure(row: Row | None, name: str, form: str, scale: float = 1) -> str:
    """A figure with its interval behind it, if it has one."""
    if row is None or row[name] is None:
        return _NOTHING
    interval = row.get(f"{name}_interval")
    ends = f" [{', '.join(f'{scale * end:{form}}' for end in interval)}]" if interval else ""
    return f"{scale * row[name]:{form}}{ends}"


_WORDS = (
    ("perplexity ratio", "perplexity_ratio", ".4f", 1),
    ("mean KL, nat", "mean_kl", ".5f", 1),
    ("median KL", "median_kl", ".5f", 1),
    ("p99 KL", "p99_kl", ".4f", 1),
    ("top-1, %", "top1_agreement", ".2f", 100),
    ("top-5, %", "top5_agreement", ".2f", 100),
)


def _words(bundles: Sequence[Row], parts: Sequence[str] | None) -> str:
    rows = [["bundle", *(["where"] if parts else []), "tokens", *(title for title, *_ in _WORDS)]]
    for row in bundles:
        for part in parts or (None,):
            of = row if part is None else row[part]
            where = [] if part is None else [part.replace("_", " ")]
            tokens = "0" if of is None else f"{of['tokens']} of {of['stories']} stories"
            rows.append(
                [_name(row), *where, tokens, *(figure(of, name, form, scale) for _, name, form, scale in _WORDS)]
            )
    return table(rows)


def _pages(bundles: Sequence[Row]) -> str:
    rows = [["page", "tokens", *(f"{_name(row)}: {what}" for row in bundles for what in ("mean KL, nat", "top-1, %"))]]
    for page, first in bundles[0]["per_page"].items():
        cells = [page, str(first["tokens"])]
        for row in bundles:
            of = row["per_page"][page]
            cells += [figure(of, "mean_kl", ".5f"), figure(of, "top1_agreement", ".1f", 100)]
        rows.append(cells)
    return table(rows)


def _pictures(bundles: Sequence[Row]) -> str:
    rows = [["bundle", "graph", "pictures", "mean cosine", "worst picture", "least cosine"]]
    names = {VIT: "ViT", QFORMER: "ViT and Q-Former"}
    for row in bundles:
        for graph, of in row["picture_cosine"].items():
            figures = [figure(of, name, ".5f") for name in ("mean", "worst_picture", "least")]
            rows.append([_name(row), names[graph], str(of["pictures"]), *figures])
    return table(rows)


def _naming(rows: Sequence[Row]) -> str:
    made = [["bundle", "pictures", "named, %", "change, points"]]
    for row in rows:
        of = row["naming"]
        made.append(
            [_name(row), str(of["pictures"]), figure(of, "share", ".1f", 100), figure(of, "change", "+.1f", 100)]
        )
    return table(made)


def _cost(rows: Sequence[Row]) -> str:
    made = [["bundle", "MB", "of float32", "decode, tokens/s", "x", "prefill, tokens/s", "load, s", "peak MiB"]]
    for row in rows:
        made.append([
            _name(row), f"{row['bytes'] / 1e6:.1f}", f"{row['size_ratio']:.3f}",
            _quartiles(row["decode_tokens_per_second"], ".1f"), _quartiles(row["decode_ratio"], ".2f"),
            _quartiles(row["prefill_tokens_per_second"], ".0f"),
            figure(row, "load_s", ".2f"), figure(row, "peak_mib", ".0f"),
        ])  # fmt: skip
    return table(made)


def _quartiles(values: Sequence[float], form: str) -> str:
    low, median, high = (f"{value:{form}}" for value in values)
    return f"{median} [{low}, {high}]"


def _name(row: Row) -> str:
    return f"{row['recipe']}{' (forced)' if row['missed_bounds'] else ''}"


def number(value: float | None, form: str = ".4f") -> str:
    """A figure of one matrix."""
    return "no number" if value is None else f"{value:{form}}"


def located(rows: Sequence[Row]) -> str:
    """Where each bundle leaves the reference, as Markdown; of the other matrices, the worst of each graph."""
    parts = []
    for row in rows:
        bad = row["first_bad"]
        said = f"leaves the reference at {bad['graph']}, {bad['matrix']}" if bad else "has no matrix that stands out"
        worst: dict[str, Row] = {}
        for one in sorted(row["matrices"], key=lambda one: -(math.inf if one["own"] is None else one["own"])):
            worst.setdefault(one["graph"], one)
        shown = [bad, *worst.values()] if bad else list(worst.values())
        cells = [[one["graph"], one["matrix"], number(one["own"]), number(one["inherited"])] for one in shown]
        head = ["graph", "matrix", "its own relative error", "with what it inherited"]
        parts.append(f"**{_name(row)}** {said}.\n\n{table([head, *cells])}")
    return "\n\n".join(parts) + "\n"


def ranking(rows: Sequence[Row]) -> str:
    """What each matrix costs when it alone is quantized, as Markdown, the dearest of each graph first."""
    parts = []
    for row in rows:
        head = ["graph", "matrix", "cost: KL in nat, or 1 - cosine", "positions or pictures"]
        costs = row["sensitivity"]
        cells = [[one["graph"], one["matrix"], number(one["cost"], ".3g"), str(one["measured"])] for one in costs]
        parts.append(f"**{_name(row)}**, each matrix quantized alone:\n\n{table([head, *cells])}")
    return "\n\n".join(parts) + "\n"


def save_pareto(file: Path, report: Row) -> None:
    """Draws divergence against size and against speed; the lower left, and the lower right, are best.

    Raises:
        SeedStoryError: it can't be written.
    """
    rows = report["bundles"]
    kl = np.array([math.log10(max(row["mean_kl"], _LEAST_KL)) for row in rows])
    megabytes = np.array([row["bytes"] / 1e6 for row in rows])
    speed = np.array([row["decode_tokens_per_second"][1] for row in rows])
    title = f"{report['reference']['name']}: {rows[0]['tokens']} tokens of held-out stories, {report['cpu']}"
    names = [_name(row) for row in rows]
    image = Image.new("RGB", (_WIDTH, 2 * _PANEL), PAPER)
    for index, (axis, x) in enumerate((("size of the bundle, MB", megabytes), ("decode, tokens/s", speed))):
        panel = Panel(title, axis, "log10 of the mean KL, nat", x, [Dots("bundle", BLUE, kl)], labels=names)
        draw_panel(image, (0, index * _PANEL, _WIDTH, (index + 1) * _PANEL), panel)
    save_image(file, image)
