"""A vision transformer in OpenVINO."""

import numpy as np
import openvino


class Engine:
    """An ONNX file or OpenVINO's own, and pictures made by `benchmarks.peers.weights`.

    `precision` is `f32`, `bf16`, or `default` for what OpenVINO takes on this machine.
    """

    def __init__(self, path: str, pictures: str, threads: str, precision: str) -> None:
        hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": int(threads), "NUM_STREAMS": 1}
        if precision != "default":
            hints["INFERENCE_PRECISION_HINT"] = precision
        compiled = openvino.Core().compile_model(path, "CPU", hints)
        taken = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.version = f"{openvino.__version__.partition('-')[0]}, {taken}"
        self._request = compiled.create_infer_request()
        self._pixels = np.load(pictures)["normalized"]

    def show(self, index: int) -> None:
        """Chooses a picture."""
        self._picture = np.ascontiguousarray(self._pixels[index : index + 1])

    def look(self) -> None:
        """Computes its features."""
        self._request.infer([self._picture], share_inputs=True)

    def features(self) -> object:
        """The last features."""
        return self._request.get_output_tensor().data
