"""This project's own decoder. Arguments: the bundle, and the number of threads."""

from __future__ import annotations

import json
import sys
import time

from seed_story import SEEDStory, __version__
from seed_story.measure import peak_rss_mib


def main() -> None:
    """Answers jobs until standard input ends."""
    model = SEEDStory(sys.argv[1], threads=int(sys.argv[2]))
    decoder = model.decoder
    engine = f"seed-story ({model.bundle.manifest.recipe})"
    print(json.dumps({"engine": engine, "version": __version__}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        decoder.cache.reset()
        started = time.perf_counter()
        decoder.feed(decoder.embed(job["tokens"]))
        prefill_s = time.perf_counter() - started
        step_s = []
        for token in job["tokens"][: job["steps"]]:
            started = time.perf_counter()
            decoder.step(token)
            step_s.append(time.perf_counter() - started)
        print(json.dumps({"prefill_s": prefill_s, "step_s": step_s, "peak_rss_mib": peak_rss_mib()}), flush=True)


if __name__ == "__main__":
    main()
