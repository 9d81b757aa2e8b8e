"""LoRA linear over dense and NF4 weights: values, gradients, dtypes, what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from bench.shapes import shapes
from fastft.compare import assert_within
from fastft.kernels import _dense_weights, _products
from fastft.kernels import lora_linear as module
from fastft.kernels._dense_weights import quant_args, release_scratch
from fastft.kernels.lora_linear import JOINT, OP, lora_linear, lora_linears
from tests.kernels._derivations import BOTH, Array, Derivation
from tests.kernels._expressions import ratio
from tests.kernels._fuzz import SIZES, WIDTHS, Draw
from tests.kernels._samples import Named, New, Sample, nf4_states
from tests.mutation._mutant import Mutant

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

#: Dtypes of x, dense weight, adapters, base product, adapters' products, output.
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPES = {
    "fp32": (F32, F32, F32, F32, F32, F32),
    "bf16": (BF16, BF16, BF16, BF16, BF16, BF16),
    "fp16": (F16, F16, F16, F16, F16, F16),
    "bf16-fp32-adapters": (BF16, BF16, F32, BF16, F32, BF16),  # PEFT's default without autocast
    "fp16-fp32-adapters": (F16, F16, F32, F16, F32, F16),
    "autocast": (BF16, F32, F32, BF16, BF16, BF16),  # fp32 parameters under autocast to bf16
    "autocast-fp32-x": (F32, F32, F32, BF16, BF16, BF16),
    "autocast-frozen-bf16": (BF16, BF16, F32, BF16, BF16, BF16),
    "bf16-to-fp32": (BF16, BF16, F32, BF16, F32, F32),
    "bf16-adapters-to-fp32": (BF16, BF16, BF16, BF16, BF16, F32),
    "fp32-bf16-adapters": (F32, F32, BF16, F32, BF16, F32),
    "fp32-x-bf16-base": (F32, BF16, F32, BF16, F32, F32),  # NF4 in a model whose other parameters are fp32
}


def make(
    dtypes,
    *,
    n=24,
    k=64,
    lead=(3, 5),
    ranks=(4,),
    own=False,
    bias=False,
    b_bias=False,
    residual=False,
    quant=None,
    device="cpu",
    train=True,
):
    """Arguments of the op: positional ones, keyword ones, and all tensors that want gradients by name."""
    generator = torch.Generator().manual_seed(0)
    x_dtype, w_dtype, a_dtype, dtype, lora_dtype, out_dtype = dtypes

    def tensor(*size, dtype, grad=True, scale=1.0):
        t = (torch.randn(size, generator=generator) * scale).to(device=device, dtype=dtype)
        return t.requires_grad_(grad)

    x = tensor(*lead, k, dtype=x_dtype)
    named = {"x": x}
    kwargs = {"dtype": dtype, "lora_dtype": lora_dtype, "out_dtype": out_dtype}
    if quant is None:
        weight = named["weight"] = tensor(n, k, dtype=w_dtype, grad=train, scale=k**-0.5)
    else:
        functional = pytest.importorskip("bitsandbytes.functional")
        dense = tensor(n, k, dtype=F32, grad=False, scale=k**-0.5)
        weight, state = functional.quantize_4bit(dense, compress_statistics=quant == "double", quant_type="nf4")
        extra = (state.state2.code, state.offset, state.state2.absmax) if quant == "double" else ()
        kwargs |= {"quant": (state.absmax, *extra), "shape": (n, k)}
    biases = None
    if bias:
        biases = named["bias"] = tensor(n, dtype=w_dtype)
    a = [tensor(r, k, dtype=a_dtype, scale=k**-0.5) for r in ranks]
    b = [tensor(n, r, dtype=a_dtype, scale=r**-0.5) for r in ranks]
    named |= {f"a{i}": t for i, t in enumerate(a)} | {f"b{i}": t for i, t in enumerate(b)}
    if own:
        kwargs["x_lora"] = [tensor(*lead, k, dtype=lora_dtype) for _ in ranks]
        named |= {f"x_lora{i}": t for i, t in enumerate(kwargs["x_lora"])}
    if b_bias:
        kwargs["b_bias"] = [tensor(n, dtype=a_dtype) for _ in ranks]
        named |= {f"b_bias{i}": t for i, t in enumerate(kwargs["b_bias"])}
    if residual:
        kwargs["residual"] = named["residual"] = tensor(*lead, n, dtype=out_dtype)
    scaling = [2.0, 0.7071, 1.25][: len(ranks)]
    return (x, weight, biases, a, b, scaling), kwargs, {n: t for n, t in named.items() if t.requires_grad}


def convert(args, kwargs, named, dtype):
    """The same arguments with every floating tensor in ``dtype``, as new leaves."""
    seen = {}

    def to(t):
        if isinstance(t, (list, tuple)):
            return type(t)(map(to, t))
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        return seen.setdefault(id(t), t.detach().to(dtype).requires_grad_(t.requires_grad))

    args = tuple(map(to, args))
    kwargs = {k: (dtype if isinstance(v, torch.dtype) else v if k == "quant" else to(v)) for k, v in kwargs.items()}
    return args, kwargs, {n: seen[id(t)] for n, t in named.items()}


def results(call, args, kwargs, named, dy):
    """y and the gradients, by name."""
    y = call(*args, **kwargs)
    grads = torch.autograd.grad(y, list(named.values()), dy.to(y.dtype), allow_unused=True)
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(named, grads, strict=True) if g is not None}


def check(dtypes, device="cpu", strided=False, **options):
    args, kwargs, named = make(dtypes, device=device, **options)
    n = args[4][0].shape[0] if args[4] else kwargs.get("shape", args[1].shape)[0]
    dy = torch.randn(*args[0].shape[:-1], n, generator=torch.Generator().manual_seed(1)).to(device).to(dtypes[5])
    if strided:
        dy = dy.transpose(0, 1).contiguous().transpose(0, 1)
    ours = results(lora_linear, args, kwargs, named, dy)
    stock = results(OP.reference, args, kwargs, named, dy)
    high = convert(args, kwargs, named, F64)
    if kwargs.get("quant"):  # the weight is what it is in x's dtype; the reference multiplies with it in fp64
        weight = module.nf4.nf4_dequantize_reference(
            args[1], *quant_args(kwargs["quant"]), 64, 256, kwargs["shape"], dtypes[3]
        )
        plain = {k: v for k, v in high[1].items() if k not in ("quant", "shape")}
        high = ((high[0][0], weight.double(), *high[0][2:]), plain, high[2])
    exact = results(OP.reference, *high, dy.double())
    assert ours.keys() == stock.keys() == exact.keys()
    for name, value in ours.items():
        assert value.dtype == stock[name].dtype and value.shape == stock[name].shape, name
        assert_within(name, value, stock[name], exact[name], length=max(value.shape[-1], args[0].numel()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("own", [False, True], ids=["x", "dropout"])
def test_dtypes(dtypes, own, device):
    check(dtypes, device, own=own, bias=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", [DTYPES[n] for n in ("fp32", "bf16", "bf16-fp32-adapters", "autocast")], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"ranks": (4, 8)},
        {"ranks": (3, 1, 5), "own": True, "b_bias": True},
        {"b_bias": True},
        {"b_bias": True, "bias": True, "train": False},
        {"ranks": ()},
        {"ranks": (), "bias": True, "train": False},
        {"n": 7, "k": 13, "lead": (11,), "ranks": (2,)},
        {"lead": (1,)},
        {"lead": (2, 2, 3), "strided": True},
        {"residual": True, "ranks": ()},
        {"residual": True, "ranks": (), "train": False, "strided": True},
        {"ranks": (4, 8), "own": True, "bias": True},
    ],
    ids=[
        *("two", "three-own-biased", "b-bias", "biases", "none", "none-bias-frozen", "odd", "one-token", "strided"),
        *("residual", "residual-frozen-strided", "two-own-bias"),
    ],
)
def test_shapes(dtypes, options, device):
    check(dtypes, device, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", shapes("lora_linear", tag="test"), ids=str)
@pytest.mark.parametrize("name", ["fp32", "bf16-fp32-adapters"])
def test_listed_shapes(name, shape, device):
    lead = (shape["batch"], shape["seq"])
    check(DTYPES[name], device, n=shape["out_features"], k=shape["in_features"], lead=lead, ranks=(shape["rank"],))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quant", ["single", "double"])
@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16-fp32-adapters", "autocast", "fp16", "fp32-x-bf16-base"])
@pytest.mark.parametrize("ranks", [(), (4,)], ids=["plain", "lora"])
def test_nf4(name, quant, ranks, device):
    check(DTYPES[name], device, quant=quant, ranks=ranks, own=name == "fp32", bias=True)


@pytest.mark.parametrize("name", ["bf16-fp32-adapters", "fp16-fp32-adapters", "autocast"])
def test_slabs(name, monkeypatch):
    """Products of a half-precision matrix with an fp32 one, a few rows or columns at a time."""
    monkeypatch.setattr(_products, "SLAB", 100)
    check(DTYPES[name], own=False, bias=True)


@pytest.mark.parametrize("own", [False, True], ids=["x", "dropout"])
@pytest.mark.parametrize("name", [n for n in DTYPES if "bf16" in n])
def test_bf16_parts_on_any_device(name, own, monkeypatch):
    """What CUDA does where bf16 meets fp32, with the same sums: products of parts, each in fp32."""
    monkeypatch.setattr(_products, "_splits", lambda half: half.dtype == BF16)
    check(DTYPES[name], own=own, bias=True, ranks=(4, 3))


def test_parts_carry_fp32():
    """Three bf16 parts are an fp32 number, two are 16 bits of it."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sum(p.float() for p in _products._bf16_parts(x, 3)), x)
    two = sum(p.float() for p in _products._bf16_parts(x, 2))
    assert ((two - x).abs() <= x.abs() * 2.0**-16).all()


@pytest.mark.parametrize("own", [False, True])
def test_gradcheck(own):
    args, kwargs, named = convert(
        *make(DTYPES["fp32"], n=3, k=4, lead=(2,), ranks=(2, 1), own=own, bias=True, b_bias=True), F64
    )

    def call(function):
        def run(*tensors):
            swap = dict(zip(map(id, named.values()), tensors, strict=True))

            def pick(v):
                return [swap.get(id(t), t) for t in v] if isinstance(v, list) else swap.get(id(v), v)

            return function(*map(pick, args), **{k: pick(v) for k, v in kwargs.items()})

        return run

    assert torch.autograd.gradcheck(call(OP.reference), tuple(named.values()))
    assert torch.autograd.gradcheck(call(lora_linear), tuple(named.values()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_one_rounding_at_full_size(name, residual, device):
    """A result, and dx, as if it had been summed in fp32: with the large product first, both were rounded twice, and
    the errors were 1.4 times these.
    """
    torch.manual_seed(0)
    dtype = DTYPES[name][0]
    x, weight, a, b = (torch.randn(*s) for s in ((64, 128), (96, 128), (4, 128), (96, 4)))
    x, weight, a, b, z, dy = (
        t.to(device, dtype)
        for t in (x, weight * 128**-0.5, a * 128**-0.5, 0.1 * b, torch.randn(64, 96), torch.randn(64, 96))
    )

    def run(fn, to):
        leaf = x.to(to).requires_grad_()
        adapters = ([a.to(to)], [b.to(to)], [0.5])
        y = fn(leaf, weight.to(to), residual=z.to(to)) if residual else fn(leaf, weight.to(to), None, *adapters)
        return [y.detach(), *torch.autograd.grad(y, leaf, dy.to(to))]

    for ours, exact in zip(run(lora_linear, dtype), run(OP.reference, F64), strict=True):
        rounded = exact.to(dtype).double()
        once = (rounded - exact).norm() / exact.norm()
        assert (ours.double() - exact).norm() / exact.norm() <= 1.1 * once


def test_smallest_layer_first():
    """dx of q, k and v is rounded at the size that the sum has reached: the large q comes last."""
    torch.manual_seed(0)
    x = torch.randn(64, 32, dtype=BF16).requires_grad_()
    weight = [torch.randn(n, 32, dtype=BF16) * 32**-0.5 for n in (256, 16, 16)]
    dy = [torch.randn(64, w.shape[0], dtype=BF16) for w in weight]
    (dx,) = torch.autograd.grad(lora_linears(x, weight), x, dy)
    expected = torch.mm(dy[1], weight[1]).addmm_(dy[2], weight[2]).addmm_(dy[0], weight[0])
    assert torch.equal(dx, expected)


def test_only_what_is_asked_for():
    """Frozen tensors get no gradient, nothing is computed for them, and their operands are not kept."""
    args, kwargs, _ = make(DTYPES["fp32"], train=False)
    x, _, _, (a,), (b,), _ = args
    x.requires_grad_(False), a.requires_grad_(False)
    y = lora_linear(*args, **kwargs)
    assert not any(t.shape == x.shape for t in y.grad_fn.saved_tensors if t is not None)  # only h for dB
    (db,) = torch.autograd.grad(y.sum(), b)
    expected = 2.0 * torch.ones_like(y).view(-1, 24).t() @ (x @ a.t()).view(-1, 4)
    torch.testing.assert_close(db, expected)
    a.requires_grad_(True)
    b.requires_grad_(False)
    y = lora_linear(*args, **kwargs)
    assert not any(t.shape == (15, 4) for t in y.grad_fn.saved_tensors if t is not None)  # no h without dB


def test_frozen_adapter_on_an_input_of_its_own():
    """An adapter whose own input needs no gradient adds nothing to dx."""
    args, kwargs, _ = make(DTYPES["fp32"], own=True)
    x, weight = args[:2]
    for t in (*args[3], *kwargs["x_lora"]):
        t.requires_grad_(False)
    (dx,) = torch.autograd.grad(lora_linear(*args, **kwargs).sum(), x)
    torch.testing.assert_close(dx, torch.ones(3, 5, 24) @ weight)


def test_empty():
    args, kwargs, named = make(DTYPES["bf16-fp32-adapters"], lead=(0, 5), bias=True)
    y = lora_linear(*args, **kwargs)
    assert y.shape == (0, 5, 24)
    for name, grad in zip(named, torch.autograd.grad(y.sum(), list(named.values())), strict=True):
        assert grad.shape == named[name].shape and not grad.any(), name


def test_scratch_is_shared_and_grows():
    release_scratch()
    small, kw_small, _ = make(DTYPES["bf16"], n=8, quant="double")
    large, kw_large, _ = make(DTYPES["bf16"], n=32, quant="double")
    lora_linear(*small, **kw_small)
    first = lora_linear(*large, **kw_large)
    lora_linear(*small, **kw_small)
    assert [t.numel() for t in _dense_weights._scratch.values()] == [32 * 64]
    assert torch.equal(lora_linear(*large, **kw_large), first)
    assert release_scratch() == 32 * 64 * 2


def test_autocast_does_not_reach_inside():
    args, kwargs, _ = make(DTYPES["fp32"])
    expected = lora_linear(*args, **kwargs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(lora_linear(*args, **kwargs), expected)


@pytest.mark.parametrize("quant", [None, "double"])
@pytest.mark.parametrize("own", [False, True])
def test_opcheck(quant, own):
    args, kwargs, _ = make(DTYPES["bf16-fp32-adapters"], quant=quant, own=own, bias=True, ranks=(4, 2), train=False)
    x, weight, bias, a, b, scaling = args
    x_lora = list(kwargs.get("x_lora", (None, None)))
    # The second layer is the first one without its adapters.
    where = ([weight] * 2, list(kwargs.get("quant", ())) * 2, list(kwargs.get("shape", ())) * 2, [64, 256] * 2)

    def detach(v):
        return (
            [detach(t) for t in v] if isinstance(v, (list, tuple)) else v.detach() if isinstance(v, torch.Tensor) else v
        )

    def opcheck(op, *arguments):
        arguments = detach(arguments)
        torch.library.opcheck(op, arguments, raise_exception=True)
        return op(*arguments)

    ops = torch.ops.fastft
    h = opcheck(ops.lora_linear_down.default, x, a, x_lora, F32)
    ys = opcheck(ops.lora_linear.default, x, *where, [bias, None], h, [2, 0], b, [None, None], scaling, None, BF16)
    own_input = [t is not None for t in x_lora]
    opcheck(
        ops.lora_linear_backward.default, [torch.ones_like(y) for y in ys], x, *where, [2, 0], a, b, x_lora, own_input,
        h, scaling, BF16, F32, True, True, [quant is None, False], [True, False], [True, False], [False, True],
        own_input,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("quant", [None, "double"])
def test_compiled(backend, quant):
    """As a node of a graph, through AOTAutograd and Inductor, with dynamic sizes."""
    if backend == "inductor" and quant is None:
        pytest.skip("one run of Inductor is enough")
    args, kwargs, named = make(DTYPES["bf16-fp32-adapters"], quant=quant, own=True, bias=True, train=False)
    for t in (args[0], kwargs["x_lora"][0]):
        torch._dynamo.mark_dynamic(t, 0)
    compiled = torch.compile(lambda *tensors: lora_linear(*tensors, args[5], **kwargs), backend=backend, fullgraph=True)
    dy = torch.ones(3, 5, 24, dtype=BF16)
    got = results(lambda *all_but, **_: compiled(*all_but[:5]), args, kwargs, named, dy)
    for name, value in results(lora_linear, args, kwargs, named, dy).items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=0, msg=name)


def make_joint(dtypes, layers, device="cpu", scaling=None):
    """Arguments of ``lora_linears``, as :func:`make` gives those of one layer; ``layers``: options of each."""
    made = [make(dtypes, device=device, **options) for options in layers]
    x = made[0][0][0]
    columns = [list(column) for column in zip(*(args[1:] for args, _, _ in made), strict=True)]
    if scaling is not None:
        columns[4] = [[scaling] * len(of_layer) for of_layer in columns[4]]
    kwargs = dict(zip(("dtype", "lora_dtype", "out_dtype"), dtypes[3:], strict=True))
    for name in ("quant", "shape", "b_bias"):
        if any(name in more for _, more, _ in made):
            kwargs[name] = [more.get(name, ()) for _, more, _ in made]
    named = {f"{n}/{i}": t for i, (_, _, tensors) in enumerate(made) for n, t in tensors.items() if n != "x"}
    return (x, *columns), kwargs, {"x": x} | named


def check_joint(dtypes, device="cpu", strided=False, scaling=None, layers=({}, {"n": 8}, {"n": 40, "ranks": (2,)})):
    args, kwargs, named = make_joint(dtypes, layers, device, scaling)
    lead = args[0].shape[:-1]
    widths = [(kwargs["shape"][i] if "quant" in kwargs else w.shape)[0] for i, w in enumerate(args[1])]
    generator = torch.Generator().manual_seed(1)
    dys = [torch.randn(*lead, n, generator=generator).to(device).to(dtypes[5]) for n in widths]
    if strided:
        dys = [dy.transpose(0, 1).contiguous().transpose(0, 1) for dy in dys]

    def run(call, args, kwargs, named, kind):
        ys = call(*args, **kwargs)
        grads = torch.autograd.grad(ys, list(named.values()), [dy.to(kind or dy.dtype) for dy in dys])
        return {f"y{i}": y.detach() for i, y in enumerate(ys)} | dict(zip(named, grads, strict=True))

    ours = run(lora_linears, args, kwargs, named, None)
    stock = run(JOINT.reference, args, kwargs, named, None)
    exact_args, exact_kwargs, exact_named = convert(args, kwargs, named, F64)
    if "quant" in kwargs:
        dense = [
            module.nf4.nf4_dequantize_reference(w, *quant_args(q), 64, 256, shape, dtypes[3]).double()
            for w, q, shape in zip(args[1], kwargs["quant"], kwargs["shape"], strict=True)
        ]
        exact_args = (exact_args[0], dense, *exact_args[2:])
        exact_kwargs = {k: v for k, v in exact_kwargs.items() if k not in ("quant", "shape")}
    exact = run(JOINT.reference, exact_args, exact_kwargs, exact_named, F64)
    for name, value in ours.items():
        assert value.dtype == stock[name].dtype and value.shape == stock[name].shape, name
        assert_within(name, value, stock[name], exact[name], length=max(value.shape[-1], args[0].numel()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scaling", [None, 1.0, 0.7071], ids=["scalings", "one", "same"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_joint_dtypes(dtypes, scaling, device):
    check_joint(dtypes, device, scaling=scaling)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", [DTYPES[n] for n in ("fp32", "bf16", "bf16-fp32-adapters", "autocast")], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"layers": ({},)},
        {"layers": ({"ranks": (4, 8)}, {"ranks": (), "bias": True}, {"n": 5, "ranks": (3,), "b_bias": True})},
        {"layers": ({"ranks": ()}, {"ranks": (), "bias": True})},
        {"layers": ({"train": False}, {"n": 7})},
        {"layers": ({"lead": (1,)}, {"lead": (1,), "ranks": (1,)})},
        {"layers": ({"lead": (2, 2, 3)}, {"lead": (2, 2, 3)}), "strided": True},
    ],
    ids=["one", "mixed", "plain", "one-frozen", "one-token", "strided"],
)
def test_joint_shapes(dtypes, options, device):
    check_joint(dtypes, device, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("quant", ["single", "double"])
@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16-fp32-adapters", "autocast", "fp16"])
def test_joint_nf4(name, quant, device):
    check_joint(DTYPES[name], device, layers=({"quant": quant}, {"quant": quant, "n": 8, "ranks": ()}))


def joined(widths, k, adapted):
    """Whether dx of NF4 layers [width, k] is one product."""
    dy, shape = [torch.empty(0)] * len(widths), [n for width in widths for n in (width, k)]
    return module.one_product(dy, shape, [not adapted], torch.float32, torch.float32, together=True, need_x=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["fp32", "bf16", "autocast", "fp16"])
@pytest.mark.parametrize("widths", [(8, 24, 16), (96, 200)], ids=["side by side", "one by one"])
def test_joint_nf4_backward(name, widths, device):
    """dx in one product of gradients that are copied next to each other, or layer after layer; a rank that is no
    multiple of 8, and a scaling each.
    """
    assert joined(widths, 64, True) == (len(widths) == 3)
    layers = [{"quant": "double", "n": n, "ranks": (3,) * (i + 1)} for i, n in enumerate(widths)]
    check_joint(DTYPES[name], device, layers=layers, strided=True)
    check_joint(DTYPES[name], device, layers=layers, scaling=1.0)


def test_side_by_side_where_it_spares_more_than_it_costs():
    llama = {"q, k, v": (4096, 1024, 1024), "o": (4096,), "gate, up": (14336, 14336)}
    assert {name: joined(widths, 4096, True) for name, widths in llama.items()} == {
        "q, k, v": True, "o": False, "gate, up": False,
    }  # fmt: skip
    assert joined((4096,), 14336, True) and not joined((4096,), 14336, False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 0.7071])
def test_accumulated(scale, device):
    """The variant: the same, with dx summed up by one product after another."""
    layers = [{"quant": "double", "n": n, "ranks": (3,)} for n in (8, 24)]
    args, kwargs, named = make_joint(DTYPES["bf16"], layers, device, scaling=scale)
    (joint, _), (alone, _) = (op.variants["accumulated"] for op in (JOINT, OP))
    dys = [torch.randn(3, 5, n, generator=torch.Generator().manual_seed(2)).to(device, BF16) for n in (8, 24)]
    ours, other = (torch.autograd.grad(fn(*args, **kwargs), list(named.values()), dys) for fn in (lora_linears, joint))
    torch.testing.assert_close(ours, other, rtol=0.03, atol=0.03)
    assert not torch.equal(ours[0], other[0]), "the same products"
    single, more, tensors = make(DTYPES["bf16"], n=24, quant="double", device=device)
    grads = (torch.autograd.grad(fn(*single, **more), list(tensors.values()), dys[1]) for fn in (lora_linear, alone))
    torch.testing.assert_close(*grads, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1.0, 0.7071])
def test_dx_over_nf4_is_rounded_once(scale, device):
    """Three layers with adapters, in one product: as if it had been summed in fp32."""
    layers = [{"quant": "double", "n": n, "lead": (64,)} for n in (16, 8, 24)]
    args, kwargs, _ = make_joint(DTYPES["bf16"], layers, device, scaling=scale)
    x, weight, _, a, b, _ = args
    dys = [torch.randn(64, n, generator=torch.Generator().manual_seed(2)).to(device, BF16) for n in (16, 8, 24)]
    (dx,) = torch.autograd.grad(lora_linears(*args, **kwargs), x, dys)
    exact = 0.0
    for w, quant, shape, (down,), (up,), dy in zip(weight, kwargs["quant"], kwargs["shape"], a, b, dys, strict=True):
        dense = module.nf4.nf4_dequantize_reference(w, *quant_args(quant), 64, 256, shape, BF16)
        thin = torch.addmm(up.new_zeros(1), dy, up, beta=0, alpha=scale)  # it is a bf16 number in any case
        exact = exact + dy.double() @ dense.double() + thin.double() @ down.double()
    once = (exact.to(BF16).double() - exact).norm()
    assert (dx.double() - exact).norm() <= 1.05 * once


def test_joint_is_each_layer():
    """The same numbers as one layer after the other, where no sum is split otherwise: the outputs, ∂B."""
    args, kwargs, _ = make_joint(DTYPES["bf16"], ({}, {"n": 8, "ranks": (2,)}))
    x, weight, bias, a, b, scaling = args
    ys = lora_linears(*args, **kwargs)
    for i, y in enumerate(ys):
        alone = lora_linear(x, weight[i], bias[i], a[i], b[i], scaling[i], **kwargs)
        assert torch.equal(y, alone)
        (db,), (expected,) = (torch.autograd.grad(v.sum(), b[i], retain_graph=True) for v in (y, alone))
        assert torch.equal(db, expected)


def test_joint_gradients_have_memory_of_their_own():
    args, kwargs, named = make_joint(DTYPES["fp32"], ({}, {"n": 8}), scaling=1.0)
    downs = [named["a0/0"], named["a0/1"]]
    first, second = torch.autograd.grad(sum(y.sum() for y in lora_linears(*args, **kwargs)), downs)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


@pytest.mark.parametrize("wanted", [("x",), ("b0/1",), ("a0/0", "b0/1"), ("a0/1",), ("weight/1", "x")], ids=str)
def test_joint_only_what_is_asked_for(wanted):
    args, kwargs, named = make_joint(DTYPES["fp32"], ({}, {"n": 8}))
    loss = sum(y.square().sum() for y in lora_linears(*args, **kwargs))
    expected = torch.autograd.grad(loss, [named[n] for n in wanted])
    for name, t in named.items():
        t.requires_grad_(name in wanted)
    ys = lora_linears(*args, **kwargs)
    if wanted == ("b0/1",):  # only h is kept for it
        assert not any(t is not None and t.shape == args[0].shape for t in ys[0].grad_fn.saved_tensors)
    found = torch.autograd.grad(sum(y.square().sum() for y in ys), [named[n] for n in wanted])
    for name, got, want in zip(wanted, found, expected, strict=True):
        torch.testing.assert_close(got, want, msg=name)


def test_joint_gradcheck():
    args, kwargs, named = convert(
        *make_joint(DTYPES["fp32"], [{"n": n, "k": 4, "lead": (2,), "ranks": (2,), "bias": True} for n in (3, 2)]), F64
    )

    def call(function):
        def run(*tensors):
            swap = dict(zip(map(id, named.values()), tensors, strict=True))

            def pick(v):
                return [pick(t) for t in v] if isinstance(v, (list, tuple)) else swap.get(id(v), v)

            return function(*map(pick, args), **kwargs)

        return run

    assert torch.autograd.gradcheck(call(JOINT.reference), tuple(named.values()))
    assert torch.autograd.gradcheck(call(lora_linears), tuple(named.values()))


def test_joint_unused_output():
    """A layer nobody reads has a gradient of zeros."""
    args, kwargs, named = make_joint(DTYPES["fp32"], ({}, {"n": 8}))
    first, _ = lora_linears(*args, **kwargs)
    grads = dict(zip(named, torch.autograd.grad(first.sum(), list(named.values())), strict=True))
    assert not grads["b0/1"].any() and grads["b0/0"].any()


def test_joint_refusals():
    args, _, _ = make_joint(DTYPES["fp32"], ({}, {"n": 8}))
    x, weight, _, a, b, scaling = args
    with pytest.raises(ValueError, match="2 weights, and a for 1"):
        lora_linears(x, weight, [], a[:1], b, scaling)
    assert JOINT.supported(x, []).code == "shape"
    assert JOINT.supported(x, weight, [], [a[0], [a[1][0].half()]], b, scaling).code == "dtype"
    assert JOINT.supported(x, weight, [], a[::-1], b, [[1.0], [1.0, 2.0]]).code == "shape"
    assert JOINT.supported(x, weight, quant=[[a[0][0]], [a[0][0]] * 4]).code == "quantization"
    with pytest.raises(ValueError, match=r"lora_linears: x \(3, 5, 5\)"):
        lora_linears(x[..., :5], weight)


def test_refusals():
    args, kwargs, _ = make(DTYPES["fp32"])
    x, weight, _, a, b, scaling = args

    def code(*changed, **more):
        reason = OP.supported(*changed, **(kwargs | more))
        with pytest.raises(ValueError, match="lora_linear"):
            lora_linear(*changed, **(kwargs | more))
        return None if reason is None else reason.code

    assert code(x.to(torch.float8_e4m3fn), weight) == "dtype"
    assert code(x, weight, None, a, b, []) == "shape"
    assert code(x, weight, None, a, [b[0].t()], scaling) == "shape"
    assert code(x[..., :5], weight, None, a, b, scaling) == "shape"
    assert code(x, weight[0]) == "shape"
    assert code(x, weight, dtype=F64) == "dtype"
    assert code(x, weight, None, a, b, scaling, x_lora=[x[0]]) == "shape"
    assert code(x, weight, quant=(a[0], a[0]), shape=(24, 64)) == "quantization"


def test_cost():
    c = OP.cost(8192, 14336, 4096, 16)
    assert int(c.flops) == 2 * 8192 * 14336 * 4096 + 2 * 8192 * 16 * (14336 + 4096)
    assert int(c.bytes_kept) == 2 * 8192 * 16


def test_joint_cost():
    one, joint = OP.cost(8192, 4096, 4096, 16), JOINT.cost(8192, (4096, 1024, 1024), 4096, 16)
    assert int(joint.flops) == int(one.flops) + 2 * int(OP.cost(8192, 1024, 4096, 16).flops)
    assert int(joint.bytes_kept) == 3 * int(one.bytes_kept)
    alone = int(one.bytes_moved) + 2 * int(OP.cost(8192, 1024, 4096, 16).bytes_moved)
    assert alone - int(joint.bytes_moved) == 2 * 2 * 8192 * 4096


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _adapters(new: New, n_out: int, k: int, *ranks: int) -> tuple[Any, ...]:
    a = [new(r, k, scale=k**-0.5) for r in ranks]
    return a, [new(n_out, r, scale=r**-0.5) for r in ranks], [2.0, 0.7][: len(ranks)]


def _lora_linear_samples(new: New, n: int) -> Named:
    x = new(2, 2 * n, 6)
    yield "plain", (x, new(5, 6), new(5)), {}
    yield "lora", (x, new(5, 6, grad=False), None, *_adapters(new, 5, 6, 2)), {}
    yield "two adapters", (x, new(5, 6), new(5), *_adapters(new, 5, 6, 2, 3)), {"b_bias": [new(5), None]}
    own = [new(2, 2 * n, 6), None]
    yield "own inputs", (x, new(5, 6, grad=False), new(5, grad=False), *_adapters(new, 5, 6, 1, 2)), {"x_lora": own}
    yield "residual", (x, new(5, 6)), {"residual": new(2, 2 * n, 5)}
    if new.dtype != torch.float64:  # NF4 weights have no fp64 form
        for name, state in nf4_states(new, n):
            quant = {"quant": state["quant"], "shape": (2 * n, 64), "blocksize2": 2}
            yield f"NF4, {name}", (new(2, 3, 64), state["packed"], None, *_adapters(new, 2 * n, 64, 2)), quant


def _lora_linears_samples(new: New, n: int) -> Named:
    def layers(*n_out: int, k: int = 6) -> tuple[list[Any], ...]:
        a, b, scaling = zip(*(_adapters(new, m, k, 2) for m in n_out), strict=True)
        return list(a), list(b), list(scaling)

    x = new(2, 2 * n, 6)
    yield "dense", (x, [new(5, 6), new(4, 6, grad=False)], [new(5), None], *layers(5, 4)), {}
    yield "no adapters", (x, [new(5, 6), new(4, 6), new(3, 6)]), {}
    if new.dtype != torch.float64:
        states = [state for _, state in nf4_states(new, n)]
        for name, state in zip(("single", "double"), states, strict=True):
            quant = {"quant": [state["quant"]] * 2, "shape": [(2 * n, 64)] * 2}
            quant |= {"blocksize": [64, 64], "blocksize2": [2, 2]}
            yield f"NF4, {name}", (new(2, 3, 64), [state["packed"]] * 2, [], *layers(2 * n, 2 * n, k=64)), quant


SAMPLES = {"lora_linear": _lora_linear_samples, "lora_linears": _lora_linears_samples}


#: How a weight is stored: dense, NF4 with scales of one level, or of two.
STORED = st.sampled_from(("dense", "dense", "single", "double"))


def _weight_case(d: Draw, stored: str, n: int, k: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """A weight [n, k], and the keyword arguments that say what it is."""
    if stored == "dense":
        return d.tensor(n, k, scale=k**-0.5), {}

    def scales(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=d.generator).to(d.device)

    blocks, blocksize2 = -(-n * k // 64), d(st.sampled_from((2, 256)))
    packed = d.integers(256, (n * k + 1) // 2, 1).to(torch.uint8)
    quant: tuple[torch.Tensor, ...] = (scales(blocks),)
    if stored == "double":
        offset = torch.tensor(0.02, device=d.device)
        quant = (d.integers(256, blocks).to(torch.uint8), scales(256), offset, scales(-(-blocks // blocksize2)))
    return packed, {"quant": quant, "shape": (n, k), "blocksize": 64, "blocksize2": blocksize2}


def _layer_case(d: Draw, stored: str, k: int) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """A layer's width, and its arguments after x."""
    n, ranks = d(WIDTHS), d(st.lists(st.sampled_from((1, 2, 3, 5, 8)), max_size=2))
    a = [d.tensor(r, k, scale=k**-0.5) for r in ranks]
    b = [d.tensor(n, r, scale=r**-0.5) for r in ranks]
    scaling = [d(st.sampled_from((1.0, 2.0, 0.7071))) for _ in ranks]
    bias = d.maybe(lambda: d.tensor(n))
    weight, state = _weight_case(d, stored, n, k)
    return n, (weight, bias, a, b, scaling), {"b_bias": [d.maybe(lambda: d.tensor(n)) for _ in ranks], **state}


def _lora_linear_case(d: Draw) -> Sample:
    k, lead = d(WIDTHS), (d(SIZES), d(SIZES))
    n, args, kwargs = _layer_case(d, d(STORED), k)
    inputs = [d.maybe(lambda: d.tensor(*lead, k)) for _ in args[2]]
    alone = args[1] is None and not args[2]
    residual = d.maybe(lambda: d.tensor(*lead, n)) if alone else None
    return Sample("", (d.tensor(*lead, k), *args), {**kwargs, "x_lora": inputs, "residual": residual})


def _lora_linears_case(d: Draw) -> Sample:
    k, stored = d(WIDTHS), d(STORED)
    layers = [_layer_case(d, stored, k) for _ in range(d(st.integers(1, 3)))]
    columns = [list(column) for column in zip(*(args for _, args, _ in layers), strict=True)]
    kwargs = {name: [of[name] for _, _, of in layers] for name in layers[0][2]}
    return Sample("", (d.tensor(d(SIZES), d(SIZES), k), *columns), kwargs)


FUZZ = {"lora_linear": _lora_linear_case, "lora_linears": _lora_linears_case}
ROWWISE = ("lora_linear", "lora_linears")

#: The arguments that say that a weight is NF4.
_NF4 = ("quant", "shape", "blocksize", "blocksize2")


def _dense(weight: torch.Tensor, dtype: torch.dtype, quant: Any, shape: Any, first: int, second: int) -> torch.Tensor:
    return module.nf4.nf4_dequantize_reference(weight, *quant_args(quant), first, second, shape, dtype)


def _lora_linear_exact(sample: Sample) -> Sample:
    """NF4 weights have no fp64 form: as the dense ones that they are in x's dtype."""
    (x, weight, *rest), kwargs = sample.args, dict(sample.kwargs)
    if kwargs.get("quant"):
        weight = _dense(weight, x.dtype, *(kwargs.pop(name) for name in _NF4))
    return Sample(sample.name, (x, weight, *rest), kwargs)


def _lora_linears_exact(sample: Sample) -> Sample:
    (x, weight, *rest), kwargs = sample.args, dict(sample.kwargs)
    if kwargs.get("quant"):
        states = zip(*(kwargs.pop(name) for name in _NF4), strict=True)
        weight = [_dense(w, x.dtype, *state) for w, state in zip(weight, states, strict=True)]
    return Sample(sample.name, (x, weight, *rest), kwargs)


#: What the exact results of a case are computed from.
EXACT = {"lora_linear": _lora_linear_exact, "lora_linears": _lora_linears_exact}


def _lora_linear_derivations() -> list[Derivation]:
    def one(x: Array, w: Array, bias: Array, a: Array, b: Array, b_bias: Array) -> list[Array]:
        return [x @ w.T + bias + 2 * ((x @ a.T) @ b.T + b_bias)]

    def two(x: Array, w: Array, a: Array, b: Array, a2: Array, b2: Array, x2: Array) -> list[Array]:
        return [x @ w.T + 2 * (x @ a.T) @ b.T + ratio("0.7") * (x2 @ a2.T) @ b2.T]

    return [
        Derivation(
            "linear",
            {"x": (3, 2), "w": (2, 2), "bias": (2,)},
            lambda fn, x, w, bias: fn(x, w, bias),
            lambda x, w, bias: [x @ w.T + bias],
            simplify=BOTH,
        ),
        Derivation(
            "adapter with a bias",
            {"x": (3, 2), "w": (3, 2), "bias": (3,), "a": (2, 2), "b": (3, 2), "b_bias": (3,)},
            lambda fn, x, w, bias, a, b, b_bias: fn(x, w, bias, [a], [b], [2.0], b_bias=[b_bias]),
            one,
            simplify=BOTH,
        ),
        Derivation(
            "residual",
            {"x": (3, 2), "w": (2, 2), "z": (3, 2)},
            lambda fn, x, w, z: fn(x, w, residual=z),
            lambda x, w, z: [z + x @ w.T],
            simplify=BOTH,
        ),
        Derivation(
            "frozen weight, two adapters, one with its own input",
            {"x": (3, 2), "w": (3, 2), "a": (2, 2), "b": (3, 2), "a2": (1, 2), "b2": (3, 1), "x2": (3, 2)},
            lambda fn, x, w, a, b, a2, b2, x2: fn(x, w, None, [a, a2], [b, b2], [2.0, 0.7], x_lora=[None, x2]),
            two,
            frozen=("w",),
            simplify=BOTH,
        ),
    ]


def _lora_linears_derivations() -> list[Derivation]:
    sizes = {"1": (2, 2), "2": (3, 1), "3": (1, 1)}  # of each layer: N and the adapter's rank
    shapes: dict[str, tuple[int, ...]] = {"x": (3, 2), "bias": (2,)}
    for i, (n, rank) in sizes.items():
        shapes |= {f"w{i}": (n, 2), f"a{i}": (rank, 2), f"b{i}": (n, rank)}

    def derive(name: str, scaling: tuple[str, str, str]) -> Derivation:
        def formula(x: Array, bias: Array, **of: Array) -> list[Array]:
            ys = [
                x @ of[f"w{i}"].T + ratio(s) * (x @ of[f"a{i}"].T) @ of[f"b{i}"].T
                for i, s in zip(sizes, scaling, strict=True)
            ]
            return [ys[0] + bias, *ys[1:]]

        def call(fn: Any, x: Any, bias: Any, **of: Any) -> Any:
            w, a, b = ([of[f"{kind}{i}"] for i in sizes] for kind in "wab")
            return fn(x, w, [bias, None, None], [[t] for t in a], [[t] for t in b], [[float(s)] for s in scaling])

        return Derivation(name, shapes, call, formula, frozen=("w2",), outputs=3, simplify=BOTH)

    return [derive("three layers", ("2", "2", "0.7")), derive("one scaling", ("0.5", "0.5", "0.5"))]


DERIVATIONS = {"lora_linear": _lora_linear_derivations, "lora_linears": _lora_linears_derivations}

MUTANTS = (
    Mutant(
        "lora_linear: adapter without its scaling",
        "kernels/lora_linear.py",
        "cast(b[j], h.dtype).t(), scaling[j]))",
        "cast(b[j], h.dtype).t(), 1.0))",
        'tests/kernels/test_lora_linear.py -k "test_dtypes or test_shapes or joint_dtypes or joint_shapes"',
    ),
    Mutant(
        "lora_linear: dx without the adapter",
        "kernels/lora_linear.py",
        "                add_thin(dx, u[:, columns], downs[columns], scale, first=span[0] == 0)\n",
        "                dx.zero_()\n",
        'tests/kernels/test_lora_linear.py -k "test_dtypes or test_shapes or joint_dtypes or joint_shapes"',
    ),
    Mutant(
        "lora_linear: dA without scaling",
        "kernels/lora_linear.py",
        "        return [times(scaling[0], rows)]\n",
        "        return [rows]\n",
        'tests/kernels/test_lora_linear.py -k "test_dtypes or test_shapes or joint_dtypes or joint_shapes"',
    ),
    Mutant(
        "lora_linear: dB without scaling",
        "kernels/lora_linear.py",
        "dbs[j] = times(scaling[j], db).to(up.dtype)",
        "dbs[j] = db.to(up.dtype)",
        'tests/kernels/test_lora_linear.py -k "test_dtypes or test_shapes or joint_dtypes or joint_shapes"',
    ),
    Mutant(
        "lora_linear: dx of the last layer only",
        "kernels/lora_linear.py",
        "dx = torch.mm(g, dense) if dx is None else dx.addmm_(g, dense, beta=beta_for(dx))",
        "dx = torch.mm(g, dense)",
        'tests/kernels/test_lora_linear.py -k "test_dtypes or test_shapes or joint_dtypes or joint_shapes"',
    ),
    Mutant(
        "lora_linear: a second adapter in place of the first",
        "kernels/lora_linear.py",
        "    for product in more:\n        add_thin(y, *product)\n",
        "    for product in more:\n        add_thin(y, *product, first=True)\n",
        "tests/kernels/test_lora_linear.py -k test_shapes",
    ),
    Mutant(
        "lora_linear: the base's product first, which is rounded twice",
        "kernels/lora_linear.py",
        "y = begun.addmm_(rows, dense.t(), beta=beta_for(begun))",
        "y = torch.mm(rows, dense.t()).add_(begun)",
        "tests/kernels/test_lora_linear.py -k one_rounding",
    ),
    Mutant(
        "lora_linear: dx of the largest layer first",
        "kernels/lora_linear.py",
        "key=lambda i: gs[i].shape[1])",
        "key=lambda i: -gs[i].shape[1])",
        "tests/kernels/test_lora_linear.py -k smallest",
    ),
    Mutant(
        "lora_linear: no residual",
        "kernels/lora_linear.py",
        "begun = None if residual is None else _rows(residual)",
        "begun = None",
        "tests/kernels/test_lora_linear.py -k residual",
    ),
    Mutant(
        "lora_linear: half of the residual's gradient",
        "kernels/lora_linear.py",
        "dresidual = dy[0] if ctx.needs_input_grad[2] else None",
        "dresidual = 0.5 * dy[0] if ctx.needs_input_grad[2] else None",
        "tests/kernels/test_lora_linear.py -k residual",
    ),
    Mutant(
        "lora_linear: h of the first layer for all",
        "kernels/lora_linear.py",
        "thin.append((h[:, column[j] : column[j + 1]], cast(b[j]",
        "thin.append((h[:, : b[j].shape[1]], cast(b[j]",
        'tests/kernels/test_lora_linear.py -k "test_dtypes or test_shapes or joint_dtypes or joint_shapes"',
    ),
    Mutant(
        "lora_linear: dropout's input ignored",
        "kernels/lora_linear.py",
        "own = [None if t is None and shared else",
        "own = [None if shared else",
        "tests/kernels/test_lora_linear.py -k dropout-fp32",
    ),
    Mutant(
        "lora_linear: adapters share the first one's dropout",
        "kernels/lora_linear.py",
        "(_rows(x if own is None else own) for own in x_lora)",
        "(_rows(x if own is None else x_lora[0]) for own in x_lora)",
        "tests/kernels/test_lora_linear.py -k test_shapes",
    ),
    Mutant(
        "lora_linear: dA of the first adapter's dropout",
        "kernels/lora_linear.py",
        "                source = x_lora[j]\n",
        "                source = x_lora[0]\n",
        "tests/kernels/test_lora_linear.py -k test_shapes",
    ),
    Mutant(
        "lora_linear: A transposed in h",
        "kernels/lora_linear.py",
        "_stack(a, lora_dtype).t()",
        "_stack(a, lora_dtype).reshape(a[0].shape[1], -1)",
        "tests/kernels/test_lora_linear.py -k test_dtypes",
    ),
    Mutant(
        "lora_linear: B transposed",
        "kernels/lora_linear.py",
        "cast(b[j], h.dtype).t(), scaling[j]))",
        "cast(b[j], h.dtype).reshape(b[j].shape[::-1]), scaling[j]))",
        "tests/kernels/test_lora_linear.py -k test_dtypes",
    ),
    Mutant(
        "lora_linear: side by side, A in another order than u",
        "kernels/lora_linear.py",
        "stacked(weight, quant, shape, blocks, [a[j] for j in shared], dtype)",
        "stacked(weight, quant, shape, blocks, [a[j] for j in shared[::-1]], dtype)",
        "tests/kernels/test_lora_linear.py -k joint_nf4_backward",
    ),
    Mutant(
        "lora_linear: side by side, without the scaling",
        "kernels/lora_linear.py",
        "beta=0, alpha=scaling[j])",
        "beta=0)",
        "tests/kernels/test_lora_linear.py -k joint_nf4_backward",
    ),
    Mutant(
        "lora_linear: side by side, dA scaled twice",
        "kernels/lora_linear.py",
        "            scales = [1.0] * len(shared)\n",
        "            scales = [scaling[j] for j in shared]\n",
        "tests/kernels/test_lora_linear.py -k joint_nf4_backward",
    ),
    Mutant(
        "lora_linear: side by side, whatever it costs",
        "kernels/lora_linear.py",
        "and sum(shape[::2]) < shape[1] * (len(dy) - 1 + adapted)",
        "",
        "tests/kernels/test_lora_linear.py -k side_by_side_where",
    ),
    Mutant(
        "lora_linear: side by side, columns that nobody wrote",
        "kernels/lora_linear.py",
        "        wide[:, full[-1] + at[-1] :].zero_()\n",
        "        wide[:, full[-1] + at[-1] :].fill_(torch.nan)\n",
        "tests/kernels/test_lora_linear.py -k joint_nf4_backward",
    ),
    Mutant(
        "lora_linear: layer after layer in place of side by side",
        "kernels/lora_linear.py",
        "    if quant and one_product(gs,",
        "    if False and one_product(gs,",
        "tests/kernels/test_lora_linear.py -k nf4_is_rounded_once",
    ),
    Mutant(
        "lora_linear: the variant is the op",
        "kernels/lora_linear.py",
        "return together and need_x and",
        "return need_x and",
        "tests/kernels/test_lora_linear.py -k accumulated",
    ),
    Mutant(
        "lora_linear: B transposed in the backward",
        "kernels/lora_linear.py",
        "thin_g(j), cast(b[j], lora_dtype))",
        "thin_g(j), cast(b[j], lora_dtype).t().reshape(b[j].shape))",
        "tests/kernels/test_lora_linear.py -k test_dtypes",
    ),
    Mutant(
        "lora_linear: A transposed in dx",
        "kernels/lora_linear.py",
        "downs = _stack([a[j] for j in shared], lora_dtype)\n",
        "downs = _stack([a[j].t().reshape(a[j].shape) for j in shared], lora_dtype)\n",
        "tests/kernels/test_lora_linear.py -k test_dtypes",
    ),
    Mutant(
        "lora_linear: adapter bias unscaled",
        "kernels/lora_linear.py",
        "sums += [scaling[j] * more.to(wide) for j in mine",
        "sums += [more.to(wide) for j in mine",
        "tests/kernels/test_lora_linear.py -k test_shapes",
    ),
)
