"""One dial: how many minutes. Everything else has a default that works."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from seed_story.errors import UsageError

Decoder = Literal["frozen", "lora", "full"]
DECODERS: tuple[Decoder, ...] = ("frozen", "lora", "full")


@dataclass(frozen=True)
class Recipe:
    """How a story model is trained.

    First the ViT's last blocks learn to recognize things; then stage 1 aligns the Q-Former with the decoder's words,
    and stage 2 trains all of it, end to end.

    Args:
        minutes: of training, without the features that come before it.
        decoder: what stage 2 changes of the LLaMA: nothing, LoRA matrices, or everything.
        vision_blocks: how many last blocks of the ViT are trained; the paper's 4.
        rank: of the LoRA matrices.
        recognizing, aligning: the share of the time for recognition, and for stage 1.
        recognize_batch, align_batch: pictures a step.
        rows, length: of a batch of stories, in rows of tokens.
        mixed_precision: bfloat16, for accelerators.
        seed: of everything random.
    """

    minutes: float = 60.0
    decoder: Decoder = "lora"
    vision_blocks: int = 4
    rank: int = 8
    recognizing: float = 0.57
    aligning: float = 0.03
    recognize_batch: int = 32
    align_batch: int = 64
    rows: int = 4
    length: int = 256
    recognize_rate: float = 3e-4
    align_rate: float = 1e-3
    story_rate: float = 1e-3
    weight_decay: float = 0.1
    mixed_precision: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.minutes > 0:
            raise UsageError("minutes is impossible", got=self.minutes, expected="a positive number")
        if self.decoder not in DECODERS:
            raise UsageError("the decoder can't be trained so", got=self.decoder, expected=" or ".join(DECODERS))
        if self.vision_blocks < 0 or self.rank < 1:
            raise UsageError("the recipe is impossible", got=f"vision_blocks {self.vision_blocks}, rank {self.rank}",
                             expected="vision_blocks of 0 or more, a rank of 1 or more")  # fmt: skip


def data_fingerprint(files: Sequence[Path]) -> str:
    """The first half of a sha256 of a data set's training stories, to know them again."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:32]
