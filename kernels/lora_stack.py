"""Layers with LoRA adapters that read the same input, as products side by side: what ``lora_glu`` makes an MLP's
activation of.

With N_i the layers' widths, r_i their adapters' ranks, and T tokens::

    wide = [x W₁ᵀ | x W₂ᵀ | … | x A₁ᵀ | x A₂ᵀ | … | 0]                                              [T, ΣN + ⌈Σr⌉]

x [..., K], W [N, K], A [r, K]; the columns of the x Aᵀ are filled up with zeros to a whole number of 8. Over NF4
weights it is one product with all matrices below each other in the scratch, x [W₁; W₂; …; A₁; A₂; …]ᵀ: 0.1 % more
columns, and no pass over x for the adapters. Dense weights stay where they are, with a product for each into its
columns.

Backward, where ∂wide holds the gradients of the x Aᵀ beside those of the x Wᵀ: one product for ∂x, in one rounding
(over dense weights, one for each), and one thin one for all A::

    ∂x = ∂wide [W₁; W₂; …; A₁; A₂; …]                   [∂A₁; ∂A₂; …] = ∂(x Aᵀ)ᵀ x

Nothing is gathered, copied or added up. Kept: x, if an A is trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import sympy
import torch

from fastft.kernels import lora_linear as lora
from fastft.kernels import nf4
from fastft.kernels._dense_weights import each_dense, quant_args, stacked, whole
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import Cost, Op, Reason, Recompute, raw_op, register
from fastft.kernels._products import beta_for, matmul
from fastft.kernels._rows import size

Tensors = Sequence[torch.Tensor]


# ---------------------------------------------------------------- reference


def reference(
    x: torch.Tensor,
    weight: Tensors,
    a: Tensors,
    *,
    quant: Sequence[Tensors] = (),
    shape: Sequence[Sequence[int]] = (),
    blocksize: Sequence[int] = (),
    blocksize2: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """:func:`lora_stack` in plain PyTorch, differentiable: a layer after the other."""
    dtype = dtype or x.dtype
    dense = list(weight)
    if quant:
        firsts, seconds = blocksize or [64] * len(weight), blocksize2 or [256] * len(weight)
        each = zip(weight, quant, firsts, seconds, shape, strict=True)
        dense = [
            nf4.nf4_dequantize_reference(w, *quant_args(q), one, two, sizes, dtype) for w, q, one, two, sizes in each
        ]
    parts = [torch.nn.functional.linear(x.to(dtype), m.to(dtype)) for m in (*dense, *a)]
    rank = sum(m.shape[0] for m in a)
    return torch.cat([*parts, x.new_zeros((*x.shape[:-1], whole(rank) - rank), dtype=dtype)], -1)


# ---------------------------------------------------------------- launchers


def _widths(weight: Tensors, quant: Tensors, shape: Sequence[int]) -> list[int]:
    return list(shape[::2]) if quant else [w.shape[0] for w in weight]


def _forward(
    x: torch.Tensor, weight: Tensors, quant: Tensors, shape: Sequence[int], blocks: Sequence[int], a: Tensors
) -> torch.Tensor:
    wide = _forward_fake(x, weight, quant, shape, blocks, a)
    rows, out = lora._rows(x), lora._rows(wide)
    at, rank = lora._starts(_widths(weight, quant, shape)), sum(down.shape[0] for down in a)
    out[:, at[-1] + rank :].zero_()
    if quant:
        with stacked(weight, quant, shape, blocks, a, x.dtype) as dense:
            torch.mm(rows, dense[: at[-1] + rank].t(), out=out[:, : at[-1] + rank])
        return wide
    with each_dense(weight, quant, shape, blocks, x.dtype) as each:
        for (start, end), held in zip(itertools.pairwise(at), each, strict=True):
            with held as dense:
                torch.mm(rows, dense.t(), out=out[:, start:end])
    torch.mm(rows, lora._stack(a, x.dtype).t(), out=out[:, at[-1] : at[-1] + rank])
    return wide


def _forward_fake(
    x: torch.Tensor, weight: Tensors, quant: Tensors, shape: Sequence[int], blocks: Sequence[int], a: Tensors
) -> torch.Tensor:
    rank = sum(down.shape[0] for down in a)
    return x.new_empty((*x.shape[:-1], sum(_widths(weight, quant, shape)) + whole(rank)))


def _backward(
    dwide: torch.Tensor,
    x: torch.Tensor | None,
    weight: Tensors,
    quant: Tensors,
    shape: Sequence[int],
    blocks: Sequence[int],
    a: Tensors,
    need_x: bool,
    need_a: Sequence[bool],
    into: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """[∂x, ∂A of each layer]; what is not needed is an empty tensor. ``into``: where ∂x is written, [T, K]."""
    rows = lora._rows(dwide)
    at = lora._starts(_widths(weight, quant, shape))
    ranks = [down.shape[0] for down in a]
    thin = rows[:, at[-1] : at[-1] + sum(ranks)]
    dx = dwide.new_empty(0)
    if need_x and quant:
        with stacked(weight, quant, shape, blocks, a, rows.dtype) as dense:
            dx = torch.mm(rows, dense, out=into)
    elif need_x:
        # The smallest product first: every sum is rounded at the size that it has reached.
        dx = torch.mm(thin, lora._stack(a, rows.dtype), out=into)
        with each_dense(weight, quant, shape, blocks, rows.dtype) as each:
            for i in sorted(range(len(weight)), key=lambda i: weight[i].shape[0]):
                with each[i] as dense:
                    dx.addmm_(rows[:, at[i] : at[i + 1]], dense, beta=beta_for(dx))
    das = [dwide.new_empty(0) for _ in a]
    if any(need_a):
        assert x is not None
        full = matmul(thin.t(), lora._rows(x), torch.promote_types(a[0].dtype, torch.float32))
        of_each = lora._apart(full, ranks, [1.0] * len(a))
        das = [da.to(down.dtype) if needed else das[0] for da, down, needed in zip(of_each, a, need_a, strict=True)]
    return [dx.view(*dwide.shape[:-1], a[0].shape[1]) if need_x else dx, *das]


def _backward_fake(
    dwide: torch.Tensor,
    x: torch.Tensor | None,
    weight: Tensors,
    quant: Tensors,
    shape: Sequence[int],
    blocks: Sequence[int],
    a: Tensors,
    need_x: bool,
    need_a: Sequence[bool],
) -> list[torch.Tensor]:
    das = [down.new_empty(down.shape) if needed else dwide.new_empty(0) for down, needed in zip(a, need_a, strict=True)]
    return [dwide.new_empty((*dwide.shape[:-1], a[0].shape[1]) if need_x else 0), *das]


# ---------------------------------------------------------------- ops

_raw = raw_op(f"lora_stack(Tensor x, {lora._WEIGHT}, Tensor[] a) -> Tensor", _forward, _forward_fake)
_raw_backward = raw_op(
    f"lora_stack_backward(Tensor dwide, Tensor? x, {lora._WEIGHT}, Tensor[] a, bool need_x, bool[] need_a) -> Tensor[]",
    _backward,
    _backward_fake,
)


class _Where(NamedTuple):
    """How the weights of :class:`_LoraStack` are stored, and how many tensors of each kind it is given."""

    layers: int
    quant: int
    shape: tuple[int, ...]
    blocks: tuple[int, ...]

    def cut(self, flat: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """``flat`` cut into weights, quantisation states and A."""
        at = lora._starts([self.layers, self.quant, self.layers])
        weight, quant, a = (list(flat[start:end]) for start, end in itertools.pairwise(at))
        return weight, quant, a


class _LoraStack(torch.autograd.Function):
    """Tensors in lists are invisible to autograd, so all come flat: x, *weight, *quant, *a."""

    @staticmethod
    def forward(ctx: Any, where: _Where, x: torch.Tensor, *flat: torch.Tensor) -> torch.Tensor:
        weight, quant, a = where.cut(flat)
        ctx.where, (*_, ctx.need_a) = where, where.cut(ctx.needs_input_grad[2:])
        ctx.save_for_backward(x if any(ctx.need_a) else None, *flat)
        return _raw(x, weight, quant, where.shape, where.blocks, a)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dwide: torch.Tensor) -> Any:  # type: ignore[override]
        x, *flat = ctx.saved_tensors
        weight, quant, a = ctx.where.cut(flat)
        need_x = ctx.needs_input_grad[1]
        where = (weight, quant, ctx.where.shape, ctx.where.blocks)
        dx, *das = _raw_backward(dwide, x, *where, a, need_x, ctx.need_a)
        das = [da if needed else None for da, needed in zip(das, ctx.need_a, strict=True)]
        return (None, dx if need_x else None, *[None] * (len(weight) + len(quant)), *das)


def lora_stack(
    x: torch.Tensor,
    weight: Tensors,
    a: Tensors,
    *,
    quant: Sequence[Tensors] = (),
    shape: Sequence[Sequence[int]] = (),
    blocksize: Sequence[int] = (),
    blocksize2: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """[x W₁ᵀ | x W₂ᵀ | … | x A₁ᵀ | x A₂ᵀ | … | 0], [..., ΣN + ⌈Σr⌉] in ``dtype``: layers that read one x, and what
    their adapters make of it, with columns of zeros up to a whole number of 8 for the adapters.

    ``x``: [..., K]. ``weight``: of each layer, dense [N, K] (cast on use) or NF4, all in the same way, with lists of
    ``quant``, ``shape`` and blocksizes as :func:`~fastft.kernels.lora_linear.lora_linears` takes them; frozen. ``a``:
    of each layer [r, K] in any floating dtype, which its gradient has too. ``dtype``: of the products (default: x's).

    Raises ValueError for tensors that do not belong together, and for a weight that requires a gradient.
    """
    dtype = dtype or x.dtype
    options: dict[str, Any] = {"quant": quant, "shape": shape, "blocksize": blocksize, "blocksize2": blocksize2}
    reason = supported(x, weight, a, **options, dtype=dtype)
    if reason is not None:
        raise ValueError(f"lora_stack: {reason}")
    firsts, seconds = blocksize or [64] * len(weight), blocksize2 or [256] * len(weight)
    blocks = [n for pair in zip(firsts, seconds, strict=True) for n in pair]
    states = [t for state in quant for t in state]
    sizes = [n for of_layer in shape for n in of_layer]
    where = _Where(len(weight), len(states), tuple(sizes) if states else (), tuple(blocks))
    # The cast stands outside of the op: Inductor merges it into whatever makes x, and only its result is kept.
    return _LoraStack.apply(where, x.to(dtype), *weight, *states, *a)  # type: ignore[no-any-return]


def supported(
    x: torch.Tensor,
    weight: Tensors,
    a: Tensors,
    *,
    quant: Sequence[Tensors] = (),
    shape: Sequence[Sequence[int]] = (),
    blocksize: Sequence[int] = (),
    blocksize2: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> Reason | None:
    """None, or why the op cannot run on these arguments."""
    # Its products have no gradient for them.
    if any(w.requires_grad for w in weight):
        return Reason("weight", "a weight requires a gradient; the layers' weights are frozen here")
    if len(a) != len(weight):
        return Reason("shape", f"{len(weight)} weights and {len(a)} adapters; one for each is supported")
    # What a layer's own op says of its tensors; B is not there yet, and any that fits will do.
    widths = [sizes[0] for sizes in shape] if quant else [w.shape[0] for w in weight]
    if len(widths) != len(a):
        return Reason("shape", f"{len(widths)} shapes for {len(a)} weights")
    ups = [down.new_empty((n, down.shape[0])) for n, down in zip(widths, a, strict=True)]
    return lora.supported_linears(
        x, weight, [], [[down] for down in a], [[up] for up in ups], [[1.0]] * len(a), quant=quant, shape=shape,
        blocksize=blocksize, blocksize2=blocksize2, dtype=dtype,
    )  # fmt: skip


def cost(
    x: torch.Tensor,
    weight: Tensors,
    a: Tensors,
    *,
    quant: Sequence[Tensors] = (),
    shape: Sequence[Sequence[int]] = (),
    blocksize: Sequence[int] = (),
    blocksize2: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> Cost:
    """Forward: x and the matrices in, their products out. Nothing is kept: the result is its reader's to keep."""
    K, itemsize, rank = x.shape[-1], (dtype or x.dtype).itemsize, sum(down.shape[0] for down in a)
    tokens = size(x.numel()) / size(K)
    N = sum(sizes[0] for sizes in (shape if quant else [w.shape for w in weight]))
    read = sum((nf4.cost(n, k, itemsize=itemsize).bytes_moved for n, k in shape if quant), sympy.Integer(0))
    moved = itemsize * (tokens * (K + N + rank) + (N + rank) * K)
    return Cost(2 * tokens * (N + rank) * K, moved + read, sympy.Integer(0))


# ---------------------------------------------------------------- calls


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """Gate and up, over dense and NF4 weights."""
    if model.gated and not model.fused:
        for nf4_weight, adapter in itertools.product((False, True), ("x", "float32")):
            call = {"hidden": model.hidden, "intermediate": model.intermediate, "rank": 16}
            yield {**model.tokens, **call, "nf4_weight": nf4_weight, "adapter": adapter}


def _thin(new: New, adapter: str, *shape: int, scale: float) -> torch.Tensor:
    made = new(*shape, scale=scale)
    return (made.float() if adapter == "float32" else made).requires_grad_()


def inputs(
    new: New,
    *,
    batch: int,
    seq: int,
    hidden: int,
    intermediate: int,
    rank: int,
    nf4_weight: bool = False,
    adapter: str = "x",
) -> Inputs:
    """x [batch, seq, hidden], two weights [intermediate, hidden] and the A of two adapters."""
    x = new(batch, seq, hidden, grad=True)
    more: dict[str, Any] = {}
    if nf4_weight:
        packed = [nf4.packed_weight(new, intermediate, hidden) for _ in range(2)]
        weight = [p for p, *_ in packed]
        more = {"quant": [state for _, *state in packed], "shape": [[intermediate, hidden]] * 2}
    else:
        weight = [new(intermediate, hidden, scale=hidden**-0.5) for _ in range(2)]
    a = [_thin(new, adapter, rank, hidden, scale=hidden**-0.5) for _ in range(2)]
    return Inputs((x, weight, a), more, [x, *a])


OP = register(
    Op(
        name="lora_stack",
        call=lora_stack,
        reference=reference,
        supported=supported,
        raw=("lora_stack", "lora_stack_backward"),
        recompute=Recompute.KEEP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
    )
)
