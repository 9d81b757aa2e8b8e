"""Gated linear units: SwiGLU and GeGLU (Shazeer 2020, https://arxiv.org/abs/2002.05202), the activation and the
product.

Maths, element by element, all of it in fp32 with one rounding at the end::

    y = f(g) u

    silu        f(g) = g σ(g)                        f′(g) = σ(g) (1 + g (1 − σ(g)))
    gelu_tanh   f(g) = g (1 + tanh t(g)) / 2         t(g) = √(2/π) (g + 0.044715 g³)
                     = g σ(2t)                       f′(g) = σ(2t) (1 + g (1 − σ(2t)) 2t′)
    gelu        f(g) = g Φ(g)                        f′(g) = Φ(g) + g φ(g)

(σ the logistic function, Φ and φ the normal distribution and its density; (1 + tanh t) / 2 = σ(2t) is the same number
without the cancellation of 1 + tanh t for large negative g.)

Backward::

    dg = dy u f′(g)        du = dy f(g)

Shapes: gate and up ``[..., N]``, y ``[..., N]``. Saved: gate and up; f(g) is computed again in the backward, which
costs no memory traffic. gate and up may be the two halves of one projection ``[..., 2N]``: their rows are read where
they are. ``glu_packed`` is that case as one op: its backward writes both gradients into the halves of one ``[...,
2N]``, which saves the concatenation (2N read, 2N written a row) that autograd needs for ``chunk``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fastft.kernels._config import Config, Space, crowded
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import Cost, Op, Reason, Recompute, check_dtypes, raw_op, register, use_triton
from fastft.kernels._rows import Rows, row_offset, rows_of, size
from fastft.kernels._triton import cdiv, jit, tl

KINDS = ("silu", "gelu_tanh", "gelu")

# ---------------------------------------------------------------- reference


def _activation(g: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "silu":
        return torch.nn.functional.silu(g)
    return torch.nn.functional.gelu(g, approximate="tanh" if kind == "gelu_tanh" else "none")


def reference(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """Plain PyTorch, differentiable; fp32 inside (fp64 for fp64)."""
    compute = torch.promote_types(gate.dtype, torch.float32)
    return (_activation(gate.to(compute), kind) * up.to(compute)).to(gate.dtype)


def packed_reference(gate_up: torch.Tensor, kind: str, gate_first: bool = True) -> torch.Tensor:
    """:func:`reference` on the halves of the last axis of ``gate_up``."""
    first, second = gate_up.chunk(2, dim=-1)
    return reference(first, second, kind) if gate_first else reference(second, first, kind)


# ---------------------------------------------------------------- configuration

#: Elements of a row that one program takes: 8 for each of its 128 threads, one 16-byte load in bf16.
BLOCK = 1024


def _block(device: torch.device, dtype: torch.dtype, rows: int, n: int, kind: str) -> Config:
    return {"BLOCK": BLOCK, "num_warps": 4}


def _legal(config: Config, device: torch.device, dtype: torch.dtype, rows: int, n: int, kind: str) -> str | None:
    if config["BLOCK"] < 32 * config["num_warps"]:
        return f"{config['BLOCK']} elements for {32 * config['num_warps']} threads"
    return crowded(6 * config["BLOCK"], config["num_warps"])


_VALUES = {"BLOCK": (256, 512, 1024, 2048, 4096, 8192), "num_warps": (1, 2, 4, 8, 16)}
FORWARD = Space("glu.forward", _VALUES, _block, tokens=("rows",), sizes=("n", "kind"), legal=_legal)
BACKWARD = Space("glu.backward", _VALUES, _block, tokens=("rows",), sizes=("n", "kind"), legal=_legal)

# ---------------------------------------------------------------- kernels


@jit
def _activate(g, KIND: tl.constexpr):
    """f(g) and f′(g)."""
    if KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * cdf, cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    if KIND == "silu":
        z, z_slope = g, 1.0
    else:  # z = 2t; 2√(2/π) = 1.5957691216057308
        z = 1.5957691216057308 * g * (1.0 + 0.044715 * g * g)
        z_slope = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
    # σ(z), and σ(−z) = 1 − σ(z), which f′ multiplies by up to 50, so that it must not be a difference: both of one
    # exponential, kept from overflowing, and one root. These two are an instruction each, where exp and a division take
    # five more for numbers next to 0 and infinity.
    e = tl.exp2(tl.minimum(-1.4426950408889634 * z, 126.0))
    root = tl.rsqrt(1.0 + e)
    s = root * root
    return g * s, s + g * s * (e * s) * z_slope


@jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr,
    n, blocks, inner, g_outer, g_inner, u_outer, u_inner, y_outer, y_inner,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate_ptr + row_offset(row, inner, g_outer, g_inner) + col, mask=col < n, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + row_offset(row, inner, u_outer, u_inner) + col, mask=col < n, other=0.0).to(tl.float32)
    f, _ = _activate(g, KIND)
    y_at = y_ptr + row_offset(row, inner, y_outer, y_inner) + col
    tl.store(y_at, (f * u).to(y_ptr.dtype.element_ty), mask=col < n)


@jit
def _backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    n, blocks, inner, dy_outer, dy_inner, g_outer, g_inner, u_outer, u_inner,
    dg_outer, dg_inner, du_outer, du_inner,
    KIND: tl.constexpr, WANT_DGATE: tl.constexpr, WANT_DUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + row_offset(row, inner, dy_outer, dy_inner) + col, mask=col < n, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + row_offset(row, inner, g_outer, g_inner) + col, mask=col < n, other=0.0).to(tl.float32)
    f, slope = _activate(g, KIND)
    if WANT_DGATE:
        u = tl.load(up_ptr + row_offset(row, inner, u_outer, u_inner) + col, mask=col < n, other=0.0).to(tl.float32)
        dg_at = dgate_ptr + row_offset(row, inner, dg_outer, dg_inner) + col
        tl.store(dg_at, (dy * u * slope).to(dgate_ptr.dtype.element_ty), mask=col < n)
    if WANT_DUP:
        du_at = dup_ptr + row_offset(row, inner, du_outer, du_inner) + col
        tl.store(du_at, (dy * f).to(dup_ptr.dtype.element_ty), mask=col < n)


# ---------------------------------------------------------------- launchers


def _extent(walk: Rows, n: int) -> tuple[int, int]:
    """Rows and columns to launch over: a single row of all elements where rows follow each other without a gap."""
    dense = walk.inner == 1 and all(outer == n for outer, _ in walk.strides)
    return (1, walk.count * n) if dense else (walk.count, n)


def _forward_into(y: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str) -> None:
    if y.numel() == 0:
        return
    if not use_triton(gate) or gate.dtype == torch.float64:
        y.copy_(reference(gate, up, kind))
        return
    walk = rows_of(gate, up, y)
    if walk is None:
        y.copy_(_forward(gate.contiguous(), up.contiguous(), kind))
        return
    rows, n = _extent(walk, gate.shape[-1])
    tile = FORWARD(gate.device, gate.dtype, walk.count, gate.shape[-1], kind)
    blocks = cdiv(n, tile["BLOCK"])
    (g_outer, g_inner), (u_outer, u_inner), (y_outer, y_inner) = walk.strides
    _forward_kernel[(rows * blocks,)](
        gate, up, y, n, blocks, walk.inner, g_outer, g_inner, u_outer, u_inner, y_outer, y_inner,
        KIND=kind, **tile,
    )  # fmt: skip


def _backward_into(
    dgate: torch.Tensor | None,
    dup: torch.Tensor | None,
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    kind: str,
) -> None:
    """Write the gradients that are not None."""
    if dy.numel() == 0 or (dgate is None and dup is None):
        return
    if not use_triton(gate) or gate.dtype == torch.float64:
        compute = torch.promote_types(gate.dtype, torch.float32)
        f, slope = _activate_torch(gate.to(compute), kind)
        if dgate is not None:
            dgate.copy_(dy.to(compute) * up.to(compute) * slope)
        if dup is not None:
            dup.copy_(dy.to(compute) * f)
        return
    into = (gate if dgate is None else dgate, up if dup is None else dup)
    walk = rows_of(gate, up, dy, *into)
    if walk is None:
        dense = _backward(dy.contiguous(), gate.contiguous(), up.contiguous(), kind, dgate is not None, dup is not None)
        for target, grad in zip((dgate, dup), dense, strict=True):
            if target is not None:
                target.copy_(grad)
        return
    rows, n = _extent(walk, gate.shape[-1])
    tile = BACKWARD(gate.device, gate.dtype, walk.count, gate.shape[-1], kind)
    blocks = cdiv(n, tile["BLOCK"])
    (g_outer, g_inner), (u_outer, u_inner), (dy_outer, dy_inner), (dg_outer, dg_inner), (du_outer, du_inner) = (
        walk.strides
    )
    _backward_kernel[(rows * blocks,)](
        dy, gate, up, into[0], into[1],
        n, blocks, walk.inner, dy_outer, dy_inner, g_outer, g_inner, u_outer, u_inner,
        dg_outer, dg_inner, du_outer, du_inner,
        KIND=kind, WANT_DGATE=dgate is not None, WANT_DUP=dup is not None, **tile,
    )  # fmt: skip


def _activate_torch(g: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """f(g) and f′(g), as :func:`_activate`."""
    if kind == "gelu":
        cdf = 0.5 * (1.0 + torch.erf(g * math.sqrt(0.5)))
        return g * cdf, cdf + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)
    c = 2.0 * math.sqrt(2.0 / math.pi)
    z, z_slope = (g, 1.0) if kind == "silu" else (c * g * (1 + 0.044715 * g * g), c * (1 + 3 * 0.044715 * g * g))
    s = torch.sigmoid(z)
    return g * s, s * (1.0 + g * torch.sigmoid(-z) * z_slope)


def _forward(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    y = _forward_fake(gate, up, kind)
    _forward_into(y, gate, up, kind)
    return y


def _forward_fake(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.empty_like(gate)


def _backward(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str, want_dgate: bool, want_dup: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate, dup = _backward_fake(dy, gate, up, kind, want_dgate, want_dup)
    _backward_into(dgate if want_dgate else None, dup if want_dup else None, dy, gate, up, kind)
    return dgate, dup


def _backward_fake(
    dy: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: str, want_dgate: bool, want_dup: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    dgate = torch.empty_like(gate) if want_dgate else gate.new_empty(0)
    dup = torch.empty_like(up) if want_dup else up.new_empty(0)
    return dgate, dup


def _halves(gate_up: torch.Tensor, gate_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = gate_up.chunk(2, dim=-1)
    return (first, second) if gate_first else (second, first)


def _packed_forward(gate_up: torch.Tensor, kind: str, gate_first: bool) -> torch.Tensor:
    y = _packed_forward_fake(gate_up, kind, gate_first)
    _forward_into(y, *_halves(gate_up, gate_first), kind)
    return y


def _packed_forward_fake(gate_up: torch.Tensor, kind: str, gate_first: bool) -> torch.Tensor:
    return torch.empty_like(gate_up.narrow(-1, 0, gate_up.shape[-1] // 2))


def _packed_backward(dy: torch.Tensor, gate_up: torch.Tensor, kind: str, gate_first: bool) -> torch.Tensor:
    grad = torch.empty_like(gate_up)
    _backward_into(*_halves(grad, gate_first), dy, *_halves(gate_up, gate_first), kind)
    return grad


def _packed_backward_fake(dy: torch.Tensor, gate_up: torch.Tensor, kind: str, gate_first: bool) -> torch.Tensor:
    return torch.empty_like(gate_up)


# ---------------------------------------------------------------- ops

_raw = raw_op("glu(Tensor gate, Tensor up, str kind) -> Tensor", _forward, _forward_fake)
_raw_backward = raw_op(
    "glu_backward(Tensor dy, Tensor gate, Tensor up, str kind, bool want_dgate, bool want_dup) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)
_packed_raw = raw_op(
    "glu_packed(Tensor gate_up, str kind, bool gate_first) -> Tensor", _packed_forward, _packed_forward_fake
)
_packed_raw_backward = raw_op(
    "glu_packed_backward(Tensor dy, Tensor gate_up, str kind, bool gate_first) -> Tensor",
    _packed_backward,
    _packed_backward_fake,
)


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, kind):
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return _raw(gate, up, kind)

    @staticmethod
    def backward(ctx, dy):
        want_dgate, want_dup = ctx.needs_input_grad[:2]
        dgate, dup = _raw_backward(dy, *ctx.saved_tensors, ctx.kind, want_dgate, want_dup)
        return dgate if want_dgate else None, dup if want_dup else None, None


class _PackedGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, kind, gate_first):
        ctx.save_for_backward(gate_up)
        ctx.kind, ctx.gate_first = kind, gate_first
        return _packed_raw(gate_up, kind, gate_first)

    @staticmethod
    def backward(ctx, dy):
        return _packed_raw_backward(dy, *ctx.saved_tensors, ctx.kind, ctx.gate_first), None, None


def glu(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """``f(gate) * up``, differentiable in both.

    gate, up: ``[..., N]``, one dtype (fp32, fp16, bf16), any strides. kind: "silu" (SwiGLU), "gelu_tanh" or "gelu"
    (GeGLU with the tanh form or the exact one). The result has gate's dtype and memory order.
    """
    return _GLU.apply(gate, up, kind)


def glu_packed(gate_up: torch.Tensor, kind: str, gate_first: bool = True) -> torch.Tensor:
    """``f(gate) * up`` with ``gate, up = gate_up.chunk(2, dim=-1)`` (the other way round without ``gate_first``).

    gate_up: ``[..., 2N]``; the result ``[..., N]``. kind: as for :func:`glu`.
    """
    return _PackedGLU.apply(gate_up, kind, gate_first)


def supported(gate: torch.Tensor, up: torch.Tensor, kind: str) -> Reason | None:
    """None, or why this call cannot run as one kernel."""
    # The activations that the kernels know.
    if kind not in KINDS:
        return Reason("activation", f"the activation {kind!r} is not one of {', '.join(KINDS)}")
    # fp32 arithmetic: fp64 would lose digits on a GPU.
    if reason := check_dtypes(gate, up):
        return reason
    # The result has one dtype, and mixed operands would promote.
    if gate.dtype != up.dtype:
        return Reason("dtype", f"gate is {gate.dtype} and up {up.dtype}; one dtype for both is supported")
    # Element by element: no broadcasting.
    if gate.dim() < 1 or gate.dim() != up.dim() or any(a != b for a, b in zip(gate.shape, up.shape, strict=True)):
        return Reason("shape", f"gate is {tuple(gate.shape)} and up {tuple(up.shape)}; equal shapes are supported")
    return None


def packed_supported(gate_up: torch.Tensor, kind: str, gate_first: bool = True) -> Reason | None:
    """None, or why this call cannot run as one kernel."""
    # Two halves of the last axis.
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2:
        return Reason("shape", f"gate_up is {tuple(gate_up.shape)}; its last axis must be even to have two halves")
    return supported(*_halves(gate_up, gate_first), kind)


def cost(gate: torch.Tensor, up: torch.Tensor, kind: str) -> Cost:
    """Forward: gate and up in, y out; kept: gate and up."""
    elements, bytes_each = size(gate.numel()), gate.element_size()
    return Cost(8 * elements, 3 * elements * bytes_each, 2 * elements * bytes_each)


def packed_cost(gate_up: torch.Tensor, kind: str, gate_first: bool = True) -> Cost:
    """As :func:`cost`."""
    half = gate_up.narrow(-1, 0, gate_up.shape[-1] // 2)
    return cost(half, half, kind)


# ---------------------------------------------------------------- calls


def stock(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """transformers' MLPs: the activation is rounded before the product."""
    if kind == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up


def packed_stock(gate_up: torch.Tensor, kind: str) -> torch.Tensor:
    """As Phi-3's MLP."""
    gate, up = gate_up.chunk(2, dim=-1)
    return stock(gate, up, kind)


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """Gate and up from projections of their own."""
    if model.gated and not model.fused and model.activation in KINDS:
        yield {**model.tokens, "intermediate": model.intermediate, "activation": model.activation}


def packed_sizes(model: Model) -> Iterator[dict[str, Any]]:
    """Gate and up from one projection."""
    if model.gated and model.fused and model.activation in KINDS:
        yield {**model.tokens, "intermediate": model.intermediate, "activation": model.activation}


def inputs(new: New, *, batch: int, seq: int, intermediate: int, activation: str) -> Inputs:
    """gate and up [batch, seq, intermediate]."""
    gate, up = (new(batch, seq, intermediate, grad=True) for _ in range(2))
    return Inputs((gate, up, activation), wanted=[gate, up])


def packed_inputs(new: New, *, batch: int, seq: int, intermediate: int, activation: str) -> Inputs:
    """gate_up [batch, seq, 2·intermediate]."""
    gate_up = new(batch, seq, 2 * intermediate, grad=True)
    return Inputs((gate_up, activation), wanted=[gate_up])


register(
    Op(
        name="glu",
        call=glu,
        reference=reference,
        supported=supported,
        raw=("glu", "glu_backward"),
        recompute=Recompute.CHEAP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
        stock=stock,
    )
)
register(
    Op(
        name="glu_packed",
        call=glu_packed,
        reference=packed_reference,
        supported=packed_supported,
        raw=("glu_packed", "glu_packed_backward"),
        recompute=Recompute.CHEAP,
        cost=packed_cost,
        sizes=packed_sizes,
        inputs=packed_inputs,
        stock=packed_stock,
    )
)
