"""RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467), with Gemma's ``1 + weight`` and the weightless
form of Llama 4's q and k.

Maths, for one row x of N elements, all of it in fp32 with one rounding at the end::

    r = 1 / sqrt(mean(x²) + eps)        x̂ = r x        y = x̂ (offset + w)        (y = x̂ without a weight)

Backward, with g = dy (offset + w). From ∂r/∂x = −r³ x / N::

    dx = r g + x (∂r/∂x · g) + z = r (g − x̂ mean(g x̂)) + z        dw = Σ_rows dy x̂

z is what x's other readers send back (the residual stream goes around the norm): it is added here, before the rounding,
where the op hands x on to them (``pass_through``), and is 0 otherwise.

Shapes: x ``[..., N]``, weight ``[N]`` or None, y ``[..., N]`` in ``out_dtype``. Saved: x itself and r, fp32, one number
a row.

HF models spell this in four orders, which differ in where they round to bf16 (weight after the cast, before it, ``1 +
w`` in fp32, cast then swapped operands); rounding once is at least as exact as each of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fastft.kernels._config import Config
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import Cost, Op, Reason, Recompute, check_dtypes, raw_op, register, use_triton
from fastft.kernels._rows import (
    FEW,
    MANY,
    SAME_SUMS,
    processors,
    row_offset,
    row_space,
    row_tile,
    row_values,
    rows_of,
    size,
    tile_at,
)
from fastft.kernels._triton import cdiv, jit, tl

# ---------------------------------------------------------------- reference


def reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    pass_through: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch, differentiable; fp32 inside (fp64 for fp64)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    h = x.to(compute)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        h = h * (weight.to(compute) + offset)
    y = h.to(out_dtype or x.dtype)
    return (y, x.view_as(x)) if pass_through else y


# ---------------------------------------------------------------- configuration

#: Widest row that one program keeps in registers. The widest hidden size of a published model is 18432.
MAX_N = 32768


def _tile(each: int, device: torch.device, dtype: torch.dtype, rows: int, n: int) -> Config:
    """A program's tile, and its warps. ``PROGRAMS``: programs for each processor, where they write partial rows: few
    enough that summing those is cheap, enough to fill the GPU.
    """
    block_m, block_n, warps = row_tile(n, each)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "PROGRAMS": 4}


FORWARD = row_space("rms_norm.forward", partial(_tile, FEW), values_per_element=2)
BACKWARD = row_space("rms_norm.backward", partial(_tile, MANY), values_per_element=3, programs=True)


# ---------------------------------------------------------------- forward kernel


@jit
def _normed(
    x, w_ptr, col, N: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, HAS_WEIGHT: tl.constexpr
):  # fmt: skip
    """y and r of a tile of rows, in fp32."""
    r = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / N + EPS)
    y = x * r[:, None]
    if HAS_WEIGHT:
        w = tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32) + OFFSET
        y = y * w[None, :]
    return y, r


@jit
def _forward_kernel(
    x_ptr, w_ptr, y_ptr, r_ptr,
    rows, inner, x_outer, x_inner, y_outer, y_inner, r_outer, r_inner,
    N: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < N)[None, :]
    x = tl.load(tile_at(x_ptr, row, col, inner, x_outer, x_inner), mask=mask, other=0.0).to(tl.float32)
    y, r = _normed(x, w_ptr, col, N, EPS, OFFSET, HAS_WEIGHT)
    tl.store(r_ptr + row_offset(row, inner, r_outer, r_inner), r, mask=row < rows)
    tl.store(tile_at(y_ptr, row, col, inner, y_outer, y_inner), y.to(y_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- backward kernel


@jit
def _backward_kernel(
    dy_ptr, x_ptr, w_ptr, r_ptr, z_ptr, dx_ptr, partial_ptr,
    rows, inner, dy_outer, dy_inner, x_outer, x_inner, r_outer, r_inner, z_outer, z_inner, dx_outer, dx_inner,
    N: tl.constexpr, OFFSET: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_Z: tl.constexpr,
    WANT_DX: tl.constexpr, WANT_DWEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_N)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32) + OFFSET
    # Each program sums dweight over its own rows, always the same ones in the same order, and writes one partial row:
    # no atomics.
    if WANT_DWEIGHT:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & (col < N)[None, :]
        dy = tl.load(tile_at(dy_ptr, row, col, inner, dy_outer, dy_inner), mask=mask, other=0.0).to(tl.float32)
        x = tl.load(tile_at(x_ptr, row, col, inner, x_outer, x_inner), mask=mask, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + row_offset(row, inner, r_outer, r_inner), mask=row < rows, other=0.0)[:, None]
        x = x * r
        if WANT_DWEIGHT:
            total += dy * x
        if WANT_DX:
            g = dy
            if HAS_WEIGHT:
                g = dy * w[None, :]
            dx = r * (g - x * (tl.sum(g * x, axis=1) / N)[:, None])
            if HAS_Z:
                z_at = tile_at(z_ptr, row, col, inner, z_outer, z_inner)
                dx = dx + tl.load(z_at, mask=mask, other=0.0).to(tl.float32)
            dx_at = tile_at(dx_ptr, row, col, inner, dx_outer, dx_inner)
            tl.store(dx_at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if WANT_DWEIGHT:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * N + col, tl.sum(total, axis=0), mask=col < N)


# ---------------------------------------------------------------- launchers


def _forward(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, out_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    y, r = _forward_fake(x, weight, eps, offset, out_dtype)
    if y.numel() == 0:
        return y, r
    if not use_triton(x) or x.dtype == torch.float64:
        h = x.to(r.dtype)
        r.copy_(torch.rsqrt(h.square().mean(-1) + eps))
        h = h * r.unsqueeze(-1)
        return y.copy_(h if weight is None else h * (weight.to(r.dtype) + offset)), r
    walk = rows_of(x, y, r.unsqueeze(-1))
    if walk is None:
        dense_y, dense_r = _forward(x.contiguous(), weight, eps, offset, out_dtype)
        return y.copy_(dense_y), r.copy_(dense_r)
    n = x.shape[-1]
    tile = FORWARD(x.device, x.dtype, walk.count, n)
    (x_outer, x_inner), (y_outer, y_inner), (r_outer, r_inner) = walk.strides
    _forward_kernel[(cdiv(walk.count, tile["BLOCK_M"]),)](
        x, x if weight is None else weight.contiguous(), y, r,
        walk.count, walk.inner, x_outer, x_inner, y_outer, y_inner, r_outer, r_inner,
        N=n, EPS=eps, OFFSET=offset, HAS_WEIGHT=weight is not None,
        BLOCK_M=tile["BLOCK_M"], BLOCK_N=tile["BLOCK_N"], num_warps=tile["num_warps"], **SAME_SUMS,
    )  # fmt: skip
    return y, r


def _forward_fake(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float, out_dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, dtype=out_dtype or x.dtype), row_values(x)


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    r: torch.Tensor,
    z: torch.Tensor | None,
    offset: float,
    want_dx: bool,
    want_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx, dweight = _backward_fake(dy, x, weight, r, z, offset, want_dx, want_dweight)
    if x.numel() == 0 or not (want_dx or want_dweight):
        return dx, dweight.zero_()
    if not use_triton(x) or x.dtype == torch.float64:
        x_hat, g = x.to(r.dtype) * r.unsqueeze(-1), dy.to(r.dtype)
        if want_dweight:
            dweight.copy_((g * x_hat).reshape(-1, x.shape[-1]).sum(0))
        if want_dx:
            g = g if weight is None else g * (weight.to(r.dtype) + offset)
            through = r.unsqueeze(-1) * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
            dx.copy_(through if z is None else through + z.to(r.dtype))
        return dx, dweight
    z_or_x = x if z is None else z
    walk = rows_of(x, dy, r.unsqueeze(-1), z_or_x, dx if want_dx else x)
    if walk is None:
        z = None if z is None else z.contiguous()
        dense, dweight = _backward(
            dy.contiguous(), x.contiguous(), weight, r.contiguous(), z, offset, want_dx, want_dweight
        )
        return (dx.copy_(dense) if want_dx else dx), dweight
    n = x.shape[-1]
    tile = BACKWARD(x.device, x.dtype, walk.count, n)
    programs = cdiv(walk.count, tile["BLOCK_M"])
    if want_dweight:
        programs = min(programs, tile["PROGRAMS"] * processors(x.device))
    partial = x.new_empty((programs, n) if want_dweight else (0,), dtype=torch.float32)
    x_strides, dy_strides, r_strides, z_strides, dx_strides = walk.strides
    _backward_kernel[(programs,)](
        dy, x, x if weight is None else weight.contiguous(), r, z_or_x, dx, partial,
        walk.count, walk.inner, *dy_strides, *x_strides, *r_strides, *z_strides, *dx_strides,
        N=n, OFFSET=offset, HAS_WEIGHT=weight is not None, HAS_Z=z is not None,
        WANT_DX=want_dx, WANT_DWEIGHT=want_dweight,
        BLOCK_M=tile["BLOCK_M"], BLOCK_N=tile["BLOCK_N"], num_warps=tile["num_warps"], **SAME_SUMS,
    )  # fmt: skip
    return dx, dweight.copy_(partial.sum(0)) if want_dweight else dweight


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    r: torch.Tensor,
    z: torch.Tensor | None,
    offset: float,
    want_dx: bool,
    want_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(x) if want_dx else x.new_empty(0)
    dweight = weight.new_empty(weight.shape) if want_dweight and weight is not None else x.new_empty(0)
    return dx, dweight


# ---------------------------------------------------------------- op

_raw = raw_op(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset, ScalarType? out_dtype) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_raw_backward = raw_op(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, Tensor? z, float offset,"
    " bool want_dx, bool want_dweight) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, offset, out_dtype, pass_through):
        y, r = _raw(x, weight, eps, offset, out_dtype)
        ctx.save_for_backward(x, weight, r)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return (y, x) if pass_through else y

    @staticmethod
    def backward(ctx, dy, z=None):
        if dy is None:
            return z, *(None,) * 5
        x, weight, r = ctx.saved_tensors
        want_dx, want_dweight = ctx.needs_input_grad[:2]
        dx, dweight = _raw_backward(dy, x, weight, r, z, ctx.offset, want_dx, want_dweight)
        return dx if want_dx else None, dweight if want_dweight else None, *(None,) * 4


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    pass_through: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``x / sqrt(mean(x²) + eps) * (offset + weight)`` over the last axis, differentiable in x and weight.

    x: ``[..., N]``, fp32, fp16 or bf16, any strides (a copy is made unless rows are contiguous and lie at two strides
    or fewer). weight: ``[N]`` or None. offset: 1.0 for Gemma. out_dtype: dtype of the result, x's own by default. The
    result has x's memory order, as PyTorch's elementwise ops have. pass_through: return x too, for its other readers (a
    view of it); what they send back is added to dx in fp32.
    """
    return _RMSNorm.apply(x, weight, eps, offset, out_dtype, pass_through)


def supported(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    pass_through: bool = False,
) -> Reason | None:
    """None, or why this call cannot run as one kernel."""
    # The kernels' arithmetic is fp32: fp64 would lose digits on a GPU, and integers and fp8 are not norms' inputs.
    if reason := check_dtypes(x, weight):
        return reason
    # One output element comes from one rounding of an fp32 value.
    if out_dtype is not None and not out_dtype.is_floating_point:
        return Reason("dtype", f"the result is {out_dtype}, and a norm's result is floating point")
    if x.dim() < 1:
        return Reason("shape", "x has no axis to normalise")
    # The weight is read as one row of N.
    if weight is not None and tuple(weight.shape) != (x.shape[-1],):
        return Reason(
            "shape", f"the weight has shape {tuple(weight.shape)}; one axis of {x.shape[-1]} elements is supported"
        )
    # One program holds a whole row in registers.
    if x.shape[-1] > MAX_N:
        return Reason("size", f"a row has {x.shape[-1]} elements; up to {MAX_N} are supported")
    return None


def cost(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    pass_through: bool = False,
) -> Cost:
    """Forward: x in, y out; kept: x and 4 bytes a row."""
    elements, rows = size(x.numel()), size(x.numel() // max(x.shape[-1], 1))
    out = (out_dtype or x.dtype).itemsize
    return Cost(4 * elements, elements * (x.element_size() + out) + 4 * rows, elements * x.element_size() + 4 * rows)


# ---------------------------------------------------------------- calls


def stock(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """transformers' ``LlamaRMSNorm``, which rounds before the weight, and with ``offset`` its ``GemmaRMSNorm``."""
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * (offset + weight.float())).to(x.dtype) if offset else weight * h.to(x.dtype)


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """Hidden states; where heads have norms those of q and of k, each a row."""
    if model.rms_norm:
        more = {"eps": model.eps, "offset": 1.0 if model.family.startswith("gemma") else 0.0}
        yield {**model.tokens, "hidden": model.hidden, **more}
        for heads in dict.fromkeys((model.heads, model.kv_heads) if model.head_norms else ()):
            yield {"batch": model.batch, "seq": model.seq * heads, "hidden": model.head_dim, **more}


def inputs(new: New, *, batch: int, seq: int, hidden: int, eps: float, offset: float) -> Inputs:
    """x [batch, seq, hidden] and its weight."""
    x, weight = new(batch, seq, hidden, grad=True), new(hidden)
    return Inputs((x, weight, eps, offset), wanted=[x])


register(
    Op(
        name="rms_norm",
        call=rms_norm,
        reference=reference,
        supported=supported,
        raw=("rms_norm", "rms_norm_backward"),
        recompute=Recompute.CHEAP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
        stock=stock,
    )
)
