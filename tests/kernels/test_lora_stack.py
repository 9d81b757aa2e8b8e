"""Layers and their adapters' first products side by side: values, gradients, what is kept."""

from __future__ import annotations

import numpy as np
import pytest
import sympy
import torch
from hypothesis import strategies as st

from fastft.compare import assert_within
from fastft.kernels import lora_linear as lora
from fastft.kernels import nf4
from fastft.kernels._dense_weights import quant_args
from fastft.kernels.lora_stack import OP, lora_stack
from tests.kernels._derivations import BOTH, Array, Derivation
from tests.kernels._fuzz import SIZES, WIDTHS, Draw
from tests.kernels._samples import Named, New, Sample, nf4_states
from tests.kernels.test_lora_linear import STORED, _weight_case
from tests.mutation._mutant import Mutant

F32, BF16 = torch.float32, torch.bfloat16


def layers(widths=(24, 40), k=64, ranks=(3, 8), lead=(2, 5), dtype=F32, adapter=None, quant=None, device="cpu"):
    """Arguments of ``lora_stack``, and its leaves."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*size, scale=1.0, to=dtype):
        return (torch.randn(size, generator=generator) * scale).to(device, to)

    x, more = tensor(*lead, k).requires_grad_(), {}
    weight = [tensor(n, k, scale=k**-0.5) for n in widths]
    if quant is not None:
        functional = pytest.importorskip("bitsandbytes.functional")
        packed = [
            functional.quantize_4bit(w.float(), compress_statistics=quant == "double", quant_type="nf4") for w in weight
        ]
        weight = [data for data, _ in packed]
        second = [(s.state2.code, s.offset, s.state2.absmax) if quant == "double" else () for _, s in packed]
        states = [(s.absmax, *more_) for (_, s), more_ in zip(packed, second, strict=True)]
        more = {"quant": states, "shape": [(n, k) for n in widths]}
    a = [tensor(r, k, scale=k**-0.5, to=adapter or dtype).requires_grad_() for r in ranks]
    return (x, weight, a), more, [x, *a]


def dense_in_fp64(args, more, dtype):
    """The same as dense fp64 weights, which are what they are in ``dtype``."""
    x, weight, a = args
    if more:
        each = zip(weight, more["quant"], more["shape"], strict=True)
        weight = [nf4.nf4_dequantize_reference(w, *quant_args(q), 64, 256, s, dtype) for w, q, s in each]
    leaves = [t.detach().double().requires_grad_() for t in (x, *a)]
    return (leaves[0], [w.double() for w in weight], leaves[1:]), leaves


@pytest.mark.parametrize("quant", [None, "single", "double"])
@pytest.mark.parametrize("dtype, adapter", [(F32, None), (torch.float16, None), (BF16, None), (BF16, F32)], ids=str)
@pytest.mark.parametrize("widths, ranks", [((24, 40), (3, 8)), ((16,), (4,)), ((24, 8, 16), (8, 8, 8))], ids=str)
def test_matches_reference(widths, ranks, dtype, adapter, quant, device):
    args, more, leaves = layers(widths, ranks=ranks, dtype=dtype, adapter=adapter, quant=quant, device=device)
    exact_args, exact_leaves = dense_in_fp64(args, more, dtype)
    dwide = torch.randn(2, 5, sum(widths) + lora.whole(sum(ranks)), device=device).to(dtype)

    def run(fn, args, more, leaves, grad):
        y = fn(*args, **more)
        return [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    ours = run(lora_stack, args, more, leaves, dwide)
    same = run(OP.reference, args, more, leaves, dwide)
    exact = run(OP.reference, exact_args, {}, exact_leaves, dwide)
    assert not ours[0][..., sum(widths) + sum(ranks) :].any()
    for i, (found, stock, truth) in enumerate(zip(ours, same, exact, strict=True)):
        assert (found.dtype, found.shape) == (stock.dtype, stock.shape), i
        assert_within(f"value {i}", found, stock, truth, length=max(128, dwide.shape[-1]))


def test_casts_x(device):
    (x, weight, a), _, _ = layers(dtype=BF16, device=device)
    wide = lora_stack(x.float(), weight, a, dtype=BF16)
    assert wide.dtype == BF16 and torch.equal(wide, lora_stack(x, weight, a))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("quant", [None, "double"])
def test_only_what_is_asked_for(wanted, quant, device):
    args, more, leaves = layers(quant=quant, device=device)
    expected = torch.autograd.grad(lora_stack(*args, **more).square().sum(), [leaves[i] for i in wanted])
    for i, t in enumerate(leaves):
        t.requires_grad_(i in wanted)
    y = lora_stack(*args, **more)
    if wanted == (0,):  # x is kept for the gradients of the A alone
        assert not any(t is not None and t.data_ptr() == args[0].data_ptr() for t in y.grad_fn.saved_tensors)
    found = torch.autograd.grad(y.square().sum(), [leaves[i] for i in wanted])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradients_have_memory_of_their_own(device):
    args, more, (_, first, second) = layers(ranks=(4, 4), device=device)
    found = torch.autograd.grad(lora_stack(*args, **more).sum(), (first, second))
    assert found[0].untyped_storage().data_ptr() != found[1].untyped_storage().data_ptr()


def test_gradcheck():
    (x, weight, a), _, _ = layers((3, 2), k=4, ranks=(2, 1), lead=(2,))
    leaves = [t.detach().double().requires_grad_() for t in (x, *a)]
    weight = [w.double() for w in weight]
    for fn in (lora_stack, OP.reference):
        assert torch.autograd.gradcheck(lambda x, *a, fn=fn: fn(x, weight, a), leaves)


def test_supported():
    (x, weight, a), _, _ = layers()
    assert OP.supported(x, weight, a) is None
    assert OP.supported(x, weight, a[:1]).code == "shape"
    assert OP.supported(x[..., :5], weight, a).code == "shape"
    assert OP.supported(x, [], []).code == "shape"
    assert OP.supported(x, weight, [a[0], a[1].half()]).code == "dtype"
    with pytest.raises(ValueError, match="lora_stack: a weight requires a gradient"):
        lora_stack(x, [weight[0], weight[1].clone().requires_grad_()], a)


def test_cost():
    x, a = torch.empty(8192, 4096, dtype=BF16), [torch.empty(16, 4096)] * 2
    stack = OP.cost(x, [torch.empty(14336, 4096, dtype=BF16)] * 2, a)
    assert int(stack.flops) == 2 * 8192 * 28704 * 4096 and int(stack.bytes_kept) == 0
    assert int(stack.bytes_moved) == 2 * (8192 * (4096 + 28704) + 28704 * 4096)


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _samples(new: New, n: int) -> Named:
    frozen = [new(5, 6, grad=False), new(4, 6, grad=False)]
    yield "dense", (new(2, 2 * n, 6), frozen, [new(2, 6), new(3, 6)]), {}
    yield "one layer", (new(2, 2 * n, 6), frozen[:1], [new(8, 6)]), {}
    if new.dtype != torch.float64:  # NF4 weights have no fp64 form
        for name, state in nf4_states(new, n):
            quant = {"quant": [state["quant"]] * 2, "shape": [(2 * n, 64)] * 2}
            quant |= {"blocksize": [64, 64], "blocksize2": [2, 2]}
            yield f"NF4, {name}", (new(2, 3, 64), [state["packed"]] * 2, [new(2, 64), new(3, 64)]), quant


SAMPLES = {"lora_stack": _samples}


def _case(d: Draw) -> Sample:
    k, stored, each = d(WIDTHS), d(STORED), []
    for _ in range(d(st.integers(1, 3))):
        weight, state = _weight_case(d, stored, d(WIDTHS), k)
        each.append(
            (
                weight.requires_grad_(False) if stored == "dense" else weight,
                d.tensor(d(st.sampled_from((1, 2, 3, 8, 17))), k, scale=k**-0.5),
                state,
            )
        )
    weight, a, states = map(list, zip(*each, strict=True))
    kwargs = {name: [state[name] for state in states] for name in states[0]}
    return Sample("", (d.tensor(d(SIZES), d(SIZES), k), weight, a), kwargs)


FUZZ = {"lora_stack": _case}
ROWWISE = ("lora_stack",)


def _exact(sample: Sample) -> Sample:
    """NF4 weights have no fp64 form: as the dense ones that they are in x's dtype."""
    (x, weight, a), kwargs = sample.args, dict(sample.kwargs)
    if kwargs.get("quant"):
        states = zip(*(kwargs.pop(name) for name in ("quant", "shape", "blocksize", "blocksize2")), strict=True)
        weight = [
            nf4.nf4_dequantize_reference(w, *quant_args(q), one, two, shape, x.dtype)
            for w, (q, shape, one, two) in zip(weight, states, strict=True)
        ]
    return Sample(sample.name, (x, weight, a), kwargs)


EXACT = {"lora_stack": _exact}


def _derivations() -> list[Derivation]:
    def formula(x: Array, w1: Array, w2: Array, a1: Array, a2: Array) -> list[Array]:
        parts = [x @ m.T for m in (w1, w2, a1, a2)]
        return [np.concatenate([*parts, np.full((3, 5), sympy.Integer(0), dtype=object)], 1)]

    return [
        Derivation(
            "two layers",
            {"x": (3, 2), "w1": (2, 2), "w2": (1, 2), "a1": (1, 2), "a2": (2, 2)},
            lambda fn, x, w1, w2, a1, a2: fn(x, [w1, w2], [a1, a2]),
            formula,
            frozen=("w1", "w2"),
            simplify=BOTH,
        )
    ]


DERIVATIONS = {"lora_stack": _derivations}


MUTANTS = (
    Mutant(
        "lora_stack: NF4 without the adapters' rows",
        "kernels/lora_stack.py",
        "        with stacked(weight, quant, shape, blocks, a, x.dtype) as dense:\n",
        "        with stacked(weight, quant, shape, blocks, a, x.dtype) as dense:\n            dense[-8:] = 0\n",
        "'tests/kernels/test_lora_stack.py::test_matches_reference[(24, 40)-(3, 8)-torch.float32-None-single]'",
    ),
    Mutant(
        "lora_stack: dx without the adapters",
        "kernels/lora_stack.py",
        "        dx = torch.mm(thin, lora._stack(a, rows.dtype), out=into)\n",
        "        dx = torch.mm(thin, lora._stack(a, rows.dtype), out=into).zero_()\n",
        "tests/kernels/test_lora_stack.py -k matches_reference",
    ),
    Mutant(
        "lora_stack: one layer's columns for all",
        "kernels/lora_stack.py",
        "dx.addmm_(rows[:, at[i] : at[i + 1]], dense,",
        "dx.addmm_(rows[:, : at[i + 1] - at[i]], dense,",
        "tests/kernels/test_lora_stack.py -k matches_reference",
    ),
    Mutant(
        "lora_stack: dA of wide's last columns",
        "kernels/lora_stack.py",
        "thin = rows[:, at[-1] : at[-1] + sum(ranks)]",
        "thin = rows[:, rows.shape[1] - sum(ranks) :]",
        "tests/kernels/test_lora_stack.py -k matches_reference",
    ),
    Mutant(
        "lora_stack: columns that nobody wrote",
        "kernels/lora_stack.py",
        "    out[:, at[-1] + rank :].zero_()\n",
        "    out[:, at[-1] + rank :].fill_(1.0)\n",
        "tests/kernels/test_lora_stack.py -k matches_reference",
    ),
)
