"""An ONNX file to OpenVINO's int8, by NNCF. Arguments: the file, the pictures, and the .xml to write."""

import sys

import nncf
import numpy as np
import openvino

if __name__ == "__main__":
    pictures = np.load(sys.argv[2])["normalized"]
    data = nncf.Dataset([picture[None] for picture in pictures], lambda picture: {"pixels": picture})
    made = nncf.quantize(
        openvino.Core().read_model(sys.argv[1]), data, model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.MIXED, subset_size=len(pictures),
    )  # fmt: skip
    openvino.save_model(made, sys.argv[3], compress_to_fp16=False)
