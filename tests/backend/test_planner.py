"""The memory planner's search is exact: brute force over all choices finds nothing better."""

from __future__ import annotations

import itertools
import random

import pytest

from fastft import planner
from fastft.planner import ALL, ALL_OFFLOADED, ATTENTION, CHEAP, KEEP, Choice, Problem, fastest, leanest, said


def problem(seed: int, regions: int = 4, alike: bool = False) -> Problem:
    """Random choices: few distinct numbers, so that there are ties."""
    rng = random.Random(seed)

    def one() -> dict[str, Choice]:
        found = {}
        for level in (KEEP, CHEAP, ATTENTION, ALL, ALL_OFFLOADED):
            kept = rng.randrange(8)
            host = rng.randrange(4) if level == ALL_OFFLOADED else 0
            found[level] = Choice(kept, kept + rng.randrange(8), float(rng.randrange(6)), host)
        return found

    first = one()
    return Problem(tuple(first if alike else one() for _ in range(regions)), rng.randrange(5), rng.randrange(5))


def everything(p: Problem, host: int) -> list[tuple[str, ...]]:
    return [c for c in itertools.product(*p.regions) if p.host(c) <= host]


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_the_search_is_exact(seed: int, alike: bool) -> None:
    p = problem(seed, alike=alike)
    for host in (0, 5):
        choices = everything(p, host)
        for budget in range(0, 45, 3):
            fitting = [c for c in choices if p.peak(c) <= budget]
            found = fastest(p, budget, host)
            if not fitting:
                assert found is None
                continue
            assert found is not None and tuple(found) in fitting
            best = min((p.seconds(c), sum(x.kept for x in p.chosen(c))) for c in fitting)
            assert (p.seconds(found), sum(x.kept for x in p.chosen(found))) == best
        lean = leanest(p, host)
        assert (p.peak(lean), p.seconds(lean)) == min((p.peak(c), p.seconds(c)) for c in choices)
        assert p.host(lean) <= host


def test_the_peak_is_the_formulas() -> None:
    one = {KEEP: Choice(kept=4, held=7)}
    assert Problem((one, one), before=10, after=2).peak([KEEP, KEEP]) == 10 + 4 + 7
    assert Problem((one, one), before=10, after=9).peak([KEEP, KEEP]) == 10 + 8 + 9
    assert Problem((), before=10, after=3).peak([]) == 13


def test_later_layers_keep_more() -> None:
    """A layer whose backward comes first frees what it kept first."""
    each = {KEEP: Choice(kept=10, held=12, seconds=0), ALL: Choice(kept=1, held=12, seconds=1)}
    p = Problem((each,) * 4, after=0)
    assert fastest(p, 3 + 12) == [ALL, ALL, ALL, KEEP]
    assert fastest(p, 3 + 11) is None


def test_a_deep_model_is_quick() -> None:
    each = {
        KEEP: Choice(90_000_001, 130_000_000, 0.0),
        CHEAP: Choice(66_000_003, 130_000_000, 0.000_31),
        ATTENTION: Choice(16_000_007, 150_000_000, 0.009_1),
        ALL: Choice(8_000_001, 150_000_000, 0.010_3),
        ALL_OFFLOADED: Choice(0, 158_000_000, 0.011_7, 8_000_001),
    }
    p = Problem((each,) * 80, 10**9, 10**8)
    levels = fastest(p, 4 * 10**9, 10**9)
    assert levels is not None and p.peak(levels) <= 4 * 10**9
    assert p.peak(leanest(p, 3 * 10**8)) < p.peak(leanest(p))


def test_what_the_report_says() -> None:
    assert said([KEEP, ALL, KEEP]) == "keep everything in 2 layers, recompute everything in 1"
    assert said([CHEAP]) == "recompute cheap ops in 1 layer"
    assert set(planner.SAID) == set(planner.LEVELS)
