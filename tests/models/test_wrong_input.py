"""What fastft cannot do leaves training as stock has it, with a reason; what is asked wrongly gets a clear error."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fastft

from ._families import batch, build
from ._training import compiled, compiled_step, step


def test_a_device_without_kernels_is_left_alone() -> None:
    model = build("llama3").to("meta")
    data = {k: v.to("meta") for k, v in batch("plain").items()}
    loss = compiled(model)(**data).loss
    loss.backward()
    report = fastft.report()
    assert report.counts == {}
    assert any(
        "device: ops run on CUDA and CPU tensors, this one is on meta" in site.reason for site in report.missed
    ), str(report)


def test_a_quantisation_without_kernels_is_left_alone() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    data = batch("plain")

    def model() -> torch.nn.Module:
        found = build("llama3", dtype=torch.bfloat16)
        for parameter in found.parameters():
            parameter.requires_grad_(False)
        found.model.embed_tokens.weight.requires_grad_(True)
        linear = found.model.layers[0].mlp.down_proj
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="fp4"
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="fp4")
        found.model.layers[0].mlp.down_proj = layer.to("cpu")
        return found

    eager = step(model(), data)
    loss, grads, report = compiled_step(model(), data)
    assert any("the weight is quantised as fp4; NF4 is supported" in site.reason for site in report.missed), str(report)
    torch.testing.assert_close(loss, eager[0], rtol=1e-3, atol=0)
    assert grads.keys() == eager[1].keys()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fule": 3}, "did you mean 'fuel'"),
        ({"fuel": -1}, "0 or more"),
        ({"disable": ["rotry"]}, "did you mean 'rotary'"),
        ({"residual": "x"}, "'eager'"),
    ],
)
def test_a_wrong_option_reaches_the_user(options: dict[str, object], words: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=words):
        torch.compile(torch.nn.Linear(2, 2), backend="fastft", options=options)(torch.ones(1, 2))


def test_optional_libraries_are_optional() -> None:
    """Without transformers, peft, trl, bitsandbytes, accelerate and triton a plain module still trains compiled."""
    script = """
import sys
for name in ("transformers", "peft", "trl", "bitsandbytes", "accelerate", "triton", "datasets"):
    sys.modules[name] = None
import torch
layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
compiled = torch.compile(layer, backend="fastft", options={"residual": "eager", "strict": True})
compiled(torch.randn(3, 4)).sum().backward()
import fastft
assert fastft.report().counts == {"layer_norm": 1}, fastft.report()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
