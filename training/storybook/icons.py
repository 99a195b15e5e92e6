"""Which icons of a set draw a concept: those that are named after it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

_SOLID = ("fill", "filled", "solid", "bold", "duotone")
_THIN = ("line", "linear", "outline", "outlined", "light", "thin", "broken", "regular", "sharp", "rounded")
_PLAIN = ("face", "head", "front", "side", "alt", "one", "two", "1", "2", "3")
_MANNERS = {*_SOLID, *_THIN, *_PLAIN}
"""What stands behind the name of a thing to say how it is drawn."""
_MOST = 2
"""Of one concept in one set: its other manners are the same shape again."""


def icons_of(icons: Iterable[str], concepts: Iterable[str]) -> Iterator[tuple[str, str]]:
    """`(concept, icon)` for every concept that icons are named after, as in "cat", "cat-fill" and "hot-air-balloon".

    At most two of a set; solid ones before plain ones before those of thin lines.
    """
    wanted, found = set(concepts), defaultdict[str, list[str]](list)
    for icon in icons:
        if (name := _named(icon)) in wanted:
            found[name].append(icon)
    for concept in sorted(found):
        for icon in sorted(found[concept], key=_rank)[:_MOST]:
            yield concept, icon


def _named(icon: str) -> str:
    """The thing that an icon is named after."""
    words = icon.split("-")
    while len(words) > 1 and words[-1] in _MANNERS:
        words.pop()
    return " ".join(words)


def _rank(icon: str) -> tuple[bool, bool, int, str]:
    words = set(icon.split("-"))
    return bool(words & set(_THIN)), not words & set(_SOLID), len(icon), icon
