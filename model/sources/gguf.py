"""A LLaMA decoder out of a llama.cpp GGUF file, quantized or not, in the tensor names of `transformers`.

The format: ggml's `docs/gguf.md`. llama.cpp stores the rows of the query and key projections in the order
that its interleaved rotary embedding wants (pairs side by side); `transformers` and this project rotate
halves, so the rows are put back: per head, `[head_dim / 2, 2]` becomes `[2, head_dim / 2]`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from model.sources.lazy import LazyTensors
from seed_story.config import LlamaConfig, RopeScaling, rope_frequencies
from seed_story.errors import ConfigError, WeightsError

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's stretched frequencies, as one divisor for each


class GgufTensors(LazyTensors[gguf.ReaderTensor, npt.NDArray[np.float32]]):
    """The tensors of a file, by their `transformers` names; each access dequantizes one, as float32.

    Shapes are those of `transformers`: `[out, in]` for a projection, `[vocab, hidden]` for the embeddings.
    The bytes stay in the file, memory-mapped.
    """

    def __init__(self, tensors: Mapping[str, gguf.ReaderTensor], config: LlamaConfig) -> None:
        super().__init__(dict(tensors))
        self._config = config

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor as float32; raises WeightsError if its quantization isn't supported."""
        tensor = self._stored[name]
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise WeightsError(
                f"{name} has a quantization that can't be undone", got=tensor.tensor_type.name,
                hint="Convert the file to Q8_0 or F16 with llama-quantize.",
            ) from error  # fmt: skip
        array = np.asarray(values, np.float32).reshape(self.shape(name))
        if name.endswith("q_proj.weight"):
            return _unpermute(array, self._config.num_heads)
        if name.endswith("k_proj.weight"):
            return _unpermute(array, self._config.num_kv_heads)
        return array

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without dequantizing it."""
        return tuple(int(n) for n in reversed(self._stored[name].shape))


def read_gguf(path: str | Path) -> tuple[LlamaConfig, GgufTensors, dict[str, Any]]:
    """Reads a GGUF file of architecture `llama`.

    Returns:
        The sizes; the tensors, float32 and lazy; and the file's metadata as plain Python values,
        `tokenizer.*` and `general.*` included. Without an `output.weight` the head is tied to the embeddings.

    Raises:
        WeightsError: not a GGUF file, truncated, or with missing, unknown or mis-shaped tensors.
        ConfigError: another architecture, or a setting that changes the arithmetic in a way that isn't
        supported.
    """
    reader = open_gguf(path)
    metadata = plain_metadata(reader)
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    factors = by_name.pop(_ROPE_FACTORS, None)
    _require_tensor(by_name, "token_embd.weight", path)
    config = _config(metadata, by_name, factors)
    named = {_hf_name(name, path): tensor for name, tensor in by_name.items()}
    tensors = GgufTensors(named, config)
    _check_shapes(tensors, config, path)
    return config, tensors, metadata


def open_gguf(path: str | Path) -> gguf.GGUFReader:
    """The file's table of contents, memory-mapped; raises WeightsError if it isn't a whole GGUF file."""
    hint = "Download it again, and compare its sha256 with the publisher's."
    try:
        reader = gguf.GGUFReader(path)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no file {path}") from error
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:
        raise WeightsError(f"{path} isn't a whole GGUF file", got=error, hint=hint) from error
    if reader.byte_order != "I":
        raise WeightsError(f"{path} has the other byte order", hint="Convert it with gguf-convert-endian.")
    return reader


def plain_metadata(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Every key and value of the file as plain Python values; raises WeightsError if a text isn't UTF-8."""
    try:
        return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    except (UnicodeDecodeError, IndexError) as error:
        raise WeightsError("the file's metadata is damaged", got=error) from error


def _unpermute(array: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    rows, columns = array.shape
    return array.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _config(
    metadata: Mapping[str, Any], tensors: Mapping[str, gguf.ReaderTensor], factors: gguf.ReaderTensor | None
) -> LlamaConfig:
    """Consumes every key under `llama.`; llama.cpp takes no arithmetic from keys under other names."""
    _check_general(metadata)
    left = {key.removeprefix("llama."): value for key, value in metadata.items() if key.startswith("llama.")}
    hidden, heads = _take(left, "embedding_length"), _take(left, "attention.head_count")
    head_dim = left.pop("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        _must_be(left, key, head_dim)
    _must_be(left, "tensor_data_layout", "Meta AI original pth")  # the one layout there is
    for key in ("expert_count", "expert_used_count"):
        _must_be(left, key, 0)
    vocab, width = (int(n) for n in reversed(tensors["token_embd.weight"].shape))
    _must_be(left, "vocab_size", vocab)
    if width != hidden:
        raise WeightsError("token_embd.weight has another width", got=width, expected=hidden)
    max_position = _take(left, "context_length")
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=_take(left, "feed_forward_length"),
        num_layers=_take(left, "block_count"),
        num_heads=heads,
        num_kv_heads=left.pop("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=_shortest(left.pop("rope.freq_base", 10_000.0)),
        rope_scaling=_linear_scaling(left),
        rms_norm_eps=_shortest(_take(left, "attention.layer_norm_rms_epsilon")),
        tie_word_embeddings="output.weight" not in tensors,
        max_position=max_position,
    )
    if left:
        raise ConfigError(
            "the GGUF file has settings that this project doesn't know", got=dict(list(left.items())[:10]),
            hint="Each may change the arithmetic: support them in model/sources/gguf.py.",
        )  # fmt: skip
    return config if factors is None else _with_factors(config, factors)


def _check_general(metadata: Mapping[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError("the GGUF file's architecture isn't supported", got=architecture, expected="llama")
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ConfigError("the GGUF file isn't a whole model", got=kind, expected="model")
    if metadata.get("split.count", 1) > 1:
        raise ConfigError(
            "the GGUF file is one piece of several", got=f"{metadata['split.count']} pieces",
            hint="Join them with llama-gguf-split --merge.",
        )  # fmt: skip


def _take(left: dict[str, Any], key: str) -> Any:
    if key not in left:
        raise ConfigError(f"the GGUF file lacks llama.{key}", got=sorted(left)[:10])
    value = left.pop(key)
    if isinstance(value, list):
        raise ConfigError(f"llama.{key} differs from layer to layer", got=value[:10], expected="one number")
    return value


def _must_be(left: dict[str, Any], key: str, expected: object) -> None:
    value = left.pop(key, expected)
    if value != expected:
        raise ConfigError(f"llama.{key} isn't supported", got=value, expected=expected)


def _shortest(value: float) -> float:
    """The decimal that was stored as float32: 1e-05 rather than 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _linear_scaling(left: dict[str, Any]) -> RopeScaling | None:
    """Consumes `rope.scaling.*`. As in llama.cpp, a factor without a type is linear, and 0 means none."""
    kind = left.pop("rope.scaling.type", "linear")
    factor = left.pop("rope.scaling.factor", None) or left.pop("rope.scale_linear", None) or 1.0
    left.pop("rope.scale_linear", None)
    if kind not in ("none", "linear"):
        raise ConfigError("rope scaling isn't supported", got=kind, expected="none or linear")
    for key in ("rope.scaling.original_context_length", "rope.scaling.finetuned"):
        left.pop(key, None)  # only YaRN uses them
    return None if kind == "none" or factor == 1 else RopeScaling("linear", float(factor))


def _with_factors(config: LlamaConfig, tensor: gguf.ReaderTensor) -> LlamaConfig:
    """Finds the Llama 3.1 rule behind the divisors: the released models share all but the factor."""
    divisors = np.asarray(tensor.data, np.float64).reshape(-1)
    plain = np.array(rope_frequencies(config))
    values = {**config.to_dict(), "rope_scaling": RopeScaling("llama3", float(divisors.max())).to_dict()}
    found = LlamaConfig.from_dict(values)
    same = config.rope_scaling is None and divisors.shape == plain.shape
    if not (same and np.allclose(plain / divisors, rope_frequencies(found), rtol=1e-5, atol=0)):
        raise ConfigError(
            f"{_ROPE_FACTORS} doesn't follow Llama 3.1's rule", got=divisors[:8].tolist(),
            expected="low_freq_factor 1, high_freq_factor 4, 8192 original positions",
        )  # fmt: skip
    return found


def _hf_name(name: str, path: str | Path) -> str:
    if name in _TOP:
        return _TOP[name]
    block = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if block and block[2] in _BLOCK:
        return f"model.layers.{block[1]}.{_BLOCK[block[2]]}"
    raise WeightsError(
        f"{path} has a tensor that a plain LLaMA hasn't",
        got=name,
        hint="Biases and experts aren't supported.",
    )


def _require_tensor(tensors: Mapping[str, object], name: str, path: str | Path) -> None:
    if name not in tensors:
        raise WeightsError(f"{path} lacks a tensor", got=sorted(tensors)[:5], expected=name)


def _check_shapes(tensors: GgufTensors, config: LlamaConfig, path: str | Path) -> None:
    expected = llama_shapes(config)
    for name, shape in expected.items():
        _require_tensor(tensors, name, path)
        if tensors.shape(name) != shape:
            raise WeightsError(f"{path}: {name} has another shape", got=tensors.shape(name), expected=shape)
    if unused := sorted(set(tensors) - set(expected)):
        raise WeightsError(f"{path} has tensors of more layers than it declares", got=unused[:5])


def llama_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a `transformers.LlamaForCausalLM` checkpoint of these sizes."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_layers):
        block = f"model.layers.{layer}."
        shapes |= {
            block + "input_layernorm.weight": (hidden,),
            block + "self_attn.q_proj.weight": (queries, hidden),
            block + "self_attn.k_proj.weight": (keys, hidden),
            block + "self_attn.v_proj.weight": (keys, hidden),
            block + "self_attn.o_proj.weight": (hidden, queries),
            block + "post_attention_layernorm.weight": (hidden,),
            block + "mlp.gate_proj.weight": (inner, hidden),
            block + "mlp.up_proj.weight": (inner, hidden),
            block + "mlp.down_proj.weight": (hidden, inner),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes
