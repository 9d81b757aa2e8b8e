"""Graph outputs that exist only when somebody reads them.

A lazy output (the model's logits) is dropped from the graph; what it can be computed from is returned in its place,
and the callable wraps that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from fastft.fallback import Attempt
from fastft.lazy_logits import lazy_logits, plain_logits
from fastft.rewrite import sweep


@dataclass(frozen=True)
class At:
    """Where an operand is found at run time: position ``index`` of the graph's inputs, or of its outputs."""

    kind: str
    index: int


@dataclass(frozen=True)
class LazyOutputs:
    """``outputs``: how many the caller expects; ``plans``: for each lazy one its position and the operands of
    ``lazy_logits``.
    """

    outputs: int
    plans: tuple[tuple[int, dict[str, Any]], ...]


def drop_lazy(gm: fx.GraphModule, lazy: dict[fx.Node, dict[str, Any]]) -> LazyOutputs | None:
    """Take the lazy outputs out of the graph, in place; None when there are none."""
    output = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    results = list(output.args[0])
    wanted = len(results)
    dropped = [(i, n) for i, n in enumerate(results) if isinstance(n, fx.Node) and n in lazy]
    plans = []
    for position, node in dropped:
        operands: dict[str, Any] = {}
        for name, what in lazy[node].items():
            if isinstance(what, fx.Node) and what in inputs:
                operands[name] = At("input", inputs.index(what))
            elif isinstance(what, fx.Node):
                if what not in results:
                    results.append(what)
                operands[name] = At("output", results.index(what))
            else:
                operands[name] = what
        plans.append((position, operands))
    for position, _ in dropped:
        results[position] = None
    output.args = (tuple(results),)
    for _, node in dropped:
        sweep(gm.graph, node)
    return LazyOutputs(wanted, tuple(plans)) if plans else None


def with_lazy(
    compiled: Callable[..., Any], lazy: LazyOutputs, errors: list[str] | None = None, strict: bool = False
) -> Callable[..., Any]:
    """Run ``compiled`` and put a lazy tensor where each dropped output was; or a plain one, where that fails, with a
    line in ``errors``.
    """
    said = [] if errors is None else errors

    def run(*args: Any) -> tuple[Any, ...]:
        # Compiled code may free its arguments: the inputs are looked up before the call.
        ready = [
            {k: args[v.index] if isinstance(v, At) and v.kind == "input" else v for k, v in ops.items()}
            for _, ops in lazy.plans
        ]
        results = list(compiled(*args))
        outputs = results[: lazy.outputs]
        for (position, _), operands in zip(lazy.plans, ready, strict=True):
            known = {k: results[v.index] if isinstance(v, At) else v for k, v in operands.items()}
            with Attempt("making lazy logits", "they are computed", said, strict) as attempt:
                outputs[position] = lazy_logits(**known)
            if attempt.failed is not None:
                outputs[position] = plain_logits(**known)
        return tuple(outputs)

    return run
