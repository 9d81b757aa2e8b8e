"""A norm and whoever else reads its input, the residual stream: what both send back is added in the norm's backward, in
one rounding and without a pass over memory of its own.

The norm is one that the rules of ``norm`` have replaced already, by whatever variant. It hands its input on to those
who read it later.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

import fastft.kernels.layer_norm
import fastft.kernels.rms_norm  # noqa: F401  (both register their ops)
from fastft.patterns._match import (
    Bindings,
    Match,
    Pattern,
    Reason,
    Rewrite,
    Table,
    requires_grad,
    row,
    see,
    use_again,
    value,
    variant_of,
)


def _op(node: Any) -> str | None:
    """The norm that a node calls."""
    return next((name for name in ("rms_norm", "layer_norm") if variant_of(name, node) is not None), None)


class Norm(Pattern):
    """A call of one of our norms."""

    anchors = frozenset({"unknown"})

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        if _op(found) is not None:
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
    answer = use_again(norm, str(_op(norm)), *norm.args, **norm.kwargs, pass_through=True)
    if isinstance(answer, Rewrite):
        answer.passes = x
    return answer


def _seed(node: fx.Node) -> str | None:
    return None


TABLE = Table("residual_norm", (row(Norm(), _build),), _seed)  # norm(x) and x
