"""English that a story needs: articles, adjectives, pronouns, capitals, and which names are plural."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from training.storybook.concepts import Concept

Kind = Literal["being", "vehicle", "food", "plant", "place", "weather", "thing"]
Medium = Literal["land", "air", "water"]

# Things and plants that a storybook lets speak and walk.
_LIVELY = frozenset(["robot", "snowman", "scarecrow", "teddy", "doll", "puppet", "gingerbread"])
_CREATURES = frozenset(
    [
        "alien",
        "baby",
        "dragon",
        "elf",
        "genie",
        "ghost",
        "goblin",
        "gnome",
        "monster",
        "robot",
        "scarecrow",
        "skeleton",
        "snowman",
        "troll",
        "vampire",
        "zombie",
    ]
)
_HE = frozenset(
    [
        "boy",
        "brother",
        "dad",
        "emperor",
        "father",
        "grandfather",
        "grandpa",
        "groom",
        "king",
        "man",
        "merman",
        "prince",
        "santa",
        "uncle",
        "wizard",
    ]
)
_SHE = frozenset(
    [
        "aunt",
        "ballerina",
        "bride",
        "girl",
        "grandma",
        "grandmother",
        "lady",
        "mermaid",
        "mother",
        "mum",
        "princess",
        "queen",
        "sister",
        "witch",
        "woman",
    ]
)
_AIR = frozenset(
    [
        "aeroplane",
        "airplane",
        "balloon",
        "helicopter",
        "jet",
        "kite",
        "parachute",
        "plane",
        "rocket",
        "satellite",
        "saucer",
        "spaceship",
    ]
)
_WATER = frozenset(
    ["boat", "canoe", "ferry", "kayak", "lifeboat", "motorboat", "raft", "ship", "speedboat", "submarine", "yacht"]
)
_PLURAL_WITHOUT_S = frozenset(["children", "feet", "geese", "mice", "people", "sheep", "teeth"])
_MASS_WITH_S = frozenset(["asparagus", "hummus", "molasses", "couscous"])


@dataclass(frozen=True)
class Pronouns:
    """The words that stand for somebody: "he", "him", "his", and the verb "was" that goes with them."""

    he: str
    him: str
    his: str
    was: str = "was"


_PRONOUNS = {
    "it": Pronouns("it", "it", "its"),
    "he": Pronouns("he", "him", "his"),
    "she": Pronouns("she", "her", "her"),
    "they": Pronouns("they", "them", "their", "were"),
}


def kind_of(concept: Concept) -> Kind:
    """What the story can do with it: a "being" acts and speaks, the others are as their group says."""
    if concept.group in ("animal", "person") or _LIVELY & _words(concept):
        return "being"
    return concept.group  # type: ignore[return-value]  # the groups that remain are kinds


def medium_of(vehicle: Concept) -> Medium:
    """Where a vehicle moves, by the words of its name."""
    words = _words(vehicle)
    if words & _AIR:
        return "air"
    return "water" if words & _WATER else "land"


def is_plural(concept: Concept) -> bool:
    """Whether verbs after it are plural: "some grapes were", but "a pair of skis was" and "some rice was"."""
    if concept.article not in ("some", "") or is_proper(concept):
        return False
    last = concept.name.split()[-1].lower()
    return last in _PLURAL_WITHOUT_S or (last.endswith("s") and not last.endswith("ss") and last not in _MASS_WITH_S)


def is_proper(concept: Concept) -> bool:
    """A name of its own, which takes no article: "Santa"."""
    return concept.article == "" and concept.name[:1].isupper()


def pronouns_of(concept: Concept) -> Pronouns | None:
    """Its pronouns; None for a person whose name doesn't say "he" or "she", so that the name is repeated."""
    words = _words(concept)
    if is_plural(concept):
        return _PRONOUNS["they"]
    if words & _SHE or any(word.endswith("woman") for word in words):
        return _PRONOUNS["she"]
    if concept.group != "person" or words & _CREATURES:
        return _PRONOUNS["it"]
    return _PRONOUNS["he"] if words & _HE or any(word.endswith("man") for word in words) else None


def definite(concept: Concept, adjective: str = "") -> str:
    """With "the", and an adjective if one is given: "the little fox", "Santa"."""
    return concept.name if is_proper(concept) else " ".join(filter(None, ["the", adjective, concept.name]))


def indefinite(concept: Concept, adjective: str = "") -> str:
    """As it is mentioned first: "a little fox", "an old owl", "the sun", "some rice"."""
    if not adjective or concept.article not in ("a", "an"):
        return concept.phrase
    return f"{'an' if adjective[0] in 'aeiou' else 'a'} {adjective} {concept.name}"


def capitalise(text: str) -> str:
    """With its first letter in upper case, also behind an opening quote; the rest stays as it is."""
    return re.sub(r"^(\W*)(\w)", lambda match: match[1] + match[2].upper(), text)


def _words(concept: Concept) -> set[str]:
    return set(re.findall(r"[a-z]+", concept.name.lower()))
