"""NF4 dequantisation: bit for bit what bitsandbytes gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from bench.shapes import shapes
from fastft.kernels import nf4
from fastft.kernels.nf4 import NF4, OP, nf4_dequantize
from tests.kernels._fuzz import Draw, flags
from tests.kernels._samples import Named, New, Sample, nf4_states
from tests.mutation._mutant import Mutant

try:
    functional = pytest.importorskip("bitsandbytes.functional")
except pytest.skip.Exception:  # the tables at the end are needed without it, too
    functional = None

pytestmark = pytest.mark.skipif(functional is None, reason="bitsandbytes is not installed")

# Bitsandbytes' CPU library rounds fp16 as the processor at hand does: where there is a GPU, that is compared with.
DEVICES = ["cuda" if torch.cuda.is_available() else "cpu"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
#: Even row lengths are multiples of the blocksize, 64: with others bitsandbytes' CPU kernel (not its CUDA and generic
#: ones) reads the wrong scales.
SHAPES = [(1, 64), (5, 7), (131, 127), (34, 512)]
SHAPES += [(s["out_features"], s["in_features"]) for s in shapes("nf4", tag="test") if s["in_features"] % 64 == 0]


def quantised(shape, dtype, blocksize=64, double=True, device="cpu", storage=torch.uint8, seed=0):
    """A weight as bitsandbytes stores it: (packed, quant state, arguments of nf4_dequantize)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype).to(device)
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=double, quant_type="nf4", quant_storage=storage
    )
    if double:
        scales = (state.absmax, state.state2.code, state.offset, state.state2.absmax, blocksize, state.state2.blocksize)
    else:
        scales = (state.absmax, None, None, None, blocksize, 256)
    return packed, state, (packed, *scales, shape, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_bitsandbytes(shape, dtype, double, device):
    packed, state, args = quantised(shape, dtype, double=double, device=device)
    expected = functional.dequantize_4bit(packed, state)
    assert torch.equal(nf4_dequantize(*args), expected)
    assert torch.equal(OP.reference(*args), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("blocksize", [32, 128, 1024])
def test_blocksizes(blocksize, device):
    packed, state, args = quantised((6, 1024), torch.float16, blocksize, device=device)
    assert torch.equal(nf4_dequantize(*args), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(3, 32), (48, 80)], ids=str)
def test_blocks_across_rows(shape):
    """Rows that are no multiple of the blocksize: blocks run on over their ends. The result is near the original."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    out = nf4_dequantize(*quantised(shape, torch.float32, double=False)[2])
    assert (out - weight).norm() < 0.12 * weight.norm()


def test_other_storage_dtype():
    packed, state, args = quantised((64, 64), torch.float32, storage=torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    assert torch.equal(nf4_dequantize(*args), functional.dequantize_4bit(packed, state))


def test_same_as_the_fused_op_of_bitsandbytes():
    """``gemm_4bit`` on the identity gives the weight it multiplies with."""
    _, state, args = quantised((32, 64), torch.float32)
    eye = torch.eye(64)
    out = torch.ops.bitsandbytes.gemm_4bit.default(
        eye, args[0].view(-1, 1), (32, 64), state.state2.absmax, 64, "nf4",
        bias=None, absmax_8bit=state.absmax, absmax_code=state.state2.code, absmax_offset=state.offset,
    )  # fmt: skip
    assert torch.equal(out.t().contiguous(), nf4_dequantize(*args))


def test_levels_are_those_of_bitsandbytes():
    assert torch.equal(torch.tensor(NF4), functional.get_4bit_type("nf4", device="cpu"))


KINDS = {
    "one kind": ([(6, 64), (131, 64), (40, 512)], {}, 1),
    "an odd number of weights": ([(6, 64), (5, 7), (34, 512)], {}, 3),
    "another blocksize": ([(6, 64), (32, 512)], {1: {"blocksize": 128}}, 2),
    "scales of two kinds": ([(6, 64), (32, 512)], {0: {"double": False}}, 2),
    "single": ([(6, 64), (32, 512)], {0: {"double": False}, 1: {"double": False}}, 1),
    "another storage": ([(6, 64), (32, 512)], {1: {"storage": torch.bfloat16}}, 1),
    "a single weight": ([(5, 7)], {}, 1),
    "an empty one": ([(6, 64), (0, 64), (32, 512)], {}, 1),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_several_weights_are_written_in_one_launch(name, dtype, device, monkeypatch):
    shapes_, own, count = KINDS[name]
    made = [
        quantised(shape, dtype, device=device, seed=i, **own.get(i, {}))[2] if shape[0] else nothing(device, dtype)
        for i, shape in enumerate(shapes_)
    ]
    out = torch.full((sum(n * k for n, k in shapes_) + 5,), 7.0, dtype=dtype, device=device)
    outs = out[:-5].split([n * k for n, k in shapes_])
    outs = [part.view(shape) for part, shape in zip(outs, shapes_, strict=True)]
    launches, stock = [], nf4._nf4_dequantize_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return stock[grid]

    monkeypatch.setattr(nf4, "_nf4_dequantize_kernel", Counted())
    packed, scales = [args[0] for args in made], [args[1:5] for args in made]
    nf4.dequantize_into(outs, packed, scales, [n for args in made for n in args[5:7]])
    for part, args in zip(outs, made, strict=True):
        assert torch.equal(part, OP.reference(*args))
    assert bool((out[-5:] == 7).all())
    assert len(launches) == (count if nf4.use_triton(out) else 0)


def nothing(device, dtype):
    state = (torch.empty(0, dtype=torch.uint8), torch.zeros(256), torch.zeros(()), torch.empty(0))
    state = [t.to(device) for t in (torch.empty(0, 1, dtype=torch.uint8), *state)]
    return (*state, 64, 256, (0, 64), dtype)


def test_empty():
    args = (torch.empty(0, dtype=torch.uint8), torch.empty(0), None, None, None, 64, 256, (0, 64), torch.float32)
    assert nf4_dequantize(*args).shape == (0, 64)


@pytest.mark.parametrize("double", [True, False])
def test_opcheck(double):
    _, _, args = quantised((8, 64), torch.float32, double=double)
    torch.library.opcheck(torch.ops.fastft.nf4_dequantize.default, args, raise_exception=True)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({8: torch.float64}, "dtype"),
        ({5: 48}, "blocksize"),
        ({7: (8, 640)}, "shape"),
        ({1: torch.zeros(1, dtype=torch.uint8)}, "shape"),
        ({1: torch.zeros(8)}, "dtype"),
        ({2: None}, "quantization"),
        ({3: torch.zeros((), dtype=torch.float16)}, "dtype"),
    ],
    ids=["float64", "blocksize", "packed", "absmax", "absmax-dtype", "half-state", "offset-dtype"],
)
def test_refusals(change, code):
    args = list(quantised((8, 64), torch.float32)[2])
    for position, wrong in change.items():
        args[position] = wrong
    reason = OP.supported(*args)
    assert reason is not None and reason.code == code
    with pytest.raises(ValueError, match="nf4_dequantize"):
        nf4_dequantize(*args)


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _nf4_samples(new: New, n: int) -> Named:
    for name, state in nf4_states(new, n):
        quant = (*state["quant"], None, None, None)[:4]
        yield name, (state["packed"], *quant, 64, 2, (2 * n, 64), new.dtype), {}


SAMPLES = {"nf4_dequantize": _nf4_samples}


def _nf4_case(d: Draw) -> Sample:
    blocksize = d(st.sampled_from((32, 64, 128)))
    n, k = d(st.integers(1, 9)), d(st.integers(1, 200))
    blocks, blocksize2 = -(-n * k // blocksize), d(st.sampled_from((2, 256)))
    packed = d.integers(256, (n * k + 1) // 2, 1).to(torch.uint8)
    scales: tuple[Any, ...] = (torch.rand(blocks, generator=d.generator).to(d.device), None, None, None)
    if d(flags):
        second = torch.rand(-(-blocks // blocksize2), generator=d.generator).to(d.device)
        code = torch.rand(256, generator=d.generator).to(d.device)
        scales = (d.integers(256, blocks).to(torch.uint8), code, torch.tensor(0.02, device=d.device), second)
    return Sample("", (packed, *scales, blocksize, blocksize2, (n, k), d.dtype), {})


FUZZ = {"nf4_dequantize": _nf4_case}

MUTANTS = (
    Mutant(
        "nf4: weights are written over each other",
        "kernels/nf4.py",
        "        out_ptr += sizes[i]\n",
        "",
        "tests/kernels/test_nf4.py -k 'one_launch and one_kind or one_launch and single'",
        interpret=True,
    ),
    Mutant(
        "nf4: tiles of the weights before are counted once",
        "kernels/nf4.py",
        "        tile -= tiles\n",
        "        tile -= 1\n",
        "tests/kernels/test_nf4.py -k one_launch",
        interpret=True,
    ),
    Mutant(
        "nf4: blocks of other sizes are of one kind",
        "kernels/nf4.py",
        "{(code is None, *blocks) for",
        "{(code is None,) for",
        "tests/kernels/test_nf4.py -k one_launch",
        interpret=True,
    ),
    Mutant(
        "nf4: nibbles swapped",
        "kernels/nf4.py",
        "    weight = tl.interleave(high, low)\n",
        "    weight = tl.interleave(low, high)\n",
        "tests/kernels/test_nf4.py",
        interpret=True,
    ),
    Mutant(
        "nf4: offset of double quantisation forgotten",
        "kernels/nf4.py",
        " + tl.load(offset_ptr)\n",
        "\n",
        "tests/kernels/test_nf4.py",
        interpret=True,
    ),
    Mutant(
        "nf4: a level off",
        "kernels/nf4.py",
        "0.07958029955625534",
        "0.07968029955625534",
        "tests/kernels/test_nf4.py",
    ),
    Mutant(
        "nf4: scales of the second level shifted",
        "kernels/nf4.py",
        "block // BLOCKSIZE2, mask",
        "(block + 1) // BLOCKSIZE2, mask",
        "tests/kernels/test_nf4.py -k 'equals_bitsandbytes and 34'",
        interpret=True,
    ),
)
