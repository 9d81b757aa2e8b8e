"""One canonical way to look at a node of a Dynamo graph, whatever way its author spelled it.

``see(node)`` answers ``Seen(op, args)``: a lower-case name of the field (``"mul"``, ``"cast"``, ``"linear"``) and its
operands in a fixed order.
``x * y``, ``torch.mul(x, y)`` and ``x.mul(y)`` are all ``Seen("mul", (x, y))``. The graph itself is left as it is.
In-place spellings are never seen as the functional op: they come back as ``"in_place"``, which no rule matches.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx


class Seen(NamedTuple):
    """An op by its canonical name, and its operands: nodes, numbers, tuples, None."""

    op: str
    args: tuple[Any, ...] = ()


UNKNOWN = Seen("unknown")


def value(node: Any) -> Any:
    """The FakeTensor (or SymInt, number, tuple) that ``node`` had when it was traced; a non-node is its own value."""
    if not isinstance(node, fx.Node):
        return node
    return node.meta.get("example_value", node.meta.get("val"))


def dtype(node: Any) -> torch.dtype | None:
    """dtype of a node's tensor, None when it is none."""
    v = value(node)
    return v.dtype if isinstance(v, torch.Tensor) else None


def shape(node: Any) -> tuple[Any, ...]:
    """Shape of a node's tensor (ints or SymInts), ``()`` when it is none."""
    v = value(node)
    return tuple(v.shape) if isinstance(v, torch.Tensor) else ()


def rank(node: Any) -> int:
    """Number of dimensions of a node's tensor."""
    return len(shape(node))


def requires_grad(node: Any) -> bool:
    """Whether a node's tensor required a gradient when it was traced."""
    v = value(node)
    return isinstance(v, torch.Tensor) and v.requires_grad


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without adding a guard when they are symbolic."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


# Each entry turns (args, kwargs) into canonical operands. A name maps to the parameters to pick, in order, with their
# defaults. An argument that has no name here means something that no rule knows of: such a call is unknown.
def _pick(op: str, *names: str, **defaults: Any) -> Callable[[fx.Node], Seen]:
    def read(node: fx.Node) -> Seen:
        if len(node.args) > len(names) or not node.kwargs.keys() <= {*names, "memory_format"}:
            return UNKNOWN
        got = dict(zip(names, node.args, strict=False))
        got.update(node.kwargs)
        return Seen(op, tuple(got.get(n, defaults.get(n)) for n in names))

    return read


def _binary(op: str) -> Callable[[fx.Node], Seen]:
    def read(node: fx.Node) -> Seen:
        got = dict(zip(("input", "other"), node.args, strict=False)) | dict(node.kwargs)
        if len(node.args) > 2 or got.keys() != {"input", "other"}:  # alpha, rounding_mode
            return UNKNOWN
        return Seen(op, (got["input"], got["other"]))

    return read


def _cast(node: fx.Node) -> Seen:
    x = node.args[0]
    before, after = value(x), value(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.device != after.device:
        return UNKNOWN
    return Seen("cast", (x, after.dtype))


def _swap(op: str) -> Callable[[fx.Node], Seen]:
    def read(node: fx.Node) -> Seen:
        a, b = node.args[:2]
        return Seen(op, (b, a))

    return read


def _pow(node: fx.Node) -> Seen:
    if len(node.args) != 2:
        return UNKNOWN
    base, exponent = node.args
    if isinstance(exponent, (int, float)):
        if exponent == 2:
            return Seen("square", (base,))
        if exponent == -0.5:
            return Seen("rsqrt", (base,))
        if exponent == 0.5:
            return Seen("sqrt", (base,))
    return Seen("pow", (base, exponent))


def _mean(node: fx.Node) -> Seen:
    seen = _pick("mean", "input", "dim", "keepdim", "dtype", keepdim=False)(node)
    if seen is UNKNOWN:  # axis=, as numpy has it
        return UNKNOWN
    x, dim, keepdim, out_dtype = seen.args
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    last = dim == -1 or (isinstance(dim, int) and dim == rank(x) - 1)
    if last and keepdim and out_dtype in (None, dtype(x)):
        return Seen("mean_last", (x,))
    return Seen("mean", (x, dim, keepdim)) if out_dtype in (None, dtype(x)) else UNKNOWN


def _einsum(node: fx.Node) -> Seen:
    operands = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return Seen("einsum", (node.args[0], *operands)) if not node.kwargs else UNKNOWN


def _getitem(node: fx.Node) -> Seen:
    x, index = node.args[:2]
    if isinstance(value(x), torch.Tensor):
        return Seen("index", (x, index))
    return Seen("getitem", (x, index))


def _dims(op: str) -> Callable[[fx.Node], Seen]:
    def read(node: fx.Node) -> Seen:
        sizes = node.args[1:]
        if node.kwargs or any(isinstance(s, torch.dtype) for s in sizes):  # x.view(torch.int8) reads the bits anew
            return UNKNOWN
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = tuple(sizes[0])
        return Seen(op, (node.args[0], tuple(sizes)))

    return read


def _dropout(node: fx.Node) -> Seen:
    seen = _pick("dropout", "input", "p", "training", "inplace", p=0.5, training=True, inplace=False)(node)
    return seen if seen is UNKNOWN else Seen("dropout", seen.args[:3])


def _activation(op: str) -> Callable[[fx.Node], Seen]:
    def read(node: fx.Node) -> Seen:
        seen = _pick(op, "input", "inplace")(node)
        return seen if seen is UNKNOWN else Seen(op, seen.args[:1])

    return read


_log_softmax = _pick("log_softmax", "input", "dim", "dtype")


def _log_softmax_of_nn(node: fx.Node) -> Seen:
    seen = _pick("log_softmax", "input", "dim", "_stacklevel", "dtype")(node)
    return seen if seen is UNKNOWN else Seen(seen.op, (*seen.args[:2], seen.args[3]))


def _gelu(node: fx.Node) -> Seen:
    return Seen(
        "gelu_tanh" if node.kwargs.get("approximate", "none") == "tanh" else "gelu",
        (node.args[0] if node.args else node.kwargs["input"],),
    )


_FUNCTIONS: dict[Any, Callable[[fx.Node], Seen]] = {
    operator.neg: _pick("neg", "input"),
    torch.neg: _pick("neg", "input"),
    torch.rsqrt: _pick("rsqrt", "input"),
    torch.sqrt: _pick("sqrt", "input"),
    torch.square: _pick("square", "input"),
    torch.reciprocal: _pick("reciprocal", "input"),
    operator.pow: _pow,
    torch.pow: _pow,
    torch.mean: _mean,
    torch.tanh: _pick("tanh", "input"),
    torch.sigmoid: _pick("sigmoid", "input"),
    torch._C._nn.linear: _pick("linear", "input", "weight", "bias"),
    torch.matmul: _binary("matmul"),
    operator.matmul: _binary("matmul"),
    torch.einsum: _einsum,
    F.silu: _activation("silu"),
    F.relu: _activation("relu"),
    torch.relu: _pick("relu", "input"),
    torch._C._nn.gelu: _gelu,
    F.gelu: _gelu,
    F.dropout: _dropout,
    F.layer_norm: _pick("layer_norm", "input", "normalized_shape", "weight", "bias", "eps", eps=1e-5),
    torch._C._nn.scaled_dot_product_attention: _pick(
        "sdpa",
        "query",
        "key",
        "value",
        "attn_mask",
        "dropout_p",
        "is_causal",
        "scale",
        "enable_gqa",
        dropout_p=0.0,
        is_causal=False,
        enable_gqa=False,
    ),
    F.cross_entropy: _pick(
        "cross_entropy",
        "input",
        "target",
        "weight",
        "size_average",
        "ignore_index",
        "reduce",
        "reduction",
        "label_smoothing",
        ignore_index=-100,
        reduction="mean",
        label_smoothing=0.0,
    ),
    F.nll_loss: _pick(
        "nll_loss",
        "input",
        "target",
        "weight",
        "size_average",
        "ignore_index",
        "reduce",
        "reduction",
        ignore_index=-100,
        reduction="mean",
    ),
    F.log_softmax: _log_softmax_of_nn,
    torch.log_softmax: _log_softmax,
    torch.logsumexp: _pick("logsumexp", "input", "dim", "keepdim", keepdim=False),
    torch.gather: _pick("gather", "input", "dim", "index"),
    torch.cat: _pick("cat", "tensors", "dim", dim=0),
    torch.chunk: _pick("chunk", "input", "chunks", "dim", dim=0),
    torch.split: _pick("split", "input", "split_size", "dim", dim=0),
    torch._C._nn.pad: _pick("pad", "input", "pad", "mode", "value", mode="constant"),
    torch.softmax: _pick("softmax", "input", "dim", "dtype"),
    F.softmax: _pick("softmax", "input", "dim", "_stacklevel", "dtype"),
    torch.exp: _pick("exp", "input"),
    torch.log: _pick("log", "input"),
    torch.stack: _pick("stack", "tensors", "dim", dim=0),
    torch.reshape: _dims("view"),
    torch.permute: _dims("permute"),
    torch.flatten: _pick("flatten", "input", "start_dim", "end_dim", start_dim=0, end_dim=-1),
    torch.squeeze: _pick("squeeze", "input", "dim"),
    torch.unsqueeze: _pick("unsqueeze", "input", "dim"),
    torch.transpose: _pick("transpose", "input", "dim0", "dim1"),
    torch.clone: _pick("clone", "input"),
    operator.getitem: _getitem,
}
if hasattr(F, "rms_norm"):
    _FUNCTIONS[F.rms_norm] = _pick("rms_norm", "input", "normalized_shape", "weight", "eps")
    _FUNCTIONS[torch.rms_norm] = _pick("rms_norm", "input", "normalized_shape", "weight", "eps")
for _name in ("mul", "add", "sub"):
    _FUNCTIONS[getattr(operator, _name)] = _FUNCTIONS[getattr(torch, _name)] = _binary(_name)
for _target in (operator.truediv, torch.div, torch.true_divide):
    _FUNCTIONS[_target] = _binary("div")

_METHODS: dict[str, Callable[[fx.Node], Seen]] = {
    "mul": _binary("mul"),
    "add": _binary("add"),
    "sub": _binary("sub"),
    "div": _binary("div"),
    "matmul": _binary("matmul"),
    "__mul__": _binary("mul"),
    "__rmul__": _swap("mul"),
    "__radd__": _swap("add"),
    "neg": _pick("neg", "input"),
    "rsqrt": _pick("rsqrt", "input"),
    "sqrt": _pick("sqrt", "input"),
    "square": _pick("square", "input"),
    "pow": _pow,
    "mean": _mean,
    "tanh": _pick("tanh", "input"),
    "sigmoid": _pick("sigmoid", "input"),
    "relu": _pick("relu", "input"),
    "exp": _pick("exp", "input"),
    "log": _pick("log", "input"),
    "contiguous": _pick("contiguous", "input"),
    "clone": _pick("clone", "input"),
    "view": _dims("view"),
    "reshape": _dims("view"),
    "expand": _dims("expand"),
    "permute": _dims("permute"),
    "flatten": _pick("flatten", "input", "start_dim", "end_dim", start_dim=0, end_dim=-1),
    "transpose": _pick("transpose", "input", "dim0", "dim1"),
    "unsqueeze": _pick("unsqueeze", "input", "dim"),
    "squeeze": _pick("squeeze", "input", "dim"),
    "chunk": _pick("chunk", "input", "chunks", "dim", dim=0),
    "split": _pick("split", "input", "split_size", "dim", dim=0),
    "softmax": _pick("softmax", "input", "dim", "dtype"),
    "log_softmax": _log_softmax,
    "logsumexp": _pick("logsumexp", "input", "dim", "keepdim", keepdim=False),
    "gather": _pick("gather", "input", "dim", "index"),
    "size": _pick("size", "input", "dim"),
    **{m: _cast for m in ("to", "float", "half", "bfloat16", "double", "type_as", "type")},
}

_IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.imatmul, operator.setitem,
}  # fmt: skip
_IN_PLACE_METHODS = {f"__{f.__name__}__" for f in _IN_PLACE if f is not operator.setitem} | {"__setitem__"}

#: Ops that move no numbers: a value seen through them is the same value in another shape.
VIEWS = {
    "view",
    "expand",
    "permute",
    "flatten",
    "transpose",
    "unsqueeze",
    "squeeze",
    "chunk",
    "split",
    "getitem",
    "index",
}


def in_place(node: fx.Node) -> bool:
    """Whether a node writes to one of its operands (``x += y`` on tensors, ``x.mul_(y)``, ``x[i] = y``, ``out=``)."""
    return bool(written(node))


def written(node: fx.Node) -> tuple[Any, ...]:
    """The operands whose memory a node writes to; empty for a functional op."""
    if node.op == "call_method":
        name = str(node.target)
        ours = name in _IN_PLACE_METHODS or (name.endswith("_") and not name.endswith("__"))
        return node.args[:1] if ours else ()
    if node.op != "call_function":
        return ()
    first = node.args[:1] or (node.kwargs.get("input"),)
    if node.target in _IN_PLACE:  # on numbers and tuples these make a new value
        return first if isinstance(value(first[0]), torch.Tensor) else ()
    if getattr(node.target, "__module__", "") == "_operator":  # and_, or_: the underscore is there for Python's keyword
        return ()
    if (out := node.kwargs.get("out")) is not None:
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)
    schema = getattr(_overload(node.target), "_schema", None)
    if schema is not None:
        given = dict(enumerate(node.args)) | dict(node.kwargs)
        parameters = [
            (i, a) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
        return tuple(given[k] for i, a in parameters for k in (i, a.name) if isinstance(given.get(k), fx.Node))
    position = _inplace_position(node.target)
    if node.kwargs.get("inplace", position is not None and len(node.args) > position and node.args[position]) is True:
        return first
    name = getattr(node.target, "__name__", "")
    by_name = name.endswith("_") and not name.endswith("__") and isinstance(value(node), torch.Tensor)
    return first if by_name else ()


def _overload(target: Any) -> Any:
    """The overload that ``torch.ops.library.op`` stands for when it has only one; any other target is itself."""
    names = getattr(target, "overloads", None)
    return getattr(target, names()[0]) if callable(names) and len(names()) == 1 else target


@functools.cache
def _inplace_position(target: Any) -> int | None:
    """Where a function of torch.nn.functional takes ``inplace`` when it is not given by name."""
    try:
        names = list(inspect.signature(target).parameters)
    except (TypeError, ValueError):  # a builtin has no signature
        return None
    return names.index("inplace") if "inplace" in names else None


def see(node: Any) -> Seen:
    """The canonical view of a node; ``UNKNOWN`` when the op is not one that rules speak about, or the value is no
    node.
    """
    if not isinstance(node, fx.Node):
        return UNKNOWN
    if node.op == "placeholder":
        return Seen("input", (node,))
    if node.op not in ("call_function", "call_method"):
        return UNKNOWN
    if in_place(node):
        return Seen("in_place", tuple(node.args))
    if node.op == "call_function":
        try:
            read = _FUNCTIONS.get(node.target)
        except TypeError:  # an unhashable target
            return UNKNOWN
    else:
        read = _METHODS.get(str(node.target))
    return UNKNOWN if read is None else read(node)


def through(node: Any, *ops: str) -> Any:
    """Walk up from ``node`` through ops of these names (each has its input as first operand) to the first other node.

    ``"widen"`` stands for casts that lose nothing (bf16 → fp32); ``"cast"`` would also skip a rounding. ``"noop"``
    stands for what changes nothing: a cast to the same dtype, ``contiguous``, ``clone``, ``x[:]``, ``x * 1``,
    ``x + 0``, dropout at p = 0 or outside training.
    """
    while isinstance(node, fx.Node):
        seen = see(node)
        if seen.op in ops or ("noop" in ops and is_noop(seen)) or ("widen" in ops and is_widening(seen)):
            node = seen.args[0]
        else:
            return node
    return node


def is_widening(seen: Seen) -> bool:
    """Whether a seen op is a cast that every value survives exactly."""
    before = dtype(seen.args[0]) if seen.op == "cast" else None
    if before is None or torch.promote_types(before, seen.args[1]) != seen.args[1]:
        return False
    after_whole = not seen.args[1].is_floating_point and not seen.args[1].is_complex
    return before.is_floating_point or before.is_complex or before == torch.bool or after_whole  # 2**24 + 1 is no fp32


def is_noop(seen: Seen) -> bool:
    """Whether a seen op returns its first operand unchanged (up to memory layout)."""
    if seen.op in ("contiguous", "clone"):
        return True
    if seen.op == "cast":
        return dtype(seen.args[0]) == seen.args[1]
    if seen.op == "dropout":
        return seen.args[1] == 0 or seen.args[2] is False
    if seen.op == "index":
        index = seen.args[1] if isinstance(seen.args[1], (tuple, list)) else (seen.args[1],)
        return all(
            i is Ellipsis or (isinstance(i, slice) and i.start in (None, 0) and i.stop is None and i.step in (None, 1))
            for i in index
        )
    if seen.op in ("mul", "add"):
        neutral = 1 if seen.op == "mul" else 0
        kind = dtype(seen.args[0])  # a whole number times 1.0 is of another dtype
        number = isinstance(seen.args[1], (int, float)) and seen.args[1] == neutral
        return number and kind is not None and kind.is_floating_point
    return False
