"""Steps 3 and 4: try every table of rules on a graph, make the rewrites, check each, and say what was left.

A rewrite is made only when it is safe to make: every consumed value that somebody else uses is free to compute, no
in-place op stands between what is read and where it is read, no gradient is cut in the middle (``no_grad``), and the
op's result (run on fake tensors) has the shape, dtype and device of what it replaces.

A rule that raises costs the site at which it did, a rewrite that raises is taken back: the others are made.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from fastft import _torch_compat as compat
from fastft.autotune import variants
from fastft.costs import Memo, work_of
from fastft.costs import added as added_work
from fastft.fallback import Attempt, said
from fastft.kernels._op import OPS, Op, Reason, Recompute
from fastft.kernels._triton import HAS_TRITON
from fastft.options import Options
from fastft.patterns import _see, flex, loss, tables
from fastft.patterns._match import Match, Rewrite, Rule, Table
from fastft.reporting import MISSED, REPLACED, SKIPPED, Site

#: Recomputing or keeping these costs nothing worth a refusal.
_FREE = _see.VIEWS | {"cast", "contiguous", "size", "input"}


@dataclass
class Rewritten:
    """What the rewriting of one graph did: the sites, the graph outputs that are to be lazy (node → operands of
    ``lazy_logits``), and what failed.

    ``ops``: each op that is in the graph, with its site's index and its record. ``into``: modules that a site outside
    of them took something from, and which.
    """

    sites: list[Site] = field(default_factory=list)
    lazy: dict[fx.Node, dict[str, Any]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    ops: dict[fx.Node, tuple[int, Op | None]] = field(default_factory=dict)
    into: dict[str, str] = field(default_factory=dict)


class Fuel:
    """Consulted before each rewrite, burnt by each that was made: only the first ``limit`` are."""

    def __init__(self, limit: int | None) -> None:
        self.left = limit

    @property
    def out(self) -> bool:
        return self.left == 0

    def burn(self) -> None:
        if self.left is not None:
            self.left -= 1


def rewrite(
    gm: fx.GraphModule, options: Options, fake_mode: Any, bridged: Mapping[fx.Node, Site] | None = None
) -> Rewritten:
    """Replace every site that a rule recognises, in place. ``bridged``: ops of ours that the graph came with."""
    done = Rewritten()
    for node, site in (bridged or {}).items():
        done.ops[node] = len(done.sites), OPS["linear_log_prob"]
        done.sites.append(site)
    fuel = Fuel(options.fuel)
    for table in tables():
        if table.planned and options.memory is None:
            continue
        with Attempt(f"table {table.name}", "the rest of its sites stay as they were", done.errors, options.strict):
            _apply(gm, table, options, fuel, fake_mode, done)
        if table is loss.LOSS and options.lazy_logits and table.name not in options.disable:
            with Attempt("finding returned logits", "they are computed", done.errors, options.strict):
                _leave_out(gm, fuel, done)
    with Attempt("taking out blocks that nobody reads", "they are computed", done.errors, options.strict):
        flex.forget_blocks(gm.graph)
    with Attempt("adding up work", "the report has no costs", done.errors, options.strict):
        _add_work(done)
    gm.graph.lint()
    gm.recompile()
    return done


def _leave_out(gm: fx.GraphModule, fuel: Fuel, done: Rewritten) -> None:
    """Make logits lazy of which no loss is in the graph."""
    memory = Memory(gm.graph)
    for node, operands in loss.returned_logits(gm.graph).items():
        reads = [x for x in operands.values() if isinstance(x, fx.Node)]
        if node in done.lazy or any(memory.writes_to(x) is not None for x in reads):
            continue
        site = Site(loss.RETURNED, module_path(node), REPLACED, rule="loss.py", node=node.name)
        if fuel.out:
            done.sites.append(_but(site, SKIPPED, "out of fuel"))
            continue
        fuel.burn()
        done.lazy[node] = operands
        done.sites.append(_but(site, REPLACED, "", "computed when read"))


def _add_work(done: Rewritten) -> None:
    """Say at each site what the op in its place computes. What a later rewrite took up is no longer among the ops."""
    memo = Memo()
    for node, (index, kernel) in done.ops.items():
        if node._erased:
            done.sites[index] = replace(done.sites[index], into="nothing: its result is no longer used")
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), _see.value)
        values = _see.value(node)
        results = values if isinstance(values, (tuple, list)) else (values,)
        trained = any(isinstance(t, torch.Tensor) and t.requires_grad for t in results)
        work = work_of(kernel, node.target, args, kwargs, trained, memo)
        if (before := done.sites[index].work) is not None:  # of the op that the site calls first
            work = added_work(f"{before.op} + {work.op}", (before, work))
        done.sites[index] = replace(done.sites[index], work=work)


def _apply(gm: fx.GraphModule, table: Table, options: Options, fuel: Fuel, fake_mode: Any, done: Rewritten) -> None:
    """One table over the whole graph, last node first, so that the largest pattern that ends at a value is seen
    before its parts.
    """
    refused: dict[fx.Node, Site] = {}
    parts: set[fx.Node] = set()  # of refused sites: a smaller site among them may be made, but is no other miss
    consumed: set[fx.Node] = set()
    memory = Memory(gm.graph)
    by_op: dict[str, list[Rule]] = {}
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    for node in reversed(list(gm.graph.nodes)):
        if node._erased or node in consumed or node.op in ("output", "placeholder"):
            continue
        name = _see.see(node).op
        rules = by_op.get(name)
        if rules is None:
            rules = by_op[name] = table.rules_for(name)
        recognised: set[fx.Node] = set()
        for rule, match, answer in _answers(rules, node, done.errors, options.strict):
            site = Site(table.name, module_path(node), MISSED, rule=rule.where, node=node.name)
            if isinstance(answer, Rewrite):
                answer.outputs = answer.outputs or (match.anchor,)
                answer.inside = answer.inside or match.inside
                other: Reason | None = None
                with _trying(rule, "its variant", errors=done.errors, strict=options.strict) as attempt:
                    other = _take_variant(answer, options, fake_mode)
                if attempt.failed is not None:
                    other = _failed(attempt.failed)
                if table.name in options.disable:
                    refused[node] = _but(site, SKIPPED, "switched off by options={'disable': ...}")
                    consumed |= answer.inside
                    break
                made: Reason | dict[fx.Node, fx.Node] | None = None
                with _trying(rule, "making its rewrite", done.errors, options.strict) as attempt:
                    made = other or _unsafe(answer, order, memory)
                    if made is None and not fuel.out:
                        made = _replace(gm, answer, fake_mode, order, memory)
                if attempt.failed is not None:
                    made = _failed(attempt.failed)
                if made is None:
                    refused[node] = _but(site, SKIPPED, "out of fuel")
                    consumed |= answer.inside
                    break
                if not isinstance(made, Reason):
                    for old in made:
                        sweep(gm.graph, old)
                    fuel.burn()
                    notes = "" if answer.lazy and not options.lazy_logits else answer.notes
                    _note(done, _but(site, REPLACED, "", notes), answer, made)
                    done.lazy = {made.get(n, n): _moved(ops, made) for n, ops in {**done.lazy, **answer.lazy}.items()}
                    consumed |= set(answer.outputs)
                    refused.pop(node, None)
                    break
                answer = made
            if node not in parts:
                refused.setdefault(node, _but(site, MISSED, f"{answer.code}: {answer.text}"))
            parts |= match.inside - {node}
            if answer.code not in ("escapes", "failed"):
                recognised |= match.inside - {node}
        else:
            consumed |= recognised  # the parts of a site that stays as it was are no sites of their own
    for node in gm.graph.nodes:
        if node in refused or node in consumed or node in parts:
            continue
        what = None
        if node.op in ("call_function", "call_method"):
            with Attempt(f"seed of table {table.name}", "sites may be unreported", done.errors, options.strict):
                what = table.seed(node)
        if what is not None:
            status = SKIPPED if table.name in options.disable else MISSED
            refused[node] = Site(table.name, module_path(node), status, f"no rule fits: {what}", node=node.name)
    done.sites += [site for node, site in refused.items() if not node._erased]


def _note(done: Rewritten, site: Site, answer: Rewrite, made: dict[fx.Node, fx.Node]) -> None:
    """Enter a rewrite that was made: its site, its op, and what it took up."""
    name = f"{site.pattern} at {site.module}" if site.module else site.pattern
    for node in answer.inside:
        if (path := module_path(node)) != site.module:
            done.into[path] = name
        if node._erased and node in done.ops:
            index, _ = done.ops.pop(node)
            done.sites[index] = replace(done.sites[index], into=name)
    new: Any = made[answer.outputs[0]]
    while new.target is not answer.target:  # an item of its results, or a copy
        new = new.args[0]
    if answer.first is not None:
        done.ops[new.args[0]] = len(done.sites), answer.first.kernel
    done.ops[new] = len(done.sites), answer.kernel
    done.sites.append(site)


def _answers(
    rules: Sequence[Rule], node: fx.Node, errors: list[str], strict: bool
) -> Iterator[tuple[Rule, Match, Rewrite | Reason]]:
    for rule in rules:
        matches = rule.tries(node)
        while True:
            match: Match | None = None
            with _trying(rule, "matching", errors, strict):
                match = next(matches, None)
            if match is None:
                break
            answer: Rewrite | Reason | None = None
            with _trying(rule, "its answer to a match", errors, strict) as attempt:
                answer = rule.build(match)
            if attempt.failed is not None:
                answer = _failed(attempt.failed)
            if answer is not None:
                yield rule, match, answer


def _take_variant(answer: Rewrite, options: Options, fake_mode: Any) -> Reason | None:
    """Let ``answer`` call the variant of its op that is chosen for it; why it cannot, if so."""
    if answer.draws and (not options.attention_dropout or options.verify != "never"):
        return Reason("dropout", f"the op draws {answer.draws} itself, and eager's is wanted")
    op = answer.kernel
    if op is None:
        return None
    if answer.first is not None:
        if (reason := _take_variant(answer.first, options, fake_mode)) is not None:
            return reason
        answer.notes = "; ".join(filter(None, (answer.notes, answer.first.notes)))
    operands = _operands(answer, fake_mode)
    if isinstance(operands, Reason):
        return operands
    args, kwargs = operands
    if answer.prepare is not None:
        found = _on_fakes(answer.prepare, answer, fake_mode)
        if isinstance(found, Reason):
            return found
        args, kwargs = found
    chosen = variants.choose(op, options.variants.get(op.name), args, kwargs)
    if isinstance(chosen, Reason):
        return chosen
    if answer.prepare is None:
        answer.target = chosen.call
    if chosen.name != op.default:
        if answer.prepare is not None:
            answer.kwargs = {**answer.kwargs, "variant": chosen.name}
        answer.notes = "; ".join(filter(None, (answer.notes, f"variant {chosen.name}")))
    return None


def _trying(rule: Rule, what: str, errors: list[str], strict: bool) -> Attempt:
    return Attempt(f"rule {rule.where}: {what}", "the site stays as it was", errors, strict)


def _failed(error: Exception) -> Reason:
    return Reason("failed", said(error))


def _but(site: Site, status: str, reason: str, notes: str = "") -> Site:
    return Site(site.pattern, site.module, status, reason, site.rule, site.node, notes)


def _device_problem(tensor: Any) -> Reason | None:
    """Why no op of ours runs where this operand is, if so."""
    if not isinstance(tensor, torch.Tensor) or tensor.device.type == "cpu":
        return None
    if tensor.device.type != "cuda":
        return Reason("device", f"ops run on CUDA and CPU tensors, this one is on {tensor.device.type}")
    if not HAS_TRITON:
        return Reason("triton", "Triton is not installed, and kernels on CUDA need it: pip install triton")
    return None


def _moved(operands: dict[str, Any], moved: dict[fx.Node, fx.Node]) -> dict[str, Any]:
    """Operands of a lazy output, where some of them were replaced."""
    return {name: moved.get(what, what) if isinstance(what, fx.Node) else what for name, what in operands.items()}


def _unsafe(answer: Rewrite, order: dict[fx.Node, int], memory: Memory) -> Reason | None:
    """Why this rewrite must not be made, if so."""
    for read in _reads(answer):
        if (problem := _device_problem(_see.value(read))) is not None:
            return problem
    inside = answer.inside | set(answer.outputs)
    for node in inside:
        seen = _see.see(node)
        if node in answer.outputs or node in answer.may_escape or seen.op in _FREE or _see.is_noop(seen):
            continue
        for user in node.users:
            if user not in inside:
                return Reason("escapes", f"the intermediate {node.name} is also used by {user.name}")
    last, place = max(answer.outputs, key=lambda n: order[n]), _place(answer, order)
    for output in answer.outputs:
        for user in output.users:
            if user not in inside and order.get(user, len(order)) < order[place]:
                return Reason("order", f"{output.name} is used before {place.name} is computed")
    reads = _reads(answer)
    for read in reads:
        if order.get(read, 0) > order[place]:
            return Reason("order", f"{read.name} is computed after {place.name}")
    skipped = _between(answer.outputs, reads | answer.known)
    # Where no gradients are recorded, the op records none either.
    if any(_see.requires_grad(output) for output in answer.outputs) or compat.grad_mode_at(place):
        for node in skipped:
            if _cuts_gradient(node):
                return Reason("no_grad", f"no gradient flows through {node.name}, and one would through the op")
    # A value that the op reads may be written to until somebody here reads it; one that the op never sees, not at all.
    since = {node: order.get(node, 0) for node in skipped}
    for read in reads:
        since[read] = min([order.get(u, 0) for u in read.users if u in skipped] + [order[place]])
    barrier = memory.written(since, order[last], order)
    if barrier is not None:
        return Reason("in_place", f"{barrier.name} writes to one of its values in between")
    return None


def _place(answer: Rewrite, order: dict[fx.Node, int]) -> fx.Node:
    """The replaced value behind which the op is inserted."""
    return (min if answer.early else max)(answer.outputs, key=lambda n: order[n])


def _reads(answer: Rewrite) -> set[fx.Node]:
    found: set[fx.Node] = set() if answer.first is None else _reads(answer.first)
    fx.map_arg((answer.args, answer.kwargs), lambda n: found.add(n))
    return found


def _between(outputs: Sequence[fx.Node], reads: set[fx.Node]) -> set[fx.Node]:
    """Everything from the outputs up to what the op reads: what it stands for, and what a rule looked through."""
    found: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in found or node in reads or node.op == "placeholder":
            continue
        found.add(node)
        seen = _see.see(node)
        # Of what type_as is given besides, it reads the dtype.
        stack += seen.args[:1] if seen.op == "cast" else node.all_input_nodes
    return found


def _cuts_gradient(node: fx.Node) -> bool:
    """Whether ``node`` is a number that a gradient could flow through and does not: it was computed under
    ``no_grad``.
    """
    kind = _see.dtype(node)
    if kind is None or not kind.is_floating_point or _see.requires_grad(node):
        return False
    return any(_see.requires_grad(n) for n in node.all_input_nodes)


class Memory:
    """The in-place ops of a graph, and which nodes share memory."""

    def __init__(self, graph: fx.Graph) -> None:
        self.writes = [(n, {_base(w) for w in _see.written(n)}) for n in graph.nodes if _see.in_place(n)]

    def written(self, since: dict[fx.Node, int], until: int, order: dict[fx.Node, int]) -> fx.Node | None:
        """An in-place op before position ``until`` that writes to the memory of a node of ``since`` from its position
        on.
        """
        for write, bases in self.writes:
            if write._erased or not order[write] < until:
                continue
            storages = {_storage(w) for w in _see.written(write)} - {None}
            for node, start in since.items():
                if start <= order[write] and (_base(node) in bases or _storage(node) in storages):
                    return write
        return None

    def writes_to(self, node: fx.Node) -> fx.Node | None:
        """An in-place op that writes to the memory of ``node``, through whatever view."""
        storage = _storage(node)
        for write, _ in self.writes:
            if storage is not None and not write._erased and storage in map(_storage, _see.written(write)):
                return write
        return None


def _base(node: Any) -> Any:
    """The node whose memory ``node`` may be a view of, as far as the graph says it."""
    return _see.through(node, *_see.VIEWS, "noop")


def _storage(node: Any) -> int | None:
    """The memory that a node's fake tensor has: views share it, whatever op made them."""
    v = _see.value(node)
    return compat.storage_of(v) if isinstance(v, torch.Tensor) else None


def _replace(
    gm: fx.GraphModule, answer: Rewrite, fake_mode: Any, order: dict[fx.Node, int], memory: Memory
) -> Reason | dict[fx.Node, fx.Node]:
    """Insert the op in its place, check it, and move the users over; what raises on the way leaves the graph as it was.

    Returns what each output was replaced by, or the reason that nothing was done. Sweeping is left to the caller.

    A result that is written to later is copied first: an op may have kept it for its backward, and may return a view.
    """
    place = _place(answer, order)
    values = _on_fakes(answer.target, answer, fake_mode)
    if isinstance(values, Reason):
        return values
    olds = answer.outputs if answer.passes is None else (*answer.outputs, answer.passes)
    results = [values]
    if len(olds) > 1:
        if not isinstance(values, (tuple, list)) or len(values) < len(olds):
            return Reason("outputs", f"the op does not give {len(olds)} results")
        results = list(values[: len(olds)])
    for old, got in zip(olds, results, strict=True):
        problem = _differs(old, got)
        if problem is not None:
            return problem
    if answer.passes is not None and (write := memory.writes_to(answer.passes)) is not None:
        return Reason("in_place", f"{write.name} writes to {answer.passes.name}, which the op would hand on")
    writes = {old: memory.writes_to(old) for old in answer.outputs}
    for (old, write), got in zip(writes.items(), results, strict=False):
        if write is not None and _see.value(old).stride() != got.stride():
            return Reason("in_place", f"{write.name} writes to {old.name}, and the op's result has other strides")
    added: list[fx.Node] = []
    moved: dict[fx.Node, fx.Node] = {}
    undo: dict[fx.Node, fx.Node] = {}
    try:
        before, args = place, answer.args
        if (first := answer.first) is not None:
            with gm.graph.inserting_after(place):
                before = gm.graph.call_function(first.target, first.args, first.kwargs)
            added.append(before)
            _tag(before, first.outputs[0], _on_fakes(first.target, first, fake_mode), first)
            args = (before, *args)
        with gm.graph.inserting_after(before):
            new = gm.graph.call_function(answer.target, args, answer.kwargs)
        added.append(new)
        _tag(new, place, values, answer)
        replacements = [new]
        if len(olds) > 1:
            replacements = []
            for index, got in reversed(list(enumerate(results))):
                with gm.graph.inserting_after(new):
                    item = gm.graph.call_function(operator.getitem, (new, index))
                added.append(item)
                _tag(item, place, got, answer)
                replacements.insert(0, item)
        for old, item in zip(answer.outputs, replacements, strict=False):
            if writes[old] is not None:
                got = _see.value(item)
                with gm.graph.inserting_after(item):
                    item = gm.graph.call_function(torch.clone, (item,))
                added.append(item)
                with fake_mode if fake_mode is not None else contextlib.nullcontext():
                    _tag(item, place, got.clone(), answer)
            moved[old] = undo[old] = item
            old.replace_all_uses_with(item, delete_user_cb=lambda user: user is not new)
            item.meta.setdefault("nn_module_stack", old.meta.get("nn_module_stack"))
            _relax_views(old, item)
        if (passed := answer.passes) is not None:
            undo[passed] = replacements[-1]
            passed.replace_all_uses_with(
                replacements[-1], delete_user_cb=lambda u: u.op != "output" and order.get(u, -1) > order[place]
            )
    except Exception:
        for old, item in undo.items():
            item.replace_all_uses_with(old)
        for node in reversed(added):
            gm.graph.erase_node(node)
        raise
    order.update(dict.fromkeys(added, order[place]))
    return moved


def _relax_views(old: fx.Node, new: fx.Node) -> None:
    """Let ``view`` below ``new`` be ``reshape`` where strides are no longer what they were (a view is still one if it
    can be).
    """
    was, got = _see.value(old), _see.value(new)
    if not isinstance(was, torch.Tensor) or was.stride() == got.stride():
        return
    stack = list(new.users)
    while stack:
        user = stack.pop()
        if user.op == "call_method" and user.target == "view" and _see.see(user).op == "view":
            user.target = "reshape"
        if _see.see(user).op in _see.VIEWS:
            stack += user.users


def _operands(answer: Rewrite, fake_mode: Any) -> tuple[Sequence[Any], dict[str, Any]] | Reason:
    """The fake tensors and numbers that the op is called with; the reason that what comes first could not run."""
    args, kwargs = fx.map_arg((answer.args, answer.kwargs), _see.value)
    if answer.first is None:
        return args, kwargs
    made = _on_fakes(answer.first.target, answer.first, fake_mode)
    return made if isinstance(made, Reason) else ((made, *args), kwargs)


def _on_fakes(function: Any, answer: Rewrite, fake_mode: Any) -> Any:
    """The result of the op (or of what prepares its operands) on the fake tensors of the trace, or the reason it could
    not run.
    """
    operands = _operands(answer, fake_mode)
    if isinstance(operands, Reason):
        return operands
    args, kwargs = operands
    guard = fake_mode if fake_mode is not None else contextlib.nullcontext()
    grad = any(_see.requires_grad(output) for output in answer.outputs)
    try:
        with guard, torch.set_grad_enabled(grad):
            return function(*args, **kwargs)
    except variants.NotSupported as error:
        return Reason("variant", str(error))
    except Exception as error:  # any failure on fake tensors would be one at run time: the site stays as it was
        return Reason(
            "op_failed",
            f"{getattr(function, '__name__', function)} on fake tensors: {type(error).__name__}: {error}",
        )


def _differs(old: fx.Node, got: Any) -> Reason | None:
    """Why ``got`` cannot stand for ``old``, if so: shape, dtype and device must be the same."""
    was = _see.value(old)
    if not isinstance(was, torch.Tensor) or not isinstance(got, torch.Tensor):
        return (
            None
            if type(was) is type(got)
            else Reason("kind", f"{old.name} is {type(was).__name__}, the op gives {type(got).__name__}")
        )
    if len(was.shape) != len(got.shape) or not all(
        _see.same_size(a, b) for a, b in zip(was.shape, got.shape, strict=True)
    ):
        return Reason("shape", f"{old.name} has shape {tuple(was.shape)}, the op gives {tuple(got.shape)}")
    if was.dtype != got.dtype:
        return Reason("dtype", f"{old.name} is {was.dtype}, the op gives {got.dtype}")
    if was.device != got.device:
        return Reason("device", f"{old.name} is on {was.device}, the op gives {got.device}")
    return None


def _tag(new: fx.Node, old: fx.Node, got: Any, answer: Rewrite) -> None:
    """Where the new node comes from, what it gives, and whether its result is cheap enough to be computed twice."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "recompute", "ac_graph_id"):
        if key in old.meta:
            new.meta[key] = old.meta[key]
    new.meta["example_value"] = got
    if answer.kernel is not None and answer.kernel.recompute is Recompute.CHEAP and "recompute" not in new.meta:
        new.meta["recompute"] = compat.PREFER_RECOMPUTE
        new.meta.setdefault("ac_graph_id", 0)


def sweep(graph: fx.Graph, node: fx.Node) -> None:
    """Erase ``node`` if nobody uses it, then its operands, and so on. Ops with an effect stay."""
    stack = [node]
    while stack:
        n = stack.pop()
        if n._erased or n.users or n.op in ("placeholder", "output") or _has_effect(n):
            continue
        operands = list(n.all_input_nodes)
        graph.erase_node(n)
        stack += operands


def _has_effect(node: fx.Node) -> bool:
    if _see.in_place(node) or (node.op == "call_function" and node.target in compat.autocast_nodes()):
        return True
    return bool(node.is_impure()) and _see.see(node) is _see.UNKNOWN


#: Words in Dynamo's paths that name no module of the user's (TRL replaces ``forward`` by a bound method).
_NO_MODULE = {"L", "G", "self", "__self__", "__dict__", "_modules", "_orig_mod", "forward"}


def module_path(node: fx.Node) -> str:
    """Path of the module that a node belongs to (``model.layers.0.mlp``), from Dynamo's module stack; empty when it
    has none.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    return _readable(str(list(stack.values())[-1][0]))


@functools.lru_cache(maxsize=4096)
def _readable(path: str) -> str:
    words = [quoted or name for quoted, name in re.findall(r"(\w+)'\]|(\w+)", path)]
    return ".".join(w for w in words if w not in _NO_MODULE)
