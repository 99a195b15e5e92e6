"""A memory of names: for each slot of queries, one attention over all names that the Q-Former knows.

What a slot recalls is a mixture of the names' embeddings, so a decoder reads words that it knows even of a picture that
the Q-Former is unsure about (docs/decisions/0005). The idea is that of key-value memories (arXiv 1606.03126), with keys
of its own for each slot. Where it can't tell an owl from an eagle, it says "bird": each name is weighted by what saying
it would be worth, given how likely the names of the thing are (after arXiv 1205.5137, "hedging your bets").
"""

from __future__ import annotations

from keras import ops

from model.layers import Linear, Module, Rng, Tensor
from seed_story.config import QFormerConfig

_SQUARINGS = 2
"""The fourth power: a decoder reads one name better than a blend of many, and int8 stays near float32.

At the eighth, the least cosine of the default Q-Former's int8 graph fell from 0.983 to 0.943."""


class NameMemory(Module):
    """What a picture's summary, `[b, 1, hidden_size]`, calls to mind: `[b, num_queries, llm_size]`.

    Attributes:
        scores: of each slot, from the summary to a score for each name.
        worth: weight `[names, names]`: what it is worth to say a name (row) of a thing of another (column), 0 to 1.
            Given, not learned.
        values: the names' embeddings, weight `[width * llm_size, names]`, a slot's `width` queries end to end.
    """

    def __init__(self, config: QFormerConfig, rng: Rng) -> None:
        super().__init__()
        self.config = config
        sizes = config.hidden_size, config.memory_names
        self.scores = [Linear(*sizes, rng, name=f"name_scores_{slot}") for slot in range(config.memory_slots)]
        self.worth = Linear(config.memory_names, config.memory_names, rng, bias=False)
        self.worth.trainable = False
        self.values = Linear(config.memory_names, config.memory_width * config.llm_size, rng, bias=False)

    def call(self, summary: Tensor) -> Tensor:  # noqa: D102
        likely = ops.softmax(ops.concatenate([score(summary) for score in self.scores], axis=1), axis=-1)
        shares = self.worth(likely)
        for _ in range(_SQUARINGS):  # to shares of one each time, so that integers hold the last as well as the first
            shares = ops.square(shares * ops.rsqrt(ops.sum(ops.square(shares), axis=-1, keepdims=True)))
        return ops.reshape(self.values(shares), (-1, self.config.num_queries, self.config.llm_size))
