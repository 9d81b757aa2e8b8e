from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import _COMPILER_FNS

from fastft import compiler, reporting


class Calls:
    """How often compiled graphs were called."""

    def __init__(self) -> None:
        self.count = 0

    def backend(self, gm: torch.fx.GraphModule, example_inputs: Any, **kwargs: Any) -> Any:
        """fastft, but what it does not replace runs in eager (Inductor would take half a minute on two cores), and an
        error of its own is an error."""
        options = {"residual": "eager", "strict": True, **kwargs.pop("options", {})}
        compiled = compiler.fastft(gm, example_inputs, options=options, **kwargs)

        @functools.wraps(compiled)
        def counted(*args: Any) -> Any:
            self.count += 1
            return compiled(*args)

        return counted


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing left of what other tests compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reporting.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def calls(fresh: None, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """fastft under its own name, with a count of calls, and nothing left of what other tests compiled."""
    counting = Calls()
    monkeypatch.setitem(_COMPILER_FNS, "fastft", counting.backend)
    return counting
