"""The vision transformer's and the Q-Former's graphs, straight from the Keras networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from export.vit_rotation import rotated_vit
from model.layers import numpy_of
from model.qformer import QFormer
from model.rotation import Doubles
from model.vit import VisionTransformer
from seed_story.contract import Signature, qformer_signatures, vit_signatures

Floats = npt.NDArray[np.float32]


def write_vit(network: VisionTransformer, folder: Path, *, rotated: bool = False) -> bytes:
    """Pixels to features, as a float32 `.tflite`.

    Args:
        folder: an empty folder for the intermediate SavedModel.
        rotated: whether its residual stream is turned (`export/vit_rotation.py`); features are as ever.
    """
    signature = vit_signatures(network.config)[0]
    if not rotated:
        return _convert(network, signature, folder, {})
    changed, back, bias = rotated_vit(network)
    return _convert(network, signature, folder, changed, lambda features: tf.matmul(features, back) + bias)


def write_qformer(network: QFormer, feature_tokens: int, folder: Path, turn: Doubles | None = None) -> bytes:
    """Features to decoder embeddings, as a float32 `.tflite`.

    Args:
        turn: what the last matrices turn them by, for a rotated decoder (`export/rotation.py`), `[llm_size, llm_size]`.
    """
    signature = qformer_signatures(network.config, feature_tokens)[0]
    return _convert(network, signature, folder, {} if turn is None else _turned(network, turn))


def _turned(network: QFormer, turn: Doubles) -> dict[str, Floats]:
    """What becomes of the variables that write embeddings, by their paths."""
    size, last = network.config.llm_size, network.projection
    writers = [last.weight, *([] if last.bias is None else [last.bias])]
    writers += [] if network.memory is None else [network.memory.values.weight]
    made = {}
    for variable in writers:  # outputs first, those of each query end to end
        value = numpy_of(variable)
        rows = np.einsum("ij,qjn->qin", turn, value.reshape(-1, size, *value.shape[1:] or (1,)))
        made[variable.path] = rows.reshape(value.shape).astype(np.float32)
    return made


def _convert(
    network: keras.Layer,
    signature: Signature,
    folder: Path,
    changed: Mapping[str, Floats],
    last: Callable[[tf.Tensor], tf.Tensor] = tf.identity,
) -> bytes:
    """The network's graph, with other values for some variables, by their paths, and what is done last."""
    (given,), (made,) = signature.inputs, signature.outputs
    values = [(variable, changed.get(variable.path, numpy_of(variable))) for variable in network.variables]

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def run(**inputs: Any) -> dict[str, Any]:
        # Constants in place of variables: so the converter folds what follows from weights alone.
        constants = [(variable, tf.constant(value)) for variable, value in values]
        with keras.StatelessScope(state_mapping=constants):
            return {made.name: last(network(inputs[given.name], training=False))}

    function = run.get_concrete_function(**{given.name: tf.TensorSpec(given.shape, tf.float32, given.name)})
    tf.saved_model.save(tf.Module(), str(folder), signatures={signature.name: function})
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder), signature_keys=[signature.name])
    return bytes(converter.convert())
