"""LayerNorm (Ba, Kiros and Hinton 2016, https://arxiv.org/abs/1607.06450) over the last axis.

Maths, for one row x of N elements, all of it in fp32 with one rounding at the end::

    m = mean(x)    r = 1 / sqrt(mean((x − m)²) + eps)    x̂ = r (x − m)    y = x̂ w + b

Backward, with g = dy w. x̂ depends on x directly, through m and through r; collecting the three::

    dx = r (g − mean(g) − x̂ mean(g x̂)) + z        dw = Σ_rows dy x̂        db = Σ_rows dy

z is what x's other readers send back (the residual stream goes around the norm): it is added here, before the rounding,
where the op hands x on to them (``pass_through``), and is 0 otherwise.

Shapes: x ``[..., N]``, weight and bias ``[N]`` or None, y ``[..., N]`` in ``out_dtype``. Saved: x itself, m and r,
fp32, one number each a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

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
    two_pieces,
)
from fastft.kernels._triton import cdiv, jit, tl

# ---------------------------------------------------------------- reference


def reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
    pass_through: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch, differentiable; fp32 inside (fp64 for fp64)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    w, b = (None if t is None else t.to(compute) for t in (weight, bias))
    y = torch.nn.functional.layer_norm(x.to(compute), x.shape[-1:], w, b, eps).to(out_dtype or x.dtype)
    return (y, x.view_as(x)) if pass_through else y


# ---------------------------------------------------------------- configuration

#: Widest row that one program keeps in registers.
MAX_N = 32768


def _tile(each: int, device: torch.device, dtype: torch.dtype, rows: int, n: int) -> Config:
    """A program's tile, and its warps. ``PROGRAMS``: programs for each processor, where they write partial rows: few
    enough that summing those is cheap, enough to fill the GPU.
    """
    block_m, block_n, warps = row_tile(n, each)
    pieces = 1
    if block_m == 1 and sum(two_pieces(n)) < 0.6 * block_n:
        pieces, warps = 2, row_tile(n, each, sum(two_pieces(n)))[2]
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "PIECES": pieces, "num_warps": warps, "PROGRAMS": 4}


def _pieces(n: int, tile: Config) -> Config:
    """Columns of a row's first piece and of its second, of which there may be none."""
    head, tail = two_pieces(n)
    return {"BLOCK_N": head, "TAIL": tail} if tile["PIECES"] == 2 else {"BLOCK_N": tile["BLOCK_N"], "TAIL": 0}


FORWARD = row_space("layer_norm.forward", partial(_tile, FEW), values_per_element=2, pieces=True)
BACKWARD = row_space("layer_norm.backward", partial(_tile, MANY), values_per_element=3, programs=True, pieces=True)


# ---------------------------------------------------------------- forward kernel


@jit
def _load(ptr, row, col, mask, inner, outer_stride, inner_stride):
    return tl.load(tile_at(ptr, row, col, inner, outer_stride, inner_stride), mask=mask, other=0.0).to(tl.float32)


@jit
def _mean(head, tail, N: tl.constexpr, TAIL: tl.constexpr):
    """Of each row, which is in one piece, or in two of different sizes."""
    total = tl.sum(head, axis=1)
    if TAIL:
        total = total + tl.sum(tail, axis=1)
    return (total / N)[:, None]


@jit
def _store_affine(
    w_ptr, b_ptr, y_ptr, x, row, col, mask, inner, y_outer, y_inner,
    N: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    if HAS_WEIGHT:
        x = x * tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        x = x + tl.load(b_ptr + col, mask=col < N, other=0.0).to(tl.float32)[None, :]
    tl.store(tile_at(y_ptr, row, col, inner, y_outer, y_inner), x.to(y_ptr.dtype.element_ty), mask=mask)


@jit
def _forward_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, m_ptr, r_ptr,
    rows, inner, x_outer, x_inner, y_outer, y_inner, r_outer, r_inner,
    N: tl.constexpr, EPS: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (col < N)[None, :]
    x = _load(x_ptr, row, col, mask, inner, x_outer, x_inner)
    x_t = x
    if TAIL:
        col_t = BLOCK_N + tl.arange(0, TAIL)
        mask_t = (row < rows)[:, None] & (col_t < N)[None, :]
        x_t = _load(x_ptr, row, col_t, mask_t, inner, x_outer, x_inner)
    m = _mean(x, x_t, N, TAIL)
    # The row is in registers: the variance is taken around the mean, not from mean(x²) − m², which cancels. Where the
    # mean is large it is itself rounded; what it misses is the mean of the differences.
    x = tl.where(mask, x - m, 0.0)
    if TAIL:
        x_t = tl.where(mask_t, x_t - m, 0.0)
    missed = _mean(x, x_t, N, TAIL)
    x = tl.where(mask, x - missed, 0.0)
    if TAIL:
        x_t = tl.where(mask_t, x_t - missed, 0.0)
    r = 1.0 / tl.sqrt_rn(_mean(x * x, x_t * x_t, N, TAIL) + EPS)
    at = row_offset(row, inner, r_outer, r_inner)[:, None]
    tl.store(m_ptr + at, m, mask=(row < rows)[:, None])
    tl.store(r_ptr + at, r, mask=(row < rows)[:, None])
    _store_affine(
        w_ptr, b_ptr, y_ptr, x * r, row, col, mask, inner, y_outer, y_inner, N, HAS_WEIGHT, HAS_BIAS
    )  # fmt: skip
    if TAIL:
        _store_affine(
            w_ptr, b_ptr, y_ptr, x_t * r, row, col_t, mask_t, inner, y_outer, y_inner, N, HAS_WEIGHT, HAS_BIAS
        )  # fmt: skip


# ---------------------------------------------------------------- backward kernel


@jit
def _store_dx(dx_ptr, z_ptr, dx, row, col, mask, inner, z_outer, z_inner, dx_outer, dx_inner, HAS_Z: tl.constexpr):
    if HAS_Z:
        dx = dx + _load(z_ptr, row, col, mask, inner, z_outer, z_inner)
    tl.store(tile_at(dx_ptr, row, col, inner, dx_outer, dx_inner), dx.to(dx_ptr.dtype.element_ty), mask=mask)


@jit
def _backward_kernel(
    dy_ptr, x_ptr, w_ptr, m_ptr, r_ptr, z_ptr, dx_ptr, dw_ptr, db_ptr,
    rows, inner, dy_outer, dy_inner, x_outer, x_inner, r_outer, r_inner, z_outer, z_inner, dx_outer, dx_inner,
    N: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_Z: tl.constexpr,
    WANT_DX: tl.constexpr, WANT_DWEIGHT: tl.constexpr, WANT_DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    col = tl.arange(0, BLOCK_N)
    if TAIL:
        col_t = BLOCK_N + tl.arange(0, TAIL)
    if HAS_WEIGHT:
        w = tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32)
        if TAIL:
            w_t = tl.load(w_ptr + col_t, mask=col_t < N, other=0.0).to(tl.float32)
    # One partial row of dweight and dbias a program, over the same rows in the same order each time: no atomics.
    if WANT_DWEIGHT:
        dw = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if TAIL:
            dw_t = tl.zeros([BLOCK_M, TAIL], tl.float32)
    if WANT_DBIAS:
        db = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if TAIL:
            db_t = tl.zeros([BLOCK_M, TAIL], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (row < rows)[:, None] & (col < N)[None, :]
        dy = _load(dy_ptr, row, col, mask, inner, dy_outer, dy_inner)
        x = _load(x_ptr, row, col, mask, inner, x_outer, x_inner)
        dy_t, x_t = dy, x
        if TAIL:
            mask_t = (row < rows)[:, None] & (col_t < N)[None, :]
            dy_t = _load(dy_ptr, row, col_t, mask_t, inner, dy_outer, dy_inner)
            x_t = _load(x_ptr, row, col_t, mask_t, inner, x_outer, x_inner)
        m = tl.load(m_ptr + row_offset(row, inner, r_outer, r_inner), mask=row < rows, other=0.0)[:, None]
        r = tl.load(r_ptr + row_offset(row, inner, r_outer, r_inner), mask=row < rows, other=0.0)[:, None]
        # As in the forward: what the rounding of a large mean missed is the mean of the differences.
        x = tl.where(mask, x - m, 0.0)
        if TAIL:
            x_t = tl.where(mask_t, x_t - m, 0.0)
        missed = _mean(x, x_t, N, TAIL)
        x = tl.where(mask, x - missed, 0.0) * r
        if TAIL:
            x_t = tl.where(mask_t, x_t - missed, 0.0) * r
        if WANT_DWEIGHT:
            dw += dy * x
            if TAIL:
                dw_t += dy_t * x_t
        if WANT_DBIAS:
            db += dy
            if TAIL:
                db_t += dy_t
        if WANT_DX:
            g, g_t = dy, dy_t
            if HAS_WEIGHT:
                g = dy * w[None, :]
                if TAIL:
                    g_t = dy_t * w_t[None, :]
            mean, slope = _mean(g, g_t, N, TAIL), _mean(g * x, g_t * x_t, N, TAIL)
            dx = r * (g - mean - x * slope)
            _store_dx(dx_ptr, z_ptr, dx, row, col, mask, inner, z_outer, z_inner, dx_outer, dx_inner, HAS_Z)
            if TAIL:
                dx_t = r * (g_t - mean - x_t * slope)
                _store_dx(dx_ptr, z_ptr, dx_t, row, col_t, mask_t, inner, z_outer, z_inner, dx_outer, dx_inner, HAS_Z)
    first = tl.program_id(0).to(tl.int64) * N
    if WANT_DWEIGHT:
        tl.store(dw_ptr + first + col, tl.sum(dw, axis=0), mask=col < N)
        if TAIL:
            tl.store(dw_ptr + first + col_t, tl.sum(dw_t, axis=0), mask=col_t < N)
    if WANT_DBIAS:
        tl.store(db_ptr + first + col, tl.sum(db, axis=0), mask=col < N)
        if TAIL:
            tl.store(db_ptr + first + col_t, tl.sum(db_t, axis=0), mask=col_t < N)


# ---------------------------------------------------------------- launchers


def _centred(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """x − mean, exact where the mean is large and m its rounded value, as in the kernels."""
    x = x - m.unsqueeze(-1)
    return x - x.mean(-1, keepdim=True)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    y, m, r = _forward_fake(x, weight, bias, eps, out_dtype)
    if y.numel() == 0:
        return y, m, r
    if not use_triton(x) or x.dtype == torch.float64:
        h = x.to(r.dtype)
        m.copy_(h.mean(-1))
        h = _centred(h, m)
        r.copy_(torch.rsqrt(h.square().mean(-1) + eps))
        h = h * r.unsqueeze(-1)
        h = h if weight is None else h * weight.to(r.dtype)
        return y.copy_(h if bias is None else h + bias.to(r.dtype)), m, r
    walk = rows_of(x, y, r.unsqueeze(-1))
    if walk is None:
        dense = _forward(x.contiguous(), weight, bias, eps, out_dtype)
        return y.copy_(dense[0]), m.copy_(dense[1]), r.copy_(dense[2])
    n = x.shape[-1]
    tile = FORWARD(x.device, x.dtype, walk.count, n)
    (x_outer, x_inner), (y_outer, y_inner), (r_outer, r_inner) = walk.strides
    _forward_kernel[(cdiv(walk.count, tile["BLOCK_M"]),)](
        x, x if weight is None else weight.contiguous(), x if bias is None else bias.contiguous(), y, m, r,
        walk.count, walk.inner, x_outer, x_inner, y_outer, y_inner, r_outer, r_inner,
        N=n, EPS=eps, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        BLOCK_M=tile["BLOCK_M"], **_pieces(n, tile), num_warps=tile["num_warps"], **SAME_SUMS,
    )  # fmt: skip
    return y, m, r


def _forward_fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x, dtype=out_dtype or x.dtype), row_values(x), row_values(x)


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    m: torch.Tensor,
    r: torch.Tensor,
    z: torch.Tensor | None,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx, dweight, dbias = _backward_fake(dy, x, weight, m, r, z, want_dx, want_dweight, want_dbias)
    if x.numel() == 0 or not (want_dx or want_dweight or want_dbias):
        return dx, dweight.zero_(), dbias.zero_()
    n = x.shape[-1]
    if not use_triton(x) or x.dtype == torch.float64:
        x_hat, g = _centred(x.to(r.dtype), m) * r.unsqueeze(-1), dy.to(r.dtype)
        if want_dweight:
            dweight.copy_((g * x_hat).reshape(-1, n).sum(0))
        if want_dbias:
            dbias.copy_(g.reshape(-1, n).sum(0))
        if want_dx:
            g = g if weight is None else g * weight.to(r.dtype)
            through = r.unsqueeze(-1) * (g - g.mean(-1, keepdim=True) - x_hat * (g * x_hat).mean(-1, keepdim=True))
            dx.copy_(through if z is None else through + z.to(r.dtype))
        return dx, dweight, dbias
    z_or_x = x if z is None else z
    walk = rows_of(x, dy, r.unsqueeze(-1), z_or_x, dx if want_dx else x)
    if walk is None or m.stride() != r.stride():
        z = None if z is None else z.contiguous()
        dense = (dy.contiguous(), x.contiguous(), weight, m.contiguous(), r.contiguous(), z)
        dense_dx, dweight, dbias = _backward(*dense, want_dx, want_dweight, want_dbias)
        return (dx.copy_(dense_dx) if want_dx else dx), dweight, dbias
    tile = BACKWARD(x.device, x.dtype, walk.count, n)
    programs = cdiv(walk.count, tile["BLOCK_M"])
    if want_dweight or want_dbias:
        programs = min(programs, tile["PROGRAMS"] * processors(x.device))
    dw, db = (x.new_empty((programs, n) if want else (0,), dtype=torch.float32) for want in (want_dweight, want_dbias))
    x_strides, dy_strides, r_strides, z_strides, dx_strides = walk.strides
    _backward_kernel[(programs,)](
        dy, x, x if weight is None else weight.contiguous(), m, r, z_or_x, dx, dw, db,
        walk.count, walk.inner, *dy_strides, *x_strides, *r_strides, *z_strides, *dx_strides,
        N=n, HAS_WEIGHT=weight is not None, HAS_Z=z is not None,
        WANT_DX=want_dx, WANT_DWEIGHT=want_dweight, WANT_DBIAS=want_dbias,
        BLOCK_M=tile["BLOCK_M"], **_pieces(n, tile), num_warps=tile["num_warps"],
        # And w · g contracted into its difference from its mean is not rounded as the mean is: no zero where N is 1.
        **SAME_SUMS,
    )  # fmt: skip
    return dx, dweight.copy_(dw.sum(0)) if want_dweight else dweight, dbias.copy_(db.sum(0)) if want_dbias else dbias


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    m: torch.Tensor,
    r: torch.Tensor,
    z: torch.Tensor | None,
    want_dx: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(x) if want_dx else x.new_empty(0)
    dweight = weight.new_empty(x.shape[-1:]) if want_dweight and weight is not None else x.new_empty(0)
    # The bias has the weight's dtype (`supported` sees to it); without a weight it has dy's.
    dbias = (dy if weight is None else weight).new_empty(x.shape[-1:]) if want_dbias else x.new_empty(0)
    return dx, dweight, dbias


# ---------------------------------------------------------------- op

_raw = raw_op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType? out_dtype) -> (Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_raw_backward = raw_op(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd,"
    " Tensor? z, bool want_dx, bool want_dweight, bool want_dbias) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, out_dtype, pass_through):
        y, m, r = _raw(x, weight, bias, eps, out_dtype)
        ctx.save_for_backward(x, weight, m, r)
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return (y, x) if pass_through else y

    @staticmethod
    def backward(ctx, dy, z=None):
        if dy is None:
            return z, *(None,) * 5
        x, weight, m, r = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        dx, dweight, dbias = _raw_backward(dy, x, weight, m, r, z, *wanted)
        return (
            dx if wanted[0] else None,
            dweight if wanted[1] else None,
            dbias.to(ctx.bias_dtype) if wanted[2] else None,
            *(None,) * 3,
        )


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
    pass_through: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``(x − mean(x)) / sqrt(var(x) + eps) * weight + bias`` over the last axis, differentiable in x, weight and bias.

    x: ``[..., N]``, fp32, fp16 or bf16, any strides (a copy is made unless rows are contiguous and lie at two strides
    or fewer). weight, bias: ``[N]`` or None. out_dtype: dtype of the result, x's own by default. The result has x's
    memory order, as PyTorch's elementwise ops have. pass_through: return x too, for its other readers (a view of it);
    what they send back is added to dx in fp32.
    """
    return _LayerNorm.apply(x, weight, bias, eps, out_dtype, pass_through)


def supported(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
    pass_through: bool = False,
) -> Reason | None:
    """None, or why this call cannot run as one kernel."""
    # The kernels' arithmetic is fp32: fp64 would lose digits on a GPU, and integers and fp8 are not norms' inputs.
    if reason := check_dtypes(x, weight, bias):
        return reason
    # One output element comes from one rounding of an fp32 value.
    if out_dtype is not None and not out_dtype.is_floating_point:
        return Reason("dtype", f"the result is {out_dtype}, and a norm's result is floating point")
    # dbias is written in the weight's dtype.
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        return Reason(
            "dtype", f"the weight is {weight.dtype} and the bias {bias.dtype}; one dtype for both is supported"
        )
    if x.dim() < 1:
        return Reason("shape", "x has no axis to normalise")
    # Weight and bias are read as one row of N.
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and tuple(t.shape) != (x.shape[-1],):
            return Reason("shape", f"the {name} has shape {tuple(t.shape)}; one axis of {x.shape[-1]} is supported")
    # One program holds a whole row in registers.
    if x.shape[-1] > MAX_N:
        return Reason("size", f"a row has {x.shape[-1]} elements; up to {MAX_N} are supported")
    return None


def cost(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype | None = None,
    pass_through: bool = False,
) -> Cost:
    """Forward: x in, y out; kept: x and 8 bytes a row."""
    elements, rows = size(x.numel()), size(x.numel() // max(x.shape[-1], 1))
    out = (out_dtype or x.dtype).itemsize
    return Cost(8 * elements, elements * (x.element_size() + out) + 8 * rows, elements * x.element_size() + 8 * rows)


# ---------------------------------------------------------------- calls


def stock(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """PyTorch's, which stock models call."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """Hidden states."""
    if not model.rms_norm:
        yield {**model.tokens, "hidden": model.hidden, "eps": model.eps}


def inputs(new: New, *, batch: int, seq: int, hidden: int, eps: float) -> Inputs:
    """x [batch, seq, hidden], its weight and bias."""
    x, weight, bias = new(batch, seq, hidden, grad=True), new(hidden), new(hidden)
    return Inputs((x, weight, bias, eps), wanted=[x])


register(
    Op(
        name="layer_norm",
        call=layer_norm,
        reference=reference,
        supported=supported,
        raw=("layer_norm", "layer_norm_backward"),
        recompute=Recompute.CHEAP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
        stock=stock,
    )
)
