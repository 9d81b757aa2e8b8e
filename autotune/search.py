"""The search for the fastest configuration of a kernel, or variant of an op, at one key.

What is raced is told by labels; the empty one is what would be taken otherwise (the heuristic, the default variant).
A :class:`Bench` knows how to compile, check and time them, so that the search itself needs no GPU.

A candidate that fails (it cannot be compiled, needs more than the device has, gives another result than the reference)
is data: it is recorded with what it said. Only where everything fails there is nothing to record.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastft.autotune.database import MAX_FAILURES
from fastft.autotune.timing import Clock, in_turns, median_and_spread, said
from fastft.kernels._config import Config, Space, shown

#: So many candidates are timed at most, those nearest to the heuristic.
MOST = 48
#: So many go into the last, long race, beside the heuristic.
FINALISTS = 6
#: Rounds of that race: at least, at most; between these, as many as fit in so many seconds.
ROUNDS, SECONDS = (7, 31), 2.0
#: Differences smaller than this share are nobody's win, however quiet the machine is.
LEAST = 0.01
#: Nothing is searched where the heuristic takes less than this many times what the roofline says; nor is a candidate
#: tried of which the roofline says more than this many times what the heuristic takes. That much may be wrong with
#: rates that were measured.
NEAR_FLOOR = 1.05
#: Why a declared candidate is not tried, and how that is said.
SKIPPED = {
    "illegal": "cannot run",
    "roofline": "too slow by the roofline",
    "cap": "too far from the heuristic",
    "floor": "not tried: the heuristic is near the roofline",
}


class TuningError(RuntimeError):
    """Nothing that was tried ran, the heuristic included."""


class Bench(Protocol):
    """What is raced, by label; the empty label is the default."""

    def compile(self, labels: Sequence[str]) -> None:
        """Compile these, in parallel. What fails here fails again, and is noted, when it is checked."""

    def check(self, label: str) -> str | None:
        """Run once. None, or what is wrong with the result; a failure raises."""

    def sample(self, label: str) -> float:
        """µs of a run."""

    def floor_us(self, label: str) -> float | None:
        """µs that a run takes at the least on this device, by its cost and what its tiles pad; of the default, that
        whatever is chosen takes. None where nobody can tell.
        """


@dataclass
class Race:
    """Who won: ``best`` is empty where nobody beat the default by more than the noise. Times are median µs; ``noise``
    is a share. ``default_us`` is 0 where the default failed. ``skipped``: how many were not tried, by the reasons of
    :data:`SKIPPED`.
    """

    best: str
    us: float
    default_us: float
    noise: float
    tried: int
    failures: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


def race(
    labels: Sequence[str],
    bench: Bench,
    *,
    rounds: tuple[int, int] = ROUNDS,
    seconds: float = SECONDS,
    clock: Clock = time.perf_counter,
) -> Race:
    """Race the candidates, those to be preferred first, against the default. :class:`TuningError` where all of them
    fail.
    """
    failures: dict[str, str] = {}
    skipped: dict[str, int] = {}

    def runs(label: str) -> bool:
        try:
            wrong = bench.check(label)
        except Exception as error:
            wrong = said(error)
        if wrong is not None:
            failures[label] = wrong[:300]
        return wrong is None

    # 1. The default: whether it leaves anything to win, and who cannot win by the roofline.
    default = runs("")
    floors = {label: bench.floor_us(label) for label in ("", *labels)} if default else {}
    if any(floor is not None for floor in floors.values()):
        found, _ = in_turns([""], bench.sample, rounds=(3, 3), seconds=0.0, clock=clock)
        us, spread = median_and_spread(found[""]) if found else (math.inf, 0.0)
        if us <= NEAR_FLOOR * (floors[""] or 0.0):
            return Race("", us, us, spread, 1, skipped={"floor": len(labels)})
        able = [label for label in labels if (floors[label] or 0.0) <= NEAR_FLOOR * us]
        skipped["roofline"], labels = len(labels) - len(able), able
    skipped["cap"], labels = len(labels[MOST:]), labels[:MOST]
    # 2. Compile, and leave out what does not run or computes something else.
    bench.compile(labels)
    able = [label for label in labels if runs(label)]
    if not able and not default:
        raise TuningError("; ".join(f"{label or 'the heuristic'}: {why}" for label, why in failures.items())[:1000])
    # 3. One short race of all, one long race of the fastest.
    entered = [*([""] if default else []), *able]
    samples, failed = in_turns(entered, bench.sample, rounds=(3, 3), seconds=0.0, clock=clock)
    failures.update(failed)
    times = {label: median_and_spread(s)[0] for label, s in samples.items()}
    last = sorted((label for label in times if label), key=lambda label: times[label])[:FINALISTS]
    last = [*([""] if "" in times else []), *last]
    samples, failed = in_turns(last, bench.sample, rounds=rounds, seconds=seconds, clock=clock)
    failures.update(failed)
    final = {label: median_and_spread(s) for label, s in samples.items()}
    if not final:
        raise TuningError("; ".join(f"{label or 'the heuristic'}: {why}" for label, why in failures.items())[:1000])
    # 4. The winner must beat the default by more than both of them scatter.
    best = min(final, key=lambda label: final[label][0])
    us, spread = final[best]
    default_us, default_spread = final.get("", (0.0, 0.0))
    noise = max(LEAST, spread, default_spread)
    if "" in final and not us < default_us * (1.0 - noise):
        best, us = "", default_us
    return Race(best, us, default_us, noise, len(entered), failures, {why: n for why, n in skipped.items() if n})


def nearest_first(space: Space, key: tuple[Any, ...], candidates: Sequence[Config]) -> list[Config]:
    """Candidates without the heuristic, those that differ from it by the fewest doublings first."""
    start = space.chosen(*key)

    def far(config: Config) -> float:
        return sum(abs(math.log2(max(config[name], 1) / max(start[name], 1))) for name in config)

    return sorted((c for c in candidates if c != start), key=far)


def search(space: Space, key: tuple[Any, ...], bench: Bench, **limits: Any) -> dict[str, Any]:
    """The record for one kernel at one key. ``bench``'s labels are configurations, as ``shown``."""
    legal, refused = space.candidates(*key)
    found = {shown(config): config for config in nearest_first(space, key, legal)}
    done = race([*found], bench, **limits)
    if refused:
        done.skipped["illegal"] = len(refused)
    return to_record(done, found.get(done.best, {}))


def to_record(done: Race, config: Mapping[str, int], variant: str = "", source: str = "") -> dict[str, Any]:
    """A race as the database holds it (:data:`fastft.autotune.database.RECORD`)."""
    failures = {label or "heuristic": why for label, why in done.failures.items()}
    return {
        "config": dict(config),
        "variant": variant,
        "source": source[:12],
        "us": round(done.us, 3),
        "heuristic_us": round(done.default_us, 3),
        "noise": round(done.noise, 4),
        "tried": done.tried,
        "failures": dict(list(failures.items())[:MAX_FAILURES]),
        "failed": len(failures),
        "skipped": done.skipped,
    }
