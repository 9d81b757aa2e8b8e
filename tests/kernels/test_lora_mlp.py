"""Gated MLPs a slice of tokens at a time: values and gradients beside the layers' own ops, and what is there at one
time.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastft.compare import assert_within
from fastft.kernels import _dense_weights, nf4
from fastft.kernels import lora_linear as lora
from fastft.kernels import lora_mlp as module
from fastft.kernels._dense_weights import quant_args, release_scratch
from fastft.kernels._op import INTERPRET
from fastft.kernels.glu import glu
from fastft.kernels.lora_glu import lora_glu
from fastft.kernels.lora_mlp import OP, lora_mlp
from fastft.kernels.lora_stack import lora_stack
from tests.kernels._derivations import Array, Derivation
from tests.kernels._expressions import ACTIVATIONS, ratio, unary
from tests.kernels._fuzz import SIZES, WIDTHS, Draw
from tests.kernels._samples import Named, New, Sample, nf4_states
from tests.kernels.test_lora_linear import _NF4, STORED, _dense, _weight_case
from tests.mutation._mutant import Mutant

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
N, K, H = 64, 64, 128

#: What the layers have: ranks of gate's, up's and down's adapters, and more.
FORMS: dict[str, dict[str, Any]] = {
    "one adapter each": dict(ranks=((3,), (8,), (4,))),
    "none": dict(),
    "none, and the stream": dict(residual=True),
    "down alone": dict(ranks=((), (), (4,))),
    "gate alone": dict(ranks=((3,), (), ())),
    "two each": dict(ranks=((3, 2), (8, 1), (4, 5))),
    "a large rank": dict(ranks=((65,), (8,), (4,))),
    "biases": dict(ranks=((3,), (8,), (4,)), bias=True),
}


def make(
    ranks=((), (), ()), bias=False, residual=False, dtype=F32, adapter=None, quant=None, train=False, lead=(2, 5),
    device="cpu", lora_dtype=None,
):  # fmt: skip
    """Arguments of ``lora_mlp``, and its leaves."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*size, scale=1.0, to=dtype, grad=True):
        return (torch.randn(size, generator=generator) * scale).to(device, to).requires_grad_(grad)

    x, widths, ins = tensor(*lead, K), (N, N, H), (K, K, N)
    weight = [tensor(n, k, scale=k**-0.5, grad=train) for n, k in zip(widths, ins, strict=True)]
    more: dict[str, Any] = {} if lora_dtype is None else {"lora_dtype": lora_dtype}
    if quant is not None:
        functional = pytest.importorskip("bitsandbytes.functional")
        packed = [
            functional.quantize_4bit(w.float(), compress_statistics=quant == "double", quant_type="nf4") for w in weight
        ]
        weight = [data for data, _ in packed]
        second = [(s.state2.code, s.offset, s.state2.absmax) if quant == "double" else () for _, s in packed]
        more["quant"] = [(s.absmax, *rest) for (_, s), rest in zip(packed, second, strict=True)]
        more["shape"] = list(zip(widths, ins, strict=True))
    to = adapter or dtype
    a = [[tensor(r, k, scale=k**-0.5, to=to) for r in of] for of, k in zip(ranks, ins, strict=True)]
    b = [[tensor(n, r, scale=r**-0.5, to=to) for r in of] for of, n in zip(ranks, widths, strict=True)]
    scaling = [[2.0, 0.7][: len(of)] for of in ranks]
    biases = [tensor(n) for n in widths] if bias else []
    if bias:
        more["b_bias"] = [[tensor(n, to=to) for _ in of] for of, n in zip(ranks, widths, strict=True)]
    if residual:
        more["residual"] = tensor(*lead, H)
    return (x, "silu", weight, biases, a, b, scaling), more


def leaves_of(args, more) -> list[torch.Tensor]:
    return [t for t in tree_iter((args, more)) if isinstance(t, torch.Tensor) and t.requires_grad]


def exactly(args, more, dtype):
    """In fp64; NF4 weights as the dense ones that they are in ``dtype``."""
    (x, kind, weight, *rest), more = args, dict(more)
    if more.get("quant"):
        quant, shape = more.pop("quant"), more.pop("shape")
        weight = [
            nf4.nf4_dequantize_reference(w, *quant_args(q), 64, 256, s, dtype)
            for w, q, s in zip(weight, quant, shape, strict=True)
        ]

    def wide(t):
        if isinstance(t, (list, tuple)):
            return type(t)(map(wide, t))
        return t.detach().double().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t

    return (wide(x), kind, *map(wide, (weight, *rest))), {k: wide(v) for k, v in more.items() if k != "lora_dtype"}


def run(fn, args, more, dy) -> list[torch.Tensor]:
    y = fn(*args, **more)
    return [y.detach(), *torch.autograd.grad(y, leaves_of(args, more), dy.to(y.dtype))]


def apart(x, kind, weight, bias, a, b, scaling, *, residual=None, rows=None, **more):
    """The MLP by the layers' own ops."""
    down = {name: more[name][2] for name in ("quant", "shape", "b_bias") if name in more}
    two = {name: more[name][:2] for name in ("quant", "shape", "b_bias") if name in more}
    to = {"lora_dtype": more.get("lora_dtype")}
    if module.stacks(
        weight[:2], bias[:2], a[:2], b[:2], two.get("b_bias", ()), more.get("lora_dtype") in (None, x.dtype)
    ):
        wide = lora_stack(x, weight[:2], [t for (t,) in a[:2]], **two)
        act = lora_glu(wide, [t for (t,) in b[:2]], [s for (s,) in scaling[:2]], kind)
    else:
        act = glu(
            *lora.lora_linears(x, weight[:2], bias[:2], a[:2], b[:2], scaling[:2], **two, **to, out_dtype=x.dtype), kind
        )
    last = bias[2] if bias else None
    return lora.lora_linear(
        act, weight[2], last, a[2], b[2], scaling[2], **down, **to, out_dtype=x.dtype, residual=residual
    )


DTYPES = {
    "fp32": dict(dtype=F32),
    "fp16": dict(dtype=F16),
    "bf16": dict(dtype=BF16),
    "autocast": dict(dtype=BF16, adapter=F32),
    "fp32 adapters": dict(dtype=BF16, adapter=F32, lora_dtype=F32),
}


@pytest.mark.parametrize("rows", [100, 10, 4, 3, 1])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_matches_reference(form, dtypes, rows, device):
    args, more = make(**form, **dtypes, device=device)
    dy = torch.randn(2, 5, H, generator=torch.Generator().manual_seed(1)).to(device)
    compare(args, more, dtypes["dtype"], rows, dy)


@pytest.mark.parametrize("quant", ["single", "double"])
@pytest.mark.parametrize("rows", [10, 4])
@pytest.mark.parametrize("form", ["one adapter each", "none", "down alone", "biases"])
@pytest.mark.parametrize("dtype, adapter", [(F32, None), (BF16, F32)], ids=str)
def test_nf4_weights(dtype, adapter, form, rows, quant, device):
    args, more = make(**FORMS[form], dtype=dtype, adapter=adapter, quant=quant, device=device)
    compare(args, more, dtype, rows, torch.randn(2, 5, H, device=device))


@pytest.mark.parametrize("rows", [10, 4])
@pytest.mark.parametrize("form", ["one adapter each", "none", "none, and the stream", "biases"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_trained_weights(dtype, form, rows, device):
    args, more = make(**FORMS[form], dtype=dtype, train=True, device=device)
    compare(args, more, dtype, rows, torch.randn(2, 5, H, device=device))


def compare(args, more, dtype, rows, dy):
    ours = run(lora_mlp, args, {**more, "rows": rows}, dy)
    same = run(OP.reference, args, more, dy)
    exact = run(OP.reference, *exactly(args, more, dtype), dy)
    for i, (found, stock, truth) in enumerate(zip(ours, same, exact, strict=True)):
        assert (found.dtype, found.shape) == (stock.dtype, stock.shape), i
        assert_within(f"value {i}", found, stock, truth, length=max(N, K, H, 65))


@pytest.mark.skipif(INTERPRET, reason="PyTorch adds the slices up, and 512 of them are slow here")
@pytest.mark.parametrize("form", ["one adapter each", "biases"])
def test_sums_are_in_fp32(form, device):
    """Of 512 slices whose sums grow to 2⁹ times what each adds: in bf16 the last ones would add nothing."""
    args, more = make(**FORMS[form], dtype=BF16, lead=(512,), train=form == "biases", device=device)
    x = args[0].detach()[:1].expand(512, K).contiguous().requires_grad_()
    args, dy = (x, *args[1:]), torch.ones(512, H, device=device)
    ours = run(lora_mlp, args, {**more, "rows": 1}, dy)[2:]
    exact = run(OP.reference, *exactly(args, more, BF16), dy)[2:]
    for found, truth in zip(ours, exact, strict=True):
        assert (found - truth).norm() <= 0.05 * truth.norm()


@pytest.mark.parametrize("quant", [None, "double"])
@pytest.mark.parametrize("dtype, adapter", [(F32, None), (BF16, None), (BF16, F32)], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_one_slice_is_what_the_layers_compute(form, dtype, adapter, quant, device):
    """Bit for bit."""
    args, more = make(**form, dtype=dtype, adapter=adapter, quant=quant, device=device)
    dy = torch.randn(2, 5, H, device=device)
    wanted = run(apart, args, more, dy)
    torch.testing.assert_close(run(lora_mlp, args, {**more, "rows": 10}, dy), wanted, rtol=0, atol=0)


def test_the_slice_is_chosen_by_bytes():
    of = module.tokens_of_slice
    assert of(400_000, 14336, 2) == 6144 and of(400_000, 28672, 2) == 3072  # 8B and 70B
    assert of(400_000, 14336, 2, forward=True) == of(8192, 14336, 2, forward=True) == 8192
    assert of(400_000, 200_000, 4) == 1024 == of(400_000, 200_000, 4, forward=True)
    slices = {1: 1024, 2048: 1024, 4096: 2048, 8192: 4096, 12288: 6144, 12289: 4096, 16384: 5120}
    assert {tokens: of(tokens, 14336, 2) for tokens in slices} == slices
    for tokens, n, forward in itertools.product((8192, 70_000), (5632, 8192, 18944), (True, False)):
        rows = of(tokens, n, 2, forward=forward)
        wide = module.WIDE_FORWARD if forward else module.WIDE
        assert rows % module.FEWEST == 0 and (rows * n * 2 * wide <= module.SLICE_BYTES or rows == module.FEWEST)
        assert forward or math.ceil(tokens / rows) >= module.SLICES


@pytest.mark.parametrize("wanted", ["x", "a", "b", "weight", "bias", "down"])
def test_only_what_is_asked_for(wanted, device):
    args, more = make(**FORMS["biases"], train=True, device=device)
    names = dict(zip(("x", "kind", "weight", "bias", "a", "b"), args, strict=False)) | {
        "down": (args[4][2], args[5][2])
    }
    asked = [t for t in tree_iter(names[wanted]) if t.requires_grad]
    more["rows"] = 4
    expected = torch.autograd.grad(lora_mlp(*args, **more).square().sum(), asked)
    for t in leaves_of(args, more):
        t.requires_grad_(any(t is one for one in asked))
    found = torch.autograd.grad(lora_mlp(*args, **more).square().sum(), asked)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradients_have_memory_of_their_own(device):
    args, more = make(**FORMS["one adapter each"], device=device)
    found = torch.autograd.grad(lora_mlp(*args, rows=4).sum(), leaves_of(args, more))
    assert len({t.untyped_storage().data_ptr() for t in found}) == len(found)


def test_strided_operands(device):
    args, _ = make(**FORMS["one adapter each"], lead=(5, 2), device=device)
    dy = torch.randn(2, 5, H, device=device).transpose(0, 1)
    turned = (args[0].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(), *args[1:])
    for found, wanted in zip(
        run(lora_mlp, turned, {"rows": 4}, dy), run(lora_mlp, args, {"rows": 4}, dy.contiguous()), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("form", ["one adapter each", "biases"])
def test_no_tokens(form, device):
    args, more = make(**FORMS[form], lead=(0, 5), train=form == "biases", device=device)
    y, *grads = run(lora_mlp, args, {**more, "rows": 4}, torch.randn(0, 5, H, device=device))
    assert y.shape == (0, 5, H) and not any(g.any() for g in grads)


@pytest.fixture
def seen(monkeypatch):
    """What the op's bodies call is seen by dispatch modes, too."""
    monkeypatch.setattr(module, "_raw", module._forward)
    monkeypatch.setattr(module, "_raw_backward", module._backward)


class Widths(TorchDispatchMode):
    """The widths of all tensors of ``rows`` rows or more that have the memory for them."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.found = rows, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_iter(out):
            large = isinstance(t, torch.Tensor) and t.dim() > 1 and t.shape[:-1].numel() >= self.rows
            if large and t.untyped_storage().nbytes() >= t.numel() * t.element_size():
                self.found.add(t.shape[-1])
        return out


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("quant", [None, "double"])
def test_nothing_as_wide_as_the_mlp_is_there_for_all_tokens(form, quant, seen, monkeypatch):
    """Of all tokens there are x, y, and their gradients; the layers' own ops make others."""
    monkeypatch.setattr("tests.kernels.test_lora_mlp.N", 320)
    args, more = make(**form, lead=(400,), quant=quant, train=quant is None)
    with Widths(400) as widths:  # more rows than any matrix has
        run(lora_mlp, args, {**more, "rows": 64}, torch.randn(400, H))
    assert max(widths.found) == max(K, H)
    with Widths(400) as widths:
        run(apart, args, more, torch.randn(400, H))
    assert widths.found & {320, 640, 656}


@pytest.mark.parametrize("form", ["one adapter each", "none"])
def test_kept_are_x_and_h_of_down(form):
    args, more = make(**FORMS[form], lead=(400,))
    y = lora_mlp(*args, rows=64)
    theirs = {t.data_ptr() for t in leaves_of(args, more)} | {t.data_ptr() for t in args[2]}
    kept = [t for t in y.grad_fn.saved_tensors if t is not None and t.data_ptr() not in theirs]
    ranks = sum(len(a) for a in args[4][2]) if args[4] else 0
    assert [t.shape for t in kept] == [(400, ranks)] * (ranks > 0)


def test_h_of_down_is_not_computed_again(monkeypatch):
    """It would be a pass over N numbers a token."""
    args, more = make(**FORMS["one adapter each"])
    y = lora_mlp(*args, **more, rows=3)
    monkeypatch.setattr(module.lora, "_down", lambda *_: pytest.fail("an adapter's h again"))
    y.sum().backward()


@pytest.mark.parametrize("form", ["one adapter each", "none"])
def test_weights_are_dense_once_a_pass(form, monkeypatch):
    made = []
    stock = nf4.dequantize_into
    monkeypatch.setattr(nf4, "dequantize_into", lambda outs, *rest: made.extend(outs) or stock(outs, *rest))
    args, more = make(**FORMS[form], quant="double")
    lora_mlp(*args, **more, rows=10)
    made.clear()
    y = lora_mlp(*args, **more, rows=2)
    assert len(made) == 3 and release_scratch() == 0  # in memory of their own, which is free again; as the scratch is
    y.sum().backward()
    assert len(made) == 6 and _dense_weights._once.get() is None
    lora_mlp(*args, **more, rows=10)
    assert release_scratch() > 0  # a single slice has no use for copies of its own


def test_adapters_are_rounded_once_a_pass(seen):
    """However many slices: a copy of a thin matrix is a launch."""

    class Copies(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.number += func.overloadpacket == torch.ops.aten._foreach_copy_
            return func(*args, **(kwargs or {}))

    found = []
    for rows in (2, 5):
        args, more = make(**FORMS["one adapter each"], lead=(10,), dtype=torch.bfloat16, adapter=F32)
        with Copies() as copies:
            lora_mlp(*args, **more, rows=rows).sum().backward()
        found.append(copies.number)
    assert found[0] == found[1] > 0


def test_scratch_is_what_is_made(seen):
    """Bytes at one time, as the planner has them. The bodies in PyTorch make more than the kernels."""
    for form, quant in itertools.product(("one adapter each", "none"), (None, "double")):
        args, more = make(**FORMS[form], lead=(512,), quant=quant)
        y = lora_mlp(*args, **more, rows=256)
        grads: list[torch.Tensor] = []
        found = _most(lambda: grads.extend(torch.autograd.grad(y, leaves_of(args, more), torch.ones_like(y))))  # noqa: B023
        said = module.scratch_bytes(512, 256, (N, K, H), 15, 4, quant is not None, [False] * 3)
        found -= sum(t.numel() * t.element_size() for t in (y, *grads))
        one, four = (_most(lambda: lora_mlp(*args, **{**more, "rows": 512 // n})) for n in (1, 4))  # noqa: B023
        # A slice's gate and up are gone before the next one's come.
        # (Triton's interpreter has copies of all that a kernel gets.)
        assert quant is not None or INTERPRET or four - y.nbytes < 0.4 * (one - y.nbytes)
        assert said / 2 < found <= said * (1.15 if INTERPRET else 2), (form, quant, found, said)


def _most(call) -> int:
    from torch.utils.weak import WeakIdKeyDictionary

    class Peak(TorchDispatchMode):
        most = 0
        alive = WeakIdKeyDictionary()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in tree_iter(out):
                if isinstance(t, torch.Tensor):
                    self.alive[t] = True
            storages = {s.data_ptr(): s.nbytes() for t in list(self.alive) if (s := t.untyped_storage()).nbytes()}
            self.most = max(self.most, sum(storages.values()))
            return out

    with Peak() as peak:
        call()
    return peak.most


def test_supported():
    args, _ = make(**FORMS["one adapter each"])
    x, kind, weight, bias, a, b, scaling = args

    def code(*given, **options) -> str | None:
        reason = OP.supported(*given, **options)
        return None if reason is None else reason.code

    assert code(*args) is None
    assert code(x, "relu", *args[2:]) == "activation"
    assert code(x, kind, weight[:2]) == "shape"
    assert code(x, kind, [weight[0], weight[1][:5], weight[2]]) == "shape"
    assert code(x, kind, [*weight[:2], weight[2][:, :5]]) == "shape"
    assert code(x[..., :5], kind, weight) == "shape"
    assert code(*args, rows=0) == "rows"
    assert code(x, kind, weight, bias, [[a[0][0].half()], *a[1:]], b, scaling) == "dtype"
    assert code(*args, residual=torch.zeros(2, 5, H)) == "residual"
    packed, options = make(quant="double")
    options["quant"][2] = options["quant"][2][:1]
    assert code(*packed, **options) == "quantization"
    with pytest.raises(ValueError, match="lora_mlp: slices of 0 tokens; 1 or more is supported"):
        lora_mlp(*args, rows=0)


def test_what_is_stacked():
    """Gate and up with an adapter each, frozen and without a bias, all in one dtype."""
    weight, one, up = [torch.ones(4, 4)] * 2, [[torch.ones(2, 4)]] * 2, [[torch.ones(4, 2)]] * 2
    assert module.stacks(weight, [None] * 2, one, up, [[None]] * 2, True)
    assert not module.stacks(weight, [None] * 2, one, up, [[None]] * 2, False)
    assert not module.stacks(weight, [None, torch.ones(4)], one, up, [[None]] * 2, True)
    assert not module.stacks(weight, [None] * 2, one, up, [[None], [torch.ones(4)]], True)
    assert not module.stacks([w.clone().requires_grad_() for w in weight], [None] * 2, one, up, [[None]] * 2, True)
    assert not module.stacks(weight, [None] * 2, [one[0], []], [up[0], []], [[None], []], True)
    assert not module.stacks(weight, [None] * 2, one, [[torch.ones(4, 65)]] * 2, [[None]] * 2, True)


def test_cost():
    x = torch.empty(8192, 4096, dtype=BF16)
    weight = [torch.empty(14336, 4096, dtype=BF16)] * 2 + [torch.empty(4096, 14336, dtype=BF16)]
    cost = OP.cost(x, "silu", weight)
    assert int(cost.flops) == 6 * 8192 * 14336 * 4096 + 8 * 8192 * 14336 and int(cost.bytes_kept) == 0
    adapted = OP.cost(x, "silu", weight, a=[[torch.empty(16, k)] for k in (4096, 4096, 14336)])
    assert int(adapted.flops - cost.flops) == 3 * 2 * 8192 * 16 * (14336 + 4096)


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _layers(new: New, n: int, grad: bool = True) -> tuple[list[torch.Tensor], list[Any], list[Any], list[Any]]:
    """Weights [2n, 6], [2n, 6] and [4, 2n], and an adapter of each."""
    sizes = ((2 * n, 6), (2 * n, 6), (4, 2 * n))
    weight = [new(*size, grad=grad) for size in sizes]
    ranks = (2, 3, 2)
    a = [[new(r, k)] for r, (_, k) in zip(ranks, sizes, strict=True)]
    b = [[new(m, r)] for r, (m, _) in zip(ranks, sizes, strict=True)]
    return weight, a, b, [[2.0], [0.5], [1.5]]


def _samples(new: New, n: int) -> Named:
    weight, *adapters = _layers(new, n, grad=False)
    yield "slices", (new(2, 3, 6), "silu", weight, [], *adapters), {"rows": 4}
    yield "one slice", (new(2, 3, 6), "gelu", weight, [], *adapters), {}
    weight, a, b, scaling = _layers(new, n)
    biases = [new(w.shape[0]) for w in weight]
    more = {"rows": 4, "b_bias": [[new(w.shape[0])] for w in weight]}
    yield "all trained", (new(2, 3, 6), "gelu_tanh", weight, biases, a, b, scaling), more
    yield "no adapters", (new(2, 3, 6), "silu", weight), {"rows": 2, "residual": new(2, 3, 4)}
    if new.dtype != torch.float64:  # NF4 weights have no fp64 form
        for name, state in nf4_states(new, n):
            quant = {"quant": [state["quant"]] * 3, "shape": [(2 * n, 64), (2 * n, 64), (64, 2 * n)]}
            quant |= {"blocksize": [64] * 3, "blocksize2": [2] * 3}
            a = [[new(2, 64)], [new(3, 64)], [new(2, 2 * n)]]
            b = [[new(2 * n, 2)], [new(2 * n, 3)], [new(64, 2)]]
            args = (new(2, 3, 64), "silu", [state["packed"]] * 3, [], a, b, [[1.0]] * 3)
            yield f"NF4, {name}", args, {**quant, "rows": 4}


SAMPLES = {"lora_mlp": _samples}


def _case(d: Draw) -> Sample:
    n, k, h, stored = d(WIDTHS), d(WIDTHS), d(WIDTHS), d(STORED)
    lead, sizes = (d(SIZES), d(SIZES)), ((n, k), (n, k), (h, n))
    stored_as = [_weight_case(d, stored, *size) for size in sizes]
    weight = [w.requires_grad_(w.is_floating_point() and d(st.booleans())) for w, _ in stored_as]
    state = {name: [of[name] for _, of in stored_as] for name in stored_as[0][1]}
    ranks = [d(st.lists(st.sampled_from((1, 2, 5)), max_size=2)) for _ in sizes]
    if d(st.booleans()):
        ranks = [[3], [2], [1]]
    a = [[d.tensor(r, of, scale=of**-0.5) for r in each] for each, (_, of) in zip(ranks, sizes, strict=True)]
    b = [[d.tensor(m, r, scale=r**-0.5) for r in each] for each, (m, _) in zip(ranks, sizes, strict=True)]
    bias = [d.maybe(lambda m=m: d.tensor(m)) for m, _ in sizes]
    scaling = [[d(st.sampled_from((1.0, 0.7071))) for _ in each] for each in ranks]
    alone = bias[2] is None and not ranks[2]
    residual = d.maybe(lambda: d.tensor(*lead, h)) if alone else None
    rows = max(1, lead[0] * lead[1] // d(st.sampled_from((1, 2, 3))))  # few: each is slow in the interpreter
    more = {"residual": residual, "rows": rows}
    kind = d(st.sampled_from(("silu", "gelu", "gelu_tanh")))
    return Sample("", (d.tensor(*lead, k), kind, weight, bias, a, b, scaling), {**state, **more})


FUZZ = {"lora_mlp": _case}


def _exact(sample: Sample) -> Sample:
    """NF4 weights have no fp64 form: as the dense ones that they are in x's dtype."""
    (x, kind, weight, *rest), kwargs = sample.args, dict(sample.kwargs)
    if kwargs.get("quant"):
        states = zip(*(kwargs.pop(name) for name in _NF4), strict=True)
        weight = [_dense(w, x.dtype, *state) for w, state in zip(weight, states, strict=True)]
    return Sample(sample.name, (x, kind, weight, *rest), kwargs)


EXACT = {"lora_mlp": _exact}


def _derivations() -> list[Derivation]:
    def mlp(kind: str, x: Array, gate: Any, up: Any, down: Any) -> Array:
        """gate, up, down: functions of their input."""
        return down(unary(ACTIVATIONS[kind])(gate(x)) * up(x))

    def adapted(w: Array, a: Array, b: Array, scale: Any) -> Any:
        return lambda x: x @ w.T + scale * (x @ a.T) @ b.T

    def stacked(x: Array, w1: Array, w2: Array, w3: Array, **thin: Array) -> list[Array]:
        layers = [
            adapted(w, thin[f"a{i}"], thin[f"b{i}"], scale)
            for i, w, scale in zip("123", (w1, w2, w3), (2, ratio("0.5"), 1), strict=True)
        ]
        return [mlp("silu", x, *layers)]

    def call(fn: Any, x: Any, w1: Any, w2: Any, w3: Any, **thin: Any) -> Any:
        a, b = ([[thin[f"{name}{i}"]] for i in "123"] for name in "ab")
        return fn(x, "silu", [w1, w2, w3], [], a, b, [[2.0], [0.5], [1.0]], rows=2)

    def plain(x: Array, w1: Array, w2: Array, w3: Array, b1: Array, b3: Array) -> list[Array]:
        return [mlp("silu", x, lambda x: x @ w1.T + b1, lambda x: x @ w2.T, lambda x: x @ w3.T + b3)]

    weights = {"x": (3, 2), "w1": (2, 2), "w2": (2, 2), "w3": (1, 2)}
    thin = {"a1": (1, 2), "b1": (2, 1), "a2": (1, 2), "b2": (2, 1), "a3": (1, 2), "b3": (1, 1)}
    return [
        Derivation("an adapter each", {**weights, **thin}, call, stacked, frozen=("w1", "w2", "w3")),
        Derivation(
            "all trained, two biases",
            {**weights, "b1": (2,), "b3": (1,)},
            lambda fn, x, w1, w2, w3, b1, b3: fn(x, "silu", [w1, w2, w3], [b1, None, b3], rows=2),
            plain,
        ),
        Derivation(
            "the stream",
            {**weights, "z": (3, 1)},
            lambda fn, x, w1, w2, w3, z: fn(x, "silu", [w1, w2, w3], residual=z, rows=2),
            lambda x, w1, w2, w3, z: [z + plain(x, w1, w2, w3, 0, 0)[0]],
            frozen=("w2",),
        ),
    ]


DERIVATIONS = {"lora_mlp": _derivations}

MUTANTS = (
    Mutant(
        "lora_mlp: the last slice is left out",
        "kernels/lora_mlp.py",
        "for start in range(0, tokens, rows))",
        "for start in range(0, tokens - tokens % rows or tokens, rows))",
        "'tests/kernels/test_lora_mlp.py::test_matches_reference[one adapter each-fp32-4]'",
    ),
    Mutant(
        "lora_mlp: sums of the last slice alone",
        "kernels/lora_mlp.py",
        "totals = totals or found",
        "totals = found",
        "'tests/kernels/test_lora_mlp.py::test_matches_reference[one adapter each-fp32-4]'",
    ),
    Mutant(
        "lora_mlp: sums in the adapters' dtype",
        "kernels/lora_mlp.py",
        "[t.to(torch.promote_types(t.dtype, torch.float32)) for t in thin]",
        "[t for t in thin]",
        "tests/kernels/test_lora_mlp.py -k sums_are_in_fp32",
    ),
    Mutant(
        "lora_mlp: every slice adds the stream's first rows",
        "kernels/lora_mlp.py",
        "None if zs is None else zs[part])",
        "None if zs is None else zs[: part.stop - part.start])",
        "'tests/kernels/test_lora_mlp.py::test_matches_reference[none, and the stream-fp32-4]'",
    ),
    Mutant(
        "lora_mlp: every slice has the first one's h",
        "kernels/lora_mlp.py",
        "thin = None if h is None else h[part]",
        "thin = None if h is None else h[: part.stop - part.start]",
        "'tests/kernels/test_lora_mlp.py::test_matches_reference[one adapter each-fp32-4]'",
    ),
    Mutant(
        "lora_mlp: h of the last slice alone",
        "kernels/lora_mlp.py",
        "torch.cat(hs) if hs else",
        "torch.cat(hs[-1:] * len(hs))[: len(x)] if hs else",
        "'tests/kernels/test_lora_mlp.py::test_matches_reference[one adapter each-fp32-4]'",
    ),
    Mutant(
        "lora_mlp: down's adapters are gate's",
        "kernels/lora_mlp.py",
        "slice(q, None), slice(first, None))]",
        "slice(q, None), slice(0, len(self.a) - first))]",
        "tests/kernels/test_lora_mlp.py -k matches_reference",
    ),
    Mutant(
        "lora_mlp: nothing comes back to gate and up unless x asks",
        "kernels/lora_mlp.py",
        "            need_x = mine.any\n",
        "",
        "tests/kernels/test_lora_mlp.py::test_only_what_is_asked_for[a]",
    ),
    Mutant(
        "lora_mlp: the activation of all tokens",
        "kernels/lora_mlp.py",
        "    totals: list[torch.Tensor] = []\n",
        "    totals, rows = [], xs.shape[0]\n",
        "tests/kernels/test_lora_mlp.py -k nothing_as_wide",
    ),
    Mutant(
        "lora_mlp: legality allocates the activation",
        "kernels/lora_mlp.py",
        "    act = x[..., :1].expand(*x.shape[:-1], widths[0])",
        "    act = x.new_empty((*x.shape[:-1], widths[0]))",
        "tests/kernels/test_lora_mlp.py -k nothing_as_wide",
    ),
    Mutant(
        "lora_mlp: fp32 adapters are stacked in bf16",
        "kernels/lora_mlp.py",
        "return one_each and plain and frozen and same_dtype and all(",
        "return one_each and plain and frozen and all(",
        "tests/kernels/test_lora_mlp.py -k what_is_stacked",
    ),
)
