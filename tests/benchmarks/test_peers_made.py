"""Venvs and files of peers: made once, and a reason where they can't be. Without a network."""

from __future__ import annotations

import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.peers import venvs
from benchmarks.peers.files import Made, Workshop
from benchmarks.peers.table import without_amx
from benchmarks.peers.venvs import OWN, Gap, Venv, fits, last_line, peer_environment, ready_python, run


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip looks, and nowhere else."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


def put_wheel(folder: Path, name: str, number: str) -> None:
    info = f"{name}-{number}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{number}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


def test_a_venv_is_made_once(tmp_path: Path, shelf: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    put_wheel(shelf, "engine", "1.2+cpu")
    venv = Venv("peer", ("engine==1.2",))
    python = ready_python(venv, tmp_path / "venvs", said.append)
    assert Path(python) == tmp_path / "venvs" / "peer" / "bin" / "python"
    assert fits(python, ("engine==1.2",)) and not fits(python, ("engine==1.3",))
    assert said == ["installing engine==1.2"]
    monkeypatch.setattr(venvs, "run", lambda *_, **__: pytest.fail("installed again"))
    assert ready_python(venv, tmp_path / "venvs", said.append) == python
    assert len(said) == 1


def test_what_cannot_be_installed_is_a_gap(tmp_path: Path, shelf: Path, said: list[str]) -> None:
    with pytest.raises(Gap, match=r"^ERROR: No matching distribution found for nowhere==1"):
        ready_python(Venv("peer", ("nowhere==1",)), tmp_path / "venvs", said.append)
    assert list((tmp_path / "venvs").iterdir()) == []


def test_a_lent_venv_is_left_alone(tmp_path: Path, said: list[str]) -> None:
    lent, home = tmp_path / "lent", tmp_path / "venvs" / "peer"
    lent.mkdir()
    home.parent.mkdir()
    home.symlink_to(lent)
    with pytest.raises(Gap, match="is a link to a venv without engine==1"):
        ready_python(Venv("peer", ("engine==1",)), tmp_path / "venvs", said.append)
    assert lent.is_dir() and home.is_symlink()


def test_whether_pins_fit() -> None:
    assert fits(sys.executable, ("numpy==" + version("numpy"),))
    assert not fits(sys.executable, ("numpy==" + version("numpy"), "no-such-thing==1"))
    assert not fits("/nowhere/python", ())
    assert ready_python(OWN, Path("/nowhere"), print) == sys.executable


def test_peers_do_not_see_this_project(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder `quantization` would take the place of a module of onnxruntime-genai's builder."""
    monkeypatch.setenv("PYTHONPATH", "here")
    environment = peer_environment()
    assert "PYTHONPATH" not in environment and environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PATH"]


def test_how_a_command_fails() -> None:
    words = [sys.executable, "-c"]
    with pytest.raises(Gap, match=r"^and why$"):
        run([*words, "raise SystemExit('what\\nand why')"], timeout=60, environment={})
    with pytest.raises(Gap, match="took longer than 0 s"):
        run([*words, "import time; time.sleep(60)"], timeout=0.1, environment={})
    with pytest.raises(Gap, match=r"^/nowhere: No such file"):
        run(["/nowhere"], timeout=60, environment={})
    assert last_line("a\nERROR: b\nhint: c\n") == "ERROR: b"
    assert last_line("\n") == "it said nothing"


MAKER = """
import sys
from pathlib import Path
*sources, target = sys.argv[1:]
name = Path(target).name  # the folder's is random
with open(LOG, "a") as log:
    print(name, file=log)
if name == "bad":
    raise SystemExit("no such operator")
if name != "lazy":
    Path(target).write_text("+".join(Path(source).read_text() for source in sources) or "weights")
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "maker.py"
    file.write_text(MAKER.replace("LOG", repr(str(tmp_path / "log"))))
    return file


def made_of(script: Path, name: str, *sources: Made) -> Made:
    words = [f"{{{index}}}" for index in range(len(sources))]
    return Made(name, OWN, (script, *words, "{target}"), sources)


def test_a_file_is_made_once_from_its_sources(tmp_path: Path, script: Path, said: list[str]) -> None:
    one, two = made_of(script, "one"), made_of(script, "two")
    both = made_of(script, "both", one, two)
    for _ in range(2):
        path = Workshop(tmp_path, tmp_path / "files", said.append).path(both)
        assert (path.name, path.read_text()) == ("both", "weights+weights")
    assert (tmp_path / "log").read_text().split() == ["one", "two", "both"]
    assert sorted(folder.name for folder in (tmp_path / "files").iterdir()) == sorted(m.key() for m in (one, two, both))


def test_what_a_key_depends_on(tmp_path: Path, script: Path) -> None:
    fact = tmp_path / "fact"
    fact.write_text("a")
    one = made_of(script, "one")
    others = [
        made_of(script, "two"),
        made_of(script, "one", one),
        Made("one", Venv("peer", ("engine==1",)), one.command),
        Made("one", Venv("peer", ("engine==2",)), one.command),
        Made("one", OWN, one.command, facts=("a",)),
        Made("one", OWN, one.command, facts=(fact,)),
    ]
    keys = [one.key(), *(other.key() for other in others)]
    assert len(set(keys)) == len(keys)
    fact.write_text("b")
    assert others[-1].key() != keys[-1]
    script.write_text(script.read_text() + "\n")
    assert not {one.key(), *(other.key() for other in others)} & set(keys)


def test_a_file_that_cannot_be_made(tmp_path: Path, script: Path, said: list[str]) -> None:
    workshop = Workshop(tmp_path, tmp_path / "files", said.append)
    bad = made_of(script, "bad")
    for _ in range(2):
        with pytest.raises(Gap, match=r"^bad can't be made: no such operator$"):
            workshop.path(bad)
    assert (tmp_path / "log").read_text().split() == ["bad"], "tried once"
    with pytest.raises(Gap, match=r"^more can't be made: bad can't be made: no such operator"):
        workshop.path(made_of(script, "more", bad))
    with pytest.raises(Gap, match="the command made nothing"):
        workshop.path(made_of(script, "lazy"))
    assert list((tmp_path / "files").iterdir()) == []


def test_a_missing_venv_is_remembered(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        said.append("tried")
        raise Gap("offline")

    monkeypatch.setattr("benchmarks.peers.files.ready_python", refuse)
    workshop = Workshop(tmp_path, tmp_path, said.append)
    for _ in range(2):
        with pytest.raises(Gap, match="offline"):
            workshop.python(Venv("peer", ("engine==1",)))
    assert said == ["tried"]


def test_llama_cpp_is_built_without_amx_where_there_is_any(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "proc" / "cpuinfo"
    cpuinfo.parent.mkdir()
    assert without_amx(tmp_path) == {}
    cpuinfo.write_text("flags\t: fpu avx512_vnni\n")
    assert without_amx(tmp_path) == {}
    cpuinfo.write_text("flags\t: fpu amx_bf16 amx_tile amx_int8\n")
    assert "-mno-amx-int8" in without_amx(tmp_path)["CMAKE_ARGS"]


def test_a_venv_is_installed_in_its_own_environment(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    environments: list[dict[str, str]] = []
    monkeypatch.setattr(venvs, "run", lambda *_, environment, **__: environments.append(environment))
    ready_python(Venv("peer", ("engine==1",), lambda: {"CMAKE_ARGS": "-DX=1"}), tmp_path, said.append)
    assert environments[-1]["CMAKE_ARGS"] == "-DX=1"
