"""The ordinary tests notice every mistake of the list: each mutant must be killed by a failing test."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import fastft.kernels
from fastft import bridges
from fastft.patterns import tables
from tests.mutation import _inject
from tests.mutation.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
TESTS_FAILED = 1  # pytest's exit code; others mean that no test ran to its end


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_is_killed(mutant: Mutant, record_property: pytest.RecordProperty) -> None:
    command = [sys.executable, _inject.__file__, mutant.file, mutant.old, mutant.new, *shlex.split(mutant.tests)]
    environment = {**os.environ, "TRITON_INTERPRET": str(int(mutant.interpret)), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    killed = run.returncode == TESTS_FAILED
    record_property("mutant", killed)
    why = {0: "SURVIVED: its tests pass", _inject.STALE: "stale", _inject.NOT_IMPORTED: "its module was never imported"}
    said = why.get(run.returncode, f"pytest ended with {run.returncode}")
    assert killed, f"{mutant.name} ({mutant.file}): {said}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"


def test_the_list_is_current() -> None:
    for mutant in MUTANTS:
        source = (ROOT / mutant.file).read_text(encoding="utf-8")
        assert source.count(mutant.old) == 1, f"{mutant.name}: its line is {source.count(mutant.old)} times in its file"
        assert mutant.old != mutant.new
        assert (ROOT / mutant.tests.split()[0].partition("::")[0]).exists(), mutant.tests
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 40


def test_everything_has_mutants() -> None:
    """A new kernel, table of rules or bridge brings its own."""
    files = {m.file for m in MUTANTS}
    kernels = {f"kernels/{op.call.__module__.rpartition('.')[2]}.py" for op in fastft.kernels.load().values()}
    rules = {f"patterns/{Path(rule.where.partition(':')[0]).name}" for table in tables() for rule in table.rows}
    laid = {f"backend/bridges/{spec.name}.py" for spec in bridges.TABLE}
    assert not (kernels | rules | laid) - files
