"""Dense copies of weights that are stored otherwise (4 bits, another dtype), for one product at a time."""

from __future__ import annotations

import contextlib
import contextvars
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
    key = (how, dtype, *((t.data_ptr(), t.shape) for t in of))
    if call is not None and (found := call.find(key)) is not None:
        return found  # type: ignore[no-any-return]
    if made is None:
        return make()
    if key not in made:
        made[key] = make()
    return made[key]  # type: ignore[no-any-return]


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


class Rounded:
    """A compiled graph, ``call(inputs)``, that rounds all adapters before it begins, in a few launches, where each op
    would round its own: a model has hundreds, and their launches take the host longer than the products behind them.
    Which ones its first call tells. Nothing is kept from one call to the next.
    """

    def __init__(self, call: Callable[[Any], Any]) -> None:
        self.call = call
        self.asked: list[tuple[str, torch.dtype, tuple[int, ...]]] | None = None

    def __call__(self, inputs: Any) -> Any:
        if self.asked is None:
            own = enumerate(inputs)
            mine = _Call({(x.data_ptr(), x.shape): i for i, x in own if isinstance(x, torch.Tensor) and _is_thin(x)})
        else:
            mine = _Call()
            held = [self._make(inputs, dtype, mine) for dtype in dict.fromkeys(dtype for _, dtype, _ in self.asked)]
        token = _call.set(mine)
        try:
            result = self.call(inputs)
        finally:
            _call.reset(token)
        if self.asked is None:
            self.asked = list(mine.asked)
        else:
            del held  # till now: an address is nobody else's
        return result

    def _make(self, inputs: Any, dtype: torch.dtype, into: _Call) -> list[torch.Tensor]:
        """Make all that is asked for in ``dtype``; returns what it is made of."""
        assert self.asked is not None
        mine = [(how, of) for how, kind, of in self.asked if kind == dtype]
        thin = [inputs[i] for _, of in mine for i in of]
        sizes = [t.numel() for t in thin]
        flat = torch.empty(sum(sizes), dtype=dtype, device=thin[0].device)
        views = compat().views_like(flat, thin)
        torch._foreach_copy_(views, thin)
        at = start = 0
        for how, of in mine:
            parts, end = views[at : at + len(of)], start + sum(sizes[at : at + len(of)])
            whole_ = flat[start:end].view(-1, parts[0].shape[1]) if how == "stack" else None
            key = (how, dtype, *((t.data_ptr(), t.shape) for t in thin[at : at + len(of)]))
            into.made[key] = {"cast": parts[0], "stack": whole_, "each": parts}[how]
            at, start = at + len(of), end
        return thin


def _is_thin(x: torch.Tensor) -> bool:
    """Whether a graph's input may be an adapter that is rounded with the others: cuBLAS finds each behind the one
    before in memory, at a multiple of 16 bytes."""
    return x.dim() == 2 and x.dtype == torch.float32 and x.is_contiguous() and x.numel() > 0 and x.numel() % WHOLE == 0


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
    sizes = [m.shape[0] for m in below]
    full, rank = sum(widths), sum(sizes)

    def fill(out: torch.Tensor) -> None:
        _fill(out[:full].split(list(widths)), weight, quant, blocks)
        if below:
            torch._foreach_copy_(list(out[full : full + rank].split(sizes)), list(below))
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
