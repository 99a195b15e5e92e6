"""Where the parts of a story model come from: a preset, with any part replaced by the user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from model.layers import named_variables, numpy_of
from model.llama import IGNORED as LLAMA_IGNORED
from model.llama import Llama
from model.lora import merge_lora
from model.presets import get_preset
from model.qformer import QFormer, initial_qformer
from model.sources.gguf import read_gguf
from model.sources.huggingface import hf_folder, read_hf
from model.sources.lazy import LazyTensors
from model.story_model import StoryModel
from model.tokenizer_files import add_picture_tokens, tokenizer_from_folder, tokenizer_from_gguf
from model.vit import IGNORED as VISION_IGNORED
from model.vit import VisionTransformer
from model.weights import load_safetensors, load_weights, read_safetensors, without_prefix
from seed_story.bundle import Prompt
from seed_story.config import LlamaConfig, QFormerConfig, StoryConfig, VisionConfig

CHECKPOINTS = Path(__file__).parent / "checkpoints"
"""Trained weights of our own, a folder a preset."""
PRETRAINED = "pretrained"
"""Inside it: what was learned for exports of the preset's parts as they are published."""
QFORMER_FILE, VISION_FILE = "qformer.safetensors", "vision.safetensors"
LORA_FILE, DECODER_FILE = "lora.safetensors", "decoder.safetensors"
"""What a checkpoint's folder holds: the Q-Former; and, if they were trained, the ViT's last blocks, and the decoder's
LoRA matrices or all of its weights."""

_HEAD = "lm_head.weight"
TABLES = ("model.embed_tokens.weight", _HEAD)
"""The decoder's weights with a row for each token."""
_QFORMER_SEED = 0


@dataclass(frozen=True)
class StorySource:
    """Everything that an export needs to know about a model.

    Args:
        model: the float32 networks: what is exported, and the reference of the parity gate.
        tokenizer: with the picture tokens.
        qformer_trained: whether the Q-Former's weights were learned; if not, pictures say nothing yet.
        licences: of the weights, by part.
        checkpoint: the folder of the trained weights, if there are any.
        learned: a folder with what was learned for exports: `export.learned_rotation` and `export.learned_scales`.
        rotation, scales: files of these instead of the folder's.
    """

    name: str
    model: StoryModel
    tokenizer: Tokenizer
    prompt: Prompt
    qformer_trained: bool
    licences: Mapping[str, str]
    checkpoint: Path | None = None
    learned: Path | None = None
    rotation: Path | None = None
    scales: Path | None = None

    def learned_file(self, name: str) -> Path | None:
        """The file of that name in the folder of what was learned; None if there is none."""
        file = self.learned and self.learned / name
        return file if file and file.is_file() else None


def load_source(
    preset: str,
    *,
    llama: str | None = None,
    vision: str | None = None,
    checkpoint: Path | Literal["none"] | None = None,
) -> StorySource:
    """Loads a model's three networks and its tokenizer.

    Args:
        preset: a name of `model.presets.PRESETS`.
        llama: instead of the preset's: a GGUF file, or a folder or hub id with safetensors and tokenizer.json.
        vision: instead of the preset's: a folder or hub id of a Dinov2Model or ViTModel.
        checkpoint: a folder of trained weights, as `python -m training.train` writes it; by default the preset's own,
            if it has one and its decoder and vision transformer are used; "none" for an untrained Q-Former.

    Raises:
        SeedStoryError: a part can't be found, read, or doesn't fit.
    """
    base = get_preset(preset)
    licences = {"decoder": "see its source", "vision": "see its source"}
    if llama is None:
        decoder_config, tensors, tokenizer = base.story.llama, base.load_decoder(), base.load_tokenizer()
        licences["decoder"] = base.decoder.license if base.decoder else "none: random weights"
    else:
        decoder_config, tensors, tokenizer = _read_llama(llama)
    if vision is None:
        vision_config, vision_tensors = base.story.vision, base.load_vision()
        licences["vision"] = base.vision.license if base.vision else "none: random weights"
    else:
        values, vision_tensors = read_hf(vision)
        vision_config = VisionConfig.from_hf(values)
        vision_tensors = without_prefix(vision_tensors, f"{values['model_type']}.")  # as a network with a head has it
    tokenizer, _, _, grown = add_picture_tokens(tokenizer, decoder_config.vocab_size)
    if grown:
        tensors = Grown(tensors, grown)
        decoder_config = replace(decoder_config, vocab_size=decoder_config.vocab_size + grown)

    decoder = Llama(decoder_config, seed=None)
    load_weights(decoder, tensors, ignore=(*LLAMA_IGNORED, _HEAD))  # some files store a tied head a second time
    eye = VisionTransformer(vision_config, seed=None)
    load_weights(eye, vision_tensors, ignore=VISION_IGNORED)
    own = llama is not None or vision is not None
    folder = _checkpoint(preset, own, checkpoint)
    sizes = replace(base.story.qformer, vision_size=vision_config.hidden_size, llm_size=decoder_config.hidden_size)
    bridge = _qformer(sizes, folder, decoder)
    sizes = bridge.config
    if folder is not None:
        _adapt(decoder, eye, folder)
        licences["checkpoint"] = _licence(folder)
    config = StoryConfig(vision_config, sizes, decoder_config)
    made = StoryModel(config, vision=eye, qformer=bridge, llama=decoder)
    name = f"{preset}-custom" if own else preset
    learned = folder or (None if own else CHECKPOINTS / preset / PRETRAINED)
    return StorySource(name, made, tokenizer, _prompt(tokenizer), folder is not None, licences, folder, learned)


def _read_llama(source: str) -> tuple[LlamaConfig, Mapping[str, Any], Tokenizer]:
    if source.endswith(".gguf"):
        config, tensors, _ = read_gguf(Path(source))
        return config, tensors, tokenizer_from_gguf(Path(source))
    values, weights = read_hf(source)
    return LlamaConfig.from_hf(values), weights, tokenizer_from_folder(hf_folder(source))


def _checkpoint(preset: str, own: bool, given: Path | Literal["none"] | None) -> Path | None:
    if given is not None:
        return None if given == "none" else Path(given)
    default = CHECKPOINTS / preset
    return default if not own and (default / QFORMER_FILE).is_file() else None


def _qformer(config: QFormerConfig, folder: Path | None, decoder: Llama) -> QFormer:
    if folder is None:
        return initial_qformer(config, numpy_of(decoder.model.embed_tokens.weight), _QFORMER_SEED)
    return read_qformer(config, folder / QFORMER_FILE)


def read_qformer(config: QFormerConfig, file: Path) -> QFormer:
    """A trained Q-Former. How many names it remembers depends on its data, so its file says so.

    Args:
        config: its sizes but for the memory's.

    Raises:
        WeightsError: the file can't be read, or its tensors don't fit.
    """
    tensors = read_safetensors(file)
    network = QFormer(_with_memory(config, tensors), seed=None)
    load_weights(network, tensors)
    return network


def _with_memory(config: QFormerConfig, tensors: Mapping[str, Any]) -> QFormerConfig:
    slots = [np.asarray(tensors[name]) for name in tensors if re.fullmatch(r"memory\.scores\.\d+\.weight", name)]
    return replace(config, memory_names=len(slots[0]), memory_slots=len(slots)) if slots else config


def _adapt(decoder: Llama, eye: VisionTransformer, folder: Path) -> None:
    """What training changed of the pretrained networks."""
    if (folder / DECODER_FILE).is_file():
        load_safetensors(decoder, folder / DECODER_FILE)
    if (folder / LORA_FILE).is_file():
        merge_lora(decoder, read_safetensors(folder / LORA_FILE))
    if (folder / VISION_FILE).is_file():
        trained = read_safetensors(folder / VISION_FILE)
        unchanged = {name: numpy_of(v) for name, v in named_variables(eye).items() if name not in trained}
        load_weights(eye, {**unchanged, **trained})


def _licence(folder: Path) -> str:
    """The first line of the checkpoint's LICENSE file."""
    file = folder / "LICENSE"
    return file.read_text(encoding="utf-8").splitlines()[0].strip() if file.is_file() else "see its source"


class Grown(LazyTensors[Any, Any]):
    """A decoder's tensors, with rows for tokens that the vocabulary had no place for: the mean of the others.

    Each is read when it is asked for, so a big checkpoint never is in memory as a whole.
    """

    def __init__(self, tensors: Mapping[str, Any], rows: int) -> None:
        super().__init__(tensors)
        self._rows = rows

    def __getitem__(self, name: str) -> Any:
        found = self._stored[name]
        if name not in TABLES:
            return found
        table = np.asarray(found)
        return np.concatenate([table, np.repeat(table.mean(0, keepdims=True), self._rows, axis=0)])


_REQUEST = "Write a short story for children about this picture."
_TEMPLATES = {
    "<|im_start|>": ("<|im_start|>user\n", f"\n{_REQUEST}<|im_end|>\n<|im_start|>assistant\n"),
    "<|start_header_id|>": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        f"\n{_REQUEST}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "<s>": ("<s>", ""),
}
"""Opening and request of a story, by a control token that tells which chat format a model was trained on."""

_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>")


def _prompt(tokenizer: Tokenizer) -> Prompt:
    def known(token: str) -> bool:
        return tokenizer.token_to_id(token) is not None

    ends = tuple(filter(known, _END_TOKENS))
    plain = (ends[0] if ends else "", "")  # a base model: a text begins after the end of another
    opening, request = next((template for token, template in _TEMPLATES.items() if known(token)), plain)
    return Prompt(opening, request, ends)
