"""Norms of heads and rotary after them become one op; what is read in between, or differs, stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastft.kernels.norm_rotary import norm_rotary
from tests.patterns._sites import check_site, rewritten

B, S, D = 2, 5, 16
ALL = {"rms_norm": 2, "rotary": 1, "norm_rotary": 1}


def leaves(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q and k as the projections leave them, and their weights."""
    torch.manual_seed(0)
    shapes = ((B, S, 4, D), (B, S, 2, D), (D,), (D,))
    return [torch.randn(s).to(dtype).requires_grad_() for s in shapes]


def tables() -> list[torch.Tensor]:
    angle = torch.randn(1, S, D // 2).repeat(1, 1, 2)
    return [angle.cos(), angle.sin()]


def norm(x: torch.Tensor, w: torch.Tensor, eps: float = 1e-6, gemma: bool = False) -> torch.Tensor:
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * (1.0 + w.to(h.dtype))).type_as(x) if gemma else w * h.to(x.dtype)


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int = 1) -> torch.Tensor:
    cos, sin = cos.unsqueeze(heads).to(x.dtype), sin.unsqueeze(heads).to(x.dtype)
    first, second = x[..., : D // 2], x[..., D // 2 :]
    return x * cos + torch.cat((-second, first), -1) * sin


def qwen(q, k, qw, kw, cos, sin):
    q, k = norm(q, qw).transpose(1, 2), norm(k, kw).transpose(1, 2)
    return turn(q, cos, sin), turn(k, cos, sin)


def gemma(q, k, qw, kw, cos, sin):
    q, k = (t.transpose(1, 2) for t in (q, k))
    q, k = norm(q, qw, gemma=True), norm(k, kw, gemma=True)
    return turn(q, cos, sin), turn(k, cos, sin)


def joined(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [n for n in graph.graph.nodes if n.target is norm_rotary]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [qwen, gemma])
def test_one_launch(layer: Any, dtype: torch.dtype) -> None:
    graph = check_site(layer, *leaves(dtype), *tables(), counts=ALL)
    (node,) = joined(graph)
    assert node.args[-1] is (layer is qwen), "transposed in between, or before"
    assert node.args[7] == (1.0 if layer is gemma else 0.0)


def test_sequence_first() -> None:
    """FlashAttention's order: nothing is transposed, and the heads come third."""

    def layer(q, k, qw, kw, cos, sin):
        return turn(norm(q, qw), cos, sin, 2), turn(norm(k, kw), cos, sin, 2)

    (node,) = joined(check_site(layer, *leaves(), *tables(), counts=ALL))
    assert node.args[-2:] == (1, False)


def test_exchanged_twice() -> None:
    def layer(q, k, qw, kw, cos, sin):
        q, k = (norm(t.transpose(1, 2), w).transpose(1, 2).permute(0, 2, 1, 3) for t, w in ((q, qw), (k, kw)))
        return turn(q, cos, sin), turn(k, cos, sin)

    (node,) = joined(check_site(layer, *leaves(), *tables(), counts=ALL))
    assert node.args[-1] is False


def test_without_weights() -> None:
    def bare(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def layer(q, k, cos, sin):
        return turn(bare(q).transpose(1, 2), cos, sin), turn(bare(k).transpose(1, 2), cos, sin)

    q, k, *_ = leaves()
    check_site(layer, q, k, *tables(), counts=ALL)


def test_in_a_checkpointed_layer() -> None:
    def inner(*t):
        return tuple(y.sin() for y in qwen(*t))

    def layer(q, *rest):
        return checkpoint(inner, q.cos(), *rest, use_reentrant=False)

    check_site(layer, *leaves(), *tables(), counts=ALL, exact=lambda q, *rest: inner(q.cos(), *rest))


def left(fn: Any, *args: Any, **options: Any) -> list[str]:
    """Reasons of a graph in which nothing was joined, and what it computes is right."""
    result, report, graph = rewritten(fn, *args, **options)
    assert "norm_rotary" not in report.counts and not joined(graph)
    for a, b in zip(result, fn(*args), strict=True):
        torch.testing.assert_close(a, b)
    return [site.reason for site in report.missed if site.pattern == "norm_rotary"]


def test_the_norm_is_read_by_others() -> None:
    def layer(q, k, qw, kw, cos, sin):
        k = norm(k, kw).transpose(1, 2)
        return turn(norm(q, qw).transpose(1, 2), cos, sin), turn(k, cos, sin), k

    (reason,) = left(layer, *leaves(), *tables())
    assert reason.startswith("escapes")


def test_norms_that_differ() -> None:
    def layer(q, k, qw, kw, cos, sin):
        return turn(norm(q, qw).transpose(1, 2), cos, sin), turn(norm(k, kw, 1e-2).transpose(1, 2), cos, sin)

    (reason,) = left(layer, *leaves(), *tables())
    assert reason.startswith("eps: the norms of q and k differ")


def test_one_of_them_has_no_norm() -> None:
    def layer(q, k, qw, cos, sin):
        return turn(norm(q, qw).transpose(1, 2), cos, sin), turn(k.transpose(1, 2), cos, sin)

    q, k, w, _ = leaves()
    assert left(layer, q, k, w, *tables()) == []


def test_a_norm_over_all_heads() -> None:
    """OLMo 2: one row for all heads of a token."""

    def layer(q, k, qw, kw, cos, sin):
        q, k = (norm(t.flatten(2), w.repeat(t.shape[2])).view(t.shape).transpose(1, 2) for t, w in ((q, qw), (k, kw)))
        return turn(q, cos, sin), turn(k, cos, sin)

    assert left(layer, *leaves(), *tables()) == []


def test_a_variant_that_was_chosen_stays() -> None:
    (reason,) = left(qwen, *leaves(), *tables(), variants={"rotary": "reference"})
    assert reason.startswith("variant: variant reference was chosen for")
