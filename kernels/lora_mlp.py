"""Gated MLPs a slice of tokens at a time: no tensor as wide as the MLP is ever there for all tokens.

With the three layers' adapters, biases and ways of storing a weight as ``lora_linear`` has them, and f as ``glu``::

    g = gate(x)        u = up(x)        y = down(f(g) u) [+ z]

x [..., K], g and u [..., N], y and z (the residual stream) [..., H]. Tokens do not depend on each other, so the forward
takes ``rows`` of them at a time through all three layers, into their part of y. The backward takes slices too, of as
many tokens or others: each computes g, u and f(g) u again, and goes on from there by the formulas of the layers' own
ops; ∂x is written slice by slice, and what is a sum over tokens (∂A, ∂B, ∂W, ∂bias) is added up over them in fp32.

What is there at one time besides x, y and their gradients is of one slice, 4 N numbers a token at the most (g, u,
f(g) u and its gradient; those of g and u take their place). With N = 14,336 in bf16 that is 115 KB a token, for 4,096
tokens 0.5 GB; over 400,000 tokens at once it would be 46 GB. Kept: x, and h = f(g) u Aᵀ of down's adapters, [T, Σr],
for ∂B: 32 bytes a token at rank 16, for a pass over N numbers a token. What a backward computes again is what a
recomputed layer's backward computes again in any case, down's product not among it, so slices cost no arithmetic; what
they cost is that products are of fewer tokens (:func:`tokens_of_slice`), and a copy of each slice of y and of ∂x.

Nothing here multiplies or activates by itself. Slices go through the bodies of ``lora_stack`` and ``lora_glu`` where
gate and up have an adapter each (``stacked``), of ``lora_linears`` and ``glu`` elsewhere, and of ``lora_linear``:
within a slice every number is rounded where those round it. A dense copy of an NF4 weight is made once for all slices
of a pass (:func:`~fastft.kernels._dense_weights.dense_once`): three of 117 MB for as long as the pass takes, against
0.23 ms for each slice of 4,096 tokens, whose products take 2.1 ms in the forward.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import sympy
import torch

from fastft.kernels import glu, lora_glu, lora_stack
from fastft.kernels import lora_linear as lora
from fastft.kernels._dense_weights import dense_once
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import Cost, Op, Reason, Recompute, raw_op, register
from fastft.kernels._products import matmul
from fastft.kernels._rows import size

Tensors = Sequence[torch.Tensor]
Optionals = Sequence["torch.Tensor | None"]

# ---------------------------------------------------------------- slices

#: Numbers as wide as the MLP that the backward of a slice holds at one time, and the forward.
WIDE, WIDE_FORWARD = 4, 3
#: What these may take, in bytes (8,192 tokens of Llama-3.1-8B's forward), and the fewest tokens that a slice has: with
#: 1,024 a product that gives [tokens, 4096] fills an H100 once (128 tiles of 128 × 256, 132 multiprocessors). Slices
#: are of whole such numbers, so that the last wave of each product is nearly full.
SLICE_BYTES, FEWEST = 672 * 2**20, 1024
#: Into how many slices a backward is cut at least. More need less memory, and launches that the GPU waits for.
SLICES = 2


def tokens_of_slice(tokens: int, intermediate: int, itemsize: int, *, forward: bool = False) -> int:
    """Tokens of a slice: about half of all that there are, or (``forward``, which holds less) all; no more than
    :data:`SLICE_BYTES` has room for; :data:`FEWEST`, or a multiple of it.
    """
    wide = WIDE_FORWARD if forward else WIDE
    most = max(1, SLICE_BYTES // (wide * intermediate * itemsize) // FEWEST)
    slices = max(math.ceil(tokens / (most * FEWEST)), 1 if forward else SLICES)
    return max(1, round(tokens / slices / FEWEST)) * FEWEST


def scratch_bytes(
    tokens: int,
    rows: int,
    widths: Sequence[int],
    rank: int,
    itemsize: int,
    copied: bool,
    need_weight: Sequence[bool] | None,
) -> int:
    """The most bytes that a pass holds at one time besides its operands and results. ``widths``: N, K and H. ``rank``:
    of all adapters. ``copied``: whether weights are not used as they are. ``need_weight``: of the backward, None for
    the forward.
    """
    n, k, h = widths
    wide = (WIDE_FORWARD if need_weight is None else WIDE) * n
    of_slice = min(tokens, rows) * (wide + k + h + 2 * rank) * itemsize
    trained = [size for size, needed in zip((n * k, n * k, n * h), need_weight or (), strict=False) if needed]
    sums = 4 * (sum(trained) + max(trained, default=0))  # in fp32, with one slice's own
    return of_slice + copied * n * (2 * k + h) * itemsize + sums


def widths(weight: Sequence[Any], quant: Sequence[Any], shape: Sequence[Any]) -> tuple[Any, Any, Any]:
    """N, K and H of gate, up and down, as the raw ops take them."""
    (n, k), h = (shape[:2], shape[4]) if quant else (weight[0].shape, weight[2].shape[0])
    return n, k, h


# ---------------------------------------------------------------- reference


def reference(
    x: torch.Tensor,
    kind: str,
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
    residual: torch.Tensor | None = None,
    rows: int | None = None,
) -> torch.Tensor:
    """:func:`lora_mlp` in plain PyTorch, differentiable: all tokens at once."""
    layers = lora._by_layer(weight, bias, a, b, scaling, b_bias, quant, shape, blocksize, blocksize2)
    dtypes: dict[str, Any] = {"dtype": dtype, "lora_dtype": lora_dtype, "out_dtype": dtype}
    gate, up = (lora.lora_linear_reference(x, *args, **(kwargs | dtypes)) for args, kwargs in layers[:2])
    ((args, kwargs),) = layers[2:]
    act = glu.reference(gate, up, kind)
    return lora.lora_linear_reference(act, *args, **(kwargs | dtypes), residual=residual)


# ---------------------------------------------------------------- launchers

#: ∂x, and lists of ∂W and Σₜ g of each layer, and of ∂A and ∂B of each adapter.
_Found = tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]


class _Needs(NamedTuple):
    """Whose gradients are wanted: x's, and lists of layers' weights and sums over tokens, of adapters' A and B."""

    x: bool
    weight: Sequence[bool]
    sum: Sequence[bool]
    a: Sequence[bool]
    b: Sequence[bool]

    @property
    def any(self) -> bool:
        return self.x or any(itertools.chain(*self[1:]))


class _Layers(NamedTuple):
    """Layers' tensors and constants, in lists that hold all layers' in a row."""

    weight: Tensors
    quant: Tensors
    shape: Sequence[int]
    blocks: Sequence[int]
    bias: Optionals
    adapters: Sequence[int]
    a: Tensors
    b: Tensors
    b_bias: Optionals
    scaling: Sequence[float]

    def apart(self, needs: _Needs) -> Iterator[tuple[_Layers, _Needs]]:
        """Gate and up, and down; of down ∂x is needed if anything is of gate and up."""
        first, q = sum(self.adapters[:2]), len(self.quant) // 3 * 2
        cuts = [(slice(0, 2), slice(0, 4), slice(0, q), slice(0, first))]
        cuts += [(slice(2, 3), slice(4, 6), slice(q, None), slice(first, None))]
        need_x = needs.x
        for one, two, state, thin in cuts:
            layers = _Layers(
                self.weight[one], self.quant[state], self.shape[two], self.blocks[two], self.bias[one],
                self.adapters[one], self.a[thin], self.b[thin], self.b_bias[thin], self.scaling[thin],
            )  # fmt: skip
            mine = _Needs(need_x, needs.weight[one], needs.sum[one], needs.a[thin], needs.b[thin])
            yield layers, mine
            need_x = mine.any

    @property
    def stored(self) -> tuple[Tensors, Tensors, Sequence[int], Sequence[int]]:
        return self.weight, self.quant, self.shape, self.blocks

    def down(self, x: torch.Tensor, lora_dtype: torch.dtype) -> torch.Tensor | None:
        """The adapters' h."""
        return lora._down(x, self.a, [None] * len(self.a), lora_dtype) if self.a else None

    def forward(self, x: torch.Tensor, h: torch.Tensor | None, residual: torch.Tensor | None) -> list[torch.Tensor]:
        """Each layer's result."""
        own = (self.b, self.b_bias, self.scaling)
        return lora._forward(x, *self.stored, self.bias, h, self.adapters, *own, residual, x.dtype)

    def backward(
        self, dy: Tensors, x: torch.Tensor, h: torch.Tensor | None, lora_dtype: torch.dtype, needs: _Needs
    ) -> _Found:
        """As of ``lora_linear``, with ∂W in fp32."""
        none = [False] * len(self.a)
        dx, *rest = lora._backward(
            dy, x, *self.stored, self.adapters, self.a, self.b, [None] * len(self.a), none, h, self.scaling,
            x.dtype, lora_dtype, True, needs.x, [False] * len(dy), needs.sum, needs.a, needs.b, none,
        )  # fmt: skip
        base, thin = rest[: 2 * len(dy)], rest[2 * len(dy) :]
        for i, needed in enumerate(needs.weight):
            if needed:
                base[2 * i] = matmul(dy[i].t(), x, torch.promote_types(x.dtype, torch.float32))
        return dx, base, [t for i, t in enumerate(thin) if i % 3 != 2]


def _activated(
    x: torch.Tensor, layers: _Layers, kind: str, stacked: bool, lora_dtype: torch.dtype
) -> tuple[torch.Tensor, list[Any]]:
    """f(g) u of a slice, and what the backward reads to come back from there."""
    if stacked:
        wide = lora_stack._forward(x, *layers.stored, layers.a)
        return lora_glu._forward(wide, layers.b, layers.scaling, kind), [wide]
    h = layers.down(x, lora_dtype)
    gate, up = layers.forward(x, h, None)
    return glu._forward(gate, up, kind), [gate, up, h]


def _back(
    dact: torch.Tensor,
    kept: list[Any],
    x: torch.Tensor,
    layers: _Layers,
    kind: str,
    stacked: bool,
    lora_dtype: torch.dtype,
    needs: _Needs,
    into: torch.Tensor | None,
) -> _Found:
    """Back through :func:`_activated`, whose ``kept`` is used up. ∂x is written to ``into``, where there is one."""
    if not needs.any:
        nothing = dact.new_empty(0)
        return nothing, [nothing] * 4, [nothing] * (2 * len(layers.a))
    if stacked:
        dwide, *dbs = lora_glu._backward(
            dact, kept.pop(), layers.b, layers.scaling, kind, needs.x or any(needs.a), needs.b, over=True
        )
        dx, *das = lora_stack._backward(dwide, x, *layers.stored, layers.a, needs.x, needs.a, into)
        return dx, [dact.new_empty(0)] * 4, [t for pair in zip(das, dbs, strict=True) for t in pair]
    gate, up, h = kept
    glu._backward_into(gate, up, dact, gate, up, kind)  # over both
    dx, base, thin = layers.backward([gate, up], x, h, lora_dtype, needs)
    return dx if into is None else into.copy_(dx), base, thin


def _slices(tokens: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows))


def _passing(tokens: int, rows: int) -> contextlib.AbstractContextManager[None]:
    """A pass over several slices makes dense copies once; one over a single slice has no use for that."""
    return dense_once() if tokens > rows else contextlib.nullcontext()


def _forward(
    x: torch.Tensor,
    weight: Tensors,
    quant: Tensors,
    shape: Sequence[int],
    blocks: Sequence[int],
    bias: Optionals,
    adapters: Sequence[int],
    a: Tensors,
    b: Tensors,
    b_bias: Optionals,
    scaling: Sequence[float],
    residual: torch.Tensor | None,
    kind: str,
    stacked: bool,
    lora_dtype: torch.dtype,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and down's h [T, Σr]."""
    layers = _Layers(weight, quant, shape, blocks, bias, adapters, a, b, b_bias, scaling)
    (gate_up, _), (down, _) = layers.apart(_Needs(False, (), (), (), ()))
    y = x.new_empty((*x.shape[:-1], widths(weight, quant, shape)[2]))
    xs, ys, zs = lora._rows(x), lora._rows(y), None if residual is None else lora._rows(residual)
    hs: list[torch.Tensor] = []
    with _passing(xs.shape[0], rows):
        for part in _slices(xs.shape[0], rows):
            act = _activated(xs[part], gate_up, kind, stacked, lora_dtype)[0]
            thin = down.down(act, lora_dtype)
            (ys[part],) = down.forward(act, thin, None if zs is None else zs[part])
            hs += [] if thin is None else [thin]
            del act  # before the next slice's gate and up
    if len(hs) == 1:
        return y, hs[0]
    return y, torch.cat(hs) if hs else lora._down_fake(x, down.a, [], lora_dtype)


def _forward_fake(
    x: torch.Tensor,
    weight: Tensors,
    quant: Tensors,
    shape: Sequence[int],
    blocks: Any,
    bias: Any,
    adapters: Sequence[int],
    a: Tensors,
    b: Any,
    b_bias: Any,
    scaling: Any,
    residual: Any,
    kind: Any,
    stacked: Any,
    lora_dtype: torch.dtype,
    rows: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    y = x.new_empty((*x.shape[:-1], widths(weight, quant, shape)[2]))
    return y, lora._down_fake(x, a[sum(adapters[:2]) :], [], lora_dtype)


def _backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor | None,
    weight: Tensors,
    quant: Tensors,
    shape: Sequence[int],
    blocks: Sequence[int],
    bias: Optionals,
    adapters: Sequence[int],
    a: Tensors,
    b: Tensors,
    b_bias: Optionals,
    scaling: Sequence[float],
    kind: str,
    stacked: bool,
    lora_dtype: torch.dtype,
    rows: int,
    need_x: bool,
    need_weight: Sequence[bool],
    need_sum: Sequence[bool],
    need_a: Sequence[bool],
    need_b: Sequence[bool],
) -> list[torch.Tensor]:
    """[∂x, for each layer ∂W and Σₜ g (fp32), for each adapter ∂A, ∂B]; what is not needed is an empty tensor."""
    needs = _Needs(need_x, need_weight, need_sum, need_a, need_b)
    dtypes = [dtype for w in weight for dtype in (w.dtype, None)]
    dtypes += [t.dtype for pair in zip(a, b, strict=True) for t in pair]
    # Of fp32 adapters the bodies give gradients in fp32, and what they multiply with is rounded as ever.
    a, b = ([t.to(torch.promote_types(t.dtype, torch.float32)) for t in thin] for thin in (a, b))
    parts = list(_Layers(weight, quant, shape, blocks, bias, adapters, a, b, b_bias, scaling).apart(needs))
    xs, gs = lora._rows(x), lora._rows(dy)
    dx = xs.new_empty(xs.shape if need_x else 0)
    totals: list[torch.Tensor] = []
    with _passing(xs.shape[0], rows):
        for part in _slices(xs.shape[0], rows):
            into = dx[part] if need_x else None
            thin = None if h is None else h[part]
            found = _back_of_slice(gs[part], xs[part], thin, parts, kind, stacked, lora_dtype, into)
            if totals and (pairs := [pair for pair in zip(totals, found, strict=True) if pair[0].numel()]):
                torch._foreach_add_(*map(list, zip(*pairs, strict=True)))
            totals = totals or found
            del found  # the next slice's take their place
    if not totals:
        layers = weight, quant, shape, blocks, bias, adapters, a, b, b_bias, scaling
        found = _backward_fake(dy, x, h, *layers, kind, stacked, lora_dtype, rows, *needs)
        totals = [t.zero_() for t in found[1:]]
    wanted = [n for lists in (needs[1:3], needs[3:]) for pair in zip(*lists, strict=True) for n in pair]
    sums = [
        x.new_empty(0) if not need else total if dtype is None else total.to(dtype)
        for total, need, dtype in zip(totals, wanted, dtypes, strict=True)
    ]
    return [dx.view(x.shape) if need_x else dx, *sums]


def _back_of_slice(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor | None,
    parts: Sequence[tuple[_Layers, _Needs]],
    kind: str,
    stacked: bool,
    lora_dtype: torch.dtype,
    into: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Write a slice's ∂x ``into``; returns what it adds to the sums over tokens, in the order of the results."""
    (gate_up, of_gate_up), (down, of_down) = parts
    act, kept = _activated(x, gate_up, kind, stacked, lora_dtype)
    dact, base, thin = down.backward([dy], act, h, lora_dtype, of_down)
    del act  # what comes next is the most that there is at one time
    _, first_base, first_thin = _back(dact, kept, x, gate_up, kind, stacked, lora_dtype, of_gate_up, into)
    return [*first_base, *base, *first_thin, *thin]


def _backward_fake(
    dy: torch.Tensor,
    x: torch.Tensor,
    h: torch.Tensor | None,
    weight: Tensors,
    quant: Tensors,
    shape: Sequence[int],
    blocks: Sequence[int],
    bias: Optionals,
    adapters: Sequence[int],
    a: Tensors,
    b: Tensors,
    b_bias: Any,
    scaling: Any,
    kind: Any,
    stacked: Any,
    lora_dtype: Any,
    rows: Any,
    need_x: bool,
    need_weight: Sequence[bool],
    need_sum: Sequence[bool],
    need_a: Sequence[bool],
    need_b: Sequence[bool],
) -> list[torch.Tensor]:
    def new(of: Any, dtype: torch.dtype, needed: bool) -> torch.Tensor:
        return x.new_empty(of if needed else 0, dtype=dtype if needed else x.dtype)

    out = [x.new_empty(x.shape if need_x else 0)]
    n, _, hidden = widths(weight, quant, shape)
    for w, out_features, need_w, need_s in zip(weight, (n, n, hidden), need_weight, need_sum, strict=True):
        single = torch.promote_types(x.dtype, torch.float32)
        out += [new(w.shape, w.dtype, need_w), new(out_features, single, need_s)]
    for thin, needed in zip(zip(a, b, strict=True), zip(need_a, need_b, strict=True), strict=True):
        out += [new(t.shape, t.dtype, need) for t, need in zip(thin, needed, strict=True)]
    return out


# ---------------------------------------------------------------- ops

_LAYERS = f"{lora._WEIGHT}, Tensor?[] bias, int[] adapters, Tensor[] a, Tensor[] b, Tensor?[] b_bias, float[] scaling"
_HOW = "str kind, bool stacked, ScalarType lora_dtype, int rows"
_raw = raw_op(f"lora_mlp(Tensor x, {_LAYERS}, Tensor? residual, {_HOW}) -> (Tensor, Tensor)", _forward, _forward_fake)
_raw_backward = raw_op(
    f"lora_mlp_backward(Tensor dy, Tensor x, Tensor? h, {_LAYERS}, {_HOW}, "
    "bool need_x, bool[] need_weight, bool[] need_sum, bool[] need_a, bool[] need_b) -> Tensor[]",
    _backward,
    _backward_fake,
)


class _Constants(NamedTuple):
    """What :class:`_LoraMLP` is given besides tensors."""

    layers: lora._Constants
    kind: str
    stacked: bool
    rows: int


#: The lists of tensors that :class:`_LoraMLP` is given, all in a row: weight, bias, quant, a, b, b_bias.
_COLUMNS = ("layer", "layer", "quant", *("adapter",) * 3)


class _LoraMLP(torch.autograd.Function):
    """Tensors in lists are invisible to autograd, so all come flat."""

    @staticmethod
    def forward(ctx: Any, c: _Constants, x: Any, residual: Any, *flat: Any) -> torch.Tensor:
        ctx.constants = c
        y, h = _raw(x, *_given(c, flat), residual, *_how(c))
        ctx.save_for_backward(x, h if h.shape[1] else None, *flat)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:  # type: ignore[override]
        c: _Constants = ctx.constants
        x, h, *flat = ctx.saved_tensors
        _, need_x, need_residual, *needed = ctx.needs_input_grad
        need_weight, need_bias, _, need_a, need_b, need_more = c.layers.take(needed, *_COLUMNS)
        layer = [i for i, count in enumerate(c.layers.adapters) for _ in range(count)]
        need_sum = [
            need or any(need_more[j] for j, of in enumerate(layer) if of == i) for i, need in enumerate(need_bias)
        ]
        dx, *found = _raw_backward(dy, x, h, *_given(c, flat), *_how(c), need_x, need_weight, need_sum, need_a, need_b)
        sums, thin = found[1:6:2], found[6:]
        _, bias, _, _, _, b_bias = c.layers.take(flat, *_COLUMNS)
        grads = [
            *found[0:6:2],
            *(None if t is None else total.to(t.dtype) for t, total in zip(bias, sums, strict=True)),
            *[None] * (3 * c.layers.quant),
            *thin[::2],
            *thin[1::2],
            *(
                None if t is None else (s * sums[i]).to(t.dtype)
                for t, s, i in zip(b_bias, c.layers.scaling, layer, strict=True)
            ),
        ]
        grads = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
        return (None, dx if need_x else None, dy if need_residual else None, *grads)


def _given(c: _Constants, flat: Sequence[Any]) -> tuple[Any, ...]:
    """The layers as the raw ops take them."""
    weight, bias, quant, a, b, b_bias = c.layers.take(flat, *_COLUMNS)
    return weight, quant, c.layers.shape, c.layers.blocks, bias, c.layers.adapters, a, b, b_bias, c.layers.scaling


def _how(c: _Constants) -> tuple[Any, ...]:
    return c.kind, c.stacked, c.layers.lora_dtype, c.rows


def stacks(
    weight: Tensors,
    bias: Optionals,
    a: Sequence[Tensors],
    b: Sequence[Tensors],
    b_bias: Sequence[Optionals],
    same_dtype: bool,
) -> bool:
    """Whether gate and up, whose lists these are, go through ``lora_stack`` and ``lora_glu``."""
    one_each = all(len(downs) == 1 for downs in a) and len(a) == 2
    plain = all(t is None for t in (*bias, *itertools.chain(*b_bias)))
    frozen = not any(w.requires_grad for w in weight)
    return one_each and plain and frozen and same_dtype and all(up.shape[1] <= lora_glu.MOST_RANK for (up,) in b)


def lora_mlp(
    x: torch.Tensor,
    kind: str,
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
    residual: torch.Tensor | None = None,
    rows: int | None = None,
) -> torch.Tensor:
    """down(f(gate(x)) · up(x)) [+ residual], [..., H] in ``dtype``, ``rows`` tokens at a time.

    ``x``: [..., K]. ``kind``: f, as for :func:`~fastft.kernels.glu.glu`. Every other list has an entry for each of gate
    [N, K], up [N, K] and down [H, N], of what :func:`~fastft.kernels.lora_linear.lora_linears` takes; adapters read
    their layer's input itself, without a dropout. ``residual``: as for
    :func:`~fastft.kernels.lora_linear.lora_linear`, of down. ``dtype``: of the products (default: x's);
    ``lora_dtype``: of the adapters' (default: ``dtype``). ``rows``: tokens of a slice, 1 or more (default:
    :func:`tokens_of_slice`).

    Raises ValueError for tensors that do not belong together.
    """
    dtype = dtype or x.dtype
    lora_dtype = lora_dtype or dtype
    state: dict[str, Any] = {
        "b_bias": b_bias, "quant": quant, "shape": shape, "blocksize": blocksize, "blocksize2": blocksize2
    }  # fmt: skip
    reason = supported(
        x, kind, weight, bias, a, b, scaling, **state, dtype=dtype, lora_dtype=lora_dtype, residual=residual, rows=rows
    )
    if reason is not None:
        raise ValueError(f"lora_mlp: {reason}")
    layers = lora._by_layer(weight, bias, a, b, scaling, **state)
    each: dict[str, list[Any]] = {
        name: [args[i] for args, _ in layers] for i, name in enumerate(("weight", "bias", "a", "b", "scaling"))
    }
    each["b_bias"] = [
        list(of["b_bias"]) or [None] * len(downs) for (_, of), downs in zip(layers, each["a"], strict=True)
    ]
    two = {name: each[name][:2] for name in ("weight", "bias", "a", "b", "b_bias")}
    stacked = stacks(**two, same_dtype=lora_dtype == dtype)
    a, b, b_bias = each["a"], each["b"], each["b_bias"]
    quant = [t for _, of in layers for t in of["quant"]]
    c = lora._Constants(
        len(quant) // 3,
        tuple(map(len, a)),
        tuple(n for _, of in layers for n in of["shape"]),
        tuple(n for _, of in layers for n in (of["blocksize"], of["blocksize2"])),
        tuple(float(s) for of_layer in each["scaling"] for s in of_layer),
        lora_dtype,
        dtype,
        True,
    )
    if rows is None:
        n = c.shape[0] if quant else weight[0].shape[0]
        rows = tokens_of_slice(math.prod(x.shape[:-1]), n, dtype.itemsize)
    flat = (*each["weight"], *each["bias"], *quant, *itertools.chain(*a, *b, *b_bias))
    # The cast stands outside of the op: Inductor merges it into whatever makes x, and only its result is kept.
    return _LoraMLP.apply(_Constants(c, kind, stacked, rows), x.to(dtype), residual, *flat)  # type: ignore[no-any-return]


def supported(
    x: torch.Tensor,
    kind: str,
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
    residual: torch.Tensor | None = None,
    rows: int | None = None,
) -> Reason | None:
    """None, or why the op cannot run on these arguments."""
    # The activations that the kernels know.
    if kind not in glu.KINDS:
        return Reason("activation", f"the activation {kind!r} is not one of {', '.join(glu.KINDS)}")
    if len(weight) != 3:
        return Reason("shape", f"{len(weight)} layers; gate, up and down are supported")
    if rows is not None and rows < 1:
        return Reason("rows", f"slices of {rows} tokens; 1 or more is supported")
    # Two layers that read x, which may share products, and one that reads what they give.
    if len({len(state) for state in quant}) > 1:
        return Reason("quantization", "the layers are quantised in different ways")
    dtype = dtype or x.dtype
    layers = lora._by_layer(weight, bias, a, b, scaling, b_bias, quant, shape, blocksize, blocksize2)
    widths = [(state["shape"] or args[0].shape)[0] for args, state in layers]
    if widths[0] != widths[1]:
        return Reason("shape", f"gate gives {widths[0]} numbers and up {widths[1]}; as many of both are supported")
    if len({down.dtype for downs, _ in zip(a, range(2), strict=False) for down in downs}) > 1:
        return Reason("dtype", "the adapters of gate and up have different dtypes")
    act = x[..., :1].expand(*x.shape[:-1], widths[0])  # of the right size, without memory
    for source, (args, state) in zip((x, x, act), layers, strict=True):
        taken = residual if source is act else None
        reason = lora.supported(
            source, *args, **state, dtype=dtype, lora_dtype=lora_dtype, out_dtype=dtype, residual=taken
        )
        if reason is not None:
            return reason
    return None


def cost(
    x: torch.Tensor,
    kind: str,
    weight: Tensors,
    bias: Optionals = (),
    a: Sequence[Tensors] = (),
    b: Sequence[Tensors] = (),
    scaling: Sequence[Sequence[float]] = (),
    *,
    quant: Sequence[Tensors] = (),
    shape: Sequence[Sequence[int]] = (),
    dtype: torch.dtype | None = None,
    **_: Any,
) -> Cost:
    """Forward: what the layers' and the activation's own formulas say. Kept: x, which is the producer's to keep."""
    itemsize = (dtype or x.dtype).itemsize
    n, k = (shape or [w.shape for w in weight])[0]
    h = (shape or [w.shape for w in weight])[2][0]
    ranks = [sum(down.shape[0] for down in downs) for downs in a] or [0] * 3
    return cost_of(size(x.numel()) / size(k), (n, k, h), ranks, itemsize, bool(quant), parts=3)


def cost_of(
    tokens: Any, widths: Sequence[Any], ranks: Sequence[Any], itemsize: int, nf4_weight: bool, *, parts: int
) -> Cost:
    """Of gate, up and the activation (``parts`` = 2), or of all three layers (3). ``widths``: N, K and H; ``ranks``: of
    each layer's adapters together.
    """
    n, k, h = widths
    each = [
        lora.cost(tokens, out, of, rank, itemsize, nf4_weight)
        for out, of, rank in zip((n, n, h), (k, k, n), ranks, strict=True)
    ][:parts]
    each.append(Cost(8 * tokens * n, 3 * tokens * n * itemsize, sympy.Integer(0)))
    flops, moved = (sum((getattr(c, of) for c in each), sympy.Integer(0)) for of in ("flops", "bytes_moved"))
    return Cost(flops, moved, sympy.Integer(0))


# ---------------------------------------------------------------- calls


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """Gated MLPs with projections of their own, over dense and NF4 weights, with adapters on all three."""
    if model.gated and not model.fused and model.activation in glu.KINDS:
        call = {"hidden": model.hidden, "intermediate": model.intermediate, "activation": model.activation, "rank": 16}
        for nf4_weight in (False, True):
            yield {**model.tokens, **call, "nf4_weight": nf4_weight}


def inputs(
    new: New,
    *,
    batch: int,
    seq: int,
    hidden: int,
    intermediate: int,
    activation: str,
    rank: int,
    nf4_weight: bool = False,
    adapter: str | None = "x",
) -> Inputs:
    """x [batch, seq, hidden], and gate, up and down with an adapter each."""
    x = new(batch, seq, hidden, grad=True)
    sizes = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    layers = [lora._layer(new, *of, rank, nf4_weight, adapter) for of in sizes]
    weight, a, b, quant, shape = map(list, zip(*layers, strict=True))
    more: dict[str, Any] = {"quant": quant, "shape": shape} if nf4_weight else {}
    wanted = [x, *(t for thin in (*a, *b) for t in thin)]
    return Inputs((x, activation, weight, (), a, b, [[2.0] * len(thin) for thin in a]), more, wanted)


def stock(
    x: torch.Tensor, kind: str, weight: Tensors, bias: Any, a: Any, b: Any, scaling: Any, **dtypes: Any
) -> torch.Tensor:
    """PEFT's adapters in transformers' MLP."""
    (gate, up), down = (
        [lora.stock(x, weight[i], None, a[i], b[i], scaling[i]) for i in range(2)],
        (weight[2], None, a[2], b[2], scaling[2]),
    )
    return lora.stock(glu.stock(gate, up, kind), *down)


OP = register(
    Op(
        name="lora_mlp",
        call=lora_mlp,
        reference=reference,
        supported=supported,
        raw=("lora_mlp", "lora_mlp_backward"),
        recompute=Recompute.KEEP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
        stock=stock,
    )
)
