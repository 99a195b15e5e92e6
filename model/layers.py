"""The few layers that all networks share.

A network's attributes ARE the names in its checkpoint: `network.encoder.layer[0].norm1.weight` is the tensor
`encoder.layer.0.norm1.weight`, in torch's layout. So no table of names has to be kept, and none can rot. One
exception: Keras reserves `output`, so an attribute may end in an underscore that its checkpoint doesn't have.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

Tensor: TypeAlias = Any
"""A tensor of the backend that Keras runs on; Keras is untyped. Shapes are in the docstrings."""
FloatArray: TypeAlias = NDArray[np.floating[Any]]
Rng: TypeAlias = np.random.Generator | None
"""Where initial weights come from: NumPy, so every backend gets the same. None: zeros, to be loaded over."""

_MASKED = -1e9  # finite, so that a row that may see nothing (padding) gives no NaN


class Module(keras.Layer):  # type: ignore[misc]
    """A layer that makes its weights in `__init__`: Keras has nothing left to build at the first call.

    Args:
        name: what its operators are called in a graph, where recipes can find them; None for a number of Keras's.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__(name=name)
        self.built = True
        self.supports_masking = True

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor) -> None:
        """No tensor here carries a Keras mask with it: a mask is an argument like any other."""

    def parameter(self, name: str, values: FloatArray) -> keras.Variable:
        """A trainable float32 variable with these initial values."""
        return self.add_weight(
            shape=values.shape,
            initializer=lambda shape, dtype=None: ops.convert_to_tensor(values, dtype=dtype),
            dtype="float32",
            name=name,
        )


def normal(rng: Rng, *shape: int, std: float = 0.02) -> FloatArray:
    """Initial weights: float32, normal with standard deviation `std`; zeros without an `rng`."""
    if rng is None:
        return np.zeros(shape, np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(std)


def generator(seed: int | None) -> Rng:
    """The `Rng` of a seed; None (zeros) for None."""
    return None if seed is None else np.random.default_rng(seed)


class Linear(Module):
    """`x @ weight.T + bias`: `[..., inputs]` to `[..., outputs]`; weight `[outputs, inputs]` as in torch."""

    def __init__(self, inputs: int, outputs: int, rng: Rng, *, bias: bool = True, name: str | None = None) -> None:
        super().__init__(name)
        self.weight = self.parameter("weight", normal(rng, outputs, inputs))
        self.bias = self.parameter("bias", np.zeros(outputs, np.float32)) if bias else None

    def call(self, x: Tensor) -> Tensor:  # noqa: D102
        y = ops.matmul(x, ops.transpose(self.weight))
        return y if self.bias is None else y + self.bias

    def assign(self, weight: FloatArray, bias: FloatArray) -> None:
        """Other weights, of the same shapes, for a layer with a bias."""
        assert self.bias is not None
        self.weight.assign(weight)
        self.bias.assign(bias)


class LayerNorm(Module):
    """Layer Normalization over the last axis (arXiv 1607.06450), biased variance as in torch."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = self.parameter("weight", np.ones(size, np.float32))
        self.bias = self.parameter("bias", np.zeros(size, np.float32))

    def call(self, x: Tensor) -> Tensor:  # noqa: D102
        centred = x - ops.mean(x, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(centred), axis=-1, keepdims=True)
        return centred * ops.rsqrt(variance + self.eps) * self.weight + self.bias


class RMSNorm(Module):
    """Root mean square normalization over the last axis (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = self.parameter("weight", np.ones(size, np.float32))

    def call(self, x: Tensor) -> Tensor:  # noqa: D102
        return x * ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + self.eps) * self.weight


class LayerScale(Module):
    """A learnable factor per channel on a residual branch (arXiv 2103.17239)."""

    def __init__(self, size: int, initial: float) -> None:
        super().__init__()
        self.lambda1 = self.parameter("lambda1", np.full(size, initial, np.float32))

    def call(self, x: Tensor) -> Tensor:  # noqa: D102
        return x * self.lambda1


class Embedding(Module):
    """Rows of a table: int ids of any shape `[...]`, each in `[0, rows)`, to `[..., size]`."""

    def __init__(self, rows: int, size: int, rng: Rng) -> None:
        super().__init__()
        self.weight = self.parameter("weight", normal(rng, rows, size))

    def call(self, ids: Tensor) -> Tensor:  # noqa: D102
        return ops.take(self.weight, ids, axis=0)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`[b, t, heads * d]` to `[b, heads, t, d]`."""
    b, t, width = ops.shape(x)
    return ops.transpose(ops.reshape(x, (b, t, heads, width // heads)), (0, 2, 1, 3))


def split_queries(x: Tensor, heads: int) -> Tensor:
    """`split_heads`, divided by sqrt(d): before the split, where the converter folds it into the queries' weights."""
    return split_heads(x * (x.shape[-1] // heads) ** -0.5, heads)


def merge_heads(x: Tensor) -> Tensor:
    """`[b, heads, t, d]` to `[b, t, heads * d]`."""
    b, heads, t, d = ops.shape(x)
    return ops.reshape(ops.transpose(x, (0, 2, 1, 3)), (b, t, heads * d))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, softmax(q k^T) v of queries that are scaled (arXiv 1706.03762).

    Args:
        q: of `split_queries`, `[b, heads, t, d]`.
        k, v: `[b, heads, s, d]`.
        mask: boolean, broadcastable to `[b, heads, t, s]`; True where a row may look.

    Returns:
        `[b, heads, t, d]`.
    """
    scores = ops.matmul(q, ops.transpose(k, (0, 1, 3, 2)))
    if mask is not None:
        scores = ops.where(mask, scores, _MASKED)
    return ops.matmul(ops.softmax(scores, axis=-1), v)


def numpy_of(variable: keras.Variable) -> FloatArray:
    """A copy of a variable's value on the host."""
    return np.array(ops.convert_to_numpy(ops.convert_to_tensor(variable)))


def named_variables(network: keras.Layer) -> dict[str, keras.Variable]:
    """Every weight of a network under its checkpoint's name, in the order in which they were made."""
    found: dict[str, keras.Variable] = {}
    own = vars(network)
    for attribute, value in {**own, **own.get("_modules", {})}.items():  # torch keeps layers apart
        if not attribute.startswith("_"):
            _collect(attribute.rstrip("_"), value, found)
    return found


def _collect(name: str, value: object, found: dict[str, keras.Variable]) -> None:
    if isinstance(value, keras.Variable):
        found[name] = value
    elif isinstance(value, keras.Layer):
        found.update({f"{name}.{inner}": variable for inner, variable in named_variables(value).items()})
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _collect(f"{name}.{index}", item, found)
