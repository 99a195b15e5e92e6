"""A long session's cache against formulas, and whether what goes wrong in it is seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import soak as benchmark
from benchmarks.soak import expected_angles, expected_slots, main, rotation_error, soak
from seed_story.cache import EMPTY, SinkCache
from seed_story.config import CacheConfig, LlamaConfig
from seed_story.errors import SeedStoryError, UsageError
from seed_story.resident import Resident
from seed_story.story import SEEDStory
from tests.export.tiny_decoders import gallery_of
from tests.reference.streaming_llama import frequencies, seen

SINK = CacheConfig(32, 2, 6, 1, 2)
GEOMETRIES = {
    "window": SINK.under("window"),
    "text-sink": SINK.under("text-sink"),
    "oldest": SINK,
    "first-and-last": CacheConfig(32, 2, 6, 1, 2, "first-and-last"),
    "one-for-ever": CacheConfig(32, 2, 3, 1, 2, "first-and-last"),
    "among-the-sinks": CacheConfig(32, 5, 3, 1, 2),
}


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is a byte here, and the sentence would fill a stretch."""
    monkeypatch.setattr(benchmark, "_READ", "So on. ")


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Iterator[SEEDStory]:
    with SEEDStory(tiny_bundle, threads=1) as made:
        yield made


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_formulas_are_the_rule(name: str) -> None:
    """`tests.reference` tells which tokens the next one sees, and in which order, without slots."""
    config, pictures = GEOMETRIES[name], [range(begin, begin + 6) for begin in range(3, 400, 19)]
    for told in range(1, 350):
        so_far = [picture for picture in pictures if picture.start < told]
        expected = seen(told, config.sinks, config.ring, so_far, gallery_of(config))
        slots = expected_slots(config, told, so_far)
        kept = [token for token in slots[: config.kept].tolist() if token != EMPTY]
        assert kept == expected[: len(kept)]
        ring = set(slots[config.kept :].tolist()) - {EMPTY}
        assert set(expected[len(kept) : -1]) <= ring  # the last is the next one itself; some of the ring is hidden
        angles = expected_angles(LlamaConfig.tiny(), config, told, so_far)
        places = np.array([told, len(expected) - 1])
        np.testing.assert_allclose(angles.astype(float), places[:, None] * frequencies(LlamaConfig.tiny()), rtol=1e-12)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_a_session_is_where_it_should_be(model: SEEDStory, name: str) -> None:
    found = soak(model, GEOMETRIES[name], tokens=1000, every=50, read=20)
    assert found["worst_rotation_error"] < 6e-8
    assert found["pictures"] == 20 and 1000 <= found["tokens"] < 1100
    assert 0 < found["told"] <= 1000 + 50 - 20 * 20


def test_a_wrong_rotation_is_seen() -> None:
    """A float32 angle is wrong in the fourth digit after 100,000 tokens."""
    cache, angles = SinkCache(LlamaConfig.tiny(), SINK), expected_angles(LlamaConfig.tiny(), SINK, 99_999, [])
    cache.position = 99_999
    assert rotation_error(cache, angles) < 6e-8
    assert rotation_error(cache, angles.astype(np.float32).astype(np.longdouble)) > 1e-4
    assert rotation_error(cache, expected_angles(LlamaConfig.tiny(), SINK, 100_000, [])) > 0.1


@pytest.mark.parametrize("slot", [1, 3, 20])
def test_a_token_in_a_wrong_slot_is_seen(model: SEEDStory, slot: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SinkCache.store

    def misplaced(self: SinkCache, *args: Any) -> None:
        store(self, *args)
        if self.position > 600:
            self.slot_positions[slot] += 1

    monkeypatch.setattr(SinkCache, "store", misplaced)
    with pytest.raises(SeedStoryError, match=f"in slot {slot}"):
        soak(model, SINK, tokens=1000, every=50, read=20)


def test_memory_that_grows_fails(model: SEEDStory) -> None:
    leak, flat = count(), Resident(50, 40)
    found = soak(model, SINK, tokens=1000, every=50, read=30, memory=lambda: Resident(50, 40 + 0.2 * next(leak)))
    assert (found["verdict"], found["memory"]["outcome"]) == ("FAIL", "drift")
    assert soak(model, SINK, tokens=1000, every=50, read=30, memory=lambda: flat)["verdict"] == "PASS"
    with pytest.raises(SeedStoryError, match="memory can't be read"):
        soak(model, SINK, tokens=1000, every=50, read=30, memory=lambda: None)


@pytest.mark.parametrize(("tokens", "every", "said"), [(500, 50, "20 to 1000 stretches"), (1000, 20, "too short")])
def test_impossible_soaks(model: SEEDStory, tokens: int, every: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        soak(model, SINK, tokens=tokens, every=every, read=20)


def test_the_command(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "--bundle",
        str(tiny_bundle),
        "--tokens",
        "1000",
        "--every",
        "50",
        "--threads",
        "1",
        "--policy",
        "window",
    ]
    code = main(command)
    *_, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert code == (found["verdict"] != "PASS")
    assert (found["policy"], found["threads"], found["pictures"]) == ("window", 1, 20)
    assert main(["--bundle", "nowhere"]) == 1
    assert "there is no such bundle" in capsys.readouterr().err


@pytest.mark.slow
def test_a_hundred_thousand_tokens(model: SEEDStory) -> None:
    found = soak(model, GEOMETRIES["first-and-last"], tokens=100_000, every=300, read=150)
    assert found["verdict"] == "PASS", found
    assert found["tokens"] >= 100_000
