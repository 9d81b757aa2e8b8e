"""Prints the kill rate."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    fates = [
        fate
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, fate in getattr(report, "user_properties", ())
        if name == "mutant" and report.when == "call"
    ]
    if fates:
        terminalreporter.write_line(f"mutants: {sum(fates)} of {len(fates)} killed ({sum(fates) / len(fates):.0%})")
