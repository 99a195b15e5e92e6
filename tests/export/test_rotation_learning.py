"""Learning a rotation: of planted rows that one rotation makes flat, and of the tiny model's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from export.export import ExportOptions, export_bundle
from export.hessians import FIRST, story_rows
from export.learn_rotation import main
from export.learned_rotation import ROTATION_FILE, read_rotation
from export.rotation_learning import _slope, learn_rotation, squared_range, stream_rows
from model.rotation import rotation_matrix
from model.story_source import StorySource, load_source
from quantization.recipe import CALIBRATION, load_recipe
from quantization.surgery import OpenGraph
from seed_story.config import CacheConfig
from seed_story.contract import DECODE, Steps
from tests.export.tiny_decoders import random_rotation

SIZE = 48


def flat_rows(seed: int, count: int = 2000) -> np.ndarray:
    """Rows of plus and minus one, which no rotation makes narrower, after one that makes them as wide as noise."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (count, SIZE))
    return np.asarray(signs @ random_rotation(SIZE), np.float32)


def test_planted_flat_rows_are_found() -> None:
    """In rows that weren't learned from; the least that is possible is 4."""
    learned = learn_rotation({"a": flat_rows(0), "b": flat_rows(1)}, "b", 800)
    np.testing.assert_allclose(learned @ learned.T, np.eye(SIZE), atol=1e-12)
    others = flat_rows(2)
    assert squared_range(others) > 15
    assert squared_range(others @ learned.T) < 0.5 * squared_range(others)


def test_noise_has_no_better_rotation() -> None:
    rows, others = (np.random.default_rng(seed).normal(size=(20000, SIZE)) for seed in (0, 1))
    learned = learn_rotation({"a": rows.astype(np.float32)}, "a", 200)
    assert squared_range(others @ learned.T) == pytest.approx(squared_range(others), rel=0.05)


def test_what_counts_more_becomes_narrower() -> None:
    """Two kinds of rows that want different rotations."""
    rows = {"a": flat_rows(0), "head": flat_rows(1) @ random_rotation(SIZE).astype(np.float32)}
    ranges = [[squared_range(one @ learn_rotation(rows, head, 300).T) for one in rows.values()]
              for head in ("head", "a")]  # fmt: skip
    assert ranges[0][0] < ranges[1][0] and ranges[1][1] < ranges[0][1]  # the head counts for 0.15 of two


def test_the_slope_is_that_of_the_smooth_range() -> None:
    rows = np.random.default_rng(0).normal(size=(3, SIZE))

    def smooth(x: np.ndarray) -> float:
        ends = [np.log(np.exp(sign * x).sum(1)) / 4 for sign in (4, -4)]
        return float(np.mean(np.square(ends[0] + ends[1])))

    step = np.random.default_rng(1).normal(size=rows.shape) * 1e-5
    expected = (smooth(rows + step) - smooth(rows - step)) / 2
    assert (_slope(rows) * step).sum() == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def source() -> StorySource:
    return load_source("tiny")


def test_rows_are_the_decoders_own(source: StorySource) -> None:
    """Of all matrices that read the stream, as many as there are tokens; the first of stories with pictures is one."""
    source = replace(source, qformer_trained=True)
    rows, turn = stream_rows(source, CALIBRATION, 1500)
    llama = source.model.config.llama
    kinds = {f"layers_{i}_{kind}" for i in range(llama.num_layers) for kind in ("qkv", "gate_up")}
    assert set(rows) == {*kinds, "embed_tokens"}
    np.testing.assert_array_equal(turn, rotation_matrix(llama.hidden_size))
    lengths = [len(story) for story in story_rows(source, CALIBRATION, 1500)]
    for found in rows.values():  # those of first tokens count for many
        assert found.shape == (1500 + (FIRST - 1) * len(lengths), llama.hidden_size) and found.dtype == np.float32
        np.testing.assert_allclose(np.square(found).mean(1), 1, rtol=1e-5)
        np.testing.assert_array_equal(found[:FIRST], found[:1].repeat(FIRST, 0))
        np.testing.assert_allclose(found[FIRST - 1 + lengths[0]], found[0], atol=1e-3)


def test_an_export_takes_what_was_learned(
    source: StorySource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And is the same function: the gate says so, of the decoder and of the Q-Former that turns what it gives."""
    command = ["--model", "tiny", "--tokens", "500", "--steps", "40", "--out", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    ratios = [float(line.split(": ")[1]) for line in out.splitlines() if line.startswith("  ")]
    assert len(ratios) == 3 and max(ratios) < 0.97, out
    trained, options = replace(source, learned=tmp_path), ExportOptions(CacheConfig(32, 2), Steps((4,), ()))
    bundle = export_bundle(trained, load_recipe("float32-rotated"), tmp_path / "made", options)
    assert not bundle.manifest.missed
    graph = OpenGraph(bundle.path / "decoder.tflite", DECODE)
    table = next(graph.constant(one.w) for one in graph.matrices() if one.name == "embed_tokens")
    plain = np.asarray(source.model.llama.model.embed_tokens.weight)
    turn = read_rotation(tmp_path / ROTATION_FILE, plain.shape[1])
    np.testing.assert_allclose(table, plain @ turn.T, atol=1e-5)


def test_a_users_mistake_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny", "--out", str(tmp_path / "out")]
    assert main([*words, "--calibration", "/nowhere"]) == 2
    assert "nothing to calibrate with" in capsys.readouterr().err
    for flag in ("--tokens", "--steps"):
        with pytest.raises(SystemExit, match="2"):
            main([*words, flag, "0"])
        assert f"argument {flag}: got '0'; expected a whole number, 1 or more" in capsys.readouterr().err
    assert not (tmp_path / "out" / ROTATION_FILE).exists()
