"""What this process has used."""

from __future__ import annotations

import sys
from pathlib import Path

_MIB = 1024 * 1024


def peak_rss_mib(status: Path = Path("/proc/self/status")) -> float | None:
    """The most memory this process has had in RAM so far, in MiB; None where that can't be read.

    Linux's own VmHWM comes first: `getrusage` there starts from what the process that started this one had,
    which a large parent makes far too much.
    """
    try:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if peak <= 0:
        return None
    return peak / _MIB if sys.platform == "darwin" else peak / 1024
