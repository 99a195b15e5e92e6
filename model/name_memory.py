"""A memory of names: for each slot of queries, one attention over all names that the Q-Former knows.

What a slot recalls is a mixture of the names' embeddings, weighted by a softmax, so a decoder reads words that it knows
even of a picture that the Q-Former is unsure about (docs/decisions/0005). The idea is that of key-value memories
(arXiv 1606.03126), with keys of its own for each slot.
"""

from __future__ import annotations

from keras import ops

from model.layers import Linear, Module, Rng, Tensor
from seed_story.config import QFormerConfig


class NameMemory(Module):
    """What a picture's summary, `[b, 1, hidden_size]`, calls to mind: `[b, num_queries, llm_size]`.

    Attributes:
        scores: of each slot, from the summary to a score for each name.
        values: the names' embeddings, weight `[width * llm_size, names]`, a slot's `width` queries end to end.
    """

    def __init__(self, config: QFormerConfig, rng: Rng) -> None:
        super().__init__()
        self.config = config
        self.scores = [Linear(config.hidden_size, config.memory_names, rng) for _ in range(config.memory_slots)]
        self.values = Linear(config.memory_names, config.memory_width * config.llm_size, rng, bias=False)

    def call(self, summary: Tensor) -> Tensor:  # noqa: D102
        recalled = ops.softmax(ops.concatenate([score(summary) for score in self.scores], axis=1), axis=-1)
        return ops.reshape(self.values(recalled), (-1, self.config.num_queries, self.config.llm_size))
