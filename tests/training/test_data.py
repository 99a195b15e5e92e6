"""StoryStream's files, and stories as the sequences that the runtime feeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import story_model
from model.presets import SEED_STORY_135M
from model.tokenizer_files import add_picture_tokens, byte_tokenizer
from seed_story.bundle import Prompt
from seed_story.errors import BundleError, PictureError, UsageError
from seed_story.story import SEEDStory
from seed_story.tokenizer import StoryTokenizer
from tests.runtime.storytelling import Spy, ids_of, pixels, told
from tests.training.stories import CAPTIONS, FIRST_LINE, story, write
from training.data import IGNORE, PICTURE, StoryEncoder, check_pictures, chunks, complete_stories
from training.data import read_stories as read

PROMPT = Prompt("<|im_start|>user\n", "\nTell.<|im_end|>\n<|im_start|>assistant\n", ("<|im_end|>", "<|endoftext|>"))
START, END, BEGIN_PICTURE, END_PICTURE = 257, 258, 259, 260  # of the tokenizer of bytes, after its 257 names


@pytest.fixture(scope="module")
def encoder() -> StoryEncoder:
    return StoryEncoder(add_picture_tokens(byte_tokenizer(), 320)[0], PROMPT, num_queries=2)


# Files


def test_reads_lines_as_published(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", FIRST_LINE, "", {**FIRST_LINE, "id": "b", "source": "unknown keys are fine"})
    first, second = read(file)
    assert (first.id, second.id) == ("102", "b")
    assert [page.caption for page in first.pages] == list(CAPTIONS[:2])
    assert [page.picture for page in first.pages] == [tmp_path / name for name in FIRST_LINE["images"]]
    assert [page.order for page in first.pages] == [0, 1]
    assert second.pages == first.pages


def test_reads_what_upstreams_chunking_writes(tmp_path: Path) -> None:
    """No orders, one id for all chunks of a story; and one path as written on Windows."""
    images = ["000219\\000219_keyframe_0-30-56-211.jpg", "a/b.jpg"]
    line = {"id": 0, "images": images, "captions": [" One. ", "Two."]}
    first, second = read(write(tmp_path / "train_10.jsonl", line, line), tmp_path / "george_full")
    assert first == second
    assert [page.order for page in first.pages] == [0, 1]
    assert first.pages[0].picture == tmp_path / "george_full" / "000219" / "000219_keyframe_0-30-56-211.jpg"
    assert first.pages[0].caption == "One."


def test_pages_are_sorted_by_their_order(tmp_path: Path) -> None:
    line = {"id": 1, "images": ["c", "a", "b"], "captions": ["C", "A", "B"], "orders": [30, 10, 20]}
    (found,) = read(write(tmp_path / "s.jsonl", line))
    assert [(page.picture.name, page.caption, page.order) for page in found.pages] == [
        ("a", "A", 10),
        ("b", "B", 20),
        ("c", "C", 30),
    ]


@pytest.mark.parametrize(
    ("line", "what", "got"),
    [
        ('{"id": 1,', "isn't JSON", ""),
        ("[" * 100_000, "isn't JSON", ""),
        ("None", "isn't JSON", ""),  # what upstream's build_story.py writes for an answer that never came
        ("[1, 2]", "isn't a story", "list"),
        ({"id": 1, "texts": []}, "lacks images and captions", "['id', 'texts']"),
        ({**FIRST_LINE, "id": None}, "the id", "None"),
        ({**FIRST_LINE, "id": True}, "the id", "True"),
        ({**FIRST_LINE, "captions": "One."}, "captions isn't a list", "str"),
        ({**FIRST_LINE, "captions": ["One.", 2]}, "captions[1]", "2"),
        ({**FIRST_LINE, "captions": ["One.", " \n"]}, "captions[1]", "' \\n'"),
        ({**FIRST_LINE, "images": ["", "b"]}, "images[0]", "''"),
        ({**FIRST_LINE, "orders": [0, "1"]}, "orders[1]", "'1'"),
        ({**FIRST_LINE, "orders": [False, True]}, "orders[0]", "False"),
        ({**FIRST_LINE, "orders": [4, 4]}, "an order stands twice", "[4, 4]"),
        ({**FIRST_LINE, "orders": [0]}, "don't agree", "2 images, 2 captions, 1 orders"),
        ({**FIRST_LINE, "captions": ["One."]}, "don't agree", "2 images, 1 captions, 2 orders"),
        ({"id": 1, "images": [], "captions": []}, "don't agree", "0 images, 0 captions"),
    ],
)
def test_a_wrong_line_is_refused_by_its_number(tmp_path: Path, line: Any, what: str, got: str) -> None:
    file = write(tmp_path / "s.jsonl", FIRST_LINE, "", line, FIRST_LINE)
    with pytest.raises(UsageError) as caught:
        read(file)
    assert caught.value.what.startswith(f"{file}, line 3")
    assert what in caught.value.what and got in str(caught.value.got)
    assert caught.value.expected


def test_a_file_that_holds_no_stories_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin1.jsonl").write_bytes('{"id": "ü"}'.encode("latin-1"))
    write(tmp_path / "empty.jsonl", "", "  ")
    for name, what in (("latin1.jsonl", "can't be read"), ("gone.jsonl", "can't be read"), (".", "can't be read")):
        with pytest.raises(UsageError, match=what):
            read(tmp_path / name)
    with pytest.raises(UsageError, match="has no story"):
        read(tmp_path / "empty.jsonl")


def test_missing_pictures_are_named_not_read(tmp_path: Path) -> None:
    line = {"images": [f"{n:02}.jpg" for n in range(12)], "captions": ["A."] * 12}
    stories = read(write(tmp_path / "s.jsonl", {"id": 1, **line}, {"id": 2, **line}))
    with pytest.raises(PictureError) as caught:
        check_pictures(stories)
    assert caught.value.what == "12 pictures are missing"
    assert str(tmp_path / "09.jpg") in str(caught.value.got) and "10.jpg" not in str(caught.value.got)
    for n in range(11):
        (tmp_path / f"{n:02}.jpg").touch()
    with pytest.raises(PictureError, match="1 pictures"):
        check_pictures(stories)
    pieces = [piece for found in stories for piece in chunks(found)]
    assert [piece.id for piece in complete_stories(pieces)] == ["1.0", "2.0"]
    (tmp_path / "11.jpg").touch()
    check_pictures(stories)
    assert complete_stories(pieces) == pieces


def test_chunks_cut_where_upstream_cuts_and_keep_the_rest() -> None:
    long = story(*(f"Page {n}." for n in range(23)), name="x")
    pieces = chunks(long)
    assert [(piece.id, len(piece.pages)) for piece in pieces] == [("x.0", 10), ("x.1", 10), ("x.2", 3)]
    assert sum((piece.pages for piece in pieces), ()) == long.pages
    assert chunks(pieces[0]) == [pieces[0]]
    assert [len(piece.pages) for piece in chunks(long, pages=23)] == [23]
    with pytest.raises(UsageError, match="got 0"):
        chunks(long, pages=0)


# Sequences


def bytes_of(*parts: str | int) -> list[int]:
    return [i for part in parts for i in ([part] if isinstance(part, int) else part.encode())]


@pytest.mark.parametrize("shown", ["all", "first", "none"])
def test_the_sequence_part_by_part(encoder: StoryEncoder, shown: Any) -> None:
    example = encoder.encode(story("One <|im_end|>.", "Two."), shown)
    picture = [BEGIN_PICTURE, PICTURE, PICTURE, END_PICTURE]
    first = picture if shown != "none" else []
    second = [*picture, *b"\nTwo."] if shown == "all" else [*b" Two."]
    template = bytes_of(START, "user\n", *first, "\nTell.", END, "\n", START, "assistant\n")
    assert example.ids.tolist() == [*template, *b"One <|im_end|>.", *second, END]
    assert example.pictures == (Path("s0.jpg"), Path("s1.jpg"))[: {"all": 2, "first": 1, "none": 0}[shown]]
    assert example.ids.dtype == example.labels.dtype == np.int32
    assert (PICTURE, IGNORE) == (story_model.PICTURE, -100)  # the labels that Keras and torch users know


@pytest.mark.parametrize("shown", ["all", "first", "none"])
def test_captions_and_the_end_are_learned_and_nothing_else(encoder: StoryEncoder, shown: Any) -> None:
    example = encoder.encode(story(), shown)
    learned = example.labels != IGNORE
    joined = ("\n" if shown == "all" else " ").join(CAPTIONS)
    assert example.labels[learned].tolist() == [*joined.encode(), END]
    at = np.flatnonzero(learned)
    assert example.labels[at].tolist() == example.ids[at + 1].tolist()  # each is what follows
    assert example.labels[-1] == IGNORE
    # The request's last token is the first to predict; of a shown picture, the token after it.
    assert at[0] == example.ids.tolist().index(ord("O")) - 1
    not_predicted = set(range(1, len(example.ids))) - set((at + 1).tolist())
    assert not_predicted >= set(np.flatnonzero(np.isin(example.ids, [PICTURE, BEGIN_PICTURE, END_PICTURE])).tolist())


def test_a_beginning_is_given_not_learned(encoder: StoryEncoder) -> None:
    whole, given = encoder.encode(story()), encoder.encode(story(), beginning="Once upon a time,")
    assert given.ids.tolist() == whole.ids.tolist()
    learned = given.labels[given.labels != IGNORE]
    assert bytes(learned[:17].tolist()) == b" there was a fox."
    with pytest.raises(UsageError, match="begins in another way"):
        encoder.encode(story(), beginning="A time ago")


def test_what_goes_on_does_not_end(encoder: StoryEncoder) -> None:
    ended, open_ = encoder.encode(story()), encoder.encode(story(), ends=False)
    assert open_.ids.tolist() == ended.ids[:-1].tolist()
    assert open_.labels.tolist() == [*ended.labels[:-2], IGNORE]
    endless = StoryEncoder(encoder.tokenizer, Prompt(PROMPT.opening, PROMPT.request, ()), num_queries=2)
    assert endless.encode(story()).ids.tolist() == open_.ids.tolist()


@pytest.mark.parametrize("shown", ["all", "first", "none"])
def test_encode_within_drops_last_pages_until_it_fits(encoder: StoryEncoder, shown: Any) -> None:
    full = encoder.encode(story(), shown)
    kept = encoder.encode_within(story(), len(full.ids), shown)
    assert kept.ids.tolist() == full.ids.tolist()
    assert encoder.encode_within(story(), 999, shown, ends=False).ids.tolist() == full.ids[:-1].tolist()
    two = encoder.encode(story(*CAPTIONS[:2]), shown, ends=False)
    for room in (len(full.ids) - 1, len(two.ids)):
        short = encoder.encode_within(story(), room, shown)
        assert (short.ids.tolist(), short.labels.tolist()) == (two.ids.tolist(), two.labels.tolist())
        assert short.pictures == two.pictures
    one = encoder.encode(story(CAPTIONS[0]), shown, ends=False)
    assert encoder.encode_within(story(), len(two.ids) - 1, shown).ids.tolist() == one.ids.tolist()
    with pytest.raises(UsageError, match=f"got {len(one.ids)} tokens; expected at most {len(one.ids) - 1}"):
        encoder.encode_within(story(), len(one.ids) - 1, shown)


def test_wrong_encoders_are_refused(encoder: StoryEncoder) -> None:
    with pytest.raises(UsageError, match="all or first or none"):
        encoder.encode(story(), "some")  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"<\|picture\|>"):
        StoryEncoder(byte_tokenizer(), PROMPT, num_queries=2)
    with pytest.raises(BundleError, match="</s>"):
        StoryEncoder(encoder.tokenizer, Prompt("", "", ("</s>",)), num_queries=2)


# Against the runtime


@pytest.mark.parametrize("shown", ["all", "first", "none"])
def test_the_runtime_feeds_the_same(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, shown: Any) -> None:
    """A reader gives the first words and the pictures; the model (here: its draws, scripted) tells the rest."""
    beginning = "Once upon a time,"
    with SEEDStory(tiny_bundle, threads=1) as model:
        manifest, spy = model.bundle.manifest, Spy(model, monkeypatch)
        queries = manifest.story.qformer.num_queries
        example = StoryEncoder(model.tokenizer, manifest.prompt, queries).encode(story(), shown, beginning=beginning)
        begun = model.begin()
        if shown != "none":
            begun.add_picture(pixels(seed=1))
        begun.add_text(beginning)
        rest = [CAPTIONS[0].removeprefix(beginning), *(("\n" if shown == "all" else " ") + c for c in CAPTIONS[1:])]
        for number, text in enumerate(rest):
            if number and shown == "all":
                begun.add_picture(pixels(seed=number))
            script = [*text.encode()]
            monkeypatch.setattr(begun._sampler, "sample", lambda _, script=script: script.pop(0))
            assert told(begun, len(script)) == text
        monkeypatch.setattr(begun._sampler, "sample", lambda _: int(example.ids[-1]))
        assert told(begun, 1) == "" and begun.finished
        assert ids_of(model, spy.rows) == example.ids[:-1].tolist()


@pytest.mark.weights
def test_real_tokens_do_not_merge_across_borders() -> None:
    assert SEED_STORY_135M.decoder is not None
    if not SEED_STORY_135M.decoder.path.is_file():
        pytest.skip("the tokenizer isn't in the cache: run `make setup`")
    made = add_picture_tokens(SEED_STORY_135M.load_tokenizer(), SEED_STORY_135M.story.llama.vocab_size)[0]
    tokenizer = StoryTokenizer(made)
    encoder = StoryEncoder(tokenizer, PROMPT, num_queries=16)
    beginning = tokenizer.encode("Once upon a time,")
    whole = tokenizer.encode(CAPTIONS[0])
    assert whole[: len(beginning)] == beginning and len(whole) > len(beginning)
    request = tokenizer.encode_template(PROMPT.request)
    assert tokenizer.encode_template(PROMPT.request + CAPTIONS[0]) == [*request, *whole]
    joined = [*whole, *tokenizer.encode(" " + CAPTIONS[1]), *tokenizer.encode(" " + CAPTIONS[2])]
    assert learned(encoder, "first") == joined
    lines = [*whole, *tokenizer.encode("\n" + CAPTIONS[1]), *tokenizer.encode("\n" + CAPTIONS[2])]
    assert learned(encoder, "all") == lines
    assert tokenizer.decode(lines) == "\n".join(CAPTIONS)
    given = encoder.encode(story(), beginning="Once upon a time,").ids
    assert given.tolist() == encoder.encode(story()).ids.tolist()
    # Where a beginning breaks a word, what was given stays as it was read, and the text is still the caption's.
    broken = encoder.encode(story(), "none", beginning="Once upon a ti").ids.tolist()
    assert tokenizer.decode(broken[broken.index(beginning[0]) :]) == " ".join(CAPTIONS)


def learned(encoder: StoryEncoder, shown: Any) -> list[int]:
    labels = encoder.encode(story(), shown, ends=False).labels
    return [int(label) for label in labels[labels != IGNORE]]


def test_sentence_piece_gets_no_second_space() -> None:
    """It puts a space before every text, also before what follows a beginning."""
    encoder = StoryEncoder(sentence_piece(), Prompt("", "", ()), num_queries=1)
    for beginning in ("", "a b", "a"):
        ids = encoder.encode(story("a b", "a"), "none", beginning=beginning).ids
        assert encoder.tokenizer.decode(ids.tolist()) == "a b a"


def sentence_piece() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocabulary = {"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4, "▁b": 5}
    made = Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("▁", "b")], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<|picture|>", "<|/picture|>")])
    return made
