"""``fastft.explain``: capture and match, without compiling or training."""

from __future__ import annotations

import copy
from typing import Any

import torch

from fastft import reporting
from fastft.options import Options
from fastft.reporting import Report


def explain(model: torch.nn.Module, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Say what fastft would do with ``model(*args, **kwargs)``: every site replaced or left, and why, graph breaks,
    bridges.

    The model runs once, op by op, as it would in training (in the grad and train mode it is in); nothing is compiled,
    no gradient is taken, and the model is left as it was. What torch compiled in this process before is compiled
    again at its next call, as after ``torch._dynamo.explain``. ``options`` are those of the backend.
    """
    from fastft import bridges
    from fastft.compiler import transform
    from fastft.memory import plan_only

    asked = Options.of(options)
    merged = Report(bridges=bridges.rows())
    before = reporting.graph_breaks()

    def capture(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        untouched = torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))
        one = Report(graphs=1)
        transform(gm, asked, one)
        if asked.memory is not None:
            plan_only(gm, example_inputs, asked, one)
        merged.graphs += 1
        merged.parts.append(one)
        merged.sites += one.sites
        merged.errors += one.errors
        merged.merge_plan(one.plan)
        merged.memory += one.memory
        merged.timings = {k: merged.timings.get(k, 0.0) + v for k, v in one.timings.items()}
        return untouched.forward

    # What model.compile() put in place would call the backend it was given, not this one.
    in_place = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    torch._dynamo.reset()
    try:
        for module in in_place:
            module._compiled_call_impl = None
        torch.compile(model, backend=capture)(*args, **kwargs)
    finally:
        for module, call in in_place.items():
            module._compiled_call_impl = call
        torch._dynamo.reset()
    broken = reporting.graph_breaks() - before
    reporting.forget_breaks(broken)
    merged.break_reasons, merged.breaks = dict(broken), broken.total()
    return merged
