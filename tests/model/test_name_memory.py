"""The memory of names hedges: where it can't tell which of a kind it sees, it names the kind."""

from __future__ import annotations

import numpy as np
import pytest

from model.name_memory import NameMemory
from seed_story.config import QFormerConfig

NAMES = ("", "owl", "eagle", "bird", "boat")
CONFIG = QFormerConfig(
    vision_size=8, hidden_size=4, llm_size=len(NAMES), num_queries=1, num_layers=1, num_heads=1, groups=1,
    memory_names=len(NAMES), memory_slots=1,
)  # fmt: skip


def recalled(**likely: float) -> dict[str, float]:
    """The share of every name in what a memory recalls, if it holds things for so likely."""
    memory = NameMemory(CONFIG, None)
    worth = np.eye(len(NAMES), dtype=np.float32)
    worth[NAMES.index("bird"), [NAMES.index("owl"), NAMES.index("eagle")]] = 0.8
    memory.worth.weight.assign(worth)
    memory.values.weight.assign(np.eye(len(NAMES), dtype=np.float32))  # a name's embedding says which it is
    bias = np.log(np.array([likely.get(name, 1e-6) for name in NAMES], np.float32))
    memory.scores[0].assign(np.zeros((len(NAMES), 4), np.float32), bias)
    shares = np.asarray(memory(np.ones((1, 1, 4), np.float32))).reshape(-1)
    return dict(zip(NAMES, shares.tolist(), strict=True))


@pytest.mark.parametrize(
    ("likely", "said"),
    [
        ({"owl": 0.97, "eagle": 0.03}, "owl"),
        ({"owl": 0.5, "eagle": 0.45, "boat": 0.05}, "bird"),
        ({"owl": 0.3, "eagle": 0.25, "boat": 0.45}, "boat"),  # a kind is worth less than what it is made of
        ({"owl": 0.35, "eagle": 0.25, "boat": 0.4}, "bird"),
        ({"bird": 0.9, "owl": 0.1}, "bird"),
        ({"": 1.0}, ""),
    ],
)
def test_says_what_is_worth_most(likely: dict[str, float], said: str) -> None:
    shares = recalled(**likely)
    assert max(shares, key=shares.__getitem__) == said
    worth = {n: likely.get(n, 0) + 0.8 * (n == "bird") * (likely.get("owl", 0) + likely.get("eagle", 0)) for n in NAMES}
    total = sum(w**4 for w in worth.values())
    assert shares == pytest.approx({n: w**4 / total for n, w in worth.items()}, abs=1e-4)


def test_worth_is_not_learned() -> None:
    memory = NameMemory(CONFIG, np.random.default_rng(0))
    learned = {id(variable) for variable in memory.trainable_variables}
    assert id(memory.worth.weight) not in learned
    assert {id(memory.values.weight), id(memory.scores[0].weight)} <= learned
