"""StreamingLLM on LLaMA, as slowly and plainly as possible, in float64: what the decoder is measured against.

It keeps the un-rotated key and the value of EVERY token for ever. At every token it gathers those that
StreamingLLM (arXiv 2309.17453, section 3.2) keeps, the sinks and the newest ones, and between them those that
SEED-Story (arXiv 2407.08683, section 3.3) keeps of the pictures that left; gives them the positions 0 to m - 1 which
they have inside the cache, rotates all keys anew, and attends. No ring, no slots, no mask, no absolute positions, no
state but the tokens, and no code of this project but the class that holds the sizes.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from seed_story.config import LlamaConfig

Array = npt.NDArray[np.float64]
Attention = Mapping[int, Mapping[int, float]]
"""Of some tokens, how much each looked at which: mean over layers and heads, 1 in all."""

NOBODY_ASKED: Attention = {}


def frequencies(config: LlamaConfig) -> Array:
    """Radians a token of each pair of channels; scalings as in `transformers.modeling_rope_utils`."""
    plain = 1.0 / config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    assert scaling.kind == "llama3"
    longest = scaling.original_max_position / scaling.low_freq_factor
    shortest = scaling.original_max_position / scaling.high_freq_factor
    scaled = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < shortest:
            scaled.append(frequency)
        elif wavelength > longest:
            scaled.append(frequency / scaling.factor)
        else:
            smooth = scaling.original_max_position / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            scaled.append((1 - smooth) * frequency / scaling.factor + smooth * frequency)
    return np.array(scaled)


@dataclass(frozen=True)
class Gallery:
    """What is kept of pictures that left.

    Args:
        room: for how many pictures.
        begin, end: how many of a picture's first and last tokens.
        keep_first: whether the first picture never gives up its place.
        decay: if given, the picture goes whose anchors were looked at least: what each of the tokens that were asked
            said, multiplied by this for each that was asked after it.
    """

    room: int
    begin: int
    end: int
    keep_first: bool = False
    decay: float | None = None

    def anchors(self, picture: range) -> list[int]:
        """What is kept of a picture."""
        return [*picture[: self.begin], *picture[len(picture) - self.end :]]

    def mass(self, picture: range, before: int, attention: Attention) -> float:
        """How much its anchors were looked at since it was there, by tokens before the one that is named."""
        total = 0.0
        for token, looks in attention.items():
            if picture.stop <= token < before:
                total = total * (self.decay or 0) + sum(looks.get(t, 0) for t in self.anchors(picture))
        return total

    def hang(self, gone: Sequence[range], newest: int, attention: Attention) -> list[range]:
        """The pictures on the wall, from left to right, after these left one after the other."""
        wall: list[range] = []
        for picture in gone:
            if len(wall) < self.room:
                wall.append(picture)
            elif self.decay is not None:
                left = picture.start + newest  # the first token that doesn't see it
                least = min(sorted(wall, key=lambda p: p.start), key=lambda p: self.mass(p, left, attention))
                wall[wall.index(least)] = picture
            elif old := sorted(wall, key=lambda p: p.start)[self.keep_first :]:
                wall[wall.index(old[0])] = picture
        return wall


NO_GALLERY = Gallery(0, 0, 0)


def seen(
    token: int,
    sinks: int,
    newest: int,
    pictures: Sequence[range] = (),
    gallery: Gallery = NO_GALLERY,
    attention: Attention = NOBODY_ASKED,
) -> list[int]:
    """The tokens that `token` looks at, in the order of their positions inside the cache.

    Args:
        sinks: how many first tokens every token sees.
        newest: how many of the other tokens it sees at most, itself included.
        pictures: the tokens of each picture of the story. It is gone, all of it at once, when the first of its tokens
            that is no sink isn't among the newest.
        attention: what the tokens that were asked looked at.
    """
    everything = range(token + 1)
    others = everything[sinks:]
    others = others[max(0, len(others) - newest) :]
    if not gallery.room:
        return [*everything[:sinks], *others]
    pictures = [range(max(p.start, sinks), p.stop) for p in pictures]
    gone = [p for p in pictures if len(p) >= gallery.begin + gallery.end and others and p.start < others.start]
    anchors = [t for p in gallery.hang(gone, newest, attention) for t in gallery.anchors(p)]
    last_gone = max((p.stop for p in gone), default=0)
    return [*everything[:sinks], *anchors, *(t for t in others if t >= last_gone)]


class StreamingLlama:
    """A LLaMA that tells for ever.

    Args:
        weights: in the names of `transformers.LlamaForCausalLM`.
        sinks: how many first tokens every token sees.
        newest: how many of the other tokens it sees, itself included.
        gallery: what it keeps of pictures.

    Attributes:
        pictures: the tokens of each picture; add each before the first of its tokens is told.
        asked: the tokens whose attention counts for the gallery.
        attention: what every token looked at.
        keys, values: by layer, by token: `[kv_heads, head_dim]`; keys are not rotated.
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: Mapping[str, npt.NDArray[np.float32]],
        sinks: int,
        newest: int,
        gallery: Gallery = NO_GALLERY,
    ) -> None:
        self.config, self.sinks, self.newest, self.gallery = config, sinks, newest, gallery
        self.pictures: list[range] = []
        self.asked: Container[int] = ()
        self.attention: list[dict[int, float]] = []
        self.weights = {name: np.asarray(weight, np.float64) for name, weight in weights.items()}
        self.keys: list[list[Array]] = [[] for _ in range(config.num_layers)]
        self.values: list[list[Array]] = [[] for _ in range(config.num_layers)]
        self._frequencies = frequencies(config)

    def seen(self, token: int) -> list[int]:
        """The tokens that `token` looks at, in their order inside the cache."""
        attention = {t: looks for t, looks in enumerate(self.attention[:token]) if t in self.asked}
        return seen(token, self.sinks, self.newest, self.pictures, self.gallery, attention)

    def rotate(self, x: Array, position: int) -> Array:
        """Turns channel i together with channel i + d/2: the real and the imaginary part of one number."""
        half = x.shape[-1] // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position * self._frequencies)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def step(self, embedding: npt.ArrayLike) -> Array:
        """The logits `[vocab]` after one more token, given as an embedding `[hidden]`."""
        x = np.asarray(embedding, np.float64)
        self.attention.append({})
        for layer in range(self.config.num_layers):
            block = f"model.layers.{layer}."
            x = x + self._attend(layer, self._norm(x, block + "input_layernorm"))
            y = self._norm(x, block + "post_attention_layernorm")
            gate, up = (self._linear(y, f"{block}mlp.{part}_proj") for part in ("gate", "up"))
            x = x + self._linear(gate / (1 + np.exp(-gate)) * up, block + "mlp.down_proj")
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return self._linear(self._norm(x, "model.norm"), head)

    def feed(self, embeddings: Sequence[npt.ArrayLike] | npt.NDArray[np.float32]) -> Array:
        """The logits `[n, vocab]` after each of n more tokens."""
        return np.stack([self.step(embedding) for embedding in embeddings])

    def _linear(self, x: Array, name: str) -> Array:
        return self.weights[name + ".weight"] @ x

    def _norm(self, x: Array, name: str) -> Array:
        return x / np.sqrt(np.mean(x**2) + self.config.rms_norm_eps) * self.weights[name + ".weight"]

    def _attend(self, layer: int, x: Array) -> Array:
        config, name = self.config, f"model.layers.{layer}.self_attn."
        queries, key, value = (
            self._linear(x, f"{name}{part}_proj").reshape(-1, config.head_dim) for part in ("q", "k", "v")
        )
        self.keys[layer].append(key)
        self.values[layer].append(value)
        seen = self.seen(len(self.keys[layer]) - 1)
        looks = self.attention[-1]
        heads = []
        for head, query in enumerate(queries):
            shared = head // (config.num_heads // config.num_kv_heads)
            query = self.rotate(query, len(seen) - 1)
            keys = [self.rotate(self.keys[layer][token][shared], place) for place, token in enumerate(seen)]
            scores = np.array(keys) @ query / math.sqrt(config.head_dim)
            weights = np.exp(scores - scores.max())
            values = np.array([self.values[layer][token][shared] for token in seen])
            weights /= weights.sum()
            heads.append(weights @ values)
            for token, weight in zip(seen, weights, strict=True):
                looks[token] = looks.get(token, 0) + float(weight) / (config.num_layers * config.num_heads)
        return self._linear(np.concatenate(heads), name + "o_proj")
