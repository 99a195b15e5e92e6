"""What the pictures of the storybook show: names, groups, and the words that count as naming them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from seed_story.errors import ConfigError

GROUPS = ("animal", "person", "food", "vehicle", "place", "plant", "weather", "thing")
_TABLE = Path(__file__).with_name("concepts.tsv")
_COLUMNS = ("name", "group", "article", "emoji", "also")


@dataclass(frozen=True)
class Concept:
    """One thing that a picture can show.

    Args:
        name: as a story says it, without an article: "fox", "hot air balloon", "sun".
        emoji: the code points that draw it, in order of preference, separated by spaces; empty if there are none.
        group: one of `GROUPS`.
        article: "a", "an", "the", "some" or "".
        also: synonyms, and the next more general word, that count as naming it.
    """

    name: str
    emoji: str
    group: str
    article: str
    also: tuple[str, ...] = ()

    @property
    def phrase(self) -> str:
        """The name with its article: "a fox", "the sun", "some rice"."""
        return f"{self.article} {self.name}".strip()

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every word that counts as naming it, its name first."""
        return (self.name, *self.also)


@cache
def load_concepts() -> tuple[Concept, ...]:
    """All concepts of `concepts.tsv`, in its order.

    Raises:
        ConfigError: a line has other columns, an unknown group, or a name that was there before; names the line.
    """
    header, *lines = _TABLE.read_text(encoding="utf-8").splitlines()
    if tuple(header.split("\t")) != _COLUMNS:
        raise ConfigError(f"{_TABLE.name} has other columns", got=header.split("\t"), expected=list(_COLUMNS))
    found: dict[str, Concept] = {}
    for number, line in enumerate(lines, 2):
        name, group, article, emoji, also = (line.split("\t") + [""] * 5)[:5]
        if group not in GROUPS or name in found or line.count("\t") != len(_COLUMNS) - 1:
            expected = f"{', '.join(_COLUMNS)}, separated by tabs; a group of {', '.join(GROUPS)}"
            raise ConfigError(f"{_TABLE.name}, line {number}, isn't a new concept", got=line, expected=expected)
        found[name] = Concept(name, emoji, group, article, tuple(filter(None, also.split(","))))
    return tuple(found.values())
