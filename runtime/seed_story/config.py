"""The sizes of the networks and of the cache, as frozen dataclasses that every side shares.

`from_hf` reads a `transformers` configuration strictly: a key that is neither consumed nor known to be harmless
raises, so that no setting that changes the arithmetic can be dropped in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from seed_story.errors import ConfigError
from seed_story.policies import ATTENTION_MASS, MULTIMODAL_SINK, OLDEST, PICTURE_EVICTIONS, POLICIES, TEXT_SINK, WINDOW

FLOAT32, INT8 = "float32", "int8"
CACHE_DTYPES = (FLOAT32, INT8)
"""What the keys and values of a cache may be."""

# Keys of a transformers configuration that don't change what a network computes.
_BOOKKEEPING = frozenset(
    [
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "dtype",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "is_llama_config",
        "label2id",
        "max_position_embeddings",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "rope_interleaved",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "use_cache",
        "use_return_dict",
    ]
)


def _require(condition: bool, what: str, got: object, expected: object, hint: str = "") -> None:
    if not condition:
        raise ConfigError(what, got=got, expected=expected, hint=hint)


class _HfReader:
    """Takes keys out of a transformers configuration and complains about what is left."""

    def __init__(self, config: Mapping[str, Any], model_types: tuple[str, ...]) -> None:
        self._left = dict(config)
        model_type = self._left.get("model_type")
        _require(model_type in model_types, "model_type isn't supported", model_type, " or ".join(model_types))

    def take(self, key: str, default: Any = None, *, required: bool = False) -> Any:
        if required and key not in self._left:
            raise ConfigError(f"the configuration lacks {key!r}", got=sorted(self._left)[:10])
        return self._left.pop(key, default)

    def must_be(self, key: str, *allowed: Any) -> None:
        """A setting that this project has one form of; absent counts as the first allowed value."""
        value = self._left.pop(key, allowed[0])
        _require(value in allowed, f"{key} isn't supported", value, allowed[0])

    def finish(self) -> None:
        unknown = sorted(set(self._left) - _BOOKKEEPING)
        if unknown:
            raise ConfigError(
                "the configuration has keys that this project doesn't know",
                got=unknown[:10],
                hint="Each may change the arithmetic: add support, or list it as bookkeeping in seed_story/config.py.",
            )


class _Config:
    """What all configurations can do: to and from plain JSON."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)  # type: ignore[call-overload,no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; raises ConfigError when a field is missing or unknown."""
        names = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        if set(values) != names:
            raise ConfigError(f"{cls.__name__} has other fields", got=sorted(values), expected=sorted(names))
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class VisionConfig(_Config):
    """A vision transformer: DINOv2 (layer_scale, position grid of another size) or the plain HF ViT.

    Args:
        feature_layer: the features are the output of this many blocks (1 to num_layers).
        final_norm: whether the network's last LayerNorm is applied to the features.
        pretrained_grid: side of the stored position grid, in patches; interpolated to `grid`.
        image_mean, image_std: per channel, for pixels in 0..1; folded into the graph.
        trainable_blocks: how many last blocks training may change (the paper's recipe: 4).
    """

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_layers: int = 12
    num_heads: int = 6
    layer_norm_eps: float = 1e-6
    layer_scale: bool = True
    pretrained_grid: int = 37
    feature_layer: int = 11
    final_norm: bool = False
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    trainable_blocks: int = 4

    def __post_init__(self) -> None:
        _require(self.image_size % self.patch_size == 0, "image_size isn't a multiple of patch_size",
                 self.image_size, f"a multiple of {self.patch_size}")  # fmt: skip
        _require(self.hidden_size % self.num_heads == 0, "hidden_size isn't a multiple of num_heads",
                 self.hidden_size, f"a multiple of {self.num_heads}")  # fmt: skip
        _require(1 <= self.feature_layer <= self.num_layers, "feature_layer is out of range",
                 self.feature_layer, f"1 to {self.num_layers}")  # fmt: skip
        _require(0 <= self.trainable_blocks <= self.num_layers, "trainable_blocks is out of range",
                 self.trainable_blocks, f"0 to {self.num_layers}")  # fmt: skip

    @property
    def grid(self) -> int:
        """Patches along one side of the picture."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Rows of the features: the class token and the patches."""
        return self.grid**2 + 1

    @classmethod
    def tiny(cls) -> Self:
        """A few thousand parameters, for tests."""
        return cls(image_size=28, hidden_size=16, intermediate_size=32, num_layers=3, num_heads=2,
                   pretrained_grid=3, feature_layer=2, trainable_blocks=1)  # fmt: skip

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, image_size: int = 224, feature_layer: int | None = None) -> Self:
        """From a `Dinov2Config` or `ViTConfig` dictionary.

        Args:
            image_size: side of the pictures the graph takes, in pixels.
            feature_layer: see the class; by default the last block, with the final norm.
        """
        reader = _HfReader(config, ("dinov2", "vit"))
        dinov2 = reader.take("model_type") == "dinov2"
        hidden_size = reader.take("hidden_size", 768)
        num_layers = reader.take("num_hidden_layers", 12)
        patch_size = reader.take("patch_size", 14 if dinov2 else 16)
        trained_size = reader.take("image_size", 518 if dinov2 else 224)
        reader.must_be("hidden_act", "gelu")
        reader.must_be("qkv_bias", True)
        reader.must_be("num_channels", 3)
        for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "layerscale_value",
                    "out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states",
                    "use_mask_token", "encoder_stride", "pooler_output_size", "pooler_act"):  # fmt: skip
            reader.take(key)  # training only, or about outputs that this project doesn't use
        if dinov2:
            reader.must_be("use_swiglu_ffn", False)
            intermediate_size = hidden_size * reader.take("mlp_ratio", 4)
        else:
            intermediate_size = reader.take("intermediate_size", 3072)
        made = cls(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_layers=num_layers,
            num_heads=reader.take("num_attention_heads", 12),
            layer_norm_eps=reader.take("layer_norm_eps", 1e-6 if dinov2 else 1e-12),
            layer_scale=dinov2,
            pretrained_grid=trained_size // patch_size,
            feature_layer=feature_layer or num_layers,
            final_norm=feature_layer is None,
            image_mean=cls.image_mean if dinov2 else (0.5, 0.5, 0.5),
            image_std=cls.image_std if dinov2 else (0.5, 0.5, 0.5),
            trainable_blocks=min(4, num_layers),
        )
        reader.finish()
        return made


@dataclass(frozen=True)
class QFormerConfig(_Config):
    """A Q-Former: learnable queries that read a picture's features.

    Args:
        groups: groups of the Group Normalization (divides hidden_size).
        layer_scale_init: the starting value of every Layer Scale vector; 0.1 for so few layers (arXiv 2103.17239).
        patch_pool: the queries see the means of squares of so many patches a side; 1 for the patches themselves.
        memory_names: names that the queries can recall; 0 for a Q-Former without a memory of names.
        memory_slots: how many names are recalled of a picture; each by an equal share of the queries.
        vision_size, llm_size: widths of what comes in and of what goes out.
    """

    num_queries: int = 16
    hidden_size: int = 384
    intermediate_size: int = 1536
    num_layers: int = 2
    num_heads: int = 6
    groups: int = 8
    dropout: float = 0.3
    layer_scale_init: float = 0.1
    norm_eps: float = 1e-5
    patch_pool: int = 2
    memory_names: int = 0
    memory_slots: int = 4
    vision_size: int = 384
    llm_size: int = 576

    def __post_init__(self) -> None:
        for name in ("num_heads", "groups"):
            _require(self.hidden_size % getattr(self, name) == 0, f"hidden_size isn't a multiple of {name}",
                     self.hidden_size, f"a multiple of {getattr(self, name)}")  # fmt: skip
        _require(not self.memory_names or self.num_queries % self.memory_slots == 0,
                 "memory_slots doesn't divide num_queries", self.memory_slots,
                 f"a divisor of {self.num_queries}")  # fmt: skip

    @property
    def memory_width(self) -> int:
        """Queries that recall one name."""
        return self.num_queries // self.memory_slots

    @classmethod
    def tiny(cls) -> Self:
        """A few thousand parameters, for tests; fits `VisionConfig.tiny()` and `LlamaConfig.tiny()`."""
        return cls(num_queries=4, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, groups=4,
                   patch_pool=1, vision_size=16, llm_size=24)  # fmt: skip


@dataclass(frozen=True)
class RopeScaling(_Config):
    """How RoPE's frequencies are stretched for longer contexts.

    Args:
        kind: `linear` (all frequencies divided by factor) or `llama3` (Llama 3.1's smooth band).
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        _require(self.kind in ("linear", "llama3"), "rope scaling isn't supported", self.kind, "linear or llama3")


@dataclass(frozen=True)
class LlamaConfig(_Config):
    """A LLaMA decoder: Llama 2 and 3, TinyLlama, SmolLM2 and their family.

    Args:
        max_position: the longest sequence it was trained on; the attention sink does not need more.
    """

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    rope_theta: float = 100_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    max_position: int = 8192

    def __post_init__(self) -> None:
        _require(self.num_heads % self.num_kv_heads == 0, "num_heads isn't a multiple of num_kv_heads",
                 self.num_heads, f"a multiple of {self.num_kv_heads}")  # fmt: skip
        _require(self.head_dim % 2 == 0, "head_dim is odd", self.head_dim, "an even number")

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_heads // self.num_kv_heads

    @classmethod
    def tiny(cls) -> Self:
        """A few thousand parameters, for tests."""
        return cls(vocab_size=320, hidden_size=24, intermediate_size=48, num_layers=2, num_heads=6, num_kv_heads=2,
                   head_dim=8, rope_theta=10_000.0, max_position=128)  # fmt: skip

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        scaling = values.get("rope_scaling")
        return super().from_dict({**values, "rope_scaling": scaling and RopeScaling.from_dict(scaling)})

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From a `transformers.LlamaConfig` dictionary (both spellings of the rope keys)."""
        reader = _HfReader(config, ("llama",))
        reader.take("model_type")
        reader.must_be("hidden_act", "silu")
        reader.must_be("attention_bias", False)
        reader.must_be("mlp_bias", False)
        reader.take("attention_dropout")  # training only
        hidden_size = reader.take("hidden_size", required=True)
        num_heads = reader.take("num_attention_heads", required=True)
        rope = dict(reader.take("rope_parameters") or reader.take("rope_scaling") or {})
        reader.take("rope_scaling")
        theta = rope.pop("rope_theta", None)
        max_position = config.get("max_position_embeddings", 2048)
        made = cls(
            vocab_size=reader.take("vocab_size", required=True),
            hidden_size=hidden_size,
            intermediate_size=reader.take("intermediate_size", required=True),
            num_layers=reader.take("num_hidden_layers", required=True),
            num_heads=num_heads,
            num_kv_heads=reader.take("num_key_value_heads") or num_heads,
            head_dim=reader.take("head_dim") or hidden_size // num_heads,
            rope_theta=float(reader.take("rope_theta", None) or theta or 10_000.0),
            rope_scaling=_rope_scaling(rope, max_position),
            rms_norm_eps=reader.take("rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(reader.take("tie_word_embeddings", False)),
            max_position=max_position,
        )
        reader.finish()
        return made


def _rope_scaling(rope: dict[str, Any], max_position: int) -> RopeScaling | None:
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if kind == "default":
        return None
    made = RopeScaling(
        kind=kind,
        factor=float(rope.pop("factor")),
        low_freq_factor=float(rope.pop("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.pop("high_freq_factor", 4.0)),
        original_max_position=int(rope.pop("original_max_position_embeddings", max_position)),
    )
    if rope:
        raise ConfigError("rope scaling has unknown keys", got=sorted(rope))
    return made


def kept_limit(slots: int) -> int:
    """How many of a float32 cache's slots may be kept: a prefill scores them by both rotations, the others by one.

    A quarter: twice what the sinks and the usual anchors take. In a small cache more.
    """
    return max(slots // 4, min(slots - 1, 16))


@dataclass(frozen=True)
class CacheConfig(_Config):
    """The geometry of the cache, `[text sinks | picture anchors | ring]`, and which pictures it remembers.

    Args:
        slots: all of them, fixed for ever.
        sinks: the first tokens of the story, kept for ever (StreamingLLM, arXiv 2309.17453).
        anchors: kept for picture tokens that left the ring (SEED-Story, arXiv 2407.08683); 0 for none.
        picture_begin, picture_end: how many of a picture's first and last tokens become its anchors.
        picture_eviction: one of `PICTURE_EVICTIONS`.
    """

    slots: int = 512
    sinks: int = 4
    anchors: int = 0
    picture_begin: int = 2
    picture_end: int = 4
    picture_eviction: str = OLDEST

    def __post_init__(self) -> None:
        regions = (self.sinks, self.anchors, self.picture_begin, self.picture_end)
        _require(min(regions) >= 0, "a region of the cache is negative", regions, "0 or more")
        _require(self.ring >= 1, "the cache has no room for a ring", self.slots, f"more than {self.kept} slots")
        _require(self.anchors % max(1, self.picture_anchors) == 0, "the anchors are no whole number of pictures",
                 self.anchors, f"a multiple of {self.picture_anchors}")  # fmt: skip
        _require(self.picture_eviction in PICTURE_EVICTIONS, "the picture eviction isn't known",
                 self.picture_eviction, " or ".join(PICTURE_EVICTIONS))  # fmt: skip

    @property
    def kept(self) -> int:
        """Slots that never rotate out: sinks and anchors."""
        return self.sinks + self.anchors

    @property
    def ring(self) -> int:
        """Slots of the ring, which holds the newest tokens."""
        return self.slots - self.kept

    @property
    def picture_anchors(self) -> int:
        """Anchors of one picture."""
        return self.picture_begin + self.picture_end

    @property
    def pictures(self) -> int:
        """Pictures that the anchors' place has room for."""
        return self.anchors // self.picture_anchors if self.picture_anchors else 0

    def sink_rows(self, dtype: str) -> int | None:
        """The float32 rows beside an int8 cache in a bundle of this geometry: as many as slots are kept, at least one.

        Args:
            dtype: one of `CACHE_DTYPES`; there are none (None) beside a float32 cache.
        """
        return None if dtype == FLOAT32 else max(1, self.kept)

    def check_kept(self, sink_rows: int | None) -> None:
        """Whether the decoder has room for what this geometry keeps.

        Args:
            sink_rows: of its int8 cache; None where its cache is float32.

        Raises:
            ConfigError: it hasn't.
        """
        kind, room = ("float32", kept_limit(self.slots)) if sink_rows is None else ("int8", sink_rows)
        _require(self.kept <= room, f"this {kind} cache has no room for what the policy keeps",
                 f"{self.kept} kept slots ({self.policy})", f"at most {room}",
                 "Keep less, or export the bundle with that policy or more slots.")  # fmt: skip

    @property
    def needs_attention(self) -> bool:
        """Whether what it keeps depends on what the decoder looks at."""
        return self.pictures > 0 and self.picture_eviction == ATTENTION_MASS

    @property
    def policy(self) -> str:
        """Which of `POLICIES` this geometry is."""
        if self.pictures:
            return MULTIMODAL_SINK
        return TEXT_SINK if self.sinks else WINDOW

    def under(self, policy: str, **changes: Any) -> Self:
        """Another policy in the same slots.

        Args:
            policy: one of `POLICIES`. What it needs and this cache lacks is added: the default sinks, and anchors
                for an eighth of the slots.
            changes: fields that shall be otherwise, for example `picture_eviction="first-and-last"`.

        Raises:
            ConfigError: there is no such policy, or a geometry that isn't possible, or isn't of this policy.
        """
        _require(policy in POLICIES, "the cache policy isn't known", policy, " or ".join(POLICIES))
        if policy != MULTIMODAL_SINK:
            changes = {"sinks": (self.sinks or type(self).sinks) if policy == TEXT_SINK else 0, "anchors": 0, **changes}
        elif not self.pictures:
            begin, end = (changes.get(name, getattr(type(self), name)) for name in ("picture_begin", "picture_end"))
            changes = {"picture_begin": begin, "picture_end": end, "anchors": self.usual_anchors(begin, end), **changes}
            changes = {"sinks": self.sinks or type(self).sinks, **changes}
        made = replace(self, **changes)
        _require(made.policy == policy, "the changes make it another policy", made.policy, policy)
        return made

    def usual_anchors(self, begin: int, end: int) -> int:
        """Slots of anchors where nothing else is said: for an eighth of the slots, and at least one picture's.

        Args:
            begin, end: first and last tokens of each picture.
        """
        return max(1, self.slots // 8 // max(1, begin + end)) * (begin + end)

    def check_picture(self, tokens: int) -> None:
        """Whether pictures of so many tokens, the two around it included, fit this geometry.

        Raises:
            ConfigError: a picture has fewer tokens than anchors, or more than the ring has slots.
        """
        if self.pictures:
            _require(self.picture_anchors <= tokens <= self.ring, "pictures don't fit the cache",
                     f"{tokens} tokens each", f"{self.picture_anchors} anchors to {self.ring} ring slots")  # fmt: skip

    @classmethod
    def tiny(cls) -> Self:
        """For tests: wraps after a dozen tokens."""
        return cls(slots=12, sinks=2)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`; a bundle from before there were picture anchors has none."""
        if set(values) == {"slots", "sinks", "anchors"}:
            values = {**values, "picture_begin": 0, "picture_end": 0, "picture_eviction": OLDEST}
        return super().from_dict(values)


@dataclass(frozen=True)
class StoryConfig(_Config):
    """Everything that says what a story model is; the networks' sizes agree with each other."""

    vision: VisionConfig
    qformer: QFormerConfig
    llama: LlamaConfig

    def __post_init__(self) -> None:
        _require(self.qformer.vision_size == self.vision.hidden_size, "the Q-Former reads other features",
                 self.qformer.vision_size, self.vision.hidden_size)  # fmt: skip
        _require(self.qformer.llm_size == self.llama.hidden_size, "the Q-Former writes another width",
                 self.qformer.llm_size, self.llama.hidden_size)  # fmt: skip

    @property
    def picture_tokens(self) -> int:
        """What a picture takes in the decoder: its embeddings and the two tokens around them."""
        return self.qformer.num_queries + 2

    @classmethod
    def tiny(cls) -> Self:
        """For tests."""
        return cls(VisionConfig.tiny(), QFormerConfig.tiny(), LlamaConfig.tiny())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`."""
        return cls(
            VisionConfig.from_dict(values["vision"]),
            QFormerConfig.from_dict(values["qformer"]),
            LlamaConfig.from_dict(values["llama"]),
        )


def rope_frequencies(config: LlamaConfig) -> list[float]:
    """RoPE's angular frequencies, `[head_dim / 2]`, in float64, radians a token.

    Source: RoFormer (arXiv 2104.09864); the llama3 band as in the Llama 3.1 release.
    """
    half = config.head_dim // 2
    base = [config.rope_theta ** (-i / half) for i in range(half)]
    scaling = config.rope_scaling
    if scaling is None:
        return base
    if scaling.kind == "linear":
        return [f / scaling.factor for f in base]
    return [_llama3_frequency(f, scaling) for f in base]


def _llama3_frequency(frequency: float, scaling: RopeScaling) -> float:
    turns = scaling.original_max_position * frequency / (2 * math.pi)
    if turns >= scaling.high_freq_factor:
        return frequency
    if turns <= scaling.low_freq_factor:
        return frequency / scaling.factor
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return (1 - smooth) * frequency / scaling.factor + smooth * frequency
