"""The error rule: how far a result may be from the truth. Tests, ``fastft.verify`` and the first-step check share it.

A result in some dtype is compared with a reference in higher precision (fp32, or fp64 where cheap). Four checks, none
with a tolerance set by hand:

* **error**: its error may be at most ``factor`` (2) times the error that PyTorch makes in the same dtype on the same
  inputs, plus a rounding term: what storing the exact result in that dtype costs by itself, and for fp32 the growth of
  rounding with the length of the longest sum;
* **cosine**: the same rule for the direction alone, so that an error of PyTorch's in length excuses none in direction;
* **bias** and **drift**: rounding to nearest goes up as often as down, and away from zero as often as towards it. The
  mean signed error (bias), and the mean error away from zero (drift: truncation, a factor), must be what chance makes
  of errors of that size, PyTorch's own taken into account;
* **bitwise**, where the algebra is unchanged (a cast that is dropped, another layout): :func:`assert_bitwise`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

#: Standard errors that a mean may be off by: chance goes beyond that once in 1.7 million checks.
SIGMAS = 5.0


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """``‖actual − exact‖ / ‖exact‖`` in fp64 (Frobenius). 0 when both are zero everywhere, inf when a NaN or Inf
    stands in one and not in the other.
    """
    pair = _finite(actual, exact)
    return math.inf if pair is None else _relative(pair[0] - pair[1], pair[1])


def _finite(actual: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Both in fp64 where ``exact`` is finite (zero elsewhere); None when a NaN or Inf stands in one and not in the
    other.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"cannot compare shape {tuple(actual.shape)} with {tuple(exact.shape)}")
    a, e = actual.detach().double().cpu(), exact.detach().double().cpu()
    finite = torch.isfinite(e)
    if bool(finite.all()) and bool(torch.isfinite(a).all()):
        return a, e
    same = torch.equal(torch.isfinite(a), finite) and torch.equal(
        torch.nan_to_num(a[~finite], nan=0.5, posinf=1.0, neginf=-1.0),
        torch.nan_to_num(e[~finite], nan=0.5, posinf=1.0, neginf=-1.0),
    )
    return (torch.where(finite, a, 0.0), torch.where(finite, e, 0.0)) if same else None


def _relative(difference: torch.Tensor, exact: torch.Tensor) -> float:
    norm, size = float(exact.norm()), float(difference.norm())
    if norm == 0.0:
        return 0.0 if size == 0.0 else math.inf
    return size / norm


def _chord(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """``‖a/‖a‖ − e/‖e‖‖``: 0 for the same direction, 2 for the opposite one; its square is ``2 (1 − cosine)``. Zero has
    no direction: it counts as orthogonal to all but zero.
    """
    norms = float(actual.norm()), float(exact.norm())
    if 0.0 in norms:
        return 0.0 if norms == (0.0, 0.0) else math.sqrt(2.0)
    return float((actual / norms[0] - exact / norms[1]).norm())


def rounding(dtype: torch.dtype, length: int = 1) -> float:
    """Relative error that one rounding to ``dtype`` makes, times ``√length`` for an fp32 sum of ``length`` terms.

    Half a unit in the last place is ``eps / 2``; sums grow like a random walk. Half-precision results are taken to be
    summed in fp32, so ``length`` counts there with fp32's eps.
    """
    return torch.finfo(dtype).eps / 2 + _sum_rounding(dtype, length)


def _sum_rounding(dtype: torch.dtype, length: int) -> float:
    return min(torch.finfo(torch.float32).eps, torch.finfo(dtype).eps) * math.sqrt(max(length, 1))


def _mean_and_noise(error: torch.Tensor) -> tuple[float, float]:
    """The mean of ``error``, and how far from 0 chance may take it: :data:`SIGMAS` standard errors.

    The errors of one row, or of one column, may have one cause (a rounded norm, a rounded token), so the standard
    error counts whole rows and whole columns as one draw each, and adds both up (cluster-robust variance). With few of
    them Student's t takes the normal's place, by Wallace's approximation (1959, https://doi.org/10.1214/aoms/1177706093).
    """
    flat = error.reshape(-1, error.shape[-1]) if error.dim() > 1 else error.reshape(-1, 1)
    n = flat.numel()
    if n == 0:
        return 0.0, math.inf
    mean = flat.mean()
    variance, draws = 0.0, []
    for axis in (0, 1):
        if flat.shape[1 - axis] > 1:
            sums = (flat - mean).sum(axis)
            k = sums.numel()
            variance += float(sums.square().sum()) / n**2 * k / (k - 1)
            draws.append(k)
    if not draws:
        return float(mean), math.inf
    nu = min(draws) - 1
    exponent = (SIGMAS * (8 * nu + 3) / (8 * nu + 1)) ** 2 / nu
    student = math.sqrt(nu * math.expm1(exponent)) if exponent < 100 else math.inf
    return float(mean), student * math.sqrt(variance) if variance > 0.0 else 0.0


@dataclass(frozen=True)
class Comparison:
    """One value's errors: ours and PyTorch's, all against the exact value, and the bounds that follow.

    ``error``, ``torch_error``, ``bound``: relative (Frobenius). ``cosine``: of the angle to the exact value. ``bias``:
    mean signed error; ``drift``: mean error away from zero, weighted by size; both as a share of the exact value's root
    mean square.
    """

    name: str
    error: float
    torch_error: float
    bound: float
    cosine: float = 1.0
    cosine_bound: float = -1.0
    bias: float = 0.0
    bias_bound: float = math.inf
    drift: float = 0.0
    drift_bound: float = math.inf

    def allowing(self, error: float) -> Comparison:
        """The same, with at least ``error`` allowed in length and direction."""
        return replace(self, bound=max(self.bound, error), cosine_bound=min(self.cosine_bound, _cosine_bound(error)))

    @property
    def ratio(self) -> float:
        """Our error over PyTorch's (1 when both are 0)."""
        if self.torch_error == 0.0:
            return 1.0 if self.error == 0.0 else math.inf
        return self.error / self.torch_error

    @property
    def problems(self) -> list[str]:
        """What is not as it must be, in words; empty when all is well."""
        found = []
        if not self.error <= self.bound:
            found.append(f"error {self.error:.3e} is over its bound {self.bound:.3e}")
        if not self.cosine >= self.cosine_bound:
            found.append(f"cosine is 1 − {1 - self.cosine:.3e}, bound 1 − {1 - self.cosine_bound:.3e}")
        for name, value, bound in (
            ("bias", self.bias, self.bias_bound),
            ("drift", self.drift, self.drift_bound),
        ):
            if not abs(value) <= bound:
                found.append(f"{name} {value:+.3e} is over its bound {bound:.3e}")
        return found

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"WRONG ({'; '.join(self.problems)})"
        return f"{self.name}: error {self.error:.3e}, PyTorch {self.torch_error:.3e}, bound {self.bound:.3e}: {verdict}"


def compare(
    name: str,
    actual: torch.Tensor,
    same_dtype: torch.Tensor,
    exact: torch.Tensor,
    *,
    length: int = 1,
    factor: float = 2.0,
    dtype: torch.dtype | None = None,
) -> Comparison:
    """Compare ``actual`` with ``exact`` beside what PyTorch got in the same dtype (``same_dtype``); ``length`` as in
    :func:`rounding`; ``dtype``: what the arithmetic was rounded to, where that is narrower than ``actual``'s own dtype
    (the fp32 gradients of autocast).
    """
    dtype = dtype or actual.dtype
    ours, torchs = _finite(actual, exact), _finite(same_dtype, exact)
    if torchs is None:  # PyTorch overflowed somewhere, or lost a NaN: nothing can be demanded
        return Comparison(name, relative_error(actual, exact), math.inf, math.inf)
    torch_error = _relative(torchs[0] - torchs[1], torchs[1])
    allowed = factor * torch_error + rounding(dtype, length)
    if ours is None:
        return Comparison(name, math.inf, torch_error, allowed, cosine=-1.0)
    a, e = ours
    error = a - e
    bounds: dict[str, float] = {}
    scale = math.sqrt(float(e.square().mean())) if e.numel() else 0.0
    if scale > 0.0 and torch_error < 1.0:  # of a value that PyTorch gets no digit of, no sign can be demanded
        bounds["cosine"] = 1 - _chord(a, e) ** 2 / 2
        bounds["cosine_bound"] = _cosine_bound(factor * _chord(*torchs) + rounding(dtype, length))
        for what, weight in (("bias", torch.ones_like(e)), ("drift", e / scale)):
            mean, noise = _mean_and_noise(error * weight)
            torch_mean = float(((torchs[0] - e) * weight).mean())
            # fp32 arithmetic has no exact mean either: its own rounding is allowed for in full.
            bound = factor * abs(torch_mean) + noise + _sum_rounding(dtype, length) * scale
            bounds |= {what: mean / scale, f"{what}_bound": bound / scale}
    return Comparison(name, _relative(error, e), torch_error, allowed, **bounds)


def _cosine_bound(chord: float) -> float:
    return max(-1.0, 1 - chord**2 / 2)


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


def bitwise(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit are the same (so −0 is not 0, and a NaN is itself)."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    return torch.equal(_bits(actual), _bits(expected))


def assert_bitwise(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise ``AssertionError``, saying what differs, unless :func:`bitwise` holds."""
    if bitwise(actual, expected):
        return
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        found = f"{actual.dtype} {tuple(actual.shape)} is not {expected.dtype} {tuple(expected.shape)}"
    else:
        differs = (_bits(actual) != _bits(expected)).reshape((*actual.shape, -1)).any(-1)
        first = tuple(int(i) for i in differs.nonzero()[0])
        found = (
            f"{int(differs.sum())} of {actual.numel()} elements differ; at {first} "
            f"{actual[first].item()!r} is not {expected[first].item()!r}"
        )
    raise AssertionError(f"{name}: not bit for bit the same: {found}")


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
