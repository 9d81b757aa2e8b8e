"""RMSNorm of a sum, and the sum itself: what a decoder layer does to its residual stream, twice.

Maths, for one row of N elements of x and of the residual::

    s = x + residual        y = rms_norm(s)

s is rounded to x's dtype, as the sum by itself is, and the norm (``kernels/rms_norm.py``, its weight, offset and eps)
is that of what was rounded: not a bit differs from the two by themselves, but nobody reads s from memory again.

Backward, with z the gradient of s by its other readers, that of ``rms_norm``'s ``pass_through``; ∂s/∂x = ∂s/∂residual
= 1::

    dx = dresidual = r (g − ŝ mean(g ŝ)) + z        g = dy (offset + w)        dw = Σ_rows dy ŝ

Shapes: x, residual, s ``[..., N]``, weight ``[N]`` or None, y ``[..., N]`` in ``out_dtype``. Saved: s and r, fp32, one
number a row.

Stock models have no such call. ``backend/sums.py`` makes it, behind the cut of a graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fastft.kernels import rms_norm as norm
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import Cost, Op, Reason, Recompute, raw_op, register, use_triton
from fastft.kernels._rows import FEW, SAME_SUMS, row_offset, row_space, row_values, rows_of, size, tile_at
from fastft.kernels._triton import cdiv, jit, tl
from fastft.kernels.rms_norm import _normed, _tile

# ---------------------------------------------------------------- reference


def reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch, differentiable; fp32 inside (fp64 for fp64)."""
    y, total = norm.reference(x + residual, weight, eps, offset, out_dtype, pass_through=True)
    return y, total


# ---------------------------------------------------------------- configuration

FORWARD = row_space("add_rms_norm.forward", partial(_tile, FEW), values_per_element=3)

# ---------------------------------------------------------------- kernel


@jit
def _forward_kernel(
    x_ptr, residual_ptr, w_ptr, total_ptr, y_ptr, r_ptr,
    rows, inner, x_outer, x_inner, residual_outer, residual_inner, total_outer, total_inner, y_outer, y_inner,
    r_outer, r_inner,
    N: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < N)[None, :]
    x = tl.load(tile_at(x_ptr, row, col, inner, x_outer, x_inner), mask=mask, other=0.0).to(tl.float32)
    residual_at = tile_at(residual_ptr, row, col, inner, residual_outer, residual_inner)
    total = x + tl.load(residual_at, mask=mask, other=0.0).to(tl.float32)
    total = total.to(total_ptr.dtype.element_ty)
    tl.store(tile_at(total_ptr, row, col, inner, total_outer, total_inner), total, mask=mask)
    y, r = _normed(total.to(tl.float32), w_ptr, col, N, EPS, OFFSET, HAS_WEIGHT)
    tl.store(r_ptr + row_offset(row, inner, r_outer, r_inner), r, mask=row < rows)
    tl.store(tile_at(y_ptr, row, col, inner, y_outer, y_inner), y.to(y_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launcher


def _forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total, y, r = _forward_fake(x, residual, weight, eps, offset, out_dtype)
    if y.numel() == 0:
        return total, y, r
    if not use_triton(x) or x.dtype == torch.float64:
        torch.add(x, residual, out=total)
        normed_y, normed_r = norm._forward(total, weight, eps, offset, out_dtype)
        return total, y.copy_(normed_y), r.copy_(normed_r)
    walk = rows_of(x, residual, total, y, r.unsqueeze(-1))
    if walk is None:
        dense = _forward(x.contiguous(), residual.contiguous(), weight, eps, offset, out_dtype)
        return total.copy_(dense[0]), y.copy_(dense[1]), r.copy_(dense[2])
    n = x.shape[-1]
    chosen = FORWARD(x.device, x.dtype, walk.count, n)
    strides = [stride for pair in walk.strides for stride in pair]
    _forward_kernel[(cdiv(walk.count, chosen["BLOCK_M"]),)](
        x, residual, x if weight is None else weight.contiguous(), total, y, r,
        walk.count, walk.inner, *strides,
        N=n, EPS=eps, OFFSET=offset, HAS_WEIGHT=weight is not None,
        BLOCK_M=chosen["BLOCK_M"], BLOCK_N=chosen["BLOCK_N"], num_warps=chosen["num_warps"], **SAME_SUMS,
    )  # fmt: skip
    return total, y, r


def _forward_fake(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = torch.empty_like(x)
    return total, torch.empty_like(total, dtype=out_dtype or x.dtype), row_values(total)


# ---------------------------------------------------------------- op

_raw = raw_op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset, ScalarType? out_dtype)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset, out_dtype):
        total, y, r = _raw(x, residual, weight, eps, offset, out_dtype)
        ctx.save_for_backward(total, weight, r)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    def backward(ctx, dy=None, z=None):
        want_x, want_residual, want_dweight, *_ = ctx.needs_input_grad
        dtotal, dweight = z, None
        if dy is not None:
            total, weight, r = ctx.saved_tensors
            wanted = want_x or want_residual, want_dweight
            dtotal, dweight = norm._raw_backward(dy, total, weight, r, z, ctx.offset, *wanted)
        return (
            dtotal if want_x else None,
            dtotal if want_residual else None,
            dweight if want_dweight else None,
            *(None,) * 3,
        )


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rms_norm(x + residual)`` over the last axis, and ``x + residual``; differentiable in x, residual and weight.

    x: ``[..., N]``, fp32, fp16 or bf16. residual: of x's shape and dtype. Any strides (copies are made unless rows are
    contiguous and lie at two strides or fewer). weight: ``[N]`` or None. offset: 1.0 for Gemma. out_dtype: dtype of
    the norm, x's own by default. Both results have x's memory order.

    Raises ValueError where residual has another shape or dtype than x.
    """
    if reason := _alike(x, residual):
        raise ValueError(f"add_rms_norm: {reason}; expand or cast it before")
    return _AddRMSNorm.apply(x, residual, weight, eps, offset, out_dtype)


def _alike(x: torch.Tensor, residual: torch.Tensor) -> Reason | None:
    if residual.dtype != x.dtype:
        return Reason("dtype", f"x is {x.dtype}, and the residual {residual.dtype}")
    if residual.shape != x.shape:
        return Reason("shape", f"x has shape {tuple(x.shape)}, and the residual {tuple(residual.shape)}")
    return None


def supported(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Reason | None:
    """None, or why this call cannot run as one kernel."""
    # What is added is read row by row beside x, and rounded as x is.
    return _alike(x, residual) or norm.supported(x, weight, eps, offset, out_dtype)


def cost(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Cost:
    """Forward: x and the residual in, their sum and y out; kept: the sum and 4 bytes a row."""
    of_norm, elements = norm.cost(x, weight, eps, offset, out_dtype), size(x.numel())
    return Cost(of_norm.flops + elements, of_norm.bytes_moved + 2 * elements * x.element_size(), of_norm.bytes_kept)


# ---------------------------------------------------------------- calls


def stock(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' decoder layers: the sum, and their norm of it."""
    total = x + residual
    return norm.stock(total, weight, eps, offset), total


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """Hidden states."""
    yield from (given for given in norm.sizes(model) if given["hidden"] == model.hidden)


def inputs(new: New, *, batch: int, seq: int, hidden: int, eps: float, offset: float) -> Inputs:
    """x and the residual [batch, seq, hidden], and the norm's weight."""
    x, residual, weight = new(batch, seq, hidden, grad=True), new(batch, seq, hidden, grad=True), new(hidden)
    return Inputs((x, residual, weight, eps, offset), wanted=[x, residual])


register(
    Op(
        name="add_rms_norm",
        call=add_rms_norm,
        reference=reference,
        supported=supported,
        raw=("add_rms_norm", "rms_norm_backward"),
        recompute=Recompute.CHEAP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
        stock=stock,
    )
)
