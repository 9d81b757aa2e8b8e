"""Plain linear layers around a gated activation of ours, where memory is planned: as ops of ours they are part of an
MLP that a plan can have computed a slice of tokens at a time (``backend/slicing.py``).

With adapters, or over NF4 weights, they are ours already. Without a memory plan nobody would take them by slices, and
they stay what Inductor knows.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fastft.kernels.lora_linear import OP as LORA_LINEAR
from fastft.patterns._match import (
    Match,
    Reason,
    Rewrite,
    Table,
    Var,
    dtype,
    op,
    rank,
    row,
    see,
    through,
    use,
    variant_of,
)
from fastft.patterns.nf4 import exact_source

matrix = Var("weight", lambda n: rank(n) == 2)


def _is_glu(node: Any) -> bool:
    return isinstance(node, fx.Node) and variant_of("glu", node) is not None


def _of_an_mlp(layer: fx.Node, x: Any) -> bool:
    """Whether a layer gives the gate or the other factor of an activation of ours, or reads what one gives."""
    return _is_glu(through(x, "noop")) or any(_is_glu(user) and layer in user.args[:2] for user in layer.users)


def _build(m: Match) -> Rewrite | Reason | None:
    layer = m.anchor
    x, weight, bias = see(layer).args
    if not _of_an_mlp(layer, x):
        return None
    to = dtype(layer)
    return use(LORA_LINEAR.name, exact_source(x, to), weight, bias, dtype=to, lora_dtype=to, out_dtype=to)


def _seed(node: fx.Node) -> str | None:
    return None


TABLE = Table("mlp_linears", (row(op("linear", Var("x"), matrix), _build),), _seed, planned=True)  # x Wᵀ + bias
