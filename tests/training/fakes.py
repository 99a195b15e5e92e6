"""Stand-ins for what training reads from disk: a picture's features, and a tokenizer."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from model.tokenizer_files import add_picture_tokens, byte_tokenizer
from seed_story.tokenizer import StoryTokenizer
from training.features import FeatureStore


def byte_story_tokenizer() -> StoryTokenizer:
    """Bytes and the picture tokens, as the tiny preset has them."""
    return StoryTokenizer(add_picture_tokens(byte_tokenizer(), 320)[0])


class Features(FeatureStore):
    """Random states after `end` blocks, float16 `[tokens, size]` a picture: a function of its name alone."""

    def __init__(self, end: int, tokens: int, size: int) -> None:
        self.end, self._shape = end, (tokens, size)

    def __getitem__(self, pictures: Sequence[Path]) -> np.ndarray:
        drawn = [np.random.default_rng(zlib.crc32(str(p).encode())).standard_normal(self._shape) for p in pictures]
        return np.array(drawn, np.float16).reshape(-1, *self._shape)
