"""What the cache keeps: chosen in the bundle, chosen for a session, refused where it can't be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seed_story.bundle import MANIFEST, Bundle
from seed_story.config import CacheConfig, StoryConfig
from seed_story.errors import ConfigError, UsageError
from seed_story.policies import POLICIES
from seed_story.story import SEEDStory
from seed_story.telling import cache_config
from tests.runtime.paper_bundle import write_paper_bundle
from tests.runtime.storytelling import GREEDY, Spy, pixels, told

SINK = CacheConfig(32, 2, 6, 1, 2)  # two pictures of three anchors, and a ring of 24

# --------------------------------------------------------------------------------
# Geometries


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("cache", [CacheConfig(), CacheConfig(512, 0), CacheConfig(32, 2), SINK], ids=str)
def test_every_policy_has_the_same_slots(cache: CacheConfig, policy: str) -> None:
    made = cache.under(policy)
    assert made.policy == policy
    assert made.slots == cache.slots == made.sinks + made.anchors + made.ring
    assert made.under(policy) == made
    assert cache.under(cache.policy) == cache


def test_what_a_policy_adds_and_takes() -> None:
    cache = CacheConfig()
    assert cache.policy == "text-sink"
    assert cache.under("window") == replace(cache, sinks=0)
    assert cache.under("window").under("text-sink") == cache
    assert cache.under("multimodal-sink") == CacheConfig(512, 4, 60, 2, 4, "oldest")
    wider = cache.under("multimodal-sink", picture_begin=12, picture_end=12, picture_eviction="first-and-last")
    assert wider == CacheConfig(512, 4, 48, 12, 12, "first-and-last")
    assert (wider.pictures, wider.picture_anchors, wider.ring) == (2, 24, 460)
    assert SINK.under("text-sink") == CacheConfig(32, 2, 0, 1, 2)


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        ("windows", {}, "windows"),
        ("multimodal-sink", {"anchors": 7}, "multiple of 6"),
        ("multimodal-sink", {"anchors": 0}, "another policy"),
        ("multimodal-sink", {"picture_eviction": "youngest"}, "oldest or first-and-last or attention-mass"),
        ("multimodal-sink", {"picture_begin": 0, "picture_end": 0}, "another policy"),
        ("multimodal-sink", {"picture_end": -1}, "negative"),
        ("window", {"sinks": 3}, "another policy"),
        ("multimodal-sink", {"anchors": 510}, "no room for a ring"),
    ],
)
def test_impossible_policies_are_refused(policy: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CacheConfig().under(policy, **changes)


@pytest.mark.parametrize("tokens", [2, 25])
def test_pictures_that_do_not_fit(tokens: int) -> None:
    with pytest.raises(ConfigError, match="3 anchors to 24 ring slots"):
        SINK.check_picture(tokens)
    for fits in (3, 6, 24):
        SINK.check_picture(fits)
    SINK.under("text-sink").check_picture(tokens)  # where nothing is kept of them, any fit


# --------------------------------------------------------------------------------
# In the bundle


def test_a_bundle_keeps_its_policy(tmp_path: Path) -> None:
    cache = replace(SINK, picture_eviction="first-and-last")
    assert Bundle.open(write_paper_bundle(tmp_path / "a", cache=CacheConfig(**cache.to_dict()))).manifest.cache == cache


@pytest.mark.parametrize("anchors", [0, 5])
def test_a_bundle_from_before_the_anchors_promotes_nothing(tmp_path: Path, anchors: int) -> None:
    folder = write_paper_bundle(tmp_path / "old")
    values = json.loads((folder / MANIFEST).read_text())
    values["cache"] = {"slots": 12, "sinks": 2, "anchors": anchors}
    (folder / MANIFEST).write_text(json.dumps(values))
    cache = Bundle.open(folder).manifest.cache
    assert (cache.slots, cache.sinks, cache.anchors, cache.pictures) == (12, 2, anchors, 0)
    assert cache.policy == "text-sink"


def test_a_bundle_from_before_the_attention_refuses_what_needs_it(loud_bundle: Path, tmp_path: Path) -> None:
    """It tells stories as ever; for one by attention mass it must be exported again."""
    shutil.copytree(loud_bundle, tmp_path / "old")
    values = json.loads((tmp_path / "old" / MANIFEST).read_text())
    del values["attention"], values["contract"]["decoder"]["decode_attention"]
    (tmp_path / "old" / MANIFEST).write_text(json.dumps(values))
    with SEEDStory(tmp_path / "old", threads=1) as model:
        assert not model.bundle.manifest.steps.attention
        story = model.begin(sampling=GREEDY).add_text("Once")
        with pytest.raises(ConfigError, match=r"no signature 'decode_attention'.*Export the bundle again"):
            model.begin(policy=replace(SINK, picture_eviction="attention-mass"))
        assert told(story, 3) is not None


# --------------------------------------------------------------------------------
# In a session


def test_a_session_s_policy(model: SEEDStory) -> None:
    """The cache works by it, and the next story by the bundle's own again."""
    slots = model.cache.slots
    for policy in POLICIES:
        model.begin(policy=policy)
        assert model.decoder.cache.config == model.cache.under(policy)
    model.begin(policy=SINK)
    assert model.decoder.cache.config == SINK
    model.begin()
    assert model.decoder.cache.config == model.cache == CacheConfig(slots, 2)


def test_the_story_says_where_its_pictures_are(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among the first, after text, in the middle of telling, and two at once: each with its two tokens around it."""
    spy = Spy(model, monkeypatch)
    story = model.begin(sampling=GREEDY, policy=SINK)
    story.add_picture(pixels(0.1)).add_text("Once").add_picture(pixels(0.2))
    told(story, 30)
    story.add_picture(pixels(0.3)).add_picture(pixels(0.4)).add_text("So")
    told(story, 5)
    begin, end = (model.decoder.embed([id_])[0] for id_ in model._picture_ids)
    assert [len(p) for p in spy.pictures] == [6] * 4
    for picture in spy.pictures:
        np.testing.assert_array_equal(spy.rows[picture[0]], begin)
        np.testing.assert_array_equal(spy.rows[picture[-1]], end)
    assert sum(np.array_equal(row, begin) for row in spy.rows) == 4


def test_a_picture_that_left_is_still_seen(model: SEEDStory) -> None:
    """After more than a turn of the ring, its first and its last tokens lie among the anchors."""

    def positions(policy: CacheConfig) -> list[int]:
        story = model.begin(sampling=GREEDY, policy=policy).add_text("Once")
        story.add_picture(pixels(seed=1))
        told(story, 40)
        return model.decoder.cache.slot_positions[: policy.kept].tolist()

    kept = positions(SINK)
    opening = len(model.tokenizer.encode_template(model.bundle.manifest.prompt.opening))
    request = len(model.tokenizer.encode_template(model.bundle.manifest.prompt.request))
    first = opening + request + len("Once")
    assert kept == [0, 1, first, first + 4, first + 5, -1, -1, -1]
    assert positions(SINK.under("text-sink")) == [0, 1]


@pytest.mark.parametrize(
    "policy", ["sinks", CacheConfig(32, 2, 7, 3, 4), CacheConfig(32, 20, 7, 3, 4), CacheConfig(31, 2)], ids=str
)
def test_impossible_session_policies(model: SEEDStory, policy: Any) -> None:
    before = model.begin(sampling=GREEDY).add_text("Once")
    with pytest.raises((ConfigError, UsageError)):
        model.begin(policy=policy)
    assert told(before, 3) is not None  # it goes on


# --------------------------------------------------------------------------------
# On the command line


def test_the_command_line_s_policy() -> None:
    cache = CacheConfig()
    assert cache_config(cache, None, None) is cache
    assert cache_config(cache, "window", None) == cache.under("window")
    both = cache_config(cache, "multimodal-sink", "first-and-last")
    assert both == cache.under("multimodal-sink", picture_eviction="first-and-last")
    assert cache_config(both, None, "oldest") == cache.under("multimodal-sink")
    for policy in (None, "window", "text-sink"):
        with pytest.raises(UsageError, match="multimodal-sink"):
            cache_config(cache, policy, "oldest")
    with pytest.raises(UsageError, match="doesn't fit"):
        cache_config(CacheConfig(4, 2), "multimodal-sink", None)


def test_pictures_of_the_default_model_fit_the_default_policy() -> None:
    assert StoryConfig.tiny().picture_tokens == 6
    CacheConfig().under("multimodal-sink").check_picture(18)
