"""Copies of weights in the form that products take: dense ones of 4 bits, for one product at a time or for a pass over
slices (:func:`dense_once`); adapters in half precision, for one call of a compiled graph (:class:`Rounded`).
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from fastft.kernels import nf4
from fastft.kernels._op import compat

Tensors = Sequence[torch.Tensor]
T = TypeVar("T")

_scratch: dict[tuple[torch.device, torch.dtype, int], torch.Tensor] = {}
_scratch_lock = threading.Lock()


@contextlib.contextmanager
def _scratch_rows(like: torch.Tensor, n: int, k: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A dense [n, k] matrix in the scratch of ``like``'s device, to be filled and read before anything else is.

    There is one scratch for each device, dtype and stream; it grows to the largest weight and stays. The lock keeps the
    copy and the GEMM that reads it next to each other in the stream when two threads launch into it.
    """
    stream, fresh = 0, False
    if like.is_cuda:
        stream = compat().current_stream(like.get_device())
        # A captured graph owns the memory it was captured with: it may not share the scratch with what runs outside.
        fresh = torch.cuda.is_current_stream_capturing()
    with _scratch_lock:
        key = (like.device, dtype, stream)
        held = None if fresh else _scratch.pop(key, None)
        if held is None or held.numel() < n * k:
            held = None  # the old one goes before the new one comes
            held = torch.empty(n * k, dtype=dtype, device=like.device)
        if not fresh:
            _scratch[key] = held
        yield held[: n * k].view(n, k)


_once: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar("once", default=None)


@contextlib.contextmanager
def dense_once() -> Iterator[None]:
    """In here a copy of the same tensors, dense or in another dtype, is made once, in memory of its own, which is free
    again behind it: for bodies of ops that multiply with the same weights many times. The tensors outlive it. The
    scratch, which nobody uses in here, is freed.
    """
    release_scratch()
    token = _once.set({})
    try:
        yield
    finally:
        _once.reset(token)


def once(how: str, of: Tensors, dtype: torch.dtype, make: Callable[[], T]) -> T:
    """What ``make`` makes of thin matrices in this way: "cast", the one in another dtype; "stack", all below each
    other; "each", a list of them. In a call of :class:`Rounded` it is there already; in :func:`dense_once` it is made
    the first time.
    """
    call, made = _call.get(), _once.get()
    if call is None and made is None:
        return make()
    key = _key(how, of, dtype)
    if call is not None and (found := call.find(key)) is not None:
        return found  # type: ignore[no-any-return]
    if made is None:
        return make()
    if key not in made:
        made[key] = make()
    return made[key]  # type: ignore[no-any-return]


def _key(how: str, of: Tensors, dtype: torch.dtype) -> tuple[Any, ...]:
    return (how, dtype, *((t.data_ptr(), t.shape) for t in of))


def _copy_below(out: torch.Tensor, matrices: Tensors) -> None:
    """Write thin matrices to ``out``, below each other. From where a call of :class:`Rounded` has them it is one copy
    (one launch for many tensors gives each of so few a block or two, and takes longer).
    """
    call = _call.get()
    how = "stack" if len(matrices) > 1 else "cast"
    found = None if call is None else call.find(_key(how, matrices, out.dtype))
    if found is not None:
        out.copy_(found)
    else:
        torch._foreach_copy_(list(out.split([m.shape[0] for m in matrices])), list(matrices))


def cast(thin: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A thin matrix in ``dtype``."""
    return thin if thin.dtype == dtype else once("cast", [thin], dtype, lambda: thin.to(dtype))


@contextlib.contextmanager
def _copied(
    of: Tensors, n: int, k: int, dtype: torch.dtype, fill: Callable[[torch.Tensor], None]
) -> Iterator[torch.Tensor]:
    """A dense [n, k] matrix that ``fill`` makes of the tensors ``of``: in the scratch, or once (:func:`dense_once`)."""
    made = _once.get()
    if made is None:
        with _scratch_rows(of[0], n, k, dtype) as out:
            fill(out)
            yield out
        return
    key = (n, k, dtype, *(t.data_ptr() for t in of))
    if key not in made:
        out = torch.empty(n, k, dtype=dtype, device=of[0].device)
        fill(out)
        made[key] = out
    yield made[key]


def _fill(outs: Tensors, weight: Tensors, quant: Tensors, blocks: Sequence[int]) -> None:
    """Write weights to ``outs``, [N, K] each, which lie behind each other. The lists hold all weights' in a row."""
    if quant:
        each = len(quant) // len(weight)
        scales = [quant_args(quant[i : i + each]) for i in range(0, len(quant), each)]
        nf4.dequantize_into(outs, [w.contiguous() for w in weight], scales, blocks)
    else:
        for out, w in zip(outs, weight, strict=True):
            out.copy_(w)


@contextlib.contextmanager
def dense(
    weight: torch.Tensor, quant: Tensors, shape: Sequence[int], blocksize: int, blocksize2: int, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """The weight as a dense [N, K] matrix in ``dtype``: itself where it is one, else a copy in the scratch."""
    if not quant and weight.dtype == dtype:
        yield weight
        return
    n, k = shape if quant else weight.shape
    with _copied([weight], n, k, dtype, lambda out: _fill([out], [weight], quant, (blocksize, blocksize2))) as out:
        yield out


@dataclass
class _Call:
    """A call of a compiled graph. ``inputs``: where those of its inputs are that ops may ask for in another dtype, None
    where that is known; ``asked``: for which they did; ``made``: what was made before, as :func:`once` gives it."""

    inputs: dict[tuple[int, torch.Size], int] | None = None
    asked: dict[tuple[str, torch.dtype, tuple[int, ...]], None] = field(default_factory=dict)
    made: dict[Any, Any] = field(default_factory=dict)

    def find(self, key: tuple[Any, ...]) -> Any:
        if self.inputs is not None:
            how, dtype, *of = key
            positions = tuple(self.inputs.get(one, -1) for one in of)
            if min(positions) >= 0:
                self.asked[how, dtype, positions] = None
        return self.made.get(key)


_call: contextvars.ContextVar[_Call | None] = contextvars.ContextVar("call", default=None)


class _Plan:
    """What of a graph's inputs is made in one dtype: for each of ``asked`` one adapter or more. Those of as many
    columns lie below each other, parts of one tensor that one call makes: parts of a flat one take two each, and a step
    begins with this.
    """

    def __init__(self, dtype: torch.dtype, asked: Sequence[tuple[str, tuple[int, ...]]], inputs: Any) -> None:
        self.dtype = dtype
        pieces = [(i, at) for at, (_, of) in enumerate(asked) for i in of]
        pieces.sort(key=lambda piece: inputs[piece[0]].shape[1])  # what is stacked stays together
        self.of = [i for i, _ in pieces]
        #: Columns, and the rows of each piece.
        self.groups = [
            (columns, [inputs[i].shape[0] for i in group])
            for columns, group in itertools.groupby(self.of, lambda i: inputs[i].shape[1])
        ]
        #: Of each of ``asked``: how, its shapes, and which pieces it is.
        self.rows: list[tuple[str, list[torch.Size], list[int]]] = [
            (how, [inputs[i].shape for i in of], [k for k, piece in enumerate(pieces) if piece[1] == at])
            for at, (how, of) in enumerate(asked)
        ]
        self.addresses: list[int] = []
        self.keys: list[Any] = []

    def make(self, inputs: Any, made: dict[Any, Any]) -> list[torch.Tensor]:
        """Make all of it; returns what it is made of."""
        thin, views = [inputs[i] for i in self.of], list[torch.Tensor]()
        for columns, rows in self.groups:
            below = torch.empty(sum(rows), columns, dtype=self.dtype, device=thin[0].device)
            views += below.split_with_sizes(rows)
        torch._foreach_copy_(views, thin)
        addresses = [t.data_ptr() for t in thin]
        if addresses != self.addresses:  # adapters stay where they are, as a rule
            self.addresses = addresses
            self.keys = [
                (how, self.dtype, *zip((addresses[k] for k in which), shapes, strict=True))
                for how, shapes, which in self.rows
            ]
        for key, (how, shapes, which) in zip(self.keys, self.rows, strict=True):
            first = views[which[0]]
            if how == "stack":
                made[key] = first.as_strided((sum(s[0] for s in shapes), shapes[0][1]), first.stride())
            else:
                made[key] = first if how == "cast" else [views[k] for k in which]
        return thin


class Rounded:
    """A compiled graph, ``call(inputs)``, that rounds all adapters before it begins, in a few launches, where each op
    would round its own: a model has hundreds, and their launches take the host longer than the products behind them.
    Which ones its first call tells. No number is kept from one call to the next.
    """

    def __init__(self, call: Callable[[Any], Any]) -> None:
        self.call = call
        self.plans: list[_Plan] | None = None

    def __call__(self, inputs: Any) -> Any:
        held: list[Any]
        if self.plans is None:
            held = [x if isinstance(x, torch.Tensor) and _is_thin(x) else None for x in inputs]
            mine = _Call({(x.data_ptr(), x.shape): i for i, x in enumerate(held) if x is not None})
        else:
            mine = _Call()
            held = [plan.make(inputs, mine.made) for plan in self.plans]
        token = _call.set(mine)
        try:
            result = self.call(inputs)
        finally:
            _call.reset(token)
        if self.plans is None:
            dtypes = dict.fromkeys(dtype for _, dtype, _ in mine.asked)
            self.plans = [
                _Plan(dtype, [(how, of) for how, kind, of in mine.asked if kind == dtype], held) for dtype in dtypes
            ]
        del held  # till now: an address is nobody else's
        return result


#: The highest rank of an adapter that is rounded with the others.
MOST_THIN = 512


def _is_thin(x: torch.Tensor) -> bool:
    """Whether a graph's input may be an adapter that is rounded with the others: cuBLAS finds each behind the one
    before in memory, at a multiple of 16 bytes."""
    return (
        x.dim() == 2
        and x.dtype == torch.float32
        and x.is_contiguous()
        and 0 < min(x.shape) <= MOST_THIN
        and x.numel() % WHOLE == 0
    )


#: cuBLAS reads 16 bytes at a time, 8 half-precision numbers: columns and rows that are added come in such numbers.
WHOLE = 8


def whole(n: int) -> int:
    """The rows that Σr rows of thin matrices take below the weights."""
    return -(-n // WHOLE) * WHOLE


@contextlib.contextmanager
def stacked(
    weight: Tensors, quant: Tensors, shape: Sequence[int], blocks: Sequence[int], below: Tensors, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """The weights of all layers, and the matrices ``below`` (any dtype), below each other in the scratch, with rows of
    zeros up to a whole number of 8 for ``below``: [ΣN + ⌈Σr⌉, K].
    """
    widths, k = shape[::2] if quant else [w.shape[0] for w in weight], shape[1] if quant else weight[0].shape[1]
    full, rank = sum(widths), sum(m.shape[0] for m in below)

    def fill(out: torch.Tensor) -> None:
        _fill(out[:full].split(list(widths)), weight, quant, blocks)
        if below:
            _copy_below(out[full : full + rank], below)
            out[full + rank :].zero_()

    with _copied([*weight, *below], full + whole(rank), k, dtype, fill) as out:
        yield out


def release_scratch() -> int:
    """Free the scratch that dequantised weights pass through (it comes back on use); returns the bytes freed."""
    with _scratch_lock:
        freed = sum(t.numel() * t.element_size() for t in _scratch.values())
        _scratch.clear()
    return freed


@contextlib.contextmanager
def each_dense(
    weight: Tensors, quant: Tensors, shape: Sequence[int], blocks: Sequence[int], dtype: torch.dtype
) -> Iterator[list[Any]]:
    """For each layer, what gives its dense weight (:func:`dense`). The lists hold all layers' in a row. Several in 4
    bits are below each other in the scratch, from one launch: so they are for as long as they take.
    """
    if quant and len(weight) > 1:
        with stacked(weight, quant, shape, blocks, (), dtype) as out:
            yield [contextlib.nullcontext(part) for part in out.split(list(shape[::2]))]
        return
    own = zip(weight, blocks[::2], blocks[1::2], strict=True)
    yield [dense(w, quant, shape, blocksize, blocksize2, dtype) for w, blocksize, blocksize2 in own]


def quant_args(quant: Tensors) -> nf4.Scales:
    """``quant`` as :func:`~fastft.kernels.nf4.nf4_dequantize` takes it: absmax, its code, its offset, its scales."""
    return (quant[0], *quant[1:]) if len(quant) == 4 else (quant[0], None, None, None)  # type: ignore[return-value]
