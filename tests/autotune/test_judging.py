"""``fastft verify --variant``: ours pass, and a variant that is wrong in one way is refused with a message that says
how.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastft
import fastft.kernels
from fastft import cli
from fastft.autotune import cases, database, judging, tuning, variants
from fastft.autotune.judging import DTYPES, Row, examine
from fastft.kernels._inputs import New
from fastft.kernels._op import OPS
from tests.autotune import _bad, _mine

fastft.kernels.load()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(variants, "_USERS", {})
    monkeypatch.setattr(variants, "_PROBLEMS", [])
    monkeypatch.setattr(variants, "_LOADED", True)
    database.forget()
    yield
    database.forget()


def only_silu(gate: torch.Tensor, up: torch.Tensor, kind: str) -> str | None:
    return None if kind == "silu" else f"{kind} is another activation"


def found(function: Callable[..., Any], op: str = "glu", supported: Any = only_silu) -> list[Row]:
    fastft.variants.register(op, "mine", supported=supported)(function)
    return list(examine(fastft.variants.get(op, "mine")))


def not_right(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.status in ("wrong", "failed")]


# ------------------------------------------------------------------------------------------------------------ ours pass

OWN = [(op, v.name) for op in OPS for v in variants.listed(op)]
#: What refuses every call on a CPU.
ON_GPUS = {("attention", "varlen"), ("attention", "flex")}


@pytest.mark.parametrize(("op", "name"), OWN)
def test_ours_pass(monkeypatch: pytest.MonkeyPatch, op: str, name: str) -> None:
    # The reference is what all are judged by, and the linear layers are called in many forms: one dtype shows that they
    # can be traced, and called in every way. Of these every seventh call is judged, which has all shapes and all of the
    # six forms; and the one large model in bf16 alone, since PyTorch's fp16 products take seconds on a CPU.
    linear = op.startswith("lora_linear")
    dtypes = DTYPES[1:2] if name == "reference" or linear else DTYPES
    every, large = judging.small_cases(op)[:: 7 if linear else 1], {c.name for c in cases.cases(*cases.SMALL[-1])}
    monkeypatch.setattr(judging, "small_cases", lambda op: [c for c in every if c.name not in large])
    rows = list(examine(fastft.variants.get(op, name), dtypes))
    monkeypatch.setattr(judging, "small_cases", lambda op: [c for c in every if c.name in large])
    monkeypatch.setattr(judging, "empty_cases", lambda op: [])
    rows += examine(fastft.variants.get(op, name), DTYPES[1:2])
    assert not not_right(rows), not_right(rows)[:3]
    if (op, name) in ON_GPUS:
        assert {row.status for row in rows} == {"refused"}
        return
    assert {row.dtype for row in rows if row.status == "ok"} == {str(d).removeprefix("torch.") for d in dtypes}
    if name == OPS[op].default:
        called_in_every_way(op, {row.inputs for row in rows})


def called_in_every_way(op: str, ways: set[str]) -> None:
    assert {"as a model makes them", "halves of wider tensors", "every second element", "transposed in memory"} <= ways
    if op != "nf4_dequantize":  # it has no tokens and no gradient
        assert {"no tokens", "no tokens, every second element", "the gradient of a sum"} <= ways
        assert "a NaN in the first operand" in ways
    options = {
        "rms_norm": {"weight=None", "out_dtype=float32", "pass_through=True", "every operand trained"},
        "attention": {"causal=False"},
        "linear_cross_entropy": {"every third label ignored"},
    }
    assert options.get(op, set()) <= ways


def test_layouts_are_what_they_say() -> None:
    op = OPS["glu"]
    inputs = cases.small_cases("glu")[0].make(New(torch.float32, "cpu"))
    strides = {way.name: way.fresh().args[0].stride() for way in judging.ways(op, inputs)}
    batch, seq, n = inputs.args[0].shape
    assert strides["as a model makes them"] == (seq * n, n, 1)
    assert strides["halves of wider tensors"] == (2 * seq * n, 2 * n, 1)
    assert strides["every second element"] == (2 * seq * n, 2 * n, 2)
    assert strides["transposed in memory"] == (1, batch, seq * batch)
    for way in judging.ways(op, inputs):
        if "NaN" not in way.name:
            assert torch.equal(way.fresh().args[0], inputs.args[0]), way.name
            assert [t.requires_grad for t in way.fresh().wanted] == [True, True]
        gradient = way.gradient(torch.ones(2, 3))
        assert (gradient.stride() == (0, 0)) == (way.name == "the gradient of a sum")


# ------------------------------------------------------------------------------------------------ bad ones are refused

TRANSPOSED = {"halves of wider tensors", "every second element", "transposed in memory"}
EVERY = None


@pytest.mark.parametrize(
    ("function", "where", "what"),
    [
        (_bad.contiguous_only, TRANSPOSED, "result 0: NaN or infinity stands in other places"),
        (_bad.dense_gradient, {*TRANSPOSED, "the gradient of a sum"}, "gradient of up: "),
        (_bad.fp32, EVERY, "result 0 is float32 [2, 17, 176] on cpu, the op's bfloat16 [2, 17, 176] on cpu"),
        (_bad.item, EVERY, "reads a tensor's values (.item(), float(), an `if`, nonzero)"),
        (_bad.writes_operand, EVERY, "the forward writes to up"),
        (_bad.writes_gradient, EVERY, "the backward writes to the gradient of result 0"),
        (_bad.wrong_gradient, EVERY, "gradient of up: error"),
        (_bad.no_gradient, EVERY, "there is no gradient of up"),
        (_bad.detached, EVERY, "result 0 has no gradient, the op's has"),
        (_bad.no_tokens, {"no tokens"}, "result 0 is float32 [1] on cpu, the op's float32 [0, 17, 176] on cpu"),
        (_bad.raises_without_tokens, {"no tokens"}, "ValueError: grid of 0 programs (line "),
        (_bad.nondeterministic, EVERY, "result 0 is not bit for bit the same in two runs"),
        (_bad.swallows_nan, {"a NaN in the first operand"}, "result 0: NaN or infinity stands in other places"),
        (
            _bad.other_strides_than_fake,
            EVERY,
            "but under fake tensors (as torch.compile traces it) float32 [2, 17, 176]",
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_bad_variant(function: Callable[..., Any], where: set[str] | None, what: str) -> None:
    rows = not_right(found(function))
    assert any(what in row.what for row in rows), [row.what for row in rows][:5]
    assert all(row.case.startswith("glu ") for row in rows)
    if where is not EVERY:  # there, and where there are no tokens, and nowhere else
        ways = {row.inputs for row in rows}
        assert where <= ways and all(way in where or way.startswith("no tokens") for way in ways)


def test_where_it_reads_a_value() -> None:
    row = not_right(found(_bad.item))[0]
    assert f"of {_bad.__file__})" in row.what and "DataDependentOutputException" in row.what


def test_options_that_are_forgotten() -> None:
    rows = not_right(found(_bad.rms_norm_without_options, "rms_norm", None))
    said = {row.inputs: row.what for row in rows if row.dtype == "bfloat16"}
    assert "the op's float32" in said["out_dtype=float32"]
    assert "gives 1 results, the op 2" in said["pass_through=True"]
    assert "there is no gradient of weight" in said["every operand trained"]


def test_a_legality_that_looks_at_values() -> None:
    rows = not_right(found(_mine.glu, supported=_bad.looks_at_values))
    assert rows and all("its legality, on fake tensors: " in row.what for row in rows)


def test_a_right_one_passes_with_gradients_of_its_own() -> None:
    rows = found(_mine.glu)
    assert {row.status for row in rows} == {"ok", "refused"}
    assert {row.dtype for row in rows} == {str(d).removeprefix("torch.") for d in DTYPES}


# ---------------------------------------------------------------------------------------------------------- the command


def verify(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["verify", *arguments])


def test_the_command_says_what_is_wrong_and_tune_does_not_offer_it() -> None:
    fastft.variants.register("glu", "mine", supported=only_silu)(_bad.contiguous_only)
    shown = verify("--variant", "glu=mine")
    said = " ".join(shown.output.replace("│", " ").split())
    assert shown.exit_code == 1 and "calls are not right. fastft tune will not offer it." in said
    assert "halves of" in said and "NaN or" in said
    assert "mine" not in {v.name for v in tuning.offered("glu", database.device_kind())}
    body = json.loads(verify("--variant", "glu=mine", "--json").stdout)
    wrong = [row for row in body["cases"] if row["status"] == "wrong"]
    assert not body["ok"] and {"case", "dtype", "inputs", "status", "what", "ratio"} == set(wrong[0])
    assert "as a model makes them" not in {row["inputs"] for row in wrong}


def test_a_model_and_a_variant_exclude_each_other(tmp_path: Path) -> None:
    shown = verify(str(tmp_path), "--variant", "glu=triton")
    assert shown.exit_code == 2 and "a model or --variant, not both" in " ".join(shown.output.split())


def test_the_help_has_examples() -> None:
    said = " ".join(verify("--help").output.split())
    assert "fastft verify path/to/config.json" in said
    assert "fastft verify --import my_kernels.py --variant glu=mine" in said
