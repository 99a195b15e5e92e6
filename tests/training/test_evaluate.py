"""The command line: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seed_story.story import SEEDStory
from tests.training.held_out import draw, storybook
from training.evaluate import main
from training.evaluation.report import lines

METRICS = ("grounding", "perplexity", "shuffled", "repetition")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return storybook(tmp_path_factory.mktemp("data"))


@pytest.fixture
def evaluate(tiny_bundle: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a metric in this process; gives the exit code and its two outputs."""

    def run(metric: str, *options: object) -> tuple[int, str, str]:
        given = ["--bundle", tiny_bundle, "--data", data, "--threads", 1, *options]
        code = main([metric, *map(str, given)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


KEYS = {
    "grounding": ("pictures", "blind_stories", "pictures_by_split", "accuracy", "accuracy_interval",
                  "blind_accuracy", "blind_accuracy_interval", "unseen_style_accuracy",
                  "unseen_style_accuracy_interval", "unseen_concept_accuracy", "unseen_concept_accuracy_interval"),
    "perplexity": ("stories", "tokens", "loss", "perplexity", "perplexity_interval", "blind_loss", "blind_perplexity",
                   "blind_perplexity_interval", "gain", "gain_interval"),
    "shuffled": ("stories", "loss", "shuffled_loss", "difference", "difference_interval"),
    "repetition": ("stories", "distinct_1", "distinct_2", "distinct_3", "longest_repeat_words", "loop", "loop_share",
                   "loop_share_interval", "mean_words", "mean_tokens", "ended_share", "broken_character_share"),
}  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
def test_the_last_line_is_json_and_progress_is_elsewhere(evaluate: Any, metric: str) -> None:
    code, out, err = evaluate(metric, "--json", "--seed", 3)
    assert code == 0
    report = json.loads(out)
    assert out.count("\n") == 1 and out.endswith("\n")
    assert set(KEYS[metric]) <= set(report)
    assert (report["metric"], report["bundle"], report["recipe"], report["seed"]) == (metric, "tiny", "float32", 3)
    assert "story/s" in err or "s/story" in err


@pytest.mark.parametrize("metric", METRICS)
def test_without_json_it_is_a_table(evaluate: Any, metric: str) -> None:
    code, out, _ = evaluate(metric, "--limit", 2)
    assert code == 0
    assert out.startswith("metric") and metric in out.splitlines()[0]
    assert "_" not in out and "{" not in out and "None" not in out


@pytest.mark.parametrize(("metric", "count"), [("grounding", "pictures"), *((name, "stories") for name in METRICS[1:])])
def test_limit(evaluate: Any, metric: str, count: str) -> None:
    assert json.loads(evaluate(metric, "--json", "--limit", 3)[1])[count] == 3
    assert json.loads(evaluate(metric, "--json")[1])[count] == {"grounding": 6, "repetition": 6}.get(metric, 3)


def test_limit_keeps_the_splits_even(evaluate: Any) -> None:
    report = json.loads(evaluate("grounding", "--json", "--limit", 3)[1])
    assert report["pictures_by_split"] == {"picture": 1, "style": 1, "concept": 1}


def test_the_same_seed_gives_the_same_report(evaluate: Any) -> None:
    def run(seed: int) -> dict[str, Any]:
        return json.loads(evaluate("repetition", "--json", "--limit", 2, "--tokens", 30, "--seed", seed)[1])

    assert run(1) == run(1) != run(2)


def test_details_show_every_story(evaluate: Any, tmp_path: Path) -> None:
    file = tmp_path / "told.jsonl"
    code, out, _ = evaluate("grounding", "--json", "--details", file, "--beginning", "Thing 4 and 3 met thing 2")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert code == 0 and [row["id"] for row in rows] == [f"g{n}" for n in range(6)]
    assert all(row["text"].startswith("Thing 4 and 3 met") for row in rows)
    named = {row["concept"]: row["named"] for row in rows}
    assert named["thing 4"] and named["thing 2"] is not None and not named["thing 0"]
    report = json.loads(out)
    assert report["accuracy"] == sum(row["named"] for row in rows if row["split"] == "picture") / 2
    assert list(tmp_path.iterdir()) == [file]


def test_out_shows_every_story(evaluate: Any, tmp_path: Path) -> None:
    file = tmp_path / "stories.md"
    assert evaluate("repetition", "--limit", 2, "--tokens", 5, "--out", file)[0] == 0
    text = file.read_text(encoding="utf-8")
    assert text.count("## ") == text.count("![") == text.count("Once upon a time,") == 2
    assert list(tmp_path.iterdir()) == [file]


def test_own_pictures(evaluate: Any, tmp_path: Path) -> None:
    for name in ("fox.png", "red_fox_2.png"):
        draw(tmp_path / name, 1)
    code, out, _ = evaluate("grounding", "--json", "--pictures", tmp_path, "--beginning", "A red fox")
    report = json.loads(out)
    assert code == 0 and report["pictures"] == 2
    assert report["accuracy"] == report["blind_accuracy"] == 1.0
    assert report["unseen_style_accuracy"] is None
    assert evaluate("grounding", "--pictures", tmp_path)[1].count("nothing to measure") == 2


@pytest.mark.parametrize(
    ("metric", "options", "said"),
    [
        ("grounding", ("--bundle", "nowhere"), "there is no such bundle"),
        ("perplexity", ("--bundle", "nowhere"), "there is no such bundle"),
        ("grounding", ("--data", "nowhere"), "there are no pictures"),
        ("repetition", ("--data", "nowhere"), "there are no pictures"),
        ("perplexity", ("--data", "nowhere"), "there are no held-out stories"),
        ("shuffled", ("--data", "nowhere"), "there are no held-out stories"),
        ("shuffled", ("--limit", "1"), "no pictures to swap"),
        ("grounding", ("--pictures", "nowhere.jsonl"), "there are no pictures"),
        ("grounding", ("--details", "nowhere/told.jsonl"), "the folder to write to"),
        ("grounding", ("--beginning", ""), "the text is empty"),
        ("repetition", ("--out", "nowhere/stories.md"), "the folder to write to"),
    ],
)
def test_a_users_mistake_is_one_line(evaluate: Any, metric: str, options: tuple[str, ...], said: str) -> None:
    code, out, err = evaluate(metric, *options)
    last = err.splitlines()[-1]
    assert code in (1, 2) and out == ""
    assert last.startswith("evaluate: error: ") and said in last and "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["grounding", "--limit", "0"], ["perplexity", "--pages", "x"]])
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_interrupted(evaluate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, begun = SEEDStory.begin, []

    def interrupted(self: SEEDStory, **options: Any) -> Any:
        begun.append(1)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return begin(self, **options)

    monkeypatch.setattr(SEEDStory, "begin", interrupted)
    code, out, err = evaluate("grounding", "--json", "--details", tmp_path / "told.jsonl")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "evaluate: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_no_framework_is_loaded(tiny_bundle: Path, data: Path) -> None:
    program = (
        "import sys\nfrom training.evaluate import main\n"
        "assert not {'numpy', 'tqdm', 'ai_edge_litert'} & set(sys.modules), 'imported before it was needed'\n"
        "code = [main(a.split('|')) for a in sys.argv[1:]]\n"
        "assert not {'tensorflow', 'keras', 'torch'} & set(sys.modules)\n"
        "sys.exit(max(code))\n"
    )
    common = f"--bundle|{tiny_bundle}|--data|{data}|--limit|2|--json"
    command = [sys.executable, "-c", program, f"grounding|{common}", f"shuffled|{common}|--pages|1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={"PYTHONPATH": f"{ROOT / 'runtime'}:{ROOT}", "PATH": ""})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["metric"] for line in done.stdout.splitlines()] == ["grounding", "shuffled"]


def test_the_table_shows_intervals_and_nested_figures() -> None:
    report = {"a_b": 0.5, "a_b_interval": [0.25, 0.75], "c": None, "c_interval": None, "n": 3,
              "per_group": {"x": {"accuracy": 1.0, "accuracy_interval": None}}}  # fmt: skip
    assert lines(report) == (
        "a b  0.500  [0.250, 0.750]\nc    nothing to measure\nn    3\nper group\n  x\n    accuracy  1.000\n"
    )
