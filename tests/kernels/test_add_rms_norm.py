"""RMSNorm of a sum: bit for bit the two by themselves, kernel against fp64, layouts, the formula itself."""

from __future__ import annotations

import numpy as np
import pytest
import sympy
import torch
from hypothesis import strategies as st

from fastft.kernels._op import OPS
from fastft.kernels.add_rms_norm import add_rms_norm, supported
from fastft.kernels.rms_norm import MAX_N, rms_norm
from tests.kernels._check import check_op
from tests.kernels._derivations import EPS, Array, Derivation, over_rows
from tests.kernels._expressions import ratio
from tests.kernels._fuzz import SIZES, WIDTHS, Draw
from tests.kernels._samples import Named, New, Sample
from tests.kernels.test_rms_norm import LAYOUTS
from tests.mutation._mutant import Mutant

OP = OPS["add_rms_norm"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(2, 5, 64), (65, 1), (1, 3, 4100), (300, 33), (2, 0, 8)]


def inputs(shape, dtype, device):
    """x, the residual and the norm's weight."""
    return [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in (shape, shape, shape[-1:])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_bit_for_bit_the_two_by_themselves(shape, dtype, offset, device):
    """The gradients, too: it is the norm's own backward."""
    x, residual, w = leaves = inputs(shape, dtype, device)
    dys = [torch.randn(shape, dtype=dtype, device=device) for _ in range(2)]
    found = []
    for out in (add_rms_norm(*leaves, 1e-6, offset), rms_norm(x + residual, w, 1e-6, offset, None, True)):
        found.append([*out, *torch.autograd.grad(out, leaves, dys)])
    assert all(map(torch.equal, *found)) and len(found[0]) == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:-1])
def test_matches_reference(shape, dtype, device):
    check_op(OP, inputs(shape, dtype, device), 1e-6, length=max(shape[-1], 700))


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_weight_and_result_in_other_dtypes(out_dtype, device):
    x, residual, _ = inputs((2, 6, 48), torch.float16, device)
    w = torch.randn(48, device=device, requires_grad=True)
    check_op(OP, (x, residual, w), 1e-6, 0.0, out_dtype, length=48)


@pytest.mark.parametrize("frozen", ["x", "residual"])
def test_a_gradient_of_one_of_what_is_added(frozen, device):
    x, residual, w = inputs((4, 32), torch.float32, device)
    (x if frozen == "x" else residual).requires_grad_(False)
    wanted, w = residual if frozen == "x" else x, w.detach()
    y, total = add_rms_norm(x, residual, w, 1e-6)
    (found,) = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    leaf = (x + residual).detach().requires_grad_()
    assert torch.equal(found, *torch.autograd.grad(rms_norm(leaf, w, 1e-6).sum(), leaf))
    assert torch.equal(*torch.autograd.grad(total.sum(), wanted), torch.ones_like(x)), "nobody reads the norm"


def test_a_gradient_of_the_weight_alone(device):
    x, residual, w = inputs((9, 32), torch.float32, device)
    (found,) = torch.autograd.grad(add_rms_norm(x.detach(), residual.detach(), w, 1e-6)[0].sum(), w)
    assert torch.equal(found, *torch.autograd.grad(rms_norm((x + residual).detach(), w, 1e-6).sum(), w))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided_grads", [False, True])
def test_layouts(layout, strided_grads, device):
    """Of x, of the residual, and of both."""
    one = LAYOUTS[layout](device)
    other, w = torch.randn(one.shape, device=device), torch.randn(32, device=device, requires_grad=True)
    for x, residual in ((one, other), (other, one), (one, one.clone())):
        x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
        check_op(OP, (x, residual, w), 1e-6, length=32, strided_grads=strided_grads)
        assert {out.stride() for out in add_rms_norm(x, residual, w, 1e-6)} == {torch.empty_like(x).stride()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_raw_op(layout, device):
    x, w = LAYOUTS[layout](device), torch.randn(32, device=device)
    residual = torch.randn(x.shape, device=device)
    torch.library.opcheck(torch.ops.fastft.add_rms_norm.default, (x, residual, w, 1e-6, 0.0, torch.float16))


def test_compiles_without_retracing_the_body(device):
    leaves = inputs((2, 5, 64), torch.float32, device)
    compiled = torch.compile(lambda *given: add_rms_norm(*given, 1e-6, 1.0), backend="aot_eager", fullgraph=True)
    ours, eager = (
        torch.autograd.grad(sum(out.square().sum() for out in call(*leaves)), leaves)
        for call in (compiled, lambda *given: add_rms_norm(*given, 1e-6, 1.0))
    )
    assert all(map(torch.equal, ours, eager))


WRONG = {
    "dtype": (torch.empty(2, 8), torch.empty(2, 8).half(), "the residual torch.float16; expand or cast"),
    "shape": (torch.empty(2, 8), torch.empty(1, 8), r"shape \(2, 8\), and the residual \(1, 8\); expand or cast"),
}


@pytest.mark.parametrize("code", WRONG)
def test_what_is_added_is_like_x(code):
    """The kernel would read beyond it."""
    x, residual, said = WRONG[code]
    assert supported(x, residual, None, 1e-6).code == code
    with pytest.raises(ValueError, match=f"^add_rms_norm: x .*{said}"):
        add_rms_norm(x, residual, None, 1e-6)


def test_supported():
    x, wide = torch.empty(2, 8), torch.empty(1, MAX_N + 1)
    assert supported(x, x, torch.empty(8), 1e-6) is None
    assert supported(wide, wide, None, 1e-6).code == "size", "what the norm by itself says"


def test_cost_counts_what_is_read_and_written():
    x, w = torch.empty(4, 8, dtype=torch.bfloat16), torch.empty(8, dtype=torch.bfloat16)
    found = OP.cost(x, x, w, 1e-6)
    assert found.bytes_moved == 4 * x.nbytes + 4 * 4 and found.bytes_kept == x.nbytes + 4 * 4


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _add_rms_norm_samples(new: New, n: int) -> Named:
    yield "llama", (new(3, n, 5 * n), new(3, n, 5 * n), new(5 * n), 1e-6), {}
    yield "gemma", (new(2, 3, n, 4).transpose(1, 2), new(2, n, 3, 4), new(4), 1e-5, 1.0), {}
    yield "weightless", (new(2, 7 * n), new(2, 7 * n), None, 1e-6), {}


SAMPLES = {"add_rms_norm": _add_rms_norm_samples}


def _add_rms_norm_case(d: Draw) -> Sample:
    n = d(WIDTHS)
    weight = d.maybe(lambda: d.tensor(n, scale=1.0))
    offset = d(st.sampled_from((0.0, 1.0))) if weight is not None else 0.0
    shape = d(SIZES), d(SIZES), n
    return Sample("", (d.tensor(*shape), d.tensor(*shape), weight, d(st.sampled_from((1e-6, 1e-3))), offset), {})


FUZZ = {"add_rms_norm": _add_rms_norm_case}
ROWWISE = ("add_rms_norm",)


def _add_rms_norm_derivations() -> list[Derivation]:
    def normed(x: Array) -> Array:
        return over_rows(lambda row: row / sympy.sqrt(np.sum(row**2) / len(row) + ratio(EPS)))(x)

    def derivation(name: str, rows: int, weight: str = "", **more: tuple[str, ...]) -> Derivation:
        shapes = {"x": (rows, 3), "z": (rows, 3), **({"w": (3,)} if weight else {})}
        return Derivation(
            name,
            shapes,
            lambda fn, x, z, w=None: fn(x, z, w, EPS, 1.0 if weight == "1 + w" else 0.0),
            lambda x, z, w=1: [normed(x + z) * (1 + w if weight == "1 + w" else w), x + z],
            outputs=2,
            **more,
        )

    return [
        derivation("weight", 5, "w"),
        derivation("1 + weight", 3, "1 + w"),
        derivation("weightless", 3),
        derivation("frozen weight", 3, "w", frozen=("w",)),
        derivation("what is not trained is added", 3, frozen=("x",)),
    ]


DERIVATIONS = {"add_rms_norm": _add_rms_norm_derivations}

#: Both results, that their offsets are looked at.
MANY_ROWS = {"add_rms_norm": lambda fn, x: sum(fn(x, x, None, 1e-6))}

_FILE = "kernels/add_rms_norm.py"
_BIT = "tests/kernels/test_add_rms_norm.py -k bit_for_bit"

MUTANTS = (
    Mutant(
        "add_rms_norm: the norm of a sum that is not rounded",
        _FILE,
        "y, r = _normed(total.to(tl.float32), w_ptr",
        "y, r = _normed(x + tl.load(residual_at, mask=mask, other=0.0).to(tl.float32), w_ptr",
        _BIT,
        interpret=True,
    ),
    Mutant(
        "add_rms_norm: x is kept in place of the sum",
        _FILE,
        "ctx.save_for_backward(total,",
        "ctx.save_for_backward(x,",
        _BIT,
    ),
    Mutant(
        "add_rms_norm: the sum's gradient is dropped",
        _FILE,
        "weight, r, z, ctx.offset, *wanted)",
        "weight, r, None, ctx.offset, *wanted)",
        _BIT,
    ),
    Mutant(
        "add_rms_norm: one gradient for what both had",
        _FILE,
        "            dtotal if want_residual else None,\n",
        "            dtotal if want_residual and not want_x else None,\n",
        _BIT,
    ),
    Mutant(
        "add_rms_norm: the residual's strides are x's",
        _FILE,
        "tile_at(residual_ptr, row, col, inner, residual_outer, residual_inner)",
        "tile_at(residual_ptr, row, col, inner, x_outer, x_inner)",
        "tests/kernels/test_add_rms_norm.py -k layouts",
        interpret=True,
    ),
    Mutant(
        "add_rms_norm: what has another shape is read",
        _FILE,
        "    if residual.shape != x.shape:",
        "    if False:",
        "tests/kernels/test_add_rms_norm.py -k like_x",
    ),
)
