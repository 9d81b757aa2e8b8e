"""How row-wise kernels (norms, gated activations) walk over a tensor ``[..., N]`` without copying it first, and what
tiles they hold.

A row is the last axis, contiguous. The other axes are visited in the memory order of the first tensor and merged where
every tensor allows it, which leaves at most two of them for everything that models make: one for a dense tensor in any
order (``[batch, seq, hidden]``, or heads transposed), two for a slice of a fused projection (``q`` out of ``qkv``, one
half of ``gate_up``). Row ``r`` of a tensor then begins at ``(r // inner) * outer_stride + (r % inner) * inner_stride``
elements.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch

from fastft.kernels._config import Config, Space, crowded, padded
from fastft.kernels._triton import cdiv, jit, next_power_of_2, tl


@dataclass(frozen=True)
class Rows:
    """``outer * inner`` rows; ``strides`` has one pair ``(outer_stride, inner_stride)``, in elements, for each
    tensor."""

    outer: int
    inner: int
    strides: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        return self.outer * self.inner


def rows_of(*tensors: torch.Tensor) -> Rows | None:
    """The common walk over ``tensors``, whose leading axes agree (``[..., N]``; a value per row is ``[..., 1]``).

    None when it takes more than two axes, or when a row of more than one element is not contiguous: the caller then
    works on contiguous copies.
    """
    if tensors[0].numel() and all(t.is_contiguous() for t in tensors):  # as below, in less of the host's time
        count = math.prod(tensors[0].shape[:-1])
        return Rows(count, 1, tuple((t.shape[-1] if count > 1 else 0, 0) for t in tensors))
    if any(t.shape[-1] > 1 and t.stride(-1) != 1 for t in tensors):
        return None
    sizes = tensors[0].shape[:-1]
    axes = sorted((a for a, size in enumerate(sizes) if size != 1), key=tensors[0].stride, reverse=True)
    merged: list[tuple[int, tuple[int, ...]]] = []
    for a in axes:
        strides = tuple(t.stride(a) for t in tensors)
        if merged and all(before == s * sizes[a] for before, s in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * sizes[a], strides)
        else:
            merged.append((sizes[a], strides))
    if len(merged) > 2:
        return None
    # A size-1 inner axis makes the division in `row_offset` vanish: Triton specialises on 1.
    merged += [(1, (0,) * len(tensors))] * (2 - len(merged))
    (outer, outer_strides), (inner, inner_strides) = merged
    return Rows(outer, inner, tuple(zip(outer_strides, inner_strides, strict=True)))


def row_values(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised fp32 value for each row of x ``[..., N]``: ``[...]``, in x's memory order (fp64 for fp64)."""
    return torch.empty_like(x.select(-1, 0), dtype=torch.promote_types(x.dtype, torch.float32))


#: Columns that a warp takes at a time, 16 bytes of bf16 for each of its threads; and how many columns a thread is given
#: at most.
WARP_COLUMNS, MOST_COLUMNS = 256, 72


def row_tile(n: int, each: int, held: int | None = None) -> tuple[int, int, int]:
    """Rows and columns of the tile of a program that keeps whole rows of N = ``n`` in registers, and its warps.

    Up to 1024 columns, and 2048: about 4096 elements, so that a norm over 64-wide heads fills its program too. Others:
    one row, with ``each`` of its elements or more for each thread, and so many warps that few of them idle at the row's
    end (5120 columns are a warp's 20 times: four warps take five each; of eight, four would take three and the others
    wait). ``held``: columns that a row's registers are for, where they are less than the next power of two.
    """
    columns = next_power_of_2(n)
    if columns < 2048 or n == 2048:
        rows = 4096 // columns
        return rows, columns, min(16, max(4, rows * columns // 512))
    turns, idle = cdiv(n, WARP_COLUMNS), 0.0 if held else 0.15
    warps = 1
    while warps < 16 and (
        (held or columns) > MOST_COLUMNS * 32 * warps
        or (n >= 2 * each * 32 * warps and 2 * warps * cdiv(turns, 2 * warps) <= (1.0 + idle) * turns)
    ):
        warps *= 2
    return 1, columns, warps


def two_pieces(n: int) -> tuple[int, int]:
    """A row's columns in two powers of two: 4608 = 4096 + 512, where one power of two, 8192, would be nearly half
    empty. The second is 0 where n is a power of two."""
    head = 1 << (n.bit_length() - 1)
    return head, 1 << (n - head - 1).bit_length() if n > head else 0


def row_space(
    kernel: str,
    heuristic: Callable[..., Config],
    *,
    values_per_element: int,
    programs: bool = False,
    pieces: bool = False,
) -> Any:
    """The space of a kernel that keeps tiles of whole rows (``BLOCK_M`` of them) in registers, as norms do.

    ``values_per_element``: how many fp32 values of the tile are alive at once. ``programs``: with how many programs for
    each processor share the rows where partial sums are written. ``pieces``: with rows in two pieces, each a power of
    two, where that is less than one power of two. Sizes: rows, N.
    """

    def legal(config: Config, device: torch.device, dtype: torch.dtype, rows: int, n: int) -> str | None:
        columns = config["BLOCK_N"]
        if config.get("PIECES", 1) == 2:
            columns = sum(two_pieces(n))
            if columns >= config["BLOCK_N"]:
                return f"two pieces of {n} are no less than {config['BLOCK_N']}"
        tile = config["BLOCK_M"] * columns
        if tile < 32 * config["num_warps"]:
            return f"{tile} elements for {32 * config['num_warps']} threads"
        return crowded(values_per_element * tile, config["num_warps"])

    def waste(config: Config, device: torch.device, dtype: torch.dtype, rows: int, n: int) -> tuple[float, float]:
        columns = sum(two_pieces(n)) if config.get("PIECES", 1) == 2 else config["BLOCK_N"]
        return padded(rows, config["BLOCK_M"]) * columns / max(n, 1), 1.0

    values: dict[str, tuple[int, ...]] = {"BLOCK_M": (1, 2, 4, 8, 16, 32, 64), "num_warps": (1, 2, 4, 8, 16)}
    if programs:
        values["PROGRAMS"] = (1, 2, 4, 8)
    if pieces:
        values["PIECES"] = (1, 2)
    space = Space(kernel, values, heuristic, tokens=("rows",), sizes=("n",), legal=legal, waste=waste)
    space.file = Path(sys._getframe(1).f_code.co_filename)
    return space


#: Elements for each thread at least, where little is held beside the row, and where its sums are (an H100's best).
FEW, MANY = 16, 28

#: Launch option for kernels that sum products along a row and store the sum. A product that is contracted into the
#: first addition across threads, fma(x, x, what the neighbour has), rounds differently in the two threads; every thread
#: has the row's sum in the end, and which of them stores it is a race.
SAME_SUMS = {"enable_fp_fusion": False}


def size(n: int | torch.SymInt) -> sympy.Expr:
    """A size as cost formulas take it: a sympy integer, or the expression of a dynamic dimension."""
    return n.node.expr if isinstance(n, torch.SymInt) else sympy.Integer(n)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 2 under Triton's interpreter, so that tests see programs with several blocks
    of rows."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@jit
def row_offset(row, inner, outer_stride, inner_stride):
    """First element of each row in ``row``; 64-bit, since a long batch of wide rows passes 2³¹ elements."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@jit
def tile_at(ptr, row, col, inner, outer_stride, inner_stride):
    """Pointers to a tile of rows ``row`` and columns ``col``."""
    return ptr + row_offset(row, inner, outer_stride, inner_stride)[:, None] + col[None, :]
