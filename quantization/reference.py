"""What a bundle can be measured beside: a bundle of the same weights whose graphs are all float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from seed_story.bundle import TOKENIZER, Bundle, Manifest, graph_file
from seed_story.config import CacheConfig
from seed_story.contract import DECODER, GRAPHS, Steps
from seed_story.errors import UsageError
from seed_story.policies import MULTIMODAL_SINK

FLOAT, ROTATED = "float32", "float32-rotated"
"""The recipes of references."""

_PLAIN = {getattr(schema.TensorType, name) for name in ("FLOAT32", "INT32", "INT64", "BOOL")}
"""Types of weights, positions, shapes and masks in a graph that nobody quantized."""


def check_reference(reference: Bundle, bundles: Sequence[Bundle]) -> None:
    """Whether the bundles can be compared with the reference.

    Raises:
        UsageError: it isn't float32, or a bundle is of other weights, or reads stories in another way.
    """
    if not is_float(reference):
        raise UsageError(f"the reference {reference.path} isn't {FLOAT}", got=reference.manifest.recipe,
                         expected=f"{FLOAT} or {ROTATED}",
                         hint="Export one with --recipe float32, and give it with --reference.")  # fmt: skip
    for bundle in (reference, *bundles):
        if not bundle.manifest.weights:
            raise UsageError(f"{bundle.path} doesn't say which weights it was made from", hint="Export it again.")
    theirs = _reading(reference)
    for bundle in bundles:
        mine = _reading(bundle)
        different = [name for name in theirs if mine[name] != theirs[name]]
        if different:
            raise UsageError(f"{bundle.path} can't be compared with {reference.path}", got=f"other {different[0]}",
                             expected=f"the same {', '.join(theirs)}",
                             hint="Export the reference with the bundle's options and --recipe float32.")  # fmt: skip


def check_matrices(reference: Bundle, bundles: Sequence[Bundle]) -> None:
    """Whether the bundles' matrices are the reference's, beside which each can be looked at alone.

    Raises:
        UsageError: a bundle's decoder is rotated and the reference's isn't, or the other way round.
    """
    turned = is_rotated(reference)
    for bundle in bundles:
        if is_rotated(bundle) != turned:
            recipe = FLOAT if turned else ROTATED
            words = "rotated", "not rotated"
            raise UsageError(
                f"{bundle.path} has other matrices than {reference.path}",
                got=f"a decoder that is {words[turned]} beside a reference that is {words[not turned]}",
                expected=f"a reference of the recipe {recipe}",
                hint=f"Make it: {export_command(bundle.manifest, recipe)} (and the bundle's own --checkpoint, --llama, "
                f"--vision and --trim-vocabulary, if it had any), then give --reference build/{recipe}.",
            )


def is_float(bundle: Bundle) -> bool:
    """Whether nothing in its graphs is quantized."""
    return all(kind in _PLAIN for graph in GRAPHS for _, kind in _tensors(bundle, graph))


def is_rotated(bundle: Bundle) -> bool:
    """Whether its decoder's residual stream is turned (`export/rotation.py`)."""
    return any(name.split("/")[1:] == ["rotated_norm"] for name, _ in _tensors(bundle, DECODER))


def export_command(manifest: Manifest, recipe: str) -> str:
    """The command that exports the bundle's model with another recipe, as far as a manifest tells its options."""
    cache, usual = manifest.cache, CacheConfig()
    words = ["python -m export", f"--model {manifest.name}", f"--recipe {recipe}"]
    words += [f"--{name} {getattr(cache, name)}" for name in ("slots", "sinks")
              if getattr(cache, name) != getattr(usual, name)]  # fmt: skip
    if cache.policy == MULTIMODAL_SINK:
        words.append(f"--policy {MULTIMODAL_SINK} --pictures {cache.pictures} --picture-begin {cache.picture_begin} "
                     f"--picture-end {cache.picture_end} --picture-eviction {cache.picture_eviction}")  # fmt: skip
    words += [" ".join([f"--{name}", *map(str, getattr(manifest.steps, name))]) for name in ("prefill", "begin")
              if getattr(manifest.steps, name) != getattr(Steps, name)]  # fmt: skip
    if not manifest.steps.attention:
        words.append("--no-attention")
    return " ".join([*words, f"--out build/{recipe}"])


def _reading(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "weights": manifest.weights,
        "tokenizer": manifest.files[TOKENIZER][0],
        "prompt": manifest.prompt,
        "cache": manifest.cache,
    }


def _tensors(bundle: Bundle, graph: str) -> Iterator[tuple[str, int]]:
    """Names and types of all signatures' tensors; contents are not read."""
    model = schema.Model.GetRootAs(np.memmap(bundle.file(graph_file(graph)), np.uint8, "r"), 0)
    for number in range(model.SubgraphsLength()):
        part = model.Subgraphs(number)
        for index in range(part.TensorsLength()):
            tensor = part.Tensors(index)
            yield tensor.Name().decode(), tensor.Type()
