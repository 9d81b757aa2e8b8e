"""``fastft bench compare OLD NEW``: what got slower, faster, lost or new between two result files.

Rows belong together by op, shape and implementation (kernels), or by implementation (training steps of one setting).
A time counts as another one when it left the noise band: the wider of the band that was asked for and the spreads
(distance between the quartiles over the median) of both files' own samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.files import Result, relative_spread, spread
from bench.tables import OURS, Grid, time_of

SLOWER, FASTER, SAME, GONE, NEW = "slower", "faster", "same", "gone", "new"
#: Two runs whose settings differ in one of these measured different things.
SETTING = ("model", "quant", "train", "rank", "batch", "seq", "checkpointing")

Key = tuple[str, str]  # what was measured, implementation


class NotComparable(ValueError):
    """Two files that say nothing about each other; the message says why."""


@dataclass(frozen=True)
class Change:
    """One row of both files. Times in the files' own unit; None where there is none."""

    what: str
    implementation: str
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
        """Ours, and slower or gone: what the gate is for."""
        return self.ours and self.verdict in (SLOWER, GONE)


def times(result: Result) -> dict[Key, Mapping[str, Any]]:
    """(what, implementation) → a time with its quartiles, or ``{"error": ...}``."""
    found: dict[Key, Mapping[str, Any]] = {}
    for row in result.rows:
        if result.kind == "kernels":
            for name, figures in row["implementations"].items():
                found[f"{row['op']} {row['shape']}", name] = time_of(figures) or figures
        elif row["status"] == "ok":
            found["step", row["impl"]] = spread(row["step_ms"]["all"])
        else:
            found["step", row["impl"]] = {"error": str(row["error"])}
    return found


def changes(old: Result, new: Result, band: float = 0.05, any_device: bool = False) -> list[Change]:
    """Every row of ``old`` and ``new``; raises :class:`NotComparable`."""
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
    before, after = times(old), times(new)
    return [_change(key, before.get(key), after.get(key), band) for key in dict.fromkeys([*before, *after])]


def _change(key: Key, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, band: float) -> Change:
    def median(figure: Mapping[str, Any] | None) -> float | None:
        return None if figure is None else figure.get("median")

    why = next((f"{when}: {f['error']}" for when, f in (("new", new), ("old", old)) if f and "error" in f), "")
    a, b = median(old), median(new)
    if a is None or b is None:
        verdict = SAME if a is b else NEW if a is None else GONE  # the same: it failed in both
        return Change(*key, a, b, band, verdict, why)
    assert old is not None and new is not None
    band = max(band, relative_spread(old), relative_spread(new))
    verdict = SLOWER if b > a * (1 + band) else FASTER if b * (1 + band) < a else SAME
    return Change(*key, a, b, band, verdict)


def table(found: list[Change], unit: str, everything: bool = False) -> Grid:
    """What changed, ours first, the worst first; with ``everything``, what did not too."""
    order = [SLOWER, GONE, FASTER, NEW, SAME]

    def rank(change: Change) -> tuple[Any, ...]:
        ratio = change.new / change.old if change.old and change.new else 0.0
        return not change.bad, not change.ours, order.index(change.verdict), -ratio

    shown = sorted((c for c in found if everything or c.verdict != SAME), key=rank)
    counts = ", ".join(f"{sum(c.verdict == v for c in found)} {v}" for v in order)
    columns = ["", "implementation", f"old {unit}", f"new {unit}", "new / old", "band ± %", "verdict", "why"]
    grid = Grid(f"{len(found)} rows: {counts}", columns, [], left=frozenset({"", "implementation", "verdict", "why"}))
    for i, c in enumerate(shown):
        if c.bad:
            grid.strong.add(i)
        numbers = [f"{value:,.1f}" if value is not None else "" for value in (c.old, c.new)]
        ratio, band = (f"{c.new / c.old:.3f}", f"{100 * c.band:.1f}") if c.old and c.new else ("", "")
        grid.rows.append([c.what, c.implementation, *numbers, ratio, band, c.verdict, c.why])
    return grid
