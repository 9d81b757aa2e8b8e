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

import fastft.kernels
from fastft.compare import bitwise, compare, rounding
from fastft.kernels import glu, rotary
from fastft.kernels._op import INTERPRET, OPS
from tests.kernels._check import strided
from tests.kernels._samples import Sample

fastft.kernels.load()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = st.one_of(st.integers(0, 5), st.sampled_from((7, 16, 17, 33)))
WIDTHS = st.one_of(st.integers(1, 9), st.sampled_from((16, 31, 64, 65, 130)))
flags = st.booleans()


class Draw:
    """What a case is made of: sizes and choices from hypothesis, numbers from a seed of its own."""

    def __init__(self, data: st.DataObject, device: str) -> None:
        self.data, self.device = data, device
        self.dtype = self(st.sampled_from(DTYPES))
        self.generator = torch.Generator().manual_seed(self(st.integers(0, 2**16)))

    def __call__(self, strategy: Any) -> Any:
        return self.data.draw(strategy)

    def tensor(self, *shape: int, scale: float | None = None, grad: bool | None = None, dtype: Any = None) -> Any:
        """Normal numbers, in a memory layout of hypothesis's choice."""
        scale = self(st.sampled_from((1.0, 0.01, 8.0))) if scale is None else scale
        t = torch.randn(shape, generator=self.generator).mul(scale).to(self.device, dtype or self.dtype)
        layout = self(st.integers(0, 3))
        if layout == 1 and t.dim() > 1:
            t = t.transpose(0, -1).contiguous().transpose(0, -1)
        elif layout == 2 and t.dim() > 1:
            t = torch.cat((t, t), 0)[: shape[0]] if shape[0] else t
        elif layout == 3:
            t = strided(t)
        return t.detach().requires_grad_(self(flags) if grad is None else grad)

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self(flags) else None

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator).to(self.device)


def rms_norm(d: Draw) -> Sample:
    n = d(WIDTHS)
    weight = d.maybe(lambda: d.tensor(n, scale=1.0))
    offset = d(st.sampled_from((0.0, 1.0))) if weight is not None else 0.0
    args = (d.tensor(d(SIZES), d(SIZES), n), weight, d(st.sampled_from((1e-6, 1e-3))), offset)
    return Sample("", args, {"pass_through": d(flags)})


def layer_norm(d: Draw) -> Sample:
    n = d(st.integers(2, 130))
    weight = d.maybe(lambda: d.tensor(n, scale=1.0))
    args = (d.tensor(d(SIZES), d(SIZES), n), weight, d.maybe(lambda: d.tensor(n)), 1e-5)
    return Sample("", args, {"pass_through": d(flags)})


def gated(d: Draw) -> Sample:
    shape, kind = (d(SIZES), d(SIZES), d(WIDTHS)), d(st.sampled_from(glu.KINDS))
    return Sample("", (d.tensor(*shape), d.tensor(*shape), kind), {})


def gated_packed(d: Draw) -> Sample:
    kind = d(st.sampled_from(glu.KINDS))
    return Sample("", (d.tensor(d(SIZES), d(SIZES), 2 * d(WIDTHS), grad=True), kind, d(flags)), {})


def turned(d: Draw) -> Sample:
    batch, seq, half = d(st.integers(1, 3)), d(st.integers(1, 9)), d(st.sampled_from((1, 3, 8, 16, 20)))
    width = 2 * half + d(st.sampled_from((0, 0, 2, 6)))
    style, seq_dim = d(st.sampled_from(tuple(rotary.STYLES))), d(st.sampled_from((1, 2)))

    def heads(count: int) -> torch.Tensor:
        x = d.tensor(batch, seq, count, width, grad=True)
        return x if seq_dim == 1 else x.detach().transpose(1, 2).requires_grad_()

    angle = torch.randn(d(st.sampled_from((1, batch))), seq, half, generator=d.generator).to(d.device)
    if d(flags):
        angle = angle.repeat_interleave(2, -1) if style == "interleaved" else torch.cat((angle, angle), -1)
    k = d.maybe(lambda: heads(d(st.integers(1, 3))))
    tables = angle.cos().to(d.dtype), angle.sin().to(d.dtype)
    return Sample("", (heads(d(st.integers(1, 5))), k, *tables, style, None, 2 * half, seq_dim), {})


def _layer(d: Draw, k: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    n, ranks = d(WIDTHS), d(st.lists(st.sampled_from((1, 2, 3, 5, 8)), max_size=2))
    a = [d.tensor(r, k, scale=k**-0.5) for r in ranks]
    b = [d.tensor(n, r, scale=r**-0.5) for r in ranks]
    scaling = [d(st.sampled_from((1.0, 2.0, 0.7071))) for _ in ranks]
    bias = d.maybe(lambda: d.tensor(n))
    return (d.tensor(n, k, scale=k**-0.5), bias, a, b, scaling), {
        "b_bias": [d.maybe(lambda: d.tensor(n)) for _ in ranks]
    }


def linear(d: Draw) -> Sample:
    k, lead = d(WIDTHS), (d(SIZES), d(SIZES))
    args, kwargs = _layer(d, k)
    inputs = [d.maybe(lambda: d.tensor(*lead, k)) for _ in args[2]]
    alone = args[1] is None and not args[2]
    residual = d.maybe(lambda: d.tensor(*lead, args[0].shape[0])) if alone else None
    return Sample("", (d.tensor(*lead, k), *args), {**kwargs, "x_lora": inputs, "residual": residual})


def linears(d: Draw) -> Sample:
    k = d(WIDTHS)
    layers = [_layer(d, k) for _ in range(d(st.integers(1, 3)))]
    columns = [list(column) for column in zip(*(args for args, _ in layers), strict=True)]
    return Sample(
        "", (d.tensor(d(SIZES), d(SIZES), k), *columns), {"b_bias": [kwargs["b_bias"] for _, kwargs in layers]}
    )


def attended(d: Draw) -> Sample:
    batch, queries, head = d(st.integers(1, 2)), d(st.integers(1, 40)), d(st.integers(1, 20))
    value = d(st.sampled_from((head, head + 3)))
    heads, group = d(st.integers(1, 2)), d(st.integers(1, 3))
    causal = d(flags)
    keys = queries if causal else d(st.integers(1, 40))
    options: dict[str, Any] = {"causal": causal, "softcap": d(st.sampled_from((0.0, 0.0, 3.0)))}
    if causal:
        options["window"] = d(st.sampled_from((0, 1, 7, 100)))
        options["chunk"] = d(st.sampled_from((0, 0, 1, 12)))
        if d(flags):
            cuts = torch.rand(batch, queries, generator=d.generator) < d(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
            cuts[:, 0] = True
            order = torch.arange(queries)
            options["positions"] = (order - torch.where(cuts, order, 0).cummax(-1).values).to(d.device)
    kind = d(st.sampled_from(("none", "none", "left", "right", "holes", "all", "one")))
    if kind != "none":
        count = d.integers(keys + 1, batch, 1).cpu()
        order = torch.arange(keys)[None]
        padding = {
            "left": order >= count, "right": order < count,
            "holes": torch.rand(batch, keys, generator=d.generator) < 0.5,
            "all": order < 0, "one": order == count - 1,
        }[kind].expand(batch, keys)  # fmt: skip
        options["padding"] = padding.to(d.device)
    dense = d(st.sampled_from(("none", "none", "none", "bool", "additive")))
    if dense != "none" and "positions" not in options:
        mask = torch.randn(batch, 1, queries, keys, generator=d.generator).to(d.device)
        options["dense"] = mask > -1 if dense == "bool" else mask.to(d.dtype)

    def rows(length: int, count: int, width: int) -> torch.Tensor:
        return d.tensor(batch, length, count, width, scale=1.0, grad=True).detach().transpose(1, 2).requires_grad_()

    q, k, v = rows(queries, heads * group, head), rows(keys, heads, head), rows(keys, heads, value)
    return Sample("", (q, k, v), options)


def _head(d: Draw) -> tuple[Any, ...]:
    tokens, hidden, vocab = d(SIZES), d(WIDTHS), d(st.integers(1, 140))
    labels = d.integers(vocab, tokens)
    kind = d(st.sampled_from(("some", "some", "all", "none", "one class")))
    if kind == "some":
        labels[torch.rand(tokens, generator=d.generator) < 0.5] = -100
    elif kind == "all":
        labels[:] = -100
    elif kind == "one class":
        labels[:] = vocab - 1
    frozen = d(flags)
    weight = d.tensor(vocab, hidden, scale=hidden**-0.5, grad=not frozen)
    bias = d.maybe(lambda: d.tensor(vocab, grad=not frozen))
    return d.tensor(tokens, hidden, grad=True), weight, bias, labels


def _maths(d: Draw) -> dict[str, Any]:
    return {"softcap": d(st.sampled_from((None, 5.0))), "logit_scale": d(st.sampled_from((1.0, 0.25)))}


def cross_entropy(d: Draw) -> Sample:
    return Sample("", _head(d), {**_maths(d), "reduction": d(st.sampled_from(("mean", "sum", "none")))})


def log_prob(d: Draw) -> Sample:
    wanted = {name: d(flags) for name in ("entropy", "mean_logits", "log_sum_sq_probs")}
    return Sample("", _head(d), {**_maths(d), "temperature": d(st.sampled_from((1.0, 1.5))), **wanted})


def dequantised(d: Draw) -> Sample:
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


CASES: dict[str, Callable[[Draw], Sample]] = {
    "attention": attended,
    "glu": gated,
    "glu_packed": gated_packed,
    "layer_norm": layer_norm,
    "linear_cross_entropy": cross_entropy,
    "linear_log_prob": log_prob,
    "lora_linear": linear,
    "lora_linears": linears,
    "nf4_dequantize": dequantised,
    "rms_norm": rms_norm,
    "rotary": turned,
}


def test_every_op_is_fuzzed() -> None:
    assert CASES.keys() == OPS.keys()


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
        truth = values(op.reference, exact(sample), 1)
        parts = [*truth, sample.args[2]] if name == "attention" else truth  # its output is a mean of v
        largest = max((float(t.detach().double().norm()) for t in parts if t.isfinite().all()), default=0.0)
        found = zip(values(op.call, sample, 1), values(op.reference, sample, 1), truth, strict=True)
        for i, (ours, same, true) in enumerate(found):
            assert (ours.dtype, ours.shape) == (same.dtype, same.shape), f"value {i}"
            got = compare(f"{name} value {i}", ours, same, true, length=length)
            # What cancels (dq of a query that sees one key) is as exact as what it is made of.
            cancelled = float((ours.detach() - true.detach()).norm()) <= rounding(ours.dtype, length) * largest
            # PyTorch's error in a few numbers may be small by chance: there each of a product's roundings counts. And
            # attention's δ is that of the rounded output, as in every flash attention; the reference's is exact.
            chance = 3 * rounding(ours.dtype) if true.numel() < 64 or name == "attention" else 0.0
            # Means over a few numbers say little: bias and direction are for the tests of known cases.
            assert got.error <= got.bound + chance or cancelled, got

    cases = settings(max_examples=examples)(cases)
    if settings().derandomize:
        cases = hypothesis_seed(share)(cases)  # the same ones each time, others in each share
    cases()
    record_property("fuzz", run)
    assert run > examples // 2, f"only {run} cases are supported"


#: Ops of which each row depends on its own inputs only.
ROWWISE = ("rms_norm", "layer_norm", "glu", "glu_packed", "rotary")


@pytest.mark.parametrize("name", ROWWISE)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_nan_and_infinity_stay_in_their_row(name: str, poison: float, device: str) -> None:
    """What is not finite makes the same elements not finite as in PyTorch, and no others."""
    op = OPS[name]

    @given(st.data())
    def cases(data: st.DataObject) -> None:
        draw = Draw(data, device)
        sample = CASES[name](draw)
        x = sample.args[0]
        if not supported(name, sample) or not x.numel():
            return
        at = tuple(draw(st.integers(0, n - 1)) for n in x.shape)
        with torch.no_grad():
            x[at] = poison
        for ours, theirs in zip(sample.outputs(op.call), sample.outputs(op.reference), strict=True):
            assert torch.equal(torch.isfinite(ours), torch.isfinite(theirs))

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
