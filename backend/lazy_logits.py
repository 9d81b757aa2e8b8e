"""Logits that are computed when somebody reads them.

A model whose loss is fused with its head never needs [batch, seq, vocab] logits, but its output has a ``logits`` field.
:class:`LazyLogits` stands there: it holds the hidden states [..., hidden] and the head, says it has shape [..., vocab],
and

* row-wise operations (casts, slices of the leading dimensions, views that keep the vocabulary last, scaling by a
  number, ``softmax``, ``log_softmax``, ``exp``, the product of two of them) give another lazy tensor, and row-wise
  reductions (``logsumexp``, ``sum``, ``mean``, ``gather``, ``argmax``, ``max``, ``topk``, ``cross_entropy``) run over
  chunks of rows, forward and backward, those of a loss as :func:`linear_log_prob` does it: these are caught above
  autograd, in ``__torch_function__``;
* anything else computes the logits, once, with the very operations of the uncompiled model: caught below autograd, in
  ``__torch_dispatch__``, so that autograd sees ordinary logits whose gradient flows on into hidden states and head.

What cannot be right raises ``RuntimeError``: reading after the head's weight was changed (an optimizer step), and
reading a tensor of which a view was written to in place (lazy views do not share memory). A gradient with respect to
the logits themselves needs a hook, ``retain_grad`` or a plain copy (``logits + 0``): lazy operations pass by the tensor
they start from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from fastft import _torch_compat as compat
from fastft.kernels._linear_cross_entropy_chunks import chunk_rows
from fastft.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_prob

#: One row-wise operation on logits, by name, and its operand.
Step = tuple[str, Any]

_STEPS: dict[str, Callable[[torch.Tensor, Any], torch.Tensor]] = {
    "cast": lambda z, dtype: z.to(dtype),
    "mul": lambda z, number: z * number,
    "div": lambda z, number: z / number,
    "tanh": lambda z, _: torch.tanh(z),
    "log_softmax": lambda z, _: torch.log_softmax(z, dim=-1),
    "softmax": lambda z, _: torch.softmax(z, dim=-1),
    "exp": lambda z, _: torch.exp(z),
}


class _Memory:
    """Where the logits are once they were computed; shared by a tensor and what ``detach`` makes of it."""

    value: torch.Tensor | None = None


class _Family:
    """The lazy tensors that would share memory were they real. ``writer`` is the memory that was written to."""

    writer: _Memory | None = None


@dataclass(eq=False)
class _Source:
    """What one lazy tensor is computed from. ``hidden`` [..., hidden], ``weight`` and ``bias`` carry their history."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    head_dtype: torch.dtype
    steps: tuple[Step, ...]
    stamp: tuple[Any, ...]
    memory: _Memory = field(default_factory=_Memory)
    family: _Family = field(default_factory=_Family)

    def detached(self) -> _Source:
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], self.weight.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        return _dtype_after(self.steps, self.head_dtype)

    def check(self) -> None:
        """Raise unless computing the logits now gives what they were when the model ran."""
        if _stamp(self.hidden, self.weight, self.bias) != self.stamp:
            raise RuntimeError(
                "these logits were not read before the head's weight or the hidden states changed (optimizer.step(), a "
                "weight moved, merged or freed), so they cannot be computed any more: read outputs.logits before that "
                "(outputs.logits + 0 is a plain copy), or compile with options={'disable': ['linear_cross_entropy']}"
            )
        self.check_writes()

    def check_writes(self) -> None:
        if self.family.writer not in (None, self.memory):
            raise RuntimeError(
                "these logits were written to in place through a view of them, which lazy logits do not follow: make a "
                "plain copy with logits + 0 before writing, and take views of the copy"
            )

    def materialise(self) -> torch.Tensor:
        """The logits, without autograd history; computed once."""
        if self.memory.value is None:
            self.check()
            with torch.no_grad():
                self.memory.value = _evaluate(self.hidden.detach(), *_head(self), self.steps)
        self.check_writes()
        return self.memory.value


def _dtype_after(steps: Sequence[Step], dtype: torch.dtype) -> torch.dtype:
    raw = dtype
    for name, operand in steps:
        if name == "cast":
            dtype = operand
        elif name == "times":
            dtype = torch.promote_types(dtype, _dtype_after(operand, raw))
    return dtype


def _stamp(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Changes whenever one of the tensors is written to, moved or freed."""
    known = []
    for t in tensors:
        # A fake tensor, or one that another subclass wraps, has no memory to look at.
        if t is None or type(t) not in (torch.Tensor, torch.nn.Parameter):
            continue
        known.append((t._version, t.device, t.untyped_storage().size(), t.data_ptr()))
    return tuple(known)


def _head(source: _Source) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias in the dtype the head multiplies in, without history."""
    bias = None if source.bias is None else source.bias.detach().to(source.head_dtype)
    return source.weight.detach().to(source.head_dtype), bias


def _evaluate(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, steps: Sequence[Step]
) -> torch.Tensor:
    """The uncompiled model's own operations; ambient autocast is in ``weight``'s dtype already."""
    with torch.autocast(hidden.device.type, enabled=False):
        return _stepped(F.linear(hidden.to(weight.dtype), weight, bias), steps)


def _stepped(raw: torch.Tensor, steps: Sequence[Step]) -> torch.Tensor:
    z = raw
    for name, operand in steps:
        # "times": by what other steps make of the same logits.
        z = z * _stepped(raw, operand) if name == "times" else _STEPS[name](z, operand)
    return z


def _chunks(rows: int, vocab: int) -> list[slice]:
    # 4 bytes: steps and reductions usually widen a chunk to fp32.
    size = chunk_rows(rows, vocab, 4)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _itself(z: torch.Tensor) -> torch.Tensor:
    return z


class _ByRows(torch.autograd.Function):
    """``reduce(logits, *row_args)`` for a row-wise ``reduce``: [rows, vocab] → [rows, ...], chunk after chunk; so is
    its backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        source: _Source,
        reduce: Callable[..., torch.Tensor],
        *row_args: torch.Tensor,
    ) -> torch.Tensor:
        ctx.source, ctx.reduce = source, reduce
        ctx.save_for_backward(hidden, weight, bias, *row_args)
        rows = hidden.reshape(-1, hidden.shape[-1])
        flat = [a.reshape(rows.shape[0], *a.shape[hidden.dim() - 1 :]) for a in row_args]
        head = _head(source)
        parts = [
            reduce(_evaluate(rows[chunk], *head, source.steps), *(a[chunk] for a in flat))
            for chunk in _chunks(rows.shape[0], weight.shape[0]) or [slice(0, 0)]
        ]
        out = torch.cat(parts)
        if not out.is_floating_point():
            ctx.mark_non_differentiable(out)
        # No view, which could not be written to in place.
        return torch.ops.aten._unsafe_view(out, (*hidden.shape[:-1], *out.shape[1:]))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, *row_args = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        grads = _gradients(ctx.source, ctx.reduce, hidden, weight, bias, row_args, grad, need)
        return (*grads, *(None for _ in ctx.needs_input_grad[3:]))


def _gradients(
    source: _Source,
    reduce: Callable[..., torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    row_args: Sequence[torch.Tensor],
    grad: torch.Tensor,
    need: Sequence[bool],
) -> list[torch.Tensor | None]:
    """Gradients of hidden, weight and bias: each chunk is computed again with autograd on, the head's are summed in
    fp32.
    """
    rows = hidden.detach().reshape(-1, hidden.shape[-1])
    flat = [a.reshape(rows.shape[0], *a.shape[hidden.dim() - 1 :]) for a in row_args]
    grad = grad.reshape(rows.shape[0], *grad.shape[hidden.dim() - 1 :])
    head_weight, head_bias = _head(source)
    head = (head_weight.requires_grad_(need[1]), None if head_bias is None else head_bias.requires_grad_(need[2]))
    wide = torch.float64 if source.head_dtype == torch.float64 else torch.float32
    totals: list[torch.Tensor | None] = [
        torch.zeros_like(t, dtype=wide) if n and t is not None else None for t, n in zip(head, need[1:], strict=True)
    ]
    grad_hidden = torch.zeros_like(rows) if need[0] else None
    for chunk in _chunks(rows.shape[0], weight.shape[0]):
        part = rows[chunk].requires_grad_(need[0])
        with torch.enable_grad():
            out = reduce(_evaluate(part, *head, source.steps), *(a[chunk] for a in flat))
        operands = [t for t, n in zip((part, *head), need, strict=True) if n and t is not None]
        found = iter(torch.autograd.grad(out, operands, grad[chunk].to(out.dtype)))
        if grad_hidden is not None:
            grad_hidden[chunk] = next(found)
        for total in totals:
            if total is not None:
                total += next(found)
    like = (hidden, weight, bias)
    results = [None if grad_hidden is None else grad_hidden.view(hidden.shape), *totals]
    return [None if r is None or t is None else r.to(t.dtype) for r, t in zip(results, like, strict=True)]


class _Make(torch.autograd.Function):
    """The lazy tensor as autograd sees it: a function of hidden states and head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, source: _Source
    ) -> LazyLogits:
        # Without the computed logits, which must not live as long as the graph does.
        ctx.source = replace(source, memory=_Memory())
        ctx.save_for_backward(hidden, weight, bias)
        return LazyLogits(source)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, bias = ctx.saved_tensors
        return (*_gradients(ctx.source, _itself, hidden, weight, bias, (), grad, ctx.needs_input_grad[:3]), None)


def _make(source: _Source) -> LazyLogits:
    if not torch.is_grad_enabled():
        source = source.detached()
    made = _Make.apply(source.hidden, source.weight, source.bias, source)
    with torch._C.DisableTorchFunctionSubclass():
        made._node = made.grad_fn
    return made


class LazyLogits(torch.Tensor):
    """Logits [..., vocab] that are computed when read. Made by :func:`lazy_logits`."""

    _source: _Source
    _node: Any
    _watched: bool

    @staticmethod
    def __new__(cls, source: _Source) -> LazyLogits:
        made = torch.Tensor._make_wrapper_subclass(
            cls, source.shape, dtype=source.dtype, device=source.hidden.device, requires_grad=False
        )
        made._source, made._node, made._watched = source, None, False
        return made

    @classmethod
    @torch.compiler.disable
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            # Autograd keeps operands for backward through detach: the same logits, computed once for both.
            return LazyLogits(args[0]._source.detached())
        written = []
        if func._schema.is_mutable:
            written = [
                a
                for a, formal in zip(args, func._schema.arguments, strict=False)
                if isinstance(a, LazyLogits) and formal.alias_info is not None and formal.alias_info.is_write
            ]

        def real(x: Any) -> Any:
            return x._source.materialise() if isinstance(x, LazyLogits) else x

        plain_args, plain_kwargs = compat.tree_map(real, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        for lazy in written:
            lazy._source.family.writer = lazy._source.memory
            if result is lazy._source.memory.value:
                result = lazy
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(_plain(self))

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            wanted = self.requires_grad
        return self._source.materialise().detach().requires_grad_(wanted).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return _plain(self).__deepcopy__(memo)


def lazy_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    divisor: float = 1.0,
    dtype: torch.dtype | None = None,
    head_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Logits ``softcap(scale * linear(hidden, weight, bias) / divisor)`` as a tensor [..., vocab], computed when
    read.

    ``hidden`` [..., hidden], ``weight`` [vocab, hidden], ``bias`` [vocab] or None. ``head_dtype`` is what the head
    multiplies in (default: that of ``hidden``), ``dtype`` the logits' own (default: ``head_dtype``). Its gradient flows
    to hidden states, weight and bias. Raises ``ValueError`` when the shapes do not fit.
    """
    if weight.dim() != 2 or hidden.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"hidden {tuple(hidden.shape)} does not fit a head of [vocab, hidden] = {tuple(weight.shape)}")
    head_dtype = head_dtype or hidden.dtype
    steps = _steps(softcap, scale, divisor, None if dtype == head_dtype else dtype)
    return _make(_Source(hidden, weight, bias, head_dtype, steps, _stamp(hidden, weight, bias)))


def plain_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    divisor: float = 1.0,
    dtype: torch.dtype | None = None,
    head_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What :func:`lazy_logits` stands for, computed now."""
    head_dtype = head_dtype or hidden.dtype
    head = weight.to(head_dtype), None if bias is None else bias.to(head_dtype)
    return _evaluate(hidden, *head, _steps(softcap, scale, divisor, None if dtype == head_dtype else dtype))


def _steps(softcap: float | None, scale: float, divisor: float, cast: torch.dtype | None) -> tuple[Step, ...]:
    steps: list[Step] = [("mul", scale)] if scale != 1.0 else []
    if divisor != 1.0:
        steps.append(("div", divisor))
    if softcap is not None:
        steps += [("div", softcap), ("tanh", None), ("mul", softcap)]
    if cast is not None:
        steps.append(("cast", cast))
    return tuple(steps)


# ------------------------------------------------------------------------------------------------------ lazy operations

_HANDLERS: dict[Any, Callable[..., Any]] = {}


def _plain(lazy: LazyLogits) -> torch.Tensor:
    """The logits as an ordinary tensor, with autograd history."""
    with torch._C.DisableTorchFunctionSubclass():
        return torch.ops.aten.alias.default(lazy)


def _lazy(x: Any) -> bool:
    """Whether an operation may start from what ``x`` is computed from instead of from ``x``.

    Not when it was computed or written to already, nor when its gradient is somebody's: a hook, a leaf, or another
    function's output.
    """
    if not isinstance(x, LazyLogits) or x._watched or x._source.memory.value is not None:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        if x.requires_grad and (x.grad_fn is None or x.grad_fn is not x._node):
            return False
    x._source.check_writes()
    return True


def _handles(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a handler for these names of ``torch.Tensor``, ``torch`` and ``torch.nn.functional``. It gets a tensor that
    may be lazy as first operand.
    """

    def enter(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def guarded(x: Any = None, *args: Any, **kwargs: Any) -> Any:
            if x is None:
                x = kwargs.pop("input", None)
            return handler(x, *args, **kwargs) if _lazy(x) else NotImplemented

        for name in names:
            for owner in (torch.Tensor, torch, F):
                func = getattr(owner, name, None)
                if func is not None and not isinstance(func, torch.dtype):
                    _HANDLERS[func] = guarded
        return handler

    return enter


def _after(x: LazyLogits, *steps: Step) -> LazyLogits:
    """``x`` with more steps: new memory."""
    return _make(replace(x._source, steps=(*x._source.steps, *steps), memory=_Memory(), family=_Family()))


def _rows(x: LazyLogits, hidden: torch.Tensor) -> LazyLogits:
    """Other rows of ``x``: the same memory."""
    stamp = _stamp(hidden, x._source.weight, x._source.bias)
    x._source.check()
    return _make(replace(x._source, hidden=hidden, stamp=stamp, memory=_Memory()))


def _maths(steps: Sequence[Step], dtype: torch.dtype) -> dict[str, Any] | None:
    """The options with which :func:`linear_log_prob` makes of a head's output [of ``dtype``] what ``steps`` make; None
    if it has none.
    """
    scale, outer, tanh = 1.0, 1.0, False
    for name, operand in steps:
        if name == "cast":
            if operand == torch.float64 or torch.promote_types(dtype, operand) != operand:
                return None
            dtype = operand
        elif name in ("mul", "div"):
            factor = operand if name == "mul" else 1 / operand if operand else 0.0
            scale, outer = (scale, outer * factor) if tanh else (scale * factor, outer)
        elif name == "tanh" and not tanh:
            tanh = True
        else:
            return None
    if not tanh:
        return {"logit_scale": scale}
    # outer tanh(scale r) = cap tanh(cap scale r / cap) with cap = outer
    return {"softcap": outer, "logit_scale": outer * scale} if outer > 0 else None


def _reduced(x: Any, reduce: Callable[..., torch.Tensor], *row_args: torch.Tensor) -> torch.Tensor:
    source = x._source
    source.check()
    return _ByRows.apply(source.hidden, source.weight, source.bias, source, reduce, *row_args)


def _is_last(x: LazyLogits, dim: Any) -> bool:
    return isinstance(dim, int) and dim in (-1, x._source.hidden.dim() - 1)


def _leading(x: LazyLogits, dim: Any) -> int | None:
    """``dim`` counted from the front when it is one of the leading dimensions, else None."""
    rank = x._source.hidden.dim()
    if not isinstance(dim, int) or not -rank <= dim < rank or dim % rank == rank - 1:
        return None
    return dim % rank


def _cast(x: LazyLogits, dtype: torch.dtype) -> LazyLogits:
    return x if dtype == x._source.dtype else _after(x, ("cast", dtype))


for _name, _dtype in (
    ("float", torch.float32),
    ("half", torch.float16),
    ("bfloat16", torch.bfloat16),
    ("double", torch.float64),
):
    _handles(_name)(lambda x, *, memory_format=None, _dtype=_dtype: _cast(x, _dtype))


@_handles("to")
def _to(x: LazyLogits, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("copy") or kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
        return NotImplemented
    wanted = [*args[:2], *(kwargs.get(k) for k in ("device", "dtype", "other"))]
    dtype, device = x._source.dtype, x._source.hidden.device
    here = device
    for w in wanted:
        if isinstance(w, torch.dtype):
            dtype = w
        elif isinstance(w, torch.Tensor):
            dtype, device = w.dtype, w.device
        elif isinstance(w, (str, torch.device)) or (isinstance(w, int) and not isinstance(w, bool)):
            device = torch.device(w)
    if device.index is None and device.type == here.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    return _cast(x, dtype) if device == here and dtype.is_floating_point else NotImplemented


@_handles("type_as")
def _type_as(x: LazyLogits, other: torch.Tensor) -> Any:
    same = other.is_floating_point() and other.device == x._source.hidden.device
    return _cast(x, other.dtype) if same else NotImplemented


@_handles("type")
def _type(x: LazyLogits, dtype: Any = None, non_blocking: bool = False) -> Any:
    return _cast(x, dtype) if isinstance(dtype, torch.dtype) and dtype.is_floating_point else NotImplemented


@_handles("detach")
def _detach(x: LazyLogits) -> LazyLogits:
    with torch.no_grad():
        return _make(x._source)


@_handles("contiguous")
def _contiguous(x: LazyLogits, memory_format: Any = torch.contiguous_format) -> Any:
    return x if memory_format in (torch.contiguous_format, torch.preserve_format) else NotImplemented


@_handles("clone")
def _clone(x: LazyLogits, *, memory_format: Any = None) -> LazyLogits:
    return _after(x)


@_handles("mul", "multiply", "__mul__", "__rmul__")
def _mul(x: LazyLogits, other: Any, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    if _lazy(other) and _same_rows(x._source, other._source):
        return _after(x, ("times", other._source.steps))
    return _after(x, ("mul", other)) if _is_number(other) else NotImplemented


def _same_rows(a: _Source, b: _Source) -> bool:
    """Whether two are computed of the same hidden states, by the same head."""
    return (a.hidden is b.hidden, a.weight is b.weight, a.bias is b.bias, a.head_dtype) == (True,) * 3 + (b.head_dtype,)


@_handles("neg", "negative", "__neg__")
def _neg(x: LazyLogits) -> LazyLogits:
    return _after(x, ("mul", -1))


@_handles("exp")
def _exp(x: LazyLogits, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _after(x, ("exp", None))


@_handles("div", "divide", "true_divide", "__truediv__")
def _div(x: LazyLogits, other: Any, **kwargs: Any) -> Any:
    return _after(x, ("div", other)) if _is_number(other) and not kwargs else NotImplemented


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _normalised(step: str) -> Callable[..., Any]:
    def handler(x: LazyLogits, dim: Any = None, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
        dtype = next((a for a in args if isinstance(a, torch.dtype)), dtype)
        if not _is_last(x, dim) or (dtype is not None and not dtype.is_floating_point):
            return NotImplemented
        return _after(x, *([("cast", dtype)] if dtype is not None else []), (step, None))

    return handler


_handles("log_softmax")(_normalised("log_softmax"))
_handles("softmax")(_normalised("softmax"))


@_handles("__getitem__")
def _getitem(x: LazyLogits, index: Any) -> Any:
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(
        i is None or i is Ellipsis or (isinstance(i, (int, slice, torch.Tensor)) and not isinstance(i, bool))
        for i in items
    ):
        return NotImplemented
    rank = x._source.hidden.dim()

    def taken(i: Any) -> int:
        if i is None or i is Ellipsis:
            return 0
        return i.dim() if isinstance(i, torch.Tensor) and i.dtype == torch.bool else 1

    used = sum(map(taken, items))
    if used > rank:
        return NotImplemented  # the error is torch's
    full = slice(None)
    if Ellipsis in [i if i is Ellipsis else None for i in items]:
        at = next(n for n, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [full] * (rank - used)
    else:
        items += [full] * (rank - used)
    # The vocabulary must come out whole, and last.
    if any(i is Ellipsis for i in items) or not isinstance(items[-1], slice) or items[-1] != full:
        return NotImplemented
    return _rows(x, x._source.hidden[tuple(items)])


@_handles("view", "reshape", "view_as", "reshape_as")
def _view(x: LazyLogits, *size: Any, **kwargs: Any) -> Any:
    if "shape" in kwargs or "size" in kwargs:
        size = (kwargs.get("shape", kwargs.get("size")),)
    if len(size) == 1 and isinstance(size[0], torch.Tensor):
        size = (tuple(size[0].shape),)
    if len(size) == 1 and isinstance(size[0], (tuple, list)):
        size = tuple(size[0])
    if not size or not all(isinstance(s, int) for s in size):
        return NotImplemented  # a view as another dtype
    wanted = torch.empty(x._source.shape, device="meta").view(size).shape
    if not wanted or wanted[-1] != x._source.shape[-1]:
        return NotImplemented
    return _rows(x, x._source.hidden.reshape(*wanted[:-1], x._source.hidden.shape[-1]))


@_handles("flatten")
def _flatten(x: LazyLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = _leading(x, start_dim), _leading(x, end_dim)
    return NotImplemented if start is None or end is None else _rows(x, x._source.hidden.flatten(start, end))


@_handles("unsqueeze")
def _unsqueeze(x: LazyLogits, dim: int) -> Any:
    rank = x._source.hidden.dim()
    dim = dim + rank + 1 if dim < 0 else dim
    return _rows(x, x._source.hidden.unsqueeze(dim)) if 0 <= dim < rank else NotImplemented


@_handles("squeeze")
def _squeeze(x: LazyLogits, dim: Any = None) -> Any:
    at = _leading(x, dim)
    return NotImplemented if at is None else _rows(x, x._source.hidden.squeeze(at))


@_handles("unbind")
def _unbind(x: LazyLogits, dim: int = 0) -> Any:
    at = _leading(x, dim)
    return NotImplemented if at is None else tuple(_rows(x, h) for h in x._source.hidden.unbind(at))


@_handles("__iter__")
def _iter(x: LazyLogits) -> Any:
    found = _unbind(x, 0)
    return NotImplemented if found is NotImplemented else iter(found)


@_handles("split")
def _split(x: LazyLogits, split_size: Any = None, dim: int = 0, *, split_size_or_sections: Any = None) -> Any:
    at, size = _leading(x, dim), split_size if split_size is not None else split_size_or_sections
    return NotImplemented if at is None else tuple(_rows(x, h) for h in x._source.hidden.split(size, at))


@_handles("chunk")
def _chunk(x: LazyLogits, chunks: int, dim: int = 0) -> Any:
    at = _leading(x, dim)
    return NotImplemented if at is None else tuple(_rows(x, h) for h in x._source.hidden.chunk(chunks, at))


@_handles("logsumexp")
def _logsumexp(x: LazyLogits, dim: Any, keepdim: bool = False, **kwargs: Any) -> Any:
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if kwargs or not _is_last(x, dim):
        return NotImplemented
    return _reduced(x, functools.partial(torch.logsumexp, dim=-1, keepdim=keepdim))


def _total(name: str) -> Callable[..., Any]:
    def handler(x: LazyLogits, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, **kwargs: Any) -> Any:
        dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        if kwargs or not _is_last(x, dim):
            return NotImplemented
        return _reduced(x, functools.partial(getattr(torch, name), dim=-1, keepdim=keepdim, dtype=dtype))

    return handler


_handles("sum")(_total("sum"))
_handles("mean")(_total("mean"))


@_handles("max")
def _max(x: LazyLogits, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    if kwargs or not _is_last(x, dim):
        return NotImplemented
    # The gradient of the largest goes to where it was found.
    where = _reduced(x.detach(), functools.partial(torch.argmax, dim=-1, keepdim=True))
    largest = _reduced(x, _pick, where)
    return torch.return_types.max((largest, where) if keepdim else (largest.squeeze(-1), where.squeeze(-1)))


def _largest(z: torch.Tensor, k: int, sorted: bool) -> torch.Tensor:
    return z.topk(k, dim=-1, sorted=sorted).indices


@_handles("topk")
def _topk(x: LazyLogits, k: int, dim: Any = -1, largest: bool = True, sorted: bool = True, **kwargs: Any) -> Any:
    if kwargs or not largest or not _is_last(x, dim):
        return NotImplemented
    where = _reduced(x.detach(), functools.partial(_largest, k=k, sorted=sorted))
    return torch.return_types.topk((_reduced(x, _pick, where), where))


@_handles("amax")
def _amax(x: LazyLogits, dim: Any = (), keepdim: bool = False, **kwargs: Any) -> Any:
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    if kwargs or not _is_last(x, dim):
        return NotImplemented
    return _reduced(x, functools.partial(torch.amax, dim=-1, keepdim=keepdim))


@_handles("argmax")
def _argmax(x: LazyLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not _is_last(x, dim):
        return NotImplemented
    return _reduced(x, functools.partial(torch.argmax, dim=-1, keepdim=keepdim))


def _pick(z: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return z.gather(-1, index)


@_handles("gather")
def _gather(x: LazyLogits, dim: Any, index: torch.Tensor, **kwargs: Any) -> Any:
    # torch lets the index be smaller than the leading dimensions; lazily only whole rows are taken.
    if kwargs or not _is_last(x, dim) or tuple(index.shape[:-1]) != x._source.shape[:-1]:
        return NotImplemented
    found = _log_prob(x, index) if index.shape[-1] == 1 else None
    return _reduced(x, _pick, index) if found is None else found


def _log_prob(x: LazyLogits, index: torch.Tensor) -> torch.Tensor | None:
    """``x.gather(-1, index)`` [..., 1] by the op of the head and its loss, where ``x`` are log-probabilities."""
    source = x._source
    names = [name for name, _ in source.steps]
    if names.count("log_softmax") != 1:
        return None
    at = names.index("log_softmax")
    maths, after = _maths(source.steps[:at], source.head_dtype), source.steps[at + 1 :]
    wide = _dtype_after(source.steps[:at], source.head_dtype)
    if maths is None or "times" in names or not _differ(after) or not _fits(source, index):
        return None
    source.check()
    rows = source.hidden.reshape(-1, source.hidden.shape[-1])
    # No label is ignored: a wrong one is an error, as it is for gather.
    head = (source.weight, source.bias, index.reshape(-1))
    found = linear_log_prob(rows, *head, ignore_index=-(2**31), dtype=source.head_dtype, **maths).log_prob
    return _stepped(found.view(index.shape).to(wide), after)


def _differ(steps: Sequence[Step]) -> bool:
    """Whether steps act on each value by itself."""
    return all(name in ("cast", "mul", "div", "exp", "tanh") for name, _ in steps)


def _fits(source: _Source, labels: torch.Tensor) -> bool:
    """Whether the op takes this head and these labels."""
    float64 = torch.float64 in (source.hidden.dtype, source.head_dtype)
    return labels.dtype == torch.int64 and labels.device == source.hidden.device and not float64


@_handles("nll_loss")
def _nll_loss(x: LazyLogits, target: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    steps = x._source.steps
    if not steps or steps[-1][0] != "log_softmax":
        return NotImplemented
    before = _make(replace(x._source, steps=steps[:-1], memory=_Memory()))
    return _cross_entropy(before, target, *args, **kwargs)


@_handles("cross_entropy")
def _cross_entropy(
    x: LazyLogits,
    target: torch.Tensor,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    classes = x._source.hidden.dim() == 2 and target.dim() == 1 and not target.is_floating_point()
    plain = weight is None and size_average is None and reduce is None
    if not classes or not plain or len(target) != x._source.shape[0] or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    source = x._source
    maths = _maths(source.steps, source.head_dtype)
    if maths is not None and _fits(source, target):
        source.check()
        maths |= {"ignore_index": ignore_index, "reduction": reduction, "dtype": source.head_dtype}
        maths["label_smoothing"] = label_smoothing
        return linear_cross_entropy(source.hidden, source.weight, source.bias, target, **maths).to(source.dtype)
    one = functools.partial(
        F.cross_entropy, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    losses = _reduced(x, one, target)
    if reduction == "none":
        return losses
    total = losses.sum(dtype=torch.promote_types(losses.dtype, torch.float32))
    return (total if reduction == "sum" else total / (target != ignore_index).sum()).to(losses.dtype)


# ---------------------------------------------------------------------------- what needs memory, or somebody's gradient


def _real(name: str) -> None:
    method = getattr(torch.Tensor, name, None)
    if method is not None:
        _HANDLERS[method] = lambda x, *args, **kwargs: method(_plain(x), *args, **kwargs)


for _name in ("data_ptr", "numpy", "tolist", "__array__", "item", "untyped_storage", "storage", "__dlpack__"):
    _real(_name)


def _watch(name: str) -> None:
    """From now on gradients must pass through this very tensor."""

    def handler(x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, LazyLogits):
            x._watched = True
        return NotImplemented

    _HANDLERS[getattr(torch.Tensor, name)] = handler


for _name in ("register_hook", "register_post_accumulate_grad_hook", "retain_grad", "requires_grad_"):
    _watch(_name)


def _setitem(x: Any, *args: Any, **kwargs: Any) -> Any:
    # torch writes through a view of x, which the dispatcher does not show as a write to x.
    if isinstance(x, LazyLogits):
        x._source.materialise()
        x._source.family.writer = x._source.memory
    return NotImplemented


_HANDLERS[torch.Tensor.__setitem__] = _setitem
