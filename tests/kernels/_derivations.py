"""Textbook formulas beside the calls that compute them: what ``test_derivations.py`` differentiates.

A function that gives an op's derivations stands in the table ``DERIVATIONS`` of the op's own tests (``_each.py``), and
what makes its kernels' tiles small in ``SMALL_TILES``: attributes of its module, or of one
that it has (``fused._tiles``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy

from tests.kernels._expressions import unary

Array = np.ndarray
BOTH = ("PyTorch", "Triton")
EPS = 0.001
#: Small tiles of kernels over rows: two rows a tile, and one processor.
ROW_TILES: dict[str, Callable[..., Any]] = {
    "row_tile": lambda n, *each: (2, 1 << (n - 1).bit_length(), 1),
    "processors": lambda device: 1,
}


@dataclass(frozen=True)
class Derivation:
    """A textbook formula, and the call of an op that computes it.

    ``shapes``: of the operands, by name. ``call``: the op (or its reference) as first argument, and the operands by
    name; gives the outputs. ``formula``: the same outputs as arrays of expressions of the operands' symbols.
    ``frozen``: operands without a gradient. ``outputs``: how many outputs, the first ones, have a gradient.
    ``simplify``: bodies whose difference to sympy's derivative simplifies to 0 (powers of two do not). ``kept``: the
    graph is there after the backward.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[..., Any]
    formula: Callable[..., Sequence[Array]]
    frozen: tuple[str, ...] = ()
    outputs: int = 1
    simplify: tuple[str, ...] = ()
    kept: bool = False

    def __str__(self) -> str:
        return self.name

    @functools.cached_property
    def symbols(self) -> dict[str, Array]:
        return {name: real_symbols(name, shape) for name, shape in self.shapes.items()}

    @functools.cached_property
    def values(self) -> list[Array]:
        return [np.asarray(out, dtype=object) for out in self.formula(**self.symbols)]

    @functools.cached_property
    def cotangents(self) -> list[Array]:
        return [real_symbols(f"dy{i}", out.shape) for i, out in enumerate(self.values[: self.outputs])]

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


def real_symbols(name: str, shape: tuple[int, ...]) -> Array:
    """Real symbols ``name_i_j``."""
    out = np.empty(shape, dtype=object)
    for at in np.ndindex(shape):
        out[at] = sympy.Symbol("_".join((name, *map(str, at))), real=True)
    return out


def over_rows(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: np.apply_along_axis(function, -1, x)
