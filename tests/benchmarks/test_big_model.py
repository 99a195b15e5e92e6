"""The checkpoint that big exports are measured with loads like any other, and its tokenizer writes any text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.big_model import TINYLLAMA, cut, write_checkpoint
from export.decoder_weights import weight_shapes
from model.layers import named_variables, numpy_of
from model.story_source import load_source
from model.tokenizer_files import byte_tokenizer
from seed_story.config import LlamaConfig

CONFIG = replace(LlamaConfig.tiny(), num_layers=3, tie_word_embeddings=False)


def test_it_has_the_size_of_its_name() -> None:
    gains = 2 * TINYLLAMA.num_layers * TINYLLAMA.hidden_size  # folded away in the graph
    matrices = sum(int(np.prod(shape)) for shape in weight_shapes(TINYLLAMA).values())
    assert matrices + gains == 1_100_048_384, "what TinyLlama-1.1B is published with"


def test_a_cut_tokenizer_writes_any_text() -> None:
    state = json.loads(byte_tokenizer().to_str())
    for pair in (["o", "n"], ["on", "ce"], ["c", "e"]):
        state["model"]["vocab"]["".join(pair)] = max(259, *state["model"]["vocab"].values()) + 1
    state["model"]["merges"] = [["o", "n"], ["c", "e"], ["on", "ce"]]
    whole, less = (Tokenizer.from_str(json.dumps(one)) for one in (state, cut(state, 261)))
    assert len(whole.encode("once").ids) == 1
    assert less.encode("once").tokens == ["on", "c", "e"]
    assert max(less.get_vocab().values()) < 261
    assert less.decode(less.encode("once upon a time").ids) == "once upon a time"


def test_the_checkpoint_loads(tmp_path: Path) -> None:
    tokenizer = json.loads(byte_tokenizer().to_str())
    for folder in ("a", "b"):
        write_checkpoint(tmp_path / folder, CONFIG, tokenizer)
    source, again = (load_source("tiny", llama=str(tmp_path / folder)).model.llama for folder in ("a", "b"))
    assert source.config == CONFIG
    weights = {name: numpy_of(variable) for name, variable in named_variables(source).items()}
    for name, variable in named_variables(again).items():
        np.testing.assert_array_equal(numpy_of(variable), weights[name])
    table, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    np.testing.assert_allclose(table[:-1], head[1:] * 3.5, rtol=1e-2)
    assert [path.name[:11] for path in sorted((tmp_path / "a").glob("*.safetensors"))] == [
        f"model-0000{shard}" for shard in range(1, 5)
    ]
