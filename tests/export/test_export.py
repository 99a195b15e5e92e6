"""The export as a whole: what it writes, what it refuses to write, and what is left when it is killed."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from ai_edge_litert import schema_py_generated as schema

from export.__main__ import main
from export.export import ExportOptions, export_bundle, summary
from model.layers import named_variables
from model.story_source import load_source
from model.weights import fingerprint
from quantization.recipe import FOLDER, Recipe, load_recipe, recipe_names
from seed_story import __version__
from seed_story.bundle import MANIFEST, TOKENIZER, Bundle
from seed_story.cli import main as cli
from seed_story.config import CacheConfig
from seed_story.contract import DECODER, GRAPHS, SCHEMA_VERSION, Steps, decoder_signatures
from seed_story.errors import ConfigError, ExportError, ParityError, UsageError
from seed_story.files import file_sha256
from seed_story.sampling import SamplingConfig
from seed_story.story import SEEDStory
from seed_story.tokenizer import StoryTokenizer
from tests.loud import loud_source

ROOT = Path(__file__).parents[2]
TINY = ("--model", "tiny", "--slots", "32", "--sinks", "2", "--prefill", "4", "8", "--begin", "8")
STEPS = Steps((4, 8), (8,))
OPTIONS = ExportOptions(CacheConfig(32, 2), STEPS)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------
# What is written


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if not name.startswith("int4")])
def test_every_recipe_tells_a_story(export_tiny: Callable[[str], Path], recipe: str) -> None:
    folder = export_tiny(recipe)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*(f"{g}.tflite" for g in GRAPHS), TOKENIZER, MANIFEST]
    )
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    with SEEDStory(folder, threads=1) as model:
        assert model.bundle.manifest.recipe == recipe
        text = model("Once", max_tokens=50, sampling=SamplingConfig.greedy())
        assert text == model("Once", max_tokens=50, sampling=SamplingConfig.greedy())
        assert len(text) > len("Once")


def test_what_a_picture_is_summed_up_by_stays_in_float16(export_tiny: Callable[[str], Path]) -> None:
    """One operator in int8 costs the Q-Former more than all others; recipes find it by its name."""
    config = load_source("tiny").model.config.qformer
    file = (export_tiny("int8") / "qformer.tflite").read_bytes()
    (graph,) = schema.ModelT.InitFromPackedBuf(bytearray(file), 0).subgraphs
    shape = [config.hidden_size, 3 * config.vision_size]
    kinds = {t.type for t in graph.tensors if list(t.shape) == shape}
    assert schema.TensorType.FLOAT16 in kinds and schema.TensorType.INT8 not in kinds
    assert schema.TensorType.INT8 in {t.type for t in graph.tensors}


def test_a_model_too_narrow_for_blocks_is_refused(export_tiny: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"blocks don't fill the rows.*multiple of 32"):
        export_tiny("int4")


def test_smaller_recipes_make_smaller_decoders(export_tiny: Callable[[str], Path]) -> None:
    """By what the weights lose; the tiny graph's own structure is large beside them."""
    sizes = {
        recipe: (export_tiny(recipe) / "decoder.tflite").stat().st_size for recipe in ("float32", "float16", "int8")
    }
    config = load_source("tiny").model.config.llama
    d, f, n = config.hidden_size, config.intermediate_size, config.num_layers
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    weights = config.vocab_size * d + n * d * (heads + 3 * f)
    assert sizes["float32"] - sizes["float16"] > 1.5 * weights
    # Its scales are many here, since rows are as short as 24, and its rotations are more operators.
    assert sizes["float32"] - sizes["int8"] > 0.9 * weights


@pytest.mark.parametrize(("flags", "sizes"), [((), (64,)), (("--begin", "8", "512"), (8, 512)), (("--begin",), ())])
def test_no_beginning_is_longer_than_the_cache_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], sizes: tuple[int, ...]
) -> None:
    class AskedError(Exception):
        pass

    def ask(source: object, recipe: object, out: object, options: ExportOptions) -> None:
        raise AskedError(options.steps.begin)

    monkeypatch.setattr("export.export.export_bundle", ask)
    with pytest.raises(AskedError) as asked:
        main(["--model", "tiny", "--slots", "100", *flags])
    assert asked.value.args == (sizes,)


def test_manifest_says_everything(export_tiny: Callable[[str], Path]) -> None:
    folder = export_tiny("int8")
    values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    source = load_source("tiny")
    assert values["schema_version"] == SCHEMA_VERSION
    assert values["name"] == "tiny"
    assert values["architecture"] == json.loads(json.dumps(source.model.config.to_dict()))
    pictures = {"anchors": 0, "picture_begin": 2, "picture_end": 4, "picture_eviction": "oldest"}
    assert values["cache"] == {"slots": 32, "sinks": 2, **pictures}
    assert values["prefill_sizes"] == [4, 8]
    assert values["attention"] is True
    assert values["recipe"] == "int8"
    assert values["qformer_trained"] is False

    tokenizer = StoryTokenizer(folder / TOKENIZER)
    special = values["special_tokens"]
    assert set(special) == {"<|picture|>", "<|/picture|>", *values["prompt"]["end_tokens"]}
    assert values["prompt"]["end_tokens"] == list(source.prompt.end_tokens) != []
    for name, id_ in special.items():
        assert tokenizer.token_id(name) == id_ and id_ in tokenizer.control_ids

    contract = values["contract"]
    assert set(contract) == set(GRAPHS)
    assert set(contract["decoder"]) == {"embed", "begin_8", "prefill_4", "prefill_8", "decode", "decode_attention"}
    for entry in decoder_signatures(source.model.config.llama, 32, STEPS):
        assert contract["decoder"][entry.name] == entry.to_dict()
    assert contract["decoder"]["decode"]["inputs"]["kv_cache_k_0"] == ["float32", 2, 32, 8]

    on_disk = {path.name for path in folder.iterdir()} - {MANIFEST}
    assert set(values["files"]) == on_disk
    for name, entry in values["files"].items():
        assert entry == {"sha256": file_sha256(folder / name), "bytes": (folder / name).stat().st_size}

    parity = values["parity"]
    assert {"vit_cosine_min", "qformer_cosine_min", "decoder_mean_kl_nat", "decoder_top1"} <= set(parity)
    assert parity["decoder_positions"] >= 256 + 32
    assert parity["decoder_mean_kl_after_eviction_nat"] >= 0
    made_by = {"seed-story", "tensorflow", "keras", "litert-quantizer", "ai-edge-litert", "numpy", "tokenizers"}
    assert made_by <= set(values["versions"])
    assert values["versions"]["seed-story"] == __version__
    assert set(values["licences"]) >= {"decoder", "vision"}


def test_a_bundle_says_which_weights_it_was_made_from(export_tiny: Callable[[str], Path], loud_bundle: Path) -> None:
    """The same for every recipe, another for other weights."""
    weights = [Bundle.open(export_tiny(recipe)).manifest.weights for recipe in ("float32", "int8")]
    assert len(weights[0]) == 64 and weights[0] == weights[1] == fingerprint(load_source("tiny").model)
    assert Bundle.open(loud_bundle).manifest.weights != weights[0]


def test_summary_is_a_table(export_tiny: Callable[[str], Path]) -> None:
    lines = summary(Bundle.open(export_tiny("int8"))).splitlines()
    assert [line.split()[0] for line in lines] == ["graph", "vit", "qformer", "decoder"]
    assert all("int8" in line for line in lines[1:])
    assert "KL" in lines[3] and "top-1" in lines[3]


# --------------------------------------------------------------------------------
# What isn't


def impossible(figure: str, bound: float) -> Recipe:
    recipe = load_recipe("float32")
    return replace(recipe, bounds={**recipe.bounds, figure: bound})


@pytest.mark.parametrize("old", [pytest.param(False, marks=pytest.mark.slow), True])
def test_failed_gate_writes_nothing(loud_bundle: Path, tmp_path: Path, old: bool) -> None:
    out = tmp_path / "story"
    if old:
        shutil.copytree(loud_bundle, out)
    before = everything(tmp_path)
    with pytest.raises(ParityError, match="decoder_mean_kl_nat"):
        export_bundle(loud_source(), impossible("decoder_mean_kl_nat", -1.0), out, OPTIONS)
    assert everything(tmp_path) == before
    assert list(tmp_path.iterdir()) == ([out] if old else [])
    if old:
        Bundle.open(out)


def test_a_forced_bundle_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its manifest, at the end of the export, by `inspect`, and by `tell`; and it tells a story all the same."""
    own = json.loads((FOLDER / "float32.json").read_text())
    own["bounds"]["decoder_mean_kl_nat"]["bound"] = -1
    (tmp_path / "strict.json").write_text(json.dumps({**own, "name": "strict"}))
    out = tmp_path / "story"
    arguments = [*TINY, "--recipe", str(tmp_path / "strict.json"), "--out", str(out)]
    assert main(arguments) == 1 and not out.exists()
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    assert "MISSED, and written with --force: decoder_mean_kl_nat" in capsys.readouterr().out
    missed = json.loads((out / MANIFEST).read_text())["missed_bounds"]
    assert list(missed) == ["decoder_mean_kl_nat"] and missed["decoder_mean_kl_nat"]["bound"] == -1
    assert cli(["inspect", str(out)]) == 0
    assert "MISSED" in capsys.readouterr().out
    assert cli(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missed_bounds"] == missed
    assert cli(["tell", "--bundle", str(out), "--prompt", "Once", "--max-tokens", "2"]) == 0
    assert "misses its recipe's bounds" in capsys.readouterr().err


def test_gate_looks_at_the_written_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter that confuses two matrices."""
    from export import rounding

    make = rounding.skeleton_weight
    swapped = {"layers_0_down": "layers_1_down", "layers_1_down": "layers_0_down"}
    monkeypatch.setattr(
        rounding, "skeleton_weight", lambda config, weights, name: make(config, weights, swapped.get(name, name))
    )
    with pytest.raises(ParityError, match="decoder_mean_kl_nat"):
        export_bundle(loud_source(), load_recipe("float32"), tmp_path / "story", OPTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["fill_skeleton", "write_manifest"])
def test_full_disk(loud_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    out = tmp_path / "story"
    shutil.copytree(loud_bundle, out)
    before = everything(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"export.export.{step}", full)
    with pytest.raises(ExportError, match="No space left") as caught:
        export_bundle(loud_source(), load_recipe("float32"), out, OPTIONS)
    assert str(out) in caught.value.what
    assert everything(tmp_path) == before and list(tmp_path.iterdir()) == [out]


def test_refused_target_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.export.write_vit", lambda *_: pytest.fail("it began"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    (tmp_path / "file").write_text("dear diary")
    before = everything(tmp_path)
    for name in ("photos", "file"):
        with pytest.raises(ExportError, match=name):
            export_bundle(load_source("tiny"), load_recipe("float32"), tmp_path / name, OPTIONS)
    assert everything(tmp_path) == before


def test_too_little_room_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("export.export.write_vit", lambda *_: pytest.fail("it began"))
    source = load_source("tiny")
    weights = sum(math.prod(v.shape) for v in named_variables(source.model.llama).values())
    free = shutil.disk_usage(tmp_path)._replace(free=6 * weights // 2)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(ExportError, match="too little room"):
        export_bundle(source, load_recipe("int8"), tmp_path / "new" / "story", OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_gptq_of_a_rotation_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rotations are given isn't recorded."""
    monkeypatch.setattr("export.export.write_vit", lambda *_: pytest.fail("it began"))
    recipe = load_recipe("int8")
    everywhere = [{**entry, "regex": ".*"} for entry in recipe.graphs[DECODER] if entry["algorithm_key"] == "GPTQ"]
    recipe = replace(recipe, graphs={**recipe.graphs, DECODER: everywhere})
    with pytest.raises(ConfigError, match=r"more rounded by GPTQ.*'down_rotation'"):
        export_bundle(load_source("tiny"), recipe, tmp_path / "story", OPTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sizes", [(1,), (0, 4), (4, 4)])
def test_impossible_prefill_sizes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="chunk's size"):
        ExportOptions(CacheConfig(32, 2), Steps(sizes))


@pytest.mark.parametrize(("verify", "sizes"), [(1, (4,)), (-1, (4,)), (31, (4,)), (4, ())])
def test_impossible_blocks(verify: int, sizes: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"verifies guesses is impossible.*expected 2 to 30, beside a prefill"):
        ExportOptions(CacheConfig(32, 2), Steps(sizes, verify=verify))
    ExportOptions(CacheConfig(32, 2), Steps((4,), verify=30))


# --------------------------------------------------------------------------------
# The command


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT / "runtime"), str(ROOT)))}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "export", *map(str, arguments)]


def test_unknown_recipe_is_instant(tmp_path: Path) -> None:
    """No TensorFlow is loaded to find that out."""
    started = time.perf_counter()
    done = subprocess.run(command("--recipe", "nope", "--out", tmp_path / "story"), capture_output=True, text=True,
                          env=environment(), timeout=60, check=False)  # fmt: skip
    assert time.perf_counter() - started < 3
    assert done.returncode == 2
    assert done.stdout == ""
    assert "nope" in done.stderr and "int8" in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (("--model", "nope"), "seed-story-135m or tiny", 2),
        ((*TINY, "--slots", "2"), "no room for a ring", 1),
        ((*TINY, "--slots", "8", "--policy", "multimodal-sink"), "no room for a ring", 1),
        ((*TINY, "--pictures", "2", "--picture-end", "3"), "--pictures, --picture-end needs pictures that are kept", 2),
        (
            (
                *TINY,
                "--slots",
                "64",
                "--policy",
                "multimodal-sink",
                "--picture-eviction",
                "attention-mass",
                "--no-attention",
            ),
            "needs the attention; got --no-attention",
            2,
        ),
        ((*TINY, "--slots", "13", "--policy", "multimodal-sink"), "pictures don't fit the cache", 1),
        ((*TINY, "--prefill", "1"), "chunk's size", 2),
        ((*TINY, "--llama", "/nowhere.gguf"), "nowhere", 1),
        ((*TINY, "--checkpoint", "/nowhere"), "nowhere", 1),
        ((*TINY, "--recipe", "/nowhere.json"), "nowhere", 2),
        ((*TINY, "--recipe", "int8", "--rotation", "/nowhere"), "no file with learned rotation; got /nowhere", 1),
        ((*TINY, "--recipe", "int4", "--scales", "/nowhere"), "no file with learned scales; got /nowhere", 1),
        ((*TINY, "--recipe", "float32", "--rotation", "/nowhere"), "takes no learned rotation", 2),
        ((*TINY, "--recipe", "int8", "--scales", "/nowhere"), "takes no learned scales", 2),
    ],
)
def test_users_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str, code: int
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "story")]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("export: error: ") and words in err
    assert list(tmp_path.iterdir()) == []


def test_an_export_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The quantizer warns of each buffer that several signatures share."""
    assert main([*TINY, "--recipe", "int8", "--force", "--out", str(tmp_path / "story")]) == 0
    assert [one.getMessage() for one in caplog.records if one.name == "root"] == []
    assert logging.root.manager.disable == logging.NOTSET


def test_exit_code_of_a_refused_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("dear diary")
    assert main([*TINY, "--out", str(tmp_path / "file")]) == 1
    assert "is a file" in capsys.readouterr().err


def started_export(out: Path) -> subprocess.Popen[bytes]:
    """An export that has begun to write; its standard error is read up to there."""
    process = subprocess.Popen(command(*TINY, "--recipe", "float32", "--out", out), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=environment())  # fmt: skip
    assert process.stderr is not None
    seen = b""
    while b"decoder: converting" not in seen:
        byte = os.read(process.stderr.fileno(), 4096)
        assert byte, seen.decode()
        seen += byte
    return process


def test_interrupt_writes_nothing(tmp_path: Path) -> None:
    process = started_export(tmp_path / "story")
    assert any(path.name.endswith(".part") for path in tmp_path.iterdir())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == b""
    assert b"interrupted; nothing was written" in err and b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


KILLED_AT = """
import os, signal, sys
from pathlib import Path
import export.export as exporter
from export import bundle_writer
from export.__main__ import main

moment, out = sys.argv[1:]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

rename = Path.rename
def renamed(self, to):
    if moment == "before the last rename" and self.name.endswith(f".{os.getpid()}.part"):
        die()
    made = rename(self, to)
    if moment == "after the last rename" and self.name.endswith(f".{os.getpid()}.part"):
        die()
    return made
Path.rename = renamed

def half_a_manifest(folder, manifest):
    (folder / "manifest.json").write_text('{"schema_version": 1, ')
    die()

if moment == "between two graphs":
    exporter.write_qformer = die
elif moment == "the decoder half written":
    fill = exporter.fill_skeleton
    exporter.fill_skeleton = lambda *a: (a[3].write_bytes(bytes(1000)), die())
elif moment == "in the gate":
    exporter.measure_decoder = die
elif moment == "the manifest half written":
    exporter.write_manifest = half_a_manifest
elif moment == "before it is synced":
    bundle_writer._sync = die
main(["--model", "tiny", "--slots", "32", "--sinks", "2", "--prefill", "4", "--begin", "--recipe", "float32",
      "--out", out])
"""


@pytest.mark.parametrize(
    "moment",
    [
        "before the last rename",
        pytest.param("the manifest half written", marks=pytest.mark.slow),
        pytest.param("between two graphs", marks=pytest.mark.slow),
        pytest.param("the decoder half written", marks=pytest.mark.slow),
        pytest.param("in the gate", marks=pytest.mark.slow),
        pytest.param("before it is synced", marks=pytest.mark.slow),
        pytest.param("after the last rename", marks=pytest.mark.slow),
    ],
)
def test_kill_leaves_no_half_bundle(loud_bundle: Path, tmp_path: Path, moment: str) -> None:
    out = tmp_path / "story"
    shutil.copytree(loud_bundle, out)
    old = everything(out)
    done = subprocess.run([sys.executable, "-c", KILLED_AT, moment, out], env=environment(), capture_output=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    if moment == "before the last rename":
        assert not out.exists()
    elif moment == "after the last rename":
        assert Bundle.open(out).manifest.steps.prefill == (4,)
    else:
        assert everything(out) == old
    left = [path.name for path in tmp_path.iterdir() if path != out]
    assert left and all(re.fullmatch(r"\.story\.\d+(\.old)?\.part", name) for name in left)

    from export.bundle_writer import staged

    with pytest.raises(RuntimeError), staged(out):  # the next export finds all that, cleans up, and fails
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [out]
    assert moment == "after the last rename" or everything(out) == old
    Bundle.open(out)
