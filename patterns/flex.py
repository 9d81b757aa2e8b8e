"""FlexAttention's call in a graph: what its functions ``mask_mod`` and ``score_mod`` say, and whether its blocks say no
more than that.

Dynamo leaves a call ``flex_attention(q, k, v, score_mod, block_mask, scale, kernel_options, ...)`` whose result is
(out, logsumexp, largest scores). Both functions are graphs of their own, on scalars: a score, and the indices of the
sequence, head, query and key. They are evaluated on symbols, as dense masks are (:mod:`fastft.patterns.masks`).

The blocks need a proof: a block that ``block_mask`` does not list is skipped, and one that it lists as full is not
masked, whatever ``mask_mod`` would say. PyTorch's ``create_block_mask`` makes blocks out of ``mask_mod`` itself. So
they are believed where it runs in the same graph: all that lies between the blocks and the dense mask, from which it
makes them, was traced inside of that function, and the dense mask has the structure that ``mask_mod`` has. Blocks that
come into the graph from outside may be anybody's, and such a call stays as it is.

With all its calls replaced, nobody reads the blocks, and :func:`forget_blocks` takes them out of the graph.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fastft.kernels._op import Reason
from fastft.patterns._see import dtype, in_place, rank, same_size, see, shape, value
from fastft.patterns.masks import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    Coordinate,
    Structure,
    Symbol,
    called,
    evaluate,
    number_of,
    recover,
    structure_of,
)

__all__ = ["Scores", "forget_blocks", "is_call", "mask_of", "proven", "scores_of"]

#: Where PyTorch makes blocks: out of a mask, and for calls without any.
_MAKERS = re.compile(
    r'torch/nn/attention/flex_attention\.py", line \d+, in (create_block_mask|_create_empty_block_mask)\b'
)
#: From this size on a block is as large as any sequence: PyTorch's way to say that there is no block mask.
_NO_BLOCKS = 1 << 30
#: The calls between which a function is mapped over an axis.
_ENTERS, _LEAVES = "_vmap_increment_nesting", "_vmap_decrement_nesting"


@dataclass(frozen=True)
class Scores:
    """What ``score_mod`` makes of a score: ``softcap · tanh(scale · score / softcap) + bias``, seen where ``mask``
    says. ``softcap``: 0.0 for none. ``bias``: ``[B, H, Sq, Sk]``. ``mask``: a symbol; None: seen everywhere.
    """

    scale: float = 1.0
    softcap: float = 0.0
    bias: fx.Node | None = None
    mask: Symbol | None = None


def is_call(node: Any) -> bool:
    """Whether a node calls FlexAttention."""
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and isinstance(node.target, torch._ops.HigherOrderOperator)
        and node.target.name() == "flex_attention"
        and len(node.args) >= 7
    )


def _graph_of(node: Any) -> fx.Graph | None:
    """The graph of a function that a call is given."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or node.graph.owning_module is None:
        return None
    module = getattr(node.graph.owning_module, str(node.target), None)
    return module.graph if isinstance(module, fx.GraphModule) else None


def _result(graph: fx.Graph) -> Any:
    found = graph.output_node().args[0]
    return found[0] if isinstance(found, (tuple, list)) and len(found) == 1 else found


def _symbols(graph: fx.Graph, indices: int, buffers: Any) -> dict[fx.Node, Symbol]:
    """What a function's arguments are: its last four of ``indices`` count along the mask, then come tensors of the
    graph outside.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    outside: dict[fx.Node, Symbol] = {}
    known: dict[fx.Node, Symbol] = {
        node: Coordinate(axis)
        for node, axis in zip(inputs[indices - 4 : indices], (BATCH, HEAD, QUERY, KEY), strict=True)
    }
    return known | {node: evaluate(buffer, outside) for node, buffer in zip(inputs[indices:], buffers, strict=False)}


def mask_of(call: fx.Node, scores: Scores) -> Structure | Reason:
    """The structure of the mask of a call of FlexAttention; the reason that it, or its blocks, are not known."""
    blocks: Any = call.args[4]
    graph = _graph_of(blocks[-1])
    if graph is None:
        return Reason("mask", "FlexAttention's mask_mod is no graph that can be read")
    buffers = call.args[8] if len(call.args) > 8 else ()
    found = evaluate(_result(graph), _symbols(graph, 4, buffers))
    structure = structure_of("mask_mod", found)
    if isinstance(structure, Reason):
        return structure
    if (problem := _blocks_problem(blocks, structure, shape(call.args[0])[0])) is not None:
        return problem
    if scores.mask is None:
        return structure
    return structure_of("mask_mod and score_mod", found, scores.mask)


def scores_of(call: fx.Node) -> Scores | Reason:
    """What the ``score_mod`` of a call of FlexAttention does, or why that is not known."""
    graph = _graph_of(call.args[3])
    if graph is None:
        return Reason("score_mod", "FlexAttention's score_mod is no graph that can be read")
    buffers: Any = call.args[7] if len(call.args) > 7 else ()
    symbols = _symbols(graph, 5, buffers)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    outside = dict(zip(inputs[5:], buffers, strict=False))
    node, found = _result(graph), Scores()
    while node is not inputs[0]:
        seen = see(node)
        name = called(node)
        inner: Any = None
        plain = found == Scores()  # nothing that comes after it is known yet
        if seen.op in ("cast", "clone", "contiguous"):
            inner = seen.args[0]
        elif name == "where" and plain and len(node.args) == 3 and number_of(node.args[2]) == -math.inf:
            inner, found = node.args[1], Scores(mask=evaluate(node.args[0], symbols))
        elif seen.op == "add" and found.bias is None and found.scale == 1.0 and not found.softcap:
            for scores, added in (seen.args, seen.args[::-1]):
                bias = _bias(added, symbols, outside)
                if bias is not None and isinstance(scores, fx.Node):
                    inner, found = scores, replace(found, bias=bias)
        elif (product := _factor(seen)) is not None:
            factor, inside = product
            tanh = see(inside)
            divided = _factor(see(tanh.args[0])) if tanh.op == "tanh" else None
            if divided is not None and not found.softcap and found.scale == 1.0 and factor > 0:
                if math.isclose(divided[0] * factor, 1.0, rel_tol=1e-6):
                    inner, found = divided[1], replace(found, softcap=factor)
            elif tanh.op != "tanh":
                inner, found = inside, replace(found, scale=found.scale * factor)
        if inner is None:
            return Reason("score_mod", f"FlexAttention's score_mod has {getattr(node, 'name', node)} = {name}(...)")
        node = inner
    return found


def _factor(seen: Any) -> tuple[float, fx.Node] | None:
    """The number that a product or quotient with a number multiplies by, and what it multiplies."""
    if seen.op in ("mul", "div"):
        for number, other in (seen.args[::-1], seen.args)[: 2 if seen.op == "mul" else 1]:
            if isinstance(number, (int, float)) and number != 0 and isinstance(other, fx.Node):
                return (float(number) if seen.op == "mul" else 1.0 / number), other
    return None


def _bias(added: Any, symbols: dict[fx.Node, Symbol], outside: dict[fx.Node, Any]) -> fx.Node | None:
    """The ``[B, H, Sq, Sk]`` of which a score is given its own element."""
    seen = see(added)
    if seen.op != "index" or seen.args[0] not in outside or not isinstance(seen.args[1], (tuple, list)):
        return None
    axes = [evaluate(i, symbols) for i in seen.args[1]]
    source = outside[seen.args[0]]
    return source if axes == [Coordinate(a) for a in (BATCH, HEAD, QUERY, KEY)] and rank(source) == 4 else None


# ---------------------------------------------------------------- blocks


def _made(node: fx.Node) -> bool:
    """Whether a node was traced inside of the function that makes blocks."""
    return _MAKERS.search(str(node.meta.get("stack_trace", ""))) is not None


def _tensors(blocks: Any) -> list[fx.Node]:
    return [n for n in blocks[:-1] if isinstance(n, fx.Node) and isinstance(value(n), torch.Tensor)]


def _blocks_problem(blocks: Any, structure: Structure, batch: Any) -> Reason | None:
    """Why the blocks of a call may hide or show other keys than ``structure`` does for each of ``batch`` sequences."""
    unknown = Reason(
        "mask",
        "FlexAttention's blocks come from outside of the graph, and may hide what its mask_mod shows: call "
        "create_block_mask in the function that is compiled",
    )
    masks: set[fx.Node] = set()
    passed: set[fx.Node] = set()
    stack = _tensors(blocks)
    while stack:
        node = stack.pop()
        if node in passed or isinstance(value(node), (int, torch.SymInt)):  # a length
            continue
        passed.add(node)
        if not _made(node):
            return unknown
        if any(in_place(user) and not _made(user) for user in node.users):
            return Reason("mask", f"FlexAttention's blocks are written to after they were made, through {node.name}")
        name = str(getattr(node.target, "__name__", node.target))
        if dtype(node) == torch.bool and rank(node) == 4 and name == "_remove_batch_dim":
            masks.add(node)
        else:
            stack += node.all_input_nodes
    if not masks:
        sizes = [n for n in blocks[:-1] if isinstance(n, int)][-2:]
        return None if sizes and min(sizes) >= _NO_BLOCKS else unknown
    for mask in masks:
        if isinstance(found := recover(mask), Reason):
            return found
        if found != structure:
            return Reason("mask", "FlexAttention's blocks were made from another mask than its mask_mod")
        each = structure.padding is not None or structure.positions is not None
        if each and not same_size(shape(mask)[0], batch):
            return Reason("mask", f"FlexAttention's blocks were made for {shape(mask)[0]} of {batch} sequences")
    return None


def proven(call: fx.Node) -> frozenset[fx.Node]:
    """The blocks of a call, whose making is known: what happens in there is nothing to look at."""
    return frozenset(_tensors(call.args[4]))


def forget_blocks(graph: fx.Graph) -> None:
    """Erase what made blocks that nobody reads. Each making is one run of nodes, and goes as a whole or stays."""
    runs: list[list[fx.Node]] = []
    inside = False
    for node in graph.nodes:
        # Where a vmap ends, no trace is noted.
        if (node.op in ("call_function", "call_method") and _made(node)) or (inside and called(node) == _LEAVES):
            if not inside:
                runs.append([])
            runs[-1].append(node)
            inside = True
        elif node.op != "get_attr":
            inside = False
    for run in reversed(runs):
        own = set(run)
        whole = sum(called(n) == _ENTERS for n in run) == sum(called(n) == _LEAVES for n in run)
        if whole and all(user in own for node in run for user in node.users):
            for node in reversed(run):
                graph.erase_node(node)
