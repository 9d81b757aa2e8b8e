"""A gated activation of two layers with LoRA adapters, where the rules of ``mlp`` and ``joint_linears`` have replaced
both already: the activation adds the adapters' products itself, and nobody writes gate and up.

Those are other ops, with variants of their own: where a variant of ``glu`` or of ``lora_linears`` was chosen, it stays.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from fastft.kernels.glu import glu
from fastft.kernels.lora_glu import OP
from fastft.kernels.lora_linear import JOINT, lora_linears
from fastft.kernels.lora_stack import OP as STACK
from fastft.patterns._match import Bindings, Match, Pattern, Reason, Rewrite, Table, dtype, row, use, value, variant_of


class Activation(Pattern):
    """A call of our own gated activation, of two results of one call of our own joined layers."""

    anchors = frozenset({"unknown"})

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        if variant_of("glu", found) is not None and _layers(found) is not None:
            yield bound.take(found)


def _layers(activation: fx.Node) -> tuple[fx.Node, list[int]] | None:
    """The call that gives an activation's gate and up, and which of its results they are."""
    items = [v for v in activation.args[:2] if isinstance(v, fx.Node) and v.target is operator.getitem]
    calls: list[Any] = [item.args[0] for item in items]
    if len(items) != 2 or calls[0] is not calls[1] or variant_of(JOINT.name, calls[0]) is None:
        return None
    return calls[0], [item.args[1] for item in items]  # type: ignore[misc]


def _region(node: fx.Node) -> int:
    """The checkpointed region that a node is recomputed with; 0: none."""
    return node.meta.get("ac_graph_id") or 0


def _build(m: Match) -> Rewrite | Reason | None:
    activation: Any = m.anchor
    found = _layers(activation)
    if found is None:
        return None
    joint, places = found
    given: dict[str, Any] = {**dict(zip(("x", "weight", "bias", "a", "b", "scaling"), joint.args, strict=False))}
    given |= joint.kwargs
    a, b, scaling, b_bias = ([given[name][i] for i in places] for name in ("a", "b", "scaling", "b_bias"))
    if not any(a):
        return None  # nothing is added to gate and up
    if activation.target is not glu or joint.target is not lora_linears:
        return Reason("variant", "a variant was chosen for the activation or the layers: what fuses them is another op")
    if sorted(places) != [0, 1] or len(given["weight"]) != 2:
        return Reason("layers", f"of {len(given['weight'])} joined layers; gate and up alone are supported")
    others = [user for item in activation.args[:2] for user in item.users if user is not activation]
    if others:
        return Reason("escapes", f"gate or up is also read by {others[0].name}")
    if any(len(of_layer) != 1 for of_layer in a):
        return Reason("adapters", f"gate has {len(a[0])} adapters and up {len(a[1])}; one each is supported")
    if any(bias is not None for bias in (*given["bias"], *b_bias[0], *b_bias[1])):
        return Reason("bias", "gate, up, or an adapter of theirs has a bias, which is not part of the op")
    if {given["dtype"], given["lora_dtype"], given["out_dtype"]} != {dtype(activation)}:
        kinds = f"{given['dtype']}, their adapters in {given['lora_dtype']}"
        return Reason("dtype", f"gate and up are computed in {kinds}, the result is {dtype(activation)}")
    if _region(activation) != _region(joint):
        return Reason("checkpoint", "the activation is not in the layers' checkpointed region")
    nf4 = ("quant", "shape", "blocksize", "blocksize2") if any(given["quant"]) else ()
    more = {name: [given[name][i] for i in places] for name in nf4}
    weight, downs, ups = [given["weight"][i] for i in places], [down for (down,) in a], [up for (up,) in b]
    first = use(STACK.name, given["x"], weight, downs, **more, dtype=given["dtype"])
    if isinstance(first, Reason):
        return first
    first.outputs = (activation.args[0],)
    operands = ups, [scale for (scale,) in scaling], activation.args[2]
    x, thin = value(given["x"]), [value(up) for up in ups]
    columns = 2 * thin[0].shape[0] + sum(up.shape[1] for up in thin)
    wide = x.new_empty((*x.shape[:-1], columns), dtype=given["dtype"])
    if (reason := OP.supported(wide, thin, *operands[1:])) is not None:
        return reason
    inside = frozenset({activation, joint, *activation.args[:2]})
    return Rewrite(OP.call, operands, inside=inside, first=first, kernel=OP)


def _seed(node: fx.Node) -> str | None:
    return None


TABLE = Table("lora_glu", (row(Activation(), _build),), _seed)  # f(x Wᵀ + s x Aᵀ Bᵀ) · (x Vᵀ + t x Cᵀ Dᵀ)
