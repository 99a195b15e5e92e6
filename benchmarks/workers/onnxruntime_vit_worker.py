"""A vision transformer in ONNX Runtime."""

import numpy as np
import onnxruntime


class Engine:
    """An ONNX file, and pictures made by `benchmarks.peers.weights`."""

    version = onnxruntime.__version__

    def __init__(self, path: str, pictures: str, threads: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._pixels = np.load(pictures)["normalized"]

    def show(self, index: int) -> None:
        """Chooses a picture."""
        self._feed = {"pixels": self._pixels[index : index + 1]}

    def look(self) -> None:
        """Computes its features."""
        (self._features,) = self._session.run(None, self._feed)

    def features(self) -> object:
        """The last features."""
        return self._features
