"""Attention sites: repeated keys and dense masks go, what is not understood stays as an operand, with its reason."""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from fastft import _torch_compat as compat
from fastft.compare import assert_within
from fastft.kernels._attention_mask import attention_mask
from fastft.kernels.attention import attention
from fastft.normalise import normalise
from fastft.options import Options
from fastft.patterns.attention import rounded_attention
from fastft.rewrite import Rewritten, rewrite
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
    refused(lambda q, k, v: sdpa(q, k, v, causal(), dropout_p=1.0), *leaves(), code="dropout")
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


# ---------------------------------------------------------------- written out

LOWEST = torch.finfo(torch.float32).min


def written(q, k, v, mask=None, *, cap=0.0, sinks=None, dropout=0.0):
    """transformers' ``eager_attention_forward``, with Gemma 2's cap and gpt-oss's sinks."""
    k, v = (repeat_kv(t, q.shape[1] // t.shape[1]) for t in (k, v))
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
    if cap:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores + mask
    if sinks is None:
        p = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    else:
        scores = torch.cat([scores, sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)], dim=-1)
        scores = scores - scores.max(dim=-1, keepdim=True).values
        p = F.softmax(scores, dim=-1, dtype=scores.dtype)[..., :-1]
    return torch.matmul(F.dropout(p, p=dropout, training=True).to(v.dtype), v).transpose(1, 2).contiguous()


def added(mask: torch.Tensor) -> torch.Tensor:
    """transformers' ``eager_mask``."""
    return torch.where(mask, torch.tensor(0.0), LOWEST)


def sink() -> torch.Tensor:
    return torch.randn(HQ, generator=torch.Generator().manual_seed(3)).requires_grad_()


def test_written_out() -> None:
    graph = check_site(lambda q, k, v: written(q, k, v, added(causal())), *leaves(), counts={"attention": 1})
    node = site(graph)
    assert node.kwargs["causal"] and node.kwargs["scale"] == 0.3 and node.args[1].meta["example_value"].shape[1] == HK
    assert not dense_nodes(graph) and "blind" not in node.kwargs


def test_a_cap() -> None:
    graph = check_site(
        lambda q, k, v: written(q, k, v, added(causal(window=5)), cap=2.0), *leaves(), counts={"attention": 1}
    )
    assert site(graph).kwargs["softcap"] == 2.0 and site(graph).kwargs["window"] == 5
    assert not dense_nodes(graph)


@pytest.mark.parametrize("padded", [False, True])
def test_sinks(padded: bool) -> None:
    """A sink takes all of what a query that sees no key would give."""

    def layer(q, k, v, sinks, m):
        return written(q, k, v, added(causal(m if padded else None)), sinks=sinks)

    graph = check_site(layer, *leaves(), sink(), padding(), counts={"attention": 1})
    assert site(graph).kwargs["sinks"].op == "placeholder" and not dense_nodes(graph)
    assert "blind" not in site(graph).kwargs
    assert notes(layer, *leaves(), sink(), padding()).endswith("; sinks; 4 query heads on 2")


def test_queries_of_padding_give_a_mean() -> None:
    """One finite number for every key is no mask, and softmax gives all of them the same weight."""

    def layer(q, k, v, m):
        return written(q, k, v, added(causal(m)))

    graph = check_site(layer, *leaves(), padding(), counts={"attention": 1})
    assert site(graph).kwargs["blind"] == "added" and not dense_nodes(graph)


@pytest.mark.parametrize("blocked", [False, True])
def test_an_added_mask_in_sdpa(blocked: bool) -> None:
    def layer(q, k, v, m):  # PyTorch's own gradient of a query that sees no key takes every weight for 1
        return sdpa(q, k, v, added(causal(m if blocked else None))) * m[:, None, :, None]

    graph = check_site(layer, *leaves(), padding(), counts={"attention": 1})
    assert not dense_nodes(graph) and site(graph).kwargs.get("blind") == ("added" if blocked else None)


def later() -> torch.Tensor:
    return torch.arange(S)[None, :] > torch.arange(S)[:, None]


OF_SCORES = {
    "fill": lambda s: s.masked_fill(~causal(), LOWEST),
    "fill by a function": lambda s: torch.masked_fill(s, torch.logical_not(causal()), float("-inf")),
    "fill above the diagonal": lambda s: s.masked_fill(torch.ones(S, S).triu(diagonal=1).bool(), -1e9),
    "fill later keys": lambda s: s.masked_fill(later(), -1e9),
    "fill where tril is 0": lambda s: s.masked_fill(torch.tril(torch.ones(S, S)) == 0, float("-inf")),
    "where seen": lambda s: torch.where(causal(), s, LOWEST),
    "where hidden": lambda s: torch.where(~causal(), torch.full((), LOWEST), s),
    "triu": lambda s: s + torch.triu(torch.full((S, S), float("-inf")), diagonal=1),
    "filled zeros": lambda s: s + torch.zeros(S, S).masked_fill(later(), float("-inf"))[None, None],
    "mask first": lambda s: torch.where(causal(), 0.0, -1e9) + s,
}


@pytest.mark.parametrize("spelling", OF_SCORES)
def test_ways_to_mask(spelling: str) -> None:
    def layer(q, k, v):
        scores = OF_SCORES[spelling](q @ k.transpose(-2, -1) / 3.0)
        return scores.softmax(-1) @ v

    graph = check_site(layer, *leaves(hk=HQ), counts={"attention": 1})
    assert site(graph).kwargs["causal"] and not dense_nodes(graph)


def test_hidden_padding() -> None:
    def layer(q, k, v, m):
        scores = (q @ k.transpose(-2, -1)).masked_fill((m == 0)[:, None, None, :], -1e9)
        return scores.softmax(-1) @ v

    graph = check_site(layer, *leaves(hk=HQ), padding(), counts={"attention": 1})
    assert not dense_nodes(graph) and site(graph).kwargs["blind"] == "filled"


def test_products_by_einsum() -> None:
    def layer(q, k, v):
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * 0.3
        return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, dim=-1), v)

    check_site(layer, *leaves(hk=HQ), counts={"attention": 1})
    check_site(
        lambda q, k, v: torch.einsum("bhij, bhjd -> bhid", (q @ k.transpose(3, 2)).softmax(-1), v),
        *leaves(hk=HQ),
        counts={"attention": 1},
    )


def test_keys_of_another_sequence() -> None:
    def layer(q, k, v, m):
        return written(q, k, v, added(m.bool()[:, None, None, :].expand(B, 1, 5, S)))

    q, k, v = leaves(d_v=6)
    check_site(layer, q[:, :, :5].detach().requires_grad_(), k, v, padding(), counts={"attention": 1})


@pytest.mark.parametrize("way", [sdpa, written])
def test_dropout(way) -> None:
    """It is the op's; its weights are those that the op draws."""

    def layer(q, k, v):
        more = {"dropout_p": 0.5} if way is sdpa else {"dropout": 0.5}
        return way(q, k, v, causal() if way is sdpa else added(causal()), **more)

    args = leaves()
    torch.manual_seed(5)
    result, report, graph = rewritten(layer, *args)
    assert report.counts == {"attention": 1} and not report.missed
    assert site(graph).kwargs["dropout_p"] == 0.5
    torch.manual_seed(5)
    wanted = attention(*args, causal=True, dropout_p=0.5, scale=site(graph).kwargs.get("scale"))
    torch.testing.assert_close(result, wanted if way is sdpa else wanted.transpose(1, 2))


@pytest.mark.parametrize("options", [{"attention_dropout": False}, {"verify": "first_step"}], ids=str)
def test_dropout_that_is_left(options: dict[str, Any]) -> None:
    """Where eager's numbers are wanted, PyTorch draws them."""

    def layer(q, k, v):
        return sdpa(q, k, v, causal(), dropout_p=0.5)

    args = leaves()
    torch.manual_seed(5)
    result, report, _ = rewritten(layer, *args, **options)
    (missed,) = report.missed
    assert missed.reason == "dropout: the op draws attention's dropout of 0.5 itself, and eager's is wanted"
    torch.manual_seed(5)
    torch.testing.assert_close(result, layer(*args))


def test_a_mask_that_is_not_known_stays() -> None:
    mask = torch.rand(B, 1, S, S) > 0.3
    for layer in (
        lambda q, k, v, m: written(q, k, v, m.float() * -3.0),
        lambda q, k, v, m: (q @ k.transpose(2, 3)).masked_fill(m, -1e9).softmax(-1) @ v,
        lambda q, k, v, m: torch.where(m, q @ k.transpose(2, 3), float("-inf")).softmax(-1) @ v,
    ):
        graph = check_site(layer, *leaves(hk=HQ), mask, counts={"attention": 1})
        assert site(graph).kwargs["dense"] is not None
        assert notes(layer, *leaves(hk=HQ), mask).startswith("dense: the mask")


def test_a_mask_that_hides_too_little() -> None:
    """Where every key is hidden, what −10,000 is added to still counts."""

    def layer(q, k, v, m):
        return written(q, k, v, torch.where(causal(m), 0.0, -1e4))

    graph = check_site(layer, *leaves(), padding(), counts={"attention": 1})
    assert site(graph).kwargs["dense"] is not None

    def less(q, k, v):
        return written(q, k, v, torch.where(causal(), 0.0, -3.0))

    assert site(check_site(less, *leaves(), counts={"attention": 1})).kwargs["dense"] is not None


def test_reasons_of_what_is_written_out() -> None:
    refused(written, *leaves(), torch.randn(1, HQ, S, S, requires_grad=True), code="mask")

    def weights_too(q, k, v):
        p = (q @ k.transpose(2, 3)).softmax(-1)
        return p @ v, p

    refused(weights_too, *leaves(hk=HQ), code="escapes")


@pytest.mark.parametrize(
    "layer",
    [
        lambda q, k, v: (q @ k.transpose(2, 3)).softmax(-2) @ v,
        lambda q, k, v: (q @ k.transpose(2, 3)).softmax(-1).transpose(2, 3) @ v,
        lambda q, k, v: (torch.tanh((q @ k.transpose(2, 3)) / 2.0) * 3.0).softmax(-1) @ v,
        lambda q, k, v: (q @ k.transpose(2, 3)).softmax(-1)[..., :-1] @ v[:, :, 1:],
        lambda q, k, v: (q @ k.transpose(2, 3)).masked_fill(causal(), 0.0).softmax(-1) @ v,
        lambda q, k, v: torch.einsum("bhqk,bhdk->bhqd", (q @ k.transpose(2, 3)).softmax(-1), v.transpose(2, 3)),
    ],
    ids=["other axis", "transposed", "other cap", "cut without sinks", "filled with 0", "other product"],
)
def test_near_misses(layer) -> None:
    result, report, _ = rewritten(layer, *leaves(hk=HQ))
    assert not report.counts, report
    torch.testing.assert_close(result, layer(*leaves(hk=HQ)))


@pytest.mark.parametrize("what", ["of each query", "two for each head", "in front"])
def test_what_is_no_sink(what: str) -> None:
    def layer(q, k, v, more):
        scores = q @ k.transpose(2, 3)
        both = [scores, more.expand(B, HQ, S, -1)]
        p = torch.cat(both[::-1] if what == "in front" else both, dim=-1).softmax(-1)
        return p[..., : -more.shape[-1]] @ v if what != "in front" else p[..., :-1] @ v

    more = torch.randn(*{"of each query": (1, 1, S, 1), "two for each head": (1, HQ, 1, 2)}.get(what, (1, HQ, 1, 1)))
    result, report, _ = rewritten(layer, *leaves(hk=HQ), more)
    assert not report.counts
    torch.testing.assert_close(result, layer(*leaves(hk=HQ), more))


# ---------------------------------------------------------------- varlen_attn

T, CU = 24, (0, 9, 10, 24)
VARLEN_TAKES = frozenset(inspect.signature(varlen_attn).parameters)


def rows(hk: int = HK) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(T, h, D, requires_grad=True) for h in (HQ, hk, hk)]


def documents(q, k, v, cu, window=(-1, 0), scale=None, **kwargs):
    """What varlen_attn means, document by document."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    found = []
    edges = sorted({*cu.tolist(), len(q)})
    for a, b in itertools.pairwise(edges):
        distance = torch.arange(b - a)[:, None] - torch.arange(b - a)
        shown = (distance >= 0) & (distance <= (window[0] if window[0] >= 0 else T))
        found.append(
            F.scaled_dot_product_attention(
                *(t[a:b].transpose(0, 1) for t in (q, k, v)), attn_mask=shown, scale=scale
            ).transpose(0, 1)
        )
    return torch.cat(found)


def varlen(q, k, v, cu, window=(-1, 0), scale=None, longest=14, of_keys=None, **kwargs):
    of_keys = cu if of_keys is None else of_keys
    if "enable_gqa" in VARLEN_TAKES:  # torch 2.11 takes heads as they are
        kwargs["enable_gqa"] = q.shape[1] != k.shape[1]
    return varlen_attn(q, k, v, cu, of_keys, longest, longest, window_size=window, scale=scale, **kwargs)


@pytest.mark.parametrize("cu", [CU, (0, T), (0, 5, 5, T), (0, 7, 20)], ids=["three", "one", "an empty one", "a rest"])
@pytest.mark.parametrize("options", [{}, {"window": (4, 0)}, {"scale": 0.3}], ids=str)
def test_varlen(cu: tuple[int, ...], options: dict[str, Any]) -> None:
    args, of = rows(), torch.tensor(cu, dtype=torch.int32)
    result, report, _ = rewritten(lambda q, k, v, cu: varlen(q, k, v, cu, **options), *args, of)
    assert report.counts == {"attention": 1} and not report.missed, str(report)
    assert notes(lambda q, k, v, cu: varlen(q, k, v, cu, **options), *args, of).startswith("causal & ")
    wanted = documents(*args, of, **options)
    torch.testing.assert_close(result, wanted)
    do = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(t, args, do) for t in (result, wanted)), strict=True):
        torch.testing.assert_close(a, b)
    assert report.sites[0].work.flops and not report.sites[0].work.problem


def test_layers_of_varlen_look_once() -> None:
    def layers(q, k, v, cu):
        return varlen(varlen(q, k, v, cu), k, v, cu)

    _, report, graph = rewritten(layers, *rows(), torch.tensor(CU, dtype=torch.int32))
    assert report.counts == {"attention": 2}
    assert sum(n.target is attention_mask for n in graph.graph.nodes) == 1


def test_varlen_of_any_length_and_number() -> None:
    """Two graphs, one of these sizes and one of all."""
    graphs: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        normalise(gm)
        graphs.append(rewrite(gm, Options.of({}), compat.fake_mode_of(gm)))
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v, cu: varlen(q, k, v, cu), backend=backend, fullgraph=True)
    for of in (CU, (0, 3, 20), (0, 1, 2, 3, 4, 21), (0, 19)):
        q, k, v = (t[: of[-1]] for t in rows())
        cu = torch.tensor(of, dtype=torch.int32)
        torch.testing.assert_close(compiled(q, k, v, cu), documents(q, k, v, cu))
    assert len(graphs) == 2 and all(not g.sites[0].reason for g in graphs), [g.sites for g in graphs]
    torch._dynamo.reset()


def test_varlen_that_is_left() -> None:
    cu = torch.tensor(CU, dtype=torch.int32)
    for change, code in (
        ({"window": (-1, -1)}, "mask"),
        ({"window": (2, 2)}, "mask"),
        ({"of_keys": cu.clone()}, "mask"),
        ({"seqused_k": torch.ones(3, dtype=torch.int32)}, "mask"),
    ):
        if "seqused_k" in change and "seqused_k" not in VARLEN_TAKES:
            continue  # torch 2.11
        graphs: list[Rewritten] = []

        def backend(gm: torch.fx.GraphModule, inputs: list[Any], graphs: list[Rewritten] = graphs) -> Any:
            graphs.append(rewrite(gm, Options.of({}), compat.fake_mode_of(gm)))
            return lambda *inputs: (torch.zeros(T, HQ, D),)  # there is no such kernel for a CPU

        torch._dynamo.reset()
        torch.compile(functools.partial(varlen, **change), backend=backend, fullgraph=True)(
            *map(torch.detach, rows()), cu
        )
        (found,) = graphs[0].sites
        assert found.reason.startswith(f"{code}:") and found.status == "missed", found
    torch._dynamo.reset()


def test_other_libraries_kernels_are_reported() -> None:
    """FlashAttention's, as transformers calls it, stays where it is."""
    q, k, v = (t.detach() for t in leaves(hk=HQ, d_v=D))
    with torch.library._scoped_library("flash_attn_test", "DEF") as library:
        library.define("_flash_attn_forward(Tensor q, Tensor k, Tensor v) -> Tensor")
        library.impl("_flash_attn_forward", lambda q, k, v: q + k + v, "CompositeImplicitAutograd")
        op = torch.ops.flash_attn_test._flash_attn_forward
        result, report, graph = rewritten(lambda q, k, v: op(q, k, v), q, k, v)
    assert [s.reason for s in report.missed if "FlashAttention" in s.reason], report
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [op] and not report.counts
    assert torch.equal(result, q + k + v)
