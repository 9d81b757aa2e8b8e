"""The sum of a linear layer and the residual stream: the layer's GEMM adds to the stream, in one rounding.

The layer is a plain one, or one that the rules of ``nf4`` have replaced already. With adapters or a bias it is a sum of
three, which takes two roundings in any case.
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
    same_size,
    see,
    shape,
    through,
    use,
    use_again,
    variant_of,
)
from fastft.patterns.nf4 import exact_source

either = op("add", Var("_"), Var("_"))


def _layer(node: fx.Node) -> fx.Node | None:
    """The linear layer without adapters and bias that gives ``node``: ours, or a plain one."""
    found = through(node, "noop")
    if not isinstance(found, fx.Node):
        return None
    if variant_of(LORA_LINEAR.name, found) is not None:
        more = (*found.args[2:4], found.kwargs.get("residual"))  # bias, A
        return None if any(more) else found
    seen = see(found)
    return found if seen.op == "linear" and seen.args[2] is None and rank(seen.args[1]) == 2 else None


def _path(node: fx.Node, layer: fx.Node) -> list[fx.Node] | None:
    """The nodes from ``layer`` to ``node``, if nobody else reads any of them."""
    nodes = [node]
    while nodes[-1] is not layer:
        nodes.append(see(nodes[-1]).args[0])
    return nodes if all(len(n.users) == 1 for n in nodes) else None


def _tags(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta.get(key) for key in ("recompute", "ac_graph_id"))


def _build(m: Match) -> Rewrite | Reason | None:
    total = m.anchor
    terms = [t for t in see(total).args[:2] if isinstance(t, fx.Node)]
    if len(terms) != 2 or terms[0] is terms[1] or any(not _same_shape(t, total) for t in terms):
        return None  # twice the same, or a bias or something else that broadcasts
    found = [
        (layer, path, other)
        for this, other in (terms, terms[::-1])
        if (layer := _layer(this)) is not None and (path := _path(this, layer)) is not None
    ]
    if not found:
        return None
    layer, path, residual = found[0]  # of two layers, one adds to what the other gave
    if dtype(residual) != dtype(layer) or dtype(total) != dtype(layer):
        return Reason("dtype", f"a result in {dtype(layer)} is added to {dtype(residual)}")
    if _tags(layer) != _tags(total):
        return Reason("checkpoint", "one of the layer and the sum is recomputed in backward, the other is not")
    ours = variant_of(LORA_LINEAR.name, layer) is not None
    if ours:
        answer = use_again(layer, LORA_LINEAR.name, *layer.args, **{**layer.kwargs, "residual": residual})
    else:
        x, weight, _ = see(layer).args
        to = dtype(layer)
        answer = use(LORA_LINEAR.name, exact_source(x, to), weight, dtype=to, out_dtype=to, residual=residual)
    if isinstance(answer, Rewrite):
        answer.inside = m.inside.union(path)
        answer.notes = "" if ours else "plain linear layer"
    return answer


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return rank(a) == rank(b) and all(same_size(x, y) for x, y in zip(shape(a), shape(b), strict=True))


def _seed(node: fx.Node) -> str | None:
    return None


TABLE = Table("residual", (row(either, _build),), _seed)  # z + x Wᵀ + …
