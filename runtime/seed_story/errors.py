"""Every error a user can meet, as one tree.

SeedStoryError
├── UsageError          the call itself is wrong: an unknown option, an impossible value (exit code 2)
├── PictureError        a picture can't be read, or isn't one
├── PromptError         a text that the model can't take
├── BundleError         a bundle is missing, damaged, unsafe or of another version
│   └── ContractError   a graph's inputs and outputs aren't those that the manifest promises
├── SnapshotError       a saved story is missing, damaged, of another version or of another bundle
├── BackendError        the inference engine is missing or refused a graph
├── ConfigError         a model configuration that isn't supported, or contradicts itself
├── WeightsError        a checkpoint with missing, unused or mis-shaped tensors
├── DownloadError       a file that can't be fetched, or came with another sha256
└── ExportError         an export that can't go on
    └── ParityError     a graph that strays from the reference by more than its bound
"""

from __future__ import annotations


class SeedStoryError(Exception):
    """The root of the tree. The message says what is wrong, what was got and expected, and what to do.

    Args:
        what: the thing that is wrong, one clause.
        got: what was found.
        expected: what would have been right.
        hint: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, what: str, *, got: object = None, expected: object = None, hint: str = "") -> None:
        self.what, self.got, self.expected, self.hint = what, got, expected, hint
        parts = [what.rstrip(".")]
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        super().__init__("; ".join(parts) + "." + (f" {hint}" if hint else ""))


class UsageError(SeedStoryError):
    """The call itself is wrong."""

    exit_code = 2


class PictureError(SeedStoryError):
    """A picture can't be read, or isn't one."""


class PromptError(SeedStoryError):
    """A text that the model can't take."""


class BundleError(SeedStoryError):
    """A bundle is missing, damaged, unsafe or of another version."""


class ContractError(BundleError):
    """A graph's inputs and outputs aren't those that the manifest promises."""


class SnapshotError(SeedStoryError):
    """A saved story is missing, damaged, of another version or of another bundle."""


class BackendError(SeedStoryError):
    """The inference engine is missing or refused a graph."""


class ConfigError(SeedStoryError):
    """A model configuration that isn't supported, or contradicts itself."""


class WeightsError(SeedStoryError):
    """A checkpoint with missing, unused or mis-shaped tensors."""


class DownloadError(SeedStoryError):
    """A file that can't be fetched, or came with another sha256."""


class ExportError(SeedStoryError):
    """An export that can't go on."""


class ParityError(ExportError):
    """A graph that strays from the reference by more than its bound."""
