"""What the end of a run says besides pytest's own: how many mutants were killed, how many cases were made up."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [r for found in terminalreporter.stats.values() for r in found if getattr(r, "when", "") == "call"]
    properties = [(name, value) for r in reports for name, value in r.user_properties]
    fates = [value for name, value in properties if name == "mutant"]
    counts = [value for name, value in properties if name == "fuzz"]
    if fates:
        terminalreporter.write_line(f"mutants: {sum(fates)} of {len(fates)} killed ({sum(fates) / len(fates):.0%})")
    if counts:
        terminalreporter.write_line(f"fuzz: {sum(counts):,} cases of {len(counts)} ops")
