"""``fastft.explain``: capture and match, without compiling or training."""

from __future__ import annotations

import copy
from typing import Any

import torch

from fastft._torch_compat import dynamo_counters
from fastft.options import Options
from fastft.reporting import Report


def explain(model: torch.nn.Module, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Say what fastft would do with ``model(*args, **kwargs)``: every site replaced or left, and why, graph breaks, bridges.

    The model runs once, op by op, as it would in training (in the grad and train mode it is in); nothing is compiled, no gradient is taken, and the
    model is left as it was. ``options`` are those of the backend.
    """
    from fastft import bridges
    from fastft.compiler import transform

    asked = Options.of(options)
    merged = Report(bridges=bridges.rows())
    before = dict(dynamo_counters().get("graph_break", {}))

    def capture(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        untouched = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))
        one = Report(graphs=1)
        transform(gm, asked, one)
        merged.graphs += 1
        merged.sites += one.sites
        merged.plan.update(one.plan)
        merged.timings = {k: merged.timings.get(k, 0.0) + v for k, v in one.timings.items()}
        return untouched.forward

    torch._dynamo.reset()
    try:
        torch.compile(model, backend=capture)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    after = dynamo_counters().get("graph_break", {})
    merged.break_reasons = {k: n - before.get(k, 0) for k, n in after.items() if n > before.get(k, 0)}
    merged.breaks = sum(merged.break_reasons.values())
    return merged
