"""What the story tests look at: short tellings, and what the decoder was fed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from seed_story.decoder import Guess
from seed_story.sampling import SamplingConfig
from seed_story.story import SEEDStory, Story

ROOT = Path(__file__).parents[2]
GREEDY = SamplingConfig.greedy()
HOT = SamplingConfig(temperature=1.0, min_p=0.0, repetition_penalty=1.0)
"""Nearly any byte may come: most of what is told is no valid UTF-8."""


def pixels(value: float | None = None, seed: int = 0) -> np.ndarray:
    if value is not None:
        return np.full((1, 28, 28, 3), value, np.float32)
    return np.random.default_rng(seed).uniform(0, 1, (1, 28, 28, 3)).astype(np.float32)


def told(story: Story, count: int) -> str:
    return "".join(story.tell(max_tokens=count))


class Spy:
    """Records every embedding that the decoder reads, in order, and which of them are pictures."""

    def __init__(self, model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[np.ndarray] = []
        self.pictures: list[range] = []
        feed = model.decoder.feed

        def spied(embeddings: np.ndarray, pictures: Sequence[range] = (), guess: Guess | None = None) -> np.ndarray:
            self.pictures.extend(range(len(self.rows) + p.start, len(self.rows) + p.stop) for p in pictures)
            self.rows.extend(embeddings.copy())
            return feed(embeddings, pictures, guess)

        monkeypatch.setattr(model.decoder, "feed", spied)


def ids_of(model: SEEDStory, rows: list[np.ndarray]) -> list[int]:
    """Embeddings back to token ids; -1 for what is no token's."""
    vocab = model.bundle.manifest.story.llama.vocab_size
    table = {row.tobytes(): i for i, row in enumerate(model.decoder.embed(range(vocab)))}
    return [table.get(row.tobytes(), -1) for row in rows]


def layout(model: SEEDStory, rows: list[np.ndarray]) -> str:
    """What the decoder read, as text: `[picture]` for a picture with its two tokens around it."""
    begin, end = model._picture_ids
    names = {begin: "<", end: ">", -1: "*"}
    controls = {model.tokenizer.token_id(name): name for name in ("<|im_start|>", "<|im_end|>")}
    parts = (names.get(i) or controls.get(i) or model.tokenizer.decode([i]) for i in ids_of(model, rows))
    return "".join(parts).replace("<****>", "[picture]")


def drawn(story: Story) -> list[int]:
    """Grows by every token that the story draws from now on."""
    ids: list[int] = []
    draw = story._sampler.sample

    def sample(logits: np.ndarray) -> int:
        ids.append(draw(logits))
        return ids[-1]

    story._sampler.sample = sample  # type: ignore[method-assign]
    return ids
