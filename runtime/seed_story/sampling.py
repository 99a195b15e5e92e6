"""From logits to the next token: penalties, filters, the draw, and where to stop.

The order is that of `transformers`: repetition penalty, no-repeat n-gram, temperature, top-k, top-p, min-p.
Two facts keep a step over a vocabulary of 49,152 far below a millisecond: min-p compares with the best token,
so its threshold is known before any exponential is taken, and what is above it is mostly a handful, which plain Python
chooses from; and top-p sorts values, never ids.
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from seed_story.errors import BackendError, UsageError
from seed_story.filters import filtered
from seed_story.ngrams import NgramMemory
from seed_story.stop import StopMatcher

__all__ = ["Sampler", "SamplingConfig", "StopMatcher"]

_FEW = 128
"""So many tokens are weighed in plain Python. After a step over the weights NumPy's code has left the processor's
caches, and each of its functions costs 2 to 10 µs at its first use (docs/performance.md): 105 µs a token, not 180."""


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen; validated on creation.

    Args:
        temperature: divides the logits; 0 takes the best token always.
        top_k: keep the k best tokens (and those equal to the k-th); 0 for all.
        top_p: keep the best tokens that make up this probability; 1 for all.
        min_p: keep tokens at least this fraction as probable as the best; 0 for all.
        repetition_penalty: divides positive and multiplies negative logits of recent tokens; 1 for none.
        repetition_window: how many recent tokens that concerns; 0 for none.
        no_repeat_ngram: never repeat a sequence of so many tokens (of the last 16,384); 0 for off.
        stop: strings that end the story, for `StopMatcher`.

    Raises:
        UsageError: a value out of range.
    """

    temperature: float = 0.4
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.05
    repetition_penalty: float = 1.15
    repetition_window: int = 256
    no_repeat_ngram: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        self._check("temperature", _is_number(self.temperature) and self.temperature >= 0, "0 or more")
        self._check("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "above 0, at most 1")
        self._check("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "0 to 1")
        penalty = self.repetition_penalty
        self._check("repetition_penalty", _is_number(penalty) and 0.01 <= penalty <= 100, "0.01 to 100")
        for name in ("top_k", "repetition_window", "no_repeat_ngram"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            self._check(name, whole and value >= 0, "a whole number, 0 or more")
        self._check("stop", all(isinstance(s, str) and s for s in stop), "strings that aren't empty")

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UsageError(f"{name} is impossible", got=getattr(self, name), expected=expected)

    @property
    def divisor(self) -> float:
        """The temperature, within what float32 can divide by; beyond, nothing changes."""
        return min(max(self.temperature, 1e-6), 1e6)

    @property
    def reach(self) -> float:
        """How far below the best logit a token can be chosen; infinite where no logit alone says it."""
        if self.temperature == 0:
            return 0.0
        # Top-p would need the weights of those that min-p leaves out.
        return -self.divisor * math.log(self.min_p) if self.top_p == 1 and self.min_p > 0 else math.inf

    @classmethod
    def greedy(cls, *, no_repeat_ngram: int = 0, stop: Sequence[str] = ()) -> Self:
        """The best token always, the lowest id among equals; nothing is penalised."""
        return cls(temperature=0.0, min_p=0.0, repetition_penalty=1.0, no_repeat_ngram=no_repeat_ngram,
                   stop=tuple(stop) if not isinstance(stop, str) else (stop,))  # fmt: skip


class Sampler:
    """Chooses tokens for one story. The same seed, history and logits give the same tokens.

    Args:
        config: how to choose.
        seed: of the random generator (PCG64), 0 or more.
        vocab_size: the length of the logits.
        suppressed_ids: tokens that are never chosen.

    Raises:
        UsageError: ids beyond the vocabulary, or nothing left to choose.
    """

    def __init__(self, config: SamplingConfig, seed: int, vocab_size: int, suppressed_ids: Iterable[int] = ()) -> None:
        self.config, self.vocab_size = config, vocab_size
        if vocab_size < 1:
            raise UsageError("the vocabulary is empty", got=vocab_size, expected="1 or more tokens")
        self._generator = _generator(seed)
        suppressed = sorted({self._checked(id_) for id_ in suppressed_ids})
        if len(suppressed) == vocab_size:
            raise UsageError("every token is suppressed", got=vocab_size, expected="at least one token to choose")
        self._suppressed = frozenset(suppressed)
        penalised = config.repetition_penalty != 1 and config.repetition_window > 0
        self._recent: deque[int] = deque(maxlen=config.repetition_window if penalised else 0)
        self._times: Counter[int] = Counter()  # how often each id is among these
        self._ngrams = NgramMemory(config.no_repeat_ngram)
        self._scores = np.empty(vocab_size, np.float32)

    def accept(self, token_id: int) -> None:
        """Remembers a token, of the prompt or sampled, for the penalty and the n-grams.

        Memory: the last `repetition_window` ids, and with `no_repeat_ngram` those of the last 16,384 tokens.

        Raises:
            UsageError: an id beyond the vocabulary.
        """
        token_id = self._checked(token_id)
        self._remember(token_id)
        self._ngrams.accept(token_id)

    def sample(self, logits: NDArray[np.floating[Any]]) -> int:
        """The next token; remembers nothing until `accept`.

        Args:
            logits: `[vocab_size]`, any float type, natural logarithms up to a constant; not changed.

        Raises:
            BackendError: another shape, NaN or +infinity among the logits, or nothing that can be chosen.
        """
        if logits.shape != (self.vocab_size,):
            raise BackendError("the logits have another shape", got=list(logits.shape), expected=[self.vocab_size])
        ids, weights = self._few(logits) or self._many(logits)
        if self.config.temperature == 0:
            return int(ids[0])
        ends = list(accumulate(weights)) if isinstance(weights, list) else weights.cumsum(dtype=np.float64)
        total = float(ends[-1])
        # The draw stays below the total, so that it always falls on a token of positive weight.
        return int(ids[bisect_right(ends, min(self._generator.random() * total, math.nextafter(total, 0)))])

    def reseed(self, seed: int) -> None:
        """Chooses by another seed from now on; what was accepted stays remembered.

        Raises:
            UsageError: an impossible seed.
        """
        self._generator = _generator(seed)

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, fit for JSON."""
        inner = self._generator.bit_generator.state
        words = {key: str(value) for key, value in inner["state"].items()}  # 128 bits: too wide for many readers
        return {
            "config": {**asdict(self.config), "stop": list(self.config.stop)},
            "vocab_size": self.vocab_size,
            "suppressed_ids": sorted(self._suppressed),
            "generator": {"state": words, "has_uint32": inner["has_uint32"], "uinteger": inner["uinteger"]},
            "recent": list(self._recent),
            "ngram_history": list(self._ngrams.history),
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Self:
        """A sampler that goes on exactly where the one that gave this `state` was.

        Raises:
            UsageError: the state is damaged.
        """
        try:
            made = cls(SamplingConfig(**state["config"]), 0, state["vocab_size"], state["suppressed_ids"])
            words = {key: int(state["generator"]["state"][key]) for key in ("state", "inc")}
            made._generator.bit_generator.state = {
                **state["generator"], "bit_generator": "PCG64", "state": words,
            }  # fmt: skip
            for id_ in state["recent"]:
                made._remember(made._checked(id_))
            for id_ in state["ngram_history"]:
                made._ngrams.accept(made._checked(id_))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = "the sampler's state is damaged"
            raise UsageError(what, got=repr(error), expected="what Sampler.state() gave") from error
        return made

    def _remember(self, token_id: int) -> None:
        if not self._recent.maxlen:
            return
        if len(self._recent) == self._recent.maxlen:
            self._times[self._recent[0]] -= 1
            if not self._times[self._recent[0]]:
                del self._times[self._recent[0]]
        self._recent.append(token_id)
        self._times[token_id] += 1

    def _checked(self, token_id: int) -> int:
        token_id = operator.index(token_id)
        if not 0 <= token_id < self.vocab_size:
            most = self.vocab_size - 1
            raise UsageError("a token id is beyond the vocabulary", got=token_id, expected=f"0..{most}")
        return token_id

    def _few(self, logits: NDArray[np.floating[Any]]) -> tuple[list[int], list[float]] | None:
        """As `_many`, where at most `_FEW` tokens are known to be all that can be chosen; else None."""
        config, reach = self.config, self.config.reach
        best = self._less(float(logits[logits.argmax()]))  # or more, unless that token is suppressed or banned
        if config.repetition_penalty < 1 or not -math.inf < best - reach < math.inf:
            return None
        near = np.greater_equal(logits, best - reach).nonzero()[0]  # all others only get less
        if len(near) > min(_FEW, config.top_k or _FEW):
            return None
        times, suppressed, banned = self._times, self._suppressed, self._ngrams.banned()
        scores = {
            id_: self._less(score) if id_ in times else score
            for id_, score in zip(near.tolist(), logits[near].tolist(), strict=True)
            if id_ not in suppressed and id_ not in banned
        }
        top = max(scores.values(), default=-math.inf)
        if top < best:
            return None
        kept = {id_: score - top for id_, score in scores.items() if score >= top - reach}
        return list(kept), [math.exp(score / config.divisor) for score in kept.values()]

    def _many(self, logits: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The ids, ascending, that can be chosen, and their weights relative to the best token's."""
        config = self.config
        with np.errstate(over="ignore", under="ignore", divide="ignore"):  # extreme logits become 0 or infinity
            scores = self._penalised(logits)
            best = int(scores.argmax())  # the lowest id among equals
            if scores[best] == -np.inf:
                raise BackendError("no token can be chosen", got=-np.inf, expected="finite logits")
            if config.temperature == 0:
                return np.array([best]), np.ones(1, np.float32)
            return filtered(
                scores, float(scores[best]), reach=config.reach, temperature=config.divisor, top_k=config.top_k,
                top_p=config.top_p, min_p=config.min_p,
            )  # fmt: skip

    def _less(self, score: float) -> float:
        """A logit after the penalty."""
        penalty = self.config.repetition_penalty
        return score * penalty if score < 0 else score / penalty

    def _penalised(self, logits: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """The logits in the scratch buffer, checked, after suppression, penalty and n-grams."""
        scores = self._scores
        np.copyto(scores, logits, casting="same_kind")
        if not scores[scores.argmax()] < np.inf:  # to argmax NaN is the greatest, and it is not below anything
            got = "NaN" if np.isnan(scores).any() else "+infinity"
            hint = "The graph overflowed or its weights are damaged: verify the bundle."
            raise BackendError("the logits are no numbers", got=got, expected="finite logits", hint=hint)
        scores[list(self._suppressed)] = -np.inf
        if self._times:
            recent = np.fromiter(self._times, np.int64)
            penalty, values = np.float32(self.config.repetition_penalty), scores[recent]
            scores[recent] = np.where(values < 0, values * penalty, values / penalty)
        banned = self._ngrams.banned()
        if banned:
            places = np.array(banned, np.int64)
            before = scores[places]
            scores[places] = -np.inf
            if scores.max() == -np.inf:  # a repetition is better than nothing
                scores[places] = before
        return scores


def _generator(seed: int) -> np.random.Generator:
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError("the seed is impossible", got=seed, expected="a whole number, 0 or more")
    return np.random.Generator(np.random.PCG64(seed))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
