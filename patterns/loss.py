"""The language model's head and its cross-entropy, as transformers and hand-written loops spell them::

    linear → [× or / a scale] → [/ c → tanh → × c] → float → rows shifted, flattened → cross_entropy(labels)

The labels' side (pad, shift, view) is integer work on [batch, seq] and stays as it is; the row operations on logits are
made on hidden states instead. Logits that the model also returns become lazy: the graph returns hidden states in their
place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fastft.autotune.variants import run
from fastft.kernels._op import OPS
from fastft.kernels.linear_cross_entropy import linear_log_prob
from fastft.patterns._match import (
    Bindings,
    Match,
    Pattern,
    Reason,
    Rewrite,
    Table,
    dtype,
    is_noop,
    is_widening,
    op,
    requires_grad,
    row,
    same_size,
    see,
    shape,
    through,
    value,
)

NAME = "linear_cross_entropy"
FLAT = "flat"


def _of_rows(
    hidden: torch.Tensor, *others: Any, rows: tuple[Any, ...], out_dtype: torch.dtype, **options: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    for index in rows:
        hidden = hidden.reshape(-1, hidden.shape[-1]) if index == FLAT else hidden[index]
    return (hidden.reshape(-1, hidden.shape[-1]), *others), options


def rows_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    rows: tuple[Any, ...],
    out_dtype: torch.dtype,
    variant: str = "",
    **options: Any,
) -> torch.Tensor:
    """``linear_cross_entropy`` (or a variant of it) of the rows ``hidden[rows[0]][rows[1]]...``, rounded to
    ``out_dtype`` (what the uncompiled loss has). :data:`FLAT` among ``rows``: all axes but the last become one there.
    """
    args, options = _of_rows(hidden, weight, bias, labels, rows=rows, out_dtype=out_dtype, **options)
    return run(NAME, variant, *args, **options).to(out_dtype)


@dataclass(frozen=True)
class _Maths:
    """``softcap(raw * scale / divisor)``; ``tanh`` while the softcap's outer factor is still to come."""

    scale: float = 1.0
    divisor: float = 1.0
    softcap: float | None = None
    tanh: bool = False

    def times(self, factor: float, over: float = 1.0) -> _Maths | None:
        if self.softcap is None and not self.tanh:
            return replace(self, scale=self.scale * factor, divisor=self.divisor * over)
        if not self.tanh or not factor / over > 0:
            return None
        # cap · tanh(a r / b) = softcap(cap a r / b): the op divides by its cap again.
        cap = factor / over
        scale, divisor = self.scale * cap, self.divisor
        return _Maths(1.0, 1.0, cap) if scale == divisor else _Maths(scale, divisor, cap)


@dataclass(frozen=True)
class _Chain:
    """From the head's linear to the loss: ``maths`` in all, ``rows`` picked on the way, and for each node that still
    has
    every row (``logits``) what was computed up to it."""

    linear: fx.Node
    maths: _Maths
    rows: tuple[Any, ...]
    logits: dict[fx.Node, _Maths]
    inside: frozenset[fx.Node]


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _walk(anchor: fx.Node, logits: Any) -> _Chain | Reason:
    """Follow the loss's input up to a linear layer."""
    path: list[fx.Node] = []
    node = logits
    while isinstance(node, fx.Node) and see(node).op != "linear":
        seen = see(node)
        known = seen.op in ("view", "flatten", "index", "mul", "div", "tanh")
        if not (known or is_noop(seen) or is_widening(seen)):
            return _not_a_head(node)
        path.append(node)
        node = seen.args[1] if seen.op == "mul" and _number(seen.args[0]) else seen.args[0]
    if not isinstance(node, fx.Node):
        return Reason("head", "the logits are no tensor of this graph")
    rows: list[Any] = []
    maths, found = _Maths(), {node: _Maths()}
    vocab = shape(node)[-1]
    for step in reversed(path):
        seen = see(step)
        if seen.op == "index" and not is_noop(seen):
            index = seen.args[1] if isinstance(seen.args[1], tuple) else (seen.args[1],)
            # Rows of a view are picked of [tokens, vocab] only: that is what FLAT makes of the hidden states.
            reshaped = FLAT in rows and len(shape(seen.args[0])) != 2
            if reshaped or not _keeps_vocab(index, len(shape(seen.args[0]))):
                return Reason("shape", f"{step.name} takes a part of the logits that is not whole rows")
            rows.append(index)
        elif seen.op in ("view", "flatten"):
            if not same_size(shape(step)[-1], vocab):
                return Reason("shape", f"{step.name} does not keep the vocabulary as last dimension")
            rows.append(FLAT)
        elif seen.op in ("mul", "div", "tanh") and not is_noop(seen):
            more = _apply(maths, seen)
            if more is None:
                return Reason("maths", f"{step.name} is no scaling by a number and no softcap")
            maths = more
        if not rows:
            found[step] = maths
    if maths.tanh:
        return Reason("maths", "a tanh of the logits is not scaled back")
    return _Chain(node, maths, tuple(rows), found, frozenset((anchor, node, *path)))


def _apply(maths: _Maths, seen: Any) -> _Maths | None:
    if seen.op == "tanh":
        return replace(maths, tanh=True) if maths.softcap is None and not maths.tanh else None
    a, b = seen.args
    if seen.op == "mul" and (_number(a) or _number(b)):
        return maths.times(a if _number(a) else b)
    return maths.times(1.0, b) if seen.op == "div" and _number(b) and b != 0 else None


def _keeps_vocab(index: tuple[Any, ...], rank: int) -> bool:
    """Whether ``x[index]`` takes whole rows, the vocabulary staying last; only slices and numbers."""
    if not all(i is Ellipsis or isinstance(i, (int, slice, fx.Node)) for i in index):
        return False
    if any(isinstance(i, fx.Node) and not isinstance(value(i), (int, torch.SymInt)) for i in index):
        return False
    dots = [n for n, i in enumerate(index) if i is Ellipsis]
    reaches_last = len(index) == rank if not dots else dots[0] < len(index) - 1
    full = slice(None)
    return not reaches_last or (isinstance(index[-1], slice) and index[-1] == full)


def _not_a_head(node: fx.Node) -> Reason:
    op_name = see(node).op
    if op_name == "add":
        return Reason(
            "adapter",
            f"the logits are a sum ({node.name}): an adapter wraps the head, or a bias is added apart from it",
        )
    if op_name == "cast":
        return Reason("dtype", f"{node.name} rounds the logits to {dtype(node)} before the loss")
    what = op_name
    if op_name in ("unknown", "input"):
        what = getattr(node.target, "__name__", f"{node.op} {node.target}")
    return Reason("head", f"the logits come from {what}, not from a linear layer")


def _returned(chain: _Chain) -> dict[fx.Node, dict[str, Any]] | Reason:
    """The logits that the graph returns, as operands of ``lazy_logits``; or the reason that others need them."""
    lazy: dict[fx.Node, dict[str, Any]] = {}
    x, weight, bias = see(chain.linear).args
    for node in chain.inside:
        if see(node).op == "cross_entropy":
            continue
        for user in node.users:
            if user in chain.inside:
                continue
            result = _leads_out(node, user)
            if result is None:
                return Reason("escapes", f"the logits ({node.name}) are also used by {user.name}")
            maths = chain.logits.get(node)
            if maths is None or maths.tanh:
                return Reason("escapes", f"{node.name}, a part of the logits, is an output of the graph")
            lazy[result] = {
                "hidden": through(x, "noop"),
                "weight": weight,
                "bias": bias,
                "softcap": maths.softcap,
                "scale": maths.scale,
                "divisor": maths.divisor,
                "dtype": dtype(result),
                "head_dtype": dtype(chain.linear),
            }
    return lazy


def _leads_out(node: fx.Node, user: fx.Node) -> fx.Node | None:
    """The graph output that ``user`` makes of ``node``: itself, or a cast of it that nobody else reads (accelerate's
    ``float()``).
    """
    if user.op == "output":
        return node
    seen = see(user)
    if (seen.op == "cast" or is_noop(seen)) and user.users and all(u.op == "output" for u in user.users):
        return user
    return None


def _build(m: Match) -> Rewrite | Reason | None:
    logits, labels, class_weight, size_average, ignore_index, reduce, reduction, smoothing = see(m.anchor).args
    if class_weight is not None:
        return Reason("class_weight", "the loss has class weights")
    if smoothing != 0.0:
        return Reason("label_smoothing", f"label_smoothing is {smoothing}")
    if size_average is not None or reduce is not None:
        return Reason("reduction", "the loss is called with the deprecated size_average or reduce")
    if not isinstance(ignore_index, int) or reduction not in ("mean", "sum", "none"):
        return Reason("reduction", f"ignore_index {ignore_index!r} or reduction {reduction!r} is no constant")
    if len(shape(logits)) != 2 or len(shape(labels)) != 1:
        return Reason(
            "shape",
            f"the loss is of logits {tuple(shape(logits))} and labels {tuple(shape(labels))}, not [tokens, vocab] and "
            "[tokens]",
        )
    chain = _walk(m.anchor, logits)
    if isinstance(chain, Reason):
        return chain
    x, w, b = see(chain.linear).args
    lazy = _returned(chain)
    if isinstance(lazy, Reason):
        return lazy
    if lazy and not requires_grad(chain.linear):
        return Reason("no_grad", "without gradients (evaluation) the logits are returned as they are")
    maths, hidden = chain.maths, through(x, "noop")
    kernel = OPS[NAME]
    options = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "softcap": maths.softcap,
        "logit_scale": maths.scale / maths.divisor,
        "dtype": dtype(chain.linear),
    }
    if reason := kernel.supported(value(hidden), value(w), value(b), value(labels), **options):
        return reason
    return Rewrite(
        rows_linear_cross_entropy,
        (hidden, w, b, labels),
        {"rows": chain.rows, "out_dtype": dtype(m.anchor), **options},
        inside=chain.inside,
        may_escape=chain.inside,
        lazy=lazy,
        notes="logits are computed when read" if lazy else "",
        kernel=kernel,
        prepare=_of_rows,
    )


def _seed(node: fx.Node) -> str | None:
    return "cross_entropy" if see(node).op == "cross_entropy" else None


LOSS = Table(
    NAME,
    (row(op("cross_entropy"), _build),),  # -log softmax(softcap(scale · W h))[label], reduced
    _seed,
)


# TRL's head, traced (fastft.bridges.trl_head): every position is scored, an ignored one with label 0, and its results
# are filled with 0. Told which labels are ignored, the op leaves them out of its GEMMs.


def _ignoring(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    items: tuple[int, ...],
    ignore_index: int,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    flat = labels.reshape(-1)
    flat = torch.where(flat == ignore_index, ignore_index, flat.clamp(min=0))
    return (hidden, weight, bias, flat), {"ignore_index": ignore_index, **options}


def ignoring_log_prob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    items: tuple[int, ...],
    ignore_index: int,
    variant: str = "",
    **options: Any,
) -> Any:
    """The fields ``items`` of :func:`linear_log_prob` (or a variant of it) for ``labels`` of any shape: those equal to
    ``ignore_index`` are ignored, other negative ones count as 0. One field comes as itself, several as a tuple.
    """
    args, options = _ignoring(hidden, weight, bias, labels, items=items, ignore_index=ignore_index, **options)
    found = run("linear_log_prob", variant, *args, **options)
    return found[items[0]] if len(items) == 1 else tuple(found[i] for i in items)


class _Call(Pattern):
    """A call of this very function."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        if isinstance(found, fx.Node) and found.target is self.target:
            yield bound


def _is(node: Any, *names: str) -> bool:
    """Whether a node calls a function or method of one of these names."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    return (node.target if node.op == "call_method" else getattr(node.target, "__name__", "")) in names


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _ignored_by(mask: Any) -> tuple[Any, Any] | None:
    """``(labels, ignore_index)`` when ``mask`` is true exactly where labels are ignored: ``~(labels != i)``, ``labels
    == i``.
    """
    negated = _is(mask, "invert", "bitwise_not", "logical_not", "__invert__")
    compared = mask.args[0] if negated else mask
    if not _is(compared, *(("ne", "__ne__") if negated else ("eq", "__eq__"))) or len(compared.args) != 2:
        return None
    return compared.args[0], compared.args[1]


def _build_ignoring(m: Match) -> Rewrite | Reason | None:
    hidden, weight, bias, labels = m.anchor.args
    clamped = through(labels, "noop", "view", "flatten")
    if "ignore_index" in m.anchor.kwargs or not _is(clamped, "clamp", "clamp_min"):
        return None
    source = clamped.args[0]
    if _argument(clamped, 1, "min") != 0 or _argument(clamped, 2, "max") is not None:
        return None
    fields: list[Any] = sorted(m.anchor.users, key=lambda n: str(n.args[1]))
    fills = []
    for field in fields:
        users = list(field.users)
        while users:
            user = users.pop()
            if see(user).op in ("view", "flatten") or is_noop(see(user)):
                users += user.users
            elif _is(user, "masked_fill") and _argument(user, 2, "value") == 0:
                fills.append(_ignored_by(_argument(user, 1, "mask")))
            else:
                return Reason("unmasked", f"{user.name} reads results of positions whose label is ignored")
    if not fills or any(f != fills[0] for f in fills) or fills[0] is None or fills[0][0] is not source:
        return Reason("mask", "the results are not all filled with 0 where the same labels are ignored")
    if not isinstance(fills[0][1], int):
        return Reason("mask", f"the label that is ignored, {fills[0][1]}, is no constant")
    options = {"items": tuple(f.args[1] for f in fields), "ignore_index": fills[0][1], **m.anchor.kwargs}
    return Rewrite(
        ignoring_log_prob,
        (hidden, weight, bias, source),
        options,
        outputs=tuple(fields),
        inside=frozenset((m.anchor, *fields)),
        notes="ignored tokens are left out",
        kernel=OPS["linear_log_prob"],
        prepare=_ignoring,
    )


IGNORED = Table(
    "ignored_tokens",
    (row(_Call(linear_log_prob), _build_ignoring),),  # log_prob(max(y, 0)) filled with 0 where y is ignored
    lambda node: None,
)

TABLES = (LOSS, IGNORED)
