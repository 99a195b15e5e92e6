"""LiteRT-LM, which takes text and decodes its own choices, so that it is timed by its stream."""

import itertools
import time
from importlib.metadata import version
from typing import Any

import litert_lm


class Engine:
    """A .litertlm file, a cache of `slots` tokens, and a folder for its packed weights."""

    version = version("litert-lm-api")

    def __init__(self, path: str, threads: str, slots: str, packed: str) -> None:
        cpu = litert_lm.Backend.CPU(thread_count=int(threads))
        self._engine = litert_lm.Engine(path, backend=cpu, max_num_tokens=int(slots), cache_dir=packed)
        self._greedy = litert_lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=1)

    def turn(self, job: dict[str, Any]) -> dict[str, Any]:
        """Reads the text, then lets it choose tokens; a step is the time between two pieces of the stream.

        Prefill lasts until the first piece, for only then is known what follows the prompt, as with the others. The
        last piece isn't counted: it comes along with the one before.
        """
        if self._engine.tokenize(job["text"]) != job["tokens"]:
            raise SystemExit("LiteRT-LM reads the text as other tokens")
        options = {"apply_prompt_template": False, "sampler_config": self._greedy}
        with self._engine.create_session(max_output_tokens=job["steps"] + 2, **options) as session:
            started = time.perf_counter()
            session.run_prefill([job["text"]])
            at, pieces = [], []
            for said in session.run_decode_async():
                at.append(time.perf_counter())
                pieces.append(said.texts[0])
        if not pieces:
            raise SystemExit("LiteRT-LM says nothing after the text")
        times = [after - before for before, after in itertools.pairwise(at)]
        return {
            "prefill_s": at[0] - started,
            "step_s": times[:-1],
            "next": (self._engine.tokenize(pieces[0]) or [None])[0],
        }
