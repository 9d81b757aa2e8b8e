"""What belongs to one op is found in its own tests, and an error says where it is not."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

import fastft.kernels
from fastft.kernels._op import OPS
from tests.kernels import _each


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two files with ops, of which the second one has no tests; gives what the tests of the first one have."""
    there = ModuleType("tests.kernels.test_here")
    there.__spec__ = _each.__spec__  # as an imported module has one
    monkeypatch.setitem(sys.modules, there.__name__, there)
    monkeypatch.setattr(_each, "homes", lambda: {"here": ["one", "two"], "nowhere": ["three"]})
    return vars(there)


def test_every_op_has_a_home() -> None:
    ops = [name for names in _each.homes().values() for name in names]
    assert sorted(ops) == sorted(fastft.kernels.load())
    for home, names in _each.homes().items():
        assert all(_each.kernels(home).__name__ == OPS[name].call.__module__ for name in names)


def test_the_order_is_not_that_of_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    before = list(_each.homes())
    backwards = dict(reversed(OPS.items()))
    monkeypatch.setattr(fastft.kernels, "load", lambda: backwards)
    assert list(_each.homes()) == before == sorted(before)


def test_tables_are_those_that_pytest_runs(request: pytest.FixtureRequest) -> None:
    """A second copy of a file of tests would have classes of its own."""
    for item in request.session.items:
        home = item.module.__name__.removeprefix("tests.kernels.test_")  # type: ignore[attr-defined]
        if home in _each.homes():
            assert _each.table(home, "SAMPLES") is item.module.SAMPLES  # type: ignore[attr-defined]


def test_a_table_that_is_missing(ops: dict[str, Any]) -> None:
    with pytest.raises(LookupError, match=r"^tests/kernels/test_here.py has no FUZZ for one$"):
        _each.collected("FUZZ")
    assert _each.tables("FUZZ") == {}


def test_an_op_that_is_missing(ops: dict[str, Any]) -> None:
    ops["FUZZ"] = {"one": 1}
    with pytest.raises(LookupError, match=r"^tests/kernels/test_here.py has no FUZZ for two$"):
        _each.collected("FUZZ")


def test_a_file_that_is_missing(ops: dict[str, Any]) -> None:
    ops["FUZZ"] = {"one": 1, "two": 2}
    with pytest.raises(LookupError, match=r"^tests/kernels/test_nowhere.py has no FUZZ for three$"):
        _each.collected("FUZZ")
    assert _each.tables("FUZZ") == {"here": ops["FUZZ"]}


def test_an_op_of_another_file(ops: dict[str, Any]) -> None:
    ops["FUZZ"] = {"one": 1, "two": 2, "three": 3}
    with pytest.raises(LookupError, match=r"^tests/kernels/test_here.py has FUZZ for three, no op of that file$"):
        _each.collected("FUZZ")


def test_all_that_is_there(ops: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ops["FUZZ"] = {"two": 2, "one": 1}
    monkeypatch.setattr(_each, "homes", lambda: {"here": ["one", "two"]})
    assert list(_each.collected("FUZZ").items()) == [("one", 1), ("two", 2)]


def test_samples_say_where_they_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    op = next(iter(OPS.values()))
    monkeypatch.setattr(_each, "table", lambda home, name: {})
    with pytest.raises(LookupError, match=rf"^{_each.own_tests(_each.home_of(op))} has no SAMPLES for {op.name}$"):
        _each.entry(op, "SAMPLES")
