"""A decoder of the user's own: random weights, as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from model.tokenizer_files import byte_tokenizer

FULL = 259
"""As many rows as the tokenizer of bytes has tokens: no slot is free."""


def llama_folder(folder: Path, vocab: int = FULL, *, tied: bool = False) -> Path:
    """Saves one with `vocab` rows, and a tokenizer of bytes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder
