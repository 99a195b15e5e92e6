"""PyTorch through `transformers`, as `AutoModelForCausalLM` runs it."""

from collections.abc import Sequence

import torch
import transformers


class Engine:
    """A folder with a decoder, and the type to compute in: `float32` or `bfloat16`."""

    version = f"torch {torch.__version__}, transformers {transformers.__version__}"

    def __init__(self, folder: str, threads: str, dtype: str) -> None:
        torch.set_num_threads(int(threads))
        load = transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._cache = transformers.DynamicCache(config=self._model.config)

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int]) -> None:
        """Goes on by the tokens."""
        said = self._model(torch.tensor([tokens]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._logits = said.logits[0, -1]

    def logits(self) -> object:
        """What follows the last token, float32 `[vocab]`."""
        return self._logits.float().numpy()
