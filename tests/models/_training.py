"""One training step, eager or compiled, and the error rule over the loss and every gradient."""

from __future__ import annotations

import math
from typing import Any

import torch

import fastft
from fastft import reporting
from fastft.compare import compare, relative_error, rounding


def step(model: torch.nn.Module, batch: dict[str, Any], seed: int = 0, call: Any = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one step from a fixed random state (dropout)."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = (model if call is None else call)(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def compiled_step(model: torch.nn.Module, batch: dict[str, Any], seed: int = 0, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], fastft.Report]:
    """The same through fastft; residual ops run eagerly unless told otherwise. Also the report."""
    torch._dynamo.reset()
    reporting.reset()
    options = {"residual": "eager", "strict": True, **options}
    call = torch.compile(model, backend="fastft", options=options)
    loss, grads = step(model, batch, seed, call)
    return loss, grads, fastft.report()


def check(ours: Any, eager: Any, exact: Any, *, relative: float | None = None, tokens: int = 1) -> None:
    """Loss and every gradient of ``ours`` by the error rule, or (fp32 models) within ``relative`` of eager's.

    A loss is one number, and eager's own error in it can be zero by luck. It is a mean over ``tokens`` losses that each carry a rounding in the
    gradients' dtype: that over √tokens is its rounding term.
    """
    assert ours[1].keys() == eager[1].keys()
    wrong: list[str] = []
    for name, got, same, true in [("loss", ours[0], eager[0], exact[0]), *((n, ours[1][n], eager[1][n], exact[1][n]) for n in eager[1])]:
        if relative is not None:
            error = relative_error(got, same)
            if not error <= relative:
                wrong.append(f"{name}: {error:.2e} from eager, allowed {relative:.0e}")
            continue
        result = compare(name, got, same, true)
        slack = rounding(next(iter(eager[1].values())).dtype) / math.sqrt(tokens) if name == "loss" else 0.0
        if not result.error <= result.bound + slack:
            wrong.append(str(result))
    assert not wrong, "\n".join(wrong)
