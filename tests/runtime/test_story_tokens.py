"""What a user types, and what nobody should read: control tokens and stop strings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from seed_story.bundle import MANIFEST
from seed_story.errors import BundleError
from seed_story.sampling import SamplingConfig
from seed_story.story import SEEDStory
from tests.runtime.storytelling import GREEDY, HOT, Spy, drawn, ids_of, told

CONTROLS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<|picture|>", "<|/picture|>")


@pytest.mark.parametrize("typed", CONTROLS)
def test_typed_control_tokens_stay_text(model: SEEDStory, monkeypatch: pytest.MonkeyPatch, typed: str) -> None:
    spy = Spy(model, monkeypatch)
    story = model.begin(sampling=GREEDY).add_text(f"a{typed}b")
    list(story.tell(max_tokens=1))
    ids = ids_of(model, spy.rows)[-len(f"a{typed}b") :]
    assert ids == list(f"a{typed}b".encode())
    assert story.given == f"a{typed}b"


def test_no_control_token_is_ever_told(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the model wants nothing else, and a padded vocabulary's empty ids."""
    feed = model.decoder.feed

    def biased(embeddings: np.ndarray, pictures: Sequence[range], _: object) -> np.ndarray:
        logits = feed(embeddings, pictures).copy()
        logits[sorted(model.tokenizer.control_ids)] += 1000
        logits[model.tokenizer.vocab_size :] += 1000
        return logits

    monkeypatch.setattr(model.decoder, "feed", biased)
    for sampling in (GREEDY, HOT):
        story = model.begin(sampling=sampling).add_text("Once")
        accepted: list[int] = []
        accept = story._sampler.accept
        monkeypatch.setattr(story._sampler, "accept", lambda id_, to=(accepted.append, accept): [f(id_) for f in to])
        told(story, 60)
        assert len(accepted) == 60
        assert max(accepted) < 256
        assert not any(name in story.told for name in CONTROLS)


def test_end_token_ends_the_story_unseen(loud_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(loud_bundle, tmp_path / "ends")
    values = json.loads((tmp_path / "ends" / MANIFEST).read_text())
    values["prompt"]["end_tokens"] = ["<|im_end|>"]
    values["special_tokens"]["<|im_end|>"] = 258
    (tmp_path / "ends" / MANIFEST).write_text(json.dumps(values))
    with SEEDStory(tmp_path / "ends", threads=1) as model:
        story = model.begin(sampling=HOT).add_text("Once")
        queue = [*b"the ", *"🐻".encode()[:2], 258, *b"more"]
        monkeypatch.setattr(story._sampler, "sample", lambda _: queue.pop(0))
        assert told(story, 50) == "the \ufffd"
        assert story.finished and story.stats.tokens == 6
        assert told(story, 4) == "more"
        assert not story.finished


@pytest.mark.parametrize("name", ["<|im_end|>", "<|picture|>"])
def test_special_token_that_the_tokenizer_has_elsewhere(loud_bundle: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(loud_bundle, tmp_path / "b")
    values = json.loads((tmp_path / "b" / MANIFEST).read_text())
    values["prompt"]["end_tokens"] = ["<|im_end|>"]
    values["special_tokens"].update({"<|im_end|>": 258, name: 5})
    (tmp_path / "b" / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(BundleError) as caught:
        SEEDStory(tmp_path / "b")
    assert name in caught.value.what and caught.value.expected == 5


@pytest.mark.parametrize("how", ["missing", "unknown"])
def test_special_token_that_somebody_lacks(loud_bundle: Path, tmp_path: Path, how: str) -> None:
    shutil.copytree(loud_bundle, tmp_path / "b")
    values = json.loads((tmp_path / "b" / MANIFEST).read_text())
    name = "<|picture|>" if how == "missing" else "<|nothing|>"
    if how == "missing":
        del values["special_tokens"][name]
    else:
        values["prompt"]["end_tokens"] = [name]
    (tmp_path / "b" / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(BundleError) as caught:
        SEEDStory(tmp_path / "b")
    assert name in caught.value.what


def test_stories_that_end_by_themselves(tiny_bundle: Path) -> None:
    """Where every token is as likely as another, the end tokens come, and no other control token."""
    config = SamplingConfig(temperature=1e4, min_p=0.0, repetition_penalty=1.0)
    with SEEDStory(tiny_bundle, threads=1) as model:
        story = model.begin(seed=1, sampling=config).add_text("Once")
        ids, ends = drawn(story), 0
        while len(ids) < 4000:
            told(story, 500)
            ends += story.finished
            assert story.finished == (ids[-1] in model._end_ids)
        assert set(ids) == {*range(256), *model._end_ids}
        assert story.stats.tokens == len(ids) - ends
        assert ends > 5 and "<|" not in story.told


def test_stop_strings(model: SEEDStory) -> None:
    free = told(model.begin(seed=1, sampling=HOT).add_text("Once"), 80)
    for at in (5, 20):
        stop = free[at : at + 4]
        cut = free.find(stop)
        story = model.begin(seed=1, sampling=SamplingConfig(**{**vars(HOT), "stop": ("never", stop)})).add_text("Once")
        assert told(story, 80) == story.told == free[:cut]
        assert story.finished
        assert told(story, 10)  # and it goes on when asked to


def test_stop_string_that_never_completes_is_told(model: SEEDStory) -> None:
    free = told(model.begin(seed=1, sampling=HOT).add_text("Once"), 40)
    sampling = SamplingConfig(**{**vars(HOT), "stop": (free[-3:] + "\x00never",)})
    story = model.begin(seed=1, sampling=sampling).add_text("Once")
    assert told(story, 40) == free and not story.finished
