"""Squared ReLU: the kernels against fp64, layouts, the formula, the rule that finds it, a model that has it."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
import transformers

from fastft import _torch_compat as compat
from fastft.kernels import squared_relu as module
from fastft.kernels._op import INTERPRET, OPS
from fastft.kernels._triton import HAS_TRITON
from fastft.kernels.squared_relu import squared_relu, stock, supported
from fastft.options import Options
from fastft.reporting import MISSED
from fastft.rewrite import rewrite
from tests.kernels._check import check_op
from tests.kernels._derivations import Derivation
from tests.kernels._expressions import unary
from tests.kernels._fuzz import SIZES, WIDTHS, Draw
from tests.kernels._samples import Named, New, Sample
from tests.models._training import check_equal, compiled_step, step
from tests.mutation._mutant import Mutant
from tests.patterns._graphs import Build
from tests.patterns._sites import check_site, rewritten

OP = OPS["squared_relu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 48), (3, 1031), (1,), (0, 8)])
def test_matches_reference(shape, dtype, device):
    check_op(OP, (torch.randn(shape, dtype=dtype, device=device).mul(3).requires_grad_(),))


LAYOUTS = {
    "a part of a projection": lambda x: x[..., 3:35],
    "transposed": lambda x: x.transpose(0, 1),
    "rows not contiguous": lambda x: x.transpose(1, 2),
    "one row for all": lambda x: x[:1].expand(4, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strided_grads", [False, True])
def test_layouts(layout, strided_grads, device):
    x = LAYOUTS[layout](torch.randn(2, 5, 64, device=device)).detach().requires_grad_()
    check_op(OP, (x,), strided_grads=strided_grads)


def test_special_values(device):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 0.0], device=device)
    assert torch.equal(squared_relu(x).nan_to_num(-1), stock(x).nan_to_num(-1))


@pytest.mark.skipif(
    INTERPRET or not HAS_TRITON or torch.cuda.is_available(), reason="Triton's compiler, in place of a GPU"
)
def test_compiles_for_an_h100():
    from tests.kernels._hopper import compiling

    x = torch.randn(4, 16384, dtype=torch.bfloat16)
    with compiling(module) as kernels:
        torch.ops.fastft.squared_relu_backward(torch.ops.fastft.squared_relu(x), x)
    assert len(kernels) == 2
    for kernel in kernels:
        assert "ld.global.v4.b32" in kernel.asm["ptx"] and "st.global.v4.b32" in kernel.asm["ptx"]


def test_supported():
    assert supported(torch.empty(2, 8)) is None
    assert supported(torch.empty(())).code == "shape"
    assert supported(torch.empty(2, 8, dtype=torch.int32)).code == "dtype"


# ---------------------------------------------------------------------------------------------------------- its rule

SPELLINGS = {
    "transformers": lambda h: torch.square(F.relu(h)),
    "power": lambda h: F.relu(h) ** 2,
    "methods": lambda h: h.relu().pow(2),
    "product": lambda h: (lambda r: r * r)(torch.relu(h)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_is_found(spelling):
    x, w = torch.randn(2, 3, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
    graph = check_site(lambda x, w: SPELLINGS[spelling](F.linear(x, w)), x, w, counts={"mlp": 1})
    assert squared_relu in {n.target for n in graph.graph.nodes}


LOOK_ALIKES = {
    "a cube": lambda h: F.relu(h) ** 3,
    "relu times x": lambda h: F.relu(h) * h,
    "two relus": lambda h: F.relu(h) * F.relu(h + 1),
    "no relu": lambda h: torch.square(h),
}


@pytest.mark.parametrize("spelling", LOOK_ALIKES)
def test_look_alikes_are_left(spelling):
    assert not rewritten(LOOK_ALIKES[spelling], torch.randn(2, 8))[1].counts


def test_a_relu_that_is_read_twice_is_left_with_a_reason():
    report = rewritten(lambda h: (lambda r: (torch.square(r), r))(F.relu(h)), torch.randn(2, 8))[1]
    assert not report.counts and [s.pattern for s in report.missed] == ["mlp"], str(report)
    assert "also used" in report.missed[0].reason


def test_a_square_in_another_dtype_is_left_with_a_reason():
    """As autocast on CUDA has it, where a power is fp32."""
    g = Build()
    squared = g.call(torch.square, g.call(F.relu, g.input(2, 8, dtype=torch.bfloat16)))
    squared.meta["example_value"] = squared.meta["example_value"].float()
    gm = g.module(squared)
    (site,) = rewrite(gm, Options(), compat.fake_mode_of(gm)).sites
    assert (site.pattern, site.status) == ("mlp", MISSED) and "bfloat16 and its square torch.float32" in site.reason


SIZES_OF_A_MODEL = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    use_cache=False,
)


@pytest.mark.parametrize("family", ["Nemotron", "Arcee"])
def test_models(family):
    """Every MLP of the two families, and the loss and all gradients as eager's."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES_OF_A_MODEL)
    model = getattr(transformers, f"{family}ForCausalLM")(config).train()
    ids = torch.randint(3, 128, (2, 12))
    batch = {"input_ids": ids, "labels": ids}
    eager = step(model, batch)
    loss, grads, report = compiled_step(model, batch)
    assert report.counts["mlp"] == 2, str(report)
    assert squared_relu.__name__ in str({s.work.op for s in report.sites if s.pattern == "mlp" and s.work})
    check_equal((loss, grads), eager)


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _samples(new: New, n: int) -> Named:
    yield "dense", (new(2, n, 5),), {}
    yield "transposed", (new(2, 3, n, 4).transpose(1, 2),), {}


SAMPLES = {"squared_relu": _samples}


def _case(d: Draw) -> Sample:
    return Sample("", (d.tensor(d(SIZES), d(SIZES), d(WIDTHS)),), {})


FUZZ = {"squared_relu": _case}
ROWWISE = ("squared_relu",)

MANY_ROWS = {"squared_relu": lambda fn, x: fn(x)}


def _derivations() -> list[Derivation]:
    def formula(x):  # type: ignore[no-untyped-def]
        return [unary(lambda v: sympy.Max(v, 0) ** 2)(x)]

    return [Derivation("squared", {"x": (2, 5)}, lambda fn, x: fn(x), formula)]


DERIVATIONS = {"squared_relu": _derivations}

MUTANTS = (
    Mutant(
        "squared_relu: backward without its factor",
        "kernels/squared_relu.py",
        "(2.0 * r * dy)",
        "(r * dy)",
        'tests/kernels/test_squared_relu.py -k "matches_reference"',
        interpret=True,
    ),
    Mutant(
        "squared_relu: squared in the inputs' dtype",
        "kernels/squared_relu.py",
        "(r * r).to(y_ptr.dtype.element_ty)",
        "(r * r).to(tl.float16).to(y_ptr.dtype.element_ty)",
        'tests/kernels/test_squared_relu.py -k "matches_reference"',
        interpret=True,
    ),
    Mutant(
        "squared_relu: zero of NaN",
        "kernels/squared_relu.py",
        "tl.where(x <= 0, 0.0, x)",
        "tl.where(x > 0, x, 0.0)",
        "tests/kernels/test_squared_relu.py -k special_values",
        interpret=True,
    ),
    Mutant(
        "squared_relu: PyTorch backward by the square",
        "kernels/squared_relu.py",
        "2.0 * torch.relu(x.to(compute)) * dy",
        "2.0 * torch.relu(x.to(compute)).square() * dy",
        'tests/kernels/test_squared_relu.py -k "matches_reference"',
    ),
)
