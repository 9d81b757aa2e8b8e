"""LoRA linears as PEFT traces them: replaced, nothing of them left, values and gradients by the error rule."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import fastft
from fastft import compiler, reporting
from fastft.compare import assert_within, relative_error
from fastft.kernels.nf4 import nf4_dequantize
from fastft.options import Options
from fastft.reporting import MISSED, Report

peft = pytest.importorskip("peft")

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


class Net(torch.nn.Module):
    """One linear layer named as PEFT's targets are."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.proj = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # An operation on each side, so that x is computed and y is used.
        return self.proj(x * 1.25) * 0.5


class Autocast(torch.nn.Module):
    """A model under autocast, entered inside the compiled region (as accelerate does) or around it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", BF16):
            return self.model(x)


def build(
    base: torch.dtype = BF16,
    adapters: torch.dtype = F32,
    *,
    names: tuple[str, ...] = ("default",),
    nf4: str = "",
    bias: bool = False,
    **config: Any,
) -> Any:
    torch.manual_seed(0)
    layer: Any = torch.nn.Linear(64, 48, bias=bias, dtype=BF16 if nf4 else F32)
    if nf4:
        bnb = pytest.importorskip("bitsandbytes")
        weight = layer.weight.data
        quantised = bnb.nn.Linear4bit(64, 48, bias=bias, compute_dtype=BF16, quant_type=nf4)
        quantised.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=nf4, module=quantised)
        quantised.bias = layer.bias
        layer = quantised.to("cpu")
    else:
        layer = layer.to(base)
    net: Any = Net(layer)
    net.is_loaded_in_4bit = bool(nf4)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["proj"], "init_lora_weights": False, **config}
    model = peft.get_peft_model(net, peft.LoraConfig(**config), autocast_adapter_dtype=False)
    for name in names[1:]:
        model.add_adapter(name, peft.LoraConfig(**{**config, "r": 6}), autocast_adapter_dtype=False)
    if len(names) > 1:
        model.base_model.set_adapter(list(names))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.to(adapters)
    return model.train()


def rewritten(model: Any, x: torch.Tensor, ambient: bool = False) -> tuple[torch.Tensor, Report, torch.fx.GraphModule]:
    """The output after our rewriting (ambient: under autocast from outside), the report, the graph."""
    report, graphs = Report(), []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        compiler.transform(gm, Options.of({"strict": True}), report)
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.manual_seed(7)
    with torch.autocast("cpu", BF16) if ambient else contextlib.nullcontext():
        out = torch.compile(model, backend=backend, fullgraph=True)(x)
    (graph,) = graphs
    return out, report, graph


def results(model: Any, out: torch.Tensor, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """y and the gradients of everything that wants one, by name."""
    named = {n.split("base_model.", 1)[1]: p for n, p in model.named_parameters() if p.requires_grad}
    named |= {"x": x} if x.requires_grad else {}
    grads = torch.autograd.grad(out, list(named.values()), dy.to(out.dtype))
    return {"y": out.detach()} | dict(zip(named, grads, strict=True))


def truth(model: Any) -> Any:
    """The same model in fp64, over the weight that is really stored."""
    proj = model.base_model.model.proj
    base, config = proj.base_layer, model.peft_config["default"]
    same = {n: getattr(config, n) for n in ("lora_dropout", "lora_bias", "use_rslora", "lora_alpha")}
    exact = build(F32, F32, names=tuple(proj.active_adapters), bias=base.bias is not None, **same)
    state = dict(model.state_dict())
    if hasattr(base, "quant_state"):
        q = base.weight.quant_state
        second = (q.state2.code, q.offset, q.state2.absmax)
        weight = nf4_dequantize(base.weight.data, q.absmax, *second, 64, 256, (48, 64), BF16)
        state = {n: t for n, t in state.items() if ".weight." not in n}
        state["base_model.model.proj.base_layer.weight"] = weight
    exact.load_state_dict(state)
    for (_, ours), (_, theirs) in zip(exact.named_parameters(), model.named_parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return exact.to(F64)


def check(model: Any, x_dtype: torch.dtype = BF16, *, autocast: str = "", grad: bool = True) -> torch.fx.GraphModule:
    """One site, no LoRA left in the graph, y and every gradient by the error rule."""
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(x_dtype).requires_grad_(grad)
    call = Autocast(model) if autocast == "inside" else model
    out, report, graph = rewritten(call, x, autocast == "ambient")
    assert report.counts == {"lora": 1}, str(report)
    names = [getattr(n.target, "__name__", str(n.target)) for n in graph.graph.nodes]
    assert "lora_linear" in names and not {"linear", "gemm_4bit", "autograd_function_apply"} & set(names), names
    # The mask of a CPU dropout does not depend on the dtype of what is dropped.
    torch.manual_seed(7)
    with torch.autocast("cpu", BF16) if autocast == "ambient" else contextlib.nullcontext():
        stock = call(x)
    assert out.dtype == stock.dtype
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    x64, exact_model = x.detach().double().requires_grad_(grad), truth(model)
    torch.manual_seed(7)
    exact = results(exact_model, exact_model(x64), x64, dy)
    ours, theirs = results(call, out, x, dy), results(call, stock, x, dy)
    assert ours.keys() == theirs.keys() == exact.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert_within(name, value, theirs[name], exact[name], length=640)
        assert relative_error(theirs[name], exact[name]) < 0.02, f"{name}: this is not what stock computes"
    return graph


AUTOCAST = pytest.mark.parametrize("autocast", ["", "ambient", "inside"], ids=["plain", "ambient", "inside"])


@AUTOCAST
@pytest.mark.parametrize(
    ("base", "adapters", "dropout"),
    [(F32, F32, 0.0), (F32, F32, 0.3), (BF16, F32, 0.0), (BF16, F32, 0.3), (BF16, BF16, 0.3)],
    ids=["fp32", "fp32-dropout", "bf16-fp32", "bf16-fp32-dropout", "bf16-dropout"],
)
def test_dtypes(base, adapters, dropout, autocast):
    check(build(base, adapters, lora_dropout=dropout), base, autocast=autocast)


@AUTOCAST
@pytest.mark.parametrize(
    ("x_dtype", "dropout", "grad"),
    [(BF16, 0.0, False), (BF16, 0.3, True), (F32, 0.0, True), (F32, 0.3, False)],
    ids=["bf16-first", "bf16-dropout", "x32", "x32-first-dropout"],
)
def test_nf4(x_dtype, dropout, grad, autocast):
    check(build(nf4="nf4", lora_dropout=dropout), x_dtype, autocast=autocast, grad=grad)


@pytest.mark.parametrize("nf4", ["", "nf4"], ids=["dense", "nf4"])
@pytest.mark.parametrize(
    "config",
    [
        {"names": ("default", "second")},
        {"names": ("default", "second", "third"), "lora_dropout": 0.2},
        {"use_rslora": True},
        {"lora_bias": True},
        {"bias": True, "lora_bias": True, "names": ("default", "second")},
        {"lora_alpha": 4},
    ],
    ids=["two", "three-dropout", "rslora", "lora-bias", "biases", "scaling-1"],
)
def test_configurations(config, nf4):
    check(build(nf4=nf4, **config))


def test_trainable_base():
    model = build(F32, F32)
    model.base_model.model.proj.base_layer.weight.requires_grad_(True)
    check(model, F32)


def test_base_without_gradient_to_x():
    check(build(), grad=False)


def test_casts_need_no_copy_of_x():
    """The op reads x itself: neither PEFT's upcast nor autocast's downcast of it is left in the graph."""
    graph = check(build(BF16, F32))
    (node,) = (n for n in graph.graph.nodes if getattr(n.target, "__name__", "") == "lora_linear")
    assert node.args[0].target in (torch.mul, __import__("operator").mul) and node.kwargs["x_lora"] == [None]
    assert "to" not in [n.target for n in graph.graph.nodes]


def test_dynamic_sizes_and_checkpoint():
    model = build(lora_dropout=0.1)
    x = torch.randn(2, 5, 64).to(BF16).requires_grad_()
    torch._dynamo.mark_dynamic(x, 1)
    call = torch.nn.Module()
    call.forward = lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)  # type: ignore[method-assign]
    out, report, _ = rewritten(call.forward, x)
    assert report.counts == {"lora": 1}, str(report)
    assert out.shape == (2, 5, 48)


def test_intermediate_that_escapes():
    """A base output that is also used elsewhere keeps the site as it was."""
    model = build(F32, F32)
    layer = model.base_model.model.proj

    def both(x):
        base = layer.base_layer(x)
        lora = layer.lora_B["default"](layer.lora_A["default"](x)) * 2.0
        return base + lora, base

    x = torch.randn(3, 64)
    out, report, _ = rewritten(both, x)
    assert [(s.pattern, s.status) for s in report.sites] == [("lora", MISSED)], str(report)
    assert "escapes" in report.sites[0].reason
    assert torch.equal(out[0], both(x)[0])


@pytest.mark.parametrize("kind", ["fp4", "dora"])
def test_left_with_a_reason(kind):
    model = build(nf4="fp4") if kind == "fp4" else build(F32, F32, use_dora=True)
    x = torch.randn(2, 5, 64).to(BF16 if kind == "fp4" else F32)
    torch._dynamo.reset()
    reporting.reset()
    torch.compile(model, backend="fastft", options={"residual": "eager", "strict": True})(x)
    report = fastft.report()
    reasons = [s.reason for s in report.sites if s.pattern == "lora"]
    assert len(reasons) == 1 and reasons[0].startswith("quantization" if kind == "fp4" else "dora"), str(report)
    assert not report.counts


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, a, b: x + torch.nn.functional.linear(torch.nn.functional.linear(x, a), b[:, :2]),
        lambda x, w, a, b: torch.nn.functional.linear(x, w) + torch.nn.functional.linear(x, w) * 2.0,
        lambda x, w, a, b: torch.nn.functional.linear(
            torch.nn.functional.silu(torch.nn.functional.linear(x, a)), b[:, :2]
        ),
    ],
    ids=["residual", "two-linears", "mlp"],
)
def test_look_alikes_are_no_sites(call):
    x, w, a, b = torch.randn(3, 8), torch.randn(8, 8), torch.randn(2, 8), torch.randn(8, 3)
    out, report, _ = rewritten(lambda x: call(x, w, a, b), x)
    assert "lora" not in report.counts, str(report)
    torch.testing.assert_close(out, call(x, w, a, b))
