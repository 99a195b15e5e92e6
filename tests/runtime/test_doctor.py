"""`seed-story doctor`: says what is, what is wrong and what mends it, whatever the device looks like."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from seed_story import device, doctor
from seed_story.cli import main
from seed_story.doctor import FAIL, OK, WARN, Check
from tests.runtime.paper_bundle import write_paper_bundle

JETSON_CPU = """processor\t: 0
BogoMIPS\t: 62.50
Features\t: fp asimd evtstrm aes asimdrdm lrcpc dcpop asimddp i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd42

processor\t: 1
Features\t: fp asimd evtstrm aes asimdrdm lrcpc dcpop asimddp i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd42
"""


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place without a default bundle and with a cache folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEED_STORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SEED_STORY_BUNDLE", raising=False)
    return tmp_path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the process that tries the engine."""
    monkeypatch.setattr(doctor, "_probe", lambda: (None, ""))


def proc(root: Path, **files: str) -> Path:
    (root / "proc").mkdir(exist_ok=True)
    for name, text in files.items():
        (root / "proc" / name).write_text(text)
    return root


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_this_machine_is_fit(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paper = write_paper_bundle(empty / "paper")
    assert main(["doctor", "--bundle", str(paper), "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["ok"] is True
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["LiteRT"]["data"]["works"] is True
    assert checks["bundle"]["data"]["name"] == "paper"
    assert checks["memory"]["data"]["total_bytes"] > 1e8
    assert not any(check["status"] == FAIL for check in found["checks"])
    assert captured.err == ""
    assert not (empty / "cache").exists(), "a check must not make folders"


def test_text_has_a_row_a_check_and_the_fix_below(empty: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    place = next(i for i, line in enumerate(lines) if line.startswith("warn  bundle"))
    assert "there is no default bundle" in lines[place]
    assert lines[place + 1].strip().startswith("-> make export")
    assert lines[-1].startswith("Nothing fatal")
    assert all(line.startswith(("ok  ", "warn", "    ", "Nothing")) for line in lines)


def test_a_named_bundle_that_is_missing_or_damaged_is_fatal(
    empty: Path, quick: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor", "--bundle", str(empty / "none")]) == 1
    assert "fail  bundle" in capsys.readouterr().out
    monkeypatch.setenv("SEED_STORY_BUNDLE", str(empty / "none"))
    assert main(["doctor"]) == 1
    paper = write_paper_bundle(empty / "build" / "story")
    monkeypatch.delenv("SEED_STORY_BUNDLE")
    assert main(["doctor"]) == 0
    (paper / "vit.tflite").unlink()
    assert main(["doctor"]) == 1, "a damaged default bundle"
    assert "lacks vit.tflite" in capsys.readouterr().out


def test_missing_package_is_fatal_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    check = doctor.check_package("tokenizers")
    assert check.status == FAIL
    assert "pip install --force-reinstall tokenizers" in check.fix


def test_missing_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    check = doctor.check_engine()
    assert (check.status, check.data["works"]) == (FAIL, False)
    assert "ai-edge-litert" in check.fix


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "crashes: Illegal instruction"),
        ("import os, signal; os.kill(os.getpid(), 63)", "crashes: "),
        ("raise SystemExit('no such library')", "fails: no such library"),
        ("print('not json')", "fails: no message"),
        ('print(\'{"what": "LiteRT broke", "got": "x", "hint": "mend it"}\')', "LiteRT broke x"),
        ("import time; time.sleep(60)", "hangs"),
    ],
)
def test_broken_engine(code: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 3)
    check = doctor.check_engine()
    assert check.status == FAIL
    assert words in check.text
    assert check.fix


def test_engine_that_computes_nonsense(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from seed_story.backends import litert, probe

    probe.main("litert")
    assert capsys.readouterr().out == "null\n"
    monkeypatch.setattr(litert.LiteRtSignature, "run", lambda self: None)  # as tflite-runtime does: all zeros
    probe.main("litert")
    assert "computes nonsense" in json.loads(capsys.readouterr().out)["what"]
    probe.main("abacus")
    assert "no such backend" in json.loads(capsys.readouterr().out)["what"]


def test_check_that_breaks_is_a_row_and_no_traceback(
    empty: Path, quick: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("nobody thought of this")

    for name in ("memory", "cpu_model", "glibc_version", "operating_system"):
        monkeypatch.setattr(device, name, broken)
    monkeypatch.setattr(doctor, "cache_dir", broken)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.count("couldn't be checked: ZeroDivisionError: nobody thought of this") == 5
    assert "ok    numpy" in out


def test_what_cannot_be_read_is_unavailable_and_never_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert device.cpu_model(tmp_path) is None
    assert device.simd_features(tmp_path) is None
    assert device.board(tmp_path) is None
    assert device.memory(tmp_path) == device.Memory(None, None)
    monkeypatch.setattr(device, "memory", lambda: device.Memory(None, None))
    monkeypatch.setattr(device, "cpu_model", lambda: None)
    monkeypatch.setattr(device, "simd_features", lambda: None)
    monkeypatch.setattr(device, "usable_cores", lambda: None)
    monkeypatch.setattr(device, "performance_cores", lambda: None)
    assert doctor.check_memory(None).text == "unavailable in all, unavailable available"
    cpu = doctor.check_cpu()
    assert cpu.text == "model unavailable, unavailable cores usable, SIMD: unavailable"
    assert cpu.data == {"model": None, "usable_cores": None, "performance_cores": None, "simd": None}


def test_reads_a_jetson(tmp_path: Path) -> None:
    root = proc(tmp_path, cpuinfo=JETSON_CPU, meminfo="MemTotal:  7802352 kB\nMemAvailable: 5000000 kB\n")
    (root / "proc/device-tree").mkdir()
    (root / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    assert device.cpu_model(root) == "Cortex-A78AE"
    assert device.simd_features(root) == ("neon", "dotprod", "i8mm")
    assert device.board(root) == "NVIDIA Jetson Orin Nano Developer Kit"
    assert device.memory(root) == device.Memory(7802352 * 1024, 5000000 * 1024)


def test_reads_big_and_little_cores_and_unknown_ones(tmp_path: Path) -> None:
    cores = "".join(f"CPU implementer : 0x41\nCPU part : {part}\n" for part in ("0xd05", "0xd05", "0xd41", "0xfff"))
    assert device.cpu_model(proc(tmp_path, cpuinfo=cores)) == "Cortex-A55 + Cortex-A78 + ARM core 0x41/0xfff"


def test_cpu_without_what_int8_needs_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "simd_features", lambda: ("neon",))
    assert doctor.check_cpu().status == WARN
    monkeypatch.setattr(device, "simd_features", lambda: ("neon", "dotprod"))
    assert doctor.check_cpu().status == OK


@pytest.mark.parametrize(
    ("machine", "version", "status"),
    [("aarch64", (2, 31), WARN), ("aarch64", (2, 34), OK), ("x86_64", (2, 31), OK), ("riscv64", (2, 30), OK)],
)
def test_c_library(machine: str, version: tuple[int, int], status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "machine", lambda: machine)
    monkeypatch.setattr(device, "glibc_version", lambda: version)
    assert doctor.check_c_library().status == status


def test_systems_that_cannot_run_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "is_android", lambda: True)
    assert "proot-distro" in doctor.check_system().fix
    monkeypatch.setattr(sys, "maxsize", 2**31 - 1)
    assert doctor.check_system().status == FAIL


def test_bundle_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seed_story.bundle import Bundle

    bundle = Bundle.open(write_paper_bundle(tmp_path / "paper"))
    monkeypatch.setattr(device, "memory", lambda: device.Memory(10**9, 10**8))
    assert doctor.check_memory(bundle).status == WARN
    monkeypatch.setattr(device, "memory", lambda: device.Memory(10**9, 10**9))
    assert doctor.check_memory(bundle).status == OK


def test_cache_folder(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not made yet" in doctor.check_cache_folder().text
    (empty / "cache/packed").mkdir(parents=True)
    (empty / "cache/packed/a.xnnpack").write_bytes(bytes(300_000))
    check = doctor.check_cache_folder()
    assert (check.status, check.data["bytes"]) == (OK, 300_000)
    monkeypatch.setattr(doctor, "_SPACE", 10**18)
    assert doctor.check_cache_folder().status == WARN
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    check = doctor.check_cache_folder()
    assert "can't be written" in check.text
    assert "SEED_STORY_CACHE" in check.fix


def test_cache_folder_that_is_a_file(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty / "cache").write_text("")
    assert doctor.check_cache_folder().status == WARN


def test_real_bundle(tiny_bundle: Path, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--bundle", str(tiny_bundle)]) == 0
    assert "ok    bundle" in capsys.readouterr().out
