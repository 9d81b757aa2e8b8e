"""Run a function of tensors through the rules alone, and compare what the rewritten graph computes with the function
itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastft import _torch_compat as compat
from fastft.normalise import normalise
from fastft.options import Options
from fastft.reporting import Report
from fastft.rewrite import rewrite


def rewritten(fn: Callable[..., Any], *args: Any, **options: Any) -> tuple[Any, Report, torch.fx.GraphModule]:
    """``fn(*args)`` captured as one graph and rewritten: its result as the rewritten graph computes it, the report, the
    graph."""
    graphs: list[torch.fx.GraphModule] = []
    report = Report(graphs=1)

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        normalise(gm)
        report.sites = rewrite(gm, Options.of(options), compat.fake_mode_of(gm)).sites
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    result = torch.compile(fn, backend=backend, fullgraph=True)(*args)
    torch._dynamo.reset()
    assert len(graphs) == 1
    return result, report, graphs[0]


def check_site(
    fn: Callable[..., Any], *args: Any, counts: dict[str, int], tolerance: float = 1e-5
) -> torch.fx.GraphModule:
    """These sites and no others are replaced, and result and gradients are as ``fn``'s own, relative to their norm."""
    result, report, graph = rewritten(fn, *args)
    assert report.counts == counts, str(report)
    assert not report.missed, str(report)
    expected = fn(*args)
    ours, theirs = (r if isinstance(r, tuple) else (r,) for r in (result, expected))
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    if leaves:
        grads = [torch.randn_like(t) for t in theirs]
        ours = (*ours, *torch.autograd.grad(ours, leaves, grads))
        theirs = (*theirs, *torch.autograd.grad(theirs, leaves, grads))
    for a, e in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (e.dtype, e.shape)
        error = (a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)
        assert error <= tolerance, f"relative error {error:.2e}"
    return graph
