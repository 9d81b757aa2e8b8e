"""The error rule: how far a result may be from the truth.

A result in some dtype is compared with a reference in higher precision (fp32, or fp64 where cheap). Its error may be
at most ``factor`` (2) times the error that PyTorch makes in the same dtype on the same inputs, plus a rounding term:
what storing the exact result in that dtype costs by itself, and for fp32 the growth of rounding with the length of
the longest sum. No tolerance is set by hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """``‖actual − exact‖ / ‖exact‖`` in fp64 (Frobenius). 0 when both are zero everywhere, inf when a NaN or Inf
    stands in one and not in the other.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"cannot compare shape {tuple(actual.shape)} with {tuple(exact.shape)}")
    a, e = actual.detach().double().cpu(), exact.detach().double().cpu()
    finite = torch.isfinite(e)
    same = torch.equal(torch.isfinite(a), finite) and torch.equal(
        torch.nan_to_num(a[~finite], nan=0.5, posinf=1.0, neginf=-1.0),
        torch.nan_to_num(e[~finite], nan=0.5, posinf=1.0, neginf=-1.0),
    )
    if not same:
        return math.inf
    a, e = a[finite], e[finite]
    norm = float(e.norm())
    difference = float((a - e).norm())
    if norm == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / norm


def rounding(dtype: torch.dtype, length: int = 1) -> float:
    """Relative error that one rounding to ``dtype`` makes, times ``√length`` for an fp32 sum of ``length`` terms.

    Half a unit in the last place is ``eps / 2``; sums grow like a random walk. Half-precision results are taken to be
    summed in fp32, so ``length`` counts there with fp32's eps.
    """
    single = torch.finfo(torch.float32).eps
    own = torch.finfo(dtype).eps
    return own / 2 + min(single, own) * math.sqrt(max(length, 1))


@dataclass(frozen=True)
class Comparison:
    """One value's errors: ours and PyTorch's, both against the exact value, and the bound that follows."""

    name: str
    error: float
    torch_error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        return f"{self.name}: error {self.error:.3e}, PyTorch {self.torch_error:.3e}, bound {self.bound:.3e}: {verdict}"


def compare(
    name: str,
    actual: torch.Tensor,
    same_dtype: torch.Tensor,
    exact: torch.Tensor,
    *,
    length: int = 1,
    factor: float = 2.0,
) -> Comparison:
    """Compare ``actual`` with ``exact`` beside what PyTorch got in the same dtype (``same_dtype``); ``length`` as in
    :func:`rounding`.
    """
    torch_error = relative_error(same_dtype, exact)
    bound = factor * torch_error + rounding(actual.dtype, length)
    return Comparison(name, relative_error(actual, exact), torch_error, bound)


def assert_within(
    name: str,
    actual: torch.Tensor,
    same_dtype: torch.Tensor,
    exact: torch.Tensor,
    *,
    length: int = 1,
    factor: float = 2.0,
) -> None:
    """Raise ``AssertionError`` with the figures when the error rule does not hold."""
    result = compare(name, actual, same_dtype, exact, length=length, factor=factor)
    if not result.ok:
        raise AssertionError(str(result))
