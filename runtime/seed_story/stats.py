"""What a story took so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StoryStats:
    """What a session has done so far. Times are wall clock.

    Args:
        prompt_tokens: slots that pictures and given text took, control tokens included.
        tokens: tokens told.
        steps: tokens that the decoder read one by one.
        guessed: tokens that were guessed, and computed in the run of one before them.
        guessed_right: those that came true: steps without a run.
        picture_ms, prefill_ms, decode_ms: spent on pictures, on reading the prompt, and on telling.
        time_to_first_token_ms: pictures, reading, and the first choice, without pauses between the calls.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    guessed: int = 0
    guessed_right: int = 0
    picture_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    time_to_first_token_ms: float | None = None

    @property
    def runs(self) -> int:
        """How often the decoder ran for the steps."""
        return self.steps - self.guessed_right

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Steps a second, with sampling and all else that a token costs; None before there is one."""
        return self.steps / self.decode_ms * 1e3 if self.steps else None
