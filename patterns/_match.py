"""The matcher: patterns over canonical nodes, and tables of rules ``(pattern, build)``.

A pattern says what a subgraph looks like from its last node (the anchor) upward. Commutative ops match in both
orders, with backtracking; the same
``Var`` twice must be the same node; no-ops (casts to the same dtype, ``contiguous``, ``x[:]``) are looked through
everywhere, and ``cast(p)`` also looks through casts that change the dtype. A rule's ``build`` receives the
:class:`Match` and answers with

* a :class:`Rewrite`: the site is replaced;
* a :class:`~fastft.kernels._op.Reason`: the site was recognised and stays as it was, with this reason in the report;
* ``None``: this is not such a site after all, the next rule is tried.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fastft.autotune import variants
from fastft.kernels._op import OPS, Reason
from fastft.kernels._op import Op as Kernel
from fastft.patterns._see import (
    Seen,
    dtype,
    is_noop,
    is_widening,
    rank,
    requires_grad,
    same_size,
    see,
    shape,
    through,
    value,
)

__all__ = [
    "Match", "Pattern", "Reason", "Rewrite", "Rule", "Seen", "Table", "Var", "alt", "cast", "const", "down", "dtype",
    "is_noop", "is_widening", "number", "op", "rank", "requires_grad", "row", "same_size", "see", "shape", "through",
    "use", "use_again", "value", "variant_of",
]  # fmt: skip

COMMUTATIVE = {"mul", "add"}


@dataclass(frozen=True)
class Bindings:
    """What a partial match knows: names bound to nodes or numbers, and the nodes that the pattern consumed."""

    names: dict[str, Any] = field(default_factory=dict)
    inside: frozenset[fx.Node] = frozenset()

    def bind(self, name: str, found: Any) -> Bindings | None:
        """With ``name`` bound to ``found``; None when it is bound to something else already."""
        if name in self.names:
            known = self.names[name]
            same = known is found if isinstance(known, fx.Node) or isinstance(found, fx.Node) else known == found
            return self if same else None
        return Bindings({**self.names, name: found}, self.inside)

    def take(self, node: fx.Node) -> Bindings:
        return Bindings(self.names, self.inside | {node})


class Pattern:
    """Something a node can look like. Compose with :func:`op`, :func:`cast`, :func:`alt`; ``p * q`` and ``p + q`` are
    the commutative ops.
    """

    #: canonical ops that this pattern's anchor can have; None: any.
    anchors: frozenset[str] | None = None

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        raise NotImplementedError

    def __mul__(self, other: Any) -> Pattern:
        return op("mul", self, other)

    def __rmul__(self, other: Any) -> Pattern:
        return op("mul", other, self)

    def __add__(self, other: Any) -> Pattern:
        return op("add", self, other)

    def __radd__(self, other: Any) -> Pattern:
        return op("add", other, self)


class Var(Pattern):
    """Any node or number, bound to ``name``; ``where`` narrows it. ``Var("_")`` matches anything and binds nothing."""

    def __init__(self, name: str, where: Callable[[Any], bool] | None = None) -> None:
        self.name, self.where = name, where

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        if self.where is not None and not self.where(found):
            return
        if self.name == "_":
            yield bound
            return
        more = bound.bind(self.name, found)
        if more is not None:
            yield more


def number(name: str) -> Var:
    """A Python number (not a node), bound to ``name``."""
    return Var(name, lambda v: isinstance(v, (int, float)) and not isinstance(v, bool))


class const(Pattern):
    """This very constant."""

    def __init__(self, wanted: Any) -> None:
        self.wanted = wanted

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        if not isinstance(found, fx.Node) and found == self.wanted:
            yield bound


class op(Pattern):
    """A canonical op with these operand patterns; operands beyond the given ones are not looked at. Looks through
    no-ops first.
    """

    def __init__(self, name: str, *operands: Any) -> None:
        self.name = name
        self.operands = tuple(o if isinstance(o, Pattern) else const(o) for o in operands)
        self.anchors = frozenset({name})

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        while isinstance(found, fx.Node):
            seen = see(found)
            if seen.op == self.name:
                more = bound.take(found)
                yield from self._operands(seen.args, more)
                if self.name in COMMUTATIVE:
                    yield from self._operands(seen.args[::-1], more)
            if not is_noop(seen):
                return
            bound, found = bound.take(found), seen.args[0]

    def _operands(self, args: Sequence[Any], bound: Bindings) -> Iterator[Bindings]:
        if len(args) < len(self.operands):
            return
        states: Iterable[Bindings] = (bound,)
        for pattern, arg in zip(self.operands, args, strict=False):
            states = [after for before in states for after in pattern.match(arg, before)]
        yield from states


class cast(Pattern):
    """``inner``, seen through any number of casts (including none)."""

    def __init__(self, inner: Pattern) -> None:
        self.inner = inner
        self.anchors = None if inner.anchors is None else inner.anchors | {"cast"}

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        yield from self.inner.match(found, bound)
        while isinstance(found, fx.Node):
            seen = see(found)
            if seen.op != "cast" and not is_noop(seen):
                return
            bound, found = bound.take(found), seen.args[0]
            yield from self.inner.match(found, bound)


class down(Pattern):
    """``inner``, or a cast to a narrower dtype of ``inner`` when that cast is its only use: for anchors whose result
    is rounded at the end.
    """

    def __init__(self, inner: Pattern) -> None:
        self.inner = inner
        self.anchors = None if inner.anchors is None else inner.anchors | {"cast"}

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        seen = see(found)
        if seen.op != "cast":
            yield from self.inner.match(found, bound)
        elif not is_widening(seen) and len(seen.args[0].users) == 1:
            yield from self.inner.match(seen.args[0], bound.take(found))


class alt(Pattern):
    """The first of several patterns that matches; all are tried."""

    def __init__(self, *choices: Pattern) -> None:
        self.choices = choices
        self.anchors = (
            None if any(c.anchors is None for c in choices) else frozenset().union(*(c.anchors or () for c in choices))
        )

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        for choice in self.choices:
            yield from choice.match(found, bound)


@dataclass(frozen=True)
class Match:
    """A complete match: the anchor, the nodes consumed (anchor included), the bound names as ``match["x"]``."""

    anchor: fx.Node
    names: dict[str, Any]
    inside: frozenset[fx.Node]

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.names.get(name, default)


@dataclass
class Rewrite:
    """Replace ``outputs`` by the results of ``target(*args, **kwargs)`` (one output: the result itself; several: its
    first items, in order).

    ``inside`` are the nodes that the site consists of, outputs included (left empty: those of the match). A consumed
    node that somebody else uses too is a reason to refuse unless it is free to compute (a view or a cast) or
    ``may_escape`` says that keeping it is right. ``lazy`` maps a graph output (logits) to the operands of
    :func:`fastft.lazy_logits.lazy_logits`. ``notes`` go into the report beside the site. ``out_dtype`` is not needed
    here: the replaced value's dtype, shape and device are checked against the target's.

    ``passes`` is an operand that the op hands on, as its result after the outputs: whoever reads it later reads that
    instead, so that what they send back meets the op's own gradient inside of the op.

    ``first`` is another op of ours, which is called before, and whose result is ``target``'s first argument (``args``
    are those behind it). Its own ``outputs``: a replaced value whose metadata its node takes.

    ``prepare`` is given where ``target`` prepares the operands before it calls the op: from the same arguments it makes
    those of the op's own call, ``(args, kwargs)``.

    ``draws`` says what the op draws other random numbers for than what it replaces, if it does: the site is left where
    eager's are wanted.

    ``known`` are values above the outputs whose making the rule has looked at itself: what writes to memory there is
    no hindrance.

    The op stands where the last output stood; ``early``: where the first did, for outputs that are used before the
    last one is computed. What it reads must be there by then.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[fx.Node, ...] = ()
    inside: frozenset[fx.Node] = frozenset()
    may_escape: frozenset[fx.Node] = frozenset()
    lazy: dict[fx.Node, dict[str, Any]] = field(default_factory=dict)
    notes: str = ""
    kernel: Kernel | None = None
    early: bool = False
    passes: fx.Node | None = None
    first: Rewrite | None = None
    prepare: Callable[..., tuple[Sequence[Any], dict[str, Any]]] | None = None
    draws: str = ""
    known: frozenset[fx.Node] = frozenset()


def use(kernel: str, *args: Any, **kwargs: Any) -> Rewrite | Reason:
    """A :class:`Rewrite` that calls the op named ``kernel`` with these operands (nodes, numbers), or the reason that
    op gives against it.
    """
    record = OPS[kernel]
    fake_args, fake_kwargs = fx.node.map_aggregate((args, kwargs), value)
    reason = record.supported(*fake_args, **fake_kwargs)
    return reason or Rewrite(record.call, args, kwargs, kernel=record)


def variant_of(kernel: str, node: Any) -> variants.Variant | None:
    """The variant of the op named ``kernel`` that ``node`` calls, its default among them; None: it calls none."""
    return variants.called(OPS[kernel], node.target) if isinstance(node, fx.Node) else None


def use_again(node: fx.Node, kernel: str, *args: Any, **kwargs: Any) -> Rewrite | Reason:
    """:func:`use` in the place of ``node``, which calls this op already. The variant that was chosen for ``node`` stays
    the one for its site: where it does not take the new arguments, that is the reason against it.
    """
    variant = variant_of(kernel, node)
    if variant is not None and variant.name != OPS[kernel].default:
        fake_args, fake_kwargs = fx.node.map_aggregate((args, kwargs), value)
        if (why := variant.refuses(*fake_args, **fake_kwargs)) is not None:
            return Reason(
                "variant", f"variant {variant.name}, which was chosen for {node.name}, does not do that: {why}"
            )
    return use(kernel, *args, **kwargs)


Build = Callable[[Match], "Rewrite | Reason | None"]


@dataclass(frozen=True)
class Rule:
    """One row of a table: a pattern, what to build, and where the row stands (``norm.py:41``)."""

    pattern: Pattern
    build: Build
    where: str

    def tries(self, anchor: fx.Node) -> Iterator[Match]:
        """Every way the pattern fits at this anchor. A no-op is never an anchor: its operand is the better one."""
        if is_noop(see(anchor)):
            return
        for found in self.pattern.match(anchor, Bindings()):
            yield Match(anchor, found.names, found.inside | {anchor})


def row(pattern: Pattern, build: Build) -> Rule:
    """A table row that knows its own file and line."""
    frame = sys._getframe(1)
    return Rule(pattern, build, f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")


@dataclass(frozen=True)
class Table:
    """The rules for one family of sites.

    ``seed`` tells of a node that is still in the graph afterwards whether it looks like such a site: the report lists
    it as missed. It answers with what was seen ("rsqrt of a mean of squares"), or None. ``planned``: its rules are of
    use, and tried, only where memory is planned.
    """

    name: str
    rows: tuple[Rule, ...]
    seed: Callable[[fx.Node], str | None]
    planned: bool = False

    def rules_for(self, canonical: str) -> list[Rule]:
        return [r for r in self.rows if r.pattern.anchors is None or canonical in r.pattern.anchors]
