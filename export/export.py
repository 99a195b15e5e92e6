"""The export itself: networks to graphs, quantized, checked, and written as one bundle."""

from __future__ import annotations

import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import keras
import tensorflow as tf
from tqdm import tqdm

from export.bundle_writer import check_room, file_entries, staged, write_manifest
from export.decoder_graph import write_skeleton
from export.decoder_weights import weight_shapes
from export.flatbuffer import fill_skeleton
from export.integer_ops import with_integer_ops
from export.learned_rotation import rotation_of
from export.learned_scales import lacks_scales
from export.network_graphs import write_qformer, write_vit
from export.parity import STEPS, STORY, Parity, check, chunk_lengths, decoder_tokens, measure_decoder, measure_vision
from export.rounding import Reading, gptq_grids, rounded_weights
from model.story_model import StoryModel
from model.story_source import StorySource
from model.weights import fingerprint
from quantization.calibration import calibration_pictures
from quantization.gptq import without_gptq
from quantization.graph_rounding import round_graph
from quantization.quantize import Samples, is_static, quantize_graph
from quantization.recipe import CALIBRATION, Recipe
from seed_story import __version__
from seed_story.backends import open_graph
from seed_story.bundle import TOKENIZER, Bundle, Manifest, graph_file
from seed_story.config import CacheConfig, LlamaConfig
from seed_story.contract import (
    BEGIN_PICTURE,
    DECODER,
    ENCODE,
    END_PICTURE,
    PROJECT,
    QFORMER,
    VIT,
    Steps,
)
from seed_story.decoder import Decoder
from seed_story.errors import ExportError, UsageError
from seed_story.files import file_sha256
from seed_story.packed import packed_weights
from seed_story.policies import ATTENTION_MASS
from seed_story.threads import default_threads
from seed_story.tokenizer import StoryTokenizer
from seed_story.vision import Vision

_PACKAGES = ("tensorflow", "keras", "litert-quantizer", "ai-edge-litert", "numpy", "tokenizers")


@dataclass(frozen=True)
class ExportOptions:
    """What a user may choose besides the model and the recipe.

    Args:
        cache: geometry of the cache.
        steps: which signatures the decoder gets; with `decode_attention`, which the picture eviction `attention-mass`
            needs, and with a `verify_K` a session can speculate.
        force: write a bundle that misses its recipe's bounds, marked in its manifest.
        calibration: a folder of stories with pictures (`quantization/calibration.py`), read by recipes that need it.

    Raises:
        UsageError: a chunk's size is below 2, or given twice; K is more than the ring, or there is no prefill beside
            it; or the cache needs `decode_attention`.
    """

    cache: CacheConfig = field(default_factory=CacheConfig)
    steps: Steps = field(default_factory=Steps)
    force: bool = False
    calibration: Path = CALIBRATION

    def __post_init__(self) -> None:
        steps = self.steps
        for sizes in (steps.prefill, steps.begin):
            if min(sizes, default=2) < 2 or len(set(sizes)) < len(sizes):
                raise UsageError("a chunk's size is impossible", got=sizes, expected="different sizes of 2 or more")
        if steps.verify and not (steps.prefill and 2 <= steps.verify <= self.cache.ring):
            raise UsageError("the graph that verifies guesses is impossible", got=f"{steps.verify} tokens",
                             expected=f"2 to {self.cache.ring}, beside a prefill")  # fmt: skip
        if self.cache.needs_attention and not steps.attention:
            raise UsageError(f"the picture eviction {ATTENTION_MASS} needs the attention", got="--no-attention")


def export_bundle(source: StorySource, recipe: Recipe, out: Path, options: ExportOptions | None = None) -> Bundle:
    """Exports a model.

    Args:
        out: the bundle's folder; replaced as a whole when it is a bundle already.

    Raises:
        ConfigError: the model's pictures don't fit the cache, it keeps more than a decoder has room for, or the
            recipe's GPTQ doesn't fit the model.
        UsageError, PictureError: the recipe needs calibration, and its folder or a picture can't be read.
        WeightsError: the checkpoint's learned scales or rotation aren't this recipe's or model's.
        ParityError: a graph strays from the reference; nothing was written.
        ExportError: a graph can't be converted or quantized, or `out` can't be written.
    """
    options = options or ExportOptions()
    options.cache.check_picture(source.model.config.picture_tokens)
    options.cache.check_kept(options.cache.sink_rows(recipe.cache))
    gptq_grids(source.model.config.llama, recipe)
    check_room(out, _room(source.model.config.llama))
    with staged(out) as part, tqdm(total=6 + STEPS, desc="export", unit="step") as bar:
        # Not `save`, whose errors have no class of their own.
        (part / TOKENIZER).write_text(source.tokenizer.to_str(), encoding="utf-8")
        with tempfile.TemporaryDirectory(dir=part, prefix="work.") as work:
            try:
                _write_graphs(source, recipe, options, part, Path(work), bar)
            except tf.errors.OpError as error:  # what TensorFlow says of a full disk
                raise ExportError("a graph can't be converted", got=error.message,
                                  hint="Is there enough free space and memory?") from error  # fmt: skip
        parity = _gate(source, recipe, options, part, bar)
        missed = check(parity, recipe, force=options.force, unlearned=lacks_scales(recipe, source))
        write_manifest(part, _manifest(source, recipe, options, parity, missed, part))
    return Bundle.open(out)


def _room(llama: LlamaConfig) -> int:
    """Bytes that an export has on the disk at most: the decoder in float32, and in float16 beside it."""
    return 6 * sum(map(math.prod, weight_shapes(llama).values()))


def _write_graphs(
    source: StorySource, recipe: Recipe, options: ExportOptions, part: Path, work: Path, bar: tqdm
) -> None:
    model, tokens = source.model, source.model.config.vision.tokens
    turn = rotation_of(source, recipe)
    writers: dict[str, Callable[[Path], bytes]] = {
        VIT: lambda folder: write_vit(
            model.vision, folder, rotated=recipe.rotated and not is_static(recipe.graphs[VIT])
        ),
        QFORMER: lambda folder: write_qformer(model.qformer, tokens, folder, turn),
    }
    samples = _samples(model, options.calibration)
    for graph, write in writers.items():
        bar.set_postfix_str(f"{graph}: converting")
        raw, entries = work / f"{graph}.float.tflite", recipe.graphs[graph]
        converted = write(work / graph)
        raw.write_bytes(with_integer_ops(converted) if is_static(entries) else converted)
        round_graph(raw, entries, samples[graph], threads=default_threads())
        quantize_graph(raw, part / graph_file(graph), without_gptq(entries), samples[graph])
        bar.update(1)
    _write_decoder(source, recipe, options, part, work, bar)


def _write_decoder(
    source: StorySource, recipe: Recipe, options: ExportOptions, part: Path, work: Path, bar: tqdm
) -> None:
    bar.set_postfix_str("decoder: converting")
    llama, entries, rotated = source.model.config.llama, recipe.graphs[DECODER], recipe.rotated
    cache, steps = options.cache, options.steps
    skeleton = write_skeleton(llama, cache.slots, steps, work / DECODER, rotated=rotated,
                              sink_rows=cache.sink_rows(recipe.cache))  # fmt: skip
    bar.update(2)
    raw = work / "decoder.float.tflite"
    reading = Reading(source, recipe, skeleton, cache, max(steps.prefill, default=1), options.calibration, work)
    bar.set_postfix_str("decoder: balancing")
    make = reading.exact
    if grids := gptq_grids(llama, recipe):
        bar.total += len(grids)
        bar.set_postfix_str("decoder: rounding")
        make = rounded_weights(reading, bar.update)
    fill_skeleton(skeleton, reading.shapes, make, raw)
    bar.set_postfix_str(f"decoder: {recipe.name}")
    quantize_graph(raw, part / graph_file(DECODER), without_gptq(entries))
    bar.update(2)


def _samples(model: StoryModel, folder: Path) -> dict[str, Callable[[], Samples]]:
    """What the picture graphs are calibrated with: pictures, and the features that the float ViT sees in them."""
    pictures = functools.cache(lambda: calibration_pictures(folder, model.config.vision.image_size))
    return {
        VIT: lambda: {ENCODE: [{"image": pixels} for pixels in pictures()]},
        QFORMER: lambda: {
            PROJECT: [{"features": keras.ops.convert_to_numpy(model.vision(pixels))} for pixels in pictures()]
        },
    }


def _gate(source: StorySource, recipe: Recipe, options: ExportOptions, part: Path, bar: tqdm) -> Parity:
    bar.set_postfix_str("parity")
    config, threads = source.model.config, default_threads()
    vision = Vision((part / graph_file(VIT), part / graph_file(QFORMER)), config, backend="litert", threads=threads)
    vit, qformer = measure_vision(source.model, vision, rotation_of(source, recipe))
    vision.close()
    file = part / graph_file(DECODER)
    with packed_weights(file_sha256(file)) as packed:
        graph = open_graph(file, threads=threads, packed=packed)
    sink_rows = options.cache.sink_rows(recipe.cache)
    decoder = Decoder(graph, config.llama, options.cache, options.steps, sink_rows)
    ids = StoryTokenizer(part / TOKENIZER).encode(STORY.read_text(encoding="utf-8"))
    ids = decoder_tokens(options.steps, options.cache, ids)
    bar.total = bar.n + 1 + len(ids) + sum(chunk_lengths(options.steps.begin, options.cache))
    figures = measure_decoder(source.model, decoder, ids, bar.update)
    decoder.close()
    bar.update(1)
    return Parity(vit, qformer, **figures)  # type: ignore[arg-type]


def _manifest(
    source: StorySource,
    recipe: Recipe,
    options: ExportOptions,
    parity: Parity,
    missed: Mapping[str, Mapping[str, float]],
    part: Path,
) -> Manifest:
    tokenizer = StoryTokenizer(part / TOKENIZER)
    versions = {"seed-story": __version__, **{name: metadata.version(name) for name in _PACKAGES}}
    return Manifest(
        name=source.name,
        story=source.model.config,
        cache=options.cache,
        steps=options.steps,
        prompt=source.prompt,
        special_tokens={
            name: tokenizer.token_id(name) for name in (BEGIN_PICTURE, END_PICTURE, *source.prompt.end_tokens)
        },
        files=file_entries(part),
        recipe=recipe.name,
        qformer_trained=source.qformer_trained,
        parity=parity.to_dict(),
        versions=versions,
        licences=source.licences,
        weights=fingerprint(source.model),
        missed_bounds=missed,
        cache_dtype=recipe.cache,
    )


def summary(bundle: Bundle) -> str:
    """The table that ends an export: graph, recipe, MB, parity."""
    manifest = bundle.manifest
    parity = manifest.parity
    said = {
        VIT: f"least cosine {parity['vit_cosine_min']:.6f}",
        QFORMER: f"least cosine {parity['qformer_cosine_min']:.6f}",
        DECODER: f"mean KL {parity['decoder_mean_kl_nat']:.6f} nat, top-1 {100 * parity['decoder_top1']:.1f} %, "
        f"perplexity x {parity['decoder_perplexity_ratio']:.4f}, "
        f"{parity['decoder_positions']} positions",
    }
    mark = f"\nMISSED, and written with --force: {manifest.missed}" if manifest.missed else ""
    rows = [("graph", "recipe", "MB", "parity with the float32 model")]
    for graph, words in said.items():
        size = manifest.files[graph_file(graph)][1] / 1e6
        rows.append((graph, manifest.recipe, f"{size:.1f}", words))
    return table(rows) + mark


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
