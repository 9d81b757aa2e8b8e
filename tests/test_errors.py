"""``bench/errors.py`` works: tiny models and every op on a CPU; its figures are what their names say."""

from __future__ import annotations

import json
import math
import os
from unittest import mock

import pytest
import torch

import fastft.kernels
from bench import errors

pytest.importorskip("transformers")
pytest.importorskip("peft")

SIZES = {"layers": 1, "hidden": 64, "vocab": 128, "batch": 1, "seq": 16, "seeds": 2}
TINY = [w for k, v in SIZES.items() for w in (f"--{k}", str(v))] + ["--impls", "fastft", "--options", "residual=eager"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with mock.patch.dict(os.environ):
        yield


@pytest.mark.parametrize(("setting", "tensors"), [("lora", 14), ("full", 12)])
def test_models(setting, tensors, tmp_path, capsys):
    out = tmp_path / "errors.json"
    assert errors.main(["model", "--settings", setting, *TINY, "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["status"] == "ok" and row["exact"] == "float32" and row["replaced"]["rms_norm"] == 3
    assert len(row["gradients"]) == row["trained"]["tensors"] == tensors
    # Every gradient is there, none is zero by construction, and bf16 is what eager computes in.
    for gradient in row["gradients"]:
        assert len(gradient["errors"]["fastft"]) == len(gradient["errors"]["eager"]) == 2
        assert all(1e-4 < e < 0.3 for each in gradient["errors"].values() for e in each), gradient
    ratios = row["ratios"]["fastft"]
    assert ratios["count"] == 2 * tensors == sum(kind["count"] for kind in ratios["kinds"].values())
    assert 0.3 < ratios["median"] <= ratios["pooled_worst"] <= ratios["worst"] < 3
    assert ("q_proj.lora_A" if setting == "lora" else "post_attention_layernorm") in ratios["kinds"]
    assert "pooled worst" in capsys.readouterr().out


def test_a_failure_is_a_row(tmp_path):
    out = tmp_path / "errors.json"
    assert errors.main(["model", "--settings", "full", *TINY, "--options", "no_such_option=1", "--out", str(out)]) == 1
    (row,) = json.loads(out.read_text())["rows"]
    assert row["status"] == "failed" and "no_such_option" in row["error"]


def test_ops(tmp_path, capsys):
    out = tmp_path / "ops.json"
    assert errors.main(["ops", "--dtypes", "bfloat16", "--shapes", "2", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["op"] for row in rows} == set(fastft.kernels.load())
    for row in rows:
        assert row["median"] <= row["worst"] < 2, row  # the error rule's factor; stock code rounds no less often
        assert all(math.isfinite(value["ratio"]) for value in row["values"])
    trained = {row["op"]: row for row in rows if row["trained"] == "weights trained"}
    assert {value["value"] for value in trained["rms_norm"]["values"]} == {"output 0", "d x", "d weight"}
    assert "rms_norm" in capsys.readouterr().out


def test_what_stock_code_computes_is_what_the_op_computes():
    """A spelling that means something else would make any op look exact."""
    from bench import kernels

    arguments = mock.Mock(seq=16, shapes=2)
    for name, maker, shape in errors.op_cases(arguments):
        if kernels.OPS[name].stock is not None:
            torch.manual_seed(0)
            for _, values in errors.op_rows(name, maker(shape), torch.float32):
                assert all(v["eager"] < 1e-5 or kernels.CUDA for v in values), (name, str(shape), values)


def test_summary():
    found = errors.summary(
        {"layers.0.q_proj.weight": {"eager": [1.0, 2.0], "fastft": [0.5, 3.0]},
         "layers.1.q_proj.weight": {"eager": [1.0, 1.0], "fastft": [1.0, 1.0]},
         "norm.weight": {"eager": [2.0, 0.0], "fastft": [1.0, 0.0]}},
        "fastft",
    )  # fmt: skip
    assert (found["count"], found["median"], found["worst"], found["over_1.05"]) == (6, 1.0, 1.5, 1)
    assert found["worst_of"] == "layers.0.q_proj.weight"
    assert found["kinds"]["norm"]["pooled_worst"] == 0.5
    assert found["kinds"]["q_proj"]["pooled_worst"] == pytest.approx(math.sqrt(9.25 / 5))
    assert errors.kind_of("base.layers.3.self_attn.q_proj.lora_A.default.weight") == "q_proj.lora_A"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["model", "--settings", "qlora"], "'qlora'; it is one of lora, nf4, full"),
        (["model", "--impls", "eager"], "'eager'; it is one of fastft, inductor"),
        (["ops", "--dtypes", "fp8"], "'fp8'; it is one of bfloat16"),
        (["ops", "--device", "tpu"], "'tpu'; it is cpu or cuda"),
    ],
)
def test_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        errors.main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
