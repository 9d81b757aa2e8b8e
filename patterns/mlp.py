"""Gated MLPs: ``f(gate) * up`` in either order, gate and up from two projections or from one.

Only the gate is the site: the projections around it are linears, with rules of their own.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

import fastft.kernels.glu  # noqa: F401  (registers the ops)
from fastft.patterns._match import (
    Match,
    Reason,
    Rewrite,
    Table,
    Var,
    const,
    dtype,
    op,
    row,
    same_size,
    see,
    shape,
    use,
)
from fastft.patterns._parts import first_half, piece, second_half

gate = Var("gate", lambda n: isinstance(n, fx.Node))
up = Var("up", lambda n: isinstance(n, fx.Node))
#: √(2/π) as models write it: some digits of it.
root_2_over_pi = Var("_", lambda c: isinstance(c, float) and math.isclose(c, math.sqrt(2 / math.pi), rel_tol=1e-6))
cubic = const(0.044715) * op("pow", gate, const(3))
new_gelu = (const(0.5) * gate) * (const(1) + op("tanh", root_2_over_pi * (gate + cubic)))


def _same_shape(a: Any, b: Any) -> bool:
    return len(shape(a)) == len(shape(b)) and all(same_size(m, n) for m, n in zip(shape(a), shape(b), strict=True))


def _glu(kind: str) -> Any:
    def build(m: Match) -> Rewrite | Reason | None:
        g, u = m["gate"], m["up"]
        if not _same_shape(g, u):
            return None  # a product with a scalar or a row is no gate
        # The op's result has gate's dtype; another one would be promotion.
        if dtype(m.anchor) != dtype(g):
            return Reason("dtype", f"gate is {dtype(g)} and the product {dtype(m.anchor)}; one dtype is supported")
        halves = piece(g), piece(u)
        if None not in halves and halves[0].source is halves[1].source:
            spans = [(h.start, h.stop, h.step) for h in halves]
            wanted = [first_half(halves[0].width), second_half(halves[0].width)]
            if spans in (wanted, wanted[::-1]):
                return use("glu_packed", halves[0].source, kind, spans == wanted)
        return use("glu", g, u, kind)

    return build


def _seed(node: fx.Node) -> str | None:
    seen = see(node)
    if seen.op not in ("silu", "gelu", "gelu_tanh"):
        return None
    for user in node.users:
        product = see(user)
        if product.op == "mul" and all(isinstance(a, fx.Node) and _same_shape(a, node) for a in product.args):
            return f"product with a {seen.op}"
    return None


TABLE = Table(
    "mlp",
    (
        row(op("silu", gate) * up, _glu("silu")),  # SwiGLU (Llama, Qwen, Mistral, Phi)
        row((gate * op("sigmoid", gate)) * up, _glu("silu")),  # the same, written out
        row(op("gelu_tanh", gate) * up, _glu("gelu_tanh")),  # GeGLU (Gemma)
        row(op("gelu", gate) * up, _glu("gelu")),  # GeGLU with the exact form
        row(new_gelu * up, _glu("gelu_tanh")),  # the tanh form written out (T5 v1.1)
    ),
    _seed,
)
