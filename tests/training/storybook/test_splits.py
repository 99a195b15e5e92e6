"""What is trained on and what is kept: nothing leaks from one into the other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.training.storybook.synthetic import drawing, drawings
from training.storybook.concepts import Concept
from training.storybook.drawings import Drawing
from training.storybook.splits import (
    NEAR,
    UNSEEN_CONCEPTS,
    UNSEEN_STYLE,
    Splits,
    difference_hash,
    split_drawings,
    trained_icons,
)

TRAINED_STYLES = ("fluent-3d", "fluent-flat", "noto", "fxemoji", "openclipart")
NAMES = ("fox", "owl", "cat", "dog", "sun", "castle", "train", "apple", "pear", "queen", "hot air balloon", "llama")
CONCEPTS = tuple(Concept(name, "", "thing", "a") for name in NAMES)
KEPT = ("picture", "style", "concept")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("training.storybook.drawings.folder", lambda: tmp_path)
    return tmp_path


def all_of(splits: Splits, *names: str) -> list[Drawing]:
    return [d for name in names for found in getattr(splits, name).values() for d in found]


def family(drawing: Drawing) -> tuple[str, str]:
    """What was drawn by the same hand after the same model; by the definition, not by the code."""
    if drawing.style == "openclipart":
        return drawing.concept, drawing.source
    return drawing.concept, "fluent" if drawing.style.startswith("fluent") else drawing.style


def test_every_drawing_is_in_one_split_under_its_concept(folder: Path) -> None:
    given = drawings(folder, NAMES, (*TRAINED_STYLES, UNSEEN_STYLE))
    splits = split_drawings(CONCEPTS, given)
    for name in ("train", *KEPT):
        assert all(d.concept == concept for concept, found in getattr(splits, name).items() for d in found)
    unseen = [d for d in given if d.style == UNSEEN_STYLE and d.concept in UNSEEN_CONCEPTS]  # new in both ways: unused
    assert Counter(all_of(splits, "train", *KEPT)) == Counter(set(given) - set(unseen))
    assert len(unseen) == 1


def test_what_is_unseen_is_never_trained(folder: Path) -> None:
    splits = split_drawings(CONCEPTS, drawings(folder, NAMES, (*TRAINED_STYLES, UNSEEN_STYLE)))
    assert {d.style for d in all_of(splits, "style")} == {UNSEEN_STYLE}
    assert UNSEEN_STYLE not in {d.style for d in all_of(splits, "train", "picture", "concept")}
    assert set(splits.concept) == {"llama"} == set(NAMES) & set(UNSEEN_CONCEPTS)
    assert set(splits.train) == set(splits.picture) == set(splits.style) == set(NAMES) - {"llama"}


def test_a_family_is_trained_or_kept_as_a_whole(folder: Path) -> None:
    splits = split_drawings(CONCEPTS, drawings(folder, NAMES, (*TRAINED_STYLES, UNSEEN_STYLE)))
    kept = {concept: {family(d) for d in found} for concept, found in splits.picture.items()}
    assert all(len(families) == 1 for families in kept.values())
    assert not {family(d) for d in all_of(splits, "train")} & set.union(*kept.values())
    assert len({hand for families in kept.values() for _, hand in families}) > 2  # not always the same one
    assert any(len(found) == 2 for found in splits.picture.values())  # both fluent ones together


def test_concepts_need_two_families(folder: Path) -> None:
    given = [
        *drawings(folder, ["fox"], ["fluent-3d", "fluent-flat", UNSEEN_STYLE]),  # one family, drawn twice
        *drawings(folder, ["owl"], ["noto", "fluent-3d", UNSEEN_STYLE]),
        *drawings(folder, ["cat"], ["openclipart"]),  # two hands
        *drawings(folder, ["dog"], ["noto", "fxemoji", "fluent-3d"]),
    ]
    splits = split_drawings(CONCEPTS, given)
    assert {name: len(found) for name, found in splits.train.items()} == {"owl": 2, "cat": 2, "dog": 2}
    assert {name: len(found) for name, found in splits.picture.items()} == {"dog": 1}
    assert set(splits.style) == {"owl"}


def sorted_mosaic(bits: int) -> Image.Image:
    """Each row falls from left to right, except that in `bits` rows two neighbours changed places."""
    rows = np.tile(np.arange(200, 20, -20, dtype=np.uint8), (8, 1))
    for row in range(bits):
        rows[row, [3, 4]] = rows[row, [4, 3]]
    return Image.fromarray(np.kron(rows, np.ones((4, 4), np.uint8))).convert("RGBA")


@pytest.mark.parametrize(("bits", "dropped"), [(0, True), (NEAR, True), (NEAR + 1, False), (8, False)])
def test_a_kept_drawing_that_looks_like_a_trained_one_is_dropped(folder: Path, bits: int, dropped: bool) -> None:
    twin = drawing(folder, "owl", UNSEEN_STYLE, picture=sorted_mosaic(bits))
    given = [
        drawing(folder, "fox", "noto", picture=sorted_mosaic(0)),  # of another concept
        *drawings(folder, ["fox"], ["fxemoji", UNSEEN_STYLE]),
        *drawings(folder, ["owl"], ["noto", "fxemoji"]),
        twin,
    ]
    splits = split_drawings(CONCEPTS, given)
    assert ("owl" in splits.style) is not dropped  # a concept without drawings isn't listed
    assert "fox" in splits.style
    assert Counter(all_of(splits, "train", *KEPT)) == Counter(set(given) - ({twin} if dropped else set()))


@pytest.mark.parametrize("split", ["picture", "concept"])
def test_look_alikes_are_dropped_from_every_split(folder: Path, split: str) -> None:
    given = drawings(folder, NAMES, (*TRAINED_STYLES, UNSEEN_STYLE))
    before = split_drawings(CONCEPTS, given)
    concept, found = next(iter(getattr(before, split).items()))
    trained = all_of(before, "train")[0]
    trained.open().save(folder / found[0].file)
    after = split_drawings(CONCEPTS, given)
    assert getattr(after, split).get(concept, []) == found[1:]
    assert after.train == before.train


def test_new_drawings_move_no_others(folder: Path) -> None:
    """Of another concept, or by a hand that has drawn the concept already; whatever the order."""
    given = drawings(folder, NAMES, ("fluent-flat", "noto", "fxemoji", UNSEEN_STYLE))
    before = split_drawings(CONCEPTS, given)
    new = [*drawings(folder, ["fish"], TRAINED_STYLES), drawing(folder, "fox", "noto", "fox-face"),
           drawing(folder, "owl", "fluent-3d")]  # fmt: skip
    after = split_drawings((Concept("fish", "", "animal", "a"), *CONCEPTS), [*new, *reversed(given)])
    for name in ("train", *KEPT):
        assert set(all_of(before, name)) == set(all_of(after, name)) - set(new)


# The hash, against pictures whose hash is known


def grey(rows: list[list[int]], scale: int = 1) -> Image.Image:
    return Image.fromarray(np.kron(np.array(rows, np.uint8), np.ones((scale, scale), np.uint8)))


@pytest.mark.parametrize("scale", [1, 7])
def test_difference_hash_of_a_picture_by_hand(scale: int) -> None:
    falling, rising, flat = [9, 8, 7, 6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6, 7, 8, 9], [5] * 9
    zigzag = [1, 9, 1, 9, 1, 9, 1, 9, 1]
    rows = [falling, rising, flat, zigzag, flat, rising, falling, flat]
    expected = [1] * 8 + [0] * 8 + [0] * 8 + [0, 1] * 4 + [0] * 8 + [0] * 8 + [1] * 8 + [0] * 8
    got = difference_hash(grey(rows, scale))
    assert got.dtype == np.bool_
    assert got.tolist() == [bool(bit) for bit in expected]


def test_difference_hash_sees_transparency_as_white() -> None:
    left = Image.new("RGBA", (90, 80), (0, 0, 0, 255))
    left.paste((0, 0, 0, 0), (50, 0, 90, 80))  # opaque black, then transparent black
    white = Image.new("RGB", (90, 80), (255, 255, 255))
    white.paste((0, 0, 0), (0, 0, 50, 80))
    assert (difference_hash(left) == difference_hash(white)).all()
    assert not difference_hash(left).any()
    assert difference_hash(left.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).sum() == 8


def test_synthetic_drawings_differ(folder: Path) -> None:
    """What the tests above rest on."""
    hashes = [difference_hash(d.open()) for d in drawings(folder, NAMES, TRAINED_STYLES)]
    apart = [int((a != b).sum()) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(apart) > NEAR


def test_icons_of_kept_families_and_look_alikes_of_kept_drawings_are_not_trained_on(folder: Path) -> None:
    splits = split_drawings(CONCEPTS, drawings(folder, NAMES, ("fluent-3d", "noto", "fxemoji", UNSEEN_STYLE)))
    kept_fluent = {name for name, found in splits.picture.items() if family(found[0])[1] == "fluent"}
    assert kept_fluent and kept_fluent != set(splits.train)
    look_alike = splits.style["fox"][0]
    icons = [
        *drawings(folder, NAMES, ["fluent-high-contrast", "phosphor"]),
        drawing(folder, "owl", "phosphor", "copied", look_alike.open()),  # under another name
    ]
    found = trained_icons(icons, splits)
    assert set(found) == set(NAMES) - {"llama"}
    styles = {name: {icon.style for icon in icons} for name, icons in found.items()}
    assert {name for name in found if "fluent-high-contrast" not in styles[name]} == kept_fluent
    assert all("phosphor" in style for style in styles.values())
    assert "copied" not in {icon.source for found_icons in found.values() for icon in found_icons}
