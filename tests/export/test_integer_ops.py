"""The float graph before it is calibrated: the same function, in operators that have integer kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from export.integer_ops import with_integer_ops
from seed_story.errors import ExportError

UNWANTED = {"NEG", "SQUARE", "SQUARED_DIFFERENCE", "REDUCE_MAX", "L2_NORMALIZATION"}
NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
SHAPE = (1, 5, 8)
X = np.random.default_rng(3).normal(size=SHAPE).astype(np.float32)
WEIGHT = np.random.default_rng(4).normal(size=(8, 6)).astype(np.float32) * np.array([1, 1, 0, 1, 0, 1], np.float32)
BIAS = np.arange(6, dtype=np.float32) - 20

FUNCTIONS = {
    "NEG": (lambda x: -x, lambda x: -x),
    "SQUARE": (tf.square, np.square),
    "SQUARED_DIFFERENCE": (
        lambda x: tf.math.squared_difference(x, tf.reduce_mean(x, -1, keepdims=True)),
        lambda x: (x - x.mean(-1, keepdims=True)) ** 2,
    ),
    "REDUCE_MAX": (lambda x: tf.reduce_max(x, 1, keepdims=True), lambda x: x.max(1, keepdims=True)),
    "L2_NORMALIZATION": (
        lambda x: x * tf.math.rsqrt(tf.reduce_sum(tf.square(x), -1, keepdims=True)),
        lambda x: x / np.sqrt((x**2).sum(-1, keepdims=True)),
    ),
    "FULLY_CONNECTED": (lambda x: tf.matmul(x, WEIGHT) + BIAS, lambda x: x @ WEIGHT.astype(np.float64) + BIAS),
}


def converted(function: object) -> bytes:
    concrete = tf.function(function, input_signature=[tf.TensorSpec(SHAPE, tf.float32)], autograph=False)
    return bytes(tf.lite.TFLiteConverter.from_concrete_functions([concrete.get_concrete_function()]).convert())


def operators(graph: bytes) -> list[str]:
    model = schema.ModelT.InitFromPackedBuf(bytearray(graph), 0)
    codes = [NAMES[max(c.builtinCode, c.deprecatedBuiltinCode)] for c in model.operatorCodes]
    return [codes[op.opcodeIndex] for op in model.subgraphs[0].operators]


def run(graph: bytes) -> np.ndarray:
    interpreter = Interpreter(model_content=graph)
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], X)
    interpreter.invoke()
    return np.asarray(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_same_function_in_other_operators(name: str) -> None:
    function, reference = FUNCTIONS[name]
    graph = converted(function)
    assert name in operators(graph)  # or there is nothing to rewrite
    rewritten = with_integer_ops(graph)
    assert not UNWANTED & set(operators(rewritten))
    np.testing.assert_allclose(run(rewritten), reference(X.astype(np.float64)), rtol=1e-5, atol=1e-5)


def test_a_bias_is_set_apart_only_beside_a_row_of_zeros() -> None:
    apart = operators(with_integer_ops(converted(FUNCTIONS["FULLY_CONNECTED"][0])))
    assert apart.count("ADD") == 1
    full = converted(lambda x: tf.matmul(x, WEIGHT + 1) + BIAS)
    assert "ADD" not in operators(with_integer_ops(full))


def test_refuses_a_maximum_that_no_pool_takes() -> None:
    with pytest.raises(ExportError, match="maximum"):
        with_integer_ops(converted(lambda x: tf.reduce_max(x, -1)))


def test_a_difference_that_is_there_is_used_again(tiny_bundle: Path) -> None:
    graph = (tiny_bundle / "vit.tflite").read_bytes()
    before, after = operators(graph), operators(with_integer_ops(graph))
    assert before.count("SQUARED_DIFFERENCE") > 0
    assert after.count("SUB") == before.count("SUB")
