"""The report: as JSON, as a table, and merged over graphs."""

from __future__ import annotations

import json

import pytest
import torch

import fastft
from fastft import reporting
from fastft.reporting import MISSED, REPLACED, SKIPPED, Report, Site


@pytest.fixture(autouse=True)
def fresh() -> None:
    reporting.reset()


def example() -> Report:
    return Report(
        sites=[
            Site("rms_norm", "layers.0.norm", REPLACED, rule="norm.py:44"),
            Site("rms_norm", "model.layers.1.norm", REPLACED, rule="norm.py:44"),
            Site("rms_norm", "model.norm", REPLACED, rule="norm.py:45", notes="a note"),
            Site("attention", "model.layers.0.attn", MISSED, "shape: [batch, seq] is not [/b]", rule="attention.py:9"),
            Site("rotary", "", SKIPPED, "out of fuel"),
        ],
        graphs=1,
        recompiles=1,
        plan={"recompute": "2 regions"},
        timings={"rewrite": 0.25, "compile": 2.0},
        break_reasons={"a reason\nwith two lines [1]": 2, "": 1},
        errors=["KeyError: [red]"],
    )


def test_counts_and_misses() -> None:
    report = example()
    assert report.counts == {"rms_norm": 3}
    assert [s.pattern for s in report.missed] == ["attention"]


def test_to_dict_is_ready_for_json() -> None:
    report = example()
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert report.to_dict()["sites"][0] == {
        "pattern": "rms_norm", "module": "layers.0.norm", "status": "replaced", "reason": "", "rule": "norm.py:44",
        "node": "", "notes": "",
    }  # fmt: skip
    assert json.dumps(fastft.report().to_dict())  # with the bridges


def test_the_table() -> None:
    text = str(example())
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("│") and line.split()[1] != "│"}
    assert "replaced" in rows["rms_norm"]
    assert " 3 " in rows["rms_norm"]
    assert "norm.py:44, norm.py:45" in rows["rms_norm"]
    assert "(3 modules)" in text
    assert "[batch, seq] is not [/b]" in rows["attention"]  # brackets are no markup
    assert "out of fuel" in rows["rotary"]
    assert "graphs 1, graph breaks 0, recompilations 1" in text
    assert "break ×2: a reason\n" in text
    assert "time: rewrite 0.25 s, compile 2.00 s" in text
    assert "plan: recompute: 2 regions" in text
    assert "error: KeyError: [red]" in text


def test_replaced_sites_come_first() -> None:
    lines = str(example()).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("│") and line.split()[1] != "│"] == [
        "rms_norm", "attention", "rotary",
    ]  # fmt: skip


def test_an_empty_report_says_so() -> None:
    assert "no graph with a known site was compiled" in str(Report())


def test_merged() -> None:
    first, second = example(), example()
    second.plan = {"recompute": "cheap ops only", "more": "x"}
    second.recompiles = 0
    reporting.add(first)
    reporting.add(second)
    merged = fastft.report()
    assert [r is f for r, f in zip(fastft.reports(), (first, second), strict=True)] == [True, True]
    assert merged.counts == {"rms_norm": 6}
    assert (merged.graphs, merged.recompiles, len(merged.errors)) == (2, 1, 2)
    assert merged.timings == {"rewrite": 0.5, "compile": 4.0}
    assert merged.plan == {"recompute": "2 regions; cheap ops only", "more": "x"}
    assert {b.name for b in merged.bridges} >= {"accelerate_backend", "trl_head"}
    # The graphs' own reports are as they were.
    assert first.counts == {"rms_norm": 3}
    assert first.plan == {"recompute": "2 regions"}


def test_plans_that_agree_are_said_once() -> None:
    for _ in range(3):
        reporting.add(example())
    assert fastft.report().plan == {"recompute": "2 regions"}


def test_reset() -> None:
    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    torch._dynamo.reset()
    torch.compile(breaks, backend="fastft", options={"residual": "eager"})(torch.ones(3))
    reporting.add(example())
    assert fastft.report().breaks == sum(fastft.report().break_reasons.values()) == 1
    reporting.reset()
    assert fastft.reports() == []
    assert (fastft.report().graphs, fastft.report().breaks) == (0, 0)


@torch._dynamo.config.patch(recompile_limit=2)
def test_what_runs_uncompiled_as_its_code_was_compiled_too_often_is_a_break() -> None:
    torch._dynamo.reset()

    def scaled(x: torch.Tensor, by: str) -> torch.Tensor:
        return x * len(by)

    compiled = torch.compile(scaled, backend="fastft", options={"residual": "eager"})
    for by in ("a", "bb"):
        compiled(torch.ones(3), by)
    assert fastft.report().breaks == 0
    assert compiled(torch.ones(3), "ccc").tolist() == [3, 3, 3]
    report = fastft.report()
    assert (report.graphs, report.breaks) == (2, 1) and "recompile limit" in next(iter(report.break_reasons))
