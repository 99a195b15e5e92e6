"""A checkpoint in the Hugging Face layout: a local folder with config.json and safetensors, or an id on the
hub.

The safetensors format is read here directly (eight bytes of length, a JSON header, raw little-endian
tensors): the library's numpy reader has no bfloat16, which most LLaMA checkpoints are stored in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from model.sources.lazy import LazyTensors
from seed_story.errors import ConfigError, DownloadError, WeightsError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # bfloat16: the upper half of a float32
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


@dataclass(frozen=True)
class _Entry:
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file


class SafetensorsWeights(LazyTensors[_Entry, npt.NDArray[np.float32]]):
    """Tensors by name; each access reads one from its file and makes it float32."""

    def __init__(self, entries: Mapping[str, _Entry]) -> None:
        super().__init__(dict(entries))

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor as float32; raises WeightsError if it is stored in another kind of number."""
        entry = self._stored[name]
        if entry.dtype not in _DTYPES:
            raise WeightsError(f"{name} isn't stored as floats", got=entry.dtype, expected=" ".join(_DTYPES))
        raw = np.fromfile(entry.file, _DTYPES[entry.dtype], int(np.prod(entry.shape)), offset=entry.offset)
        if entry.dtype == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float32, copy=False).reshape(entry.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self._stored[name].shape


def read_hf(folder_or_hub_id: str | Path) -> tuple[dict[str, Any], SafetensorsWeights]:
    """The configuration and the tensors of a checkpoint.

    Args:
        folder_or_hub_id: a folder with config.json and model.safetensors (or its shards with their index),
        else an
            id on the hub such as `owner/name`.

    Returns:
        config.json as a dictionary, for `LlamaConfig.from_hf` and its like; the tensors, float32 and lazy.

    Raises:
        DownloadError: not a folder, and the hub can't be reached or doesn't know the id.
        ConfigError: config.json is missing or isn't JSON.
        WeightsError: no safetensors, or damaged, truncated or missing ones.
    """
    folder = hf_folder(folder_or_hub_id)
    return _read_config(folder), read_safetensors(folder)


def hf_folder(folder_or_hub_id: str | Path) -> Path:
    """The local folder of a checkpoint, its tokenizer included; an id is downloaded into the hub's own cache.

    Raises:
        DownloadError: not a folder, and the hub can't be reached or doesn't know the id.
    """
    folder = Path(folder_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download  # slow to import, and not needed for a folder
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(str(folder_or_hub_id), allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, HFValidationError, OfflineModeIsEnabled, RuntimeError) as error:
        lines = str(error).strip().splitlines()
        raise DownloadError(
            f"{folder_or_hub_id} is neither a folder nor a model that the hub gives",
            got=f"{type(error).__name__}: {lines[0] if lines else ''}",
            expected="a folder with config.json and *.safetensors, or an id such as owner/name",
            hint="Without the hub, copy the model's files into a local folder and give its path.",
        ) from error


def read_safetensors(path: str | Path) -> SafetensorsWeights:
    """The tensors of one safetensors file, or of a folder with one or with shards and their index.

    Raises:
        WeightsError: none there, or damaged, truncated or missing ones.
    """
    path = Path(path)
    if path.is_file():
        return SafetensorsWeights(_read_header(path))
    if (path / _INDEX).is_file():
        return SafetensorsWeights(_read_shards(path))
    if (path / _SINGLE).is_file():
        return SafetensorsWeights(_read_header(path / _SINGLE))
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise WeightsError(
            f"{path} has no safetensors weights that are certain", got=[file.name for file in files],
            expected=f"{_SINGLE}, or {_INDEX} with its shards",
            hint="Save older formats again with `model.save_pretrained(folder)` of transformers.",
        )  # fmt: skip
    return SafetensorsWeights(_read_header(files[0]))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} can't be read", got=error, hint="Is this a model's folder?") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} isn't a configuration", got=type(config).__name__, expected="an object")
    return config


def _read_shards(folder: Path) -> dict[str, _Entry]:
    try:
        places = dict(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{folder / _INDEX} can't be read", got=error) from error
    headers = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise WeightsError(f"{_INDEX} names a file outside of its folder", got=name)
        headers[name] = _read_header(folder / name)
    if lost := [tensor for tensor, name in places.items() if tensor not in headers[name]]:
        raise WeightsError(f"{folder}: tensors aren't in the shards that the index names", got=lost[:5])
    if extra := sorted({t for header in headers.values() for t in header} - set(places)):
        raise WeightsError(f"{folder}: the shards hold tensors that the index doesn't name", got=extra[:5])
    return {tensor: headers[name][tensor] for tensor, name in places.items()}


def _read_header(path: Path) -> dict[str, _Entry]:
    hint = "Download it again."
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _entry(path, name, value, 8 + length, size) for name, value in header.items()}
    except FileNotFoundError as error:
        raise WeightsError(f"there is no file {path}", hint=hint) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} isn't a whole safetensors file", got=error, hint=hint) from error


def _entry(path: Path, name: str, value: Mapping[str, Any], start: int, size: int) -> _Entry:
    shape = tuple(int(n) for n in value["shape"])
    begin, end = (int(n) for n in value["data_offsets"])
    if not 0 <= begin <= end <= size - start:
        raise ValueError(f"{name} ends at byte {start + end} of {size}")
    dtype = str(value["dtype"])
    if dtype in _DTYPES and end - begin != int(np.prod(shape)) * np.dtype(_DTYPES[dtype]).itemsize:
        raise ValueError(f"{name} has {end - begin} bytes for the shape {list(shape)}")
    return _Entry(path, dtype, shape, start + begin)
