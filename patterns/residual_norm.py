"""A norm and whoever else reads its input, the residual stream: what both send back is added in the norm's backward, in
one rounding and without a pass over memory of its own.

The norm is one that the rules of ``norm`` have replaced already. It hands its input on to those who read it later.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from fastft.kernels.layer_norm import layer_norm
from fastft.kernels.rms_norm import rms_norm
from fastft.patterns._match import Bindings, Match, Pattern, Reason, Rewrite, Table, requires_grad, row, see, use, value

_OPS = {rms_norm: "rms_norm", layer_norm: "layer_norm"}


class Norm(Pattern):
    """A call of one of our norms."""

    anchors = frozenset({"unknown"})

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        if isinstance(found, fx.Node) and found.target in _OPS:
            yield bound.take(found)


def _region(node: fx.Node) -> int:
    """The checkpointed region that a node is recomputed with; 0: none."""
    return node.meta.get("ac_graph_id") or 0


def _sends_back(reader: fx.Node, x: fx.Node) -> bool:
    """Whether a gradient of x may come back from ``reader``; ``y.type_as(x)`` reads x's dtype alone."""
    seen, found = see(reader), value(reader)
    if seen.op == "cast" and seen.args[0] is not x:
        return False
    return any(
        isinstance(t, torch.Tensor) and t.requires_grad
        for t in (found if isinstance(found, (tuple, list)) else (found,))
    )


def _build(m: Match) -> Rewrite | Reason | None:
    norm = m.anchor
    x: Any = norm.args[0]
    later = [u for u in x.users if u > norm and u.op != "output"]
    # Nothing comes back on two ways, or the norm is under no_grad, where what it hands on would lose its gradient.
    if not requires_grad(x) or not requires_grad(norm) or not any(_sends_back(u, x) for u in later):
        return None
    if any(_region(u) != _region(norm) for u in later):
        return Reason("checkpoint", "what reads the norm's input later is not in the norm's checkpointed region")
    answer = use(_OPS[norm.target], *norm.args, **norm.kwargs, pass_through=True)
    if isinstance(answer, Rewrite):
        answer.passes = x
    return answer


def _seed(node: fx.Node) -> str | None:
    return None


TABLE = Table("residual_norm", (row(Norm(), _build),), _seed)  # norm(x) and x
