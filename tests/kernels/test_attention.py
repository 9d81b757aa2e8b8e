"""Attention: every mask against dense SDPA, forward and gradients; the PyTorch bodies as is, the kernels under
TRITON_INTERPRET=1 and on CUDA."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import fastft
from fastft.compare import assert_within, compare, rounding
from fastft.kernels import _attention_mask as masks
from fastft.kernels import _attention_pytorch as pytorch
from fastft.kernels import _attention_routes as routes
from fastft.kernels import attention as module
from fastft.kernels._attention_mask import attention_mask, visible
from fastft.kernels._attention_routes import supported
from fastft.kernels._op import INTERPRET
from fastft.kernels._triton import HAS_TRITON
from fastft.kernels.attention import attention, reference
from tests.kernels._derivations import Array, Derivation
from tests.kernels._expressions import ratio
from tests.kernels._fuzz import Draw, flags
from tests.kernels._samples import Named, New, Sample
from tests.mutation._mutant import Mutant

CUDA = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # Triton's interpreter has bf16 wrong


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: sizes, and the names of the mask's parts."""

    b: int = 2
    hq: int = 2
    hk: int = 1
    sq: int = 44
    sk: int = 44
    d: int = 16
    dv: int = 16
    causal: bool = True
    window: int = 0
    chunk: int = 0
    padding: str = ""
    packed: bool = False
    dense: str = ""
    softcap: float = 0.0
    scale: float | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    blind: str = "zero"

    def __str__(self) -> str:
        default = Case()
        return (
            ",".join(
                f"{f.name}={getattr(self, f.name)}"
                for f in dataclasses.fields(self)
                if getattr(self, f.name) != getattr(default, f.name)
            )
            or "causal"
        )


def padding_mask(kind: str, b: int, s: int) -> torch.Tensor | None:
    if not kind:
        return None
    mask = torch.ones(b, s, dtype=torch.int64)
    if kind == "left":
        mask[-1, : s // 3] = 0
    if kind == "right":
        mask[-1, -(s // 3) :] = 0
    if kind == "holes":
        mask[0, 3:7] = 0
        mask[-1, ::3] = 0
    if kind == "all":
        mask[-1] = 0
    return mask  # "none": a mask that hides nothing


def packed_positions(b: int, s: int) -> torch.Tensor:
    """Row 0 holds three documents, row 1 one."""
    rows = [torch.cat([torch.arange(s // 4), torch.arange(s // 3), torch.arange(s - s // 4 - s // 3)]), torch.arange(s)]
    return torch.stack([rows[i % 2] for i in range(b)])


def inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[list[torch.Tensor], dict]:
    torch.manual_seed(seed)
    # Memory as the projections leave it, [B, S, H, D].
    q = torch.randn(case.b, case.sq, case.hq, case.d).transpose(1, 2)
    k = torch.randn(case.b, case.sk, case.hk, case.d).transpose(1, 2)
    v = torch.randn(case.b, case.sk, case.hk, case.dv).transpose(1, 2)
    dense = None
    if case.dense == "bool":
        dense = torch.rand(case.b, 1, case.sq, case.sk) > 0.4
        dense[0, :, 2] = False
    elif case.dense == "additive":
        dense = torch.randn(1, case.hq, case.sq, case.sk)
    elif case.dense == "finite":  # what older transformers builds: finfo.min, not −∞
        dense = torch.where(torch.rand(case.b, 1, case.sq, case.sk) > 0.4, 0.0, torch.finfo(torch.float32).min)
        dense[..., 0] = 0.0
    elif case.dense == "finite rows":  # all keys of some queries
        dense = torch.where(torch.rand(case.b, 1, case.sq, 1) > 0.4, 0.0, torch.finfo(torch.float32).min)
        dense = dense.expand(-1, -1, -1, case.sk)
    padding = padding_mask(case.padding, case.b, case.sk)
    positions = packed_positions(case.b, case.sq) if case.packed else None
    mask = {
        "causal": case.causal, "window": case.window, "chunk": case.chunk, "scale": case.scale, "softcap": case.softcap,
        "padding": None if padding is None else padding.to(DEVICE),
        "positions": None if positions is None else positions.to(DEVICE),
        "dense": None if dense is None else dense.to(DEVICE),
        "dropout_p": case.dropout_p, "blind": case.blind,
        "seed": torch.tensor([seed + 2**40 + 12345], device=DEVICE) if case.dropout_p else None,
    }  # fmt: skip
    sinks = [torch.randn(case.hq)] if case.sinks else []
    return [t.to(DEVICE, dtype) for t in (q, k, v, *sinks)], mask


def called(fn: Callable[..., torch.Tensor], mask: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """``fn`` of q, k, v and the sinks, if there are any."""
    return lambda q, k, v, sinks=None: fn(q, k, v, sinks=sinks, **mask)


def run(call, tensors: list[torch.Tensor], do: torch.Tensor) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, do)]


def eager(q, k, v, mask, blind, *, scale, softcap, sinks, dropout_p, seed):
    """What transformers' eager attention runs, masked by a finite number, with gpt-oss's sinks."""
    s = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    s = torch.tanh(s / softcap) * softcap if softcap else s
    if mask is not None:
        lowest = torch.finfo(torch.float32 if s.dtype == torch.float64 else s.dtype).min
        s = s + torch.where(mask, 0.0, lowest).to(s.dtype) if blind == "added" else torch.where(mask, s, lowest)
    if sinks is not None:
        s = torch.cat([s, sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)], -1)
    wide = torch.promote_types(q.dtype, torch.float32)
    p = F.softmax(s, -1, dtype=wide)[..., : k.shape[2]].to(q.dtype)
    if dropout_p:
        p = p * masks.kept(seed, *p.shape, dropout_p) / (1 - dropout_p)
    return p @ v


def sdpa(q, k, v, *, scale, softcap, dense, sinks, dropout_p, blind, seed, **parts):
    """What stock transformers runs: repeated keys and a dense mask."""
    if softcap and not (sinks is not None or dropout_p or blind != "zero"):
        return reference(q, k, v, scale=scale, softcap=softcap, dense=dense, **parts)
    group = q.shape[1] // k.shape[1]
    mask = visible(q.shape[2], k.shape[2], q.device, **parts)
    if sinks is not None or dropout_p or blind != "zero":
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        mask = dense if mask is None else mask
        return eager(q, k, v, mask, blind, scale=scale, softcap=softcap, sinks=sinks, dropout_p=dropout_p, seed=seed)
    if dense is not None and dense.dtype != torch.bool:
        mask = dense.to(q.dtype) if mask is None else torch.where(mask, dense, -torch.inf).to(q.dtype)
    elif dense is not None:
        mask = dense if mask is None else mask & dense
    return F.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), attn_mask=mask, scale=scale
    )


CASES = [
    Case(),
    Case(hq=3, hk=3, sq=33, sk=33, scale=0.3),
    Case(causal=False, sq=19, sk=45),
    Case(causal=False, padding="right"),
    Case(hq=4, hk=2, d=24, dv=40, sq=37, sk=37),
    Case(window=7),
    Case(window=32, sq=52, sk=52),
    Case(window=500),
    Case(chunk=20, sq=52, sk=52),
    Case(padding="left"),
    Case(padding="right"),
    Case(padding="holes"),
    Case(padding="none"),
    Case(padding="all"),
    Case(packed=True),
    Case(packed=True, window=9),
    Case(packed=True, chunk=12),
    Case(padding="left", window=9),
    Case(padding="left", chunk=12),
    Case(padding="none", chunk=12),
    Case(padding="left", packed=True),
    Case(causal=False, dense="bool"),
    Case(causal=False, dense="additive"),
    Case(causal=False, dense="finite"),
    Case(causal=False, dense="finite rows", dv=40),
    Case(dense="additive", padding="right"),
    Case(softcap=3.0),
    Case(softcap=3.0, window=9, padding="left"),
    Case(d=64, dv=64, b=1, hq=2, hk=1),
    Case(d=128, dv=128, b=1, hq=2, hk=1, packed=True, sq=40, sk=40),
    Case(d=256, dv=256, b=1, hq=2, hk=1, window=9, sq=40, sk=40),
    Case(sq=1, sk=1),
    Case(sinks=True),
    Case(hq=4, hk=2, d=24, dv=40, window=9, padding="left", sinks=True),
    Case(causal=False, sq=19, sk=45, dense="bool", sinks=True),
    Case(packed=True, sinks=True, softcap=3.0),
    Case(dropout_p=0.25),
    Case(hq=4, hk=2, padding="right", window=20, dropout_p=0.5),
    Case(causal=False, sq=19, sk=45, dropout_p=0.1, sinks=True),
    Case(padding="left", blind="filled"),
    Case(padding="all", blind="filled", window=9, hq=4, hk=2),
    Case(padding="left", blind="added"),
    Case(padding="right", blind="added", hq=4, hk=2),
    Case(padding="all", blind="added", window=9, softcap=3.0),
    Case(d=96, dv=64, b=1, hq=2, hk=2, padding="left"),
    Case(b=1, sq=70, sk=70, window=9, sinks=True),  # two tiles of δ
]  # fmt: skip
#: Sizes that fill several tiles of the real kernels.
LARGE = [
    Case(hq=8, sq=1000, sk=1000, d=128, dv=128),
    Case(hq=8, sq=1000, sk=1000, d=128, dv=128, padding="left"),
    Case(hq=8, sq=1000, sk=1000, d=128, dv=128, padding="none"),
    Case(hq=8, sq=1000, sk=1000, d=128, dv=128, packed=True, window=100),
    Case(hq=8, sq=1000, sk=1000, d=96, dv=96, chunk=256),
    Case(hq=8, sq=1000, sk=1000, d=64, dv=64, window=200, softcap=30.0),
    Case(hq=8, sq=1000, sk=1000, d=256, dv=256, window=200),
    Case(hq=8, sq=900, sk=1000, d=64, dv=64, causal=False, dense="bool"),
    Case(hq=8, sq=1000, sk=1000, d=64, dv=64, window=128, sinks=True, padding="left"),
    Case(hq=8, sq=1000, sk=1000, d=128, dv=128, dropout_p=0.1),
    Case(hq=8, hk=8, sq=1000, sk=1000, d=192, dv=128, packed=True),
]


def trials() -> list:
    """Every case in half precision; in fp32 all of them where that is cheap, some in the interpreter and on a GPU."""
    sparse = INTERPRET or CUDA
    pairs = [(c, torch.float32) for c in (CASES[::4] if sparse else CASES)]
    pairs += [(c, HALF) for c in (CASES + LARGE if CUDA else CASES)]
    return [pytest.param(c, t, id=f"{c}-{t}".replace("torch.", "")) for c, t in pairs]


@pytest.mark.parametrize("case, dtype", trials())
def test_forward_and_gradients(case: Case, dtype: torch.dtype) -> None:
    tensors, mask = inputs(case, dtype)
    assert called(supported, mask)(*tensors) is None
    do = torch.randn(case.b, case.hq, case.sq, case.dv).to(DEVICE, dtype)
    ours = run(called(attention, mask), tensors, do)
    exact_dtype = torch.float32 if CUDA and case.sq > 500 else torch.float64
    exact = run(called(reference, mask), [t.to(exact_dtype) for t in tensors], do.to(exact_dtype))
    # PyTorch keeps the repeated keys' gradients in the same dtype before it adds them up.
    torch_run = run(called(sdpa, mask), tensors, do)
    for name, a, b, e in zip(("out", "dq", "dk", "dv", "dsinks"), ours, torch_run, exact, strict=False):
        assert torch.isfinite(a).all()
        if name == "dsinks":  # few numbers, sums of δ, do · out by the rounded output, whose terms mostly cancel out
            found = compare(name, a, b, e, length=case.sq * case.b)
            terms = (do * exact[0]).abs().sum((0, 2, 3)).norm() / e.norm()
            assert found.error <= found.bound + max(3, terms) * rounding(dtype), found
            continue
        assert_within(f"{name} ({case}, {dtype})", a, b, e, length=max(case.sk, case.d))
    assert ours[0].transpose(1, 2).is_contiguous()


TAILS = [
    Case(padding="right"),
    Case(padding="left", hq=4, hk=2, sq=150, sk=150),
    Case(padding="holes", window=20, sq=150, sk=150),
    Case(padding="right", softcap=3.0, sinks=True, sq=150, sk=150, hq=4, hk=2, d=24),
    Case(padding="right", causal=False, sq=150, sk=150),
    Case(padding="all", blind="filled", sq=150, sk=150),
]


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("case", TAILS, ids=str)
def test_queries_that_no_gradient_comes_to(case: Case, dtype: torch.dtype) -> None:
    """Behind another query in every head, in one behind none, in one behind all of them."""
    tensors, mask = inputs(case, dtype)
    do = torch.randn(case.b, case.hq, case.sq, case.dv).to(DEVICE, dtype)
    last = torch.tensor([0, case.sq, 129, case.sq // 2 + 1] * case.b)[: case.b * case.hq].to(DEVICE)
    do *= (torch.arange(case.sq, device=DEVICE) < last.view(case.b, case.hq, 1)).unsqueeze(-1)
    do[:, :, case.sq // 4] = 0  # one in between
    ours, theirs = (run(called(f, mask), tensors, do) for f in (attention, sdpa))
    exact = run(called(reference, mask), [t.double() for t in tensors], do.double())
    for name, a, b, e in zip(("out", "dq", "dk", "dv"), ours, theirs, exact, strict=False):
        assert_within(f"{name} ({case}, {dtype})", a, b, e, length=max(case.sk, case.d))


@pytest.mark.skipif(not (INTERPRET or CUDA), reason="of the Triton kernels")
def test_padding_costs_the_backward_nothing() -> None:
    """Queries behind the last one that has a gradient are not read: NaNs there reach no gradient of others."""
    case = Case(b=1, sq=512, sk=512, d=32, dv=32, padding="right")
    (q, k, v), mask = inputs(case, torch.float32)
    do = torch.randn(1, 2, 512, 32, device=DEVICE)
    do[:, :, 128:] = 0
    wanted = run(called(attention, mask), [q, k, v], do)[1:]
    q[:, :, 128:] = math.nan
    for found, expected in zip(run(called(attention, mask), [q, k, v], do)[1:], wanted, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("case", CASES[:26] + CASES[32:], ids=str)
def test_reference_is_what_sdpa_computes(case: Case) -> None:
    tensors, mask = inputs(case, torch.float64)
    do = torch.randn(case.b, case.hq, case.sq, case.dv, dtype=torch.float64, device=DEVICE)
    ours, theirs = (run(called(f, mask), tensors, do) for f in (reference, sdpa))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)  # two formulas in fp64, none of them a kernel


@pytest.mark.skipif(INTERPRET, reason="fp64 runs the PyTorch body")
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(
    "case",
    [
        Case(sq=9, sk=9, d=4, dv=4),
        Case(sq=9, sk=9, d=4, dv=6, window=3, padding="left"),
        Case(sq=12, sk=12, d=4, dv=4, packed=True, chunk=5),
        Case(sq=5, sk=8, d=4, dv=4, causal=False, dense="bool"),
        Case(sq=7, sk=7, d=4, dv=6, padding="left", sinks=True, dropout_p=0.3),
        Case(sq=7, sk=7, d=4, dv=4, padding="all", blind="filled"),
    ],
    ids=str,
)
def test_backward_by_finite_differences(case: Case, softcap: float) -> None:
    """Both hand-derived bodies: PyTorch's CPU kernel (no softcap, one head size), and the formulas."""
    tensors, mask = inputs(dataclasses.replace(case, b=2, hq=2, hk=1, softcap=softcap), torch.float64)
    leaves = [t.cpu().requires_grad_() for t in tensors]
    mask = {key: m.cpu() if isinstance(m, torch.Tensor) else m for key, m in mask.items()}
    assert torch.autograd.gradcheck(called(attention, mask), leaves)
    assert torch.autograd.gradcheck(called(reference, mask), leaves)


@pytest.mark.parametrize(
    "case", [Case(), Case(padding="left", chunk=12), Case(packed=True), Case(sinks=True, dropout_p=0.25)], ids=str
)
def test_opcheck(case: Case) -> None:
    case = dataclasses.replace(case, b=1, hq=2, hk=1, sq=18, sk=18)
    (q, k, v, *sinks), mask = inputs(case, torch.float32)
    found = (None,) * 5
    if mask["padding"] is not None or mask["positions"] is not None:
        args = (mask["padding"], mask["positions"], mask["chunk"])
        torch.library.opcheck(torch.ops.fastft.attention_mask.default, args)
        found = attention_mask(*args)
    operands = (*found[:4], mask["dense"], found[4], sinks[0] if sinks else None, mask["seed"])
    rest = (*operands, case.causal, case.window, case.chunk, 0.25, 0.0, case.dropout_p)
    torch.library.opcheck(torch.ops.fastft.attention.default, (q, k, v, *rest))
    out, lse = torch.ops.fastft.attention(q, k, v, *rest)
    for want_q, want_kv in ((True, True),) if case.packed else ((True, False), (False, True)):
        args = (torch.randn_like(out), q, k, v, out, lse, want_q, want_kv, case.sinks, *rest)
        torch.library.opcheck(torch.ops.fastft.attention_backward.default, args)


KINDS = {"": masks.PLAIN, "none": masks.PLAIN, "holes": masks.HOLES}


@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding", ["", "none", "left", "right", "all", "holes"])
def test_mask_op(padding: str, packed: bool, chunk: int) -> None:
    """start, stop, end and keep describe the dense mask; kind says how much of it there is."""
    if not padding and not packed:
        return
    s = 40
    order = torch.arange(s, device=DEVICE)
    pad = padding_mask(padding, 2, s)
    positions = packed_positions(2, s) if packed else None
    pad, positions = (t if t is None else t.to(DEVICE) for t in (pad, positions))
    start, stop, end, keep, kind = attention_mask(pad, positions, chunk)
    masks.arrived(kind)
    wanted_kind = KINDS.get(padding, masks.INTERVALS)
    if packed and wanted_kind == masks.PLAIN:
        wanted_kind = masks.INTERVALS
    assert kind.device.type == "cpu" and int(kind) % masks.BLIND == wanted_kind
    seen = (order >= start[:, :, None]) & (order <= order[:, None])
    if pad is None:
        assert end is None and keep is None
    else:
        seen &= (
            keep.bool()[:, None, :] if int(kind) % masks.BLIND == masks.HOLES else (order < end[:, None])[:, None, :]
        )
    wanted = visible(s, s, DEVICE, causal=True, chunk=chunk, padding=pad, positions=positions)[:, 0]
    assert torch.equal(seen, wanted.expand_as(seen))
    # What is said to see, sees.
    assert int(kind) & masks.BLIND or bool(wanted.any(-1).all())
    # No query sees a key from its stop on, and none before, from the key itself, is hidden by its start.
    assert torch.equal(stop[:, :, None] > order, (order[:, None] >= start[:, None, :]))


@pytest.mark.parametrize("padding", ["none", "left", "right", "all", "holes"])
@pytest.mark.parametrize("packed, chunk", [(False, 0), (True, 0), (False, 7)])
def test_mask_op_without_padding_behind_the_last_token(padding: str, packed: bool, chunk: int) -> None:
    """Those queries see nothing; the others what they saw."""
    s = 40
    order = torch.arange(s, device=DEVICE)
    pad = padding_mask(padding, 2, s).to(DEVICE)
    positions = packed_positions(2, s).to(DEVICE) if packed else None
    start, _, end, keep, kind = attention_mask(pad, positions, chunk)
    other = attention_mask(pad, positions, chunk, True)
    found, before = masks.arrived(other[4]), masks.arrived(kind)
    behind = order >= torch.where(pad.bool(), order + 1, 0).amax(-1, keepdim=True)
    assert found % masks.BLIND == before % masks.BLIND and bool(found & masks.BLIND) == (
        bool(before & masks.BLIND) or bool(behind.any())
    )
    assert torch.equal(other[0], torch.where(behind, s, start)) and bool((other[0].diff() >= 0).all())
    assert torch.equal(other[1][:, :, None] > order, (order[:, None] >= other[0][:, None, :]))
    assert torch.equal(other[2], end) and torch.equal(other[3], keep)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(padding="right"),
        Case(padding="holes", window=9, hq=4, hk=2),
        Case(padding="all", softcap=3.0),
        Case(padding="right", packed=True, sinks=True),
        Case(padding="right", sq=150, sk=150, chunk=64, dropout_p=0.25),
    ],
    ids=str,
)
def test_padding_that_is_skipped(case: Case, dtype: torch.dtype) -> None:
    """Zeros, and no gradient from there; everything else as without."""
    tensors, mask = inputs(case, dtype)
    pad = mask["padding"]
    behind = torch.arange(case.sq, device=DEVICE) >= torch.where(
        pad.bool(), torch.arange(1, case.sq + 1, device=DEVICE), 0
    ).amax(-1, keepdim=True)
    behind = behind[:, None, :, None]
    found = attention_mask(pad, mask["positions"], case.chunk, True)
    skipped = {**mask, "mask": found, "padding": None, "positions": None}
    do = torch.randn(case.b, case.hq, case.sq, case.dv).to(DEVICE, dtype)
    ours = run(called(attention, skipped), tensors, do)
    assert not ours[0].masked_select(behind).any()

    def zeroed(fn: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *leaves: called(fn, mask)(*leaves).masked_fill(behind, 0)

    theirs, exact = run(zeroed(sdpa), tensors, do), run(zeroed(reference), [t.double() for t in tensors], do.double())
    for name, a, b, e in list(zip(("out", "dq", "dk", "dv"), ours, theirs, exact, strict=False)):
        assert_within(f"{name} ({case}, {dtype})", a, b, e, length=max(case.sk, case.d))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "dtype, softcap", [(HALF, 60.0), (torch.float16, 10.0), (torch.float16, 50.0), (torch.float32, 60.0)]
)
def test_scores_that_all_reach_their_cap(dtype: torch.dtype, softcap: float, sign: int) -> None:
    """Their exponentials, taken without a maximum, are sums that neither overflow nor vanish."""
    q, v = torch.ones(1, 2, 40, 16, device=DEVICE, dtype=dtype), torch.randn(1, 2, 40, 16, device=DEVICE).to(dtype)
    tensors, mask = [60 * q, 60.0 * sign * q, v], {"causal": True, "softcap": softcap}
    do = torch.randn(1, 2, 40, 16, device=DEVICE).to(dtype)
    ours = run(called(attention, mask), tensors, do)
    same, exact = (run(called(reference, mask), [t.to(d) for t in tensors], do.to(d)) for d in (dtype, torch.float64))
    for name, a, s, e in list(zip(("out", "dq", "dk", "dv"), ours, same, exact, strict=True))[::3]:
        assert_within(f"{name} ({dtype})", a, s, e, length=4000)
    assert all(t.isfinite().all() for t in ours)


def test_strides_of_inputs_and_gradients() -> None:
    """Heads first, sliced out of a fused projection, an expanded gradient, a frozen q."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 21, 3, 4, 16, device=DEVICE)
    q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
    k = k.contiguous()
    same, exact = (
        run(lambda *t: reference(*t, causal=True), [t.to(dtype) for t in (q, k, v)], torch.ones_like(q, dtype=dtype))
        for dtype in (torch.float32, torch.float64)
    )
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = attention(*leaves, causal=True)
    out.sum().backward()
    for name, a, s, e in zip(("out", "dq", "dk", "dv"), (out, *(t.grad for t in leaves)), same, exact, strict=True):
        assert_within(name, a, s, e, length=21)
    frozen = attention(q, leaves[1], v, causal=True)
    (dk,) = torch.autograd.grad(frozen, leaves[1], torch.ones_like(q))
    assert_within("dk alone", dk, same[2], exact[2], length=21)


def test_odd_strides_of_heads() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16, 9, device=DEVICE).transpose(-1, -2) for _ in range(3))
    exact = reference(q.double(), k.double(), v.double(), causal=True)
    assert_within("out", attention(q, k, v, causal=True), reference(q, k, v, causal=True), exact, length=16)


@pytest.mark.parametrize("b, sq, sk", [(0, 8, 8), (2, 0, 0), (2, 0, 5), (2, 4, 0)])
def test_empty(b: int, sq: int, sk: int) -> None:
    q = torch.randn(b, 4, sq, 16, device=DEVICE, requires_grad=True)
    k, v = (torch.randn(b, 2, sk, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    out = attention(q, k, v)
    out.sum().backward()
    assert out.shape == q.shape and not out.any()
    assert q.grad.shape == q.shape and not q.grad.any() and not k.grad.any()
    if sq == sk:
        positions = torch.zeros(b, sq, dtype=torch.int64, device=DEVICE)
        assert attention(q, k, v, causal=True, positions=positions, padding=positions).shape == q.shape


def test_repeats_bit_for_bit() -> None:
    size = 500 if CUDA else 40
    tensors, mask = inputs(Case(padding="left", window=9, sq=size, sk=size), HALF)
    do = torch.randn(2, 2, size, 16).to(DEVICE, HALF)
    once, again = (run(lambda *t: attention(*t, **mask), tensors, do) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.skipif(not (INTERPRET or CUDA), reason="the kernels skip, PyTorch's bodies do not")
@pytest.mark.parametrize("kind", ["packed", "window", "chunk", "left padding", "right padding"])
def test_tiles_outside_of_the_mask_are_not_visited(kind: str) -> None:
    """Forward and both backward kernels: what is not finite in keys and queries out of reach reaches no result."""
    half = 512 if CUDA else 64  # whole tiles
    q, k, v, do = (torch.randn(1, 2, 2 * half, 32, device=DEVICE, dtype=HALF) for _ in range(4))
    order = torch.arange(2 * half, device=DEVICE)
    options: dict[str, Any] = {"causal": True}
    hidden = order < half  # from the second half of the tokens
    if kind == "packed":
        options["positions"] = (order % half)[None]
    elif kind == "window":
        options["window"], hidden = half // 2, order < half // 2
    elif kind == "chunk":
        options["chunk"] = half
    else:
        hidden = order < half if kind == "left padding" else order >= half
        options["padding"] = ~hidden[None]
    seen = ~hidden if kind != "window" else order >= half
    do = do * seen[:, None]
    clean = run(lambda *t: attention(*t, **options), [q, k, v], do)
    k, v = (torch.where(hidden[:, None], torch.nan, t) for t in (k, v))
    if kind != "right padding":  # whose queries see what is before them
        q, do = (torch.where(hidden[:, None], torch.nan, t) for t in (q, do))
    found = run(lambda *t: attention(*t, **options), [q, k, v], do)
    for name, a, b in zip(("out", "dq", "dk", "dv"), clean, found, strict=True):
        assert torch.equal(a[:, :, seen], b[:, :, seen]), name


@pytest.mark.skipif(not (INTERPRET or CUDA), reason="of the Triton kernels")
def test_gradients_of_skipped_padding_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """δ is what they are read for."""
    found: list[torch.Tensor] = []
    kernel = module._delta_kernel

    class Seen:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **constants: Any) -> None:
                kernel[grid](*args, **constants)
                found.append(args[4].clone())

            return launch

    monkeypatch.setattr(module, "_delta_kernel", Seen())
    q, k, v, do = (torch.randn(1, 2, 64, 32, device=DEVICE, dtype=HALF) for _ in range(4))
    keep = (torch.arange(64, device=DEVICE) < 40).to(torch.int64)[None]
    do[:, :, 40:] = torch.nan
    run(lambda *t: attention(*t, causal=True, mask=attention_mask(keep, None, 0, True)), [q, k, v], do)
    (delta,) = found
    assert delta[:, :, :40].isfinite().all() and delta[:, :, :40].any() and not delta[:, :, 40:].any()


def test_the_kind_of_mask_is_waited_for_once() -> None:
    """Until it arrives, its memory holds what is right for every mask."""
    kind = torch.tensor(masks.HOLES | masks.BLIND, dtype=torch.int8)
    waited: list[int] = []

    class Event:
        def synchronize(self) -> None:
            waited.append(int(kind.fill_(masks.PLAIN)))

    masks._COMING[kind.data_ptr()] = Event()
    assert [masks.arrived(kind) for _ in range(3)] == [masks.PLAIN] * 3 and waited == [masks.PLAIN]


def test_documents_alone_are_intervals() -> None:
    """Whatever they are: nothing is looked at that only the device knows."""
    for positions in (torch.arange(9)[None], torch.zeros(1, 9, dtype=torch.int64)):
        assert int(attention_mask(None, positions.to(DEVICE))[4]) == masks.INTERVALS


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["packing", "padding"])
def test_nothing_waits_for_the_device(kind: str) -> None:
    """Neither looking at the step's mask nor any layer synchronises, forward or backward."""
    tensors, mask = inputs(Case(sq=300, sk=300, padding="left" * (kind == "padding"), packed=kind == "packing"), HALF)
    do = torch.randn(2, 2, 300, 16, device=DEVICE, dtype=HALF)

    def layer(*t: torch.Tensor) -> torch.Tensor:
        found = attention_mask(mask["padding"], mask["positions"])
        return attention(*t, causal=True, mask=found, dropout_p=0.1)

    once = run(layer, tensors, do)  # what is compiled, is
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(layer, tensors, do)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [t.shape for t in once] == [t.shape for t in again]


def test_dropout_draws_from_the_generator() -> None:
    """The generator's state decides what is dropped, a step's backward drops the same, and a seed decides it alone."""
    tensors, mask = inputs(Case(dropout_p=0.5), torch.float32)
    mask["seed"] = None
    do = torch.ones(2, 2, 44, 16, device=DEVICE)
    torch.manual_seed(7)
    first, other = (run(called(attention, mask), tensors, do) for _ in range(2))
    torch.manual_seed(7)
    again = run(called(attention, mask), tensors, do)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    torch.manual_seed(7)
    mask["seed"] = masks.new_seed(tensors[0])
    seeded = run(called(attention, mask), tensors, do)
    assert all(torch.equal(a, b) for a, b in zip(first, seeded, strict=True))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_as_many_as_it_says(p: float) -> None:
    """Of all weights, of each head's, query's and key's; neighbours and other seeds know nothing of each other."""
    one, two = (masks.kept(torch.tensor([s]), 3, 4, 100, 90, p).float() for s in (1, 2))
    for axes, count in (((0, 1, 2, 3), 108000), ((2, 3), 9000), ((0, 1, 3), 1080), ((0, 1, 2), 1200)):
        share = one.mean(axes)
        assert ((share - (1 - p)).abs() <= 5 * (p * (1 - p) / count) ** 0.5).all()
    chance, spread = p * p + (1 - p) * (1 - p), 5 * 0.5 / 100000**0.5
    for a, b in ((one, two), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[:, :, 1:], one[:, :, :-1])):
        assert abs(float((a == b).float().mean()) - chance) <= spread
    assert abs(float((one[..., 1:] == one[..., :-1]).float().mean()) - chance) <= spread


def test_dropout_of_philox() -> None:
    """The numbers of Random123's own test vectors, for seven rounds."""
    keep = masks.kept(torch.zeros(1, dtype=torch.int64), 1, 1, 1, 1, 0x5F6FB709 / 2**32)
    more = masks.kept(torch.zeros(1, dtype=torch.int64), 1, 1, 1, 1, (0x5F6FB709 + 2) / 2**32)
    assert bool(keep) and not bool(more)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", *["inductor"] * CUDA])
def test_dropout_is_the_same_when_it_is_recomputed(backend: str) -> None:
    """Checkpointing, compiled or not: the forward that is computed again drops what the first one dropped.

    Compiled for a GPU, PyTorch draws from a generator of its own (each call is another draw). So what is looked at is
    that ⟨out, do⟩ = ⟨v, ∂v⟩, as of anything linear in v: it holds of one draw, not of two.
    """
    from torch.utils.checkpoint import checkpoint

    tensors, mask = inputs(Case(dropout_p=0.5), torch.float32)
    mask["seed"] = None

    def layer(*t: torch.Tensor) -> torch.Tensor:
        return checkpoint(called(attention, mask), *t, use_reentrant=False)

    fn = layer if backend == "eager" else torch.compile(layer, backend=backend, fullgraph=True)
    do = torch.randn(2, 2, 44, 16, device=DEVICE)
    for _ in range(2):
        out, _, _, dv = run(fn, tensors, do)
        torch.testing.assert_close((out * do).sum(), (tensors[2] * dv).sum(), rtol=1e-4, atol=1e-3)
    if backend == "eager" or not CUDA:
        torch.manual_seed(3)
        plain = run(called(attention, mask), tensors, do)
        torch.manual_seed(3)
        for a, b in zip(run(fn, tensors, do), plain, strict=True):
            torch.testing.assert_close(a, b)


def test_under_autocast() -> None:
    """Ambient autocast does not reach the body."""
    tensors, mask = inputs(Case(), torch.float32)
    want = attention(*tensors, **mask)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(attention(*tensors, **mask), want)


def test_compiles_without_a_break() -> None:
    """Through AOT and with a dynamic length: what a rewritten graph does."""
    case = Case(b=1, hq=2, hk=1, sq=18, sk=18, padding="left")
    tensors, mask = inputs(case, torch.float32)

    def step(q, k, v, padding):
        return attention(q, k, v, causal=True, padding=padding)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    do = torch.randn(1, 2, 18, 16, device=DEVICE)
    got = run(lambda *t: compiled(*t, mask["padding"]), tensors, do)
    want = run(lambda *t: attention(*t, **mask), tensors, do)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    "code, change",
    [
        ("dropout", {"dropout_p": 1.0}),
        ("dropout", {"dropout_p": 0.1, "seed": torch.zeros(2)}),
        ("dropout", {"dropout_p": 0.1, "blind": "filled"}),
        ("mask", {"blind": "none"}),
        ("mask", {"blind": "added", "dense": torch.zeros(44, 44)}),
        ("sinks", {"sinks": torch.zeros(3)}),
        ("sinks", {"sinks": torch.zeros(2, dtype=torch.int64)}),
        ("mask", {"causal": False, "window": 4}),
        ("dtype", {"k": torch.float64}),
        ("shape", {"padding": torch.ones(2, 3)}),
        ("shape", {"positions": torch.ones(1, 44)}),
        ("mask", {"dense": torch.zeros(2, 1, 44, 44, requires_grad=True)}),
        ("mask", {"dense": torch.zeros(2, 1, 44, 44, dtype=torch.int64)}),
    ],
)
def test_reasons(code: str, change: dict) -> None:
    (q, k, v), mask = inputs(Case(), torch.float32)
    k = k.to(change.pop("k", k.dtype))
    reason = supported(q, k, v, **{**mask, **change})
    assert reason is not None and reason.code == code and str(reason)


def test_reason_for_lengths() -> None:
    (q, k, v), _ = inputs(Case(sq=3), torch.float32)
    assert supported(q, k, v, causal=True).code == "shape"
    assert supported(q, k[:, :, :, :8], v).code == "shape"
    assert supported(q, torch.cat([k] * 3, 1), torch.cat([v] * 3, 1)).code == "shape"


def test_cost_follows_the_window() -> None:
    (q, k, v), _ = inputs(Case(), torch.float32)
    full, causal, window = (module.cost(q, k, v, **m) for m in ({}, {"causal": True}, {"causal": True, "window": 5}))
    assert (
        full.flops == 4 * 2 * 2 * 44 * 44 * 16
        and causal.flops * 2 == full.flops
        and window.flops * 44 == full.flops * 5
    )
    assert causal.bytes_kept == 2 * 2 * 44 * (16 * 4 + 4)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_plain_causal_is_cudnn_on_cuda() -> None:
    """A padding mask without padding costs one question, not another kernel."""
    tensors, mask = inputs(Case(b=2, hq=4, hk=2, sq=256, sk=256, d=128, dv=128, padding="none"), torch.bfloat16)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as prof:
        attention(*tensors, **mask)
    assert any("_scaled_dot_product_cudnn_attention" in e.key for e in prof.key_averages())


# ------------------------------------------------------------------------------------------------------ cuDNN's plans


def sized(length: int, batch: int = 4, heads: int = 32, causal: bool = True) -> SimpleNamespace:
    """A call of heads of 128, as far as :class:`routes.Plans` looks at it."""
    sizes = dict(batch=batch, q_length=length, k_length=length, heads=heads, group=4, d=128, d_v=128)
    return SimpleNamespace(**sizes, causal=causal)


def test_first_sizes_have_a_plan_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of each kind; whoever trains on sizes that stay never leaves cuDNN."""
    plans, x = routes.Plans(), torch.empty(0, dtype=torch.bfloat16)
    for _ in range(2):
        assert [plans.worth(sized(n), x) for n in (512, 513)] == [True] * 2
    assert plans.said() == ""
    assert not plans.worth(sized(516), x) and not plans.worth(sized(512, batch=3), x)
    ours = "cuDNN has plans for 2 sizes; 2 did not come often enough for one, and are computed by Triton's kernel"
    assert plans.said() == ours
    monkeypatch.setattr(routes, "PLANS", plans)
    assert fastft.report().plan["attention"] == ours
    for other in (sized(516, heads=16), sized(516, causal=False)):
        assert plans.worth(other, x)
    assert plans.worth(sized(516), x.half()) and not plans.worth(sized(516), x)


@pytest.mark.parametrize("length, calls", [(512, 11642), (2048, 727), (8192, 45), (65536, 0)])
def test_a_size_that_comes_again_pays_for_its_plan(length: int, calls: int) -> None:
    """Once what our kernel lost to it is what the plan takes: a sequence so long that one call loses as much, at once;
    and a size of an epoch's last batch, never.
    """
    plans, x = routes.Plans(), torch.empty(0, dtype=torch.bfloat16)
    for n in range(routes.Plans.AT_ONCE):
        plans.worth(sized(16 + n), x)
    found = [plans.worth(sized(length), x) for _ in range(calls + 3)]
    assert found.index(True) == pytest.approx(calls, rel=1e-3) and all(found[found.index(True) :])


def test_no_more_sizes_are_counted_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes.Plans, "COUNTED", 8)
    plans, x = routes.Plans(), torch.empty(0, dtype=torch.bfloat16)
    for n in range(100):
        plans.worth(sized(16 + n), x)
    assert plans.said().startswith("cuDNN has plans for 2 sizes; ")
    ((planned, lost),) = plans._kinds.values()
    assert len(planned) == routes.Plans.AT_ONCE and 0 < len(lost) <= 8
    assert plans.worth(sized(16), x), "what has a plan keeps it"


@pytest.mark.parametrize("case", [Case(), Case(padding="right", hq=4, hk=2), Case(softcap=3.0, sinks=True)], ids=str)
def test_what_is_saved_is_the_natural_logsumexp(case: Case) -> None:
    """Of whoever computes the forward; so that another one may compute the backward."""
    tensors, mask = inputs(case, HALF)
    saved: list[torch.Tensor] = []
    forward = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    q, k, _, *sinks = (t.detach().double() for t in tensors)
    s = q @ k.repeat_interleave(case.hq // case.hk, 1).transpose(-1, -2) * case.d**-0.5
    s = torch.tanh(s / case.softcap) * case.softcap if case.softcap else s
    shown = visible(case.sq, case.sk, torch.device(DEVICE), causal=True, padding=mask["padding"])
    s = s.masked_fill(~shown, -torch.inf)
    s = torch.cat((s, sinks[0][None, :, None, None].expand(*s.shape[:-1], 1)), -1) if sinks else s
    for route in ("auto", "triton"):
        leaves = [t.detach().requires_grad_() for t in tensors]
        with forward:
            module._attend(route, *leaves[:3], routes.Options(**mask, sinks=leaves[3] if sinks else None))
        (found,) = (t for t in saved if t.shape == (case.b, case.hq, case.sq) and t.is_floating_point())
        seen = shown.any(-1).expand_as(found)
        torch.testing.assert_close(found[seen].double(), s.logsumexp(-1)[seen], rtol=1e-2, atol=2e-2)
        saved.clear()


@pytest.mark.skipif(not INTERPRET, reason="where there is a GPU, test_sizes_that_change_are_ours_on_cuda")
@pytest.mark.parametrize("case", [Case(), Case(padding="right", hq=4, hk=2), Case(softcap=3.0, sinks=True)], ids=str)
def test_another_one_may_compute_the_backward(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch after a forward of Triton's kernel, and the other way round."""
    tensors, mask = inputs(case, torch.float32)
    do = torch.randn(case.b, case.hq, case.sq, case.dv)
    plain, exact = run(called(sdpa, mask), tensors, do), run(called(reference, mask), [t.double() for t in tensors], do)
    for ours in ((True, False), (False, True)):
        leaves = [t.detach().requires_grad_() for t in tensors]
        monkeypatch.setattr(routes, "use_triton", lambda q, first=ours[0]: first)
        out = called(attention, mask)(*leaves)
        monkeypatch.setattr(routes, "use_triton", lambda q, then=ours[1]: then)
        grads = torch.autograd.grad(out, leaves, do)
        for name, a, b, e in zip(("dq", "dk", "dv"), grads, plain[1:], exact[1:], strict=False):
            assert_within(f"{name} ({case}, {ours})", a, b, e, length=case.sk)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_sizes_that_change_are_ours_on_cuda() -> None:
    """Beyond the first two; and what the forward of one computed is what the backward of the other takes."""
    from torch.profiler import ProfilerActivity, profile

    def of(length: int, *plans: bool) -> list[bool]:
        tensors, mask = inputs(Case(b=2, hq=4, hk=2, sq=length, sk=length, d=128, dv=128), torch.bfloat16)
        do = torch.randn(2, 4, length, 128, device=DEVICE, dtype=torch.bfloat16)
        answers = iter(plans)
        with pytest.MonkeyPatch.context() as patched, profile(activities=[ProfilerActivity.CPU]) as prof:
            if plans:
                patched.setattr(routes.PLANS, "worth", lambda *_: next(answers))
            found = run(called(attention, mask), tensors, do)
        plain = run(called(sdpa, mask), tensors, do)
        exact = run(called(reference, mask), [t.float() for t in tensors], do.float())
        for name, ours, same, wide in zip(("out", "dq", "dk", "dv"), found, plain, exact, strict=True):
            assert_within(name, ours, same, wide, length=length)
        names = {e.key.removeprefix("aten::_scaled_dot_product_") for e in prof.key_averages()}
        return [name in names for name in ("cudnn_attention", "cudnn_attention_backward")]

    assert [of(100 + n) for n in range(6)] == [[True, True]] * 2 + [[False, False]] * 4
    assert of(100) == [True, True] and of(105) == [False, False]
    assert of(106, True, False) == [True, False] and of(107, False, True) == [False, True]


# ----------------------------------------------------------------------------------------------------------- varlen

VARLEN = [
    Case(),
    Case(window=7),
    Case(packed=True, hq=4, hk=2),
    Case(packed=True, window=9, scale=0.3),
    Case(packed=True, chunk=12, sq=40, sk=40),
]


def _flash(q, k, v, cu, of_keys, longest, longest_key, p, causal, *, scale, window_size_left, window_size_right, **of):
    """FlashAttention's maths, document by document: out ``[tokens, H, D]``, logsumexp ``[H, tokens]``; with ``do``,
    dq, dk and dv.
    """
    assert cu is of_keys and longest == longest_key == int(cu.diff().max()) and p == 0.0
    assert (window_size_left, window_size_right) == (-1, 0) if causal else window_size_left > 0 == window_size_right
    group, found = q.shape[1] // k.shape[1], []
    for a, b in itertools.pairwise(cu.tolist()):
        one, keys, values = q[a:b], k[a:b].repeat_interleave(group, 1), v[a:b].repeat_interleave(group, 1)
        distance = torch.arange(b - a)[:, None] - torch.arange(b - a)
        seen = (distance >= 0) & (distance <= (b if window_size_left < 0 else window_size_left))
        s = torch.einsum("qhd,khd->hqk", one, keys).mul(scale).masked_fill(~seen, -torch.inf)
        weights = s.softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, values)
        if not of:
            found.append((out, s.logsumexp(-1).T))
            continue
        torch.testing.assert_close((of["out"][a:b], of["lse"][:, a:b]), (out, s.logsumexp(-1)))
        do = of["do"][a:b]
        dp = torch.einsum("qhd,khd->hqk", do, values)
        ds = weights * (dp - (do * out).sum(-1).T.unsqueeze(-1)) * scale
        dk, dv = torch.einsum("hqk,qhd->khd", ds, one), torch.einsum("hqk,qhd->khd", weights, do)
        dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))
        found.append((torch.einsum("hqk,khd->qhd", ds, keys), dk, dv))
    results = [torch.cat(parts) for parts in zip(*found, strict=True)]
    return results if of else (results[0], results[1].T.contiguous())


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """FlashAttention on a CPU; what was called of it."""
    called: list[str] = []
    monkeypatch.setattr(routes, "_on_gpu", lambda q: True)

    def forward(q, k, v, *lengths, **options):
        called.append("forward")
        *lengths, debug = lengths
        assert debug is False
        none = torch.empty(0)
        return *_flash(q, k, v, *lengths, **options), none, none, none

    def backward(do, q, k, v, out, lse, *lengths, **options):
        called.append("backward")
        *lengths, state, _ = lengths
        assert state.dtype == torch.uint64 and state.shape == (2,)
        return tuple(_flash(q, k, v, *lengths, **options, do=do, out=out, lse=lse))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield called


@pytest.mark.skipif(CUDA, reason="there it is called itself")
@pytest.mark.parametrize("case", VARLEN, ids=str)
def test_varlen_is_called_as_it_is_to_be(case: Case, flash: list[str]) -> None:
    tensors, mask = inputs(case, torch.float32)
    do = torch.randn(case.b, case.hq, case.sq, case.dv)
    ours = run(called(module.attention_varlen, mask), tensors, do)
    exact = run(called(reference, mask), tensors, do)
    for a, e in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
    assert flash == ["forward", "backward"] and ours[0].transpose(1, 2).is_contiguous()


@pytest.mark.skipif(CUDA, reason="there it is called itself")
def test_varlen_looks_once_at_a_mask(flash: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """For all layers that are given it, and again at another one in its place."""
    monkeypatch.setattr(pytorch, "_LAST", [lambda: None, 0, None])
    (q, k, v), mask = inputs(Case(packed=True), torch.float32)
    looks: list[int] = []
    stock = torch.Tensor.nonzero
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda self, **kw: looks.append(1) or stock(self, **kw))
    found = attention_mask(None, mask["positions"])
    for _ in range(3):
        module.attention_varlen(q, k, v, causal=True, mask=found)
    assert len(looks) == 1
    found[0].copy_(attention_mask(None, torch.arange(44).expand(2, -1))[0])
    out = module.attention_varlen(q, k, v, causal=True, mask=found)
    assert len(looks) == 2
    torch.testing.assert_close(out, reference(q, k, v, causal=True), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "code, change",
    [
        ("mask", {"causal": False}),
        ("mask", {"chunk": 5}),
        ("mask", {"padding": torch.ones(2, 44)}),
        ("mask", {"mask": attention_mask(torch.ones(2, 44, device=DEVICE), None)}),
        ("mask", {"dense": torch.zeros(44, 44)}),
        ("softcap", {"softcap": 2.0}),
        ("sinks", {"sinks": torch.zeros(2)}),
        ("dropout", {"dropout_p": 0.1}),
        ("dtype", {"dtype": torch.float32}),
        ("head_size", {"d_v": 24}),
        ("device", {}),
    ],
    ids=str,
)
def test_what_varlen_refuses(code: str, change: dict) -> None:
    change = dict(change)
    tensors, mask = inputs(Case(dv=change.pop("d_v", 16)), change.pop("dtype", torch.float16))
    reason = routes.varlen_supported(*(t.cpu() for t in tensors), **{**mask, **change})
    assert reason is not None and reason.code == code, reason


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
@pytest.mark.parametrize("case", [*VARLEN, *(c for c in LARGE if c.packed or c.window)], ids=str)
def test_varlen_on_cuda(case: Case) -> None:
    tensors, mask = inputs(case, HALF)
    if called(routes.varlen_supported, mask)(*tensors) is not None:
        pytest.skip("not supported")
    do = torch.randn(case.b, case.hq, case.sq, case.dv).to(DEVICE, HALF)
    ours = run(called(module.attention_varlen, mask), tensors, do)
    exact = run(called(reference, mask), [t.float() for t in tensors], do.float())
    theirs = run(called(sdpa, mask), tensors, do)
    for name, a, b, e in zip(("out", "dq", "dk", "dv"), ours, theirs, exact, strict=True):
        assert_within(f"{name} ({case})", a, b, e, length=max(case.sk, case.d))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET or CUDA or not HAS_TRITON, reason="Triton's compiler, in place of a GPU")
@pytest.mark.parametrize("roomy", [True, False], ids=["H100", "smaller GPU"])
@pytest.mark.parametrize("d, more", [(128, {}), (256, {}), (128, {"sinks": True, "dropout_p": 0.1})], ids=str)
def test_compiles_within_shared_memory(
    d: int, more: dict[str, Any], roomy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.kernels._hopper import compiling

    monkeypatch.setattr(module, "_roomy", lambda device: roomy)
    tensors, mask = inputs(Case(hq=4, d=d, dv=d, padding="left", **more), torch.bfloat16)
    with compiling(module) as kernels:
        run(called(attention, mask), tensors, torch.zeros(2, 4, 44, d, dtype=torch.bfloat16))
    assert len(kernels) == 4, "forward, delta, dq, dk and dv"
    for kernel in kernels:
        assert kernel.metadata.shared <= (227 if roomy else 99) * 1024
        # A tile of 64 queries or more is a warp group's, which is what Hopper's tensor cores take.
        if roomy and "delta" not in kernel.metadata.name:
            assert "wgmma" in kernel.asm["ptx"]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET or CUDA or not HAS_TRITON, reason="Triton's compiler, in place of a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tanh_of_a_softcap(dtype: torch.dtype) -> None:
    """The GPU's own where it is exact enough, in every kernel."""
    from tests.kernels._hopper import compiling

    tensors, mask = inputs(Case(hq=4, d=128, dv=128, softcap=50.0), dtype)
    with compiling(module) as kernels:
        run(called(attention, mask), tensors, torch.zeros(2, 4, 44, 128, dtype=dtype))
    own = ["tanh.approx.f32" in kernel.asm["ptx"] for kernel in kernels if "delta" not in kernel.metadata.name]
    assert own == [dtype == torch.bfloat16] * 3


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _attention_samples(new: New, n: int) -> Named:
    s = 5 * n

    def qkv(d_v: int = 4) -> tuple[torch.Tensor, ...]:
        return tuple(new(2, s, heads, d).transpose(1, 2) for heads, d in ((2, 4), (1, 4), (1, d_v)))

    left = torch.ones(2, s, dtype=torch.int64)
    left[1, : s // 2] = 0
    holes = left.clone()
    holes[0, 1::3] = 0
    packed = torch.cat([torch.arange(s // 2), torch.arange(s - s // 2)]).expand(2, s)
    left, holes, packed = (t.to(new.device) for t in (left, holes, packed))
    yield "causal", qkv(), {"causal": True}
    yield "window, left padding", qkv(), {"causal": True, "window": 3, "padding": left}
    yield "holes, wide values", qkv(6), {"causal": True, "padding": holes}
    yield "packed, softcap", qkv(), {"causal": True, "positions": packed, "softcap": 2.0}
    yield "chunk", qkv(), {"causal": True, "chunk": 3, "scale": 0.3}
    yield "boolean mask", qkv(), {"dense": new(2, 1, s, s, grad=False) > -1}
    yield "sinks, window", (*qkv(),), {"causal": True, "window": 4, "sinks": new(2)}
    seed = torch.tensor([2**50 + 11], device=new.device)
    yield "dropout, sinks", qkv(6), {"causal": True, "dropout_p": 0.3, "seed": seed, "sinks": new(2), "padding": left}
    yield "mean where nothing is seen", qkv(), {"causal": True, "padding": left, "blind": "filled"}
    yield "padding on the right, added", qkv(), {"causal": True, "padding": left.flip(1), "blind": "added"}
    yield "additive mask, softcap", qkv(), {"dense": new(1, 2, s, s, grad=False), "softcap": 3.0}


SAMPLES = {"attention": _attention_samples}


def _attention_case(d: Draw) -> Sample:
    batch, queries, head = d(st.integers(1, 2)), d(st.integers(1, 40)), d(st.integers(1, 20))
    value = d(st.sampled_from((head, head + 3)))
    heads, group = d(st.integers(1, 2)), d(st.integers(1, 3))
    causal = d(flags)
    keys = queries if causal else d(st.integers(1, 40))
    options: dict[str, Any] = {"causal": causal, "softcap": d(st.sampled_from((0.0, 0.0, 3.0)))}
    if causal:
        options["window"] = d(st.sampled_from((0, 1, 7, 100)))
        options["chunk"] = d(st.sampled_from((0, 0, 1, 12)))
        if d(flags):
            cuts = torch.rand(batch, queries, generator=d.generator) < d(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
            cuts[:, 0] = True
            order = torch.arange(queries)
            options["positions"] = (order - torch.where(cuts, order, 0).cummax(-1).values).to(d.device)
    kind = d(st.sampled_from(("none", "none", "left", "right", "holes", "all", "one")))
    if kind != "none":
        count = d.integers(keys + 1, batch, 1).cpu()
        order = torch.arange(keys)[None]
        padding = {
            "left": order >= count, "right": order < count,
            "holes": torch.rand(batch, keys, generator=d.generator) < 0.5,
            "all": order < 0, "one": order == count - 1,
        }[kind].expand(batch, keys)  # fmt: skip
        options["padding"] = padding.to(d.device)
    dense = d(st.sampled_from(("none", "none", "none", "bool", "additive")))
    if dense != "none" and "positions" not in options:
        mask = torch.randn(batch, 1, queries, keys, generator=d.generator).to(d.device)
        options["dense"] = mask > -1 if dense == "bool" else mask.to(d.dtype)

    if d(flags):
        options["sinks"] = d.tensor(heads * group, scale=1.0, grad=True)
    if d(st.integers(0, 3)) == 0:
        options["dropout_p"] = d(st.sampled_from((0.1, 0.5)))
        options["seed"] = d.integers(2**62, 1)
    elif "sinks" not in options and "dense" not in options:
        options["blind"] = d(st.sampled_from(masks.BLINDS))

    def rows(length: int, count: int, width: int) -> torch.Tensor:
        return d.tensor(batch, length, count, width, scale=1.0, grad=True).detach().transpose(1, 2).requires_grad_()

    q, k, v = rows(queries, heads * group, head), rows(keys, heads, head), rows(keys, heads, value)
    return Sample("", (q, k, v), options)


FUZZ = {"attention": _attention_case}


def _attention_derivations() -> list[Derivation]:
    def formula(
        q: Array,
        k: Array,
        v: Array,
        bias: Array | None = None,
        sinks: Array | None = None,
        *,
        scale: str,
        cap: int = 0,
        sees: Callable[[int, int, int], bool] = lambda b, i, j: True,
        keeps: Array | None = None,
        p: str = "0",
    ) -> list[Array]:
        out = np.full((*q.shape[:3], v.shape[3]), sympy.Integer(0), dtype=object)
        for b, h, i in np.ndindex(q.shape[:3]):
            kv = h * k.shape[1] // q.shape[1]
            seen = [j for j in range(k.shape[2]) if sees(b, i, j)]
            s = [ratio(scale) * np.dot(q[b, h, i], k[b, kv, j]) for j in seen]
            s = [cap * sympy.tanh(u / cap) for u in s] if cap else s
            s = [u + bias[0, h, i, j] for u, j in zip(s, seen, strict=True)] if bias is not None else s
            e = [sympy.exp(u) for u in s]
            total = sum(e) + (0 if sinks is None else sympy.exp(sinks[h]))
            for j, weight in zip(seen, e, strict=True):
                if keeps is None or keeps[b, h, i, j]:
                    out[b, h, i] = out[b, h, i] + weight / total / (1 - ratio(p)) * v[b, kv, j]
        return [out]

    def derive(
        name: str,
        b: int,
        length: int,
        of_formula: dict[str, Any],
        of_call: dict[str, Any],
        sizes: tuple[int, int, int, int],
        **rest: Any,
    ) -> Derivation:
        hq, hk, d, dv = sizes
        more = {"bias": (1, hq, length, length)} if "frozen" in rest else {}
        if rest.pop("sinks", False):
            more["sinks"] = (hq,)

        def call(fn: Any, q: Any, k: Any, v: Any, bias: Any = None, sinks: Any = None) -> Any:
            return fn(q, k, v, scale=0.7, dense=bias, sinks=sinks, **of_call)

        return Derivation(
            name,
            {"q": (b, hq, length, d), "k": (b, hk, length, d), "v": (b, hk, length, dv), **more},
            call,
            functools.partial(formula, scale="0.7", **of_formula),
            **rest,
        )

    def causal(b: int, i: int, j: int) -> bool:
        return j <= i

    left = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    holes = torch.tensor([[1, 0, 1]])
    documents = torch.tensor([[0, 1, 0, 1]])
    seed = torch.tensor([2**33 + 5])
    keeps = masks.kept(seed, 1, 2, 3, 3, 0.25).numpy()
    assert 0 < keeps.sum() < keeps.size
    return [
        derive("a row of scores", 1, 2, {}, {}, (1, 1, 1, 2), simplify=("PyTorch",)),
        derive("a row of capped scores", 1, 2, {"cap": 3}, {"softcap": 3.0}, (1, 1, 1, 2), simplify=("PyTorch",)),
        derive("two heads share keys", 1, 3, {}, {}, (2, 1, 1, 2)),
        derive("causal, capped", 1, 3, {"sees": causal, "cap": 2}, {"causal": True, "softcap": 2.0}, (1, 1, 2, 1)),
        derive(
            "left padding, window",
            2,
            4,
            {"sees": lambda b, i, j: i - 2 < j <= i and bool(left[b, j])},
            {"causal": True, "window": 2, "padding": left},
            (1, 1, 1, 2),
        ),
        derive(
            "padding between tokens",
            1,
            3,
            {"sees": lambda b, i, j: j <= i and bool(holes[b, j])},
            {"causal": True, "padding": holes},
            (2, 1, 1, 2),
        ),
        derive(
            "packed documents",
            1,
            4,
            {"sees": lambda b, i, j: j <= i and i // 2 == j // 2},
            {"causal": True, "positions": documents},
            (1, 1, 1, 2),
        ),
        derive("a row of scores with a sink", 1, 1, {}, {}, (1, 1, 1, 2), sinks=True, simplify=("PyTorch",)),
        derive("sinks, causal", 1, 3, {"sees": causal}, {"causal": True}, (2, 1, 1, 2), sinks=True),
        derive(
            "dropout, sinks",
            1,
            3,
            {"keeps": keeps, "p": "0.25"},
            {"dropout_p": 0.25, "seed": seed},
            (2, 1, 1, 2),
            sinks=True,
        ),
        derive("additive mask", 1, 2, {"cap": 2}, {"softcap": 2.0}, (2, 1, 1, 2), frozen=("bias",)),
    ]


DERIVATIONS = {"attention": _attention_derivations}

SMALL_TILES = {"_tiles": lambda *_: {"BLOCK_M": 2, "BLOCK_N": 2, "num_warps": 1, "num_stages": 1}}

GRADIENTLESS = "no_gradient_comes_to and float32"
MUTANTS = (
    *(
        Mutant(
            f"attention by cuDNN: {name}",
            "kernels/_attention_routes.py",
            old,
            new,
            "tests/kernels/test_attention.py tests/autotune/test_variants.py "
            "-k 'at_once or comes_again or are_counted or not_cudnn'",
        )
        for name, old, new in (
            ("a batch of another size has the same plan", "size = call.batch, call.q_length", "size = call.q_length"),
            ("a size never pays for its plan", "so_far >= self.PLAN or len(planned)", "len(planned)"),
            ("every new size has a plan at once", "len(planned) < self.AT_ONCE", "True"),
            ("what was lost is forgotten", "lost.pop(size, 0.0) +", ""),
            ("what causality hides is not lost less", "(2 if call.causal else 1)", "1"),
            ("kinds share their first sizes", "kind = q.device, q.dtype, call.heads", "kind = q.device, call.heads"),
            ("all sizes that there ever were are counted", "            lost.clear()", "            pass"),
            ("a plan is made in a recording", "if q.is_cuda and torch.cuda.is_current_stream_capturing()", "if False"),
        )
    ),
    *(
        Mutant(
            f"attention: {name}",
            "kernels/_attention_triton.py",
            old,
            new,
            "tests/kernels/test_attention.py -k 'natural or another_one or (forward_and_gradients and sinks)'",
            interpret=True,
        )
        for name, old, new in (
            ("the logsumexp is left in units of log₂e", " * 0.6931471805599453)", ")"),
            ("the logsumexp is taken in units of log₂e", "return lse * 1.4426950408889634", "return lse"),
            ("the logsumexp of a sink's weight is taken so", "- _in_twos(lse))", "- lse)"),
        )
    ),
    Mutant(
        "attention: causal off by one",
        "kernels/_attention_triton.py",
        "            if CAUSAL:\n"
        "                seen = seen & (cols[None, :] <= rows[:, None])\n"
        '            s = tl.where(seen, s, float("-inf"))\n'
        "        if BOUNDED",
        "            if CAUSAL:\n"
        "                seen = seen & (cols[None, :] < rows[:, None])\n"
        '            s = tl.where(seen, s, float("-inf"))\n'
        "        if BOUNDED",
        'tests/kernels/test_attention.py -k "forward_and_gradients"',
        interpret=True,
    ),
    Mutant(
        "attention: window off by one",
        "kernels/_attention_triton.py",
        "first = tl.maximum(first, q - (WINDOW - 1))",
        "first = tl.maximum(first, q - WINDOW)",
        'tests/kernels/test_attention.py -k "forward_and_gradients and window"',
        interpret=True,
    ),
    Mutant(
        "attention: window of the keys off by one",
        "kernels/_attention_triton.py",
        "past = tl.minimum(past, k + WINDOW)",
        "past = tl.minimum(past, k + WINDOW + 1)",
        'tests/kernels/test_attention.py -k "forward_and_gradients and window"',
        interpret=True,
    ),
    Mutant(
        "attention: no rescaling of the sum",
        "kernels/_attention_triton.py",
        "l_i = l_i * alpha + tl.sum(p, 1)",
        "l_i = l_i + tl.sum(p, 1)",
        'tests/kernels/test_attention.py -k "forward_and_gradients"',
        interpret=True,
    ),
    Mutant(
        "attention: dq without delta",
        "kernels/_attention_triton.py",
        "ds = _weights(s, lse[:, None], Sk, DENSE) * (dp - delta[:, None])",
        "ds = _weights(s, lse[:, None], Sk, DENSE) * dp",
        'tests/kernels/test_attention.py -k "forward_and_gradients"',
        interpret=True,
    ),
    Mutant(
        "attention: the sequence's last queries are taken twice",
        "kernels/_attention_triton.py",
        "tl.minimum(tl.minimum(inner, whole), past_last)",
        "tl.minimum(inner, past_last)",
        'tests/kernels/test_attention.py -k "forward_and_gradients"',
        interpret=True,
    ),
    Mutant(
        "attention: the sequence's last queries are left out",
        "kernels/_attention_triton.py",
        "tl.maximum(tl.minimum(inner, whole), past_full)",
        "tl.maximum(inner, past_full)",
        'tests/kernels/test_attention.py -k "forward_and_gradients"',
        interpret=True,
    ),
    Mutant(
        "attention: dk without scale",
        "kernels/_attention_triton.py",
        "    dk *= scale\n",
        "",
        'tests/kernels/test_attention.py -k "forward_and_gradients"',
        interpret=True,
    ),
    Mutant(
        "attention: dk of the first query head of a group",
        "kernels/_attention_triton.py",
        "        hq = h * GROUP + g\n",
        "        hq = h * GROUP\n",
        'tests/kernels/test_attention.py -k "forward_and_gradients"',
        interpret=True,
    ),
    Mutant(
        "attention: fp16 holds exponentials of any cap",
        "kernels/attention.py",
        "(10 if q.dtype == torch.float16 else 60)",
        "60",
        'tests/kernels/test_attention.py -k "reach_their_cap"',
        interpret=True,
    ),
    Mutant(
        "attention: softcap forgotten in dkdv",
        "kernels/_attention_triton.py",
        "            ds *= 1 - t * t\n        dk +=",
        "            ds *= 1\n        dk +=",
        'tests/kernels/test_attention.py -k "forward_and_gradients and softcap"',
        interpret=True,
    ),
    Mutant(
        "attention: PyTorch dv of one head",
        "kernels/_attention_pytorch.py",
        "return x.unflatten(1, (-1, group)).sum(2,",
        "return x.unflatten(1, (-1, group))[:, :, :1].sum(2,",
        'tests/kernels/test_attention.py -k "forward_and_gradients"',
    ),
    Mutant(
        "attention: documents run into each other",
        "kernels/_attention_mask.py",
        "return torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1",
        "return torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) > 1",
        "tests/kernels/test_attention.py::test_mask_op[none-True-0]",
    ),
    Mutant(
        "attention: the kind of mask is not waited for",
        "kernels/_attention_mask.py",
        "        event.synchronize()\n",
        "        pass\n",
        "tests/kernels/test_attention.py -k waited_for",
    ),
    *(
        Mutant(
            f"attention: queries without a gradient, {name}",
            "kernels/_attention_triton.py",
            old,
            new,
            f"tests/kernels/test_attention.py -k '{test}'",
            interpret=True,
        )
        for name, old, new, test in (
            ("one too many left out", "tl.where(asked, rows + 1, 0)", "tl.where(asked, rows, 0)", GRADIENTLESS),
            ("dq for the head before", "asked = tl.load(asked_ptr + head)", "asked = tl.load(asked_ptr)", GRADIENTLESS),
            (
                "dk and dv for another head",
                "tl.load(asked_ptr + b * Hq + hq)",
                "tl.load(asked_ptr + b * Hq)",
                GRADIENTLESS,
            ),
            (
                "the last tile is not whole",
                "past_full = tl.minimum(outer, past_last // BLOCK_M * BLOCK_M)",
                "past_full = outer",
                "padding_costs",
            ),
            ("dq is computed", "        hi = tl.where(m0 < asked, hi, 0)\n", "", "padding_costs"),
            (
                "gradients of queries that saw nothing are read",
                "        mask = mask & (lse != float(\"inf\"))[:, None]\n",
                "        lse = lse\n",
                "skipped_padding_are_not_read",
            ),
            ("dk is computed", "tl.minimum(hi, tl.load(asked_ptr + b * Hq + hq))", "hi", "padding_costs"),
        )
    ),
    *(
        Mutant(
            f"attention: skipped padding, {name}",
            "kernels/_attention_mask.py",
            old,
            new,
            "tests/kernels/test_attention.py -k test_mask_op",
        )
        for name, old, new in (
            (
                "the last token too",
                "torch.where(order >= last[:, None], length,",
                "torch.where(order + 1 >= last[:, None], length,",
            ),
            ("nobody is said to see nothing", "sighted = sighted & (last == length).all()", "pass"),
            ("always", "    if skip and padding is not None:", "    if padding is not None:"),
        )
    ),
    Mutant(
        "attention: documents are looked at",
        "kernels/_attention_mask.py",
        "    if padding is None:\n        return start, stop, end, keep, kind.fill_(INTERVALS)\n",
        "",
        "tests/kernels/test_attention.py -k documents_alone",
    ),
    *(
        Mutant(
            f"attention: varlen, {name}", f"kernels/{file}.py", old, new, "tests/kernels/test_attention.py -k varlen"
        )
        for name, file, old, new in (
            (
                "the last mask's documents",
                "_attention_pytorch",
                "if _LAST[0]() is not call.start or _LAST[1] !=",
                "if False and _LAST[1] !=",
            ),
            (
                "a mask that was written to",
                "_attention_pytorch",
                "is not call.start or _LAST[1] != call.start._version:",
                "is not call.start:",
            ),
            (
                "a window one too wide",
                "_attention_pytorch",
                '"window_size_left": call.window - 1',
                '"window_size_left": call.window',
            ),
            (
                "heads and sequences change places",
                "_attention_pytorch",
                "stats.unflatten(1, (call.batch, -1)).transpose(0, 1)",
                "stats.view(lse.shape)",
            ),
            (
                "padding",
                "_attention_routes",
                "    if o.padding is not None or (o.mask is",
                "    if False or (False and o.mask is",
            ),
        )
    ),
    Mutant(
        "attention: padding counts as a key",
        "kernels/_attention_triton.py",
        "    if HAS_END:\n"
        "        dk = tl.where((cols < end)[:, None], dk, 0.0)\n"
        "        dv = tl.where((cols < end)[:, None], dv, 0.0)\n",
        "",
        "tests/kernels/test_attention.py::test_forward_and_gradients[causal=False,padding=right-float16]",
        interpret=True,
    ),
    *(
        Mutant(
            f"attention: {name}",
            f"kernels/{file}.py",
            old,
            new,
            f'tests/kernels/test_attention.py -k "forward_and_gradients and {which}"',
            interpret=file == "_attention_triton",
        )
        for name, which, file, old, new in (
            (
                "no sink in the sum",
                "sinks",
                "_attention_triton",
                "        l_i = tl.full([BLOCK_M], 1.0, tl.float32)\n",
                "        l_i = tl.zeros([BLOCK_M], tl.float32)\n",
            ),
            (
                "a sink's gradient of the other sign",
                "sinks",
                "_attention_triton",
                "-tl.sum(p * delta, 0))",
                "tl.sum(p * delta, 0))",
            ),
            (
                "a sink's gradient of one tile",
                "sinks and window",
                "_attention_triton",
                "tl.store(dsinks_ptr + tl.program_id(0),",
                "tl.store(dsinks_ptr + head * tiles,",
            ),
            (
                "PyTorch's sink without a gradient",
                "sinks",
                "_attention_pytorch",
                "dsinks.copy_(-(weight",
                "dsinks.copy_(0 * (weight",
            ),
            (
                "dropout in the sum of the softmax",
                "dropout",
                "_attention_triton",
                "            l_i = l_i * alpha + tl.sum(p, 1)\n",
                "            dropped = _kept(p, seed, rows[:, None], cols[None, :], head, DROP) if DROP > 0 else p\n"
                "            l_i = l_i * alpha + tl.sum(dropped, 1)\n",
            ),
            (
                "other weights dropped in dq",
                "dropout",
                "_attention_triton",
                "dp = _kept(dp, seed, rows[:, None], cols[None, :], head, DROP)",
                "dp = _kept(dp, seed + 1, rows[:, None], cols[None, :], head, DROP)",
            ),
            (
                "nothing dropped in dv",
                "dropout",
                "_attention_triton",
                "dv += tl.dot(dropped.to(do.dtype), do",
                "dv += tl.dot(p.to(do.dtype), do",
            ),
            (
                "dropout of one head for all",
                "dropout",
                "_attention_triton",
                "tl.cast(head, tl.int32) + zero",
                "zero",
            ),
            (
                "PyTorch's dp without dropout",
                "dropout",
                "_attention_pytorch",
                "    ds = p * (dp - delta)\n",
                "    ds = p * (do @ v.to(compute).repeat_interleave(call.group, 1).transpose(-1, -2) - delta)\n",
            ),
            (
                "a query that sees nothing gives 0",
                "blind",
                "attention",
                "    if call.means:  #",
                "    if False:  #",
            ),
            (
                "a hidden row's weights of 1",
                "rows",
                "_attention_triton",
                "    if DENSE == 2:  # of a row",
                "    if False:  # of a row",
            ),
            ("no gradient of means", "blind", "attention", "    if call.means and want_kv:", "    if False:"),
            (
                "queries before the first token see",
                "blind",
                "_attention_mask",
                "sighted = ~left.any() & whole if",
                "sighted = whole if",
            ),
        )
    ),
)
