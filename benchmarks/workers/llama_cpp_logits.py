"""llama.cpp's logits of whole texts; runs in a venv of its own, so it imports nothing of this project.

Arguments: the GGUF file, the number of threads, and the most tokens of a text.

Reads a job a line on standard input, `{"tokens": [...], "file": "logits.npy"}`: starts over, reads the tokens, and
writes what follows each of them, float32 `[tokens, vocab]`. Answers with a line `{}`. A first line tells the version.
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    """Answers jobs until standard input ends."""
    path, threads, most = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    model = llama_cpp.Llama(path, n_ctx=most, n_batch=most, n_threads=threads, n_threads_batch=threads,
                            logits_all=True, verbose=False)  # fmt: skip
    print(json.dumps({"version": llama_cpp.__version__, "bytes": Path(path).stat().st_size}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        model.reset()
        model.eval(job["tokens"])
        np.save(job["file"], model.scores[: len(job["tokens"])].astype(np.float32))
        print("{}", flush=True)


if __name__ == "__main__":
    main()
