"""Weights into a network, strictly, and our own checkpoints on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from model.layers import named_variables, numpy_of
from seed_story.errors import WeightsError

_SHOWN = 10


def load_weights(network: keras.Layer, tensors: Mapping[str, NDArray[Any]], *, ignore: Sequence[str] = ()) -> None:
    """Assigns every tensor to the weight of its name; all of them, or none.

    Args:
        tensors: floating-point arrays (float16, bfloat16 and float64 become float32), in torch's layout.
        ignore: `fnmatch` patterns of tensors that may be left over.

    Raises:
        WeightsError: tensors are missing, left over, mis-shaped or not floats; names the first ten of each.
    """
    variables = named_variables(network)
    missing = [name for name in variables if name not in tensors]
    left = [n for n in tensors if n not in variables and not any(fnmatchcase(n, p) for p in ignore)]
    common = [name for name in variables if name in tensors]
    forms = {name: _form(tensors[name]) for name in common}  # once each: a lazy mapping reads anew every time
    misshaped = [
        f"{name} is {shape}, expected {tuple(variables[name].shape)}"
        for name, (shape, _) in forms.items()
        if shape != tuple(variables[name].shape)
    ]
    untyped = [f"{name} is {dtype}" for name, (_, dtype) in forms.items() if not _is_float(dtype)]
    problems = {"missing": missing, "unused": left, "mis-shaped": misshaped, "not floating-point": untyped}
    found = [_describe(kind, names) for kind, names in problems.items() if names]
    if found:
        raise WeightsError("the checkpoint doesn't fit the network: " + "; ".join(found))
    for name in common:
        variables[name].assign(np.asarray(tensors[name]).astype(np.float32))


def without_prefix(tensors: Mapping[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    """The tensors whose names start with `prefix`, under the rest of their names; or all, if none does.

    For files of a network with a head, such as `ViTForImageClassification` (`vit.embeddings...`).
    """
    inner = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    return inner or dict(tensors)


def fingerprint(network: keras.Layer) -> str:
    """Sha256 of every weight with its name and shape, 64 hex digits: equal for equal weights, however it was read."""
    digest = hashlib.sha256()
    for name, variable in sorted(named_variables(network).items()):
        digest.update(f"{name} {tuple(variable.shape)}\n".encode())
        digest.update(np.ascontiguousarray(numpy_of(variable), np.float32).data)
    return digest.hexdigest()


def save_safetensors(network: keras.Layer, path: str | os.PathLike[str]) -> None:
    """Writes every weight under its name, float32, atomically."""
    write_safetensors({name: numpy_of(v) for name, v in named_variables(network).items()}, path)


def write_safetensors(tensors: Mapping[str, NDArray[Any]], path: str | os.PathLike[str]) -> None:
    """Writes tensors under their names, atomically: `path` is the old or the whole new file."""
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    scratch = Path(name)
    try:
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, scratch)
        with scratch.open("rb") as written:
            os.fsync(written.fileno())
        scratch.chmod(0o666 & ~_umask())  # mkstemp makes it private
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def load_safetensors(network: keras.Layer, path: str | os.PathLike[str], *, ignore: Sequence[str] = ()) -> None:
    """Loads a safetensors file with `load_weights`.

    Raises:
        WeightsError: there is no such file, it isn't a whole safetensors file, or it doesn't fit the network.
    """
    load_weights(network, read_safetensors(path), ignore=ignore)


def read_safetensors(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """A safetensors file's tensors by name.

    Raises:
        WeightsError: there is no such file, or it isn't a whole safetensors file.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise WeightsError("there is no such checkpoint", got=str(path)) from None
    except SafetensorError as error:
        raise WeightsError(f"{path} isn't a whole safetensors file", got=error) from error
    except OSError as error:
        raise WeightsError(f"{path} can't be read", got=error, expected="a safetensors file") from error


def _form(tensor: NDArray[Any]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    return tuple(tensor.shape), tensor.dtype


def _is_float(dtype: np.dtype[Any]) -> bool:
    return np.issubdtype(dtype, np.floating) or dtype.name == "bfloat16"


def _describe(kind: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind}: {', '.join(sorted(names)[:_SHOWN])}{more}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
