"""A product of which the rounding of activations is averaged away: deterministic dither.

The engine rounds each row that a matrix of integers reads to 255 steps of its range. Rows that are shifted by parts of
such a step are rounded each in another way, and their products' mean has a rounding as of steps `rows` times as fine:
the shifts' own sum is zero. The matrix is read once for all rows, so where memory is the limit, as in decoding, this
costs little more than the operators that shift and average.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

Tensor = Any

_CREST = 2.85
"""Half a row's range beside its root mean square: in `seed-story-135m`, what qkv and gate_up read has 2.7 to 3.1."""
_STEPS = 255


def dithered(x: Tensor, weight: Tensor, rows: int) -> Tensor:
    """`x weight^T`, float32 `[n, outputs]`.

    Args:
        x: `[n, inputs]`, each row with a mean square of one and none of its values much above the others.
        weight: `[outputs, inputs]`.
        rows: that each row is rounded as; 1 for the plain product.
    """
    if rows == 1:
        return tf.matmul(x, weight, transpose_b=True)
    (n, inputs), outputs = x.shape, weight.shape[0]
    shifts = ((np.arange(rows) + 0.5) / rows - 0.5) * (2 * _CREST / _STEPS)
    shifted = tf.reshape(x, [n, 1, inputs]) + shifts.astype(np.float32)[:, None]
    product = tf.matmul(tf.reshape(shifted, [n * rows, inputs]), weight, transpose_b=True)
    return tf.reduce_mean(tf.reshape(product, [n, rows, outputs]), axis=1)
