"""``options={"memory": ...}``: from a budget to compiled graphs that keep it, for every batch.

A graph's plan is made where AOTAutograd cuts it (:meth:`Memory.partition`), for the sizes of the batch at hand. With
symbolic sizes the same graph runs other batches too. :class:`Planned` stands for the compiled graph: it knows what each
of its plans needs for any sizes, takes the fastest that fits, and has the graph compiled once more, leaner, for a batch
that none of them fits; also when the device runs out of memory in a forward.

The peak that is predicted is the sum of

* what is allocated on the device when the graph is compiled: weights, inputs, whatever else there is (on a CPU: the
  graph's inputs);
* the optimizer's state that is still to be made, taken as Adam's: two tensors like each trained one. A graph that is
  compiled again finds it allocated;
* the most bytes of the graph's own tensors that live at one time in its forward and backward, gradients among them, as
  the two halves run node by node (:class:`fastft.partitioner.Walk`);
* the largest buffer that an op of ours makes for itself: the loss's logits of one chunk, one dequantised weight, or
  what an MLP makes of one slice of tokens.

Not in it: the allocator's fragmentation, and that Inductor never makes some tensors that the graph has.
"""

from __future__ import annotations

import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from fastft import _torch_compat as compat
from fastft import costs, cuda_graphs, offload, planner, sums
from fastft.collecting import no_collection
from fastft.costs import Rates
from fastft.fallback import Attempt
from fastft.judging import random_state, set_random_state
from fastft.options import MEMORY, Options, bytes_of
from fastft.partitioner import Sizes, Walk, bytes_made, drop_views, forward_of, kinds_of, number_at, regions_of, tag
from fastft.planner import ALL, ATTENTION, CHEAP, GIB, KEEP, MLP, OFFLOADED, Choice, Problem
from fastft.reporting import Report
from fastft.slicing import Slices, slice_mlps

log = logging.getLogger("fastft")

#: Compiled plans of one graph, at most: each takes as long to compile as the graph did.
MOST_PLANS = 3
#: Of what is free, the part that ``"auto"`` and ``"lean"`` leave alone, and bytes of it at least: fragmentation,
#: libraries' handles.
MARGIN, LEAST_MARGIN = 0.05, GIB // 2
#: Calls of a graph after which the device's own peak is no longer read.
MEASURED_CALLS = 8
#: A plan after out of memory needs at most this part of what the one before it was predicted to need.
LEANER = 0.9
#: Of the optimizer, which is taken to be Adam: how many tensors like each trained one.
ADAM_STATES = 2
#: Of free host memory, the part that offloading may take; and what copies reach (an H100: 51 GB/s there, 55 back).
HOST_SHARE, HOST_BYTES_PER_SECOND = 0.25, 50e9
#: How often a choice whose cut does not fit is made again, with so much less as the formula was off, and at least twice
#: as much less as before: it may be off by more the leaner the choice is.
ROUNDS = 6
#: How much more than the smallest peak there is ``"lean"`` may need, for less time: a part of that peak.
LEAN_SHARE = 0.055
#: The leanest choice's own cut is believed if it needs no more than this beside what the formula says it adds.
CLOSE = 0.02

#: Levels that are measured; the others follow from them.
MEASURED = (KEEP, CHEAP, MLP, ATTENTION, ALL)
#: Levels whose MLP is computed by slices of tokens: those that recompute it in any case.
SLICED = (MLP, ATTENTION, ALL)

Halves = tuple[fx.GraphModule, fx.GraphModule]


@dataclass
class Plan:
    """One way to cut a graph. ``before``: bytes that are there beside the graph's own tensors; ``leanest``: there is no
    smaller peak.
    """

    levels: list[str]
    walk: Walk
    slices: Slices
    before: int
    budget: int | None
    seconds: float
    leanest: bool = False
    peaks: dict[Any, int] = field(default_factory=dict)

    def peak(self, sizes: Sizes) -> int:
        """Predicted bytes for a batch of these sizes."""
        key = tuple(sizes.items())
        if key not in self.peaks:
            self.peaks[key] = self.before + self.walk.peak(sizes)
        return self.peaks[key]

    def to_dict(self, sizes: Sizes) -> dict[str, Any]:
        """For the report: bytes, and seconds that recomputation adds to a step; ``sliced``: layers whose MLP is
        computed a slice of tokens at a time. ``measured``, on a GPU: the most that the process had allocated there,
        from its second step on.
        """
        return {
            "levels": {level: self.levels.count(level) for level in planner.LEVELS if level in self.levels},
            "sliced": len(self.slices.tokens),
            "budget": self.budget,
            "predicted": self.peak(sizes),
            "kept": sum(self.walk.kept(sizes)),
            "host": sum(self.walk.offloaded(sizes)),
            "seconds": self.seconds,
        }


class Memory:
    """Plans one graph. ``done`` gets the plans. ``runs``: the graph is compiled by the plan, and run."""

    def __init__(self, gm: fx.GraphModule, options: Options, done: Report, runs: bool = True) -> None:
        self.options, self.done, self.runs = options, done, runs
        self.plans: list[Plan] = []
        self.sizes: Sizes = {}
        self.limit: int | None = None  # a peak that must not be reached again
        self.device = _device(gm)
        self.rates = costs.rates_of(done.device) or costs.H100
        inputs = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
        #: Where in the graph's arguments the sizes are that are symbols.
        self.symbols = {
            i: compat.size_expression(x)
            for i, x in enumerate(inputs)
            if isinstance(x, torch.SymInt) and isinstance(compat.size_expression(x), sympy.Symbol)
        }
        self.budget = self._budget()
        self.host = self._host()

    def forget(self, after: int = 0) -> None:
        """The first so many plans are all there are: what came of others was not compiled."""
        del self.plans[after:], self.done.memory[after:]
        if not after:
            self.done.plan.pop("memory", None)
            self.done.plan.pop("sums", None)

    def _budget(self) -> int | None:
        """Bytes; None for no limit."""
        wanted = self.options.memory
        if wanted not in MEMORY:
            return bytes_of("memory", wanted)
        if wanted == "fast" or self.device is None:
            return None
        free, total = torch.cuda.mem_get_info(self.device)
        ours = torch.cuda.memory_reserved(self.device)
        return free + ours - max(int(MARGIN * total), LEAST_MARGIN)

    def _host(self) -> int:
        """Bytes that may be offloaded; on a CPU that is of no use, unless it is asked for."""
        if self.options.host_memory is not None:
            return bytes_of("host_memory", self.options.host_memory)
        return int(HOST_SHARE * offload.bytes_free()) if self.device is not None else 0

    def sizes_of(self, args: Sequence[Any]) -> Sizes:
        """The numbers that symbols stand for in a call."""
        return {symbol: int(args[i]) for i, symbol in self.symbols.items()}

    # ---------------------------------------------------------------------------------------------------------- a plan

    def partition(self, joint: fx.GraphModule, outputs: int, static: list[int] | None) -> Halves:
        """Cut a joint graph by the best plan for ``sizes``, or, where planning fails, as the user's checkpoints say."""
        halves = self._cut(_Cut(joint, outputs, static, self.sizes, self.rates, self.options.cuda_graphs))
        before = compat.copy_graph(halves[0].graph)
        with Attempt(
            "letting norms add",
            "sums are computed by themselves",
            self.done.errors,
            self.options.strict,
            lambda: setattr(halves[0], "graph", before),
        ):
            if number := sums.into_norms(halves[0]):
                self.done.merge_plan({"sums": f"{number} are computed by the norms that read them"})
        return halves

    def _cut(self, cut: _Cut) -> Halves:
        start = time.perf_counter()
        with (
            no_collection(),
            Attempt("planning memory", "layers are recomputed in full", self.done.errors, self.options.strict),
        ):
            halves, plan = self._planned(cut)
            self.done.timings["plan"] = self.done.timings.get("plan", 0.0) + time.perf_counter() - start
            self.plans.append(plan)
            self._report(plan)
            offload.POOL.limit = max(offload.POOL.limit, self.host)
            if self.device is not None and self.runs:
                offload.POOL.prepare(plan.walk.offloaded(self.sizes), self.device)
            return halves
        return cut.at([ALL] * cut.count, sliced=False).halves

    def _planned(self, cut: _Cut) -> tuple[Halves, Plan]:
        wanted, budgets = self.options.memory, [b for b in (self.budget, self.limit) if b is not None]
        levels, least, smallest = [CHEAP if wanted == "fast" else KEEP] * cut.count, False, 0
        # A cut takes seconds. Where inputs and all that the forward makes are more than there is, the formula says that
        # not everything can be kept: its cuts are needed then, and one to see is not.
        problem = self._problem(cut) if wanted == "lean" or (budgets and cut.made() > min(budgets)) else None
        if wanted == "lean" or (budgets and self._needs_more(cut, levels, min(budgets), problem)):
            problem = self._problem(cut) if problem is None else problem
            if wanted == "lean":
                smallest = self._smallest(cut, problem)
                budgets.append(int((1 + LEAN_SHARE) * smallest))
            found = self._fastest(cut, problem, min(budgets))
            levels, least = found or self._leanest(cut, problem), found is None
        plan = self._plan(cut, levels)
        # Slices are for what does not fit, or to be lean, without them, which is not cut where it clearly does not.
        most = plan.peak(self.sizes) if least or not budgets else min(budgets)
        tried = plan.slices.tokens and plan.before + plan.walk.peak(self.sizes, sliced=False) <= most
        whole = self._plan(cut, levels, sliced=False) if tried else plan
        sliced = whole is plan or whole.peak(self.sizes) > most
        chosen = plan if sliced else whole
        return cut.at(levels, sliced).halves, replace(chosen, leanest=least or chosen.peak(self.sizes) <= smallest)

    def _needs_more(self, cut: _Cut, levels: list[str], budget: int, problem: Problem | None) -> bool:
        """Whether the levels need more than there is: by the formula, if there is one, or by the cut."""
        if problem is not None and problem.peak(levels) > budget:
            return True
        return self._plan(cut, levels).peak(self.sizes) > budget

    def _fastest(self, cut: _Cut, problem: Problem, budget: int) -> list[str] | None:
        """The formula's choice; it is of regions that are cut alike, and where the cut itself needs more, it is made
        again. None where none was found.
        """
        off: list[int] = [0]
        for _ in range(ROUNDS):
            found = planner.fastest(problem, budget - off[-1], self.host)
            if found is None:
                break
            peak = self._plan(cut, found).peak(self.sizes)
            if peak <= budget:
                return found
            off.append(max(peak - problem.peak(found), 2 * off[-1]))
        if len(off) > 1 and budget in (self.budget, self.limit):  # else it is lean's own goal, which nobody asked for
            said = f"memory plan: no choice but the leanest was found to keep {budget / GIB:.2f} GiB"
            self.done.errors.append(f"{said}; the first needed {off[1] / 2**20:.2f} MiB more than the formula says")
        return None

    def _smallest(self, cut: _Cut, problem: Problem) -> int:
        """The smallest peak: by the formula, and in a shallow graph, where that may be too large, by the cut."""
        found = problem.peak(planner.leanest(problem, self.host))
        if (True, (ALL,) * cut.count) not in cut.found:
            return found
        return min(found, self._plan(cut, self._leanest(cut, problem)).peak(self.sizes))

    def _leanest(self, cut: _Cut, problem: Problem) -> list[str]:
        """The formula's choice. In a shallow graph, where its cut needs more: the leanest of that and of layers all
        alike, as they were cut to be measured.
        """

        def peak(levels: list[str]) -> int:
            return self._plan(cut, levels).peak(self.sizes)

        levels = planner.leanest(problem, self.host)
        alike = [[level] * cut.count for level in (ATTENTION, ALL, *OFFLOADED)]
        close = peak(levels) - problem.peak(levels) <= CLOSE * (peak(levels) - problem.before)
        if close or (True, (ALL,) * cut.count) not in cut.found:
            return levels
        allowed = [of for of in alike if of[0] in problem.regions[0] and problem.host(of) <= self.host]
        return min(levels, planner.leanest(problem), *allowed, key=lambda of: (peak(of), problem.seconds(of)))

    def _plan(self, cut: _Cut, levels: list[str], sliced: bool = True) -> Plan:
        _, walk, slices = cut.at(levels, sliced)
        there = walk.given(self.sizes) if self.device is None else torch.cuda.memory_allocated(self.device)
        states = 0 if self.done.recompiles else ADAM_STATES * walk.trained(self.sizes)
        return Plan(levels, walk, slices, there + states, self.budget, sum(walk.seconds(self.sizes, self.rates)))

    def _problem(self, cut: _Cut) -> Problem:
        """Every region's choices, from the graph cut with the regions at the levels that :func:`layouts` gives."""
        kinds = kinds_of(cut.joint, cut.outputs, cut.regions)
        before = after = 0
        gradients = [0] * cut.count
        each: dict[tuple[int, str], _Region] = {}  # by region, where all were cut at one level
        alike: dict[tuple[int, str], _Region] = {}  # by kind
        for levels in layouts(kinds):
            plan = self._plan(cut, levels)
            forward, backward, made = plan.walk.held(self.sizes)
            before = max(before, plan.before + plan.walk.kept(self.sizes)[-1])
            after = max(after, forward[-1], backward[-1])
            gradients = [max(pair) for pair in zip(gradients, made, strict=False)]
            for r, region in enumerate(self._regions(plan)):
                if len(set(levels)) == 1:
                    each[r, levels[r]] = region
                elif _inner(levels, r):
                    key = kinds[r], levels[r]
                    alike[key] = alike.get(key, region).or_more(region)
        choices: list[dict[str, Choice]] = []
        for r in range(cut.count):
            choices.append({})
            for level in MEASURED:
                region = each[r, level] if (r, level) in each else alike[kinds[r], level]
                choices[r] |= region.choices(level, gradients[r], bool(self.host), last=r == cut.count - 1)
        piece = max((r.piece for (_, level), r in (each | alike).items() if level in OFFLOADED.values()), default=0)
        drained = plan.walk.loss_seconds(self.sizes, self.rates) * HOST_BYTES_PER_SECOND
        return Problem(tuple(choices), before, after, piece, drained, HOST_BYTES_PER_SECOND)

    def _regions(self, plan: Plan) -> list[_Region]:
        """What each region needs in a plan."""
        walk, sizes = plan.walk, self.sizes
        forward, backward, _ = walk.held(sizes)
        return [
            _Region(*numbers)
            for numbers in zip(
                walk.kept(sizes)[:-1],
                forward[:-1],
                backward[:-1],
                walk.seconds(sizes, self.rates),
                walk.movable_bytes(sizes),
                walk.pieces(sizes),
                walk.forward_seconds(sizes, self.rates),
                strict=True,
            )
        ]

    def _report(self, plan: Plan) -> None:
        row = plan.to_dict(self.sizes)
        self.done.memory.append(row)
        budget = "" if plan.budget is None else f" of {plan.budget / GIB:.2f} GiB"
        if plan.budget is not None and row["predicted"] > plan.budget:
            budget += ", which no plan keeps"
        text = (
            f"{self.options.memory}: {planner.said(plan.levels) or 'no layers'}{_said(plan.slices)}; predicted peak "
            f"{row['predicted'] / GIB:.2f} GiB{budget}; recomputation {plan.seconds * 1e3:.1f} ms a step at the rates "
            f"of {self.rates.name}" + (f"; {row['host'] / GIB:.2f} GiB on the host" if row["host"] else "")
        )
        self.done.merge_plan({"memory": text})


@dataclass(frozen=True)
class _Region:
    """What a region needs at a level: bytes kept, and held in the forward and in the backward (without the gradients
    that are there before), seconds of recomputation, bytes that can be offloaded and of the largest tensor among them,
    seconds of its forward.
    """

    kept: int
    forward: int
    backward: int
    seconds: float
    movable: int
    piece: int
    computing: float

    def or_more(self, other: _Region) -> _Region:
        """The larger of each number."""
        return _Region(*map(max, zip(vars(self).values(), vars(other).values(), strict=True)))

    def choices(self, level: str, gradients: int, offload: bool, last: bool) -> dict[str, Choice]:
        """The level, and with ``offload`` the one that offloads what is kept there, if there is one."""
        held, drained = self.backward + gradients, self.computing * HOST_BYTES_PER_SECOND
        found = {level: Choice(self.kept, held, self.seconds, 0, self.forward, drained)}
        away = next((name for name, of in OFFLOADED.items() if of == level), None)
        if away is not None and offload:
            # A copy that comes back has the time of one layer's backward, which is about twice the forward's work, and
            # what is computed again; that of the last layer has none.
            number, backward = self.movable, 0.0 if last else 2 * self.computing + self.seconds
            waits = max(0.0, number / HOST_BYTES_PER_SECOND - backward)
            found[away] = Choice(self.kept - number, held, self.seconds + waits, number, self.forward, drained)
        return found


class _Halves(NamedTuple):
    """A cut graph, how it runs, and what of it is computed by slices of tokens."""

    halves: Halves
    walk: Walk
    slices: Slices


class _Cut:
    """One joint graph, and what it was cut into, by the regions' levels, for a batch of ``sizes`` on a device of
    ``rates``. ``recorded``: its halves are, as CUDA graphs.
    """

    def __init__(
        self,
        joint: fx.GraphModule,
        outputs: int,
        static: list[int] | None,
        sizes: Sizes,
        rates: Rates,
        recorded: bool,
    ) -> None:
        self.joint, self.outputs, self.static, self.sizes, self.rates = joint, outputs, static, sizes, rates
        self.recorded = recorded
        drop_views(joint)
        self.regions = regions_of(joint, outputs)
        self.count = max(self.regions.values(), default=-1) + 1
        self.found: dict[tuple[bool, tuple[str, ...]], _Halves] = {}

    def made(self) -> int:
        """Bytes of the graph's inputs and of all that regions make in the forward."""
        nodes = self.joint.graph.nodes
        return sum(bytes_made(n, self.sizes) for n in nodes if n.op == "placeholder" or n.name in self.regions)

    def at(self, levels: Sequence[str], sliced: bool = True) -> _Halves:
        """``sliced``: MLPs that are recomputed are computed by slices."""
        key = sliced, tuple(levels)
        if key not in self.found:
            joint = compat.copy_joint(self.joint)
            slices = Slices(dict(self.regions))
            wanted = {r for r, level in enumerate(levels) if sliced and OFFLOADED.get(level, level) in SLICED}
            if wanted:
                forward = forward_of(joint, self.outputs)
                slices = slice_mlps(joint, forward, self.regions, wanted, lambda n: number_at(n, self.sizes))
            regions = slices.regions
            tag(joint, self.outputs, regions, [OFFLOADED.get(level, level) for level in levels])
            halves = compat.partition(joint, self.outputs, self.static)
            walk = Walk(*halves, self.outputs, regions, slices.again, self.recorded)
            moved = {name: r for name, r in walk.movable.items() if levels[r] in OFFLOADED}
            if moved:
                offload.offload(*halves, moved, self._landings(halves[0], walk, moved), regions, walk.turns)
                walk = Walk(*halves, self.outputs, regions, slices.again, self.recorded)
            self.found[key] = _Halves(halves, walk, slices)
        return self.found[key]

    def _landings(self, forward: fx.GraphModule, walk: Walk, moved: Mapping[str, int]) -> dict[str, int]:
        """Where the forward waits for each tensor's copy to the host; they leave as they are made."""
        order = [n.name for n in forward.graph.nodes if n.name in moved]
        number, seconds = walk.bytes_of(self.sizes), walk.forward_seconds(self.sizes, self.rates)
        drained = [f * HOST_BYTES_PER_SECOND for f in seconds]
        return dict(zip(order, planner.landings([(moved[t], number[t]) for t in order], drained), strict=True))


def _said(slices: Slices) -> str:
    """What the report says of slices: of how many tokens they are, in how many layers; why not in others."""
    found = [f"the MLP by slices of {rows:,} tokens in {n}" for rows, n in Counter(slices.tokens.values()).items()]
    left = Counter(f"{reason.code}: {reason.text}" for reason in slices.left.values())
    found += [f"the MLP in one piece in {n} ({why})" for why, n in left.items()]
    return "".join(f"; {text}" for text in found)


def layouts(kinds: Sequence[int]) -> list[list[str]]:
    """Levels for the regions in each of the cuts that measure every level of every kind of region: one cut, or five.

    ``kinds``: which regions are alike. In a cut, regions that follow each other share a level; what one needs is read
    where its neighbours have its level too, and where it is neither the first nor the last. Where there are too few
    regions for that, all have the same level in each of five cuts, and each region's own numbers are read.
    """
    levels = [MEASURED[r * len(MEASURED) // len(kinds)] for r in range(len(kinds))]
    read = {(kinds[r], levels[r]) for r in range(len(kinds)) if _inner(levels, r)}
    if len(read) == len(set(kinds)) * len(MEASURED):
        return [levels]
    return [[level] * len(kinds) for level in MEASURED]


def _inner(levels: Sequence[str], region: int) -> bool:
    """Whether a region has two neighbours, and both have its level."""
    return 0 < region < len(levels) - 1 and levels[region - 1] == levels[region] == levels[region + 1]


def _device(gm: fx.GraphModule) -> torch.device | None:
    """The GPU that a graph's inputs are on, None for a CPU."""
    values = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
    return next((x.device for x in values if isinstance(x, torch.Tensor) and x.is_cuda), None)


def plan_only(gm: fx.GraphModule, inputs: Sequence[Any], options: Options, done: Report) -> None:
    """Make a rewritten graph's plan, for the report, and compile nothing."""
    with Attempt("planning memory", "the report has no plan", done.errors, options.strict):
        compat.compile_with_aot_eager(gm, inputs, Memory(gm, options, done, runs=False).partition)


# ------------------------------------------------------------------------------------------------------------- running


class Planned:
    """Stands for a compiled graph with one plan or more.

    ``compiled(inputs)`` compiles the graph, by the plan that ``memory`` makes when it cuts it; with ``inputs`` now.
    """

    def __init__(
        self, memory: Memory, compiled: Callable[[Sequence[Any]], Callable[..., Any]], inputs: Sequence[Any]
    ) -> None:
        self.memory, self.compiled = memory, compiled
        memory.forget()
        self.calls = [compiled(inputs)]
        self.moment = compat.Moment(inputs) if memory.plans else None
        #: Sizes → position of the plan that serves them.
        self.serves: dict[Any, int] = {}
        #: The arguments that a call writes to, by what the first one did; None before it.
        self.written: list[int] | None = None
        self.ran = 0

    def __call__(self, *args: Any) -> Any:
        if not self.memory.plans:  # a graph without a backward: nothing is kept
            return self.calls[0](*args)
        sizes = self.memory.sizes_of(args)
        key = tuple(sizes.values())
        if key not in self.serves:
            self.serves[key] = self._fitting(sizes)
        self._measure(self.serves[key])
        while True:
            state, versions = random_state(), _versions(args, self.written)
            try:
                with compat.plain_tensors():
                    result = self.calls[self.serves[key]](*args)
                if self.written is None:
                    after = _versions(args, None)
                    self.written = [i for i, version in versions.items() if after[i] != version]
                return result
            except torch.OutOfMemoryError:
                # If it has written to its inputs, they are not what they were.
                if _versions(args, self.written) != versions:
                    raise
                leaner = self._leaner(self.serves[key], sizes)
                if leaner is None:
                    raise
            # Out of the handler, the traceback holds no tensors of the forward any more.
            self.serves[key] = leaner
            self._free()
            set_random_state(state)

    def _measure(self, plan: int) -> None:
        """Note the most that was allocated on the device before this call, since the user's statistics were reset: from
        the second call on, that of a whole step.
        """
        device = self.memory.device
        if device is not None and 0 < self.ran <= MEASURED_CALLS:
            self.memory.done.memory[plan]["measured"] = torch.cuda.max_memory_allocated(device)
        self.ran += 1

    def _fitting(self, sizes: Sizes) -> int:
        """The first plan, the fastest, that fits a batch of these sizes; a new one where none does."""
        budget, plans = self.memory.budget, self.memory.plans
        if budget is None:
            return 0
        for i, plan in enumerate(plans):
            if plan.peak(sizes) <= budget:
                return i
        new = self._compiled(sizes, None)
        return _leanest(plans, sizes) if new is None else new

    def _leaner(self, failed: int, sizes: Sizes) -> int | None:
        """After out of memory: a plan that needs clearly less than the one that failed; None when there is none."""
        plans = self.memory.plans
        limit = int(LEANER * plans[failed].peak(sizes))
        said = f"out of memory in a step that was predicted to need {plans[failed].peak(sizes) / GIB:.2f} GiB"
        log.warning("%s: a leaner plan is tried", said)
        self.memory.done.errors.append(said)
        fitting = [i for i, plan in enumerate(plans) if plan.peak(sizes) <= limit]
        if plans[failed].leanest:
            return None
        new = fitting[0] if fitting else self._compiled(sizes, limit)
        if new is not None and plans[new].peak(sizes) < plans[failed].peak(sizes):
            return new
        least = _leanest(plans, sizes)
        return least if plans[least].peak(sizes) < plans[failed].peak(sizes) else None

    def _compiled(self, sizes: Sizes, limit: int | None) -> int | None:
        """Compile one more plan, for these sizes and below ``limit``; its position, None where that cannot be."""
        memory = self.memory
        if len(memory.plans) >= MOST_PLANS:
            memory.done.merge_plan({"memory": f"no plan is made after {MOST_PLANS} of them"})
            return None
        before = len(memory.plans)
        memory.sizes, memory.limit = sizes, limit
        with Attempt(
            "compiling a leaner plan",
            "the leanest there is runs on",
            memory.done.errors,
            memory.options.strict,
            lambda: memory.forget(before),
        ) as attempt:
            assert self.moment is not None
            with self.moment:
                call = self.compiled(self.moment.inputs)
            self.calls.append(call)
        return None if attempt.failed is not None or len(memory.plans) == before else before

    def _free(self) -> None:
        cuda_graphs.release("out of memory beside them")
        offload.abandon()
        gc.collect()
        if self.memory.device is not None:
            torch.cuda.empty_cache()


def _leanest(plans: Sequence[Plan], sizes: Sizes) -> int:
    return min(range(len(plans)), key=lambda i: plans[i].peak(sizes))


def _versions(args: Sequence[Any], positions: Iterable[int] | None) -> dict[int, int]:
    """How often each tensor was written to; of those at ``positions``, or all."""
    with compat.plain_tensors():  # bitsandbytes' weights are of a class that Python is asked about
        return {
            i: x._version
            for i in (range(len(args)) if positions is None else positions)
            if isinstance(x := args[i], torch.Tensor) and not x.is_inference()
        }
