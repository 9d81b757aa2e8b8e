"""Which layer keeps, recomputes or offloads what: the fastest choice that fits a budget of bytes.

A *region* is what may be recomputed as a whole, a checkpointed layer. Each has the same few :data:`LEVELS`, and each
level is a :class:`Choice`: bytes and seconds. What a step needs at most, with regions 1 … L and k, h those of what each
chose,

    peak = before + max( max over r of (k_1 + … + k_{r-1} + h_r),  k_1 + … + k_L + after )

because the backward frees what a region kept before it comes to the one before: while region r computes, forward or
backward, all earlier ones keep what they keep, and no later one keeps anything that is not in h_r. ``before`` is what
is there all the time; ``after`` is what the loss needs beside everything that is kept. The time of a step grows by the
sum of what the choices cost.

The search is exact. Regions are decided first to last; of what is decided so far only three numbers matter to the rest:
bytes kept, seconds, bytes on the host. A state that another one beats in all three is dropped, and one whose peak is
over the budget. Layers are alike, so few states are left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

GIB = 2**30

#: What a region does, from the fastest to the leanest: it keeps everything that its backward reads; recomputes ops that
#: cost less than keeping their output (norms, GLU, rotary); recomputes these and all that comes from the first norm
#: after attention on (the MLP); recomputes all but attention; recomputes all. The last two once more with what is kept
#: offloaded to the host.
KEEP, CHEAP, MLP, ATTENTION, ALL = "keep", "cheap", "mlp", "attention", "all"
ATTENTION_OFFLOADED, ALL_OFFLOADED = "attention, offloaded", "all, offloaded"
LEVELS = (KEEP, CHEAP, MLP, ATTENTION, ALL, ATTENTION_OFFLOADED, ALL_OFFLOADED)
#: Level with offloading → what is recomputed there.
OFFLOADED = {ATTENTION_OFFLOADED: ATTENTION, ALL_OFFLOADED: ALL}
#: Level → what the report says of a region that has it.
SAID = {
    KEEP: "keep everything",
    CHEAP: "recompute cheap ops",
    MLP: "recompute cheap ops and the MLP",
    ATTENTION: "recompute all but attention",
    ALL: "recompute everything",
    ATTENTION_OFFLOADED: "recompute all but attention and offload what is kept",
    ALL_OFFLOADED: "recompute everything and offload the input",
}


@dataclass(frozen=True)
class Choice:
    """A region at one level. ``kept``: bytes on the device from its forward to its backward. ``held``: most bytes
    while it computes, in either direction, its own ``kept`` among them, without those of earlier regions. ``seconds``:
    that the level adds to a step. ``host``: bytes in host memory.
    """

    kept: int
    held: int
    seconds: float = 0.0
    host: int = 0


@dataclass(frozen=True)
class Problem:
    """What is to be decided: for each region, in the order of the forward, its choice at each level; bytes ``before``
    and ``after`` as in the formula above.
    """

    regions: tuple[Mapping[str, Choice], ...]
    before: int = 0
    after: int = 0

    def chosen(self, levels: Sequence[str]) -> list[Choice]:
        """Each region's choice."""
        return [region[level] for region, level in zip(self.regions, levels, strict=True)]

    def peak(self, levels: Sequence[str]) -> int:
        """Most bytes of a step in which region r has ``levels[r]``."""
        kept = peak = self.before
        for choice in self.chosen(levels):
            peak = max(peak, kept + choice.held)
            kept += choice.kept
        return max(peak, kept + self.after)

    def seconds(self, levels: Sequence[str]) -> float:
        """What the levels add to a step."""
        return sum(choice.seconds for choice in self.chosen(levels))

    def host(self, levels: Sequence[str]) -> int:
        """Bytes in host memory."""
        return sum(choice.host for choice in self.chosen(levels))


#: Of a decision for the first regions: bytes kept, seconds, bytes on the host; and the levels, last first, as a chain.
_State = tuple[int, float, int, tuple]


def fastest(problem: Problem, budget: int, host: int = 0) -> list[str] | None:
    """The levels of least time whose peak is at most ``budget`` bytes, with at most ``host`` bytes offloaded; of those
    the ones that keep least. None when no choice fits.
    """
    states: list[_State] = [(0, 0.0, 0, ())]
    for region in problem.regions:
        states = _undominated(
            (kept + choice.kept, seconds + choice.seconds, offloaded + choice.host, (level, chain))
            for kept, seconds, offloaded, chain in states
            for level, choice in region.items()
            if problem.before + kept + choice.held <= budget and offloaded + choice.host <= host
        )
    ends = [s for s in states if problem.before + s[0] + problem.after <= budget]
    if not ends:
        return None
    levels, chain = [], min(ends, key=lambda s: (s[1], s[0]))[3]
    while chain:
        level, chain = chain
        levels.append(level)
    return levels[::-1]


def leanest(problem: Problem, host: int = 0) -> list[str]:
    """The levels of the smallest peak, and of those the fastest."""

    def fits(budget: int) -> bool:
        return fastest(untimed, budget, host) is not None

    untimed = Problem(
        tuple({k: Choice(c.kept, c.held, 0.0, c.host) for k, c in region.items()} for region in problem.regions),
        problem.before,
        problem.after,
    )
    least = _least(fits, problem.before, max(problem.peak([k] * len(problem.regions)) for k in _on_device(problem)))
    found = fastest(problem, least, host)
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


def _undominated(states: object) -> list[_State]:
    """Those that no other one beats in bytes, seconds and host bytes."""
    found: list[_State] = []
    # Sorted by bytes, a state is beaten by an earlier one or by none: by one with no more seconds and host bytes.
    best: list[tuple[float, int]] = []
    for state in sorted(states, key=lambda s: s[:3]):  # type: ignore[call-overload]
        _, seconds, host, _ = state
        if any(s <= seconds and h <= host for s, h in best):
            continue
        best = [(s, h) for s, h in best if not (seconds <= s and host <= h)]
        best.append((seconds, host))
        found.append(state)
    return found


def said(levels: Sequence[str]) -> str:
    """``"keep everything in 20 layers, recompute everything in 12"``."""
    counts = [(SAID[level], levels.count(level)) for level in LEVELS if level in levels]
    return ", ".join(
        f"{what} in {n}" + ("" if i else " layer" if n == 1 else " layers") for i, (what, n) in enumerate(counts)
    )
