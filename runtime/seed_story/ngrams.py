"""Remembers which tokens would repeat an n-gram, in bounded memory and constant time a token."""

from __future__ import annotations

from collections import deque
from itertools import islice

__all__ = ["NGRAM_MEMORY", "NgramMemory"]

NGRAM_MEMORY = 16_384
"""How many tokens back a repeated n-gram is still recognised: about 4 MB, however long the story."""


class NgramMemory:
    """From every n - 1 tokens to the tokens that have followed them, counted. Nothing at all for n = 0."""

    def __init__(self, n: int) -> None:
        self._n = n
        self.history: deque[int] = deque()
        self._next: dict[tuple[int, ...], dict[int, int]] = {}
        self._prefix: deque[int] = deque(maxlen=max(n - 1, 0))

    def accept(self, token_id: int) -> None:
        """Adds the n-gram that this token ends; forgets the oldest one beyond the memory."""
        if not self._n:
            return
        if len(self._prefix) == self._n - 1:
            followers = self._next.setdefault(tuple(self._prefix), {})
            followers[token_id] = followers.get(token_id, 0) + 1
        self._prefix.append(token_id)
        self.history.append(token_id)
        if len(self.history) > max(NGRAM_MEMORY, self._n):
            self._forget()

    def banned(self) -> list[int]:
        """The tokens that would complete an n-gram a second time."""
        if not self._n or len(self._prefix) < self._n - 1:
            return []
        return list(self._next.get(tuple(self._prefix), ()))

    def _forget(self) -> None:
        *prefix, last = islice(self.history, self._n)
        self.history.popleft()
        followers = self._next[tuple(prefix)]
        followers[last] -= 1
        if not followers[last]:
            del followers[last]
        if not followers:
            del self._next[tuple(prefix)]
