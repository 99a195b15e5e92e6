from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.layers import numpy_of
from tests.training.tiny_task import SCHEDULE, tiny_task
from training import checkpoint
from training.checkpoint import planned_steps, read_checkpoint, state_variables, write_checkpoint
from training.errors import TrainingError
from training.optimizer import AdamW
from training.task import Outcome

FINGERPRINT = {"task": "tiny", "steps": 12, "learning_rate": 0.1}


def state() -> dict[str, keras.Variable]:
    network = tiny_task().network
    return state_variables(network, AdamW(SCHEDULE, network.trainable_variables, lambda variable: 1.0))


def test_holds_what_changes_and_nothing_frozen(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, state(), FINGERPRINT, Outcome(0, False, 0.0))
    names = list(load_file(path))
    assert {n for n in names if n.startswith("network.")} == {
        f"network.{name}" for name in ("table.weight", "layers.1.weight", "layers.1.bias", "scale")
    }
    assert [n for n in names if n.startswith("random.")] == ["random.0"]
    # iteration and norm; an accumulator and two moments of each of the four
    assert len([n for n in names if n.startswith("optimizer.")]) == 2 + 3 * 4


def test_gives_back_what_it_was_given(tmp_path: Path) -> None:
    path, saved, loaded = tmp_path / "checkpoint.safetensors", state(), state()
    for number, variable in enumerate(saved.values()):
        variable.assign(np.full(variable.shape, number))
    outcome = Outcome(7, False, 1 / 3, {"loss": 0.1})
    write_checkpoint(path, saved, FINGERPRINT, outcome)
    assert read_checkpoint(path, loaded, FINGERPRINT) == outcome
    for number, variable in enumerate(loaded.values()):
        assert np.array_equal(numpy_of(variable), np.full(variable.shape, number))
    assert planned_steps(tmp_path) == 12
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_none_is_no_error(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path / "none", state(), FINGERPRINT) is None
    assert planned_steps(tmp_path) is None


def test_refuses_another_training(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, state(), FINGERPRINT, Outcome(7, False, 1.0))
    with pytest.raises(TrainingError, match=r"got steps 13, task huge; expected steps 12, task tiny\..* delete"):
        read_checkpoint(path, state(), {**FINGERPRINT, "task": "huge", "steps": 13})


def test_refuses_another_network_and_changes_nothing(tmp_path: Path) -> None:
    path, saved = tmp_path / "checkpoint.safetensors", state()
    del saved["network.scale"]
    write_checkpoint(path, saved, FINGERPRINT, Outcome(7, False, 1.0))
    fresh = state()
    fresh["network.table.weight"].assign(np.ones((5, 4)))
    with pytest.raises(TrainingError, match=r"1 tensors don't fit; got network\.scale"):
        read_checkpoint(path, fresh, FINGERPRINT)
    assert np.array_equal(numpy_of(fresh["network.table.weight"]), np.ones((5, 4)))


@pytest.mark.parametrize("damage", ["cut", "weights"])
def test_refuses_a_damaged_file(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, state(), FINGERPRINT, Outcome(7, False, 1.0))
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        save_file({"scale": np.ones(2)}, path)
    with pytest.raises(TrainingError, match="delete"):
        read_checkpoint(path, state(), FINGERPRINT)
    with pytest.raises(TrainingError, match="delete"):
        planned_steps(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, state(), FINGERPRINT, Outcome(7, False, 1.0))
    before = path.read_bytes()

    def full(tensors: object, filename: Path, metadata: object) -> None:
        filename.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainingError, match="No space left"):
        write_checkpoint(path, state(), FINGERPRINT, Outcome(8, False, 1.0))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]
