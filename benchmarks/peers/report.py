"""Who was faster: a table for a reader, and the same for a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.peers.measure import Result
from benchmarks.peers.table import OURS, Engine
from benchmarks.spread import quartiles, spread
from quantization.render import table

_SPEEDS = {"decoder": ("decode", "prefill"), "vit": ("vit",)}
_UNITS = {"decode": "decode_tokens_per_second", "prefill": "prefill_tokens_per_second", "vit": "pictures_per_second"}
_PEAK = "peak_rss"
_HEADS = {
    "decoder": ("decode, tokens/s", "prefill, tokens/s", "peak memory, MiB", "first choices kept",
                "decode, ours x", "prefill, ours x"),
    "vit": ("pictures/s", "peak memory, MiB", "mean cosine", "ours x"),
}  # fmt: skip


def ratio_name(figure: str, peer: Engine, ours: str) -> str:
    """`decode_vs_PEER` and its like; `vit_int8_vs_PEER` beside one of ours that isn't the like one."""
    if figure == _PEAK:
        figure = "vit_peak_rss" if peer.kind == "vit" else _PEAK
    if ours != peer.ours[0]:
        figure = f"{figure}_{ours.removeprefix('vit_')}"
    return f"{figure}_vs_{peer.key}"


def ratios(peers: Sequence[Engine], results: Mapping[str, Result]) -> dict[str, list[float] | None]:
    """Ours by theirs, round by round: quartiles over rounds; None for a peer that couldn't be measured.

    Of speeds, more than 1 is better for this project; of memory, less.
    """
    found: dict[str, list[float] | None] = {}
    for peer in peers:
        for ours in peer.ours:
            for figure in (*_SPEEDS[peer.kind], _PEAK):
                mine, theirs = (results[key].rounds.get(figure) for key in (ours, peer.key))
                name = ratio_name(figure, peer, ours)
                found[name] = quartiles(np.array(mine) / np.array(theirs)) if mine and theirs else None
    return found


def to_json(peers: Sequence[Engine], results: Mapping[str, Result]) -> dict[str, Any]:
    """`engines`, `gaps`, `ratios` (medians) and `ratio_quartiles`."""
    titles = {engine.key: engine.title for engine in (*OURS, *peers)}
    engines: dict[str, Any] = {}
    for key, result in results.items():
        if not result.gap:
            row: dict[str, Any] = {"title": titles[key], "version": result.version}
            row |= {"first_choices": result.first_choices, "cosine": result.cosine}
            for figure, values in result.rounds.items():
                if figure == _PEAK:
                    row["peak_rss_mib"] = round(values[-1])
                else:
                    row[_UNITS[figure]] = quartiles(np.array(values))
            engines[key] = {name: value for name, value in row.items() if value is not None}
    all_ratios = ratios(peers, results)
    return {
        "engines": engines,
        "gaps": {key: result.gap for key, result in results.items() if result.gap},
        "ratios": {name: found and found[1] for name, found in all_ratios.items()},
        "ratio_quartiles": all_ratios,
    }


def to_text(peers: Sequence[Engine], results: Mapping[str, Result]) -> str:
    """Markdown: a table for each kind of engine, then the gaps."""
    found, parts = ratios(peers, results), []
    for kind, head in _HEADS.items():
        here = [engine for engine in (*OURS, *peers) if engine.kind == kind and engine.key in results]
        if here:
            rows = [_row(engine, results[engine.key], found) for engine in here]
            parts.append(table([("engine", *head), *rows]))
    if gaps := [f"- {engine.title}: {results[engine.key].gap}" for engine in peers if results[engine.key].gap]:
        parts.append("Not measured:\n\n" + "\n".join(gaps))
    return "\n\n".join(parts) + "\n"


def _row(engine: Engine, result: Result, found: Mapping[str, list[float] | None]) -> list[str]:
    if result.gap:
        return [engine.title, "gap", *[""] * (len(_HEADS[engine.kind]) - 1)]
    name = engine.title if not engine.ours else f"{engine.title} ({result.version})"
    speeds = [spread(quartiles(np.array(result.rounds[figure])), 1) for figure in _SPEEDS[engine.kind]]
    kept = result.first_choices or f"{result.cosine:.5f}"
    beside = [_beside(engine, figure, found) for figure in _SPEEDS[engine.kind]]
    return [name, *speeds, f"{result.rounds[_PEAK][-1]:.0f}", kept, *beside]


def _beside(peer: Engine, figure: str, found: Mapping[str, list[float] | None]) -> str:
    named = [(ours.removeprefix("vit_"), found[ratio_name(figure, peer, ours)]) for ours in peer.ours]
    return "; ".join(f"{ours}: {spread(ratio, 2)}" for ours, ratio in named if ratio)
