"""Norms of heads and their rotary embedding in one launch: forward and every gradient, in every style and layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import sympy
import torch
from hypothesis import strategies as st

from fastft.kernels._op import OPS
from fastft.kernels.norm_rotary import norm_rotary, reference, stock, supported
from fastft.kernels.rms_norm import rms_norm
from fastft.kernels.rotary import STYLES, rotary
from tests.kernels._check import check_op
from tests.kernels._derivations import BOTH, EPS, Array, Derivation, over_rows
from tests.kernels._expressions import ratio
from tests.kernels._fuzz import Draw, flags
from tests.kernels._samples import Named, New, Sample
from tests.kernels.test_rotary import _rotated
from tests.mutation._mutant import Mutant

OP = OPS["norm_rotary"]
E = 1e-5


def made(
    *, batch: int = 2, seq: int = 5, q: int = 4, k: int = 2, d: int = 16, width: int = 16, weights: bool = True,
    transpose: bool = True, dtype: torch.dtype = torch.float32, device: str = "cpu", tables: int = 1,
) -> list[Any]:  # fmt: skip
    """q, k, their weights, cos and sin of tables of ``width``."""

    def heads(n: int) -> torch.Tensor:
        x = torch.randn(batch, seq, n, d, device=device).to(dtype)
        return (x if transpose else x.transpose(1, 2)).requires_grad_()

    angle = torch.randn(tables, seq, width, device=device)
    pair = [torch.randn(d, device=device).to(dtype).requires_grad_() if weights else None for _ in range(2)]
    return [heads(q), heads(k), *pair, angle.cos().to(dtype), angle.sin().to(dtype)]


HALF = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("width", [16, 8])
@pytest.mark.parametrize("transpose", [True, False])
def test_matches_reference(dtype: torch.dtype, style: str, width: int, transpose: bool, device: str) -> None:
    args = made(dtype=dtype, width=width, transpose=transpose, device=device, tables=2)
    check_op(OP, args, E, 0.0, style, None, 16, 2, transpose, length=2 * 5 * 4)


@pytest.mark.parametrize(
    "more",
    [
        {"weights": False},
        {"d": 24, "width": 10},
        {"d": 20, "width": 20, "q": 3, "k": 3},
        {"seq": 1, "batch": 1},
        {"q": 17, "k": 1},
        {"d": 256, "width": 256, "q": 9, "k": 5, "seq": 3},
        {"d": 6, "width": 6, "seq": 40},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_sizes(more: dict[str, Any], offset: float, device: str) -> None:
    args = made(**more, device=device)
    length = args[0].numel() // args[0].shape[-1]
    check_op(OP, args, E, offset, "half", None, more.get("width", 16), 2, True, length=max(length, args[0].shape[-1]))


def test_sequence_first_and_another_dtype(device: str) -> None:
    args = made(device=device, dtype=torch.bfloat16)
    check_op(OP, args, E, 1.0, "half", torch.float32, 16, 1, False, length=40)


@pytest.mark.parametrize("strided", [False, True])
def test_slices_of_a_fused_projection(strided: bool, device: str) -> None:
    qkv = torch.randn(2, 5, 8, 16, device=device)
    _, _, *rest = made(device=device)
    q, k = (t.detach().requires_grad_() for t in (qkv[:, :, :4], qkv[:, :, 4:6]))
    check_op(OP, [q, k, *rest], E, 0.0, "half", None, 16, 2, True, length=40, strided_grads=strided)


def test_frozen_weights_and_frozen_heads(device: str) -> None:
    """LoRA trains q and k alone; a model whose projections are frozen may train the weights."""
    q, k, qw, kw, *tables = made(device=device)
    check_op(OP, [q, k, qw.detach(), kw.detach(), *tables], E, 0.0, "half", None, 16, 2, True, length=40)
    check_op(OP, [q.detach(), k.detach(), qw, kw, *tables], E, 0.0, "half", None, 16, 2, True, length=40)
    check_op(OP, [q, k.detach(), qw.detach(), kw, *tables], E, 0.0, "half", None, 16, 2, True, length=40)


def test_is_norm_then_rotary(device: str) -> None:
    q, k, qw, kw, cos, sin = made(device=device)
    ours = norm_rotary(q, k, qw, kw, cos, sin, E, 1.0, transpose=True)
    normed = [rms_norm(x, w, E, 1.0).transpose(1, 2) for x, w in ((q, qw), (k, kw))]
    for a, b, c in zip(
        ours, rotary(*normed, cos, sin), stock(q, k, qw, kw, cos, sin, E, 1.0, transpose=True), strict=True
    ):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)
        assert a.stride() == b.stride(), "in memory as the projection is"


def test_gradients_lie_as_the_projections_do(device: str) -> None:
    q, k, *rest = made(device=device)
    outs = norm_rotary(q, k, *rest, E, transpose=True)
    dq, dk = torch.autograd.grad(outs, (q, k), [torch.randn_like(y).contiguous() for y in outs])
    assert dq.is_contiguous() and dk.is_contiguous()


@pytest.mark.parametrize("batch, seq", [(0, 5), (2, 0)])
def test_empty(batch: int, seq: int, device: str) -> None:
    args = made(batch=batch, seq=seq, device=device)
    outs = norm_rotary(*args, E, transpose=True)
    grads = torch.autograd.grad([y.sum() for y in outs], args[:4])
    assert [g.shape for g in grads] == [t.shape for t in args[:4]] and not any(g.any() for g in grads)


def test_complex_tables(device: str) -> None:
    q, k, qw, kw, cos, sin = made(width=8, device=device)
    ours = norm_rotary(q, k, qw, kw, torch.complex(cos, sin), None, E, style="interleaved", transpose=True)
    want = norm_rotary(q, k, qw, kw, cos, sin, E, style="interleaved", transpose=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, want, strict=True))


@pytest.mark.parametrize("weights", [True, False])
def test_raw_ops(weights: bool, device: str) -> None:
    made_up = made(weights=weights, transpose=False, device=device)
    args = tuple(None if t is None else t.detach() for t in made_up)
    torch.library.opcheck(torch.ops.fastft.norm_rotary.default, (*args, E, 0.0, "half", None, 16, 2))
    y, z, qr, kr = torch.ops.fastft.norm_rotary(*args, E, 0.0, "half", None, 16, 2)
    for wanted in ((True, weights), (True, False), (False, weights)):
        rest = (0.0, "half", 16, 2, *wanted)
        torch.library.opcheck(torch.ops.fastft.norm_rotary_backward.default, (y, z, *args, qr, kr, *rest))


@pytest.mark.parametrize("fn", [norm_rotary, reference])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("width", [6, 3])
def test_gradcheck(fn: Any, style: str, width: int) -> None:
    args = made(dtype=torch.float64, batch=1, seq=2, q=2, k=1, d=8, width=width)
    *leaves, cos, sin = args
    assert torch.autograd.gradcheck(lambda *t: fn(*t, cos, sin, E, 1.0, style, None, 6, 2, True), leaves)


def test_compiles(device: str) -> None:
    *leaves, cos, sin = made(device=device)

    def call(*t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return norm_rotary(*t, cos, sin, E, transpose=True)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    ours, eager = (torch.autograd.grad([y.square().sum() for y in f(*leaves)], leaves) for f in (compiled, call))
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_tables_that_require_a_gradient_are_refused(device: str) -> None:
    *args, cos, sin = made(device=device)
    with pytest.raises(ValueError, match="gradients of cos and sin"):
        norm_rotary(*args, cos.requires_grad_(), sin, E, transpose=True)


@pytest.mark.parametrize(
    "change, code",
    [
        ({}, None),
        ({0: torch.empty(2, 5, 64)}, "shape"),
        ({1: torch.empty(2, 6, 2, 16)}, "shape"),
        ({1: torch.empty(2, 5, 2, 16, dtype=torch.half)}, "dtype"),
        ({2: torch.empty(8)}, "shape"),
        ({2: None}, "weight"),
        ({3: torch.empty(16, dtype=torch.int64)}, "dtype"),
        ({4: torch.empty(1, 6, 16)}, "shape"),
        ({8: "spiral"}, "style"),
    ],
    ids=lambda v: "-".join(map(str, v)) if isinstance(v, dict) else str(v),  # not what is in a tensor
)
def test_supported(change: dict[int, Any], code: str | None) -> None:
    args = [*made(), E, 0.0, "half", None, None, 2, True]
    for at, value in change.items():
        args[at] = value
    reason = supported(*args)
    assert (reason and reason.code) == code


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _samples(new: New, n: int) -> Named:
    for style in STYLES:
        tables = new(1, 3 * n, 3, grad=False), new(1, 3 * n, 3, grad=False)
        yield (
            style,
            (new(1, 3 * n, 2, 6), new(1, 3 * n, 1, 6), new(6), new(6), *tables, E, 1.0, style),
            {"transpose": True},
        )
    tables = new(2, n, 4, grad=False), new(2, n, 4, grad=False)
    part = (new(2, 2, n, 6), new(2, 1, n, 6), None, None, *tables, E)
    yield "part of a head, weightless", part, {"rotary_dim": 4}
    yield "sequence first", (new(2, n, 2, 4), new(2, n, 1, 4), new(4), new(4), *tables, E), {"seq_dim": 1}


SAMPLES = {"norm_rotary": _samples}


def _case(d: Draw) -> Sample:
    batch, seq, half = d(st.integers(1, 3)), d(st.integers(1, 9)), d(st.sampled_from((1, 3, 8, 16, 20)))
    width = 2 * half + d(st.sampled_from((0, 0, 2, 6)))
    style, seq_dim, transpose = d(st.sampled_from(tuple(STYLES))), d(st.sampled_from((1, 2))), d(flags)

    def heads(count: int) -> torch.Tensor:
        x = d.tensor(batch, seq, count, width, grad=True)
        return x if (seq_dim == 1) != transpose else x.detach().transpose(1, 2).requires_grad_()

    angle = torch.randn(d(st.sampled_from((1, batch))), seq, half, generator=d.generator).to(d.device)
    if d(flags):
        angle = angle.repeat_interleave(2, -1) if style == "interleaved" else torch.cat((angle, angle), -1)
    tables = angle.cos().to(d.dtype), angle.sin().to(d.dtype)
    weights = [d.tensor(width, scale=1.0), d.tensor(width, scale=1.0)] if d(flags) else [None, None]
    q, k = heads(d(st.integers(1, 5))), heads(d(st.integers(1, 3)))
    offset = d(st.sampled_from((0.0, 1.0)))
    rest = (d(st.sampled_from((1e-6, 1e-2))), offset, style, None, 2 * half, seq_dim, transpose)
    return Sample("", (q, k, *weights, *tables, *rest), {})


FUZZ = {"norm_rotary": _case}
ROWWISE = ("norm_rotary",)


def _derivations() -> list[Derivation]:
    def normed(x: Array, w: Array | None, offset: int) -> Array:
        y = over_rows(lambda row: row / sympy.sqrt(np.sum(row**2) / len(row) + ratio(EPS)))(x)
        return y if w is None else y * (w + offset)

    def two(style: str, width: int, offset: int) -> Derivation:
        def formula(q: Array, k: Array, qw: Array, kw: Array, cos: Array, sin: Array) -> list[Array]:
            return [_rotated(normed(x, w, offset), cos, sin, style) for x, w in ((q, qw), (k, kw))]

        return Derivation(
            f"{style}, tables of {width}, {offset} + w",
            {"q": (1, 3, 2, 4), "k": (1, 1, 2, 4), "qw": (4,), "kw": (4,), "cos": (1, 2, width), "sin": (1, 2, width)},
            lambda fn, q, k, qw, kw, cos, sin: fn(q, k, qw, kw, cos, sin, EPS, float(offset), style),
            formula,
            frozen=("cos", "sin"),
            outputs=2,
        )

    def part(q: Array, k: Array, cos: Array, sin: Array) -> list[Array]:
        found = []
        for x in (q, k):
            y = normed(x.transpose(0, 2, 1, 3), None, 0)
            found.append(np.concatenate((_rotated(y[..., :2], cos, sin, "half"), y[..., 2:]), axis=-1))
        return found

    shapes = {"q": (2, 2, 1, 3), "k": (2, 2, 1, 3), "cos": (2, 2, 2), "sin": (2, 2, 2)}
    weightless = Derivation(
        "part of a head, weightless",
        shapes,
        lambda fn, q, k, cos, sin: fn(q, k, None, None, cos, sin, EPS, 0.0, "half", None, 2, 2, True),
        part,
        frozen=("cos", "sin"),
        outputs=2,
        simplify=BOTH,
    )
    return [two(style, width, offset) for style, width, offset in zip(STYLES, (4, 2, 4), (0, 1, 0), strict=True)] + [
        weightless
    ]


DERIVATIONS = {"norm_rotary": _derivations}

SMALL_TILES = {
    "processors": lambda device: 1,
    **{f"{way}.heuristic": lambda *_: {"TILE": 4, "num_warps": 1, "PROGRAMS": 2} for way in ("FORWARD", "BACKWARD")},
}

MUTANTS = (
    *(
        Mutant(
            f"norm_rotary: {name}",
            "kernels/norm_rotary.py",
            old,
            new,
            f'tests/kernels/test_norm_rotary.py -k "{which}"',
            interpret=interpret,
        )
        for name, which, old, new, interpret in (
            ("dx without its second term", "matches_reference", "r * (g1 - x1 * mean)", "r * g1", True),
            (
                "mean over half of a head",
                "matches_reference",
                "    total = tl.sum(first, 1) + tl.sum(second, 1)\n",
                "    total = tl.sum(first, 1)\n",
                True,
            ),
            (
                "the passed part is not in the mean",
                "sizes",
                "        total += tl.sum(rest, 1)\n",
                "        total += 0.0\n",
                True,
            ),
            (
                "backward turns on",
                "matches_reference",
                "g1 = dy1 * c1[None, :] + dy2 * s2[None, :]",
                "g1 = dy1 * c1[None, :] - dy2 * s2[None, :]",
                True,
            ),
            (
                "k with q's weight",
                "matches_reference",
                "    w1, w2, w_rest = _load_weight(kw_ptr,",
                "    w1, w2, w_rest = _load_weight(qw_ptr,",
                True,
            ),
            (
                "dweight of the gradient before it is turned back",
                "matches_reference",
                "            dw1 += tl.sum(g1 * x1, 0)",
                "            dw1 += tl.sum(dy1 * x1, 0)",
                True,
            ),
            (
                "dweight of one program",
                "sizes",
                "        total = partial.sum(0)\n",
                "        total = partial[0]\n",
                True,
            ),
            (
                "offset forgotten",
                "sizes and 1.0",
                "mask=pair < HALF, other=0.0).to(tl.float32) + OFFSET\n        second",
                "mask=pair < HALF, other=0.0).to(tl.float32)\n        second",
                True,
            ),
            (
                "PyTorch's dx without its second term",
                "matches_reference",
                "grad.copy_(each * (g - x_hat * (g * x_hat).mean(-1, keepdim=True)))",
                "grad.copy_(each * g)",
                False,
            ),
            (
                "PyTorch's dweights exchanged",
                "matches_reference",
                "q_r, q_grad, q_dweight), (dk, k, k_weight, k_r, k_grad, k_dweight)",
                "q_r, q_grad, k_dweight), (dk, k, k_weight, k_r, k_grad, q_dweight)",
                False,
            ),
        )
    ),
)
