"""One training step, eager or compiled, and the error rule over the loss and every gradient."""

from __future__ import annotations

import math
from typing import Any

import torch

import fastft
from fastft import reporting
from fastft.compare import relative_error, rounding

Gradients = dict[str, torch.Tensor]
Step = tuple[torch.Tensor, Gradients]


def step(model: torch.nn.Module, batch: dict[str, Any], seed: int = 0, call: Any = None) -> Step:
    """Loss and gradients of one step from a fixed random state (dropout)."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = (model if call is None else call)(**batch).loss
    loss.backward()
    return loss.detach(), {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}


def compiled(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    """The model through fastft, reports forgotten; residual ops run eagerly unless told otherwise."""
    torch._dynamo.reset()
    reporting.reset()
    return torch.compile(model, backend="fastft", options={"residual": "eager", "strict": True, **options})  # type: ignore[return-value]


def compiled_step(
    model: torch.nn.Module, batch: dict[str, Any], seed: int = 0, **options: Any
) -> tuple[torch.Tensor, Gradients, fastft.Report]:
    """Loss, gradients and report of one compiled step."""
    loss, grads = step(model, batch, seed, compiled(model, **options))
    return loss, grads, fastft.report()


def check_equal(ours: Step, eager: Step, relative: float = 1e-5) -> None:
    """Loss and every gradient within ``relative`` of eager's: for fp32 models."""
    assert ours[1].keys() == eager[1].keys()
    errors = {"loss": relative_error(ours[0], eager[0])} | {
        n: relative_error(g, eager[1][n]) for n, g in ours[1].items()
    }
    wrong = [
        f"{n}: {error:.2e} from eager, allowed {relative:.0e}" for n, error in errors.items() if not error <= relative
    ]
    assert not wrong, "\n".join(wrong)


def check_rule(ours: list[Step], eager: list[Step], exact: list[Step], *, tokens: int = 1) -> None:
    """The error rule for the loss and every gradient, over several batches.

    Errors are root mean squares over the batches: in a tiny model a single batch's error is a handful of roundings, as
    eager's is, and a ratio of two such draws says little. A loss is one number, a mean over ``tokens`` losses that
    each carry a rounding in the gradients' dtype: that over √tokens is its rounding term.
    """
    names = ["loss", *eager[0][1]]
    assert all(run[1].keys() == eager[0][1].keys() for run in ours)
    dtype = next(iter(eager[0][1].values())).dtype

    def rms(runs: list[Step], name: str) -> float:
        pick = (lambda run: run[0]) if name == "loss" else (lambda run: run[1][name])
        return math.sqrt(
            sum(relative_error(pick(run), pick(true)) ** 2 for run, true in zip(runs, exact, strict=True)) / len(runs)
        )

    wrong = []
    for name in names:
        error, torch_error = rms(ours, name), rms(eager, name)
        bound = 2 * torch_error + rounding(dtype) / (math.sqrt(tokens) if name == "loss" else 1)
        if not error <= bound:
            wrong.append(f"{name}: error {error:.3e}, PyTorch {torch_error:.3e}, bound {bound:.3e}")
    assert not wrong, "\n".join(wrong)
