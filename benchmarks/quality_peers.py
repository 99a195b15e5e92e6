"""What llama.cpp's quantization costs the same weights on the same text, beside this project's.

`make quality-peers`. Text only, and without what training added: a GGUF file holds the decoder alone. All rows are
measured against one reference, this project's float32 bundle; the row F32 tells how far the two engines are apart
where neither quantizes. Texts are shorter than the cache, so that nothing is evicted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.peers.files import Workshop
from benchmarks.peers.table import LLAMA_CPP, gguf
from benchmarks.peers.venvs import Gap, peer_environment
from quantization.fidelity import Divergence, Place, divergence, figures, log_softmax
from quantization.reference import check_reference
from quantization.render import figure, table
from seed_story.backends.base import Array
from seed_story.bundle import Bundle, graph_file
from seed_story.cli import whole
from seed_story.contract import DECODER
from seed_story.device import cpu_model
from seed_story.errors import SeedStoryError
from seed_story.files import cache_dir
from seed_story.output import exit_code, note, prepare, write, write_json
from seed_story.story import SEEDStory
from training.data import IGNORE, Example, read_stories
from training.evaluation.perplexity import forced_logits

KINDS = ("F32", "Q8_0", "Q4_1", "Q4_K_M")
"""llama.cpp's types that are compared. A file that already is of one is requantized all the same, from its values."""
_WORKER = Path(__file__).parent / "workers" / "llama_cpp_logits.py"


class Peer:
    """llama.cpp with one file, in a process of its own.

    Raises:
        SeedStoryError: it ended.
    """

    def __init__(self, python: str, gguf: Path, kind: str, *, threads: int, most: int, scratch: Path) -> None:
        command = [python, str(_WORKER), str(gguf), str(threads), str(most)]
        self.kind, self._file = kind, scratch / f"{kind}.npy"
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
            env=peer_environment(),
        )  # fmt: skip
        hello = self._read()
        self.version, self.bytes = str(hello["version"]), int(hello["bytes"])

    def logits(self, ids: Sequence[int]) -> Array:
        """What follows each of a text's tokens, float32 `[tokens, vocab]`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"tokens": list(ids), "file": str(self._file)}) + "\n")
        self._process.stdin.flush()
        self._read()
        return np.asarray(np.load(self._file))

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SeedStoryError(f"llama.cpp's process for {self.kind} has ended", got=self._process.wait(),
                                 hint="Does its venv have llama-cpp-python, and does the GGUF file load?")  # fmt: skip
        return dict(json.loads(line))


def texts(file: Path) -> Iterator[tuple[str, str]]:
    """Held-out stories' ids and words."""
    for story in read_stories(file):
        yield story.id, " ".join(page.caption for page in story.pages)


def walk(
    models: Sequence[SEEDStory], peers: Sequence[Peer], stories: Iterator[tuple[str, str]], tokens: int
) -> tuple[list[Place], list[list[Divergence]]]:
    """Reads the stories with all models and peers; the first model is the reference.

    Returns:
        The places of `tokens` tokens, fewer if there are no more, and the divergences of all but the reference there.
    """
    places: list[Place] = []
    found: list[list[Divergence]] = [[] for _ in (*models[1:], *peers)]
    with tqdm(total=tokens, desc="held-out stories", unit="token") as bar:
        for name, text in stories:
            ids = np.array(models[0].tokenizer.encode(text)[: models[0].cache.slots], np.int32)
            example = Example(ids, np.append(ids[1:], np.int32(IGNORE)), ())
            theirs = [peer.logits(ids.tolist()) for peer in peers]
            for (at, truth), *ours in zip(*(forced_logits(model, example, ()) for model in models), strict=True):
                expected, token_id = log_softmax(truth), int(example.labels[at])
                others = [*(logits for _, logits in ours), *(rows[at] for rows in theirs)]
                places.append(Place(name, 1, False))
                for mine, logits in zip(found, others, strict=True):
                    mine.append(divergence(expected, log_softmax(logits), token_id))
                bar.update(1)
                if len(places) == tokens:
                    return places, found
    return places, found


def compare(
    reference: Bundle, bundles: Sequence[Bundle], *, workshop: Workshop, stories: Path, tokens: int, threads: int
) -> list[dict[str, Any]]:
    """A row of figures for each bundle and each of `KINDS`.

    Raises:
        SeedStoryError: the bundles can't be compared, or llama.cpp fails.
    """
    check_reference(reference, bundles)
    try:
        python, files = workshop.python(LLAMA_CPP), {kind: workshop.path(gguf(kind)) for kind in KINDS}
    except Gap as gap:
        raise SeedStoryError("llama.cpp can't be compared with", got=gap, expected=LLAMA_CPP.pins[0]) from gap
    most = reference.manifest.cache.slots
    with ExitStack() as opened:
        scratch = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        models = [opened.enter_context(SEEDStory(bundle, threads=threads)) for bundle in (reference, *bundles)]
        peers = [Peer(python, files[kind], kind, threads=threads, most=most, scratch=scratch) for kind in KINDS]
        for peer in peers:
            opened.callback(peer.close)
        places, found = walk(models, peers, texts(stories), tokens)
    rows: list[dict[str, Any]] = []
    for manifest in (bundle.manifest for bundle in bundles):
        rows.append({"engine": f"seed-story, {manifest.recipe}", "bytes": manifest.files[graph_file(DECODER)][1]})
    rows += [{"engine": f"llama.cpp {peer.version}, {peer.kind}", "bytes": peer.bytes} for peer in peers]
    return [{**row, **figures(places, one)} for row, one in zip(rows, found, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and prints a table, then one line of JSON."""
    prepare()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality_peers", description=__doc__)
    parser.add_argument("bundles", nargs="+", type=Path, help="bundles of the GGUF file's weights (--checkpoint none)")
    parser.add_argument("--reference", type=Path, required=True, help="their float32 bundle")
    parser.add_argument("--venvs", type=Path, default=Path("build/peers"), help="of llama.cpp (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("build/storybook"), help="held-out stories: test.jsonl")
    parser.add_argument("--tokens", type=whole(1), default=2000, help="compare at so many (default: %(default)s)")
    parser.add_argument("--threads", type=whole(1), default=2)
    args = parser.parse_args(argv)
    return exit_code(lambda: _run(args), "quality_peers")


def _run(args: argparse.Namespace) -> int:
    workshop = Workshop(args.venvs.absolute(), cache_dir() / "benchmarks" / "peers", note)
    rows = compare(
        Bundle.open(args.reference), [Bundle.open(path) for path in args.bundles], workshop=workshop,
        stories=args.data / "test.jsonl", tokens=args.tokens, threads=args.threads,
    )  # fmt: skip
    shown = [["engine", "decoder, MB", "perplexity ratio", "mean KL, nat", "p99 KL", "top-1, %", "top-5, %"]]
    columns = (("perplexity_ratio", ".4f", 1), ("mean_kl", ".5f", 1), ("p99_kl", ".4f", 1),
               ("top1_agreement", ".2f", 100), ("top5_agreement", ".2f", 100))  # fmt: skip
    for row in rows:
        shown.append([row["engine"], f"{row['bytes'] / 1e6:.1f}", *(figure(row, *column) for column in columns)])
    head = f"{cpu_model()}, {args.threads} threads; {rows[0]['tokens']} tokens of {rows[0]['stories']} held-out stories"
    write(f"{head}; intervals over stories, 95 %\n\n{table(shown)}\n")
    write_json({"cpu": cpu_model(), "threads": args.threads, "engines": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
