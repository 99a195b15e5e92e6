"""This project's own vision transformer."""

import numpy as np

from seed_story import __version__
from seed_story.backends import open_graph
from seed_story.bundle import Bundle, graph_file
from seed_story.contract import VIT, vit_signatures


class Engine:
    """The ViT of a bundle, and pictures made by `benchmarks.peers.weights`."""

    version = __version__

    def __init__(self, bundle: str, pictures: str, threads: str) -> None:
        opened = Bundle.open(bundle)
        self._graph = open_graph(opened.path / graph_file(VIT), backend="litert", threads=int(threads))
        self._bound = self._graph.bind(vit_signatures(opened.manifest.story.vision)[0])
        self._pixels = np.load(pictures)["pixels"]

    def show(self, index: int) -> None:
        """Chooses a picture."""
        self._bound.inputs["image"][:] = self._pixels[index : index + 1]

    def look(self) -> None:
        """Computes its features."""
        self._bound.run()

    def features(self) -> object:
        """The last features."""
        return self._bound.outputs["features"]
