"""MLPs: ``f(gate) * up`` in either order, gate and up from two projections or from one; squared ReLU, without a gate.

Only the activation is the site: the projections around it are linears, with rules of their own.
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

import fastft.kernels.glu
import fastft.kernels.squared_relu  # noqa: F401  (both register their ops)
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

x = Var("x", lambda n: isinstance(n, fx.Node))
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


def _squared_relu(m: Match) -> Rewrite | Reason | None:
    # torch.pow is promoted to fp32 under autocast.
    if dtype(m.anchor) != dtype(m["x"]):
        return Reason("dtype", f"x is {dtype(m['x'])} and its square {dtype(m.anchor)}; one dtype is supported")
    return use("squared_relu", m["x"])


def _seed(node: fx.Node) -> str | None:
    seen = see(node)
    if seen.op == "relu" and any(see(u).op == "square" or see(u) == ("mul", (node, node)) for u in node.users):
        return "square of a relu"
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
        row(op("square", op("relu", x)), _squared_relu),  # squared ReLU (Nemotron, Arcee)
        row(op("relu", x) * op("relu", x), _squared_relu),
    ),
    _seed,
)
