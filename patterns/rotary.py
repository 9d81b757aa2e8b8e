"""Rotary position embedding, in the five spellings of transformers; q and k go into one launch.

A site is one rotated tensor. Where another one stands just before it, rotated in the same way by the same tables, the
two are q and k of one layer and are replaced together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

import fastft.kernels.rotary  # noqa: F401  (registers the op)
from fastft.patterns._match import (
    Bindings,
    Match,
    Pattern,
    Reason,
    Rewrite,
    Rule,
    Table,
    Var,
    alt,
    cast,
    const,
    down,
    dtype,
    op,
    rank,
    row,
    same_size,
    see,
    shape,
    through,
    use,
)
from fastft.patterns._parts import evens, first_half, odds, part, piece, second_half


class items(Pattern):
    """A tuple or list of exactly these."""

    def __init__(self, *patterns: Pattern) -> None:
        self.patterns = patterns

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        if not isinstance(found, (tuple, list)) or len(found) != len(self.patterns):
            return
        states = [bound]
        for pattern, item in zip(self.patterns, found, strict=True):
            states = [after for before in states for after in pattern.match(item, before)]
        yield from states


class call(Pattern):
    """A call of this very function (one that no canonical op stands for), with its first operand."""

    def __init__(self, target: Callable[..., Any], operand: Pattern) -> None:
        self.target, self.operand = target, operand

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        if isinstance(found, fx.Node) and found.op == "call_function" and found.target is self.target:
            yield from self.operand.match(found.args[0], bound.take(found))


class leading(Pattern):
    """``x[..., :R]``, with x bound to ``x`` and the piece itself to ``turned``: partial rotary."""

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        got = piece(found)
        if got is not None and (got.start, got.step) == (0, 1):
            for more in Var("x").match(got.source, bound):
                yield from Var("turned").match(found, more)


class trailing(Pattern):
    """``x[..., R:]``: the part that partial rotary passes on."""

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        got = piece(found)
        if got is not None and (got.stop, got.step) == (got.width, 1):
            for more in Var("x").match(got.source, bound):
                yield from Var("passed").match(found, more)


x = Var("x")
cos, sin = Var("cos"), Var("sin")
last = alt(const(-1), const(3))


def _half(x: Pattern) -> Pattern:
    """``x cos + cat(−x₂, x₁) sin``: Llama's rotate_half."""
    turned = op("cat", items(op("neg", part(x, second_half)), part(x, first_half)), last)
    return x * cos + turned * sin


def _interleaved(x: Pattern) -> Pattern:
    """``x cos + (−x₂, x₁ interleaved) sin``: GPT-J's rotate_every_two."""
    pairs = op("stack", items(op("neg", part(x, odds)), part(x, evens)), alt(const(-1), const(4)))
    flat = alt(op("flatten", pairs, alt(const(-2), const(3)), alt(const(-1), const(4))), op("view", pairs))
    return x * cos + flat * sin


def _apart(x: Pattern, first: Any, second: Any) -> Pattern:
    """``cat(x₁ cos − x₂ sin, x₂ cos + x₁ sin)``."""
    x1, x2 = part(x, first), part(x, second)
    return op("cat", items(op("sub", x1 * cos, x2 * sin), x2 * cos + x1 * sin), last)


def _partial(turned: Pattern) -> Pattern:
    """``cat(turned x[..., :R], x[..., R:])``."""
    return op("cat", items(turned, trailing()), last)


def _complex() -> Pattern:
    """``(x as complex pairs) · table``, back to real pairs: Llama 4, DeepSeek V2."""
    pairs = call(torch.view_as_complex, op("view", cast(x)))
    return op("flatten", call(torch.view_as_real, pairs * cos), alt(const(3), const(-2)))


def _arguments(m: Match, style: str) -> dict[str, Any] | None:
    """What the op is called with for one site; None when the numbers say that this is another computation."""
    source = through(m["x"], "noop", "widen")
    rotary_dim = shape(source)[-1] if rank(source) else None
    if "turned" in m.names:
        turned, passed = piece(m["turned"]), piece(m["passed"])
        if turned is None or passed is None or turned.stop != passed.start:
            return None
        rotary_dim = turned.stop
    table = m["cos"]
    if rank(source) != 4 or not isinstance(table, fx.Node):
        return None
    # Three axes are broadcast: the first of them over the heads, not over the batch as the op would have it.
    if rank(table) == 3 and not same_size(shape(table)[0], 1):
        return None
    # The tables have an axis of one where the heads are; q and k as [batch, seq, heads, D] have it third.
    sizes, seq_dim = shape(source), 2
    if rank(table) == 4 and not (same_size(shape(table)[1], 1) and same_size(shape(table)[2], sizes[2])):
        seq_dim = 1
    return {
        "x": source,
        "cos": table,
        "sin": m.get("sin"),
        "style": style,
        "out_dtype": dtype(m.anchor),
        "rotary_dim": rotary_dim,
        "seq_dim": seq_dim,
    }


#: Functions without a canonical name that give the same for the same.
_PURE = (torch.repeat_interleave,)


def _same(a: Any, b: Any, depth: int = 8) -> bool:
    """Whether two values are one: the same node, or the same computation of the same nodes (a table indexed twice)."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node):
        if a is b:
            return True
        alike = a.op == b.op and a.target == b.target and a.op in ("call_function", "call_method")
        pure = (see(a).op != "unknown" or a.target in _PURE) and not a.is_impure()
        return alike and pure and depth > 0 and _same((a.args, a.kwargs), (b.args, b.kwargs), depth - 1)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(_same(m, n, depth) for m, n in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k], depth) for k in a)
    return type(a) is type(b) and not isinstance(a, fx.Node) and a == b


#: How far before a site its partner is looked for. transformers rotates k right after q: 20 nodes in the longest
#: spelling.
NEAR = 48


def _partner(pattern: Pattern, style: str, anchor: fx.Node, mine: dict[str, Any]) -> tuple[Match, Any] | None:
    """The nearest earlier site that can be replaced together with this one: its match, and its x."""
    rule, node = Rule(pattern, lambda m: None, ""), anchor
    shared = mine.keys() - {"x"}
    for _ in range(NEAR):
        node = node.prev
        if node.op == "root":
            return None
        # Replaced together, both results stand where the later one did: nobody may need the earlier one before.
        if see(node).op != see(anchor).op or any(user < anchor for user in node.users):
            continue
        for m in rule.tries(node):
            theirs = _arguments(m, style)
            if theirs is None or not all(_same(theirs[key], mine[key]) for key in shared):
                continue
            sizes, other = shape(theirs["x"]), shape(mine["x"])
            if dtype(theirs["x"]) == dtype(mine["x"]) and all(
                same_size(sizes[d], other[d]) for d in (0, mine["seq_dim"], 3)
            ):
                return m, theirs["x"]
    return None


def _with(answer: Rewrite | Reason, notes: str, outputs: tuple[fx.Node, ...], inside: frozenset[fx.Node]) -> Any:
    if isinstance(answer, Rewrite):
        answer.notes, answer.outputs, answer.inside = notes, outputs, inside
    return answer


def _rotary(pattern: Pattern, style: str) -> tuple[Pattern, Callable[[Match], Rewrite | Reason | None]]:
    """A table row's two halves: the pattern, and what to build from it."""

    def build(m: Match) -> Rewrite | Reason | None:
        mine = _arguments(m, style)
        if mine is None:
            return None
        shared = [mine[key] for key in ("cos", "sin", "style", "out_dtype", "rotary_dim", "seq_dim")]
        partner = _partner(pattern, style, m.anchor, mine)
        if partner is None:
            answer = use("rotary", mine["x"], None, *shared)
            return _with(answer, "one tensor", (m.anchor,), m.inside)
        earlier, q = partner
        answer = use("rotary", q, mine["x"], *shared)
        return _with(answer, "q and k in one launch", (earlier.anchor, m.anchor), earlier.inside | m.inside)

    return pattern, build


def _seed(node: fx.Node) -> str | None:
    seen = see(node)
    if node.op == "call_function" and node.target is torch.view_as_complex:
        return "a product of complex pairs"
    if seen.op in ("cat", "stack") and isinstance(seen.args[0], (tuple, list)) and len(seen.args[0]) == 2:
        negated, kept = see(seen.args[0][0]), piece(seen.args[0][1])
        turned = piece(negated.args[0]) if negated.op == "neg" else None
        if turned is not None and kept is not None and turned.source is kept.source:
            return "a tensor with its halves swapped and one negated"
    return None


TABLE = Table(
    "rotary",
    (
        row(*_rotary(down(_partial(_half(leading()))), "half")),  # Phi 3 and 4, GPT-NeoX, StableLM
        row(*_rotary(down(_half(x)), "half")),  # Llama, Mistral, Qwen, Gemma
        row(*_rotary(down(_apart(x, first_half, second_half)), "half")),  # gpt-oss
        row(*_rotary(down(_apart(x, evens, odds)), "interleaved_to_half")),  # DeepSeek V3
        row(*_rotary(down(_partial(_interleaved(leading()))), "interleaved")),  # GLM
        row(*_rotary(down(_interleaved(x)), "interleaved")),  # Cohere, GPT-J
        row(*_rotary(down(_complex()), "interleaved")),  # Llama 4, DeepSeek V2
    ),
    _seed,
)
