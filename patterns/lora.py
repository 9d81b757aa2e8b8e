"""LoRA over a linear layer, as PEFT writes it::

    result = linear(x, W, bias)                                   or one of the NF4 forms, then clone and casts
    result = result + linear(linear(dropout(x), A), B[, b]) * s   once for each active adapter
    result = result.to(dtype of the first result)

with x cast to the adapters' dtype first, or nothing cast where autocast does it inside linear: what each product runs
in is read off the traced dtypes. rsLoRA and rank patterns change constants only. DoRA, whose magnitudes need the
weight's norm, is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fastft.kernels.lora_linear import OP as LORA_LINEAR
from fastft.patterns._match import (
    Bindings,
    Match,
    Reason,
    Rewrite,
    Table,
    Var,
    alt,
    cast,
    dtype,
    is_noop,
    op,
    rank,
    row,
    see,
    shape,
    through,
    use,
)
from fastft.patterns.nf4 import QuantizedLinear, bitsandbytes_op, exact_source, read

matrix = Var("_", lambda n: rank(n) == 2)
thin = op("linear", op("linear", Var("x"), matrix), matrix)
# A scaling of 1 is still in the graph, as a product that changes nothing.
branch = cast(alt(op("mul", thin, Var("scale", lambda v: not rank(v))), thin))
adapted = op("add", Var("base"), branch)


@dataclass(frozen=True)
class _Adapter:
    """s · ((x Aᵀ) Bᵀ + b): nodes, the dtype of its products."""

    x: fx.Node
    a: fx.Node
    b: fx.Node
    b_bias: fx.Node | None
    scale: Any
    dtype: Any


def _adapter(inside: frozenset[fx.Node], scale: Any) -> _Adapter | Reason | None:
    """The one adapter among the nodes that the pattern consumed."""
    linears = [n for n in inside if see(n).op == "linear"]
    outer = next((n for n in linears if any(through(see(n).args[0], "noop") is other for other in linears)), None)
    if outer is None or len(linears) != 2:
        return None
    hidden, b, b_bias = see(outer).args
    inner = through(hidden, "noop")
    x, a, a_bias = see(inner).args
    if shape(a)[0] != shape(b)[1] or a_bias is not None:
        return None
    if dtype(inner) != dtype(outer):
        return Reason("dtype", f"the adapter's two products are in {dtype(inner)} and {dtype(outer)}")
    if isinstance(scale, fx.Node):
        return Reason("scaling", f"the scaling {scale.name} is an input of the graph, not a constant")
    return _Adapter(x, a, b, b_bias, 1.0 if scale is None else scale, dtype(outer))


def _chain(anchor: fx.Node) -> tuple[list[_Adapter], fx.Node, frozenset[fx.Node]] | Reason | None:
    """The adapters that end at ``anchor``, first to last, the base they are added to, and the nodes in between."""
    adapters: list[_Adapter] = []
    inside: frozenset[fx.Node] = frozenset()
    node: Any = anchor
    while isinstance(node, fx.Node):
        step = next(_steps(node), None)
        if step is None:
            break
        adapter, base, consumed = step
        if isinstance(adapter, Reason):
            return adapter
        adapters.insert(0, adapter)
        inside |= consumed
        node = base
    return (adapters, node, inside) if adapters else None


def _steps(node: fx.Node) -> Any:
    for found in adapted.match(node, Bindings()):
        adapter = _adapter(found.inside, found.names.get("scale"))
        if adapter is not None:
            yield adapter, found.names["base"], found.inside


def _base(node: Any) -> tuple[dict[str, Any], Any, fx.Node, frozenset[fx.Node]] | Reason | None:
    """The linear layer below the adapters: keyword arguments for its weight, positional ones, its node, its nodes."""
    path: set[fx.Node] = set()
    while isinstance(node, fx.Node):
        layer = read(node)
        if isinstance(layer, Reason):
            return layer
        if isinstance(layer, QuantizedLinear):
            return layer.kwargs, (layer.x, layer.weight, layer.bias), node, layer.inside | path
        seen = see(node)
        if seen.op == "linear":
            return {}, seen.args, node, frozenset(path | {node})
        # A cast to more precision or to no other changes nothing; one to less is PEFT's own rounding of the base.
        if seen.op != "cast" and not is_noop(seen):
            return None
        path.add(node)
        node = seen.args[0]
    return None


def _build(m: Match) -> Rewrite | Reason | None:
    chain = _chain(m.anchor)
    if chain is None or isinstance(chain, Reason):
        return chain
    adapters, below, inside = chain
    base = _base(below)
    if base is None:
        what = bitsandbytes_op(below) or see(through(below, "noop", "cast")).op
        scaled = any(a.scale != 1.0 for a in adapters)
        return Reason("base", f"what the adapter is added to is no linear layer but {what}") if scaled else None
    if isinstance(base, Reason):
        return base
    kwargs, (x, weight, bias), layer, nodes = base
    # The next adapter's add is the last one's only reader; a rounding back to the base's dtype belongs to the site.
    output = m.anchor
    users = list(output.users)
    if len(users) == 1 and see(users[0]).op == "cast" and dtype(users[0]) == dtype(below):
        output = users[0]
        inside |= {m.anchor}
    products = {a.dtype for a in adapters}
    if len(products) > 1:
        return Reason("dtype", f"adapters multiply in different dtypes: {', '.join(sorted(map(str, products)))}")
    to, lora_dtype = dtype(layer), adapters[0].dtype
    source = exact_source(x, to)
    inputs = [exact_source(a.x, lora_dtype) for a in adapters]
    answer = use(
        LORA_LINEAR.name,
        source,
        weight,
        bias,
        [a.a for a in adapters],
        [a.b for a in adapters],
        [a.scale for a in adapters],
        x_lora=[None if own is source else own for own in inputs],
        b_bias=[a.b_bias for a in adapters],
        **kwargs,
        dtype=to,
        lora_dtype=lora_dtype,
        out_dtype=dtype(output),
    )
    if isinstance(answer, Reason):
        return answer
    answer.outputs, answer.inside = (output,), inside | nodes | {output}
    answer.notes = "NF4 weight" if kwargs else ""
    return answer


def _left(m: Match) -> Reason | None:
    """Two thin products in a row whose result a tensor scales."""
    if not isinstance(_adapter(m.inside, None), _Adapter):
        return None
    for user in m.anchor.users:
        seen = see(user)
        if seen.op == "mul" and all(isinstance(v, fx.Node) for v in seen.args):
            return Reason(
                "dora", "a tensor scales the adapter's output (DoRA): the weight's norm is not part of the op"
            )
    return None


def _seed(node: fx.Node) -> str | None:
    return None


TABLE = Table(
    "lora",
    (
        row(adapted, _build),  # x Wᵀ + bias + Σ s (x Aᵀ) Bᵀ
        row(thin, _left),  # m ∘ (x Aᵀ) Bᵀ, m a tensor
    ),
    _seed,
)
