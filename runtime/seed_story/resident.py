"""How much memory this process has in RAM right now, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Resident:
    """A process's memory, MiB.

    Args:
        total_mib: all its pages in RAM (RSS), those of mapped files included.
        private_mib: its anonymous pages, swapped ones included: what nobody but the process itself can give back.
            When the kernel drops pages of a mapped file, the total falls, and could hide a leak; this can't.
    """

    total_mib: float
    private_mib: float


def resident(process: Path = Path("/proc/self")) -> Resident | None:
    """What the process has in RAM; None where that can't be read, as outside Linux.

    `smaps_rollup` counts the pages themselves. `status` adds counters up that each CPU keeps for itself and
    hands in late: it may be wrong by more than a leak is large.
    """
    try:
        figures = _kilobytes((process / "smaps_rollup").read_text())
        return Resident(figures["Rss"] / 1024, (figures["Anonymous"] + figures["Swap"]) / 1024)
    except (OSError, KeyError, ValueError):
        return None


def _kilobytes(text: str) -> dict[str, int]:
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) == 3 and row[2] == "kB"}
