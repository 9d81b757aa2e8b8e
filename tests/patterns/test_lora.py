"""LoRA linears as PEFT traces them: replaced, nothing of them left, values and gradients by the error rule."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from fastft import compiler
from fastft.compare import assert_within
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
    layer: Any = torch.nn.Linear(64, 48, bias=bias)
    if nf4:
        bnb = pytest.importorskip("bitsandbytes")
        weight = layer.weight.data
        quantised = bnb.nn.Linear4bit(64, 48, bias=bias, compute_dtype=BF16, quant_type=nf4)
        quantised.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type=nf4, module=quantised)
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


def gradients(model: Any, out: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad} | ({"x": x} if x.requires_grad else {})
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return dict(zip(named, torch.autograd.grad(out, list(named.values()), dy), strict=True))


def check(
    model: Any, x_dtype: torch.dtype = BF16, *, autocast: str = "", grad: bool = True, sites: int = 1
) -> torch.fx.GraphModule:
    """One site, no LoRA left in the graph, y and every gradient by the error rule."""
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(x_dtype).requires_grad_(grad)
    call = Autocast(model) if autocast == "inside" else model
    out, report, graph = rewritten(call, x, autocast == "ambient")
    assert report.counts == {"lora": sites}, str(report)
    names = [getattr(n.target, "__name__", str(n.target)) for n in graph.graph.nodes]
    assert "lora_linear" in names and not {"linear", "gemm_4bit", "autograd_function_apply"} & set(names), names
    ours = {"y": out.detach()} | gradients(call, out, x)
    torch.manual_seed(7)
    with torch.autocast("cpu", BF16) if autocast == "ambient" else contextlib.nullcontext():
        stock = call(x)
    assert out.dtype == stock.dtype
    theirs = {"y": stock.detach()} | gradients(call, stock, x)
    # The truth: the same model in fp64, over the weight that is really stored.
    linear = (
        next(m for m in model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "quant_state"))
        if _is_nf4(model)
        else None
    )
    if linear is not None:
        state = linear.weight.quant_state
        second = (state.state2.code, state.offset, state.state2.absmax) if state.nested else (None, None, None)
        plain = torch.nn.Linear(64, 48, bias=linear.bias is not None)
        plain.weight.data = nf4_dequantize(linear.weight.data, state.absmax, *second, 64, 256, (48, 64), BF16)
        if linear.bias is not None:
            plain.bias.data = linear.bias.data
        exact_model = build(F32, F32, names=tuple(model.base_model.model.proj.active_adapters), **_config(model))
        exact_model.base_model.model.proj.base_layer = plain.requires_grad_(False)
        exact_model.load_state_dict({n: p for n, p in model.state_dict().items() if "lora_" in n}, strict=False)
        exact_model = exact_model.to(F64)
    else:
        exact_model = build(
            F32,
            F32,
            names=tuple(model.base_model.model.proj.active_adapters),
            bias=model.base_model.model.proj.base_layer.bias is not None,
            **_config(model),
        )
        exact_model.load_state_dict(model.state_dict())
        exact_model = exact_model.to(F64)
        for (_, a), (_, b) in zip(exact_model.named_parameters(), model.named_parameters(), strict=True):
            a.requires_grad_(b.requires_grad)
    x64 = x.detach().double().requires_grad_(grad)
    torch.manual_seed(7)
    out64 = exact_model(x64)
    named = {
        "model." + n if autocast == "inside" else n: g for n, g in gradients(exact_model, out64.to(F64), x64).items()
    }
    exact = {"y": out64.detach()} | {n.removeprefix("model.") if n == "model.x" else n: g for n, g in named.items()}
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        # Dropout's mask does not depend on the dtype of what it drops (CPU); dy is rounded before exact sees it.
        assert_within(name, value, theirs[name], exact[name], length=640)
    return graph


def _is_nf4(model: Any) -> bool:
    return type(model.base_model.model.proj.base_layer).__name__ == "Linear4bit"


def _config(model: Any) -> dict[str, Any]:
    config = model.peft_config["default"]
    return {"lora_dropout": config.lora_dropout, "lora_bias": config.lora_bias, "use_rslora": config.use_rslora}


AUTOCAST = ["", "ambient", "inside"]


@pytest.mark.parametrize("autocast", AUTOCAST, ids=["plain", "ambient", "inside"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("base", "adapters"), [(F32, F32), (BF16, F32), (BF16, BF16)], ids=["fp32", "bf16-fp32", "bf16"]
)
def test_dtypes(base, adapters, dropout, autocast):
    check(build(base, adapters, lora_dropout=dropout), base, autocast=autocast)


@pytest.mark.parametrize("autocast", AUTOCAST, ids=["plain", "ambient", "inside"])
@pytest.mark.parametrize("x_dtype", [BF16, F32], ids=["bf16", "x32"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("grad", [False, True], ids=["first", "grad"])
def test_nf4(grad, dropout, x_dtype, autocast):
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
    report = Report()

    def backend(gm, example_inputs):
        compiler.transform(gm, Options.of({"strict": True}), report)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(x)
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
    assert not report.counts, str(report)
    assert torch.equal(out, call(x, w, a, b))
