"""What the commands print: results to standard output, everything else to standard error; and how they end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable

from seed_story.errors import SeedStoryError

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + the signal, as shells have it


def exit_code(command: Callable[[], int], program: str, interrupted: str = "") -> int:
    """Runs a command: its own exit code, or that of how it ended, with a line for the user instead of a traceback.

    Args:
        program: the line begins with it.
        interrupted: what Ctrl-C left behind; nothing is said by default.
    """
    try:
        return command()
    except SeedStoryError as error:
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"\n{program}: {interrupted}" if interrupted else "", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        silence()
        return BROKEN_PIPE


def prepare() -> None:
    """Makes standard output show `?` for a character that its encoding lacks, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def write(text: str) -> None:
    """Text to standard output, at once.

    Raises:
        BrokenPipeError: nobody reads any more.
        SeedStoryError: it can't be written, because the disk is full for example.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        silence()
        raise SeedStoryError("standard output can't be written", got=error.strerror or error) from error


def write_json(value: object) -> None:
    """One line of JSON, in ASCII so that it survives any encoding."""
    write(json.dumps(value, allow_nan=False) + "\n")


def note(text: str) -> None:
    """A line for the user, to standard error."""
    print(f"seed-story: {text}", file=sys.stderr, flush=True)


def silence() -> None:
    """Sends what is still to be written nowhere, so that Python doesn't fail once more when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, closed, or without a descriptor
            try:
                stream.flush()
            except OSError:
                os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def table(rows: list[tuple[str, str]], indent: str = "") -> str:
    """Lines of name and value, the values aligned; a value's further lines stand below its first."""
    width = max((len(name) for name, _ in rows), default=0)
    lines = []
    for name, value in rows:
        first, *more = value.split("\n")
        lines.append(f"{indent}{name:<{width}}  {first}".rstrip())
        lines += [f"{indent}{'':<{width}}  {line}".rstrip() for line in more]
    return "".join(f"{line}\n" for line in lines)


def size_text(size: int | None) -> str:
    """Bytes for a reader, in decimal units."""
    if size is None:
        return "unavailable"
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"
