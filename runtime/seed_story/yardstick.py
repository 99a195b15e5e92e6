"""What a token costs on this machine right now: a second process that tells one short story again and again.

`seed-story certify` divides by it. A machine that is shared, or that heats up, slows both stories; only a story that
costs more because it is long slows one of them. It is a process of its own so that nothing that a long story might
clog (the allocator, the engine's state) is shared, and so that its memory isn't counted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seed_story.errors import SeedStoryError
from seed_story.story import SEEDStory, Story

BEGINNING = "Once upon a time,"
_BEGIN, _TOKEN = "begin", "token"


class Yardstick:
    """The process, seen from the one that measures.

    Args:
        bundle: its folder.
        threads, backend: as the measured model has them.

    Raises:
        SeedStoryError: it can't be started, or can't load the bundle.
    """

    def __init__(self, bundle: Path, *, threads: int, backend: str) -> None:
        if not sys.executable:
            raise SeedStoryError("a second process can't be started: this Python doesn't know its own program")
        folder = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "seed_story.yardstick", str(bundle), str(threads), backend]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Starts the short story anew, and reads its beginning."""
        self._ask(_BEGIN)

    def token_ms(self) -> float:
        """Tells one more token of it; how long that took."""
        return float(self._ask(_TOKEN)["ms"])

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> Yardstick:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        except OSError:  # it has ended; the answer that isn't there says so
            pass
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            how = signal.strsignal(-code) if code < 0 else f"exit code {code}"
            raise SeedStoryError("the process that tells the short story has ended", got=how)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SeedStoryError("the process that tells the short story failed", got=answer["error"])
        return answer


def timed_token(story: Story, clock: Callable[[], float] = time.perf_counter) -> float:
    """Tells one token; how long that took, ms."""
    started = clock()
    for _ in story.tell(max_tokens=1):
        pass
    return 1e3 * (clock() - started)


def main(bundle: str, threads: str, backend: str) -> None:
    """Answers until standard input ends: a line of JSON for each line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that measures; it ends this one
    try:
        with SEEDStory(bundle, threads=int(threads), backend=backend) as model:
            _reply({})
            _serve(model)
    except SeedStoryError as error:
        _reply({"error": str(error)})


def _serve(model: SEEDStory) -> None:
    story = model.begin()
    for line in sys.stdin:
        if line.strip() == _BEGIN:
            story = model.begin().add_text(BEGINNING)
            timed_token(story)  # reads the beginning
            _reply({})
        else:
            _reply({"ms": timed_token(story)})


def _reply(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
