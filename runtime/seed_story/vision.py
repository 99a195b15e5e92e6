"""Pictures to embeddings: the vision transformer, then the Q-Former. Loaded when the first picture comes."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seed_story.backends import Graph, GraphSignature, open_graph
from seed_story.config import StoryConfig
from seed_story.contract import qformer_signatures, vit_signatures
from seed_story.errors import BackendError
from seed_story.packed import packed_weights

PICTURES_KNOWN = 8
"""Pictures whose embeddings are remembered, each in queries * hidden * 4 bytes; few, since memory shall stay flat."""


class Vision:
    """The two picture graphs.

    Args:
        paths: of `vit.tflite` and `qformer.tflite`.
        sha256: of these two, for the engine's packed weights to be kept; by default they are packed at each load.
    """

    def __init__(
        self,
        paths: tuple[Path, Path],
        story: StoryConfig,
        *,
        backend: str,
        threads: int,
        sha256: tuple[str, str] | None = None,
    ) -> None:
        self._paths, self._story, self._backend, self._threads = paths, story, backend, threads
        self._sha256 = sha256 or (None, None)
        self._graphs: list[Graph] = []
        self._bound: list[GraphSignature] = []
        self._known: dict[bytes, npt.NDArray[np.float32]] = {}
        self._closed = False

    def _load(self) -> tuple[GraphSignature, GraphSignature]:
        if self._closed:
            raise BackendError("the graph is closed", hint="Open the bundle again.")
        if not self._bound:
            entries = (
                vit_signatures(self._story.vision)[0],
                qformer_signatures(self._story.qformer, self._story.vision.tokens)[0],
            )
            self._graphs = list(map(self._open, self._paths, self._sha256))
            self._bound = [graph.bind(entry) for graph, entry in zip(self._graphs, entries, strict=True)]
        vit, qformer = self._bound
        return vit, qformer

    def _open(self, path: Path, sha256: str | None) -> Graph:
        with packed_weights(sha256) if sha256 else contextlib.nullcontext() as packed:
            return open_graph(path, backend=self._backend, threads=self._threads, packed=packed)

    def features(self, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Pixels `[1, size, size, 3]` in 0..1 to features `[1, tokens, vision_hidden]`, a view."""
        vit, _ = self._load()
        vit.inputs["image"][:] = pixels
        vit.run()
        return np.asarray(vit.outputs["features"])

    def embeddings(self, pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Pixels `[1, size, size, 3]` in 0..1 to decoder embeddings `[queries, hidden]`, read-only.

        Those of the last pictures are remembered by their content: one of them again costs a hash.
        """
        _, qformer = self._load()
        digest = hashlib.sha256(np.ascontiguousarray(pixels).data).digest()
        found = self._known.pop(digest, None)
        if found is None:
            qformer.inputs["features"][:] = self.features(pixels)
            qformer.run()
            found = np.array(qformer.outputs["image_embeddings"][0])
            found.flags.writeable = False
        self._known[digest] = found  # the newest is last
        if len(self._known) > PICTURES_KNOWN:
            del self._known[next(iter(self._known))]
        return found

    def close(self) -> None:
        """Frees the graphs."""
        for graph in self._graphs:
            graph.close()
        self._graphs, self._bound, self._closed = [], [], True
        self._known.clear()
