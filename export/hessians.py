"""What the decoder's matrices are given when it reads stories: what GPTQ rounds by (`quantization/gptq.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from keras import ops

from export.decoder_weights import DOWN_ROTATION, NORM, ROTATED_NORM, head_name
from export.flatbuffer import with_constants
from export.layer_graph import EMBEDDINGS, KEYS, VALUES, layer_matrices, write_layer
from model.rotation import in_blocks
from model.story_source import StorySource
from quantization.calibration import Floats, Ids, calibration_rows
from quantization.locate import chunk_inputs
from quantization.surgery import Runner
from seed_story.cache import SinkCache
from seed_story.config import LlamaConfig
from seed_story.contract import prefill_name
from seed_story.image import load_and_preprocess_image
from seed_story.tokenizer import StoryTokenizer

Make = Callable[[str], Floats]
See = Callable[[str, Floats, int], object]

TOKENS = 4096
"""That the Hessians are summed over, pictures' embeddings included."""
FIRST = 30
"""As many tokens as a story's first one counts for: it is the same in all stories, and all other tokens look at it."""


def story_rows(source: StorySource, folder: Path, tokens: int = TOKENS) -> Iterator[Floats]:
    """Stories of a calibration folder as the decoder is fed them, by the Keras model; see `calibration_rows`.

    Where the Q-Former is untrained no pictures are shown: what it makes of them is noise (docs/decisions/0017).
    """
    model, tokenizer = source.model, StoryTokenizer(source.tokenizer)

    def embed(ids: Ids) -> Floats:
        return np.array(ops.convert_to_numpy(model.llama.embed(ids[None]))[0], np.float32)

    def look(picture: Path) -> Floats:
        pixels = load_and_preprocess_image(picture, model.config.vision.image_size)
        return np.asarray(ops.convert_to_numpy(model.qformer(model.vision(pixels)))[0], np.float32)

    queries, shown = model.config.qformer.num_queries, look if source.qformer_trained else None
    return calibration_rows(folder, tokenizer, source.prompt, queries, embed, shown, tokens)


def decoder_hessians(
    skeleton: bytes,
    shapes: Mapping[str, tuple[int, ...]],
    make: Make,
    llama: LlamaConfig,
    cache: SinkCache,
    size: int,
    stories: Iterable[Floats],
    *,
    threads: int,
    work: Path,
    see: See = lambda name, rows, start: None,
) -> Iterator[tuple[str, Floats]]:
    """The layers' matrices in order, then the head, each with the sum of `x^T x` over all its inputs x.

    A rotated `down` has the sum of what it is given before the graph turns it: what is huge there is huge in few
    channels, and turned it would leave the others' sums nothing of float32's digits.

    All stories go through one layer before the next layer is made: so what is in memory doesn't grow with their number.

    Args:
        skeleton, shapes, make: as in `fill_skeleton`.
        cache: of one layer, and of the kind that the graph reads; each story is read from an empty one.
        size: N of the prefill that reads them, or 1.
        stories: of `story_rows`.
        work: a folder for a layer's graph.
        see: told what each matrix is given before it is summed: its name, rows `[n, inputs]` of one story, and how many
            tokens the story has before them.

    Yields:
        A name, and the sum, float32 `[inputs, inputs]`.
    """
    streams, file = list(stories), work / "layer.tflite"
    turn = make(DOWN_ROTATION) if DOWN_ROTATION in shapes else None
    model, buffers = with_constants(skeleton, shapes)
    for layer in range(llama.num_layers):
        weights = {name: make(name) for name in layer_matrices(layer)}
        write_layer(model, buffers, shapes, lambda name: weights[name] if name in weights else make(name),  # noqa: B023
                    prefill_name(size), layer, file)  # fmt: skip
        run = Runner(file, threads)
        sums = {name: np.zeros((weight.shape[1],) * 2, np.float32) for name, weight in weights.items()}
        streams = [_through(run, rows, llama, cache, size, sums, turn, see) for rows in streams]
        del run
        yield from sums.items()
    file.unlink()
    read, width = np.concatenate(streams), llama.hidden_size
    read /= np.sqrt(np.mean(np.square(read), axis=1, keepdims=True) + llama.rms_norm_eps * width / read.shape[1])
    read = read[:, :width]
    read = read @ make(ROTATED_NORM).T if ROTATED_NORM in shapes else read * make(NORM)
    for story in np.split(read, np.cumsum([len(stream) for stream in streams])[:-1]):
        see(head_name(llama), story, 0)
    yield head_name(llama), read.T @ read


def _through(
    run: Runner,
    rows: Floats,
    llama: LlamaConfig,
    cache: SinkCache,
    size: int,
    sums: Mapping[str, Floats],
    turn: Floats | None,
    see: See,
) -> Floats:
    """One story's residual stream `[t, hidden]` through a layer; adds to `sums` what its matrices are given.

    Args:
        turn: that of what `down` reads, its own inverse.
    """
    cache.reset()
    made: list[Floats] = []
    start = 0
    while len(rows):
        chunk, rows = np.split(rows, [min(size, cache.max_chunk)])
        found = run(chunk_inputs(cache, llama, chunk, size))
        cache.store(found[KEYS][None], found[VALUES][None], len(chunk))
        for name, total in sums.items():
            x = found[name].reshape(-1, len(total))[-len(chunk) :]
            if turn is not None and name.endswith("_down"):
                x = in_blocks(x, turn)
            see(name, x, start)
            total += x.T @ x
        made.append(found[EMBEDDINGS][-len(chunk) :])
        start += len(chunk)
    return np.concatenate(made)
