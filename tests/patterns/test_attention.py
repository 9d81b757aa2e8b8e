"""Attention sites: repeated keys and dense masks go, what is not understood stays as an operand, with its reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastft.compare import assert_within
from fastft.kernels.attention import attention, attention_mask
from fastft.patterns.attention import rounded_attention
from tests.patterns._sites import check_site, exactly, rewritten

B, HQ, HK, S, D = 2, 4, 2, 12, 8


def leaves(*, hq: int = HQ, hk: int = HK, d_v: int = D, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((B, hq, S, D), (B, hk, S, D), (B, hk, S, d_v))
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


def repeat_kv(x: torch.Tensor, n: int) -> torch.Tensor:
    b, h, s, d = x.shape
    return x[:, :, None, :, :].expand(b, h, n, s, d).reshape(b, h * n, s, d)


def causal(m: torch.Tensor | None = None, window: int = 0) -> torch.Tensor:
    q, k = torch.arange(S)[None, None, :, None], torch.arange(S)[None, None, None, :]
    mask = k <= q
    if window:
        mask = mask & (k > q - window)
    if m is not None:
        mask = mask & m.to(torch.bool)[torch.arange(B)[:, None, None, None], k]
    return mask.expand(B, 1, S, S)


def padding() -> torch.Tensor:
    m = torch.ones(B, S, dtype=torch.int64)
    m[1, :4] = 0
    return m


def site(graph: torch.fx.GraphModule) -> torch.fx.Node:
    (node,) = (n for n in graph.graph.nodes if n.target in (attention, rounded_attention))
    return node


def notes(fn, *args) -> str:
    (found,) = rewritten(fn, *args)[1].sites
    return found.notes


def dense_nodes(graph: torch.fx.GraphModule) -> list[str]:
    """Values that still have a mask's [.., S, S]."""
    return [n.name for n in graph.graph.nodes if getattr(n.meta.get("example_value"), "shape", ())[-2:] == (S, S)]


def sdpa(q, k, v, mask=None, **kwargs):
    return F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2), attn_mask=mask, **kwargs)


def test_causal_with_repeated_keys() -> None:
    graph = check_site(lambda q, k, v: sdpa(q, k, v, causal(), scale=0.3), *leaves(), counts={"attention": 1})
    node = site(graph)
    assert node.kwargs["causal"] and node.kwargs["scale"] == 0.3 and node.args[1].meta["example_value"].shape[1] == HK
    assert not dense_nodes(graph)
    assert notes(lambda q, k, v: sdpa(q, k, v, causal()), *leaves()) == "causal; 4 query heads on 2"


@pytest.mark.parametrize("window", [0, 5])
def test_padding_is_looked_at_once_for_all_layers(window: int) -> None:
    def layers(q, k, v, m):
        mask = causal(m, window)
        return sdpa(sdpa(q, k, v, mask), k, v, mask)

    graph = check_site(layers, *leaves(), padding(), counts={"attention": 2})
    assert sum(n.target is attention_mask for n in graph.graph.nodes) == 1
    assert not dense_nodes(graph)


def test_two_kinds_of_mask_share_the_padding() -> None:
    def layers(q, k, v, m):
        return sdpa(sdpa(q, k, v, causal(m)), k, v, causal(m, 5))

    graph = check_site(layers, *leaves(), padding(), counts={"attention": 2})
    assert sum(n.target is attention_mask for n in graph.graph.nodes) == 1


def test_packed_and_chunked() -> None:
    positions = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.arange(S)])

    def layer(q, k, v, p):
        ids = (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)
        b = torch.arange(B)[:, None, None, None]
        rows, cols = torch.arange(S)[None, None, :, None], torch.arange(S)[None, None, None, :]
        same = ids[b, rows] == ids[b, cols]
        return sdpa(q, k, v, causal() & same & (cols // 4 == rows // 4))

    graph = check_site(layer, *leaves(), positions, counts={"attention": 1})
    assert not dense_nodes(graph) and site(graph).kwargs["chunk"] == 4


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_a_mask(is_causal: bool) -> None:
    graph = check_site(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True),
        *leaves(),
        counts={"attention": 1},
    )
    assert site(graph).kwargs.get("causal", False) is is_causal


def test_no_groups() -> None:
    check_site(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=causal()),
        *leaves(hk=HQ),
        counts={"attention": 1},
    )


def test_values_of_another_width() -> None:
    """DeepSeek's: the heads of v are narrower."""
    check_site(lambda q, k, v: sdpa(q, k, v, causal()), *leaves(d_v=6), counts={"attention": 1})


def test_an_empty_cache_before_the_keys() -> None:
    def layer(q, k, v):
        k, v = (torch.cat([torch.tensor([]), t], dim=-2) for t in (k, v))
        return sdpa(q, k, v, causal()), k, v

    (out, *_), report, _ = rewritten(layer, *leaves())
    assert report.counts == {"attention": 1}
    assert_within("out", out, layer(*leaves())[0], exactly(layer, *leaves())[0][0], length=S)


def test_a_filled_cache_is_not_looked_through() -> None:
    def layer(q, k, v, old):
        k = torch.cat([old, k], dim=-2)
        v = torch.cat([old, v], dim=-2)
        return F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2))

    graph = check_site(layer, *leaves(), torch.randn(B, HK, 3, D), counts={"attention": 1})
    assert site(graph).args[1].meta["example_value"].shape == (B, HK, S + 3, D)


@pytest.mark.parametrize("mask", [torch.rand(B, 1, S, S) > 0.3, torch.randn(1, HQ, S, S)], ids=["bool", "additive"])
def test_an_unknown_mask_stays_as_an_operand(mask: torch.Tensor) -> None:
    graph = check_site(sdpa, *leaves(), mask, counts={"attention": 1})
    assert site(graph).kwargs["dense"] is not None and site(graph).args[1].meta["example_value"].shape[1] == HK
    assert notes(sdpa, *leaves(), mask).startswith("dense: the mask")


def test_a_window_that_is_not_causal_stays_dense() -> None:
    def layer(q, k, v):
        rows, cols = torch.arange(S)[None, None, :, None], torch.arange(S)[None, None, None, :]
        return sdpa(q, k, v, cols > rows - 3)

    graph = check_site(layer, *leaves(), counts={"attention": 1})
    assert site(graph).kwargs["dense"] is not None and "causal" in notes(layer, *leaves())


def test_padding_without_causality() -> None:
    def layer(q, k, v, m):
        return sdpa(q, k, v, m.bool()[:, None, None, :].expand(B, 1, S, S))

    graph = check_site(layer, *leaves(), padding(), counts={"attention": 1})
    assert not dense_nodes(graph)


def test_autocast_rounds_to_one_dtype() -> None:
    def layer(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return sdpa(q, k, v.bfloat16(), causal())

    graph = check_site(layer, *leaves(), counts={"attention": 1})
    assert site(graph).target is rounded_attention and site(graph).kwargs["to"] == torch.bfloat16


def refused(fn, *args, code: str) -> None:
    _, report, _ = rewritten(fn, *args)
    assert not report.counts
    (found,) = report.sites
    assert found.reason.startswith(f"{code}:"), found


def test_reasons() -> None:
    refused(lambda q, k, v: sdpa(q, k, v, causal(), dropout_p=0.1), *leaves(), code="dropout")
    bias = torch.randn(1, HQ, S, S, requires_grad=True)
    refused(sdpa, *leaves(), bias, code="mask")
    refused(lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), *leaves(hk=HQ), code="shape")
    refused(
        lambda q, k, v: F.scaled_dot_product_attention(q[:, :, :5], k, v, is_causal=True), *leaves(hk=HQ), code="shape"
    )


@pytest.mark.parametrize("insert", [lambda t: t[:, None], lambda t: t.unsqueeze(1)], ids=["index", "unsqueeze"])
def test_repeats_of_another_kind_are_not_looked_through(insert) -> None:
    """Heads in another order ([group, head] and not [head, group]), and repeats along another axis."""

    def tiled(q, k, v):
        k, v = (insert(t).expand(B, 2, HK, S, D).reshape(B, HQ, S, D) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal())

    graph = check_site(tiled, *leaves(), counts={"attention": 1})
    assert site(graph).args[1].meta["example_value"].shape[1] == HQ


def test_only_one_of_two_repeated() -> None:
    def layer(q, k, v):
        return F.scaled_dot_product_attention(q, repeat_kv(k, 2), v, attn_mask=causal())

    q, k, _ = leaves()
    check_site(layer, q, k, torch.randn(B, HQ, S, D, requires_grad=True), counts={"attention": 1})


def test_eager_attention_is_reported_as_missed() -> None:
    def eager(q, k, v):
        scores = torch.matmul(q, repeat_kv(k, 2).transpose(2, 3)) * 0.3
        return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), repeat_kv(v, 2))

    def sinks(q, k, v, sink):
        """gpt-oss: a learned score that takes part in the softmax and reaches no value."""
        scores = torch.matmul(q, repeat_kv(k, 2).transpose(2, 3)) * 0.3 + torch.zeros(S, S)
        both = torch.cat([scores, sink.reshape(1, -1, 1, 1).expand(B, -1, S, -1)], dim=-1)
        both = both - both.max(dim=-1, keepdim=True).values
        return torch.matmul(F.softmax(both, dim=-1, dtype=torch.float32)[..., :-1].to(q.dtype), repeat_kv(v, 2))

    for fn, args in ((eager, leaves()), (sinks, [*leaves(), torch.zeros(HQ)])):
        _, report, _ = rewritten(fn, *args)
        (missed,) = report.missed
        assert missed.pattern == "attention" and "eager" in missed.reason
