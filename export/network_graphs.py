"""The vision transformer's and the Q-Former's graphs, straight from the Keras networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from model.layers import numpy_of
from model.qformer import QFormer
from model.vit import VisionTransformer
from seed_story.contract import Signature, qformer_signatures, vit_signatures


def write_vit(network: VisionTransformer, folder: Path) -> bytes:
    """Pixels to features, as a float32 `.tflite`.

    Args:
        folder: an empty folder for the intermediate SavedModel.
    """
    return _convert(network, vit_signatures(network.config)[0], folder)


def write_qformer(network: QFormer, feature_tokens: int, folder: Path) -> bytes:
    """Features to decoder embeddings, as a float32 `.tflite`."""
    return _convert(network, qformer_signatures(network.config, feature_tokens)[0], folder)


def _convert(network: keras.Layer, signature: Signature, folder: Path) -> bytes:
    (given,), (made,) = signature.inputs, signature.outputs
    values = [(variable, numpy_of(variable)) for variable in network.variables]

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def run(**inputs: Any) -> dict[str, Any]:
        # Constants in place of variables: so the converter folds what follows from weights alone.
        constants = [(variable, tf.constant(value)) for variable, value in values]
        with keras.StatelessScope(state_mapping=constants):
            return {made.name: network(inputs[given.name], training=False)}

    function = run.get_concrete_function(**{given.name: tf.TensorSpec(given.shape, tf.float32, given.name)})
    tf.saved_model.save(tf.Module(), str(folder), signatures={signature.name: function})
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder), signature_keys=[signature.name])
    return bytes(converter.convert())
