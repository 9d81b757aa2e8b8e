"""MLPs in AOTAutograd's joint graph that are computed a slice of tokens at a time (``kernels/lora_mlp.py``).

A gated MLP whose layers are ours is a chain of raw calls there, and one that comes back::

    lora_stack → lora_glu → lora_linear                       lora_linear_backward → lora_glu_backward →
    (or: lora_linear of gate and up → glu → lora_linear)      lora_stack_backward

Each is replaced by one call, in regions that the plan recomputes: what the backward of a slice computes again is what
the region's backward computes again in any case. A chain of which anybody else reads a part stays as it is.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

import fastft.kernels.lora_mlp  # noqa: F401  (registers its op, and those of which a chain consists)
from fastft.kernels._op import Reason
from fastft.kernels.lora_mlp import tokens_of_slice
from fastft.rewrite import sweep

_ops: Any = torch.ops.fastft


@dataclass
class Slices:
    """What was done. ``regions``: of forward nodes, with the new ones; ``again``: the new backward node of each MLP,
    which computes it again → its region; ``tokens`` of a slice of the backward, by region; ``left``: why a region's MLP
    stays in one piece.
    """

    regions: dict[str, int]
    again: dict[str, int] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    left: dict[int, Reason] = field(default_factory=dict)


def slice_mlps(
    joint: fx.GraphModule,
    forward: Set[fx.Node],
    regions: Mapping[str, int],
    wanted: Set[int],
    size: Callable[[Any], int],
) -> Slices:
    """Have the MLPs of the regions ``wanted`` computed by slices, in place, where there are tokens for more than one.
    ``forward``: the nodes of the forward; ``size`` gives the number that a size is.
    """
    done = Slices(dict(regions))
    for node in list(joint.graph.nodes):
        region = regions.get(node.name)
        if region is None or region not in wanted or node not in forward or node.target is not _ops.lora_linear.default:
            continue
        mlp = _mlp(node)
        if isinstance(mlp, _MLP) and {regions.get(n.name) for n in (mlp.first, *mlp.h, mlp.act)} != {region}:
            mlp = Reason("checkpoint", "its layers are not all in the same checkpointed region")
        back = _way_back(mlp) if isinstance(mlp, _MLP) else mlp
        if isinstance(back, Reason):
            done.left[region] = back
        elif isinstance(mlp, _MLP) and back is not None:
            x = mlp.x.meta["val"]
            tokens, width = size(math.prod(x.shape[:-1])), size(mlp.act.meta["val"].shape[-1])
            rows = [tokens_of_slice(tokens, width, x.element_size(), forward=half) for half in (True, False)]
            if tokens > rows[1]:
                made, again = _replace(joint.graph, mlp, back, *rows)
                done.regions |= {n.name: region for n in made}
                done.again[again.name] = region
                done.tokens[region] = rows[1]
    joint.graph.lint()
    joint.recompile()
    return done


# ------------------------------------------------------------------------------------------------------------- forward


@dataclass(frozen=True)
class _Layer:
    """One linear layer, as the raw ops take it: nodes and numbers."""

    weight: fx.Node
    quant: Sequence[fx.Node]
    shape: Sequence[Any]
    blocks: Sequence[int]
    bias: fx.Node | None = None
    a: Sequence[fx.Node] = ()
    b: Sequence[fx.Node] = ()
    b_bias: Sequence[fx.Node | None] = ()
    scaling: Sequence[float] = ()


@dataclass(frozen=True)
class _MLP:
    """A chain of the forward. ``layers``: gate, up and down; ``first``: the call of gate and up, and ``order``: which
    of its layers these are; ``wide``: what ``act`` reads of it; ``down``: the last call; ``h``: of ``first`` and
    ``down``.
    """

    x: fx.Node
    layers: Sequence[_Layer]
    first: fx.Node
    order: tuple[int, ...]
    wide: tuple[fx.Node, ...]
    act: fx.Node
    kind: str
    down: fx.Node
    h: tuple[fx.Node, ...]
    residual: fx.Node | None
    lora_dtype: torch.dtype

    @property
    def stacked(self) -> bool:
        return self.first.target is _ops.lora_stack.default


def _named(node: fx.Node) -> dict[str, Any]:
    """The arguments of a raw call by their names."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    return dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs


def _stored(given: Mapping[str, Any]) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Of each layer of a call, its weight and how that is stored."""
    each = len(given["quant"]) // len(given["weight"])
    for i, weight in enumerate(given["weight"]):
        two = slice(2 * i, 2 * i + 2)
        yield weight, given["quant"][each * i : each * (i + 1)], given["shape"][two], given["blocks"][two]


def _linears(call: fx.Node) -> tuple[list[_Layer], tuple[fx.Node, ...], torch.dtype | None] | Reason:
    """Of a call of ``lora_linear``: its layers, its h, the dtype of its adapters' products."""
    given = _named(call)
    h, thin = given["h"], {} if given["h"] is None else _named(given["h"])
    if any(own is not None for own in thin.get("x_lora", ())):
        return Reason("dropout", "an adapter has an input of its own, for all tokens (its dropout)")
    if given["out_dtype"] != (of := given["x"].meta["val"].dtype):
        return Reason("dtype", f"a layer of {of} gives {given['out_dtype']}")
    layers, start = [], 0
    for stored, bias, count in zip(_stored(given), given["bias"], given["adapters"], strict=True):
        mine = slice(start, start := start + count)
        b, b_bias, scaling = (given[name][mine] for name in ("b", "b_bias", "scaling"))
        layers.append(_Layer(*stored, bias, thin.get("a", ())[mine], b, b_bias, scaling))
    return layers, () if h is None else (h,), thin.get("lora_dtype")


def _mlp(down: fx.Node) -> _MLP | Reason | None:
    """The chain that ends with ``down``; why it cannot be taken by slices; None where it is none."""
    act: Any = down.args[0]
    order: tuple[int, ...] = (0, 1)
    h: tuple[fx.Node, ...] = ()
    if act.target is _ops.lora_glu.default and act.args[0].target is _ops.lora_stack.default:
        wide, (first, *_) = (act.args[0],), act.args
        of_stack, of_glu = _named(first), _named(act)
        each = zip(_stored(of_stack), of_stack["a"], of_glu["b"], of_glu["scaling"], strict=True)
        both = [_Layer(*stored, None, [a], [b], [None], [scale]) for stored, a, b, scale in each]
        kind, thin = of_glu["kind"], first.args[0].meta["val"].dtype
    elif act.target is _ops.glu.default and all(n.target is operator.getitem for n in act.args[:2]):
        wide, kind = tuple(act.args[:2]), act.args[2]
        first, other = (n.args[0] for n in wide)
        if any(call.target is not _ops.lora_linear.default for call in (first, other)):
            return None
        if first is not other or len(first.args[1]) != 2:
            apart = (found for call in (first, other) if isinstance(found := _linears(call), Reason))
            return next(apart, Reason("layers", "gate and up are not two results of one op"))
        order = tuple(n.args[1] for n in wide)
        found = _linears(first)
        if isinstance(found, Reason):
            return found
        both, h, thin = found
    elif act.target is _ops.glu_packed.default:
        return Reason("packed", "gate and up are one layer")
    else:
        return None
    if sorted(order) != [0, 1]:
        return None
    found = _linears(down)
    if isinstance(found, Reason):
        return found
    (last,), of_down, dtype = found
    layers = [*(both[i] for i in order), last]
    if thin is not None and dtype is not None and thin != dtype:
        return Reason("dtype", f"the adapters of gate and up multiply in {thin}, down's in {dtype}")
    if len({len(layer.quant) for layer in layers}) > 1:
        return Reason("quantization", "the layers are quantised in different ways")
    x: Any = first.args[0]
    to = thin or dtype or x.meta["val"].dtype
    return _MLP(x, layers, first, order, wide, act, kind, down, (*h, *of_down), _named(down)["residual"], to)


# ------------------------------------------------------------------------------------------------------------ backward

#: A gradient: ("x",), ("weight", layer), ("sum", layer), ("a", layer, adapter), ("b", layer, adapter).
_Slot = tuple[Any, ...]


@dataclass(frozen=True)
class _Back:
    """The chain that comes back: the gradient that it begins with, its calls, and the items that are read of them."""

    dy: fx.Node
    calls: tuple[fx.Node, ...]
    read: Mapping[_Slot, fx.Node]


def _items(call: fx.Node) -> dict[int, fx.Node]:
    """The items of a call's results that somebody reads."""
    return {user.args[1]: user for user in call.users if user.target is operator.getitem and user.users}  # type: ignore[misc]


def _slots(call: fx.Node, roles: Sequence[int]) -> Iterator[tuple[int, _Slot]]:
    """What the results of a call of ``lora_linear_backward`` are. ``roles``: which layers are its own."""
    yield 0, ("x",)
    for i, role in enumerate(roles):
        yield from ((1 + 2 * i, ("weight", role)), (2 + 2 * i, ("sum", role)))
    at = 1 + 2 * len(roles)
    for role, count in zip(roles, _named(call)["adapters"], strict=True):
        for j in range(count):
            yield from ((at, ("a", role, j)), (at + 1, ("b", role, j)))
            at += 3


def _reader(node: fx.Node, op: Any) -> fx.Node | None:
    """The only call of ``op`` that reads a node."""
    found = [user for user in node.users if user.target is op.default]
    return found[0] if len(found) == 1 else None


def _way_back(mlp: _MLP) -> _Back | Reason | None:
    """The chain that comes back; why it cannot be taken by slices; None where nothing comes back."""
    middle = _reader(mlp.wide[0], _ops.lora_glu_backward if mlp.stacked else _ops.glu_backward)
    if middle is None:
        return None
    layers = (_ops.lora_linear, _ops.lora_linear_down, _ops.lora_linear_backward)
    others = [user for user in mlp.act.users if user.target not in [op.default for op in layers]]
    if others:
        return Reason("escapes", f"{mlp.act.name} is also read by {others[0].name}")
    dact: Any = middle.args[0]
    last: Any = dact.args[0] if dact.target is operator.getitem and dact.args[1] == 0 else None
    apart = Reason("backward", "the gradients of its layers do not follow each other")
    if last is None or last.target is not _ops.lora_linear_backward.default:
        return apart
    of_last = _named(last)
    if list(of_last["weight"]) != [mlp.layers[2].weight] or len(of_last["dy"]) != 1:
        return apart
    found = {slot: item for i, slot in _slots(last, [2]) if (item := _items(last).get(i)) is not None}
    del found["x",]
    between = _items(middle)
    back = _ops.lora_stack_backward if mlp.stacked else _ops.lora_linear_backward
    grads = [between[i] for i in ((0,) if mlp.stacked else (0, 1)) if i in between]
    first = _reader(grads[0], back) if grads else None
    if mlp.stacked:
        found |= {("b", i, 0): between[1 + i] for i in range(2) if 1 + i in between}
        slots = [(0, ("x",)), (1, ("a", 0, 0)), (2, ("a", 1, 0))]
    else:
        slots = [] if first is None else list(_slots(first, [mlp.order.index(i) for i in range(2)]))
    if first is not None:
        given = _named(first)
        if not mlp.stacked and list(given["dy"]) != [between.get(i) for i in (mlp.order.index(0), mlp.order.index(1))]:
            return apart
        found |= {slot: item for i, slot in slots if (item := _items(first).get(i)) is not None}
    linears = [call for call in (last, first) if call is not None and call.target is last.target]
    if not all(_named(call)["together"] for call in linears):
        return Reason("variant", "a variant was chosen for its layers: what computes them by slices is another op")
    calls = {mlp.first, *mlp.wide, mlp.act, *mlp.h, mlp.down, last, dact, middle, *grads, first}
    for value in (*mlp.wide, mlp.act, *mlp.h, dact, *grads):
        others = [user for user in value.users if user not in calls]
        if others:
            return Reason("escapes", f"{value.name} is also read by {others[0].name}")
    return _Back(of_last["dy"][0], (last, middle, *([] if first is None else [first])), found)


# --------------------------------------------------------------------------------------------------------- replacement


def _replace(graph: fx.Graph, mlp: _MLP, back: _Back, forward: int, backward: int) -> tuple[list[fx.Node], fx.Node]:
    """The new forward nodes (the call, and its items: the result, and h), and the new backward node, with so many
    tokens in a slice.
    """
    flat = {name: [t for layer in mlp.layers for t in getattr(layer, name)] for name in _LISTS}
    layers = (
        [layer.weight for layer in mlp.layers], flat["quant"], flat["shape"], flat["blocks"],
        [layer.bias for layer in mlp.layers], [len(layer.a) for layer in mlp.layers],
        flat["a"], flat["b"], flat["b_bias"], flat["scaling"],
    )  # fmt: skip
    how = mlp.kind, mlp.stacked, mlp.lora_dtype
    with graph.inserting_before(mlp.down):
        given = (mlp.x, *layers, mlp.residual, *how, forward)
        call = call_like(graph, _ops.lora_mlp.default, given, mlp.down)
        y, h = items = [graph.call_function(operator.getitem, (call, i)) for i in range(2)]
    for item, value in zip(items, call.meta["val"], strict=True):
        item.meta = {**mlp.down.meta, "val": value}
    each = range(len(mlp.layers))
    thin = [(role, j) for role, layer in enumerate(mlp.layers) for j in range(len(layer.a))]
    lists: list[list[_Slot]] = [[(name, role) for role in each] for name in ("weight", "sum")]
    lists += [[(name, *which) for which in thin] for name in ("a", "b")]
    needs = ("x",) in back.read, *([slot in back.read for slot in slots] for slots in lists)
    order: list[_Slot] = [("x",)]
    for pairs in (zip(*lists[:2], strict=True), zip(*lists[2:], strict=True)):
        order += [slot for pair in pairs for slot in pair]
    ends = [item for call in (mlp.down, *back.calls) for item in (*call.users, call)]
    with graph.inserting_before(back.calls[0]):
        backs = (back.dy, mlp.x, h if mlp.layers[2].a else None, *layers, *how, backward, *needs)
        again = call_like(graph, _ops.lora_mlp_backward.default, backs, back.calls[0])
        for slot, old in back.read.items():
            item = graph.call_function(operator.getitem, (again, order.index(slot)))
            item.meta = dict(old.meta)
            old.replace_all_uses_with(item)
    for item in list(mlp.down.users):
        item.replace_all_uses_with(y)
    for node in ends:
        sweep(graph, node)
    return [call, *items], again


_LISTS = ("quant", "shape", "blocks", "a", "b", "b_bias", "scaling")


def call_like(graph: fx.Graph, op: Any, args: tuple[Any, ...], old: fx.Node) -> fx.Node:
    """A new call, with the metadata of ``old`` and its own value."""
    node = graph.call_function(op, args)
    values = fx.map_arg(args, lambda n: n.meta["val"])
    node.meta = dict(old.meta)
    with values[0].fake_mode:
        node.meta["val"] = op(*values)
    if "eager_input_vals" in old.meta:  # by which Inductor keeps the operands' strides
        node.meta["eager_input_vals"] = values, {}
    return node
