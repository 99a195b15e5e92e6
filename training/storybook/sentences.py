"""The sentence patterns of `patterns/*.txt`, read and checked.

A file holds sections, `[being]`, with one pattern a line; lines that begin with `#` are comments. What the slots of
a pattern mean is written at the top of `narrator.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from seed_story.errors import ConfigError

FOLDER = Path(__file__).with_name("patterns")
HERO_SLOTS = frozenset(["new_hero", "the_hero", "name", "he", "him", "his"])
SLOTS = HERO_SLOTS | frozenset(
    ["ever", "day", "then", "there_was", "was", "a_thing", "the_thing", "thing_was", "at", "to", "place", "child"]
)
_LONG_SLOTS = frozenset(["new_hero", "a_thing", "at", "to"])
_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Pattern:
    """A sentence with slots.

    Args:
        text: the sentence; "{the_hero}" is a slot, "{The_hero}" the same with a capital letter.
        slots: the names of its slots, in lower case.
    """

    text: str
    slots: frozenset[str]

    @property
    def length(self) -> int:
        """About how many words it has when its slots are filled."""
        return len(self.text.split()) + len(self.slots & HERO_SLOTS) + 2 * len(self.slots & _LONG_SLOTS)

    @property
    def mentions_hero(self) -> bool:
        """Whether it speaks of the hero."""
        return bool(self.slots & HERO_SLOTS)

    def fill(self, values: Mapping[str, str]) -> str:
        """The sentence; `values` must have an entry for each of `slots`."""
        return _SLOT.sub(lambda match: _fitted(match[1], values), self.text)


Sections = Mapping[str, tuple[Pattern, ...]]


def read_patterns(path: Path) -> Sections:
    """The patterns of one file by section.

    Raises:
        ConfigError: an unknown slot, a brace that isn't part of one, or a pattern before the first section; names
            the file and the line.
    """
    sections: dict[str, list[Pattern]] = {}
    section = None
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        where = f"{path.name}, line {number}"
        if text.startswith("["):
            section = sections.setdefault(text.strip("[]"), [])
        elif section is None:
            raise ConfigError(f"{where}: a pattern before the first section", got=text, expected="[section]")
        else:
            section.append(Pattern(text, _slots_of(text, where)))
    return {name: tuple(patterns) for name, patterns in sections.items()}


@cache
def load_sentences() -> Mapping[str, Sections]:
    """All pattern files by their name without ".txt".

    Raises:
        ConfigError: as `read_patterns`.
    """
    return {path.stem: read_patterns(path) for path in sorted(FOLDER.glob("*.txt"))}


def _slots_of(text: str, where: str) -> frozenset[str]:
    slots = frozenset(_lower(name) for name in _SLOT.findall(text))
    if slots - SLOTS:
        raise ConfigError(f"{where}: an unknown slot", got=sorted(slots - SLOTS)[0], expected=", ".join(sorted(SLOTS)))
    if set("{}") & set(_SLOT.sub("", text)):
        raise ConfigError(f"{where}: a brace that isn't part of a slot", got=text, expected="{slot}")
    return slots


def _fitted(slot: str, values: Mapping[str, str]) -> str:
    value = values[_lower(slot)]
    return value[0].upper() + value[1:] if slot[0].isupper() else value


def _lower(slot: str) -> str:
    return slot[0].lower() + slot[1:]
