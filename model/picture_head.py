"""Where an illustrated story would come from: the decoder's state to the features of the picture that comes next."""

from __future__ import annotations

from keras import ops

from model.layers import Linear, Module, Tensor, generator, normal


class PictureHead(Module):
    """Learnable picture queries that read the decoder's state (SEED-Story, arXiv 2407.08683, section 3.2).

    In: hidden states float32 `[n, hidden_size]`, each at the token that begins a picture. Out: float32
    `[n, num_queries, vision_size]`, what the ViT would say of the picture, its class token first.
    """

    def __init__(self, hidden_size: int, vision_size: int, num_queries: int, seed: int = 0) -> None:
        super().__init__()
        rng = generator(seed)
        self.queries = self.parameter("queries", normal(rng, 1, num_queries, hidden_size))
        self.fc1 = Linear(hidden_size, hidden_size, rng)
        self.fc2 = Linear(hidden_size, vision_size, rng)

    def call(self, hidden: Tensor) -> Tensor:  # noqa: D102
        return self.fc2(ops.gelu(self.fc1(hidden[:, None] + self.queries), approximate=False))


def cosine_distance(said: Tensor, seen: Tensor) -> Tensor:
    """One minus the cosine of the last axes, averaged over the others but the first: `[n, ..., size]` to `[n]`."""
    dot = ops.sum(said * seen, axis=-1)
    sizes = ops.sqrt(ops.sum(ops.square(said), axis=-1) * ops.sum(ops.square(seen), axis=-1) + 1e-12)
    distance = 1 - dot / sizes
    return ops.mean(ops.reshape(distance, (ops.shape(distance)[0], -1)), axis=1)
