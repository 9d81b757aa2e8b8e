"""What hypothesis makes cases of: sizes that several ops have, and :class:`Draw`.

A case is a function that makes a sample of a draw. It stands in the table ``FUZZ`` of its op's own tests
(``_each.py``), where ``ROWWISE`` names the ops of which each row depends on its own inputs only, and ``EXACT`` what
makes of a sample one that has an fp64 form (NF4 weights dense).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from tests.kernels._check import strided

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = st.one_of(st.integers(0, 5), st.sampled_from((7, 16, 17, 33)))
WIDTHS = st.one_of(st.integers(1, 9), st.sampled_from((16, 31, 64, 65, 130)))
flags = st.booleans()


class Draw:
    """What a case is made of: sizes and choices from hypothesis, numbers from a seed of its own."""

    def __init__(self, data: st.DataObject, device: str) -> None:
        self.data, self.device = data, device
        self.dtype = self(st.sampled_from(DTYPES))
        self.generator = torch.Generator().manual_seed(self(st.integers(0, 2**16)))

    def __call__(self, strategy: Any) -> Any:
        return self.data.draw(strategy)

    def tensor(self, *shape: int, scale: float | None = None, grad: bool | None = None, dtype: Any = None) -> Any:
        """Normal numbers, in a memory layout of hypothesis's choice."""
        scale = self(st.sampled_from((1.0, 0.01, 8.0))) if scale is None else scale
        t = torch.randn(shape, generator=self.generator).mul(scale).to(self.device, dtype or self.dtype)
        layout = self(st.integers(0, 3))
        if layout == 1 and t.dim() > 1:
            t = t.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == 2 and t.dim() > 1:
            t = torch.cat((t, t), 0)[: shape[0]] if shape[0] else t
        elif layout == 3:
            t = strided(t)
        return t.detach().requires_grad_(self(flags) if grad is None else grad)

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self(flags) else None

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator).to(self.device)
