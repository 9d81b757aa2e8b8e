"""The comparator finds small mistakes, and takes honest rounding for none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from fastft.compare import Comparison, assert_bitwise, assert_within, bitwise, compare, relative_error, rounding

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def draw(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> torch.Tensor:
    """Exact values, fp64."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def judged(exact: torch.Tensor, dtype: torch.dtype, mistake: Callable[[torch.Tensor], torch.Tensor]) -> Comparison:
    """What is said of ``mistake`` made in the exact values, beside a PyTorch that only rounds them."""
    return compare("x", mistake(exact).to(dtype), exact.to(dtype), exact)


# --------------------------------------------------------------------------------------------------- honest roundings


@pytest.mark.parametrize("seed", range(10))
def test_honest_rounding_passes(seed: int) -> None:
    """1000 trials in all: two implementations that round differently, in every dtype, shape and scale, with errors of
    single elements, of whole rows or of whole columns.
    """
    shapes = [(64,), (1000,), (16, 64), (4, 300), (3, 17, 40), (100, 100), (1, 1, 500)]
    for trial in range(100 * seed, 100 * (seed + 1)):
        generator = torch.Generator().manual_seed(trial)
        shape, dtype = shapes[trial % len(shapes)], DTYPES[trial % 3]
        exact = draw(shape, trial, scale=10.0 ** float(torch.randint(-3, 4, (), generator=generator)))
        size = torch.finfo(dtype).eps * (0, 1, 10)[trial % 5 % 3]
        together = [shape, (*shape[:-1], 1), (*(1 for _ in shape[:-1]), shape[-1])][trial % 7 % 3]
        if len(shape) < 2 or math.prod(together) < 16:
            together = shape

        def rounded(
            exact: torch.Tensor = exact,
            size: float = size,
            together: tuple[int, ...] = together,
            generator: torch.Generator = generator,
            dtype: torch.dtype = dtype,
        ) -> torch.Tensor:
            noise = size * torch.randn(together, generator=generator, dtype=torch.float64)
            return (exact * (1 + noise)).to(dtype)

        # Errors of few draws are compared with few draws: the rule's factor is for two of the same size.
        factor = 2.0 if math.prod(together) >= 64 else 4.0
        result = compare("x", rounded(), rounded(), exact, factor=factor)
        assert result.ok, f"trial {trial}, {shape}, {dtype}: {result}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3,), (), (0,), (2, 0), (2, 2)])
def test_small_and_empty(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for seed in range(20):
        exact = draw(shape, seed)
        assert judged(exact, dtype, lambda x: x).ok


def test_sums_may_be_off_by_the_root_of_their_length() -> None:
    exact = draw((1000,), 0)
    got = (exact * (1 + 2e-6)).float()
    assert not compare("x", got, exact.float(), exact).ok
    assert compare("x", got, exact.float(), exact, length=1000).ok


# ----------------------------------------------------------------------------------------------------------- mistakes


def shifted(x: torch.Tensor) -> torch.Tensor:
    """By a quarter of a bf16 ulp of 1."""
    return x + torch.finfo(torch.bfloat16).eps / 4


def truncated(x: torch.Tensor) -> torch.Tensor:
    """To bf16, towards zero."""
    bits = x.float().view(torch.int32) & -65536
    return bits.view(torch.float32)


def without_a_row(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(x[:1]), x[1:]])


def one_sign(x: torch.Tensor) -> torch.Tensor:
    flipped = x.clone()
    flipped[x.shape[0] // 2] *= -1
    return flipped


MISTAKES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sign": lambda x: -x,
    "sign of a row": one_sign,
    "factor 1.01": lambda x: 1.01 * x,
    "factor 0.99": lambda x: 0.99 * x,
    "half": lambda x: x / 2,
    "dropped row": without_a_row,
    "zero": torch.zeros_like,
    "transposed": lambda x: x.T,
    "rolled": lambda x: x.roll(1, -1),
    "shift": shifted,
    "NaN": lambda x: torch.where(x == x.max(), math.nan, x),
    "Inf": lambda x: torch.where(x == x.max(), math.inf, x),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str, dtype: torch.dtype) -> None:
    result = judged(draw((96, 96), 1), dtype, MISTAKES[name])
    assert not result.ok, str(result)
    with pytest.raises(AssertionError, match="WRONG"):
        exact = draw((96, 96), 1)
        assert_within("x", MISTAKES[name](exact).to(dtype), exact.to(dtype), exact)


def test_a_shift_within_rounding_is_found_by_bias() -> None:
    """A quarter of an ulp: the error rule alone allows it."""
    result = judged(draw((4096,), 2), torch.bfloat16, shifted)
    assert result.error <= result.bound
    assert abs(result.bias) > result.bias_bound
    assert "bias" in str(result) and "drift" not in str(result)


def test_truncation_is_found_by_drift() -> None:
    """Rounding towards zero: as large an error as the rule allows, and no mean."""
    result = judged(draw((4096,), 3), torch.bfloat16, truncated)
    assert result.error <= result.bound
    assert abs(result.bias) <= result.bias_bound
    assert -result.drift > result.drift_bound
    assert "drift" in str(result)


def test_a_factor_in_noise_is_found_by_drift() -> None:
    """1 % beside errors of 2 %."""
    exact = draw((128, 128), 4)
    noisy = [exact * (1 + 0.02 * draw((128, 128), seed)) for seed in (5, 6)]
    assert compare("x", noisy[0].bfloat16(), noisy[1].bfloat16(), exact).ok
    result = compare("x", 1.01 * noisy[0].bfloat16(), noisy[1].bfloat16(), exact)
    assert result.error <= result.bound
    assert result.drift > result.drift_bound


def test_pytorchs_error_in_length_excuses_none_in_direction() -> None:
    exact = draw((1000,), 7)
    turned = exact + 0.05 * draw((1000,), 8)
    result = compare("x", turned.float(), (1.1 * exact).float(), exact)
    assert result.error <= result.bound
    assert result.cosine < result.cosine_bound
    assert "cosine" in str(result)


def test_a_bias_of_pytorchs_own_is_allowed() -> None:
    exact = draw((4096,), 9)
    got = shifted(exact).bfloat16()
    assert compare("x", got, got, exact).ok


def test_a_cause_common_to_a_row_is_no_bias() -> None:
    """One error for each of 8 rows: 8 draws, not 8000, and their mean is no news."""
    exact = draw((8, 1000), 10).abs()
    off = [exact * (1 + 0.01 * draw((8, 1), seed)) for seed in (11, 12)]
    result = compare("x", off[0].bfloat16(), off[1].bfloat16(), exact, factor=4.0)
    assert result.ok, str(result)


def test_no_sign_is_demanded_where_pytorch_has_no_digit() -> None:
    exact = 1e-12 * draw((64,), 13)
    assert compare("x", 1e-9 * draw((64,), 14), 1e-9 * draw((64,), 15), exact).ok


# ------------------------------------------------------------------------------------------------------------- figures


def test_figures() -> None:
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    result = compare("x", torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.25]), exact)
    assert result.error == pytest.approx(0.1)
    assert result.torch_error == pytest.approx(0.05)
    assert result.ratio == pytest.approx(2.0)
    assert result.bound == pytest.approx(0.1 + rounding(torch.float32))
    assert result.cosine == pytest.approx((9 + 18) / (5 * math.hypot(3, 4.5)))
    assert result.bias == pytest.approx(0.25 / math.sqrt(12.5))
    assert result.drift == pytest.approx(0.5 * 4 / 2 / 12.5)
    assert result.ok and result.problems == [] and str(result).endswith("ok")


def test_ratio_of_nothing() -> None:
    exact = torch.ones(4, dtype=torch.float64)
    assert compare("x", exact.float(), exact.float(), exact).ratio == 1.0
    assert compare("x", exact.float() + 1, exact.float(), exact).ratio == math.inf


def test_allowing() -> None:
    exact = draw((100,), 16)
    row = judged(exact, torch.float32, lambda x: x + 1e-3 * draw((100,), 17))
    assert not row.ok
    assert row.allowing(1e-2).ok
    assert row.allowing(0.0) == row


def test_relative_error_of_zeros_and_infinities() -> None:
    zero, one, inf = torch.zeros(2), torch.ones(2), torch.tensor([1.0, math.inf])
    assert relative_error(zero, zero) == 0.0
    assert relative_error(one, zero) == math.inf
    assert relative_error(zero, one) == 1.0
    assert relative_error(inf, inf) == 0.0
    assert relative_error(one, inf) == math.inf
    assert relative_error(-inf, inf) == math.inf
    assert relative_error(inf, one) == math.inf
    assert relative_error(torch.tensor([math.nan, 1.0]), torch.tensor([math.nan, 1.0])) == 0.0
    assert relative_error(torch.empty(0), torch.empty(0)) == 0.0
    with pytest.raises(ValueError, match="shape"):
        relative_error(torch.zeros(2), torch.zeros(3))


def test_where_pytorch_overflows_nothing_is_demanded() -> None:
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert compare("x", torch.tensor([1.0, 9.0]), torch.tensor([1.0, math.inf]), exact).ok
    assert not compare("x", torch.tensor([1.0, math.inf]), torch.tensor([1.0, 2.0]), exact).ok


def test_the_arithmetics_dtype_may_be_narrower_than_the_results() -> None:
    exact = draw((1000,), 18)
    got = exact.bfloat16().float()
    assert not compare("x", got, exact.float(), exact).ok
    assert compare("x", got, exact.float(), exact, dtype=torch.bfloat16).ok


# ------------------------------------------------------------------------------------------------------------- bitwise


def test_bitwise() -> None:
    x = torch.tensor([[1.0, math.nan], [0.0, -3.0]])
    assert bitwise(x, x.clone())
    assert_bitwise("x", x.T.contiguous().T, x)
    assert bitwise(torch.empty(0, 3), torch.empty(0, 3))
    for other in (x.double(), x[:1], -x, torch.nextafter(x, x + 1)):
        assert not bitwise(x, other)


def test_bitwise_says_what_differs() -> None:
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    y = x.clone()
    y[1, 2] = 0.5
    with pytest.raises(AssertionError, match=r"x: .* 1 of 6 elements differ; at \(1, 2\) 0.5 is not 0.0"):
        assert_bitwise("x", y, x)
    with pytest.raises(AssertionError, match=r"torch.float32 \(2, 3\) is not torch.bfloat16 \(2, 3\)"):
        assert_bitwise("x", y.float(), x)
    assert not bitwise(x, -x)  # −0 is not 0
