"""FlexAttention's calls: what its functions say is recovered with the blocks that belong to it, and nothing else is
believed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastft.kernels._attention_mask import attention_mask
from fastft.kernels.attention import attention
from tests.patterns._sites import rewritten

B, HQ, HK, S, D = 2, 4, 2, 24, 16
Mod = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def trained_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention itself has no gradients there; its call in a graph is what it is on a GPU."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)


def leaves(hk: int = HK) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, h, S, D, requires_grad=True) for h in (HQ, hk, hk)]


def padding() -> torch.Tensor:
    m = torch.ones(B, S, dtype=torch.bool)
    m[1, :4] = False
    return m


def positions() -> torch.Tensor:
    return torch.stack([torch.cat([torch.arange(9), torch.arange(15)]), torch.arange(S)])


def dense(q, k, v, shown=None, score_mod=None, scale=None, sinks=None):
    """What FlexAttention means."""
    k, v = (t.repeat_interleave(HQ // t.shape[1], 1) for t in (k, v))
    s = q @ k.transpose(2, 3) * (D**-0.5 if scale is None else scale)
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in s.shape), indexing="ij")
    s = s if score_mod is None else score_mod(s, b, h, i, j)
    s = s if shown is None else torch.where(shown(b, h, i, j), s, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    return torch.softmax(s, -1).nan_to_num(0.0)[..., : k.shape[2]] @ v


def by_flex(q, k, v, shown=None, score_mod=None, scale=None, batch=B):
    mask = None if shown is None else create_block_mask(shown, batch, None, S, S, device="cpu")
    return flex_attention(q, k, v, score_mod, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def check(shown: Callable[..., Mod] | None, *more: torch.Tensor, score_mod: Any = None, scale: Any = None) -> Any:
    """Recovered, and it is what it means: ``shown(*more)`` is the mask_mod, ``score_mod(*more)`` the score_mod."""

    def run(way: Any) -> Any:
        def called(q: Any, k: Any, v: Any, *more: Any) -> Any:
            mods = None if shown is None else shown(*more), None if score_mod is None else score_mod(*more)
            return way(q, k, v, *mods, scale)

        return called

    args = (*leaves(), *more)
    result, report, graph = rewritten(run(by_flex), *args)
    assert report.counts == {"attention": 1} and not report.missed, str(report)
    names = [str(n.target) for n in graph.graph.nodes]
    assert not any("flex" in n or "batch_dim" in n or "setitem" in n for n in names), names
    wanted = run(dense)(*args)
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)
    do = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(t, args[:3], do) for t in (result, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    (site,) = report.sites
    (node,) = (n for n in graph.graph.nodes if n.target is attention)
    return site.notes, node.kwargs


def causal(b, h, q, k):
    return q >= k


def same_document(ids: torch.Tensor) -> Mod:
    return lambda b, h, q, k: (q >= k) & (ids[b, q] == ids[b, k])


def documents(p: torch.Tensor) -> torch.Tensor:
    return (torch.diff(p, prepend=p[:, :1] - 1, dim=-1) != 1).cumsum(-1)


MASKS: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "none": (None, (), "full"),
    "causal": (lambda: causal, (), "causal"),
    "all": (lambda: lambda b, h, q, k: q >= 0, (), "full"),
    "window": (lambda: lambda b, h, q, k: (q >= k) & (q - k < 5), (), "causal & window(5)"),
    "window by <=": (lambda: lambda b, h, q, k: (q >= k) & (q - k <= 5), (), "causal & window(6)"),
    "window of keys": (lambda: lambda b, h, q, k: (q - k >= 0) & (k - q > -5), (), "causal & window(5)"),
    "window as transformers": (lambda: lambda b, h, q, k: (k > q - 5) & (k <= q), (), "causal & window(5)"),
    "chunks": (lambda: lambda b, h, q, k: (q >= k) & (q // 8 == k // 8), (), "causal & chunk(8)"),
    "padding": (lambda m: lambda b, h, q, k: (q >= k) & m[b, k], (padding(),), "causal & padding["),
    "padding alone": (lambda m: lambda b, h, q, k: m[b, k], (padding(),), "padding["),
    "packed": (lambda p: same_document(documents(p)), (positions(),), "causal & packed["),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    shown, more, note = MASKS[name]
    assert check(shown, *more)[0].startswith(note)


SCORES: dict[str, tuple[Any, dict[str, Any]]] = {
    "identity": (lambda: lambda s, b, h, q, k: s, {}),
    "cap": (lambda: lambda s, b, h, q, k: 3.0 * torch.tanh(s / 3.0), {"softcap": 3.0}),
    "cap of a scaled score": (lambda: lambda s, b, h, q, k: torch.tanh(s * 0.5 / 3.0) * 3.0, {"softcap": 3.0}),
    "scale": (lambda: lambda s, b, h, q, k: s * 0.5, {"scale": 0.3 * 0.5}),
    "mask": (lambda: lambda s, b, h, q, k: torch.where(q >= k, s, -torch.inf), {"causal": True}),
    "mask and cap": (
        lambda: lambda s, b, h, q, k: torch.where(q >= k, 3.0 * torch.tanh(s / 3.0), float("-inf")),
        {"causal": True, "softcap": 3.0},
    ),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("masked", [False, True])
def test_scores(name: str, masked: bool) -> None:
    score_mod, wanted = SCORES[name]
    shown = (lambda: lambda b, h, q, k: q - k < 7) if name.startswith("mask") else (lambda: causal)
    _, options = check(shown if masked else None, score_mod=score_mod, scale=0.3)
    assert {key: options[key] for key in wanted} == pytest.approx(wanted)
    assert not masked or options["causal"] or options["window"] == 7


def test_a_bias() -> None:
    bias = torch.randn(B, HQ, S, S)

    def biased(bias: torch.Tensor) -> Any:
        return lambda s, b, h, q, k: 3.0 * torch.tanh(s / 3.0) + bias[b, h, q, k]

    note, options = check(lambda bias: causal, bias, score_mod=biased)
    assert options["dense"] is not None and options["causal"] and note.startswith("causal; bias")


def test_layers_look_once() -> None:
    def layers(q, k, v, m):
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & m[b, j], B, None, S, S, device="cpu")
        x = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
        return flex_attention(x, k, v, block_mask=mask, enable_gqa=True)

    _, report, graph = rewritten(layers, *leaves(), padding())
    assert report.counts == {"attention": 2} and not report.missed
    assert sum(n.target is attention_mask for n in graph.graph.nodes) == 1


def test_sinks() -> None:
    """As transformers joins them, from the logarithm of the sum that is returned on a GPU."""
    sinks = torch.randn(HQ, requires_grad=True)

    def layer(q, k, v, sinks):
        mask = create_block_mask(causal, B, None, S, S, device="cpu")
        out, aux = flex_attention(
            q, k, v, block_mask=mask, enable_gqa=True, return_aux=flex.AuxRequest(lse=True), scale=0.3
        )
        lse = aux.lse.to(v.dtype).unsqueeze(-1)
        each = sinks.view(1, -1, 1, 1).expand(B, HQ, S, 1)
        both = torch.logsumexp(torch.cat([lse, each], dim=-1), dim=-1, keepdim=True)
        return (out * torch.exp(lse - both)).to(q.dtype)

    args = (*leaves(), sinks)
    result, report, _ = rewritten(layer, *args)
    assert report.counts == {"attention": 1} and not report.missed, str(report)
    wanted = dense(*args[:3], causal, None, 0.3, sinks)
    torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)
    do = torch.randn_like(wanted)
    for a, b in zip(*(torch.autograd.grad(t, args, do) for t in (result, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what is left


def left(layer: Any, *args: Any) -> str:
    """The call stays, once, with this reason."""
    _, report, graph = rewritten(layer, *args)
    assert not report.counts, str(report)
    assert sum("flex_attention" in str(n.target) for n in graph.graph.nodes) == 1
    (site,) = report.missed
    return site.reason


LEFT: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "a prefix": (lambda: lambda b, h, q, k: (q >= k) | (k < 4), (), "mask: the mask's structure was not recovered"),
    "of heads": (lambda: lambda b, h, q, k: (q >= k) & (h >= 1), (), "mask: the mask's structure was not recovered"),
    "two-sided": (lambda: lambda b, h, q, k: q - k < 5, (), "mask: a window"),
    "ids": (lambda p: same_document(p), (positions(),), "mask: the mask's structure was not recovered"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_masks_that_are_left(name: str) -> None:
    shown, more, reason = LEFT[name]
    assert left(lambda q, k, v, *more: by_flex(q, k, v, shown(*more)), *leaves(), *more).startswith(reason)


@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, q, k: s + (k - q),
        lambda s, b, h, q, k: 2.0 * torch.tanh(s / 3.0),
        lambda s, b, h, q, k: torch.where(q >= k, s, -1.0),
        lambda s, b, h, q, k: s * s,
        lambda s, b, h, q, k: torch.tanh(s * 3.0),
        lambda s, b, h, q, k: (3.0 * torch.tanh(s / 3.0)) * 2.0,
    ],
    ids=["distance", "other cap", "hides by little", "square", "tanh alone", "scaled cap"],
)
def test_scores_that_are_left(mod: Any) -> None:
    assert left(lambda q, k, v: by_flex(q, k, v, causal, mod), *leaves()).startswith("score_mod: ")


def test_blocks_from_outside() -> None:
    mask = create_block_mask(causal, B, None, S, S, device="cpu")
    reason = left(lambda q, k, v: flex_attention(q, k, v, block_mask=mask, enable_gqa=True), *leaves())
    assert "create_block_mask in the function that is compiled" in reason


def test_blocks_of_one_sequence_for_all() -> None:
    def layer(q, k, v, m):
        return by_flex(q, k, v, lambda b, h, i, j: (i >= j) & m[b, j], batch=1)

    assert "made for 1 of 2 sequences" in left(layer, *leaves(), padding())


def test_blocks_of_another_mask() -> None:
    def layer(q, k, v):
        mask = create_block_mask(lambda b, h, i, j: (i >= j) & (i - j < 5), B, None, S, S, device="cpu")
        mask.mask_mod = causal
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    assert "made from another mask" in left(layer, *leaves())


@pytest.mark.parametrize("way", ["made by hand", "changed", "written to"])
def test_blocks_of_the_users_own(way: str) -> None:
    def layer(q, k, v):
        mask = create_block_mask(causal, B, None, S, S, device="cpu")
        counts, indices = mask.kv_num_blocks, mask.kv_indices
        if way == "written to":
            counts.zero_()
        elif way == "changed":
            counts = counts * 0
        else:
            counts = torch.ones(B, 1, 1, dtype=torch.int32)
        if way != "written to":
            mask = flex.BlockMask.from_kv_blocks(counts, indices, mask_mod=causal, seq_lengths=(S, S))
        return flex_attention(q, k, v, block_mask=mask, enable_gqa=True)

    assert "blocks" in left(layer, *leaves())


def test_what_else_is_read_of_a_call() -> None:
    def layer(q, k, v):
        out, aux = flex_attention(q, k, v, enable_gqa=True, return_aux=flex.AuxRequest(lse=True))
        return out, aux.lse

    assert left(layer, *leaves()).startswith("escapes: ")
