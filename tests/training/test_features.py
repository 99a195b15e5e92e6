"""What frozen blocks see, kept on disk: the network's own states, whatever interrupted the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.layers import named_variables, numpy_of
from model.vit import VisionTransformer
from seed_story.config import VisionConfig
from seed_story.errors import PictureError
from seed_story.image import load_and_preprocess_image
from training import features
from training.features import FeatureStore

CONFIG = VisionConfig.tiny()
STATE = CONFIG.tokens * CONFIG.hidden_size * 2  # bytes of one picture


@pytest.fixture(scope="module")
def vision() -> VisionTransformer:
    """Weights large enough that every block changes its input."""
    network = VisionTransformer(CONFIG, seed=4)
    for variable in named_variables(network).values():
        if len(variable.shape) > 1:
            variable.assign(numpy_of(variable) * 8)
    return network


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_BATCH", 2)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the graphs, which take longer to trace than so few pictures to compute."""
    monkeypatch.setattr(features, "_compiled", lambda function: function)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    (tmp_path / "data" / "sub").mkdir(parents=True)
    paths = [tmp_path / "data" / name for name in ("a.png", "sub/a.png", "b.png", "c.png", "d.png")]
    for seed, path in enumerate(paths):
        pixels = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


def store(tmp_path: Path, vision: VisionTransformer, end: int = 2, source: FeatureStore | None = None) -> FeatureStore:
    return FeatureStore(tmp_path / "kept", tmp_path / "data", vision, end, source)


def states(vision: VisionTransformer, pictures: list[Path], end: int) -> np.ndarray:
    return np.concatenate([numpy_of(vision.hidden(load_and_preprocess_image(p, 28), end)) for p in pictures])


def assert_rounded(got: np.ndarray, expected: np.ndarray) -> None:
    """`got` is `expected` in float16: off by one step at most, where float32's rounding tips the balance."""
    assert got.dtype == np.float16
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() > 0  # else nothing was rounded
    assert (np.abs(got - expected.astype(np.float64)) <= np.spacing(np.abs(expected).astype(np.float16))).all()


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the pictures that were read, in order."""
    seen: list[str] = []

    def read(path: Path, size: int) -> Any:
        seen.append(path.name)
        return load_and_preprocess_image(path, size)

    monkeypatch.setattr(features, "load_and_preprocess_image", read)
    return seen


@pytest.mark.parametrize("end", [0, 2])
def test_holds_the_networks_states(tmp_path: Path, vision: VisionTransformer, pictures: list[Path], end: int) -> None:
    kept = store(tmp_path, vision, end)
    kept.fill(pictures)
    order = [pictures[i] for i in (3, 0, 1, 0)]
    assert_rounded(kept[order], states(vision, order, end))
    assert kept[[]].shape == (0, CONFIG.tokens, CONFIG.hidden_size)


@pytest.mark.usefixtures("eager")
def test_computes_each_picture_once(
    tmp_path: Path, vision: VisionTransformer, pictures: list[Path], reads: list[str]
) -> None:
    store(tmp_path, vision).fill([*pictures[:3], pictures[0]])
    assert reads == ["a.png", "a.png", "b.png"]
    again = store(tmp_path, vision)
    again.fill(pictures)
    assert reads[3:] == ["c.png", "d.png"]
    assert_rounded(again[pictures], states(vision, pictures, 2))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("left_behind", [7, 3 * STATE + 5])
def test_overwrites_what_an_interrupted_write_left_behind(
    tmp_path: Path, vision: VisionTransformer, pictures: list[Path], left_behind: int
) -> None:
    store(tmp_path, vision).fill(pictures[:3])
    with (tmp_path / "kept" / "after_2.f16").open("ab") as file:
        file.write(b"\x3c" * left_behind)
    resumed = store(tmp_path, vision)
    resumed.fill(pictures)
    assert_rounded(resumed[pictures], states(vision, pictures, 2))


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("lost", [1, 2 * STATE])
def test_computes_again_what_a_crash_lost(
    tmp_path: Path, vision: VisionTransformer, pictures: list[Path], lost: int
) -> None:
    """The names reached the disk, the end of the states didn't."""
    store(tmp_path, vision).fill(pictures[:3])
    data = tmp_path / "kept" / "after_2.f16"
    data.write_bytes(data.read_bytes()[:-lost])
    resumed = store(tmp_path, vision)
    resumed.fill(pictures)
    assert_rounded(resumed[pictures], states(vision, pictures, 2))


@pytest.mark.usefixtures("eager")
def test_goes_on_after_a_picture_that_cannot_be_read(
    tmp_path: Path, vision: VisionTransformer, pictures: list[Path], reads: list[str]
) -> None:
    good = pictures[3].read_bytes()
    pictures[3].write_bytes(b"no picture")
    with pytest.raises(PictureError):
        store(tmp_path, vision).fill(pictures)
    pictures[3].write_bytes(good)
    reads.clear()
    resumed = store(tmp_path, vision)
    resumed.fill(pictures)
    assert reads == ["b.png", "c.png", "d.png"]  # the first batch of two was kept
    assert_rounded(resumed[pictures], states(vision, pictures, 2))


def test_goes_on_from_another_store(
    tmp_path: Path, vision: VisionTransformer, pictures: list[Path], reads: list[str]
) -> None:
    first = store(tmp_path, vision, 1)
    first.fill(pictures[:1])
    second = store(tmp_path, vision, 2, first)
    second.fill(pictures)
    assert len(reads) == len(pictures)  # no picture was read twice
    given = first[pictures].astype(np.float32)
    assert_rounded(second[pictures], numpy_of(vision.encoder(given, first=1, end=2)))
    direct = states(vision, pictures, 2)
    rounding = np.finfo(np.float16).eps * np.abs(direct).max()  # of the first store's states, through one block
    assert np.abs(second[pictures] - direct).max() < 4 * rounding
    assert np.abs(first[pictures] - direct).max() > 20 * rounding


@pytest.mark.usefixtures("eager")
def test_an_unknown_picture_is_an_error(tmp_path: Path, vision: VisionTransformer, pictures: list[Path]) -> None:
    kept = store(tmp_path, vision)
    kept.fill(pictures[:2])
    with pytest.raises(KeyError, match=r"b\.png"):
        kept[pictures[:3]]


@pytest.mark.usefixtures("eager")
def test_pictures_are_known_by_their_place_below_the_root(
    tmp_path: Path, vision: VisionTransformer, pictures: list[Path]
) -> None:
    """So a data set may be moved."""
    store(tmp_path, vision).fill(pictures)
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = FeatureStore(tmp_path / "kept", tmp_path / "moved", vision, 2)
    there = [tmp_path / "moved" / p.relative_to(tmp_path / "data") for p in pictures]
    assert_rounded(moved[there], states(vision, there, 2))
