"""Sums in the forward of a cut graph that the norm behind them computes (``kernels/add_rms_norm.py``).

A decoder layer adds to the residual stream twice, and a norm reads the sum: ``aten.add`` writes it, and the norm reads
it again. Here the norm computes both. Layers without adapters have no such sums: their product adds
(``patterns/residual.py``).

It is done where nothing else takes the sum up: Inductor puts a sum into the kernel of what it adds, where that is
pointwise (dropout), and there it costs nothing. And only behind the cut: a sum that is kept is no norm's result, which
the backward may compute again.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import fastft.kernels.add_rms_norm  # noqa: F401  (registers its op, and the norm's)
from fastft.offload import MOVES
from fastft.partitioner import is_alias
from fastft.slicing import call_like

_ops: Any = torch.ops.fastft


def into_norms(forward: fx.GraphModule) -> int:
    """Let norms of sums compute these, in place; returns how many do."""
    order = {node: i for i, node in enumerate(forward.graph.nodes)}
    norms = [n for n in order if n.target is _ops.rms_norm.default and _is_sum(n.args[0], order)]
    for norm in norms:
        total, *others = norm.args
        with forward.graph.inserting_before(total):  # before its copy to the host begins
            both = call_like(forward.graph, _ops.add_rms_norm.default, (*total.args, *others), norm)
            items = [forward.graph.call_function(operator.getitem, (both, i)) for i in range(3)]
        for item, value in zip(items, both.meta["val"], strict=True):
            item.meta = {**norm.meta, "val": value}
        items[0].meta = dict(total.meta)
        for user in list(norm.users):
            user.replace_all_uses_with(items[1 + user.args[1]])
            forward.graph.erase_node(user)
        forward.graph.erase_node(norm)
        total.replace_all_uses_with(items[0])
        forward.graph.erase_node(total)
    forward.graph.lint()
    forward.recompile()
    return len(norms)


def _is_sum(total: Any, order: dict[fx.Node, int]) -> bool:
    """Whether ``total`` is the sum of two tensors that are in memory, which a norm reads before all others."""
    if total.target is not torch.ops.aten.add.Tensor or total.kwargs or len(total.all_input_nodes) != 2:
        return False
    first, *_ = sorted((u for u in total.users if u.target not in MOVES), key=order.__getitem__)
    if first.target is not _ops.rms_norm.default or any(u.target is not operator.getitem for u in first.users):
        return False
    if any(order[n] > order[total] for n in first.all_input_nodes):  # a weight that is computed
        return False
    values = [n.meta["val"] for n in (total, *total.args)]
    alike = all(v.dtype == values[0].dtype and v.shape == values[0].shape and v.is_contiguous() for v in values)
    return alike and all(map(_in_memory, total.args))


def _in_memory(node: fx.Node) -> bool:
    """Whether a tensor is written in any case: a graph's input, a result of ours, and what such an op reads."""
    while is_alias(node):
        node = node.all_input_nodes[0]
    if node.op == "placeholder" or any(_is_ours(user) for user in node.users):
        return True
    return _is_ours(node.args[0] if node.target is operator.getitem else node)


def _is_ours(node: Any) -> bool:
    return getattr(node.target, "namespace", "") == "fastft"
