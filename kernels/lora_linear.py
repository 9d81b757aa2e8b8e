"""Linear layers with LoRA adapters, over dense or NF4 weights: one, or several that read the same input.

LoRA (Hu et al., 2021, arXiv:2106.09685) adds to a linear layer products of two thin matrices, rank r ≪ N, K::

    y = x Wᵀ + bias + Σᵢ sᵢ · (hᵢ Bᵢᵀ + bᵢ),      hᵢ = x̃ᵢ Aᵢᵀ

x [..., K], W [N, K], Aᵢ [r, K], Bᵢ [N, r], hᵢ [T, r] with T = batch · seq; x̃ᵢ is x, or x after adapter i's own
dropout (a separate input, so that the random numbers stay outside this op). Without adapters this is a plain linear
layer, which is what an NF4 layer without LoRA becomes; without a bias too, it may take up what its result is added to,
the residual stream z [..., N]: y = z + x Wᵀ.

Backward, with g = ∂L/∂y and the thin product uᵢ = g Bᵢ [T, r]::

    ∂x = g W + Σ sᵢ uᵢ Aᵢ   (over the adapters that read x itself)          ∂x̃ᵢ = sᵢ uᵢ Aᵢ
    ∂Bᵢ = sᵢ gᵀ hᵢ      ∂Aᵢ = sᵢ uᵢᵀ x̃ᵢ      ∂W = gᵀ x      ∂bias = Σₜ g      ∂bᵢ = sᵢ Σₜ g      ∂z = g

Layers that read the same x (q, k and v; gate and up) are one op, because their thin products are: with the Aᵢ of all
layers below each other, h and ∂A are one product each, which reads x once, and ∂x is accumulated by the GEMMs, layer
after layer, onto a single thin product. None of them writes a [T, K] tensor that somebody has to add up.

Kept for it: x, and h (r numbers a token). Sums are made by the GEMMs, in their fp32 registers, and the large one comes
last: y starts as s h Bᵀ, or as z, and x Wᵀ is accumulated onto it; ∂x starts as Σ sᵢ uᵢ Aᵢ. What is rounded on the way
is small beside the result, or rounded already (z); with the large product first, the result would be rounded twice, and
so it would be with a third term beside z, which is why z comes alone. A thin GEMM that only writes is also faster than
one that reads y and adds. On a GPU they add with a β of almost 1 (:data:`BETA`), since cuBLAS at 1 rounds twice.

Precision. The base GEMM runs in x's dtype. The adapters' products run in ``lora_dtype``: x's own under autocast or
with adapters of that dtype, fp32 where stock PEFT upcasts x to meet its fp32 adapters. An fp32 copy of x is never
made: on CUDA a bf16 matrix meets an fp32 one as bf16 GEMMs. An fp32 number is the sum of three bf16 numbers (3 × 8
bits of mantissa), products of bf16 numbers are exact in fp32, and thin matrices cost a GEMM the same at rank 16 and
48; so three parts side by side give fp32 accuracy at tensor-core speed. Elsewhere (fp16, CPU) a slab at a time is
cast.

An NF4 weight is dequantised into a scratch that all layers share, once for the forward and once for ∂x, and the GEMM is
cuBLAS's: at training sizes the launch is small beside the GEMM, and a bf16 copy of the model never exists. What lies in
a scratch of ours can be laid out as we like: with the weights of all layers and their A below each other, ∂x is one
product of everything that comes back, side by side, in one rounding::

    ∂x = [g₁ | g₂ | … | s₁u₁ | s₂u₂ | …] [W₁; W₂; …; A₁; A₂; …]

which asks for a copy of the gᵢ, and is done where that costs less than what it spares (:func:`one_product`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import sympy
import torch
import torch.nn.functional as F

from fastft.kernels import nf4
from fastft.kernels._dense_weights import cast, each_dense, once, quant_args, stacked, whole
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import Cost, Op, Reason, Recompute, check_dtypes, raw_op, register
from fastft.kernels._products import add_thin, beta_for, matmul, matmul_into, times
from fastft.kernels._side_by_side import side_by_side

Tensors = Sequence[torch.Tensor]
Optionals = Sequence["torch.Tensor | None"]

# ---------------------------------------------------------------------------------------------------------- reference


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
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`lora_linear` in plain PyTorch, as PEFT writes it; differentiable."""
    dtype = dtype or x.dtype
    lora_dtype, out_dtype = lora_dtype or dtype, out_dtype or dtype
    if quant:
        scales = quant_args(quant)
        weight = nf4.nf4_dequantize_reference(weight, *scales, blocksize, blocksize2, shape, dtype)
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    for i in range(len(a)):
        own, more = x_lora[i] if x_lora else None, b_bias[i] if b_bias else None
        h = F.linear((x if own is None else own).to(lora_dtype), a[i].to(lora_dtype))
        y = y + F.linear(h, b[i].to(lora_dtype), None if more is None else more.to(lora_dtype)) * scaling[i]
    return y.to(out_dtype) if residual is None else residual + y.to(out_dtype)


def lora_linears_reference(
    x: torch.Tensor,
    weight: Tensors,
    bias: Optionals = (),
    a: Sequence[Tensors] = (),
    b: Sequence[Tensors] = (),
    scaling: Sequence[Sequence[float]] = (),
    *,
    b_bias: Sequence[Optionals] = (),
    quant: Sequence[Tensors] = (),
    shape: Sequence[Sequence[int]] = (),
    blocksize: Sequence[int] = (),
    blocksize2: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """:func:`lora_linears` in plain PyTorch: a layer after the other."""
    layers = _by_layer(weight, bias, a, b, scaling, b_bias, quant, shape, blocksize, blocksize2)
    dtypes: dict[str, Any] = {"dtype": dtype, "lora_dtype": lora_dtype, "out_dtype": out_dtype}
    return tuple(lora_linear_reference(x, *args, **(kwargs | dtypes)) for args, kwargs in layers)


def _by_layer(
    weight: Tensors,
    bias: Optionals,
    a: Sequence[Tensors],
    b: Sequence[Tensors],
    scaling: Sequence[Sequence[float]],
    b_bias: Sequence[Optionals],
    quant: Sequence[Tensors],
    shape: Sequence[Sequence[int]],
    blocksize: Sequence[int],
    blocksize2: Sequence[int],
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Each layer's arguments as :func:`lora_linear` takes them, after x. Raises ValueError for lists that do not pair
    up.
    """
    count = len(weight)
    columns: dict[str, Any] = {
        "bias": bias or [None] * count,
        "a": a or [()] * count,
        "b": b or [()] * count,
        "scaling": scaling or [()] * count,
        "b_bias": b_bias or [()] * count,
        "quant": quant or [()] * count,
        "shape": shape or [()] * count,
        "blocksize": blocksize or [64] * count,
        "blocksize2": blocksize2 or [256] * count,
    }
    for name, column in columns.items():
        if len(column) != count:
            raise ValueError(f"lora_linears: {count} weights, and {name} for {len(column)}; none, or one for each")
    rows = [{name: column[i] for name, column in columns.items()} for i in range(count)]
    positional = ("bias", "a", "b", "scaling")
    return [((w, *(row.pop(name) for name in positional)), row) for w, row in zip(weight, rows, strict=True)]


# -------------------------------------------------------------------------------------------------- bodies of the ops


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _stack(matrices: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """Matrices below each other, in ``dtype``."""
    if len(matrices) == 1:
        return cast(matrices[0], dtype)

    def make() -> torch.Tensor:
        out = matrices[0].new_empty((sum(m.shape[0] for m in matrices), matrices[0].shape[1]), dtype=dtype)
        torch._foreach_copy_(list(out.split([m.shape[0] for m in matrices])), list(matrices))
        return out

    return once("stack", matrices, dtype, make)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes)]


def _down(x: torch.Tensor, a: Tensors, x_lora: Optionals, lora_dtype: torch.dtype) -> torch.Tensor:
    """The adapters' h = x̃ Aᵀ side by side, [T, Σr] in ``lora_dtype``."""
    if all(own is None for own in x_lora):
        return matmul(_rows(x), _stack(a, lora_dtype).t(), lora_dtype)
    sources = (_rows(x if own is None else own) for own in x_lora)
    hs = [matmul(source, down.to(lora_dtype).t(), lora_dtype) for source, down in zip(sources, a, strict=True)]
    return hs[0] if len(hs) == 1 else torch.cat(hs, 1)


#: h [T, r], up [r, N] and scale of scale · h @ up.
Thin = tuple[torch.Tensor, torch.Tensor, float]


def _sum_of_thin(rows: torch.Tensor, n: int, bias: torch.Tensor | None, thin: Sequence[Thin]) -> torch.Tensor:
    """bias + Σ scale · h @ up, [T, n] in rows' dtype."""
    (h, up, scale), *more = thin
    if bias is not None and h.dtype == rows.dtype:
        y = torch.addmm(bias, h, up, alpha=scale)
    else:
        y = rows.new_empty((rows.shape[0], n))
        y = y if bias is None else y.copy_(bias)
        add_thin(y, h, up, scale, first=bias is None)
    for product in more:
        add_thin(y, *product)
    return y


def _forward(
    x: torch.Tensor,
    weight: Tensors,
    quant: Tensors,
    shape: Sequence[int],
    blocks: Sequence[int],
    bias: Optionals,
    h: torch.Tensor | None,
    adapters: Sequence[int],
    b: Tensors,
    b_bias: Optionals,
    scaling: Sequence[float],
    residual: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> list[torch.Tensor]:
    """y of each layer. ``adapters``: how many each layer has; theirs are in the same order in all lists and in h.
    ``residual``: what the result of a single layer is added to, one without adapters and bias.
    """
    rows, ys = _rows(x), []
    first, column = _starts(adapters), _starts([up.shape[1] for up in b])
    # The adapters' own biases are constants of the layer: they join the base's, in fp32.
    wide = torch.promote_types(x.dtype, torch.float32)
    with each_dense(weight, quant, shape, blocks, x.dtype) as each:
        for i, held in enumerate(each):
            mine = range(first[i], first[i + 1])
            base = bias[i]
            sums = [] if base is None else [base.to(wide)]
            sums += [scaling[j] * more.to(wide) for j in mine if (more := b_bias[j]) is not None]
            total = functools.reduce(torch.add, sums) if sums else None

            thin: list[Thin] = []
            for j in mine:
                assert h is not None
                thin.append((h[:, column[j] : column[j + 1]], cast(b[j], h.dtype).t(), scaling[j]))
            with held as dense:
                if out_dtype != x.dtype:  # y is wide: nothing is lost on the way
                    y = matmul(rows, dense.t(), out_dtype)
                    for term in (total, None if residual is None else _rows(residual)):
                        y = y if term is None else y.add_(term)
                    for product in thin:
                        add_thin(y, *product)
                else:
                    begun = None if residual is None else _rows(residual)
                    if total is not None:
                        begun = total.to(x.dtype)
                    if thin:
                        begun = _sum_of_thin(rows, dense.shape[0], begun, thin)
                    # cuBLAS adds a bias for nothing, and adds to what it may overwrite without a copy.
                    if begun is None:
                        y = torch.mm(rows, dense.t())
                    elif thin:
                        y = begun.addmm_(rows, dense.t(), beta=beta_for(begun))
                    else:
                        y = torch.addmm(begun, rows, dense.t(), beta=1 if residual is None else beta_for(begun))
            ys.append(y.view(*x.shape[:-1], y.shape[-1]))
    return ys


def one_product(
    dy: Tensors, shape: Sequence[int], own: Sequence[bool], dtype: torch.dtype, lora_dtype: torch.dtype,
    together: bool, need_x: bool,
) -> bool:  # fmt: skip
    """Whether a backward copies the gradients of its layers with NF4 weights next to each other, for ∂x in one product;
    the arguments are :func:`_backward`'s.

    In numbers read and written for each token: the copy costs 2 ΣN. It spares 2 K for each product but one, which
    reads ∂x and writes it again; the adapters' is one of them. q, k and v: 2 · 6,144 for 6 · 4,096; down: 2 · 4,096 for
    2 · 14,336; gate and up would pay 2 · 28,672 for 4 · 4,096.
    """
    adapted = not all(own)
    one_dtype = all(g.dtype == dtype for g in dy) and (not adapted or lora_dtype == dtype)
    return together and need_x and one_dtype and sum(shape[::2]) < shape[1] * (len(dy) - 1 + adapted)


def _backward(
    dy: Tensors,
    x: torch.Tensor | None,
    weight: Tensors,
    quant: Tensors,
    shape: Sequence[int],
    blocks: Sequence[int],
    adapters: Sequence[int],
    a: Tensors,
    b: Tensors,
    x_lora: Optionals,
    own: Sequence[bool],
    h: torch.Tensor | None,
    scaling: Sequence[float],
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    together: bool,
    need_x: bool,
    need_weight: Sequence[bool],
    need_sum: Sequence[bool],
    need_a: Sequence[bool],
    need_b: Sequence[bool],
    need_x_lora: Sequence[bool],
) -> list[torch.Tensor]:
    """[∂x, for each layer ∂W and Σₜ g (fp32), for each adapter ∂A, ∂B, ∂x̃]; what is not needed is an empty tensor.

    ``own``: whether an adapter has an input of its own; ``x_lora`` holds it where ∂A needs it. ``together``: whether ∂x
    may be one product of what is copied next to each other.
    """
    gs = [_rows(g) for g in dy]
    lead, k = dy[0].shape[:-1], shape[1] if quant else weight[0].shape[1]
    layer = [i for i, count in enumerate(adapters) for _ in range(count)]
    rank = [down.shape[0] for down in a]
    column = _starts(rank)

    def thin_g(j: int) -> torch.Tensor:
        g = gs[layer[j]]
        return g if lora_dtype == torch.float32 else g.to(lora_dtype)

    base: list[torch.Tensor | None] = []
    for i, g in enumerate(gs):
        dw = dsum = None
        if need_weight[i]:
            assert x is not None
            dw = matmul(g.to(dtype).t(), _rows(x), weight[i].dtype)
        if need_sum[i]:
            dsum = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32))
        base += [dw, dsum]

    dx: torch.Tensor | None = None
    none: list[torch.Tensor | None] = [None] * len(a)
    das, dbs, dx_loras = none.copy(), none.copy(), none.copy()
    # The adapters that read x: their u side by side, behind all g where these are.
    shared = [j for j in range(len(a)) if not own[j] and (need_x or need_a[j])]
    at = _starts([rank[j] for j in shared])
    wide = None
    if quant and one_product(gs, shape, own, dtype, lora_dtype, together, need_x):
        full = _starts(shape[::2])
        wide = gs[0].new_empty((gs[0].shape[0], full[-1] + whole(at[-1])))
        gs = side_by_side(wide, gs)
        wide[:, full[-1] + at[-1] :].zero_()
    if shared:
        scales = [scaling[j] for j in shared]
        if wide is None:
            u = gs[0].new_empty((gs[0].shape[0], at[-1]), dtype=lora_dtype)
        else:  # with its scale, so that ∂x needs no other
            u = wide[:, full[-1] : full[-1] + at[-1]]
        for (start, end), j in zip(itertools.pairwise(at), shared, strict=True):
            if wide is None:
                matmul_into(u[:, start:end], thin_g(j), cast(b[j], lora_dtype))
            else:
                u[:, start:end].addmm_(thin_g(j), cast(b[j], lora_dtype), beta=0, alpha=scaling[j])
        if wide is not None:
            scales = [1.0] * len(shared)
        elif need_x:
            downs = _stack([a[j] for j in shared], lora_dtype)
            dx = gs[0].new_empty((gs[0].shape[0], k), dtype=dtype)
            for scale, run in itertools.groupby(range(len(shared)), lambda i: scaling[shared[i]]):
                span = list(run)
                columns = slice(at[span[0]], at[span[-1] + 1])
                add_thin(dx, u[:, columns], downs[columns], scale, first=span[0] == 0)
        if any(need_a[j] for j in shared):
            assert x is not None
            of_all = matmul(u.t(), _rows(x), torch.promote_types(a[shared[0]].dtype, torch.float32))
            found = zip(shared, _apart(of_all, [rank[j] for j in shared], scales), strict=True)
            for j, da in found:
                das[j] = da.to(a[j].dtype) if need_a[j] else None
    for j, (down, up) in enumerate(zip(a, b, strict=True)):
        if own[j] and (need_a[j] or need_x_lora[j]):
            u = matmul(thin_g(j), up.to(lora_dtype), lora_dtype)
            if need_x_lora[j]:
                dx_loras[j] = times(scaling[j], matmul(u, down.to(lora_dtype), lora_dtype)).view(*lead, k)
            if need_a[j]:
                source = x_lora[j]
                assert source is not None
                single = torch.promote_types(down.dtype, torch.float32)
                das[j] = times(scaling[j], matmul(u.t(), _rows(source), single)).to(down.dtype)
        if need_b[j]:
            assert h is not None
            single = torch.promote_types(up.dtype, torch.float32)
            db = matmul(thin_g(j).t(), h[:, column[j] : column[j + 1]], single)
            dbs[j] = times(scaling[j], db).to(up.dtype)
    if wide is not None:
        with stacked(weight, quant, shape, blocks, [a[j] for j in shared], dtype) as dense:
            dx = torch.mm(wide, dense)
    elif need_x:
        # The smallest product first: every sum is rounded at the size that it has reached.
        with each_dense(weight, quant, shape, blocks, dtype) as each:
            for i in sorted(range(len(gs)), key=lambda i: gs[i].shape[1]):
                with each[i] as dense:
                    g = gs[i].to(dtype)
                    dx = torch.mm(g, dense) if dx is None else dx.addmm_(g, dense, beta=beta_for(dx))
    thin = [t for three in zip(das, dbs, dx_loras, strict=True) for t in three]
    results = (None if dx is None else dx.view(*lead, k), *base, *thin)
    return [dy[0].new_empty(0) if t is None else t for t in results]


def _apart(rows: torch.Tensor, sizes: Sequence[int], scaling: Sequence[float]) -> list[torch.Tensor]:
    """The blocks of ``rows``, each times its scale, as tensors with memory of their own (an op's results are)."""
    if len(sizes) == 1:
        return [times(scaling[0], rows)]
    blocks = list(rows.split(list(sizes)))
    if len(set(scaling)) == 1:
        return list(torch._foreach_mul(blocks, scaling[0]))
    return [block * scale for block, scale in zip(blocks, scaling, strict=True)]


def _down_fake(x: torch.Tensor, a: Tensors, x_lora: Optionals, lora_dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((math.prod(x.shape[:-1]), sum(t.shape[0] for t in a)), dtype=lora_dtype)


def _forward_fake(
    x: torch.Tensor, weight: Tensors, quant: Tensors, shape: Sequence[int], *rest: Any
) -> list[torch.Tensor]:
    widths = shape[::2] if quant else [w.shape[0] for w in weight]
    return [x.new_empty((*x.shape[:-1], n), dtype=rest[-1]) for n in widths]


def _backward_fake(
    dy: Tensors,
    x: torch.Tensor | None,
    weight: Tensors,
    quant: Tensors,
    shape: Sequence[int],
    blocks: Sequence[int],
    adapters: Sequence[int],
    a: Tensors,
    b: Tensors,
    x_lora: Optionals,
    own: Sequence[bool],
    h: torch.Tensor | None,
    scaling: Sequence[float],
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    together: bool,
    need_x: bool,
    need_weight: Sequence[bool],
    need_sum: Sequence[bool],
    need_a: Sequence[bool],
    need_b: Sequence[bool],
    need_x_lora: Sequence[bool],
) -> list[torch.Tensor]:
    g = dy[0]

    def new(size: Any, kind: torch.dtype, needed: bool) -> torch.Tensor:
        return g.new_empty(size, dtype=kind) if needed else g.new_empty(0)

    k = shape[1] if quant else weight[0].shape[1]
    out = [new((*g.shape[:-1], k), dtype, need_x)]
    for i, w in enumerate(weight):
        single = torch.promote_types(dy[i].dtype, torch.float32)
        out += [new(w.shape, w.dtype, need_weight[i]), new(dy[i].shape[-1], single, need_sum[i])]
    for j, (down, up) in enumerate(zip(a, b, strict=True)):
        out += [new(down.shape, down.dtype, need_a[j]), new(up.shape, up.dtype, need_b[j])]
        out += [new((*g.shape[:-1], k), lora_dtype, need_x_lora[j])]
    return out


# Lists hold all layers' in a row: two sizes and two blocksizes each, the same number of quant tensors each.
_WEIGHT = "Tensor[] weight, Tensor[] quant, SymInt[] shape, int[] blocks"
# h has an op of its own: a backward that recomputes a layer needs h of each linear, but not the output of its last one.
_raw_down = raw_op(
    "lora_linear_down(Tensor x, Tensor[] a, Tensor?[] x_lora, ScalarType lora_dtype) -> Tensor", _down, _down_fake
)
_raw = raw_op(
    f"lora_linear(Tensor x, {_WEIGHT}, Tensor?[] bias, Tensor? h, int[] adapters, Tensor[] b, Tensor?[] b_bias, "
    "float[] scaling, Tensor? residual, ScalarType out_dtype) -> Tensor[]",
    _forward,
    _forward_fake,
)
_raw_backward = raw_op(
    f"lora_linear_backward(Tensor[] dy, Tensor? x, {_WEIGHT}, int[] adapters, Tensor[] a, Tensor[] b, "
    "Tensor?[] x_lora, bool[] own, Tensor? h, float[] scaling, ScalarType dtype, ScalarType lora_dtype, bool together, "
    "bool need_x, bool[] need_weight, bool[] need_sum, bool[] need_a, bool[] need_b, bool[] need_x_lora) -> Tensor[]",
    _backward,
    _backward_fake,
)


# ----------------------------------------------------------------------------------------------------- differentiable


class _Constants(NamedTuple):
    """What :class:`_LoraLinears` is given besides tensors. All layers have ``quant`` tensors of quantisation state."""

    quant: int
    adapters: tuple[int, ...]
    shape: tuple[int, ...]
    blocks: tuple[int, ...]
    scaling: tuple[float, ...]
    lora_dtype: torch.dtype
    out_dtype: torch.dtype
    together: bool

    def take(self, flat: Sequence[Any], *columns: str) -> Iterator[list[Any]]:
        """``flat`` cut into lists: of layers' tensors (``layer``), of their ``quant``, of adapters' (``adapter``)."""
        layers = len(self.adapters)
        sizes = {"layer": layers, "quant": layers * self.quant, "adapter": sum(self.adapters)}
        start = 0
        for column in columns:
            yield list(flat[start : start + sizes[column]])
            start += sizes[column]


class _LoraLinears(torch.autograd.Function):
    """Tensors in lists are invisible to autograd, so all come flat: x, residual, *weight, *bias, *quant, *a, *b,
    *b_bias, *x_lora.
    """

    @staticmethod
    def forward(ctx: Any, c: _Constants, x: Any, residual: Any, *flat: Any) -> tuple[torch.Tensor, ...]:
        columns = ("layer", "layer", "quant", *("adapter",) * 4)
        weight, bias, quant, a, b, b_bias, x_lora = c.take(flat, *columns)
        need_weight, need_bias, _, need_a, need_b, need_b_bias, need_x_lora = c.take(ctx.needs_input_grad[3:], *columns)
        where = (weight, quant, c.shape, c.blocks)
        h = _raw_down(x, a, x_lora, c.lora_dtype) if a else None
        ys = _raw(x, *where, bias, h, c.adapters, b, b_bias, c.scaling, residual, c.out_dtype)
        needed = iter(need_b_bias)
        need_sum = [
            any([need, *itertools.islice(needed, count)]) for need, count in zip(need_bias, c.adapters, strict=True)
        ]
        keep_x = any(need_weight) or any(need and own is None for need, own in zip(need_a, x_lora, strict=True))
        ctx.needs = (ctx.needs_input_grad[1], need_weight, need_sum, need_a, need_b, need_x_lora)
        ctx.constants, ctx.dtype = c, x.dtype
        ctx.bias, ctx.b_bias = (
            [t.dtype if need else None for t, need in zip(tensors, needs, strict=True)]
            for tensors, needs in ((bias, need_bias), (b_bias, need_b_bias))
        )
        kept = [t if need else None for t, need in zip(x_lora, need_a, strict=True)]
        ctx.own = [t is not None for t in x_lora]
        ctx.save_for_backward(x if keep_x else None, h if any(need_b) else None, *weight, *quant, *a, *b, *kept)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dy: torch.Tensor) -> Any:  # type: ignore[override]
        c: _Constants = ctx.constants
        x, h, *flat = ctx.saved_tensors
        weight, quant, a, b, x_lora = c.take(flat, "layer", "quant", *("adapter",) * 3)
        need_x, need_weight, _, need_a, need_b, need_x_lora = ctx.needs
        dx, *rest = _raw_backward(
            list(dy), x, weight, quant, c.shape, c.blocks, c.adapters, a, b, x_lora, ctx.own, h, c.scaling,
            ctx.dtype, c.lora_dtype, c.together, *ctx.needs,
        )  # fmt: skip
        base, thin = rest[: 2 * len(weight)], rest[2 * len(weight) :]
        dw, da, db, dx_lora = (
            [g if need else None for g, need in zip(found, needs, strict=True)]
            for found, needs in (
                (base[::2], need_weight),
                (thin[::3], need_a),
                (thin[1::3], need_b),
                (thin[2::3], need_x_lora),
            )
        )
        sums = base[1::2]
        layer = [i for i, count in enumerate(c.adapters) for _ in range(count)]
        dbias = [None if d is None else total.to(d) for d, total in zip(ctx.bias, sums, strict=True)]
        db_bias = [
            None if d is None else (s * sums[i]).to(d) for d, s, i in zip(ctx.b_bias, c.scaling, layer, strict=True)
        ]
        dresidual = dy[0] if ctx.needs_input_grad[2] else None
        dx = dx if need_x else None
        return (None, dx, dresidual, *dw, *dbias, *[None] * len(quant), *da, *db, *db_bias, *dx_lora)


def _call(
    x: torch.Tensor,
    layers: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    x_lora: Optionals,
    dtype: torch.dtype,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    together: bool = True,
) -> tuple[torch.Tensor, ...]:
    """y of each layer (:func:`_by_layer`). ``x_lora``: of all adapters, or empty. ``residual``: of a single layer.
    ``together``: as :func:`_backward` has it.
    """
    weight, bias, quant, a, b, b_bias = ([] for _ in range(6))  # type: ignore[var-annotated]
    counts, scaling, shape, blocks = ([] for _ in range(4))  # type: ignore[var-annotated]
    for (w, of_base, downs, ups, scales), state in layers:
        weight.append(w)
        bias.append(of_base)
        quant += state["quant"]
        a += downs
        b += ups
        b_bias += list(state["b_bias"]) or [None] * len(downs)
        counts.append(len(downs))
        scaling += [float(s) for s in scales]
        shape += state["shape"]
        blocks += [state["blocksize"], state["blocksize2"]]
    # Casts stand outside of the op: Inductor merges them into whatever makes x, and only their results are kept. The
    # adapters share the base's x where that is as exact as what they ask for.
    shared = lora_dtype in (dtype, torch.float32) and (lora_dtype == dtype or x.dtype == dtype)
    inputs = list(x_lora) or [None] * len(a)
    own = [None if t is None and shared else (x if t is None else t).to(lora_dtype) for t in inputs]
    sizes = tuple(counts), tuple(shape), tuple(blocks), tuple(scaling)
    c = _Constants(len(quant) // len(weight), *sizes, lora_dtype, out_dtype, together)
    return _LoraLinears.apply(c, x.to(dtype), residual, *weight, *bias, *quant, *a, *b, *b_bias, *own)  # type: ignore[no-any-return]


def _one(
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
    residual: torch.Tensor | None = None,
    together: bool,
) -> torch.Tensor:
    """:func:`lora_linear`, and its variant."""
    dtype = dtype or x.dtype
    lora_dtype, out_dtype = lora_dtype or dtype, out_dtype or dtype
    n = len(a)
    x_lora, b_bias = list(x_lora) or [None] * n, list(b_bias) or [None] * n
    reason = supported(
        x, weight, bias, a, b, scaling, x_lora=x_lora, b_bias=b_bias, quant=quant, shape=shape,
        blocksize=blocksize, blocksize2=blocksize2, dtype=dtype, lora_dtype=lora_dtype, out_dtype=out_dtype,
        residual=residual,
    )  # fmt: skip
    if reason is not None:
        raise ValueError(f"lora_linear: {reason}")
    state = {"b_bias": b_bias, "quant": quant, "shape": shape, "blocksize": blocksize, "blocksize2": blocksize2}
    return _call(x, [((weight, bias, a, b, scaling), state)], x_lora, dtype, lora_dtype, out_dtype, residual, together)[
        0
    ]


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
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x Wᵀ + bias + Σ s · ((x̃ Aᵀ) Bᵀ + b), or x Wᵀ + residual, [..., N] in ``out_dtype``.

    ``x``: [..., K]. ``weight``: dense [N, K] in any floating dtype (cast on use; its gradient comes back in its own),
    or NF4: packed bytes, with ``quant`` = (absmax,) or (absmax8, absmax_code, absmax_offset, absmax2), ``shape`` =
    (N, K) and the blocksizes as in :func:`fastft.kernels.nf4.nf4_dequantize`; frozen then. ``bias``: [N]. ``a``: the
    adapters' [r, K], ``b``: [N, r], ``scaling``: a number each. ``x_lora``: for each adapter its own input [..., K],
    or None where it reads x. ``b_bias``: for each adapter [N] or None. ``residual``: what the result of a layer without
    adapters and bias is added to, [..., N] in ``out_dtype``, or None.

    ``dtype``: of the base GEMM (default: x's). ``lora_dtype``: of the adapters' products; ``out_dtype`` (defaults:
    ``dtype``). Sums are in fp32. Gradients have their tensors' dtypes.

    Raises ValueError for tensors that do not belong together.
    """
    return _one(
        x, weight, bias, a, b, scaling,
        x_lora=x_lora, b_bias=b_bias, quant=quant, shape=shape, blocksize=blocksize, blocksize2=blocksize2,
        dtype=dtype, lora_dtype=lora_dtype, out_dtype=out_dtype, residual=residual,
        together=True,
    )  # fmt: skip


def lora_linear_accumulated(
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
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`lora_linear` whose ∂x is summed up by the products, one after another, over NF4 weights too."""
    return _one(
        x, weight, bias, a, b, scaling,
        x_lora=x_lora, b_bias=b_bias, quant=quant, shape=shape, blocksize=blocksize, blocksize2=blocksize2,
        dtype=dtype, lora_dtype=lora_dtype, out_dtype=out_dtype, residual=residual,
        together=False,
    )  # fmt: skip


def _several(
    x: torch.Tensor,
    weight: Tensors,
    bias: Optionals = (),
    a: Sequence[Tensors] = (),
    b: Sequence[Tensors] = (),
    scaling: Sequence[Sequence[float]] = (),
    *,
    b_bias: Sequence[Optionals] = (),
    quant: Sequence[Tensors] = (),
    shape: Sequence[Sequence[int]] = (),
    blocksize: Sequence[int] = (),
    blocksize2: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    together: bool,
) -> tuple[torch.Tensor, ...]:
    """:func:`lora_linears`, and its variant."""
    dtype = dtype or x.dtype
    lora_dtype, out_dtype = lora_dtype or dtype, out_dtype or dtype
    reason = supported_linears(
        x, weight, bias, a, b, scaling, b_bias=b_bias, quant=quant, shape=shape,
        blocksize=blocksize, blocksize2=blocksize2, dtype=dtype, lora_dtype=lora_dtype, out_dtype=out_dtype,
    )  # fmt: skip
    if reason is not None:
        raise ValueError(f"lora_linears: {reason}")
    layers = _by_layer(weight, bias, a, b, scaling, b_bias, quant, shape, blocksize, blocksize2)
    return _call(x, layers, (), dtype, lora_dtype, out_dtype, together=together)


def lora_linears(
    x: torch.Tensor,
    weight: Tensors,
    bias: Optionals = (),
    a: Sequence[Tensors] = (),
    b: Sequence[Tensors] = (),
    scaling: Sequence[Sequence[float]] = (),
    *,
    b_bias: Sequence[Optionals] = (),
    quant: Sequence[Tensors] = (),
    shape: Sequence[Sequence[int]] = (),
    blocksize: Sequence[int] = (),
    blocksize2: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """:func:`lora_linear` of several layers that read the same ``x`` [..., K]: one [..., N] for each.

    Every argument but ``x`` and the dtypes is a list with one entry for each layer, of what :func:`lora_linear` takes;
    an empty list stands for its default in every layer. Adapters read x itself. Layers are all dense, or all quantised
    in the same way (single or double).

    Raises ValueError for lists that do not pair up and for what :func:`lora_linear` raises it for.
    """
    return _several(
        x, weight, bias, a, b, scaling,
        b_bias=b_bias, quant=quant, shape=shape, blocksize=blocksize, blocksize2=blocksize2,
        dtype=dtype, lora_dtype=lora_dtype, out_dtype=out_dtype,
        together=True,
    )  # fmt: skip


def lora_linears_accumulated(
    x: torch.Tensor,
    weight: Tensors,
    bias: Optionals = (),
    a: Sequence[Tensors] = (),
    b: Sequence[Tensors] = (),
    scaling: Sequence[Sequence[float]] = (),
    *,
    b_bias: Sequence[Optionals] = (),
    quant: Sequence[Tensors] = (),
    shape: Sequence[Sequence[int]] = (),
    blocksize: Sequence[int] = (),
    blocksize2: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """:func:`lora_linears` whose ∂x is summed up by the products, layer after layer, over NF4 weights too."""
    return _several(
        x, weight, bias, a, b, scaling,
        b_bias=b_bias, quant=quant, shape=shape, blocksize=blocksize, blocksize2=blocksize2,
        dtype=dtype, lora_dtype=lora_dtype, out_dtype=out_dtype,
        together=False,
    )  # fmt: skip


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
    residual: torch.Tensor | None = None,
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
        wrong = nf4.supported(weight, *quant_args(quant), blocksize, blocksize2, shape, dtype)
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
    # Together they would be rounded once more, at the size of the result.
    if residual is not None and (len(a) or bias is not None):
        return Reason("residual", "a layer with adapters or a bias does not take the residual stream up as well")
    # A sum that broadcasts, or that comes out in another dtype, is not one with the product's.
    if residual is not None and (residual.shape[-1] != n or residual.dim() != x.dim()):
        return Reason("shape", f"x {tuple(x.shape)} through a weight [{n}, {k}] is added to {tuple(residual.shape)}")
    if residual is not None and residual.dtype != out_dtype:
        return Reason("dtype", f"a result in {out_dtype} is added to {residual.dtype}")
    if not len(a) == len(b) == len(scaling) or any(len(t) not in (0, len(a)) for t in (x_lora, b_bias)):
        return Reason("shape", f"{len(a)} A, {len(b)} B, {len(scaling)} scalings, {len(x_lora)} inputs do not pair up")
    for down, up in zip(a, b, strict=True):
        if down.dim() != 2 or up.dim() != 2 or down.shape[1] != k or up.shape[0] != n or down.shape[0] != up.shape[1]:
            return Reason("shape", f"A {tuple(down.shape)} and B {tuple(up.shape)} do not fit a weight [{n}, {k}]")
    for own in x_lora:
        if own is not None and (own.dim() != x.dim() or own.shape[-1] != k):
            return Reason("shape", f"an adapter's own input is {tuple(own.shape)}, x {tuple(x.shape)}")
    return None


def supported_linears(
    x: torch.Tensor,
    weight: Tensors,
    bias: Optionals = (),
    a: Sequence[Tensors] = (),
    b: Sequence[Tensors] = (),
    scaling: Sequence[Sequence[float]] = (),
    *,
    b_bias: Sequence[Optionals] = (),
    quant: Sequence[Tensors] = (),
    shape: Sequence[Sequence[int]] = (),
    blocksize: Sequence[int] = (),
    blocksize2: Sequence[int] = (),
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> Reason | None:
    """None, or why :func:`lora_linears` cannot run on these arguments."""
    if not weight:
        return Reason("shape", "there is no layer")
    if len({len(state) for state in quant}) > 1:
        return Reason("quantization", "the layers are quantised in different ways")
    # ∂A of all adapters is one product, in one dtype.
    if len({down.dtype for downs in a for down in downs}) > 1:
        return Reason("dtype", "the adapters of the layers have different dtypes")
    for args, kwargs in _by_layer(weight, bias, a, b, scaling, b_bias, quant, shape, blocksize, blocksize2):
        reason = supported(x, *args, **kwargs, dtype=dtype, lora_dtype=lora_dtype, out_dtype=out_dtype)
        if reason is not None:
            return reason
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


def cost_linears(T: Any, N: Sequence[Any], K: Any, r: Any = 0, itemsize: int = 2, nf4_weight: bool = False) -> Cost:
    """As :func:`cost`, for layers [N, K] with the sizes ``N`` and adapters of rank r each; x is read once for all h."""
    each = [cost(T, n, K, r, itemsize, nf4_weight) for n in N]
    again = sympy.Piecewise((itemsize * sympy.sympify(T) * K * (len(N) - 1), sympy.sympify(r) > 0), (0, True))
    return Cost(
        flops=sum((c.flops for c in each), sympy.Integer(0)),
        bytes_moved=sum((c.bytes_moved for c in each), sympy.Integer(0)) - again,
        bytes_kept=sum((c.bytes_kept for c in each), sympy.Integer(0)),
    )


# --------------------------------------------------------------------------------------------------------------- calls


def stock(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scaling: Sequence[float],
    **dtypes: Any,
) -> torch.Tensor:
    """PEFT's ``lora.Linear``, as it runs under autocast."""
    y = F.linear(x, weight, bias)
    for down, up, scale in zip(a, b, scaling, strict=True):
        y = y + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)) * scale
    return y


def linears_stock(x: torch.Tensor, weight: Any, bias: Any, a: Any, b: Any, scaling: Any, **dtypes: Any) -> Any:
    """One by one."""
    return tuple(stock(x, w, None, *thin) for w, *thin in zip(weight, a, b, scaling, strict=True))


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """Every linear layer: a rule makes each of them a site before those that read one input are joined."""
    for out_features, in_features in model.linears:
        for form in _FORMS:
            yield {**model.tokens, "in_features": in_features, "out_features": out_features, "rank": 16, **form}


def linears_sizes(model: Model) -> Iterator[dict[str, Any]]:
    """q, k and v, with the MLP's first where that reads the same; gate and up. Dense layers without adapters are not
    joined.
    """
    if not model.fused:
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        groups: list[tuple[int, ...]] = [(q, kv, kv)]
        if model.parallel:
            groups.append((q, kv, kv, model.intermediate))
        if model.gated:
            groups.append((model.intermediate,) * 2)
        for widths in groups:
            for form in _FORMS:
                if form["nf4_weight"] or form["adapter"]:
                    call = {**model.tokens, "in_features": model.hidden, "out_features": widths, "rank": 16, **form}
                    yield call
                    if form["adapter"] and len(widths) == 3:  # PEFT's default: adapters on q and v
                        yield {**call, "bare": 1}


#: How a weight is stored, and its adapter: None; in x's dtype ("x"), as autocast makes it; in fp32, as PEFT keeps it.
_FORMS = tuple({"nf4_weight": stored, "adapter": kind} for stored in (False, True) for kind in ("x", "float32", None))


def _layer(
    new: New, out_features: int, in_features: int, rank: int, nf4_weight: bool, adapter: str | None
) -> tuple[Any, ...]:
    """Weight, A, B, quant, shape."""
    if nf4_weight:
        weight, *quant = nf4.packed_weight(new, out_features, in_features)
    else:
        weight, quant = new(out_features, in_features, scale=in_features**-0.5), []
    shape = [out_features, in_features] if nf4_weight else []
    if adapter is None:
        return weight, [], [], quant, shape
    a, b = new(rank, in_features, scale=in_features**-0.5), new(out_features, rank, scale=rank**-0.5)
    if adapter == "float32":
        a, b = a.float(), b.float()
    return weight, [a.requires_grad_()], [b.requires_grad_()], quant, shape


def _dtypes(new: New, adapter: str | None) -> dict[str, torch.dtype]:
    """Said only where it does not follow from x: an fp64 copy of a call is in fp64 then."""
    return {"lora_dtype": torch.float32} if adapter == "float32" and new.dtype != torch.float32 else {}


def inputs(
    new: New,
    *,
    batch: int,
    seq: int,
    in_features: int,
    out_features: int,
    rank: int,
    nf4_weight: bool = False,
    adapter: str | None = "x",
) -> Inputs:
    """x [batch, seq, in_features], the weight, and an adapter, or without one the residual stream."""
    x = new(batch, seq, in_features, grad=True)
    weight, a, b, quant, shape = _layer(new, out_features, in_features, rank, nf4_weight, adapter)
    more: dict[str, Any] = {"quant": quant, "shape": shape} if nf4_weight else {}
    if adapter is None:
        more["residual"] = new(batch, seq, out_features, grad=True)
    wanted = [x, *a, *b, *([more["residual"]] if adapter is None else [])]
    return Inputs((x, weight, None, a, b, [2.0] * len(a)), {**more, **_dtypes(new, adapter)}, wanted)


def linears_inputs(
    new: New,
    *,
    batch: int,
    seq: int,
    in_features: int,
    out_features: Sequence[int],
    rank: int,
    nf4_weight: bool = False,
    adapter: str | None = "x",
    bare: int = 0,
) -> Inputs:
    """x [batch, seq, in_features], a weight and an adapter for each of ``out_features``. ``bare``: which of them has no
    adapter, 0 for none; a dense layer without one is not joined with the others.
    """
    x = new(batch, seq, in_features, grad=True)
    layers = [
        _layer(new, n, in_features, rank, nf4_weight, None if bare and i == bare else adapter)
        for i, n in enumerate(out_features)
        if nf4_weight or not bare or i != bare
    ]
    weight, a, b, quant, shape = map(list, zip(*layers, strict=True))
    more = {"quant": quant, "shape": shape} if nf4_weight else {}
    wanted = [x, *(t for thin in (*a, *b) for t in thin)]
    return Inputs((x, weight, (), a, b, [[2.0] * len(thin) for thin in a]), {**more, **_dtypes(new, adapter)}, wanted)


OP = register(
    Op(
        name="lora_linear",
        call=lora_linear,
        reference=lora_linear_reference,
        supported=supported,
        raw=("lora_linear_down", "lora_linear", "lora_linear_backward"),
        recompute=Recompute.KEEP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
        stock=stock,
        variants={"accumulated": (lora_linear_accumulated, supported)},
    )
)


JOINT = register(
    Op(
        name="lora_linears",
        call=lora_linears,
        reference=lora_linears_reference,
        supported=supported_linears,
        raw=OP.raw,
        recompute=Recompute.KEEP,
        cost=cost_linears,
        sizes=linears_sizes,
        inputs=linears_inputs,
        stock=linears_stock,
        variants={"accumulated": (lora_linears_accumulated, supported_linears)},
    )
)
