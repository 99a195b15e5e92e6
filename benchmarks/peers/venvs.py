"""A venv of its own for each peer, from pinned versions, made when it is first asked for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]), sep='\\n')"
_HOUR = 3600.0
_PIP = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--retries", "1", "--no-input")


class Gap(Exception):  # noqa: N818  # nothing that is wrong
    """Why a peer can't be measured: a line for the table, not an error of ours."""


@dataclass(frozen=True)
class Venv:
    """A Python with packages.

    Args:
        name: of its folder; empty for the Python that runs this, which has this project.
        pins: `distribution==version`.
        build: what the environment has beside when they are installed.
    """

    name: str
    pins: tuple[str, ...] = ()
    build: Callable[[], Mapping[str, str]] = dict


OWN = Venv("")


def peer_environment() -> dict[str, str]:
    """The environment of a peer: without this project's modules, whose names others have too, and without a hub."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def last_line(text: str) -> str:
    """What a program said last; an error of pip's, if there is one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1]


def ready_python(venv: Venv, folder: Path, say: Callable[[str], None]) -> str:
    """The venv's Python, with its pins; installs them if they aren't there.

    Args:
        folder: of all venvs.
        say: is told what takes long.

    Raises:
        Gap: they can't be installed.
    """
    if not venv.name:
        return sys.executable
    home = folder / venv.name
    python = home / "bin" / "python"
    if fits(str(python), venv.pins):
        return str(python)
    say(f"installing {' '.join(venv.pins)}")
    if home.is_symlink():  # a venv that somebody lent: theirs to mend
        raise Gap(f"{home} is a link to a venv without {' '.join(venv.pins)}")
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    try:
        _call([sys.executable, "-m", "venv", str(home)])
        _call([str(python), *_PIP, *venv.pins], venv.build())
    except Gap:
        shutil.rmtree(home, ignore_errors=True)  # else it would look like one that fits some day
        raise
    return str(python)


def fits(python: str, pins: Sequence[str]) -> bool:
    """Whether that Python has just these versions; `2.13.0+cpu` is 2.13.0."""
    wanted = dict(pin.split("==") for pin in pins)
    try:
        done = subprocess.run([python, "-c", _VERSIONS, *wanted], capture_output=True, text=True, timeout=60,
                              env=peer_environment())  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and [v.partition("+")[0] for v in done.stdout.split()] == list(wanted.values())


def _call(command: Sequence[str], beside: Mapping[str, str] | None = None) -> None:
    run(command, timeout=_HOUR, environment={**peer_environment(), **(beside or {})})


def run(command: Sequence[str], *, timeout: float, environment: Mapping[str, str], cwd: Path | None = None) -> None:
    """Runs a command and swallows what it says.

    Raises:
        Gap: it failed or took longer, with its last line.
    """
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8",
            errors="replace", timeout=timeout, env=environment, cwd=cwd,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Gap(f"took longer than {timeout:.0f} s: {Path(command[0]).name} {command[1:4]}") from error
    except OSError as error:
        raise Gap(f"{command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        raise Gap(last_line(done.stdout))
