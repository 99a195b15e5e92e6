"""Parts of a user's own: Hugging Face folders, a vocabulary without room, and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import torch
import transformers
from keras import ops
from safetensors.torch import load_file, save_file

from export.__main__ import main
from model.layers import named_variables, numpy_of
from model.qformer import QFormer
from model.story_source import (
    DECODER_FILE,
    LORA_FILE,
    PRETRAINED,
    QFORMER_FILE,
    TABLES,
    VISION_FILE,
    Grown,
    load_source,
)
from model.weights import save_safetensors, write_safetensors
from seed_story.config import CacheConfig, QFormerConfig
from seed_story.errors import SeedStoryError, UsageError, WeightsError
from seed_story.sampling import SamplingConfig
from seed_story.story import SEEDStory
from tests.compare import assert_close
from tests.loud import loud_source
from tests.model.own_decoder import FULL, llama_folder


def vision_folder(folder: Path, kind: str) -> Path:
    torch.manual_seed(1)
    sizes = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}
    if kind.startswith("dinov2"):
        config = transformers.Dinov2Config(**sizes, image_size=98, patch_size=14, mlp_ratio=2)
        model: type = transformers.Dinov2ForImageClassification if kind.endswith("head") else transformers.Dinov2Model
    else:
        config = transformers.ViTConfig(**sizes, image_size=224, patch_size=32, intermediate_size=36)
        model = transformers.ViTForImageClassification if kind.endswith("head") else transformers.ViTModel
    model(config).save_pretrained(folder)
    return folder


def test_preset_alone() -> None:
    source = load_source("tiny")
    assert source.name == "tiny"
    assert not source.qformer_trained
    assert source.licences["decoder"] == source.licences["vision"] == "none: random weights"
    assert source.prompt.opening.startswith("<|im_start|>")


def test_unknown_preset() -> None:
    with pytest.raises(UsageError, match="tiny"):
        load_source("nope")


@pytest.mark.parametrize("tied", [False, True])
def test_vocabulary_grows_where_no_slot_is_free(tmp_path: Path, tied: bool) -> None:
    folder = llama_folder(tmp_path, tied=tied)
    source = load_source("tiny", llama=str(folder))
    llama = source.model.config.llama
    assert llama.vocab_size == FULL + 2 and llama.tie_word_embeddings is tied
    assert [source.tokenizer.token_to_id(name) for name in ("<|picture|>", "<|/picture|>")] == [FULL, FULL + 1]
    assert source.name == "tiny-custom"

    old = {name: tensor.numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
    new = named_variables(source.model.llama)
    tables = ["model.embed_tokens.weight"] + ([] if tied else ["lm_head.weight"])
    for name in tables:
        np.testing.assert_array_equal(numpy_of(new[name])[:FULL], old[name])
        assert_close(numpy_of(new[name])[FULL:], np.stack([old[name].mean(0)] * 2), "same_maths")

    published = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    ids = np.arange(40)[None] * 6
    logits = ops.convert_to_numpy(source.model.llama(source.model.llama.embed(ids)))
    with torch.no_grad():
        assert_close(logits[..., :FULL], published(torch.from_numpy(ids)).logits, "network")


@pytest.mark.parametrize(("vocab", "grown"), [(FULL + 1, 1), (FULL + 2, 0), (300, 0)])
def test_grows_no_more_than_it_must(tmp_path: Path, vocab: int, grown: int) -> None:
    assert load_source("tiny", llama=str(llama_folder(tmp_path, vocab))).model.config.llama.vocab_size == vocab + grown


def test_growing_reads_a_tensor_only_when_it_is_asked_for() -> None:
    """As a dictionary of them, a big checkpoint would be in memory a second time."""
    reads: list[str] = []

    class Watched(dict[str, np.ndarray]):
        def __getitem__(self, name: str) -> np.ndarray:
            reads.append(name)
            return super().__getitem__(name)

    tensors = Watched({name: np.eye(3, dtype=np.float32) for name in ("a", *TABLES)})
    grown = Grown(tensors, 2)
    assert (list(grown), len(grown), "a" in grown, "b" in grown, reads) == (["a", *TABLES], 3, True, False, [])
    assert (grown["a"].shape, grown[TABLES[1]].shape, reads) == ((3, 3), (5, 3), ["a", TABLES[1]])


@pytest.mark.parametrize("kind", ["dinov2", "dinov2 with a head", "vit", "vit with a head"])
def test_vision_folder_equals_transformers(tmp_path: Path, kind: str) -> None:
    folder = vision_folder(tmp_path, kind)
    source = load_source("tiny", vision=str(folder))
    assert source.model.config.vision.layer_scale == kind.startswith("dinov2")
    body = transformers.AutoModel.from_pretrained(folder).eval()
    pixels = np.random.default_rng(0).uniform(0, 1, (1, 224, 224, 3)).astype(np.float32)
    config = source.model.config.vision
    normal = ((pixels - np.float32(config.image_mean)) / np.float32(config.image_std)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        expected = body(torch.from_numpy(np.ascontiguousarray(normal)), **(
            {} if kind.startswith("dinov2") else {"interpolate_pos_encoding": True})).last_hidden_state  # fmt: skip
    assert_close(source.model.vision(pixels), expected, "network")


def test_vision_folder_with_a_strange_tensor(tmp_path: Path) -> None:
    folder = vision_folder(tmp_path, "dinov2")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "adapter.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"adapter\.weight"):
        load_source("tiny", vision=str(folder))
    tensors.pop("layernorm.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layernorm\.weight"):
        load_source("tiny", vision=str(folder))


def values_of(network: keras.Layer) -> dict[str, np.ndarray]:
    return {name: numpy_of(variable) for name, variable in named_variables(network).items()}


def checkpoint_folder(folder: Path, config: QFormerConfig | None = None) -> Path:
    """A folder with a Q-Former alone, which is the least that makes a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_safetensors(QFormer(config or QFormerConfig.tiny(), seed=77), folder / QFORMER_FILE)
    return folder


def assert_same(got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_checkpoint_folder_is_used(tmp_path: Path) -> None:
    """Its Q-Former is taken; what it has no file for stays the preset's."""
    source, plain = load_source("tiny", checkpoint=checkpoint_folder(tmp_path)), load_source("tiny")
    assert source.qformer_trained and source.name == "tiny"
    assert_same(values_of(source.model.qformer), values_of(QFormer(QFormerConfig.tiny(), seed=77)))
    assert_same(values_of(source.model.llama), values_of(plain.model.llama))
    assert_same(values_of(source.model.vision), values_of(plain.model.vision))


def test_checkpoint_brings_its_memory_of_names(tmp_path: Path) -> None:
    config = replace(QFormerConfig.tiny(), memory_names=6, memory_slots=2)
    source = load_source("tiny", checkpoint=checkpoint_folder(tmp_path, config))
    assert source.model.config.qformer == source.model.qformer.config == config
    assert_same(values_of(source.model.qformer), values_of(QFormer(config, seed=77)))


def test_checkpoint_of_the_preset_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.story_source.CHECKPOINTS", tmp_path)
    assert not load_source("tiny").qformer_trained
    checkpoint_folder(tmp_path / "tiny")
    assert load_source("tiny").qformer_trained
    untrained = load_source("tiny", checkpoint="none")
    assert not untrained.qformer_trained and "checkpoint" not in untrained.licences
    assert load_source("tiny").learned == tmp_path / "tiny" and untrained.learned == tmp_path / "tiny" / PRETRAINED


@pytest.mark.parametrize("option", ["llama", "vision"])
def test_own_parts_ignore_the_presets_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """It was trained with the preset's own networks, and wouldn't even fit others."""
    monkeypatch.setattr("model.story_source.CHECKPOINTS", tmp_path)
    checkpoint_folder(tmp_path / "tiny")
    own = llama_folder(tmp_path / "own") if option == "llama" else vision_folder(tmp_path / "own", "dinov2")
    source = load_source("tiny", **{option: str(own)})
    assert not source.qformer_trained and source.learned is None


def test_lora_of_a_checkpoint_is_added_to_the_decoder(tmp_path: Path) -> None:
    folder, plain = checkpoint_folder(tmp_path), load_source("tiny")
    rng = np.random.default_rng(4)
    down, up = rng.standard_normal((2, 24)), rng.standard_normal((48, 2))
    stem = "model.layers.1.mlp.gate_proj"
    pair = {f"{stem}.lora_down": down.astype(np.float16), f"{stem}.lora_up": up.astype(np.float16)}
    write_safetensors(pair, folder / LORA_FILE)
    source = load_source("tiny", checkpoint=folder)
    got, expected = values_of(source.model.llama), values_of(plain.model.llama)
    product = pair[f"{stem}.lora_up"].astype(np.float64) @ pair[f"{stem}.lora_down"].astype(np.float64)
    assert_close(got.pop(f"{stem}.weight"), expected.pop(f"{stem}.weight") + product, "same_maths")
    assert_same(got, expected)
    assert_same(values_of(source.model.vision), values_of(plain.model.vision))


def test_whole_decoder_of_a_checkpoint_replaces_the_presets(tmp_path: Path) -> None:
    folder, plain = checkpoint_folder(tmp_path), load_source("tiny")
    trained = {name: value.astype(np.float16) + 1 for name, value in values_of(plain.model.llama).items()}
    write_safetensors(trained, folder / DECODER_FILE)
    source = load_source("tiny", checkpoint=folder)
    assert_same(values_of(source.model.llama), trained)
    assert_same(values_of(source.model.vision), values_of(plain.model.vision))


def test_trained_vision_blocks_replace_just_those(tmp_path: Path) -> None:
    folder, plain = checkpoint_folder(tmp_path), load_source("tiny")
    expected = values_of(plain.model.vision)
    block = {n: v.astype(np.float16) + 1 for n, v in expected.items() if n.startswith("encoder.layer.1.")}
    assert block
    write_safetensors(block, folder / VISION_FILE)
    source = load_source("tiny", checkpoint=folder)
    assert_same(values_of(source.model.vision), {**expected, **block})
    assert_same(values_of(source.model.llama), values_of(plain.model.llama))


@pytest.mark.parametrize(("text", "said"), [("MIT, and CC-BY 4.0 \n\nAll of it.\n", "MIT, and CC-BY 4.0"),
                                            (None, "see its source")])  # fmt: skip
def test_licence_is_the_first_line(tmp_path: Path, text: str | None, said: str) -> None:
    folder = checkpoint_folder(tmp_path)
    if text is not None:
        (folder / "LICENSE").write_text(text)
    assert load_source("tiny", checkpoint=folder).licences["checkpoint"] == said


@pytest.mark.parametrize("kind", ["no folder", "no Q-Former", "garbage", "another size"])
def test_wrong_checkpoint(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "checkpoint"
    if kind != "no folder":
        checkpoint_folder(folder, replace(QFormerConfig.tiny(), llm_size=25) if kind == "another size" else None)
    if kind == "no Q-Former":
        (folder / QFORMER_FILE).unlink()
    elif kind == "garbage":
        (folder / QFORMER_FILE).write_bytes(b"garbage")
    with pytest.raises(WeightsError, match="QFormer|qformer" if kind != "another size" else "mis-shaped"):
        load_source("tiny", checkpoint=folder)


@pytest.mark.parametrize("name", [LORA_FILE, DECODER_FILE, VISION_FILE])
@pytest.mark.parametrize("kind", ["garbage", "a stranger"])
def test_wrong_file_beside_the_qformer(tmp_path: Path, name: str, kind: str) -> None:
    folder = checkpoint_folder(tmp_path)
    if kind == "garbage":
        (folder / name).write_bytes(b"garbage")
    else:
        write_safetensors({"stranger.weight": np.ones((2, 2), np.float32)}, folder / name)
    with pytest.raises(WeightsError, match=name if kind == "garbage" else r"stranger\.weight"):
        load_source("tiny", checkpoint=folder)


@pytest.mark.parametrize("option", ["llama", "vision"])
def test_folder_that_is_no_model(tmp_path: Path, option: str) -> None:
    with pytest.raises(SeedStoryError):
        load_source("tiny", **{option: str(tmp_path)})


def test_all_parts_of_ones_own_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, a decoder whose vocabulary grows, a ViT with its pooler, and a Q-Former between them."""
    llama, vision = llama_folder(tmp_path / "llama"), vision_folder(tmp_path / "vision", "vit")
    sizes = replace(QFormerConfig.tiny(), vision_size=20, llm_size=32)
    checkpoint = checkpoint_folder(tmp_path / "checkpoint", sizes)
    code = main([
        "--model", "tiny", "--llama", str(llama), "--vision", str(vision), "--checkpoint", str(checkpoint),
        "--recipe", "float32", "--slots", "32", "--sinks", "2", "--prefill", "4", "8", "--out", str(tmp_path / "out"),
    ])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "untrained" not in printed.out
    values = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert values["qformer_trained"] is True
    assert values["architecture"]["llama"]["vocab_size"] == FULL + 2
    assert values["special_tokens"]["<|picture|>"] == FULL
    assert values["licences"] == dict.fromkeys(("decoder", "vision", "checkpoint"), "see its source")
    assert values["parity"]["decoder_top1"] > 0.99
    with SEEDStory(tmp_path / "out", threads=1) as model:
        picture = np.random.default_rng(2).uniform(0, 1, (1, 224, 224, 3)).astype(np.float32)
        text = model((picture, "Once"), max_tokens=30, sampling=SamplingConfig.greedy())
        assert text.startswith("Once")


def test_loud_model_is_loud() -> None:
    """What the tests of stories and of the gate rest on: attention and pictures matter in it."""
    source = loud_source()
    x = source.model.llama.embed(np.array([[*b"Once upon a time there was a bear"]]))
    full, bounded = (ops.convert_to_numpy(source.model.llama(x, cache=c)) for c in (None, CacheConfig(8, 2)))
    assert np.abs(full - bounded)[0, -1].max() > 0.1
    pictures = np.stack([np.zeros((28, 28, 3)), np.ones((28, 28, 3))]).astype(np.float32)[None]
    first, second = np.split(ops.convert_to_numpy(source.model.embed_pictures(pictures))[0], 2)
    assert np.abs(first - second).max() > 0.1


def test_base_model_without_a_chat_format(tmp_path: Path) -> None:
    """No control tokens but an end of text: a story begins after the end of another."""
    folder = llama_folder(tmp_path / "llama")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<|endoftext|>"]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    source = load_source("tiny", llama=str(folder))
    assert (source.prompt.opening, source.prompt.request) == ("<|endoftext|>", "")
    assert source.prompt.end_tokens == ("<|endoftext|>",)
