"""A checkpoint of TinyLlama-1.1B's shape, with random weights: what an export costs doesn't depend on them.

    python -m benchmarks.big_model build/tinyllama-shaped
    python -m export --llama build/tinyllama-shaped --out build/big

A shard a layer, in bfloat16, as such checkpoints come. The tokenizer is a bundle's, cut to the first 32,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from seed_story.bundle import TOKENIZER, Bundle
from seed_story.config import LlamaConfig
from seed_story.errors import SeedStoryError

TINYLLAMA = LlamaConfig(vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_layers=22, num_heads=32,
                        num_kv_heads=4, head_dim=64, rope_theta=10_000.0, rms_norm_eps=1e-5,
                        tie_word_embeddings=False, max_position=2048)  # fmt: skip
_DEVIATION = 0.02  # transformers' `initializer_range`
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LOUD = 3.5
"""By how much the table is louder, so that each token tells which comes next about as surely as in a trained model."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and writes the folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.big_model", description="Writes a big checkpoint.")
    parser.add_argument("out", type=Path, help="the folder to write, 2.2 GB")
    parser.add_argument("--bundle", type=Path, help="the bundle whose tokenizer it gets (default: the default one)")
    args = parser.parse_args(argv)
    try:
        bundle = Bundle.open(args.bundle)
        tokenizer = json.loads(bundle.file(TOKENIZER).read_text(encoding="utf-8"))
        write_checkpoint(args.out, TINYLLAMA, cut(tokenizer, TINYLLAMA.vocab_size))
    except SeedStoryError as error:
        print(f"big_model: error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"Wrote {args.out}")
    return 0


def cut(tokenizer: dict[str, Any], size: int) -> dict[str, Any]:
    """A byte-level BPE `tokenizer.json` with its first `size` tokens: it learned the most frequent ones first."""
    model = tokenizer["model"]
    vocabulary = {token: number for token, number in model["vocab"].items() if number < size}
    merges = [pair for pair in model["merges"] if "".join(pair) in vocabulary]
    return {**tokenizer, "model": {**model, "vocab": vocabulary, "merges": merges}}


def write_checkpoint(folder: Path, config: LlamaConfig, tokenizer: dict[str, Any], seed: int = 0) -> None:
    """Writes a folder in the Hugging Face layout; the same for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    random, places = np.random.default_rng(seed), dict[str, str]()
    for layer in range(-1, config.num_layers):  # the first shard has what isn't of a layer
        file = f"model-{layer + 2:05}-of-{config.num_layers + 1:05}.safetensors"
        tensors = {name: _draw(random, name, shape, config) for name, shape in _shapes(config, layer).items()}
        if layer < 0:  # the head finds a token's successor in the stream; one at random would compare noise
            tensors[_HEAD] = np.roll(tensors[_TABLE], 1, axis=0)
            tensors[_TABLE] = (tensors[_TABLE] * np.float32(_LOUD)).astype(ml_dtypes.bfloat16)
        save_file(tensors, folder / file)
        places |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}, indent=1))
    (folder / "config.json").write_text(json.dumps(_hf_config(config), indent=2))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def _draw(
    random: np.random.Generator, name: str, shape: tuple[int, ...], config: LlamaConfig
) -> npt.NDArray[ml_dtypes.bfloat16]:
    """Gains are near one; what writes to the residual stream shrinks with the depth, as in GPT-2."""
    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
    scale = _DEVIATION / (2 * config.num_layers) ** 0.5 if writes else _DEVIATION
    values = random.standard_normal(shape, np.float32) * np.float32(scale)
    return (values + (len(shape) == 1)).astype(ml_dtypes.bfloat16)


def _shapes(config: LlamaConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """A layer's tensors in the names of `LlamaForCausalLM`; of layer -1, those around the layers."""
    d, f = config.hidden_size, config.intermediate_size
    if layer < 0:
        table = (config.vocab_size, d)
        return {_TABLE: table, "model.norm.weight": (d,), _HEAD: table}
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "self_attn.q_proj": (queries, d), "self_attn.k_proj": (keys, d), "self_attn.v_proj": (keys, d),
        "self_attn.o_proj": (d, queries), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
        "input_layernorm": (d,), "post_attention_layernorm": (d,),
    }  # fmt: skip
    return {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}


def _hf_config(config: LlamaConfig) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_act": "silu", "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim, "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps, "max_position_embeddings": config.max_position,
        "tie_word_embeddings": config.tie_word_embeddings, "torch_dtype": "bfloat16",
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
