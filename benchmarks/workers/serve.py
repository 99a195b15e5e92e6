"""Answers jobs with one engine: a line of JSON on standard input, a line of JSON on standard output.

Arguments: a module beside this file, and what its `Engine` takes. The first line that comes out tells the engine's
version. Then there are two jobs:

- `{"tokens": [...], "text": "...", "steps": n}`: starts over, reads the tokens (the text's) at once, then n single
  tokens. Answers `{"prefill_s", "step_s": [...], "next"}`: seconds, and the most probable token after the prompt.
- `{"picture": i, "repeats": n, "file": path or null}`: looks at the picture n times. Answers `{"step_s": [...]}`, and
  saves the features, float32 `[tokens, width]`, to the file.

Every answer has `peak_rss_mib` too. What an engine prints goes to standard error.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def answer(engine: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Does one job; an engine that can't be timed call by call has a `turn` of its own."""
    if hasattr(engine, "turn"):
        return dict(engine.turn(job))
    import numpy as np  # LiteRT-LM has none in its venv, and doesn't come here

    if "picture" in job:
        engine.show(job["picture"])
        taken = [seconds(engine.look) for _ in range(job["repeats"])]
        if job["file"]:
            engine.look()
            np.save(job["file"], np.asarray(engine.features(), np.float32).reshape(-1, engine.features().shape[-1]))
        return {"step_s": taken}
    engine.reset()
    prefill_s = seconds(partial(engine.feed, job["tokens"]))
    best = int(np.argmax(engine.logits()))
    steps = [seconds(partial(engine.feed, [token])) for token in job["tokens"][: job["steps"]]]
    return {"prefill_s": prefill_s, "step_s": steps, "next": best}


def peak_rss_mib() -> float:
    """The most memory this process has had. VmHWM first: `getrusage` begins with what the parent had."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Answers jobs until standard input ends."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        engine = importlib.import_module(sys.argv[1]).Engine(*sys.argv[2:])
        print(json.dumps({"version": engine.version}), file=out, flush=True)
        for line in sys.stdin:
            said = {**answer(engine, json.loads(line)), "peak_rss_mib": peak_rss_mib()}
            print(json.dumps(said), file=out, flush=True)


if __name__ == "__main__":
    main()
