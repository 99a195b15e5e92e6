"""What peers load, made from the downloaded weights once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.peers.venvs import Gap, Venv, peer_environment, ready_python, run
from seed_story.files import file_sha256

_T = TypeVar("_T")
_HALF_AN_HOUR = 1800.0


@dataclass(frozen=True)
class Made:
    """A file or a folder that a command makes.

    Args:
        name: of the file.
        venv: whose Python runs the command.
        command: Python's arguments: words, paths of scripts, `{target}` for the
            file, `{folder}` for the empty folder that it goes to, and `{0}`, `{1}` for the sources.
        sources: what it is made from.
        facts: what else decides what comes out: words as they are, files by their contents.
    """

    name: str
    venv: Venv
    command: tuple[str | Path, ...]
    sources: tuple[Made, ...] = ()
    facts: tuple[str | Path, ...] = ()

    def key(self) -> str:
        """16 hex digits: another command, version, script or source gives others."""
        told = [file_sha256(fact) if isinstance(fact, Path) else fact for fact in (*self.command, *self.facts)]
        whole = json.dumps([self.name, self.venv.pins, told, [source.key() for source in self.sources]])
        return hashlib.sha256(whole.encode()).hexdigest()[:16]


class Workshop:
    """Makes venvs and files when they are asked for, and remembers why one can't be made.

    Args:
        venvs, files: folders.
        say: is told what takes long.
    """

    def __init__(self, venvs: Path, files: Path, say: Callable[[str], None]) -> None:
        self._venvs, self._files, self._say = venvs, files, say
        self._pythons: dict[Venv, str | Gap] = {}
        self._made: dict[Made, Path | Gap] = {}

    def python(self, venv: Venv) -> str:
        """The venv's Python; raises Gap."""
        if venv not in self._pythons:
            try:
                self._pythons[venv] = ready_python(venv, self._venvs, self._say)
            except Gap as gap:
                self._pythons[venv] = gap
        return _or_raise(self._pythons[venv])

    def path(self, made: Made) -> Path:
        """Where the file is; raises Gap."""
        if made not in self._made:
            try:
                self._made[made] = self._make(made)
            except Gap as gap:
                self._made[made] = Gap(f"{made.name} can't be made: {gap}")
        return _or_raise(self._made[made])

    def _make(self, made: Made) -> Path:
        target = self._files / made.key() / made.name
        if target.exists():
            return target
        sources = [str(self.path(source)) for source in made.sources]
        python = self.python(made.venv)
        self._say(f"making {made.name}")
        started = time.monotonic()
        scratch = self._files / f".{made.key()}.{secrets.token_hex(4)}.part"
        scratch.mkdir(parents=True)
        try:
            words = [str(w).format(*sources, target=scratch / made.name, folder=scratch) for w in made.command]
            environment = peer_environment() if made.venv.name else dict(os.environ)
            run([python, *words], timeout=_HALF_AN_HOUR, environment=environment, cwd=scratch)
            if not (scratch / made.name).exists():
                raise Gap("the command made nothing")
            shutil.rmtree(target.parent, ignore_errors=True)  # what an interrupted run left
            scratch.rename(target.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._say(f"made {made.name} in {time.monotonic() - started:.0f} s")
        return target


def _or_raise(found: _T | Gap) -> _T:
    if isinstance(found, Gap):
        raise found
    return found
