"""`make bench`: what it counts is what is there, and its last line is JSON with every figure."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench, roofline, starts
from benchmarks.bench import GraphClock, host_share, main, measure
from benchmarks.roofline import decode_bytes, read_bandwidth_gb_s, weight_bytes
from export.decoder_weights import weight_shapes
from seed_story.bundle import Bundle
from seed_story.errors import SeedStoryError
from seed_story.sampling import Sampler
from seed_story.story import SEEDStory

FIGURES = {
    *(f"prefill_{size}_tokens_per_second" for size in (32, 128, 512)),
    *("decode_at_0_ms", "decode_at_512_ms", "decode_after_5_wraps_ms", "picture_ms"),
    *("host_us_per_token", "host_percent", "cold_first_token_s", "warm_first_token_s"),
    *("warm_peak_rss_mib", "warm_private_mib"),
}


@pytest.fixture
def model(tiny_bundle: Path) -> Iterator[SEEDStory]:
    with SEEDStory(tiny_bundle, threads=1) as made:
        yield made


def test_bytes_are_those_of_weights_and_cache(tiny_bundle: Path) -> None:
    """Constants such as shapes and epsilons come on top."""
    bundle = Bundle.open(tiny_bundle)
    llama, needed = bundle.manifest.story.llama, decode_bytes(bundle)
    weights = 4 * sum(map(math.prod, weight_shapes(llama).values()))
    assert weights <= needed["weights"] <= weights + 4096
    assert (
        needed["cache"] == 4 * 2 * llama.num_layers * llama.num_kv_heads * bundle.manifest.cache.slots * llama.head_dim
    )


def test_int8_weights_count_a_byte_each(export_tiny: object, tiny_bundle: Path) -> None:
    int8 = export_tiny("int8")  # type: ignore[operator]
    both = [weight_bytes(folder / "decoder.tflite", "decode") for folder in (int8, tiny_bundle)]
    assert 0.25 < both[0] / both[1] < 0.6  # rotations, which float32 has none of, are float16


def test_the_probe_reads_all_of_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(roofline, "PROBE_BYTES", 4000)
    monkeypatch.setattr(np, "dot", lambda a, b: read.append(a.nbytes))
    assert read_bandwidth_gb_s(3, rounds=2) > 0
    assert sum(read) == 2 * 4000 and len(read) == 6


def test_the_clock_counts_graphs_and_lets_go(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    step = model.decoder.signatures["decode"]
    run, clock = step.run, GraphClock()
    monkeypatch.setattr(type(step), "run", lambda self: time.sleep(0.02))
    with clock.on(model.decoder):
        step.run()
        step.run()
    assert 0.04 <= clock.s < 0.2
    step.run()
    assert clock.s < 0.2 and run.__self__ is step  # type: ignore[attr-defined]


def test_host_time_is_what_the_graphs_leave(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sampler.sample

    def slow(self: Sampler, logits: np.ndarray) -> int:
        time.sleep(0.01)
        return sample(self, logits)

    monkeypatch.setattr(Sampler, "sample", slow)
    host_us, percent = host_share(model)
    assert host_us > 10_000
    assert 50 < percent < 100


def test_every_round_counts_but_the_first(model: SEEDStory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PREFILLS", (4,))
    assert {name: len(values) for name, values in measure(model, 2).items()} == dict.fromkeys(
        ("prefill_4_tokens_per_second", *(f for f in FIGURES if not f.startswith(("prefill", "warm", "cold")))), 2
    )


def test_a_process_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SeedStoryError, match="no such bundle"):
        starts.start(tmp_path / "nothing", 1)


def test_the_last_line_is_json(tiny_bundle: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(tiny_bundle), "--rounds", "2", "--threads", "1"]) == 0
    *_, last = capfd.readouterr().out.strip().splitlines()
    answer = json.loads(last)
    assert set(answer["figures"]) == FIGURES
    assert answer["roofline"]["percent_reached"] > 0
    assert (answer["threads"], answer["rounds"]) == (1, 2)


def test_a_missing_bundle_is_no_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(tmp_path / "nothing")]) == 1
    assert "no such bundle" in capfd.readouterr().err
