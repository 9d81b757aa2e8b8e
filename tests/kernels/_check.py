"""One check for every op: outputs and gradients against fp64, beside what the reference gets in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastft.compare import assert_within
from fastft.kernels._op import Op


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values with no contiguous axis: every second element of a buffer twice as long."""
    return torch.stack((x, x), dim=-1)[..., 0]


def _run(
    fn: Any, tensors: Sequence[Any], constants: Sequence[Any], grads: Sequence[torch.Tensor] | None
) -> list[torch.Tensor]:
    leaves = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in tensors]
    out = fn(*leaves, *constants)
    outs = list(out) if isinstance(out, tuple) else [out]
    if grads is None:
        return outs
    wanted = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    return outs + list(torch.autograd.grad(outs, wanted, [g.to(o.dtype) for g, o in zip(grads, outs, strict=True)]))


def _double(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def check_op(op: Op, tensors: Sequence[Any], *constants: Any, length: int = 1, strided_grads: bool = False) -> None:
    """``op.call(*tensors, *constants)`` keeps the error rule, in its outputs and in the gradient of every tensor that
    requires one.

    ``length``: terms of the longest sum in one output or gradient element.
    """
    with torch.no_grad():
        outs = _run(op.call, tensors, constants, None)
    grads = [torch.randn_like(o) for o in outs]
    if strided_grads:
        grads = [strided(g) for g in grads]
    ours = _run(op.call, tensors, constants, grads)
    same = _run(op.reference, tensors, constants, grads)
    exact = _run(op.reference, [_double(t) for t in tensors], [_double(c) for c in constants], grads)
    for i, (a, s, e) in enumerate(zip(ours, same, exact, strict=True)):
        assert (a.dtype, a.shape) == (s.dtype, s.shape), (
            f"value {i}: {a.dtype} {tuple(a.shape)}, not {s.dtype} {tuple(s.shape)}"
        )
        assert_within(f"{op.name} value {i}", a, s, e, length=length)
