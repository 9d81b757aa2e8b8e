"""The activation takes up what adapters add to gate and up; where it cannot, the rules before have their way."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastft.kernels.glu import glu
from fastft.kernels.lora_glu import lora_glu
from fastft.kernels.lora_linear import lora_linears
from fastft.kernels.lora_stack import lora_stack
from tests.patterns._sites import check_site, rewritten

COUNTS = {"mlp": 1, "lora": 2, "joint_linears": 1, "lora_glu": 1}


def lora(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
    """As PEFT writes it."""
    return F.linear(x, w) + F.linear(F.linear(x, a), b) * scale


def leaves(n: int = 8, k: int = 16, ranks: tuple[int, ...] = (3, 2), dtype: Any = torch.float32) -> list[torch.Tensor]:
    """x, then W, A and B of gate and of up, the W frozen."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 5, k), *(size for r in ranks for size in ((n, k), (r, k), (n, r)))]
    made = [(torch.randn(size, generator=generator) * 0.3).to(dtype) for size in sizes]
    return [t.requires_grad_(i % 3 != 1) for i, t in enumerate(made)]


def mlp(x: torch.Tensor, *w: torch.Tensor, act: Any = F.silu) -> torch.Tensor:
    x = x * 1.5
    return act(lora(x, *w[:3])) * lora(x, *w[3:6], scale=0.5)


def targets(graph: torch.fx.GraphModule) -> list[Any]:
    return [n.target for n in graph.graph.nodes if n.target in (lora_stack, lora_glu, lora_linears, glu)]


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp(dtype: torch.dtype, act: str) -> None:
    graph = check_site(partial(mlp, act=ACTIVATIONS[act]), *leaves(dtype=dtype), counts=COUNTS)
    assert targets(graph) == [lora_stack, lora_glu]
    (node,) = (n for n in graph.graph.nodes if n.target is lora_glu)
    assert node.args[2:] == ([2.0, 0.5], act)


def test_up_first() -> None:
    """The layers are joined in the graph's order, the op has gate first."""

    def block(x, *w):
        x = x * 1.5
        up = lora(x, *w[3:6], scale=0.5)
        return up * F.silu(lora(x, *w[:3]))

    graph = check_site(block, *leaves(), counts=COUNTS)
    (node,) = (n for n in graph.graph.nodes if n.target is lora_glu)
    assert node.args[2] == [2.0, 0.5]


def test_autocast() -> None:
    """bf16 products of fp32 adapters, whose gradients come back in fp32."""

    def block(x, *w):
        with torch.autocast("cpu", torch.bfloat16):
            return mlp(x, *w)

    x, *w = leaves()
    w[0], w[3] = w[0].bfloat16(), w[3].bfloat16()
    result, report, graph = rewritten(block, x.detach().bfloat16().requires_grad_(), *w)
    assert report.counts == COUNTS and not report.missed and targets(graph) == [lora_stack, lora_glu], str(report)
    assert {g.dtype for g in torch.autograd.grad(result.sum(), (w[1], w[2], w[4], w[5]))} == {torch.float32}


def test_what_it_computes_is_counted_once_for_each_op() -> None:
    _, report, _ = rewritten(mlp, *leaves())
    (site,) = (s for s in report.sites if s.pattern == "lora_glu")
    assert site.rule.startswith("lora_glu.py") and site.work.op == "lora_stack + lora_glu" and not site.work.problem
    assert site.work.flops == 2 * 10 * (16 + 5) * 16 + 10 * 8 * (8 + 2 * 5)
    taken = {s.pattern: s.into for s in report.sites if s.pattern != "lora_glu"}
    assert all(into.startswith(("lora_glu", "joint_linears")) for into in taken.values()), taken


@pytest.mark.parametrize("backend_options", [{}, {"residual": "eager"}], ids=["inductor", "eager"])
def test_compiled(backend_options: dict[str, Any]) -> None:
    """Through AOTAutograd, where the activation is computed again and the layers are not."""
    given = leaves()
    torch._dynamo.reset()
    compiled = torch.compile(mlp, backend="fastft", options={**backend_options, "strict": True})
    trained = [t for t in given if t.requires_grad]
    ours, stock = (torch.autograd.grad(fn(*given).square().sum(), trained) for fn in (compiled, mlp))
    torch.testing.assert_close(ours, stock)
    torch._dynamo.reset()


def test_only_the_activation_is_cheap() -> None:
    _, _, graph = rewritten(mlp, *leaves())
    cheap = {n.target: n.meta.get("recompute") is not None for n in graph.graph.nodes if n.target in targets(graph)}
    assert cheap == {lora_stack: False, lora_glu: True}


@pytest.mark.parametrize("compress", [True, False])
def test_nf4(compress: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    bnb = pytest.importorskip("bitsandbytes")
    x, *w = leaves(n=16, k=64)  # a row is a block: bitsandbytes' CPU library is wrong about shorter ones
    packed = [functional.quantize_4bit(w[i], quant_type="nf4", compress_statistics=compress) for i in (0, 3)]

    def block(x, *thin, exact=False):
        x, ys = x * 1.5, []
        for i, (data, state) in enumerate(packed):
            y = (
                F.linear(x, functional.dequantize_4bit(data, state).double())
                if exact
                else bnb.matmul_4bit(x, data, quant_state=state)
            )
            ys.append(y + F.linear(F.linear(x, thin[2 * i]), thin[2 * i + 1]) * 2.0)
        return F.silu(ys[0]) * ys[1]

    graph = check_site(block, x, *w[1:3], *w[4:6], counts=COUNTS, exact=partial(block, exact=True))
    (node,) = (n for n in graph.graph.nodes if n.target is lora_stack)
    assert len(node.kwargs["quant"]) == 2 and targets(graph) == [lora_stack, lora_glu]


def left(fn: Any, *args: torch.Tensor, **options: Any) -> list[str]:
    """Reasons of a graph whose activation stays as the rules before made it."""
    result, report, graph = rewritten(fn, *args, **options)
    assert "lora_glu" not in report.counts and lora_stack not in targets(graph), str(report)
    torch.testing.assert_close(result, fn(*args))
    return [f"{s.status}: {s.reason}" for s in report.sites if s.pattern == "lora_glu"]


def test_no_adapters() -> None:
    """Nothing is added to gate and up: nothing is to be said."""
    functional = pytest.importorskip("bitsandbytes.functional")
    bnb = pytest.importorskip("bitsandbytes")
    x, *w = leaves(n=16, k=64)
    packed = [functional.quantize_4bit(w[i], quant_type="nf4") for i in (0, 3)]

    def block(x):
        x = x * 1.5
        gate, up = (bnb.matmul_4bit(x, data, quant_state=state) for data, state in packed)
        return F.silu(gate) * up

    assert left(block, x) == []


def test_what_is_left() -> None:
    x, *w = leaves()

    def bias(x, *w):
        x, ones = x * 1.5, torch.ones(8)
        return F.silu(lora(x, *w[:3])) * (F.linear(x, w[3], ones) + F.linear(F.linear(x, w[4]), w[5]))

    def escapes(x, *w):
        x = x * 1.5
        gate, up = lora(x, *w[:3]), lora(x, *w[3:6])
        return F.silu(gate) * up, up.sin()

    def two(x, *w):
        x = x * 1.5
        gate = lora(x, *w[:3]) + F.linear(F.linear(x, w[1] * 0.5), w[2])
        return F.silu(gate) * lora(x, *w[3:6])

    def three_layers(x, *w):
        x = x * 1.5
        gate, up = lora(x, *w[:3]), lora(x, *w[3:6])
        return F.silu(gate) * up, lora(x, *w[:3])

    for fn, code in ((bias, "bias"), (escapes, "escapes"), (two, "adapters"), (three_layers, "layers")):
        (reason,) = left(fn, x, *w)
        assert reason.startswith(f"missed: {code}: "), (fn.__name__, reason)
    (reason,) = left(mlp, *leaves(ranks=(65, 2)))
    assert reason.startswith("missed: rank: ")
    trained = [t.requires_grad_() for t in leaves()]
    (reason,) = left(mlp, *trained)
    assert reason.startswith("missed: weight: ")


def test_adapters_in_fp32_beside_bf16_layers() -> None:
    def block(x, *w):
        x, ys = x * 1.5, []
        for weight, a, b in (w[:3], w[3:6]):
            ys.append((F.linear(x, weight) + F.linear(F.linear(x.float(), a), b)).to(x.dtype))
        return F.silu(ys[0]) * ys[1]

    x, *w = leaves(dtype=torch.bfloat16)
    w = [t if i % 3 == 0 else t.detach().float().requires_grad_() for i, t in enumerate(w)]
    _, report, graph = rewritten(block, x, *w)
    (site,) = (s for s in report.missed if s.pattern == "lora_glu")
    assert site.reason.startswith("dtype: gate and up are computed in torch.bfloat16, their adapters in torch.float32")
    assert targets(graph) == [lora_linears, glu]


@pytest.mark.parametrize("op", ["glu", "lora_linears", "lora_glu", "lora_stack"])
def test_variants(op: str) -> None:
    """One of an op before keeps the site; one of the ops here is called in it."""
    given = leaves()
    result, report, graph = rewritten(mlp, *given, variants={op: "reference"})
    torch.testing.assert_close(result, mlp(*given))
    if op in ("glu", "lora_linears"):
        (missed,) = report.missed
        assert missed.pattern == "lora_glu" and missed.reason.startswith("variant: ")
        return
    (site,) = (s for s in report.sites if s.pattern == "lora_glu")
    assert report.counts == COUNTS and site.notes == "variant reference" and len(targets(graph)) == 1


def test_checkpointed_regions() -> None:
    def whole(x, *w):
        return checkpoint(mlp, x, *w, use_reentrant=False)

    _, report, graph = rewritten(whole, *leaves())
    assert report.counts == COUNTS, str(report)
    tagged = [n for n in graph.graph.nodes if n.target in (lora_stack, lora_glu)]
    assert len({n.meta["ac_graph_id"] for n in tagged}) == 1 and all("recompute" in n.meta for n in tagged)

    def layers(x, *w):
        x = x * 1.5
        return lora(x, *w[:3]), lora(x, *w[3:6])

    def across(x, *w):
        gate, up = checkpoint(layers, x, *w, use_reentrant=False)
        return F.silu(gate) * up

    (reason,) = left(across, *leaves())
    assert "checkpointed region" in reason


def test_switched_off_and_out_of_fuel() -> None:
    (reason,) = left(mlp, *leaves(), disable=("lora_glu",))
    assert reason.startswith("skipped: switched off")
    (reason,) = left(mlp, *leaves(), fuel=4)
    assert reason == "skipped: out of fuel"
