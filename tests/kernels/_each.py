"""What belongs to one op stands in one file of tests: that of ``kernels/glu.py`` is ``test_glu.py``, with tables at its
end. The tests that go over all ops find them here.

Test files take their machinery from the modules with an underscore, and are imported only when a table is asked for:
the two would be a circle otherwise.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import fastft.kernels
from fastft.kernels._config import parts_of
from fastft.kernels._op import Op


def home_of(op: Op) -> str:
    """The name of the file that an op stands in: ``glu``, for ``glu_packed`` too."""
    return op.call.__module__.rpartition(".")[2]


def homes() -> dict[str, list[str]]:
    """The names of the ops in each file, sorted by file."""
    found: dict[str, list[str]] = {}
    for op in fastft.kernels.load().values():
        found.setdefault(home_of(op), []).append(op.name)
    return dict(sorted(found.items()))


def kernels(home: str) -> ModuleType:
    """The file itself, as a module."""
    return importlib.import_module(f"fastft.kernels.{home}")


def parts(home: str) -> list[ModuleType]:
    """The file, and those that it is divided into, as modules."""
    file = Path(str(kernels(home).__file__))
    return [importlib.import_module(f"fastft.kernels.{part.stem}") for part in parts_of(file)]


def own_tests(home: str) -> str:
    """The path of its tests."""
    return f"tests/kernels/test_{home}.py"


def table(home: str, name: str) -> Any:
    """What a file's tests have under a name; None where they have nothing, and where there are none."""
    module = f"{__package__}.test_{home}"
    return getattr(importlib.import_module(module), name, None) if importlib.util.find_spec(module) else None


def tables(name: str) -> dict[str, Any]:
    """The tables of a name, by file; without the files that have none."""
    return {home: found for home in homes() if (found := table(home, name)) is not None}


def collected(name: str) -> dict[str, Any]:
    """The tables of a name in one, by op: every op must be in its own file's, and nothing else."""
    out: dict[str, Any] = {}
    for home, ops in homes().items():
        out |= {op: _entry(home, op, name) for op in ops}
        if others := (table(home, name) or {}).keys() - set(ops):
            raise LookupError(f"{own_tests(home)} has {name} for {', '.join(sorted(others))}, no op of that file")
    return out


def entry(op: Op, name: str) -> Any:
    """What an op has in the table of its own file's tests."""
    return _entry(home_of(op), op.name, name)


def _entry(home: str, op: str, name: str) -> Any:
    found = table(home, name) or {}
    if op not in found:
        raise LookupError(f"{own_tests(home)} has no {name} for {op}")
    return found[op]
