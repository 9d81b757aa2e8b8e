"""Sums over tokens have every token in them, however many there are."""

from __future__ import annotations

import pytest
import torch

from fastft.kernels._op import INTERPRET
from fastft.kernels._products import BLOCK, matmul_into, mm, mm_into, mm_single
from tests.mutation._mutant import Mutant

HALF = torch.float16 if INTERPRET else torch.bfloat16
#: Results as an adapter's gradients are, and terms of which cuBLAS (CUDA 13.0, H100) leaves out the last; others.
SIZES = [
    *((m, n, 8193) for m, n in ((16, 4096), (64, 4096), (4096, 16))),
    *((m, n, 16385) for m, n in ((16, 1024), (1024, 16))),
    *((m, n, 104861) for m, n in ((16, 16), (32, 16), (64, 64))),
    (16, 128, 98305),
    (16, 4096, 8192),
    (16, 96, 5000),
    (16, 96, 1000),
    (16, 96, 0),
    (2048, 2048, 1100),
]


def into(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Into columns of a larger matrix."""
    out = torch.full((left.shape[0], right.shape[1] + 3), torch.nan, dtype=left.dtype, device=left.device)
    matmul_into(out[:, :-3], left, right)
    assert bool(out[:, -3:].isnan().all())
    return out[:, :-3]


def halved(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Half of the product, twice."""
    out = torch.full((left.shape[0], right.shape[1]), torch.nan, dtype=left.dtype, device=left.device)
    return 2 * mm_into(out, 0.5, left, right)


@pytest.mark.parametrize("product", [mm_single, mm, into, halved])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("m, n, k", SIZES, ids=str)
def test_every_term_is_in_the_sum(m, n, k, strided, product, device):
    """The last terms alone, counted: exactly."""
    last = min(BLOCK - 1, k)
    left = torch.ones(k, m + 8 * strided, dtype=HALF, device=device)[:, 8 * strided :].t()
    right = torch.zeros(k, n, dtype=HALF, device=device)
    right[k - last :] = 1
    out = product(left, right)
    assert out.dtype == (torch.float32 if product is mm_single else HALF)
    assert out.shape == (m, n) and bool((out == last).all())


@pytest.mark.parametrize("k", [1100, 8193, 8192])
def test_a_product_is_rounded_once(k, device):
    torch.manual_seed(0)
    left, right = torch.randn(k, 16, device=device).to(HALF).t(), torch.randn(k, 48, device=device).to(HALF)
    exact = left.double() @ right.double()
    single = mm_single(left, right)
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(mm(left, right).double(), exact, rtol=torch.finfo(HALF).eps, atol=1e-3)
    third = mm_into(torch.empty(16, 48, dtype=HALF, device=device), 1 / 3, left, right)
    torch.testing.assert_close(third.double(), exact / 3, rtol=torch.finfo(HALF).eps / 2 * 1.01, atol=1e-3)


def test_other_dtypes_are_pytorchs(device):
    left, right = (torch.randn(2000, n, dtype=torch.float64, device=device) for n in (3, 5))
    assert torch.equal(mm(left.t(), right), torch.mm(left.t(), right))


def test_what_the_script_counts(monkeypatch):
    """``bench/products.py``: terms that are missing, of any of the last ones."""
    from bench import products

    for name in ("ones", "zeros"):
        stock = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, stock=stock, device=None, **kw: stock(*size, **kw))
    short = lambda a, b: torch.mm(a[:, :-5], b[:-5])  # noqa: E731
    assert products.lost(short, 4, 6, 100, torch.float32) == 5 and products.lost(short, 4, 6, 64, torch.float32) == 5
    assert products.lost(torch.mm, 4, 6, 100, torch.float32) == 0


MUTANTS = (
    Mutant(
        "products: the rest of a block is forgotten",
        "kernels/_products.py",
        "out.add_(_single(left[:, whole:], right[whole:]))",
        "out",
        "tests/kernels/test_products.py -k every_term",
    ),
    Mutant(
        "products: of half precision in two roundings",
        "kernels/_products.py",
        "else mm_single(left, right).to(left.dtype)",
        "else torch.mm(left[:, :-1], right[:-1]) + torch.mm(left[:, -1:], right[-1:])",
        "tests/kernels/test_products.py -k rounded_once",
    ),
    Mutant(
        "products: multiplied after they are rounded",
        "kernels/_products.py",
        "out.copy_(mm_single(left, right).mul_(alpha))",
        "out.copy_(mm_single(left, right).to(out.dtype).mul_(alpha))",
        "tests/kernels/test_products.py -k rounded_once",
    ),
    Mutant(
        "products: into a matrix, the rest of a block left to cuBLAS",
        "kernels/_products.py",
        "left.dtype == right.dtype == out.dtype and sums_all(left, right):",
        "left.dtype == right.dtype == out.dtype:",
        "tests/kernels/test_linear_cross_entropy.py -k odd_sizes",
    ),
)
