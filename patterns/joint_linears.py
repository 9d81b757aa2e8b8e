"""Linear layers that read the same input (q, k and v; gate and up), each of which the rules of ``lora`` or ``nf4`` have
replaced already: one op instead of one for each, with the thin products and ∂x in common.

That is another op, with variants of its own: a layer for which a variant of ``lora_linear`` was chosen stays alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from fastft.kernels.lora_linear import JOINT, OP, lora_linear
from fastft.patterns._match import Bindings, Match, Pattern, Reason, Rewrite, Table, dtype, row, use, variant_of


class LoraLinear(Pattern):
    """A call of our own op whose adapters, if it has any, read the layer's input, and which adds to nothing."""

    anchors = frozenset({"unknown"})

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        if _is_ours(found):
            yield bound.take(found)


def _is_ours(node: Any) -> bool:
    if not isinstance(node, fx.Node) or variant_of(OP.name, node) is None:
        return False
    return node.kwargs.get("residual") is None and all(own is None for own in node.kwargs.get("x_lora", ()))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """A call's arguments by name, each of them an entry of a list that the joint op takes."""
    names = ("weight", "bias", "a", "b", "scaling", "b_bias", "quant", "shape", "blocksize", "blocksize2")
    defaults = dict(zip(names, (None, None, (), (), (), (), (), (), 64, 256), strict=True))
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    return {name: given.get(name, default) for name, default in defaults.items()}


def _kind(node: fx.Node) -> tuple[Any, ...]:
    """What layers must share: x, its dtype and y's, how the weight is stored, whether they are recomputed."""
    tags = (node.meta.get(key) for key in ("recompute", "ac_graph_id"))
    return node.args[0], node.kwargs.get("dtype"), dtype(node), len(_arguments(node)["quant"]), *tags


def _build(m: Match) -> Rewrite | Reason | None:
    x, last = m.anchor.args[0], m.anchor
    every = sorted(n for n in x.users if _is_ours(n) and n.args and _kind(n) == _kind(last))  # type: ignore[union-attr]
    nodes = [n for n in every if n.target is lora_linear]
    others = sorted({v.name for n in every if n not in nodes and (v := variant_of(OP.name, n)) is not None})
    apart = f"{len(every) - len(nodes)} with variant {' or '.join(others)}, which was chosen for lora_linear"
    if others and len(nodes) < 2 <= len(every) and last is every[-1]:
        return Reason("variant", f"of {len(every)} layers {apart}: what joins them is another op, lora_linears")
    if len(nodes) < 2 or last is not nodes[-1]:
        return None
    layers = [_arguments(n) for n in nodes]
    thin = {(n.kwargs["lora_dtype"], *map(dtype, of["a"])) for n, of in zip(nodes, layers, strict=True) if of["a"]}
    # ∂A of all adapters is one product, in one dtype.
    if len({kind[0] for kind in thin}) > 1 or len({a for _, *kinds in thin for a in kinds}) > 1:
        return Reason("dtype", f"the adapters of the {len(nodes)} layers have, or multiply in, different dtypes")
    columns = {name: [of[name] for of in layers] for name in layers[0]}
    positional = [columns.pop(name) for name in ("weight", "bias", "a", "b", "scaling")]
    to = last.kwargs["dtype"]
    lora_dtype = next((kind[0] for kind in thin), to)
    answer = use(JOINT.name, x, *positional, **columns, dtype=to, lora_dtype=lora_dtype, out_dtype=dtype(last))
    if isinstance(answer, Reason):
        return answer
    # k's product comes after q's result is used.
    answer.outputs, answer.inside, answer.early = tuple(nodes), frozenset(nodes), True
    answer.notes = f"{len(nodes)} layers" + (f"; not {apart}" if others else "")
    return answer


def _seed(node: fx.Node) -> str | None:
    return None


TABLE = Table("joint_linears", (row(LoraLinear(), _build),), _seed)  # x Wᵢᵀ + Σ s (x Aᵀ) Bᵀ, for several i
