"""Products of cuBLAS, and what has to be known of them.

cuBLAS of CUDA 13.0 sums a product up in several parts (kernels named ``nvjet_…_splitK``) where its result has too few
tiles for the GPU: a sum over tokens, as of an adapter's gradients. The terms are taken in blocks of 64. Where the whole
blocks divide evenly among the parts, a rest of less than a block is left out: of 8,193 tokens the last one, of 104,861
the last 29 (H100, torch 2.11; ``tests/kernels/test_products.py``). So the rest is added here.
"""

from __future__ import annotations

import torch

#: Terms that cuBLAS takes at a time; the fewest terms, and the largest result, that are looked at: a sum of less, or a
#: result of more than one tile of 128 x 128 for each of an H100's multiprocessors, is not split.
BLOCK, FEWEST, LARGEST = 64, 1024, 132 * 128 * 128


def whole_blocks(left: torch.Tensor, right: torch.Tensor) -> int:
    """Terms of ``left @ right`` that one product may sum up: all, or those in whole blocks."""
    terms = left.shape[1]
    small = left.shape[0] * right.shape[1] <= LARGEST
    return terms - terms % BLOCK if terms > FEWEST and small else terms


def mm_single(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right of two half-precision matrices, [M, K] and [K, N], in fp32."""
    whole = whole_blocks(left, right)
    out = _single(left[:, :whole], right[:whole])
    return out if whole == left.shape[1] else out.add_(_single(left[:, whole:], right[whole:]))


def mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right of two matrices of one dtype, [M, K] and [K, N], in that dtype, rounded once."""
    if left.element_size() == 2 and whole_blocks(left, right) != left.shape[1]:
        return mm_single(left, right).to(left.dtype)
    return torch.mm(left, right)


def _single(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())
