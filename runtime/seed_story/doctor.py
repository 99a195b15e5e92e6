"""`seed-story doctor`: whether stories can be told on this device, and what mends it when they can't."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from seed_story import __version__, device
from seed_story.bundle import BUNDLE_VARIABLE, Bundle, Manifest, graph_file
from seed_story.contract import DECODER
from seed_story.describe import cache_bytes
from seed_story.errors import BundleError
from seed_story.files import CACHE_VARIABLE, cache_dir
from seed_story.output import size_text, write, write_json
from seed_story.threads import default_threads

OK, WARN, FAIL = "ok", "warn", "fail"

_PACKAGES = {"numpy": "numpy", "pillow": "PIL.Image", "tokenizers": "tokenizers"}
_GLIBC = {"aarch64": (2, 34), "x86_64": (2, 27)}  # what LiteRT 2.3's wheels are built for
_SPACE = 500_000_000  # bytes: a packed decoder of the usual size, and as much again
_PROCESS = 150_000_000  # bytes: Python, NumPy and the engine, before any model
_PROBE_SECONDS = 120
_SLOWER = 1.15  # what the default may take, times the best: less is a shared machine's noise


@dataclass(frozen=True)
class Check:
    """One row of the report.

    Args:
        status: OK, WARN (stories can be told, but) or FAIL (they can't).
        text: what was found.
        fix: what mends it: a command, as far as there is one.
        data: the same as JSON values; None for what can't be read.
    """

    name: str
    status: str
    text: str
    fix: str = ""
    data: dict[str, Any] = field(default_factory=dict)


def doctor(bundle: str | None, *, as_json: bool, threads: bool = False) -> int:
    """Checks and reports.

    Args:
        threads: whether to time a token with every sensible number of threads, which takes some seconds.

    Returns:
        The exit code: 1 when something is fatal.
    """
    checks = examine(bundle, threads=threads)
    failed = any(check.status == FAIL for check in checks)
    if as_json:
        write_json({"ok": not failed, "seed_story": __version__, "checks": [asdict(check) for check in checks]})
    else:
        write(render(checks))
    return 1 if failed else 0


def examine(bundle: str | None = None, *, threads: bool = False) -> list[Check]:
    """All checks; one that breaks is a warning, never an exception."""
    checked, opened = _open(bundle)
    steps: tuple[tuple[str, Callable[[], Check]], ...] = (
        ("system", check_system),
        ("C library", check_c_library),
        ("CPU", check_cpu),
        ("memory", lambda: check_memory(opened)),
        *((package, partial(check_package, package)) for package in _PACKAGES),
        ("LiteRT", check_engine),
        ("cache folder", check_cache_folder),
        *((("threads", partial(check_threads, opened)),) if threads and opened else ()),
    )
    return [*(_guarded(name, step) for name, step in steps), checked]


def _open(bundle: str | None) -> tuple[Check, Bundle | None]:
    opened: list[Bundle] = []

    def step() -> Check:
        check, found = check_bundle(bundle)
        opened.extend([found] if found else [])
        return check

    return _guarded("bundle", step), opened[0] if opened else None


def _guarded(name: str, step: Callable[[], Check]) -> Check:
    try:
        return step()
    except Exception as error:  # devices break in ways nobody thought of: the other checks still help
        return Check(name, WARN, f"couldn't be checked: {type(error).__name__}: {error}")


def check_system() -> Check:
    """Machine, operating system and Python."""
    machine, python = platform.machine() or "unavailable", platform.python_version()
    board = device.board()
    text = f"{f'{board}, ' if board else ''}{machine}, {device.operating_system()}, Python {python}"
    data = {"machine": machine, "board": board, "os": device.operating_system(), "python": python}
    if sys.maxsize < 2**32:
        return Check("system", FAIL, text, "LiteRT needs a 64-bit Python: install a 64-bit system.", data)
    if device.is_android():
        fix = "pkg install proot-distro && proot-distro install debian"
        return Check("system", WARN, f"{text}: Android's own Python has no LiteRT wheel", fix, data)
    return Check("system", OK, text, data=data)


def check_c_library() -> Check:
    """glibc, and whether it is new enough for LiteRT's wheel."""
    version, needed = device.glibc_version(), _GLIBC.get(platform.machine())
    data = {"glibc": ".".join(map(str, version)) if version else None}
    if version is None:
        bad = sys.platform == "linux"
        fix = "Use a system with glibc, such as Debian: LiteRT has no wheel for musl." if bad else ""
        return Check("C library", WARN if bad else OK, "glibc: unavailable", fix, data)
    text = f"glibc {data['glibc']}"
    if needed and version < needed:
        fix = "Use Ubuntu 22.04, Debian 12, JetPack 6 or newer."
        return Check("C library", WARN, f"{text}; LiteRT needs {needed[0]}.{needed[1]}", fix, data)
    return Check("C library", OK, text, data=data)


def check_cpu() -> Check:
    """The processor's name, cores and instruction sets."""
    model, cores, simd = device.cpu_model(), device.usable_cores(), device.simd_features()
    known = "unavailable" if simd is None else ", ".join(simd) or "none"
    fast = device.performance_cores()
    slow = f", {fast} of them fast" if fast and cores and fast < cores else ""
    text = f"{model or 'model unavailable'}, {cores or 'unavailable'} cores usable{slow}, SIMD: {known}"
    data = {"model": model, "usable_cores": cores, "performance_cores": fast, "simd": simd and list(simd)}
    if simd is not None and not {"avx2", "dotprod"} & set(simd):
        return Check("CPU", WARN, text, "Neither AVX2 nor NEON dotprod: expect slow stories; prefer int8.", data)
    return Check("CPU", OK, text, data=data)


def check_memory(bundle: Bundle | None) -> Check:
    """RAM, and whether the bundle fits into what is free."""
    ram = device.memory()
    needed = _memory_needed(bundle.manifest) if bundle else None
    data = {"total_bytes": ram.total, "available_bytes": ram.available, "needed_bytes": needed}
    text = f"{size_text(ram.total)} in all, {size_text(ram.available)} available"
    if needed and ram.available is not None and ram.available < needed:
        return Check("memory", WARN, f"{text}; a story takes about {size_text(needed)}",
                     "End other programs, or use a smaller bundle.", data)  # fmt: skip
    return Check("memory", OK, text, data=data)


def _memory_needed(manifest: Manifest) -> int:
    return _PROCESS + manifest.files[graph_file(DECODER)][1] + cache_bytes(manifest)


def check_package(package: str) -> Check:
    """Whether a package that the runtime needs is there and can be imported."""
    fix = f"{_pip()} --force-reinstall {package}"
    try:
        importlib.import_module(_PACKAGES[package])
        version = metadata.version(package)
    except Exception as error:  # a broken extension module raises anything at all
        return Check(package, FAIL, f"can't be imported: {error}", fix, {"version": None})
    return Check(package, OK, version, data={"version": version})


def check_engine() -> Check:
    """Whether LiteRT loads and computes: in a process of its own, as a broken one takes Python with it."""
    fix = f"{_pip()} --force-reinstall 'ai-edge-litert>=2.3,<2.4'"
    try:
        version = metadata.version("ai-edge-litert")
    except metadata.PackageNotFoundError:
        return Check("LiteRT", FAIL, "isn't installed", fix, {"version": None, "works": False})
    problem, hint = _probe()
    data = {"version": version, "works": problem is None}
    if problem is None:
        return Check("LiteRT", OK, f"{version}, loads and computes", data=data)
    return Check("LiteRT", FAIL, f"{version}: {problem}", hint or fix, data)


def _probe() -> tuple[str | None, str]:
    """What is wrong with the engine (None: nothing), and a hint."""
    problem, found = _apart("seed_story.backends.probe")
    if problem or found is None:
        return problem, ""
    return f"{found['what']} {found['got']}".strip(), found["hint"]


def _apart(module: str, *arguments: str) -> tuple[str | None, Any]:
    """Runs a module in a process of its own: what is wrong with it (None: nothing), and the JSON that it printed."""
    if not sys.executable:
        return "can't be tried: this Python doesn't know its own program", None
    folder = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_PROBE_SECONDS,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        return f"hangs (tried for {_PROBE_SECONDS} s)", None
    if done.returncode < 0:
        return f"crashes: {signal.strsignal(-done.returncode) or f'signal {-done.returncode}'}", None
    try:
        return None, json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return f"fails: {last}", None


def check_threads(bundle: Bundle) -> Check:
    """How long a token takes by number of threads, and whether the default is a good one."""
    usual = default_threads()
    problem, found = _apart("seed_story.threads", str(bundle.path))
    data = {"default": usual, "token_ms": found}
    if problem:
        return Check("threads", WARN, f"{usual} by default; can't be timed: {problem}", data=data)
    text = f"{usual} by default; a token takes " + ", ".join(f"{ms:g} ms with {n}" for n, ms in found.items())
    best = min(found, key=found.__getitem__)
    if found[str(usual)] > _SLOWER * found[best]:
        return Check("threads", WARN, text, f"End other programs and look again, or use --threads {best}.", data)
    return Check("threads", OK, text, data=data)


def check_cache_folder() -> Check:
    """The folder for packed weights: there or possible, writable, with space."""
    folder = cache_dir()
    parent = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(parent).free
    size = sum(path.stat().st_size for path in _files(folder))
    data = {"path": str(folder), "bytes": size, "free_bytes": free, "writable": os.access(parent, os.W_OK)}
    state = f"{size_text(size)} used" if folder.exists() else "not made yet"
    text = f"{folder}, {state}, {size_text(free)} free"
    other = f"export {CACHE_VARIABLE}=/a/folder/with/space"
    if not parent.is_dir() or not data["writable"]:
        return Check("cache folder", WARN, f"{folder} can't be written: every start will be slow", other, data)
    if free < _SPACE:
        return Check("cache folder", WARN, text, f"Free some space: rm -r {folder}/packed, or {other}", data)
    return Check("cache folder", OK, text, data=data)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def check_bundle(bundle: str | None) -> tuple[Check, Bundle | None]:
    """Whether the bundle is there and whole; to have none is a warning, unless somebody named one."""
    fix = f"make export, or --bundle DIR, or export {BUNDLE_VARIABLE}=DIR"
    try:
        opened = Bundle.open(bundle, afresh=True)
    except BundleError as error:
        named = bundle is not None or bool(os.environ.get(BUNDLE_VARIABLE))
        missing = not named and error.what == "there is no default bundle"
        text = error.what if error.got is None else f"{error.what}: {error.got}"
        return Check("bundle", WARN if missing else FAIL, text, fix, {"path": None}), None
    manifest = opened.manifest
    size = sum(size for _, size in manifest.files.values())
    text = f"{opened.path}: {manifest.name} {manifest.recipe}, {size_text(size)}, verified"
    data = {"path": str(opened.path), "name": manifest.name, "recipe": manifest.recipe, "bytes": size}
    return Check("bundle", OK, text, data=data), opened


def render(checks: list[Check]) -> str:
    """The report as text: a row a check, and under it what mends it."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name:<{width}}  {check.text}")
        if check.fix:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check.fix}")
    failed, warned = (sum(check.status == status for check in checks) for status in (FAIL, WARN))
    verdict = f"{failed} fatal, {warned} warnings." if failed else f"Nothing fatal, {warned} warnings."
    return "\n".join([*lines, verdict]) + "\n"


def _pip() -> str:
    return f"{sys.executable or 'python3'} -m pip install"
