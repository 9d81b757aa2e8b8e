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
#: Numbers of a half-precision matrix that are cast to fp32 at a time, where no GEMM takes it as it is (64 MiB of fp32).
SLAB = 1 << 24


def whole_blocks(left: torch.Tensor, right: torch.Tensor) -> int:
    """Terms of ``left @ right`` that one product may sum up: all, or those in whole blocks."""
    terms = left.shape[1]
    small = left.shape[0] * right.shape[1] <= LARGEST
    return terms - terms % BLOCK if terms > FEWEST and small else terms


def sums_all(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether one product of cuBLAS, [M, K] and [K, N] of one dtype, has all terms."""
    return left.element_size() != 2 or whole_blocks(left, right) == left.shape[1]


def mm_single(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right of two half-precision matrices, [M, K] and [K, N], in fp32."""
    whole = whole_blocks(left, right)
    out = _single(left[:, :whole], right[:whole])
    return out if whole == left.shape[1] else out.add_(_single(left[:, whole:], right[whole:]))


def mm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right of two matrices of one dtype, [M, K] and [K, N], in that dtype, rounded once."""
    return torch.mm(left, right) if sums_all(left, right) else mm_single(left, right).to(left.dtype)


def mm_into(out: torch.Tensor, alpha: float, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """out[:] = alpha · left @ right of three matrices of one dtype, rounded once."""
    if alpha == 1:
        matmul_into(out, left, right)
    elif sums_all(left, right):
        torch.addmm(out, left, right, beta=0, alpha=alpha, out=out)
    else:
        out.copy_(mm_single(left, right).mul_(alpha))
    return out


def _single(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.mm(left.float(), right.float())


def _bf16_parts(x: torch.Tensor, count: int) -> list[torch.Tensor]:
    """bf16 tensors whose sum is the fp32 ``x``, to 8 · ``count`` bits."""
    parts, rest = [], x
    for _ in range(count - 1):
        parts.append(rest.to(torch.bfloat16))
        rest = rest - parts[-1]
    return [*parts, rest.to(torch.bfloat16)]


def _splits(half: torch.Tensor) -> bool:
    """Whether an fp32 matrix that meets ``half`` goes through its GEMM in bf16 parts."""
    return half.is_cuda and half.dtype == torch.bfloat16


def matmul(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left @ right in ``dtype``, accumulated in fp32. One side may be half precision and the other, thin one fp32."""
    if left.dtype == right.dtype == dtype:
        return mm(left, right)
    single = torch.float32
    if left.numel() == 0 or right.numel() == 0:
        return left.new_zeros((left.shape[0], right.shape[1]), dtype=dtype)
    if left.is_cuda and left.dtype == right.dtype and left.element_size() == 2:
        return mm_single(left, right).to(dtype)
    if _splits(left) and right.dtype == single:
        wide = mm_single(left, torch.cat(_bf16_parts(right, 3), 1))
        return wide.view(left.shape[0], 3, -1).sum(1).to(dtype)
    if _splits(right) and left.dtype == single:
        tall = mm_single(torch.cat(_bf16_parts(left, 3), 0), right)
        return tall.view(3, -1, right.shape[1]).sum(0).to(dtype)
    # The larger matrix is walked in slabs along its outer dimension, so that its fp32 form never exists as a whole.
    wanted = torch.promote_types(torch.promote_types(left.dtype, right.dtype), single)
    out = left.new_empty((left.shape[0], right.shape[1]), dtype=dtype)
    step = max(1, SLAB // max(1, left.shape[1]))
    if left.numel() >= right.numel():
        right = right.to(wanted)
        for i in range(0, left.shape[0], step):
            out[i : i + step] = torch.mm(left[i : i + step].to(wanted), right)
    else:
        left = left.to(wanted)
        for i in range(0, right.shape[1], step):
            out[:, i : i + step] = torch.mm(left, right[:, i : i + step].to(wanted))
    return out


def times(scale: float, x: torch.Tensor) -> torch.Tensor:
    """scale · x, in place. A scaling of 1, which alpha = r gives, launches nothing."""
    return x if scale == 1 else x.mul_(scale)


def matmul_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out[:] = left @ right; ``out`` may be columns of a larger matrix."""
    if left.dtype == right.dtype == out.dtype and sums_all(left, right):
        torch.mm(left, right, out=out)
    else:
        out.copy_(matmul(left, right, out.dtype))


#: The β of a product that is added to half-precision numbers on a GPU: 1, to every digit that they have. At a β of
#: exactly 1 cuBLAS rounds the product to their dtype before it adds (kernels named ``nvjet_…_badd``: 1.4 times the
#: error of one rounding); at any other it adds in fp32 (``…_bx``), in the same time. Measured on an H100, CUDA 13.0.
BETA = 1 + 2**-23


def beta_for(y: torch.Tensor) -> float:
    """β for a product that is added to y."""
    return BETA if y.is_cuda and y.element_size() == 2 else 1


def add_thin(y: torch.Tensor, h: torch.Tensor, up: torch.Tensor, scale: float, *, first: bool = False) -> torch.Tensor:
    """y += scale · h @ up, in place, with one rounding to y's dtype at the end. h [T, r], up [r, N], y [T, N].

    ``first``: y holds nothing yet, and becomes the product.
    """
    beta = 0 if first else beta_for(y)
    if y.dtype == h.dtype == up.dtype:
        return y.addmm_(h, up, beta=beta, alpha=scale)
    if _splits(y) and h.dtype == up.dtype == torch.float32:
        # (h₁ + h₂)(u₁ + u₂) without h₂u₂: 16 bits of each factor, for a sum that is then rounded to 8.
        (h1, h2), (up1, up2) = _bf16_parts(h, 2), _bf16_parts(up, 2)
        return y.addmm_(torch.cat((h1, h1, h2), 1), torch.cat((up1, up2, up1), 0), beta=beta, alpha=scale)
    wanted = torch.promote_types(torch.promote_types(h.dtype, up.dtype), y.dtype)
    h, up = h.to(wanted), up.to(wanted)
    if y.dtype == wanted:
        return y.addmm_(h, up, beta=beta, alpha=scale)
    step = max(1, SLAB // max(1, y.shape[1]))
    for i in range(0, y.shape[0], step):
        y[i : i + step] = torch.addmm(y[i : i + step].to(wanted), h[i : i + step], up, beta=beta, alpha=scale)
    return y
