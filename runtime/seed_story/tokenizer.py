"""Text to token ids and back, for a stream.

Two promises that the plain `tokenizers.Tokenizer` doesn't make:

- What a user types is text. A typed `<|im_end|>` becomes ordinary tokens, never the control token of that
  name; only `encode_template`, for the bundle's own templates, knows control tokens.
- Decoding is a map from ids to bytes, so a stream costs the same at its millionth token as at its first, and
  holds back nothing but the at most three bytes of an unfinished character.
"""

from __future__ import annotations

import codecs
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from seed_story.errors import BundleError, PromptError, UsageError

__all__ = ["StoryTokenizer", "StreamDecoder"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Some checkpoints leave the "special" mark off tokens such as <tool_call>; a name in brackets is a control
# all the same.
_LOOKS_LIKE_CONTROL = re.compile(r"<.+>|\[.+\]", re.DOTALL)


class StoryTokenizer:
    """A bundle's tokenizer. Safe to use from several threads.

    Args:
        source: the path of a `tokenizer.json`, or a `tokenizers.Tokenizer` (which it takes over and changes).

    Raises:
        BundleError: the file is missing or damaged, or decodes in a way that can't be streamed (byte-level
            BPE and SentencePiece's BPE can).
    """

    def __init__(self, source: str | Path | Tokenizer) -> None:
        self._tokenizer = source if isinstance(source, Tokenizer) else _load(Path(source))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._mark_controls()
        self._tokenizer.encode_special_tokens = True  # i.e. encode their text: what a user types stays text
        self._lock = threading.Lock()  # guards that property while a template is encoded
        added = self._tokenizer.get_added_tokens_decoder()
        self.control_ids: frozenset[int] = frozenset(id_ for id_, token in added.items() if token.special)
        """The ids that mean something to the machinery and nothing to a reader."""
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        """The number of tokens, control tokens included. A graph's vocabulary may be padded beyond it."""
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        self._unknown_id = None if unknown is None else self._tokenizer.token_to_id(unknown)
        self._to_bytes, self._strips_space = _decoder_of(self._tokenizer)
        self._added = {id_: token.content for id_, token in added.items()}
        self._pieces: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of a user's text, in which nothing is a control token.

        Characters that the vocabulary has no form for (none, in a byte-level one) are left out.

        Raises:
            PromptError: not a string, lone surrogates, or text that this tokenizer can only read as a control
                token.
        """
        with self._lock:
            ids = self._encode(text)
        if self.control_ids.isdisjoint(ids):
            return ids
        ids = [id_ for id_ in ids if id_ != self._unknown_id or id_ not in self.control_ids]
        caught = self.control_ids.intersection(ids)
        if caught:
            names = sorted(str(self._tokenizer.id_to_token(id_)) for id_ in caught)
            raise PromptError("the text holds the name of a control token", got=names, expected="text without it")
        return ids

    def encode_template(self, text: str) -> list[int]:
        """Token ids of a template of the bundle's own, in which control tokens count. Never for a user's
        text.

        Raises:
            PromptError: not a string, or lone surrogates.
        """
        with self._lock:
            self._tokenizer.encode_special_tokens = False
            try:
                return self._encode(text)
            finally:
                self._tokenizer.encode_special_tokens = True

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens: control tokens and ids beyond the vocabulary give nothing, bytes that form
        no character give U+FFFD.

        Raises:
            UsageError: a negative id.
        """
        stream = self.stream()
        return "".join([*map(stream.push, ids), stream.flush()])

    def stream(self) -> StreamDecoder:
        """A decoder for one stream of tokens."""
        return StreamDecoder(self.token_bytes, strip_space=self._strips_space)

    def token_id(self, name: str) -> int:
        """The id of a token, by its name in the vocabulary.

        Raises:
            BundleError: there is none.
        """
        found = self._tokenizer.token_to_id(name)
        if found is None:
            raise BundleError(f"the tokenizer has no token {name!r}", expected="a name of the vocabulary")
        return int(found)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for; may be a part of a character.

        Raises:
            UsageError: a negative id.
        """
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[int(token_id)] = self._look_up(int(token_id))
        return piece

    def _look_up(self, token_id: int) -> bytes:
        if token_id < 0:
            raise UsageError("a token id is negative", got=token_id, expected="0 or more")
        if token_id in self.control_ids:
            return b""
        name = self._added.get(token_id) or self._tokenizer.id_to_token(token_id)
        return b"" if name is None else self._to_bytes(name)

    def _encode(self, text: str) -> list[int]:
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except TypeError as error:
            got = "a lone surrogate" if isinstance(text, str) else type(text).__name__
            raise PromptError("this text can't be encoded", got=got, expected="a string") from error

    def _mark_controls(self) -> None:
        """Marks as special what only looks it: nothing else keeps a user from typing it."""
        unmarked = [
            AddedToken(
                t.content,
                single_word=t.single_word,
                lstrip=t.lstrip,
                rstrip=t.rstrip,
                normalized=False,
                special=True,
            )
            for t in self._tokenizer.get_added_tokens_decoder().values()
            if not t.special and _LOOKS_LIKE_CONTROL.fullmatch(t.content)
        ]
        self._tokenizer.add_special_tokens(unmarked)


class StreamDecoder:
    """Tokens in, text out, as soon as it is certain. The pieces joined are `decode` of all the ids.

    Holds back the bytes of an unfinished character, at most three; bytes that can't begin or go on a
    character come out as U+FFFD at once, the rest at `flush`. Constant time and memory per token.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, strip_space: bool = False) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = strip_space  # SentencePiece writes a space before the first word

    def push(self, token_id: int) -> str:
        """The text that became certain with this token; often empty, never half a character.

        Raises:
            UsageError: a negative id.
        """
        return self._strip(self._utf8.decode(self._token_bytes(token_id)))

    def flush(self) -> str:
        """What was held back, as U+FFFD. Ends the stream."""
        return self._strip(self._utf8.decode(b"", final=True))

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, fit for JSON."""
        held, flags = self._utf8.getstate()
        return {"held": held.hex(), "flags": flags, "strip_space": self._strip_space}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on where the stream of the same tokenizer that gave this `state` was."""
        self._utf8.setstate((bytes.fromhex(state["held"]), state["flags"]))
        self._strip_space = state["strip_space"]

    def _strip(self, text: str) -> str:
        if self._strip_space and text:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


def _load(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BundleError("the tokenizer is missing", got=path, expected="a tokenizer.json") from error
    except Exception as error:  # tokenizers raises a bare Exception for whatever it can't parse
        raise BundleError(
            "the tokenizer can't be read",
            got=f"{path}: {error}",
            expected="a tokenizer.json",
            hint="Export the bundle again.",
        ) from error


def _decoder_of(tokenizer: Tokenizer) -> tuple[Callable[[str], bytes], bool]:
    """How a token's name becomes bytes, and whether the text's first space is not text."""
    spec: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {"type": None}
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level, False
    if kinds == ["Metaspace"]:
        return _sentence_piece(steps[0]["replacement"]), steps[0]["prepend_scheme"] != "never"
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[3:] in ([], [strip]):
        mark, into = steps[0]["pattern"].get("String"), steps[0]["content"]
        if mark and into == " ":
            return _sentence_piece(mark), bool(steps[3:])
    raise BundleError(
        "the tokenizer's decoder can't be streamed",
        got=kinds,
        expected="ByteLevel, Metaspace, or Replace + ByteFallback + Fuse (+ Strip)",
    )


def _gpt2_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 stays, the others are U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTE_OF = _gpt2_alphabet()


def _byte_level(name: str) -> bytes:
    """A token with a character outside the alphabet was added as it is, and stands for itself."""
    if all(char in _BYTE_OF for char in name):
        return bytes(_BYTE_OF[char] for char in name)
    return name.encode()


def _sentence_piece(mark: str) -> Callable[[str], bytes]:
    def to_bytes(name: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(name)
        return bytes([int(byte[1], 16)]) if byte else name.replace(mark, " ").encode()

    return to_bytes
