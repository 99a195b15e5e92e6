"""`seed-story inspect`: what a bundle is, in words and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from seed_story.bundle import TOKENIZER, Bundle, Manifest, graph_file
from seed_story.config import LlamaConfig, QFormerConfig, StoryConfig, VisionConfig
from seed_story.contract import BEGIN_PICTURE, DECODER, END_PICTURE, QFORMER, VIT, cache_specs
from seed_story.errors import BundleError
from seed_story.output import size_text, table, write, write_json

_MOST_TOKENS = 8  # special tokens that the text form names; the JSON form has all


def inspect(path: str, *, as_json: bool) -> int:
    """Verifies a bundle and prints what it is.

    Raises:
        BundleError: it is missing, damaged, or of another version.
    """
    description = describe(Bundle.open(path, afresh=True))
    if as_json:
        write_json(description)
    else:
        write(render(description))
    return 0


def vision_parameters(config: VisionConfig) -> int:
    """Weights of the vision graph: only the blocks up to `feature_layer` are in it, and one position grid."""
    size, wide = config.hidden_size, config.intermediate_size
    embeddings = config.patch_size**2 * 3 * size + size + size + config.tokens * size  # patches, class, positions
    attention, mlp = 4 * (size * size + size), 2 * size * wide + wide + size
    block = attention + mlp + 4 * size + (2 * size if config.layer_scale else 0)
    return embeddings + config.feature_layer * block + (2 * size if config.final_norm else 0)


def qformer_parameters(config: QFormerConfig) -> int:
    """Weights of the Q-Former, without its training-only parts."""
    size, wide, source = config.hidden_size, config.intermediate_size, config.vision_size
    self_attention = 4 * (size * size + size)
    cross_attention = 2 * (size * size + size) + 2 * (source * size + size)
    mlp = 2 * size * wide + wide + size
    layer = self_attention + cross_attention + mlp + 9 * size  # three norms of two vectors, three Layer Scales
    summary = 3 * source  # class token, mean and maximum of the patches
    ends = 2 * config.num_queries * size + 2 * source + 2 * summary + (summary + 1) * size + 2 * size
    ends += (size + 1) * config.llm_size
    ends += config.memory_names * (config.memory_slots * (size + 1) + config.memory_width * config.llm_size)
    ends += config.memory_names**2  # what each name is worth, said of another thing
    return config.num_layers * layer + ends


def llama_parameters(config: LlamaConfig) -> int:
    """Weights of the decoder; a tied head counts once."""
    size, heads, kv_heads = config.hidden_size, config.num_heads, config.num_kv_heads
    attention = 2 * size * heads * config.head_dim + 2 * size * kv_heads * config.head_dim
    layer = attention + 3 * size * config.intermediate_size + 2 * size
    tables = config.vocab_size * size * (1 if config.tie_word_embeddings else 2)
    return tables + config.num_layers * layer + size


def _architecture(story: StoryConfig) -> dict[str, dict[str, Any]]:
    vision, qformer, llama = story.vision, story.qformer, story.llama
    return {
        VIT: {
            "words": f"{'DINOv2 ViT' if vision.layer_scale else 'ViT'}, {vision.image_size} px in patches of "
            f"{vision.patch_size}, {vision.feature_layer} of {vision.num_layers} layers, width "
            f"{vision.hidden_size}, {vision.num_heads} heads -> {vision.tokens} features",
            "parameters": vision_parameters(vision),
        },
        QFORMER: {
            "words": f"Q-Former, {qformer.num_layers} layers, width {qformer.hidden_size}, "
            f"{qformer.num_heads} heads -> {qformer.num_queries} embeddings of {qformer.llm_size}",
            "parameters": qformer_parameters(qformer),
        },
        DECODER: {
            "words": f"LLaMA, {llama.num_layers} layers, width {llama.hidden_size}, {llama.num_heads} heads "
            f"({llama.num_kv_heads} for keys and values) of {llama.head_dim}, "
            f"vocabulary {llama.vocab_size:,}",
            "parameters": llama_parameters(llama),
        },
    }


def cache_bytes(manifest: Manifest) -> int:
    """The memory of the cache's keys and values; no story makes it larger."""
    specs = cache_specs(manifest.story.llama, manifest.cache.slots, manifest.sink_rows)
    return sum(math.prod(spec.shape) * np.dtype(spec.dtype).itemsize for spec in specs)


def special_tokens(bundle: Bundle) -> dict[str, int]:
    """The tokenizer's control tokens and their ids, in the order of the ids.

    Raises:
        BundleError: the tokenizer can't be read.
    """
    try:
        tokens = json.loads(bundle.file(TOKENIZER).read_text(encoding="utf-8"))["added_tokens"]
        return dict(sorted(((t["content"], t["id"]) for t in tokens if t["special"]), key=lambda item: item[1]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{TOKENIZER} can't be read", got=error, hint="Export the bundle again.") from error


def describe(bundle: Bundle) -> dict[str, Any]:
    """A verified bundle as JSON values."""
    manifest, cache = bundle.manifest, bundle.manifest.cache
    return {
        "name": manifest.name,
        "path": str(bundle.path),
        "verified": True,  # Bundle.open refuses it otherwise
        "recipe": manifest.recipe,
        "qformer_trained": manifest.qformer_trained,
        "bytes": sum(size for _, size in manifest.files.values()),
        "architecture": _architecture(manifest.story),
        "cache": {
            "policy": cache.policy,
            **cache.to_dict(),
            "ring": cache.ring,
            "dtype": manifest.cache_dtype,
            "bytes": cache_bytes(manifest),
        },
        "graphs": {
            graph: {
                "bytes": manifest.files[graph_file(graph)][1],
                "signatures": {entry.name: entry.to_dict() for entry in entries},
            }
            for graph, entries in manifest.contract.items()
        },
        "files": {name: {"sha256": sha, "bytes": size} for name, (sha, size) in manifest.files.items()},
        "prompt": {
            "opening": manifest.prompt.opening,
            "request": manifest.prompt.request,
            "end_tokens": list(manifest.prompt.end_tokens),
            "picture_tokens": [BEGIN_PICTURE, END_PICTURE],
        },
        "special_tokens": special_tokens(bundle),
        "parity": dict(manifest.parity),
        "missed_bounds": dict(manifest.missed_bounds),
        "weights": manifest.weights,
        "versions": dict(manifest.versions),
        "licences": dict(manifest.licences),
    }


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"


def render(description: Mapping[str, Any]) -> str:
    """A description as text for a reader."""
    cache, prompt = description["cache"], description["prompt"]
    tokens = list(description["special_tokens"])
    more = f" and {len(tokens) - _MOST_TOKENS} more" if len(tokens) > _MOST_TOKENS else ""
    trained = "trained" if description["qformer_trained"] else "untrained: pictures don't influence the story yet"
    anchors = f" + {cache['anchors']} picture anchors" if cache["anchors"] else ""
    policy = cache["policy"] + (f", {cache['picture_eviction']}" if cache["anchors"] else "")
    rows = [
        ("bundle", f"{description['name']}, {description['path']}"),
        ("files", f"{len(description['files'])}, {size_text(description['bytes'])}, all verified"),
        ("recipe", description["recipe"]),
        ("networks", "\n".join(_network(*item) for item in description["architecture"].items())),
        ("Q-Former", trained),
        ("cache", f"{cache['slots']} slots = {cache['sinks']} sinks{anchors} + a ring of {cache['ring']} "
                  f"({policy}), {cache['dtype']}, {size_text(cache['bytes'])} in memory"),
        ("graphs", "\n".join(_graph(*item) for item in description["graphs"].items())),
        ("opening", repr(prompt["opening"]) if prompt["opening"] else "none"),
        ("request", repr(prompt["request"]) if prompt["request"] else "none"),
        ("ends at", ", ".join(prompt["end_tokens"]) or "nothing"),
        ("pictures", " ... ".join(prompt["picture_tokens"])),
        ("specials", f"{len(tokens)}: {', '.join(tokens[:_MOST_TOKENS])}{more}"),
        ("parity", _lines(description["parity"])),
        ("gate", _gate(description["missed_bounds"])),
        ("made with", _lines(description["versions"])),
        ("licences", _lines(description["licences"])),
    ]  # fmt: skip
    return table(rows)


def _network(graph: str, network: Mapping[str, Any]) -> str:
    return f"{graph}: {network['words']}; about {_count(network['parameters'])} parameters"


def _graph(graph: str, facts: Mapping[str, Any]) -> str:
    return f"{graph_file(graph)}: {size_text(facts['bytes'])}: {', '.join(facts['signatures'])}"


def _gate(missed: Mapping[str, Any]) -> str:
    return f"MISSED, and written with --force:\n{_lines(missed)}" if missed else "passed"


def _lines(values: Mapping[str, Any], prefix: str = "") -> str:
    """Nested figures, one a line, with dotted names."""
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines.append(_lines(value, f"{prefix}{name}."))
        else:
            lines.append(f"{prefix}{name}: {f'{value:.4g}' if isinstance(value, float) else value}")
    return "\n".join(line for line in lines if line) or "none"
