"""Attention: ``scaled_dot_product_attention``, ``flex_attention``, ``varlen_attn``, or what is written out as a
product, a softmax and a product, with keys and values repeated for their query heads and a dense mask.

The op takes the keys and values as they were before ``repeat_kv``, and the mask's structure
(:mod:`fastft.patterns.masks`) in place of the mask, which nobody computes any more once its last user is replaced. A
mask that is not understood stays, as an operand.

Written out, scores are scaled, capped (Gemma 2), masked by a sum, a fill or a choice, joined by sinks (gpt-oss), and
their weights may be dropped: each of these at most once, in this order, as transformers' eager attention has them.

Of FlexAttention, what its functions say is recovered (:mod:`fastft.patterns.flex`). There is no dense mask to fall back
on: a call that is not recovered stays.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fastft.autotune.variants import run
from fastft.kernels._attention_mask import attention_mask, document_positions
from fastft.kernels.attention import OP as ATTENTION
from fastft.kernels.attention import attention
from fastft.patterns._match import (
    Bindings,
    Match,
    Pattern,
    Reason,
    Rewrite,
    Table,
    Var,
    dtype,
    is_noop,
    op,
    rank,
    row,
    same_size,
    see,
    shape,
    through,
    value,
)
from fastft.patterns._see import in_place
from fastft.patterns.flex import is_call, mask_of, proven, scores_of
from fastft.patterns.masks import HIDES, Structure, number_of, recover, recover_added, recover_hidden


def _rounded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, to: torch.dtype, **options: Any
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    return (q.to(to), k.to(to), v.to(to)), options


def rounded_attention(*qkv: torch.Tensor, variant: str = "", **options: Any) -> torch.Tensor:
    """:func:`attention` (or a variant of it) of q, k and v rounded to one dtype (``to``), as autocast rounds them."""
    args, options = _rounded(*qkv, **options)
    return run(ATTENTION.name, variant, *args, **options)


def _by_rows(q: torch.Tensor, *kv: torch.Tensor, **options: Any) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    return tuple(t.transpose(0, 1).unsqueeze(0) for t in (q, *kv)), options


def packed_attention(*qkv: torch.Tensor, variant: str = "", **options: Any) -> torch.Tensor:
    """:func:`attention` (or a variant of it) of q ``[tokens, Hq, D]``, k and v ``[tokens, Hk, D]``, documents one after
    another, as PyTorch's ``varlen_attn`` takes them. Returns ``[tokens, Hq, Dv]``.
    """
    args, options = _by_rows(*qkv, **options)
    return run(ATTENTION.name, variant, *args, **options).squeeze(0).transpose(0, 1)


@dataclass(frozen=True)
class Spelled:
    """Attention as it stands in the graph. ``mask`` shows keys where it is True ("shows"), hides them ("hides"), or is
    added to the scores ("adds"). ``below``: what hidden scores are set to, where they are set to something.
    ``structure``: the mask's, where it is no tensor; then ``bias`` is what is added to the scores beside it, and
    ``known`` what made the mask.
    """

    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None = None
    kind: str = "shows"
    below: float = -math.inf
    is_causal: bool = False
    scale: float | None = None
    softcap: float = 0.0
    sinks: fx.Node | None = None
    dropout_p: float = 0.0
    structure: Structure | None = None
    bias: fx.Node | None = None
    known: frozenset[fx.Node] = frozenset()


def _sdpa(m: Match) -> Rewrite | Reason | None:
    q, k, v, mask, dropout_p, is_causal, scale, _ = see(m.anchor).args
    if any(rank(t) != 4 for t in (q, k, v)):
        return Reason("shape", f"q has {rank(q)} axes: [batch, heads, seq, head] is needed")
    for name, number in (("scale", scale), ("dropout", dropout_p)):
        if isinstance(number, fx.Node):
            return Reason(name, f"attention's {name} is an input of the graph ({number.name}), not a constant")
    kind = "shows" if mask is None or dtype(mask) == torch.bool else "adds"
    site = Spelled(q, k, v, mask, kind, is_causal=bool(is_causal), scale=scale, dropout_p=float(dropout_p or 0.0))
    return _attention(m, site)


def _attention(m: Match, site: Spelled) -> Rewrite | Reason | None:
    q, k, v, mask, is_causal = site.q, _solid(site.k), _solid(site.v), site.mask, site.is_causal
    short_k, short_v = _unrepeated(k), _unrepeated(v)
    if same_size(shape(short_k)[1], shape(short_v)[1]):
        k, v = short_k, short_v
    options: dict[str, Any] = {"dropout_p": site.dropout_p}
    options |= {"scale": site.scale} if site.scale is not None else {}
    options |= {"softcap": site.softcap} if site.softcap else {}
    options |= {"sinks": site.sinks} if site.sinks is not None else {}
    options |= {"dense": site.bias} if site.bias is not None else {}
    always = dict(options)
    note = "full"
    if is_causal:
        options["causal"], note = True, "causal"
    if mask is not None or site.structure is not None:
        structure = _recover(site) if site.structure is None else site.structure
        unrecovered = structure if isinstance(structure, Reason) else None
        if isinstance(structure, Structure):
            note = str(structure)
            options |= {
                "causal": structure.causal or is_causal,
                "window": structure.window,
                "chunk": structure.chunk,
            }
            # Only padding can hide every key from a query; one finite number for all of them hides none of them then.
            if structure.padding is not None and structure.below > -math.inf and site.sinks is None:
                options["blind"] = "added" if site.kind == "adds" else "filled"
            # What they hold is looked at once for all layers, by a node of its own.
            found = {"padding": structure.padding, "positions": structure.positions}
            unrecovered = _problem(m, q, k, v, {**options, **found})
            if unrecovered is None and (structure.padding is not None or structure.positions is not None):
                options["mask"] = _shared(structure)
        if unrecovered is not None:
            if mask is None:
                return unrecovered
            options = {**always, "causal": is_causal, "dense": mask}
            if site.below > -math.inf and site.kind != "adds" and site.sinks is None:
                options["blind"] = "filled"
            if site.kind == "hides":
                if problem := _problem(m, q, k, v, options):
                    return problem
                options["dense"] = _negated(mask)
            note = f"dense: {unrecovered.text}"
    if problem := _problem(m, q, k, v, {key: o for key, o in options.items() if key != "mask"}):
        return problem
    note += "; bias" if site.bias is not None else ""
    note += "; sinks" if site.sinks is not None else ""
    if not same_size(shape(q)[1], shape(k)[1]):
        note += f"; {shape(q)[1]} query heads on {shape(k)[1]}"
    target, prepare = attention, None
    if not all(dtype(t) == dtype(m.anchor) for t in (q, k, v)):
        options["to"] = dtype(m.anchor)
        target, prepare = rounded_attention, _rounded
    answer = Rewrite(target, (q, k, v), options, inside=m.inside, notes=note, kernel=ATTENTION, prepare=prepare)
    answer.known = site.known
    answer.draws = f"attention's dropout of {site.dropout_p}" if site.dropout_p else ""
    return answer


def _problem(m: Match, q: fx.Node, k: fx.Node, v: fx.Node, options: dict[str, Any]) -> Reason | None:
    """What the op says about these operands, rounded as autocast would."""
    to = dtype(m.anchor)
    q, k, v = (t if t.dtype == to else t.to(to) for t in (value(q), value(k), value(v)))
    return ATTENTION.supported(q, k, v, **{key: value(o) for key, o in options.items()})


def _recover(site: Spelled) -> Structure | Reason:
    """The mask's structure. What it adds must be as good as infinite, where a query may see no key."""
    mask = site.mask
    assert mask is not None
    if site.kind == "adds":
        structure = recover_added(mask)
        kind = dtype(mask)
        assert kind is not None
        padded = isinstance(structure, Structure) and structure.padding is not None
        if isinstance(structure, Structure) and padded and structure.below > torch.finfo(kind).min / 2:
            return Reason("mask", f"{structure.below} is added to hidden scores, which is not below all others")
        return structure
    structure = (recover if site.kind == "shows" else recover_hidden)(mask)
    return replace(structure, below=site.below) if isinstance(structure, Structure) else structure


def _negated(mask: fx.Node) -> fx.Node:
    """``~mask``, right after it."""
    node = next((u for u in mask.users if u.target is torch.logical_not), None)
    if node is None:
        with mask.graph.inserting_after(mask):
            node = mask.graph.call_function(torch.logical_not, (mask,))
        with value(mask).fake_mode:
            node.meta["example_value"] = torch.logical_not(value(mask))
    return node


def _shared(structure: Structure) -> tuple[fx.Node | None, ...]:
    """The results of ``attention_mask``, from the node that another layer has made, or from a new one.

    It stands where its operands are, outside every layer, so that no layer's recomputation asks again.
    """
    padding, positions = structure.padding, structure.positions
    operands = [n for n in (padding, positions) if n is not None]
    args = (padding, positions, structure.chunk)
    graph = operands[0].graph
    node = next((u for u in operands[0].users if u.target is attention_mask and u.args == args), None)
    if node is None:
        after = operands[0]
        if len(operands) == 2:
            after = next(n for n in reversed(graph.nodes) if n in operands)
        after = _last_placeholder(graph, after)
        fake = [value(n) for n in args]
        mode = value(operands[0]).fake_mode
        with graph.inserting_after(after):
            node = graph.call_function(attention_mask, args)
        with mode:
            node.meta["example_value"] = attention_mask(*fake)
    return tuple(_item(node, i) for i in range(5))


def skip_padding(graph: fx.Graph) -> str:
    """``options={"skip_padding": True}``: every :func:`attention_mask` in a rewritten graph leaves out the queries of
    padding behind the last token, where they may give 0 in every layer. Returns what the report says.
    """
    found: list[str] = []
    for node in graph.nodes:
        if node.target is not attention_mask or node.args[0] is None:
            continue
        # What a query without keys gives is 0 here, unless stock code hides scores by a finite number.
        layers = {u for item in node.users for u in item.users if u.op == "call_function"}
        if all(u.kwargs.get("causal") and u.kwargs.get("blind", "zero") == "zero" for u in layers):
            node.args = (*node.args, True)
            found.append("queries of padding behind the last token are skipped")
        else:
            found.append("queries of padding are computed: a layer is not causal, or hides scores by a finite number")
    return "; ".join(dict.fromkeys(found)) or "no padding mask was recovered"


def _last_placeholder(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """``node``, or the graph's last input when it is an input: inputs stand together."""
    if node.op != "placeholder":
        return node
    return [n for n in graph.nodes if n.op == "placeholder"][-1]


def _item(node: fx.Node, index: int) -> fx.Node | None:
    """Item ``index`` of a node's tuple; None where the item is None."""
    found = value(node)[index]
    if found is None:
        return None
    item = next((u for u in node.users if u.target is operator.getitem and u.args[1] == index), None)
    if item is None:
        with node.graph.inserting_after(node):
            item = node.graph.call_function(operator.getitem, (node, index))
        item.meta["example_value"] = found
    return item


def _solid(node: fx.Node) -> fx.Node:
    """``node``, seen through no-ops and through ``cat`` with empty tensors (a cache that holds nothing yet)."""
    while True:
        node = through(node, "noop")
        seen = see(node)
        if seen.op != "cat" or not isinstance(seen.args[0], (tuple, list)):
            return node
        filled = [t for t in seen.args[0] if not (rank(t) == 1 and same_size(shape(t)[0], 0))]
        if len(filled) != 1:
            return node
        node = filled[0]


def _unrepeated(node: fx.Node) -> fx.Node:
    """What ``repeat_kv`` was given, or ``node``: ``x[:, :, None].expand(b, h, n, s, d).reshape(b, h n, s, d)``."""
    whole = see(node)
    if whole.op != "view":
        return node
    wide = see(through(whole.args[0], "noop"))
    if wide.op != "expand":
        return node
    narrow = through(wide.args[0], "noop")
    seen = see(narrow)
    b, _, s, d = shape(node)
    sizes = shape(through(whole.args[0], "noop"))
    if len(sizes) != 5 or not all(same_size(x, y) for x, y in zip((b, s, d), (sizes[0], *sizes[3:]), strict=True)):
        return node
    if seen.op == "unsqueeze":
        inserts = seen.args[1] in (2, -3)
    else:
        inserts = seen.op == "index" and isinstance(seen.args[1], tuple) and _inserts_third(seen.args[1])
    if (
        not inserts
        or rank(seen.args[0]) != 4
        or not all(same_size(x, y) for x, y in zip(shape(seen.args[0]), (b, sizes[1], s, d), strict=True))
    ):
        return node
    return _solid(seen.args[0])


def _inserts_third(index: tuple[Any, ...]) -> bool:
    """Whether an index is ``[:, :, None]``, with any number of ``:`` after it."""
    return len(index) >= 3 and index[2] is None and all(i == slice(None) for n, i in enumerate(index) if n != 2)


# ---------------------------------------------------------------- written out


class Written(Pattern):
    """``dropout(softmax(mask(cap(q kᵀ · scale)) and sinks)) v``, bound to ``site`` as :class:`Spelled`."""

    anchors = frozenset({"matmul", "einsum"})

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        walk = _Walk()
        site = walk.site(found)
        if site is not None:
            more = Bindings(bound.names, bound.inside | walk.inside).bind("site", site)
            if more is not None:
                yield more


class _Walk:
    """From the last product up to the first one; ``inside``: the nodes passed by."""

    def __init__(self) -> None:
        self.inside: set[fx.Node] = set()

    def take(self, node: Any, *ops: str) -> Any:
        """``node``, seen through no-ops and ``ops``."""
        while isinstance(node, fx.Node):
            seen = see(node)
            if seen.op not in ops and not is_noop(seen):
                break
            self.inside.add(node)
            node = seen.args[0]
        return node

    def site(self, anchor: Any) -> Spelled | None:
        product = _product(anchor)
        if product is None or product[2]:
            return None
        self.inside.add(anchor)
        p, v, _ = product
        dropout_p = 0.0
        p = self.take(p, "cast")
        if see(p).op == "dropout":  # one that drops: the others are no-ops
            self.inside.add(p)
            dropout_p, p = see(p).args[1], self.take(see(p).args[0], "cast")
        cut = see(p).op == "index" and _drops_last(see(p).args[1])
        if cut:
            self.inside.add(p)
            p = self.take(see(p).args[0], "cast")
        softmax = see(p)
        if softmax.op != "softmax" or rank(p) != 4 or softmax.args[1] not in (-1, 3):
            return None
        self.inside.add(p)
        s = self.take(softmax.args[0], "cast")
        s = self.take(self._unshifted(s), "cast")
        sinks = None
        if cut:
            joined = see(s)
            if joined.op != "cat" or joined.args[1] not in (-1, 3) or len(joined.args[0]) != 2:
                return None
            self.inside.add(s)
            s, sinks = self.take(joined.args[0][0], "cast"), _per_head(joined.args[0][1], shape(p)[1])
            if sinks is None:
                return None
        s, mask, kind, below = self._unmasked(s)
        s, softcap = self._uncapped(self.take(s, "cast"))
        scale = 1.0
        s = self.take(s, "cast")
        while (factor := _factor(see(s))) is not None:
            self.inside.add(s)
            scale, s = scale * factor, self.take(see(s).args[0], "cast")
        product = _product(s)
        if product is None:
            return None
        self.inside.add(s)
        q, k, transposed = product
        if not transposed:
            k = self._transposed(k)
        if k is None or any(rank(t) != 4 for t in (q, k, v)) or isinstance(dropout_p, fx.Node):
            return None
        return Spelled(q, k, v, mask, kind, below, False, scale, softcap, sinks, dropout_p)

    def _unshifted(self, s: Any) -> Any:
        """Without the subtraction of the largest score, which softmax does by itself."""
        seen = see(s)
        if seen.op != "sub" or not isinstance(seen.args[1], fx.Node):
            return s
        x, largest = seen.args[0], through(seen.args[1], "noop")
        passed = {s, seen.args[1], largest}
        if see(largest).op == "getitem" and see(largest).args[1] == 0:
            largest = see(largest).args[0]
            passed.add(largest)
        name = getattr(largest.target, "__name__", largest.target)
        dim = largest.kwargs.get("dim", largest.args[1] if len(largest.args) > 1 else None)
        if name not in ("max", "amax") or dim not in (-1, 3) or largest.args[:1] != (x,):
            return s
        self.inside |= passed
        return x

    def _unmasked(self, s: Any) -> tuple[Any, fx.Node | None, str, float]:
        """The scores before the mask, the mask, how it hides, and what it sets hidden scores to."""
        seen, name = see(s), str(getattr(getattr(s, "target", None), "__name__", getattr(s, "target", "")))
        if seen.op == "add" and all(isinstance(t, fx.Node) for t in seen.args):
            for scores, mask in (seen.args, seen.args[::-1]):
                whole = rank(scores) == rank(s) and all(map(same_size, shape(scores), shape(s)))  # none is broadcast
                if _scores(scores) and not _scores(mask) and whole:
                    self.inside.add(s)
                    return scores, mask, "adds", -math.inf
        args: tuple[Any, ...] = s.args if isinstance(s, fx.Node) else ()
        if name in ("masked_fill", "where") and len(args) == 3:
            if name == "where":
                hides = _scores(args[2]) and not _scores(args[1])
                scores, mask, fill = (args[2], args[0], args[1]) if hides else (args[1], args[0], args[2])
            else:
                hides, (scores, mask, fill) = True, args
            below = number_of(fill)
            if below is not None and below <= HIDES and _scores(scores) and dtype(mask) == torch.bool:
                self.inside.add(s)
                return scores, mask, "hides" if hides else "shows", below
        return s, None, "shows", -math.inf

    def _uncapped(self, s: Any) -> tuple[Any, float]:
        """The scores before ``cap · tanh(scores / cap)``, and the cap; 0.0 where there is none."""
        cap = _factor(see(s))
        inner: Any = through(see(s).args[0], "noop", "cast") if cap is not None else None
        if cap is None or see(inner).op != "tanh":
            return s, 0.0
        divided = through(see(inner).args[0], "noop", "cast")
        factor = _factor(see(divided))
        if factor is None or not math.isclose(factor * cap, 1.0, rel_tol=1e-6):
            return s, 0.0
        for node in (s, inner, divided):
            self.inside.add(node)
        self.take(see(s).args[0], "cast")
        self.take(see(inner).args[0], "cast")
        return see(divided).args[0], cap

    def _transposed(self, node: Any) -> Any:
        """What ``node`` is the transpose of, over its last two axes; None: it is none."""
        node = self.take(node)
        seen = see(node)
        if seen.op == "transpose" and {a % 4 for a in seen.args[1:]} == {2, 3}:
            self.inside.add(node)
            return seen.args[0]
        if seen.op == "permute" and seen.args[1] == (0, 1, 3, 2):
            self.inside.add(node)
            return seen.args[0]
        return None


def _product(node: Any) -> tuple[Any, Any, bool] | None:
    """The operands of a product over heads, and whether the second one is transposed."""
    seen = see(node)
    if seen.op == "matmul":
        return (*seen.args, False)
    if seen.op != "einsum" or len(seen.args) != 3 or not isinstance(seen.args[0], str):
        return None
    inputs, _, output = seen.args[0].replace(" ", "").partition("->")
    a, _, b = inputs.partition(",")
    if not all(len(set(t)) == len(t) == 4 for t in (a, b, output)) or not a[:2] == b[:2] == output[:2]:
        return None
    if output[2:] == a[2] + b[3] and a[3] == b[2]:
        return seen.args[1], seen.args[2], False
    if output[2:] == a[2] + b[2] and a[3] == b[3]:
        return seen.args[1], seen.args[2], True
    return None


def _factor(seen: Any) -> float | None:
    """The number that a product or quotient with a number multiplies by."""
    if seen.op in ("mul", "div") and isinstance(seen.args[1], (int, float)) and seen.args[1] != 0:
        return float(seen.args[1]) if seen.op == "mul" else 1.0 / seen.args[1]
    return None


def _drops_last(index: Any) -> bool:
    """Whether an index is ``[..., :-1]``."""
    index = index if isinstance(index, (tuple, list)) else (index,)
    rest = all(i is Ellipsis or i == slice(None) for i in index[:-1])
    return rest and len(index) in (2, 4) and index[-1] == slice(None, -1)


def _per_head(node: Any, heads: Any) -> fx.Node | None:
    """The ``[heads]`` that a ``[batch, heads, seq, 1]`` repeats; None: it repeats something else."""
    if not same_size(shape(node)[-1], 1) or rank(node) != 4:
        return None
    node = through(node, "expand", "noop")
    while rank(node) == 4:
        sizes, seen = shape(node), see(node)
        if not all(same_size(n, 1) for n in (sizes[0], *sizes[2:])) or not same_size(sizes[1], heads):
            return None
        if seen.op not in ("view", "index", "unsqueeze", "cast", "expand") and not is_noop(seen):
            return None
        node = seen.args[0]
    return node if rank(node) == 1 and same_size(shape(node)[0], heads) else None


def _written(m: Match) -> Rewrite | Reason | None:
    return _attention(m, m["site"])


# ---------------------------------------------------------------- FlexAttention


class Flex(Pattern):
    """The first result of a call of FlexAttention, bound to ``call``; alone, or as transformers joins it with sinks:
    times ``exp(l − logsumexp([l, sinks]))``, where l is the logarithm of the sum that the call returns too.
    """

    anchors = frozenset({"getitem", "mul"})

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        seen = see(found)
        out: Any = found
        out, factor = (found, None) if seen.op == "getitem" else seen.args
        item = see(out)
        if item.op != "getitem" or item.args[1] != 0 or not is_call(item.args[0]):
            return
        call, sinks = item.args[0], None
        inside: set[fx.Node] = {found, out}
        _drop_unread(call)
        if factor is not None:
            sinks = _renormalises(factor, call, shape(out)[1], inside)
            if sinks is None:
                return
        inside |= {call, *(n for n in call.all_input_nodes if n.op == "get_attr")}
        more = Bindings(bound.names, bound.inside | inside).bind("call", call)
        if more is not None and (more := more.bind("sinks", sinks)) is not None:
            yield more


def _drop_unread(call: fx.Node) -> None:
    """Erase the results of a call, and what is computed of them, that nobody reads: Dynamo leaves them."""
    for user in list(call.users):
        below = [user]
        for node in below:
            below += [u for u in node.users if u not in below]
        if not any(n.op == "output" or in_place(n) for n in below):
            for node in reversed(sorted(below)):
                node.graph.erase_node(node)


def _renormalises(factor: Any, call: fx.Node, heads: Any, inside: set[fx.Node]) -> fx.Node | None:
    """The sinks ``[heads]`` of a factor ``exp(l − logsumexp([l, sinks]))``; None: it is another. Passed nodes go to
    ``inside``.
    """
    walk = _Walk()
    factor = walk.take(factor, "cast")
    difference: Any = walk.take(see(factor).args[0], "cast") if see(factor).op == "exp" else None
    if see(difference).op != "sub":
        return None
    walk.inside |= {factor, difference}
    lse, total = see(difference).args
    joined = see(walk.take(total, "cast"))
    if joined.op != "logsumexp" or joined.args[1] not in (-1, 3, (-1,), [-1]) or not joined.args[2]:
        return None
    both = see(walk.take(joined.args[0], "cast"))
    if both.op != "cat" or both.args[1] not in (-1, 3) or len(both.args[0]) != 2 or both.args[0][0] is not lse:
        return None
    walk.inside |= {walk.take(total, "cast"), walk.take(joined.args[0], "cast"), lse}
    narrow = walk.take(lse, "cast", "unsqueeze")
    # The call counts in powers of 2, but for the kernels of FlashAttention.
    of_two = see(narrow)
    if of_two.op == "mul" and isinstance(of_two.args[1], float) and math.isclose(of_two.args[1], math.log(2.0)):
        walk.inside.add(narrow)
        narrow = walk.take(of_two.args[0], "cast")
    elif dict(call.args[6]).get("BACKEND") != "FLASH":  # type: ignore[arg-type]
        return None
    if see(narrow).op != "getitem" or see(narrow).args != (call, 1):
        return None
    inside |= walk.inside | {narrow}
    return _per_head(both.args[0][1], heads)


def _flex(m: Match) -> Rewrite | Reason | None:
    call = m["call"]
    q, k, v, _, _, scale, *_ = call.args
    scores = scores_of(call)
    if isinstance(scores, Reason):
        return scores
    if isinstance(scale, fx.Node):
        return Reason("scale", f"attention's scale is an input of the graph ({scale.name}), not a constant")
    structure = mask_of(call, scores)
    if isinstance(structure, Reason):
        return structure
    site = Spelled(q, k, v, scale=scale * scores.scale, softcap=scores.softcap, sinks=m["sinks"])
    return _attention(m, replace(site, structure=structure, bias=scores.bias, known=proven(call)))


# ---------------------------------------------------------------- varlen_attn


class Varlen(Pattern):
    """The first result of PyTorch's ``varlen_attn``, bound to ``call``."""

    anchors = frozenset({"getitem"})

    def match(self, found: Any, bound: Bindings) -> Iterator[Bindings]:
        call, index = see(found).args
        if index != 0 or str(getattr(call, "target", "")).split(".")[:2] != ["torch_attn", "_varlen_attn"]:
            return
        _drop_unread(call)
        more = Bindings(bound.names, bound.inside | {found, call}).bind("call", call)
        if more is not None:
            yield more


def _varlen(m: Match) -> Rewrite | Reason | None:
    call = m["call"]
    names = [a.name for a in torch.ops.torch_attn._varlen_attn.default._schema.arguments]
    given = dict(zip(names, call.args, strict=False)) | dict(call.kwargs)
    q, k, v, of_q, of_k = (given[name] for name in ("query", "key", "value", "cu_seq_q", "cu_seq_k"))
    for name in ("seqused_k", "block_table"):
        if given.get(name) is not None:
            return Reason("mask", f"varlen_attn has {name}, which is for generating")
    if of_q is not of_k:
        return Reason("mask", "varlen_attn has documents of other lengths for queries than for keys")
    left, right = given.get("window_size") or (-1, -1)
    if right != 0 and not given.get("is_causal"):
        return Reason("mask", "a window, chunk or packed mask that is not causal has no kernel")
    if isinstance(left, fx.Node) or isinstance(given.get("scale"), fx.Node):
        return Reason("mask", "varlen_attn's window or scale is an input of the graph, not a constant")
    positions = _positions(of_q, shape(q)[0])
    if positions is None:
        return Reason("shape", f"no input of the graph says how many tokens there are ({shape(q)[0]})")
    structure = Structure(causal=True, window=left + 1 if left >= 0 else 0, positions=positions)
    options: dict[str, Any] = {"causal": True, "window": structure.window}
    options |= {"scale": given["scale"]} if given.get("scale") is not None else {}
    fakes, _ = _by_rows(*(value(t) for t in (q, k, v)))
    if problem := ATTENTION.supported(*fakes, **options, positions=value(positions)):
        return problem
    options["mask"] = _shared(structure)
    note = str(structure)
    if not same_size(shape(q)[1], shape(k)[1]):
        note += f"; {shape(q)[1]} query heads on {shape(k)[1]}"
    return Rewrite(
        packed_attention, (q, k, v), options, inside=m.inside, notes=note, kernel=ATTENTION, prepare=_by_rows
    )


def _positions(cu_seqlens: fx.Node, tokens: Any) -> fx.Node | None:
    """The position_ids of documents that ``cu_seqlens`` are between, from the node that another layer has made, or from
    a new one; None: the number of tokens is no constant, and no input of the graph.
    """
    graph = cu_seqlens.graph
    length: Any = tokens
    if not isinstance(tokens, int):
        inputs = (n for n in graph.nodes if n.op == "placeholder" and not isinstance(value(n), torch.Tensor))
        length = next((n for n in inputs if same_size(value(n), tokens)), None)
        if length is None:
            return None
    args = (cu_seqlens, length)
    node = next((u for u in cu_seqlens.users if u.target is document_positions and u.args == args), None)
    if node is None:
        with graph.inserting_after(_last_placeholder(graph, cu_seqlens)):
            node = graph.call_function(document_positions, args)
        with value(cu_seqlens).fake_mode:
            node.meta["example_value"] = document_positions(value(cu_seqlens), tokens)
    return node


#: What other libraries leave in a graph for their own attention kernels.
_FOREIGN = {
    "flex_attention": "FlexAttention, whose result is read in another way than its first one alone, or with sinks",
    "varlen_attn": "PyTorch's varlen_attn, whose result is read in another way than its first one alone",
    "flash_attn": "FlashAttention's own op, which stays; attn_implementation='sdpa' has one here",
    "flash_attention": "FlashAttention's own op, which stays; attn_implementation='sdpa' has one here",
}


def _seed(node: fx.Node) -> str | None:
    seen = see(node)
    if seen.op == "sdpa":
        return "scaled_dot_product_attention"
    if seen.op == "softmax" and rank(node) == 4 and _scores(seen.args[0]):
        return "softmax of attention scores, spelled out in another way than transformers' eager attention"
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", node.target))
    return next((what for word, what in _FOREIGN.items() if word in name), None)


def _scores(node: Any) -> bool:
    """Whether a value is a product, scaled, capped, masked, shifted, or standing first in a ``cat`` with sinks."""
    while True:
        node = through(node, "noop", "cast", "add", "mul", "div", "sub", "index", "tanh")
        seen = see(node)
        if isinstance(node, fx.Node) and str(getattr(node.target, "__name__", node.target)) == "masked_fill":
            node = node.args[0]
            continue
        if seen.op != "cat" or not isinstance(seen.args[0], (tuple, list)):
            return seen.op == "matmul" or _product(node) is not None
        node = seen.args[0][0]


TABLE = Table(
    "attention",
    (
        row(op("sdpa", Var("q"), Var("k"), Var("v")), _sdpa),  # softmax(mask(scale · q kᵀ)) v
        row(Flex(), _flex),  # softmax(mask_mod(score_mod(scale · q kᵀ))) v
        row(Varlen(), _varlen),  # the same of documents in a row, between cu_seqlens
        row(Written(), _written),  # the same, written out (gpt-oss, Gemma 2 with its cap)
    ),
    _seed,
)
