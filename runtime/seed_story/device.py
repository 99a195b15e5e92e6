"""Facts about the device that runs this. What can't be read is None, never a guess and never 0.

Every function takes the root of the file system, so that tests can show it another device.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")

# What XNNPACK's int8 kernels care about: the kernel's name of a feature to the usual one.
_SIMD = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512_vnni": "avx512_vnni",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "neon": "neon",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "sve": "sve",
    "sme": "sme",
}

# ARM's cores don't tell their names; these are util-linux's (lscpu), implementer and part.
_ARM_CORES = {
    (0x41, 0xD03): "Cortex-A53", (0x41, 0xD04): "Cortex-A35", (0x41, 0xD05): "Cortex-A55",
    (0x41, 0xD07): "Cortex-A57", (0x41, 0xD08): "Cortex-A72", (0x41, 0xD09): "Cortex-A73",
    (0x41, 0xD0A): "Cortex-A75", (0x41, 0xD0B): "Cortex-A76", (0x41, 0xD0C): "Neoverse-N1",
    (0x41, 0xD0D): "Cortex-A77", (0x41, 0xD40): "Neoverse-V1", (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE", (0x41, 0xD44): "Cortex-X1", (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710", (0x41, 0xD48): "Cortex-X2", (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD4B): "Cortex-A78C", (0x41, 0xD4D): "Cortex-A715", (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD4F): "Neoverse-V2", (0x41, 0xD80): "Cortex-A520", (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD82): "Cortex-X4", (0x4E, 0x003): "NVIDIA Denver 2", (0x4E, 0x004): "NVIDIA Carmel",
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes of RAM: all of it, and what is free for a new process without swapping."""

    total: int | None
    available: int | None


def _cpuinfo(root: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        name, found, value = line.partition(":")
        if found:
            yield name.strip().lower(), value.strip()


def _sysctl(name: str) -> str | None:
    if sys.platform != "darwin":
        return None
    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def cpu_model(root: Path = ROOT) -> str | None:
    """The processor's name; an ARM's kinds of cores, such as `Cortex-A78AE`."""
    implementer, cores, names = 0, [], []
    for name, value in _cpuinfo(root):
        if name == "model name":
            names.append(value)
        elif name in ("cpu implementer", "cpu part"):
            try:
                number = int(value, 0)
            except ValueError:
                continue
            if name == "cpu implementer":
                implementer = number
            else:
                cores.append(_ARM_CORES.get((implementer, number), f"ARM core {implementer:#x}/{number:#x}"))
    found = dict.fromkeys(cores or names)  # in order, each once
    return " + ".join(found) or _sysctl("machdep.cpu.brand_string")


def board(root: Path = ROOT) -> str | None:
    """What the device tree calls the board, such as `NVIDIA Jetson Orin Nano Developer Kit`."""
    try:
        text = (root / "proc/device-tree/model").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.strip("\0 \n") or None


def simd_features(root: Path = ROOT) -> tuple[str, ...] | None:
    """The instruction sets that matter here and that this CPU has; None where nothing says."""
    for name, value in _cpuinfo(root):
        if name in ("flags", "features"):
            flags = set(value.split())
            return tuple(dict.fromkeys(usual for flag, usual in _SIMD.items() if flag in flags))
    return None


def memory(root: Path = ROOT) -> Memory:
    """The device's RAM."""
    figures: dict[str, int] = {}
    try:
        for line in (root / "proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            amount, *unit = value.split()
            if unit == ["kB"]:
                figures[name] = int(amount) * 1024
    except (OSError, ValueError):
        pass
    total = figures.get("MemTotal")
    if total is None and (text := _sysctl("hw.memsize")) and text.isdigit():
        total = int(text)
    return Memory(total, figures.get("MemAvailable"))


def usable_cores() -> int | None:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def performance_cores(root: Path = ROOT) -> int | None:
    """Of the CPUs that this process may use, those at least half as fast as the fastest; None where nothing says.

    By the kernel's own figure of what a core gets done (`cpu_capacity`, on ARM and hybrid processors), else by the
    highest clock.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    for figure in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        speeds = []
        for cpu in os.sched_getaffinity(0):
            try:
                speeds.append(int((root / f"sys/devices/system/cpu/cpu{cpu}" / figure).read_text()))
            except (OSError, ValueError):
                break
        else:
            return sum(2 * speed >= max(speeds) for speed in speeds)
    return None


def glibc_version() -> tuple[int, int] | None:
    """The C library's version; None where it isn't glibc (musl, Android, macOS)."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        major, minor = version.split(".")[:2]
        return (int(major), int(minor)) if name == "glibc" else None
    except (AttributeError, OSError, ValueError):
        return None


def operating_system(root: Path = ROOT) -> str:
    """The system's own name for itself, and its kernel."""
    kernel = f"{platform.system()} {platform.release()}"
    try:
        lines = (root / "etc/os-release").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return kernel
    names = [line.partition("=")[2].strip("\"'") for line in lines if line.startswith("PRETTY_NAME=")]
    return f"{names[0]}, {kernel}" if names else kernel


def is_android() -> bool:
    """Whether this Python runs on Android itself, such as Termux's."""
    return sys.platform == "android" or hasattr(sys, "getandroidapilevel")
