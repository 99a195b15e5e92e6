"""llama.cpp through llama-cpp-python; runs in a venv of its own, so it imports nothing of this project.

Arguments: the GGUF file, and the number of threads. With a third argument, first requantizes the file to Q8_0 there.
"""

import json
import resource
import sys
import time
from pathlib import Path

import llama_cpp


def requantize(source: str, target: str) -> None:
    """Writes `target`: `source` as Q8_0."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params) != 0:
        raise SystemExit("llama.cpp could not requantize the file")


def main() -> None:
    """Answers jobs until standard input ends."""
    path, threads = sys.argv[1], int(sys.argv[2])
    if len(sys.argv) > 3:
        if not Path(sys.argv[3]).is_file():
            requantize(path, sys.argv[3])
        path = sys.argv[3]
    model = llama_cpp.Llama(path, n_ctx=2048, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
    print(json.dumps({"engine": f"llama.cpp ({Path(path).stem})", "version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        model.reset()
        started = time.perf_counter()
        model.eval(job["tokens"])
        prefill_s = time.perf_counter() - started
        step_s = []
        for token in job["tokens"][: job["steps"]]:
            started = time.perf_counter()
            model.eval([token])
            step_s.append(time.perf_counter() - started)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"prefill_s": prefill_s, "step_s": step_s, "peak_rss_mib": peak}), flush=True)


if __name__ == "__main__":
    main()
