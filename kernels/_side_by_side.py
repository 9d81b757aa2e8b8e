"""Copy matrices next to each other: out[T, ΣN] = [s₁ | s₂ | …], what one product in place of several reads.

PyTorch copies into columns of a wider matrix an element at a time (its vectorised kernels are for dense memory), at a
half of what the memory gives and less. Here a thread moves 16 bytes at a time, and all matrices are one launch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from fastft.kernels._op import use_triton
from fastft.kernels._rows import row_offset
from fastft.kernels._triton import cdiv, jit, tl

#: Tile of a program: 32 elements for each of its 128 threads, 64 bytes of bf16 on their way.
ROWS, COLUMNS = 4, 1024
#: Widths and strides are passed in units of so many elements where all of them are, 16 bytes of bf16, so that the
#: compiler knows: by itself it sees whether an argument is a multiple of 16, and rows that end with an adapter of an
#: odd rank are multiples of 8.
UNIT = 8


@jit
def _copy_kernel(
    out_ptr, sources, widths, strides, out_stride, rows,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    out = out_ptr + row_offset(row, 1, out_stride * UNIT, 0)[:, None]
    for i in tl.static_range(len(sources)):
        blocks = tl.cdiv(widths[i] * UNIT, COLUMNS)
        if (block >= 0) & (block < blocks):
            col = block * COLUMNS + tl.arange(0, COLUMNS)
            there = (row < rows)[:, None] & (col < widths[i] * UNIT)[None, :]
            source = sources[i] + row_offset(row, 1, strides[i] * UNIT, 0)[:, None]
            tl.store(out + col[None, :], tl.load(source + col[None, :], mask=there, other=0.0), mask=there)
        block -= blocks
        out += widths[i] * UNIT


def side_by_side(out: torch.Tensor, sources: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Write ``sources`` [T, Nᵢ] into ``out`` [T, ΣN or more], from its first column on; all of one dtype, in rows of
    any stride. Returns the columns that each of them has there."""
    starts = itertools.accumulate((s.shape[1] for s in sources), initial=0)
    columns = [out[:, start : start + s.shape[1]] for start, s in zip(starts, sources, strict=False)]
    dense = all(t.stride(1) == 1 for t in (out, *sources))
    if not dense or out.dtype == torch.float64 or not use_triton(out):
        for column, source in zip(columns, sources, strict=True):
            column.copy_(source)
        return columns
    if out.shape[0] == 0:
        return columns
    widths, strides = [s.shape[1] for s in sources], [s.stride(0) for s in sources]
    unit = 1 if any(n % UNIT for n in (*widths, *strides, out.stride(0))) else UNIT
    blocks = sum(cdiv(n, COLUMNS) for n in widths)
    _copy_kernel[(cdiv(out.shape[0], ROWS), blocks)](
        out, tuple(sources), tuple(n // unit for n in widths), tuple(n // unit for n in strides),
        out.stride(0) // unit, out.shape[0], UNIT=unit, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
    return columns
