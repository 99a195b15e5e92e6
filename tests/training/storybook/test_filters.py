from __future__ import annotations

import pytest

from training.storybook.filters import RULES, broken_rule, whole_sentences

GOOD = (
    "Once upon a time, there was a fox who lived beside an old oak. Every evening an owl came down and told it about "
    'the far hills.\n\n"Will you come with me?" asked the owl. The fox thought for a while, and then it packed a '
    "small bag. They walked all night, and in the morning they stood on the highest hill of all."
)
THINGS = ["fox", "owl"]
LOOP = " The owl sang a song." * 4


def words(count: int) -> str:
    """Three sentences about a fox and an owl, of so many words in all."""
    fillers = [f"the {a}{b}{c}" for a in "bdfgklmnp" for b in "aeiou" for c in "lmnprst"]
    text = " ".join(fillers).split()[: count - 10]
    return f"The fox ran. The owl flew. They met the {' '.join(text)} here."


def test_a_story_breaks_no_rule() -> None:
    assert broken_rule(GOOD, THINGS) is None


@pytest.mark.parametrize("count", [40, 160])
def test_the_shortest_and_the_longest_story_are_kept(count: int) -> None:
    assert len(words(count).split()) == count
    assert broken_rule(words(count), THINGS) is None


@pytest.mark.parametrize(
    ("reason", "text", "things"),
    [
        ("length", words(39), THINGS),
        ("length", words(161), THINGS),
        ("length", "", THINGS),
        ("sentences", GOOD.replace(".", ",").replace("?", ",")[:-1] + ".", THINGS),
        ("characters", GOOD.replace("a fox", "a f\ufffdx"), THINGS),
        ("characters", GOOD.replace("a small bag", "2 small bags"), THINGS),
        ("characters", GOOD.replace("fox", "**fox**"), THINGS),
        ("characters", GOOD.replace("It", "\u201cIt\u201d").replace('"', "\u201c"), THINGS),
        ("characters", GOOD.replace("oak", "ch\u00eane"), THINGS),
        ("lines", f"The Fox and the Owl\n\n{GOOD}", THINGS),
        ("lines", f"{GOOD}\n- The fox slept.", THINGS),
        ("speech", f'{GOOD} "We are here.', THINGS),
        ("names", GOOD, ["fox", "owl", "hot air balloon"]),
        ("names", GOOD.replace("an owl", "a bird").replace("the owl", "the bird"), THINGS),
        ("names", GOOD.replace("owl", "growler"), THINGS),
        ("loop", GOOD + LOOP, THINGS),
        ("picture", f"{GOOD} What a fine picture it was.", THINGS),
        ("picture", f"{GOOD} They were in many Photos.", THINGS),
        ("assistant", f"{GOOD} I hope you like it.", THINGS),
        ("assistant", f"Sure! {GOOD}", THINGS),
        ("assistant", f"{GOOD} Here is another one.", THINGS),
        ("assistant", f"{GOOD} Here's another one.", THINGS),
    ],
)
def test_a_bad_story_breaks_its_rule(reason: str, text: str, things: list[str]) -> None:
    assert broken_rule(text, things) == reason


@pytest.mark.parametrize(
    ("text", "things"),
    [
        (f'{GOOD} "I hope we stay," said the owl.', THINGS),
        (f'{GOOD} "Sure!" said the fox, and it was sure. Here and there a light shone.', THINGS),
        (GOOD.replace("fox", "foxes"), THINGS),
        (f"{GOOD} They hung a picture on the wall.", [*THINGS, "picture"]),
        (f"{GOOD} They could not imagine a better hill.", THINGS),
        (GOOD + LOOP.removesuffix(" The owl sang a song."), THINGS),
    ],
)
def test_what_looks_alike_is_kept(text: str, things: list[str]) -> None:
    assert broken_rule(text, things) is None


def test_every_rule_has_a_case_above() -> None:
    marks = test_a_bad_story_breaks_its_rule.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in marks[0].args[1]} == set(RULES)


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        ("The fox ran. The owl", False, "The fox ran."),
        ("The fox ran. The owl", True, "The fox ran."),
        ('He said, "Run!" and ran. "Where', False, 'He said, "Run!" and ran.'),
        ("The fox ran. The owl flew.", True, "The fox ran. The owl flew."),
        ("The fox ran. The owl flew.", False, "The fox ran."),  # "flew..." may follow
        ("The fox met Mr. Owl", False, ""),
        ("no end", True, ""),
    ],
)
def test_a_text_ends_with_a_whole_sentence(text: str, ended: bool, expected: str) -> None:
    assert whole_sentences(text, ended=ended) == expected
