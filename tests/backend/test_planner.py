"""The memory planner's search is exact: brute force over all choices finds nothing better."""

from __future__ import annotations

import itertools
import math
import random
import time
from dataclasses import replace

import pytest

from fastft import planner
from fastft.planner import (
    ALL,
    ALL_OFFLOADED,
    ATTENTION,
    CHEAP,
    KEEP,
    MLP,
    MLP_OFFLOADED,
    Choice,
    Problem,
    fastest,
    landings,
    leanest,
    said,
)


def problem(seed: int, regions: int = 4, alike: bool = False) -> Problem:
    """Random choices: few distinct numbers, so that there are ties."""
    rng = random.Random(seed)

    def one() -> dict[str, Choice]:
        found = {}
        drained = rng.randrange(5)
        for level in (KEEP, CHEAP, ATTENTION, MLP_OFFLOADED, ALL_OFFLOADED):
            kept = rng.randrange(8)
            host = rng.randrange(1, 6) if level in planner.OFFLOADED else 0
            held, forward = kept + rng.randrange(8), kept + rng.randrange(8)
            found[level] = Choice(kept, held, float(rng.randrange(6)), host, forward, drained)
        return found

    first = one()
    each = tuple(first if alike else one() for _ in range(regions))
    return Problem(each, rng.randrange(5), rng.randrange(5), rng.randrange(3), rng.randrange(4), 2.0)


def everything(p: Problem, host: int) -> list[tuple[str, ...]]:
    return [c for c in itertools.product(*p.regions) if p.host(c) <= host]


@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_the_search_is_exact(seed: int, alike: bool) -> None:
    p = problem(seed, alike=alike)
    for host in (0, 7, 30):
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
    one = {KEEP: Choice(kept=4, held=5, forward=9)}
    assert Problem((one, one), before=10).peak([KEEP, KEEP]) == 10 + 4 + 9


def test_what_is_on_its_way_is_on_the_device() -> None:
    """A copy of the region before, at least; and all that the link has not copied yet, up to the last piece of it."""
    away = {KEEP: Choice(0, 20, 0.0, 0, 20, 4), ALL_OFFLOADED: Choice(0, 20, 0.0, host=10, forward=20, drained=4)}
    quick = {level: replace(c, drained=math.inf) for level, c in away.items()}
    p = Problem((quick,) * 3, after=1, piece=3)
    assert p.peak([ALL_OFFLOADED, KEEP, KEEP]) == 20 + 10
    assert p.peak([KEEP, KEEP, ALL_OFFLOADED]) == 20
    assert replace(p, after=15).peak([KEEP, KEEP, ALL_OFFLOADED]) == 15 + 10
    p = Problem((away,) * 4, after=1, piece=3)
    assert p.peak([ALL_OFFLOADED, KEEP, KEEP, KEEP]) == 20 + 10  # 6 are left to copy then
    assert p.peak([ALL_OFFLOADED, ALL_OFFLOADED, KEEP, KEEP]) == 20 + (6 + 6 + 3)
    assert p.peak([ALL_OFFLOADED] * 3 + [KEEP]) == 20 + (6 + 6 + 6 + 3)
    held = {level: replace(c, forward=0) for level, c in away.items()}  # what comes back comes in time
    assert replace(p, regions=(held,) * 4).peak([ALL_OFFLOADED] * 4) == 20 + 10 > 6 * 4 + 3 + 1
    assert replace(p, regions=(held,) * 4, after=5).peak([ALL_OFFLOADED] * 4) == 6 * 4 + 3 + 5


def test_what_is_left_to_copy_after_the_loss_takes_time() -> None:
    """The link is never ahead: a region that copies nothing does not make room for later ones."""
    away = {KEEP: Choice(0, 0, 1.0, 0, 0, 4), ALL_OFFLOADED: Choice(0, 0, 2.0, host=10, drained=4)}
    p = Problem((away,) * 3, link=2.0, drained=0)
    assert p.seconds([KEEP] * 3) == 3
    assert p.seconds([ALL_OFFLOADED, KEEP, KEEP]) == 4
    assert p.seconds([KEEP, KEEP, ALL_OFFLOADED]) == 4 + 6 / 2
    assert p.seconds([ALL_OFFLOADED] * 3) == 6 + 18 / 2
    assert replace(p, drained=17).seconds([ALL_OFFLOADED] * 3) == 6 + 1 / 2
    assert replace(p, drained=math.inf).seconds([ALL_OFFLOADED] * 3) == 6


@pytest.mark.parametrize(
    ("copies", "drained", "landed"),
    [
        ([(0, 4), (1, 4)], [10, 10, 10], [1, 2]),  # quick: the end of the next region
        ([(0, 4), (1, 4)], [10, 10], [1, 2]),  # the last region's, with the loss
        ([(0, 6), (0, 6)], [4, 4, 4, 4], [1, 2]),
        ([(0, 6), (1, 6), (1, 5)], [4, 4, 4, 4], [1, 2, 4]),
        ([(0, 6), (1, 6), (1, 4)], [4, 4, 4, 4], [1, 2, 3]),
        ([(0, 1), (1, 5)], [4, 4, 4, 4], [1, 2]),
        ([(0, 1), (1, 8)], [4, 4, 4, 4], [1, 2]),  # what was not used in the first region is no help later
        ([(0, 1), (1, 9)], [4, 4, 4, 4], [1, 3]),
        ([(2, 9)], [4, 4, 4, 4], [4]),
        ([], [4], []),
    ],
)
def test_where_copies_land(copies: list[tuple[int, int]], drained: list[float], landed: list[int]) -> None:
    assert landings(copies, drained) == landed


@pytest.mark.parametrize("seed", range(20))
def test_no_more_is_on_its_way_than_the_formula_has(seed: int) -> None:
    """Tensors stay on the device until they land: with pieces of any size, the formula's bytes are enough."""
    rng = random.Random(seed)
    regions = [[rng.randrange(1, 9) for _ in range(rng.randrange(4))] for _ in range(12)]
    drained = [rng.randrange(12) for _ in regions]
    copies = [(r, number) for r, each in enumerate(regions) for number in each]
    landed = landings(copies, drained)
    p = Problem((), piece=max(number for _, number in copies))
    behind = 0.0
    for r, each in enumerate(regions):
        behind = planner._behind(behind, sum(each), drained[r])
        there = sum(number for (of, number), at in zip(copies, landed, strict=True) if of <= r < at)
        assert there <= p.late(sum(each), behind)


def test_later_layers_keep_more() -> None:
    """A layer whose backward comes first frees what it kept first."""
    each = {KEEP: Choice(kept=10, held=12, seconds=0), ALL: Choice(kept=1, held=12, seconds=1)}
    p = Problem((each,) * 4, after=0)
    assert fastest(p, 3 + 12) == [ALL, ALL, ALL, KEEP]
    assert fastest(p, 3 + 11) is None


#: A layer of Llama-3.1-8B, NF4, with 4 x 2,048 tokens on an H100: as it was measured by the graph's walk.
LAYER = {
    KEEP: Choice(1145634816, 1773330428, 0.0, 0, 1195958264, 274565678.0),
    CHEAP: Choice(776470528, 1639047164, 0.000381, 0, 1061675000, 274565678.0),
    MLP: Choice(305135616, 1280073724, 0.002725, 0, 867557368, 262884262.0),
    MLP_OFFLOADED: Choice(0, 1280073724, 0.002725, 305135616, 867557368, 262884262.0),
    ATTENTION: Choice(135266304, 1177837564, 0.003718, 0, 764796920, 262884262.0),
    ALL: Choice(67108864, 1347215356, 0.003901, 0, 696639480, 262884262.0),
    ALL_OFFLOADED: Choice(0, 1347215356, 0.003901, 67108864, 696639480, 262884262.0),
}


def deep(layers: int = 32) -> Problem:
    return Problem((LAYER,) * layers, 6340954252, 592535544, 67108864, 1149861508.0, 50e9)


@pytest.mark.parametrize("host", [4 * 10**9, 10**11])
def test_a_deep_model_is_quick(host: int) -> None:
    """Of 32 layers; and a larger budget or more host memory is no slower step."""
    p, before = deep(), math.inf
    begun = time.process_time()
    lean = leanest(p, host)
    for budget in (p.peak(lean), 8 * planner.GIB, 12 * planner.GIB, 16 * planner.GIB, 24 * planner.GIB):
        levels = fastest(p, budget, host)
        assert levels is not None and p.peak(levels) <= budget and p.host(levels) <= host
        assert p.seconds(levels) <= before
        before = p.seconds(levels)
    assert time.process_time() - begun < 10  # two seconds; minutes without the grid
    assert p.peak(lean) < p.peak(leanest(p))


def test_a_budget_is_used_to_the_byte() -> None:
    """Also where states differ by less than a cell of the grid."""
    each = {KEEP: Choice(103, 103, 0.0), ALL: Choice(102, 102, 1.0)}
    p = Problem((each,) * 20)
    assert 20 * 102 // planner.CELLS > 1
    assert fastest(p, 20 * 102) == [ALL] * 20
    assert fastest(p, 20 * 102 - 1) is None


def test_a_deep_model_uses_the_link_all_the_time() -> None:
    """A plan with an allowance over the smallest peak offloads what the link copies in the forward, and more."""
    p = deep()
    smallest = p.peak(leanest(p, 10**11))
    levels = fastest(p, int(1.1 * smallest), 10**11)
    assert levels is not None and p.peak(levels) <= 1.1 * smallest
    assert p.host(levels) >= 0.98 * 32 * LAYER[MLP].drained
    assert levels.count(MLP_OFFLOADED) >= 26
    assert p.seconds(levels) < 0.75 * p.seconds([ALL_OFFLOADED] * 32)
    assert p.seconds(levels) < p.seconds([MLP_OFFLOADED] * 32)  # which would wait for the link


def test_what_the_report_says() -> None:
    assert said([KEEP, ALL, KEEP]) == "keep everything in 2 layers, recompute everything in 1"
    assert said([CHEAP]) == "recompute cheap ops in 1 layer"
    assert set(planner.SAID) == set(planner.LEVELS)
