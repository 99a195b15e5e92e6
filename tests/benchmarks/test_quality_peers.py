"""The comparison with llama.cpp, whose part a script plays: what it says is compared with what torch makes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.peers.files import Made
from benchmarks.peers.venvs import Gap, Venv
from benchmarks.quality_peers import KINDS, Peer, main
from seed_story.errors import SeedStoryError
from seed_story.story import SEEDStory
from tests.training.held_out import CAPTIONS

FAKE = """
import json, sys
from pathlib import Path
import numpy as np
kind = Path(sys.argv[1]).stem
print(json.dumps({"version": "0", "bytes": 1000 + len(kind)}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if kind == "Q8_0" and FAILS:
        break
    rng = np.random.default_rng(len(kind) + sum(job["tokens"]))
    np.save(job["file"], rng.normal(size=(len(job["tokens"]), 320)).astype(np.float32))
    print("{}", flush=True)
"""


class Lent:
    """A workshop that has everything."""

    def __init__(self, *_: object) -> None:
        pass

    def python(self, _: Venv) -> str:
        return sys.executable

    def path(self, made: Made) -> Path:
        return Path(made.name)


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "worker.py"
    file.write_text(FAKE.replace("FAILS", "False"))
    monkeypatch.setattr("benchmarks.quality_peers._WORKER", file)
    monkeypatch.setattr("benchmarks.quality_peers.Workshop", Lent)
    return file


def arguments(loud_int8: Path, loud_bundle: Path, held_out: Path) -> list[str]:
    given = (loud_int8, "--reference", loud_bundle, "--data", held_out, "--tokens", "20", "--threads", "1")  # fmt: skip
    return [*map(str, given)]


@pytest.mark.usefixtures("worker")
def test_rows(loud_int8: Path, loud_bundle: Path, held_out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(loud_bundle), *arguments(loud_int8, loud_bundle, held_out)]) == 0
    out = capsys.readouterr().out
    same, *rows = json.loads(out.splitlines()[-1])["engines"]
    assert (same["engine"], same["mean_kl"], same["perplexity_ratio"]) == ("seed-story, float32", 0, 1)
    assert [row["engine"] for row in rows] == ["seed-story, int8", *(f"llama.cpp 0, {kind}" for kind in KINDS)]
    assert all(row["tokens"] == 20 for row in rows)
    assert 0 < rows[0]["mean_kl"] < 0.1 < rows[1]["mean_kl"]
    assert all(row["engine"] in out for row in rows)

    with SEEDStory(loud_bundle, threads=1) as model:
        ids = model.tokenizer.encode(" ".join(CAPTIONS[:3]))[: model.cache.slots]
        model.begin()
        truth = [model.decoder.step(token).copy() for token in ids]
        counted = [at for at in range(len(ids) - 1) if model.tokenizer.token_bytes(ids[at + 1]).strip()][:20]
    said = np.random.default_rng(len("Q8_0") + sum(ids)).normal(size=(len(ids), 320)).astype(np.float32)
    p, q = (torch.log_softmax(torch.tensor(np.stack(x), dtype=torch.float64), -1)[counted] for x in (truth, said))
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert rows[1 + KINDS.index("Q8_0")]["mean_kl"] == pytest.approx(float(expected), rel=1e-4)


def test_a_worker_that_ends(
    worker: Path, loud_int8: Path, loud_bundle: Path, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.write_text(FAKE.replace("FAILS", "True"))
    assert main(arguments(loud_int8, loud_bundle, held_out)) == 1
    assert "llama.cpp's process for Q8_0 has ended" in capsys.readouterr().err
    worker.write_text("raise SystemExit(3)")
    with pytest.raises(SeedStoryError, match="has ended; got 3"):
        Peer(sys.executable, Path("x.gguf"), "F32", threads=1, most=8, scratch=worker.parent)


@pytest.mark.usefixtures("worker")
def test_no_llama_cpp(
    loud_int8: Path,
    loud_bundle: Path,
    held_out: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> str:
        raise Gap("no compiler")

    monkeypatch.setattr(Lent, "python", refuse)
    assert main(arguments(loud_int8, loud_bundle, held_out)) == 1
    assert "llama.cpp can't be compared with; got no compiler" in capsys.readouterr().err
