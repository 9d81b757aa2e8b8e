"""PyTorch and Triton on sympy expressions: tensors whose elements are expressions, and what computes with them.

:class:`Exact` is such a tensor, and :class:`Interpreter` runs the aten operations of a body on arrays of expressions.
:func:`triton_bodies` runs the kernels' Python functions program by program, with a stand-in for ``triton.language``.
Elements are numbers of :data:`DIGITS` digits, or symbols.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import product, repeat
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import sympy
import torch
from numpy.lib.stride_tricks import as_strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastft.kernels import _maths, _rows
from tests.kernels._each import homes, parts

# ----------------------------------------------------------------------------------------------------- exact numbers

DIGITS = 40
#: Largest relative difference between two ways to the same number of DIGITS digits.
AGREE = 1e-30


class Digits:
    """How irrational constants are read: to :data:`DIGITS` digits among numbers, as they are among symbols."""

    symbolic = False


@functools.cache
def _constant(value: float, symbolic: bool) -> sympy.Expr:
    if math.isnan(value):
        return sympy.nan
    if math.isinf(value):
        return sympy.oo if value > 0 else -sympy.oo
    if value < 0:
        return -_constant(-value, symbolic)
    pi, near = sympy.pi, 2 * math.ulp(value)
    for c in (
        sympy.sqrt(2) / 2,
        1 / sympy.sqrt(2 * pi),
        sympy.sqrt(2 * pi),
        2 * sympy.sqrt(2 / pi),
        1 / sympy.log(2),
        sympy.log(2),
    ):
        if abs(float(c) - value) <= near:
            return c if symbolic else c.evalf(DIGITS)
    simple = Fraction(value).limit_denominator(10**6)
    return sympy.Rational(simple if abs(simple - Fraction(value)) <= near else Fraction(value))


def exact(value: Any) -> Any:
    """The number that a float in the code stands for: 0.044715 is 44715 / 10⁶, and 1.4426950408889634 is 1 / log 2."""
    return _constant(float(value), Digits.symbolic) if isinstance(value, (float, np.floating)) else value


def exactly(values: Any) -> np.ndarray:
    """An array of expressions out of anything; integers and booleans stay what they are."""
    array = np.asarray(values)
    if array.dtype.kind == "f":
        return np.frompyfunc(exact, 1, 1)(array) if array.ndim else np.array(exact(float(array)), dtype=object)
    return array


def unary(function: Callable[..., Any]) -> Callable[..., Any]:
    return np.frompyfunc(function, 1, 1)


def _same(a: Any, b: Any) -> bool:
    # sympy tells 0 from 0.0.
    return bool(a == b) or getattr(a - b, "is_zero", False) is True


#: |z| of a z whose sign nobody knows, as it stands: sympy would take it apart.
_MAGNITUDE = sympy.Function("magnitude")


def _abs(z: Any) -> Any:
    known = sympy.sympify(z).is_number or z.is_nonnegative
    return sympy.Abs(z) if known else _MAGNITUDE(z)


def _by_sign(at_least: Any, a: Any, b: Any) -> Any:
    """a where z ≥ 0, else b. Where nobody knows z's sign, with |z| as z in a and as −z in b, they must be one
    expression, and that is the result.
    """
    if at_least in (True, False):
        return a if at_least else b
    assert isinstance(at_least, sympy.Ge) and at_least.rhs == 0, f"a choice by {at_least}"
    z, t = at_least.lhs, sympy.Dummy("t", real=True)
    a, b = (e.xreplace({_MAGNITUDE(z): size}) for e, size in ((a, t), (b, -t)))
    assert sympy.simplify(a - b) == 0, f"{a} where {at_least}, else {b}"
    return a.xreplace({t: z})


EXP, LOG, TANH, ERF, ABS = (unary(f) for f in (sympy.exp, sympy.log, sympy.tanh, sympy.erf, _abs))
AT_LEAST, BY_SIGN = np.frompyfunc(sympy.Ge, 2, 1), np.frompyfunc(_by_sign, 3, 1)
SQRT, SIGMOID = unary(sympy.sqrt), unary(lambda z: 1 / (1 + sympy.exp(-z)))
MAX, MIN = np.frompyfunc(sympy.Max, 2, 1), np.frompyfunc(sympy.Min, 2, 1)
EQUAL = np.frompyfunc(_same, 2, 1)


def ratio(x: Any) -> sympy.Expr:
    """The number that a decimal stands for."""
    return sympy.Rational(str(x))


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "silu": lambda g: g / (1 + sympy.exp(-g)),
    "gelu": lambda g: g * (1 + sympy.erf(g / sympy.sqrt(2))) / 2,
    "gelu_tanh": lambda g: g / 2 * (1 + sympy.tanh(sympy.sqrt(2 / sympy.pi) * (g + ratio("0.044715") * g**3))),
}


# -------------------------------------------------------------------------------------------- PyTorch on expressions


class Exact(torch.Tensor):
    """A tensor of expressions: PyTorch's geometry (sizes, strides, offset) over a flat array of cells."""

    cells: np.ndarray

    @staticmethod
    def __new__(cls, cells: np.ndarray, like: torch.Tensor, requires_grad: bool = False) -> Exact:
        self = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), storage_offset=like.storage_offset(), dtype=like.dtype,
            requires_grad=requires_grad,
        )  # fmt: skip
        self.cells = cells
        return self

    @classmethod
    def of(cls, values: np.ndarray, dtype: torch.dtype, requires_grad: bool = False) -> Exact:
        flat = np.array(exactly(values), dtype=object).reshape(-1)
        return cls(flat, torch.empty(np.shape(values), dtype=dtype, device="meta"), requires_grad)

    @classmethod
    def blank(cls, like: torch.Tensor) -> Exact:
        """Memory that nobody has written: NaN."""
        span = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        return cls(np.full(like.storage_offset() + span, sympy.nan, dtype=object), like)

    @property
    def values(self) -> np.ndarray:
        """The elements, as a view of the cells."""
        if not self.numel():
            return np.empty(self.shape, dtype=object)
        return as_strided(self.cells[self.storage_offset() :], self.shape, [8 * s for s in self.stride()])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Exact({self.values.tolist()})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return interpret(func, args, kwargs or {})


def to_meta(t: Any) -> Any:
    """The geometry of a tensor: itself, without its elements."""
    if not isinstance(t, torch.Tensor):
        return t
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    base = torch.empty(t.storage_offset() + span, dtype=t.dtype, device="meta")
    return base.as_strided(t.shape, t.stride(), t.storage_offset())


def interpret(func: Any, args: Any, kwargs: Any) -> Any:
    """An aten operation (or one of fastft's raw ops) on tensors of which some are :class:`Exact`."""
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if func.namespace == "fastft":
        with Interpreter():  # the op's own body
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
    name, schema = func._opname, func._schema
    if not any(isinstance(t, Exact) for t in given):
        out = func(*args, **kwargs)
        ours = isinstance(out, torch.Tensor) and out.is_floating_point() and not out.is_meta
        return Exact.of(out.numpy(), out.dtype) if ours and (not given or name in FACTORIES) else out
    if name.startswith("_foreach_"):
        each = zip(*(a if isinstance(a, (list, tuple)) else repeat(a, len(args[0])) for a in args), strict=True)
        made = [getattr(torch.ops.aten, name.removeprefix("_foreach_"))(*one) for one in each]
        return None if name.endswith("_") else made
    if name == "is_same_size":
        return args[0].shape == args[1].shape
    meta_args, meta_kwargs = tree_map(to_meta, (args, kwargs))
    if "device" in meta_kwargs:
        meta_kwargs["device"] = "meta"
    writes = [a for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    if any(r.alias_info is not None for r in schema.returns) and not writes:  # a view
        (source,) = (t for t in given if isinstance(t, Exact))
        return tree_map(lambda m: Exact(source.cells, m), func(*meta_args, **meta_kwargs))
    layout = func(*meta_args, **meta_kwargs)
    if name in ("empty_like", "new_empty", "empty_strided", "new_empty_strided"):
        return Exact.blank(layout) if layout.dtype.is_floating_point else torch.empty_like(layout, device="cpu")
    if writes:  # in place, or into ``out``
        target = kwargs.pop("out") if "out" in kwargs else args[0]
        found = compute(name.removesuffix("_"), args, kwargs)
        target.values[...] = exactly(found)
        return target
    return tree_map(lambda m, v: _wrap(m, v), layout, compute(name, args, kwargs))


def _wrap(layout: torch.Tensor, values: Any) -> torch.Tensor:
    values = np.asarray(values)
    assert values.shape == tuple(layout.shape), f"{values.shape} is not {tuple(layout.shape)}"
    if not layout.dtype.is_floating_point:
        return torch.from_numpy(values.astype(bool if layout.dtype == torch.bool else np.int64)).to(layout.dtype)
    out = Exact.blank(layout)
    out.values[...] = exactly(values)
    return out


def compute(name: str, args: Any, kwargs: Any) -> Any:
    """A functional aten operation on arrays; in-place ones come here under their functional names."""
    if name not in ATEN:
        raise NotImplementedError(f"aten.{name} is not interpreted on expressions: give it a line in ATEN")

    def value(t: Any) -> Any:
        if isinstance(t, Exact):
            return t.values
        return t.numpy() if isinstance(t, torch.Tensor) else exact(t)

    return ATEN[name](*tree_map(value, args), **tree_map(value, kwargs))


def _sum(x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    return np.sum(x, axis=None if dim is None else tuple(np.atleast_1d(dim)), keepdims=keepdim)


def _mean(x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Any:
    total = _sum(x, dim, keepdim)
    return total / (x.size // max(np.size(total), 1))


def _logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Any:
    return LOG(_sum(EXP(x), dim, keepdim))


def _scatter_add(x: Any, dim: int, index: Any, source: Any) -> Any:
    x = np.array(x)
    for at in np.ndindex(index.shape):
        to = (*at[:dim], index[at], *at[dim + 1 :])
        x[to] = x[to] + source[at]
    return x


def _scatter(x: Any, dim: int, index: Any, source: Any) -> Any:
    total = x.copy()
    np.put_along_axis(total, index, source, axis=dim)
    return total


def _index_copy(x: Any, dim: int, index: Any, source: Any) -> Any:
    x = np.array(x)
    x[(slice(None),) * dim + (index,)] = source
    return x


def _argmax(x: Any, dim: int) -> Any:
    def first_largest(row: Any) -> int:
        return functools.reduce(lambda i, j: j if row[j] > row[i] else i, range(len(row)))

    return np.apply_along_axis(first_largest, dim, x).astype(np.int64)


FACTORIES = {"empty_like", "new_empty", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like"}
ATEN: dict[str, Callable[..., Any]] = {
    "add": lambda x, y, alpha=1: x + alpha * y,
    "sub": lambda x, y, alpha=1: x - alpha * y,
    "rsub": lambda x, y, alpha=1: y - alpha * x,
    "mul": lambda x, y: x * y,
    "div": lambda x, y: x / y,
    "neg": lambda x: -x,
    "pow": lambda x, n: x**n,
    "reciprocal": lambda x: 1 / x,
    "exp": EXP,
    "log": LOG,
    "tanh": TANH,
    "erf": ERF,
    "sigmoid": SIGMOID,
    "sqrt": SQRT,
    "rsqrt": lambda x: 1 / SQRT(x),
    "square": lambda x: x * x,
    "relu": lambda x: MAX(x, 0),
    "silu": lambda x: unary(ACTIVATIONS["silu"])(x),
    "gelu": lambda x, approximate="none": unary(ACTIVATIONS["gelu_tanh" if approximate == "tanh" else "gelu"])(x),
    "addcmul": lambda x, y, z, value=1: x + value * y * z,
    "sum": _sum,
    "mean": _mean,
    "amax": lambda x, dim, keepdim=False: MAX.reduce(x, axis=int(np.ravel(dim)[0]), keepdims=keepdim),
    "argmax": _argmax,
    "logsumexp": _logsumexp,
    "any": lambda x: any(not _same(v, 0) for v in x.flat),
    "eq": EQUAL,
    "ne": lambda x, y: ~EQUAL(x, y).astype(bool),
    "lt": lambda x, y: (x < y).astype(bool),
    "gt": lambda x, y: (x > y).astype(bool),
    "bitwise_and": np.logical_and,
    "where": np.where,
    "masked_fill": lambda x, mask, value: np.where(mask, value, x),
    "mm": lambda x, y: x @ y,
    "bmm": lambda x, y: x @ y,
    "matmul": lambda x, y: x @ y,
    "addmm": lambda c, x, y, beta=1, alpha=1: (beta * c if beta else 0) + alpha * (x @ y),
    "baddbmm": lambda c, x, y, beta=1, alpha=1: beta * c + alpha * (x @ y),
    "cat": lambda xs, dim=0: np.concatenate(xs, axis=dim),
    "repeat_interleave": lambda x, times, dim, **_: np.repeat(x, times, axis=dim),
    "stack": lambda xs, dim=0: np.stack(xs, axis=dim),
    "gather": lambda x, dim, index: np.take_along_axis(x, index, axis=dim),
    "scatter": _scatter,
    "scatter_add": _scatter_add,
    "index": lambda x, at: x[tuple(slice(None) if i is None else i for i in at)],
    "index_copy": _index_copy,
    "_to_copy": lambda x, **_: x,
    "clone": lambda x, **_: x,
    "_unsafe_view": lambda x, size: x.reshape(size),
    "copy": lambda x, source, *_: np.broadcast_to(source, x.shape),
    "zero": lambda x: np.zeros(x.shape, dtype=int),
    "fill": lambda x, value: np.full(x.shape, value, dtype=object),
    "zeros_like": lambda x, **_: np.zeros(x.shape, dtype=int),
    "ones_like": lambda x, **_: np.ones(x.shape, dtype=int),
    "new_zeros": lambda x, size, **_: np.zeros(size, dtype=int),
}


class Interpreter(TorchDispatchMode):
    """New floating-point tensors hold expressions too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return interpret(func, args, kwargs or {})


# --------------------------------------------------------------------------------------------- Triton on expressions


class Block(np.ndarray):
    """A value in a program's registers: expressions, integers or booleans. Never changed in place."""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        plain = [exactly(x.view(np.ndarray) if isinstance(x, Block) else x) for x in inputs]
        if ufunc in (np.equal, np.not_equal) and any(x.dtype == object for x in plain):
            same = np.asarray(EQUAL(*plain)).astype(bool)
            return block(same if ufunc is np.equal else ~same)
        if ufunc is np.greater_equal and any(x.dtype == object for x in plain):
            return block(AT_LEAST(*plain))
        return block(getattr(ufunc, method)(*plain, **kwargs))

    def to(self, dtype: Any) -> Block:
        return block(self.astype(np.int64)) if dtype in Language.INTEGERS and self.dtype.kind in "bui" else self


def block(values: Any) -> Block:
    return exactly(values).view(Block)


@dataclass(frozen=True)
class Pointer:
    """Places in a flat array of cells."""

    cells: np.ndarray
    at: Any
    dtype = SimpleNamespace(element_ty=None)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.cells, self.at + np.asarray(offset))

    def __getitem__(self, key: Any) -> Pointer:
        return Pointer(self.cells, np.asarray(self.at)[key])

    def places(self, mask: Any, *values: Any) -> list[np.ndarray]:
        """Places, mask and ``values``, of one shape; no place that the mask allows is outside of the cells."""
        plain = [np.asarray(v) for v in (self.at, True if mask is None else mask, *values)]
        at, allowed, *rest = np.broadcast_arrays(*plain)
        touched = at[allowed]
        assert not touched.size or (touched.min() >= 0 and touched.max() < self.cells.size), "out of bounds"
        return [at, allowed, *rest]


class Language:
    """What the kernels use of ``triton.language``, for one program after another."""

    INTEGERS = int1, int8, int32, int64 = ("int1", "int8", "int32", "int64")
    float32, bfloat16 = "float32", "bfloat16"
    program: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()

    def program_id(self, axis: int) -> Block:
        return block(self.program[axis])

    def num_programs(self, axis: int) -> int:
        return self.grid[axis]

    def philox(self, seed: Any, *counters: Any) -> tuple[Block, ...]:
        """As :func:`fastft.kernels._attention_mask.kept` has it: integers, which expressions know nothing of."""
        *counters, rounds = counters  # type: ignore[assignment]
        c = [np.asarray(n).astype(np.uint64) for n in counters]
        key = [int(np.asarray(seed)) & 0xFFFFFFFF, int(np.asarray(seed)) >> 32]
        low, word = np.uint64(0xFFFFFFFF), np.uint64(32)
        for _ in range(rounds):
            a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
            c = [(b >> word) ^ c[1] ^ np.uint64(key[0]), b & low, (a >> word) ^ c[3] ^ np.uint64(key[1]), a & low]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return tuple(block(n.astype(np.int64)) for n in c)

    def debug_barrier(self) -> None:
        """A program is one thread here."""

    def load(self, at: Pointer, mask: Any = None, other: Any = sympy.nan, eviction_policy: str = "") -> Block:
        places, allowed, others = at.places(mask, exactly(other))
        whole = at.cells.dtype != object
        others = np.where(allowed, 0, others).astype(np.int64) if whole else others
        out = np.where(allowed, at.cells[np.where(allowed, places, 0)], others) if at.cells.size else others
        return block(out.astype(np.int64) if whole else out)

    def store(self, at: Pointer, value: Any, mask: Any = None, eviction_policy: str = "") -> None:
        places, allowed, values = at.places(mask, exactly(value))
        at.cells[places[allowed]] = values[allowed]

    def where(self, condition: Any, a: Any, b: Any) -> Block:
        condition, a, b = np.asarray(condition), exactly(a), exactly(b)
        return block(BY_SIGN(condition, a, b) if condition.dtype == object else np.where(condition, a, b))

    def _either(self, function: Any, whole: Any, a: Any, b: Any) -> Block:
        a, b = exactly(a).view(np.ndarray), exactly(b).view(np.ndarray)
        return block((function if object in (a.dtype, b.dtype) else whole)(a, b))

    def maximum(self, a: Any, b: Any) -> Block:
        return self._either(MAX, np.maximum, a, b)

    def minimum(self, a: Any, b: Any) -> Block:
        return self._either(MIN, np.minimum, a, b)

    arange = staticmethod(lambda start, end: block(np.arange(start, end)))
    cdiv = staticmethod(lambda a, b: -(-a // b))
    cast = staticmethod(lambda x, dtype: block(x))
    zeros = staticmethod(lambda shape, dtype: block(np.full(shape, sympy.Integer(0), dtype=object)))
    full = staticmethod(lambda shape, value, dtype: block(np.full(shape, exact(value), dtype=object)))
    sum = staticmethod(lambda x, axis: block(np.sum(x.view(np.ndarray), axis=axis)))
    max = staticmethod(lambda x, axis: block(MAX.reduce(x.view(np.ndarray), axis=axis)))
    dot = staticmethod(lambda a, b, **_: block(a.view(np.ndarray) @ b.view(np.ndarray)))
    trans = staticmethod(np.transpose)
    reshape = staticmethod(lambda x, shape: x.reshape(shape))
    split = staticmethod(lambda x: (x[..., 0], x[..., 1]))
    join = staticmethod(lambda a, b: np.stack((a, b), -1))
    exp = staticmethod(lambda x: block(EXP(exactly(x))))
    exp2 = staticmethod(lambda x: block(EXP(exactly(x) * _LOG2())))
    log = staticmethod(lambda x: block(LOG(x)))
    log2 = staticmethod(lambda x: block(LOG(x) / _LOG2()))
    sqrt_rn = staticmethod(lambda x: block(SQRT(x)))
    rsqrt = staticmethod(lambda x: block(1 / SQRT(exactly(x))))
    sigmoid = staticmethod(lambda x: block(SIGMOID(x)))
    erf = staticmethod(lambda x: block(ERF(x)))
    abs = staticmethod(lambda x: block(ABS(x)))


def _LOG2() -> sympy.Expr:
    return sympy.log(2) if Digits.symbolic else sympy.log(2).evalf(DIGITS)


class Kernel:
    """Stands for a jitted function: called from a kernel, or launched on a grid."""

    launched: ClassVar[set[tuple[str, str]]] = set()

    def __init__(self, fn: Any, language: Language) -> None:
        self.fn, self.language, self.parameters = fn, language, inspect.signature(fn).parameters

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        Kernel.launched.add((self.fn.__module__, self.fn.__name__))
        given = {name: value for name, value in constants.items() if name in self.parameters}  # warps and such are not
        self.language.grid = grid
        for self.language.program in product(*map(range, grid)):
            self.fn(*map(_argument, args), **tree_map(_argument, given))


def _argument(value: Any) -> Any:
    if isinstance(value, Exact):
        return Pointer(value.cells, value.storage_offset())
    if isinstance(value, torch.Tensor):
        array = value.numpy()
        span = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 0
        return Pointer(as_strided(array, (span,), (array.itemsize,)), 0)
    return block(value) if isinstance(value, float) else value


@contextlib.contextmanager
def triton_bodies() -> Iterator[None]:
    """Within, ops launch their kernels, and these run on expressions."""
    jitted, language = type(_rows.row_offset), Language()
    with contextlib.ExitStack() as stack:
        for module in {_maths, _rows, *(m for home in homes() for m in parts(home))}:
            for name, value in vars(module).copy().items():
                if isinstance(value, jitted):
                    stack.enter_context(mock.patch.object(module, name, Kernel(value.fn, language)))  # type: ignore[attr-defined]
            for name, value in (("tl", language), ("use_triton", lambda x: True), ("_INTERPRET", True)):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, value))
        yield
