"""llama.cpp through llama-cpp-python."""

from collections.abc import Sequence

import llama_cpp
import numpy as np


class Engine:
    """A GGUF file, and a context of `slots` tokens; with flash attention, as llama.cpp itself would choose."""

    version = llama_cpp.__version__

    def __init__(self, path: str, threads: str, slots: str) -> None:
        self._model = llama_cpp.Llama(
            path, n_ctx=int(slots), n_batch=512, n_ubatch=512, n_threads=int(threads), n_threads_batch=int(threads),
            flash_attn=True, verbose=False,
        )  # fmt: skip
        self._vocabulary = self._model.n_vocab()

    def reset(self) -> None:
        """Forgets everything."""
        self._model.reset()

    def feed(self, tokens: Sequence[int]) -> None:
        """Goes on by the tokens."""
        self._model.eval(tokens)

    def logits(self) -> object:
        """What follows the last token, float32 `[vocab]`."""
        found = llama_cpp.llama_get_logits_ith(self._model.ctx, -1)
        return np.ctypeslib.as_array(found, (self._vocabulary,))
