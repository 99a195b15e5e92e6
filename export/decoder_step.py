"""What the decoder computes in one step: LLaMA over a chunk of N tokens and a cache that it reads but does not own.

The same mathematics as `model/llama.py`, shaped for the device (`seed_story/contract.py` lists inputs and outputs):

- RMSNorm gains and the 1/sqrt(head_dim) of attention are folded into the matrix that follows them; q, k and v are one
  matrix, gate and up another: fewer operations, and activations quantized once for each.
- Rotated (`export/rotation.py`), it is the same function of the same inputs, computed with fewer outliers.
- Rows of qkv come by key/value head: its query heads, its key; all values last. So one rotation serves q and k, and
  the queries of a key/value head are one matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from export.decoder_weights import BROAD, DOWN_ROTATION, NARROWING, NORM, ROTATED_NORM, head_name, matrix
from seed_story.config import LlamaConfig, kept_limit
from seed_story.contract import (
    BLOCK_K,
    BLOCK_V,
    PLACE,
    Signature,
    key_cache,
    scales_of,
    sinks_of,
    value_cache,
)

Tensor = Any

AT_ONCE = 256
"""Queries that `begin_N` scores at once."""


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    return tf.matmul(x, weight, transpose_b=True)


def _rows(x: Tensor, begin: int, end: int) -> Tensor:
    """Some of the rows of `[a, rows, b]`."""
    a, rows, b = x.shape
    return x if end - begin == rows else tf.slice(x, [0, begin, 0], [a, end - begin, b])


def _parted(x: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """The columns of `[a, b, columns]` before `at`, and the others."""
    a, b, columns = x.shape
    return tf.slice(x, [0, 0, 0], [a, b, at]), tf.slice(x, [0, 0, at], [a, b, columns - at])


def _scores_of(queries: Tensor, keys: Tensor) -> Tensor:
    """The products of queries `[v, rows, d]` and keys `[v, m, d]`: `[v, rows, m]`."""
    if keys.shape[1] == 1:  # a matrix product would copy the one key into a layout of its own first
        return tf.reduce_sum(queries * keys, -1, keepdims=True)
    return tf.matmul(queries, keys, transpose_b=True)


def _mixture_of(weights: Tensor, values: Tensor) -> Tensor:
    """Values `[v, m, d]` by their weights `[v, rows, m]`: `[v, rows, d]`; one value as one key in `_scores_of`."""
    return weights * values if values.shape[1] == 1 else tf.matmul(weights, values)


class DecoderStep:
    """`prefill_N`, `decode` or `verify_K`, by its signature: it also gives the logits of several last tokens.

    Shapes in comments: n tokens, m columns of their own, v key/value heads, g queries for each, d head_dim.
    """

    def __init__(self, config: LlamaConfig, slots: int, signature: Signature) -> None:
        shapes = {spec.name: spec.shape for spec in (*signature.inputs, *signature.outputs)}
        self.config, self.slots, self.n = config, slots, shapes["embeddings"][0]
        self.answers = shapes["logits"][0]
        self.block = shapes[PLACE][0] if PLACE in shapes else 0
        self.m = self.block or self.n
        self.few = self.n == 1 or self.block > 0  # sums in the order of single tokens, to come to the same bits
        self.columns = shapes["mask"][1] - self.m
        self.rotations = shapes["cos"][1]
        self.v, self.g, self.d = config.num_kv_heads, config.group, config.head_dim

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The signature's outputs, of its inputs and the weights by name."""
        x = inputs["embeddings"]
        if BROAD in inputs:
            broad = _matmul(x, inputs[BROAD])
            x = tf.pad(x, [[0, 0], [0, broad.shape[1]]]) + _matmul(broad, inputs[NARROWING])
        shared = {
            "cos": tf.reshape(inputs["cos"], [self.n, 1, self.rotations, 1, self.d]),
            "sin": tf.reshape(inputs["sin"], [self.n, 1, self.rotations, 1, self.d]),
            "mask": tf.reshape(inputs["mask"], [1, self.n, self.columns + self.m]),
        }
        if "region" in inputs:
            shared["region"] = tf.reshape(inputs["region"], [1, 2, 1, self.slots])
        keys, values, weights = [], [], []
        for i in range(self.config.num_layers):
            attended, key, value, weight = self._attention(i, self._norm(x), inputs, shared)
            x = x + _matmul(attended, inputs[matrix(i, "o")])
            x = x + self._mlp(i, self._norm(x), inputs)
            keys.append(key)
            values.append(value)
            weights.append(weight)
        last = self._norm(tf.slice(x, [self.n - self.answers, 0], [self.answers, x.shape[1]]))
        last = _matmul(last, inputs[ROTATED_NORM]) if ROTATED_NORM in inputs else last * inputs[NORM]
        made = {"logits": _matmul(last, inputs[head_name(self.config)]), "k": tf.stack(keys), "v": tf.stack(values)}
        return {**made, "attention": self._mean_attention(weights)} if self.n == 1 else made

    def _mean_attention(self, weights: Sequence[Tensor]) -> Tensor:
        """One token's softmax weights of all layers, `[v, g, columns + m]`, to their mean `[1, columns + m]`."""
        heads = tf.reshape(functools.reduce(tf.add, weights), [self.v * self.g, self.columns + self.m])
        return tf.reduce_mean(heads, 0, keepdims=True) * (1 / self.config.num_layers)

    def _norm(self, x: Tensor) -> Tensor:
        """RMSNorm without its gain, of `[n, hidden]`, or of the first channels of a wider stream, by all of them.

        Of a wider stream the mean is smaller, which is made up for in what reads it (`export/rotation.py`).
        """
        n, width = x.shape
        size = self.config.hidden_size
        scale = tf.math.rsqrt(tf.reduce_mean(x * x, -1, keepdims=True) + self.config.rms_norm_eps * size / width)
        return (x if width == size else tf.slice(x, [0, 0], [n, size])) * scale

    def _mlp(self, layer: int, x: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        gate, up = tf.split(_matmul(x, inputs[matrix(layer, "gate_up")]), 2, axis=-1)
        hidden = gate * tf.sigmoid(gate) * up
        if DOWN_ROTATION in inputs:
            blocks = tf.reshape(hidden, [-1, inputs[DOWN_ROTATION].shape[0]])
            hidden = tf.reshape(_matmul(blocks, inputs[DOWN_ROTATION]), hidden.shape)
        return _matmul(hidden, inputs[matrix(layer, "down")])

    def _attention(
        self, layer: int, x: Tensor, inputs: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, v, g, d = self.n, self.v, self.g, self.d
        queries, key, value = self._project(_matmul(x, inputs[matrix(layer, "qkv")]), shared)
        keys, values = (self._in_block(*one, layer, inputs) for one in ((key, BLOCK_K), (value, BLOCK_V)))
        mixed, weights = self._attended(queries, keys, values, layer, inputs, shared)
        if n > 1:
            mixed = tf.transpose(tf.reshape(mixed, [v * g, n, d]), [1, 0, 2])
        return tf.reshape(mixed, [n, v * g * d]), key, value, weights

    def _attended(
        self,
        queries: Tensor,
        key: Tensor,
        value: Tensor,
        layer: int,
        inputs: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """What queries `[v, 2 rows, d]` get of the cache and of the chunk's own keys and values, `[v, m, d]` each.

        Returns:
            Mixed values, as many as `[v, rows, d]`, and what `_mean_attention` needs of a single token: their weights
            `[v, rows, columns + m]`.
        """
        scores = tf.concat(self._scores(queries, key, layer, inputs, shared), axis=-1)
        weights = tf.nn.softmax(self._masked(scores, shared["mask"]))
        return self._mixed(weights, value, layer, inputs), weights

    def _in_block(self, new: Tensor, name: str, layer: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Keys or values of the tokens `[v, n, d]`, in their places among those of their block `[v, m, d]`."""
        if not self.block:
            return new
        shape = [self.v, self.block, self.d]
        held = tf.reshape(tf.slice(inputs[name], [layer, 0, 0, 0], [1, *shape]), shape)
        return held + new * tf.reshape(inputs[PLACE], [1, self.block, 1])

    def _scores(
        self, queries: Tensor, key: Tensor, layer: int, inputs: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """What queries `[v, 2 rows, d]` say to the cache and to the chunk's own `key`: columns to be put side by side.

        The first k slots may be kept or the ring's: both rotations score them, and the unwanted half is multiplied
        away. Few tokens do so with all slots: of few scores that costs less than cutting the cache.
        """
        v, rows, slots, cache = self.v, queries.shape[1] // 2, self.slots, inputs[key_cache(layer)]
        k = slots if self.few else kept_limit(slots)
        both = tf.matmul(queries, _rows(cache, 0, k), transpose_b=True)
        both = tf.reshape(both, [v, 2, rows, k]) * tf.slice(shared["region"], [0, 0, 0, 0], [1, 2, 1, k])
        others = key if self.few else tf.concat([_rows(cache, k, slots), key], axis=1)
        return [tf.reduce_sum(both, 1), _scores_of(_rows(queries, 0, rows), others)]

    def _mixed(self, weights: Tensor, value: Tensor, layer: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Values by their weights `[v, rows, columns + m]`: `[v, rows, d]`; `value` `[v, m, d]` is the chunk's own."""
        cache = inputs[value_cache(layer)]
        if self.few:
            old, new = _parted(weights, self.slots)
            return tf.matmul(old, cache) + _mixture_of(new, value)
        return tf.matmul(weights, tf.concat([cache, value], axis=1))

    def _project(self, qkv: Tensor, shared: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Splits and rotates `[n, (v (g + 1) + v) d]`.

        Returns:
            Queries `[v, 2 rows, d]` (rows = g n, by position, then by place inside the cache; `begin_N` has the first
            half alone), and key and value, `[v, n, d]`.
        """
        n, v, g, d, turns = self.n, self.v, self.g, self.d, self.rotations
        qk = tf.reshape(tf.slice(qkv, [0, 0], [n, v * (g + 1) * d]), [n, v, 1, g + 1, d])
        value = tf.slice(qkv, [0, v * (g + 1) * d], [n, v * d])
        left, right = tf.split(qk, 2, axis=-1)
        turned = qk * shared["cos"] + tf.concat([right, left], axis=-1) * shared["sin"]  # [n, v, turns, g + 1, d]
        key = tf.slice(turned, [0, 0, 0, g, 0], [n, v, 1, 1, d])
        queries = tf.slice(turned, [0, 0, 0, 0, 0], [n, v, turns, g, d])
        if n > 1:  # else there is nothing to move: the axes of length one only change their places
            queries = tf.transpose(queries, [1, 2, 3, 0, 4])
            key, value = (tf.transpose(tf.reshape(t, [n, v, d]), [1, 0, 2]) for t in (key, value))
        return tf.reshape(queries, [v, turns * g * n, d]), tf.reshape(key, [v, n, d]), tf.reshape(value, [v, n, d])

    def _masked(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Scores `[v, g rows, columns]` and the mask of these rows, `[1, rows, columns]`, which all heads share."""
        if self.n == 1:
            return scores + mask
        return tf.reshape(tf.reshape(scores, [self.v * self.g, *mask.shape[1:]]) + mask, scores.shape)


class BeginStep(DecoderStep):
    """`begin_N`: there is no cache, so the chunk's own keys and values are all.

    A part of the queries at a time, for a part has no use for the keys behind it: of 512 tokens' products in parts of
    256, a quarter is left out.
    """

    def _attended(
        self,
        queries: Tensor,
        key: Tensor,
        value: Tensor,
        layer: int,
        inputs: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        n, v, g, d = self.n, self.v, self.g, self.d
        by_head, mixed = tf.reshape(queries, [v * g, n, d]), []
        for begin in range(0, n, AT_ONCE):
            end = min(begin + AT_ONCE, n)
            part, mask = _rows(by_head, begin, end), _rows(shared["mask"], begin, end)
            mask = mask if end == n else _parted(mask, end)[0]
            scores = _scores_of(tf.reshape(part, [v, g * (end - begin), d]), _rows(key, 0, end))
            weights = tf.nn.softmax(self._masked(scores, mask))
            mixed.append(tf.reshape(_mixture_of(weights, _rows(value, 0, end)), [v * g, end - begin, d]))
        return tf.concat(mixed, axis=1), None


class Int8Step(DecoderStep):
    """A step that reads int8 keys and values of all slots, and float32 rows of the kept ones beside them.

    So each row of the cache is scored by one rotation only. A single token scales scores and weights, of which there
    are few, and so does `verify_K`, to come to the same bits; a prefill scales the cache's rows.
    """

    def _scores(
        self, queries: Tensor, key: Tensor, layer: int, inputs: Mapping[str, Tensor], shared: Mapping[str, Tensor]
    ) -> list[Tensor]:
        cache, rows = key_cache(layer), queries.shape[1] // 2
        by_position, in_cache = _rows(queries, 0, rows), _rows(queries, rows, 2 * rows)
        # Not `[None]`, which is a STRIDED_SLICE: a copy.
        coded = tf.matmul(tf.expand_dims(by_position, 0), self._float_rows(cache, inputs), transpose_b=True)
        coded = tf.reshape(coded, [self.v, rows, self.slots])
        exact = tf.matmul(in_cache, inputs[sinks_of(cache)], transpose_b=True)
        return [self._scaled(coded, cache, inputs), exact, _scores_of(by_position, key)]

    def _mixed(self, weights: Tensor, value: Tensor, layer: int, inputs: Mapping[str, Tensor]) -> Tensor:
        cache = value_cache(layer)
        coded, exact = _parted(weights, self.slots)
        mixed = tf.matmul(tf.expand_dims(self._scaled(coded, cache, inputs), 0), self._float_rows(cache, inputs))
        mixed = tf.reshape(mixed, [self.v, weights.shape[1], self.d])
        return mixed + tf.matmul(exact, tf.concat([inputs[sinks_of(cache)], value], axis=1))

    def _float_rows(self, cache: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """float32 `[1, v, slots, d]`; `export/flatbuffer.py` makes the cast a DEQUANTIZE."""
        # Four axes, since XNNPACK keeps a copy of what a product reads straight from a DEQUANTIZE: 95 MB a signature.
        codes = tf.reshape(tf.cast(inputs[cache], tf.float32), [1, self.v, self.slots, self.d])
        return codes if self.few else codes * tf.reshape(inputs[scales_of(cache)], [1, self.v, self.slots, 1])

    def _scaled(self, x: Tensor, cache: str, inputs: Mapping[str, Tensor]) -> Tensor:
        """Scores or weights `[v, rows, slots]` of codes as those of the rows, unless the rows are scaled already."""
        return x * inputs[scales_of(cache)] if self.few else x
