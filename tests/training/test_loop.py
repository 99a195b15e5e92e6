from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest

from model.layers import named_variables, numpy_of
from tests.compare import assert_close
from tests.training.tiny_task import SCHEDULE, tiny_task
from training.checkpoint import FILE_NAME, planned_steps
from training.errors import TrainingError
from training.interrupt import Interrupt
from training.loop import steps_for_minutes, train

ROOT = Path(__file__).resolve().parents[2]
SELF_KILLING = """
import os, signal, sys
from training import checkpoint
from tests.training import tiny_task
real, calls = checkpoint.save_file, []
def save_file(tensors, filename, metadata):
    calls.append(filename)
    if len(calls) == 6:
        filename.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    real(tensors, filename, metadata=metadata)
checkpoint.save_file = save_file
sys.argv = ["tiny_task", sys.argv[1], "--save-every-s", "0"]
tiny_task.main()
"""


def weights(network: keras.Layer) -> dict[str, np.ndarray]:
    return {name: numpy_of(variable) for name, variable in named_variables(network).items()}


def trained(out: Path, **options: Any) -> dict[str, np.ndarray]:
    task = tiny_task(**options)
    assert train(task, out, SCHEDULE).finished
    return weights(task.network)


def start(*arguments: str, backend: str = "tensorflow") -> subprocess.Popen[str]:
    environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'runtime'}"}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    import tensorflow as tf

    found: dict[str, dict[int, float]] = defaultdict(dict)
    for path in sorted(folder.iterdir()):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                found[value.tag][event.step] = value.simple_value
    return found


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The weights after a training that was never stopped."""
    return trained(tmp_path_factory.mktemp("straight"))


def assert_same_bits(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.tobytes() == expected[name].tobytes(), name


def test_learns_what_is_trainable(straight: dict[str, np.ndarray]) -> None:
    changed = {
        name for name, value in weights(tiny_task().network).items() if not np.array_equal(value, straight[name])
    }
    assert changed == {"table.weight", "layers.1.weight", "layers.1.bias", "scale"}


def test_goes_on_with_the_same_bits(tmp_path: Path, straight: dict[str, np.ndarray]) -> None:
    """In the middle of an accumulation, with Dropout; in this process, with new objects."""
    task = tiny_task()
    inner = task.batch

    def batch(step: int) -> Any:
        if step == 5:
            raise RuntimeError("crash")
        return inner(step)

    task.batch = batch
    with pytest.raises(RuntimeError, match="crash"):
        train(task, tmp_path, SCHEDULE, save_every_s=0)
    assert_same_bits(trained(tmp_path), straight)


def test_ctrl_c_saves_and_another_process_goes_on(tmp_path: Path, straight: dict[str, np.ndarray]) -> None:
    process = start("-m", "tests.training.tiny_task", str(tmp_path), "--step-s", "0.3", "--save-every-s", "0")
    wait_for(tmp_path / FILE_NAME, process)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    outcome = json.loads(out)
    assert not outcome["finished"]
    assert 0 < outcome["step"] < SCHEDULE.steps
    assert "stopping after this step" in errors
    assert_same_bits(trained(tmp_path), straight)


def test_killed_while_it_saves_the_checkpoint_before_is_whole(tmp_path: Path, straight: dict[str, np.ndarray]) -> None:
    process = start("-c", SELF_KILLING, str(tmp_path))
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGKILL
    assert planned_steps(tmp_path) == SCHEDULE.steps
    assert_same_bits(trained(tmp_path), straight)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_stops_at_once(first: signal.Signals) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupt() as interrupt:
        assert not interrupt.asked
        os.kill(os.getpid(), first)
        assert interrupt.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_torch_learns_the_same(tmp_path: Path) -> None:
    """Without Dropout, whose random numbers differ between backends."""
    process = start("-m", "tests.training.tiny_task", str(tmp_path / "torch"), "--dropout", "0", backend="torch")
    train(tiny_task(dropout=0.0), tmp_path / "tensorflow", SCHEDULE, log_every=1)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    theirs, ours = scalars(tmp_path / "torch" / "logs"), scalars(tmp_path / "tensorflow" / "logs")
    for tag in ("loss", "gradient_norm", "learning_rate"):
        assert list(theirs[tag]) == list(ours[tag]) == list(range(1, SCHEDULE.steps + 1))
        assert_close(list(theirs[tag].values()), list(ours[tag].values()), "backend")
    assert json.loads(out)["finished"]


def test_a_nan_names_its_batch_and_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step 4 isn't finite, trained on stories 24 to 29; got loss nan"):
        train(tiny_task(bad_step=4), tmp_path, SCHEDULE, save_every_s=0)
    assert_same_bits(trained(tmp_path), trained(tmp_path / "straight"))


def test_a_finished_training_is_left_alone(tmp_path: Path) -> None:
    first = train(tiny_task(), tmp_path, SCHEDULE)
    task = tiny_task()
    assert train(task, tmp_path, SCHEDULE) == first
    assert (first.step, first.finished, task.traces) == (SCHEDULE.steps, True, 0)
    assert len(list((tmp_path / "logs").iterdir())) == 1
    assert first.seconds > 0
    assert set(first.losses) == {"loss", "size", "gradient_norm"}


def test_refuses_a_changed_schedule(tmp_path: Path) -> None:
    train(tiny_task(), tmp_path, SCHEDULE)
    with pytest.raises(TrainingError, match=r"got learning_rate 0\.02; expected learning_rate 0\.01"):
        train(tiny_task(), tmp_path, replace(SCHEDULE, learning_rate=0.02))


def test_refuses_a_batch_of_another_shape(tmp_path: Path) -> None:
    task = tiny_task()
    inner = task.batch
    task.batch = lambda step: {name: array[: 6 - (step == 2)] for name, array in inner(step).items()}
    with pytest.raises(TrainingError, match="the batch of step 2 has another form"):
        train(task, tmp_path, SCHEDULE)


def test_traces_once(tmp_path: Path) -> None:
    task = tiny_task()
    train(task, tmp_path, SCHEDULE)
    assert task.traces == 1


def test_logs_for_tensorboard(tmp_path: Path) -> None:
    outcome = train(tiny_task(), tmp_path, SCHEDULE, log_every=5)
    found = scalars(tmp_path / "logs")
    assert set(found) == {"loss", "size", "gradient_norm", "learning_rate", "seconds"}
    assert list(found["loss"]) == [5, 10, 12]
    assert found["loss"][12] == np.float32(outcome.losses["loss"])
    assert found["learning_rate"][5] == np.float32(SCHEDULE.learning_rate_at(4))


def test_a_learning_rate_factor_holds_a_variable_back(tmp_path: Path) -> None:
    task = tiny_task()
    task.learning_rate_factor = lambda variable: 0.0 if variable is task.network.table.weight else 1.0
    before = weights(task.network)
    train(task, tmp_path, SCHEDULE)
    after = weights(task.network)
    assert np.array_equal(after["table.weight"], before["table.weight"])
    assert not np.array_equal(after["scale"], before["scale"])


def test_mixed_precision_ends_with_the_training(tmp_path: Path) -> None:
    task, plain = tiny_task(dropout=0.0), tiny_task(dropout=0.0)
    mixed = train(task, tmp_path / "mixed", replace(SCHEDULE, mixed_precision=True))
    exact = train(plain, tmp_path / "exact", SCHEDULE)
    assert (task.computes_in, plain.computes_in) == ("bfloat16", "float32")
    assert mixed.losses["loss"] != exact.losses["loss"]
    assert mixed.losses["loss"] == pytest.approx(exact.losses["loss"], rel=2**-7)  # bfloat16 has 8 bits
    assert {value.dtype for value in weights(task.network).values()} == {np.dtype(np.float32)}
    assert keras.backend.standardize_dtype(task.network(task.batch(0)["ids"]).dtype) == "float32"


def test_minutes_become_steps_and_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: dict[str, np.ndarray]
) -> None:
    clock = iter([0.0, 30.0, *np.arange(32.0, 100.0, 2.0)])  # 30 s for the first step, then 2 s each
    with monkeypatch.context() as patch:
        patch.setattr("training.loop.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
        task = tiny_task()
        assert steps_for_minutes(task, SCHEDULE, 1.0) == 15  # (60 - 30) / 2, a multiple of 3
    train(task, tmp_path, SCHEDULE)
    assert_same_bits(weights(task.network), straight)


def test_no_time_is_still_one_update(tmp_path: Path) -> None:
    assert steps_for_minutes(tiny_task(), SCHEDULE, 0.0) == SCHEDULE.accumulate
