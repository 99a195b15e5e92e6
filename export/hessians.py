"""What the decoder's matrices are given when it reads stories: the Hessians that GPTQ rounds by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from keras import ops

from model.story_source import StorySource
from quantization.calibration import Floats, Ids, calibration_rows
from quantization.locate import chunk_inputs
from quantization.surgery import OpenGraph, Runner
from seed_story.cache import SinkCache
from seed_story.config import LlamaConfig
from seed_story.contract import prefill_name
from seed_story.image import load_and_preprocess_image
from seed_story.tokenizer import StoryTokenizer

TOKENS = 4096
"""That the Hessians are summed over, pictures' embeddings included."""


def story_rows(source: StorySource, tokenizer: StoryTokenizer, folder: Path) -> Iterator[Floats]:
    """Stories of a calibration folder as the decoder is fed them, by the Keras model; see `calibration_rows`."""
    model = source.model

    def embed(ids: Ids) -> Floats:
        return np.array(ops.convert_to_numpy(model.llama.embed(ids[None]))[0], np.float32)

    def look(picture: Path) -> Floats:
        pixels = load_and_preprocess_image(picture, model.config.vision.image_size)
        return np.asarray(ops.convert_to_numpy(model.qformer(model.vision(pixels)))[0], np.float32)

    return calibration_rows(folder, tokenizer, source.prompt, model.config.qformer.num_queries, embed, look, TOKENS)


def decoder_hessians(
    raw: Path,
    llama: LlamaConfig,
    cache: SinkCache,
    prefill_sizes: Sequence[int],
    stories: Iterator[Floats],
    names: Collection[str],
    *,
    threads: int,
    tick: Callable[[int], object],
) -> dict[str, npt.NDArray[Any]]:
    """Sums `x^T x` over all inputs x of the matrices, by matrix, float32 `[inputs, inputs]`.

    Args:
        raw: the decoder in float32, as it is to be quantized; a copy that tells its matrices' inputs is made beside it.
        cache: of the kind that the graph reads; each story is read from an empty one.
        stories: of `story_rows`.
        names: the matrices, as in `decoder_graph.weight_shapes`.
        tick: told how many tokens were read since the last call.
    """
    size = max(prefill_sizes, default=1)
    opened = OpenGraph(raw, prefill_name(size))
    outputs = {one.name: opened.add_output(one.x) for one in opened.matrices() if one.name in names}
    recorder = raw.with_name("recorder.tflite")
    opened.write(recorder)
    run, sums = Runner(recorder, threads), dict[str, npt.NDArray[Any]]()
    for rows in stories:
        cache.reset()
        while len(rows):
            chunk, rows = np.split(rows, [min(size, cache.max_chunk)])
            found = run(chunk_inputs(cache, llama, chunk, size))
            cache.store(found["k"], found["v"], len(chunk))
            for name, output in outputs.items():
                x = found[output].reshape(size, -1)[-len(chunk) :]
                sums[name] = sums[name] + x.T @ x if name in sums else x.T @ x
            tick(len(chunk))
    del run
    recorder.unlink()
    return sums
