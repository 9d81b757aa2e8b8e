"""SwiGLU and GeGLU, separate and packed: kernels against fp64, layouts, raw ops, the formulas themselves."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import strategies as st

from fastft.kernels._op import OPS
from fastft.kernels.glu import BLOCK, KINDS, glu, glu_packed, packed_reference, packed_supported, reference, supported
from tests.kernels._check import check_op
from tests.kernels._derivations import BOTH, Array, Derivation
from tests.kernels._expressions import ACTIVATIONS, unary
from tests.kernels._fuzz import SIZES, WIDTHS, Draw, flags
from tests.kernels._samples import Named, New, Sample
from tests.mutation._mutant import Mutant

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def pair(shape, dtype=torch.float32, device="cpu", spread=3.0):
    """gate and up; ``spread`` reaches into the tails, where careless formulas cancel."""
    return [(torch.randn(shape, dtype=dtype, device=device) * spread).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, BLOCK + 7), (1,)])
def test_matches_reference(shape, kind, dtype, device):
    check_op(OPS["glu"], pair(shape, dtype, device), kind)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate_first", [True, False])
def test_packed_matches_reference(gate_first, kind, dtype, device):
    check_op(OPS["glu_packed"], pair((2, 5, 96), dtype, device)[:1], kind, gate_first)


@pytest.mark.parametrize("kind", KINDS)
def test_tails(kind, device):
    gate = torch.tensor([-1e4, -90.0, -12.0, 0.0, 12.0, 90.0, 1e4], device=device, requires_grad=True)
    check_op(OPS["glu"], (gate, torch.ones_like(gate).requires_grad_()), kind)


def halves(shape, device):
    return torch.randn(shape, device=device).chunk(2, dim=-1)


LAYOUTS = {
    "halves of one projection": lambda d: halves((2, 5, 64), d),
    "transposed": lambda d: [
        t.transpose(0, 1) for t in (torch.randn(2, 5, 32, device=d), torch.randn(2, 5, 32, device=d))
    ],
    "two orders": lambda d: [torch.randn(2, 5, 32, device=d), torch.randn(5, 2, 32, device=d).transpose(0, 1)],
    "rows not contiguous": lambda d: [torch.randn(2, 32, 7, device=d).transpose(1, 2) for _ in range(2)],
    "empty": lambda d: [torch.randn(0, 5, 32, device=d) for _ in range(2)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided_grads", [False, True])
def test_layouts(layout, strided_grads, device):
    gate, up = (t.detach().requires_grad_() for t in LAYOUTS[layout](device))
    check_op(OPS["glu"], (gate, up), "silu", strided_grads=strided_grads)


@pytest.mark.parametrize("strided_grads", [False, True])
def test_packed_layouts(strided_grads, device):
    wide = torch.randn(2, 5, 100, device=device)[..., 4:68].requires_grad_()
    check_op(OPS["glu_packed"], (wide,), "gelu", strided_grads=strided_grads)


def test_only_what_is_asked_for(device):
    gate, up = pair((2, 40), device=device)
    dgate, dup = torch.autograd.grad(glu(gate, up, "gelu_tanh").sum(), (gate, up))
    assert torch.equal(torch.autograd.grad(glu(gate, up.detach(), "gelu_tanh").sum(), gate)[0], dgate)
    assert torch.equal(torch.autograd.grad(glu(gate.detach(), up, "gelu_tanh").sum(), up)[0], dup)


def test_packed_is_glu_of_the_halves(device):
    (gate_up,) = pair((2, 3, 64), device=device)[:1]
    first, second = gate_up.chunk(2, -1)
    for packed, plain in (
        (glu_packed(gate_up, "silu"), glu(first, second, "silu")),
        (glu_packed(gate_up, "silu", False), glu(second, first, "silu")),
    ):
        assert torch.equal(packed, plain)
        ours, theirs = (torch.autograd.grad(y.square().sum(), gate_up, retain_graph=True)[0] for y in (packed, plain))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_raw_ops(layout, device):
    gate, up = LAYOUTS[layout](device)
    torch.library.opcheck(torch.ops.fastft.glu.default, (gate, up, "silu"))
    for want in [(True, True), (True, False), (False, True)]:
        args = (torch.randn(gate.shape, device=device), gate, up, "gelu", *want)
        torch.library.opcheck(torch.ops.fastft.glu_backward.default, args)


def test_raw_packed_ops(device):
    gate_up = torch.randn(2, 3, 64, device=device)
    torch.library.opcheck(torch.ops.fastft.glu_packed.default, (gate_up, "silu", True))
    args = (torch.randn(2, 3, 32, device=device), gate_up, "silu", False)
    torch.library.opcheck(torch.ops.fastft.glu_packed_backward.default, args)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    gate, up = ((torch.randn(3, 4, dtype=torch.float64) * 2).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: glu(g, u, kind), (gate, up))
    assert torch.autograd.gradcheck(lambda g, u: reference(g, u, kind), (gate, up))
    assert torch.autograd.gradcheck(lambda g: glu_packed(g, kind, False), (gate,))
    assert torch.autograd.gradcheck(lambda g: packed_reference(g, kind, False), (gate,))


def test_compiles(device):
    gate, up = pair((2, 5, 64), device=device)
    compiled = torch.compile(lambda g, u: glu(g, u, "silu"), backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(gate, up).square().sum(), (gate, up))
    eager = torch.autograd.grad(glu(gate, up, "silu").square().sum(), (gate, up))
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


@pytest.mark.parametrize(
    "gate, up, kind, code",
    [
        (torch.empty(2, 8), torch.empty(2, 8), "silu", None),
        (torch.empty(2, 8), torch.empty(2, 8), "relu", "activation"),
        (torch.empty(2, 8, dtype=torch.int32), torch.empty(2, 8), "silu", "dtype"),
        (torch.empty(2, 8, dtype=torch.float16), torch.empty(2, 8), "silu", "dtype"),
        (torch.empty(2, 8), torch.empty(1, 8), "silu", "shape"),
        (torch.empty(2, 8), torch.empty(8), "silu", "shape"),
        (torch.empty(()), torch.empty(()), "silu", "shape"),
    ],
)
def test_supported(gate, up, kind, code):
    reason = supported(gate, up, kind)
    assert (reason and reason.code) == code


def test_packed_supported():
    assert packed_supported(torch.empty(2, 8), "silu") is None
    assert packed_supported(torch.empty(2, 7), "silu").code == "shape"
    assert packed_supported(torch.empty(2, 8), "relu").code == "activation"


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _glu_samples(new: New, n: int) -> Named:
    for kind in KINDS:
        yield kind, (new(2, n, 5, scale=2.0), new(2, n, 5), kind), {}


def _glu_packed_samples(new: New, n: int) -> Named:
    for kind in KINDS:
        yield kind, (new(2, n, 10, scale=2.0), kind), {}
    yield "up first", (new(2, n, 10), "silu", False), {}


SAMPLES = {"glu": _glu_samples, "glu_packed": _glu_packed_samples}


def _glu_case(d: Draw) -> Sample:
    shape, kind = (d(SIZES), d(SIZES), d(WIDTHS)), d(st.sampled_from(KINDS))
    return Sample("", (d.tensor(*shape), d.tensor(*shape), kind), {})


def _glu_packed_case(d: Draw) -> Sample:
    kind = d(st.sampled_from(KINDS))
    return Sample("", (d.tensor(d(SIZES), d(SIZES), 2 * d(WIDTHS), grad=True), kind, d(flags)), {})


FUZZ = {"glu": _glu_case, "glu_packed": _glu_packed_case}
ROWWISE = ("glu", "glu_packed")


def _glu_derivations() -> list[Derivation]:
    shape = (2, 3)
    return [
        Derivation(
            kind,
            {"gate": shape, "up": shape},
            lambda fn, gate, up, kind=kind: fn(gate, up, kind),
            lambda gate, up, kind=kind: [unary(ACTIVATIONS[kind])(gate) * up],
            simplify=BOTH,
        )
        for kind in KINDS
    ]


def _glu_packed_derivations() -> list[Derivation]:
    def formula(gate_up: Array, kind: str, first: bool) -> list[Array]:
        gate, up = (gate_up[..., :3], gate_up[..., 3:]) if first else (gate_up[..., 3:], gate_up[..., :3])
        return [unary(ACTIVATIONS[kind])(gate) * up]

    return [
        Derivation(
            f"{kind}, {'gate' if first else 'up'} first",
            {"gate_up": (2, 6)},
            lambda fn, gate_up, kind=kind, first=first: fn(gate_up, kind, first),
            functools.partial(formula, kind=kind, first=first),
            simplify=BOTH,
        )
        for kind in KINDS
        for first in (True, False)
    ]


DERIVATIONS = {"glu": _glu_derivations, "glu_packed": _glu_packed_derivations}

SMALL_TILES = {"BLOCK": 4}

MUTANTS = (
    Mutant(
        "glu: d silu without its product",
        "kernels/glu.py",
        "return g * s, s + g * s * (e * s) * z_slope",
        "return g * s, s + 0.0 * g * s * z_slope",
        'tests/kernels/test_glu.py -k "matches_reference"',
        interpret=True,
    ),
    Mutant(
        "glu: an exponential that overflows",
        "kernels/glu.py",
        "e = tl.exp2(tl.minimum(-1.4426950408889634 * z, 126.0))",
        "e = tl.exp2(-1.4426950408889634 * z)",
        "tests/kernels/test_glu.py",
        interpret=True,
    ),
    Mutant(
        "glu: sign in the slope",
        "kernels/glu.py",
        "return g * s, s + g * s * (e * s) * z_slope",
        "return g * s, s - g * s * (e * s) * z_slope",
        'tests/kernels/test_glu.py -k "matches_reference"',
        interpret=True,
    ),
    Mutant(
        "glu: a digit of the tanh form",
        "kernels/glu.py",
        "(1.0 + 0.134145 * g * g)",
        "(1.0 + 0.044715 * g * g)",
        "tests/kernels/test_glu.py::test_matches_reference[shape0-gelu_tanh-dtype0]",
        interpret=True,
    ),
    Mutant(
        "glu: gradients swapped",
        "kernels/glu.py",
        "tl.store(dg_at, (dy * u * slope)",
        "tl.store(dg_at, (dy * f * slope)",
        'tests/kernels/test_glu.py -k "matches_reference"',
        interpret=True,
    ),
    Mutant(
        "glu: exact gelu density",
        "kernels/glu.py",
        "0.3989422804014327 * tl.exp(-0.5 * g * g)",
        "0.3989422804014327 * tl.exp(-g * g)",
        "tests/kernels/test_glu.py::test_matches_reference[shape0-gelu-dtype0]",
        interpret=True,
    ),
    Mutant(
        "glu: PyTorch slope of gelu",
        "kernels/glu.py",
        "return g * cdf, cdf + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)",
        "return g * cdf, cdf",
        "tests/kernels/test_glu.py::test_matches_reference[shape0-gelu-dtype0]",
    ),
    Mutant(
        "glu: packed halves swapped",
        "kernels/glu.py",
        "return (first, second) if gate_first else (second, first)",
        "return first, second",
        "tests/kernels/test_glu.py::test_packed_matches_reference[False-silu-dtype0]",
    ),
)
