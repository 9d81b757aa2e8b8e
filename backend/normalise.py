"""Step 2 of the pipeline: one flat graph, without what does nothing.

Gradient checkpointing traces to a higher-order op with the layer as its body. Executed as it is, it would run with
``preserve_rng_state=False`` (dropout gets another mask in the backward: silently wrong gradients), and no rule could
look across its boundary. So each body is inlined, and its nodes remember that the user allowed recomputation there:
AOTAutograd's partitioner reads the same two tags that it writes itself for the higher-order op. A body with a
selective-checkpointing context function of the user's stays as it is.

A region inside a region belongs to the outer one, which is recomputed as a whole.

With ``dynamic=True`` every Python float is an input of the graph: a norm's ε, an adapter's scaling, dropout's p. Those
that are attributes of modules become the constants that rules look for, and another value compiles again.
"""

from __future__ import annotations

import copy
import operator
import re
from typing import Any

import torch
from torch import fx

from fastft import _torch_compat as compat
from fastft.rewrite import module_path


def normalise(gm: fx.GraphModule, *, recompute: bool = True, planned: bool = False) -> dict[str, int]:
    """Inline checkpoint bodies and drop calls without effect, in place. ``recompute=False`` forgets that the user
    allowed recomputation; so is it in a graph without a backward, where AOTAutograd refuses tagged random ops.
    ``planned``: regions are numbered, and nothing is said yet of what is recomputed; in a graph without any, each layer
    of the model is one (:mod:`fastft.memory` decides later).

    Returns counts for the report: ``checkpoints`` inlined, ``kept`` (a user's own checkpoint policy).
    """
    counts = {"checkpoints": 0, "kept": 0}
    given = (n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder")
    trained = torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in given)
    recompute = recompute and trained
    waiting = list(gm.graph.nodes)[::-1]  # a stack: what a region is replaced by is looked at next
    while waiting:
        node = waiting.pop()
        if node.op != "call_function":
            continue
        if node.target in compat.no_side_effect_calls() and not node.users:
            gm.graph.erase_node(node)
        elif compat.is_checkpoint(node.target):
            body = getattr(gm, node.args[0].target)
            if body.meta.get("_checkpoint_context_fn") is not None:
                counts["kept"] += 1
                continue
            counts["checkpoints"] += 1
            layer = node.meta.get("ac_graph_id", counts["checkpoints"]) if recompute else None
            waiting += _inline(gm, node, body, layer, recompute=not planned)[::-1]
    if planned and trained and not counts["checkpoints"]:
        counts["layers"] = _mark_layers(gm)
    if compat.numbers_are_inputs():
        _make_constants(gm)
    # Items that nobody reads (the second result of a higher-order op, as torch 2.11 lists it) would look like another
    # use.
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "call_function" and node.target is operator.getitem and not node.users:
            gm.graph.erase_node(node)
    gm.graph.lint()
    return counts


#: Where a list of layers ends in a module's path: ``model.layers.3`` of ``model.layers.3.mlp``.
_LAYER = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")


def _mark_layers(gm: fx.GraphModule) -> int:
    """Number the layers of the model, as regions; returns how many there are."""
    numbers: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and (found := _LAYER.match(module_path(node))):
            node.meta["ac_graph_id"] = numbers.setdefault(found[0], len(numbers) + 1)
    return len(numbers)


def _make_constants(gm: fx.GraphModule) -> None:
    """Python floats that modules hold, and what is computed of them alone, as numbers in the graph."""
    for node in list(gm.graph.nodes):
        number = node.meta.get("example_value")
        inputs = node.all_input_nodes
        held = not inputs or (inputs[0].op == "placeholder" and "." in compat.input_source(inputs[0]))
        if isinstance(number, torch.SymFloat) and node.op != "placeholder" and held:
            _replace(node, float(number))  # which is a guard
            gm.graph.erase_node(node)


def _inline(
    gm: fx.GraphModule, call: fx.Node, body: fx.GraphModule, layer: int | None, recompute: bool
) -> list[fx.Node]:
    """Replace ``call`` by the nodes of ``body``, as region number ``layer``, tagged to be recomputed or not; returns
    them.
    """
    holder, *operands = call.args
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    mapped: dict[fx.Node, Any] = dict(zip(placeholders, operands, strict=True))
    result: Any = None
    added: list[fx.Node] = []
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "placeholder" or (
                node.op == "call_function" and node.target in compat.no_side_effect_calls()
            ):
                continue
            if node.op == "output":
                result = fx.map_arg(node.args[0], lambda n: mapped[n])
                break
            if node.op == "get_attr":
                mapped[node] = _move_attribute(gm, body, node)
                continue
            new = gm.graph.node_copy(node, lambda n: mapped[n])
            new.meta = copy.copy(node.meta)
            # torch 2.11 tags a body's nodes while it traces them.
            new.meta.pop("recompute", None)
            new.meta.pop("ac_graph_id", None)
            if layer is not None:
                new.meta["ac_graph_id"] = layer
                if recompute:
                    new.meta["recompute"] = compat.PREFER_RECOMPUTE
            mapped[node] = new
            added.append(new)
    _replace_outputs(gm, call, result)
    if isinstance(holder, fx.Node) and not holder.users:
        gm.graph.erase_node(holder)
    return added


def _move_attribute(gm: fx.GraphModule, body: fx.GraphModule, node: fx.Node) -> fx.Node:
    """Give the outer module what a body's ``get_attr`` refers to (another op's body), under a free name."""
    name = base = str(node.target).replace(".", "_")
    number = 0
    while hasattr(gm, name):
        number += 1
        name = f"{base}_{number}"
    thing: Any = body
    for part in str(node.target).split("."):
        thing = getattr(thing, part)
    setattr(gm, name, thing)
    new = gm.graph.get_attr(name)
    new.meta = copy.copy(node.meta)
    return new


def _replace_outputs(gm: fx.GraphModule, call: fx.Node, result: Any) -> None:
    """Point the users of the higher-order op (getitems of its tuple) at the inlined values."""
    for user in list(call.users):
        if isinstance(result, (tuple, list)) and user.op == "call_function" and user.target is operator.getitem:
            item: Any = user.args[1]
            _replace(user, result[item])
            gm.graph.erase_node(user)
    if call.users:  # one value that is no tuple, or the whole tuple (as a graph's output)
        _replace(call, result)
    gm.graph.erase_node(call)


def _replace(old: fx.Node, new: Any) -> None:
    """``new`` (a node, a tuple of nodes, a number, None) wherever ``old`` is used."""
    for user in list(old.users):
        user.args = _exchange(user.args, old, new)
        user.kwargs = _exchange(user.kwargs, old, new)


def _exchange(value: Any, old: fx.Node, new: Any) -> Any:
    return fx.node.map_aggregate(value, lambda v: new if v is old else v)
