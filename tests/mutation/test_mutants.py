"""The ordinary tests notice every mistake of the list: each mutant must be killed by a failing test."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastft import bridges
from fastft.patterns import tables
from tests.kernels import _each
from tests.mutation import _inject, mutants
from tests.mutation._mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
#: Those of each op's own file, which stand in its tests, and then all others.
OF_KERNELS: dict[str, tuple[Mutant, ...]] = _each.tables("MUTANTS")
MUTANTS = (*(mutant for found in OF_KERNELS.values() for mutant in found), *mutants.MUTANTS)
TESTS_FAILED = 1  # pytest's exit code; others mean that no test ran to its end


@pytest.fixture(scope="module")
def server() -> Iterator[Callable[[bool], subprocess.Popen[str]]]:
    """A process that runs mutants, with or without Triton's interpreter; started when it is first asked for."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def started(interpret: bool) -> subprocess.Popen[str]:
            environment = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"}
            environment.pop("PYTEST_ADDOPTS", None)
            command, pipe = [sys.executable, _inject.__file__], subprocess.PIPE
            one = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdin=pipe, stdout=pipe)
            stack.enter_context(one)  # closes its standard input, and waits for it
            assert one.stdout is not None and json.loads(one.stdout.readline()) == "ready"
            return one

        yield started


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_is_killed(
    mutant: Mutant, server: Callable[[bool], subprocess.Popen[str]], record_property: pytest.RecordProperty
) -> None:
    one = server(mutant.interpret)
    assert one.stdin is not None and one.stdout is not None
    one.stdin.write(json.dumps([mutant.file, mutant.old, mutant.new, *shlex.split(mutant.tests)]) + "\n")
    one.stdin.flush()
    code, output = json.loads(one.stdout.readline())
    record_property("mutant", code == TESTS_FAILED)
    why = {0: "SURVIVED: its tests pass", _inject.STALE: "stale", _inject.NOT_IMPORTED: "its module was never imported"}
    said = why.get(code, f"pytest ended with {code}")
    assert code == TESTS_FAILED, f"{mutant.name} ({mutant.file}): {said}\n{output[-3000:]}"


def test_the_list_is_current() -> None:
    for mutant in MUTANTS:
        source = (ROOT / mutant.file).read_text(encoding="utf-8")
        assert source.count(mutant.old) == 1, f"{mutant.name}: its line is {source.count(mutant.old)} times in its file"
        assert mutant.old != mutant.new
        assert (ROOT / shlex.split(mutant.tests)[0].partition("::")[0]).exists(), mutant.tests
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 40


def test_everything_has_mutants() -> None:
    """A new kernel, table of rules or bridge brings its own."""
    for home in _each.homes():
        found = OF_KERNELS.get(home)
        assert found, f"{_each.own_tests(home)} has no MUTANTS"
        own = {f"kernels/{part.__name__.rpartition('.')[2]}.py" for part in _each.parts(home)}
        assert {m.file for m in found} <= own, f"{_each.own_tests(home)} has MUTANTS of other files"
    files = {m.file for m in mutants.MUTANTS}
    rules = {f"patterns/{Path(rule.where.partition(':')[0]).name}" for table in tables() for rule in table.rows}
    laid = {f"backend/bridges/{spec.name}.py" for spec in bridges.TABLE}
    assert not (missing := (rules | laid) - files), f"tests/mutation/mutants.py has none of {sorted(missing)}"
