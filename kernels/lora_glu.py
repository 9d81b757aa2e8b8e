"""Gated MLPs with LoRA adapters on gate and up: the activation takes both adapters' up projections in itself.

With the layers' results e = x Wᵀ and their adapters' h = x Aᵀ, which ``lora_stack`` gives side by side, element by
element::

    g = e_g + s_g h_g B_gᵀ        u = e_u + s_u h_u B_uᵀ        y = f(g) u          (f as in ``glu.py``)

e and y [..., N], h [..., r], B [N, r]. Neither g nor u is ever in memory: h Bᵀ is a product of matrices as thin as r,
which tensor cores compute in registers while e is read, where the layers by themselves write it for each of them and
read it again (4 N numbers a token). The sum is in fp32, so what is rounded is e, y, and nothing else.

Backward, with g and u computed again, and dg and du by the formulas of ``glu``. All gradients are written into one
matrix as wide as ``wide`` = [e_g | e_u | h_g | h_u | …], from which ``lora_stack`` goes on::

    ∂wide = [dg | du | s_g dg B_g | s_u du B_u | 0]      ∂B = s dgᵀ h_g, s duᵀ h_u

dg B is summed up in the same pass that writes dg. A program walks over some columns of its rows, every eighth tile of
them, and leaves its part of the sums [T, r] behind, in fp32; a second, small kernel adds the parts up, always in the
same order. Programs that share rows are at neighbouring tiles at the same time: DRAM gives its rate to those who ask
for what lies side by side, and a tile is only 128 bytes wide. (With ``FUSED`` 0, which tuning may choose, the pass
writes dg and du and no more, and dg B are products of cuBLAS's.)

Kept: wide. The op is cheap to compute again, from what the backward needs anyway; its products are not, which is why
they are another op.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fastft.kernels import lora_linear as lora
from fastft.kernels._config import Config, Space, crowded, padded
from fastft.kernels._dense_weights import once, whole
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import Cost, Op, Reason, Recompute, check_dtypes, raw_op, register, use_triton
from fastft.kernels._products import matmul, times
from fastft.kernels._rows import rows_of, size, tile_at
from fastft.kernels._triton import cdiv, jit, next_power_of_2, tl
from fastft.kernels.glu import KINDS, _activate, _activate_torch
from fastft.kernels.glu import reference as glu_reference
from fastft.kernels.glu import stock as glu_stock

Tensors = Sequence[torch.Tensor]

#: h and B of this rank fit into registers beside the tiles of gate and up.
MOST_RANK = 64

# ---------------------------------------------------------------- reference


def _pieces(wide: torch.Tensor, n: int, ranks: Sequence[int]) -> list[torch.Tensor]:
    """``wide`` cut into e_g, e_u, h_g and h_u: views."""
    starts = lora._starts([n, n, *ranks])
    return [wide[..., start:end] for start, end in itertools.pairwise(starts)]


def reference(wide: torch.Tensor, b: Tensors, scaling: Sequence[float], kind: str) -> torch.Tensor:
    """:func:`lora_glu` in plain PyTorch, differentiable; fp32 inside (fp64 for fp64)."""
    compute = torch.promote_types(wide.dtype, torch.float32)
    *bases, h_gate, h_up = _pieces(wide, b[0].shape[0], [up.shape[1] for up in b])
    gate, up = (
        base.to(compute) + scale * (h.to(compute) @ thin.to(wide.dtype).to(compute).t())
        for base, h, thin, scale in zip(bases, (h_gate, h_up), b, scaling, strict=True)
    )
    return glu_reference(gate, up, kind).to(wide.dtype)


# ---------------------------------------------------------------- configuration


#: Tokens and columns of a program's tile: 32 elements of gate, and as many of up, for each of its 128 threads. With
#: twice the columns and threads an H100 takes 8 % longer.
BLOCK_M, BLOCK_N = 64, 64
#: A product on tensor cores has as many terms at least.
LEAST_RANK = 16


def _tile(device: torch.device, dtype: torch.dtype, rows: int, n: int, rank: int, kind: str) -> Config:
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": 4}


#: Rows of a program that adds the parts up.
SUM_ROWS = 32
#: Columns that a program of the backward takes at a time (about 190 registers a thread, two programs a processor, each
#: with two tiles on their way), and programs that share a row's columns, each with a part of the sums over them. With
#: half as many, a GPU's last wave of programs has too little to do where rows are few, as in a slice.
SPLIT_N, SPLITS = 64, 16
#: Above this rank, half as many of both: B's tiles, the sums and their parts are four times those of rank 16.
MIDDLE_RANK = 32
#: Rows of a warp's product.
WARP_ROWS = 16


def _split_tile(device: torch.device, dtype: torch.dtype, rows: int, n: int, rank: int, kind: str) -> Config:
    high = rank > MIDDLE_RANK
    columns = SPLIT_N // 2 if high or dtype == torch.float32 else SPLIT_N
    splits = max(SPLITS // 2, 1) if high else SPLITS
    return {"BLOCK_M": BLOCK_M, "BLOCK_N": columns, "SPLITS": splits, "FUSED": 1, "num_warps": 4, "num_stages": 3}


def _legal(
    config: Config, device: torch.device, dtype: torch.dtype, rows: int, n: int, rank: int, kind: str
) -> str | None:
    return crowded(6 * config["BLOCK_M"] * config["BLOCK_N"], config["num_warps"])


def _legal_backward(
    config: Config, device: torch.device, dtype: torch.dtype, rows: int, n: int, rank: int, kind: str
) -> str | None:
    if config["FUSED"]:
        # Warps of a product whose result goes into another product stand below each other.
        if config["BLOCK_M"] < WARP_ROWS * config["num_warps"]:
            return f"{config['BLOCK_M']} rows for {config['num_warps']} warps: some would compute what others do"
    else:
        # Its programs have one tile and share nothing; of the values that change nothing, the heuristic's stand.
        usual = _split_tile(device, dtype, rows, n, rank, kind)
        for name in ("SPLITS", "num_stages"):
            if config[name] != usual[name]:
                return f"{name} changes nothing where FUSED is 0"
    return _legal(config, device, dtype, rows, n, rank, kind)


def _waste(
    config: Config, device: torch.device, dtype: torch.dtype, rows: int, n: int, rank: int, kind: str
) -> tuple[float, float]:
    return padded(rows, config["BLOCK_M"]) * padded(n, config["BLOCK_N"]), 1.0


_VALUES = {"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (32, 64, 128, 256), "num_warps": (2, 4, 8, 16)}
_SIZES: dict[str, Any] = {"tokens": ("rows",), "sizes": ("n", "rank", "kind"), "waste": _waste}
FORWARD = Space("lora_glu.forward", _VALUES, _tile, legal=_legal, **_SIZES)
BACKWARD = Space(
    "lora_glu.backward",
    {**_VALUES, "num_warps": (2, 4, 8), "SPLITS": (1, 2, 4, 8, 16, 32), "FUSED": (0, 1), "num_stages": (1, 2, 3, 4)},
    _split_tile,
    legal=_legal_backward,
    **_SIZES,
)

# ---------------------------------------------------------------- kernels


@jit
def _thin(wide_ptr, row, first, rows, inner, outer_stride, inner_stride, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """h of a tile's rows, from column ``first`` on."""
    r = tl.arange(0, BLOCK_R)
    there = (row < rows)[:, None] & (r < RANK)[None, :]
    return tl.load(tile_at(wide_ptr, row, first + r, inner, outer_stride, inner_stride), mask=there, other=0.0)


@jit
def _bases(wide_ptr, row, col, rows, n, inner, outer_stride, inner_stride):
    """e of gate and up of a tile. What a tile reads is asked for before any of it is used: a product waits for all
    threads, and no load passes it."""
    there = (row < rows)[:, None] & (col < n)[None, :]
    at = tile_at(wide_ptr, row, col, inner, outer_stride, inner_stride)
    return tl.load(at, mask=there, other=0.0), tl.load(at + n, mask=there, other=0.0)


@jit
def _thin_b(b_ptr, col, n, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """B of a tile's columns."""
    r = tl.arange(0, BLOCK_R)
    return tl.load(b_ptr + col[:, None] * RANK + r[None, :], mask=(col < n)[:, None] & (r < RANK)[None, :], other=0.0)


@jit
def _adapted(e, h, b, scale, PRECISION: tl.constexpr):
    """e + s h Bᵀ, in fp32. s is no constant: with one of 1 Triton makes e the product's accumulator, which is then not
    loaded ahead, and the backward takes 1.6 times as long."""
    return e.to(tl.float32) + scale * tl.dot(h, tl.trans(b), input_precision=PRECISION)


@jit
def _forward_kernel(
    wide_ptr, b_gate_ptr, b_up_ptr, y_ptr,
    rows, n, blocks, inner, wide_outer, wide_inner, y_outer, y_inner,
    scale_gate, scale_up, RANK_GATE: tl.constexpr, RANK_UP: tl.constexpr,
    BLOCK_R: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    h_gate = _thin(wide_ptr, row, 2 * n, rows, inner, wide_outer, wide_inner, RANK_GATE, BLOCK_R)
    h_up = _thin(wide_ptr, row, 2 * n + RANK_GATE, rows, inner, wide_outer, wide_inner, RANK_UP, BLOCK_R)
    e_gate, e_up = _bases(wide_ptr, row, col, rows, n, inner, wide_outer, wide_inner)
    b_gate, b_up = _thin_b(b_gate_ptr, col, n, RANK_GATE, BLOCK_R), _thin_b(b_up_ptr, col, n, RANK_UP, BLOCK_R)
    g = _adapted(e_gate, h_gate, b_gate, scale_gate, PRECISION)
    u = _adapted(e_up, h_up, b_up, scale_up, PRECISION)
    f, _ = _activate(g, KIND)
    there = (row < rows)[:, None] & (col < n)[None, :]
    tl.store(tile_at(y_ptr, row, col, inner, y_outer, y_inner), (f * u).to(y_ptr.dtype.element_ty), mask=there)


@jit
def _backward_kernel(
    dy_ptr, wide_ptr, b_gate_ptr, b_up_ptr, dwide_ptr, parts_ptr,
    rows, n, inner, dy_outer, dy_inner, wide_outer, wide_inner, dwide_outer, dwide_inner,
    scale_gate, scale_up, RANK_GATE: tl.constexpr, RANK_UP: tl.constexpr,
    BLOCK_R: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr, WANT_H: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // SPLITS) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(0) % SPLITS
    h_gate = _thin(wide_ptr, row, 2 * n, rows, inner, wide_outer, wide_inner, RANK_GATE, BLOCK_R)
    h_up = _thin(wide_ptr, row, 2 * n + RANK_GATE, rows, inner, wide_outer, wide_inner, RANK_UP, BLOCK_R)
    dh_gate = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    dh_up = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(split * BLOCK_N, n, SPLITS * BLOCK_N):
        col = start + tl.arange(0, BLOCK_N)
        there = (row < rows)[:, None] & (col < n)[None, :]
        dy = tl.load(tile_at(dy_ptr, row, col, inner, dy_outer, dy_inner), mask=there, other=0.0)
        e_gate, e_up = _bases(wide_ptr, row, col, rows, n, inner, wide_outer, wide_inner)
        b_gate, b_up = _thin_b(b_gate_ptr, col, n, RANK_GATE, BLOCK_R), _thin_b(b_up_ptr, col, n, RANK_UP, BLOCK_R)
        g = _adapted(e_gate, h_gate, b_gate, scale_gate, PRECISION)
        u = _adapted(e_up, h_up, b_up, scale_up, PRECISION)
        f, slope = _activate(g, KIND)
        dy = dy.to(tl.float32)
        dg = (dy * u * slope).to(dwide_ptr.dtype.element_ty)
        du = (dy * f).to(dwide_ptr.dtype.element_ty)
        dg_at = tile_at(dwide_ptr, row, col, inner, dwide_outer, dwide_inner)
        tl.store(dg_at, dg, mask=there)
        tl.store(dg_at + n, du, mask=there)
        if WANT_H:
            dh_gate += tl.dot(dg, b_gate, input_precision=PRECISION)
            dh_up += tl.dot(du, b_up, input_precision=PRECISION)
    if WANT_H:
        r = tl.arange(0, BLOCK_R)
        part = parts_ptr + (split.to(tl.int64) * rows + row)[:, None] * (RANK_GATE + RANK_UP) + r[None, :]
        live = (row < rows)[:, None]
        tl.store(part, scale_gate * dh_gate, mask=live & (r < RANK_GATE)[None, :])
        tl.store(part + RANK_GATE, scale_up * dh_up, mask=live & (r < RANK_UP)[None, :])


@jit
def _sum_kernel(
    parts_ptr, dwide_ptr, rows, first, columns, inner, dwide_outer, dwide_inner,
    RANK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The gradient of all h, and zeros behind it: ``columns`` of them, from column ``first`` on."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for split in range(SPLITS):
        part = parts_ptr + (row.to(tl.int64) + split * rows)[:, None] * RANK + c[None, :]
        total += tl.load(part, mask=(row < rows)[:, None] & (c < RANK)[None, :], other=0.0)
    at = tile_at(dwide_ptr, row, first + c, inner, dwide_outer, dwide_inner)
    tl.store(at, total.to(dwide_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (c < columns)[None, :])


# ---------------------------------------------------------------- launchers


def _constants(x: torch.Tensor, b: Tensors, kind: str) -> dict[str, Any]:
    """What both kernels are compiled for."""
    gate, up = (t.shape[1] for t in b)
    return {
        "RANK_GATE": gate, "RANK_UP": up, "BLOCK_R": max(LEAST_RANK, next_power_of_2(max(gate, up))),
        "KIND": kind, "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def _rounded(b: Tensors, dtype: torch.dtype) -> list[torch.Tensor]:
    """Both B, contiguous, in ``dtype``, in one launch: what a kernel converts stands in registers, tile after tile,
    between being loaded and being multiplied."""
    if all(up.dtype == dtype for up in b):
        return [up.contiguous() for up in b]

    def make() -> list[torch.Tensor]:
        out = [up.new_empty(up.shape, dtype=dtype) for up in b]
        torch._foreach_copy_(out, list(b))
        return out

    return once("each", b, dtype, make)


def _forward(wide: torch.Tensor, b: Tensors, scaling: Sequence[float], kind: str) -> torch.Tensor:
    y = _forward_fake(wide, b, scaling, kind)
    if y.numel() == 0:
        return y
    if not use_triton(wide) or wide.dtype == torch.float64:
        return y.copy_(reference(wide, b, scaling, kind))
    walk = rows_of(wide, y)
    if walk is None:
        return y.copy_(_forward(wide.contiguous(), b, scaling, kind))
    n, rank = y.shape[-1], max(up.shape[1] for up in b)
    tile = FORWARD(wide.device, wide.dtype, walk.count, n, rank, kind)
    blocks = cdiv(n, tile["BLOCK_N"])
    b_gate, b_up = _rounded(b, wide.dtype)
    _forward_kernel[(cdiv(walk.count, tile["BLOCK_M"]) * blocks,)](
        wide, b_gate, b_up, y,
        walk.count, n, blocks, walk.inner, *itertools.chain.from_iterable(walk.strides), *map(float, scaling),
        **_constants(wide, b, kind), **tile,
    )  # fmt: skip
    return y


def _forward_fake(wide: torch.Tensor, b: Tensors, scaling: Sequence[float], kind: str) -> torch.Tensor:
    return wide.new_empty((*wide.shape[:-1], b[0].shape[0]))


def _backward_into(
    dwide: torch.Tensor,
    dy: torch.Tensor,
    wide: torch.Tensor,
    b: Tensors,
    scaling: Sequence[float],
    kind: str,
    want_h: bool,
) -> Callable[[], None]:
    """Write dg and du, and return what writes the gradients behind them, if ``want_h``. ``dwide`` may be ``wide``: the
    first overwrites g and u, the second h.
    """
    if not use_triton(wide) or wide.dtype == torch.float64:
        return _backward_torch(dwide, dy, wide, b, scaling, kind, want_h)
    walk = rows_of(dwide, dy, wide)
    if walk is None:
        return _backward_into(dwide, dy.contiguous(), wide.contiguous(), b, scaling, kind, want_h)
    n, ranks = b[0].shape[0], [up.shape[1] for up in b]
    tile = BACKWARD(wide.device, wide.dtype, walk.count, n, max(ranks), kind)
    fused, blocks = tile.pop("FUSED"), cdiv(n, tile["BLOCK_N"])
    summed = bool(want_h and fused)
    if not fused:
        tile["SPLITS"], tile["num_stages"] = blocks, 1
    parts = wide.new_empty((tile["SPLITS"], walk.count, sum(ranks)) if summed else 0, dtype=torch.float32)
    b_gate, b_up = _rounded(b, wide.dtype)
    of_dwide, of_dy, of_wide = walk.strides
    _backward_kernel[(cdiv(walk.count, tile["BLOCK_M"]) * tile["SPLITS"],)](
        dy, wide, b_gate, b_up, dwide, parts, walk.count, n, walk.inner, *of_dy, *of_wide, *of_dwide,
        *map(float, scaling), **_constants(wide, b, kind), WANT_H=summed, **tile,
    )  # fmt: skip

    def behind() -> None:
        if summed:
            columns = wide.shape[-1] - 2 * n
            _sum_kernel[(cdiv(walk.count, SUM_ROWS),)](
                parts, dwide, walk.count, 2 * n, columns, walk.inner, *of_dwide,
                RANK=sum(ranks), BLOCK_C=next_power_of_2(columns), BLOCK_M=SUM_ROWS, SPLITS=tile["SPLITS"],
                num_warps=4,
            )  # fmt: skip
        elif want_h:
            *grads, dh_gate, dh_up = _pieces(lora._rows(dwide), n, ranks)
            for at, grad, up, scale in zip((dh_gate, dh_up), grads, (b_gate, b_up), scaling, strict=True):
                at.addmm_(grad, up, beta=0, alpha=scale)
            dwide[..., 2 * n + sum(ranks) :].zero_()

    return behind


def _backward_torch(
    dwide: torch.Tensor,
    dy: torch.Tensor,
    wide: torch.Tensor,
    b: Tensors,
    scaling: Sequence[float],
    kind: str,
    want_h: bool,
) -> Callable[[], None]:
    """:func:`_backward_into`, in PyTorch."""
    n, ranks = b[0].shape[0], [up.shape[1] for up in b]
    compute = torch.promote_types(wide.dtype, torch.float32)
    ups = [up.to(wide.dtype).to(compute) for up in b]
    *bases, h_gate, h_up = _pieces(wide.to(compute), n, ranks)
    g, u = (base + scale * (h @ up.t()) for base, h, up, scale in zip(bases, (h_gate, h_up), ups, scaling, strict=True))
    f, slope = _activate_torch(g, kind)
    dg_at, du_at, dh_gate, dh_up = _pieces(dwide, n, ranks)
    dg_at.copy_(dy.to(compute) * u * slope)
    du_at.copy_(dy.to(compute) * f)

    def behind() -> None:
        if want_h:
            for at, grad, up, scale in zip((dh_gate, dh_up), (dg_at, du_at), ups, scaling, strict=True):
                at.copy_(scale * (grad.to(compute) @ up))
            dwide[..., 2 * n + sum(ranks) :].zero_()

    return behind


def _backward(
    dy: torch.Tensor,
    wide: torch.Tensor,
    b: Tensors,
    scaling: Sequence[float],
    kind: str,
    need_wide: bool,
    need_b: Sequence[bool],
    over: bool = False,
) -> list[torch.Tensor]:
    """[∂wide, ∂B of gate, ∂B of up]; what is not needed is an empty tensor. ``over``: ∂wide takes the place of wide."""
    n, ranks = b[0].shape[0], [up.shape[1] for up in b]
    dwide = wide if over else wide.new_empty(wide.shape)
    behind = _backward_into(dwide, dy, wide, b, scaling, kind, need_wide) if dwide.numel() else None
    dgates = _pieces(lora._rows(dwide), n, ranks)[:2]
    hs = _pieces(lora._rows(wide), n, ranks)[2:]
    dbs = [wide.new_empty(0) for _ in b]
    for i, (g, h, up, scale) in enumerate(zip(dgates, hs, b, scaling, strict=True)):
        if need_b[i]:
            db = matmul(g.t(), h, torch.promote_types(up.dtype, torch.float32))
            dbs[i] = times(scale, db).to(up.dtype)
    if behind is not None:
        behind()  # where h was, which ∂B was made of
    return [dwide if need_wide else wide.new_empty(0), *dbs]


def _backward_fake(
    dy: torch.Tensor,
    wide: torch.Tensor,
    b: Tensors,
    scaling: Sequence[float],
    kind: str,
    need_wide: bool,
    need_b: Sequence[bool],
) -> list[torch.Tensor]:
    dbs = [up.new_empty(up.shape) if needed else wide.new_empty(0) for up, needed in zip(b, need_b, strict=True)]
    return [wide.new_empty(wide.shape if need_wide else 0), *dbs]


# ---------------------------------------------------------------- ops

_raw = raw_op("lora_glu(Tensor wide, Tensor[] b, float[] scaling, str kind) -> Tensor", _forward, _forward_fake)
_raw_backward = raw_op(
    "lora_glu_backward(Tensor dy, Tensor wide, Tensor[] b, float[] scaling, str kind, bool need_wide, bool[] need_b) "
    "-> Tensor[]",
    _backward,
    _backward_fake,
)


class _LoraGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, wide, b_gate, b_up, scaling, kind):
        ctx.save_for_backward(wide, b_gate, b_up)
        ctx.scaling, ctx.kind = scaling, kind
        return _raw(wide, [b_gate, b_up], scaling, kind)

    @staticmethod
    def backward(ctx, dy):
        wide, *b = ctx.saved_tensors
        need_wide, *need_b = ctx.needs_input_grad[:3]
        found = _raw_backward(dy, wide, b, ctx.scaling, ctx.kind, need_wide, need_b)
        found = [grad if needed else None for grad, needed in zip(found, (need_wide, *need_b), strict=True)]
        return (*found, None, None)


def lora_glu(wide: torch.Tensor, b: Tensors, scaling: Sequence[float], kind: str) -> torch.Tensor:
    """f(e_g + s_g h_g B_gᵀ) · (e_u + s_u h_u B_uᵀ), [..., N] in wide's dtype.

    ``wide``: [e_g | e_u | h_g | h_u | anything], [..., 2 N + r_g + r_u or more], as :func:`lora_stack` makes it of gate
    and up. ``b``: gate's B [N, r_g] and up's [N, r_u] in any floating dtype, which their gradients have too (they are
    rounded to wide's where they are used). ``scaling``: s_g and s_u. ``kind``: as for :func:`~fastft.kernels.glu.glu`.

    Raises ValueError for tensors that do not belong together.
    """
    reason = supported(wide, b, scaling, kind)
    if reason is not None:
        raise ValueError(f"lora_glu: {reason}")
    return _LoraGLU.apply(wide, *b, [float(s) for s in scaling], kind)  # type: ignore[no-any-return]


def supported(wide: torch.Tensor, b: Tensors, scaling: Sequence[float], kind: str) -> Reason | None:
    """None, or why this call cannot run as one kernel."""
    # The activations that the kernels know.
    if kind not in KINDS:
        return Reason("activation", f"the activation {kind!r} is not one of {', '.join(KINDS)}")
    # fp32 arithmetic: fp64 would lose digits on a GPU.
    if reason := check_dtypes(wide, *b):
        return reason
    if len(b) != 2 or len(scaling) != 2:
        return Reason("shape", f"{len(b)} adapters and {len(scaling)} scalings; gate and up have one each")
    gate, up = b
    if gate.dim() != 2 or up.dim() != 2 or gate.shape[0] != up.shape[0]:
        return Reason("shape", f"B is {tuple(gate.shape)} for gate and {tuple(up.shape)} for up; [N, r] is supported")
    # A program holds a tile's rows of h and of B at once.
    if max(gate.shape[1], up.shape[1]) > MOST_RANK:
        return Reason("rank", f"ranks {gate.shape[1]} and {up.shape[1]}: up to {MOST_RANK} is supported")
    least = 2 * gate.shape[0] + gate.shape[1] + up.shape[1]
    if wide.dim() < 1 or wide.shape[-1] < least:
        return Reason("shape", f"wide is {tuple(wide.shape)}; at least {least} columns are needed")
    return None


def cost(wide: torch.Tensor, b: Tensors, scaling: Sequence[float], kind: str) -> Cost:
    """Forward: e and h in, y out; kept: e and h."""
    tokens, n, itemsize = size(wide.numel()) / size(wide.shape[-1]), b[0].shape[0], wide.element_size()
    rank = sum(up.shape[1] for up in b)
    kept = tokens * (2 * n + rank) * itemsize
    return Cost(tokens * n * (8 + 2 * rank), kept + tokens * n * itemsize, kept)


# ---------------------------------------------------------------- calls


def stock(wide: torch.Tensor, b: Tensors, scaling: Sequence[float], kind: str) -> torch.Tensor:
    """PEFT's adapters and transformers' MLP, from what the products before them gave."""
    *bases, h_gate, h_up = _pieces(wide, b[0].shape[0], [up.shape[1] for up in b])
    each = zip(bases, (h_gate, h_up), b, scaling, strict=True)
    gate, up = (e + torch.nn.functional.linear(h, thin.to(h.dtype)) * scale for e, h, thin, scale in each)
    return glu_stock(gate, up, kind)


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """Gate and up from projections of their own; adapters as autocast rounds them, and as PEFT keeps them."""
    if model.gated and not model.fused and model.activation in KINDS:
        for adapter in ("x", "float32"):
            call = {"intermediate": model.intermediate, "activation": model.activation, "rank": 16, "adapter": adapter}
            yield {**model.tokens, **call}


def _b(new: New, adapter: str, *shape: int, scale: float) -> torch.Tensor:
    made = new(*shape, scale=scale)
    return (made.float() if adapter == "float32" else made).requires_grad_()


def inputs(
    new: New,
    *,
    batch: int,
    seq: int,
    intermediate: int,
    activation: str,
    rank: int,
    adapter: str = "x",
) -> Inputs:
    """wide [batch, seq, 2·intermediate + 2·rank, rounded up], and the B of two adapters."""
    wide = new(batch, seq, 2 * intermediate + whole(2 * rank), grad=True)
    b = [_b(new, adapter, intermediate, rank, scale=rank**-0.5) for _ in range(2)]
    return Inputs((wide, b, [2.0, 2.0], activation), wanted=[wide, *b])


OP = register(
    Op(
        name="lora_glu",
        call=lora_glu,
        reference=reference,
        supported=supported,
        raw=("lora_glu", "lora_glu_backward"),
        recompute=Recompute.CHEAP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
        stock=stock,
    )
)
