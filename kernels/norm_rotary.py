"""RMSNorm of each head of q and k, and the rotary embedding of the result, in one launch (Qwen 3, Gemma 3).

Maths, for one head x of D elements of one token, all of it in fp32 with one rounding at the end::

    r = 1 / sqrt(mean(x²) + eps)        x̂ = r x        n = x̂ (offset + w)        y = R n

R turns the first elements of a head by the token's angles and passes the rest on: ``rotary.py`` has its styles. q and k
have weights of their own, or none.

Backward: R's transpose undoes the turn, and the rest is the norm's (``rms_norm.py``)::

    dn = Rᵀ dy        g = dn (offset + w)        dx = r (g − x̂ mean(g x̂))        dw = Σ dn x̂, over tokens and heads

Shapes: q ``[batch, heads, seq, D]``, k ``[batch, kv_heads, seq, D]``, weights ``[D]``, cos and sin ``[batch or 1, seq,
R or R/2]``, the results as q and k. Saved: q and k as they came, r, one fp32 number for each head of a token, and the
tables, which all layers share. What is between norm and rotary is never in memory. Gradients of the tables are not
computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastft.kernels import rotary as _rotary
from fastft.kernels._config import Config, Space, crowded
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import Cost, Op, Reason, Recompute, check_dtypes, raw_op, register, use_triton
from fastft.kernels._rows import SAME_SUMS, processors, size
from fastft.kernels._triton import cdiv, jit, next_power_of_2, tl
from fastft.kernels.rotary import STYLES, _load_heads, _store_heads, _store_pairs, _tables, _turn

# ---------------------------------------------------------------- reference


def _heads_first(x: torch.Tensor, transpose: bool) -> torch.Tensor:
    return x.transpose(1, 2) if transpose else x


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    style: str = "half",
    out_dtype: torch.dtype | None = None,
    rotary_dim: int | None = None,
    seq_dim: int = 2,
    transpose: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain PyTorch, differentiable; fp32 inside (fp64 for fp64)."""
    cos, sin = _tables(cos, sin, seq_dim)
    compute = torch.promote_types(q.dtype, torch.float32)

    def one(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        h = _heads_first(x, transpose).to(compute)
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
        h = h if weight is None else h * (weight.to(compute) + offset)
        return _turn(h, cos, sin, style, out_dtype or x.dtype, rotary_dim or x.shape[-1], seq_dim)

    return one(q, q_weight), one(k, k_weight)


# ---------------------------------------------------------------- configuration


def _space(kernel: str, alive: int, tile: int) -> Space:
    """``alive``: values of the tile that are in registers at once; ``tile``: its elements, as far as there are so many.

    A program holds ``TILE`` elements of a token's heads at a time. One warp needs nobody for a head's sum: of twelve
    launches of six models on an H100 nine were fastest by one, by up to 37 % (`fastft tune`). ``PROGRAMS``: programs
    for each processor, where they write partial rows of dweight.
    """

    def heuristic(
        device: torch.device, dtype: torch.dtype, tokens: int, q_heads: int, k_heads: int, head_dim: int,
        rotary_dim: int, *how: Any,
    ) -> Config:  # fmt: skip
        held = min(tile, _rotary._held(q_heads, rotary_dim))
        return {"TILE": held, "num_warps": min(8, next_power_of_2(cdiv(head_dim, rotary_dim))), "PROGRAMS": 8}

    def legal(
        config: Config, device: torch.device, dtype: torch.dtype, tokens: int, q_heads: int, k_heads: int,
        head_dim: int, rotary_dim: int, *how: Any,
    ) -> str | None:  # fmt: skip
        if config["TILE"] > (most := _rotary._held(q_heads, rotary_dim)):
            return f"all heads are {most} elements"
        return crowded(alive * config["TILE"] * max(1, head_dim / rotary_dim), config["num_warps"])

    values = {"TILE": (_rotary.LEAST, 1024, 2048, 4096, 8192), "num_warps": (1, 2, 4, 8), "PROGRAMS": (2, 4, 8, 16)}
    sizes = ("q_heads", "k_heads", "head_dim", "rotary_dim", "style", "weighted")
    return Space(f"norm_rotary.{kernel}", values, heuristic, tokens=("tokens",), sizes=sizes, legal=legal)


FORWARD, BACKWARD = _space("forward", 3, 1024), _space("backward", 5, 512)

# ---------------------------------------------------------------- device functions


@jit
def _load_weight(
    w_ptr, OFFSET: tl.constexpr, HAS_WEIGHT: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """``offset + w`` of the pairs' first elements, of their second ones, and of the rest; 1 without a weight."""
    pair, rest = tl.arange(0, BLOCK), 2 * HALF + tl.arange(0, BLOCK_REST)
    first, second, passed = pair * 0.0 + 1.0, pair * 0.0 + 1.0, rest * 0.0 + 1.0
    if HAS_WEIGHT:
        if PAIRS:
            at1, at2 = 2 * pair, 2 * pair + 1
        else:
            at1, at2 = pair, HALF + pair
        first = tl.load(w_ptr + at1, mask=pair < HALF, other=0.0).to(tl.float32) + OFFSET
        second = tl.load(w_ptr + at2, mask=pair < HALF, other=0.0).to(tl.float32) + OFFSET
        if D > 2 * HALF:
            passed = tl.load(w_ptr + rest, mask=rest < D, other=0.0).to(tl.float32) + OFFSET
    return first, second, passed


@jit
def _load_tables(
    cos_ptr, sin_ptr, cos_d, sin_d,
    HALF: tl.constexpr, FULL_TABLES: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """cos and sin of a token, for the first and for the second elements of its pairs."""
    pair = tl.arange(0, BLOCK)
    if FULL_TABLES and PAIRS:
        at1, at2 = 2 * pair, 2 * pair + 1
    elif FULL_TABLES:
        at1, at2 = pair, HALF + pair
    else:
        at1, at2 = pair, pair
    c1 = tl.load(cos_ptr + at1 * cos_d, mask=pair < HALF, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + at2 * cos_d, mask=pair < HALF, other=0.0).to(tl.float32)
    s1 = tl.load(sin_ptr + at1 * sin_d, mask=pair < HALF, other=0.0).to(tl.float32)
    s2 = tl.load(sin_ptr + at2 * sin_d, mask=pair < HALF, other=0.0).to(tl.float32)
    return c1, s1, c2, s2


@jit
def _sums(first, second, rest, D: tl.constexpr, HALF: tl.constexpr):
    """The sum of each head."""
    total = tl.sum(first, 1) + tl.sum(second, 1)
    if D > 2 * HALF:
        total += tl.sum(rest, 1)
    return total


# ---------------------------------------------------------------- forward kernel


@jit
def _forward_heads(
    x_ptr, y_ptr, r_ptr, x_h, y_h, w1, w2, w_rest, c1, s1, c2, s2, EPS: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, X_PAIRS: tl.constexpr, Y_PAIRS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token."""
    for start in range(0, HEADS, BLOCK_H):
        first, second, rest = _load_heads(x_ptr, start, x_h, HEADS, D, HALF, X_PAIRS, BLOCK_H, BLOCK, BLOCK_REST)
        r = 1.0 / tl.sqrt_rn(_sums(first * first, second * second, rest * rest, D, HALF) / D + EPS)
        head = start + tl.arange(0, BLOCK_H)
        tl.store(r_ptr + head, r, mask=head < HEADS)
        first, second = first * r[:, None] * w1[None, :], second * r[:, None] * w2[None, :]
        if D > 2 * HALF:
            rest = rest * r[:, None] * w_rest[None, :]
        _store_heads(
            y_ptr, start, y_h, first, second, rest, c1, s1, c2, s2,
            HEADS, D, HALF, Y_PAIRS, False, BLOCK_H, BLOCK, BLOCK_REST,
        )  # fmt: skip


@jit
def _forward_kernel(
    q_ptr, k_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, qr_ptr, kr_ptr,
    seq,
    q_b, q_h, q_s, k_b, k_h, k_s, qo_b, qo_h, qo_s, ko_b, ko_h, ko_s, cos_b, cos_s, cos_d, sin_b, sin_s, sin_d,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, FULL_TABLES: tl.constexpr,
    X_PAIRS: tl.constexpr, Y_PAIRS: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    # One program a token: its row of the tables is read once for all heads of q and k.
    token = tl.program_id(0).to(tl.int64)
    b, s = token // seq, token % seq
    c1, s1, c2, s2 = _load_tables(
        cos_ptr + b * cos_b + s * cos_s, sin_ptr + b * sin_b + s * sin_s, cos_d, sin_d,
        HALF, FULL_TABLES, Y_PAIRS, BLOCK,
    )  # fmt: skip
    w1, w2, w_rest = _load_weight(qw_ptr, OFFSET, HAS_WEIGHT, D, HALF, X_PAIRS, BLOCK, BLOCK_REST)
    _forward_heads(
        q_ptr + b * q_b + s * q_s, q_out_ptr + b * qo_b + s * qo_s, qr_ptr + token * Q_HEADS, q_h, qo_h,
        w1, w2, w_rest, c1, s1, c2, s2, EPS, Q_HEADS, D, HALF, X_PAIRS, Y_PAIRS, BLOCK_Q, BLOCK, BLOCK_REST,
    )  # fmt: skip
    w1, w2, w_rest = _load_weight(kw_ptr, OFFSET, HAS_WEIGHT, D, HALF, X_PAIRS, BLOCK, BLOCK_REST)
    _forward_heads(
        k_ptr + b * k_b + s * k_s, k_out_ptr + b * ko_b + s * ko_s, kr_ptr + token * K_HEADS, k_h, ko_h,
        w1, w2, w_rest, c1, s1, c2, s2, EPS, K_HEADS, D, HALF, X_PAIRS, Y_PAIRS, BLOCK_K, BLOCK, BLOCK_REST,
    )  # fmt: skip


# ---------------------------------------------------------------- backward kernel


@jit
def _backward_heads(
    dy_ptr, x_ptr, r_ptr, dx_ptr, dy_h, x_h, dx_h, w1, w2, w_rest, c1, s1, c2, s2, dw1, dw2, dw_rest,
    HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, X_PAIRS: tl.constexpr, Y_PAIRS: tl.constexpr,
    WANT_DX: tl.constexpr, WANT_DWEIGHT: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token; what they add to dweight is added to ``dw1``, ``dw2`` and ``dw_rest``."""
    for start in range(0, HEADS, BLOCK_H):
        dy1, dy2, g_rest = _load_heads(dy_ptr, start, dy_h, HEADS, D, HALF, Y_PAIRS, BLOCK_H, BLOCK, BLOCK_REST)
        x1, x2, x_rest = _load_heads(x_ptr, start, x_h, HEADS, D, HALF, X_PAIRS, BLOCK_H, BLOCK, BLOCK_REST)
        head = start + tl.arange(0, BLOCK_H)
        r = tl.load(r_ptr + head, mask=head < HEADS, other=0.0)[:, None]
        x1, x2 = x1 * r, x2 * r
        g1 = dy1 * c1[None, :] + dy2 * s2[None, :]
        g2 = dy2 * c2[None, :] - dy1 * s1[None, :]
        if WANT_DWEIGHT:
            dw1 += tl.sum(g1 * x1, 0)
            dw2 += tl.sum(g2 * x2, 0)
        if D > 2 * HALF:
            x_rest = x_rest * r
            if WANT_DWEIGHT:
                dw_rest += tl.sum(g_rest * x_rest, 0)
            g_rest = g_rest * w_rest[None, :]
        if WANT_DX:
            g1, g2 = g1 * w1[None, :], g2 * w2[None, :]
            mean = (_sums(g1 * x1, g2 * x2, g_rest * x_rest, D, HALF) / D)[:, None]
            mask, at = head < HEADS, head.to(tl.int64) * dx_h
            _store_pairs(dx_ptr, at, mask, r * (g1 - x1 * mean), r * (g2 - x2 * mean), HALF, X_PAIRS, BLOCK_H, BLOCK)
            if D > 2 * HALF:
                col = 2 * HALF + tl.arange(0, BLOCK_REST)
                dx = (r * (g_rest - x_rest * mean)).to(dx_ptr.dtype.element_ty)
                tl.store(dx_ptr + at[:, None] + col[None, :], dx, mask=mask[:, None] & (col < D)[None, :])
    return dw1, dw2, dw_rest


@jit
def _store_dweight(
    ptr, dw1, dw2, dw_rest, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    pair, rest = tl.arange(0, BLOCK), 2 * HALF + tl.arange(0, BLOCK_REST)
    if PAIRS:
        at1, at2 = 2 * pair, 2 * pair + 1
    else:
        at1, at2 = pair, HALF + pair
    tl.store(ptr + at1, dw1, mask=pair < HALF)
    tl.store(ptr + at2, dw2, mask=pair < HALF)
    if D > 2 * HALF:
        tl.store(ptr + rest, dw_rest, mask=rest < D)


@jit
def _backward_kernel(
    dq_ptr, dk_ptr, q_ptr, k_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr, qr_ptr, kr_ptr, q_grad_ptr, k_grad_ptr, partial_ptr,
    tokens, seq,
    dq_b, dq_h, dq_s, dk_b, dk_h, dk_s, q_b, q_h, q_s, k_b, k_h, k_s, qg_b, qg_h, qg_s, kg_b, kg_h, kg_s,
    cos_b, cos_s, cos_d, sin_b, sin_s, sin_d,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, FULL_TABLES: tl.constexpr,
    X_PAIRS: tl.constexpr, Y_PAIRS: tl.constexpr, OFFSET: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WANT_DX: tl.constexpr, WANT_DWEIGHT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    qw1, qw2, qw_rest = _load_weight(qw_ptr, OFFSET, HAS_WEIGHT, D, HALF, X_PAIRS, BLOCK, BLOCK_REST)
    kw1, kw2, kw_rest = _load_weight(kw_ptr, OFFSET, HAS_WEIGHT, D, HALF, X_PAIRS, BLOCK, BLOCK_REST)
    # Each program sums dweight over its own tokens, always the same ones in the same order, and writes one partial row
    # for q and one for k: no atomics.
    qd1, qd2, qd_rest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK_REST], tl.float32)
    kd1, kd2, kd_rest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK_REST], tl.float32)
    for i in range(tl.program_id(0), tokens, tl.num_programs(0)):
        token = tl.cast(i, tl.int64)
        b, s = token // seq, token % seq
        c1, s1, c2, s2 = _load_tables(
            cos_ptr + b * cos_b + s * cos_s, sin_ptr + b * sin_b + s * sin_s, cos_d, sin_d,
            HALF, FULL_TABLES, Y_PAIRS, BLOCK,
        )  # fmt: skip
        qd1, qd2, qd_rest = _backward_heads(
            dq_ptr + b * dq_b + s * dq_s, q_ptr + b * q_b + s * q_s, qr_ptr + token * Q_HEADS,
            q_grad_ptr + b * qg_b + s * qg_s, dq_h, q_h, qg_h, qw1, qw2, qw_rest, c1, s1, c2, s2, qd1, qd2, qd_rest,
            Q_HEADS, D, HALF, X_PAIRS, Y_PAIRS, WANT_DX, WANT_DWEIGHT, BLOCK_Q, BLOCK, BLOCK_REST,
        )  # fmt: skip
        kd1, kd2, kd_rest = _backward_heads(
            dk_ptr + b * dk_b + s * dk_s, k_ptr + b * k_b + s * k_s, kr_ptr + token * K_HEADS,
            k_grad_ptr + b * kg_b + s * kg_s, dk_h, k_h, kg_h, kw1, kw2, kw_rest, c1, s1, c2, s2, kd1, kd2, kd_rest,
            K_HEADS, D, HALF, X_PAIRS, Y_PAIRS, WANT_DX, WANT_DWEIGHT, BLOCK_K, BLOCK, BLOCK_REST,
        )  # fmt: skip
    if WANT_DWEIGHT:
        row = partial_ptr + tl.program_id(0).to(tl.int64) * (2 * D)
        _store_dweight(row, qd1, qd2, qd_rest, D, HALF, X_PAIRS, BLOCK, BLOCK_REST)
        _store_dweight(row + D, kd1, kd2, kd_rest, D, HALF, X_PAIRS, BLOCK, BLOCK_REST)


# ---------------------------------------------------------------- launchers


def _unit(x: torch.Tensor) -> torch.Tensor:
    """``x`` with elements of a head side by side, which the kernels read without a stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(seq_dim: int, *tensors: torch.Tensor) -> list[int]:
    """Of batch, heads and sequence."""
    return [t.stride(d) for t in tensors for d in (0, 3 - seq_dim, seq_dim)]


def _table_strides(*tables: torch.Tensor) -> list[int]:
    return [n for t in tables for n in ((t.stride(0) if t.shape[0] > 1 else 0), t.stride(1), t.stride(2))]


def _constants(
    space: Space, q: torch.Tensor, k: torch.Tensor, weight: torch.Tensor | None, cos: torch.Tensor, style: str,
    rotary_dim: int, seq_dim: int, offset: float,
) -> tuple[dict[str, Any], int]:  # fmt: skip
    """What a kernel is specialised on, and programs for each processor."""
    heads, tokens, width = [t.shape[3 - seq_dim] for t in (q, k)], q.shape[0] * q.shape[seq_dim], q.shape[-1]
    config = space(q.device, q.dtype, tokens, *heads, width, rotary_dim, style, weight is not None)
    half = rotary_dim // 2
    block = next_power_of_2(half)
    blocks = [min(next_power_of_2(h), max(1, config["TILE"] // (2 * block))) for h in heads]
    x_pairs, y_pairs = STYLES[style]
    return {
        "Q_HEADS": heads[0], "K_HEADS": heads[1], "D": width, "HALF": half,
        "FULL_TABLES": cos.shape[-1] == rotary_dim, "X_PAIRS": x_pairs, "Y_PAIRS": y_pairs,
        "OFFSET": offset, "HAS_WEIGHT": weight is not None,
        "BLOCK_Q": blocks[0], "BLOCK_K": blocks[1], "BLOCK": block,
        "BLOCK_REST": next_power_of_2(max(width - rotary_dim, 1)), "num_warps": config["num_warps"], **SAME_SUMS,
    }, config["PROGRAMS"]  # fmt: skip


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
    style: str,
    out_dtype: torch.dtype | None,
    rotary_dim: int,
    seq_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rest = eps, offset, style, out_dtype, rotary_dim, seq_dim
    outs = _forward_fake(q, k, q_weight, k_weight, cos, sin, *rest)
    q_out, k_out, q_r, k_r = outs
    if q.numel() == 0:
        return outs
    if not use_triton(q) or q.dtype == torch.float64:
        for x, weight, out, r in ((q, q_weight, q_out, q_r), (k, k_weight, k_out, k_r)):
            h = x.to(r.dtype)
            each = torch.rsqrt(h.square().mean(-1) + eps)
            r.copy_(each if seq_dim == 1 else each.transpose(1, 2))
            h = h * each.unsqueeze(-1)
            h = h if weight is None else h * (weight.to(r.dtype) + offset)
            out.copy_(_turn(h, cos, sin, style, out.dtype, rotary_dim, seq_dim))
        return outs
    q, k = _unit(q), _unit(k)
    constants, _ = _constants(FORWARD, q, k, q_weight, cos, style, rotary_dim, seq_dim, offset)
    weights = [x if w is None else w.contiguous() for x, w in ((q, q_weight), (k, k_weight))]
    _forward_kernel[(q.shape[0] * q.shape[seq_dim],)](
        q, k, *weights, cos, sin, q_out, k_out, q_r, k_r, q.shape[seq_dim],
        *_strides(seq_dim, q, k, q_out, k_out), *_table_strides(cos, sin), EPS=eps, **constants,
    )  # fmt: skip
    return outs


def _forward_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float,
    style: str,
    out_dtype: torch.dtype | None,
    rotary_dim: int,
    seq_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    q_out, k_out = _rotary._forward_fake(q, k, cos, sin, style, out_dtype, rotary_dim, seq_dim)
    compute = torch.promote_types(q.dtype, torch.float32)
    q_r, k_r = (x.new_empty((x.shape[0], x.shape[seq_dim], x.shape[3 - seq_dim]), dtype=compute) for x in (q, k))
    return q_out, k_out, q_r, k_r


def _backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_r: torch.Tensor,
    k_r: torch.Tensor,
    offset: float,
    style: str,
    rotary_dim: int,
    seq_dim: int,
    want_dx: bool,
    want_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rest = offset, style, rotary_dim, seq_dim, want_dx, want_dweight
    outs = _backward_fake(dq, dk, q, k, q_weight, k_weight, cos, sin, q_r, k_r, *rest)
    q_grad, k_grad, q_dweight, k_dweight = outs
    if q.numel() == 0 or not (want_dx or want_dweight):
        q_dweight.zero_(), k_dweight.zero_()
        return outs
    if not use_triton(q) or q.dtype == torch.float64:
        sides = ((dq, q, q_weight, q_r, q_grad, q_dweight), (dk, k, k_weight, k_r, k_grad, k_dweight))
        for dy, x, weight, r, grad, dweight in sides:
            each = (r if seq_dim == 1 else r.transpose(1, 2)).unsqueeze(-1)
            x_hat = x.to(r.dtype) * each
            g = _turn(dy, cos, sin, style, r.dtype, rotary_dim, seq_dim, transpose=True)
            if want_dweight:
                dweight.copy_((g * x_hat).reshape(-1, x.shape[-1]).sum(0))
            if want_dx:
                g = g if weight is None else g * (weight.to(r.dtype) + offset)
                grad.copy_(each * (g - x_hat * (g * x_hat).mean(-1, keepdim=True)))
        return outs
    dq, dk, q, k = _unit(dq), _unit(dk), _unit(q), _unit(k)
    constants, most = _constants(BACKWARD, q, k, q_weight, cos, style, rotary_dim, seq_dim, offset)
    tokens = q.shape[0] * q.shape[seq_dim]
    programs = min(tokens, most * processors(q.device)) if want_dweight else tokens
    partial = q.new_empty((programs, 2, q.shape[-1]) if want_dweight else (0,), dtype=torch.float32)
    weights = [x if w is None else w.contiguous() for x, w in ((q, q_weight), (k, k_weight))]
    grads = (q_grad, k_grad) if want_dx else (q, k)  # not written to
    _backward_kernel[(programs,)](
        dq, dk, q, k, *weights, cos, sin, q_r, k_r, *grads, partial, tokens, q.shape[seq_dim],
        *_strides(seq_dim, dq, dk, q, k, *grads), *_table_strides(cos, sin),
        WANT_DX=want_dx, WANT_DWEIGHT=want_dweight, **constants,
    )  # fmt: skip
    if want_dweight:
        total = partial.sum(0)
        q_dweight.copy_(total[0])
        k_dweight.copy_(total[1])
    return outs


def _backward_fake(
    dq: torch.Tensor,
    dk: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_r: torch.Tensor,
    k_r: torch.Tensor,
    offset: float,
    style: str,
    rotary_dim: int,
    seq_dim: int,
    want_dx: bool,
    want_dweight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def like(x: torch.Tensor) -> torch.Tensor:
        # [batch, seq, heads, D] in memory: what the projection's backward multiplies.
        order = [0, seq_dim, 3 - seq_dim, 3]
        return x.new_empty([x.shape[d] for d in order]).permute(order) if want_dx else x.new_empty(0)

    def of(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(0) if weight is None or not want_dweight else weight.new_empty(weight.shape)

    return like(q), like(k), of(q, q_weight), of(k, k_weight)


# ---------------------------------------------------------------- op

_raw = raw_op(
    "norm_rotary(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps,"
    " float offset, str style, ScalarType? out_dtype, SymInt rotary_dim, int seq_dim)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_raw_backward = raw_op(
    "norm_rotary_backward(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos,"
    " Tensor sin, Tensor q_rstd, Tensor k_rstd, float offset, str style, SymInt rotary_dim, int seq_dim,"
    " bool want_dx, bool want_dweight) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _NormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps, offset, style, out_dtype, rotary_dim, seq_dim):
        rest = eps, offset, style, out_dtype, rotary_dim, seq_dim
        q_out, k_out, q_r, k_r = _raw(q, k, q_weight, k_weight, cos, sin, *rest)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, q_r, k_r)
        ctx.rest = offset, style, rotary_dim, seq_dim
        return q_out, k_out

    @staticmethod
    def backward(ctx, dq, dk):
        wanted = ctx.needs_input_grad[:4]
        grads = _raw_backward(dq, dk, *ctx.saved_tensors, *ctx.rest, any(wanted[:2]), any(wanted[2:]))
        return (*(grad if w else None for grad, w in zip(grads, wanted, strict=True)), *(None,) * 8)


def norm_rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    style: str = "half",
    out_dtype: torch.dtype | None = None,
    rotary_dim: int | None = None,
    seq_dim: int = 2,
    transpose: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rotary(rms_norm(q, q_weight), rms_norm(k, k_weight))``, each head normalised by itself; differentiable in q, k
    and the weights.

    q: ``[batch, heads, seq, D]``; k: ``[batch, kv_heads, seq, D]`` in q's dtype, any strides. q_weight, k_weight:
    ``[D]``, both or neither. cos, sin, style, rotary_dim, seq_dim: as :func:`fastft.kernels.rotary.rotary` has them,
    for the results. eps, offset: as :func:`fastft.kernels.rms_norm.rms_norm`'s. out_dtype: of the results, q's own by
    default. transpose: q and k have their second and third axis exchanged: ``[batch, seq, heads, D]`` for ``seq_dim``
    2.

    Raises ``ValueError`` where cos or sin requires a gradient.
    """
    cos, sin = _tables(cos, sin, seq_dim)
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("norm_rotary computes no gradients of cos and sin; detach them, or leave this site to PyTorch")
    q, k = _heads_first(q, transpose), _heads_first(k, transpose)
    rest = float(eps), float(offset), style, out_dtype, rotary_dim or q.shape[-1], seq_dim
    return _NormRotary.apply(q, k, q_weight, k_weight, cos, sin, *rest)


def supported(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    style: str = "half",
    out_dtype: torch.dtype | None = None,
    rotary_dim: int | None = None,
    seq_dim: int = 2,
    transpose: bool = False,
) -> Reason | None:
    """None, or why this call cannot run as one kernel."""
    if q.dim() != 4 or k.dim() != 4:
        return Reason("shape", f"q is {tuple(q.shape)} and k {tuple(k.shape)}; 4 axes are supported")
    q, k = _heads_first(q, transpose), _heads_first(k, transpose)
    if reason := _rotary.supported(q, k, cos, sin, style, out_dtype, rotary_dim, seq_dim):
        return reason
    if reason := check_dtypes(q_weight, k_weight):
        return reason
    # One kernel has weights or none; its programs read a row of D of each.
    if (q_weight is None) != (k_weight is None):
        return Reason("weight", "one of q and k has a weight and the other none; both or neither is supported")
    for weight in (q_weight, k_weight):
        if weight is not None and tuple(weight.shape) != (q.shape[-1],):
            return Reason(
                "shape", f"a weight is {tuple(weight.shape)}; [{q.shape[-1]}], one for each element of a head"
            )
    return None


def cost(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    style: str = "half",
    out_dtype: torch.dtype | None = None,
    rotary_dim: int | None = None,
    seq_dim: int = 2,
    transpose: bool = False,
) -> Cost:
    """Forward: q and k in and out, the tables in; kept: q and k, 4 bytes for each head, and the tables."""
    elements, heads = (size(q.numel()) + size(k.numel())), (size(q.numel()) + size(k.numel())) / size(q.shape[-1])
    cos, _ = _tables(cos, sin, seq_dim)
    tables, item = 2 * size(cos.numel()) * cos.element_size(), q.element_size()
    moved = elements * (item + (out_dtype or q.dtype).itemsize) + tables + 4 * heads
    return Cost(7 * elements, moved, elements * item + 4 * heads + tables)


# ---------------------------------------------------------------- calls


def stock(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    offset: float = 0.0,
    rotary_dim: int | None = None,
    transpose: bool = False,
) -> tuple[torch.Tensor, ...]:
    """transformers' ``Qwen3RMSNorm`` (``Gemma3RMSNorm`` with ``offset``), and its ``apply_rotary_pos_emb``."""
    from fastft.kernels.rms_norm import stock as norm

    q, k = norm(q, q_weight, eps, offset), norm(k, k_weight, eps, offset)
    return _rotary.stock(_heads_first(q, transpose), _heads_first(k, transpose), cos, sin, rotary_dim)


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """q and k of a layer whose heads have norms. Gemma transposes the heads before them, Qwen after them."""
    if model.head_norms:
        heads = {"heads": model.heads, "kv_heads": model.kv_heads, "head_dim": model.head_dim}
        gemma = model.family.startswith("gemma")
        more = {"eps": model.eps, "offset": float(gemma), "transpose": not gemma}
        yield {**model.tokens, **heads, "rotary_dim": model.rotary_dim, **more}


def inputs(
    new: New,
    *,
    batch: int,
    seq: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    eps: float,
    offset: float,
    transpose: bool = True,
) -> Inputs:
    """q [batch, seq, heads, head_dim] and k as the projections leave them, weights, and tables [1, seq, rotary_dim].

    Without ``transpose`` the heads are second, as views of the same memory.
    """
    q, k = (t.detach() for t in new.heads(batch, seq, head_dim, heads, kv_heads))
    q, k = ((t.transpose(1, 2) if transpose else t).requires_grad_() for t in (q, k))
    angle = new.uniform(1, seq, rotary_dim // 2).repeat(1, 1, 2)
    tables = angle.cos().to(new.dtype), angle.sin().to(new.dtype)
    args = q, k, new(head_dim), new(head_dim), *tables, eps, offset
    return Inputs(args, {"rotary_dim": rotary_dim} | ({"transpose": True} if transpose else {}), [q, k])


register(
    Op(
        name="norm_rotary",
        call=norm_rotary,
        reference=reference,
        supported=supported,
        raw=("norm_rotary", "norm_rotary_backward"),
        recompute=Recompute.CHEAP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
        stock=stock,
    )
)
