"""Inputs of every op, for tests that go over all ops: one provider an op, named variants of its arguments.

A provider stands in the table ``SAMPLES`` of its op's own tests (``_each.py``). An op without one fails the meta-tests
(``tests/test_ops.py``), so that a new op cannot be left out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastft.kernels._op import Op
from tests.kernels._each import entry

Named = Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of an op; the tensors among them that require a gradient are its leaves."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def leaves(self) -> list[torch.Tensor]:
        return [t for t in tree_flatten((self.args, self.kwargs))[0] if isinstance(t, torch.Tensor) and t.requires_grad]

    def copied(self) -> Sample:
        """The same values and strides at other addresses, as new leaves."""
        values, tree = tree_flatten((self.args, self.kwargs))
        copies = [
            t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in values
        ]
        return Sample(self.name, *tree_unflatten(copies, tree))

    def outputs(self, fn: Callable[..., Any], leaves: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """What ``fn`` returns, as a list; with ``leaves`` in the place of the sample's own."""
        values, tree = tree_flatten((self.args, self.kwargs))
        given = iter(self.leaves() if leaves is None else leaves)
        wanted = [isinstance(t, torch.Tensor) and t.requires_grad for t in values]
        args, kwargs = tree_unflatten([next(given) if w else v for v, w in zip(values, wanted, strict=True)], tree)
        out = fn(*args, **kwargs)
        return list(out) if isinstance(out, tuple) else [out]


class New:
    """Makes the tensors of a sample: random, in one dtype, on one device."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, grad: bool = True, scale: float = 1.0) -> torch.Tensor:
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return t.to(self.device, self.dtype).requires_grad_(grad)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator).to(self.device)


def nf4_states(new: New, n: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and states of NF4 weights [2n, 64], by the arguments' names of ``nf4_dequantize``."""
    packed = new.integers(256, 64 * n, 1).to(torch.uint8)
    scales = torch.rand(2 * n, generator=new.generator).to(new.device)
    yield "single", {"packed": packed, "quant": (scales,)}
    code = torch.rand(256, generator=new.generator).to(new.device)
    offset = torch.tensor(0.01, device=new.device)
    second = torch.rand(-(-2 * n // 2), generator=new.generator).to(new.device)
    yield "double", {"packed": packed, "quant": (new.integers(256, 2 * n).to(torch.uint8), code, offset, second)}


def samples(op: Op, dtype: torch.dtype = torch.float32, device: str = "cpu", n: int = 1) -> list[Sample]:
    """Variants of ``op``'s arguments, all supported; the same numbers at every call. ``n`` multiplies the sizes."""
    found = [Sample(*named) for named in entry(op, "SAMPLES")(New(dtype, device), n)]
    for sample in found:
        reason = op.supported(*sample.args, **sample.kwargs)
        assert reason is None, f"the sample {sample.name!r} of {op.name} is not supported: {reason}"
    return found


def differentiable(op: Op) -> bool:
    """Whether the op has a backward of its own."""
    return any(name.endswith("_backward") for name in op.raw)
