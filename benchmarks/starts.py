"""How long a new process takes to a story's first token: with the engine's packed weights at hand, and without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from seed_story.errors import SeedStoryError
from seed_story.files import CACHE_VARIABLE

PROMPT_TOKENS = 32


def start(bundle: Path, threads: int, cache: Path | None = None) -> dict[str, Any]:
    """One new process, from before it is made until its first token is read from its standard output.

    Args:
        cache: where it finds and keeps packed weights; by default where this process does.

    Returns:
        `first_token_s`, and what `benchmarks/workers/start_worker.py` tells.

    Raises:
        SeedStoryError: it failed.
    """
    environment = {**os.environ, **({CACHE_VARIABLE: str(cache)} if cache else {})}
    command = [sys.executable, "-m", "benchmarks.workers.start_worker", str(bundle), str(threads), str(PROMPT_TOKENS)]
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.readline()
        first_token_s = time.perf_counter() - began
        rest, complaint = process.stdout.read(), process.stderr.read()
    if not first or process.returncode:
        raise SeedStoryError("a process that should open the bundle failed", got=complaint.strip()[-300:],
                             expected=f"a first token of {bundle}")  # fmt: skip
    return {"first_token_s": first_token_s, **json.loads(rest)}


def cold_start(bundle: Path, threads: int) -> dict[str, Any]:
    """As `start`, of a bundle that this machine never opened; but its files lie in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        return start(bundle, threads, Path(folder))
