"""Stories saved, restored and forked: to the same tokens, or refused."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from seed_story.config import CacheConfig
from seed_story.errors import SnapshotError, UsageError
from seed_story.sampling import SamplingConfig
from seed_story.session import Story
from seed_story.snapshot import MAGIC, State, read_snapshot, write_snapshot
from seed_story.story import SEEDStory
from tests.runtime.storytelling import HOT, pixels, told

SINK = CacheConfig(32, 2, 6, 1, 2)
SAMPLING = SamplingConfig(temperature=1.0, min_p=0.0, no_repeat_ngram=3, stop=("never said",))
BUNDLE = {"decoder.tflite": "a" * 64}
STATE = State({"text": "é"}, {"keys": np.arange(6, dtype=np.float32).reshape(2, 3), "places": np.arange(3)})


@pytest.fixture(scope="module", params=["float32", "int8"])
def model(request: pytest.FixtureRequest) -> Iterator[SEEDStory]:
    """With either kind of cache."""
    bundle = request.getfixturevalue("loud_bundle" if request.param == "float32" else "loud_int8_cache")
    with SEEDStory(bundle, threads=1) as made:
        assert made.bundle.manifest.cache_dtype == request.param
        yield made


def begun(model: SEEDStory) -> Story:
    """A story with a picture that left, one in the ring, and one that isn't read yet."""
    story = model.begin(seed=5, sampling=SAMPLING, policy=SINK).add_picture(pixels(seed=1)).add_text("Once")
    told(story, 40)
    story.add_picture(pixels(seed=2))
    told(story, 7)
    return story.add_picture(pixels(seed=3))


# --------------------------------------------------------------------------------
# The file


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    write_snapshot(tmp_path / "a", STATE, BUNDLE)
    read = read_snapshot(tmp_path / "a", BUNDLE)
    assert read.values == STATE.values
    assert list(read.arrays) == ["keys", "places"]
    for name, array in STATE.arrays.items():
        np.testing.assert_array_equal(read.arrays[name], array)
        assert read.arrays[name].dtype == array.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_every_flipped_byte_is_refused(tmp_path: Path) -> None:
    """And every file that ends too early, or goes on."""
    path = tmp_path / "a"
    write_snapshot(path, STATE, BUNDLE)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(SnapshotError, match="damaged" if place >= len(MAGIC) else "isn't a snapshot"):
            read_snapshot(path, BUNDLE)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SnapshotError):
            read_snapshot(path, BUNDLE)
    path.write_bytes(whole + b"\0")
    with pytest.raises(SnapshotError, match="damaged"):
        read_snapshot(path, BUNDLE)


def test_another_bundle_and_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_snapshot(tmp_path / "a", STATE, BUNDLE)
    with pytest.raises(SnapshotError, match="another bundle"):
        read_snapshot(tmp_path / "a", {"decoder.tflite": "b" * 64})
    monkeypatch.setattr("seed_story.snapshot.SNAPSHOT_VERSION", 3)
    with pytest.raises(SnapshotError, match="another version; got 2; expected 3"):
        read_snapshot(tmp_path / "a", BUNDLE)


@pytest.mark.parametrize("place", ["nowhere", "folder/a"])
def test_a_file_that_is_not_there(tmp_path: Path, place: str) -> None:
    with pytest.raises(SnapshotError, match="can't be read"):
        read_snapshot(tmp_path / place, BUNDLE)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="can't be written"):
        write_snapshot(tmp_path / "folder" / "a", STATE, BUNDLE)


@pytest.mark.parametrize("call", ["os.fsync", "Path.replace"])
def test_killed_while_it_writes(tmp_path: Path, call: str) -> None:
    """`kill -9` before the new file is on the disk, and before it takes the old one's name: the old file is whole."""
    write_snapshot(tmp_path / "a", STATE, BUNDLE)
    before = (tmp_path / "a").read_bytes()
    killed = f"""
import os, sys
sys.path[:0] = {sys.path!r}
import numpy as np
from seed_story import snapshot
def die(*_):
    os.kill(os.getpid(), {int(signal.SIGKILL)})
snapshot.{call} = die
snapshot.write_snapshot({str(tmp_path / "a")!r}, snapshot.State({{}}, {{"keys": np.ones(9, np.float32)}}), {{}})
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_bytes() == before
    assert read_snapshot(tmp_path / "a", BUNDLE).values == STATE.values


# --------------------------------------------------------------------------------
# Stories


def test_a_restored_story_goes_on_to_the_same_tokens(model: SEEDStory, tmp_path: Path) -> None:
    """In this model after another story, and in one that is loaded anew."""
    story = begun(model)
    story.snapshot(tmp_path / "a")
    stats, before = vars(story.stats).copy(), (story.given, story.told)
    expected = told(story, 60)
    assert len(set(expected)) > 10
    model.begin().add_text("Something else")
    with SEEDStory(model.bundle.path, threads=1) as other:
        for by in (model, other):
            again = by.restore(tmp_path / "a")
            assert vars(again.stats) == stats
            assert (again.given, again.told) == before
            assert by.decoder.cache.config == SINK
            assert told(again, 60) == expected
            for got, kept in zip(by.decoder.cache.keys.arrays, model.decoder.cache.keys.arrays, strict=True):
                np.testing.assert_array_equal(got, kept)


@pytest.mark.parametrize("tokens", range(6))
def test_half_a_character_is_saved_too(model: SEEDStory, tmp_path: Path, tokens: int) -> None:
    whole = told(model.begin(seed=4, sampling=HOT).add_text("Once"), 40)
    story = model.begin(seed=4, sampling=HOT).add_text("Once")
    first = told(story, 8 + tokens)
    story.snapshot(tmp_path / "a")
    assert first + told(model.restore(tmp_path / "a"), 32 - tokens) == whole


def test_a_snapshot_before_the_first_word(model: SEEDStory, tmp_path: Path) -> None:
    model.begin(seed=3, sampling=SAMPLING).snapshot(tmp_path / "a")
    expected = told(model.begin(seed=3, sampling=SAMPLING).add_text("Once"), 20)
    assert told(model.restore(tmp_path / "a").add_text("Once"), 20) == expected


def test_restoring_ends_the_story_before(model: SEEDStory, tmp_path: Path) -> None:
    story = begun(model)
    story.snapshot(tmp_path / "a")
    model.restore(tmp_path / "a")
    for use in (lambda: story.add_text("x"), lambda: story.snapshot(tmp_path / "b"), story.fork, story.turn_page):
        with pytest.raises(UsageError, match="ended"):
            use()
    assert not (tmp_path / "b").exists()


def test_a_refused_snapshot_leaves_the_story_alone(model: SEEDStory, tiny_bundle: Path, tmp_path: Path) -> None:
    story = begun(model)
    with SEEDStory(tiny_bundle, threads=1) as other:
        other.begin().snapshot(tmp_path / "a")
    with pytest.raises(SnapshotError, match="another bundle"):
        model.restore(tmp_path / "a")
    assert not story.ended
    assert told(story, 3) is not None


@pytest.mark.parametrize(
    "lose",
    ["keys", "values", "keys_codes", "keys_scales", "values_codes", "values_scales",
     "slot_positions", "pending", "tail", "kept", "pictures", "generator"],
)  # fmt: skip
def test_every_part_of_a_snapshot_matters(model: SEEDStory, lose: str) -> None:
    """Without it the story goes on otherwise, or not at all."""
    if lose.endswith(("codes", "scales")) and model.bundle.manifest.cache_dtype == "float32":
        pytest.skip("a float32 cache has none")
    story = begun(model)
    state = story.state()
    expected = told(story, 60), model.decoder.cache.slot_positions.tolist()
    values, arrays = json.loads(json.dumps(state.values)), dict(state.arrays)
    if lose in arrays:
        arrays[lose] = arrays[lose][..., ::-1].copy()
    elif lose == "generator":
        values["sampler"]["generator"]["state"]["state"] = "1"
    else:
        in_ring = [picture for picture in values["cache"]["pictures"] if picture[2] is None]
        assert 0 < len(in_ring) < len(values["cache"]["pictures"])
        values["cache"] |= {"tail": {"tail": 10_000}, "kept": {"pictures": in_ring}, "pictures": {"pictures": []}}[lose]
    other = Story.from_state(model, State(values, arrays))
    model.add_fork(other)
    assert (told(other, 60), model.decoder.cache.slot_positions.tolist()) != expected


def test_the_attention_mass_is_saved_too(model: SEEDStory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshot, fork and rewind go on with it, to the same tokens and pictures; with another they keep others."""
    monkeypatch.setattr("seed_story.cache.ATTENTION_EVERY", 2)
    policy = CacheConfig(32, 2, 6, 1, 2, "attention-mass")
    story = model.begin(seed=5, sampling=SAMPLING, policy=policy).add_text("Once")
    for seed in range(2):
        story.add_picture(pixels(seed=seed))
        told(story, 31)
    story.add_picture(pixels(seed=2)).turn_page().snapshot(tmp_path / "a")

    def end(one: Story) -> tuple[str, list[int]]:
        return told(one, 40), model.decoder.cache.slot_positions.tolist()

    twin, other = story.fork(), story.fork()
    expected = end(story)
    assert end(twin) == end(story.rewind(1)) == expected
    state = other.state()
    masses = [mass for *_, group, mass in state.values["cache"]["pictures"] if group is not None]
    assert len(masses) == 2
    assert 0 < min(masses) < max(masses)
    for picture, mass in zip(state.values["cache"]["pictures"], reversed(masses), strict=False):
        picture[3] = mass
    swapped = Story.from_state(model, state)
    model.add_fork(swapped)
    assert end(swapped)[1] != expected[1]
    assert end(model.restore(tmp_path / "a")) == expected


def test_forks_go_on_on_their_own(model: SEEDStory) -> None:
    story = begun(model)
    same, other = story.fork(), story.fork(seed=77)
    pieces: dict[str, str] = {"story": "", "same": "", "other": ""}
    for _ in range(12):  # in turns
        pieces["other"] += told(other, 5)
        pieces["story"] += told(story, 5)
        pieces["same"] += told(same, 5)
    assert pieces["story"] == pieces["same"] != pieces["other"]
    assert pieces["story"] == told(begun(model), 60)
    for ended in (story, same, other):
        with pytest.raises(UsageError, match="ended"):
            ended.tell()


def test_a_fork_is_not_its_parent(model: SEEDStory) -> None:
    story = begun(model)
    fork = story.fork()
    fork.add_text(" And then").add_picture(pixels(seed=9))
    told(fork, 50)
    assert told(story, 60) == told(begun(model), 60)


# --------------------------------------------------------------------------------
# Pages


def test_pages(model: SEEDStory) -> None:
    """Together they are the story; each is at most twice as long as asked for."""
    picture = pixels(seed=1)
    pages = list(model.tell_pages(picture, "Once", pages=9, page_tokens=12, seed=5, sampling=SAMPLING, policy=SINK))
    assert len(pages) == 9
    story = model.begin(seed=5, sampling=SAMPLING, policy=SINK).add_picture(picture).add_text("Once")
    again = list(story.tell_pages(9, 12))
    assert again == pages
    assert "".join(pages) == "Once" + story.told
    assert story.page == 9
    assert 9 * 12 <= story.stats.tokens <= 9 * 24


def test_a_page_ends_with_a_sentence(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "One two. Three four five. Six seven! Eight. "
    story = model.begin(sampling=HOT).add_text("It began.")
    told(story, 1)
    ids = iter(model.tokenizer.encode(text * 3))
    monkeypatch.setattr(story._sampler, "sample", lambda _: next(ids))
    pages = story.tell_pages(3, 16)
    assert next(pages).endswith("One two. Three four five.")
    assert next(pages) == " Six seven! Eight."
    assert next(pages) == " One two. Three four five."
    assert next(pages, None) is None


def test_rewind(model: SEEDStory) -> None:
    """The same page again, another one with another seed, and pages that are gone."""
    story = begun(model)
    pages = [*story.tell_pages(4, 10)]
    assert [*story.rewind(4).tell_pages(1, 10)] == pages[3:]
    assert [*story.rewind(3).tell_pages(2, 10)] == pages[2:]
    assert [*story.rewind(3, seed=9).tell_pages(2, 10)] != pages[2:]
    assert story.page == 4
    story.rewind(3)
    for gone in (2, 4, 5, 0):
        with pytest.raises(UsageError, match="can't go back"):
            story.rewind(gone)


def test_rewind_within_the_loop(model: SEEDStory) -> None:
    story = begun(model)
    pages: list[str] = []
    for page in story.tell_pages(3, 10):
        pages.append(page)
        if len(pages) == 2:
            story.rewind(2)
    assert len(pages) == 4
    assert pages[1] == pages[2]


@pytest.mark.parametrize(("pages", "tokens"), [(0, 5), (5, 0), (-1, 5)])
def test_impossible_pages(model: SEEDStory, pages: int, tokens: int) -> None:
    with pytest.raises(UsageError, match="impossible"):
        model.begin().add_text("Once").tell_pages(pages, tokens)


# --------------------------------------------------------------------------------
# Pictures


def test_a_picture_again_runs_no_graph(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its content, not by the array; the oldest of many is forgotten."""
    monkeypatch.setattr("seed_story.vision.PICTURES_KNOWN", 2)
    model.vision._known.clear()
    runs = []
    features: Callable[..., np.ndarray] = model.vision.features
    monkeypatch.setattr(model.vision, "features", lambda pixels: (runs.append(1), features(pixels))[1])
    first = model.vision.embeddings(pixels(seed=1)).copy()
    np.testing.assert_array_equal(model.vision.embeddings(pixels(seed=1)), first)
    assert len(runs) == 1
    assert not np.array_equal(model.vision.embeddings(pixels(seed=2)), first)
    model.vision.embeddings(pixels(seed=1))
    assert len(runs) == 2
    model.vision.embeddings(pixels(seed=3))  # the second was used longer ago than the first
    model.vision.embeddings(pixels(seed=1))
    assert len(runs) == 3
    model.vision.embeddings(pixels(seed=2))
    assert len(runs) == 4
    with pytest.raises(ValueError, match="read-only"):
        model.vision.embeddings(pixels(seed=1))[0] = 0
