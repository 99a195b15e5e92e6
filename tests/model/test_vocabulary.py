"""A trimmed vocabulary: the same pieces where all stay, bytes elsewhere, and the same story."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from export.__main__ import main
from export.export import ExportOptions, export_bundle
from model.layers import named_variables, numpy_of
from model.story_source import StorySource
from model.tokenizer_files import byte_letters
from model.vocabulary import kept_ids, read_corpus, trim_source, trim_tokenizer
from quantization.recipe import load_recipe
from seed_story.bundle import Bundle
from seed_story.config import CacheConfig
from seed_story.contract import Steps
from seed_story.errors import ConfigError, UsageError
from seed_story.sampling import SamplingConfig
from seed_story.story import SEEDStory
from seed_story.tokenizer import StoryTokenizer
from tests.loud import loud_source

TEXT = "the fox and the hen sat in the warm barn while the other hens were gathering the eggs in the morning"
WORDS = TEXT.split()
CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|picture|>", "<|/picture|>"]
SIZE = 309
"""Tokens of `whole_json`; the tiny preset's table has more rows."""


@cache
def whole_json() -> str:
    """A byte-level tokenizer of 256 bytes and merges, whose control tokens come first, as SmolLM2's do."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=400, special_tokens=[AddedToken(name, special=True) for name in CONTROLS],
                         initial_alphabet=byte_letters(), show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    assert tokenizer.get_vocab_size() == SIZE
    return str(tokenizer.to_str())


def source() -> StorySource:
    return replace(loud_source(), tokenizer=Tokenizer.from_str(whole_json()))


@cache
def trimmed(*texts: str) -> tuple[list[int], StoryTokenizer, StoryTokenizer]:
    """The kept ids, the whole tokenizer and the small one."""
    kept = kept_ids(source(), texts)
    whole = Tokenizer.from_str(whole_json())
    return kept, StoryTokenizer(Tokenizer.from_str(whole_json())), StoryTokenizer(trim_tokenizer(whole, kept))


def pieces(tokenizer: StoryTokenizer, text: str) -> list[bytes]:
    return [tokenizer.token_bytes(i) for i in tokenizer.encode(text)]


TRICKY = [*WORDS, "hen sat", "thehen", "gath", "xyz", "\n", "ü", "🦊"]
CORPUS = ("the hen sat in the barn", " gathering")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([*WORDS, "hen sat", "thehen", "gath", "xyz", "\n", "ü", "🦊"]), max_size=8), st.booleans()
)
def test_the_same_pieces_where_all_stay_and_the_same_text_everywhere(words: list[str], spaced: bool) -> None:
    kept, whole, small = trimmed(*CORPUS)
    text = (" " if spaced else "").join(words)
    if set(whole.encode(text)) <= set(kept):
        assert pieces(small, text) == pieces(whole, text)
    assert small.decode(small.encode(text)) == text


def test_what_stays() -> None:
    kept, whole, small = trimmed(*CORPUS)
    assert 256 + len(CONTROLS) < len(kept) < SIZE
    assert small.vocab_size == len(kept)
    for text in CORPUS:
        assert set(whole.encode(text)) <= set(kept)
    for name in CONTROLS:
        assert small.token_id(name) in small.control_ids
    assert [small.token_bytes(n) for n in range(len(kept))] == [whole.token_bytes(i) for i in kept]
    assert len(small.encode("other while")) > len(whole.encode("other while"))  # not in the corpus
    assert pieces(small, "🦊") == [bytes([byte]) for byte in "🦊".encode()]
    state = json.loads(whole_json())["model"]
    names = {i: name for name, i in state["vocab"].items()}
    stays = {names[i] for i in kept if i in names}
    for left, right in state["merges"]:
        if left + right in stays:
            assert {left, right} <= stays


def test_a_vocabulary_that_is_used_up_stays_whole() -> None:
    kept, whole, small = trimmed(TEXT, *WORDS)
    text = " ".join(reversed(WORDS))
    assert pieces(small, text) == pieces(whole, text) and len(kept) > 290


def test_rows_follow_their_tokens() -> None:
    whole = source()
    small = trim_source(whole, CORPUS)
    kept = kept_ids(whole, CORPUS)
    assert small.model.config.llama.vocab_size == len(kept)
    before, after = (named_variables(one.model.llama) for one in (whole, small))
    for name, variable in after.items():
        old = numpy_of(before[name])
        assert np.array_equal(numpy_of(variable), old[kept] if "embed_tokens" in name else old)


def test_a_template_names_its_tokens_anew() -> None:
    tokenizer = Tokenizer.from_str(whole_json())
    tokenizer.post_processor = TemplateProcessing(single=["<|im_start|>", "$A"], special_tokens=[("<|im_start|>", 1)])
    kept = [i for i in range(SIZE) if i != 0]
    assert trim_tokenizer(tokenizer, kept).encode("the").ids[0] == 0


def test_the_same_greedy_story(tmp_path: Path) -> None:
    """Where all of a story's tokens stay, the bundle of fewer tokens tells it too, with the right words."""
    options = ExportOptions(CacheConfig(slots=32, sinks=2), Steps((4, 8), (8,)))
    whole = source()
    recipe = load_recipe("float32")
    export_bundle(whole, recipe, tmp_path / "whole", options)
    greedy = SamplingConfig.greedy()
    with SEEDStory(tmp_path / "whole", threads=1) as model:
        story = model.begin(sampling=greedy).add_text("the hen")
        told = "".join(story.tell(max_tokens=60))
        names = model.tokenizer
        spoken = {names.decode([i]) for i in range(SIZE) if i not in names.control_ids and names.decode([i]) in told}
    small = trim_source(source(), [*spoken, "the hen", told])
    assert small.model.config.llama.vocab_size < SIZE
    bundle = export_bundle(small, recipe, tmp_path / "small", options)
    assert bundle.manifest.weights != Bundle.open(tmp_path / "whole").manifest.weights
    with SEEDStory(bundle, threads=1) as model:
        assert "".join(model.begin(sampling=greedy).add_text("the hen").tell(max_tokens=60)) == told
    assert len(told) > 60


def test_corpora(tmp_path: Path) -> None:
    text, stories = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("One.\nTwo.\n")
    stories.write_text(json.dumps({"captions": [" A fox. ", "End."]}) + "\n\n")
    assert list(read_corpus(text)) == ["One.\n", "Two.\n"]
    assert list(read_corpus(stories)) == ["A fox.", "\nA fox.", " A fox.", "End.", "\nEnd.", " End."]


@pytest.mark.parametrize("content", ['{"captions": 3}', "{}", "no json", b"\xff\xfe"])
def test_no_corpus(tmp_path: Path, content: str | bytes, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["--model", "tiny", "--trim-vocabulary", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "the corpus" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="corpus"):
        list(read_corpus(tmp_path / "nothing.txt"))


def test_what_cant_be_trimmed() -> None:
    with pytest.raises(ConfigError, match="no words"):
        kept_ids(source(), [])
    with pytest.raises(ConfigError, match="WordLevel"):
        trim_tokenizer(Tokenizer(WordLevel({"a": 0}, unk_token="a")), [0])
