"""Copies next to each other: every layout, bit for bit, and nothing beside them."""

from __future__ import annotations

import re

import pytest
import torch

from fastft.kernels import _side_by_side as module
from fastft.kernels._op import INTERPRET
from fastft.kernels._side_by_side import side_by_side
from fastft.kernels._triton import HAS_TRITON

F32, BF16 = torch.float32, torch.bfloat16

LAYOUTS = {
    "dense": lambda t: t.clone(),
    "columns of a wider matrix": lambda t: torch.cat((t, t, t), 1)[:, t.shape[1] : 2 * t.shape[1]],
    "one row for all": lambda t: t[:1].expand(t.shape),
    "transposed": lambda t: t.t().contiguous().t(),
    "every second row": lambda t: torch.stack((t, t), 1)[:, 0],
}


@pytest.mark.parametrize("dtype", [F32, torch.float16, BF16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("widths, spare", [((16,), 0), ((48, 8, 1032), 8), ((5, 1, 1200), 3)], ids=str)
def test_every_number_is_where_it_belongs(widths, spare, layout, dtype, device):
    """Widths over one tile, widths that are no multiple of 8; rows that are no whole number of tiles."""
    sources = [LAYOUTS[layout](torch.randn(7, n, device=device).to(dtype)) for n in widths]
    out = torch.full((7, sum(widths) + spare), torch.nan, dtype=dtype, device=device)
    columns = side_by_side(out, sources)
    assert torch.equal(out[:, : sum(widths)], torch.cat(sources, 1))
    assert out[:, sum(widths) :].isnan().all()
    for column, source in zip(columns, sources, strict=True):
        assert torch.equal(column, source) and column.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()


def test_columns_of_a_wider_matrix_are_written(device):
    """``out`` may be columns itself, and stand anywhere."""
    sources = [torch.randn(5, n, device=device) for n in (12, 3)]
    whole = torch.zeros(5, 40, device=device)
    side_by_side(whole[:, 7:25], sources)
    assert torch.equal(whole[:, 7:22], torch.cat(sources, 1))
    assert not whole[:, :7].any() and not whole[:, 22:].any()


def test_no_rows(device):
    (column,) = side_by_side(torch.empty(0, 9, device=device), [torch.empty(0, 8, device=device)])
    assert column.shape == (0, 8)


@pytest.mark.skipif(INTERPRET or not HAS_TRITON, reason="Triton's compiler")
@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled, in place of a GPU")
@pytest.mark.parametrize("widths, spare", [((4096, 1024, 1024), 48), ((4096,), 16), ((4096,), 8)], ids=str)
def test_16_bytes_at_a_time(widths, spare):
    """For each matrix, and where rows are a multiple of 8 elements and not of 16."""
    from tests.kernels._hopper import compiling

    with compiling(module) as kernels:
        side_by_side(torch.empty(8, sum(widths) + spare, dtype=BF16), [torch.empty(8, n, dtype=BF16) for n in widths])
    (kernel,) = kernels
    accesses = re.findall(r"(?:ld|st)\.global\S*", kernel.asm["ptx"])
    assert set(accesses) == {"ld.global.v4.b32", "st.global.v4.b32"}
    assert len(accesses) == 2 * len(widths) * module.ROWS * module.COLUMNS // 128 // 8
