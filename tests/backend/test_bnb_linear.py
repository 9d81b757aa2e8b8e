"""The bridge to bitsandbytes' matmul_4bit: one node in the graph, and what stock computes wherever that node stays."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import _COMPILER_FNS
from torch.utils.checkpoint import checkpoint

from fastft import bridges, compiler
from fastft.bridges import bnb_linear
from fastft.bridges._bridge import StayOut
from fastft.compare import assert_bitwise
from fastft.options import Options
from fastft.reporting import Report

bnb = pytest.importorskip("bitsandbytes", minversion="0.50")
F32, BF16 = torch.float32, torch.bfloat16


class Graphs:
    """A backend that keeps the graphs it is given, rewrites them if asked, and runs them through AOTAutograd."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.options, self.seen, self.report = options, [], Report()

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.seen += [
            getattr(n.target, "__name__", str(n.target))
            for m in gm.modules()
            if isinstance(m, torch.fx.GraphModule)
            for n in m.graph.nodes
        ]
        if self.options is not None:
            compiler.transform(gm, Options.of({"strict": True, **self.options}), self.report)
        return aot_eager(gm, example_inputs)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``compiled(call, options)``: the call compiled with a backend that stands in for fastft, and that backend."""
    bridges.install()

    def make(call: Any, options: dict[str, Any] | None = None) -> tuple[Any, Graphs]:
        torch._dynamo.reset()
        backend = Graphs(options)
        monkeypatch.setitem(_COMPILER_FNS, "fastft", backend)
        return torch.compile(call, backend="fastft", fullgraph=True), backend

    yield make
    torch._dynamo.reset()


def layer(kind: str = "nf4", double: bool = True, bias: bool = False, compute: torch.dtype = F32) -> Any:
    torch.manual_seed(0)
    made = bnb.nn.Linear4bit(64, 48, bias=bias, compute_dtype=compute, compress_statistics=double, quant_type=kind)
    made.weight = bnb.nn.Params4bit(
        torch.randn(48, 64), requires_grad=False, compress_statistics=double, quant_type=kind, module=made
    )
    return made.to("cpu").train()


def run(call: Any, module: Any, dtype: torch.dtype = F32) -> list[torch.Tensor]:
    """The output of ``call``, and the gradients of its input and of ``module``'s bias."""
    x = torch.linspace(-1, 2, 2 * 3 * 64).view(2, 3, 64).to(dtype).requires_grad_()
    y = call(x)
    wanted = [x] if module.bias is None else [x, module.bias]
    return [y, *torch.autograd.grad(y, wanted, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))]


def test_it_is_laid() -> None:
    bridges.install()
    assert next(r.status for r in bridges.rows() if r.name == "bnb_linear") == "installed"


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_call_that_stays_is_stock(compiled: Any, kind: str, double: bool, bias: bool, checkpointed: bool) -> None:
    module = layer(kind, double, bias)
    call = (lambda x: checkpoint(module, x, use_reentrant=False)) if checkpointed else module
    expected = run(module, module)
    ours, backend = compiled(call)
    for theirs, mine in zip(expected, run(ours, module), strict=True):
        assert torch.equal(theirs, mine)
    assert backend.seen.count("linear_4bit") == 1
    assert not {"autograd_function_apply", "gemm_4bit.default"} & set(backend.seen)


@pytest.mark.parametrize("compute", [F32, BF16])
def test_under_autocast(compiled: Any, compute: torch.dtype) -> None:
    module = layer(compute=compute)
    results = []
    for off in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if off:
                patch.setattr("fastft.bridges._tracing.is_fastft", lambda backend: False)
            call, backend = compiled(module)
            with torch.autocast("cpu", BF16):
                results.append(run(call, module))
            assert ("linear_4bit" in backend.seen) != off
    for theirs, mine in zip(*results, strict=True):
        assert theirs.dtype == mine.dtype and torch.equal(theirs, mine)


@pytest.mark.parametrize("options", [{}, {"fuel": 0}, {"disable": ["nf4"]}], ids=["replaced", "fuel", "disabled"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_report_is_the_same_without_the_bridge(compiled: Any, kind: str, options: dict[str, Any]) -> None:
    module = torch.nn.Sequential(layer(kind), torch.nn.Tanh())
    module.bias = None
    sites, results = [], []
    for off in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if off:
                patch.setattr("fastft.bridges._tracing.is_fastft", lambda backend: False)
            call, backend = compiled(module, options)
            results.append(run(call, module))
        assert ("linear_4bit" in backend.seen) != off
        sites.append([(s.pattern, s.module, s.status, s.reason, s.rule) for s in backend.report.sites])
    assert sites[0] == sites[1] and len(sites[0]) == 1
    for theirs, mine in zip(*results, strict=True):
        assert_bitwise("value", mine, theirs)


def test_other_calls_are_traced_as_they_are(compiled: Any) -> None:
    module = layer()
    x = torch.randn(3, 64)
    call, backend = compiled(module)
    torch.testing.assert_close(call(x), module(x))  # no gradient wanted
    assert "gemm_4bit.default" in backend.seen and "linear_4bit" not in backend.seen
    call, backend = compiled(module)
    with torch.no_grad():
        call(x.requires_grad_())
    assert "linear_4bit" not in backend.seen
    turned, state = torch.randn(3, 48, requires_grad=True), module.weight.quant_state
    call, backend = compiled(lambda x: bnb.matmul_4bit(x, module.weight, state))  # a weight stored as [K, N]
    assert call(turned).shape == (3, 64) and "linear_4bit" not in backend.seen
    with pytest.raises(ValueError, match="quant_state is required"):
        bnb.matmul_4bit(x, module.weight, None)


def test_another_backend_sees_stock(compiled: Any) -> None:
    module, other = layer(), Graphs()
    torch._dynamo.reset()
    run(torch.compile(module, backend=other), module)
    assert "linear_4bit" not in other.seen and "autograd_function_apply" in other.seen


def test_int8_is_left_alone(compiled: Any) -> None:
    module = bnb.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False).to("cpu").train()
    torch._dynamo.reset()
    backend = Graphs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastft.bridges._tracing.is_fastft", lambda b: True)
        torch.compile(module, backend=backend)(torch.randn(3, 64, requires_grad=True))
    assert "linear_4bit" not in backend.seen


def test_check_anywhere() -> None:
    """bitsandbytes may be imported while a model is built."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(BF16)
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", BF16):
            bnb_linear.check(bnb)
    finally:
        torch.set_default_dtype(default)


def lookalike(**exchanged: Any) -> Any:
    """A module like ``bitsandbytes``, with other functions in it."""
    module = ModuleType("bitsandbytes")
    module.__dict__.update(vars(bnb) | exchanged)
    module.autograd = SimpleNamespace(_functions=SimpleNamespace(matmul_4bit=module.matmul_4bit))
    return module


def test_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = getattr(bnb.matmul_4bit, "__wrapped__", bnb.matmul_4bit)

    def other_arguments(A, B, quant_state):  # type: ignore[no-untyped-def]
        ...

    def other_ways(A, B, quant_state, out=None, bias=None):  # type: ignore[no-untyped-def]
        return stock(A, B, quant_state, out, bias)

    with pytest.raises(StayOut, match="takes A, B, quant_state where"):
        bnb_linear.apply(lookalike(matmul_4bit=other_arguments))
    with pytest.raises(StayOut, match=r"matmul_4bit has no `if A\.device"):
        bnb_linear.apply(lookalike(matmul_4bit=other_ways))
    monkeypatch.setattr(bnb_linear, "LINES", {})

    def other_maths(A, B, quant_state, out=None, bias=None):  # type: ignore[no-untyped-def]
        return 2 * stock(A, B, quant_state, out, bias)

    with pytest.raises(StayOut, match="result is another with a quantisation state"):
        bnb_linear.apply(lookalike(matmul_4bit=other_maths))
    monkeypatch.setattr(bnb_linear, "flat", lambda x, packed, bias, state, v: other_maths(x, packed, state, None, bias))
    with pytest.raises(StayOut, match="not that of a linear layer"):
        bnb_linear.apply(lookalike(matmul_4bit=other_maths))
    monkeypatch.setattr(bnb_linear, "STATE", bnb_linear.STATE - {"offset"})
    with pytest.raises(StayOut, match="QuantState holds"):
        bnb_linear.apply(lookalike())
