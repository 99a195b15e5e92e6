"""The command line: clear errors, results on standard output alone, and never a traceback for a user."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import seed_story
from seed_story import cli
from seed_story.cli import main
from seed_story.errors import SeedStoryError, UsageError
from seed_story.measure import peak_rss_mib
from tests.runtime.paper_bundle import write_paper_bundle

ROOT = Path(__file__).parents[2]
FULL = Path("/dev/full")


def environment(**changes: str) -> dict[str, str]:
    path = os.pathsep.join((str(ROOT / "runtime"), str(ROOT)))
    inherited = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error::ResourceWarning", **changes}
    inherited.pop("PYTHONUNBUFFERED", None)  # with it Python itself overlooks a write that was cut short
    return inherited


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "seed_story.cli", *map(str, arguments)]


def run(*arguments: object, stdin: bytes = b"", **variables: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(command(*arguments), input=stdin, capture_output=True, timeout=60, check=False,
                          env=environment(**variables))  # fmt: skip


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place without a default bundle."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEED_STORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SEED_STORY_BUNDLE", raising=False)
    return tmp_path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(path)
    return path


# What needs no bundle


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"seed-story {seed_story.__version__}\n"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, seed_story.cli as c\n"
        "try: c.main(['tell', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'numpy', 'PIL', 'tokenizers', 'ai_edge_litert'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), check=True)
    assert done.stderr == b"[]\n"


def test_help_is_instant() -> None:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        assert run("--help").returncode == 0
        times.append(time.perf_counter() - started)
    assert min(times) < 0.15  # the best of five: this is about what is imported, not about a busy machine


def test_every_public_name_can_be_imported_lazily() -> None:
    for name in seed_story.__all__:
        assert getattr(seed_story, name).__name__ == name
    assert set(seed_story.__all__) <= set(dir(seed_story))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        seed_story.nonsense  # noqa: B018


def test_defaults_in_the_help_are_the_real_ones(capsys: pytest.CaptureFixture[str]) -> None:
    from seed_story.sampling import SamplingConfig
    from seed_story.story import DEFAULT_MAX_TOKENS

    args = cli.build_parser().parse_args(["tell"])
    assert args.max_tokens == DEFAULT_MAX_TOKENS
    for name, kind, text in cli._SAMPLING:
        assert text.endswith(f"(default {getattr(SamplingConfig(), name)})")
        assert isinstance(getattr(SamplingConfig(), name), kind)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seed", "x"], "--seed: got 'x'; expected a whole number, 0 or more"),
        (["--seed", "-1"], "--seed: got '-1'; expected a whole number, 0 or more"),
        (["--max-tokens", "0"], "--max-tokens: got '0'; expected a whole number, 1 or more"),
        (["--max-tokens", "1.5"], "--max-tokens: got '1.5'"),
        (["--threads", "0"], "--threads: got '0'"),
        (["--seed", "9" * 5000], "--seed: got"),
        (["--temperature", "hot"], "--temperature: invalid float value: 'hot'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--image"], "--image: expected one argument"),
    ],
)
def test_usage_errors_end_with_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tell", *arguments])
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-1"], "temperature is impossible; got -1.0"),
        (["--temperature", "nan"], "temperature is impossible; got nan"),
        (["--top-p", "0"], "top_p is impossible"),
        (["--stop", ""], "stop is impossible"),
        (["--greedy", "--top-k", "3", "--min-p", "0.1"], "can't go with --top-k, --min-p"),
    ],
)
def test_impossible_sampling_ends_with_2(
    arguments: list[str], words: str, nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tell", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("seed-story: error: ")
    assert words in captured.err


def test_no_command_is_a_usage_error() -> None:
    done = run()
    assert done.returncode == 2
    assert b"COMMAND" in done.stderr
    assert b"Traceback" not in done.stderr


def test_no_bundle(nowhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tell"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("seed-story: error: there is no default bundle")
    assert captured.err.count("\n") == 1


def test_missing_picture_is_found_before_the_graphs_are_loaded(
    nowhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = write_paper_bundle(nowhere / "paper")
    assert main(["tell", "--bundle", str(paper), "--image", "none.jpg"]) == 1
    assert "the picture doesn't exist; got none.jpg" in capsys.readouterr().err


def test_unknown_exceptions_are_bugs_and_stay_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object, **__: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr("seed_story.doctor.doctor", bug)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


@pytest.mark.parametrize(
    ("error", "code"), [(SeedStoryError("x"), 1), (UsageError("x"), 2), (KeyboardInterrupt(), 130)]
)
def test_exit_codes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr("seed_story.doctor.doctor", fail)
    assert main(["doctor"]) == code


def test_reader_that_leaves(tmp_path: Path) -> None:
    paper = write_paper_bundle(tmp_path / "paper", licences={f"part {i}": "x" * 1000 for i in range(500)})
    process = subprocess.Popen(command("inspect", paper), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment())  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith(b"bundle")
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=30) == 141


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    paper = write_paper_bundle(tmp_path / "paper")
    with FULL.open("wb") as full:
        done = subprocess.run(
            command("inspect", paper), stdout=full, stderr=subprocess.PIPE, env=environment(), check=False
        )
    assert done.returncode == 1
    assert done.stderr.decode() == (
        "seed-story: error: standard output can't be written; got No space left on device.\n"
    )


def test_characters_that_the_terminal_lacks(tmp_path: Path) -> None:
    paper = write_paper_bundle(tmp_path / "paper", name="Märchen 🦊")
    done = run("inspect", paper, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"M?rchen ?" in done.stdout
    assert json.loads(run("inspect", paper, "--json", PYTHONIOENCODING="ascii").stdout)["name"] == "Märchen 🦊"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_peak_memory_is_this_process_own_and_not_its_parents() -> None:
    child = f"{sys.executable!r}, '-c', 'from seed_story.measure import *; print(peak_rss_mib())'"
    code = f"import subprocess; fat = bytearray(b'x') * 300_000_000; subprocess.run([{child}], check=True)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment(), check=True)
    assert 2 < float(done.stdout) < 150


def test_peak_memory_without_proc(tmp_path: Path) -> None:
    own, other = peak_rss_mib(), peak_rss_mib(tmp_path / "none")
    assert own is not None and other is not None
    assert other >= 0.9 * own > 10


# What needs a bundle


def tell(bundle: Path, *arguments: object) -> list[str]:
    return ["tell", "--bundle", str(bundle), *map(str, arguments)]


def test_tells_a_story(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tell(tiny_bundle, "--max-tokens", 12)) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Once upon a time,")
    assert len(captured.out) > len("Once upon a time,\n")
    assert captured.out.endswith("\n")
    *_, first, second = captured.err.splitlines()
    assert "tokens/s" in first and "first token" in first
    assert "peak memory" in second and str(tiny_bundle) in second


def story_json(bundle: Path, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(tell(bundle, "--json", *arguments)) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def test_json(tiny_bundle: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = story_json(tiny_bundle, capsys, "--image", picture, "--max-tokens", 9, "--seed", 5, "--threads", 1)
    assert found["text"].startswith("Once upon a time,")
    assert 1 <= found["tokens"] <= 9
    assert (found["seed"], found["threads"], found["interrupted"]) == (5, 1, False)
    assert found["bundle"] == str(tiny_bundle)
    assert set(found) >= {
        "prompt_tokens",
        "decode_tokens_per_second",
        "recipe",
        "qformer_trained",
        "finished",
    }
    for name in ("time_to_first_token_ms", "picture_ms", "prefill_ms", "decode_ms", "peak_rss_mib"):
        assert found[name] > 0
    assert found["versions"]["seed-story"] == seed_story.__version__
    assert found["versions"]["ai-edge-litert"]


def test_same_seed_same_story_and_both_forms_agree(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = story_json(tiny_bundle, capsys, "--max-tokens", 20, "--seed", 3)["text"]
    assert story_json(tiny_bundle, capsys, "--max-tokens", 20, "--seed", 3)["text"] == first
    others = {story_json(tiny_bundle, capsys, "--max-tokens", 20, "--seed", seed)["text"] for seed in (4, 5)}
    assert others != {first}
    assert main(tell(tiny_bundle, "--max-tokens", 20, "--seed", 3)) == 0
    assert capsys.readouterr().out.removesuffix("\n") == first.removesuffix("\n")


def test_greedy_needs_no_seed(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {story_json(tiny_bundle, capsys, "--greedy", "--max-tokens", 10, "--seed", seed)["text"] for seed in (1, 2)}
    assert len(texts) == 1


def test_sampling_options_arrive(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def fake(**arguments: Any) -> int:
        seen.update(arguments)
        return 0

    monkeypatch.setattr("seed_story.telling.tell", fake)
    options = "--temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.5 --no-repeat-ngram 4"
    options += " --stop END --stop FIN --image a --image b"
    assert main(tell(tiny_bundle, *options.split())) == 0
    config = seen["sampling"]
    assert (config.temperature, config.top_k, config.top_p, config.min_p) == (0.5, 7, 0.9, 0.1)
    assert (config.repetition_penalty, config.no_repeat_ngram, config.stop) == (1.5, 4, ("END", "FIN"))
    assert seen["images"] == ["a", "b"]


def test_empty_prompt(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tell(tiny_bundle, "--prompt", "")) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: the text is empty" in captured.err


def test_unknown_backend(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tell(tiny_bundle, "--backend", "abacus")) == 2
    assert "no such backend; got abacus" in capsys.readouterr().err


def test_untrained_qformer_is_said_with_a_picture_only(
    tiny_bundle: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if json.loads((tiny_bundle / "manifest.json").read_text())["qformer_trained"]:
        pytest.skip("the tiny bundle's Q-Former is trained")
    assert main(tell(tiny_bundle, "--max-tokens", 2)) == 0
    assert "Q-Former" not in capsys.readouterr().err
    assert main(tell(tiny_bundle, "--max-tokens", 2, "--image", picture)) == 0
    assert "the picture doesn't influence the story yet" in capsys.readouterr().err


def test_prompt_longer_than_the_cache_goes_on_with_a_note(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = json.loads((tiny_bundle / "manifest.json").read_text())["cache"]
    found = story_json(tiny_bundle, capsys, "--prompt", "a fox " * cache["slots"], "--max-tokens", 4)
    assert found["prompt_tokens"] > cache["slots"]
    assert found["tokens"] >= 1 or found["finished"]
    assert main(tell(tiny_bundle, "--prompt", "a fox " * cache["slots"], "--max-tokens", 1)) == 0
    ring = cache["slots"] - cache["sinks"] - cache["anchors"]
    assert f"keeps the first {cache['sinks']} and the newest {ring}." in capsys.readouterr().err


def test_the_cache_s_policy_of_a_story(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is what the statistics say, and what the note about a long beginning says."""
    sink = ("--policy", "multimodal-sink", "--picture-eviction", "first-and-last", "--max-tokens", 2)
    for options, kept in ((("--max-tokens", 2), "text-sink"), (sink, "multimodal-sink")):
        assert story_json(tiny_bundle, capsys, *options)["cache"]["policy"] == kept
    assert story_json(tiny_bundle, capsys, *sink)["cache"]["picture_eviction"] == "first-and-last"
    assert main(tell(tiny_bundle, "--prompt", "a fox " * 32, *sink)) == 0
    assert "the first 2 and the newest 24, and 6 of each of up to 1 pictures." in capsys.readouterr().err
    assert main(tell(tiny_bundle, "--policy", "window", "--picture-eviction", "oldest")) == 2
    assert "expected --policy multimodal-sink" in capsys.readouterr().err


def test_prompt_from_standard_input(tiny_bundle: Path) -> None:
    done = run(*tell(tiny_bundle, "--prompt", "-", "--max-tokens", 2, "--json"), stdin="Ein Füchslein\n".encode())
    assert json.loads(done.stdout)["text"].startswith("Ein Füchslein")
    done = run(*tell(tiny_bundle, "--prompt", "-"), stdin=b"\xff\xfe")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"standard input isn't text" in done.stderr


@pytest.mark.parametrize(("data", "prompt"), [(b"A fox\n", "A fox"), (b"A\nfox\n\n", "A\nfox\n"), (b"", "")])
def test_only_the_last_newline_of_standard_input_goes(
    data: bytes, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seed_story.telling import prompt_from_stdin

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert prompt_from_stdin() == prompt


def test_prompt_of_bytes_that_are_no_text(tiny_bundle: Path) -> None:
    done = subprocess.run([*map(os.fsencode, command(*tell(tiny_bundle, "--prompt"))), b"\xff\xfe"],
                          capture_output=True, env=environment(), check=False)  # fmt: skip
    assert done.returncode == 1
    assert b"seed-story: error: " in done.stderr
    assert b"Traceback" not in done.stderr


def test_only_our_own_lines_on_standard_error(tiny_bundle: Path, picture: Path) -> None:
    done = run(*tell(tiny_bundle, "--max-tokens", 3, "--image", picture))
    assert done.returncode == 0
    assert all(line.startswith("seed-story: ") for line in done.stderr.decode().splitlines()), done.stderr.decode()


def interrupted(bundle: Path, *arguments: object) -> tuple[int, bytes, bytes]:
    """Sends Ctrl-C as soon as the story has begun."""
    endless = command(*tell(bundle, "--max-tokens", 10**7, *arguments))
    process = subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), bufsize=0)
    assert process.stdout is not None
    begun = process.stdout.read(40)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    return process.returncode, begun + out, err


def test_interrupt_keeps_what_there_is(tiny_bundle: Path) -> None:
    code, out, err = interrupted(tiny_bundle)
    assert code == 130
    assert out.startswith(b"Once upon a time,")
    assert out.endswith(b"\n")
    assert b"Traceback" not in err
    assert b"interrupted" in err


def test_interrupt_in_process_gives_whole_json(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from seed_story.story import Story

    def one_piece(self: Story, *, max_tokens: int) -> Sequence[str]:
        self._told += b" told"
        raise KeyboardInterrupt

    monkeypatch.setattr(Story, "tell", one_piece)
    assert main(tell(tiny_bundle, "--json")) == 130
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["interrupted"]) == ("Once upon a time, told", True)
    assert found["decode_tokens_per_second"] is None


def test_reader_of_a_story_that_leaves(tiny_bundle: Path) -> None:
    process = subprocess.Popen(command(*tell(tiny_bundle, "--max-tokens", 10**7)), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=environment(), bufsize=0)  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(17)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 141
    assert b"Traceback" not in err and b"Exception ignored" not in err


def test_story_in_ascii(tiny_bundle: Path) -> None:
    arguments = tell(tiny_bundle, "--prompt", "Ein Füchslein", "--max-tokens", 30)
    done = run(*arguments, PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    assert done.stdout.startswith(b"Ein F?chslein")


def test_the_first_piece_does_not_wait_for_the_last(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Stream(io.StringIO):
        def flush(self) -> None:
            seen.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Stream())
    assert main(tell(tiny_bundle, "--max-tokens", 12)) == 0
    assert seen[0] == "Once upon a time,"
    assert len(set(seen)) > 3


def test_speculation_tells_the_same_story(
    verifying_bundle: Callable[[str], Path], tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = verifying_bundle("float32")
    made = {
        by: story_json(bundle, capsys, "--greedy", "--max-tokens", 90, *by)
        for by in ((), ("--speculate",), ("--no-speculate",))
    }
    assert len({found["text"] for found in made.values()}) == 1
    assert [found["guessed"] > 0 for found in made.values()] == [True, True, False]
    assert all(found["guessed_right"] <= found["guessed"] for found in made.values())
    assert main(tell(bundle, "--greedy", "--max-tokens", 90)) == 0
    assert "guesses came true" in capsys.readouterr().err
    assert main(tell(tiny_bundle, "--speculate")) == 1
    assert "Export the bundle again, with --verify 8" in capsys.readouterr().err
