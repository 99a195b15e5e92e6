"""The whole story model: pictures and text in one sequence, logits out. What is trained and compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from model.layers import Module, Tensor
from model.llama import Llama
from model.qformer import QFormer
from model.vit import VisionTransformer
from seed_story.config import StoryConfig
from seed_story.errors import UsageError

PICTURE = -1
"""The id of a place in a token sequence that takes one query embedding of a picture; never looked up."""


class StoryModel(Module):
    """ViT to Q-Former to LLaMA, on interleaved pictures and text (SEED-Story, arXiv 2407.08683).

    A story is a row of token ids. A picture takes `num_queries` places in it, each with the id `PICTURE` (any
    negative id does); the places are filled in order, picture after picture. A row with fewer places than its
    pictures fill (a padded batch) leaves the last pictures unread. A place without a picture is an error if
    the ids are NumPy's; in a tensor, which a traced graph can't read, it becomes NaN: never silent.

    Args:
        vision, qformer, llama: ready networks; by default new ones from `seed`.
        seed: of the initial weights; None for zeros.

    Raises:
        UsageError: on a call whose NumPy ids have places for more pictures than it got.
    """

    def __init__(
        self,
        config: StoryConfig,
        *,
        vision: VisionTransformer | None = None,
        qformer: QFormer | None = None,
        llama: Llama | None = None,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = vision or VisionTransformer(config.vision, seed)
        self.qformer = qformer or QFormer(config.qformer, seed)
        self.llama = llama or Llama(config.llama, seed)

    def __call__(self, token_ids: Tensor, pictures: Tensor | None = None, **options: Any) -> Tensor:
        """As `call`; refuses NumPy ids that have places for more pictures than there are."""
        self._check_places(token_ids, pictures)  # here, because Keras hands tensors to `call`
        return super().__call__(token_ids, pictures, **options)

    def call(
        self,
        token_ids: Tensor,
        pictures: Tensor | None = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The logits after every place: float32 `[b, t, vocab_size]`.

        Args:
            token_ids: int `[b, t]`, `PICTURE` where a picture's embedding goes.
            pictures: float32 `[b, n, s, s, 3]`, pixels in 0..1; None for text only.
            mask, positions: see `Llama.call`.
        """
        return self.llama(self.embed_story(token_ids, pictures), mask=mask, positions=positions)

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        """Pictures `[b, n, s, s, 3]` to their embeddings in order, `[b, n * num_queries, llm_size]`."""
        b, n, *frame = ops.shape(pictures)
        features = self.vision(ops.reshape(pictures, (b * n, *frame)))
        return ops.reshape(self.qformer(features), (b, -1, self.config.llama.hidden_size))

    def embed_story(self, token_ids: Tensor, pictures: Tensor | None = None) -> Tensor:
        """What the decoder reads: `call`'s ids and pictures to float32 `[b, t, hidden_size]`."""
        self._check_places(token_ids, pictures)
        token_ids = ops.convert_to_tensor(token_ids)
        is_place = token_ids < 0
        text = self.llama.embed(ops.where(is_place, 0, token_ids))
        if pictures is None:
            return ops.where(is_place[..., None], np.float32(np.nan), text)
        available = self.embed_pictures(ops.convert_to_tensor(pictures, dtype="float32"))
        order = ops.cumsum(ops.cast(is_place, "int32"), axis=1) - 1
        last = ops.shape(available)[1] - 1
        taken = ops.take_along_axis(available, ops.clip(order, 0, last)[..., None], axis=1)
        taken = ops.where((order > last)[..., None], np.float32(np.nan), taken)
        return ops.where(is_place[..., None], taken, text)

    def _check_places(self, token_ids: Tensor, pictures: Tensor | None) -> None:
        if not isinstance(token_ids, np.ndarray):
            return
        places = int((token_ids < 0).sum(axis=1).max(initial=0))
        room = 0 if pictures is None else pictures.shape[1] * self.config.qformer.num_queries
        if places > room:
            raise UsageError("the story has more places than its pictures fill", got=places, expected=f"at most {room}")
