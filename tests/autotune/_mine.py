"""Variants as a user's package has them."""

from __future__ import annotations

from typing import Any

import torch

from fastft.kernels._op import OPS

CALLS: list[str] = []


def glu(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """SwiGLU in PyTorch."""
    CALLS.append(kind)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def wrong_glu(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """Not SwiGLU."""
    return torch.nn.functional.silu(gate) * up * 1.1


def only_silu(gate: torch.Tensor, up: torch.Tensor, kind: str) -> str | None:
    """A legality that answers with a sentence."""
    return None if kind == "silu" else f"{kind} is another activation"


def never(*args: Any, **kwargs: Any) -> str:
    return "no time today"


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    pass_through: bool = False,
) -> Any:
    h = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    y = (h if weight is None else h * (weight.float() + offset)).to(out_dtype or x.dtype)
    return (y, x.view_as(x)) if pass_through else y


def other_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    pass_through: bool = False,
) -> Any:
    return rms_norm(x, weight, eps, offset, out_dtype, pass_through)


def bare_rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    pass_through: bool = False,
) -> Any:
    """Its result alone, whatever ``pass_through`` says."""
    return rms_norm(x, weight, eps, offset, out_dtype)


def without_pass_through(*args: Any, pass_through: bool = False, **kwargs: Any) -> str | None:
    return "nothing is handed on" if pass_through else None


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    a: Any = (),
    b: Any = (),
    scaling: Any = (),
    *,
    x_lora: Any = (),
    b_bias: Any = (),
    quant: Any = (),
    shape: Any = (),
    blocksize: int = 64,
    blocksize2: int = 256,
    dtype: torch.dtype | None = None,
    lora_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """The op, by another name."""
    return OPS["lora_linear"].call(
        x, weight, bias, a, b, scaling, x_lora=x_lora, b_bias=b_bias, quant=quant, shape=shape, blocksize=blocksize,
        blocksize2=blocksize2, dtype=dtype, lora_dtype=lora_dtype, out_dtype=out_dtype, residual=residual,
    )  # fmt: skip
