"""Linear layer with LoRA adapters, over a dense or an NF4 weight.

LoRA (Hu et al., 2021, arXiv:2106.09685) adds to a linear layer products of two thin matrices, rank r ≪ N, K::

    y = x Wᵀ + bias + Σᵢ sᵢ · (hᵢ Bᵢᵀ + bᵢ),      hᵢ = x̃ᵢ Aᵢᵀ

x [..., K], W [N, K], Aᵢ [r, K], Bᵢ [N, r], hᵢ [T, r] with T = batch · seq; x̃ᵢ is x, or x after adapter i's own
dropout (a separate input, so that the random numbers stay outside this op). Without adapters this is a plain linear
layer, which is what an NF4 layer without LoRA becomes.

Backward, with g = ∂L/∂y and the thin product uᵢ = g Bᵢ [T, r]::

    ∂x = g W + Σ sᵢ uᵢ Aᵢ   (over the adapters that read x itself)          ∂x̃ᵢ = sᵢ uᵢ Aᵢ
    ∂Bᵢ = sᵢ gᵀ hᵢ      ∂Aᵢ = sᵢ uᵢᵀ x̃ᵢ      ∂W = gᵀ x      ∂bias = Σₜ g      ∂bᵢ = sᵢ Σₜ g

Kept for it: x, and h (r numbers a token). The [T, N] output of an adapter never exists by itself: the second product is
accumulated into y by the GEMM, in fp32 registers, and likewise into ∂x.

Precision. The base GEMM runs in x's dtype. The adapters' products run in ``lora_dtype``: x's own under autocast or
with adapters of that dtype, fp32 where stock PEFT upcasts x to meet its fp32 adapters. An fp32 copy of x is never
made: on CUDA a bf16 matrix meets an fp32 one as bf16 GEMMs. An fp32 number is the sum of three bf16 numbers (3 × 8
bits of mantissa), products of bf16 numbers are exact in fp32, and thin matrices cost a GEMM the same at rank 16 and
48; so three parts side by side give fp32 accuracy at tensor-core speed. Elsewhere (fp16, CPU) a slab at a time is
cast.

An NF4 weight is dequantised into a scratch that all layers share, once for the forward and once for ∂x, and the GEMM is
cuBLAS's: at training sizes the launch is small beside the GEMM, and a bf16 copy of the model never exists.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import sympy
import torch
import torch.nn.functional as F

from fastft.kernels import nf4
from fastft.kernels._op import Cost, Op, Reason, Recompute, check_dtypes, raw_op, register

Tensors = Sequence[torch.Tensor]
Optionals = Sequence["torch.Tensor | None"]

# ---------------------------------------------------------------------------------------------------------- reference


def _quant_args(quant: Tensors) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """``quant`` as :func:`~fastft.kernels.nf4.nf4_dequantize` takes it: absmax, its code, its offset, its scales."""
    return (quant[0], *quant[1:]) if len(quant) == 4 else (quant[0], None, None, None)  # type: ignore[return-value]


def lora_linear_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    a: Tensors = (),
    b: Tensors = (),
    scaling: Sequence[float] = (),
    *,
    x_lora: Optionals = (),
    b_bias: Optionals = (),
    quant: Tensors = (),
    shape: Sequence[int] = (),
    blocksize: int = 64,
    blocksize2: int = 256,
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """:func:`lora_linear` in plain PyTorch, as PEFT writes it; differentiable."""
    dtype = dtype or x.dtype
    lora_dtype, out_dtype = lora_dtype or dtype, out_dtype or dtype
    if quant:
        scales = _quant_args(quant)
        weight = nf4.nf4_dequantize_reference(weight, *scales, blocksize, blocksize2, shape, dtype)
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    for i in range(len(a)):
        own, more = x_lora[i] if x_lora else None, b_bias[i] if b_bias else None
        h = F.linear((x if own is None else own).to(lora_dtype), a[i].to(lora_dtype))
        y = y + F.linear(h, b[i].to(lora_dtype), None if more is None else more.to(lora_dtype)) * scaling[i]
    return y.to(out_dtype)


# ---------------------------------------------------------------------------------------------------- matrix products

#: Numbers of a half-precision matrix that are cast to fp32 at a time, where no GEMM takes it as it is (64 MiB of fp32).
SLAB = 1 << 24


def _bf16_parts(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    """bf16 tensors whose sum is the fp32 ``x``, to 8 · ``count`` bits."""
    parts, rest = [], x
    for _ in range(count - 1):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1]
    return [*parts, rest.to(torch.bfloat16)]


def _splits(half: torch.Tensor) -> bool:
    """Whether an fp32 matrix that meets ``half`` goes through its GEMM in bf16 parts."""
    return half.is_cuda and half.dtype == torch.bfloat16


def _mm_single(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right of two half-precision matrices, in fp32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def _matmul(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right in ``dtype``, accumulated in fp32. One side may be half precision and the other, thin one fp32."""
    if left.dtype == right.dtype == dtype:
        return torch.mm(left, right)
    single = torch.float32
    if left.numel() == 0 or right.numel() == 0:
        return left.new_zeros((left.shape[0], right.shape[1]), dtype=dtype)
    if left.is_cuda and left.dtype == right.dtype and left.element_size() == 2:
        return _mm_single(left, right).to(dtype)
    if _splits(left) and right.dtype == single:
        wide = _mm_single(left, torch.cat(_bf16_parts(right, 3), 1))
        return wide.view(left.shape[0], 3, -1).sum(1).to(dtype)
    if _splits(right) and left.dtype == single:
        tall = _mm_single(torch.cat(_bf16_parts(left, 3), 0), right)
        return tall.view(3, -1, right.shape[1]).sum(0).to(dtype)
    # The larger matrix is walked in slabs along its outer dimension, so that its fp32 form never exists as a whole.
    wanted = torch.promote_types(torch.promote_types(left.dtype, right.dtype), single)
    out = left.new_empty((left.shape[0], right.shape[1]), dtype=dtype)
    step = max(1, SLAB // max(1, left.shape[1]))
    if left.numel() >= right.numel():
        right = right.to(wanted)
        for i in range(0, left.shape[0], step):
            out[i : i + step] = torch.mm(left[i : i + step].to(wanted), right)
    else:
        left = left.to(wanted)
        for i in range(0, right.shape[1], step):
            out[:, i : i + step] = torch.mm(left, right[:, i : i + step].to(wanted))
    return out


def _times(scale: float, x: torch.Tensor) -> torch.Tensor:
    """scale · x, in place. PEFT's usual scaling is 1, and two launches a layer for nothing are felt in small models."""
    return x if scale == 1 else x.mul_(scale)


def _add_thin(y: torch.Tensor, h: torch.Tensor, up: torch.Tensor, scale: float) -> torch.Tensor:
    """y += scale · h @ up, in place, with one rounding to y's dtype at the end. h [T, r], up [r, N], y [T, N]."""
    if y.dtype == h.dtype == up.dtype:
        return y.addmm_(h, up, alpha=scale)
    if _splits(y) and h.dtype == up.dtype == torch.float32:
        # (h₁ + h₂)(u₁ + u₂) without h₂u₂: 16 bits of each factor, for a sum that is then rounded to 8.
        (h1, h2), (up1, up2) = _bf16_parts(h, 2), _bf16_parts(up, 2)
        return y.addmm_(torch.cat((h1, h1, h2), 1), torch.cat((up1, up2, up1), 0), alpha=scale)
    wanted = torch.promote_types(torch.promote_types(h.dtype, up.dtype), y.dtype)
    h, up = h.to(wanted), up.to(wanted)
    if y.dtype == wanted:
        return y.addmm_(h, up, alpha=scale)
    step = max(1, SLAB // max(1, y.shape[1]))
    for i in range(0, y.shape[0], step):
        y[i : i + step] = torch.addmm(y[i : i + step].to(wanted), h[i : i + step], up, alpha=scale)
    return y


# ------------------------------------------------------------------------------------------------------------ weights

_scratch: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}
_scratch_lock = threading.Lock()


@contextlib.contextmanager
def _dense(
    weight: torch.Tensor, quant: Tensors, shape: Sequence[int], blocksize: int, blocksize2: int, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """The weight as a dense [N, K] matrix in ``dtype``: itself where it is one, else a copy in the scratch.

    There is one scratch for each device, dtype and stream; it grows to the largest weight and stays. The lock keeps the
    copy and the GEMM that reads it next to each other in the stream when two threads launch into it.
    """
    if not quant and weight.dtype == dtype:
        yield weight
        return
    n, k = shape if quant else weight.shape
    stream, fresh = 0, False
    if weight.is_cuda:
        stream = torch.cuda.current_stream(weight.device).cuda_stream
        # A captured graph owns the memory it was captured with: it may not share the scratch with what runs outside.
        fresh = torch.cuda.is_current_stream_capturing()
    with _scratch_lock:
        key = (weight.device, dtype, stream)
        held = None if fresh else _scratch.pop(key, None)
        if held is None or held.numel() < n * k:
            held = None  # the old one goes before the new one comes
            held = torch.empty(n * k, dtype=dtype, device=weight.device)
        if not fresh:
            _scratch[key] = held
        out = held[: n * k].view(n, k)
        if quant:
            nf4.dequantize_into(out, weight.contiguous(), *_quant_args(quant), blocksize, blocksize2)
        else:
            out.copy_(weight)
        yield out


def release_scratch() -> int:
    """Free the scratch that dequantised weights pass through (it comes back on use); returns the bytes freed."""
    with _scratch_lock:
        freed = sum(t.numel() * t.element_size() for t in _scratch.values())
        _scratch.clear()
    return freed


# -------------------------------------------------------------------------------------------------- bodies of the ops


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _down(x: torch.Tensor, a: Tensors, x_lora: Optionals, lora_dtype: torch.dtype) -> torch.Tensor:
    """The adapters' h = x̃ Aᵀ side by side, [T, Σr] in ``lora_dtype``."""
    sources = (_rows(x if own is None else own) for own in x_lora)
    hs = [_matmul(source, down.to(lora_dtype).t(), lora_dtype) for source, down in zip(sources, a, strict=True)]
    return hs[0] if len(hs) == 1 else torch.cat(hs, 1)


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    quant: Tensors,
    shape: Sequence[int],
    blocksize: int,
    blocksize2: int,
    bias: torch.Tensor | None,
    h: torch.Tensor | None,
    b: Tensors,
    b_bias: Optionals,
    scaling: Sequence[float],
    out_dtype: torch.dtype,
) -> torch.Tensor:
    rows = _rows(x)
    # The adapters' own biases are constants of the layer: they join the base's, in fp32.
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = [] if bias is None else [bias.to(wide)]
    sums += [s * more.to(wide) for s, more in zip(scaling, b_bias, strict=True) if more is not None]
    total = functools.reduce(torch.add, sums) if sums else None
    with _dense(weight, quant, shape, blocksize, blocksize2, x.dtype) as dense:
        if out_dtype == x.dtype:
            up = dense.t()
            y = torch.mm(rows, up) if total is None else torch.addmm(total.to(x.dtype), rows, up)
        else:
            y = _matmul(rows, dense.t(), out_dtype)
            y = y if total is None else y.add_(total)
    start = 0
    for up, scale in zip(b, scaling, strict=True):
        assert h is not None
        end = start + up.shape[1]
        _add_thin(y, h[:, start:end], up.to(h.dtype).t(), scale)
        start = end
    return y.view(*x.shape[:-1], y.shape[-1])


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    quant: Tensors,
    shape: Sequence[int],
    blocksize: int,
    blocksize2: int,
    a: Tensors,
    b: Tensors,
    x_lora: Optionals,
    own: Sequence[bool],
    h: torch.Tensor | None,
    scaling: Sequence[float],
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    need_x: bool,
    need_weight: bool,
    need_sum: bool,
    need_a: Sequence[bool],
    need_b: Sequence[bool],
    need_x_lora: Sequence[bool],
) -> list[torch.Tensor]:
    """[∂x, ∂W, Σₜ g (fp32), and for each adapter ∂A, ∂B, ∂x̃]; what is not needed is an empty tensor.

    ``own``: whether an adapter has an input of its own; ``x_lora`` holds it where ∂A needs it.
    """
    g = _rows(dy)
    base_g, thin_g = g.to(dtype), g if lora_dtype == torch.float32 else g.to(lora_dtype)
    k = shape[1] if quant else weight.shape[1]
    dx, dw, dsum = (dy.new_empty(0) for _ in range(3))
    if need_x:
        with _dense(weight, quant, shape, blocksize, blocksize2, dtype) as dense:
            dx = torch.mm(base_g, dense)
    if need_weight:
        assert x is not None
        dw = _matmul(base_g.t(), _rows(x), weight.dtype)
    if need_sum:
        dsum = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32))
    grads, start = [], 0
    for i, (down, up) in enumerate(zip(a, b, strict=True)):
        scale, end = scaling[i], start + down.shape[0]
        da, db, dx_lora = (dy.new_empty(0) for _ in range(3))
        onto_x = need_x and not own[i]
        if need_a[i] or need_x_lora[i] or onto_x:
            u = _matmul(thin_g, up.to(lora_dtype), lora_dtype)
            if onto_x:
                _add_thin(dx, u, down.to(lora_dtype), scale)
            if need_x_lora[i]:
                dx_lora = _times(scale, _matmul(u, down.to(lora_dtype), lora_dtype)).view(*dy.shape[:-1], k)
            if need_a[i]:
                source = x_lora[i] if own[i] else x
                assert source is not None
                wide = torch.promote_types(down.dtype, torch.float32)
                da = _times(scale, _matmul(u.t(), _rows(source), wide)).to(down.dtype)
        if need_b[i]:
            assert h is not None
            wide = torch.promote_types(up.dtype, torch.float32)
            db = _times(scale, _matmul(thin_g.t(), h[:, start:end], wide)).to(up.dtype)
        grads += [da, db, dx_lora]
        start = end
    return [dx.view(*dy.shape[:-1], k) if need_x else dx, dw, dsum, *grads]


def _down_fake(x: torch.Tensor, a: Tensors, x_lora: Optionals, lora_dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((math.prod(x.shape[:-1]), sum(t.shape[0] for t in a)), dtype=lora_dtype)


def _forward_fake(
    x: torch.Tensor, weight: torch.Tensor, quant: Tensors, shape: Sequence[int], *rest: Any
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], shape[0] if quant else weight.shape[0]), dtype=rest[-1])


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    quant: Tensors,
    shape: Sequence[int],
    blocksize: int,
    blocksize2: int,
    a: Tensors,
    b: Tensors,
    x_lora: Optionals,
    own: Sequence[bool],
    h: torch.Tensor | None,
    scaling: Sequence[float],
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    need_x: bool,
    need_weight: bool,
    need_sum: bool,
    need_a: Sequence[bool],
    need_b: Sequence[bool],
    need_x_lora: Sequence[bool],
) -> list[torch.Tensor]:
    def like(t: torch.Tensor, needed: bool) -> torch.Tensor:
        return dy.new_empty(t.shape, dtype=t.dtype) if needed else dy.new_empty(0)

    n, k = shape if quant else weight.shape
    single = torch.promote_types(dy.dtype, torch.float32)
    out = [
        dy.new_empty((*dy.shape[:-1], k), dtype=dtype) if need_x else dy.new_empty(0),
        like(weight, need_weight),
        dy.new_empty(n, dtype=single) if need_sum else dy.new_empty(0),
    ]
    for i in range(len(a)):
        dx_lora = dy.new_empty((*dy.shape[:-1], k), dtype=lora_dtype) if need_x_lora[i] else dy.new_empty(0)
        out += [like(a[i], need_a[i]), like(b[i], need_b[i]), dx_lora]
    return out


_WEIGHT = "Tensor weight, Tensor[] quant, SymInt[] shape, int blocksize, int blocksize2"
# h has an op of its own: a backward that recomputes a layer needs h of each linear, but not the output of its last one.
_raw_down = raw_op(
    "lora_linear_down(Tensor x, Tensor[] a, Tensor?[] x_lora, ScalarType lora_dtype) -> Tensor", _down, _down_fake
)
_raw = raw_op(
    f"lora_linear(Tensor x, {_WEIGHT}, Tensor? bias, Tensor? h, Tensor[] b, Tensor?[] b_bias, float[] scaling, "
    "ScalarType out_dtype) -> Tensor",
    _forward,
    _forward_fake,
)
_raw_backward = raw_op(
    f"lora_linear_backward(Tensor dy, Tensor? x, {_WEIGHT}, Tensor[] a, Tensor[] b, Tensor?[] x_lora, bool[] own, "
    "Tensor? h, float[] scaling, ScalarType dtype, ScalarType lora_dtype, bool need_x, bool need_weight, "
    "bool need_sum, bool[] need_a, bool[] need_b, bool[] need_x_lora) -> Tensor[]",
    _backward,
    _backward_fake,
)


# ----------------------------------------------------------------------------------------------------- differentiable


class _Constants(NamedTuple):
    """What :class:`_LoraLinear` is given besides tensors."""

    quant: int
    adapters: int
    shape: tuple[int, ...]
    blocksize: int
    blocksize2: int
    scaling: tuple[float, ...]
    lora_dtype: torch.dtype
    out_dtype: torch.dtype


class _LoraLinear(torch.autograd.Function):
    """Tensors in lists are invisible to autograd, so all come flat: x, weight, bias, *quant, *a, *b, *b_bias,
    *x_lora."""

    @staticmethod
    def forward(ctx: Any, c: _Constants, x: Any, weight: Any, bias: Any, *flat: Any) -> torch.Tensor:
        quant, rest = list(flat[: c.quant]), flat[c.quant :]
        a, b, b_bias, x_lora = (list(rest[i * c.adapters : (i + 1) * c.adapters]) for i in range(4))
        scale = list(c.scaling)
        where = (weight, quant, c.shape, c.blocksize, c.blocksize2)
        h = _raw_down(x, a, x_lora, c.lora_dtype) if a else None
        y = _raw(x, *where, bias, h, b, b_bias, scale, c.out_dtype)
        needs = ctx.needs_input_grad
        first = 4 + c.quant
        need_a, need_b, need_b_bias, need_x_lora = (
            list(needs[first + i * c.adapters : first + (i + 1) * c.adapters]) for i in range(4)
        )
        keep_x = needs[2] or any(need and other is None for need, other in zip(need_a, x_lora, strict=True))
        ctx.needs = (needs[1], needs[2], needs[3] or any(need_b_bias), need_a, need_b, need_x_lora)
        ctx.constants, ctx.dtype, ctx.bias = c, x.dtype, None if bias is None else bias.dtype
        ctx.b_bias = [t.dtype if need and t is not None else None for t, need in zip(b_bias, need_b_bias, strict=True)]
        ctx.need_bias = needs[3]
        kept = [t if need else None for t, need in zip(x_lora, need_a, strict=True)]
        ctx.own = [t is not None for t in x_lora]
        ctx.save_for_backward(x if keep_x else None, weight, h if any(need_b) else None, *quant, *a, *b, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]
        c: _Constants = ctx.constants
        x, weight, h, *flat = ctx.saved_tensors
        quant, rest = flat[: c.quant], flat[c.quant :]
        a, b, x_lora = (rest[i * c.adapters : (i + 1) * c.adapters] for i in range(3))
        where = (weight, quant, c.shape, c.blocksize, c.blocksize2)
        scale = list(c.scaling)
        dx, dw, dsum, *thin = _raw_backward(
            dy, x, *where, a, b, x_lora, ctx.own, h, scale, ctx.dtype, c.lora_dtype, *ctx.needs
        )
        need_x, need_weight, _, need_a, need_b, need_x_lora = ctx.needs
        none = [None] * c.adapters
        da, db, dx_lora = (
            [g if need else None for g, need in zip(thin[i::3], needed, strict=True)] if c.adapters else none
            for i, needed in enumerate((need_a, need_b, need_x_lora))
        )
        dbias = dsum.to(ctx.bias) if ctx.need_bias else None
        db_bias = [None if d is None else (s * dsum).to(d) for s, d in zip(c.scaling, ctx.b_bias, strict=True)]
        base = (dx if need_x else None, dw if need_weight else None, dbias)
        return (None, *base, *[None] * c.quant, *da, *db, *db_bias, *dx_lora)


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    a: Tensors = (),
    b: Tensors = (),
    scaling: Sequence[float] = (),
    *,
    x_lora: Optionals = (),
    b_bias: Optionals = (),
    quant: Tensors = (),
    shape: Sequence[int] = (),
    blocksize: int = 64,
    blocksize2: int = 256,
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = x Wᵀ + bias + Σ s · ((x̃ Aᵀ) Bᵀ + b), [..., N] in ``out_dtype``.

    ``x``: [..., K]. ``weight``: dense [N, K] in any floating dtype (cast on use; its gradient comes back in its own),
    or NF4: packed bytes, with ``quant`` = (absmax,) or (absmax8, absmax_code, absmax_offset, absmax2), ``shape`` =
    (N, K) and the blocksizes as in :func:`fastft.kernels.nf4.nf4_dequantize`; frozen then. ``bias``: [N]. ``a``: the
    adapters' [r, K], ``b``: [N, r], ``scaling``: a number each. ``x_lora``: for each adapter its own input [..., K],
    or None where it reads x. ``b_bias``: for each adapter [N] or None.

    ``dtype``: of the base GEMM (default: x's). ``lora_dtype``: of the adapters' products; ``out_dtype`` (defaults:
    ``dtype``). Sums are in fp32. Gradients have their tensors' dtypes.

    Raises ValueError for tensors that do not belong together.
    """
    dtype = dtype or x.dtype
    lora_dtype, out_dtype = lora_dtype or dtype, out_dtype or dtype
    n = len(a)
    x_lora, b_bias = list(x_lora) or [None] * n, list(b_bias) or [None] * n
    reason = supported(
        x, weight, bias, a, b, scaling, x_lora=x_lora, b_bias=b_bias, quant=quant, shape=shape,
        blocksize=blocksize, blocksize2=blocksize2, dtype=dtype, lora_dtype=lora_dtype, out_dtype=out_dtype,
    )  # fmt: skip
    if reason is not None:
        raise ValueError(f"lora_linear: {reason}")
    # Casts stand outside of the op: Inductor merges them into whatever makes x, and only their results are kept. The
    # adapters share the base's x where that is as exact as what they ask for.
    shared = lora_dtype in (dtype, torch.float32) and (lora_dtype == dtype or x.dtype == dtype)
    own = [None if t is None and shared else (x if t is None else t).to(lora_dtype) for t in x_lora]
    numbers = tuple(float(s) for s in scaling)
    c = _Constants(len(quant), n, tuple(shape), blocksize, blocksize2, numbers, lora_dtype, out_dtype)
    return _LoraLinear.apply(c, x.to(dtype), weight, bias, *quant, *a, *b, *b_bias, *own)  # type: ignore[no-any-return]


def supported(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    a: Tensors = (),
    b: Tensors = (),
    scaling: Sequence[float] = (),
    *,
    x_lora: Optionals = (),
    b_bias: Optionals = (),
    quant: Tensors = (),
    shape: Sequence[int] = (),
    blocksize: int = 64,
    blocksize2: int = 256,
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Reason | None:
    """None, or why the op cannot run on these arguments."""
    dtype = dtype or x.dtype
    lora_dtype, out_dtype = lora_dtype or dtype, out_dtype or dtype
    # GEMMs in other dtypes (fp8, integers) have no gradient here.
    wrong = check_dtypes(x, *(() if quant else (weight,)), bias, *a, *b, *b_bias, *x_lora)
    if wrong is not None:
        return wrong
    if {dtype, lora_dtype, out_dtype} - {x.dtype, torch.float32, torch.float16, torch.bfloat16}:
        return Reason("dtype", f"x in {x.dtype} does not go with products in {dtype}, {lora_dtype} or {out_dtype}")
    if quant:
        # One scale tensor, or the four of double quantisation.
        if len(quant) not in (1, 4) or len(shape) != 2:
            return Reason("quantization", f"{len(quant)} tensors of quantisation state and shape {tuple(shape)}")
        wrong = nf4.supported(weight, *_quant_args(quant), blocksize, blocksize2, shape, dtype)
        if wrong is not None:
            return wrong
        if weight.requires_grad:
            return Reason("quantization", "an NF4 weight is frozen, and this one requires a gradient")
    elif weight.dim() != 2:
        return Reason("shape", f"the weight has {weight.dim()} dimensions, [N, K] has 2")
    n, k = shape if quant else weight.shape
    # Sizes are compared without guards on symbolic ones: the features are always plain numbers.
    if x.dim() < 1 or x.shape[-1] != k or (bias is not None and tuple(bias.shape) != (n,)):
        return Reason("shape", f"x {tuple(x.shape)} or the bias does not fit a weight [{n}, {k}]")
    if not len(a) == len(b) == len(scaling) or any(len(t) not in (0, len(a)) for t in (x_lora, b_bias)):
        return Reason("shape", f"{len(a)} A, {len(b)} B, {len(scaling)} scalings, {len(x_lora)} inputs do not pair up")
    for down, up in zip(a, b, strict=True):
        if down.dim() != 2 or up.dim() != 2 or down.shape[1] != k or up.shape[0] != n or down.shape[0] != up.shape[1]:
            return Reason("shape", f"A {tuple(down.shape)} and B {tuple(up.shape)} do not fit a weight [{n}, {k}]")
    for own in x_lora:
        if own is not None and (own.dim() != x.dim() or own.shape[-1] != k):
            return Reason("shape", f"an adapter's own input is {tuple(own.shape)}, x {tuple(x.shape)}")
    return None


def cost(T: Any, N: Any, K: Any, r: Any = 0, itemsize: int = 2, nf4_weight: bool = False) -> Cost:
    """Forward, for T tokens through [N, K] with adapters of total rank r: numbers or sympy symbols.

    Kept: h. (x is the producer's to keep, and is shared by q, k and v.)
    """
    T, N, K, r = map(sympy.sympify, (T, N, K, r))
    flops = 2 * T * N * K + 2 * T * r * (N + K)
    dequantise = nf4.cost(N, K, itemsize=itemsize).bytes_moved if nf4_weight else sympy.Integer(0)
    # With adapters, x is read a second time for h, and y is read and written again to take h Bᵀ up.
    thin = sympy.Piecewise((itemsize * (T * K + 2 * T * N), r > 0), (0, True))
    moved = itemsize * (T * K + N * K + T * N) + thin + dequantise
    return Cost(flops=flops, bytes_moved=moved, bytes_kept=itemsize * T * r)


OP = register(
    Op(
        name="lora_linear",
        call=lora_linear,
        reference=lora_linear_reference,
        supported=supported,
        raw=("lora_linear_down", "lora_linear", "lora_linear_backward"),
        recompute=Recompute.KEEP,
        cost=cost,
    )
)
