"""Which matrix costs what: each is quantized alone, in the float reference, as the bundle has it.

A matrix of the decoder costs the KL divergence of the next token after short pieces of held-out text; one of a picture
graph, how far the mean cosine of the graph's output falls below 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from ai_edge_litert import schema_py_generated as schema
from tqdm import tqdm

from quantization.fidelity import kl_nat, log_softmax, row_cosines
from quantization.locate import Inputs, step_inputs
from quantization.surgery import Matrix, OpenGraph, Runner
from seed_story.bundle import graph_file
from seed_story.contract import DECODER, ENCODE, PROJECT, QFORMER, VIT, prefill_name
from seed_story.errors import UsageError
from seed_story.image import load_and_preprocess_image
from seed_story.story import SEEDStory

PIECES, LOOKED_AT = 32, 4
"""Pieces of text and pictures that a cost is the mean of."""


@dataclass(frozen=True)
class Cost:
    """What one matrix costs when it alone is quantized.

    Args:
        cost: nat (decoder), or 1 - cosine.
        measured: positions or pictures.
    """

    graph: str
    matrix: str
    cost: float
    measured: int


def sensitivity(reference: SEEDStory, bundle: SEEDStory, pictures: Sequence[Path], texts: Sequence[str]) -> list[Cost]:
    """The costs of all matrices that the bundle quantized, by graph, the dearest first.

    Raises:
        UsageError: a graph has other matrices than the reference's, or quantized activations too.
    """
    size = reference.bundle.manifest.story.vision.image_size
    pixels = [load_and_preprocess_image(picture, size) for picture in pictures[:LOOKED_AT]]
    features = [reference.vision.features(one).copy() for one in pixels]
    chunk = min(reference.bundle.manifest.steps.prefill, default=1)
    jobs: list[tuple[str, str, str, list[Inputs]]] = [
        (VIT, ENCODE, "features", [{"image": one} for one in pixels]),
        (QFORMER, PROJECT, "image_embeddings", [{"features": one} for one in features]),
        (DECODER, prefill_name(chunk), "logits", _pieces(reference, texts, chunk)),
    ]
    costs = []
    for graph, signature, output, inputs in jobs:
        files = [model.bundle.file(graph_file(graph)) for model in (reference, bundle)]
        opened, given = (OpenGraph(file, signature) for file in files)
        costs += _of_graph(graph, opened, given, output, inputs, reference.threads)
    return costs


def _pieces(model: SEEDStory, texts: Sequence[str], chunk: int) -> list[Inputs]:
    ids = [token for text in texts for token in model.tokenizer.encode(text)]
    starts = range(0, len(ids) - chunk + 1, chunk)
    return [step_inputs(model, ids[start : start + chunk], chunk) for start in list(starts)[:PIECES]]


def _of_graph(
    graph: str, opened: OpenGraph, given: OpenGraph, output: str, inputs: Sequence[Inputs], threads: int
) -> list[Cost]:
    pairs = _quantized(graph, opened, given)
    for mine, theirs in pairs:  # so that all contents are in the file that is written
        opened.transplant(mine, given, theirs)()
    costs = []
    with tempfile.TemporaryDirectory(prefix="seed-story-") as folder:
        file = Path(folder) / graph_file(graph)
        opened.write(file)
        expected = _outputs(file, inputs, output, threads)
        for mine, theirs in tqdm(pairs, desc=f"{graph}, one by one", unit="matrix"):
            undo = opened.transplant(mine, given, theirs)
            opened.rewrite(file)
            got = _outputs(file, inputs, output, threads)
            costs.append(Cost(graph, mine.name, _cost(graph, got, expected), len(inputs)))
            undo()
    return sorted(costs, key=lambda cost: -cost.cost)


def _quantized(graph: str, opened: OpenGraph, given: OpenGraph) -> list[tuple[Matrix, Matrix]]:
    """The matrices that the bundle quantized, in the reference and in the bundle, each once, however often used."""
    ours, theirs = opened.matrices(), given.matrices()
    hint = "Recipes that add operations, or quantize activations beforehand, can't be taken apart."
    if len(theirs) != len(ours):
        raise UsageError(f"the bundle's {graph} has other matrices", got=len(theirs), expected=len(ours), hint=hint)
    types = schema.TensorType
    if any(given.graph.tensors[one.x].type != types.FLOAT32 for one in theirs):
        raise UsageError(f"the bundle's {graph} computes in whole numbers", expected="float32 activations", hint=hint)
    changed: dict[int, tuple[Matrix, Matrix]] = {}
    for mine, other in zip(ours, theirs, strict=True):
        if given.graph.tensors[other.w].type != types.FLOAT32:
            changed.setdefault(mine.w, (mine, other))
    return list(changed.values())


def _outputs(file: Path, inputs: Sequence[Inputs], output: str, threads: int) -> list[npt.NDArray[np.float32]]:
    runner = Runner(file, threads)
    return [runner(one)[output].copy() for one in inputs]


def _cost(graph: str, got: Sequence[npt.NDArray[np.float32]], expected: Sequence[npt.NDArray[np.float32]]) -> float:
    if graph != DECODER:
        return 1 - float(np.mean([row_cosines(a, b).mean() for a, b in zip(got, expected, strict=True)]))
    return float(np.mean([kl_nat(log_softmax(b[0]), log_softmax(a[0])) for a, b in zip(got, expected, strict=True)]))
