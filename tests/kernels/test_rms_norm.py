"""RMSNorm: kernel against fp64, layouts, raw ops, the formula itself."""

from __future__ import annotations

import numpy as np
import pytest
import sympy
import torch
from hypothesis import strategies as st

from fastft.kernels._op import OPS
from fastft.kernels.rms_norm import BACKWARD, FORWARD, MAX_N, reference, rms_norm, supported
from tests.kernels._check import check_op
from tests.kernels._derivations import BOTH, EPS, ROW_TILES, Array, Derivation, over_rows
from tests.kernels._expressions import ratio
from tests.kernels._fuzz import SIZES, WIDTHS, Draw, flags
from tests.kernels._samples import Named, New, Sample
from tests.mutation._mutant import Mutant

OP = OPS["rms_norm"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape, dtype, device, weight=True):
    x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
    w = torch.randn(shape[-1], dtype=dtype, device=device, requires_grad=True) if weight else None
    return x, w


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 64), (3, 7, 4, 96), (65, 1), (1, 3, 4100), (300, 33)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_matches_reference(shape, dtype, offset, device):
    check_op(OP, inputs(shape, dtype, device), 1e-6, offset, length=max(shape[-1], 700))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_weight(dtype, device):
    check_op(OP, inputs((2, 9, 80), dtype, device, weight=False), 1e-5, length=80)


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_weight_and_result_in_other_dtypes(out_dtype, device):
    x = torch.randn(2, 6, 48, dtype=torch.float16, device=device, requires_grad=True)
    w = torch.randn(48, dtype=torch.float32, device=device, requires_grad=True)
    check_op(OP, (x, w), 1e-6, 0.0, out_dtype, length=48)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided_grads", [False, True])
def test_passes_x_on(dtype, strided_grads, device):
    """What x's other readers send back is in dx, whatever its layout."""
    args = (*inputs((3, 7, 96), dtype, device), 1e-6, 0.0, None, True)
    check_op(OP, args, length=700, strided_grads=strided_grads)


def test_the_streams_gradient_is_added_before_the_rounding(device):
    x, w = inputs((64, 128), torch.bfloat16, device)
    dy, z = torch.randn_like(x), torch.randn_like(x)
    (dx,) = torch.autograd.grad(rms_norm(x, w, 1e-6, pass_through=True), x, (dy, z))
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference(wide, w.detach().double(), 1e-6, pass_through=True), wide, (dy, z))
    once = (exact.bfloat16().double() - exact).norm()
    assert (dx.double() - exact).norm() <= 1.02 * once


def test_nobody_reads_the_result_or_what_is_passed_on(device):
    x, w = inputs((4, 32), torch.float32, device)
    y, same = rms_norm(x, w, 1e-6, pass_through=True)
    assert same.data_ptr() == x.data_ptr() and same.grad_fn is y.grad_fn
    (dx,) = torch.autograd.grad(same.sum(), x, retain_graph=True)
    assert torch.equal(dx, torch.ones_like(x))
    grads = torch.autograd.grad(y.sum(), [x, w])
    assert all(map(torch.equal, grads, torch.autograd.grad(rms_norm(x, w, 1e-6).sum(), [x, w])))
    with torch.no_grad():
        assert torch.equal(rms_norm(x, w, 1e-6, pass_through=True)[1], x)


def test_only_what_is_asked_for(device):
    x, w = inputs((4, 32), torch.float32, device)
    (dx,) = torch.autograd.grad(rms_norm(x, w.detach(), 1e-6).sum(), [x])
    (dw,) = torch.autograd.grad(rms_norm(x.detach(), w, 1e-6).sum(), [w])
    dx_too, dw_too = torch.autograd.grad(rms_norm(x, w, 1e-6).sum(), [x, w])
    assert torch.equal(dx, dx_too) and torch.equal(dw, dw_too)


def test_repeats_bit_for_bit(device):
    x, w = inputs((257, 40), torch.float16, device)
    first, second = (torch.autograd.grad(rms_norm(x, w, 1e-6).float().square().sum(), [x, w]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


LAYOUTS = {
    "heads of a projection": lambda d: torch.randn(2, 5, 4 * 32, device=d).view(2, 5, 4, 32),
    "heads transposed": lambda d: torch.randn(2, 5, 4, 32, device=d).transpose(1, 2),
    "slice of a fused projection": lambda d: torch.randn(2, 5, 12 * 32, device=d)[..., 64:192].view(2, 5, 4, 32),
    "three strides": lambda d: torch.randn(3, 5, 6, 32, device=d)[:, ::2, ::2],
    "rows not contiguous": lambda d: torch.randn(2, 32, 7, device=d).transpose(1, 2),
    "expanded": lambda d: torch.randn(2, 1, 32, device=d).expand(2, 5, 32),
    "one row": lambda d: torch.randn(32, device=d),
    "empty": lambda d: torch.randn(2, 0, 32, device=d),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided_grads", [False, True])
def test_layouts(layout, strided_grads, device):
    x = LAYOUTS[layout](device).requires_grad_()
    w = torch.randn(32, device=device, requires_grad=True)
    check_op(OP, (x, w), 1e-6, length=32, strided_grads=strided_grads)
    y = rms_norm(x, w, 1e-6)
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_raw_ops(layout, device):
    x = LAYOUTS[layout](device)
    w = torch.randn(32, device=device)
    torch.library.opcheck(torch.ops.fastft.rms_norm.default, (x, w, 1e-6, 0.0, torch.float16))
    y, r = torch.ops.fastft.rms_norm(x, w, 1e-6, 0.0, None)
    for want in [(True, True), (True, False), (False, True)]:
        for z in (None, torch.randn(x.shape, device=device)):
            args = (torch.randn_like(y), x, w, r, z, 0.0, *want)
            torch.library.opcheck(torch.ops.fastft.rms_norm_backward.default, args)


@pytest.mark.parametrize("fn", [rms_norm, reference])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gradcheck(fn, offset, device):
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: fn(x, w, 1e-6, offset), (x, w))
    assert torch.autograd.gradcheck(lambda x: fn(x, None, 1e-6, offset), (x,))


def test_compiles_without_retracing_the_body(device):
    x, w = inputs((2, 5, 64), torch.float32, device)
    compiled = torch.compile(lambda x, w: rms_norm(x, w, 1e-6, 1.0), backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(x, w).square().sum(), [x, w])
    eager = torch.autograd.grad(rms_norm(x, w, 1e-6, 1.0).square().sum(), [x, w])
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_autocast_does_not_reach_the_maths(device):
    x, w = inputs((4, 64), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        y = rms_norm(x, w, 1e-6)
    assert torch.equal(y, rms_norm(x, w, 1e-6))


@pytest.mark.parametrize(
    "x, weight, out_dtype, code",
    [
        (torch.empty(2, 8), torch.empty(8), None, None),
        (torch.empty(2, 8, dtype=torch.int32), torch.empty(8), None, "dtype"),
        (torch.empty(2, 8), torch.empty(8), torch.int32, "dtype"),
        (torch.empty(2, 8), torch.empty(4), None, "shape"),
        (torch.empty(()), None, None, "shape"),
        (torch.empty(1, MAX_N + 1), None, None, "size"),
    ],
)
def test_supported(x, weight, out_dtype, code):
    reason = supported(x, weight, 1e-6, 0.0, out_dtype)
    assert (reason and reason.code) == code


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _rms_norm_samples(new: New, n: int) -> Named:
    yield "llama", (new(3, n, 5 * n), new(5 * n), 1e-6), {}
    yield "gemma", (new(2, 3, n, 4).transpose(1, 2), new(4), 1e-5, 1.0), {}
    yield "weightless", (new(2, 7 * n), None, 1e-6), {}
    yield "residual stream", (new(2, n, 5), new(5), 1e-6), {"pass_through": True}


SAMPLES = {"rms_norm": _rms_norm_samples}


def _rms_norm_case(d: Draw) -> Sample:
    n = d(WIDTHS)
    weight = d.maybe(lambda: d.tensor(n, scale=1.0))
    offset = d(st.sampled_from((0.0, 1.0))) if weight is not None else 0.0
    args = (d.tensor(d(SIZES), d(SIZES), n), weight, d(st.sampled_from((1e-6, 1e-3))), offset)
    return Sample("", args, {"pass_through": d(flags)})


FUZZ = {"rms_norm": _rms_norm_case}
ROWWISE = ("rms_norm",)


def _rms_norm_derivations() -> list[Derivation]:
    def normed(x: Array) -> Array:
        return over_rows(lambda row: row / sympy.sqrt(np.sum(row**2) / len(row) + ratio(EPS)))(x)

    # Nine rows are five tiles of two, for four programs: one has two tiles.
    shapes = {"x": (9, 3), "w": (3,)}
    return [
        Derivation("weight", shapes, lambda fn, x, w: fn(x, w, EPS), lambda x, w: [normed(x) * w], simplify=BOTH),
        Derivation("1 + weight", shapes, lambda fn, x, w: fn(x, w, EPS, 1.0), lambda x, w: [normed(x) * (1 + w)]),
        Derivation("weightless", {"x": (3, 3)}, lambda fn, x: fn(x, None, EPS), lambda x: [normed(x)]),
        Derivation(
            "frozen weight", shapes, lambda fn, x, w: fn(x, w, EPS), lambda x, w: [normed(x) * w], frozen=("w",)
        ),
        Derivation(
            "residual stream",
            shapes,
            lambda fn, x, w: fn(x, w, EPS, pass_through=True),
            lambda x, w: [normed(x) * w, x],
            outputs=2,
        ),
    ]


def test_long_rows_have_so_many_warps_that_few_idle_at_the_end():
    """N: warps of the forward, of the backward. 5120 are 20 times a warp's 256 columns: five for each of four."""
    sizes = (1152, 2048, 2560, 3072, 3584, 4096, 4608, 5120, 6144, 8192, MAX_N)
    found = {
        n: tuple(s.heuristic(torch.device("cuda"), torch.bfloat16, 8192, n)["num_warps"] for s in (FORWARD, BACKWARD))
        for n in sizes
    }
    expected = [(1, 1), (8, 8), (2, 2), (4, 2), (4, 4), (8, 4), (4, 4), (4, 4), (8, 4), (16, 8), (16, 16)]
    assert found == dict(zip(sizes, expected, strict=True))


DERIVATIONS = {"rms_norm": _rms_norm_derivations}

SMALL_TILES = ROW_TILES

MUTANTS = (
    Mutant(
        "rms_norm: sign of the second term of dx",
        "kernels/rms_norm.py",
        "dx = r * (g - x * (tl.sum",
        "dx = r * (g + x * (tl.sum",
        'tests/kernels/test_rms_norm.py -k "matches_reference or without_weight"',
        interpret=True,
    ),
    Mutant(
        "rms_norm: dx without its second term",
        "kernels/rms_norm.py",
        "dx = r * (g - x * (tl.sum(g * x, axis=1) / N)[:, None])",
        "dx = r * g",
        'tests/kernels/test_rms_norm.py -k "matches_reference or without_weight"',
        interpret=True,
    ),
    Mutant(
        "rms_norm: dw without rstd",
        "kernels/rms_norm.py",
        "            total += dy * x\n",
        "            total += dy * x / r\n",
        'tests/kernels/test_rms_norm.py -k "matches_reference or without_weight"',
        interpret=True,
    ),
    Mutant(
        "rms_norm: offset forgotten in backward",
        "kernels/rms_norm.py",
        "    if HAS_WEIGHT:\n"
        "        w = tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32) + OFFSET\n"
        "    # Each",
        "    if HAS_WEIGHT:\n        w = tl.load(w_ptr + col, mask=col < N, other=0.0).to(tl.float32)\n    # Each",
        "tests/kernels/test_rms_norm.py::test_matches_reference[1.0-shape0-dtype0]",
        interpret=True,
    ),
    Mutant(
        "rms_norm: epsilon outside the root",
        "kernels/rms_norm.py",
        "r = 1.0 / tl.sqrt_rn(tl.sum(x * x, axis=1) / N + EPS)",
        "r = 1.0 / (tl.sqrt_rn(tl.sum(x * x, axis=1) / N) + EPS)",
        "tests/kernels/test_rms_norm.py::test_matches_reference[0.0-shape2-dtype0]",
        interpret=True,
    ),
    Mutant(
        "rms_norm: rounded before the weight",
        "kernels/rms_norm.py",
        "    y = x * r[:, None]\n    if HAS_WEIGHT",
        "    y = (x * r[:, None]).to(x_ptr.dtype.element_ty).to(tl.float32)\n    if HAS_WEIGHT",
        "tests/kernels/test_rms_norm.py::test_weight_and_result_in_other_dtypes[out_dtype0]",
        interpret=True,
    ),
    Mutant(
        "rms_norm: PyTorch dx with a factor 1.01",
        "kernels/rms_norm.py",
        "through = r.unsqueeze(-1) * (g - x_hat",
        "through = 1.01 * r.unsqueeze(-1) * (g - x_hat",
        'tests/kernels/test_rms_norm.py -k "matches_reference or without_weight"',
    ),
    Mutant(
        "rms_norm: dw of the first program only",
        "kernels/rms_norm.py",
        "dweight.copy_(partial.sum(0)) if",
        "dweight.copy_(partial[0]) if",
        "tests/kernels/test_rms_norm.py::test_matches_reference[0.0-shape1-dtype0]",
        interpret=True,
    ),
    Mutant(
        "rms_norm: the stream's gradient is dropped",
        "kernels/rms_norm.py",
        "                dx = dx + tl.load(z_at, mask=mask, other=0.0).to(tl.float32)\n",
        "                dx = dx + 0.0 * tl.load(z_at, mask=mask, other=0.0).to(tl.float32)\n",
        "tests/kernels/test_rms_norm.py -k passes_x_on",
        interpret=True,
    ),
    Mutant(
        "rms_norm: the stream's gradient takes part in the mean",
        "kernels/rms_norm.py",
        "            g = g if weight is None else g * (weight.to(r.dtype) + offset)\n            through",
        "            g = (g if weight is None else g * (weight.to(r.dtype) + offset)) + (0 if z is None else "
        "z.to(r.dtype))\n"
        "            through",
        "tests/kernels/test_rms_norm.py -k passes_x_on",
    ),
    Mutant(
        "rms_norm: rounded before the stream's gradient is added",
        "kernels/rms_norm.py",
        "dx.copy_(through if z is None else through + z.to(r.dtype))",
        "dx.copy_(through if z is None else through.to(dx.dtype) + z)",
        "tests/kernels/test_rms_norm.py -k added_before",
    ),
)
