"""Every op on inputs that hypothesis makes up: sizes of one, odd ones, none at all, ranks and heads that are no powers
of two, any strides, masks of every kind, labels that are all ignored or all the same, NaN and infinity.

The number of cases is a profile's: ``pytest tests/kernels/test_fuzz.py --hypothesis-profile long`` is the long mode,
with new cases at every run; without it the same cases are run each time. On the PyTorch bodies there are ten times as
many as in Triton's interpreter, which is slow (tests/conftest.py has the profiles).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis import strategies as st
from torch.utils._pytree import tree_flatten, tree_map

from fastft.compare import bitwise, compare, rounding
from fastft.kernels._op import INTERPRET, OPS
from tests.kernels._each import collected, tables
from tests.kernels._fuzz import Draw
from tests.kernels._samples import Sample

CASES: dict[str, Callable[[Draw], Sample]] = {
    name: case for found in tables("FUZZ").values() for name, case in found.items()
}
#: For ops with arguments that have no fp64 form: what makes a sample one that has.
EXACT: dict[str, Callable[[Sample], Sample]] = {
    name: form for found in tables("EXACT").values() for name, form in found.items()
}
#: Of a profile's cases those that must be supported. The others are drawn for nothing.
SUPPORTED = 0.75


def test_every_op_is_fuzzed() -> None:
    assert collected("FUZZ").keys() == CASES.keys()


@pytest.mark.skipif(INTERPRET or torch.cuda.is_available(), reason="there are fewer where each compiles, or is slow")
def test_continuous_integration_has_enough_cases() -> None:
    """At least 2,000, without those that :func:`test_error_rule` lets an op refuse."""
    assert settings.get_profile("short").max_examples * len(CASES) * SUPPORTED >= 2_000


def values(call: Callable[..., Any], sample: Sample, seed: int) -> list[torch.Tensor]:
    """Floating outputs, and the gradients of all leaves from random ones; zeros for a leaf that is not used."""
    outputs = [o for o in sample.outputs(call) if o.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    leaves = sample.leaves()
    if not used or not leaves:
        return outputs
    found = torch.autograd.grad([o for o, _ in used], leaves, [g for _, g in used], allow_unused=True)
    return outputs + [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]


def exact(sample: Sample) -> Sample:
    def widen(v: Any) -> Any:
        if isinstance(v, torch.dtype):
            return torch.float64
        if isinstance(v, torch.Tensor) and v.is_floating_point():
            return v.detach().double().requires_grad_(v.requires_grad)
        return v

    return Sample(sample.name, tree_map(widen, sample.args), tree_map(widen, sample.kwargs))


def supported(name: str, sample: Sample) -> bool:
    return OPS[name].supported(*sample.args, **sample.kwargs) is None


#: On a GPU most of a case's time is compiling, and the other tests' processes would end long before one with all cases.
SHARES = 4 if torch.cuda.is_available() else 1


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("share", range(SHARES))
def test_error_rule(name: str, share: int, device: str, record_property: Callable[[str, object], None]) -> None:
    """Values and gradients of any case are as near to the exact ones as the error rule demands."""
    op, run = OPS[name], 0
    examples = max(1, settings().max_examples // SHARES)

    @given(st.data())
    def cases(data: st.DataObject) -> None:
        nonlocal run
        sample = CASES[name](Draw(data, device))
        if not supported(name, sample):
            return
        run += 1
        if name == "nf4_dequantize":
            (ours,), (theirs,) = sample.outputs(op.call), sample.outputs(op.reference)
            assert bitwise(ours, theirs)
            return
        length = max(t.numel() for t in tree_flatten((sample.args, sample.kwargs))[0] if isinstance(t, torch.Tensor))
        truth = values(op.reference, exact(EXACT.get(name, lambda same: same)(sample)), 1)
        parts = [*truth, sample.args[2]] if name == "attention" else truth  # its output is a mean of v
        largest = max((float(t.detach().double().norm()) for t in parts if t.isfinite().all()), default=0.0)
        found = zip(values(op.call, sample, 1), values(op.reference, sample, 1), truth, strict=True)
        for i, (ours, same, true) in enumerate(found):
            assert (ours.dtype, ours.shape) == (same.dtype, same.shape), f"value {i}"
            got = compare(f"{name} value {i}", ours, same, true, length=length)
            # What cancels (dq of a query that sees one key) is as exact as what it is made of.
            cancelled = float((ours.detach() - true.detach()).norm()) <= rounding(ours.dtype, length) * largest
            # PyTorch's error in a few numbers may be small by chance: there each of a product's roundings counts (an
            # MLP has three in a row). And attention's δ is that of the rounded output, as in every flash attention; the
            # reference's is exact.
            few, roundings = true.numel() < 64, 9 if name == "lora_mlp" else 3
            chance = roundings * rounding(ours.dtype) if few or name == "attention" else 0.0
            # Means over a few numbers say little: bias and direction are for the tests of known cases.
            assert got.error <= got.bound + chance or cancelled, got

    cases = settings(max_examples=examples)(cases)
    if settings().derandomize:
        cases = hypothesis_seed(share)(cases)  # the same ones each time, others in each share
    cases()
    record_property("fuzz", run)
    assert run >= examples * SUPPORTED, f"only {run} of {examples} cases are supported"


#: Of hidden states, a head, its bias and labels: a row is a token, before losses are summed up.
LOSSES = ("linear_cross_entropy", "linear_log_prob")
ROWWISE = [*(name for found in tables("ROWWISE").values() for name in found), *LOSSES]


@pytest.mark.parametrize("name", ROWWISE)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_nan_and_infinity_stay_in_their_row(name: str, poison: float, device: str) -> None:
    """What is not finite makes the same elements not finite as in PyTorch, and none of other rows: in the outputs, and
    in the gradients of what has rows (the others' are sums over the rows). A token that is ignored makes none.
    """
    op = OPS[name]

    @given(st.data())
    def cases(data: st.DataObject) -> None:
        draw = Draw(data, device)
        sample = CASES[name](draw)
        if "reduction" in sample.kwargs:
            sample.kwargs["reduction"] = "none"
        x = sample.args[0].requires_grad_()
        if not supported(name, sample) or not x.numel():
            return
        at = tuple(draw(st.integers(0, n - 1)) for n in x.shape)
        ignored = name in LOSSES and int(sample.args[3][at[0]]) == -100  # nothing of this token counts
        others = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
        others[at[:-1]] = False
        count = len([o for o in sample.outputs(op.reference) if o.is_floating_point()])
        clean = values(op.reference, sample, 1)
        with torch.no_grad():
            x[at] = poison
        found = zip(values(op.call, sample, 1), values(op.reference, sample, 1), clean, strict=True)
        for i, ((ours, theirs, before), leaf) in enumerate(zip(found, [None] * count + sample.leaves(), strict=True)):
            # A head [vocab, hidden] may be as tall as there are tokens.
            if not (leaf is None or leaf is x or (leaf.shape[:-1] == x.shape[:-1] and x.dim() > 2)):
                continue
            same = before if ignored else theirs  # PyTorch's gradient is NaN for an ignored token with softcap
            assert torch.equal(torch.isfinite(ours), torch.isfinite(same)), f"value {i}"
            if ours.shape[: others.dim()] == others.shape and before.isfinite().all():
                assert torch.isfinite(ours[others]).all(), f"value {i}"

    settings(max_examples=max(10, settings().max_examples // 8))(cases)()


@pytest.mark.skipif(not (INTERPRET or torch.cuda.is_available()), reason="on a CPU PyTorch's own attention runs")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_hidden_tokens_poison_nothing(poison: float, device: str) -> None:
    """What is not finite in the keys of padding reaches no token."""

    @given(st.integers(2, 40), st.integers(1, 39), st.integers(0, 1000))
    @example(17, 16, 0)
    def cases(length: int, real: int, seed: int) -> None:
        real = min(real, length - 1)
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, 2, length, 8, generator=generator).to(device) for _ in range(3))
        padding = (torch.arange(length, device=device) < real)[None]
        for t in (k, v):
            t[:, :, real:] = 0.0
        clean = OPS["attention"].call(q, k, v, causal=True, padding=padding)
        k[:, :, real:] = poison
        poisoned = OPS["attention"].call(q, k, v, causal=True, padding=padding)
        assert torch.equal(clean[:, :, :real], poisoned[:, :, :real])

    settings(max_examples=max(10, settings().max_examples // 8))(cases)()
