"""An engine in a process of its own, which may die or hang: then it is a gap, and the others go on."""

from __future__ import annotations

import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

from benchmarks.peers.venvs import Gap, last_line


class Worker:
    """A process that answers jobs; see `benchmarks/workers/serve.py`.

    Args:
        patience: seconds that it may take to start, and for each job.

    Raises:
        Gap: it didn't start.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], patience: float) -> None:
        self.patience = patience
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # `close` closes it
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, encoding="utf-8",
                env=environment,
            )  # fmt: skip
        except OSError as error:
            raise Gap(f"{command[0]}: {error.strerror}") from error
        self._lines: queue.Queue[str] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
        self.version = str(self._read()["version"])

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Does one job.

        Raises:
            Gap: it ended, with what it said last; or it took too long. It isn't to be asked again.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has ended, as reading will find
        return self._read()

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _listen(self, stdout: IO[str]) -> None:
        for line in stdout:
            self._lines.put(line)
        self._lines.put("")

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=self.patience)
            return dict(json.loads(line))
        except queue.Empty:
            reason = f"no answer in {self.patience:g} s"
        except ValueError:
            reason = f"said {line.strip()!r}" if line else self._last_words()
        self.close()
        raise Gap(reason)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        return f"ended with {code}: {last_line(self._errors.read().decode('utf-8', 'replace'))}"
