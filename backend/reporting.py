"""What the backend did: one :class:`Report` for each graph compiled in this process, and all of them merged."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastft.bridges import Bridge

REPLACED, MISSED, SKIPPED = "replaced", "missed", "skipped"


@dataclass(frozen=True)
class Work:
    """What an op computes in one forward pass, from its cost formula, for the sizes that were traced: FLOPs, bytes read
    and written, bytes kept for the backward. ``problem``: why that is not known.
    """

    op: str
    flops: int = 0
    bytes_moved: int = 0
    bytes_kept: int = 0
    problem: str = ""


class _Record:
    """What has a ``work`` and says itself in JSON."""

    work: Work | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; ``work`` and ``into`` are there where there is something to say."""
        fields = {k: v for k, v in vars(self).items() if v or k not in ("work", "into")}
        return fields | ({"work": vars(self.work)} if self.work is not None else {})


@dataclass(frozen=True)
class Module(_Record):
    """A module of a graph, and what stays with Inductor there: ``left``, ops by name; ``work``: that of its linear
    layers. ``into``: which site took the rest, where that is not the module's own.
    """

    path: str
    left: dict[str, int] = field(default_factory=dict)
    work: Work | None = None
    into: str = ""


@dataclass(frozen=True)
class Site(_Record):
    """One place in a graph that is, or looks like, one that fastft knows.

    ``status``: ``"replaced"``; ``"missed"`` (recognised, but left as it was: ``reason``); ``"skipped"`` (switched off
    by an option).
    ``module``: path of the module it belongs to; ``rule``: ``file:line`` of the rule; ``node``: its name in the graph.
    ``work``: of the op that is in its place; None for one that a later rewrite took up, which ``into`` names
    (``"joint_linears at layers.0.attn.v"``) and where it is counted.
    """

    pattern: str
    module: str
    status: str
    reason: str = ""
    rule: str = ""
    node: str = ""
    notes: str = ""
    work: Work | None = None
    into: str = ""


@dataclass
class Report:
    """What happened to one graph, or to all of them.

    ``modules``, in the order in which they compute, ``inputs`` (``"input_ids [4, 2048]"``) and ``device`` are one
    graph's. A report of several has theirs in ``parts``. ``memory``: the plans that were made for a memory budget, in
    order, in bytes and seconds (:mod:`fastft.memory`). ``timings``: seconds of this process; ``compile`` has ``plan``
    in it.
    """

    sites: list[Site] = field(default_factory=list)
    graphs: int = 0
    breaks: int = 0
    recompiles: int = 0
    bridges: list[Bridge] = field(default_factory=list)
    plan: dict[str, Any] = field(default_factory=dict)
    memory: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    break_reasons: dict[str, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    modules: list[Module] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    device: str = ""
    parts: list[Report] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Replaced sites by pattern."""
        return dict(Counter(s.pattern for s in self.sites if s.status == REPLACED))

    @property
    def missed(self) -> list[Site]:
        """Sites that were recognised and left as they were."""
        return [s for s in self.sites if s.status == MISSED]

    def merge_plan(self, plan: dict[str, Any]) -> None:
        """Add another graph's plan: what differs from graph to graph is listed, in order of appearance."""
        for key, what in plan.items():
            known = self.plan.get(key)
            if known is None:
                self.plan[key] = what
            elif str(what) not in str(known).split("; "):
                self.plan[key] = f"{known}; {what}"

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "counts": self.counts,
            "sites": [s.to_dict() for s in self.sites],
            "graphs": self.graphs,
            "breaks": self.breaks,
            "break_reasons": dict(self.break_reasons),
            "recompiles": self.recompiles,
            "bridges": [vars(b) for b in self.bridges],
            "plan": dict(self.plan),
            "memory": list(self.memory),
            "timings": dict(self.timings),
            "errors": list(self.errors),
            "parts": [
                {"inputs": list(p.inputs), "device": p.device, "left": [m.to_dict() for m in p.modules if m.left]}
                for p in self.each_graph()
            ],
        }

    def to_html(self, title: str = "") -> str:
        """The report as a page: one file that needs no other. ``title`` says what it is of."""
        from fastft.page import page

        return page(self, title)

    def each_graph(self) -> list[Report]:
        """One report for each graph."""
        return self.parts or [self]

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        out = io.StringIO()
        console = Console(file=out, width=140, force_terminal=False)
        rows: dict[tuple[str, str, str], list[Site]] = {}
        for site in self.sites:
            rows.setdefault((site.pattern, site.status, site.reason), []).append(site)
        table = Table(title="fastft: sites", title_justify="left")
        for name, justify in (
            ("pattern", "left"),
            ("status", "left"),
            ("sites", "right"),
            ("why / rule", "left"),
            ("where", "left"),
        ):
            table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
        for (pattern, status, reason), sites in sorted(rows.items(), key=lambda r: (r[0][1] != REPLACED, r[0])):
            rules = ", ".join(sorted({s.rule for s in sites if s.rule}))
            # Text, not str: rich would read "[batch, seq]" in a reason as markup.
            table.add_row(Text(pattern), status, str(len(sites)), Text(reason or rules), Text(_where(sites)))
        if not rows:
            table.add_row("none", "", "0", "no graph with a known site was compiled", "")
        console.print(table)
        console.print(f"graphs {self.graphs}, graph breaks {self.breaks}, recompilations {self.recompiles}")
        for reason, times in self.break_reasons.items():
            first_line = next(iter(reason.splitlines()), "")
            console.print(f"  break ×{times}: {first_line}", markup=False)
        if self.timings:
            console.print("time: " + ", ".join(f"{k} {v:.2f} s" for k, v in self.timings.items()))
        for key, what in self.plan.items():
            console.print(f"plan: {key}: {what}", markup=False)
        for row in self.memory:
            if "measured" in row:
                numbers = f"predicted {row['predicted'] / 2**30:.2f} GiB, measured {row['measured'] / 2**30:.2f} GiB"
                console.print(f"memory: {numbers} (the process's peak)", markup=False)
        for bridge in self.bridges:
            console.print(
                f"bridge {bridge.name}: {bridge.status}" + (f" ({bridge.reason})" if bridge.reason else ""),
                markup=False,
            )
        for error in self.errors:
            console.print(f"error: {error}", markup=False)
        return out.getvalue()


def _where(sites: list[Site]) -> str:
    paths = list(dict.fromkeys(s.module for s in sites if s.module))
    return ", ".join(paths[:2]) + (f", … ({len(paths)} modules)" if len(paths) > 2 else "")


_REPORTS: list[Report] = []
#: Dynamo counts breaks from the start of the process; these are not ours to report.
_OTHER_BREAKS: Counter[str] = Counter()


def add(report: Report) -> None:
    """Keep the report of a graph that was just compiled."""
    _REPORTS.append(report)


def reports() -> list[Report]:
    """One report for each graph that this process compiled with fastft, oldest first."""
    return list(_REPORTS)


def report() -> Report:
    """All graphs' reports merged into one, with Dynamo's count of graph breaks and recompilations, and the bridges."""
    from fastft import bridges
    from fastft.autotune import store, variants
    from fastft.kernels import _attention_routes, _config
    from fastft.kernels._op import FAILED

    breaks = dict(graph_breaks() - _OTHER_BREAKS)
    merged = Report(bridges=bridges.rows(), breaks=sum(breaks.values()), break_reasons=breaks)
    for one in _REPORTS:
        merged.sites += one.sites
        merged.graphs += one.graphs
        merged.errors += one.errors
        merged.recompiles += one.recompiles
        for key, seconds in one.timings.items():
            merged.timings[key] = merged.timings.get(key, 0.0) + seconds
        merged.merge_plan(one.plan)
        merged.memory += one.memory
        merged.parts.append(one)
    if sizes := _attention_routes.PLANS.said():
        merged.merge_plan({"attention": sizes})
    merged.errors += [f"kernel {name} failed, PyTorch runs in its place: {why}" for name, why in FAILED.items()]
    merged.errors += [f"no tuned configuration of {name}: {why}" for name, why in _config.FAILED.items()]
    merged.errors += [f"file not used: {line}" for line in store.problems()]
    merged.errors += variants.problems()
    merged.errors += bridges.problems()
    return merged


def graph_breaks() -> Counter[str]:
    """Dynamo's own count of graph breaks in this process, by reason; and of calls that it left uncompiled, as the code
    had been compiled too often already.
    """
    from fastft._torch_compat import dynamo_counters

    counters = dynamo_counters()
    given_up = {why: n for why, n in counters.get("unimplemented", {}).items() if "recompile limit" in why}
    return Counter(counters.get("graph_break", {})) + Counter(given_up)


def forget_breaks(breaks: Counter[str]) -> None:
    """Leave these out of later reports: they did not happen in training."""
    _OTHER_BREAKS.update(breaks)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What is compiled in here is no part of training: reports, and breaks, are those of this block alone, and
    forgotten after it.
    """
    before, breaks = list(_REPORTS), graph_breaks()
    _REPORTS.clear()
    try:
        yield
    finally:
        _REPORTS[:] = before
        forget_breaks(graph_breaks() - breaks)


def reset() -> None:
    """Forget all reports, and the breaks so far (for tests and for one benchmark after the other)."""
    _REPORTS.clear()
    _OTHER_BREAKS.clear()
    _OTHER_BREAKS.update(graph_breaks())
