"""AdamW as a schedule asks for it, with a learning-rate factor for each variable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from model.layers import Tensor
from training.task import Schedule

BETAS = (0.9, 0.98)
EPSILON = 1e-6  # both as upstream, `scripts/sft_storystream.sh`


class AdamW(keras.optimizers.AdamW):  # type: ignore[misc]
    """AdamW (arXiv 1711.05101) with a learning-rate factor a variable; it notes the norm of the last gradients.

    Args:
        variables: all that are learned; those with fewer than two axes (biases, norms, scales) don't decay.
        factor: by how much a variable's learning rate is multiplied.

    Keras adds epsilon before the bias correction ("epsilon hat", arXiv 1412.6980 section 2), torch after it.
    """

    def __init__(
        self, schedule: Schedule, variables: Sequence[keras.Variable], factor: Callable[[keras.Variable], float]
    ) -> None:
        super().__init__(
            learning_rate=learning_rates(schedule),
            weight_decay=schedule.weight_decay,
            beta_1=BETAS[0],
            beta_2=BETAS[1],
            epsilon=EPSILON,
            global_clipnorm=schedule.clip_norm,
            gradient_accumulation_steps=schedule.accumulate if schedule.accumulate > 1 else None,
        )
        self._factors = [float(factor(variable)) for variable in variables]
        self.exclude_from_weight_decay(var_list=[v for v in variables if len(v.shape) < 2])
        self.gradient_norm = self.add_variable((), name="gradient_norm")
        self.build(list(variables))

    def apply(self, grads: Sequence[Tensor], trainable_variables: Any = None) -> None:  # noqa: D102
        dense = [None if g is None else _dense(g) for g in grads]
        squares = [ops.sum(ops.square(ops.cast(g, "float32"))) for g in dense if g is not None]
        self.gradient_norm.assign(ops.sqrt(ops.sum(ops.stack(squares))))
        super().apply(dense, trainable_variables)

    def update_step(self, gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:  # noqa: D102
        rate = ops.cast(learning_rate, variable.dtype) * self._factors[self._get_variable_index(variable)]
        if self._use_weight_decay(variable):
            self.assign(variable, variable * (1 - rate * self.weight_decay))
        super().update_step(gradient, variable, rate)

    def _apply_weight_decay(self, variables: object) -> None:
        """Nothing: `update_step` does it, with the variable's own learning rate."""


def learning_rates(schedule: Schedule) -> keras.optimizers.schedules.LearningRateSchedule:
    """Linear warm-up and cosine decay as Keras has them; the values of `Schedule.learning_rate_at`."""
    warmup = schedule.warmup_steps
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=schedule.learning_rate / (warmup + 1),  # so that the first step isn't in vain
        warmup_target=schedule.learning_rate if warmup else None,
        warmup_steps=warmup,
        decay_steps=max(schedule.steps - warmup, 1),
        alpha=schedule.final_share,
    )


def _dense(gradient: Tensor) -> Tensor:
    """TensorFlow's gradient of a table is a list of rows, some of them twice: their norm isn't the gradient's."""
    if keras.config.backend() != "tensorflow":
        return gradient
    import tensorflow as tf

    return tf.convert_to_tensor(gradient)
