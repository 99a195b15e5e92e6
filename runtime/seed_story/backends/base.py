"""What every inference engine offers: graphs whose tensors are NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from seed_story.contract import Signature
from seed_story.errors import ContractError

Array = npt.NDArray[Any]
ALIGNMENT = 64
"""Bytes: what engines want of the memory they read in place, and what they may read past its end."""


def aligned_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
    """A C-contiguous array of zeros at a 64-byte boundary, with 64 more readable bytes behind it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 2 * ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


class GraphSignature(Protocol):
    """One entry point, with its tensors already in place."""

    @property
    def inputs(self) -> Mapping[str, Array]:
        """What the graph reads; write into them in place."""

    @property
    def outputs(self) -> Mapping[str, Array]:
        """What the graph writes; overwritten by the next `run`."""

    def run(self) -> None:
        """Computes the outputs from the inputs."""


class Graph(Protocol):
    """One loaded `.tflite` file."""

    def bind(self, signature: Signature, memory: Mapping[str, Array] | None = None) -> GraphSignature:
        """Prepares one entry point.

        Args:
            signature: what the contract says it must be.
            memory: arrays (aligned, C-contiguous) that some inputs shall be read from, such as the cache's,
                anew at every run, and some outputs be written to. The other tensors get memory of their own.

        Raises:
            ContractError: the graph's tensors aren't those of the contract.
        """

    def close(self) -> None:
        """Frees everything; nothing bound may run afterwards."""


def check_contract(graph: str, signature: Signature, found: Mapping[str, Mapping[str, tuple[Any, ...]]]) -> None:
    """Compares what a file has with what the contract says.

    Args:
        found: `inputs` and `outputs`, each name to `(dtype name, *shape)`.

    Raises:
        ContractError: they differ; the message names the first tensor that does.
    """
    for side, specs in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        expected = {spec.name: (spec.dtype, *spec.shape) for spec in specs}
        for name in sorted(expected.keys() | found[side].keys()):
            if expected.get(name) != found[side].get(name):
                raise ContractError(
                    f"{graph}: signature {signature.name!r} differs from its contract at {side} {name!r}",
                    got=found[side].get(name, "nothing"),
                    expected=expected.get(name, "nothing"),
                    hint="Export the bundle again with this version.",
                )
