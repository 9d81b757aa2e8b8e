"""What a dense attention mask says, read off the graph that computes it.

transformers, while tracing, builds every mask as a boolean ``[B, 1, Sq, Sk]`` from index tensors: ``kv <= q``,
``kv > q - w``, ``attention_mask[b, kv]``, ``documents[b, q] == documents[b, kv]``, joined by ``&``. :func:`recover`
evaluates that graph on symbols instead of numbers, from the mask upward, and answers with the conjunction it stands
for. Constants come from the graph; nothing is read off names or configs.

What is written out by hand has other forms: a float mask that is added to the scores, 0 where a key is seen and far
below 0 where it is not (:func:`recover_added`), or scores that are overwritten where a boolean hides them
(:func:`recover_hidden`).

FlexAttention's ``mask_mod`` says the same of scalars, one index for each axis: its graph is evaluated with its
arguments as coordinates (:mod:`fastft.patterns.flex`), and so are the axes that ``vmap`` adds where a dense mask is
made of it.

The symbols: a :class:`Coordinate` is an integer tensor that counts along one axis of the mask; a :class:`Distance` is
the difference of two; :class:`Rows` is a
tensor with one row for each sequence of the batch; :class:`Gathered` is such a row laid along an axis of the mask; a
:class:`Constant` is the same number everywhere; a :class:`Mask` is a conjunction of parts. Whatever else is met is
:class:`Unknown`, and names what it was.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fastft.kernels._op import Reason
from fastft.patterns._see import dtype, rank, same_size, see, shape, through, value

__all__ = [
    "BATCH", "HEAD", "HIDES", "KEY", "QUERY", "Coordinate", "Structure", "Symbol", "called", "evaluate", "number_of",
    "recover", "recover_added", "recover_hidden", "structure_of",
]  # fmt: skip

BATCH, HEAD, QUERY, KEY = -4, -3, -2, -1  # axes of the mask, counted from the last as broadcasting does


#: From here on down a score has no weight beside any that is not hidden.
HIDES = -1e4


@dataclass(frozen=True)
class Structure:
    """A conjunction: its parts, their constants, the tensors they read (padding ``[B, Sk]``, positions ``[B, S]``).

    ``below``: the number that is added to a hidden score.
    """

    causal: bool = False
    window: int = 0
    chunk: int = 0
    padding: fx.Node | None = None
    positions: fx.Node | None = None
    below: float = -math.inf

    def __str__(self) -> str:
        parts = [
            "causal" if self.causal else "",
            f"window({self.window})" if self.window else "",
            f"chunk({self.chunk})" if self.chunk else "",
            f"padding[{self.padding.name}]" if self.padding is not None else "",
            f"packed[{self.positions.name}]" if self.positions is not None else "",
        ]
        return " & ".join(p for p in parts if p) or "full"


# ---------------------------------------------------------------- symbols


@dataclass(frozen=True)
class Coordinate:
    """``(i + offset − left[b]) // chunk``, i counting along ``axis`` from 0; no ``left`` if None, no ``chunk`` if 0."""

    axis: int
    offset: int = 0
    left: fx.Node | None = None
    chunk: int = 0

    @property
    def plain(self) -> bool:
        return self.offset == 0 and self.left is None and not self.chunk


@dataclass(frozen=True)
class Distance:
    """``a − b``, two coordinates of different axes."""

    a: Coordinate
    b: Coordinate


@dataclass(frozen=True)
class Rows:
    """A function of ``of``, ``[B, S]``:

    ``values`` (itself), ``counts`` (cumsum), ``before`` (True up to the first nonzero value), ``left`` (how many those
    are, ``[B]``), ``steps`` (difference from the previous value, 1 at the first), ``breaks`` (steps ≠ 1), ``documents``
    (which document a token is in).
    """

    kind: str
    of: fx.Node


@dataclass(frozen=True)
class Gathered:
    """Rows along ``axis`` of the mask; axis None: one number for each sequence."""

    rows: Rows
    axis: int | None


@dataclass(frozen=True)
class Constant:
    number: int | bool


@dataclass(frozen=True)
class Mask:
    """``("causal",)``, ``("window", w)``, ``("chunk", c, left)``, ``("padding", node)``, ``("packed", node)``."""

    parts: frozenset[tuple[Any, ...]]


@dataclass(frozen=True)
class Unknown:
    what: str


Symbol = Coordinate | Distance | Rows | Gathered | Constant | Mask | Unknown

# ---------------------------------------------------------------- recovery


def recover(mask: fx.Node) -> Structure | Reason:
    """The conjunction that ``mask`` computes, or a Reason that names the first thing that is not understood."""
    return structure_of(mask.name, evaluate(mask, {}))


def recover_hidden(mask: fx.Node) -> Structure | Reason:
    """The same of a boolean that is True where a key is hidden."""
    return structure_of(mask.name, _shown(mask, {}))


def recover_added(mask: fx.Node) -> Structure | Reason:
    """The same of a mask that is added to the scores: 0 where a key is seen, ``below`` (-1e4 or less) elsewhere."""
    below: set[float] = set()
    structure = structure_of(mask.name, _added(mask, {}, below))
    if isinstance(structure, Structure) and below:
        structure = replace(structure, below=max(below))
    return structure


def structure_of(name: str, *symbols: Symbol) -> Structure | Reason:
    """The conjunction that symbols say together, or a Reason that names the first thing that is not understood.
    ``name``: of what they were evaluated from.
    """
    parts: frozenset[tuple[Any, ...]] = frozenset()
    for found in symbols:
        if isinstance(found, Mask):
            parts |= found.parts
        elif not (isinstance(found, Constant) and found.number):
            what = found.what if isinstance(found, Unknown) else f"{name} is no conjunction of known parts"
            return Reason("mask", f"the mask's structure was not recovered: {what}")
    structure = Structure()
    lefts: set[fx.Node | None] = set()
    for name, *constants in sorted(parts, key=str):
        if name == "causal":
            structure = replace(structure, causal=True)
        elif name == "window":  # of two windows the narrower one decides
            structure = replace(structure, window=min(constants[0], structure.window or constants[0]))
        elif name == "chunk":
            if structure.chunk not in (0, constants[0]):
                return Reason("mask", f"chunks of {structure.chunk} and of {constants[0]} in one mask")
            structure = replace(structure, chunk=constants[0])
            lefts.add(constants[1])
        else:
            field = {"padding": "padding", "packed": "positions"}[name]
            if getattr(structure, field) not in (None, constants[0]):
                return Reason(
                    "mask", f"two {field} tensors in one mask: {getattr(structure, field).name} and {constants[0].name}"
                )
            structure = replace(structure, **{field: constants[0]})
    # Chunks count from the first real token when there is padding, and from the first token when there is none.
    if lefts and lefts != {structure.padding}:
        return Reason("mask", "chunks do not count from the padding that the mask hides")
    return structure


def evaluate(node: Any, memo: dict[fx.Node, Symbol]) -> Symbol:
    """The symbol of a node or a number. ``memo``: of nodes that are known, to which others are added."""
    if not isinstance(node, fx.Node):
        return Constant(node) if isinstance(node, (int, bool)) else Unknown(f"{node!r} is no integer")
    if node not in memo:
        found = _symbol(node, memo)
        # A tensor with one row a sequence needs no understanding: it is an operand.
        if isinstance(found, Unknown) and rank(node) == 2:
            found = Rows("values", node)
        memo[node] = found
    return memo[node]


def _symbol(node: fx.Node, memo: dict[fx.Node, Symbol]) -> Symbol:
    rule = None
    if node.op == "call_function":
        rule = _RULES.get(getattr(node.target, "__name__", ""))
    elif node.op == "call_method":
        rule = _RULES.get(str(node.target))
    if rule is None:
        name = getattr(node.target, "__name__", node.target)
        return Unknown(f"{node.name} is an input" if node.op == "placeholder" else f"{node.name} = {name}(...)")
    found = rule(node, lambda x: evaluate(x, memo))
    return (
        found if found is not None else Unknown(f"{node.name} = {getattr(node.target, '__name__', node.target)}(...)")
    )


_NOT = ("invert", "__invert__", "logical_not", "bitwise_not")
_OPPOSITE = {"gt": "le", "ge": "lt", "lt": "ge", "le": "gt", "eq": "ne", "ne": "eq"}


def called(node: Any) -> str:
    """What a node calls: the function's or the method's name; empty for other nodes and for numbers."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def _shown(node: Any, memo: dict[fx.Node, Symbol]) -> Symbol:
    """What a boolean that hides leaves: the symbol of ``~node``."""
    name = called(node)
    bare = name.strip("_")
    if name in _NOT:
        return evaluate(node.args[0], memo)
    if bare == "eq" and not isinstance(node.args[1], fx.Node) and node.args[1] == 0:
        seen = evaluate(node.args[0], memo)
        if isinstance(seen, Mask) or (isinstance(seen, Rows) and seen.kind == "values"):
            return seen
    if bare in _OPPOSITE and dtype(node) == torch.bool:
        return _compare(_OPPOSITE[bare])(node, lambda x: evaluate(x, memo)) or Unknown(f"{node.name} = {name}(...)")
    if name in _MOVES:
        return _MOVES[name](node, lambda x: _shown(x, memo)) or Unknown(f"{node.name} = {name}(...)")
    if name == "triu" and _argument(node, 1, "diagonal", 0) == 1 and number_of(node.args[0]) == 1:
        return Mask(frozenset({("causal",)}))
    found = evaluate(node, memo)
    if isinstance(found, Constant):
        return Constant(not found.number)
    return found if isinstance(found, Unknown) else Unknown(f"{node.name} hides what is not known to be a mask's rest")


def _added(node: Any, memo: dict[fx.Node, Symbol], below: set[float]) -> Symbol:
    """What an additive mask shows. ``below`` collects the numbers that it hides by."""
    unknown = Unknown(f"{node.name} = {called(node) or node.op}(...)")
    name = called(node)
    if name == "where" and len(node.args) == 3:
        condition, a, b = node.args
        a, b = number_of(a), number_of(b)
        if a == 0 and b is not None and b <= HIDES:
            below.add(b)
            return evaluate(condition, memo)
        if b == 0 and a is not None and a <= HIDES:
            below.add(a)
            return _shown(condition, memo)
        return unknown
    if name == "masked_fill" and len(node.args) == 3 and number_of(node.args[0]) == 0:
        fill = number_of(node.args[2])
        if fill is not None and fill <= HIDES:
            below.add(fill)
            return _shown(node.args[1], memo)
        return unknown
    if name == "triu" and _argument(node, 1, "diagonal", 0) == 1:
        fill = number_of(node.args[0])
        if fill is not None and fill <= HIDES:
            below.add(fill)
            return Mask(frozenset({("causal",)}))
        return unknown
    if name in _CASTS and dtype(node.args[0]) != torch.bool:
        return _added(node.args[0], memo, below)
    if name in _MOVES:
        return _MOVES[name](node, lambda x: _added(x, memo, below)) or unknown
    return Constant(True) if number_of(node) == 0 else unknown


def number_of(node: Any) -> float | None:
    """The number that a value is everywhere; None where it is none, or not known."""
    if isinstance(node, (int, float)):
        return float(node)
    node = through(node, "noop", "cast", "expand", "unsqueeze", "view")
    name = called(node)
    if name in ("zeros", "zeros_like", "new_zeros"):
        return 0.0
    if name in ("ones", "ones_like", "new_ones"):
        return 1.0
    at = {"tensor": 0, "scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2}.get(name)
    if at is None:
        return None
    number = _argument(node, at, "data" if at == 0 else "fill_value")
    return float(number) if isinstance(number, (int, float)) else None


Evaluate = Callable[[Any], Symbol]


def _argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


# ---------------------------------------------------------------- where numbers come from


def _arange(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    if dtype(node) not in (torch.int64, torch.int32):
        return None
    if len(node.args) == 1 or (not node.args and "start" not in node.kwargs):
        return Coordinate(-1)
    start, step = _argument(node, 0, "start"), _argument(node, 2, "step", 1)
    return Coordinate(-1, start) if isinstance(start, int) and step == 1 else None


def _filled(number: int) -> Callable[[fx.Node, Evaluate], Symbol]:
    return lambda node, evaluate: Constant(bool(number) if dtype(node) == torch.bool else number)


def _full(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    fill = _argument(node, 1, "fill_value")
    return Constant(fill) if isinstance(fill, (int, bool)) else None


# ---------------------------------------------------------------- moving axes


def _same(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    """Casts, copies and moves to a device, as long as the numbers survive."""
    x = evaluate(node.args[0])
    to, came = dtype(node), dtype(node.args[0])
    if isinstance(x, Rows) and x.kind == "values":
        # Zero or not is all that a boolean says: the padding mask is the tensor below its casts, whatever its dtype.
        if to == torch.bool or to == came:
            return Rows("values", _same_device(x.of, node))
        return Rows("values", node)
    if isinstance(x, Mask):
        return x if to == torch.bool else None
    if to is None or to.is_floating_point or (to == torch.bool and came != torch.bool and not isinstance(x, Constant)):
        return None
    return Constant(bool(x.number)) if isinstance(x, Constant) and to == torch.bool else x


def _same_device(below: fx.Node, node: fx.Node) -> fx.Node:
    return below if value(below).device == value(node).device else node


def _expand(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    x = evaluate(node.args[0])
    if isinstance(x, Rows):  # more rows than it had: another operand
        return Rows("values", node) if x.kind == "values" else None
    if isinstance(x, Coordinate) and not same_size(shape(node.args[0])[x.axis], shape(node)[x.axis]):
        return None
    return x


def _unsqueeze(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    x, axis = evaluate(node.args[0]), _argument(node, 1, "dim")
    if isinstance(x, Constant):
        return x
    if not isinstance(axis, int):
        return None
    after = axis if axis < 0 else axis - (rank(node.args[0]) + 1)  # where the new axis stands, from the end
    if isinstance(x, Mask):
        return x if after < QUERY and _every_row(x) else None
    return replace(x, axis=x.axis - 1 if after >= x.axis else x.axis) if isinstance(x, Coordinate) else None


def _every_row(mask: Mask) -> bool:
    """Whether a mask is the same for every sequence of the batch: then axes before the last two may come and go."""
    return all(part[0] in ("causal", "window") or (part[0] == "chunk" and part[2] is None) for part in mask.parts)


def _index(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    source, index = node.args
    x = evaluate(source)
    index = tuple(index) if isinstance(index, (tuple, list)) else (index,)
    if isinstance(x, Constant):
        return x
    if any(isinstance(i, fx.Node) and isinstance(value(i), torch.Tensor) for i in index):
        return _gather(x, [evaluate(i) for i in index], dtype(source))
    if not all(i is None or i is Ellipsis or isinstance(i, slice) for i in index):
        return None
    # Slices must keep everything: then only the new axes matter.
    kept = [n for n, i in zip(shape(node), _spelled(index, rank(source)), strict=False) if i is not None]
    if len(kept) != rank(source) or not all(same_size(a, b) for a, b in zip(kept, shape(source), strict=True)):
        return None
    if not any(i is None for i in index):
        return x
    places = [axis for axis, i in enumerate(_spelled(index, rank(source))) if i is not None]
    moved = [place - rank(node) for place in places]  # where each axis of the source went, from the end
    if isinstance(x, Coordinate):
        return replace(x, axis=moved[rank(source) + x.axis])
    if isinstance(x, Rows) and rank(source) == 2 and rank(node) == 4 and moved[0] == BATCH:
        return _along(x, moved[1], dtype(source))
    if isinstance(x, Mask) and moved[-2:] == [QUERY, KEY] and _every_row(x):
        return x
    return None


def _spelled(index: tuple[Any, ...], source_rank: int) -> list[Any]:
    """An index with one entry for each axis of the result: the Ellipsis and what is left out, spelled as slices."""
    missing = source_rank - sum(isinstance(i, slice) for i in index)
    entries = list(index)
    at = next((n for n, i in enumerate(entries) if i is Ellipsis), None)
    whole = [slice(None)] * missing
    return entries + whole if at is None else entries[:at] + whole + entries[at + 1 :]


def _gather(x: Symbol, index: list[Symbol], kind: torch.dtype | None) -> Symbol | None:
    """``rows[b, q]``, ``rows[b, kv]``, ``left[b]``."""
    if not isinstance(x, Rows) or not index or not all(isinstance(i, Coordinate) and i.plain for i in index):
        return None
    axes = [i.axis for i in index if isinstance(i, Coordinate)]
    if axes == [BATCH]:
        return Gathered(x, None) if x.kind == "left" else None
    if len(axes) == 2 and axes[0] == BATCH and axes[1] in (QUERY, KEY) and x.kind != "left":
        return _along(x, axes[1], kind)
    return None


def _along(rows: Rows, axis: int, kind: torch.dtype | None) -> Symbol | None:
    """Rows laid along an axis: boolean ones along the keys are padding already."""
    if rows.kind == "values" and axis == KEY and kind == torch.bool:
        return Mask(frozenset({("padding", rows.of)}))
    return Gathered(rows, axis)


def _aten_index(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    """An index by tensors as ``vmap`` spells it."""
    index: Any = node.args[1]
    x = evaluate(node.args[0])
    return x if isinstance(x, Constant) else _gather(x, [evaluate(i) for i in index], dtype(node.args[0]))


def _mapped(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    """What counts, mapped over by one of four ``vmap`` that are around each other: one for each axis of a mask."""
    x, place, level = evaluate(node.args[0]), node.args[1], node.args[2]
    counts = isinstance(x, Coordinate) and x.axis == -1 and rank(node.args[0]) == 1
    return replace(x, axis=level - 5) if counts and place == 0 and level in (1, 2, 3, 4) else None  # type: ignore[arg-type, operator, union-attr]


def _unmapped(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    """Behind such a ``vmap``, the innermost of which ends first: the axes come back in their order."""
    x, level, place = evaluate(node.args[0]), node.args[1], node.args[3]
    whole = isinstance(x, (Mask, Constant)) and place == 0 and isinstance(level, int)
    return x if whole and rank(node) == 5 - level else None  # type: ignore[operator]


# ---------------------------------------------------------------- arithmetic


def _add(sign: int) -> Callable[[fx.Node, Evaluate], Symbol | None]:
    def rule(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
        a, b = evaluate(node.args[0]), evaluate(node.args[1])
        if sign > 0 and isinstance(a, Constant):
            a, b = b, a
        if isinstance(a, Constant) and isinstance(b, Constant):
            return Constant(a.number + sign * b.number)
        if not isinstance(a, Coordinate) or a.chunk:
            return None
        if sign < 0 and isinstance(b, Coordinate) and not b.chunk and a.axis != b.axis:
            return Distance(a, b)
        if isinstance(b, Constant):
            return replace(a, offset=a.offset + sign * b.number)
        if sign < 0 and isinstance(b, Gathered) and b.rows.kind == "left" and a.left is None:
            return replace(a, left=b.rows.of)
        return None

    return rule


def _floor_divide(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    a, b = evaluate(node.args[0]), evaluate(node.args[1])
    if isinstance(a, Coordinate) and not a.chunk and isinstance(b, Constant) and b.number > 0:
        return replace(a, chunk=int(b.number))
    return None


def _last(node: fx.Node) -> bool:
    return _argument(node, 1, "dim") in (-1, rank(node.args[0]) - 1)


def _cumsum(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    x = evaluate(node.args[0])
    if isinstance(x, Constant) and not x.number:
        return Constant(0)
    if isinstance(x, Rows) and _last(node):
        if x.kind == "breaks":
            return Rows("documents", x.of)
        # Counting is counting nonzero values for booleans only.
        if x.kind == "values" and dtype(node.args[0]) == torch.bool:
            return Rows("counts", x.of)
    return None


def _sum(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    x = evaluate(node.args[0])
    keeps = _argument(node, 2, "keepdim", False)
    return Rows("left", x.of) if isinstance(x, Rows) and x.kind == "before" and _last(node) and not keeps else None


def _diff(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    """``diff(p, prepend=p[:, :1] - 1)``: the step that leads to each position, 1 for the first."""
    p, prepend = node.args[0], _argument(node, 3, "prepend")
    if _argument(node, 1, "n", 1) != 1 or _argument(node, 4, "append") is not None:
        return None
    if _argument(node, 2, "dim", -1) not in (-1, rank(p) - 1) or rank(p) != 2:
        return None
    less = see(prepend)
    if less.op != "sub" or less.args[1] != 1:
        return None
    first = see(less.args[0])
    if first.op != "index" or first.args[0] is not p or tuple(first.args[1]) != (slice(None), slice(None, 1)):
        return None
    x = evaluate(p)
    if isinstance(x, Coordinate) and x.axis == -1 and not x.chunk and x.left is None:
        return Constant(1)  # it counts: every step is 1
    return Rows("steps", p)


# ---------------------------------------------------------------- comparisons and conjunction


def _compare(name: str) -> Callable[[fx.Node, Evaluate], Symbol | None]:
    def rule(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
        if len(node.args) != 2:
            return None
        a, b = evaluate(node.args[0]), evaluate(node.args[1])
        if isinstance(a, Constant) and isinstance(b, Constant):
            return Constant(bool(getattr(operator, name)(a.number, b.number)))
        if name in ("eq", "ne"):
            return _equal(a, b, name == "eq") or _equal(b, a, name == "eq")
        if isinstance(a, Coordinate) and isinstance(b, Coordinate):
            return _ordered(name, a, b)
        if isinstance(a, Distance) and isinstance(b, Constant):
            return _ordered(name, a.a, replace(a.b, offset=a.b.offset + b.number))
        # A position is never negative: how transformers says "every key" of a mask that is not causal.
        if name == "ge" and isinstance(a, Coordinate) and not a.chunk and a.left is None and isinstance(b, Constant):
            return Constant(True) if b.number <= a.offset else None
        return None

    return rule


def _equal(a: Symbol, b: Symbol, equal: bool) -> Symbol | None:
    if isinstance(a, Rows) and isinstance(b, Constant):
        if equal and a.kind == "counts" and b.number == 0:
            return Rows("before", a.of)
        if not equal and a.kind == "steps" and b.number == 1:
            return Rows("breaks", a.of)
    if not equal:
        return None
    if isinstance(a, Gathered) and isinstance(b, Gathered) and a.rows == b.rows and a.rows.kind == "documents":
        return Mask(frozenset({("packed", a.rows.of)})) if {a.axis, b.axis} == {QUERY, KEY} else None
    if (
        isinstance(a, Coordinate)
        and isinstance(b, Coordinate)
        and a.chunk
        and replace(a, axis=b.axis) == b
        and not a.offset
    ):
        return Mask(frozenset({("chunk", a.chunk, a.left)})) if {a.axis, b.axis} == {QUERY, KEY} else None
    return None


def _ordered(name: str, a: Coordinate, b: Coordinate) -> Symbol | None:
    """``key + m (≤ or ≥) query + n`` as a bound on key − query."""
    if a.chunk or b.chunk or a.left is not b.left:
        return None
    if (a.axis, b.axis) == (QUERY, KEY):
        a, b, name = b, a, {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt"}[name]
    if (a.axis, b.axis) != (KEY, QUERY):
        return None
    bound = b.offset - a.offset
    if name in ("le", "lt"):  # key − query ≤ bound
        return Mask(frozenset({("causal",)})) if bound - (name == "lt") == 0 else None
    window = 1 - (bound + (name == "gt"))  # key − query ≥ 1 − window
    return Mask(frozenset({("window", window)})) if window > 0 else None


def _and(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    parts: frozenset[tuple[Any, ...]] = frozenset()
    for arg in node.args[:2]:
        x = evaluate(arg)
        if isinstance(x, Unknown):
            return x
        if isinstance(x, Constant) and x.number:
            continue
        if not isinstance(x, Mask):
            return None
        parts |= x.parts
    return Mask(parts) if parts else Constant(True)


def _tril(node: fx.Node, evaluate: Evaluate) -> Symbol | None:
    """``ones(S, S).tril()``, as hand-written models have it."""
    x = evaluate(node.args[0])
    ones = isinstance(x, Constant) and x.number == 1
    return Mask(frozenset({("causal",)})) if ones and _argument(node, 1, "diagonal", 0) == 0 else None


_RULES: dict[str, Callable[[fx.Node, Evaluate], Symbol | None]] = {
    "arange": _arange,
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _filled(1)),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _filled(0)),
    "full": _full,
    **dict.fromkeys(
        ("to", "bool", "long", "int", "type_as", "type", "contiguous", "clone", "detach", "cuda", "cpu"), _same
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "unsqueeze": _unsqueeze,
    "getitem": _index,
    "index": _aten_index,
    "_add_batch_dim": _mapped,
    "_remove_batch_dim": _unmapped,
    **dict.fromkeys(("add", "__add__", "__radd__"), _add(1)),
    **dict.fromkeys(("sub", "__sub__"), _add(-1)),
    **dict.fromkeys(("floordiv", "floor_divide", "__floordiv__"), _floor_divide),
    "cumsum": _cumsum,
    "sum": _sum,
    "diff": _diff,
    **{spelling: _compare(name) for name in ("eq", "ne", "le", "lt", "ge", "gt") for spelling in (name, f"__{name}__")},
    **dict.fromkeys(("and_", "__and__", "logical_and", "bitwise_and"), _and),
    "tril": _tril,
}

_CASTS = ("to", "float", "half", "bfloat16", "type_as", "type", "contiguous", "clone", "detach", "cuda", "cpu")
#: What moves a mask's axes and changes none of its numbers.
_MOVES: dict[str, Callable[[fx.Node, Evaluate], Symbol | None]] = {
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "unsqueeze": _unsqueeze,
    "getitem": _index,
    **dict.fromkeys(("to", "bool", "contiguous", "clone", "detach", "cuda", "cpu"), lambda node, of: of(node.args[0])),
}
