"""LayerNorm: kernel against fp64, layouts, raw ops, the formula itself."""

from __future__ import annotations

import numpy as np
import pytest
import sympy
import torch
from hypothesis import strategies as st

from fastft.kernels._op import OPS
from fastft.kernels.layer_norm import BACKWARD, FORWARD, MAX_N, _pieces, layer_norm, reference, supported
from tests.kernels._check import check_op
from tests.kernels._derivations import BOTH, EPS, ROW_TILES, Array, Derivation, over_rows
from tests.kernels._expressions import ratio
from tests.kernels._fuzz import SIZES, Draw, flags
from tests.kernels._samples import Named, New, Sample
from tests.mutation._mutant import Mutant

OP = OPS["layer_norm"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape, dtype, device, weight=True, bias=True, shift=0.0):
    x = (torch.randn(shape, dtype=dtype, device=device) + shift).requires_grad_()
    w = torch.randn(shape[-1], dtype=dtype, device=device, requires_grad=True) if weight else None
    b = torch.randn(shape[-1], dtype=dtype, device=device, requires_grad=True) if bias else None
    return x, w, b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 64), (3, 7, 4, 96), (65, 1), (1, 3, 4100), (300, 33)])
def test_matches_reference(shape, dtype, device):
    check_op(OP, inputs(shape, dtype, device), 1e-5, length=max(shape[-1], 700))


@pytest.fixture
def in_two_pieces():
    with FORWARD.using({"PIECES": 2}), BACKWARD.using({"PIECES": 2}):
        yield


@pytest.mark.usefixtures("in_two_pieces")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 5, 48, 1100, 64])
def test_rows_in_two_pieces(n, dtype, device):
    """2 + 1, 4 + 1, 32 + 16 elements, 1024 + 76 in 128; a power of two stays in one."""
    check_op(OP, inputs((3, 7, n), dtype, device), 1e-5, length=max(n, 700))
    check_op(OP, (*inputs((9, n), dtype, device, bias=False), 1e-5, None, True), length=max(n, 700))
    check_op(OP, inputs((9, n), dtype, device, weight=False, shift=30.0), 1e-5, length=max(n, 700))


def test_two_pieces_are_taken_where_one_would_be_nearly_half_empty():
    found = {n: FORWARD.heuristic(torch.device("cuda"), torch.bfloat16, 8192, n)["PIECES"]
             for n in (768, 1100, 2304, 2560, 3072, 4096, 4608, 5120, 6144, 18432)}  # fmt: skip
    assert [n for n, pieces in found.items() if pieces == 2] == [1100, 2304, 4608, 18432]


def test_two_pieces_are_offered_where_they_are_less():
    found = {n: 2 in {c["PIECES"] for c in FORWARD.candidates(torch.device("cuda"), torch.bfloat16, 8192, n)[0]}
             for n in (1024, 1025, 1536, 1537, 2560, 3584, 4096, 4608)}  # fmt: skip
    assert found == {1024: False, 1025: True, 1536: True, 1537: False, 2560: True, 3584: False, 4096: False, 4608: True}
    assert _pieces(4608, {"BLOCK_N": 8192, "PIECES": 2}) == {"BLOCK_N": 4096, "TAIL": 512}
    assert _pieces(4096, {"BLOCK_N": 4096, "PIECES": 2}) == {"BLOCK_N": 4096, "TAIL": 0}


def test_large_mean_does_not_cancel(device):
    for seed in range(60):  # how far off a rounded mean is differs from draw to draw
        torch.manual_seed(seed)
        x, w, b = inputs((4, 50), torch.float32, device, shift=3000.0)
        check_op(OP, (x, w, b), 1e-5, length=50)


@pytest.mark.parametrize("weight, bias", [(True, False), (False, True), (False, False)])
def test_without_weight_or_bias(weight, bias, device):
    check_op(OP, inputs((2, 9, 80), torch.float16, device, weight, bias), 1e-5, length=80)


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_weight_and_result_in_other_dtypes(out_dtype, device):
    x = torch.randn(2, 6, 48, dtype=torch.float16, device=device, requires_grad=True)
    w, b = (torch.randn(48, dtype=torch.float32, device=device, requires_grad=True) for _ in range(2))
    check_op(OP, (x, w, b), 1e-6, out_dtype, length=48)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided_grads", [False, True])
def test_passes_x_on(dtype, strided_grads, device):
    """What x's other readers send back is in dx, whatever its layout; also where nobody reads the result."""
    tensors = inputs((3, 7, 96), dtype, device)
    check_op(OP, (*tensors, 1e-6, None, True), length=700, strided_grads=strided_grads)
    same = layer_norm(*tensors, 1e-6, pass_through=True)[1]
    (dx,) = torch.autograd.grad(same.sum(), tensors[0])
    assert torch.equal(dx, torch.ones_like(dx))


def test_the_streams_gradient_is_added_before_the_rounding(device):
    x, w, b = inputs((64, 128), torch.bfloat16, device)
    dy, z = torch.randn_like(x), torch.randn_like(x)
    (dx,) = torch.autograd.grad(layer_norm(x, w, b, 1e-6, pass_through=True), x, (dy, z))
    wide, w, b = (t.detach().double().requires_grad_() for t in (x, w, b))
    (exact,) = torch.autograd.grad(reference(wide, w, b, 1e-6, pass_through=True), wide, (dy, z))
    once = (exact.bfloat16().double() - exact).norm()
    assert (dx.double() - exact).norm() <= 1.02 * once


@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
def test_only_what_is_asked_for(wanted, device):
    tensors = inputs((4, 32), torch.float32, device)
    everything = torch.autograd.grad(layer_norm(*tensors, 1e-6).square().sum(), tensors)
    leaves = [t if want else t.detach() for t, want in zip(tensors, wanted, strict=True)]
    asked = torch.autograd.grad(layer_norm(*leaves, 1e-6).square().sum(), [t for t in leaves if t.requires_grad])
    expected = [g for g, want in zip(everything, wanted, strict=True) if want]
    assert all(torch.equal(a, e) for a, e in zip(asked, expected, strict=True))


LAYOUTS = {
    "heads transposed": lambda d: torch.randn(2, 5, 4, 32, device=d).transpose(1, 2),
    "slice of a fused projection": lambda d: torch.randn(2, 5, 12 * 32, device=d)[..., 64:192].view(2, 5, 4, 32),
    "three strides": lambda d: torch.randn(3, 5, 6, 32, device=d)[:, ::2, ::2],
    "rows not contiguous": lambda d: torch.randn(2, 32, 7, device=d).transpose(1, 2),
    "one row": lambda d: torch.randn(32, device=d),
    "empty": lambda d: torch.randn(2, 0, 32, device=d),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided_grads", [False, True])
def test_layouts(layout, strided_grads, device):
    x = LAYOUTS[layout](device).requires_grad_()
    w, b = (torch.randn(32, device=device, requires_grad=True) for _ in range(2))
    check_op(OP, (x, w, b), 1e-6, length=32, strided_grads=strided_grads)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_raw_ops(layout, device):
    x = LAYOUTS[layout](device)
    w, b = torch.randn(32, device=device), torch.randn(32, device=device)
    torch.library.opcheck(torch.ops.fastft.layer_norm.default, (x, w, b, 1e-6, torch.float16))
    y, m, r = torch.ops.fastft.layer_norm(x, w, b, 1e-6, None)
    for want in [(True, True, True), (True, False, False), (False, True, True)]:
        for z in (None, torch.randn(x.shape, device=device)):
            args = (torch.randn_like(y), x, w, m, r, z, *want)
            torch.library.opcheck(torch.ops.fastft.layer_norm_backward.default, args)


@pytest.mark.parametrize("fn", [layer_norm, reference])
def test_gradcheck(fn, device):
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, w, b: fn(x, w, b, 1e-6), (x, w, b))
    assert torch.autograd.gradcheck(lambda x: fn(x, None, None, 1e-6), (x,))


@pytest.mark.parametrize(
    "x, weight, bias, out_dtype, code",
    [
        (torch.empty(2, 8), torch.empty(8), torch.empty(8), None, None),
        (torch.empty(2, 8, dtype=torch.int32), torch.empty(8), None, None, "dtype"),
        (torch.empty(2, 8), torch.empty(8), None, torch.int32, "dtype"),
        (torch.empty(2, 8), torch.empty(8), torch.empty(8, dtype=torch.float16), None, "dtype"),
        (torch.empty(2, 8), torch.empty(4), None, None, "shape"),
        (torch.empty(2, 8), torch.empty(8), torch.empty(2, 8), None, "shape"),
        (torch.empty(()), None, None, None, "shape"),
        (torch.empty(1, MAX_N + 1), None, None, None, "size"),
    ],
)
def test_supported(x, weight, bias, out_dtype, code):
    reason = supported(x, weight, bias, 1e-6, out_dtype)
    assert (reason and reason.code) == code


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _layer_norm_samples(new: New, n: int) -> Named:
    yield "affine", (new(3, n, 5 * n), new(5 * n), new(5 * n), 1e-5), {}
    yield "biasless", (new(2, 3, n, 4).transpose(1, 2), new(4), None, 1e-5), {}
    yield "plain", (new(2, 7 * n), None, None, 1e-5), {}
    yield "residual stream", (new(2, n, 5), new(5), new(5), 1e-5), {"pass_through": True}


SAMPLES = {"layer_norm": _layer_norm_samples}


def _layer_norm_case(d: Draw) -> Sample:
    n = d(st.integers(2, 130))
    weight = d.maybe(lambda: d.tensor(n, scale=1.0))
    args = (d.tensor(d(SIZES), d(SIZES), n), weight, d.maybe(lambda: d.tensor(n)), 1e-5)
    return Sample("", args, {"pass_through": d(flags)})


FUZZ = {"layer_norm": _layer_norm_case}
ROWWISE = ("layer_norm",)


def _layer_norm_derivations() -> list[Derivation]:
    def normed(x: Array) -> Array:
        def of_row(row: Array) -> Array:
            centred = row - np.sum(row) / len(row)
            return centred / sympy.sqrt(np.sum(centred**2) / len(row) + ratio(EPS))

        return over_rows(of_row)(x)

    shapes = {"x": (9, 3), "w": (3,), "b": (3,)}
    return [
        Derivation(
            "weight and bias",
            shapes,
            lambda fn, x, w, b: fn(x, w, b, EPS),
            lambda x, w, b: [normed(x) * w + b],
            simplify=BOTH,
        ),
        Derivation("plain", {"x": (3, 3)}, lambda fn, x: fn(x, None, None, EPS), lambda x: [normed(x)]),
        Derivation(
            "one piece",
            {"x": (5, 2), "w": (2,), "b": (2,)},
            lambda fn, x, w, b: fn(x, w, b, EPS),
            lambda x, w, b: [normed(x) * w + b],
        ),
        Derivation(
            "residual stream",
            {"x": (3, 3)},
            lambda fn, x: fn(x, None, None, EPS, pass_through=True),
            lambda x: [normed(x), x],
            outputs=2,
        ),
    ]


DERIVATIONS = {"layer_norm": _layer_norm_derivations}

#: Rows of three in two pieces.
SMALL_TILES = {
    **ROW_TILES,
    "_pieces": lambda n, tile: {"BLOCK_N": 2, "TAIL": 1} if n == 3 else {"BLOCK_N": tile["BLOCK_N"], "TAIL": 0},
}

MUTANTS = (
    Mutant(
        "layer_norm: dx without the mean of g",
        "kernels/layer_norm.py",
        "dx = r * (g - mean - x * slope)",
        "dx = r * (g - x * slope)",
        'tests/kernels/test_layer_norm.py -k "matches_reference"',
        interpret=True,
    ),
    Mutant(
        "layer_norm: db is dw",
        "kernels/layer_norm.py",
        "            db += dy\n",
        "            db += dy * x\n",
        'tests/kernels/test_layer_norm.py -k "matches_reference"',
        interpret=True,
    ),
    Mutant(
        "layer_norm: backward around a rounded mean",
        "kernels/layer_norm.py",
        "        x = tl.where(mask, x - missed, 0.0) * r\n",
        "        x = x * r\n",
        "tests/kernels/test_layer_norm.py -k large_mean",
        interpret=True,
    ),
    Mutant(
        "layer_norm: PyTorch dx sign",
        "kernels/layer_norm.py",
        "- x_hat * (g * x_hat).mean(-1, keepdim=True))\n",
        "+ x_hat * (g * x_hat).mean(-1, keepdim=True))\n",
        'tests/kernels/test_layer_norm.py -k "matches_reference"',
    ),
    Mutant(
        "layer_norm: variance over N - 1",
        "kernels/layer_norm.py",
        "_mean(x * x, x_t * x_t, N, TAIL) + EPS)",
        "_mean(x * x, x_t * x_t, N - 0.5, TAIL) + EPS)",
        'tests/kernels/test_layer_norm.py -k "matches_reference"',
        interpret=True,
    ),
    Mutant(
        "layer_norm: the stream's gradient twice",
        "kernels/layer_norm.py",
        "dx.copy_(through if z is None else through + z.to(r.dtype))",
        "dx.copy_(through if z is None else through + 2 * z.to(r.dtype))",
        "tests/kernels/test_layer_norm.py -k passes_x_on",
    ),
    Mutant(
        "layer_norm: the stream's gradient has dy's place in memory",
        "kernels/layer_norm.py",
        "dx = dx + _load(z_ptr, row, col, mask, inner, z_outer, z_inner)\n",
        "dx = dx + _load(z_ptr, row, col, mask, inner, dx_outer + 1, dx_inner)\n",
        "tests/kernels/test_layer_norm.py -k passes_x_on",
        interpret=True,
    ),
    Mutant(
        "layer_norm: the tail is not in the sums",
        "kernels/layer_norm.py",
        "        total = total + tl.sum(tail, axis=1)\n",
        "        total = total + 0.0 * tl.sum(tail, axis=1)\n",
        "tests/kernels/test_layer_norm.py -k rows_in_two_pieces",
        interpret=True,
    ),
    Mutant(
        "layer_norm: dx of the tail by the head's mean alone",
        "kernels/layer_norm.py",
        "dx_t = r * (g_t - mean - x_t * slope)",
        "dx_t = r * (g_t - x_t * slope)",
        "tests/kernels/test_layer_norm.py -k rows_in_two_pieces",
        interpret=True,
    ),
    Mutant(
        "layer_norm: dw of the tail in the head's place",
        "kernels/layer_norm.py",
        "dw_ptr + first + col_t, tl.sum(dw_t",
        "dw_ptr + first + col_t - BLOCK_N, tl.sum(dw_t",
        "tests/kernels/test_layer_norm.py -k rows_in_two_pieces",
        interpret=True,
    ),
)
