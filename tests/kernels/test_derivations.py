"""Every backward derived by hand, against the derivative that sympy takes of the textbook formula.

What is checked is the code that runs: the op's own ``call`` is differentiated with tensors whose elements are sympy
expressions (``_expressions.py``). Its raw ops run their bodies on them, once as PyTorch (the aten operations of a body
are interpreted on arrays of expressions) and once as Triton (the kernels' Python functions run program by program, with
a stand-in for ``triton.language``). So launchers, masks, residuals and the ``autograd.Function`` are part of what is
checked, and rounding is not: elements are numbers of 40 digits, or symbols, where the difference to sympy's derivative
must simplify to 0.

The textbook formulas stand in the op's own tests, in the table ``DERIVATIONS`` (``_derivations.py``); an op with a
backward that is not in one fails.
"""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import sympy
import torch

import fastft.kernels
from fastft.kernels import _attention_triton, _linear_cross_entropy_triton, _rows, glu, rotary
from fastft.kernels._op import OPS, Op
from fastft.kernels._triton import HAS_TRITON
from tests.kernels._derivations import Array, Derivation, real_symbols
from tests.kernels._each import entry, home_of, kernels, own_tests, parts, tables
from tests.kernels._expressions import (
    ACTIVATIONS,
    AGREE,
    DIGITS,
    Digits,
    Exact,
    Interpreter,
    Kernel,
    Pointer,
    block,
    exact,
    triton_bodies,
    unary,
)
from tests.kernels._samples import differentiable

fastft.kernels.load()

BODIES = {"PyTorch": (contextlib.nullcontext, torch.float64), "Triton": (triton_bodies, torch.float32)}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, chunks and programs at the sizes of the derivations."""
    for home, tiles in tables("SMALL_TILES").items():
        for name, value in tiles.items():
            part, _, attribute = name.rpartition(".")
            monkeypatch.setattr(getattr(kernels(home), part) if part else kernels(home), attribute, value)


bodies = pytest.mark.parametrize("body", [*BODIES][: 2 if HAS_TRITON else 1])
DIFFERENTIABLE = [op for op in OPS.values() if differentiable(op)]
ops = pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)


@functools.cache
def made(make: Callable[[], list[Derivation]]) -> list[Derivation]:
    """Once: the formulas' values and derivatives are kept in them."""
    return make()


def derivations(op: Op) -> list[Derivation]:
    found = made(entry(op, "DERIVATIONS"))
    assert found, f"{own_tests(home_of(op))} has an empty list of DERIVATIONS for {op.name}"
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
            retain_graph=d.kept,
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
        launchable = {
            (value.fn.__module__, value.fn.__name__)
            for module in parts(home_of(op))
            for value in vars(module).values()
            if isinstance(value, type(_rows.row_offset)) and value.fn.__name__.endswith("_kernel")
        }
        missing = launchable - Kernel.launched
        assert not missing, f"no derivation launches {sorted(missing)}"


def unbounded(e: sympy.Expr) -> sympy.Expr:
    """A minimum with a large number keeps exp from overflowing: what is shown is shown of what is below it."""
    bounds = {m: next(x for x in m.args if not x.is_number) for m in e.atoms(sympy.Min)}
    assert all(len(m.args) == 2 and any(x.is_number and x >= 64 for x in m.args) for m in bounds), bounds
    return e.xreplace(bounds)


def simplified(e: sympy.Expr) -> sympy.Expr:
    e = unbounded(e)
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
        f, slope = (unbounded(np.asarray(v).item()) for v in glu._activate(block(g), kind))
    assert simplified(f - ACTIVATIONS[kind](g)) == 0
    assert simplified(slope - sympy.diff(f, g)) == 0


@pytest.mark.skipif(not HAS_TRITON, reason="the kernels' helpers are functions of Triton's language")
def test_softcaps_in_the_kernels_are_their_own_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Digits, "symbolic", True)
    s, cap, scale, temperature = sympy.symbols("s c a T", positive=True)
    textbook = cap * sympy.tanh(scale * s / cap)
    with triton_bodies():
        score, tanh = (
            np.asarray(v).item() for v in _attention_triton._softcap(block(s), block(scale), block(cap), False)
        )
        logits = Pointer(np.array([s], dtype=object), 0)
        loaded = _linear_cross_entropy_triton._load_z(
            logits, block(0), True, block(scale), block(cap), True, block(1 / temperature), ""
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
    q, angle = real_symbols("q", (1, 2, 2, 4)), real_symbols("t", (1, 2, 2))
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
    assert exact(1.4426950408889634) * exact(0.6931471805599453) == pytest.approx(1, abs=1e-39)
    assert exact(1 / 1.25) == sympy.Rational(4, 5)
    assert exact(float("-inf")) == -sympy.oo
    assert exact(0.7071067811) != exact(math.sqrt(0.5))


def test_every_activation_is_derived() -> None:
    assert ACTIVATIONS.keys() == set(glu.KINDS)
