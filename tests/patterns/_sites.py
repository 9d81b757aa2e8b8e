"""Run a function of tensors through the rules alone, and hold what the rewritten graph computes to the error rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastft import _torch_compat as compat
from fastft.compare import assert_within
from fastft.judging import Wide, widened
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


def _widened(x: Any) -> Any:
    """Floating-point tensors in fp64, complex ones in two of it."""
    if not isinstance(x, torch.Tensor) or not (x.is_floating_point() or x.is_complex()):
        return x
    return widened(x, torch.complex128 if x.is_complex() else torch.float64)


def exactly(fn: Callable[..., Any], *args: Any) -> tuple[Any, tuple[Any, ...]]:
    """What ``fn(*args)`` means, with fp64 in place of every narrower dtype that it names; and the arguments in fp64."""
    wide = tuple(_widened(a) for a in args)
    with Wide(torch.float64, torch.float32):
        return fn(*wide), wide


def _values(
    outputs: Any, args: tuple[Any, ...], grads: list[torch.Tensor] | None = None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, then the gradient of every argument that requires one; and the outputs' gradients (drawn, if none are
    given).
    """
    values = list(outputs) if isinstance(outputs, tuple) else [outputs]
    leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    if grads is None:
        grads = [torch.randn_like(t) for t in values]
    if leaves:
        given = [g.to(t.dtype) for g, t in zip(grads, values, strict=True)]
        values += torch.autograd.grad(values, leaves, given)
    return values, grads


def check_site(
    fn: Callable[..., Any], *args: Any, counts: dict[str, int], exact: Callable[..., Any] | None = None
) -> torch.fx.GraphModule:
    """These sites and no others are replaced; outputs and gradients keep the error rule, beside ``fn``'s own.

    ``exact``: ``fn`` for fp64 arguments, where it calls code that has none in fp64. Else ``fn`` itself, with fp64 in
    place of every narrower dtype that it names.
    """
    result, report, graph = rewritten(fn, *args)
    assert report.counts == counts, str(report)
    assert not report.missed, str(report)
    same, grads = _values(fn(*args), args)
    ours, _ = _values(result, args, grads)
    if exact is None:
        outputs, wide = exactly(fn, *args)
    else:
        wide = tuple(_widened(a) for a in args)
        outputs = exact(*wide)
    true, _ = _values(outputs, wide, grads)
    length = max(n for t in (*args, *same) if isinstance(t, torch.Tensor) for n in (1, *t.shape))
    for i, (a, s, e) in enumerate(zip(ours, same, true, strict=True)):
        assert (a.dtype, a.shape) == (s.dtype, s.shape)
        assert_within(f"value {i}", a, s, e, length=length)
    return graph
