"""The decoder's graph: its signatures traced and converted, with its weights still inputs.

The converter then sees a small skeleton, takes seconds and under a gigabyte whatever the model's size, and can fold
nothing; `export/flatbuffer.py` puts the weights in afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf

from export.decoder_step import BeginStep, DecoderStep, Int8Step, Tensor
from export.decoder_weights import TABLE, weight_shapes
from seed_story.config import LlamaConfig
from seed_story.contract import EMBED, Signature, Steps, begin_name, decoder_signatures


def write_skeleton(
    config: LlamaConfig,
    slots: int,
    steps: Steps,
    folder: Path,
    *,
    rotated: bool = False,
    sink_rows: int | None = None,
) -> bytes:
    """Traces all signatures and converts them: a `.tflite` whose weights are still inputs.

    Args:
        folder: an empty folder for the intermediate SavedModel.
        rotated: as in `weight_shapes`.
        sink_rows: float32 rows beside an int8 cache; None for a float32 cache.
    """
    shapes = weight_shapes(config, rotated=rotated)
    functions = {EMBED: _trace_embed(shapes)}
    _, *others = decoder_signatures(config, slots, steps, sink_rows)
    begins = set(map(begin_name, steps.begin))
    for step in others:
        kind = BeginStep if step.name in begins else DecoderStep if sink_rows is None else Int8Step
        functions[step.name] = _trace_step(kind(config, slots, step), step, shapes)
    tf.saved_model.save(tf.Module(), str(folder), signatures=functions)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder), signature_keys=list(functions))
    return bytes(converter.convert())


def _trace_embed(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def embed(token: Tensor, **weights: Tensor) -> dict[str, Tensor]:
        return {"embeddings": tf.gather(weights[TABLE], token)}

    specs = {TABLE: tf.TensorSpec(shapes[TABLE], tf.float32, TABLE)}
    return embed.get_concrete_function(token=tf.TensorSpec([1], tf.int32, "token"), **specs)


def _trace_step(traced: DecoderStep, signature: Signature, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    wanted = [spec.name for spec in signature.outputs]

    @tf.function(autograph=False)  # type: ignore[untyped-decorator]
    def step(**inputs: Tensor) -> dict[str, Tensor]:
        made = traced(inputs)
        return {name: made[name] for name in wanted}

    specs = {spec.name: tf.TensorSpec(spec.shape, spec.dtype, spec.name) for spec in signature.inputs}
    specs |= {name: tf.TensorSpec(shape, tf.float32, name) for name, shape in shapes.items()}
    return step.get_concrete_function(**specs)
