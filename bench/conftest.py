"""Options of ``pytest bench/kernels.py``, its result file, and the tables that end it."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from bench import files
from bench.shapes import SHAPES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastft bench kernels")
    group.addoption(
        "--shapes-tag", default=None, help="shapes with this tag (default: primary on a GPU, test on a CPU)"
    )
    group.addoption("--result", type=Path, default=None, help="JSON file, written anew after every case")
    group.addoption("--budget", type=float, default=None, help="seconds: cases that have not begun by then are skipped")
    group.addoption("--rounds", type=int, default=None, help="samples of each implementation, at least (default 7)")
    group.addoption(
        "--profile",
        action="store_true",
        dest="profile_kernels",
        help="one more sample of each under the profiler: its kernels in the result file, the longest in a table",
    )
    group.addoption(
        "--empty-caches",
        action="store_true",
        help="begin with empty Triton and Inductor caches: first calls are then cold ones",
    )


def pytest_configure(config: pytest.Config) -> None:
    tags = sorted({tag for shape in SHAPES for tag in shape.tags})
    asked = config.getoption("--shapes-tag")
    if asked is not None and asked not in tags:
        raise pytest.UsageError(f"--shapes-tag is {asked!r}; it is one of {', '.join(tags)}")
    rounds = config.getoption("--rounds")
    if rounds is not None and rounds < 1:
        raise pytest.UsageError(f"--rounds is {rounds}: a median is of 1 sample or more")
    if config.getoption("--empty-caches"):
        caches = config.stash[CACHES] = tempfile.TemporaryDirectory(prefix="fastft-bench-")
        os.environ["TRITON_CACHE_DIR"] = f"{caches.name}/triton"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{caches.name}/inductor"
    config.stash[RECORDER] = Recorder(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    if CACHES in config.stash:
        config.stash[CACHES].cleanup()


class Recorder:
    """The result file of this run, as it grows."""

    def __init__(self, config: pytest.Config) -> None:
        self.path = config.getoption("--result")
        budget = config.getoption("--budget")
        self.deadline = None if budget is None else time.monotonic() + budget
        self.arguments = ["pytest", *map(str, config.invocation_params.args)]
        self.profile = config.getoption("profile_kernels")
        self.rounds = config.getoption("--rounds")
        self.caches = "empty at the start" if config.getoption("--empty-caches") else "as found"
        self.rows: list[dict[str, Any]] = []
        self.result: dict[str, Any] | None = None

    def in_time(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            pytest.skip("not started: the time of this run (--budget) is used up")

    def _head(self) -> dict[str, Any]:
        if self.result is None:
            from bench import measure

            self.result = {
                **files.head("kernels", self.arguments),
                "caches": self.caches,
                "ceilings": measure.ceilings(),
                "missing": {},
                "rows": self.rows,
            }
        return self.result

    def ceilings(self) -> dict[str, float] | None:
        """The device's, measured once in a run."""
        return self._head()["ceilings"]

    def add(self, row: dict[str, Any]) -> None:
        from bench import specialists

        result = self._head()
        self.rows.append(row)
        result["missing"] = dict(specialists.MISSING)
        if self.path is not None:
            files.write(result, self.path)


CACHES = pytest.StashKey[Any]()
RECORDER = pytest.StashKey[Recorder]()


@pytest.fixture(scope="session")
def recorder(pytestconfig: pytest.Config) -> Recorder:
    return pytestconfig.stash[RECORDER]


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """What a row means stands in pytest-benchmark's file too: ``fastft bench`` reads either."""
    recorder = config.stash[RECORDER]
    if recorder.result is not None:
        output_json["fastft"] = {k: v for k, v in recorder.result.items() if k != "rows"}


def pytest_terminal_summary(config: pytest.Config) -> None:
    result = config.stash[RECORDER].result
    if result is None or not result["rows"]:
        return
    from rich.console import Console

    from bench.tables import kernel_tables

    console = Console(width=170)
    for table in kernel_tables(result):
        console.print(table.rich())
