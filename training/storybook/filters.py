"""Whether a text that a teacher wrote may be learned from. A rule is a function that says whether a text breaks it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from training.evaluation.naming import names, sentence_ends, words_of
from training.evaluation.repetition import has_loop

FEWEST_WORDS, MOST_WORDS = 40, 160
FEWEST_SENTENCES = 3

_PLAIN = re.compile(r"""[A-Za-z \n.,;:!?'"()-]*""")
_LINE = re.compile(r"""["'(]?[A-Za-z].*[.!?]["')]*""")
_SPEECH = re.compile(r'"[^"]*"')
_TALK = re.compile(r"\bI\b|(?:^|[.!?]\s+)(?:Sure|Certainly|Here(?: is| are|'s))\b")
_PICTURE_WORDS = frozenset(f"{word}{s}" for word in ("picture", "image", "photo", "photograph") for s in ("", "s"))


def whole_sentences(text: str, *, ended: bool) -> str:
    """A text up to the end of its last complete sentence; empty if there is none.

    Args:
        ended: whether its writer came to an end; else the last full stop may belong to more than is there.
    """
    ends = sentence_ends(text, finished=ended)
    return text[: ends[-1]] if ends else ""


def has_odd_length(text: str, things: Sequence[str]) -> bool:
    """Fewer or more words than a page or two."""
    return not FEWEST_WORDS <= len(words_of(text)) <= MOST_WORDS


def has_few_sentences(text: str, things: Sequence[str]) -> bool:
    """Too few sentences for a story."""
    return len(sentence_ends(text)) < FEWEST_SENTENCES


def has_odd_characters(text: str, things: Sequence[str]) -> bool:
    """Anything but ASCII letters and the marks of prose: a digit, a star, a slash, a curly quote, half a character."""
    return _PLAIN.fullmatch(text) is None


def has_odd_lines(text: str, things: Sequence[str]) -> bool:
    """A line that isn't prose: a title, a list, or a paragraph without an end mark."""
    return not all(_LINE.fullmatch(line.strip()) for line in text.splitlines() if line.strip())


def leaves_speech_open(text: str, things: Sequence[str]) -> bool:
    """A quotation without its second mark."""
    return text.count('"') % 2 == 1


def misses_a_thing(text: str, things: Sequence[str]) -> bool:
    """A pictured thing that isn't named by its own name; a synonym would teach the eye another word."""
    return not all(names(text, [thing]) for thing in things)


def goes_round(text: str, things: Sequence[str]) -> bool:
    """A loop, as `training.evaluation.repetition` defines it."""
    return has_loop(words_of(text))


def mentions_a_picture(text: str, things: Sequence[str]) -> bool:
    """Talk about the picture instead of what it shows; unless a picture is what it shows."""
    shown = {word for thing in things for word in words_of(thing)}
    return bool(_PICTURE_WORDS & set(words_of(text))) and not _PICTURE_WORDS & shown


def speaks_as_assistant(text: str, things: Sequence[str]) -> bool:
    """Words of the writer's own, outside all quotations: "I hope", "Sure", "Here is"."""
    return _TALK.search(_SPEECH.sub('""', text)) is not None


RULES: dict[str, Callable[[str, Sequence[str]], bool]] = {
    "length": has_odd_length,
    "sentences": has_few_sentences,
    "characters": has_odd_characters,
    "lines": has_odd_lines,
    "speech": leaves_speech_open,
    "names": misses_a_thing,
    "loop": goes_round,
    "picture": mentions_a_picture,
    "assistant": speaks_as_assistant,
}
"""By the reason that is reported, in the order in which they are asked."""


def broken_rule(text: str, things: Sequence[str]) -> str | None:
    """The first of `RULES` that a text about `things` breaks; None for a text to keep."""
    return next((reason for reason, breaks in RULES.items() if breaks(text, things)), None)
