"""Files and models of more than two gigabytes, where 32-bit offsets and second copies end."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from benchmarks.big_model import write_checkpoint
from export.decoder_weights import skeleton_weight, weight_shapes
from export.flatbuffer import with_constants
from model.tokenizer_files import byte_tokenizer
from quantization.model_file import write_model
from seed_story.backends import open_graph
from seed_story.config import CacheConfig, LlamaConfig
from seed_story.contract import Steps
from seed_story.decoder import Decoder
from tests.export.tiny_decoders import BEGINS, SIZES, TinyDecoder, export_tiny

ROOT = Path(__file__).resolve().parents[2]
TWO_GB = 2**31
CACHE = CacheConfig(slots=12, sinks=2)


@dataclass(frozen=True)
class Hole:
    """A content that takes no room on the disk: nothing is written where it would be."""

    nbytes: int
    data: bytes = b""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyDecoder:
    return export_tiny(LlamaConfig.tiny(), CACHE.slots, tmp_path_factory.mktemp("tiny"))


def write_far(tiny: TinyDecoder, path: Path) -> None:
    """The same decoder, with two gigabytes of nothing before its weights."""
    model, buffers = with_constants(tiny.skeleton, weight_shapes(tiny.config))
    model.buffers.append(schema.BufferT(offset=1, size=1))
    weights = ((number, skeleton_weight(tiny.config, tiny.weights, name)) for name, number in buffers.items())
    contents = [(len(model.buffers) - 1, Hole(TWO_GB + 1)), *weights]
    write_model(path, model, flatbuffers.Builder(1 << 20), contents)  # type: ignore[arg-type]


def logits(tiny: TinyDecoder, path: Path, packed: Path | None = None) -> np.ndarray:
    """Of a chunk and a few steps, and a row of the table."""
    decoder = Decoder(open_graph(path, threads=1, packed=packed), tiny.config, CACHE, Steps(SIZES, BEGINS))
    try:
        rows = tiny.embeddings(8)
        steps = [decoder.feed(chunk).copy() for chunk in np.split(rows, range(5, 8))]
        return np.concatenate([*steps, decoder.embed([7])[0]])
    finally:
        decoder.close()


def test_weights_past_two_gigabytes(tiny: TinyDecoder, tmp_path: Path) -> None:
    far = tmp_path / "far.tflite"
    write_far(tiny, far)
    assert far.stat().st_size > TWO_GB
    assert far.stat().st_blocks * 512 < 1 << 20, "the test itself must not need gigabytes"
    np.testing.assert_array_equal(logits(tiny, far), logits(tiny, tiny.path))
    packed = tmp_path / "packed"
    for _ in ("packs", "maps what was packed"):
        np.testing.assert_array_equal(logits(tiny, far, packed), logits(tiny, tiny.path))


PROGRAM = """
import resource, sys
from export.__main__ import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
sys.exit(code)
"""


def peak_of_export(config: LlamaConfig, folder: Path) -> float:
    """MiB that an export to int8 has resident at most."""
    write_checkpoint(folder / "checkpoint", config, json.loads(byte_tokenizer().to_str()))
    given = ["--model", "tiny", "--llama", str(folder / "checkpoint"), "--out", str(folder / "bundle"), "--force"]
    command = [sys.executable, "-c", PROGRAM, *given, "--slots", "32", "--prefill", "16", "--begin"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_an_export_takes_the_memory_of_two_copies(tmp_path: Path) -> None:
    """The float32 reference, and one while the quantizer has the file mapped; no Hessian for each matrix."""
    small = LlamaConfig(vocab_size=320, hidden_size=512, intermediate_size=1408, num_layers=1, num_heads=8,
                        num_kv_heads=2, tie_word_embeddings=False, max_position=128)  # fmt: skip
    big = replace(small, num_layers=25)
    layer = sum(math.prod(shape) for name, shape in weight_shapes(small).items() if name.startswith("layers_"))
    floats = 4 * layer * (big.num_layers - small.num_layers) / 2**20
    assert floats > 250
    assert peak_of_export(big, tmp_path / "big") - peak_of_export(small, tmp_path / "small") < 2.5 * floats
