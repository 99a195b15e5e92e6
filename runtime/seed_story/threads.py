"""How many CPU threads a graph call gets; `python -m seed_story.threads BUNDLE` times a token by their number.

A call's threads wait for each other after every operator, so the slowest core sets the pace: of a phone's or a hybrid
processor's cores only the fast ones are counted.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from seed_story.device import ROOT, performance_cores, usable_cores

if TYPE_CHECKING:
    from seed_story.bundle import Bundle

MOST_THREADS = 4
"""More rarely helps a decoder that is bound by memory."""

_WARM_UP, _STEPS = 3, 20


def default_threads(root: Path = ROOT) -> int:
    """The performance cores that this process may use, at most four."""
    return min(MOST_THREADS, performance_cores(root) or usable_cores() or 1)


def token_ms(bundle: Bundle, threads: int) -> float:
    """Milliseconds of a decode step with so many threads, the median of some.

    Raises:
        BackendError: the engine refuses the bundle.
    """
    from seed_story.story import SEEDStory

    with SEEDStory(bundle, threads=threads) as model:
        times = []
        for _ in range(_WARM_UP + _STEPS):
            started = time.perf_counter()
            model.decoder.step(0)
            times.append(1e3 * (time.perf_counter() - started))
    return sorted(times[_WARM_UP:])[_STEPS // 2]


def main(path: str) -> None:
    """Prints milliseconds of a token by number of threads, as JSON: 1, 2, 4 ... up to all cores, and the default."""
    from seed_story.bundle import Bundle
    from seed_story.files import CACHE_VARIABLE

    most = usable_cores() or 1
    numbers = sorted({2**power for power in range(most.bit_length())} | {default_threads(), most})
    with tempfile.TemporaryDirectory() as folder:  # a check leaves nothing behind
        os.environ[CACHE_VARIABLE] = folder
        bundle = Bundle.open(path)
        print(json.dumps({str(threads): round(token_ms(bundle, threads), 2) for threads in numbers}))


if __name__ == "__main__":
    main(sys.argv[1])
