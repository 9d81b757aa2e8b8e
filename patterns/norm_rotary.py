"""The norms of q's and k's heads and the rotary embedding after them, once more: one launch for all three.

The norms and the rotary are ones that the rules of ``norm`` and ``rotary`` have replaced already; heads may be
transposed in between, as transformers does. What is between them is read by nobody else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

import fastft.kernels.norm_rotary
import fastft.kernels.rms_norm
import fastft.kernels.rotary  # noqa: F401  (the imports register the ops)
from fastft.kernels._op import OPS
from fastft.patterns._match import (
    Bindings,
    Match,
    Pattern,
    Reason,
    Rewrite,
    Table,
    dtype,
    is_noop,
    rank,
    row,
    see,
    use,
    variant_of,
)


class Turned(Pattern):
    """A call of ``rotary`` for q and k, both of them results of ``rms_norm``: these are bound to ``q`` and ``k``, and
    whether they are transposed in between to ``transpose``.
    """

    anchors = frozenset({"unknown"})

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        if variant_of("rotary", found) is None or found.args[1] is None:
            return
        more: Bindings | None = bound.take(found)
        for name, x in zip("qk", found.args[:2], strict=True):
            norm, turns, passed = _norm(x)
            if norm is None or more is None:
                return
            more = Bindings(more.names, more.inside | passed | {norm}).bind(name, norm)
            more = None if more is None else more.bind("transpose", turns)
        if more is not None:
            yield more


def _norm(x: Any) -> tuple[fx.Node | None, bool, set[fx.Node]]:
    """The norm that x comes from, whether its second and third axis were exchanged, and the nodes in between."""
    turns, passed = False, set()
    while isinstance(x, fx.Node):
        seen = see(x)
        exchanges = seen.op == "transpose" and rank(x) == 4 and {a % 4 for a in seen.args[1:]} == {1, 2}
        exchanges = exchanges or (seen.op == "permute" and seen.args[1] == (0, 2, 1, 3))
        if not exchanges and not is_noop(seen):
            break
        turns ^= exchanges
        passed.add(x)
        x = seen.args[0]
    return (x if variant_of("rms_norm", x) is not None and rank(x) == 4 else None), turns, passed


def _of(norm: fx.Node) -> tuple[Any, ...]:
    """x, weight, eps and offset of a call that ``norm`` has made."""
    x, weight, eps, offset, _ = norm.args
    return x, weight, eps, offset


def _build(m: Match) -> Rewrite | Reason | None:
    turned: fx.Node = m.anchor
    _, _, cos, sin, style, out_dtype, rotary_dim, seq_dim = turned.args
    for name, node in (("rotary", turned), ("rms_norm", m["q"]), ("rms_norm", m["k"])):
        variant = variant_of(name, node)
        if variant is not None and variant.name != OPS[name].default:
            return Reason("variant", f"variant {variant.name} was chosen for {node.name}, and stays")
    (q, q_weight, eps, offset), (k, k_weight, k_eps, k_offset) = _of(m["q"]), _of(m["k"])
    if (eps, offset) != (k_eps, k_offset):
        return Reason("eps", f"the norms of q and k differ: ε is {eps} and {k_eps}, 1 + w {offset} and {k_offset}")
    if len({n.meta.get("ac_graph_id") or 0 for n in (turned, m["q"], m["k"])}) > 1:
        return Reason("checkpoint", "the norms are not in rotary's checkpointed region")
    for node in m.inside - {turned}:  # views too: the norm would be computed twice
        if other := next((user for user in node.users if user not in m.inside), None):
            return Reason("escapes", f"the normalised {node.name} is also used by {other.name}")
    items = sorted(turned.users, key=lambda item: int(item.args[1]))  # type: ignore[arg-type]
    if [item.args[1] for item in items] != [0, 1]:
        return Reason("outputs", "q or k is not used")
    shared = (cos, sin, eps, offset, style, out_dtype or dtype(m["q"]), rotary_dim, seq_dim, m["transpose"])
    answer = use("norm_rotary", q, k, q_weight, k_weight, *shared)
    if isinstance(answer, Rewrite):
        answer.outputs, answer.inside = tuple(items), m.inside | set(items)
        answer.notes = "q and k, their norms and their rotary, in one launch"
    return answer


def _seed(node: fx.Node) -> str | None:
    return None


TABLE = Table("norm_rotary", (row(Turned(), _build),), _seed)  # R norm(q), R norm(k)
