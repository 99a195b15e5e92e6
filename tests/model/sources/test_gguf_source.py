"""GGUF files: small ones written here, and the real one against transformers' own reading of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from model.presets import SEED_STORY_135M
from model.sources.gguf import GgufTensors, llama_shapes, read_gguf
from model.sources.random import random_llama
from seed_story.config import LlamaConfig, RopeScaling, rope_frequencies
from seed_story.errors import ConfigError, WeightsError

CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, rope_theta=10_000.0, max_position=128,
)  # fmt: skip
F32 = gguf.GGMLQuantizationType.F32
BLOCK = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def gguf_name(name: str) -> str:
    if not name.startswith(("model.", "lm_head")):
        return name
    stem = name.removesuffix(".weight")
    if stem in BLOCK:
        return BLOCK[stem] + ".weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{BLOCK[rest]}.weight"


def permuted(array: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """As llama.cpp's convert_hf_to_gguf.py: what the reader must undo."""
    rows, columns = array.shape
    return array.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(
    path: Path,
    tensors: dict[str, np.ndarray[Any, Any]],
    *,
    config: LlamaConfig = CONFIG,
    quantization: gguf.GGMLQuantizationType = F32,
    architecture: str = "llama",
    more: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    more(writer)
    for name, array in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = permuted(array, config.num_heads if "q_proj" in name else config.num_kv_heads)
        kind = quantization if array.ndim == 2 else F32
        packed = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tensors() -> dict[str, np.ndarray[Any, Any]]:
    return dict(random_llama(CONFIG))


def test_float32_comes_back_exactly(tmp_path: Path, tensors: dict[str, Any]) -> None:
    config, read, metadata = read_gguf(write(tmp_path / "a.gguf", tensors))
    assert config == CONFIG
    assert set(read) == set(tensors) == set(llama_shapes(CONFIG))
    for name, array in tensors.items():
        assert read[name].dtype == np.float32
        assert read.shape(name) == array.shape
        np.testing.assert_array_equal(read[name], array, err_msg=name)
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 2


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_comes_back_near(tmp_path: Path, tensors: dict[str, Any], kind: str) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    _, read, _ = read_gguf(write(tmp_path / "a.gguf", tensors, quantization=quantization))
    bits = {"F16": 11, "BF16": 8, "Q8_0": 7}.get(kind) or int(kind[1]) - 1
    for name, array in tensors.items():
        # half a step of a signed grid as wide as the largest value, doubled for the rounding of the scale
        bound = 2 * float(np.abs(array).max()) / 2**bits
        np.testing.assert_allclose(read[name], array, atol=bound, rtol=0, err_msg=name)


def test_transformers_reads_the_same(tmp_path: Path, tensors: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    path = write(tmp_path / "a.gguf", tensors, quantization=gguf.GGMLQuantizationType.Q8_0)
    _, read, _ = read_gguf(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    theirs = {name: value.float().numpy() for name, value in model.state_dict().items()}
    for name in read:
        np.testing.assert_array_equal(read[name], theirs[name], err_msg=name)


def test_tensors_are_made_one_at_a_time(
    tmp_path: Path, tensors: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = gguf.quants.dequantize
    monkeypatch.setattr(gguf.quants, "dequantize", lambda data, kind: (made.append(kind), real(data, kind))[1])
    _, read, _ = read_gguf(write(tmp_path / "a.gguf", tensors))
    assert isinstance(read, GgufTensors)
    assert "model.norm.weight" in read
    assert made == []
    _ = read["model.norm.weight"]
    assert len(made) == 1


def test_an_untied_head(tmp_path: Path) -> None:
    config = LlamaConfig.from_dict({**CONFIG.to_dict(), "tie_word_embeddings": False})
    got, read, _ = read_gguf(write(tmp_path / "a.gguf", dict(random_llama(config)), config=config))
    assert got == config
    assert read.shape("lm_head.weight") == (40, 64)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_1_frequencies(tmp_path: Path, tensors: dict[str, Any], factor: float) -> None:
    scaling = RopeScaling("llama3", factor)
    config = LlamaConfig.from_dict({**CONFIG.to_dict(), "rope_scaling": scaling.to_dict(), "rope_theta": 5e5})
    plain = [5e5 ** (-i / 8) for i in range(8)]
    divisors = np.array(plain) / np.array(rope_frequencies(config))
    assert 1 < divisors.max() == pytest.approx(factor)
    tensors["rope_freqs.weight"] = divisors.astype(np.float32)
    got, read, _ = read_gguf(write(tmp_path / "a.gguf", tensors, config=config))
    assert got.rope_scaling is not None
    np.testing.assert_allclose(rope_frequencies(got), rope_frequencies(config), rtol=1e-6)
    assert "rope_freqs.weight" not in read
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 8, dtype=np.float32)
    with pytest.raises(ConfigError, match=r"rope_freqs.weight"):
        read_gguf(write(tmp_path / "b.gguf", tensors, config=config))


def test_linear_scaling(tmp_path: Path, tensors: dict[str, Any]) -> None:
    def linear(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    got, _, _ = read_gguf(write(tmp_path / "a.gguf", tensors, more=linear))
    assert got.rope_scaling == RopeScaling("linear", 4.0)


REFUSED: list[tuple[str, Callable[[gguf.GGUFWriter], None]]] = [
    ("rope scaling", lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)),
    ("sliding_window", lambda w: w.add_sliding_window(128)),
    ("expert_count", lambda w: w.add_expert_count(8)),
    ("rope.dimension_count", lambda w: w.add_rope_dimension_count(8)),
    ("value_length", lambda w: w.add_value_length(32)),
    ("attn_logit_softcapping", lambda w: w.add_attn_logit_softcapping(30.0)),
    ("logit_scale", lambda w: w.add_logit_scale(0.5)),
    ("rope.scaling.attn_factor", lambda w: w.add_float32("llama.rope.scaling.attn_factor", 1.5)),
    ("whole model", lambda w: w.add_string("general.type", "adapter")),
    ("one piece", lambda w: w.add_uint16("split.count", 3)),
    ("vocab_size", lambda w: w.add_uint32("llama.vocab_size", 41)),
]


@pytest.mark.parametrize(("message", "more"), REFUSED, ids=[message for message, _ in REFUSED])
def test_settings_that_change_the_arithmetic(
    tmp_path: Path, tensors: dict[str, Any], message: str, more: Callable[[gguf.GGUFWriter], None]
) -> None:
    if message == "vocab_size":
        config = LlamaConfig.from_dict({**CONFIG.to_dict(), "vocab_size": 41})
        path = write(tmp_path / "a.gguf", tensors, config=config)
    else:
        path = write(tmp_path / "a.gguf", tensors, more=more)
    with pytest.raises(ConfigError, match=message):
        read_gguf(path)


def test_key_length_sets_the_head_size(tmp_path: Path) -> None:
    config = LlamaConfig.from_dict({**CONFIG.to_dict(), "head_dim": 32})

    def lengths(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(32)
        writer.add_value_length(32)
        writer.add_rope_dimension_count(32)

    tensors = dict(random_llama(config))
    got, read, _ = read_gguf(write(tmp_path / "a.gguf", tensors, config=config, more=lengths))
    assert got == config
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(read[name], tensors[name])


def test_another_architecture(tmp_path: Path, tensors: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="got qwen2; expected llama"):
        read_gguf(write(tmp_path / "a.gguf", tensors, architecture="qwen2"))


def test_missing_unknown_and_misshaped_tensors(tmp_path: Path, tensors: dict[str, Any]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(WeightsError, match="lacks a tensor"):
        read_gguf(write(tmp_path / "a.gguf", {k: v for k, v in tensors.items() if k != name}))
    with pytest.raises(WeightsError, match="another shape"):
        read_gguf(write(tmp_path / "b.gguf", {**tensors, name: np.zeros((32, 64), np.float32)}))
    with pytest.raises(WeightsError, match=r"got blk.0.attn_q.bias"):
        read_gguf(write(tmp_path / "c.gguf", {**tensors, "blk.0.attn_q.bias": np.zeros(64, np.float32)}))
    more = {"model.layers.2.input_layernorm.weight": np.zeros(64, np.float32)}
    with pytest.raises(WeightsError, match="more layers"):
        read_gguf(write(tmp_path / "d.gguf", {**tensors, **more}))


@pytest.mark.parametrize("keep", [0, 3, 24, 200, 1500, -100])
def test_a_truncated_file(tmp_path: Path, tensors: dict[str, Any], keep: int) -> None:
    path = write(tmp_path / "a.gguf", tensors)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="isn't a whole GGUF file"):
        read_gguf(path)


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\3\4" * 100)
    with pytest.raises(WeightsError, match="magic"):
        read_gguf(tmp_path / "a.gguf")
    with pytest.raises(WeightsError, match="no file"):
        read_gguf(tmp_path / "b.gguf")


@pytest.mark.weights
def test_the_real_file_equals_transformers() -> None:
    assert SEED_STORY_135M.decoder is not None
    path = SEED_STORY_135M.decoder.path
    if not path.is_file():
        pytest.skip(f"{path.name} isn't in the cache: run `make setup`")
    transformers = pytest.importorskip("transformers")
    config, read, _ = read_gguf(path)
    assert config == SEED_STORY_135M.story.llama
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    theirs = model.state_dict()
    assert set(theirs) - set(read) == {"lm_head.weight"}  # tied
    for name in read:
        np.testing.assert_array_equal(read[name], theirs[name].float().numpy(), err_msg=name)
