"""The LiteRT backend: `CompiledModel` with every tensor bound to memory of our own.

Why the C API: Python's `TensorBuffer.create_from_host_memory` makes 1-D buffers only, so a graph would have to
reshape each layer's cache, which copies it. Asking the engine for a tensor's type and handing that type back
binds an array of any rank; on two x86-64 cores that made a decode step at 512 slots a sixth faster.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import sys
import weakref
from collections.abc import Mapping
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from seed_story.backends.base import ALIGNMENT, Array, aligned_zeros, check_contract
from seed_story.contract import Signature
from seed_story.errors import BackendError, ContractError
from seed_story.quiet import quiet_stderr

_RANKED_TENSOR_TYPE_BYTES = 512  # far more than LiteRtRankedTensorType has in any version


@functools.cache
def _mute_tear_down() -> None:
    """The engine logs its own end after Python's: leaves standard error to Python, and takes it from C."""

    def mute() -> None:
        sys.stderr.flush()
        sys.stderr = open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="replace")  # noqa: SIM115, PTH123
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    atexit.register(mute)


def _engine() -> ModuleType:
    try:
        from ai_edge_litert import compiled_model
    except (ImportError, OSError) as error:
        raise BackendError(
            "LiteRT can't be loaded",
            got=error,
            hint="Install it: pip install ai-edge-litert (needs glibc 2.34).",
        ) from error
    return compiled_model  # type: ignore[no-any-return]


class CApi:
    """The few calls of LiteRT's C API that Python's wrapper lacks.

    Attributes:
        library: the C library itself.
    """

    def __init__(self) -> None:
        spec = util.find_spec("ai_edge_litert")
        folder = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path()
        names = ("libLiteRt.so", "libLiteRt.dylib", "LiteRt.dll")
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            raise BackendError("LiteRT's library isn't beside its Python package", expected=f"one of {names}")
        self.library = ctypes.CDLL(str(path))
        self._pointer = ctypes.pythonapi.PyCapsule_GetPointer
        self._pointer.restype, self._pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        self._name = ctypes.pythonapi.PyCapsule_GetName
        self._name.restype, self._name.argtypes = ctypes.c_char_p, [ctypes.py_object]
        self._capsule = ctypes.pythonapi.PyCapsule_New
        self._capsule.restype = ctypes.py_object
        self._capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function of the C API; raises BackendError when it fails."""
        try:
            status = getattr(self.library, function)(*arguments)
        except AttributeError as error:
            raise BackendError(f"LiteRT has no {function}", got=error, expected="version 2.3") from error
        if status != 0:
            raise BackendError(f"LiteRT's {function} failed", got=f"status {status}", expected="status 0")

    def address(self, capsule: Any) -> int:
        """What a capsule of Python's wrapper points to."""
        return int(self._pointer(capsule, self._name(capsule)))

    def buffer_on(self, array: Array, like: Any) -> tuple[Any, int, bytes]:
        """A tensor buffer that reads and writes `array` in place, of the type of the buffer `like`.

        Returns:
            The capsule, the address of the buffer (free it with `destroy`), and the capsule's name, which must
            outlive it.
        """
        name: bytes = self._name(like)
        kind = ctypes.create_string_buffer(_RANKED_TENSOR_TYPE_BYTES)
        self.call("LiteRtGetTensorBufferTensorType", ctypes.c_void_p(self.address(like)), kind)
        made = ctypes.c_void_p()
        self.call(
            "LiteRtCreateTensorBufferFromHostMemory",
            kind,
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
            None,
            ctypes.byref(made),
        )
        assert made.value is not None
        return self._capsule(made, name, None), made.value, name

    def destroy(self, address: int) -> None:
        """Frees a buffer of `buffer_on`; its array stays."""
        self.library.LiteRtDestroyTensorBuffer(ctypes.c_void_p(address))


@functools.cache
def c_api() -> CApi:
    """LiteRT's C library, loaded once."""
    return CApi()


class LiteRtSignature:
    """One entry point of a `LiteRtGraph`; see `seed_story.backends.base.GraphSignature`."""

    def __init__(self, graph: LiteRtGraph, signature: Signature, memory: Mapping[str, Array]) -> None:
        self._graph, self._name = graph, signature.name
        self.index = graph.model.get_signature_index(signature.name)
        listed = graph.model.get_signature_list()[signature.name]
        shapes = {spec.name: spec for spec in (*signature.inputs, *signature.outputs)}

        def place(name: str, create: Any) -> tuple[Array, Any]:
            spec = shapes[name]
            array = memory.get(name)
            if array is None:
                array = aligned_zeros(spec.shape, spec.dtype)
            _check_memory(name, array, spec.shape, spec.dtype)
            return array, graph.own(array, create(signature.name, name))

        ins = {name: place(name, graph.model.create_input_buffer_by_name) for name in listed["inputs"]}
        outs = {name: place(name, graph.model.create_output_buffer_by_name) for name in listed["outputs"]}
        self.inputs: Mapping[str, Array] = {name: array for name, (array, _) in ins.items()}
        self.outputs: Mapping[str, Array] = {name: array for name, (array, _) in outs.items()}
        self._input_buffers = [buffer for _, buffer in ins.values()]
        self._output_buffers = [buffer for _, buffer in outs.values()]
        self._ran = False

    @property
    def addresses(self) -> tuple[list[int], list[int]]:
        """LiteRT's own buffers of the inputs and of the outputs, in the file's order."""
        api = c_api()
        ins, outs = ([api.address(b.capsule) for b in bufs] for bufs in (self._input_buffers, self._output_buffers))
        return ins, outs

    def run(self) -> None:
        """Computes the outputs from the inputs; raises BackendError when the engine can't."""
        if self._graph.model is None:
            raise BackendError("the graph is closed", hint="Open the bundle again.")
        try:
            with contextlib.nullcontext() if self._ran else quiet_stderr():  # a first run may set the engine up
                self._graph.model.run_by_index(self.index, self._input_buffers, self._output_buffers)
        except RuntimeError as error:
            raise BackendError(f"LiteRT failed to run signature {self._name!r}", got=error) from error
        self._ran = True


def _check_memory(name: str, array: Array, shape: tuple[int, ...], dtype: str) -> None:
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ContractError(f"the memory for {name!r} has another form",
                            got=(array.dtype.name, *array.shape), expected=(dtype, *shape))  # fmt: skip
    if not array.flags.c_contiguous or array.ctypes.data % ALIGNMENT:
        raise ContractError(f"the memory for {name!r} can't be read in place", got=f"{array.strides} strides",
                            expected=f"C-contiguous memory at a multiple of {ALIGNMENT} bytes")  # fmt: skip


class LiteRtGraph:
    """One `.tflite` file in LiteRT; see `seed_story.backends.base.Graph`.

    Args:
        packed: a file in which XNNPACK keeps the packed weights, mapped into memory by later loads.
    """

    def __init__(self, path: Path, *, threads: int, packed: Path | None = None) -> None:
        self._path = path
        engine = _engine()
        _mute_tear_down()
        self._buffer_class = engine.TensorBuffer
        self._api = c_api()
        self._addresses: list[int] = []
        self._names: list[bytes] = []
        options = engine.Options(
            hardware_accelerators=engine.HardwareAccelerator.CPU,
            cpu_options=engine.CpuOptions(num_threads=threads, xnnpack_weight_cache_path=str(packed) if packed else ""),
        )
        try:
            with quiet_stderr():
                self.model: Any = engine.CompiledModel.from_file(str(path), options=options)
        except (RuntimeError, ValueError, TypeError) as error:
            raise BackendError(f"LiteRT refuses {path.name}", got=error) from error
        self._finalizer = weakref.finalize(self, _release, self.__dict__, self._api, self._addresses)

    def own(self, array: Array, prototype: Any) -> Any:
        """A LiteRT buffer over `array` with the type of `prototype`, freed with this graph."""
        capsule, address, name = self._api.buffer_on(array, prototype.capsule)
        self._addresses.append(address)
        self._names.append(name)
        return self._buffer_class(capsule)

    def bind(self, signature: Signature, memory: Mapping[str, Array] | None = None) -> LiteRtSignature:
        """See `seed_story.backends.base.Graph.bind`."""
        if self.model is None:
            raise BackendError("the graph is closed", hint="Open the bundle again.")
        if self.model.get_signature_index(signature.name) < 0:
            raise ContractError(f"{self._path.name} has no signature {signature.name!r}",
                                got=sorted(self.model.get_signature_list()))  # fmt: skip
        try:
            details = {
                "inputs": self.model.get_input_tensor_details(signature.name),
                "outputs": self.model.get_output_tensor_details(signature.name),
            }
        except RuntimeError as error:  # this is where it finds an operation that it can't prepare
            raise BackendError(f"LiteRT can't prepare {self._path.name}", got=error) from error
        found = {
            side: {name: (d["dtype"], *d["shape"]) for name, d in tensors.items()} for side, tensors in details.items()
        }
        check_contract(self._path.name, signature, found)
        return LiteRtSignature(self, signature, memory or {})

    def close(self) -> None:
        """Frees the engine's memory."""
        self._finalizer()


def _release(fields: dict[str, Any], api: CApi, addresses: list[int]) -> None:
    with quiet_stderr():
        for address in addresses:
            api.destroy(address)
        addresses.clear()
        fields["model"] = None
