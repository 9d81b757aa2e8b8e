"""``--shapes-tag``, and the table that ends ``pytest bench/kernels.py``."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shapes-tag", default=None, help="shapes with this tag (default: primary on a GPU, test on a CPU)"
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows = [
        value
        for report in terminalreporter.getreports("passed")
        for key, value in getattr(report, "user_properties", [])
        if key == "times"
    ]
    if not rows:
        return
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    table = Table(title="µs forward / forward and backward; (…): GB/s or TFLOP/s of the forward", title_justify="left")
    table.add_column("case")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["label"], *(_cell(row["times"].get(name)) for name in names))
    Console(width=150).print(table)


def _cell(times: dict[str, Any] | None) -> str:
    if times is None:
        return ""
    if "error" in times:
        return times["error"].split(":")[0]
    both = f" / {times['both_us']:.0f}" if "both_us" in times else ""
    rate = (
        f"{times['forward_TFLOPps']:.0f} T" if "forward_TFLOPps" in times else f"{times.get('forward_GBps', 0):.0f} G"
    )
    return f"{times['forward_us']:.0f}{both} ({rate})"
