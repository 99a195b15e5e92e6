"""The report of a tiny int8 bundle beside its float32 one, and of one that loses nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quantization.__main__ import main
from quantization.passages import page_of, passages, walk
from seed_story.bundle import MANIFEST
from seed_story.story import SEEDStory
from tests.training.held_out import CAPTIONS
from training.data import read_stories
from training.evaluation.perplexity import encoder_of

SMALL = ("--tokens", "90", "--pictures", "3", "--told", "3", "--threads", "1")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantization.cost.STARTS", 1)
    monkeypatch.setattr("quantization.report.speeds", _fewer_rounds())


def _fewer_rounds() -> Callable[..., Any]:
    from quantization.cost import speeds

    return lambda models: speeds(models, rounds=2, steps=2)


def test_the_report(loud_bundle: Path, loud_int8: Path, held_out: Path, tmp_path: Path,
                    capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    plot = tmp_path / "plot.png"
    arguments = ("report", loud_int8, loud_bundle, "--reference", loud_bundle, "--data", held_out, "--plot", plot)
    assert main([*map(str, arguments), *SMALL, "--json"]) == 0
    out, err = capsys.readouterr()
    *markdown, last = out.splitlines()
    assert "held-out stories" in err
    report = json.loads(last)
    int8, same = report["bundles"]

    assert (int8["recipe"], same["recipe"], report["reference"]["recipe"]) == ("int8", "float32", "float32")
    assert same["perplexity_ratio"] == 1 and same["mean_kl"] == same["p99_kl"] == 0
    assert same["top1_agreement"] == same["top5_agreement"] == 1
    assert 1e-6 < int8["mean_kl"] < 1 and int8["median_kl"] < int8["p99_kl"]
    assert 0.5 < int8["top1_agreement"] < 1
    for row in (int8, same):
        assert row["tokens"] == 90
        assert row["before_eviction"] is None and row["after_eviction"]["tokens"] == 90  # a prompt fills 32 slots
        assert sum(page["tokens"] for page in row["per_page"].values()) == 90
        low, high = row["mean_kl_interval"]
        assert low <= row["mean_kl"] <= high
    assert same["picture_cosine"]["vit"]["least"] == pytest.approx(1)
    assert int8["picture_cosine"]["vit"]["mean"] < 1 and int8["picture_cosine"]["vit"]["pictures"] == 3
    assert int8["naming"]["pictures"] == 3
    assert int8["bytes"] == sum(f.stat().st_size for f in loud_int8.iterdir() if f.name != MANIFEST)
    assert int8["size_ratio"] < 1 and int8["load_s"] > 0 and int8["peak_mib"] > 10
    assert len(int8["decode_tokens_per_second"]) == 3 and same["decode_ratio"][1] > 0

    text = "\n".join(markdown)
    assert "int8 (forced)" in text and "written with --force" in text
    assert all(len(line.split("|")) > 2 for line in markdown if line.startswith("|"))
    assert f"{int8['mean_kl']:.5f}" in text
    with Image.open(plot) as image:
        assert image.format == "PNG" and len(np.unique(np.asarray(image.convert("L")))) > 5


def test_passages_run_past_the_cache(loud_bundle: Path, held_out: Path) -> None:
    stories = read_stories(held_out / "test.jsonl")
    with SEEDStory(loud_bundle, threads=1) as model:
        encoder = encoder_of(model)
        rows = list(passages(stories, encoder, 200))
        lengths = [len(encoder.encode(story, ends=False).ids) for story in stories]
        assert [story.id for row in rows for story in row] == [story.id for story in stories]
        assert max(lengths) < 200 and len(rows) < len(stories)
        places, found = walk(model, [], stories, tokens=10**6)
    text = "".join(CAPTIONS[:3]).replace(" ", "")
    assert found == [] and len(places) == 4 * len(text)
    per_story = {s.id: [p for p in places if p.story == s.id] for s in stories}
    for one in per_story.values():
        assert [len([p for p in one if p.page == page]) for page in sorted({p.page for p in one})] == [
            len(caption.replace(" ", "")) for caption in CAPTIONS[:3]
        ]
    assert max(p.page for p in places) == 3 * max(len(row) for row in passages(stories, encoder, 64))


def test_eviction_begins_with_the_token_after_the_last_slot(loud_bundle: Path, held_out: Path, tmp_path: Path) -> None:
    """`<`, a picture of 6 tokens, `>`, 10 letters; a picture, a line break, 7 letters: 32 slots are full on page 3."""
    short = changed(loud_bundle, tmp_path / "short", prompt={"opening": "<", "request": ">", "end_tokens": []})
    with SEEDStory(short, threads=1) as model:
        places, _ = walk(model, [], read_stories(held_out / "test.jsonl")[:1], tokens=100)
    assert {(p.page, p.after_eviction) for p in places} == {(1, False), (2, False), (3, True)}


def test_a_page_begins_with_its_picture(loud_bundle: Path, held_out: Path) -> None:
    with SEEDStory(loud_bundle, threads=1) as model:
        example = encoder_of(model).encode(read_stories(held_out / "test.jsonl")[0], ends=False)
    pages, ids = page_of(example), example.ids
    starts = [int(np.flatnonzero(pages == page)[0]) for page in range(3)]
    assert starts[0] == 0 and all(ids[start] < 0 <= ids[start - 1] for start in starts[1:])
    assert pages.max() == 2


def changed(bundle: Path, folder: Path, **changes: object) -> Path:
    shutil.copytree(bundle, folder)
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**values, **changes}))
    return folder


def test_users_mistakes(loud_bundle: Path, loud_int8: Path, held_out: Path, tmp_path: Path,
                        capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    other = changed(loud_int8, tmp_path / "other", weights="0" * 64)
    old = changed(loud_int8, tmp_path / "old", weights="")
    cases = [
        (loud_int8, loud_int8, held_out, "isn't float32"),
        (other, loud_bundle, held_out, "other weights"),
        (old, loud_bundle, held_out, "doesn't say which weights"),
        (loud_int8, tmp_path / "nothing", held_out, "no float reference"),
        (loud_int8, loud_bundle, tmp_path, "no held-out stories"),
    ]
    for bundle, reference, data, words in cases:
        arguments = ("report", bundle, "--reference", reference, "--data", data, "--plot", tmp_path / "p.png")
        assert main([*map(str, arguments), *SMALL]) == 2
        out, err = capsys.readouterr()
        assert out == "" and words in err and "Traceback" not in err
    assert main(["report", str(loud_int8), "--plot", str(tmp_path / "plot.jpg")]) == 2
    assert not (tmp_path / "p.png").exists()
