"""This project's own decoder."""

from collections.abc import Sequence

from seed_story import SEEDStory, __version__


class Engine:
    """The decoder of a bundle; its cache has the bundle's slots."""

    version = __version__

    def __init__(self, bundle: str, threads: str) -> None:
        self._model = SEEDStory(bundle, threads=int(threads))

    def reset(self) -> None:
        """Forgets everything."""
        self._model.decoder.cache.reset()

    def feed(self, tokens: Sequence[int]) -> None:
        """Goes on by the tokens."""
        decoder = self._model.decoder
        self._logits = decoder.feed(decoder.embed(tokens))

    def logits(self) -> object:
        """What follows the last token, float32 `[vocab]`."""
        return self._logits
