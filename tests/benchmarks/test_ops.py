"""The profile of a signature: every operator of the graph is in it, and a version of LiteRT without it is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import ops
from benchmarks.ops import main, parse
from seed_story.backends.litert import CApi
from seed_story.bundle import Bundle

SUMMARY = """\
============================== Run Order ==============================
      [node type]    [start]    [first]   [avg ms]        [%]     [cdf%]   [mem KB] [times called]   [Name]
            Delegate/Fully Connected (NC, F32) GEMM      0.000      0.032      0.030     0.552%     0.552%      0.000             20   [Delegate]:3
                                  Delegate/Add (ND)      0.000      0.000      0.001     0.000%     0.552%      0.000             20   [Delegate]:5
            Delegate/Fully Connected (NC, F32) GEMM      0.000      0.014      0.014     0.245%     0.798%      0.000             20   [Delegate]:9
                                               PACK      0.000      0.005      0.005     0.245%     0.798%      0.000             20   [StatefulPartitionedCall:0]:77

============================== Top by Computation Time ==============================
            Delegate/Fully Connected (NC, F32) GEMM      0.000      0.032      0.030     0.552%     0.552%      0.000             20   [Delegate]:3
"""  # noqa: E501


def test_the_table_is_summed_by_kind() -> None:
    assert parse(SUMMARY) == {
        "Delegate/Fully Connected (NC, F32) GEMM": (pytest.approx(0.044), 2),
        "PACK": (0.005, 1),
        "Delegate/Add (ND)": (0.001, 1),
    }
    assert next(iter(parse(SUMMARY))).endswith("GEMM"), "the most time first"
    assert parse("") == {}


@pytest.mark.parametrize("signature", ["decode", "prefill_8"])
def test_every_product_of_the_graph_is_counted(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], signature: str
) -> None:
    arguments = ["--bundle", str(tiny_bundle), "--signature", signature, "--runs", "2", "--threads", "1"]
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    layers = Bundle.open(tiny_bundle).manifest.story.llama.num_layers
    found = {kind: row["count"] for kind, row in answer["operators"].items()}
    assert sum(n for kind, n in found.items() if "Fully Connected" in kind) == 4 * layers + 1
    assert found["PACK"] == 2
    assert sum(row["ms"] for row in answer["operators"].values()) == pytest.approx(answer["run_ms"])


def test_an_unknown_signature(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(tiny_bundle), "--signature", "prefill_5"]) == 2
    assert "got prefill_5; expected embed, begin_8, prefill_4" in capsys.readouterr().err


def test_an_engine_without_a_profiler(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = CApi.call

    def older(self: CApi, function: str, *arguments: object) -> None:
        if function == "LiteRtCompiledModelGetProfiler":
            function = "LiteRtCompiledModelGetSomethingElse"
        call(self, function, *arguments)

    monkeypatch.setattr(CApi, "call", older)
    assert ops.main(["--bundle", str(tiny_bundle)]) == 1
    assert "LiteRT has no LiteRtCompiledModelGetSomethingElse" in capsys.readouterr().err
