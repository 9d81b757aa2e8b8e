"""NF4 linears in every form that reaches a graph: replaced, equal to bitsandbytes, nothing of it left."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastft import bridges, compiler
from fastft.bridges import _tracing
from fastft.compare import assert_within
from fastft.kernels.nf4 import nf4_dequantize
from fastft.options import Options
from fastft.reporting import MISSED, REPLACED, Report

bnb = pytest.importorskip("bitsandbytes")

BF16, F32 = torch.bfloat16, torch.float32


def linear4bit(
    k: int, n: int, compute: torch.dtype, *, double: bool = True, bias: bool = False, kind: str = "nf4"
) -> Any:
    """A quantised linear layer as transformers makes one."""
    layer = bnb.nn.Linear4bit(k, n, bias=bias, compute_dtype=compute, compress_statistics=double, quant_type=kind)
    weight = torch.randn(n, k) * k**-0.5
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=double, quant_type=kind, module=layer
    )
    if bias:
        layer.bias.data = torch.randn(n).to(compute)
    return layer.to("cpu").train()


@pytest.fixture(params=[False, True], ids=["traced", "bridged"])
def bridged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether what is compiled here is compiled for fastft, so that ``bridges/bnb_linear.py`` does its part."""
    if request.param:
        bridges.install()
        monkeypatch.setattr(_tracing, "is_fastft", lambda backend: True)
    return request.param


def rewritten(call: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, Report, torch.fx.GraphModule]:
    """The output of ``call`` after our rewriting, what was reported, and the graph."""
    report, graphs = Report(), []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        compiler.transform(gm, Options.of({"strict": True}), report)
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    out = torch.compile(call, backend=backend, fullgraph=True)(*inputs)
    (graph,) = graphs
    return out, report, graph


def dense(layer: Any) -> torch.Tensor:
    """The layer's weight in fp64, as bitsandbytes stores it for its compute dtype."""
    state = layer.weight.quant_state
    compute = layer.compute_dtype
    double = (state.state2.code, state.offset, state.state2.absmax) if state.nested else (None, None, None)
    args = (layer.weight.data, state.absmax, *double, state.blocksize, 256, tuple(state.shape), compute)
    return nf4_dequantize(*args).double()


def calls(graph: torch.fx.GraphModule) -> list[str]:
    return [getattr(n.target, "__name__", str(n.target)) for n in graph.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("grad", [False, True], ids=["first", "grad"])
@pytest.mark.parametrize(
    ("compute", "x_dtype"), [(BF16, BF16), (BF16, F32), (F32, F32)], ids=["bf16", "bf16-x32", "fp32"]
)
def test_linear4bit(compute, x_dtype, grad, bias, double, bridged):
    layer = linear4bit(64, 48, compute, double=double, bias=bias)
    if bias:
        layer.bias.requires_grad_(grad)
    x = torch.randn(3, 5, 64).to(x_dtype).requires_grad_(grad)
    out, report, graph = rewritten(layer, x)
    assert report.counts == {"nf4": 1}, str(report)
    assert "lora_linear" in calls(graph)
    assert not [n for n in calls(graph) if "autograd_function" in n or "4bit" in n]
    stock = layer(x)
    exact = x.double().to(compute).double() @ dense(layer).t() + (layer.bias.double() if bias else 0)
    assert out.dtype == stock.dtype
    assert_within("y", out, stock, exact, length=64)
    if grad:
        dy = torch.randn_like(stock)
        (dx,), (dx_stock,) = torch.autograd.grad(out, x, dy), torch.autograd.grad(stock, x, dy)
        assert_within("dx", dx, dx_stock, dy.double() @ dense(layer), length=48)


@pytest.mark.parametrize("transposes", [0, 2])
@pytest.mark.parametrize("double", ["+", "+=", ""], ids=["double", "in-place", "single"])
def test_dequantize_then_linear(double, transposes):
    """The form of older versions: dequantize_blockwise, + offset, dequantize_4bit, linear."""
    layer = linear4bit(64, 48, BF16, double=bool(double))
    state, packed = layer.weight.quant_state, layer.weight.data
    ops = torch.ops.bitsandbytes

    def old(x, packed, absmax, *second):
        if second:
            code, offset, absmax2 = second
            absmax = ops.dequantize_blockwise.default(absmax, absmax2, code, 256, F32)
            if double == "+":
                absmax = absmax + offset
            else:
                absmax += offset
        weight = ops.dequantize_4bit.default(packed, absmax, 64, "nf4", (48, 64), BF16).to(x.dtype)
        return torch.nn.functional.linear(x, weight.t().t() if transposes else weight)

    second = (state.state2.code, state.offset, state.state2.absmax) if double else ()
    x = torch.randn(3, 64).to(BF16).requires_grad_()
    out, report, graph = rewritten(old, x, packed, state.absmax, *second)
    assert report.counts == {"nf4": 1}, str(report)
    assert not [n for n in calls(graph) if n.startswith("dequantize_4bit")]
    assert_within("y", out, layer(x), x.double() @ dense(layer).t(), length=64)
    dy = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, dy)
    assert_within("dx", dx, (dy @ dense(layer).to(BF16)), dy.double() @ dense(layer), length=48)


def test_inside_checkpoint(bridged):
    layer = linear4bit(64, 48, BF16)
    x = torch.randn(3, 64).to(BF16).requires_grad_()
    out, report, _ = rewritten(lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False), x)
    assert report.counts == {"nf4": 1}, str(report)
    (dx,) = torch.autograd.grad(out, x, torch.ones_like(out))
    torch.testing.assert_close(dx, torch.autograd.grad(layer(x), x, torch.ones_like(out))[0])


def test_dynamic_sizes(bridged):
    layer = linear4bit(64, 48, BF16)
    x = torch.randn(3, 5, 64).to(BF16).requires_grad_()
    torch._dynamo.mark_dynamic(x, 1)
    out, report, _ = rewritten(layer, x)
    assert report.counts == {"nf4": 1}, str(report)
    assert out.shape == (3, 5, 48)


@pytest.mark.parametrize("grad", [False, True])
def test_fp4_is_left_with_a_reason(grad, bridged):
    layer = linear4bit(64, 48, BF16, kind="fp4")
    x = torch.randn(3, 64).to(BF16).requires_grad_(grad)
    out, report, _ = rewritten(layer, x)
    assert [(s.pattern, s.status) for s in report.sites] == [("nf4", MISSED)]
    assert "quantization" in report.sites[0].reason and "fp4" in report.sites[0].reason
    assert torch.equal(out, layer(x))


def test_transposed_storage_is_left_with_a_reason():
    layer = linear4bit(64, 48, BF16)

    def odd(x):
        state = layer.weight.quant_state
        absmax = torch.zeros(48, dtype=F32)
        weight = torch.ops.bitsandbytes.dequantize_4bit.default(
            layer.weight.data, absmax, 64, "nf4", tuple(state.shape), BF16
        )
        return torch.nn.functional.linear(x, weight.t())

    _, report, _ = rewritten(odd, torch.randn(3, 48).to(BF16))
    assert [s.status for s in report.sites] == [MISSED]
    assert "[K, N]" in report.sites[0].reason


def test_plain_linear_is_not_a_site():
    layer = torch.nn.Linear(64, 48)
    _, report, _ = rewritten(layer, torch.randn(3, 64))
    assert not [s for s in report.sites if s.status == REPLACED or s.pattern == "nf4"]
