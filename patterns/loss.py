"""The language model's head and its cross-entropy, as transformers and hand-written loops spell them::

    linear → [× or / a scale] → [/ c → tanh → × c] → float → rows shifted, flattened, chunked → cross_entropy(labels)

or ``log_softmax`` and ``nll_loss`` in place of the last, or, for each token's log-probability, ``log_softmax`` and
``gather``, or the difference of ``gather`` and ``logsumexp``. The labels' side (pad, shift, view) is integer work on
[batch, seq] and stays as it is; the row operations on logits are made on hidden states instead. Logits that the model
also returns become lazy: the graph returns hidden states in their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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


class Part(NamedTuple):
    """A piece of the rows: ``x.chunk(size, dim)[number]``, or of ``x.split``. ``dim`` is counted from the front."""

    way: str
    size: Any
    dim: int
    number: int


def _of_rows(
    hidden: torch.Tensor, *others: Any, rows: tuple[Any, ...], out_dtype: torch.dtype, **options: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (_picked(hidden, rows).reshape(-1, hidden.shape[-1]), *others), options


def _picked(hidden: torch.Tensor, rows: tuple[Any, ...]) -> torch.Tensor:
    for index in rows:
        if index == FLAT:
            hidden = hidden.reshape(-1, hidden.shape[-1])
        elif isinstance(index, Part):
            hidden = getattr(hidden, index.way)(index.size, index.dim)[index.number]
        else:
            hidden = hidden[index]
    return hidden


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
    has every row (``logits``) what was computed up to it. ``normalised``: a log_softmax was among that."""

    anchor: fx.Node
    linear: fx.Node
    maths: _Maths
    rows: tuple[Any, ...]
    logits: dict[fx.Node, _Maths]
    inside: frozenset[fx.Node]
    normalised: bool

    def same_rows(self, other: _Chain) -> bool:
        """Whether ``other`` is of the same rows of the same logits, in whatever shape."""
        whole = all(index == FLAT for index in (*self.rows, *other.rows))
        alike = (self.linear, self.maths) == (other.linear, other.maths) and not other.normalised
        return alike and (whole or self.rows == other.rows)


@dataclass(frozen=True)
class _Total:
    """A logsumexp of the logits that a loss is of, which others read (a z-loss), and where its own logits come from."""

    node: fx.Node
    chain: _Chain


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


#: Ops that pick and arrange rows. A piece (``getitem``) is of ``chunk`` or ``split``.
_ROWS = ("view", "flatten", "index", "getitem", "chunk", "split")
_LOSSES = ("cross_entropy", "nll_loss", "gather", "logsumexp")


def _walk(anchor: fx.Node, logits: Any) -> _Chain | Reason:
    """Follow the loss's input up to a linear layer."""
    path: list[fx.Node] = []
    node = logits
    while isinstance(node, fx.Node) and see(node).op != "linear":
        seen = see(node)
        known = seen.op in (*_ROWS, "mul", "div", "tanh", "log_softmax")
        if not (known or is_noop(seen) or is_widening(seen)):
            return _not_a_head(node)
        path.append(node)
        node = seen.args[1] if seen.op == "mul" and _number(seen.args[0]) else seen.args[0]
    if not isinstance(node, fx.Node):
        return Reason("head", "the logits are no tensor of this graph")
    rows: list[Any] = []
    maths, found, normalised = _Maths(), {node: _Maths()}, False
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
        elif seen.op == "getitem":
            part = _part(seen, FLAT in rows)
            if part is None:
                return Reason("shape", f"{step.name} takes a part of the logits that is not whole rows")
            rows.append(part)
        elif seen.op == "log_softmax":
            if not _over_vocabulary(seen) or maths.tanh:
                return Reason("maths", f"{step.name} is no log-softmax over the vocabulary, or of rounded logits")
            normalised = True
        elif normalised and not is_noop(seen) and seen.op in ("mul", "div", "tanh"):
            return Reason("maths", f"{step.name} changes log-probabilities")
        elif seen.op in ("mul", "div", "tanh") and not is_noop(seen):
            more = _apply(maths, seen)
            if more is None:
                return Reason("maths", f"{step.name} is no scaling by a number and no softcap")
            maths = more
        if not rows and not normalised:
            found[step] = maths
    if maths.tanh:
        return Reason("maths", "a tanh of the logits is not scaled back")
    return _Chain(anchor, node, maths, tuple(rows), found, frozenset((anchor, node, *path)), normalised)


def _part(seen: Any, flat: bool) -> Part | None:
    """Which rows an item of ``chunk`` or ``split`` has."""
    pieces, number = seen.args
    of = see(pieces)
    if of.op not in ("chunk", "split") or not isinstance(number, int):
        return None
    logits, size, dim = of.args
    rank = len(shape(logits))
    if not isinstance(dim, int) or dim % rank == rank - 1 or (flat and rank != 2):
        return None
    return Part(of.op, size, dim % rank, number)


def _over_vocabulary(seen: Any) -> bool:
    """Whether a softmax or sum is over the last dimension, and rounds nothing before."""
    x, dim, *rest = seen.args
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    wanted = rest[0] if seen.op == "log_softmax" else None
    widens = wanted is None or torch.promote_types(dtype(x), wanted) == wanted  # type: ignore[arg-type]
    return isinstance(dim, int) and dim in (-1, len(shape(x)) - 1) and widens


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


def _returned(chain: _Chain, total: _Total | None = None) -> dict[fx.Node, dict[str, Any]] | Reason:
    """The logits that the graph returns, as operands of ``lazy_logits``; or the reason that others need them."""
    lazy: dict[fx.Node, dict[str, Any]] = {}
    x, weight, bias = see(chain.linear).args
    for node in chain.inside:
        if node is chain.anchor or (total is not None and node is total.node):
            continue
        in_pieces = all(see(user).op in ("index", "getitem") and not is_noop(see(user)) for user in node.users)
        for user in node.users:
            if user in chain.inside or (in_pieces and _ends_in_losses(user)):
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


def _ends_in_losses(node: fx.Node) -> bool:
    """Whether a piece of the logits is read by losses only, which are sites of their own."""
    known = see(node).op in (*_ROWS, *_LOSSES, "log_softmax") or is_noop(see(node)) or is_widening(see(node))
    return known and (see(node).op in _LOSSES or all(map(_ends_in_losses, node.users)))


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


def _total(chain: _Chain) -> _Total | None:
    """The one logsumexp of the same rows that is outside of the loss."""
    others = {u for n in chain.inside if n is not chain.anchor for u in n.users if u not in chain.inside}
    found = {total for user in others if (total := _leads_to_total(user)) is not None}
    if len(found) != 1:
        return None
    (node,) = found
    other = _walk(chain.anchor, see(node).args[0])
    return None if isinstance(other, Reason) or not chain.same_rows(other) else _Total(node, other)


def _leads_to_total(node: fx.Node) -> fx.Node | None:
    seen = see(node)
    if seen.op == "logsumexp":
        return node if _over_vocabulary(seen) else None
    if not (seen.op in ("view", "flatten") or is_noop(seen) or is_widening(seen)) or len(node.users) != 1:
        return None
    return _leads_to_total(next(iter(node.users)))


def _with_total(made: Rewrite, anchor: fx.Node, total: _Total | None, target: Any, prepare: Any) -> Rewrite:
    """``made``, with the logsumexp as second result of ``target``. Every token is scored: its own may be wanted."""
    if total is None:
        return made
    order = {n: i for i, n in enumerate(anchor.graph.nodes)}
    reads = [order[x] for x in made.args if isinstance(x, fx.Node)]
    made.target, made.prepare, made.kernel = target, prepare, OPS["linear_log_prob"]
    made.outputs = (anchor, total.node)
    # Each is read at once, the loss for its mean: both come from where the first was, if the operands are there.
    made.early = max(reads) < min(order[anchor], order[total.node])
    made.kwargs |= {
        "total_rows": total.chain.rows,
        "total_keeps": bool(see(total.node).args[2]),
        "total_dtype": dtype(total.node),
    }
    made.notes = "; ".join(filter(None, (made.notes, "with its logsumexp")))
    return made


def _fused(chain: _Chain, labels: Any, total: _Total | None = None, **options: Any) -> tuple[Any, ...] | Reason:
    """Operands of the head's op, its options, and the logits that are returned; or the reason against it."""
    x, w, b = see(chain.linear).args
    lazy = _returned(chain, total)
    if isinstance(lazy, Reason):
        return lazy
    if lazy and not requires_grad(chain.linear):
        return Reason("no_grad", "without gradients (evaluation) the logits are returned as they are")
    maths, hidden = chain.maths, through(x, "noop")
    options = {
        **options,
        "softcap": maths.softcap,
        "logit_scale": maths.scale / maths.divisor,
        "dtype": dtype(chain.linear),
    }
    if reason := OPS[NAME].supported(value(hidden), value(w), value(b), value(labels), **options):
        return reason
    return (hidden, w, b, labels), options, lazy


def _build(m: Match) -> Rewrite | Reason | None:
    logits, labels, class_weight, size_average, ignore_index, reduce, reduction, *rest = see(m.anchor).args
    smoothing = rest[0] if rest else 0.0
    if class_weight is not None:
        return Reason("class_weight", "the loss has class weights")
    if not _number(smoothing):
        return Reason("label_smoothing", f"label_smoothing {smoothing!r} is no constant")
    if size_average is not None or reduce is not None:
        return Reason("reduction", "the loss is called with the deprecated size_average or reduce")
    if not isinstance(ignore_index, int) or reduction not in ("mean", "sum", "none"):
        return Reason("reduction", f"ignore_index {ignore_index!r} or reduction {reduction!r} is no constant")
    classes_second = _before_transpose(logits)
    rank = 2 if classes_second is None else 3
    if len(shape(logits)) != rank or len(shape(labels)) != rank - 1:
        return Reason(
            "shape",
            f"the loss is of logits {tuple(shape(logits))} and labels {tuple(shape(labels))}, not [tokens, vocab] and "
            "[tokens], or [batch, vocab, seq] and [batch, seq]",
        )
    chain = _walk(m.anchor, logits if classes_second is None else classes_second)
    if isinstance(chain, Reason):
        return chain
    if see(m.anchor).op == "nll_loss" and not chain.normalised:
        return Reason("maths", "nll_loss is of logits that no log_softmax has normalised")
    if classes_second is not None:
        chain = replace(chain, inside=chain.inside | {through(logits, "noop"), logits})
    total = None if smoothing else _total(chain)
    if total is not None:
        inside = chain.inside | total.chain.inside | {total.node}
        chain = replace(chain, inside=inside, logits={**chain.logits, **total.chain.logits})
        if reduction != "none":  # which shape they have is nothing to the loss, and they may be there earlier
            labels = through(labels, "view", "flatten", "noop")
    options = {"ignore_index": ignore_index, "reduction": reduction}
    fused = _fused(chain, labels, total, **options, **({"label_smoothing": smoothing} if smoothing else {}))
    if isinstance(fused, Reason):
        return fused
    operands, options, lazy = fused
    made = Rewrite(
        rows_linear_cross_entropy,
        operands,
        {"rows": chain.rows, "out_dtype": dtype(m.anchor), **options},
        inside=chain.inside,
        may_escape=chain.inside,
        lazy=lazy,
        notes="logits are computed when read" if lazy else "",
        kernel=OPS[NAME],
        prepare=_of_rows,
    )
    return _with_total(made, m.anchor, total, rows_loss_and_total, _of_every_row)


def _before_transpose(logits: Any) -> Any:
    """``x`` [batch, seq, vocab] when ``logits`` are [batch, vocab, seq] of it."""
    seen = see(through(logits, "noop"))
    if seen.op == "transpose" and {d % 3 for d in seen.args[1:]} == {1, 2} and len(shape(seen.args[0])) == 3:
        return seen.args[0]
    if seen.op == "permute" and seen.args[1] in ((0, 2, 1), (0, -1, 1), (0, -1, -2)):
        return seen.args[0]
    return None


# Each token's log-probability, without a loss of torch's.


def _of_labels(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    rows: tuple[Any, ...],
    ignore_index: int | None,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    flat = labels.reshape(-1)
    if ignore_index is not None:
        flat = torch.where(flat == ignore_index, ignore_index, flat.clamp(min=0))
        options["ignore_index"] = ignore_index
    for ours in ("sign", "axes", "out_dtype"):
        options.pop(ours, None)
    return (_picked(hidden, rows).reshape(-1, hidden.shape[-1]), weight, bias, flat), options


def rows_log_prob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    sign: int,
    axes: int,
    out_dtype: torch.dtype,
    variant: str = "",
    **options: Any,
) -> torch.Tensor:
    """``sign`` times each label's log-probability (:func:`linear_log_prob` of the rows that ``rows`` picks), in the
    labels' shape with ``axes`` = 1 axis of size 1 more, or -1: one less, at the end. ``ignore_index``: the label of
    which it is 0 (None: there is none).
    """
    args, options = _of_labels(hidden, weight, bias, labels, **options)
    found = run("linear_log_prob", variant, *args, **options).log_prob * sign
    return found.view((*labels.shape, 1)[: labels.dim() + axes]).to(out_dtype)


# The same with each row's logsumexp, which others read (z-loss): no token is left out.

#: A label that nobody has.
_NOBODYS = -(2**31)


def _of_every_row(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    rows: tuple[Any, ...],
    ignore_index: int | None,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    flat = labels.reshape(-1)
    if ignore_index is not None:
        flat = flat.masked_fill(flat == ignore_index, 0)
    maths = {name: options[name] for name in ("softcap", "logit_scale", "dtype")}
    operands = (_picked(hidden, rows).reshape(-1, hidden.shape[-1]), weight, bias, flat)
    return operands, {"ignore_index": _NOBODYS, "lse_gradient": True, **maths}


def _log_prob_and_total(
    hidden: torch.Tensor,
    *operands: Any,
    total_rows: tuple[Any, ...],
    total_keeps: bool,
    total_dtype: torch.dtype,
    variant: str = "",
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities [tokens], and the logsumexp as the graph has it."""
    args, maths = _of_every_row(hidden, *operands, **options)
    found = run("linear_log_prob", variant, *args, **maths)
    shape_of = _picked(hidden, total_rows).shape[:-1]
    return found.log_prob, found.lse.view((*shape_of, 1) if total_keeps else shape_of).to(total_dtype)


def rows_loss_and_total(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    out_dtype: torch.dtype,
    ignore_index: int,
    reduction: str,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rows_linear_cross_entropy, logsumexp)``: the latter of the rows that ``total_rows`` picks, for every token."""
    log_prob, total = _log_prob_and_total(hidden, weight, bias, labels, ignore_index=ignore_index, **options)
    ignored = labels.reshape(-1) == ignore_index
    loss = (-log_prob).masked_fill(ignored, 0)
    if reduction == "none":
        loss = loss.view(labels.shape)
    else:
        loss = loss.sum() if reduction == "sum" else loss.sum() / (~ignored).sum()
    return loss.to(out_dtype), total


def rows_log_prob_and_total(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    sign: int,
    axes: int,
    out_dtype: torch.dtype,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(rows_log_prob, logsumexp)``: the latter of the rows that ``total_rows`` picks."""
    log_prob, total = _log_prob_and_total(hidden, weight, bias, labels, **options)
    return (log_prob * sign).view((*labels.shape, 1)[: labels.dim() + axes]).to(out_dtype), total


@dataclass(frozen=True)
class _Pick:
    """One value of each row of ``rows`` [..., vocab], at ``index`` [..., 1] or [...]. ``nodes`` are those that pick."""

    rows: Any
    index: fx.Node
    nodes: frozenset[fx.Node]


def _picks(node: Any) -> _Pick | None:
    """What ``node`` picks: ``x.gather(-1, index)``, with or without its last axis, or ``x[arange, index]``."""
    seen = see(node)
    if seen.op == "gather":
        x, dim, index = seen.args
        whole = isinstance(index, fx.Node) and dim in (-1, len(shape(x)) - 1) and _one_of_each(x, shape(index))
        return _Pick(x, index, frozenset((node,))) if whole else None
    if _drops_last(seen) and see(seen.args[0]).op == "gather":
        inner = _picks(seen.args[0])
        return inner and replace(inner, nodes=inner.nodes | {node})
    if seen.op == "index" and isinstance(seen.args[1], tuple) and len(seen.args[1]) == 2:
        x, (first, index) = seen.args
        every = isinstance(first, fx.Node) and first.target is torch.arange and len(first.args) == 1
        if every and isinstance(index, fx.Node) and len(shape(x)) == 2 and len(shape(index)) == 1:
            same = same_size(value(first.args[0]), shape(x)[0]) and same_size(shape(index)[0], shape(x)[0])
            return _Pick(x, index, frozenset((node,))) if same else None
    return None


def _drops_last(seen: Any) -> bool:
    """``x.squeeze(-1)``, ``x[..., 0]``: without the last axis, if its size is 1."""
    if seen.op == "squeeze":
        return seen.args[1] in (-1, len(shape(seen.args[0])) - 1)
    return seen.op == "index" and seen.args[1] == (Ellipsis, 0)


def _one_of_each(x: Any, index: tuple[Any, ...]) -> bool:
    """Whether an index of this shape has one column, and a row for each of ``x``'s."""
    whole = len(index) == len(shape(x)) and same_size(index[-1], 1)
    return whole and all(same_size(a, b) for a, b in zip(index[:-1], shape(x)[:-1], strict=True))


def _build_picked(m: Match) -> Rewrite | Reason | None:
    picked = _picks(m.anchor)
    if picked is None:
        return None
    chain = _walk(m.anchor, picked.rows)
    if isinstance(chain, Reason):
        return chain if _is_normalised(picked.rows) else None
    return _log_prob(m.anchor, chain, picked, 1) if chain.normalised else None


def _ignored_labels(anchor: fx.Node, index: fx.Node) -> tuple[fx.Node, int] | None:
    """``(labels, ignore_index)`` where ``index`` are these labels with the ignored ones made valid, and what is picked
    is set to zero there.
    """
    source = _made_valid(_before_views(index))
    fills = _zeroed([anchor])
    if source is None or isinstance(fills, Reason) or not fills or None in fills:
        return None
    same = all(_same(f[0], source) and f[1] == fills[0][1] for f in fills)  # type: ignore[index]
    ignore_index = fills[0][1]  # type: ignore[index]
    negative = isinstance(ignore_index, int) and ignore_index < 0
    rows = len(shape(anchor)) - len(shape(source)) in (0, 1)
    rows = rows and all(same_size(a, b) for a, b in zip(shape(source), shape(anchor), strict=False))
    return (source, ignore_index) if same and negative and rows else None


def _before_views(node: Any) -> Any:
    """What ``node`` is, in another shape."""
    while see(node := through(node, "view", "flatten", "unsqueeze", "noop")).op == "index":
        if see(node).args[1] != (Ellipsis, None):
            break
        node = see(node).args[0]
    return node


def _made_valid(node: Any) -> Any:
    """``y`` of ``y.clamp(min=0)``, ``y.masked_fill(y == i, 0)`` or ``torch.where(y != i, y, 0)``."""
    if _is(node, "clamp", "clamp_min") and _argument(node, 1, "min") == 0 and _argument(node, 2, "max") is None:
        return node.args[0]
    if _is(node, "masked_fill") and _argument(node, 2, "value") == 0:
        mask = _ignored_by(_argument(node, 1, "mask"))
        return node.args[0] if mask is not None and _same(mask[0], node.args[0]) else None
    if _is(node, "where") and len(node.args) == 3 and node.args[2] == 0:
        mask = _kept_by(node.args[0])
        return node.args[1] if mask is not None and _same(mask[0], node.args[1]) else None
    return None


def _same(a: Any, b: Any) -> bool:
    """Whether two values are the same: one node, or the same view of the same node."""
    if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b:
        one, two = see(a), see(b)
        views = one.op == two.op and (one.op in _ROWS or is_noop(one)) and len(one.args) == len(two.args)
        return views and all(_same(x, y) for x, y in zip(one.args, two.args, strict=True))
    return a is b if isinstance(a, fx.Node) or isinstance(b, fx.Node) else a == b


def _is_normalised(rows: Any) -> bool:
    """Whether a log_softmax is what values are picked of."""
    return see(through(rows, *_ROWS, "widen", "noop")).op == "log_softmax"


def _build_difference(m: Match) -> Rewrite | Reason | None:
    for sign, (a, b) in ((-1, see(m.anchor).args), (1, see(m.anchor).args[::-1])):
        total, picked = see(a), _picks(b)
        if total.op != "logsumexp" or picked is None or not _over_vocabulary(total):
            continue
        alike = len(shape(a)) == len(shape(b)) == len(shape(m.anchor))
        if not alike or not all(same_size(x, y) for x, y in zip(shape(a), shape(b), strict=True)):
            return Reason("shape", f"{a.name} and {b.name} are not of the same rows")
        chain, other = _walk(m.anchor, picked.rows), _walk(m.anchor, total.args[0])
        if isinstance(chain, Reason) or isinstance(other, Reason):
            return None
        if (chain.linear, chain.maths, chain.rows) != (other.linear, other.maths, other.rows) or chain.normalised:
            return Reason("maths", f"{a.name} and {b.name} are not of the same logits")
        inside = chain.inside | other.inside | {a}
        chain = replace(chain, inside=inside, logits={**chain.logits, **other.logits})
        read = len(a.users) > 1
        return _log_prob(m.anchor, chain, picked, sign, _Total(a, other) if read else None)
    return None


def _log_prob(
    anchor: fx.Node, chain: _Chain, picked: _Pick, sign: int, total: _Total | None = None
) -> Rewrite | Reason:
    chain = replace(chain, inside=chain.inside | picked.nodes)
    ignored = _ignored_labels(anchor, picked.index) if total is None else None
    # The labels as they were, before those that are ignored were made valid ones.
    labels, ignore_index = (picked.index, None) if ignored is None else ignored
    axes = len(shape(anchor)) - len(shape(labels))
    fused = _fused(chain, labels, total)
    if isinstance(fused, Reason):
        return fused
    operands, options, lazy = fused
    options |= {"sign": sign, "axes": axes, "ignore_index": ignore_index}
    made = Rewrite(
        rows_log_prob,
        operands,
        {"rows": chain.rows, "out_dtype": dtype(anchor), **options},
        inside=chain.inside,
        may_escape=chain.inside,
        lazy=lazy,
        notes="; ".join(
            ["logits are computed when read"] * bool(lazy) + ["ignored tokens are left out"] * bool(ignored)
        ),
        kernel=OPS["linear_log_prob"],
        prepare=_of_labels,
    )
    return _with_total(made, anchor, total, rows_log_prob_and_total, _of_every_row)


def _seed(node: fx.Node) -> str | None:
    return "cross_entropy" if see(node).op == "cross_entropy" else None


LOSS = Table(
    NAME,
    (
        row(op("cross_entropy"), _build),  # -log softmax(softcap(scale · W h))[label], reduced
        row(op("nll_loss"), _build),  # the same, of log_softmax
        row(op("squeeze"), _build_picked),  # log softmax(z)[label]
        row(op("gather"), _build_picked),
        row(op("index"), _build_picked),
        row(op("sub"), _build_difference),  # z[label] - log Σ exp z, or its negative
    ),
    _seed,
)


#: The report's name for logits that a graph returns without a loss of them.
RETURNED = "lazy_logits"


def returned_logits(graph: fx.Graph) -> dict[fx.Node, dict[str, Any]]:
    """The outputs that are a language model's logits and that nothing in the graph reads, and the operands of
    ``lazy_logits`` for each: the caller computes the loss (label smoothing, a loss of the user's), and may need no more
    of them than a number a token.

    A language model is one that looks its tokens up in as many rows as it has logits. Without gradients (evaluation,
    generation) its logits are wanted as they are.
    """
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    vocabularies = {str(shape(n.args[1])[0]) for n in graph.nodes if _is(n, "embedding") and len(n.args) > 1}
    found: dict[fx.Node, dict[str, Any]] = {}
    for result in output.args[0] if vocabularies else ():
        if not isinstance(result, fx.Node) or str(shape(result)[-1:]) not in {f"({v},)" for v in vocabularies}:
            continue
        chain = _walk(output, result)
        if isinstance(chain, Reason) or chain.rows or chain.normalised or not requires_grad(chain.linear):
            continue
        x, weight, _ = see(chain.linear).args
        lazy = _returned(replace(chain, inside=chain.inside - {output}))
        if not isinstance(lazy, Reason) and shape(weight) == (shape(chain.linear)[-1], shape(x)[-1]):
            found |= lazy
    return found


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


def _kept_by(mask: Any) -> tuple[Any, Any] | None:
    """``(labels, ignore_index)`` when ``mask``, of any dtype, is true exactly where labels are not ignored."""
    mask = through(mask, "cast", "noop")
    negated = _is(mask, "invert", "bitwise_not", "logical_not", "__invert__")
    compared = mask.args[0] if negated else mask
    if not _is(compared, *(("eq", "__eq__") if negated else ("ne", "__ne__"))) or len(compared.args) != 2:
        return None
    return compared.args[0], compared.args[1]


def _zeroed(results: list[fx.Node]) -> list[tuple[Any, Any] | None] | Reason:
    """By which labels each use of ``results`` is set to zero (None: by something else); or that one is not."""
    fills = []
    users = [user for result in results for user in result.users]
    while users:
        user = users.pop()
        seen = see(user)
        if seen.op in ("view", "flatten", "squeeze", "neg") or is_noop(seen) or is_widening(seen):
            users += user.users
        elif _is(user, "masked_fill") and _argument(user, 2, "value") == 0:
            fills.append(_ignored_by(_argument(user, 1, "mask")))
        elif seen.op == "mul" and any(_kept_by(factor) is not None for factor in seen.args):
            fills.append(next(kept for factor in seen.args if (kept := _kept_by(factor)) is not None))
        else:
            return Reason("unmasked", f"{user.name} reads results of positions whose label is ignored")
    return fills


def _build_ignoring(m: Match) -> Rewrite | Reason | None:
    hidden, weight, bias, labels = m.anchor.args
    clamped = through(labels, "noop", "view", "flatten")
    if "ignore_index" in m.anchor.kwargs or not _is(clamped, "clamp", "clamp_min"):
        return None
    source = clamped.args[0]
    if _argument(clamped, 1, "min") != 0 or _argument(clamped, 2, "max") is not None:
        return None
    fields: list[Any] = sorted(m.anchor.users, key=lambda n: str(n.args[1]))
    fills = _zeroed(fields)
    if isinstance(fills, Reason):
        return fills
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
