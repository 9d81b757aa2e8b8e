"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) of q and k in one launch.

Maths. Of each head's D elements, the first R are rotated and the rest are passed on. The R elements form R/2 pairs
(x₁, x₂), and each pair is turned by its angle, given as a row of tables cos and sin for each token; all of it in fp32
with one rounding at the end::

    y₁ = x₁ c₁ − x₂ s₁        y₂ = x₂ c₂ + x₁ s₂

Where the pair i lies in x and in y is the style:

====================  ===============  ===============  ==========================================================
style                 x₁, x₂ at        y₁, y₂ at        spelled as
====================  ===============  ===============  ==========================================================
half                  i, i + R/2       i, i + R/2       ``x * cos + cat((-x₂, x₁)) * sin`` (Llama, Qwen, Gemma, Phi),
                                                        or ``cat((x₁ c − x₂ s, x₂ c + x₁ s))`` (gpt-oss)
interleaved           2i, 2i + 1       2i, 2i + 1       ``stack((-x₂, x₁), -1).flatten(-2)`` (Cohere, GLM, GPT-J),
                                                        or a complex product (Llama 4)
interleaved_to_half   2i, 2i + 1       i, i + R/2       ``cat((x₁ c − x₂ s, x₂ c + x₁ s))`` (DeepSeek V3)
====================  ===============  ===============  ==========================================================

Tables of width R have one entry for each element of y (c₁ stands where y₁ does); tables of width R/2 one for each pair
(c₁ = c₂, s₁ = s₂).

Backward: the transposed matrix of each pair, read from y's places and written to x's::

    dx₁ = dy₁ c₁ + dy₂ s₂        dx₂ = dy₂ c₂ − dy₁ s₁

which is the rotation by the opposite angle when both halves of the tables agree, and right when they do not.

Shapes: q ``[batch, heads, seq, D]``, k ``[batch, kv_heads, seq, D]``, cos and sin ``[batch or 1, seq, R or R/2]``, the
results as q and k. Saved: cos and sin alone. Gradients of the tables are not computed.

The results keep q's and k's memory order. HF's are transposed views of ``[batch, seq, heads, D]``: PyTorch's own
spelling keeps that order too, SDPA reads it as it is, and the gradient goes back into the projection without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastft.kernels._config import Config, Space, crowded
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import Cost, Op, Reason, Recompute, check_dtypes, raw_op, register, use_triton
from fastft.kernels._rows import size
from fastft.kernels._triton import jit, next_power_of_2, tl

#: style → whether the elements of a pair are neighbours in x, and whether they are in y.
STYLES = {"half": (False, False), "interleaved": (True, True), "interleaved_to_half": (True, False)}

# ---------------------------------------------------------------- reference


def _take(x: torch.Tensor, neighbours: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if neighbours:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, dim=-1)
    return first, second


def _put(x1: torch.Tensor, x2: torch.Tensor, neighbours: bool) -> torch.Tensor:
    return torch.stack((x1, x2), dim=-1).flatten(-2) if neighbours else torch.cat((x1, x2), dim=-1)


def _turn(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    out_dtype: torch.dtype,
    rotary_dim: int,
    seq_dim: int,
    transpose: bool = False,
) -> torch.Tensor:
    """Rotate x (or, with ``transpose``, apply the transposed rotation) in plain PyTorch."""
    compute = torch.promote_types(x.dtype, torch.float32)
    x_pairs, y_pairs = STYLES[style]
    c, s = (t.to(compute).unsqueeze(3 - seq_dim) for t in (cos, sin))
    (c1, c2), (s1, s2) = ((t, t) if t.shape[-1] < rotary_dim else _take(t, y_pairs) for t in (c, s))
    first, second = _take(x[..., :rotary_dim].to(compute), y_pairs if transpose else x_pairs)
    if transpose:
        turned = _put(first * c1 + second * s2, second * c2 - first * s1, x_pairs)
    else:
        turned = _put(first * c1 - second * s1, second * c2 + first * s2, y_pairs)
    return torch.cat((turned, x[..., rotary_dim:].to(compute)), dim=-1).to(out_dtype)


def _tables(cos: torch.Tensor, sin: torch.Tensor | None, seq_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as ``[batch or 1, seq, width]`` views, out of any form that :func:`rotary` takes."""
    if sin is None:
        cos, sin = torch.view_as_real(cos).unbind(-1)
    if cos.dim() == 4 and sin.dim() == 4:
        cos, sin = cos.select(3 - seq_dim, 0), sin.select(3 - seq_dim, 0)
    return cos, sin


def reference(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor | None,
    style: str = "half",
    out_dtype: torch.dtype | None = None,
    rotary_dim: int | None = None,
    seq_dim: int = 2,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch, differentiable; fp32 inside (fp64 for fp64)."""
    cos, sin = _tables(cos, sin, seq_dim)
    out_dtype, rotary_dim = out_dtype or q.dtype, rotary_dim or q.shape[-1]
    rest = cos, sin, style, out_dtype, rotary_dim, seq_dim
    return _turn(q, *rest) if k is None else (_turn(q, *rest), _turn(k, *rest))


# ---------------------------------------------------------------- kernel


@jit
def _load_pairs(
    ptr, at, mask, HALF: tl.constexpr, PAIRS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """First and second elements of the pairs of a tile of heads, fp32 ``[BLOCK_H, BLOCK]`` each."""
    if PAIRS:  # one contiguous load, taken apart in registers
        col = tl.arange(0, 2 * BLOCK)
        x = tl.load(ptr + at[:, None] + col[None, :], mask=mask[:, None] & (col < 2 * HALF)[None, :], other=0.0)
        first, second = tl.split(tl.reshape(x.to(tl.float32), [BLOCK_H, BLOCK, 2]))
    else:
        col = tl.arange(0, BLOCK)
        both = mask[:, None] & (col < HALF)[None, :]
        first = tl.load(ptr + at[:, None] + col[None, :], mask=both, other=0.0).to(tl.float32)
        second = tl.load(ptr + at[:, None] + HALF + col[None, :], mask=both, other=0.0).to(tl.float32)
    return first, second


@jit
def _store_pairs(
    ptr, at, mask, first, second, HALF: tl.constexpr, PAIRS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    first, second = first.to(ptr.dtype.element_ty), second.to(ptr.dtype.element_ty)
    if PAIRS:
        col = tl.arange(0, 2 * BLOCK)
        x = tl.reshape(tl.join(first, second), [BLOCK_H, 2 * BLOCK])
        tl.store(ptr + at[:, None] + col[None, :], x, mask=mask[:, None] & (col < 2 * HALF)[None, :])
    else:
        col = tl.arange(0, BLOCK)
        both = mask[:, None] & (col < HALF)[None, :]
        tl.store(ptr + at[:, None] + col[None, :], first, mask=both)
        tl.store(ptr + at[:, None] + HALF + col[None, :], second, mask=both)


@jit
def _load_heads(
    x_ptr, start, stride,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one token: the pairs, and the elements that are passed on (if there are any)."""
    head = start + tl.arange(0, BLOCK_H)
    mask, at = head < HEADS, head.to(tl.int64) * stride
    first, second = _load_pairs(x_ptr, at, mask, HALF, PAIRS, BLOCK_H, BLOCK)
    rest = first
    if D > 2 * HALF:
        col = 2 * HALF + tl.arange(0, BLOCK_REST)
        rest = tl.load(x_ptr + at[:, None] + col[None, :], mask=mask[:, None] & (col < D)[None, :], other=0.0)
    return first, second, rest.to(tl.float32)


@jit
def _store_heads(
    y_ptr, start, stride, first, second, rest, c1, s1, c2, s2,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, TRANSPOSE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Turn BLOCK_H heads of one token, and store them."""
    head = start + tl.arange(0, BLOCK_H)
    mask, at = head < HEADS, head.to(tl.int64) * stride
    if TRANSPOSE:
        turned_first = first * c1[None, :] + second * s2[None, :]
        turned_second = second * c2[None, :] - first * s1[None, :]
    else:
        turned_first = first * c1[None, :] - second * s1[None, :]
        turned_second = second * c2[None, :] + first * s2[None, :]
    _store_pairs(y_ptr, at, mask, turned_first, turned_second, HALF, PAIRS, BLOCK_H, BLOCK)
    if D > 2 * HALF:
        col = 2 * HALF + tl.arange(0, BLOCK_REST)
        both = mask[:, None] & (col < D)[None, :]
        tl.store(y_ptr + at[:, None] + col[None, :], rest.to(y_ptr.dtype.element_ty), mask=both)


@jit
def _rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr,
    seq,
    q_b, q_h, q_s, k_b, k_h, k_s, qo_b, qo_h, qo_s, ko_b, ko_h, ko_s, cos_b, cos_s, cos_d, sin_b, sin_s, sin_d,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, FULL_TABLES: tl.constexpr,
    X_PAIRS: tl.constexpr, Y_PAIRS: tl.constexpr, TRANSPOSE: tl.constexpr, HAS_Q: tl.constexpr, HAS_K: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    # One program a token: its row of the tables is read once for all heads of q and k.
    b = (tl.program_id(0) // seq).to(tl.int64)
    s = (tl.program_id(0) % seq).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    if FULL_TABLES and Y_PAIRS:
        at1, at2 = 2 * pair, 2 * pair + 1
    elif FULL_TABLES:
        at1, at2 = pair, HALF + pair
    else:
        at1, at2 = pair, pair
    cos_ptr += b * cos_b + s * cos_s
    sin_ptr += b * sin_b + s * sin_s
    c1 = tl.load(cos_ptr + at1 * cos_d, mask=pair < HALF, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + at2 * cos_d, mask=pair < HALF, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + at1 * sin_d, mask=pair < HALF, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + at2 * sin_d, mask=pair < HALF, other=0.0).to(tl.float32)
    LOAD_PAIRS: tl.constexpr = Y_PAIRS if TRANSPOSE else X_PAIRS
    STORE_PAIRS: tl.constexpr = X_PAIRS if TRANSPOSE else Y_PAIRS
    q_ptr += b * q_b + s * q_s
    q_out_ptr += b * qo_b + s * qo_s
    k_ptr += b * k_b + s * k_s
    k_out_ptr += b * ko_b + s * ko_s
    # k is loaded before q is stored: the compiler cannot know that the one does not write the other.
    if HAS_K:
        k1, k2, k_rest = _load_heads(k_ptr, 0, k_h, K_HEADS, D, HALF, LOAD_PAIRS, BLOCK_K, BLOCK, BLOCK_REST)
    if HAS_Q:
        for start in range(0, Q_HEADS, BLOCK_Q):
            q1, q2, q_rest = _load_heads(q_ptr, start, q_h, Q_HEADS, D, HALF, LOAD_PAIRS, BLOCK_Q, BLOCK, BLOCK_REST)
            _store_heads(
                q_out_ptr, start, qo_h, q1, q2, q_rest, c1, s1, c2, s2,
                Q_HEADS, D, HALF, STORE_PAIRS, TRANSPOSE, BLOCK_Q, BLOCK, BLOCK_REST,
            )  # fmt: skip
    if HAS_K:
        _store_heads(
            k_out_ptr, 0, ko_h, k1, k2, k_rest, c1, s1, c2, s2,
            K_HEADS, D, HALF, STORE_PAIRS, TRANSPOSE, BLOCK_K, BLOCK, BLOCK_REST,
        )  # fmt: skip
        for start in range(BLOCK_K, K_HEADS, BLOCK_K):
            k1, k2, k_rest = _load_heads(k_ptr, start, k_h, K_HEADS, D, HALF, LOAD_PAIRS, BLOCK_K, BLOCK, BLOCK_REST)
            _store_heads(
                k_out_ptr, start, ko_h, k1, k2, k_rest, c1, s1, c2, s2,
                K_HEADS, D, HALF, STORE_PAIRS, TRANSPOSE, BLOCK_K, BLOCK, BLOCK_REST,
            )  # fmt: skip


# ---------------------------------------------------------------- launcher

#: Heads of q that one program holds at a time, and their elements, at the least and at most.
HEADS, LEAST, MOST = 16, 512, 2048


def _held(q_heads: int, width: int) -> int:
    """Elements of all heads of q, in tiles of powers of two."""
    return max(LEAST, next_power_of_2(q_heads) * next_power_of_2(width))


def _tile(
    device: torch.device, dtype: torch.dtype, tokens: int, q_heads: int, k_heads: int, head_dim: int, rotary_dim: int,
    *how: Any,
) -> Config:  # fmt: skip
    # Four heads (Gemma 3 1B) leave many threads with one load to wait for; wide heads are many registers. Measured on
    # an H100.
    warps = 1 if _held(q_heads, head_dim) <= 1024 else 8 if rotary_dim > 128 else 4
    tile = min(MOST, max(LEAST, HEADS * next_power_of_2(rotary_dim)), _held(q_heads, rotary_dim))
    return {"TILE": tile, "num_warps": warps}


def _legal(
    config: Config, device: torch.device, dtype: torch.dtype, tokens: int, q_heads: int, k_heads: int, head_dim: int,
    rotary_dim: int, *how: Any,
) -> str | None:  # fmt: skip
    if config["TILE"] > (most := _held(q_heads, rotary_dim)):
        return f"all heads are {most} elements"
    return crowded(3 * config["TILE"], config["num_warps"])


CONFIG = Space(
    "rotary.turn",
    {"TILE": (LEAST, 1024, 2048, 4096, 8192), "num_warps": (1, 2, 4, 8)},
    _tile,
    tokens=("tokens",),
    sizes=("q_heads", "k_heads", "head_dim", "rotary_dim", "style", "transpose"),
    legal=_legal,
)


def _launch(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    rotary_dim: int,
    seq_dim: int,
    transpose: bool,
) -> None:
    """Turn q into q_out and k into k_out, each unless it is None."""
    # Only rows have to be contiguous; every other stride goes to the kernel.
    pairs = [(x if x.stride(-1) == 1 else x.contiguous(), out) for x, out in ((q, q_out), (k, k_out)) if x is not None]
    (q_in, q_out), (k_in, k_out) = pairs[0], pairs[-1]  # the one that is there stands for the other, and is not read
    batch, seq, width = q_in.shape[0], q_in.shape[seq_dim], q_in.shape[-1]

    def strides(t: torch.Tensor) -> tuple[int, int, int]:
        return t.stride(0), t.stride(3 - seq_dim), t.stride(seq_dim)

    def table_strides(t: torch.Tensor) -> tuple[int, int, int]:
        return (t.stride(0) if t.shape[0] > 1 else 0), t.stride(1), t.stride(2)

    heads = [t.shape[3 - seq_dim] for t in (q_in, k_in)]
    half = rotary_dim // 2
    block = next_power_of_2(half)
    config = CONFIG(q_in.device, q_in.dtype, batch * seq, *heads, width, rotary_dim, style, transpose)
    tiles = [min(next_power_of_2(h), max(1, config["TILE"] // (2 * block))) for h in heads]
    x_pairs, y_pairs = STYLES[style]
    _rotary_kernel[(batch * seq,)](
        q_in, k_in, q_out, k_out, cos, sin,
        seq,
        *strides(q_in), *strides(k_in), *strides(q_out), *strides(k_out),
        *table_strides(cos), *table_strides(sin),
        Q_HEADS=heads[0], K_HEADS=heads[1], D=width, HALF=half, FULL_TABLES=cos.shape[-1] == rotary_dim,
        X_PAIRS=x_pairs, Y_PAIRS=y_pairs,
        TRANSPOSE=transpose, HAS_Q=q is not None, HAS_K=k is not None,
        BLOCK_Q=tiles[0], BLOCK_K=tiles[1], BLOCK=block, BLOCK_REST=next_power_of_2(max(width - rotary_dim, 1)),
        num_warps=config["num_warps"],
    )  # fmt: skip


def _forward(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    out_dtype: torch.dtype | None,
    rotary_dim: int,
    seq_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_out, k_out = _forward_fake(q, k, cos, sin, style, out_dtype, rotary_dim, seq_dim)
    if not use_triton(q) or q.dtype == torch.float64:
        for x, out in ((q, q_out), (k, k_out)):
            if x is not None:
                out.copy_(_turn(x, cos, sin, style, out.dtype, rotary_dim, seq_dim))
    elif q.numel():
        _launch(q, k, q_out, k_out, cos, sin, style, rotary_dim, seq_dim, transpose=False)
    return q_out, k_out


def _forward_fake(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    out_dtype: torch.dtype | None,
    rotary_dim: int,
    seq_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    def like(x: torch.Tensor) -> torch.Tensor:
        keep = torch.preserve_format if x.stride(-1) == 1 else torch.contiguous_format
        return torch.empty_like(x, dtype=out_dtype or x.dtype, memory_format=keep)

    return like(q), q.new_empty(0) if k is None else like(k)


def _backward(
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    dtype: torch.dtype,
    rotary_dim: int,
    seq_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    q_grad, k_grad = _backward_fake(dq, dk, cos, sin, style, dtype, rotary_dim, seq_dim)
    if not use_triton(cos) or dtype == torch.float64:
        for g, grad in ((dq, q_grad), (dk, k_grad)):
            if g is not None:
                grad.copy_(_turn(g, cos, sin, style, dtype, rotary_dim, seq_dim, transpose=True))
    elif q_grad.numel() or k_grad.numel():
        _launch(dq, dk, q_grad, k_grad, cos, sin, style, rotary_dim, seq_dim, transpose=True)
    return q_grad, k_grad


def _backward_fake(
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    style: str,
    dtype: torch.dtype,
    rotary_dim: int,
    seq_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    def like(g: torch.Tensor | None) -> torch.Tensor:
        if g is None:
            return cos.new_empty(0, dtype=dtype)
        # [batch, seq, heads, D] in memory, whatever the order of dy: what the projection's backward multiplies.
        order = [0, seq_dim, 3 - seq_dim, 3]
        return g.new_empty([g.shape[d] for d in order], dtype=dtype).permute(order)

    return like(dq), like(dk)


# ---------------------------------------------------------------- op

_raw = raw_op(
    "rotary(Tensor q, Tensor? k, Tensor cos, Tensor sin, str style, ScalarType? out_dtype, SymInt rotary_dim,"
    " int seq_dim) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_raw_backward = raw_op(
    "rotary_backward(Tensor? dq, Tensor? dk, Tensor cos, Tensor sin, str style, ScalarType dtype, SymInt rotary_dim,"
    " int seq_dim) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, style, out_dtype, rotary_dim, seq_dim):
        ctx.save_for_backward(cos, sin)
        ctx.rest = style, q.dtype, rotary_dim, seq_dim
        q_out, k_out = _raw(q, k, cos, sin, style, out_dtype, rotary_dim, seq_dim)
        if k is None:
            ctx.mark_non_differentiable(k_out)
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq, dk):
        want_q, want_k = ctx.needs_input_grad[:2]
        grads = _raw_backward(dq if want_q else None, dk if want_k else None, *ctx.saved_tensors, *ctx.rest)
        return grads[0] if want_q else None, grads[1] if want_k else None, *(None,) * 6


def rotary(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor | None,
    style: str = "half",
    out_dtype: torch.dtype | None = None,
    rotary_dim: int | None = None,
    seq_dim: int = 2,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """q and k rotated by the angles in cos and sin; differentiable in q and k.

    q: ``[batch, heads, seq, D]``; k: ``[batch, kv_heads, seq, D]`` in q's dtype, or None, and then only q's result
    comes back. cos, sin: ``[batch or 1, seq, R or R/2]``, any floating dtype, also with an axis of one for the heads;
    or cos a complex table cos + i sin, ``[..., R/2]``, and sin None. style: "half", "interleaved" or
    "interleaved_to_half" (see the module). out_dtype: of the results, q's own by default. rotary_dim: R, all of D by
    default. seq_dim: 2, or 1 for q and k as ``[batch, seq, heads, D]``.
    """
    cos, sin = _tables(cos, sin, seq_dim)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("rotary does not compute gradients of cos and sin; detach them, or leave this site to PyTorch")
    q_out, k_out = _Rotary.apply(q, k, cos, sin, style, out_dtype, rotary_dim or q.shape[-1], seq_dim)
    return q_out if k is None else (q_out, k_out)


def supported(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor | None,
    style: str = "half",
    out_dtype: torch.dtype | None = None,
    rotary_dim: int | None = None,
    seq_dim: int = 2,
) -> Reason | None:
    """None, or why this call cannot run as one kernel."""
    # The places of a pair that the kernel knows.
    if style not in STYLES:
        return Reason("style", f"the rotary style {style!r} is not one of {', '.join(STYLES)}")
    # One program a token, all heads.
    if q.dim() != 4 or seq_dim not in (1, 2):
        return Reason("shape", f"q is {tuple(q.shape)}; 4 axes, with the sequence second or third, are supported")
    if (sin is None) != cos.dtype.is_complex or (sin is not None and cos.shape != sin.shape):
        return Reason("shape", f"cos is {cos.dtype} {tuple(cos.shape)} and sin does not go with it")
    if cos.dim() not in (3, 4) or (cos.dim() == 4 and cos.shape[3 - seq_dim] != 1):
        return Reason(
            "shape", f"the tables are {tuple(cos.shape)}; one row a token, the same for all heads, is supported"
        )
    # Learned tables are not computed gradients of.
    if cos.requires_grad or (sin is not None and sin.requires_grad):
        return Reason("gradient", "cos or sin requires a gradient, which the op does not compute")
    cos, sin = _tables(cos, sin, seq_dim)
    # fp32 arithmetic: fp64 would lose digits on a GPU.
    if reason := check_dtypes(q, k, cos, sin):
        return reason
    if out_dtype is not None and not out_dtype.is_floating_point:
        return Reason("dtype", f"the result is {out_dtype}, and a rotation's result is floating point")
    # q and k share the dtype of their gradients.
    if k is not None and k.dtype != q.dtype:
        return Reason("dtype", f"q is {q.dtype} and k {k.dtype}; one dtype for both is supported")
    if k is not None and (k.dim() != 4 or any(k.shape[d] != q.shape[d] for d in (0, seq_dim, 3))):
        return Reason("shape", f"q is {tuple(q.shape)} and k {tuple(k.shape)}; they may differ in heads only")
    if cos.shape[1] != q.shape[seq_dim] or (cos.shape[0] != 1 and cos.shape[0] != q.shape[0]):
        return Reason(
            "shape", f"the tables are {tuple(cos.shape)} and q {tuple(q.shape)}; one row a token is supported"
        )
    # Pairs, all of them inside the head, with one angle a pair or one entry an element.
    r = rotary_dim or q.shape[-1]
    if r % 2 or r > q.shape[-1] or cos.shape[-1] not in (r, r // 2):
        return Reason("shape", f"{r} of {q.shape[-1]} elements cannot be turned with tables of width {cos.shape[-1]}")
    # A program holds whole heads in registers.
    if q.shape[-1] > 1024:
        return Reason("size", f"heads of {q.shape[-1]} elements; up to 1024 are supported")
    return None


def cost(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor | None,
    style: str = "half",
    out_dtype: torch.dtype | None = None,
    rotary_dim: int | None = None,
    seq_dim: int = 2,
) -> Cost:
    """Forward: q and k in and out, the tables in; kept: the tables, which all layers share."""
    cos, _ = _tables(cos, sin, seq_dim)
    elements = size(q.numel()) + (0 if k is None else size(k.numel()))
    tables = 2 * size(cos.numel()) * cos.element_size()
    moved = elements * (q.element_size() + (out_dtype or q.dtype).itemsize) + tables
    return Cost(3 * elements, moved, tables)


# ---------------------------------------------------------------- calls


def stock(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary_dim: int | None = None
) -> tuple[torch.Tensor, ...]:
    """transformers' ``apply_rotary_pos_emb``, on a part of the heads as its Phi has it."""
    r = rotary_dim or q.shape[-1]

    def turned(x: torch.Tensor) -> torch.Tensor:
        part, rest = x[..., :r], x[..., r:]
        first, second = part.chunk(2, -1)
        y = part * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]
        return torch.cat((y, rest), -1) if r < x.shape[-1] else y

    return turned(q), turned(k)


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """q and k of a layer."""
    heads = {"heads": model.heads, "kv_heads": model.kv_heads, "head_dim": model.head_dim}
    yield {**model.tokens, **heads, "rotary_dim": model.rotary_dim}


def inputs(new: New, *, batch: int, seq: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int) -> Inputs:
    """q and k [batch, heads, seq, head_dim], and the tables [1, seq, rotary_dim]."""
    q, k = new.heads(batch, seq, head_dim, heads, kv_heads)
    angle = new.uniform(1, seq, rotary_dim // 2).repeat(1, 1, 2)
    return Inputs((q, k, angle.cos().to(new.dtype), angle.sin().to(new.dtype)), {"rotary_dim": rotary_dim}, [q, k])


register(
    Op(
        name="rotary",
        call=rotary,
        reference=reference,
        supported=supported,
        raw=("rotary", "rotary_backward"),
        recompute=Recompute.CHEAP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
        stock=stock,
    )
)
