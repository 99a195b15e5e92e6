"""What peers are given, against transformers; and what answers their jobs, against a decoder asked directly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from benchmarks.peers.session import SERVE
from benchmarks.peers.weights import write_decoder, write_pictures, write_vision
from model.layers import numpy_of
from model.llama import Llama
from model.presets import SEED_STORY_135M, TINY
from model.sources.huggingface import read_hf
from model.vit import VisionTransformer
from model.weights import load_weights
from seed_story.config import LlamaConfig
from seed_story.image import load_and_preprocess_image
from seed_story.story import SEEDStory

PICTURE = Path(__file__).parents[2] / "demo_app" / "pictures" / "fox.jpg"


def test_a_decoder_s_folder(tmp_path: Path) -> None:
    write_decoder(TINY, tmp_path / "made")
    values, tensors = read_hf(tmp_path / "made")
    assert LlamaConfig.from_hf(values) == TINY.story.llama
    for name, array in TINY.load_decoder().items():
        np.testing.assert_array_equal(tensors[name], array)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "made", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    ids = words("A fox, a hen.", return_tensors="pt").input_ids
    assert ids[0].tolist() == TINY.load_tokenizer().encode("A fox, a hen.").ids
    ours = Llama(TINY.story.llama, seed=None)
    load_weights(ours, TINY.load_decoder())
    with torch.no_grad():
        expected = theirs(ids).logits.numpy()
    np.testing.assert_allclose(numpy_of(ours(ours.embed(ids.numpy()))), expected, atol=1e-5)


def test_a_vision_transformer_s_folder(tmp_path: Path) -> None:
    write_vision(TINY, tmp_path / "made")
    config = TINY.story.vision
    theirs, info = transformers.AutoModel.from_pretrained(
        tmp_path / "made", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert len(theirs.encoder.layer) == config.feature_layer < config.num_layers
    write_pictures(TINY, tmp_path / "pictures.npz", [PICTURE])
    pictures = np.load(tmp_path / "pictures.npz")
    np.testing.assert_array_equal(pictures["pixels"], load_and_preprocess_image(PICTURE, config.image_size))
    ours = VisionTransformer(config, seed=None)
    load_weights(ours, TINY.load_vision())
    with torch.no_grad():
        said = theirs(torch.tensor(pictures["normalized"]), output_hidden_states=True, interpolate_pos_encoding=True)
    expected = said.hidden_states[-1].numpy()
    np.testing.assert_allclose(numpy_of(ours(pictures["pixels"])), expected, atol=1e-4)


class Serving:
    """`serve.py` with a module, in a process of its own."""

    def __init__(self, *arguments: str, path: Path | None = None) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *sys.path] if path else sys.path)}
        self._process = subprocess.Popen([sys.executable, str(SERVE), *arguments], stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, text=True, env=environment)  # fmt: skip
        self.hello = self._read()

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self._process.stdin
        print(json.dumps(job), file=self._process.stdin, flush=True)
        return self._read()

    def end(self) -> int:
        assert self._process.stdin
        self._process.stdin.close()
        return self._process.wait(60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        return dict(json.loads(self._process.stdout.readline()))


ENGINE = """
import numpy as np
print("a banner")

class Engine:
    version = "3"

    def __init__(self, *given):
        self.given = given

    def reset(self):
        self.fed = []

    def feed(self, tokens):
        print("working")
        self.fed.append(tokens)

    def logits(self):
        assert self.given == ("x", "2")
        return np.eye(1000)[100 * len(self.fed) + sum(self.fed[-1])]
"""


def test_what_is_served(tmp_path: Path) -> None:
    (tmp_path / "made_up_engine.py").write_text(ENGINE)
    serving = Serving("made_up_engine", "x", "2", path=tmp_path)
    assert serving.hello == {"version": "3"}
    for _ in range(2):
        said = serving.ask(tokens=[5, 6, 7, 8], text="", steps=3)
        assert said["next"] == 126, "what follows the prompt, from a fresh start"
        assert len(said["step_s"]) == 3 and min(*said["step_s"], said["prefill_s"]) > 0
        assert said["peak_rss_mib"] > 5
    assert serving.end() == 0


TURNING = """
class Engine:
    version = "4"

    def turn(self, job):
        return {"next": job["tokens"][0], "step_s": [0.5]}
"""


def test_an_engine_with_a_turn_of_its_own_needs_no_numpy(tmp_path: Path) -> None:
    """LiteRT-LM's venv has none."""
    (tmp_path / "numpy.py").write_text("raise ImportError('no numpy here')")
    (tmp_path / "turning_engine.py").write_text(TURNING)
    serving = Serving("turning_engine", path=tmp_path)
    said = serving.ask(tokens=[7], text="", steps=1)
    assert (said["next"], said["step_s"]) == (7, [0.5]) and said["peak_rss_mib"] > 5
    assert serving.end() == 0


def test_our_decoder_is_served(loud_bundle: Path) -> None:
    serving = Serving("seed_story_worker", str(loud_bundle), "1")
    ids = [40, 5, 77, 120, 33, 8, 9]
    said = serving.ask(tokens=ids, text="", steps=4)
    assert len(said["step_s"]) == 4
    with SEEDStory(loud_bundle, threads=1) as model:
        model.begin()
        for token in ids:
            logits = model.decoder.step(token)
        assert said["next"] == int(np.argmax(logits))
    assert serving.ask(tokens=ids, text="", steps=0)["next"] == said["next"]
    serving.end()


def test_our_vision_transformer_is_served(loud_bundle: Path, tmp_path: Path) -> None:
    write_pictures(TINY, tmp_path / "pictures.npz", [PICTURE.with_name("bear.jpg"), PICTURE])
    serving = Serving("seed_story_vit_worker", str(loud_bundle), str(tmp_path / "pictures.npz"), "1")
    said = serving.ask(picture=1, repeats=3, file=str(tmp_path / "features.npy"))
    assert len(said["step_s"]) == 3
    with SEEDStory(loud_bundle, threads=1) as model:
        expected = model.vision.features(load_and_preprocess_image(PICTURE, TINY.story.vision.image_size))[0].copy()
    np.testing.assert_array_equal(np.load(tmp_path / "features.npy"), expected)
    serving.end()


@pytest.mark.weights
def test_the_real_vision_transformer_is_cut(tmp_path: Path) -> None:
    write_vision(SEED_STORY_135M, tmp_path / "made")
    _, tensors = read_hf(tmp_path / "made")
    blocks = {int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layer.")}
    assert blocks == set(range(11))
