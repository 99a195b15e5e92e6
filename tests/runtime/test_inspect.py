"""`seed-story inspect`: the figures are right, the files are verified, and a damaged bundle is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from seed_story.bundle import Bundle
from seed_story.cli import main
from seed_story.config import LlamaConfig, QFormerConfig, VisionConfig
from seed_story.describe import describe, llama_parameters, qformer_parameters, render, vision_parameters
from tests.runtime.paper_bundle import write_paper_bundle


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    return write_paper_bundle(tmp_path / "paper")


def test_llama_parameters_are_those_of_the_published_models() -> None:
    assert llama_parameters(LlamaConfig()) == 134_515_008  # SmolLM2-135M
    tinyllama = LlamaConfig(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_layers=22,
                            num_heads=32, num_kv_heads=4, tie_word_embeddings=False)  # fmt: skip
    assert llama_parameters(tinyllama) == 1_100_048_384  # TinyLlama-1.1B


def test_vision_parameters_are_those_of_the_published_model() -> None:
    whole = VisionConfig(image_size=518, feature_layer=12, final_norm=True)
    assert vision_parameters(whole) == 22_056_576 - 384  # DINOv2 ViT-S/14, without its training-only mask token


def test_what_the_graph_lacks_is_not_counted() -> None:
    block = vision_parameters(VisionConfig(feature_layer=12)) - vision_parameters(VisionConfig(feature_layer=11))
    assert block == 1_775_232  # one block of ViT-S with Layer Scale
    assert vision_parameters(VisionConfig(image_size=28)) == vision_parameters(VisionConfig()) - 252 * 384


@pytest.mark.parametrize(
    "sizes",
    [QFormerConfig.tiny(), QFormerConfig(vision_size=32, llm_size=40), QFormerConfig(memory_names=9, memory_slots=2)],
)
def test_qformer_parameters_are_those_of_the_network(sizes: QFormerConfig) -> None:
    pytest.importorskip("keras")
    from model.qformer import QFormer

    assert qformer_parameters(sizes) == sum(v.shape.num_elements() for v in QFormer(sizes, seed=None).weights
                                            if "seed" not in v.name)  # fmt: skip


def test_description(paper: Path) -> None:
    found = describe(Bundle.open(paper))
    assert json.loads(json.dumps(found)) == found
    assert found["verified"] is True
    assert found["cache"] == {
        "policy": "text-sink",
        "slots": 12,
        "sinks": 2,
        "anchors": 0,
        "picture_begin": 2,
        "picture_end": 4,
        "picture_eviction": "oldest",
        "ring": 10,
        "dtype": "float32",
        "bytes": 2 * 2 * 2 * 12 * 8 * 4,
    }
    assert set(found["graphs"]) == {"vit", "qformer", "decoder"}
    assert list(found["graphs"]["decoder"]["signatures"]) == ["embed", "prefill_4", "decode"]
    assert found["graphs"]["decoder"]["bytes"] == 3000
    assert found["bytes"] == sum(f["bytes"] for f in found["files"].values())
    assert found["architecture"]["decoder"]["parameters"] == llama_parameters(LlamaConfig.tiny())
    specials = [("<|endoftext|>", 0), ("<|/picture|>", 1), ("<|picture|>", 2)]
    assert list(found["special_tokens"].items()) == specials
    assert (found["recipe"], found["qformer_trained"]) == ("int8", False)


def test_text_form(paper: Path) -> None:
    text = render(describe(Bundle.open(paper)))
    figures = ["12 slots = 2 sinks + a ring of 10 (text-sink), float32, ", "decoder.kl: 0.01235", "3.0 kB"]
    names = ["LLaMA, 2 layers", "paper", "all verified", "int8", "untrained", "prefill_4", "<|endoftext|>"]
    sources = ["tensorflow: 2.21.0", "decoder: Apache-2.0", "request    'Tell me a story.'"]
    for words in (*figures, *names, *sources):
        assert words in text
    assert "anchors" not in text
    assert max(map(len, text.splitlines())) <= 160


def test_command_prints_text_or_one_line_of_json(paper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(paper)]) == 0
    assert capsys.readouterr().out.startswith("bundle")
    assert main(["inspect", str(paper), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out)["name"] == "paper"


def test_damaged_bundle_is_refused(paper: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (paper / "vit.tflite").write_bytes(b"\1" + bytes(999))
    assert main(["inspect", str(paper)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("seed-story: error: vit.tflite is damaged")


def test_no_bundle_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 1
    assert "there is no such bundle" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 1
    assert "isn't a bundle" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "{}", '{"added_tokens": [{}]}', '{"added_tokens": 3}'])
def test_broken_tokenizer_is_a_clear_error(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    paper = write_paper_bundle(tmp_path / "paper")
    (paper / "tokenizer.json").write_text(text)
    manifest = json.loads((paper / "manifest.json").read_text())
    from seed_story.files import file_sha256

    manifest["files"]["tokenizer.json"] = {
        "sha256": file_sha256(paper / "tokenizer.json"),
        "bytes": len(text),
    }
    (paper / "manifest.json").write_text(json.dumps(manifest))
    assert main(["inspect", str(paper)]) == 1
    assert "tokenizer.json can't be read" in capsys.readouterr().err


def test_real_bundle(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tiny_bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "<|picture|>" in found["special_tokens"]
    assert main(["inspect", str(tiny_bundle)]) == 0
    assert "decoder.tflite" in capsys.readouterr().out
