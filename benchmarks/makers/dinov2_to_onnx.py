"""A `Dinov2Model` to ONNX for one picture of 224 pixels, by PyTorch. Arguments: its folder, and where to write."""

import sys
from typing import Any

import torch
import transformers

SIZE = 224


class Features(torch.nn.Module):
    """The last block's output, without the final norm."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """float32 `[1, 3, size, size]` to `[1, tokens, width]`."""
        features: torch.Tensor = self.model(pixels, output_hidden_states=True).hidden_states[-1]
        return features


if __name__ == "__main__":
    model = transformers.AutoModel.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    pixels = torch.zeros(1, 3, SIZE, SIZE)
    # The positions are interpolated here, once, and not for every picture.
    patches = (SIZE // model.config.patch_size) ** 2
    with torch.no_grad():
        place = torch.zeros(1, 1 + patches, model.config.hidden_size)
        positions = model.embeddings.interpolate_pos_encoding(place, SIZE, SIZE).clone()
    model.embeddings.interpolate_pos_encoding = lambda *_: positions
    torch.onnx.export(Features(model), (pixels,), sys.argv[2], opset_version=17, input_names=["pixels"],
                      output_names=["features"], dynamo=False)  # fmt: skip
