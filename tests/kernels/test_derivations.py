"""Every backward derived by hand, against the derivative that sympy takes of the textbook formula.

What is checked is the code that runs: the op's own ``call`` is differentiated with tensors whose elements are sympy
expressions (``_expressions.py``). Its raw ops run their bodies on them, once as PyTorch (the aten operations of a body
are interpreted on arrays of expressions) and once as Triton (the kernels' Python functions run program by program, with
a stand-in for ``triton.language``). So launchers, masks, residuals and the ``autograd.Function`` are part of what is
checked, and rounding is not: elements are numbers of 40 digits, or symbols, where the difference to sympy's derivative
must simplify to 0.

:data:`DERIVATIONS` has the textbook formulas, a list for each op; an op with a backward that is not in it fails.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import sympy
import torch

import fastft.kernels
from fastft.kernels import _rows, attention, glu, layer_norm, linear_cross_entropy, rms_norm, rotary
from fastft.kernels._op import OPS, Op
from fastft.kernels._triton import HAS_TRITON
from tests.kernels._expressions import (
    ACTIVATIONS,
    AGREE,
    DIGITS,
    EXP,
    LOG,
    TANH,
    Digits,
    Exact,
    Interpreter,
    Kernel,
    Pointer,
    block,
    exact,
    ratio,
    triton_bodies,
    unary,
)
from tests.kernels._samples import differentiable

fastft.kernels.load()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, chunks and programs at the sizes below."""
    for norm in (rms_norm, layer_norm):
        monkeypatch.setattr(norm, "row_tile", lambda n: (2, 1 << (n - 1).bit_length(), 1))
        monkeypatch.setattr(norm, "processors", lambda device: 1)
    monkeypatch.setattr(glu, "BLOCK", 4)
    monkeypatch.setattr(rotary, "TILE", 4)
    monkeypatch.setattr(attention, "_tiles", lambda *_: {"BLOCK_M": 2, "BLOCK_N": 2, "num_warps": 1, "num_stages": 1})
    monkeypatch.setattr(linear_cross_entropy, "_row_config", lambda vocab: {"BLOCK": 2, "num_warps": 1})
    monkeypatch.setattr(linear_cross_entropy, "chunk_rows", lambda *_: 1)


# ------------------------------------------------------------------------------------------------------- derivations

Array = np.ndarray
BODIES = {"PyTorch": (contextlib.nullcontext, torch.float64), "Triton": (triton_bodies, torch.float32)}
BOTH = ("PyTorch", "Triton")


@dataclass(frozen=True)
class Derivation:
    """A textbook formula, and the call of an op that computes it.

    ``shapes``: of the operands, by name. ``call``: the op (or its reference) as first argument, and the operands by
    name; gives the outputs. ``formula``: the same outputs as arrays of expressions of the operands' symbols.
    ``frozen``: operands without a gradient. ``outputs``: how many outputs, the first ones, have a gradient.
    ``simplify``: bodies whose difference to sympy's derivative simplifies to 0 (powers of two do not).
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[..., Any]
    formula: Callable[..., Sequence[Array]]
    frozen: tuple[str, ...] = ()
    outputs: int = 1
    simplify: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def symbols(self) -> dict[str, Array]:
        return {name: _symbols(name, shape) for name, shape in self.shapes.items()}

    @functools.cached_property
    def values(self) -> list[Array]:
        return [np.asarray(out, dtype=object) for out in self.formula(**self.symbols)]

    @functools.cached_property
    def cotangents(self) -> list[Array]:
        return [_symbols(f"dy{i}", out.shape) for i, out in enumerate(self.values[: self.outputs])]

    @functools.cached_property
    def gradients(self) -> dict[str, Array]:
        """sympy's: of the sum of outputs times their cotangents, by operand."""
        found = {s: sympy.Integer(0) for name in self.wanted for s in self.symbols[name].flat}
        for out, dy in zip(self.values, self.cotangents, strict=False):
            for expression, factor in zip(out.flat, dy.flat, strict=True):
                for s in expression.free_symbols & found.keys():
                    found[s] += factor * sympy.diff(expression, s)
        return {name: unary(found.__getitem__)(self.symbols[name]) for name in self.wanted}

    @property
    def wanted(self) -> list[str]:
        return [name for name in self.shapes if name not in self.frozen]


def _symbols(name: str, shape: tuple[int, ...]) -> Array:
    """Real symbols ``name_i_j``."""
    out = np.empty(shape, dtype=object)
    for at in np.ndindex(shape):
        out[at] = sympy.Symbol("_".join((name, *map(str, at))), real=True)
    return out


def _over_rows(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: np.apply_along_axis(function, -1, x)


def _glu_derivations() -> list[Derivation]:
    shape = (2, 3)
    return [
        Derivation(
            kind,
            {"gate": shape, "up": shape},
            lambda fn, gate, up, kind=kind: fn(gate, up, kind),
            lambda gate, up, kind=kind: [unary(ACTIVATIONS[kind])(gate) * up],
            simplify=BOTH,
        )
        for kind in glu.KINDS
    ]


def _glu_packed_derivations() -> list[Derivation]:
    def formula(gate_up: Array, kind: str, first: bool) -> list[Array]:
        gate, up = (gate_up[..., :3], gate_up[..., 3:]) if first else (gate_up[..., 3:], gate_up[..., :3])
        return [unary(ACTIVATIONS[kind])(gate) * up]

    return [
        Derivation(
            f"{kind}, {'gate' if first else 'up'} first",
            {"gate_up": (2, 6)},
            lambda fn, gate_up, kind=kind, first=first: fn(gate_up, kind, first),
            functools.partial(formula, kind=kind, first=first),
            simplify=BOTH,
        )
        for kind in glu.KINDS
        for first in (True, False)
    ]


EPS = 0.001


def _rms_norm_derivations() -> list[Derivation]:
    def normed(x: Array) -> Array:
        return _over_rows(lambda row: row / sympy.sqrt(np.sum(row**2) / len(row) + ratio(EPS)))(x)

    # Nine rows are five tiles of two, for four programs: one has two tiles.
    shapes = {"x": (9, 3), "w": (3,)}
    return [
        Derivation("weight", shapes, lambda fn, x, w: fn(x, w, EPS), lambda x, w: [normed(x) * w], simplify=BOTH),
        Derivation("1 + weight", shapes, lambda fn, x, w: fn(x, w, EPS, 1.0), lambda x, w: [normed(x) * (1 + w)]),
        Derivation("weightless", {"x": (3, 3)}, lambda fn, x: fn(x, None, EPS), lambda x: [normed(x)]),
        Derivation(
            "frozen weight", shapes, lambda fn, x, w: fn(x, w, EPS), lambda x, w: [normed(x) * w], frozen=("w",)
        ),
        Derivation(
            "residual stream",
            shapes,
            lambda fn, x, w: fn(x, w, EPS, pass_through=True),
            lambda x, w: [normed(x) * w, x],
            outputs=2,
        ),
    ]


def _layer_norm_derivations() -> list[Derivation]:
    def normed(x: Array) -> Array:
        def of_row(row: Array) -> Array:
            centred = row - np.sum(row) / len(row)
            return centred / sympy.sqrt(np.sum(centred**2) / len(row) + ratio(EPS))

        return _over_rows(of_row)(x)

    shapes = {"x": (9, 3), "w": (3,), "b": (3,)}
    return [
        Derivation(
            "weight and bias",
            shapes,
            lambda fn, x, w, b: fn(x, w, b, EPS),
            lambda x, w, b: [normed(x) * w + b],
            simplify=BOTH,
        ),
        Derivation("plain", {"x": (3, 3)}, lambda fn, x: fn(x, None, None, EPS), lambda x: [normed(x)]),
        Derivation(
            "residual stream",
            {"x": (3, 3)},
            lambda fn, x: fn(x, None, None, EPS, pass_through=True),
            lambda x: [normed(x), x],
            outputs=2,
        ),
    ]


def _rotated(x: Array, cos: Array, sin: Array, style: str) -> Array:
    """As transformers spells the styles, with tables [batch or 1, seq, R or R/2] of which it has the whole rows."""
    width, half = x.shape[-1], x.shape[-1] // 2

    def whole(t: Array) -> Array:
        if t.shape[-1] < width:
            t = np.repeat(t, 2, axis=-1) if style == "interleaved" else np.concatenate((t, t), axis=-1)
        return t[:, None]

    if style == "interleaved":
        turned = np.stack((-x[..., 1::2], x[..., ::2]), axis=-1).reshape(x.shape)
    else:
        if style == "interleaved_to_half":
            x = np.concatenate((x[..., ::2], x[..., 1::2]), axis=-1)
        turned = np.concatenate((-x[..., half:], x[..., :half]), axis=-1)
    return x * whole(cos) + turned * whole(sin)


def _rotary_derivations() -> list[Derivation]:
    def two(style: str, width: int) -> Derivation:
        def formula(q: Array, k: Array, cos: Array, sin: Array) -> list[Array]:
            return [_rotated(q, cos, sin, style), _rotated(k, cos, sin, style)]

        return Derivation(
            f"{style}, tables of {width}",
            {"q": (1, 3, 2, 4), "k": (1, 1, 2, 4), "cos": (1, 2, width), "sin": (1, 2, width)},
            lambda fn, q, k, cos, sin: fn(q, k, cos, sin, style),
            formula,
            frozen=("cos", "sin"),
            outputs=2,
            simplify=BOTH,
        )

    def part(q: Array, cos: Array, sin: Array) -> list[Array]:
        return [np.concatenate((_rotated(q[..., :4], cos, sin, "half"), q[..., 4:]), axis=-1)]

    shapes = {"q": (2, 1, 2, 6), "cos": (2, 2, 4), "sin": (2, 2, 4)}
    alone = Derivation(
        "part of a head, q alone",
        shapes,
        lambda fn, q, cos, sin: fn(q, None, cos, sin, "half", None, 4),
        part,
        frozen=("cos", "sin"),
    )
    return [two(style, width) for style in rotary.STYLES for width in (4, 2)] + [alone]


def _attention_derivations() -> list[Derivation]:
    def formula(
        q: Array,
        k: Array,
        v: Array,
        bias: Array | None = None,
        *,
        scale: str,
        cap: int = 0,
        sees: Callable[[int, int, int], bool] = lambda b, i, j: True,
    ) -> list[Array]:
        out = np.full((*q.shape[:3], v.shape[3]), sympy.Integer(0), dtype=object)
        for b, h, i in np.ndindex(q.shape[:3]):
            kv = h * k.shape[1] // q.shape[1]
            seen = [j for j in range(k.shape[2]) if sees(b, i, j)]
            s = [ratio(scale) * np.dot(q[b, h, i], k[b, kv, j]) for j in seen]
            s = [cap * sympy.tanh(u / cap) for u in s] if cap else s
            s = [u + bias[0, h, i, j] for u, j in zip(s, seen, strict=True)] if bias is not None else s
            e = [sympy.exp(u) for u in s]
            for j, weight in zip(seen, e, strict=True):
                out[b, h, i] = out[b, h, i] + weight / sum(e) * v[b, kv, j]
        return [out]

    def derive(
        name: str,
        b: int,
        length: int,
        of_formula: dict[str, Any],
        of_call: dict[str, Any],
        sizes: tuple[int, int, int, int],
        **rest: Any,
    ) -> Derivation:
        hq, hk, d, dv = sizes
        bias = {"bias": (1, hq, length, length)} if "frozen" in rest else {}

        def call(fn: Any, q: Any, k: Any, v: Any, bias: Any = None) -> Any:
            return fn(q, k, v, scale=0.7, dense=bias, **of_call)

        return Derivation(
            name,
            {"q": (b, hq, length, d), "k": (b, hk, length, d), "v": (b, hk, length, dv), **bias},
            call,
            functools.partial(formula, scale="0.7", **of_formula),
            **rest,
        )

    def causal(b: int, i: int, j: int) -> bool:
        return j <= i

    left = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    holes = torch.tensor([[1, 0, 1]])
    documents = torch.tensor([[0, 1, 0, 1]])
    return [
        derive("a row of scores", 1, 2, {}, {}, (1, 1, 1, 2), simplify=("PyTorch",)),
        derive("a row of capped scores", 1, 2, {"cap": 3}, {"softcap": 3.0}, (1, 1, 1, 2), simplify=("PyTorch",)),
        derive("two heads share keys", 1, 3, {}, {}, (2, 1, 1, 2)),
        derive("causal, capped", 1, 3, {"sees": causal, "cap": 2}, {"causal": True, "softcap": 2.0}, (1, 1, 2, 1)),
        derive(
            "left padding, window",
            2,
            4,
            {"sees": lambda b, i, j: i - 2 < j <= i and bool(left[b, j])},
            {"causal": True, "window": 2, "padding": left},
            (1, 1, 1, 2),
        ),
        derive(
            "padding between tokens",
            1,
            3,
            {"sees": lambda b, i, j: j <= i and bool(holes[b, j])},
            {"causal": True, "padding": holes},
            (2, 1, 1, 2),
        ),
        derive(
            "packed documents",
            1,
            4,
            {"sees": lambda b, i, j: j <= i and i // 2 == j // 2},
            {"causal": True, "positions": documents},
            (1, 1, 1, 2),
        ),
        derive("additive mask", 1, 2, {"cap": 2}, {"softcap": 2.0}, (2, 1, 1, 2), frozen=("bias",)),
    ]


LABELS = [2, -100, 0]


def _logits(h: Array, w: Array, b: Array | None, cap: Any, scale: str, temperature: str) -> Array:
    z = ratio(scale) * (h @ w.T + (0 if b is None else b))
    z = ratio(cap) * TANH(z / ratio(cap)) if cap else z
    return z / ratio(temperature)


def _of_tokens(z: Array, function: Callable[[Array, int], Any]) -> Array:
    values = [function(row, label) if label >= 0 else sympy.Integer(0) for row, label in zip(z, LABELS, strict=True)]
    return np.array(values, dtype=object)


def _probabilities(row: Array) -> Array:
    return EXP(row) / np.sum(EXP(row))


HEAD = {"h": (3, 2), "w": (3, 2), "b": (3,)}


def _linear_log_prob_derivations() -> list[Derivation]:
    def formula(h: Array, w: Array, b: Array | None = None, **maths: Any) -> list[Array]:
        z = _logits(h, w, b, **maths)
        return [
            _of_tokens(z, lambda row, y: row[y] - sympy.log(np.sum(EXP(row)))),
            _of_tokens(z, lambda row, y: -np.sum(_probabilities(row) * LOG(_probabilities(row)))),
            _of_tokens(z, lambda row, y: np.sum(row) / len(row)),
            _of_tokens(z, lambda row, y: sympy.log(np.sum(_probabilities(row) ** 2))),
            _of_tokens(z, lambda row, y: sympy.log(np.sum(EXP(row)))),
        ]

    def call(fn: Any, h: Any, w: Any, b: Any = None, **maths: Any) -> list[Any]:
        everything = {"entropy": True, "mean_logits": True, "log_sum_sq_probs": True}
        found = fn(h, w, b, torch.tensor(LABELS), **everything, **maths)
        return [found.log_prob, found.entropy, found.mean_logits, found.log_sum_sq_probs, found.lse]

    plain = {"cap": None, "scale": "1", "temperature": "1"}
    capped = {"cap": 3, "scale": "0.7", "temperature": "1.25"}
    maths = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.25}
    return [
        Derivation("plain", HEAD, call, functools.partial(formula, **plain), outputs=2),
        Derivation(
            "rows of logits",
            {"h": (3, 1), "w": (3, 1)},
            call,
            functools.partial(formula, **plain),
            frozen=("h",),
            outputs=2,
            simplify=BOTH,
        ),
        Derivation(
            "softcap, scale, temperature",
            HEAD,
            functools.partial(call, **maths),
            functools.partial(formula, **capped),
            outputs=2,
        ),
        Derivation(
            "frozen head",
            {"h": (3, 1), "w": (3, 1)},
            functools.partial(call, **maths),
            functools.partial(formula, **capped),
            frozen=("w",),
            outputs=2,
        ),
        Derivation(
            "frozen head, constant entropy",
            {"h": (3, 1), "w": (3, 1)},
            functools.partial(call, entropy_gradient=False, **maths),
            functools.partial(formula, **capped),
            frozen=("w",),
            outputs=1,
        ),
    ]


def _linear_cross_entropy_derivations() -> list[Derivation]:
    def derive(name: str, reduction: str, cap: int | None = None, **rest: Any) -> Derivation:
        def formula(h: Array, w: Array, b: Array) -> list[Array]:
            z = _logits(h, w, b, cap, "0.5", "1")
            loss = _of_tokens(z, lambda row, y: sympy.log(np.sum(EXP(row))) - row[y])
            total = np.sum(loss)
            return [loss if reduction == "none" else total if reduction == "sum" else total / 2]

        def call(fn: Any, h: Any, w: Any, b: Any) -> Any:
            softcap = None if cap is None else float(cap)
            return fn(h, w, b, torch.tensor(LABELS), reduction=reduction, softcap=softcap, logit_scale=0.5)

        return Derivation(name, HEAD, call, formula, **rest)

    return [
        derive("mean", "mean"),
        derive("each token, softcap", "none", 2),
        derive("sum, frozen head", "sum", frozen=("w", "b"), simplify=BOTH),
    ]


def _lora_derivations() -> list[Derivation]:
    def one(x: Array, w: Array, bias: Array, a: Array, b: Array, b_bias: Array) -> list[Array]:
        return [x @ w.T + bias + 2 * ((x @ a.T) @ b.T + b_bias)]

    def two(x: Array, w: Array, a: Array, b: Array, a2: Array, b2: Array, x2: Array) -> list[Array]:
        return [x @ w.T + 2 * (x @ a.T) @ b.T + ratio("0.7") * (x2 @ a2.T) @ b2.T]

    return [
        Derivation(
            "linear",
            {"x": (3, 2), "w": (2, 2), "bias": (2,)},
            lambda fn, x, w, bias: fn(x, w, bias),
            lambda x, w, bias: [x @ w.T + bias],
            simplify=BOTH,
        ),
        Derivation(
            "adapter with a bias",
            {"x": (3, 2), "w": (3, 2), "bias": (3,), "a": (2, 2), "b": (3, 2), "b_bias": (3,)},
            lambda fn, x, w, bias, a, b, b_bias: fn(x, w, bias, [a], [b], [2.0], b_bias=[b_bias]),
            one,
            simplify=BOTH,
        ),
        Derivation(
            "residual",
            {"x": (3, 2), "w": (2, 2), "z": (3, 2)},
            lambda fn, x, w, z: fn(x, w, residual=z),
            lambda x, w, z: [z + x @ w.T],
            simplify=BOTH,
        ),
        Derivation(
            "frozen weight, two adapters, one with its own input",
            {"x": (3, 2), "w": (3, 2), "a": (2, 2), "b": (3, 2), "a2": (1, 2), "b2": (3, 1), "x2": (3, 2)},
            lambda fn, x, w, a, b, a2, b2, x2: fn(x, w, None, [a, a2], [b, b2], [2.0, 0.7], x_lora=[None, x2]),
            two,
            frozen=("w",),
            simplify=BOTH,
        ),
    ]


def _lora_linears_derivations() -> list[Derivation]:
    sizes = {"1": (2, 2), "2": (3, 1), "3": (1, 1)}  # of each layer: N and the adapter's rank
    shapes: dict[str, tuple[int, ...]] = {"x": (3, 2), "bias": (2,)}
    for i, (n, rank) in sizes.items():
        shapes |= {f"w{i}": (n, 2), f"a{i}": (rank, 2), f"b{i}": (n, rank)}

    def derive(name: str, scaling: tuple[str, str, str]) -> Derivation:
        def formula(x: Array, bias: Array, **of: Array) -> list[Array]:
            ys = [
                x @ of[f"w{i}"].T + ratio(s) * (x @ of[f"a{i}"].T) @ of[f"b{i}"].T
                for i, s in zip(sizes, scaling, strict=True)
            ]
            return [ys[0] + bias, *ys[1:]]

        def call(fn: Any, x: Any, bias: Any, **of: Any) -> Any:
            w, a, b = ([of[f"{kind}{i}"] for i in sizes] for kind in "wab")
            return fn(x, w, [bias, None, None], [[t] for t in a], [[t] for t in b], [[float(s)] for s in scaling])

        return Derivation(name, shapes, call, formula, frozen=("w2",), outputs=3, simplify=BOTH)

    return [derive("three layers", ("2", "2", "0.7")), derive("one scaling", ("0.5", "0.5", "0.5"))]


DERIVATIONS: dict[str, list[Derivation]] = {
    "attention": _attention_derivations(),
    "glu": _glu_derivations(),
    "glu_packed": _glu_packed_derivations(),
    "layer_norm": _layer_norm_derivations(),
    "linear_cross_entropy": _linear_cross_entropy_derivations(),
    "linear_log_prob": _linear_log_prob_derivations(),
    "lora_linear": _lora_derivations(),
    "lora_linears": _lora_linears_derivations(),
    "rms_norm": _rms_norm_derivations(),
    "rotary": _rotary_derivations(),
}

# ------------------------------------------------------------------------------------------------------------- tests

bodies = pytest.mark.parametrize("body", [*BODIES][: 2 if HAS_TRITON else 1])
DIFFERENTIABLE = [op for op in OPS.values() if differentiable(op)]
ops = pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)


def derivations(op: Op) -> list[Derivation]:
    found = DERIVATIONS.get(op.name)
    assert found, f"{op.name} has a backward and no derivation: give DERIVATIONS its textbook formula"
    return found


def outputs(found: Any) -> list[Any]:
    return list(found) if isinstance(found, (tuple, list)) else [found]


def compared(d: Derivation, outs: Sequence[Any], grads: Sequence[Any]) -> Iterator[tuple[str, Any, Array]]:
    """What is compared: its name, ours, and sympy's as expressions."""
    assert len(outs) == len(d.values)
    for i, (ours, formula) in enumerate(zip(outs, d.values, strict=True)):
        yield f"{d}: output {i}", ours, formula
    for name, ours in zip(d.wanted, grads, strict=True):
        yield f"{d}: gradient of {name}", ours, d.gradients[name]


def differentiate(
    op: Op, d: Derivation, body: str, operands: dict[str, Array], cotangents: list[Array]
) -> tuple[list[Array], list[Array]]:
    """Outputs and gradients of ``op.call``, computed on expressions by one of its bodies."""
    context, dtype = BODIES[body]
    leaves = {name: Exact.of(values, dtype, name in d.wanted) for name, values in operands.items()}
    with context(), Interpreter():
        outs = outputs(d.call(op.call, **leaves))
        assert [out.requires_grad for out in outs] == [i < d.outputs for i in range(len(outs))], d.name
        grads = torch.autograd.grad(
            outs[: d.outputs],
            [leaves[name] for name in d.wanted],
            [Exact.of(dy, out.dtype) for dy, out in zip(cotangents, outs, strict=False)],
        )
    return [out.values for out in outs], [grad.values for grad in grads]


def numbers(d: Derivation, array: Array, seed: int = 1) -> Array:
    """``array`` with a number of :data:`DIGITS` digits for every symbol."""
    random_numbers = random.Random(seed)  # 1: in some row of logits the largest is not in the first block
    symbols = [s for part in (*d.symbols.values(), *d.cotangents) for s in part.flat]
    values = [sympy.Rational(random_numbers.randint(-20000, 20000), 10007).evalf(DIGITS) for _ in symbols]
    point = dict(zip(symbols, values, strict=True))
    return np.asarray(unary(lambda e: sympy.sympify(e).xreplace(point).evalf(DIGITS))(array), dtype=object)


@ops
@bodies
def test_op_is_the_derivative(op: Op, body: str) -> None:
    """In numbers of 40 digits: outputs are the formula's, gradients are sympy's."""
    Kernel.launched.clear()
    for d in derivations(op):
        operands, dys = {n: numbers(d, s) for n, s in d.symbols.items()}, [numbers(d, dy) for dy in d.cotangents]
        for what, ours, formula in compared(d, *differentiate(op, d, body, operands, dys)):
            expected = numbers(d, formula)
            assert ours.shape == expected.shape, what
            for a, e in zip(ours.flat, expected.flat, strict=True):
                assert abs(a - e) <= AGREE * max(1, abs(e)), f"{what}: {a} is not {e}"
    if body == "Triton":
        module = inspect.getmodule(op.call)
        kernels = {
            (value.fn.__module__, value.fn.__name__)
            for value in vars(module).values()
            if isinstance(value, type(_rows.row_offset)) and value.fn.__name__.endswith("_kernel")
        }
        assert kernels <= Kernel.launched, f"no derivation launches {sorted(kernels - Kernel.launched)}"


def simplified(e: sympy.Expr) -> sympy.Expr:
    # A maximum that is subtracted before exp and added after log cancels, whatever it is.
    e = e.xreplace({m: sympy.log(sympy.Dummy("M", positive=True)) for m in e.atoms(sympy.Max)}).rewrite(sympy.exp)
    e = e.replace(sympy.log, lambda x: sympy.expand_log(sympy.log(sympy.factor(sympy.expand(x))), force=True))
    return sympy.simplify(e)


@ops
@bodies
def test_difference_simplifies_to_zero(op: Op, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On symbols: no number stands for another."""
    monkeypatch.setattr(Digits, "symbolic", True)
    for d in derivations(op):
        if body not in d.simplify:
            continue
        for what, ours, formula in compared(d, *differentiate(op, d, body, d.symbols, d.cotangents)):
            # One element of each: numbers have shown the others, which are the same with other symbols.
            left = simplified(ours.flat[0] - formula.flat[0])
            assert left == 0, f"{what}: {left} is left of {ours.flat[0]} − ({formula.flat[0]})"


@ops
def test_reference_is_the_formula(op: Op) -> None:
    """In fp64: what the kernels' tests compare with is the textbook's too."""
    for d in derivations(op):
        leaves = {
            name: torch.from_numpy(numbers(d, s).astype(np.float64)).requires_grad_(name in d.wanted)
            for name, s in d.symbols.items()
        }
        outs = outputs(d.call(op.reference, **leaves))
        dys = [torch.from_numpy(numbers(d, dy).astype(np.float64)) for dy in d.cotangents]
        grads = torch.autograd.grad(outs[: d.outputs], [leaves[name] for name in d.wanted], dys)
        for what, ours, formula in compared(d, [out.detach() for out in outs], grads):
            expected = torch.from_numpy(numbers(d, formula).astype(np.float64))
            assert torch.allclose(ours, expected, rtol=1e-12, atol=1e-12), f"{what}: {ours} is not {expected}"


@pytest.mark.skipif(not HAS_TRITON, reason="the kernels' helpers are functions of Triton's language")
@pytest.mark.parametrize("kind", glu.KINDS)
def test_activation_in_the_kernels_is_its_own_derivative(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Digits, "symbolic", True)
    g = sympy.Symbol("g", real=True)
    with triton_bodies():
        f, slope = (np.asarray(v).item() for v in glu._activate(block(g), kind))
    assert simplified(f - ACTIVATIONS[kind](g)) == 0
    assert simplified(slope - sympy.diff(f, g)) == 0


@pytest.mark.skipif(not HAS_TRITON, reason="the kernels' helpers are functions of Triton's language")
def test_softcaps_in_the_kernels_are_their_own_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Digits, "symbolic", True)
    s, cap, scale, temperature = sympy.symbols("s c a T", positive=True)
    textbook = cap * sympy.tanh(scale * s / cap)
    with triton_bodies():
        score, tanh = (np.asarray(v).item() for v in attention._softcap(block(s), block(scale), block(cap)))
        logits = Pointer(np.array([s], dtype=object), 0)
        loaded = linear_cross_entropy._load_z(
            logits, block(0), True, block(scale), block(cap), True, block(1 / temperature)
        )
        z, slope = (np.asarray(v).item() for v in loaded)
    assert simplified(score * sympy.log(2) - textbook) == 0
    assert simplified((1 - tanh**2) * scale - sympy.diff(textbook, s)) == 0
    assert simplified(z - textbook / temperature) == 0
    assert simplified(slope - sympy.diff(textbook, s) / temperature) == 0


@bodies
@pytest.mark.parametrize("style", rotary.STYLES)
def test_rotary_backward_turns_back(style: str, body: str) -> None:
    """With cos and sin of angles, the backward of the result is the operand again: the inverse rotation."""
    context, dtype = BODIES[body]
    q, angle = _symbols("q", (1, 2, 2, 4)), _symbols("t", (1, 2, 2))
    leaf = Exact.of(q, dtype, requires_grad=True)
    tables = [Exact.of(unary(f)(angle), dtype) for f in (sympy.cos, sympy.sin)]
    with context(), Interpreter():
        y = rotary.rotary(leaf, None, *tables, style)
        (back,) = torch.autograd.grad(y, [leaf], [y.detach()])
    for a, e in zip(back.values.flat, q.flat, strict=True):
        assert sympy.simplify(a - e) == 0


def test_floats_are_read_as_what_they_stand_for() -> None:
    assert exact(0.044715) == sympy.Rational(44715, 10**6)
    assert exact(math.sqrt(0.5)) == (sympy.sqrt(2) / 2).evalf(DIGITS)
    assert exact(1 / 1.25) == sympy.Rational(4, 5)
    assert exact(float("-inf")) == -sympy.oo
    assert exact(0.7071067811) != exact(math.sqrt(0.5))


def test_every_activation_is_derived() -> None:
    assert ACTIVATIONS.keys() == set(glu.KINDS)
