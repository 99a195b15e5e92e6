"""A vocabulary of only what a corpus uses: a smaller embedding table and head, and a tokenizer to match.

What stays is what the corpus' texts are made of, with all from which byte pair encoding merges it; the byte tokens, so
that any text can still be written; and all control tokens. Every merge between tokens that stay is kept. So a text
whose tokens all stay is encoded into the same ones: each merge that makes them is still there, in the same order, and
no new one is. Any other text falls apart into smaller pieces, down to bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model.layers import named_variables, numpy_of
from model.llama import Llama
from model.story_model import StoryModel
from model.story_source import TABLES, StorySource
from model.tokenizer_files import byte_letters
from model.weights import load_weights
from seed_story.errors import ConfigError, UsageError
from seed_story.tokenizer import StoryTokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WITHOUT_IDS = ("ByteLevel",)  # post-processors that name no token


def read_corpus(file: Path) -> Iterator[str]:
    """The texts of a text file, line by line, or the captions of a StoryStream file (`.jsonl`).

    A caption comes three times, as a story has it: first, on a line of its own, and after another.

    Raises:
        UsageError: the file can't be read, or a line of a `.jsonl` holds no captions.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        if file.suffix != ".jsonl":
            yield from lines
            return
        for line in filter(str.strip, lines):
            for caption in json.loads(line)["captions"]:
                yield from (f"{before}{caption.strip()}" for before in ("", "\n", " "))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"the corpus {file} can't be read", got=f"{type(error).__name__}: {error}",
                         expected="text in UTF-8, or a StoryStream .jsonl with captions") from error  # fmt: skip


def trim_source(source: StorySource, texts: Iterable[str]) -> StorySource:
    """A model whose vocabulary is what the texts use.

    Raises:
        ConfigError: its tokenizer isn't of byte pair encoding, or the corpus is empty.
    """
    kept = kept_ids(source, texts)
    config = replace(source.model.config.llama, vocab_size=len(kept))
    values = {name: numpy_of(variable) for name, variable in named_variables(source.model.llama).items()}
    decoder = Llama(config, seed=None)
    load_weights(decoder, {name: v[kept] if name in TABLES else v for name, v in values.items()})
    whole = source.model
    story = replace(whole.config, llama=config)
    model = StoryModel(story, vision=whole.vision, qformer=whole.qformer, llama=decoder)
    return replace(source, model=model, tokenizer=trim_tokenizer(source.tokenizer, kept))


def kept_ids(source: StorySource, texts: Iterable[str]) -> list[int]:
    """The ids that stay, ascending."""
    tokenizer = StoryTokenizer(Tokenizer.from_str(source.tokenizer.to_str()))
    used = {token for text in texts for token in tokenizer.encode(text)}
    if not used:
        raise ConfigError("the corpus has no words", expected="text in the stories' language")
    for template in (source.prompt.opening, source.prompt.request):
        used |= set(tokenizer.encode_template(template))
    state = json.loads(source.tokenizer.to_str())
    vocabulary = _vocabulary(state)
    letters = set(byte_letters())
    used |= {i for name, i in vocabulary.items() if name in letters or _BYTE.fullmatch(name)}
    used |= {token["id"] for token in state["added_tokens"]}
    unknown = vocabulary.get(state["model"].get("unk_token") or "")
    return sorted(_with_parts(used if unknown is None else used | {unknown}, vocabulary, state))


def _with_parts(used: set[int], vocabulary: Mapping[str, int], state: Mapping[str, Any]) -> set[int]:
    """Adds all tokens that are merged into used ones, and into those, and so on."""
    parts: dict[int, list[int]] = {}
    for left, right in _merges(state):
        parts.setdefault(vocabulary[left + right], []).extend((vocabulary[left], vocabulary[right]))
    found, open_ = set(used), list(used)
    while open_:
        for part in parts.get(open_.pop(), ()):
            if part not in found:
                found.add(part)
                open_.append(part)
    return found


def trim_tokenizer(tokenizer: Tokenizer, kept: list[int]) -> Tokenizer:
    """The tokenizer of only these ids, which are numbered anew in their order.

    Raises:
        ConfigError: it isn't of byte pair encoding, or refers to tokens in a way that isn't known here.
    """
    state = json.loads(tokenizer.to_str())
    number = {old: new for new, old in enumerate(kept)}
    vocabulary = {name: number[i] for name, i in _vocabulary(state).items() if i in number}
    merges = [(a, b) for a, b in _merges(state) if a in vocabulary and b in vocabulary and a + b in vocabulary]
    state["model"] |= {"vocab": vocabulary, "merges": [list(pair) for pair in merges]}
    state["added_tokens"] = [{**t, "id": number[t["id"]]} for t in state["added_tokens"] if t["id"] in number]
    for token in state["added_tokens"]:
        vocabulary.setdefault(token["content"], token["id"])  # one that isn't here gets a new id when loaded
    _renumber(state.get("post_processor"), number)
    return Tokenizer.from_str(json.dumps(state))


def _renumber(processor: dict[str, Any] | None, number: Mapping[int, int]) -> None:
    if processor is None or processor["type"] in _WITHOUT_IDS:
        return
    if processor["type"] == "Sequence":
        for one in processor["processors"]:
            _renumber(one, number)
    elif processor["type"] == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [number[i] for i in token["ids"]]
    else:
        raise ConfigError("the tokenizer's post-processor can't be trimmed", got=processor["type"],
                          expected="TemplateProcessing")  # fmt: skip


def _vocabulary(state: Mapping[str, Any]) -> dict[str, int]:
    if state["model"]["type"] != "BPE":
        raise ConfigError("this tokenizer's vocabulary can't be trimmed", got=state["model"]["type"], expected="BPE")
    return dict(state["model"]["vocab"])


def _merges(state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs; older files have them as one string."""
    for merge in state["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right
