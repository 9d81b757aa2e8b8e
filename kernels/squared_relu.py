"""Squared ReLU (So et al. 2021, https://arxiv.org/abs/2109.08668): the activation of Nemotron's and Arcee's MLPs.

Maths, element by element, in fp32 with one rounding at the end::

    y = max(x, 0)²

Backward::

    dx = 2 max(x, 0) dy

Shapes: x ``[..., N]``, y ``[..., N]``. Saved: x. (From y, max(x, 0) = √y would have y's rounding, and in fp16 nothing
of what underflowed.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from fastft.kernels._config import Config, Space, crowded
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import Cost, Op, Reason, Recompute, check_dtypes, raw_op, register, use_triton
from fastft.kernels._rows import row_offset, rows_of, size
from fastft.kernels._triton import cdiv, jit, tl

# ---------------------------------------------------------------- reference


def reference(x: torch.Tensor) -> torch.Tensor:
    """Plain PyTorch, differentiable; fp32 inside (fp64 for fp64)."""
    return torch.relu(x.to(torch.promote_types(x.dtype, torch.float32))).square().to(x.dtype)


# ---------------------------------------------------------------- configuration


def _block(device: torch.device, dtype: torch.dtype, rows: int, n: int) -> Config:
    # 8 elements for each of 128 threads, one 16-byte load in bf16.
    return {"BLOCK": 1024, "num_warps": 4}


def _legal(config: Config, device: torch.device, dtype: torch.dtype, rows: int, n: int) -> str | None:
    if config["BLOCK"] < 32 * config["num_warps"]:
        return f"{config['BLOCK']} elements for {32 * config['num_warps']} threads"
    return crowded(4 * config["BLOCK"], config["num_warps"])


_VALUES = {"BLOCK": (256, 512, 1024, 2048, 4096, 8192), "num_warps": (1, 2, 4, 8, 16)}
FORWARD = Space("squared_relu.forward", _VALUES, _block, tokens=("rows",), sizes=("n",), legal=_legal)
BACKWARD = Space("squared_relu.backward", _VALUES, _block, tokens=("rows",), sizes=("n",), legal=_legal)

# ---------------------------------------------------------------- kernels


@jit
def _relu(x):
    """max(x, 0), and NaN of NaN."""
    return tl.where(x <= 0, 0.0, x)


@jit
def _forward_kernel(x_ptr, y_ptr, n, blocks, inner, x_outer, x_inner, y_outer, y_inner, BLOCK: tl.constexpr):
    row = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    r = _relu(tl.load(x_ptr + row_offset(row, inner, x_outer, x_inner) + col, mask=col < n, other=0.0).to(tl.float32))
    y_at = y_ptr + row_offset(row, inner, y_outer, y_inner) + col
    tl.store(y_at, (r * r).to(y_ptr.dtype.element_ty), mask=col < n)


@jit
def _backward_kernel(
    dy_ptr, x_ptr, dx_ptr,
    n, blocks, inner, dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + row_offset(row, inner, dy_outer, dy_inner) + col, mask=col < n, other=0.0).to(tl.float32)
    r = _relu(tl.load(x_ptr + row_offset(row, inner, x_outer, x_inner) + col, mask=col < n, other=0.0).to(tl.float32))
    dx_at = dx_ptr + row_offset(row, inner, dx_outer, dx_inner) + col
    tl.store(dx_at, (2.0 * r * dy).to(dx_ptr.dtype.element_ty), mask=col < n)


# ---------------------------------------------------------------- launchers


def _launch(kernel: Any, space: Space, *tensors: torch.Tensor) -> bool:
    """False where the tensors have no rows in common that a kernel can walk over; the last one is written."""
    walk = rows_of(*tensors)
    if walk is None:
        return False
    rows, n = walk.count, tensors[0].shape[-1]
    tile = space(tensors[0].device, tensors[0].dtype, rows, n)
    if walk.inner == 1 and all(outer == n for outer, _ in walk.strides):  # without gaps: one long row
        rows, n = 1, rows * n
    blocks = cdiv(n, tile["BLOCK"])
    strides = [stride for pair in walk.strides for stride in pair]
    kernel[(rows * blocks,)](*tensors, n, blocks, walk.inner, *strides, **tile)
    return True


def _forward(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    if not use_triton(x) or x.dtype == torch.float64:
        return y.copy_(reference(x))
    return y if _launch(_forward_kernel, FORWARD, x, y) else y.copy_(_forward(x.contiguous()))


def _backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx
    if not use_triton(x) or x.dtype == torch.float64:
        compute = torch.promote_types(x.dtype, torch.float32)
        return dx.copy_(2.0 * torch.relu(x.to(compute)) * dy.to(compute))
    if _launch(_backward_kernel, BACKWARD, dy, x, dx):
        return dx
    return dx.copy_(_backward(dy.contiguous(), x.contiguous()))


# ---------------------------------------------------------------- op

_raw = raw_op("squared_relu(Tensor x) -> Tensor", _forward, torch.empty_like)
_raw_backward = raw_op(
    "squared_relu_backward(Tensor dy, Tensor x) -> Tensor", _backward, lambda dy, x: torch.empty_like(x)
)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _raw(x)

    @staticmethod
    def backward(ctx, dy):
        return _raw_backward(dy, *ctx.saved_tensors)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """``max(x, 0)²`` of x ``[..., N]`` in fp32, fp16 or bf16: ``[..., N]`` in x's dtype, rounded once."""
    return _SquaredReLU.apply(x)


def supported(x: torch.Tensor) -> Reason | None:
    """None, or why this call cannot run as one kernel."""
    if x.dim() < 1:
        return Reason("shape", "x has no axis")
    return check_dtypes(x)


def cost(x: torch.Tensor) -> Cost:
    """Forward: x in, y out; kept: x."""
    elements = size(x.numel())
    return Cost(2 * elements, 2 * elements * x.element_size(), elements * x.element_size())


# ---------------------------------------------------------------- calls


def stock(x: torch.Tensor) -> torch.Tensor:
    """transformers' ``ReLUSquaredActivation``."""
    return torch.square(F.relu(x))


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """MLPs without a gate."""
    if model.activation == "relu2" and not model.gated and model.intermediate:
        yield {**model.tokens, "intermediate": model.intermediate}


def inputs(new: New, *, batch: int, seq: int, intermediate: int) -> Inputs:
    """x [batch, seq, intermediate]."""
    x = new(batch, seq, intermediate, grad=True)
    return Inputs((x,), wanted=[x])


register(
    Op(
        name="squared_relu",
        call=squared_relu,
        reference=reference,
        supported=supported,
        raw=("squared_relu", "squared_relu_backward"),
        recompute=Recompute.CHEAP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
        stock=stock,
    )
)
