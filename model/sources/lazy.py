"""Tensors that are read when they are asked for, so that a checkpoint is never in memory as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

Stored = TypeVar("Stored")
Value = TypeVar("Value", covariant=True)


class LazyTensors(Mapping[str, Value], Generic[Stored, Value]):
    """What the readers of checkpoints have in common; they say in `__getitem__` how a tensor is read.

    Args:
        stored: each tensor as it is stored, by the name that it is asked for.
    """

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self._stored = stored

    def __contains__(self, name: object) -> bool:
        return name in self._stored  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
