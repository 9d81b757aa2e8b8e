"""Attention: ``scaled_dot_product_attention`` with keys and values repeated for their query heads and a dense mask.

The op takes the keys and values as they were before ``repeat_kv``, and the mask's structure
(:mod:`fastft.patterns.masks`) in place of the mask, which nobody computes any more once its last user is replaced. A
mask that is not understood stays, as an operand.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fastft.autotune.variants import run
from fastft.kernels.attention import OP as ATTENTION
from fastft.kernels.attention import attention, attention_mask
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
    value,
)
from fastft.patterns.masks import Structure, recover


def _rounded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, to: torch.dtype, **options: Any
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    return (q.to(to), k.to(to), v.to(to)), options


def rounded_attention(*qkv: torch.Tensor, variant: str = "", **options: Any) -> torch.Tensor:
    """:func:`attention` (or a variant of it) of q, k and v rounded to one dtype (``to``), as autocast rounds them."""
    args, options = _rounded(*qkv, **options)
    return run(ATTENTION.name, variant, *args, **options)


def _sdpa(m: Match) -> Rewrite | Reason | None:
    q, k, v, mask, dropout_p, is_causal, scale, _ = see(m.anchor).args
    if any(rank(t) != 4 for t in (q, k, v)):
        return Reason("shape", f"q has {rank(q)} axes: [batch, heads, seq, head] is needed")
    for name, number in (("scale", scale), ("dropout", dropout_p)):
        if isinstance(number, fx.Node):
            return Reason(name, f"attention's {name} is an input of the graph ({number.name}), not a constant")
    k, v = _solid(k), _solid(v)
    short_k, short_v = _unrepeated(k), _unrepeated(v)
    if same_size(shape(short_k)[1], shape(short_v)[1]):
        k, v = short_k, short_v
    options: dict[str, Any] = {"dropout_p": float(dropout_p or 0.0)}
    if scale is not None:
        options["scale"] = scale
    note = "full"
    if is_causal:
        options["causal"], note = True, "causal"
    unrecovered = None
    if mask is not None:
        structure = _recover(mask, q, k)
        if isinstance(structure, Structure):
            note = str(structure)
            options |= {
                "causal": structure.causal or bool(is_causal),
                "window": structure.window,
                "chunk": structure.chunk,
            }
            # What they hold is looked at once for all layers, by a node of its own.
            found = {"padding": structure.padding, "positions": structure.positions}
            unrecovered = _problem(m, q, k, v, {**options, **found})
            if unrecovered is None and (structure.padding is not None or structure.positions is not None):
                options["mask"] = _shared(structure)
        else:
            unrecovered = structure
        if unrecovered is not None:
            options = {key: options[key] for key in ("dropout_p", "scale") if key in options} | {
                "causal": bool(is_causal),
                "dense": mask,
            }
            note = f"dense: {unrecovered.text}"
    if problem := _problem(m, q, k, v, {key: o for key, o in options.items() if key != "mask"}):
        return problem
    if not same_size(shape(q)[1], shape(k)[1]):
        note += f"; {shape(q)[1]} query heads on {shape(k)[1]}"
    if all(dtype(t) == dtype(m.anchor) for t in (q, k, v)):
        return Rewrite(attention, (q, k, v), options, notes=note, kernel=ATTENTION)
    options["to"] = dtype(m.anchor)
    return Rewrite(rounded_attention, (q, k, v), options, notes=note, kernel=ATTENTION, prepare=_rounded)


def _problem(m: Match, q: fx.Node, k: fx.Node, v: fx.Node, options: dict[str, Any]) -> Reason | None:
    """What the op says about these operands, rounded as autocast would."""
    to = dtype(m.anchor)
    q, k, v = (t if t.dtype == to else t.to(to) for t in (value(q), value(k), value(v)))
    return ATTENTION.supported(q, k, v, **{key: value(o) for key, o in options.items()})


def _recover(mask: fx.Node, q: fx.Node, k: fx.Node) -> Structure | Reason:
    structure = recover(mask)
    if isinstance(structure, Reason) or dtype(mask) == torch.bool:
        return structure
    return Reason("mask", f"the mask is {dtype(mask)}: only boolean masks are recovered")


def _shared(structure: Structure) -> tuple[fx.Node | None, ...]:
    """The results of ``attention_mask``, from the node that another layer has made, or from a new one.

    It stands where its operands are, outside every layer, so that no layer's recomputation asks again.
    """
    padding, positions = structure.padding, structure.positions
    operands = [n for n in (padding, positions) if n is not None]
    args = (padding, positions, structure.chunk)
    graph = operands[0].graph
    node = next((u for u in operands[0].users if u.target is attention_mask and u.args == args), None)
    if node is None:
        after = operands[0]
        if len(operands) == 2:
            after = next(n for n in reversed(graph.nodes) if n in operands)
        after = _last_placeholder(graph, after)
        fake = [value(n) for n in args]
        mode = value(operands[0]).fake_mode
        with graph.inserting_after(after):
            node = graph.call_function(attention_mask, args)
        with mode:
            node.meta["example_value"] = attention_mask(*fake)
    return tuple(_item(node, i) for i in range(5))


def _last_placeholder(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``node``, or the graph's last input when it is an input: inputs stand together."""
    if node.op != "placeholder":
        return node
    return [n for n in graph.nodes if n.op == "placeholder"][-1]


def _item(node: fx.Node, index: int) -> fx.Node | None:
    """Item ``index`` of a node's tuple; None where the item is None."""
    found = value(node)[index]
    if found is None:
        return None
    item = next((u for u in node.users if u.target is operator.getitem and u.args[1] == index), None)
    if item is None:
        with node.graph.inserting_after(node):
            item = node.graph.call_function(operator.getitem, (node, index))
        item.meta["example_value"] = found
    return item


def _solid(node: fx.Node) -> fx.Node:
    """``node``, seen through no-ops and through ``cat`` with empty tensors (a cache that holds nothing yet)."""
    while True:
        node = through(node, "noop")
        seen = see(node)
        if seen.op != "cat" or not isinstance(seen.args[0], (tuple, list)):
            return node
        filled = [t for t in seen.args[0] if not (rank(t) == 1 and same_size(shape(t)[0], 0))]
        if len(filled) != 1:
            return node
        node = filled[0]


def _unrepeated(node: fx.Node) -> fx.Node:
    """What ``repeat_kv`` was given, or ``node``: ``x[:, :, None].expand(b, h, n, s, d).reshape(b, h n, s, d)``."""
    whole = see(node)
    if whole.op != "view":
        return node
    wide = see(through(whole.args[0], "noop"))
    if wide.op != "expand":
        return node
    narrow = through(wide.args[0], "noop")
    seen = see(narrow)
    b, _, s, d = shape(node)
    sizes = shape(through(whole.args[0], "noop"))
    if len(sizes) != 5 or not all(same_size(x, y) for x, y in zip((b, s, d), (sizes[0], *sizes[3:]), strict=True)):
        return node
    if seen.op == "unsqueeze":
        inserts = seen.args[1] in (2, -3)
    else:
        inserts = seen.op == "index" and isinstance(seen.args[1], tuple) and _inserts_third(seen.args[1])
    if (
        not inserts
        or rank(seen.args[0]) != 4
        or not all(same_size(x, y) for x, y in zip(shape(seen.args[0]), (b, sizes[1], s, d), strict=True))
    ):
        return node
    return _solid(seen.args[0])


def _inserts_third(index: tuple[Any, ...]) -> bool:
    """Whether an index is ``[:, :, None]``, with any number of ``:`` after it."""
    return len(index) >= 3 and index[2] is None and all(i == slice(None) for n, i in enumerate(index) if n != 2)


def _seed(node: fx.Node) -> str | None:
    seen = see(node)
    if seen.op == "sdpa":
        return "scaled_dot_product_attention"
    if seen.op == "softmax" and rank(node) == 4 and _scores(seen.args[0]):
        return "softmax of attention scores, spelled out (attn_implementation='eager')"
    return None


def _scores(node: Any) -> bool:
    """Whether a value is a product, scaled, capped, masked, shifted, or standing first in a ``cat`` with sinks."""
    while True:
        seen = see(through(node, "noop", "cast", "add", "mul", "div", "sub", "index", "tanh"))
        if seen.op != "cat" or not isinstance(seen.args[0], (tuple, list)):
            return seen.op == "matmul"
        node = seen.args[0][0]


TABLE = Table(
    "attention",
    (row(op("sdpa", Var("q"), Var("k"), Var("v")), _sdpa),),  # softmax(mask(scale · q kᵀ)) v
    _seed,
)
