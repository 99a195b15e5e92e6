"""Tokenizers from what a checkpoint brings, and the two tokens that stand around a picture.

A GGUF file holds a tokenizer as lists: tokens, their types and the merges (ggml's `docs/gguf.md`), and names
its pre-tokenizer with one word, whose meaning is in llama.cpp's `src/llama-vocab.cpp`. The words that plain
LLaMA decoders use are known here; an unknown one raises rather than splitting text in another way than the
model learned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from tokenizers.processors import TemplateProcessing

from model.sources.gguf import open_gguf, plain_metadata
from seed_story.errors import ConfigError, WeightsError

PICTURE, END_OF_PICTURE = "<|picture|>", "<|/picture|>"

# ggml's token types
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
# `default` is what a file says whose converter knew no better; GPT-2's rule is what such models mostly have.
_GPT2_NAMES = ("gpt-2", "gpt2", "default")
_DIGITS_NAMES = ("smollm", "starcoder")

_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>|<\|unused_?\d*\|>|<unused_?\d*>|<reserved_?\d+>")
# Control tokens of models that read code repositories; a story never needs them.
_CODE = frozenset(
    ["<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<gh_stars>", "<empty_output>"]
    + [f"<issue_{part}>" for part in ("start", "comment", "closed")]
    + [f"<jupyter_{part}>" for part in ("start", "text", "code", "output", "script")]
)


def tokenizer_from_gguf(path: str | Path) -> Tokenizer:
    """The byte-level BPE tokenizer that a GGUF file carries.

    Control tokens become special tokens; user-defined ones are matched whole too but stay visible text. Slots
    that the file marks as unused are left out. Where the model wants a begin-of-text token, `encode` prepends
    it unless called with `add_special_tokens=False`.

    Raises:
        WeightsError: not a GGUF file, or its tokenizer is damaged.
        ConfigError: a kind of tokenizer or pre-tokenizer that isn't supported.
    """
    data = plain_metadata(open_gguf(path))
    kind = data.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ConfigError(
            f"the tokenizer inside {path} isn't supported", got=kind, expected="gpt2 (byte-level BPE)",
            hint="Bring the model's tokenizer.json and use its folder instead.",
        )  # fmt: skip
    pre = data.get("tokenizer.ggml.pre", "default")
    splitter = _pre_tokenizer(pre)
    tokens, types, merges = _lists(data, path)
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    try:
        model = BPE(vocabulary, merges, ignore_merges=pre in _LLAMA3_NAMES)
    except Exception as error:  # the library raises nothing narrower
        raise WeightsError(f"the tokenizer inside {path} is damaged", got=error) from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([_added(t) for t, k in zip(tokens, types, strict=True) if k == _CONTROL])
    tokenizer.add_tokens([_added(t, False) for t, k in zip(tokens, types, strict=True) if k == _USER_DEFINED])
    _add_ends(tokenizer, data, tokens, pre)
    return tokenizer


def tokenizer_from_folder(path: str | Path) -> Tokenizer:
    """The tokenizer of `tokenizer.json` in a folder (or of that file itself).

    Raises:
        ConfigError: there is none, or it can't be read.
    """
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(
            f"there is no {file}",
            hint="Make one with `AutoTokenizer.from_pretrained(...).save_pretrained(folder)`.",
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{file} isn't a tokenizer", got=error) from error


def byte_tokenizer() -> Tokenizer:
    """A tokenizer of bytes, for tests: id b is byte b; then end of text, start and end of a turn."""
    letters = byte_letters()
    tokenizer = Tokenizer(BPE({letter: byte for byte, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([_added(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    return tokenizer


def add_picture_tokens(tokenizer: Tokenizer, vocab_size: int) -> tuple[Tokenizer, int, int, int]:
    """A copy of the tokenizer that has the special tokens `<|picture|>` and `<|/picture|>`.

    They take slots that the embedding has already: ids without a token first, then reserved tokens, then
    control tokens for code repositories, which are renamed. Only when those run out are tokens added after
    the last row.

    Args:
        vocab_size: rows of the embedding.

    Returns:
        The tokenizer; the ids of the two tokens; and how many rows the embedding has to grow by, 0 to 2. The
        same call on its own result changes nothing.

    Raises:
        ConfigError: the tokenizer has ids beyond the embedding.
    """
    state = json.loads(tokenizer.to_str())
    by_id = {i: name for name, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    ids = [tokenizer.token_to_id(name) for name in (PICTURE, END_OF_PICTURE)]
    if max(by_id) >= vocab_size and None in ids:
        raise ConfigError("the tokenizer has more tokens than the embedding", got=max(by_id) + 1, expected=vocab_size)
    slots = iter([*_slots(by_id, vocab_size, state), vocab_size, vocab_size + 1])
    chosen = {name: next(slots) for name, i in zip((PICTURE, END_OF_PICTURE), ids, strict=True) if i is None}
    for name, slot in chosen.items():
        _put(state, name, slot, by_id.get(slot))
    made = Tokenizer.from_str(json.dumps(state))
    begin, end = made.token_to_id(PICTURE), made.token_to_id(END_OF_PICTURE)
    expected = [chosen.get(PICTURE, ids[0]), chosen.get(END_OF_PICTURE, ids[1])]
    if begin is None or end is None or [begin, end] != expected:
        raise ConfigError("the tokenizer doesn't take the picture tokens", got=(begin, end), expected=expected)
    return made, begin, end, max(0, max(begin, end) + 1 - vocab_size)


def _slots(by_id: Mapping[int, str], vocab_size: int, state: dict[str, Any]) -> list[int]:
    """Ids that a picture token may take, best first."""
    free = [i for i in range(vocab_size) if i not in by_id]
    added = {token["id"] for token in state["added_tokens"]}
    reserved = sorted(i for i in added if _RESERVED.fullmatch(by_id[i]))
    return free + reserved + sorted(i for i in added if by_id[i] in _CODE)


def _put(state: dict[str, Any], name: str, slot: int, old: str | None) -> None:
    """Writes the special token `name` into a tokenizer's JSON at id `slot`, over the token `old`."""
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, dict):
        for token in state["added_tokens"]:
            vocabulary.setdefault(token["content"], token["id"])  # one that isn't here gets a new id when loaded
        vocabulary.pop(old, None)
        vocabulary[name] = slot  # so that the id holds even where it isn't the next one
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] != slot]
    state["added_tokens"].append(
        {"id": slot, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
    )  # fmt: skip
    state["added_tokens"].sort(key=lambda token: int(token["id"]))


def _pre_tokenizer(name: str) -> PreTokenizer:
    if name in _GPT2_NAMES:
        return ByteLevel(add_prefix_space=False, use_regex=True)
    if name in _DIGITS_NAMES:
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)])
    if name in _LLAMA3_NAMES:
        split = Split(Regex(_LLAMA3), behavior="isolated", invert=False)
        return Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ConfigError(
        "the GGUF file's pre-tokenizer isn't supported", got=name,
        expected=" ".join((*_DIGITS_NAMES, *_LLAMA3_NAMES, *_GPT2_NAMES)),
        hint="Bring the model's tokenizer.json and use its folder instead.",
    )  # fmt: skip


def _lists(data: Mapping[str, Any], path: str | Path) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    """Tokens, their types and the merges as pairs."""
    tokens = data.get("tokenizer.ggml.tokens") or []
    types = data.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = [tuple(merge.split(" ")) for merge in data.get("tokenizer.ggml.merges") or []]
    whole = len(set(tokens)) == len(tokens) == len(types) and all(len(pair) == 2 for pair in merges)
    if not (tokens and whole):
        raise WeightsError(
            f"the tokenizer inside {path} is damaged",
            got=f"{len(tokens)} tokens, {len(set(tokens))} of them different, {len(types)} types",
        )
    return tokens, types, [(left, right) for left, right in merges]


def _add_ends(tokenizer: Tokenizer, data: Mapping[str, Any], tokens: list[str], pre: str) -> None:
    """Has `encode` add the begin and end tokens that the file asks for; Llama 3 begins with one."""
    ends: dict[str, str] = {}
    for end, wanted in (("bos", pre in _LLAMA3_NAMES), ("eos", False)):
        i = data.get(f"tokenizer.ggml.{end}_token_id")
        if data.get(f"tokenizer.ggml.add_{end}_token", wanted) and i is not None:
            ends[end] = tokens[i]
    if ends:
        template = [ends.get("bos"), "$A", ends.get("eos")]
        tokenizer.post_processor = TemplateProcessing(
            single=[piece for piece in template if piece],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in set(ends.values())],
        )


def _added(content: str, special: bool = True) -> AddedToken:
    return AddedToken(content, normalized=False, special=special)


def byte_letters() -> list[str]:
    """GPT-2's letter for every byte, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
