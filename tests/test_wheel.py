"""The device wheel: what is in it, and that it tells a story where there is no TensorFlow."""

from __future__ import annotations

import email
import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
WHEELS = Path(sys.prefix) / "wheels"
"""The runtime's dependencies, where `make setup` leaves them."""

FRAMEWORKS = ("tensorflow", "keras", "torch", "transformers", "onnx", "litert_quantizer", "model", "export")
TELL = f"""
import importlib.util, json, sys
from pathlib import Path
from seed_story import SEEDStory
model = SEEDStory(sys.argv[1])
text = model((Path(sys.argv[2]), "Once upon a time,"), max_tokens=12)
print(json.dumps({{
    "text": text,
    "there": [name for name in {FRAMEWORKS!r} if importlib.util.find_spec(name)],
    "loaded": [name for name in {FRAMEWORKS!r} if name in sys.modules],
    "from": sys.modules["seed_story"].__file__,
}}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a program as a user without a checkout would: no PYTHONPATH, no pip configuration."""
    hidden = ("PYTHONPATH", "PIP_", "VIRTUAL_ENV", "SEED_STORY_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(hidden)}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a venv with nothing in it but the wheel and what the wheel asks for."""
    if not any(WHEELS.glob("*.whl")):
        pytest.fail(f"no wheels at {WHEELS}; run `make setup`, which puts the runtime's dependencies there")
    folder = tmp_path_factory.mktemp("device") / "venv"
    venv.create(folder, with_pip=True, symlinks=True)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "--isolated", "install", "--no-index", "--find-links", WHEELS, wheel, cwd=folder)
    return python.parent


def test_the_wheel_holds_the_runtime_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    (metadata,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
    code = {name for name in names if name.startswith("seed_story/")}
    source = ROOT / "runtime"
    expected = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert code == expected
    assert "seed_story/py.typed" in code
    assert {name.removeprefix(f"{metadata}/") for name in set(names) - code} == {
        "METADATA",
        "WHEEL",
        "RECORD",
        "entry_points.txt",
        "licenses/LICENSE",
        "licenses/NOTICE",
    }
    assert wheel.stat().st_size < 250_000


def test_the_wheel_asks_for_the_four_device_packages_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    needed = {line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert {line.replace(" ", "") for line in needed} == _normal(declared)
    assert len(declared) == 4
    assert metadata["License-Expression"] == "Apache-2.0"


def _normal(requirements: list[str]) -> set[str]:
    """As hatchling writes them: the version bounds in its own order."""
    from packaging.requirements import Requirement

    return {str(Requirement(line)).replace(" ", "") for line in requirements}


def test_it_tells_a_story_without_tensorflow(device: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 48), "orange").save(picture)
    # -I: neither the current folder nor a user's site-packages may help out
    told = json.loads(run(device / "python", "-I", "-c", TELL, tiny_bundle, picture, cwd=tmp_path))
    assert told["text"].startswith("Once upon a time,")
    assert len(told["text"]) > len("Once upon a time,")
    assert told["there"] == []
    assert told["loaded"] == []
    assert Path(told["from"]).is_relative_to(device.parent)


def test_the_command_is_installed(device: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 48), "navy").save(picture)
    options = ("--bundle", tiny_bundle, "--image", picture, "--prompt", "Hello", "--max-tokens", "8", "--json")
    assert json.loads(run(device / "seed-story", "tell", *options, cwd=tmp_path))["tokens"] > 0
