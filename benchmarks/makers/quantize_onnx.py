"""An ONNX file to int8, by ONNX Runtime. Arguments: the file, the pictures, `dynamic` or `static`, where to write.

`dynamic`: weights per channel, activations by what comes. `static`: QDQ, activations calibrated on the pictures.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process


class Pictures(quantization.CalibrationDataReader):  # type: ignore[misc]  # untyped
    """The pictures, one at a time."""

    def __init__(self, path: str) -> None:
        self._pictures = iter(np.load(path)["normalized"])

    def get_next(self) -> dict[str, Any] | None:
        """The next one, or None."""
        picture = next(self._pictures, None)
        return None if picture is None else {"pixels": picture[None]}


if __name__ == "__main__":
    source, pictures, how, target = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        ready = str(Path(scratch) / "ready.onnx")
        quant_pre_process(source, ready)
        if how == "dynamic":
            quantization.quantize_dynamic(ready, target, per_channel=True, weight_type=quantization.QuantType.QInt8)
        else:
            quantization.quantize_static(
                ready, target, Pictures(pictures), per_channel=True, quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
            )  # fmt: skip
