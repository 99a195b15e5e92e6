"""Arrows run one way (DESIGN section 2): every import of every file, those inside functions too."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"seed_story": ROOT / "runtime" / "seed_story"} | {
    name: ROOT / name for name in ("model", "training", "quantization", "export", "demo_app", "benchmarks", "tests")
}
MAY_IMPORT = {
    "seed_story": set(),
    "model": {"seed_story"},
    "quantization": {"model", "seed_story", "training"},  # its report reads held-out stories as training does
    "training": {"model", "seed_story"},
    "export": {"model", "quantization", "seed_story", "training"},  # scales are learned by the loop of training
    "benchmarks": {"model", "quantization", "seed_story", "training"},  # peers are given the model's weights
    "demo_app": {"seed_story"},
}
DEVICE_PACKAGES = {"numpy", "PIL", "tokenizers", "ai_edge_litert"}
FRAMEWORKS = ("tensorflow", "keras", "torch", "transformers", "onnx", "jax")


def imported(source: str) -> Iterator[str]:
    """The full names of all that a source file imports; relative imports stay in their package and don't count."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__", "find_spec"):
                yield str(node.args[0].value)


def files(package: str) -> list[Path]:
    return sorted(FOLDERS[package].rglob("*.py"))


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path.read_text(encoding="utf-8"))}


def test_the_walker_sees_hidden_imports() -> None:
    source = (
        "def f():\n    import torch.nn as nn\n    from keras import ops\n    importlib.import_module('onnx.helper')\n"
    )
    assert sorted(imported(source)) == ["keras", "onnx.helper", "torch.nn"]
    assert len(files("seed_story")) > 10
    assert len(files("model")) > 5


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_arrows_run_one_way(package: str) -> None:
    forbidden = set(FOLDERS) - MAY_IMPORT[package] - {package}
    found = {str(path.relative_to(ROOT)): sorted(tops(path) & forbidden) for path in files(package)}
    assert {path: names for path, names in found.items() if names} == {}


def test_the_runtime_needs_only_the_device_wheels() -> None:
    allowed = set(sys.stdlib_module_names) | DEVICE_PACKAGES | {"seed_story"}
    found = {str(path.relative_to(ROOT)): sorted(tops(path) - allowed) for path in files("seed_story")}
    assert {path: names for path, names in found.items() if names} == {}


def test_importing_everything_has_no_side_effects(tmp_path: Path) -> None:
    """No framework, no output, no file, no environment variable, no thread, whichever module is imported."""
    here = FOLDERS["seed_story"]
    modules = [".".join(p.relative_to(here.parent).with_suffix("").parts) for p in files("seed_story")]
    modules = [name.removesuffix(".__init__") for name in modules if not name.endswith("__main__")]
    program = (
        "import importlib, json, os, sys, threading\n"
        "before = dict(os.environ)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "print(json.dumps([sorted(sys.modules), before == dict(os.environ), threading.active_count()]))\n"
    )
    environment = {
        "PYTHONPATH": str(here.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PATH": os.environ["PATH"],
        **dict.fromkeys(("HOME", "XDG_CACHE_HOME", "TMPDIR"), str(tmp_path)),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    loaded, same_environment, threads = json.loads(done.stdout)  # and nothing else was printed
    assert done.stderr == ""
    assert set(modules) <= set(loaded)
    assert [name for name in loaded if name.partition(".")[0] in FRAMEWORKS] == []
    assert (same_environment, threads) == (True, 1)
    assert list(tmp_path.iterdir()) == []
