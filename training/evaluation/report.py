"""A metric's figures for a reader: one a line, its interval beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seed_story.output import table

_INTERVAL = "_interval"


def lines(report: Mapping[str, Any], indent: str = "") -> str:
    """A report as a table; a mapping inside it becomes an indented table of its own."""
    plain = {name: value for name, value in report.items() if not isinstance(value, Mapping)}
    rows = [(name.replace("_", " "), _figure(value, plain.get(f"{name}{_INTERVAL}")))
            for name, value in plain.items() if not name.endswith(_INTERVAL)]  # fmt: skip
    text = table(rows, indent)
    for name, value in report.items():
        if isinstance(value, Mapping):
            text += f"{indent}{name.replace('_', ' ')}\n{lines(value, indent + '  ')}"
    return text


def _figure(value: object, interval: list[float] | None) -> str:
    if value is None:
        return "nothing to measure"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" + (f"  [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
