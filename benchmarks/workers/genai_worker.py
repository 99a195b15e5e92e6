"""ONNX Runtime's own loop for language models, onnxruntime-genai."""

import json
from collections.abc import Sequence

import numpy as np
import onnxruntime_genai as genai


class Engine:
    """A folder of its model builder, and a cache of `slots` tokens."""

    version = genai.__version__

    def __init__(self, folder: str, threads: str, slots: str) -> None:
        config = genai.Config(folder)
        options = {"intra_op_num_threads": int(threads)}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model, self._slots = genai.Model(config), int(slots)

    def reset(self) -> None:
        """Forgets everything."""
        params = genai.GeneratorParams(self._model)
        params.set_search_options(max_length=self._slots, do_sample=False)
        self._generator = genai.Generator(self._model, params)

    def feed(self, tokens: Sequence[int]) -> None:
        """Goes on by the tokens."""
        self._generator.append_tokens(np.array(tokens, np.int32))

    def logits(self) -> object:
        """What follows the last token, float32 `[vocab]`."""
        return np.asarray(self._generator.get_logits()).reshape(-1)
