"""The Keras decoder with `cache=`: the reference of every export, against StreamingLLM told plainly."""

from __future__ import annotations

import numpy as np
import pytest
from keras import ops

from model.llama import Llama
from model.weights import load_weights
from seed_story.config import CacheConfig
from tests.compare import assert_close
from tests.export.tiny_decoders import VARIANTS, loud_llama
from tests.reference.streaming_llama import StreamingLlama

CACHES = [
    CacheConfig(12, 2),
    CacheConfig(12, 0),
    CacheConfig(12, 2, 3, 1, 2),
    CacheConfig(12, 11),
    CacheConfig(5, 4),
    CacheConfig(20, 4),
]


def keras_llama(name: str) -> tuple[Llama, dict[str, np.ndarray]]:
    config, _ = VARIANTS[name]
    weights = loud_llama(config, seed=3)
    network = Llama(config, seed=None)
    load_weights(network, weights)
    return network, weights


def embeddings(network: Llama, count: int) -> np.ndarray:
    rng = np.random.default_rng(4)
    return rng.normal(0, 0.5, (1, count, network.config.hidden_size)).astype(np.float32)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("cache", CACHES, ids=lambda c: f"{c.slots}-{c.sinks}-{c.anchors}")
def test_past_three_times_its_capacity(name: str, cache: CacheConfig) -> None:
    network, weights = keras_llama(name)
    x = embeddings(network, 3 * cache.slots + 5)
    expected = StreamingLlama(network.config, weights, cache.sinks, cache.ring).feed(x[0])
    assert_close(network(x, cache=cache)[0], expected, "decoder_graph")
    assert_close(network.head(network.hidden(x, cache=cache))[0], expected, "decoder_graph")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("sinks", [0, 4])
def test_is_the_plain_model_while_nothing_was_evicted(name: str, sinks: int) -> None:
    network, _ = keras_llama(name)
    x = embeddings(network, 30)
    cache = CacheConfig(30, sinks)
    plain = ops.convert_to_numpy(network(x))
    assert_close(network(x, cache=cache), plain, "decoder_graph")
    one_more = embeddings(network, 31)
    bounded, free = (ops.convert_to_numpy(network(one_more, cache=c))[0] for c in (cache, None))
    assert_close(bounded[:30], free[:30], "decoder_graph")
    assert np.abs(bounded[30] - free[30]).max() > 1e-3  # the token that lost sight of another


def test_rows_of_a_batch_are_told_apart() -> None:
    network, _ = keras_llama("gqa")
    x = np.concatenate([embeddings(network, 40), embeddings(network, 40)[:, ::-1]])
    both = ops.convert_to_numpy(network(x, cache=CacheConfig(12, 2)))
    for row in range(2):
        assert_close(both[row], network(x[row : row + 1], cache=CacheConfig(12, 2))[0], "same_maths")
