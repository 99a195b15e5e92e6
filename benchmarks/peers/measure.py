"""Engines take turns, round by round, so that a machine whose speed drifts drifts for all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks.peers.venvs import Gap
from quantization.fidelity import row_cosines
from seed_story.errors import SeedStoryError
from seed_story.tokenizer import StoryTokenizer

REST_S = 0.1
"""Before each turn: threads of the engine before spin for a while when they have nothing to do."""

_PASSAGE = (
    "The little fox lived at the edge of the forest, where the river was wide and slow. Every morning she went down "
    "to the water to drink, and every morning an old heron stood there on one leg and said nothing. One day the heron "
    "was gone. The fox waited until noon, and then she walked along the bank to look for him."
)
_FEWEST_WORDS = 100
_PREFIXES = range(8, 56, 2)  # tokens of the passage, after which the most probable next one is asked for


class Asked(Protocol):
    """What answers jobs: `process.Worker`, or a test's."""

    version: str

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Does one job; raises Gap."""


@dataclass
class Result:
    """What was found of one engine: a value for each round, by the name of the figure; or why there is none.

    Args:
        first_choices: how many most probable next tokens are the float32 model's, and of how many.
        cosine: of the features to the float32 model's.
    """

    version: str = ""
    rounds: dict[str, list[float]] = field(default_factory=dict)
    first_choices: str | None = None
    cosine: float | None = None
    gap: str = ""

    def fail(self, gap: Gap) -> None:
        """Only the reason stays: half a measurement is none."""
        self.gap, self.rounds = str(gap), {}


def take_turns(
    workers: dict[str, Asked],
    results: Mapping[str, Result],
    turn: Callable[[Asked, int], dict[str, float]],
    rounds: int,
    say: Callable[[str], None],
) -> None:
    """Runs all workers, one after the other, in each of `rounds` rounds, after one that isn't counted.

    Who begins moves on by one each round, so that nobody always comes after the same. A worker that fails is dropped
    from `workers`.

    Args:
        turn: gives the figures of one worker in one round.
    """
    for index in range(rounds + 1):
        names = list(workers)
        begin = index % max(1, len(names))
        for name in names[begin:] + names[:begin]:
            time.sleep(REST_S)
            try:
                figures = turn(workers[name], index)
            except Gap as gap:
                results[name].fail(gap)
                del workers[name]
                continue
            if index:
                for figure, value in figures.items():
                    results[name].rounds.setdefault(figure, []).append(value)
        say(f"round {index} of {rounds}")


class Test(Protocol):
    """What engines of one kind are asked, to see whether they are the same model and how fast."""

    def answers(self, worker: Asked) -> list[Any]:
        """What shows which model it is; raises Gap."""

    def check(self, result: Result, found: list[Any], truth: list[Any]) -> None:
        """Compares answers with the float32 model's; raises Gap if it is another model, whose speed means nothing."""

    def turn(self, worker: Asked, index: int) -> dict[str, float]:
        """The figures of one round, the more the better but for memory (`peak_rss`, MiB); raises Gap."""


class DecoderTest:
    """Each round reads another prompt of random words, then decodes single tokens.

    Args:
        depth: tokens of a prompt.
        steps: single tokens; the median of their times is the round's figure.

    Raises:
        SeedStoryError: the tokenizer has too few whole words.
    """

    def __init__(self, tokenizer: StoryTokenizer, *, depth: int, steps: int, rounds: int) -> None:
        self._tokenizer, self._steps = tokenizer, steps
        self._prompts = prompts_of(tokenizer, depth, rounds + 1)

    def answers(self, worker: Asked) -> list[Any]:
        """The most probable next token after each of some beginnings of a passage."""
        ids = self._tokenizer.encode(_PASSAGE)
        begun = [ids[:end] for end in _PREFIXES]
        return [worker.ask({"tokens": b, "text": self._tokenizer.decode(b), "steps": 0})["next"] for b in begun]

    def check(self, result: Result, found: list[Any], truth: list[Any]) -> None:
        """At least half must be the same; a quantized model's are not all."""
        same = sum(mine == theirs for mine, theirs in zip(found, truth, strict=True))
        result.first_choices = f"{same} of {len(truth)}"
        if 2 * same < len(truth):
            raise Gap(f"another model: only {same} of {len(truth)} first choices are the float32 model's")

    def turn(self, worker: Asked, index: int) -> dict[str, float]:
        """Tokens a second."""
        tokens, text = self._prompts[index]
        said = worker.ask({"tokens": tokens, "text": text, "steps": self._steps})
        if 2 * len(said["step_s"]) < self._steps:
            raise Gap(f"decoded only {len(said['step_s'])} of {self._steps} tokens")
        return {"decode": 1 / float(np.median(said["step_s"])), "prefill": len(tokens) / said["prefill_s"],
                "peak_rss": said["peak_rss_mib"]}  # fmt: skip


class VitTest:
    """Each round looks at another picture, `repeats` times; the median of the times is the round's figure.

    Args:
        pictures: how many there are.
        scratch: a folder for features.
    """

    def __init__(self, *, pictures: int, repeats: int, scratch: Path) -> None:
        self._pictures, self._repeats, self._file = pictures, repeats, scratch / "features.npy"

    def answers(self, worker: Asked) -> list[Any]:
        """The features of every picture, float32 `[tokens, width]` each."""
        found = []
        for index in range(self._pictures):
            worker.ask({"picture": index, "repeats": 0, "file": str(self._file)})
            found.append(np.load(self._file))
        return found

    def check(self, result: Result, found: list[Any], truth: list[Any]) -> None:
        """The mean cosine over all rows of all pictures must be 0.9."""
        a, b = np.stack(found), np.stack(truth)
        if a.shape != b.shape:
            raise Gap(f"features {list(a.shape)}, expected {list(b.shape)}")
        result.cosine = round(float(row_cosines(a, b).mean()), 6)
        if not result.cosine >= 0.9:
            raise Gap(f"another model: mean cosine {result.cosine:.3f} to the float32 model's features")

    def turn(self, worker: Asked, index: int) -> dict[str, float]:
        """Pictures a second."""
        said = worker.ask({"picture": index % self._pictures, "repeats": self._repeats, "file": None})
        return {"vit": 1 / float(np.median(said["step_s"])), "peak_rss": said["peak_rss_mib"]}


def prompts_of(tokenizer: StoryTokenizer, depth: int, count: int) -> list[tuple[list[int], str]]:
    """Random words as tokens and as text: all of them words of one token, so that both say the same.

    Raises:
        SeedStoryError: the tokenizer joins words, or has too few.
    """
    words = [i for i in range(tokenizer.vocab_size) if _is_word(tokenizer, i)]
    if len(words) < _FEWEST_WORDS:
        raise SeedStoryError("the tokenizer has too few whole words", got=len(words), expected=_FEWEST_WORDS)
    rng = np.random.default_rng(0)
    found = [rng.choice(words, depth).tolist() for _ in range(count)]
    prompts = [(ids, tokenizer.decode(ids)) for ids in found]
    if wrong := [text for ids, text in prompts if tokenizer.encode(text) != ids]:
        raise SeedStoryError("the tokenizer joins words", got=wrong[0][:80])
    return prompts


def _is_word(tokenizer: StoryTokenizer, token_id: int) -> bool:
    try:
        text = tokenizer.token_bytes(token_id).decode()
    except UnicodeDecodeError:
        return False
    return text.startswith(" ") and text[1:].isascii() and text[1:].isalpha() and tokenizer.encode(text) == [token_id]
