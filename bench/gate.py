"""``fastft bench compare OLD NEW``: what got slower, faster, larger, lost or new between two result files; and
``fastft bench targets FILE``: the rows of kernels that are slower than Inductor or far from a copy, and what the losses
tagged ``loss`` miss of their own.

Of two files, rows belong together by op, shape and implementation (kernels), or by implementation (training steps of
one setting); forward, backward and both, or a step's time and its peak of memory, are compared each by itself. A figure
counts as another one when it left the noise band: the wider of the band that was asked for and the spreads (distance
between the quartiles over the median) of both files' own samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.files import LEAST, Result, noise_band, spread
from bench.tables import (
    COPY_TARGET,
    OURS,
    PHASES,
    Grid,
    Miss,
    beside_inductor,
    bound_by_memory,
    inductor_of,
    loss_misses,
    of_copy,
    slower_than_inductor,
    time_of,
)

SLOWER, FASTER, SAME, GONE, NEW = "slower", "faster", "same", "gone", "new"
MORE, LESS = "more memory", "less memory"
#: Two runs whose settings differ in one of these measured different things.
SETTING = (
    "model", "quant", "train", "trainer", "rank", "batch", "seq", "data", "document", "lengths", "optimizer",
    "checkpointing",
)  # fmt: skip
GIB = 2**30
PEAK = "peak"

Key = tuple[str, str]  # what was measured, implementation
Figures = Mapping[str, Any]  # part → median and quartiles; or {"error": ...}


class NotComparable(ValueError):
    """Files that say nothing about what was asked; the message says why."""


# -- two files ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One figure of both files: ``part`` is a phase of a kernel (µs), ``step`` (ms) or ``peak`` (bytes), or empty where
    one file has none of the row's. None where there is none.
    """

    what: str
    implementation: str
    part: str
    old: float | None
    new: float | None
    band: float
    verdict: str
    why: str = ""

    @property
    def ours(self) -> bool:
        return self.implementation.partition(":")[0] == OURS

    @property
    def bad(self) -> bool:
        """Ours, and slower, larger or gone: what the gate is for."""
        return self.ours and self.verdict in (SLOWER, MORE, GONE)

    def shown(self, value: float | None) -> str:
        if value is None:
            return ""
        if self.part == PEAK:
            return f"{value / GIB:.2f} GiB"
        return f"{value:,.1f} {'ms' if self.part == 'step' else 'µs'}"


def measured(result: Result) -> dict[Key, Figures]:
    found: dict[Key, Figures] = {}
    for row in result.rows:
        if result.kind == "kernels":
            for name, figures in row["implementations"].items():
                parts = {phase: figures[f"{phase}_us"] for phase in PHASES if f"{phase}_us" in figures}
                found[f"{row['op']} {row['shape']}", name] = parts or figures
        elif row["status"] == "ok":
            parts = {"step": spread(row["step_ms"]["all"])}
            peaks = [run["peak_bytes"] for run in row["runs"] if run.get("peak_bytes") is not None]
            found["training", row["impl"]] = {**parts, PEAK: spread(peaks)} if peaks else parts
        else:
            found["training", row["impl"]] = {"error": str(row["error"])}
    return found


def changes(
    old: Result, new: Result, band: float = 0.05, memory_band: float = LEAST, any_device: bool = False
) -> list[Change]:
    """Every figure of ``old`` and ``new``; raises :class:`NotComparable`."""
    if old.kind != new.kind:
        raise NotComparable(f"{old.path} holds {old.kind} results, {new.path} {new.kind} results")
    if old.device != new.device and not any_device:
        raise NotComparable(
            f"{old.path} was measured on {old.device}, {new.path} on {new.device}: the difference would be the "
            "device's (--any-device compares them all the same)"
        )
    if old.kind == "train":
        other = {k: (old.setup.get(k), new.setup.get(k)) for k in SETTING if old.setup and new.setup}
        differ = [f"{k} {a} and {b}" for k, (a, b) in other.items() if a != b]
        if differ:
            raise NotComparable(f"{old.path} and {new.path} measured different settings: {', '.join(differ)}")
    before, after = measured(old), measured(new)
    found = []
    for key in dict.fromkeys([*before, *after]):
        found += _changes(key, before.get(key), after.get(key), band, memory_band)
    return found


def _changes(key: Key, old: Figures | None, new: Figures | None, band: float, memory_band: float) -> list[Change]:
    missing = [figures is None or "error" in figures for figures in (old, new)]
    if any(missing):  # one line for all of its parts
        why = next((f"{when}: {f['error']}" for when, f in (("new", new), ("old", old)) if f and "error" in f), "")
        verdict = SAME if all(missing) else NEW if missing[0] else GONE  # the same: it failed in both
        return [Change(*key, "", None, None, band, verdict, why)]
    assert old is not None and new is not None
    found = []
    for part in dict.fromkeys([*old, *new]):
        a, b, least = old.get(part), new.get(part), memory_band if part == PEAK else band
        if a is None or b is None:  # a backward that only one of them has
            verdict = NEW if a is None else GONE
            found.append(Change(*key, part, a and a["median"], b and b["median"], least, verdict))
        else:
            found.append(_change(key, part, a, b, least))
    return found


def _change(key: Key, part: str, old: Mapping[str, float], new: Mapping[str, float], least: float) -> Change:
    a, b, band = old["median"], new["median"], noise_band(old, new, least=least)
    worse, better = (MORE, LESS) if part == PEAK else (SLOWER, FASTER)
    verdict = worse if b > a * (1 + band) else better if b * (1 + band) < a else SAME
    return Change(*key, part, a, b, band, verdict)


def table(found: Sequence[Change], everything: bool = False) -> Grid:
    """What changed, ours first, the worst first; with ``everything``, what did not too."""
    order = [SLOWER, MORE, GONE, FASTER, LESS, NEW, SAME]

    def rank(change: Change) -> tuple[Any, ...]:
        ratio = change.new / change.old if change.old and change.new else 0.0
        return not change.bad, not change.ours, order.index(change.verdict), -ratio

    shown = sorted((c for c in found if everything or c.verdict != SAME), key=rank)
    counts = ", ".join(f"{n} {v}" for v in order if (n := sum(c.verdict == v for c in found)) or v in (SLOWER, SAME))
    columns = ["", "implementation", "part", "old", "new", "new / old", "band ± %", "verdict", "why"]
    grid = Grid(f"{len(found)} figures: {counts}", columns, [])
    grid.left = frozenset({"", "implementation", "part", "verdict", "why"})
    for i, c in enumerate(shown):
        if c.bad:
            grid.strong.add(i)
        ratio, band = (f"{c.new / c.old:.3f}", f"{100 * c.band:.1f}") if c.old and c.new else ("", "")
        numbers = [c.shown(value) for value in (c.old, c.new)]
        grid.rows.append([c.what, c.implementation, c.part, *numbers, ratio, band, c.verdict, c.why])
    return grid


# -- one file and its targets ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What misses a target. ``slower``: rows slower than Inductor by more than the noise band; ``far``: rows that
    memory binds, below :data:`COPY_TARGET` of a copy's rate; ``losses``: rows tagged ``loss``, and what they miss;
    ``failed``: rows without a time of ours; ``unknown``: what was not measured, a sentence for each shape; ``notes``:
    what is nobody's fault.

    Judged is forward and backward together: a loss that computes its gradients in its forward has a slow one.
    """

    result: Result
    slower: Sequence[Mapping[str, Any]]
    far: Sequence[Mapping[str, Any]]
    losses: Sequence[tuple[Mapping[str, Any], Miss]]
    failed: Sequence[str]
    unknown: Sequence[str]
    notes: Sequence[str]

    @property
    def met(self) -> bool:
        """What was not measured is not met."""
        return not (self.slower or self.far or self.losses or self.failed or self.unknown)

    def sentence(self) -> str:
        rows = self.result.rows
        bound, losses = sum(map(bound_by_memory, rows)), sum("loss" in row.get("tags", ()) for row in rows)
        missed = len({id(row) for row, _ in self.losses})
        of_losses = f"; of {losses} losses, {missed} miss targets of their own" if losses else ""
        return (
            f"{self.result.path}: of {len(rows)} shapes, {len(self.slower)} slower than Inductor by more than the "
            f"noise band, {len(self.failed)} failed; of {bound} that memory binds, {len(self.far)} below "
            f"{100 * COPY_TARGET:.0f} % of a copy{of_losses}; {len(self.unknown)} not judged."
        )


def judge(result: Result) -> Judged:
    """Raises :class:`NotComparable` for a file that the targets do not speak of."""
    if result.kind != "kernels":
        raise NotComparable(f"{result.path} holds {result.kind} results; the targets are those of kernels")
    if not result.rows:
        raise NotComparable(f"{result.path} holds no rows: there is nothing to judge")
    if not result.data.get("ceilings"):
        raise NotComparable(f"{result.path} was measured on {result.device}; the targets are those of a GPU")
    slower, far, losses, failed, unknown, notes = [], [], [], [], [], []
    for row in result.rows:
        name, ours = f"{row['op']} {row['shape']}", row["implementations"].get(OURS, {})
        theirs = inductor_of(row)
        if not time_of(ours):
            failed.append(f"{name}: {ours.get('error', 'no time of fastft')}")
            continue
        if "error" in theirs:
            notes.append(f"{name}: nothing to be slower than, Inductor failed: {theirs['error']}")
        elif (found := slower_than_inductor(row)) is None:
            unknown.append(f"{row['op']}: no time of Inductor")
        elif found:
            slower.append(row)
        if row["op"] == "linear_cross_entropy" and "loss" in row.get("tags", ()):
            missed, missing = loss_misses(row)
            losses += [(row, miss) for miss in missed]
            unknown += [f"{row['op']}: {what}" for what in missing]
        if not bound_by_memory(row):
            continue
        if (share := of_copy(row, ours)) is None:
            unknown.append(f"{row['op']}: no copy of as many bytes was timed")
        elif share < COPY_TARGET:
            far.append(row)
    return Judged(result, slower, far, losses, failed, unknown, notes)


def target_tables(judged: Judged) -> list[Grid]:
    """The offending rows, the worst first: forward, backward and both apart."""

    def ours(row: Mapping[str, Any]) -> Mapping[str, Any]:
        return row["implementations"][OURS]

    def ratio(row: Mapping[str, Any], phase: str = "") -> str:
        found = beside_inductor(row, phase)
        return "" if found is None else f"{found[0]:.3f} ± {found[1]:.3f}"

    def share(row: Mapping[str, Any], phase: str = "") -> str:
        found = of_copy(row, ours(row), phase)
        return "" if found is None else f"{100 * found:.0f}"

    grids = []
    for title, rows, cell, worst in (
        ("Slower than Inductor: time / Inductor's ± the noise band", judged.slower, ratio,
         lambda row: -(beside_inductor(row) or (0.0,))[0]),
        (f"Below {100 * COPY_TARGET:.0f} % of a copy of as many bytes: %", judged.far, share,
         lambda row: of_copy(row, ours(row)) or 0.0),
    ):  # fmt: skip
        lines = [
            [row["op"], row["shape"], *(cell(row, phase) for phase in PHASES), f"{time['median']:,.1f}"]
            for row in sorted(rows, key=worst)
            if (time := time_of(ours(row)))
        ]
        if lines:
            columns = ["op", "shape", *PHASES, "µs"]
            grids.append(Grid(title, columns, lines, left=frozenset({"op", "shape"})).trimmed())
    if judged.losses:
        lines = [[row["shape"], miss.what, miss.found, miss.target] for row, miss in judged.losses]
        columns = ["shape", "what", "found", "target"]
        grids.append(Grid("Losses that miss a target of their own", columns, lines, left=frozenset({"shape", "what"})))
    return grids
