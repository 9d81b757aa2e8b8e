"""Which layer keeps, recomputes or offloads what: the fastest choice that fits a budget of bytes.

A *region* is what may be recomputed as a whole, a checkpointed layer. Each has the same few :data:`LEVELS`, and each
level is a :class:`Choice`: bytes and seconds. With regions 1 … L and k, f, h, a those of what each chose (kept on the
device; held in its forward, in its backward; kept away on the host), a step needs at most

    peak = before + max( k_1 + … + k_{r-1} + late_{r-1} + f_r,
                         k_1 + … + k_{r-1} + a_{r-1} + h_r      over r,
                         k_1 + … + k_L + late_L + after )

because the backward frees what a region kept before it comes to the one before: while region r computes, forward or
backward, all earlier ones keep what they keep, and no later one keeps anything that is not in f_r and h_r. What comes
back from the host comes one region ahead. ``before`` is what is there all the time; ``after`` is what the loss needs
beside everything that is kept.

Copies to the host leave one after the other while regions compute: d_r bytes while region r does. ``late`` is what is
on the device because it is on its way,

    b_r = max(0, b_{r-1} + a_r - d_r)         bytes that are still to be copied when region r ends
    late_r = a_r if b_r <= a_r else b_r + piece

where a copy stays for at least the region after its own, and a tensor (``piece``: the largest) until all of it is
copied. So a region may copy more than it has time for, and the next ones less; or it is left for the time of the loss.

The time of a step grows by the sum of what the choices cost, and by what is left to copy after the loss.

Regions are decided first to last (:func:`fastest`). Of what is decided so far five numbers matter to the rest: bytes
kept, the last region's bytes away, those still to be copied, seconds, bytes on the host. A state that another one beats
is dropped, and one whose peak is over the budget. That is exact, but a deep model has very many states that differ by a
few bytes and microseconds: of those in one cell of a grid, the leanest and the fastest stay. A plan keeps its budget to
the byte; a faster one may be missed if it keeps it by less than a few cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

GIB = 2**30

#: What a region does, from the fastest to the leanest: it keeps everything that its backward reads; recomputes ops that
#: cost less than keeping their output (norms, GLU, rotary); recomputes these and all that comes from the first norm
#: after attention on (the MLP); recomputes all but attention; recomputes all. The last three once more with what is
#: kept offloaded to the host.
KEEP, CHEAP, MLP, ATTENTION, ALL = "keep", "cheap", "mlp", "attention", "all"
MLP_OFFLOADED, ATTENTION_OFFLOADED, ALL_OFFLOADED = "mlp, offloaded", "attention, offloaded", "all, offloaded"
LEVELS = (KEEP, CHEAP, MLP, ATTENTION, ALL, MLP_OFFLOADED, ATTENTION_OFFLOADED, ALL_OFFLOADED)
#: Level with offloading → what is recomputed there.
OFFLOADED = {MLP_OFFLOADED: MLP, ATTENTION_OFFLOADED: ATTENTION, ALL_OFFLOADED: ALL}
#: Level → what the report says of a region that has it.
SAID = {
    KEEP: "keep everything",
    CHEAP: "recompute cheap ops",
    MLP: "recompute cheap ops and the MLP",
    ATTENTION: "recompute all but attention",
    ALL: "recompute everything",
    MLP_OFFLOADED: "recompute cheap ops and the MLP and offload what is kept",
    ATTENTION_OFFLOADED: "recompute all but attention and offload what is kept",
    ALL_OFFLOADED: "recompute everything and offload the input",
}


#: Cells of the search's grid over the budget, and over the limit of bytes on the host.
CELLS, HOST_CELLS = 512, 16


@dataclass(frozen=True)
class Choice:
    """A region at one level. ``kept``: bytes on the device from its forward to its backward. ``held``: most bytes while
    its backward computes, what it keeps anywhere among them, without those of other regions; ``forward``: the same of
    its forward. ``seconds``: that the level adds to a step. ``host``: bytes in host memory. ``drained``: bytes that can
    be copied there while its forward computes.
    """

    kept: int
    held: int
    seconds: float = 0.0
    host: int = 0
    forward: int = 0
    drained: float = math.inf


@dataclass(frozen=True)
class Problem:
    """What is to be decided: for each region, in the order of the forward, its choice at each level; bytes ``before``,
    ``after`` and ``piece`` as in the formulas above. ``drained``: bytes that can be copied to the host while the loss
    computes, ``link``: in a second.
    """

    regions: tuple[Mapping[str, Choice], ...]
    before: int = 0
    after: int = 0
    piece: int = 0
    drained: float = math.inf
    link: float = math.inf

    def chosen(self, levels: Sequence[str]) -> list[Choice]:
        """Each region's choice."""
        return [region[level] for region, level in zip(self.regions, levels, strict=True)]

    def peak(self, levels: Sequence[str]) -> int:
        """Most bytes of a step in which region r has ``levels[r]``."""
        kept = peak = self.before
        away, behind = 0, 0.0
        for choice in self.chosen(levels):
            peak = max(peak, kept + self.late(away, behind) + choice.forward, kept + away + choice.held)
            kept, away, behind = kept + choice.kept, choice.host, _behind(behind, choice.host, choice.drained)
        return int(max(peak, kept + self.late(away, behind) + self.after))

    def seconds(self, levels: Sequence[str]) -> float:
        """What the levels add to a step."""
        chosen, behind = self.chosen(levels), 0.0
        for choice in chosen:
            behind = _behind(behind, choice.host, choice.drained)
        return float(sum(choice.seconds for choice in chosen) + _behind(behind, 0, self.drained) / self.link)

    def late(self, away: Any, behind: Any) -> Any:
        """Bytes that are on the device on their way to the host (numbers or arrays)."""
        return np.where(behind > away, behind + self.piece, away)

    def host(self, levels: Sequence[str]) -> int:
        """Bytes in host memory."""
        return sum(choice.host for choice in self.chosen(levels))


def _behind(before: Any, host: Any, drained: Any) -> Any:
    """Bytes still to be copied to the host when a region ends (numbers or arrays)."""
    return np.maximum(before + host - drained, 0.0)


def landings(copies: Sequence[tuple[int, int]], drained: Sequence[float]) -> list[int]:
    """The region at whose end each copy to the host is done, though not before the end of the one after its own; the
    number of regions for the end of the forward.

    ``copies``: region and bytes of each, in order; ``drained``: bytes that can be copied while each region computes.
    """
    found = [len(drained)] * len(copies)
    at, behind = 0, 0.0  # the first copy that is not done, and what has been copied of it
    for region, done in enumerate(drained):
        behind += done
        while at < len(copies) and copies[at][0] <= region and copies[at][1] <= behind:
            found[at] = max(region, copies[at][0] + 1)
            behind -= copies[at][1]
            at += 1
        if at == len(copies) or copies[at][0] > region:
            behind = 0.0  # nothing was waiting
    return found


def fastest(problem: Problem, budget: int, host: int = 0) -> list[str] | None:
    """The levels of least time whose peak is at most ``budget`` bytes, with at most ``host`` bytes offloaded; of those
    the ones that keep least. None when no choice fits.
    """
    free = budget - problem.before
    short = sum(max(c.host for c in region.values()) for region in problem.regions) > host
    cell, host_cell = max(1, budget // CELLS), max(1, host // HOST_CELLS)
    #: Of what is decided so far, a column for each number of a state.
    kept = away = offloaded = np.zeros(1, np.int64)
    behind = seconds = np.zeros(1)
    decided: list[tuple[Any, Any]] = []  # for each region, each state's level, and the state it follows
    for region in problem.regions:
        columns = zip(
            *((c.kept, c.held, c.host, c.forward, c.seconds, c.drained) for c in region.values()), strict=True
        )
        own_kept, held, own_host, forward, added, drained = map(np.array, columns)
        room = free - kept
        fits = (problem.late(away, behind)[:, None] + forward <= room[:, None]) & (
            away[:, None] + held <= room[:, None]
        )
        state, level = (fits & (offloaded[:, None] + own_host <= host)).nonzero()
        behind = _behind(behind[state], own_host[level], drained[level])
        kept, away, seconds = kept[state] + own_kept[level], own_host[level], seconds[state] + added[level]
        offloaded = offloaded[state] + own_host[level]
        groups = away, behind // cell, offloaded // host_cell if short else np.zeros_like(kept)
        stay = _undominated(groups, kept, seconds, cell)
        decided.append((level[stay], state[stay]))
        kept, away, offloaded, behind, seconds = (x[stay] for x in (kept, away, offloaded, behind, seconds))
    ends = np.flatnonzero(problem.late(away, behind) + problem.after <= free - kept)
    if not len(ends):
        return None
    seconds = seconds + _behind(behind, 0, problem.drained) / problem.link
    at = ends[np.lexsort((kept[ends], seconds[ends]))[0]]
    levels = []
    for region, (level, follows) in zip(problem.regions[::-1], decided[::-1], strict=True):
        levels.append(list(region)[level[at]])
        at = follows[at]
    return levels[::-1]


def _undominated(groups: Sequence[Any], kept: Any, seconds: Any, cell: int) -> Any:
    """Positions of the states that no other one of the same groups beats in bytes and seconds; of those in one cell of
    bytes, the first and the last.
    """
    order = np.lexsort((seconds, kept, *groups))
    starts = _differs(*(x[order] for x in groups))
    # The running minimum begins anew with each group, because each is lowered by more than there is between two states.
    lowered = seconds[order] - np.cumsum(starts) * (np.ptp(seconds) + 1.0 if len(seconds) else 1.0)
    least = np.minimum.accumulate(lowered)
    order, starts = (x[starts | (lowered < np.append(np.inf, least)[:-1])] for x in (order, starts))
    first = starts | _differs(kept[order] // cell)
    return order[first | np.append(first, True)[1:]]


def _differs(*columns: Any) -> Any:
    """Which rows are not as the row before them."""
    found = np.ones(len(columns[0]), bool)
    found[1:] = np.logical_or.reduce([x[1:] != x[:-1] for x in columns])
    return found


def leanest(problem: Problem, host: int = 0) -> list[str]:
    """The levels of the smallest peak, and of those the fastest."""

    def fits(budget: int) -> bool:
        return fastest(untimed, budget, host) is not None

    regions = ({k: replace(c, seconds=0.0) for k, c in region.items()} for region in problem.regions)
    untimed = replace(problem, regions=tuple(regions), drained=math.inf)
    least = _least(fits, problem.before, max(problem.peak([k] * len(problem.regions)) for k in _on_device(problem)))
    found = fastest(problem, least, host) or fastest(untimed, least, host)
    assert found is not None
    return found


def _on_device(problem: Problem) -> list[str]:
    """Levels that need no host memory: every region has them."""
    return [k for k in LEVELS if k not in OFFLOADED and all(k in region for region in problem.regions)]


def _least(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The smallest number that fits; ``high`` does."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return high


def said(levels: Sequence[str]) -> str:
    """``"keep everything in 20 layers, recompute everything in 12"``."""
    counts = [(SAID[level], levels.count(level)) for level in LEVELS if level in levels]
    return ", ".join(
        f"{what} in {n}" + ("" if i else " layer" if n == 1 else " layers") for i, (what, n) in enumerate(counts)
    )
