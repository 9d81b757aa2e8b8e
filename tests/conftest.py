"""How many cases hypothesis makes up, and what the end of a run says besides pytest's own: how many mutants were
killed, how many cases were made up, and what they reached.
"""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from fastft.kernels import _config, _op
from fastft.kernels._op import INTERPRET

# "short" runs the same cases each time, --hypothesis-profile long new ones. Triton interpreted is slow, and on a GPU
# most cases have sizes of their own and compile kernels of their own (about a second each).
_COMPILES = INTERPRET or torch.cuda.is_available()
_ANY: dict[str, Any] = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
_ANY["phases"] = [Phase.explicit, Phase.generate]
settings.register_profile("short", max_examples=24 if _COMPILES else 240, derandomize=True, **_ANY)
settings.register_profile("long", max_examples=500 if _COMPILES else 3_000, **_ANY)
settings.load_profile("short")
# Hypothesis draws from the constants in our files too, of those that are imported: which depends on the tests that ran
# before in the same process, and the same cases would be others.
with contextlib.suppress(ImportError, AttributeError):
    from hypothesis.internal.conjecture import providers

    providers._get_local_constants  # noqa: B018  (older versions have none)
    providers._get_local_constants = type(providers.GLOBAL_CONSTANTS)
# Dynamo empties the processor's cache to time each graph's guards, for its log: a fifth of the time of a small graph.
with contextlib.suppress(ImportError, AttributeError):
    from torch._dynamo import guards

    guards.profile_guard_manager  # noqa: B018  (older versions have none)
    guards.profile_guard_manager = lambda *_: 0.0


def pytest_collection_finish() -> None:
    gc.set_threshold(100_000, 10, 10)


@pytest.fixture(scope="module", autouse=True)
def left_behind() -> None:
    """What is imported stays, and what earlier files left in PyTorch's caches: the collector need not look at it again
    and again, which each trainer that begins makes it do.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def kernels_run() -> Iterator[None]:
    """No kernel fails unseen, and no look-up: training would go on with PyTorch, or the heuristic, in its place."""
    _op.rescue(False)
    before = dict(_op.FAILED), dict(_config.FAILED)
    yield
    assert before == (_op.FAILED, _config.FAILED)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for found in terminalreporter.stats.values() for r in found if getattr(r, "when", "") == "call"]
    properties = [(name, value) for r in reports for name, value in r.user_properties]
    fates = [value for name, value in properties if name == "mutant"]
    counts = [value for name, value in properties if name == "fuzz"]
    graphs = sum((Counter(value) for name, value in properties if name == "graphs"), Counter())
    if fates:
        terminalreporter.write_line(f"mutants: {sum(fates)} of {len(fates)} killed ({sum(fates) / len(fates):.0%})")
    if counts:
        terminalreporter.write_line(f"fuzz: {sum(counts):,} cases in {len(counts)} tests")
    if graphs:
        cases = graphs.pop("cases")
        reached = ", ".join(f"{name} {times:,}" for name, times in graphs.most_common())
        terminalreporter.write_line(f"graph fuzz: {cases:,} networks; replaced in {reached}")
