"""Whether a text names a thing, and where its sentences end. Rules for English, without a model."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CURLY = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")
"""Curly quotes to straight ones, character for character: offsets stay."""
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_IRREGULAR = {
    "child": "children", "person": "people", "mouse": "mice", "goose": "geese", "foot": "feet", "tooth": "teeth",
    "ox": "oxen", "die": "dice", "louse": "lice", "cactus": "cacti",
}  # fmt: skip


def plurals(word: str) -> set[str]:
    """The plural forms that a lower-case noun may take; also some that it doesn't, which no story will hold."""
    forms = {f"{word}s"}
    if re.search(r"(s|x|z|ch|sh|o)$", word):
        forms.add(f"{word}es")
    if re.search(r"[^aeiou]y$", word):
        forms.add(f"{word[:-1]}ies")
    if stem := re.match(r"(.+?)fe?$", word):
        forms.add(f"{stem[1]}ves")
    if word.endswith("man"):
        forms.add(f"{word[:-3]}men")
    return forms | {_IRREGULAR[word]} if word in _IRREGULAR else forms


def words_of(text: str) -> list[str]:
    """A text's words in lower case: split at hyphens and all else but apostrophes, without a possessive `'s`."""
    return [word.removesuffix("'s") for word in _WORD.findall(text.lower().translate(_CURLY))]


def names(text: str, accepted: Iterable[str]) -> bool:
    """Whether `text` names one of `accepted`.

    A name matches whole words, in any case, its last word also in the plural. "cat" is in "the cat's hat" and in
    "Cats!", not in "catch"; "hot air balloon" is in "hot-air balloons", not in "hot balloon".
    """
    words = words_of(text)
    return any(_holds(words, words_of(name)) for name in accepted)


def _holds(words: list[str], name: list[str]) -> bool:
    if not name:
        return False
    *head, last = name
    lasts = {last} | plurals(last)
    size = len(name)
    return any(words[at : at + size - 1] == head and words[at + size - 1] in lasts
               for at in range(len(words) - size + 1))  # fmt: skip


_END = re.compile(r"""[.!?…]+["'»)\]]*(?=\s|$)|\n\s*\n""")
_ABBREVIATION = re.compile(r"\b(?:mr|mrs|ms|dr|st|prof|sr|jr|mt|vs|[a-hj-z])\.$", re.IGNORECASE)
_OPENERS = "\"'«(["


def sentence_ends(text: str, *, finished: bool = True) -> list[int]:
    """Where the sentences of a text end: the offset after each one's last character, closing quotes included.

    An end mark ends no sentence when a lower-case letter follows (`"Run!" said the fox`, `well... no`), nor does the
    full stop of an abbreviation (Mr.) or of an initial. A blank line ends one too.

    Args:
        finished: whether the text goes no further; if it may, a mark counts only when what follows is known.
    """
    text, ends = text.translate(_CURLY), list[int]()
    for match in _END.finditer(text):
        blank = match[0].isspace()
        end = match.start() if blank else match.end()
        following = text[match.end() :].lstrip().lstrip(_OPENERS)
        goes_on = following[:1].islower() and not blank
        empty = not words_of(text[ends[-1] if ends else 0 : end])
        if empty or goes_on or _ABBREVIATION.search(text[:end]) or not (following or finished):
            continue
        ends.append(end)
    return ends


def first_sentences(text: str, count: int) -> str:
    """The first `count` sentences of a text; all of it if there are fewer."""
    ends = sentence_ends(text)
    return text[: ends[count - 1]] if len(ends) >= count else text
