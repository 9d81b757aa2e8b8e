"""Cuts AOTAutograd's joint graph into forward and backward by a memory budget (:mod:`fastft.planner` chooses).

A region's nodes have its number in their metadata (:func:`fastft.normalise.normalise`). Its level becomes the tags that
torch's own minimum cut reads. What a level costs is measured, not estimated: the graph is cut with all regions at that
level, and both halves are walked as they will run, with what lives at each node. Sizes stay symbols there, so that the
same walk gives the bytes for a batch of another size.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import sympy
import torch
from torch import fx

from fastft import _torch_compat as compat
from fastft.costs import Memo, Rates, Size, in_one_piece, lasting, nothing, raw_work, rounded, scratch
from fastft.kernels._op import OPS, Recompute
from fastft.offload import OFFLOAD, OFFLOAD_WAIT, RELOAD, RELOAD_WAIT, can_move
from fastft.planner import ALL, ATTENTION, CHEAP, MLP

#: Where a node's region stands in its metadata. AOTAutograd copies it to what it traces the node to.
REGION = "ac_graph_id"
#: Numbers for symbols in a graph's sizes.
Sizes = Mapping[sympy.Symbol, int]
#: Forward node → its region, counted from 0 in the order of the forward.
Regions = Mapping[str, int]
#: A saved tensor is not offloaded if the largest of its region has more than ``SMALL`` times its bytes, and it has
#: fewer than ``LITTLE``.
SMALL, LITTLE = 16, 4 * 2**20


# -------------------------------------------------------------------------------------------------------------- regions


def forward_of(joint: fx.GraphModule, outputs: int) -> set[fx.Node]:
    """The nodes that the first ``outputs`` results of a joint graph are computed from, and what else their calls
    return.
    """
    waiting = [n for n in results_of(joint)[:outputs] if isinstance(n, fx.Node)]
    found: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found | {u for n in found for u in n.users if u.target is operator.getitem}


def drop_views(joint: fx.GraphModule) -> None:
    """Let what is read of a view that shows its operand as it is be read of the operand: that can be offloaded. What
    the graph returns stays a view.
    """
    for node in list(joint.graph.nodes):
        if node.op == "call_function" and node.target is torch.ops.aten.view.default:
            shown, of = (tuple(map(compat.size_expression, n.meta["val"].shape)) for n in (node, node.args[0]))
            if shown == of:
                node.replace_all_uses_with(node.args[0], lambda user: user.op != "output")


def regions_of(joint: fx.GraphModule, outputs: int) -> Regions:
    """The regions of a joint graph, the first ``outputs`` of whose results are the forward's."""
    forward, number = forward_of(joint, outputs), dict[int, int]()
    return {
        node.name: number.setdefault(mark, len(number))
        for node in joint.graph.nodes
        if node.op == "call_function" and node in forward and (mark := node.meta.get(REGION))
    }


def kinds_of(joint: fx.GraphModule, outputs: int, regions: Regions) -> list[int]:
    """A number for each region, the same for those that are alike: they compute the same of tensors of the same sizes,
    and the backward reads the same of it. What it reads may be another thing in the first and in the last: that it need
    not know the gradient of the first one's input makes no kind.
    """
    forward = forward_of(joint, outputs)
    computed: list[list[Any]] = [[] for _ in range(max(regions.values(), default=-1) + 1)]
    read: list[list[int]] = [[] for _ in computed]
    for node in joint.graph.nodes:
        region = regions.get(node.name)
        if region is None:
            continue
        read[region].append(sum(u not in forward for u in node.users))
        if node.target is not operator.getitem:  # the backward may be the only one to read an item
            value, plain = node.meta.get("val"), fx.map_arg((node.args, node.kwargs), lambda n: None)
            made = [(str(t.shape), t.dtype) for t in _tensors(value)]
            computed[region].append((str(node.target), repr(plain), tuple(made)))
    for edge, neighbour in ((0, 1), (-1, -2)):
        if len(computed) > 2 and computed[edge] == computed[neighbour]:
            read[edge] = read[neighbour]
    number: dict[Any, int] = {}
    return [number.setdefault((*a, *b), len(number)) for a, b in zip(computed, read, strict=True)]


def _tensors(value: Any) -> list[torch.Tensor]:
    return [t for t in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(t, torch.Tensor)]


def _raw_names(wanted: Callable[[Any], bool]) -> set[str]:
    return {f"fastft::{raw}" for op in OPS.values() if wanted(op) for raw in op.raw}


def tag(joint: fx.GraphModule, outputs: int, regions: Regions, levels: Sequence[str]) -> None:
    """Tell torch's minimum cut, by tags, what each region recomputes. What leaves a region is never recomputed."""
    cheap = _raw_names(lambda op: op.recompute is Recompute.CHEAP)
    rotary = _raw_names(lambda op: op.name == "rotary")
    attention = _raw_names(lambda op: op.name == "attention")
    norms = _raw_names(lambda op: op.name in ("rms_norm", "layer_norm"))
    attended: set[int] = set()  # regions whose attention has come
    mlps: set[int] = set()  # regions whose norm after it has
    for node in joint.graph.nodes:
        region = regions.get(node.name)
        if region is None:
            if node.meta.get(REGION):
                node.meta.pop("recompute", None)  # the backward's own
            continue
        level, op = levels[region], _schema_name(_source(node))
        if op in attention:
            attended.add(region)
        elif op in norms and region in attended:
            mlps.add(region)
        if op in attention and level == ATTENTION:
            node.meta["recompute"] = compat.MUST_SAVE
        elif (
            level in (ATTENTION, ALL)
            or (level == MLP and (region in mlps or is_alias(node)))  # what a view is of can be offloaded
            or (level in (CHEAP, MLP) and op in cheap and not (op in rotary and _of_kept(_source(node), cheap)))
        ):
            node.meta["recompute"] = compat.PREFER_RECOMPUTE
        else:
            node.meta.pop("recompute", None)
    forward = forward_of(joint, outputs)
    for node in joint.graph.nodes:
        region = regions.get(node.name)
        if region is not None and any(u in forward and regions.get(u.name) != region for u in node.users):
            # A view is recomputed from what it is of, and an item from its tuple.
            for one in _chain(node):
                if regions.get(one.name) == region:
                    one.meta["recompute"] = compat.MUST_SAVE
        elif _schema_name(node) == "fastft::lora_mlp" and not _reads_result(node, forward):
            # An MLP by slices computes again what its backward needs: not all of it for the little that this keeps.
            for one in (node, *node.users):
                one.meta["recompute"] = compat.MUST_SAVE


def _reads_result(mlp: fx.Node, forward: Set[fx.Node]) -> bool:
    """Whether the backward reads what an MLP by slices gives (the norm behind it does, in Gemma 2)."""
    waiting = [item for item in mlp.users if item.args[1] == 0]
    while waiting:
        node = waiting.pop()
        if any(user not in forward for user in node.users):
            return True
        waiting += [user for user in node.users if is_alias(user)]
    return False


def _of_kept(call: fx.Node, cheap: Set[str]) -> bool:
    """Whether what a rotary embedding turns is kept, or it is. Its backward reads neither, so the result, of the same
    size, is kept in that place. What a norm before it makes is computed again, and so is it then.
    """
    return not any(_schema_name(made) in cheap for n in call.all_input_nodes for made in map(_source, _chain(n)))


def save_what_leaves(graph: fx.Graph) -> None:
    """The same in a graph as Dynamo made it, for the regions that the user checkpoints: torch tags an item that another
    region reads, and recomputes it nevertheless, with all that comes before, if the call that it is of may be.
    """
    for node in graph.nodes:
        region = node.meta.get(REGION)
        if node.meta.get("recompute") == compat.PREFER_RECOMPUTE and any(
            u.op != "output" and u.meta.get(REGION) != region for u in node.users
        ):
            for one in _shown(node):
                if one.meta.get(REGION) == region:
                    one.meta["recompute"] = compat.MUST_SAVE


def _shown(node: fx.Node) -> Iterator[fx.Node]:
    """As :func:`_chain`, before AOTAutograd: an item or a view is what has the memory of an operand."""
    while True:
        yield node
        below = [n for n in node.all_input_nodes if _memory(n) & _memory(node)]
        if not below:
            return
        node = below[0]


def _memory(node: fx.Node) -> set[int | None]:
    return {compat.storage_of(t) for t in _tensors(node.meta.get("example_value"))} - {None}


def _chain(node: fx.Node) -> Iterable[fx.Node]:
    """``node``, and what it is a view or an item of, to the call that made it."""
    yield node
    while is_alias(node) or node.target is operator.getitem:
        node = node.all_input_nodes[0]
        yield node


def _source(node: fx.Node) -> fx.Node:
    """The call that a node is an item of, or the node."""
    return node.args[0] if node.target is operator.getitem else node  # type: ignore[return-value]


def _schema_name(node: fx.Node) -> str:
    return getattr(getattr(node.target, "_schema", None), "name", "")


# ----------------------------------------------------------------------------------------------------------------- walk


def number_at(size: Any, sizes: Sizes) -> int:
    """A size as a number. Symbols that ``sizes`` does not have count as what they were when the graph was traced."""
    if isinstance(size, int):
        return size
    e = compat.size_expression(size).subs(dict(sizes))
    return (compat.size_hint(size) or 0) if e.free_symbols else int(e)


def is_alias(node: fx.Node) -> bool:
    """Whether a node is other eyes on the memory of its first operand."""
    view = getattr(node.target, "is_view", False) or node.target is torch.ops.aten._unsafe_view.default
    return node.op == "call_function" and bool(view)


def _root(node: fx.Node) -> fx.Node:
    """The node whose memory this one shows: itself, an item of a call's results, or an input."""
    while is_alias(node) or node.target is RELOAD_WAIT:
        node = node.all_input_nodes[0]
    return node


def _tensor(node: Any) -> torch.Tensor | None:
    """What a node makes on the device: a copy that comes back takes its place from when it starts."""
    if not isinstance(node, fx.Node) or node.target in (OFFLOAD, OFFLOAD_WAIT):
        return None
    value = (next(iter(node.users)) if node.target is RELOAD else node).meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def results_of(gm: fx.GraphModule) -> list[Any]:
    """What a graph returns, flat."""
    return list(next(n for n in reversed(gm.graph.nodes) if n.op == "output").args[0])


def _numel(t: torch.Tensor, sizes: Sizes) -> int:
    return math.prod(number_at(n, sizes) for n in t.shape)


def _measures(t: torch.Tensor) -> tuple[Any, ...]:
    """What a tensor's bytes are computed of."""
    return *(n if isinstance(n, int) else compat.size_expression(n) for n in t.shape), t.element_size()


def bytes_made(node: fx.Node, sizes: Sizes) -> int:
    """Bytes of what a call makes, and does not show of an operand."""
    if is_alias(node) or node.target is operator.getitem:
        return 0
    return sum(_numel(t, sizes) * t.element_size() for t in _tensors(node.meta.get("val")))


def _worth_moving(movable: Mapping[fx.Node, int]) -> dict[str, int]:
    """By name, without those that are little, and small beside the largest of their region (adapters' h, attention's
    logsumexp): a copy takes the host as long to start, whatever its size.
    """
    size = {root: _numel(t := root.meta["val"], {}) * t.element_size() for root in movable}
    largest: dict[int, int] = {}
    for root, region in movable.items():
        largest[region] = max(largest.get(region, 0), size[root])
    return {
        root.name: region
        for root, region in movable.items()
        if size[root] >= LITTLE or SMALL * size[root] >= largest[region]
    }


@dataclass
class _Step:
    """One node as it runs: the tensors it makes, those that nobody reads after it, bytes that its op takes for itself,
    those of them that stay, those of an MLP by slices if it were in one piece, and the region whose turn it is."""

    makes: list[str]
    frees: list[str]
    scratch: Callable[[Size], int]
    lasting: Callable[[Size], int] | None
    in_one_piece: Callable[[Size], int] | None
    region: int = 0


class Walk:
    """Both halves of a cut graph as one list of steps: what lives when, for batches of any size.

    ``again``: nodes of the backward that compute something of the forward again by themselves, and for which region.
    ``saved``: tensor → region that keeps it for its backward, None for what belongs to no region. ``recorded``: as CUDA
    graphs, in whose memory what is kept stays in its place until the next step, and to which the gradients that the
    backward begins with are copied.

    Every new batch size asks for the peak, and layers are alike: what does not depend on sizes is worked out once, and
    each expression is evaluated once for given sizes: sympy takes longer for one than the rest of a layer does.
    """

    def __init__(
        self,
        forward: fx.GraphModule,
        backward: fx.GraphModule,
        outputs: int,
        regions: Regions,
        again: Mapping[str, int] | None = None,
        recorded: bool = False,
    ) -> None:
        self.count, self.regions, self.recorded = max(regions.values(), default=-1) + 1, regions, recorded
        #: Bytes of adapters in half precision, as long as either half runs.
        self.rounded = max(rounded(half.graph) for half in (forward, backward))
        self.tensors: dict[str, torch.Tensor] = {}
        #: The sizes that were asked for last, and the numbers that expressions are for them.
        self._known: tuple[Sizes, dict[sympy.Expr, int]] = {}, {}
        #: What :meth:`_order` found.
        self._orders: dict[frozenset[str], tuple[list[int], list[int]]] = {}
        results = results_of(forward)
        saved = {n.name: _root(n) for n in results[outputs:] if _tensor(n) is not None}
        self.host = [n.meta["val"] for n in results[outputs:] if isinstance(n, fx.Node) and n.target is OFFLOAD_WAIT]
        self.saved = {root.name: self._owner(root) for root in saved.values() if root.op != "placeholder"}
        names = {n: n.name for n in forward.graph.nodes if n.op != "placeholder"}
        steps = self._half(forward.graph, names, results)
        turn, last = 0, max((i for i, (n, _) in enumerate(steps) if n.name in regions), default=-1)
        for i, (node, step) in enumerate(steps):
            turn = self.count if i > last else regions.get(node.name, turn)
            step.region = turn
        names = {n: f"{n.name} of the backward" for n in backward.graph.nodes if not n.name.startswith("primals")}
        for node in backward.graph.nodes:
            if node.op == "placeholder" and (node.name in saved or any(u.target is RELOAD for u in node.users)):
                names.pop(node, None)
                if node.name in saved and saved[node.name].name in self.saved:
                    names[node] = saved[node.name].name
        #: The gradients that the backward begins with.
        given = [names[n] for n in backward.graph.nodes if n.op == "placeholder" and n in names]
        self.incoming = [name for name in given if name not in self.saved]
        gradients = results_of(backward)
        half = self._half(backward.graph, names, gradients)
        self._turns(half)
        #: Backward node → region whose turn it is.
        self.turns = {node.name: step.region for node, step in half}
        self.made = [(n, regions[n.name]) for n in forward.graph.nodes if n.name in regions]
        #: What the forward computes after all regions.
        self.loss = [n for n, step in steps if step.region == self.count and n.op == "call_function"]
        #: Saved tensors that can be offloaded, with the regions that read them.
        self.movable = _worth_moving(
            {
                root: region
                for name, root in saved.items()
                if root.name == name and can_move(root) and (region := self.saved.get(name)) is not None
            }
        )
        self.steps = [step for _, step in [*steps, *half]]
        self.halfway = len(steps)
        #: What the backward makes and returns.
        self.returned = {names[root] for n in gradients if isinstance(n, fx.Node) and (root := _root(n)) in names}
        #: What the backward computes again, and for which region.
        computed = {**regions, **(again or {})}
        calls = [n for n in backward.graph.nodes if n.op == "call_function"]
        self.again = [(n, computed[n.name]) for n in calls if n.name in computed]
        self.inputs = [t for n in forward.graph.nodes if n.op == "placeholder" and (t := _tensor(n)) is not None]
        self.gradients = [t for n in gradients if (t := _tensor(n)) is not None]

    def _owner(self, root: fx.Node) -> int | None:
        """A layer's input is that layer's, whoever made it; what several layers read is nobody's."""
        own, waiting, readers = self.regions.get(root.name), [root], set()
        while waiting:
            for user in waiting.pop().users:
                if is_alias(user):
                    waiting.append(user)
                elif user.op != "output":
                    readers.add(self.regions.get(user.name))
        others = readers - {own}
        return own if not others else next(iter(others)) if len(others) == 1 else None

    def _half(
        self, graph: fx.Graph, names: Mapping[fx.Node, str], results: Sequence[Any]
    ) -> list[tuple[fx.Node, _Step]]:
        """The steps of one half. ``names``: its tensors', without those that the caller has anyway."""
        stay = {names[root] for n in results if isinstance(n, fx.Node) and (root := _root(n)) in names}
        steps: dict[fx.Node, _Step] = {}
        last: dict[str, fx.Node] = {}  # by name: several saved views may be of one tensor
        for node in graph.nodes:
            if node.op == "output":
                continue
            made = _tensor(node) if _root(node) is node and node in names else None
            steps[node] = _Step([], [], scratch(node), lasting(node), in_one_piece(node))
            if made is not None:
                steps[_source(node)].makes.append(names[node])  # an item is there when its call ends
                last[names[node]] = node
                self.tensors.setdefault(names[node], made)
            for operand in map(_root, node.all_input_nodes):
                if names.get(operand) in last:
                    last[names[operand]] = node
        for tensor, node in last.items():
            if tensor not in stay:
                steps[node].frees.append(tensor)
        return list(steps.items())

    def _turns(self, steps: list[tuple[fx.Node, _Step]]) -> None:
        """In the backward it is the turn of the last region that still keeps something, once it was begun."""
        live = Counter(region for region in self.saved.values() if region is not None)
        begun = False
        for node, step in steps:
            tensors = [t for n in node.all_input_nodes for t in (n.name, _root(n).name)]
            last = max((r for r, n in live.items() if n), default=0)
            begun = begun or any(self.saved.get(t, self.regions.get(t)) == self.count - 1 for t in tensors)
            step.region = last if begun else self.count
            live.subtract(r for t in step.frees if (r := self.saved.get(t)) is not None)

    # -------------------------------------------------------------------------------------------------- for given sizes

    def _size(self, sizes: Sizes) -> Size:
        """:func:`number_at`, which evaluates each expression once."""
        of, known = self._known
        if of != sizes:
            self._known = of, known = dict(sizes), {}

        def size(n: Any) -> int:
            if isinstance(n, int):
                return n
            e = compat.size_expression(n)
            if e not in known:
                known[e] = number_at(n, sizes)
            return known[e]

        return size

    @cached_property
    def _kinds(self) -> tuple[list[torch.Tensor], dict[str, int]]:
        """Tensors of one kind take the same bytes for any sizes: one of each kind, and every tensor's kind."""
        number: dict[Any, int] = {}
        kind = {name: number.setdefault(_measures(t), len(number)) for name, t in self.tensors.items()}
        one = {k: self.tensors[name] for name, k in kind.items()}
        return [one[k] for k in number.values()], kind

    def _bytes_of_kinds(self, size: Size) -> list[int]:
        return [math.prod(map(size, t.shape)) * t.element_size() for t in self._kinds[0]]

    def bytes_of(self, sizes: Sizes) -> dict[str, int]:
        """Every tensor's bytes."""
        number = self._bytes_of_kinds(self._size(sizes))
        return {name: number[kind] for name, kind in self._kinds[1].items()}

    def given(self, sizes: Sizes) -> int:
        """Bytes of the graph's inputs."""
        return sum(_numel(t, sizes) * t.element_size() for t in self.inputs)

    def trained(self, sizes: Sizes) -> int:
        """Bytes of what has gradients."""
        return sum(_numel(t, sizes) * t.element_size() for t in self.gradients)

    def kept(self, sizes: Sizes) -> list[int]:
        """Bytes that each region keeps for its backward, and, last, those of no region."""
        number, found = self.bytes_of(sizes), [0] * (self.count + 1)
        for tensor, region in self.saved.items():
            found[-1 if region is None else region] += number[tensor]
        return found

    def held(self, sizes: Sizes) -> tuple[list[int], list[int], list[int]]:
        """Most bytes while it is each region's turn, in the forward and in the backward, and, last, while it is none's;
        without what belongs to no region, what earlier regions keep, and the gradients that there are when the turn
        begins, which are the third list.
        """
        number = self.bytes_of(sizes)
        *kept, others = self.kept(sizes)
        earlier = [others, *(others + total for total in accumulate(kept))]
        forward, backward = [0] * (self.count + 1), [0] * (self.count + 1)
        gradients: dict[int, int] = {}
        made = 0
        for i, (step, live) in enumerate(self._lives(sizes)):
            r, half = step.region, forward if i < self.halfway else backward
            if half is backward:
                live -= gradients.setdefault(r, made)
                made += sum(number[t] for t in step.makes if t in self.returned)
            half[r] = max(half[r], live - earlier[r])
        later = 0
        for r in reversed(range(self.count + 1)):  # a region that keeps nothing has no turn
            later = gradients.setdefault(r, later)
        return forward, backward, [gradients[r] for r in range(self.count + 1)]

    def peak(self, sizes: Sizes, sliced: bool = True) -> int:
        """Most bytes that the graph's own tensors take at one time. Without ``sliced``: about those, if MLPs were in
        one piece.
        """
        if not self.recorded:
            return max((live for _, live in self._lives(sizes, sliced)), default=0)
        number, stay = self.bytes_of(sizes), frozenset({*self.saved, *self.incoming})
        copies = sum(number[name] for name in self.incoming if name in number)
        return copies + max((live for _, live in self._lives(sizes, sliced, stay)), default=0)

    def _lives(
        self, sizes: Sizes, sliced: bool = True, stay: frozenset[str] = frozenset()
    ) -> Iterator[tuple[_Step, int]]:
        """Every step, with the bytes that live while it runs. ``stay``: tensors that nobody frees."""

        size, (order, there) = self._size(sizes), self._order(stay)
        number = self._bytes_of_kinds(size)
        number += [-n for n in reversed(number)]  # at ``~kind``: what goes
        live, stays = list(accumulate((number[kind] for kind in order), initial=self.rounded)), 0
        own = [0 if step.lasting in (None, nothing) else step.lasting(size) for step in self.steps]
        for step, lasts in zip(self.steps, own, strict=True):  # as a step leaves it to the next one
            stays = 0 if step.lasting is None else max(stays, lasts)
        for step, lasts, at in zip(self.steps, own, there, strict=True):
            stays = 0 if step.lasting is None else max(stays, lasts)
            scratch = step.scratch if sliced or step.in_one_piece is None else step.in_one_piece
            yield step, live[at] + (0 if scratch is nothing else scratch(size)) - lasts + stays

    def _order(self, stay: frozenset[str]) -> tuple[list[int], list[int]]:
        """The kinds of tensors in the order that these are made, with ``~kind`` where one is freed, and, for each step,
        how many of both have been when it runs. Sizes change nothing of it.
        """
        if stay not in self._orders:
            kind, order, there, live = self._kinds[1], list[int](), list[int](), set[str]()
            for step in self.steps:
                new = [t for t in step.makes if t not in live]
                live.update(new)
                order += [kind[t] for t in new]
                there.append(len(order))
                gone = [t for t in step.frees if t in live and t not in stay]
                live.difference_update(gone)
                order += [~kind[t] for t in gone]
            self._orders[stay] = order, there
        return self._orders[stay]

    def offloaded(self, sizes: Sizes) -> list[int]:
        """Bytes of each tensor that waits on the host."""
        return [_numel(t, sizes) * t.element_size() for t in self.host]

    def movable_bytes(self, sizes: Sizes) -> list[int]:
        """Of what each region keeps, the bytes that can be offloaded."""
        number, found = self.bytes_of(sizes), [0] * self.count
        for tensor, region in self.movable.items():
            found[region] += number[tensor]
        return found

    def pieces(self, sizes: Sizes) -> list[int]:
        """Of what each region keeps, the bytes of the largest tensor that can be offloaded."""
        number, found = self.bytes_of(sizes), [0] * self.count
        for tensor, region in self.movable.items():
            found[region] = max(found[region], number[tensor])
        return found

    def seconds(self, sizes: Sizes, rates: Rates) -> list[float]:
        """What each region computes again in the backward."""
        return self._seconds(self.again, sizes, rates)[:-1]

    def forward_seconds(self, sizes: Sizes, rates: Rates) -> list[float]:
        """What each region computes in the forward."""
        return self._seconds(self.made, sizes, rates)[:-1]

    def loss_seconds(self, sizes: Sizes, rates: Rates) -> float:
        """What the forward computes after all regions."""
        return self._seconds([(n, self.count) for n in self.loss], sizes, rates)[-1]

    def _seconds(self, nodes: Iterable[tuple[fx.Node, int]], sizes: Sizes, rates: Rates) -> list[float]:
        """By region, and, last, of none."""
        found, memo, size = [0.0] * (self.count + 1), Memo(), self._size(sizes)
        for node, region in nodes:
            found[region] += rates.seconds(raw_work(node, size, memo))
        return found
