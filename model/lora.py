"""Low-rank adaptation of the decoder's linear layers (LoRA, arXiv 2106.09685).

Only the two small matrices of each layer are learned and kept on disk; an export adds their product to the weights,
so a device never sees them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import keras
import numpy as np
from keras import ops

from model.layers import FloatArray, Linear, Module, Rng, Tensor, generator, named_variables, normal, numpy_of
from model.llama import Llama
from seed_story.errors import WeightsError

_DOWN, _UP = "lora_down", "lora_up"


class LoraLinear(Module):
    """`x @ (weight + lora_up @ lora_down).T`; at first the same as `base`, whose weight it takes over, frozen.

    Weights: `lora_down` `[rank, inputs]`, random; `lora_up` `[outputs, rank]`, zero.
    """

    def __init__(self, base: Linear, rank: int, rng: Rng) -> None:
        super().__init__()
        outputs, inputs = base.weight.shape
        self.weight = base.weight
        self.weight.trainable = False
        self.lora_down = self.parameter(_DOWN, normal(rng, rank, inputs, std=inputs**-0.5))
        self.lora_up = self.parameter(_UP, np.zeros((outputs, rank), np.float32))

    def call(self, x: Tensor) -> Tensor:  # noqa: D102
        low = ops.matmul(x, ops.transpose(self.lora_down))
        return ops.matmul(x, ops.transpose(self.weight)) + ops.matmul(low, ops.transpose(self.lora_up))


def add_lora(llama: Llama, rank: int, seed: int = 0) -> None:
    """Makes every linear layer of the blocks a `LoraLinear` and freezes all else."""
    rng = generator(seed)
    for variable in named_variables(llama).values():
        variable.trainable = False
    for module in _holders(llama):
        for name, layer in list(vars(module).items()):
            if isinstance(layer, Linear):
                setattr(module, name, LoraLinear(layer, rank, rng))


def lora_tensors(llama: Llama) -> dict[str, FloatArray]:
    """The learned matrices by name, `model.layers.0.self_attn.q_proj.lora_down` and so on."""
    named = named_variables(llama)
    return {name: numpy_of(v) for name, v in named.items() if name.endswith((_DOWN, _UP))}


def merge_lora(llama: Llama, tensors: Mapping[str, FloatArray]) -> None:
    """Adds learned matrices to the weights of a plain decoder.

    Args:
        tensors: of `lora_tensors`, any floating dtype.

    Raises:
        WeightsError: a name or a shape doesn't fit the decoder; nothing was changed.
    """
    variables = named_variables(llama)
    deltas = {}
    for name in tensors:
        stem, _, kind = name.rpartition(".")
        target, down, up = f"{stem}.weight", tensors.get(f"{stem}.{_DOWN}"), tensors.get(f"{stem}.{_UP}")
        if kind not in (_DOWN, _UP) or target not in variables or down is None or up is None:
            raise WeightsError("the LoRA weights don't fit the decoder", got=name,
                               expected=f"pairs of {_DOWN} and {_UP} for its linear layers")  # fmt: skip
        shape, rank = tuple(variables[target].shape), down.shape[:1]
        if up.shape != shape[:1] + rank or down.shape != rank + shape[1:]:
            raise WeightsError(f"the LoRA weights of {stem} have other shapes", got=(up.shape, down.shape),
                               expected=f"a product of {shape}")  # fmt: skip
        deltas[target] = (up, down)
    for target, (up, down) in deltas.items():
        product = up.astype(np.float32) @ down.astype(np.float32)
        variables[target].assign(numpy_of(variables[target]) + product)


def _holders(llama: Llama) -> Iterator[keras.Layer]:
    for block in llama.model.layers:
        yield block.self_attn
        yield block.mlp
