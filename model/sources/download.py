"""One file from one URL: with a progress bar, resumed where it stopped, checked, and put in place atomically.

The bytes go to `NAME.part`, which stays when the transfer is interrupted (Ctrl-C, a lost connection, a full
disk) and is continued by the next call with an HTTP Range request (RFC 9110, section 14). Only a complete
file with the right sha256 is renamed to `NAME`.
"""

from __future__ import annotations

import errno
import http.client
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO

from tqdm import tqdm

from model.sources.cache import CHUNK, file_lock, is_intact
from seed_story.errors import DownloadError
from seed_story.files import file_sha256

TIMEOUT = 30.0  # seconds without a byte
_FULL = (errno.ENOSPC, errno.EDQUOT)


class TransferError(DownloadError):
    """The server can't be reached, refused, or stopped early: another way to the same file may work."""


def download(url: str, destination: Path, *, sha256: str | None = None, progress: bool | None = None) -> Path:
    """Fetches `url` into the file `destination`, unless it is already there with the right sha256.

    Args:
        url: http or https; redirects and the usual proxy variables are followed.
        destination: the file to write; its folder is created.
        sha256: 64 hex digits that the file must have; None accepts any complete file, and never resumes.
        progress: a bar on stderr; None shows it on a terminal only.

    Returns:
        destination.

    Raises:
        TransferError: the server can't be reached, answers with an error, or ends the connection early.
        DownloadError: the file has another sha256 (it is removed), or the disk is full.
    """
    if not url.startswith(("http://", "https://")):
        raise TransferError("this isn't a web address", got=url, expected="http:// or https://")
    with file_lock(destination):
        if is_intact(destination, sha256):
            return destination
        part = destination.with_name(destination.name + ".part")
        if sha256 is None:
            part.unlink(missing_ok=True)  # nothing could tell whether its beginning is of the same file
        resumed = _fetch(url, part, progress)
        if resumed and not is_intact(part, sha256):
            part.unlink()  # its beginning was of another file: once more, from the start
            _fetch(url, part, progress)
        if not is_intact(part, sha256):
            got = file_sha256(part)
            part.unlink()
            raise DownloadError(
                f"{url} came with another sha256 and was removed",
                got=got,
                expected=sha256,
                hint="The file on the server has changed, or something on the way alters it.",
            )
        part.replace(destination)
    return destination


class _EndedEarlyError(Exception):
    """The connection broke after the answer had begun."""


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _fetch(url: str, part: Path, progress: bool | None) -> bool:
    """Completes `part`, over as many connections as bring it further; True if an earlier call began it."""
    longest = begun = _size(part)
    while True:
        try:
            _fetch_once(url, part, progress)
            return begun > 0
        except _EndedEarlyError as error:
            if _size(part) <= longest:
                raise TransferError(
                    f"the connection to {url} ended early",
                    got=f"{_size(part)} bytes ({error})",
                    hint=f"What came is kept in {part}; run again to go on from there.",
                ) from error
            longest = _size(part)


def _fetch_once(url: str, part: Path, progress: bool | None) -> None:
    start = _size(part)
    headers = {"User-Agent": "seed-story", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    with _open(urllib.request.Request(url, headers=headers)) as response:
        span = response.headers.get("Content-Range", "")
        if response.status == 416 and span == f"bytes */{start}":
            return  # complete already: the process died just before the rename
        if response.status == 416 or (response.status == 206 and not span.startswith(f"bytes {start}-")):
            part.unlink()  # a range that we didn't mean
            return _fetch_once(url, part, progress)
        if response.status == 200:
            start = 0  # the server doesn't do ranges
        length = response.headers.get("Content-Length")
        _copy(response, part, start, None if length is None else start + int(length), progress)
    return None


def _open(request: urllib.request.Request) -> http.client.HTTPResponse | urllib.error.HTTPError:
    """The response; an HTTPError with status 416 counts as one. Raises TransferError."""
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT)  # type: ignore[no-any-return]
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        error.close()
        raise TransferError(
            f"the server refused {request.full_url}",
            got=f"HTTP {error.code} {error.reason}",
            hint="It has moved, or needs an account." if error.code in (401, 403, 404, 410) else "Try again later.",
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise TransferError(
            f"{request.full_url} can't be reached",
            got=getattr(error, "reason", None) or error,
            hint="Check the network connection and the proxy variables, then run again.",
        ) from error


def _copy(source: IO[bytes], part: Path, start: int, total: int | None, progress: bool | None) -> None:
    """Writes the answer's body from byte `start` of `part` on; `total`: of the whole file, if known."""
    hidden = None if progress is None else not progress
    bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=hidden, leave=False)
    try:
        _check_room(part.parent, (total or 0) - start)
        with bar, part.open("ab" if start else "wb") as file:
            while chunk := _read(source):
                file.write(chunk)
                bar.update(len(chunk))
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise DownloadError(
            f"the disk is full: {part.parent}",
            got=error.strerror,
            hint="Free some room, or set SEED_STORY_CACHE to a folder on another disk, then run again.",
        ) from error
    if total is not None and _size(part) < total:
        raise _EndedEarlyError(f"of {total}")


def _read(source: IO[bytes]) -> bytes:
    try:
        return source.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _EndedEarlyError(str(error)) from error


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed")
