"""Which drawings are trained on, and which are kept to test with: by picture, by style and by concept."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image

from training.storybook.concepts import Concept
from training.storybook.drawings import Drawing

UNSEEN_STYLE = "twemoji"
UNSEEN_CONCEPTS = (
    "orangutan", "llama", "shrimp", "avocado", "bacon", "burrito", "ambulance", "tram", "mosque", "rugby ball",
    "ice skate", "compass", "horn", "saxophone", "stopwatch",
)  # fmt: skip
"""Chosen by hand: things that stories about other pictures can do without."""
NEAR = 5
"""Two drawings whose hashes differ in at most so many of 64 bits count as one."""
_FAMILY = {  # the same shapes, in other shades
    "fluent-3d": "fluent", "fluent-flat": "fluent", "fluent-high-contrast": "fluent", "emojione-monotone": "emojione",
}  # fmt: skip
_LEAST_FAMILIES = 2


@dataclass(frozen=True)
class Splits:
    """Drawings by concept.

    Args:
        train: what training may see.
        picture: of trained concepts, in trained styles: one family of drawings a concept, never trained on.
        style: of trained concepts, in `UNSEEN_STYLE`.
        concept: of `UNSEEN_CONCEPTS`, in trained styles.
    """

    train: dict[str, list[Drawing]] = field(default_factory=dict)
    picture: dict[str, list[Drawing]] = field(default_factory=dict)
    style: dict[str, list[Drawing]] = field(default_factory=dict)
    concept: dict[str, list[Drawing]] = field(default_factory=dict)


def split_drawings(concepts: Sequence[Concept], drawings: Iterable[Drawing]) -> Splits:
    """Splits by stable hashes of names: only a new family of a concept moves drawings, and only that concept's.

    A concept drawn by fewer than two families of trained styles is left out; one with two trains on both. A kept
    drawing that looks like a trained one, of whatever concept, is dropped.
    """
    families: dict[str, dict[str, list[Drawing]]] = defaultdict(lambda: defaultdict(list))
    for drawing in drawings:
        families[drawing.concept][_family(drawing)].append(drawing)
    splits = Splits()
    usable = [c.name for c in concepts if len(set(families[c.name]) - {UNSEEN_STYLE}) >= _LEAST_FAMILIES]
    for name in usable:
        unseen = families[name].pop(UNSEEN_STYLE, [])
        if name in UNSEEN_CONCEPTS:
            splits.concept[name] = [d for family in families[name].values() for d in family]
            continue
        if len(families[name]) > _LEAST_FAMILIES:
            splits.picture[name] = families[name].pop(min(families[name], key=lambda family: _order(name, family)))
        splits.train[name] = [d for family in families[name].values() for d in family]
        splits.style[name] = unseen
    return _without_look_alikes(splits)


def trained_icons(icons: Iterable[Drawing], splits: Splits) -> dict[str, list[Drawing]]:
    """Icons of trained concepts that training may see: unlike every kept drawing, and of no kept family."""
    kept = [d for split in (splits.picture, splits.style, splits.concept) for found in split.values() for d in found]
    hashes = np.array([difference_hash(drawing.open()) for drawing in kept])
    families = {(drawing.concept, _family(drawing)) for drawing in kept}
    found: dict[str, list[Drawing]] = {}
    for icon in icons:
        if icon.concept in splits.train and (icon.concept, _family(icon)) not in families and _apart(icon, hashes):
            found.setdefault(icon.concept, []).append(icon)
    return found


def _family(drawing: Drawing) -> str:
    if drawing.style == "openclipart":
        return f"openclipart/{drawing.source}"
    return _FAMILY.get(drawing.style, drawing.style)


def _order(concept: str, family: str) -> str:
    return hashlib.sha256(f"{concept}:{family}".encode()).hexdigest()


def _without_look_alikes(splits: Splits) -> Splits:
    trained = np.array([difference_hash(d.open()) for drawings in splits.train.values() for d in drawings])
    kept = {
        name: {
            concept: rest
            for concept, found in getattr(splits, name).items()
            if (rest := [drawing for drawing in found if _apart(drawing, trained)])
        }
        for name in ("picture", "style", "concept")
    }
    return Splits(train=splits.train, **kept)


def _apart(drawing: Drawing, hashes: npt.NDArray[np.bool_]) -> bool:
    """Whether a drawing looks like none of those whose hashes are given, `[n, 64]`."""
    return not len(hashes) or bool((hashes != difference_hash(drawing.open())).sum(axis=1).min() > NEAR)


def difference_hash(picture: Image.Image) -> npt.NDArray[np.bool_]:
    """Whether each of 8 x 8 cells is brighter than its right neighbour, on white: bool `[64]` ("dHash")."""
    flat = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    flat.alpha_composite(picture.convert("RGBA"))
    cells = np.asarray(flat.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
    return np.asarray(cells[:, :-1] > cells[:, 1:]).reshape(64)
