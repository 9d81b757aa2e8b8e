"""Layers that read the same input become one op; layers that cannot are left as the rules before made them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from fastft.autotune import variants
from fastft.compare import assert_bitwise
from fastft.kernels.lora_linear import lora_linear, lora_linear_reference, lora_linears
from tests.patterns._sites import check_site, rewritten


def lora(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
    """As PEFT writes it."""
    return F.linear(x, w) + F.linear(F.linear(x, a), b) * scale


def leaves(*widths: int, k: int = 16, rank: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """x, then W, A and B of a layer for each width."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, 5, k), *(size for n in widths for size in ((n, k), (rank, k), (n, rank)))]
    return [(torch.randn(size, generator=generator) * 0.3).to(dtype).requires_grad_() for size in sizes]


def targets(graph: torch.fx.GraphModule) -> list[Any]:
    return [n.target for n in graph.graph.nodes if n.target in (lora_linear, lora_linears)]


def qkv(x: torch.Tensor, *w: torch.Tensor) -> tuple[torch.Tensor, ...]:
    x = x * 1.5
    # q's result is used before k is computed, as in every model.
    q = lora(x, *w[:3]).view(2, 5, 2, 4).transpose(1, 2)
    k = lora(x, *w[3:6], scale=0.5).view(2, 5, 1, 4).transpose(1, 2)
    return q.sin(), k.cos(), lora(x, *w[6:9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_layers_are_one_op(dtype: torch.dtype) -> None:
    counts = {"lora": 3, "joint_linears": 1}
    graph = check_site(qkv, *leaves(8, 4, 4, dtype=dtype), counts=counts)
    assert targets(graph) == [lora_linears]


def test_the_note_says_how_many() -> None:
    _, report, _ = rewritten(qkv, *leaves(8, 4, 4))
    (site,) = (s for s in report.sites if s.pattern == "joint_linears")
    assert site.notes == "3 layers" and site.rule.startswith("joint_linears.py")


def test_layers_by_another_variant_stay_alone_and_it_is_said() -> None:
    """What joins them is another op: the variant that was chosen has no such form."""
    inputs = leaves(8, 4, 4)
    results, report, graph = rewritten(qkv, *inputs, variants={"lora_linear": "reference"})
    assert report.counts == {"lora": 3}, str(report)
    (missed,) = report.missed
    assert missed.pattern == "joint_linears"
    assert missed.reason.startswith("variant: of 3 layers 3 with variant reference, which was chosen for lora_linear")
    calls = [n.target for n in graph.graph.nodes if n.target is lora_linear_reference]
    assert len(calls) == 3
    torch.testing.assert_close(results, qkv(*inputs))


def test_the_others_are_joined_without_a_layer_by_another_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variant that was measured to be faster for q's size alone."""
    stock, reference = variants.choose, variants.get("lora_linear", "reference")

    def choose(op: Any, explicit: Any, args: Any, kwargs: Any) -> Any:
        q = op.name == "lora_linear" and args[1].shape[0] == 8
        return reference if q else stock(op, explicit, args, kwargs)

    monkeypatch.setattr(variants, "choose", choose)
    inputs = leaves(8, 4, 4)
    results, report, graph = rewritten(qkv, *inputs)
    assert report.counts == {"lora": 3, "joint_linears": 1} and not report.missed, str(report)
    (site,) = (s for s in report.sites if s.pattern == "joint_linears")
    assert site.notes == "2 layers; not 1 with variant reference, which was chosen for lora_linear"
    assert targets(graph) == [lora_linears]
    torch.testing.assert_close(results, qkv(*inputs))


def test_two_groups() -> None:
    def attention(x, *w):
        q, k, v = qkv(x, *w[:9])
        y = torch.cat([q.transpose(1, 2).reshape(2, 5, 8), k.transpose(1, 2).reshape(2, 5, 4), v], -1)
        return F.silu(lora(y, *w[9:12])) - lora(y, *w[12:15])

    check_site(attention, *leaves(8, 4, 4, 6, 6), counts={"lora": 5, "joint_linears": 2})


def test_fewer_adapters_than_layers() -> None:
    """A dense layer without an adapter is no site of ours, and stands between two that are."""

    def layers(x, *w):
        x = x.sin()
        return lora(x, *w[:3]), F.linear(x, w[6]), lora(x, *w[3:6])

    graph = check_site(layers, *leaves(8, 4, 4)[:8], counts={"lora": 2, "joint_linears": 1})
    assert targets(graph) == [lora_linears]


def test_a_layer_that_takes_the_stream_up_stays_alone() -> None:
    """Parallel attention and MLP: the output layer of one reads what a layer of the other reads."""

    def layers(x, w, v, z, *more):
        x = x.sin()
        return z + F.linear(x, v), lora(x, w, *more[:2]), lora(x, *more[2:5])

    x, w, a, b, *rest = leaves(8, 4)
    v, z = torch.randn(6, 16, requires_grad=True), torch.randn(2, 5, 6, requires_grad=True)
    graph = check_site(layers, x, w, v, z, a, b, *rest, counts={"lora": 2, "residual": 1, "joint_linears": 1})
    assert sorted(t.__name__ for t in targets(graph)) == ["lora_linear", "lora_linears"]


@pytest.mark.parametrize("adapted", [(True, True), (True, False), (False, False)], ids=str)
def test_nf4(adapted: tuple[bool, bool]) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    bnb = pytest.importorskip("bitsandbytes")
    x, *w = leaves(16, 32, k=64)  # a row is a block: bitsandbytes' CPU library is wrong about shorter ones
    packed = [functional.quantize_4bit(w[i].detach(), quant_type="nf4", compress_statistics=True) for i in (0, 3)]

    def stock(x, data, state):
        return bnb.matmul_4bit(x, data, quant_state=state)

    def exact(x, data, state):
        return F.linear(x, functional.dequantize_4bit(data, state).double())

    def layers(linear, x, *w):
        x = x * 1.5
        ys = []
        for i, (data, state) in enumerate(packed):
            y = linear(x, data, state)
            ys.append(y + F.linear(F.linear(x, w[2 * i]), w[2 * i + 1]) * 2.0 if adapted[i] else y)
        return tuple(ys)

    x, *thin = (t.detach().requires_grad_() for t in (x, *w[1:3], *w[4:6]))
    used = [t for i, t in enumerate(thin) if adapted[i // 2]]
    counts = {"joint_linears": 1} | ({"lora": n} if (n := sum(adapted)) else {}) | ({"nf4": 2 - n} if n < 2 else {})

    def run(x, *used, linear=stock):
        given = iter(used)
        return layers(linear, x, *(next(given) if adapted[i // 2] else None for i in range(4)))

    graph = check_site(run, x, *used, counts=counts, exact=partial(run, linear=exact))
    assert targets(graph) == [lora_linears]


def alone(x, *w):
    return lora(x.sin(), *w[:3])


def other_inputs(x, *w):
    return lora(x.sin(), *w[:3]), lora(x.cos(), *w[3:6])


def own_dropout(x, *w):
    x = x.sin()
    return tuple(F.linear(x, w[i]) + F.linear(F.linear(F.dropout(x, 0.5), w[i + 1]), w[i + 2]) * 2.0 for i in (0, 3))


def one_after_the_other(x, *w):
    """Both read x, but the second's adapter is computed from the first's result."""
    x = x.sin()
    first = lora(x, *w[:3])
    return first, lora(x, w[3], w[4] * first.mean(), w[5])


@pytest.mark.parametrize("layers", [alone, other_inputs, own_dropout], ids=lambda f: f.__name__)
def test_not_joined(layers: Any) -> None:
    _, report, graph = rewritten(layers, *leaves(8, 8))
    assert "joint_linears" not in report.counts and not report.missed, str(report)
    assert set(targets(graph)) == {lora_linear}


def test_adapters_in_different_dtypes() -> None:
    def layers(x, *w):
        x = x.sin()
        ys = F.linear(x, w[0]) + F.linear(F.linear(x.float(), w[1]), w[2]).to(x.dtype)
        return ys, lora(x, *w[3:6])

    x, *w = leaves(8, 8, dtype=torch.bfloat16)
    w[1:3] = [t.detach().float().requires_grad_() for t in w[1:3]]
    _, report, _ = rewritten(layers, x, *w)
    assert report.counts.get("lora") == 2 and "joint_linears" not in report.counts, str(report)
    (site,) = report.missed
    assert site.pattern == "joint_linears" and site.reason.startswith("dtype"), site


def test_an_operand_that_comes_too_late() -> None:
    _, report, graph = rewritten(one_after_the_other, *leaves(8, 8))
    (site,) = (s for s in report.missed if s.pattern == "joint_linears")
    assert site.pattern == "joint_linears" and site.reason.startswith("order"), site
    assert targets(graph) == [lora_linear] * 2


def test_a_weight_written_in_between() -> None:
    """The second layer must see what was written after the first one ran."""

    def layers(x, *w):
        x = x.sin()
        late = w[3] * 1.0
        first = lora(x, *w[:3])
        late.add_(1.0)
        return first, lora(x, late, *w[4:6])

    given = leaves(8, 8)
    result, report, graph = rewritten(layers, *given)
    assert "joint_linears" not in report.counts and targets(graph) == [lora_linear] * 2, str(report)
    for ours, theirs in zip(result, layers(*given), strict=True):
        assert_bitwise("result", ours, theirs)


def test_not_across_checkpoint_regions() -> None:
    def layers(x, *w):
        x = x.sin()
        first = checkpoint(lora, x, *w[:3], use_reentrant=False)
        return first, checkpoint(lora, x, *w[3:6], use_reentrant=False)

    _, report, graph = rewritten(layers, *leaves(8, 8))
    assert report.counts == {"lora": 2}, str(report)
    assert targets(graph) == [lora_linear] * 2


def test_within_a_checkpoint_region() -> None:
    def layers(x, *w):
        return checkpoint(qkv, x, *w, use_reentrant=False)

    _, report, graph = rewritten(layers, *leaves(8, 4, 4))
    assert report.counts == {"lora": 3, "joint_linears": 1}, str(report)
    (joint,) = (n for n in graph.graph.nodes if n.target is lora_linears)
    for node in (joint, *joint.users):
        assert "recompute" in node.meta and "ac_graph_id" in node.meta


def test_switched_off_and_out_of_fuel() -> None:
    for options, why in (({"disable": ("joint_linears",)}, "switched off"), ({"fuel": 3}, "out of fuel")):
        _, report, graph = rewritten(qkv, *leaves(8, 4, 4), **options)
        assert report.counts == {"lora": 3} and targets(graph) == [lora_linear] * 3
        (site,) = (s for s in report.sites if s.pattern == "joint_linears")
        assert why in site.reason
