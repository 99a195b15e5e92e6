"""A whole run with made-up engines, whose times are known: gaps, ratios round by round, and what is printed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from benchmarks.peers import session
from benchmarks.peers.files import Workshop
from benchmarks.peers.measure import DecoderTest, Result, VitTest, prompts_of, take_turns
from benchmarks.peers.process import Worker
from benchmarks.peers.report import ratio_name, ratios, to_json, to_text
from benchmarks.peers.session import Setting, make_plan, run
from benchmarks.peers.table import OURS, PEERS, REFERENCES, Engine
from benchmarks.peers.venvs import OWN, Gap
from model.tokenizer_files import byte_letters
from seed_story.errors import SeedStoryError
from seed_story.tokenizer import StoryTokenizer

# A machine that gets slower from round to round; an engine takes `pace` times as long as another of pace 1.
SERVE = """
import json, sys, time
import numpy as np
how, pace = sys.argv[1], float(sys.argv[2])
if how == "absent":
    raise SystemExit("no module named engine")
print(json.dumps({"version": "7"}), flush=True)
turns = 0
uneven = [1, 1, 3, 1, 2] if how == "uneven" else [1] * 5
for line in sys.stdin:
    job = json.loads(line)
    said = {"peak_rss_mib": 100 * pace + turns}
    if "picture" in job:
        if job["file"]:
            np.save(job["file"], np.eye(4, 8)[:, :: -1 if how == "other" else 1] * (1 + job["picture"]))
        taken = [pace * 2.0**turns * uneven[turns]] * job["repeats"]
        said |= {"step_s": taken}
        turns += job["repeats"] > 0
    else:
        measured = job["steps"] > 0
        if measured and turns == 2 and how == "dies":
            print("a hint", file=sys.stderr)
            raise SystemExit("out of memory")
        if measured and turns == 1 and how == "hangs":
            time.sleep(600)
        steps = [pace * 2.0**turns * uneven[turns]] * (job["steps"] if how != "stops" else job["steps"] // 3)
        nearest = sum(job["tokens"]) % 7 + (how == "other")
        said |= {"prefill_s": 10 * pace * 2.0**turns, "step_s": steps, "next": nearest}
        turns += measured
    print(json.dumps(said), flush=True)
"""

WORDS = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("a", "e", "i", "o", "u", "ay", "ee", "oo")]


@pytest.fixture(scope="module")
def tokenizer() -> StoryTokenizer:
    """A byte-level tokenizer that has 112 words as one token each, and many parts of words."""
    vocabulary = {letter: i for i, letter in enumerate(byte_letters())}
    merges = []
    for word in WORDS:
        made = "Ġ"
        for letter in word:
            if made + letter not in vocabulary:
                merges.append((made, letter))
                vocabulary[made + letter] = len(vocabulary)
            made += letter
    vocabulary["Ġzzz"] = len(vocabulary)  # no merges lead to it, so that no text is read as it
    plain = Tokenizer(BPE(vocabulary, merges))
    plain.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    plain.decoder = ByteLevelDecoder()
    return StoryTokenizer(plain)


def engine(key: str, how: str, pace: float, *ours: str, kind: Any = "decoder") -> Engine:
    return Engine(key, f"the {key}", kind, OWN, how, (str(pace),), ours)


MINE = (engine("int8", "good", 1), engine("vit_float32", "good", 2, kind="vit"),
        engine("vit_int8", "good", 1, kind="vit"))  # fmt: skip


@pytest.fixture
def measured(
    tmp_path: Path, tokenizer: StoryTokenizer, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Result]]:
    serve = tmp_path / "serve.py"
    serve.write_text(SERVE)
    monkeypatch.setattr(session, "SERVE", serve)
    monkeypatch.setattr(session, "REFERENCES", {"decoder": MINE[0], "vit": MINE[1]})
    monkeypatch.setattr("benchmarks.peers.measure.REST_S", 0)

    def test_of(kind: str, setting: Setting, scratch: Path) -> object:
        if kind == "vit":
            return VitTest(pictures=3, repeats=setting.repeats, scratch=scratch)
        return DecoderTest(tokenizer, depth=setting.depth, steps=setting.steps, rounds=setting.rounds)

    monkeypatch.setattr(session, "_test", test_of)

    def measure(*peers: Engine, ours: tuple[Engine, ...] = MINE) -> dict[str, Result]:
        monkeypatch.setattr(session, "OURS", ours)
        monkeypatch.setattr("benchmarks.peers.report.OURS", ours)
        setting = Setting({}, depth=16, steps=6, rounds=4)
        plan = make_plan(peers, setting, Workshop(tmp_path, tmp_path, lambda _: None), tmp_path)
        run(plan, setting, tmp_path, lambda _: None)
        return plan.results

    return measure


def test_ratios_are_taken_round_by_round(measured: Callable[..., dict[str, Result]]) -> None:
    """The machine halves its speed each round: speeds lie far apart, and ratios don't."""
    peers = [engine("slow", "good", 2.5, "int8"), engine("eye", "good", 4, "vit_float32", "vit_int8", kind="vit")]
    results = measured(*peers)
    assert list(results) == ["int8", "vit_float32", "vit_int8", "slow", "eye"]
    assert results["int8"].rounds["decode"] == [1 / 2, 1 / 4, 1 / 8, 1 / 16], "the first round isn't counted"
    assert results["int8"].rounds["prefill"] == [1.6 / 2, 1.6 / 4, 1.6 / 8, 1.6 / 16]
    assert ratios(peers, results) == {
        "decode_vs_slow": [2.5, 2.5, 2.5], "prefill_vs_slow": [2.5, 2.5, 2.5],
        "peak_rss_vs_slow": [0.404, 0.406, 0.408],
        "vit_vs_eye": [2, 2, 2], "vit_peak_rss_vs_eye": pytest.approx([0.5, 0.5, 0.5], abs=0.005),
        "vit_int8_vs_eye": [4, 4, 4], "vit_peak_rss_int8_vs_eye": pytest.approx([0.25, 0.25, 0.26], abs=0.01),
    }  # fmt: skip
    assert (results["slow"].first_choices, results["eye"].cosine) == ("24 of 24", 1)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("absent", "ended with 1: no module named engine"),
        ("dies", "ended with 1: out of memory"),
        ("stops", "decoded only 2 of 6 tokens"),
        ("other", "another model: only 0 of 24 first choices are the float32 model's"),
    ],
)
def test_a_peer_that_fails_is_a_named_gap(measured: Callable[..., dict[str, Result]], how: str, reason: str) -> None:
    peers = [engine("bad", how, 1, "int8"), engine("good", "good", 3, "int8")]
    results = measured(*peers)
    found = to_json(peers, results)
    assert found["gaps"] == {"bad": reason}
    assert set(found["engines"]) == {"int8", "good"}
    assert found["ratios"]["decode_vs_bad"] is None and found["ratio_quartiles"]["decode_vs_bad"] is None
    assert found["ratios"]["decode_vs_good"] == 3
    text = to_text(peers, results)
    assert "| the bad | gap |" in text and f"- the bad: {reason}" in text
    assert "| the good (7) |" in text and "| int8: 3.00 [3.00, 3.00] |" in text
    json.dumps(found, allow_nan=False)


def test_a_worker_that_hangs(tmp_path: Path) -> None:
    """The session treats it as one that dies."""
    (tmp_path / "serve.py").write_text(SERVE)
    worker = Worker([sys.executable, str(tmp_path / "serve.py"), "hangs", "1"], {}, 60)
    job = {"tokens": [1], "steps": 1}
    assert worker.ask(job)["step_s"] == [1]
    worker.patience = 0.2
    with pytest.raises(Gap, match=re.escape("no answer in 0.2 s")):
        worker.ask(job)
    worker.close()


def test_other_features(measured: Callable[..., dict[str, Result]]) -> None:
    results = measured(engine("bad", "other", 1, "vit_int8", kind="vit"))
    assert results["bad"].gap.startswith("another model: mean cosine 0.000")


@pytest.mark.parametrize("how", ["absent", "dies"])
def test_ours_must_not_fail(measured: Callable[..., dict[str, Result]], how: str) -> None:
    with pytest.raises(SeedStoryError, match="the int8, decoder, can't be measured"):
        measured(engine("good", "good", 1, "int8"), ours=(engine("int8", how, 1),))


def test_a_median_of_ratios_is_no_ratio_of_medians(measured: Callable[..., dict[str, Result]]) -> None:
    peers = [engine("uneven", "uneven", 2, "int8")]
    found = to_json(peers, measured(*peers))
    assert (found["ratio_quartiles"]["decode_vs_uneven"], found["ratios"]["decode_vs_uneven"]) == ([2, 3, 4.5], 3)
    assert found["engines"]["uneven"]["decode_tokens_per_second"][1] == pytest.approx((1 / 16 + 1 / 24) / 2, abs=1e-3)


def test_only_those_of_ours_that_are_compared(measured: Callable[..., dict[str, Result]]) -> None:
    assert list(measured(engine("good", "good", 1, "int8"))) == ["int8", "good"]


def test_nothing_to_measure(measured: Callable[..., dict[str, Result]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise Gap("offline")

    bad = engine("bad", "good", 1, "int8")
    plain = session.command
    monkeypatch.setattr(session, "command", lambda e, *rest: refuse() if e is bad else plain(e, *rest))
    assert measured(bad)["bad"].gap == "offline"


class Told:
    """Answers from a list; remembers who was asked when."""

    version = "1"

    def __init__(self, name: str, log: list[str]) -> None:
        self._name, self._log = name, log

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        self._log.append(self._name)
        return dict(job)


def test_turns_begin_with_another_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.measure.REST_S", 0)
    log: list[str] = []
    workers: dict[str, Any] = {name: Told(name, log) for name in "abc"}
    results = {name: Result() for name in "abc"}
    take_turns(workers, results, lambda worker, index: worker.ask({"at": float(index)}), 3, lambda _: None)
    assert "".join(log) == "abc" + "bca" + "cab" + "abc"
    assert results["a"].rounds == {"at": [1, 2, 3]}


def test_prompts_are_the_same_as_text_and_as_tokens(tokenizer: StoryTokenizer) -> None:
    prompts = prompts_of(tokenizer, 50, 3)
    assert len({text for _, text in prompts}) == 3
    for ids, text in prompts:
        assert (len(ids), len(text.split())) == (50, 50)
        assert tokenizer.encode(text) == ids and set(text.split()) <= {w[:n] for w in WORDS for n in range(1, 4)}


def test_a_tokenizer_without_words() -> None:
    letters = Tokenizer(BPE({letter: i for i, letter in enumerate(byte_letters())}, []))
    letters.pre_tokenizer, letters.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    with pytest.raises(SeedStoryError, match="too few whole words"):
        prompts_of(StoryTokenizer(letters), 8, 1)


def test_what_a_worker_says_that_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(Gap, match="said 'hello'"):
        Worker([sys.executable, "-c", "print('hello')"], {}, 60)
    with pytest.raises(Gap, match=r"^/nowhere: No such file"):
        Worker(["/nowhere"], {}, 60)


def test_the_table() -> None:
    engines = (*OURS, *PEERS)
    by_key = {engine.key: engine for engine in engines}
    assert len(by_key) == len(engines)
    assert set(REFERENCES) == {engine.kind for engine in engines}
    assert all(by_key[ours].kind == peer.kind and not by_key[ours].ours for peer in PEERS for ours in peer.ours)
    assert all(peer.ours and peer.venv.name for peer in PEERS) and not any(engine.ours for engine in OURS)
    assert all("==" in pin for peer in PEERS for pin in peer.venv.pins)
    workers = Path(session.SERVE).parent
    assert all((workers / f"{engine.worker}.py").is_file() for engine in engines)


def test_the_ratios_that_are_promised() -> None:
    peers = {"llama_cpp_int8", "llama_cpp_int4", "llama_cpp_q4_k_m", "litert_lm", "onnxruntime_genai_int8",
             "onnxruntime_genai_int4", "torch"}  # fmt: skip
    promised = {f"{figure}_vs_{peer}" for figure in ("decode", "prefill", "peak_rss") for peer in peers}
    promised |= {f"vit_vs_{peer}" for peer in ("onnxruntime_float32", "onnxruntime_int8", "openvino", "openvino_int8")}
    found = ratios(PEERS, {engine.key: Result() for engine in (*OURS, *PEERS)})
    assert promised <= set(found) and set(found.values()) == {None}
    names = [ratio_name(f, p, o) for p in PEERS for o in p.ours for f in ("x", "peak_rss")]
    assert len(set(names)) == len(names)


def test_slots_hold_a_prompt_and_its_steps() -> None:
    assert Setting({}, depth=512, steps=24).slots == 576
    assert all(Setting({}, depth=d, steps=24).slots >= d + 24 for d in range(1, 200))


def test_a_cosine_is_over_rows(tmp_path: Path) -> None:
    result, test = Result(), VitTest(pictures=1, repeats=1, scratch=tmp_path)
    truth = [np.array([[1.0, 0], [0, 2]])]
    test.check(result, [np.array([[3.0, 0], [0.6, 0.8]])], truth)
    assert result.cosine == pytest.approx(0.9)
    with pytest.raises(Gap, match=r"features \[1, 1, 2\]"):
        test.check(result, [truth[0][:1]], truth)
