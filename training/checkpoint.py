"""A training's state in one file: what is needed to go on as if it had never stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from model.layers import named_variables, numpy_of
from training.errors import TrainingError
from training.task import Outcome

FILE_NAME = "checkpoint.safetensors"
_KEY = "training"
_SHOWN = 5


def state_variables(network: keras.Layer, optimizer: keras.Optimizer) -> dict[str, keras.Variable]:
    """All that changes in training: learned weights, states of random generators, the optimizer's variables.

    Frozen weights aren't among them. A learned weight has its name in a checkpoint of the network, if it has one.
    """
    names = {id(variable): name for name, variable in named_variables(network).items()}
    learned = network.trainable_variables
    fixed = {id(variable) for variable in network.weights}
    random = [variable for variable in network.variables if id(variable) not in fixed]
    return (
        {f"network.{names.get(id(variable), index)}": variable for index, variable in enumerate(learned)}
        | {f"random.{index}": variable for index, variable in enumerate(random)}
        | {f"optimizer.{index}": variable for index, variable in enumerate(optimizer.variables)}
    )


def write_checkpoint(
    path: Path, variables: Mapping[str, keras.Variable], fingerprint: Mapping[str, Any], outcome: Outcome
) -> None:
    """Writes the file atomically: whenever the process dies, `path` is the old or the whole new file.

    Args:
        fingerprint: JSON values that must be the same when training goes on.

    Raises:
        TrainingError: it can't be written; the old file is left.
    """
    tensors = {name: np.asarray(numpy_of(variable), order="C") for name, variable in variables.items()}
    about = json.dumps({"fingerprint": fingerprint, "outcome": asdict(outcome)})
    scratch = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, scratch, metadata={_KEY: about})
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        scratch.replace(path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} can't be written", got=error, hint="Is the disk full?") from error
    finally:
        scratch.unlink(missing_ok=True)


def read_checkpoint(
    path: Path, variables: Mapping[str, keras.Variable], fingerprint: Mapping[str, Any]
) -> Outcome | None:
    """Assigns a checkpoint's values to all variables, or to none; None if there is no such file.

    Raises:
        TrainingError: the file is damaged, is of another training, or doesn't fit the variables.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            about = _about(path, file.metadata())
            _check_fingerprint(path, about["fingerprint"], fingerprint)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} isn't a whole checkpoint", got=error, hint=_anew(path)) from error
    wrong = [
        name
        for name in sorted(tensors.keys() | variables.keys())
        if name not in tensors or name not in variables or tensors[name].shape != tuple(variables[name].shape)
    ]
    if wrong:
        raise TrainingError(
            f"{path} is of another network: {len(wrong)} tensors don't fit",
            got=", ".join(wrong[:_SHOWN]), hint=_anew(path),
        )  # fmt: skip
    for name, variable in variables.items():
        variable.assign(tensors[name])
    return Outcome(**about["outcome"])


def planned_steps(out: Path) -> int | None:
    """The steps that the training in a folder was planned for; None if no checkpoint is there.

    Raises:
        TrainingError: the checkpoint is damaged.
    """
    path = out / FILE_NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, "numpy") as file:
            return int(_about(path, file.metadata())["fingerprint"]["steps"])
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path} isn't a whole checkpoint", got=error, hint=_anew(path)) from error


def _about(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if not metadata or _KEY not in metadata:
        raise TrainingError(f"{path} isn't a training's checkpoint", got="only weights", hint=_anew(path))
    about: dict[str, Any] = json.loads(metadata[_KEY])
    return about


def _check_fingerprint(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    changed = [key for key in sorted(saved.keys() | asked.keys()) if saved.get(key) != asked.get(key)]
    if changed:
        raise TrainingError(
            f"{path} is of another training",
            got=", ".join(f"{key} {asked.get(key)}" for key in changed),
            expected=", ".join(f"{key} {saved.get(key)}" for key in changed),
            hint=f"Go on with the same settings. {_anew(path)}",
        )


def _anew(path: Path) -> str:
    return f"To begin anew, use another folder or delete {path}."
