"""The LiteRT backend refuses what isn't the contract's, reads memory in place, and keeps silent."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from seed_story.backends import BACKENDS, open_graph
from seed_story.backends.base import ALIGNMENT, Graph, aligned_zeros, check_contract
from seed_story.backends.probe import _GRAPH
from seed_story.contract import Signature, TensorSpec
from seed_story.errors import BackendError, BundleError, ContractError, UsageError

ROOT = Path(__file__).parents[2]
X, Y = TensorSpec("x", (2, 4)), TensorSpec("y", (2, 4))
DOUBLE = Signature("double", (X,), (Y,))
"""What the probe's graph is: y = x + x."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "double.tflite").write_bytes(_GRAPH)
    return tmp_path / "double.tflite"


@pytest.fixture
def graph(file: Path) -> Iterator[Graph]:
    made = open_graph(file, threads=1)
    yield made
    made.close()


def test_memory_of_its_own(graph: Graph) -> None:
    bound = graph.bind(DOUBLE)
    assert set(bound.inputs) == {"x"} and set(bound.outputs) == {"y"}
    for factor in (1, -3):
        bound.inputs["x"][:] = np.arange(8).reshape(2, 4) * factor
        bound.run()
        np.testing.assert_array_equal(bound.outputs["y"], np.arange(8).reshape(2, 4) * 2 * factor)


def test_memory_of_ours_is_read_anew_at_every_run(graph: Graph) -> None:
    mine, out = aligned_zeros((2, 4)), aligned_zeros((2, 4))
    bound = graph.bind(DOUBLE, {"x": mine, "y": out})
    assert bound.inputs["x"] is mine and bound.outputs["y"] is out
    for value in (1, 2, 3):
        mine.fill(value)
        bound.run()
        assert (out == 2 * value).all()


def test_two_bindings_share_one_memory(graph: Graph) -> None:
    mine = aligned_zeros((2, 4))
    first, second = graph.bind(DOUBLE, {"x": mine}), graph.bind(DOUBLE, {"x": mine})
    mine.fill(4)
    first.run()
    mine.fill(5)
    second.run()
    assert (first.outputs["y"] == 8).all() and (second.outputs["y"] == 10).all()


def test_a_view_of_a_larger_array(graph: Graph) -> None:
    whole = aligned_zeros((3, 8, 4))  # 128 bytes each: a row of it begins at a multiple of 64
    bound = graph.bind(DOUBLE, {"x": whole[1, :2]})
    whole[1] = 7
    bound.run()
    assert (bound.outputs["y"] == 14).all()


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (replace(DOUBLE, inputs=(TensorSpec("x", (2, 5)),)), "'x'"),
        (replace(DOUBLE, inputs=(TensorSpec("x", (8,)),)), "'x'"),
        (replace(DOUBLE, inputs=(TensorSpec("x", (2, 4), "int32"),)), "'x'"),
        (replace(DOUBLE, inputs=(TensorSpec("z", (2, 4)),)), "'x'"),
        (replace(DOUBLE, inputs=(X, TensorSpec("z", (1,)))), "'z'"),
        (replace(DOUBLE, inputs=()), "'x'"),
        (replace(DOUBLE, outputs=(TensorSpec("y", (4, 2)),)), "'y'"),
        (replace(DOUBLE, outputs=(Y, TensorSpec("logits", (1,)))), "'logits'"),
        (replace(DOUBLE, outputs=()), "'y'"),
    ],
)
def test_other_tensors_than_the_contracts(graph: Graph, wrong: Signature, name: str) -> None:
    with pytest.raises(ContractError, match=name) as caught:
        graph.bind(wrong)
    assert "double.tflite" in caught.value.what and "'double'" in caught.value.what
    assert caught.value.got is not None and caught.value.expected is not None
    assert caught.value.hint
    assert isinstance(caught.value, BundleError)


def test_missing_signature(graph: Graph) -> None:
    with pytest.raises(ContractError, match="'triple'") as caught:
        graph.bind(replace(DOUBLE, name="triple"))
    assert caught.value.got == ["double"]


def test_check_contract_says_what_there_is_and_what_there_should_be() -> None:
    check_contract("a graph", DOUBLE, {"inputs": {"x": ("float32", 2, 4)}, "outputs": {"y": ("float32", 2, 4)}})
    with pytest.raises(ContractError) as caught:
        check_contract("a graph", DOUBLE, {"inputs": {"x": ("float32", 2, 4)}, "outputs": {"y": ("int8", 2, 4)}})
    assert (caught.value.got, caught.value.expected) == (("int8", 2, 4), ("float32", 2, 4))


def off_by_four_bytes() -> np.ndarray:
    raw = aligned_zeros((2 * 4 + ALIGNMENT,))
    return raw[1:9].reshape(2, 4)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (aligned_zeros((2, 4), np.float64), "another form"),
        (aligned_zeros((2, 4), np.int32), "another form"),
        (aligned_zeros((4, 2)), "another form"),
        (aligned_zeros((8,)), "another form"),
        (off_by_four_bytes(), "in place"),
        (aligned_zeros((4, 2)).T, "in place"),
        (aligned_zeros((2, 8))[:, :4], "in place"),
        (np.asfortranarray(aligned_zeros((2, 4))), "in place"),
    ],
    ids=["float64", "int32", "shape", "flat", "unaligned", "transposed", "strided", "fortran"],
)
def test_memory_that_could_only_be_copied(graph: Graph, array: np.ndarray, words: str) -> None:
    with pytest.raises(ContractError, match=words) as caught:
        graph.bind(DOUBLE, {"x": array})
    assert "'x'" in caught.value.what
    assert caught.value.got is not None and caught.value.expected is not None


@pytest.mark.parametrize(
    "data",
    [b"", b"garbage", os.urandom(4096), b"\0" * 4096, _GRAPH[:300], b"TFL3" + _GRAPH[4:50],
     b"\x1c\0\0\0TFL3" + b"\xff" * 99],
    ids=["empty", "word", "random", "zeros", "cut", "head", "root"],
)  # fmt: skip
def test_file_that_is_no_graph(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.tflite").write_bytes(data)
    with pytest.raises(BackendError, match=r"bad\.tflite"):
        open_graph(tmp_path / "bad.tflite", threads=1).bind(DOUBLE)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"none\.tflite"):
        open_graph(tmp_path / "none.tflite", threads=1)


def test_closed_graph_says_so(file: Path) -> None:
    graph = open_graph(file, threads=1)
    bound = graph.bind(DOUBLE)
    graph.close()
    graph.close()  # twice is fine
    with pytest.raises(BackendError, match="closed"):
        bound.run()
    with pytest.raises(BackendError, match="closed"):
        graph.bind(DOUBLE)


def test_close_frees_our_memory(file: Path) -> None:
    graph = open_graph(file, threads=1)
    bound = graph.bind(DOUBLE)
    bound.run()
    held = [weakref.ref(array.base) for array in (bound.inputs["x"], bound.outputs["y"])]
    graph.close()
    del bound
    gc.collect()
    assert [reference() for reference in held] == [None, None]


def test_close_destroys_every_buffer_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = open_graph(file, threads=1)
    graph.bind(DOUBLE)
    api, destroyed = graph._api, []  # type: ignore[attr-defined]
    destroy = api.destroy
    monkeypatch.setattr(api, "destroy", lambda address: [destroyed.append(address), destroy(address)])
    made = list(graph._addresses)  # type: ignore[attr-defined]
    graph.close()
    graph.close()
    assert destroyed == made and len(set(made)) == 2


def test_a_graph_that_is_forgotten_is_freed(file: Path) -> None:
    graph = open_graph(file, threads=1)
    graph.bind(DOUBLE).run()
    reference = weakref.ref(graph)
    del graph
    gc.collect()
    assert reference() is None


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_close_frees_the_engines_memory(loud_bundle: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "runtime"), "SEED_STORY_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", LOADS, loud_bundle], env=environment, capture_output=True, timeout=60,
                          check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert int(done.stdout) < 30 * len(aligned_zeros((100_000,))), "bytes kept for ever by thirty loads"


def test_unknown_backend(file: Path) -> None:
    with pytest.raises(UsageError, match="abacus") as caught:
        open_graph(file, backend="abacus", threads=1)
    assert caught.value.exit_code == 2
    assert all(name in str(caught.value.expected) for name in BACKENDS)


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 7, 2)])
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint8", "int64"])
def test_aligned_zeros(shape: tuple[int, ...], dtype: str) -> None:
    array = aligned_zeros(shape, dtype)
    assert array.shape == shape and array.dtype == dtype
    assert array.ctypes.data % ALIGNMENT == 0 and array.flags.c_contiguous and not array.any()
    assert array.base is not None


LOADS = """
import gc, sys
import numpy as np
from seed_story.story import SEEDStory

def rss():
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

def load():
    with SEEDStory(sys.argv[1], threads=1) as model:
        model((np.zeros((1, 28, 28, 3), np.float32), "Once"), max_tokens=5)

for _ in range(10):
    load()
before = rss()
for _ in range(30):
    load()
print(rss() - before)
"""


SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from seed_story.story import SEEDStory
model = SEEDStory(sys.argv[1])
size = model.bundle.manifest.story.vision.image_size
text = model((np.zeros((1, size, size, 3), np.float32), "Once"), max_tokens=20)
if sys.argv[2] == "close":
    model.close()
"""


@pytest.mark.parametrize("end", ["close", "leave"])
def test_nothing_is_printed_by_a_whole_run(loud_bundle: Path, tmp_path: Path, end: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "runtime"), "SEED_STORY_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", SCRIPT, loud_bundle, end],
        env=environment, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
