"""A process from its start to a story's first token. Arguments: the bundle, the threads, and how many tokens to read.

Prints a line when the first token is there, and then one of JSON: the process's memory, MiB.
"""

from __future__ import annotations

import json
import sys

from seed_story import SEEDStory
from seed_story.measure import peak_rss_mib
from seed_story.resident import resident


def main() -> None:
    """Opens the bundle, reads, chooses the best token, tells what that took."""
    model = SEEDStory(sys.argv[1], threads=int(sys.argv[2]))
    logits = model.decoder.feed(model.decoder.embed(range(100, 100 + int(sys.argv[3]))))
    print(int(logits.argmax()), flush=True)
    now = resident()
    print(json.dumps({"peak_rss_mib": peak_rss_mib(), "private_mib": now and now.private_mib}))


if __name__ == "__main__":
    main()
