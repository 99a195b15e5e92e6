"""A graph of 768 bytes, to see whether an engine works here: `python -m seed_story.backends.probe litert`.

It loads, binds arrays of two dimensions in place, and computes `y = x + x`: the same way that a bundle goes.
Made by TensorFlow 2.21's converter from a `tf.function` of that one line, with the signature `double`.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from seed_story.backends import open_graph
from seed_story.backends.base import aligned_zeros
from seed_story.contract import Signature, TensorSpec
from seed_story.errors import BackendError, SeedStoryError

_SIGNATURE = Signature("double", (TensorSpec("x", (2, 4)),), (TensorSpec("y", (2, 4)),))
_GRAPH = base64.b64decode(
    """
    HAAAAFRGTDMUACAAHAAYABQAEAAMAAAACAAEABQAAAAcAAAAfAAAANQAAACEAQAAlAEAALwCAAADAAAAAQAAABAAAAAAAAoAEAAMAAgA
    BAAKAAAADAAAABQAAAAsAAAABgAAAGRvdWJsZQAAAQAAAAQAAACk////AQAAAAQAAAABAAAAeQAAAAEAAAAEAAAADv///wQAAAABAAAA
    eAAAAAIAAAA0AAAABAAAANz///8EAAAABAAAABMAAABDT05WRVJTSU9OX01FVEFEQVRBAAgADAAIAAQACAAAAAMAAAAEAAAAEwAAAG1p
    bl9ydW50aW1lX3ZlcnNpb24ABQAAAKwAAACkAAAAnAAAAHwAAAAEAAAAkv///wQAAABgAAAAEAAAAAAAAAAIAA4ACAAEAAgAAAAQAAAA
    JAAAAAAABgAIAAQABgAAAAQAAAAAAAAADAAYABQAEAAMAAQADAAAAAbHpHKoib0bAQAAAAIAAAAEAAAABgAAADIuMjEuMAAAAAAGAAgA
    BAAGAAAABAAAABAAAAAxLjUuMAAAAAAAAAAAAAAArP7//7D+//+0/v//DwAAAE1MSVIgQ29udmVydGVkLgABAAAAFAAAAAAADgAYABQA
    EAAMAAgABAAOAAAAFAAAABwAAABcAAAAYAAAAGQAAAAEAAAAbWFpbgAAAAABAAAAFAAAAAAADgAUAAAAEAAMAAsABAAOAAAAEAAAAAAA
    AAsMAAAAEAAAADT///8BAAAAAQAAAAIAAAAAAAAAAAAAAAEAAAABAAAAAQAAAAAAAAACAAAAYAAAAAQAAAC+////AAAAARAAAAAQAAAA
    AgAAACAAAACA////EQAAAFBhcnRpdGlvbmVkQ2FsbDowAAAAAgAAAAIAAAAEAAAAAAAWABgAFAAAABAADAAIAAAAAAAAAAcAFgAAAAAA
    AAEQAAAAEAAAAAEAAAAYAAAA2P///woAAABkb3VibGVfeDowAAACAAAAAgAAAAQAAAABAAAACAAAAAQABAAEAAAA
    """
)


def probe(backend: str) -> None:
    """Runs the graph.

    Raises:
        UsageError: there is no such backend.
        BackendError: the engine isn't installed, refuses the graph, or computes something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.tflite"
        path.write_bytes(_GRAPH)
        graph = open_graph(path, backend=backend, threads=1)
        memory = aligned_zeros((2, 4))
        bound = graph.bind(_SIGNATURE, {"x": memory})
        memory[:] = np.arange(8).reshape(2, 4)
        bound.run()
        found = bound.outputs["y"].copy()
        graph.close()
    if not np.array_equal(found, 2 * memory):
        raise BackendError("the engine computes nonsense", got=found.tolist(), expected=(2 * memory).tolist())


def main(backend: str) -> None:
    """Probes, and prints what went wrong as JSON: null, or `what`, `got` and `hint`."""
    try:
        probe(backend)
    except SeedStoryError as error:
        print(json.dumps({"what": error.what, "got": str(error.got or ""), "hint": error.hint}))
    else:
        print("null")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "litert")
