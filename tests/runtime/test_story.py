"""The story session, on a model whose every part matters (`tests/loud.py`) and a cache of 32 slots."""

from __future__ import annotations

import gc
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seed_story.bundle import Bundle
from seed_story.decoder import next_chunk
from seed_story.errors import BackendError, PictureError
from seed_story.image import load_and_preprocess_image
from seed_story.sampling import SamplingConfig
from seed_story.story import SEEDStory
from tests.compare import assert_close
from tests.runtime.storytelling import GREEDY, HOT, ROOT, Spy, drawn, ids_of, layout, pixels, told

# --------------------------------------------------------------------------------
# Seeds


def test_same_seed_same_story_and_another_seed_another(model: SEEDStory) -> None:
    stories = {seed: model("Once", seed=seed, max_tokens=60) for seed in range(5)}
    assert len(set(stories.values())) == 5
    for seed, story in stories.items():
        assert model("Once", seed=seed, max_tokens=60) == story


def test_the_story_before_changes_nothing(model: SEEDStory) -> None:
    first = model((pixels(seed=1), "Once"), max_tokens=60, sampling=HOT)
    model((pixels(seed=2), "Quite something else, and long enough to fill the cache."), max_tokens=90, seed=9)
    assert model((pixels(seed=1), "Once"), max_tokens=60, sampling=HOT) == first


def test_another_load_tells_the_same(model: SEEDStory, loud_bundle: Path) -> None:
    with SEEDStory(loud_bundle, threads=1) as other:
        assert other("Once", max_tokens=60, seed=3) == model("Once", max_tokens=60, seed=3)


def test_other_beginnings_give_other_stories(model: SEEDStory) -> None:
    assert len({model(text, max_tokens=40, sampling=GREEDY)[len(text) :] for text in ("Once", "Twice", "one")}) == 3


# --------------------------------------------------------------------------------
# Against the Keras reference


def test_greedy_is_the_argmax_of_the_reference_far_past_the_end(
    model: SEEDStory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole session teacher-forced through Keras at once: template, picture, text and 200 told tokens."""
    from keras import ops

    from tests.loud import loud_source

    spy = Spy(model, monkeypatch)
    story = model.begin(sampling=GREEDY)
    picture = pixels(seed=4)
    story.add_picture(picture).add_text("Once")
    count = 200
    text = told(story, count)
    prompt = story.stats.prompt_tokens
    assert len(spy.rows) == prompt + count - 1 > 6 * model.cache.slots

    reference = loud_source().model
    queries = ops.convert_to_numpy(reference.embed_pictures(picture[None]))[0]
    ids = ids_of(model, spy.rows)
    places = [i for i, id_ in enumerate(ids) if id_ < 0]
    assert len(places) == len(queries)
    for place, query in zip(places, queries, strict=True):
        assert_close(spy.rows[place], query, "network")
    embeddings = ops.convert_to_numpy(reference.llama.embed(np.maximum([ids], 0))).copy()
    embeddings[0, places] = queries
    logits = ops.convert_to_numpy(reference.llama(embeddings, cache=model.cache))[0].copy()
    logits[:, sorted(model.tokenizer.control_ids)] = -np.inf
    logits[:, model.tokenizer.vocab_size :] = -np.inf
    chosen = logits[prompt - 1 :].argmax(-1).tolist()
    assert chosen[:-1] == ids[prompt:]
    assert text == model.tokenizer.decode(chosen).removesuffix("\ufffd") or text == model.tokenizer.decode(chosen)
    assert len(set(chosen)) > 20  # the story moves


@pytest.mark.parametrize("sizes", [(1,), (4, 1), (8, 1), (4, 8, 1)])
def test_chunks_do_not_change_the_greedy_story(
    model: SEEDStory, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    prompt = (pixels(seed=3), "A bear went out to look for honey in the dark wood.")
    expected = model(prompt, max_tokens=60, sampling=GREEDY)
    used = []

    def some(left: int, _: Any, most: int, begins: Any) -> tuple[int, int]:
        chunk = next_chunk(left, sizes, most)
        used.append(chunk[0])
        return chunk

    monkeypatch.setattr("seed_story.decoder.next_chunk", some)
    assert model(prompt, max_tokens=60, sampling=GREEDY) == expected
    assert set(used) <= set(sizes) and max(used) == max(sizes)


@pytest.fixture(scope="module")
def reference() -> Any:
    """Token ids and pictures to the logits after each of them, by the Keras networks with the same cache."""
    from keras import ops

    from seed_story.config import CacheConfig
    from tests.loud import loud_source

    network = loud_source().model

    def logits(*parts: list[int] | np.ndarray) -> np.ndarray:
        rows = [
            network.embed_pictures(part[None])
            if isinstance(part, np.ndarray)
            else network.llama.embed(np.array([part]))
            for part in parts
        ]
        hidden = network.llama.hidden(ops.concatenate(rows, axis=1), cache=CacheConfig(slots=32, sinks=2))
        return np.asarray(ops.convert_to_numpy(network.llama.head(hidden))[0])

    return logits


def best(model: SEEDStory, logits: np.ndarray) -> list[int]:
    allowed = np.array(sorted(set(range(model.tokenizer.vocab_size)) - model.tokenizer.control_ids))
    return allowed[logits[:, allowed].argmax(axis=1)].tolist()  # type: ignore[no-any-return]


def test_long_prompt_goes_on_as_the_reference_does(model: SEEDStory, reference: Any) -> None:
    text = "".join(map(chr, np.random.default_rng(3).integers(97, 123, 700)))
    prompt = model.bundle.manifest.prompt
    story = model.begin(sampling=GREEDY).add_text(text)
    ids = drawn(story)
    told(story, 60)
    given = model.tokenizer.encode_template(prompt.opening + prompt.request) + model.tokenizer.encode(text)
    assert best(model, reference([*given, *ids])[-61:-1]) == ids
    assert len(set(ids)) > 15


def test_picture_in_mid_story_goes_on_as_the_reference_does(model: SEEDStory, reference: Any) -> None:
    """In the middle there is no second request, and the cache has been full for long."""
    prompt, (begin, end) = model.bundle.manifest.prompt, model._picture_ids
    story = model.begin(sampling=GREEDY).add_picture(pixels(seed=1)).add_picture(pixels(seed=2)).add_text("Once")
    ids = drawn(story)
    told(story, 40)
    story.add_picture(pixels(seed=3)).add_text(" more")
    told(story, 40)
    request = [*model.tokenizer.encode_template(prompt.request), *b"Once"]
    start = [[*model.tokenizer.encode_template(prompt.opening), begin], pixels(seed=1), [end, begin], pixels(seed=2)]
    logits = reference(*start, [end, *request, *ids[:40], begin], pixels(seed=3), [end, *b" more", *ids[40:]])
    assert best(model, logits[-41:-1]) == ids[40:]
    middle = len(logits) - 40 - len(b" more") - 2 - 4  # the picture's four embeddings and its two tokens
    assert best(model, logits[middle - 41 : middle - 1]) == ids[:40]


def test_a_broken_picture_spoils_only_its_own_story(model: SEEDStory) -> None:
    expected = model("Once", max_tokens=40, sampling=GREEDY)
    with pytest.raises(BackendError):
        model((pixels(math.nan), "Once"), max_tokens=40, sampling=GREEDY)
    assert model("Once", max_tokens=40, sampling=GREEDY) == expected


def test_prompt_much_longer_than_the_cache(model: SEEDStory) -> None:
    long = "The bear walked on and on. " * 40
    assert len(long) > 30 * model.cache.slots
    first = model(long, max_tokens=50, sampling=GREEDY)
    assert first.startswith(long) and len(first) > len(long)
    assert model(long, max_tokens=50, sampling=GREEDY) == first
    assert model.decoder.cache.position > 1000


# --------------------------------------------------------------------------------
# Telling in parts


@pytest.mark.parametrize("sampling", [GREEDY, HOT, SamplingConfig()], ids=["greedy", "hot", "default"])
@pytest.mark.parametrize("part", [1, 2, 7, 50])
def test_telling_in_parts_is_telling_at_once(model: SEEDStory, sampling: SamplingConfig, part: int) -> None:
    whole = model.begin(seed=5, sampling=sampling).add_text("Once")
    told(whole, 100)
    parts = model.begin(seed=5, sampling=sampling).add_text("Once")
    pieces = [piece for at in range(0, 100, part) for piece in parts.tell(max_tokens=min(part, 100 - at))]
    assert "".join(pieces) == parts.told == whole.told
    assert parts.stats.tokens == whole.stats.tokens == 100


@pytest.mark.parametrize("seed", range(4))
def test_leaving_early_loses_nothing(model: SEEDStory, seed: int) -> None:
    whole = model.begin(seed=seed, sampling=HOT).add_text("Once")
    told(whole, 100)
    left = model.begin(seed=seed, sampling=HOT).add_text("Once")
    pieces: list[str] = []
    for leave in itertools.cycle((1, 3, 5)):
        rest = 100 - left.stats.tokens
        if not rest:
            break
        pieces += itertools.islice(left.tell(max_tokens=rest), leave)
    assert "".join(pieces) == left.told == whole.told


def test_leaving_early_with_half_a_stop_string(model: SEEDStory) -> None:
    """What is held back when the reader leaves isn't lost, and may still become the stop string."""
    free = told(model.begin(seed=2, sampling=HOT).add_text("Once"), 100)
    at = next(
        i for i in range(10, len(free) - 3) if free.find(free[i : i + 3]) == i and "\ufffd" not in free[i : i + 3]
    )
    story = model.begin(seed=2, sampling=SamplingConfig(**{**vars(HOT), "stop": (free[at : at + 3],)})).add_text("Once")
    for _ in range(200):
        for _ in story.tell(max_tokens=100):
            break
        if story.finished:
            break
    assert story.told == free[:at]
    assert story.finished


def test_a_character_across_two_tells_stays_whole(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = list("Ä🐻é".encode())
    story = model.begin().add_text("Once")
    monkeypatch.setattr(story._sampler, "sample", lambda _: queue.pop(0))
    pieces = [list(story.tell(max_tokens=1)) for _ in range(8)]
    assert pieces == [[], ["Ä"], [], [], [], ["🐻"], [], ["é"]]
    assert story.told == "Ä🐻é"


def test_text_after_half_a_character(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = [*"🐻".encode()[:2], *b"ab"]
    story = model.begin().add_text("Once")
    monkeypatch.setattr(story._sampler, "sample", lambda _: queue.pop(0))
    assert told(story, 2) == ""
    story.add_text(" then")
    assert told(story, 2) == "ab"


@pytest.mark.parametrize("seed", range(6))
def test_pieces_are_whole_and_joined_are_what_was_told(model: SEEDStory, seed: int) -> None:
    story = model.begin(seed=seed, sampling=HOT).add_text("Once")
    pieces = list(story.tell(max_tokens=150))
    assert all(pieces)
    assert not any("\ud800" <= letter <= "\udfff" for piece in pieces for letter in piece)
    assert "".join(pieces).encode().decode() == story.told  # strict: a lone surrogate would raise
    assert "\ufffd" in story.told  # what the model tells is broken all over
    assert any(ord(letter) > 0x7F and letter != "\ufffd" for letter in story.told)


def test_text_between_tells_is_read_where_it_stands(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(model, monkeypatch)
    story = model.begin(sampling=GREEDY).add_text("Once")
    first = [*story.tell(max_tokens=5)]
    story.add_text(" upon")
    second = [*story.tell(max_tokens=5)]
    ids = ids_of(model, spy.rows)
    start = story.stats.prompt_tokens - len(" upon")
    assert model.tokenizer.decode(ids[start - 4 : start]) == "Once"
    assert ids[start + 5 : start + 10] == list(b" upon")
    assert len(ids) == start + 5 + 5 + 4  # the last token waits
    assert story.given == "Once upon"
    assert story.told == "".join(first + second)


def test_parts_of_a_prompt_equal_the_whole(model: SEEDStory) -> None:
    """Also what the penalty for repetition remembers of it."""
    whole = told(model.begin(seed=5).add_text("Once upon a time"), 60)
    for cut in ([1], [4, 5], range(1, 16)):
        story = model.begin(seed=5)
        for start, end in itertools.pairwise([0, *cut, 16]):
            story.add_text("Once upon a time"[start:end])
        assert told(story, 60) == whole
    at_once = told(model.begin(sampling=GREEDY).add_text("Once upon a time"), 60)
    assert told(model.begin(sampling=GREEDY).add_text("Once").add_text(" upon a ").add_text("time"), 60) == at_once


# --------------------------------------------------------------------------------
# Pictures, and the request that comes once


def test_request_goes_after_the_first_pictures_once(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(model, monkeypatch)
    prompt = model.bundle.manifest.prompt
    story = model.begin(sampling=GREEDY)
    story.add_picture(pixels(0.1)).add_picture(pixels(0.9)).add_text("Once").add_text(" upon")
    list(story.tell(max_tokens=1))
    story.add_picture(pixels(0.5)).add_text(" a")
    list(story.tell(max_tokens=1))
    told_first = model.tokenizer.decode(ids_of(model, spy.rows)[-len("<****> a") - 1 :][:1])
    expected = f"{prompt.opening}[picture][picture]{prompt.request}Once upon{told_first}[picture] a"
    assert layout(model, spy.rows) == expected


def test_request_without_any_text(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(model, monkeypatch)
    prompt = model.bundle.manifest.prompt
    for _ in range(2):
        spy.rows.clear()
        list(model.begin(sampling=GREEDY).add_picture(pixels(0.1)).tell(max_tokens=1))
        assert layout(model, spy.rows) == f"{prompt.opening}[picture]{prompt.request}"
        spy.rows.clear()
        list(model.begin(sampling=GREEDY).tell(max_tokens=1))
        assert layout(model, spy.rows) == prompt.opening + prompt.request


def test_pictures_change_the_story(model: SEEDStory) -> None:
    def story(*pictures: np.ndarray) -> str:
        story = model.begin(sampling=GREEDY).add_text("Once")
        list(story.tell(max_tokens=5))
        for picture in pictures:
            story.add_picture(picture)
        return told(story, 60)

    dark, bright = pixels(0.1), pixels(seed=8)
    stories = [story(), story(dark), story(bright), story(dark, bright), story(bright, dark)]
    assert len(set(stories)) == 5
    assert story(dark) == stories[1]


def test_pictures_as_they_come(model: SEEDStory, tmp_path: Path) -> None:
    """A path, a Pillow image, bytes and pixels of one picture are the same picture."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (40, 50, 3), np.uint8))
    image.save(tmp_path / "a.png")
    forms = [tmp_path / "a.png", image, (tmp_path / "a.png").read_bytes(), np.asarray(image),
             load_and_preprocess_image(tmp_path / "a.png", 28)]  # fmt: skip

    def story(form: Any) -> str:
        return told(model.begin(sampling=GREEDY).add_text("Once").add_picture(form), 40)

    assert len({story(form) for form in forms}) == 1


@pytest.mark.parametrize(
    "wrong",
    [pixels()[0], pixels()[:, :27], np.zeros((2, 28, 28, 3), np.float32), np.zeros((1, 28, 28, 4), np.float32),
     pixels().astype(np.float64), pixels().astype(np.float16), np.zeros((1, 28, 28, 3), np.int64),
     np.zeros((0,), np.float32)],
    ids=lambda array: f"{array.dtype}{array.shape}",
)  # fmt: skip
def test_pixels_of_another_form(model: SEEDStory, wrong: np.ndarray) -> None:
    story = model.begin()
    before = story.stats.prompt_tokens
    with pytest.raises(PictureError) as caught:
        story.add_picture(wrong)
    assert caught.value.got == (wrong.dtype.name, *wrong.shape)
    assert caught.value.expected == ("float32", 1, 28, 28, 3)
    assert "load_and_preprocess_image" in caught.value.hint
    assert story.stats.prompt_tokens == before  # nothing of it was added
    assert told(story.add_text("Once"), 3) is not None


# --------------------------------------------------------------------------------
# The short form, two models, numbers


def test_forms_of_the_call(model: SEEDStory, tmp_path: Path) -> None:
    Image.new("RGB", (30, 30), "orange").save(tmp_path / "a.png")
    picture = load_and_preprocess_image(tmp_path / "a.png", 28)
    for beginning, given in (
        ("Once", "Once"),
        (("Once",), "Once"),
        (["Once", " upon"], "Once upon"),
        (picture, ""),
        (tmp_path / "a.png", ""),
        ((picture, "Once"), "Once"),
        ((tmp_path / "a.png", "Once"), "Once"),
        (("Once", picture, " upon", picture), "Once upon"),
    ):
        text = model(beginning, max_tokens=20, sampling=GREEDY)
        assert text.startswith(given) and len(text) > len(given)
        story = model.begin(sampling=GREEDY)
        for part in [beginning] if isinstance(beginning, (str, Path, np.ndarray)) else beginning:
            story.add_text(part) if isinstance(part, str) else story.add_picture(part)
        assert text == given + told(story, 20)


def test_two_models_at_once(loud_bundle: Path, tiny_bundle: Path, model: SEEDStory) -> None:
    expected = model("Once", max_tokens=40, sampling=GREEDY)
    with SEEDStory(loud_bundle, threads=1) as a, SEEDStory(Bundle.open(loud_bundle), threads=2) as b:
        first, second = (m.begin(sampling=GREEDY).add_text("Once") for m in (a, b))
        turns = [story.tell(max_tokens=40) for story in (first, second)]
        texts = ["", ""]
        for pieces in itertools.zip_longest(*turns, fillvalue=""):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        assert ["Once" + text for text in texts] == [expected, expected]
    assert model("Once", max_tokens=40, sampling=GREEDY) == expected  # closing them took nothing of ours


def test_stats(model: SEEDStory) -> None:
    story = model.begin(sampling=GREEDY)
    stats, prompt = story.stats, model.bundle.manifest.prompt
    opening = len(model.tokenizer.encode_template(prompt.opening))
    assert stats.prompt_tokens == opening
    assert stats.decode_tokens_per_second is None and stats.time_to_first_token_ms is None
    story.add_picture(pixels())
    queries = model.bundle.manifest.story.qformer.num_queries
    assert stats.prompt_tokens == opening + queries + 2
    assert stats.picture_ms > 0
    story.add_text("Once")
    request = len(model.tokenizer.encode_template(prompt.request))
    assert stats.prompt_tokens == opening + queries + 2 + request + 4
    list(story.tell(max_tokens=1))
    assert (stats.tokens, stats.steps) == (1, 0)
    assert stats.prefill_ms > 0 and stats.decode_ms == 0
    assert stats.time_to_first_token_ms == pytest.approx(stats.picture_ms + stats.prefill_ms)
    first = stats.time_to_first_token_ms
    list(story.tell(max_tokens=30))
    assert (stats.tokens, stats.steps) == (31, 30)
    assert stats.time_to_first_token_ms == first
    assert stats.decode_tokens_per_second == pytest.approx(30 / stats.decode_ms * 1e3)
    story.add_text(" upon")
    list(story.tell(max_tokens=2))
    assert (stats.tokens, stats.steps) == (33, 31)
    assert stats.prompt_tokens == opening + queries + 2 + request + 4 + 5
    assert model.decoder.cache.position == stats.prompt_tokens + stats.tokens - 1


def resident_kib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1024


MEMORY = """
import gc, os, sys
from pathlib import Path
from seed_story import SEEDStory, SamplingConfig
def kib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
with SEEDStory(sys.argv[1], threads=1) as model:
    story = model.begin(sampling=SamplingConfig(no_repeat_ngram=3)).add_text("Once")
    def tell(count):
        for piece in story.tell(max_tokens=count):
            pass
        gc.collect()
    tell(600)
    before = kib()
    tell(2000)
    print(kib() - before, story.stats.tokens)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux's /proc")
def test_memory_does_not_grow_over_two_thousand_tokens(loud_bundle: Path) -> None:
    """In a process of its own: in this one TensorFlow comes and goes."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, loud_bundle], capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "runtime")},
    )  # fmt: skip
    grown, tokens = map(int, done.stdout.split())
    assert tokens == 2600
    assert grown < 1024


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs Linux's /proc")
def test_memory_does_not_grow_over_many_stories(model: SEEDStory) -> None:
    def tell() -> None:
        for seed in range(30):
            model((pixels(seed=seed), "Once"), max_tokens=10, seed=seed)
        gc.collect()

    tell()
    before = resident_kib()
    tell()
    assert resident_kib() - before < 1024


def test_given_text_counts_for_the_penalties(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    story = model.begin()
    accepted: list[int] = []
    monkeypatch.setattr(story._sampler, "accept", accepted.append)
    story.add_text("Once")
    assert accepted == list(b"Once")
