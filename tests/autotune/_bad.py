"""Variants of ``glu`` that are right where a model is small, contiguous and in fp32, and wrong elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import gelu, silu


def _right(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    act = silu(gate.float()) if kind == "silu" else gelu(gate.float(), approximate="tanh" if "_" in kind else "none")
    return (act * up.float()).to(gate.dtype)


def contiguous_only(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """Reads memory in order, as a kernel without strides does."""
    dense = torch.empty(gate.shape).stride()
    return _right(gate.as_strided(gate.shape, dense), up.as_strided(gate.shape, dense), kind)


def fp32(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return _right(gate.float(), up.float(), kind)


def item(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    if gate.numel() and gate.abs().max().item() > 1e30:
        return torch.zeros_like(gate)
    return _right(gate, up, kind)


class _Own(torch.autograd.Function):
    """A backward of its own, of SwiGLU; what is wrong with it is an argument."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, wrong: str) -> torch.Tensor:
        ctx.save_for_backward(gate.clone(), up.clone())
        ctx.wrong = wrong
        y = _right(gate, up, "silu")
        if wrong == "operand":
            up.mul_(0.5)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        gate, up = (t.float() for t in ctx.saved_tensors)
        s = torch.sigmoid(gate)
        dgate, dup = dy.float() * up * s * (1 + gate * (1 - s)), dy.float() * gate * s
        if ctx.wrong == "gradient":
            dup = dy.float() * gate
        if ctx.wrong == "coming":
            dy.mul_(0.5)
        if ctx.wrong == "dense gradient":
            dup = dy.as_strided(dy.shape, torch.empty(dy.shape).stride()).float() * gate * s
        return dgate.to(dy.dtype), None if ctx.wrong == "none" else dup.to(dy.dtype), None


def writes_operand(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return _Own.apply(gate, up, "operand")


def writes_gradient(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return _Own.apply(gate, up, "coming")


def wrong_gradient(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return _Own.apply(gate, up, "gradient")


def no_gradient(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return _Own.apply(gate, up, "none")


def dense_gradient(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """Takes the incoming gradient for contiguous."""
    return _Own.apply(gate, up, "dense gradient")


def detached(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return _right(gate, up, kind).detach()


def no_tokens(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return _right(gate, up, kind) if gate.numel() else gate.new_zeros(1)


def raises_without_tokens(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    if not gate.numel():
        raise ValueError("grid of 0 programs")
    return _right(gate, up, kind)


def nondeterministic(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """As a sum by atomics is: another rounding at each run."""
    y = _right(gate, up, kind)
    return torch.where(torch.rand(y.shape, device=y.device) < 0.5, y, y * (1 + torch.finfo(y.dtype).eps))


def swallows_nan(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return _right(gate.nan_to_num(), up, kind)


@torch.library.custom_op("fastft_tests::transposing_glu", mutates_args=())
def _transposing(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return _right(gate, up, "silu").transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)


@_transposing.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.wrong = ""


_transposing.register_autograd(lambda ctx, dy: _Own.backward(ctx, dy)[:2], setup_context=_keep)


def other_strides_than_fake(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return _transposing(gate, up)


def rms_norm_without_options(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    pass_through: bool = False,
) -> torch.Tensor:
    """Forgets ``out_dtype`` and ``pass_through``, and the weight's gradient."""
    h = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (h if weight is None else h * (weight.detach().float() + offset)).to(x.dtype)


def looks_at_values(gate: torch.Tensor, up: torch.Tensor, kind: str) -> str | None:
    return "large" if float(gate.abs().max()) > 100 else None
