"""Where a bad bundle leaves the reference: the first graph, and the first matrix of it, that computes something else.

Each matrix is judged by itself: on what ITS bundle fed it, what should have come out by the reference's weights? So an
error that it only inherited isn't held against it. What it inherited is told beside it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantization.surgery import OpenGraph, Runner
from seed_story.bundle import graph_file
from seed_story.cache import SinkCache
from seed_story.config import LlamaConfig
from seed_story.contract import DECODER, ENCODE, GRAPHS, PROJECT, QFORMER, VIT, prefill_name
from seed_story.errors import UsageError
from seed_story.image import load_and_preprocess_image
from seed_story.story import SEEDStory

Inputs = dict[str, npt.NDArray[Any]]

LIMIT = 0.25
"""A matrix's own relative error that is no quantization's: plain int4 measures 0.1, zeros 1."""
_TIMES = 5
"""And that many times its graph's median, so that a recipe that folds scales into all matrices blames none."""


@dataclass(frozen=True)
class Reading:
    """One matrix of a bundle beside the reference's.

    Args:
        own: `|y - x w^T| / |x w^T|`, with the bundle's input and output and the reference's weights.
        inherited: the same of its output beside the reference's output, which earlier layers' errors are part of.
    """

    graph: str
    matrix: str
    own: float
    inherited: float


def first_bad(readings: Sequence[Reading]) -> Reading | None:
    """The first matrix that computes something else; None if all are as good as quantization lets them be."""
    for graph in GRAPHS:
        own = [one for one in readings if one.graph == graph]
        usual = float(np.median([one.own for one in own if np.isfinite(one.own)] or [0.0]))
        for one in own:
            if not one.own <= max(LIMIT, _TIMES * usual):  # a NaN isn't
                return one
    return None


def locate(reference: SEEDStory, bundle: SEEDStory, picture: Path, text: str) -> list[Reading]:
    """Reads every matrix of every graph, in the order in which they are computed.

    Args:
        picture, text: what the graphs are given; all of them get what the reference's earlier graphs make of it.

    Raises:
        UsageError: the graphs have other matrices than the reference's.
    """
    readings = []
    for graph, signature, *inputs in graph_inputs(reference, bundle, picture, text):
        theirs, mine = (
            _run(one, graph, signature, given) for one, given in zip((reference, bundle), inputs, strict=True)
        )
        shapes = [[out.shape for *_, out in rows] for rows in (theirs, mine)]
        if shapes[0] != shapes[1]:
            raise UsageError(f"the bundle's {graph} has other matrices", got=len(shapes[1]), expected=len(shapes[0]))
        for (name, weights, bias, _, expected), (_, _, _, x, y) in zip(theirs, mine, strict=True):
            assert weights is not None
            due = x.reshape(-1, x.shape[-1]) @ weights.T + (0 if bias is None else bias)
            readings.append(Reading(graph, name, _relative(y, due), _relative(y, expected)))
    return readings


def graph_inputs(
    reference: SEEDStory, bundle: SEEDStory, picture: Path, text: str
) -> Iterator[tuple[str, str, Inputs, Inputs]]:
    """A graph, its signature that is read, and what it is given: a picture, its features, and a text's first tokens.

    The reference is given the first, the bundle the second: the same, but each has its own kind of cache, empty.
    """
    manifest = reference.bundle.manifest
    pixels = load_and_preprocess_image(picture, manifest.story.vision.image_size)
    yield VIT, ENCODE, {"image": pixels}, {"image": pixels}
    features = {"features": reference.vision.features(pixels).copy()}
    yield QFORMER, PROJECT, features, features
    size = max(manifest.steps.prefill, default=1)
    ids = reference.tokenizer.encode(text)[:size]
    theirs, mine = (step_inputs(one, ids, size) for one in (reference, bundle))
    yield DECODER, prefill_name(size), theirs, {**mine, "embeddings": theirs["embeddings"]}


def step_inputs(model: SEEDStory, ids: Sequence[int], size: int) -> Inputs:
    """What `prefill_N` is given for the first tokens of a story, at most N."""
    model.begin()
    return chunk_inputs(model.decoder.cache, model.bundle.manifest.story.llama, model.decoder.embed(ids), size)


def chunk_inputs(cache: SinkCache, llama: LlamaConfig, rows: npt.NDArray[np.float32], size: int) -> Inputs:
    """What `prefill_N` is given for the next embeddings `[n, hidden]`, n at most N, after what the cache holds.

    A layer's graph (`export/layer_graph.py`) is given its residual stream instead, which may have more channels.
    """
    inputs: Inputs = {name: values.copy() for name, values in cache.memory().items()}
    inputs["embeddings"] = np.zeros((size, rows.shape[1]), np.float32)
    inputs["embeddings"][-len(rows) :] = rows
    inputs["cos"], inputs["sin"] = np.zeros((2, size, 2, llama.head_dim), np.float32)
    inputs["mask"] = np.zeros((size, cache.columns + size), np.float32)
    cache.fill(inputs, len(rows))
    return inputs


def _run(model: SEEDStory, graph: str, signature: str, inputs: Inputs) -> list[tuple[Any, ...]]:
    """Each matrix's name, weights and bias (None where they aren't float32), and its x and y."""
    opened = OpenGraph(model.bundle.file(graph_file(graph)), signature)
    matrices = opened.matrices()
    names = [(opened.add_output(one.x), opened.add_output(one.y)) for one in matrices]
    with tempfile.TemporaryDirectory(prefix="seed-story-") as folder:
        file = Path(folder) / graph_file(graph)
        opened.write(file)
        found = Runner(file, model.threads)(inputs)
    return [
        (one.name, opened.constant(one.w), opened.constant(one.b) if one.b >= 0 else None,
         opened.real(one.x, found[x]), opened.real(one.y, found[y]))
        for one, (x, y) in zip(matrices, names, strict=True)
    ]  # fmt: skip


def _relative(got: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    a, b = (values.reshape(-1).astype(np.float64) for values in (got, expected))
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
