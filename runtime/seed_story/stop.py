"""Ends streamed text at a stop string, without ever showing the beginning of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from seed_story.errors import UsageError

__all__ = ["StopMatcher"]


class StopMatcher:
    """Cuts streamed text at the first stop string, and emits nothing that may still become one.

    However the text is cut into pieces, the stop that is complete first counts; of several that end together,
    the longest. The stop string itself is not emitted.

    Args:
        stop: strings, none of them empty; none at all lets everything through.

    Raises:
        UsageError: an empty stop string.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(s, str) and s for s in self._stop):
            raise UsageError("a stop string is impossible", got=self._stop, expected="strings that aren't empty")
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found."""

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes the next text; gives what can be shown now, and whether the story stops here."""
        if self.matched is not None:
            return "", True
        text = self._held + piece
        ends = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.matched = min(ends)
            self._held = ""
            return text[:at], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def state(self) -> dict[str, str | None]:
        """Everything that `restore` needs, fit for JSON."""
        return {"held": self._held, "matched": self.matched}

    def restore(self, state: Mapping[str, str | None]) -> None:
        """Goes on where the matcher of the same strings that gave this `state` was."""
        self._held, self.matched = state["held"] or "", state["matched"]

    def flush(self) -> str:
        """What was held back: the stream ended before it became a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of the text that begins the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
