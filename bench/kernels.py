"""Kernel times beside others': every registered op, at the sizes of ``bench/shapes.py``.

    fastft bench kernels --shapes-tag real --out kernels.json
    pytest bench/kernels.py -k "llama-3.1-8b and rms_norm" --result kernels.json --benchmark-json benchmark.json

On a GPU the shapes tagged ``primary`` run in bf16, on a CPU the ones tagged ``test`` in fp32 (which shows that the
benchmark works, not how fast anything is). For each op, shape and implementation: microseconds of the forward (with
what it keeps for the backward), of the backward and of both, and how far they are from the device's own ceilings.
``bench/measure.py`` says how that is measured. Implementations: ``fastft``, the op; ``eager``, what stock libraries run
uncompiled; ``inductor``, the same under ``torch.compile``; those of ``bench/specialists.py``. A name in parentheses is
no competitor: it does less or more, or is ours in pieces. Gradients are those of LoRA training: weights are frozen,
but for the losses whose name says ``trained``.

What does not give the reference's result gets no time. Ops are found through ``fastft.kernels.load()``, and called as
their files say (``Op.inputs``, ``Op.stock``). An op whose cost or competitors need more than that has a maker here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastft.kernels
from bench import measure
from bench.shapes import SHAPES, Shape, shapes
from bench.specialists import plainly_causal, specialists
from bench.tables import EVERY, PRODUCTS, RECOMPUTED
from fastft import _torch_compat as compat
from fastft.kernels._attention_mask import attention_mask
from fastft.kernels._inputs import Inputs, New
from fastft.kernels._op import Op

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
OPS = fastft.kernels.load()
#: A result further than this from the reference's, ‖found − reference‖ / ‖reference‖, is another computation's.
SAME = 0.05
#: Without a device's ceilings: more operations than this for each byte, and an op counts as bound by arithmetic.
INTENSE = 200.0


@dataclass
class Case:
    """One call: arguments, the tensors whose gradients are wanted, what forward and backward must move and compute at
    the least (every input read and every output written once).

    ``asked``: as in :class:`fastft.kernels._inputs.Inputs`. ``eager``: what stock libraries run, as a function of the
    op's arguments (default: the op's ``stock``, else its reference). ``traced``: what they run while they are compiled,
    where that is another program. ``others``: more implementations beside these and the specialists'.
    """

    args: Sequence[Any]
    wanted: Sequence[torch.Tensor] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    bytes_moved: float = 0.0
    flops: float = 0.0
    backward_bytes: float = 0.0
    backward_flops: float = 0.0
    eager: Callable[..., Any] | None = None
    traced: Callable[..., Any] | None = None
    others: dict[str, Callable[..., Any]] = field(default_factory=dict)
    asked: torch.Tensor | None = None


def _generator() -> torch.Generator:
    """Seeded by the CPU's default generator: a CUDA graph whose capture fails leaves the GPU's own unusable."""
    return torch.Generator(DEVICE).manual_seed(int(torch.randint(2**62, ())))


def _random(*size: int, grad: bool = False, dtype: torch.dtype = DTYPE, scale: float = 1.0) -> torch.Tensor:
    values = torch.randn(*size, device=DEVICE, dtype=torch.float32, generator=_generator())
    return (values * scale).to(dtype).requires_grad_(grad)


def _bytes(*tensors: torch.Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def plain(op: Op, s: Shape) -> Case:
    """As the op's file makes its arguments. Forward: every tensor in, every result out; backward: the results'
    gradients and every tensor in, the wanted gradients out.
    """
    inputs = op.inputs(New(DTYPE, DEVICE, int(torch.randint(2**62, ()))), **s.dims)
    mode = compat.fake_mode()
    fake = inputs.mapped(mode.from_tensor)
    with mode:
        results = op.call(*fake.args, **fake.kwargs)
    results = (results,) if isinstance(results, torch.Tensor) else tuple(results)
    read, written = _bytes(*inputs.tensors()), _bytes(*results)
    back = written + read + _bytes(*inputs.wanted) if inputs.wanted else 0.0
    costs = dict(bytes_moved=read + written, backward_bytes=back)
    return Case(inputs.args, inputs.wanted, dict(inputs.kwargs), **costs, asked=inputs.asked)


def rotary(s: Shape) -> Case:
    case = plain(OPS["rotary"], s)
    case.bytes_moved = case.backward_bytes = 2 * _bytes(*case.wanted)  # all layers share the tables
    return case


def add_rms_norm(s: Shape) -> Case:
    case = plain(OPS["add_rms_norm"], s)
    x, _, weight = case.args[:3]
    # Both results' gradients and the sum in; out goes one gradient, of x and of the residual.
    case.backward_bytes = 4 * _bytes(x) + _bytes(weight)
    return case


def _adapters(s: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, A, B (fp32, as PEFT keeps them)."""
    x = _random(s["batch"], s["seq"], s["in_features"], grad=True)
    a = _random(s["rank"], s["in_features"], grad=True, dtype=torch.float32, scale=s["in_features"] ** -0.5)
    b = _random(s["out_features"], s["rank"], grad=True, dtype=torch.float32, scale=0.02)
    return x, a, b


def _linear_cost(s: Shape, widths: Sequence[int], *weights: torch.Tensor) -> dict[str, float]:
    """Of linear layers that read one x, with adapters. Forward: the weights and the adapters in, y out. Backward: dx
    through the weight, and through the adapter five thin products (dh, its way into dx, h, dA, dB).
    """
    tokens, k, rank = s["batch"] * s["seq"], s["in_features"], s["rank"]
    x, out = tokens * k * DTYPE.itemsize, tokens * sum(widths) * DTYPE.itemsize
    thick, thin = sum(2.0 * tokens * n * k for n in widths), sum(2.0 * tokens * rank * (n + k) for n in widths)
    both = dict(bytes_moved=x + out + _bytes(*weights), flops=thick + thin)
    return {**both, "backward_bytes": 2 * x + out + _bytes(*weights), "backward_flops": thick + 2 * thin}


def lora_linear(s: Shape) -> Case:
    x, a, b = _adapters(s)
    weight = _random(s["out_features"], s["in_features"], scale=s["in_features"] ** -0.5)
    kwargs = dict(dtype=DTYPE, lora_dtype=DTYPE)  # under bf16 autocast
    others = {"(base linear alone)": lambda x, weight, *_, **__: F.linear(x, weight)}
    cost = _linear_cost(s, [s["out_features"]], weight)
    return Case((x, weight, None, [a], [b], [1.0]), [x, a, b], kwargs, **cost, others=others)


def lora_linears(s: Shape) -> Case:
    each = [_adapters(Shape(s.op, s.model, {**s.dims, "out_features": n}, s.tags)) for n in s["out_features"]]
    x, a, b = each[0][0], [[a] for _, a, _ in each], [[b] for _, _, b in each]
    weight = [_random(n, s["in_features"], scale=s["in_features"] ** -0.5) for n in s["out_features"]]
    kwargs = dict(dtype=DTYPE, lora_dtype=DTYPE)
    wanted = [x, *(t for pair in zip(a, b, strict=True) for (t,) in pair)]
    scaling = [[1.0]] * len(weight)

    def apart(x: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: Any, **dtypes: Any) -> tuple[Any, ...]:
        op = OPS["lora_linear"].call
        return tuple(op(x, w, None, *thin, **dtypes) for w, *thin in zip(weight, a, b, scaling, strict=True))

    def bare(x: Any, weight: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        return tuple(F.linear(x, w) for w in weight)

    others = {"(lora_linear for each)": apart, "(base linears alone)": bare}
    cost = _linear_cost(s, s["out_features"], *weight)
    return Case((x, weight, (), a, b, scaling), wanted, kwargs, **cost, others=others)


def lora_glu(s: Shape) -> Case:
    def bare(wide: Any, b: Any, scaling: Any, kind: str) -> Any:  # of gate and up that somebody has written
        n = b[0].shape[0]
        return OPS["glu"].call(wide[..., :n], wide[..., n : 2 * n], kind)

    case = plain(OPS["lora_glu"], s)
    case.others = {"(glu alone)": bare}
    return case


def _lora_stack(s: Shape, nf4_weight: bool) -> Case:
    """Beside the layers by themselves, which have their adapters' B to add, and whose activation has less to do."""
    op = OPS["lora_stack"]
    made = op.inputs(New(DTYPE, DEVICE, int(torch.randint(2**62, ()))), **s.dims, nf4_weight=nf4_weight)
    x, _, a = made.args
    b = [_random(s["intermediate"], s["rank"], scale=s["rank"] ** -0.5) for _ in a]

    def layers(x: Any, weight: Any, a: Any, **more: Any) -> Any:
        thin = [[down] for down in a], [[up] for up in b], [[2.0]] * len(a)
        return torch.stack(OPS["lora_linears"].call(x, weight, [], *thin, **more))

    out = x.shape[0] * x.shape[1] * (2 * s["intermediate"] + 2 * s["rank"]) * DTYPE.itemsize
    read, flops = (
        _bytes(*made.tensors()),
        2.0 * x.shape[0] * x.shape[1] * s["hidden"] * 2 * (s["intermediate"] + s["rank"]),
    )
    costs = {"bytes_moved": read + out, "flops": flops, "backward_bytes": 2 * read + out, "backward_flops": flops}
    return Case(made.args, made.wanted, dict(made.kwargs), **costs, others={"(lora_linears)": layers})


def lora_stack(s: Shape) -> Case:
    return _lora_stack(s, nf4_weight=False)


def lora_stack_nf4(s: Shape) -> Case:
    return _lora_stack(s, nf4_weight=True)


def _recomputed(eager: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """The equal of what keeps its inputs alone: Inductor's program of ``eager`` that computes all else again."""

    def recomputed(x: Any, *args: Any, **more: Any) -> Any:
        return checkpoint(lambda x: eager(x, *args, **more), x, use_reentrant=False)

    return {RECOMPUTED: torch.compile(recomputed, dynamic=False)} if CUDA else {}


def _lora_mlp(s: Shape, nf4_weight: bool) -> Case:
    """Beside the same layers' own ops and what Inductor makes of stock code, which take all tokens at once, and keep
    what is as wide as the MLP for the backward, where one by slices computes gate and up again. And beside Inductor
    where it keeps x alone as well.
    """
    made = OPS["lora_mlp"].inputs(New(DTYPE, DEVICE, int(torch.randint(2**62, ()))), **s.dims, nf4_weight=nf4_weight)

    def whole(x: Any, kind: str, weight: Any, bias: Any, a: Any, b: Any, scaling: Any, **more: Any) -> Any:
        two, last = ({name: of[part] for name, of in more.items()} for part in (slice(0, 2), 2))
        wide = OPS["lora_stack"].call(x, weight[:2], [down for (down,) in a[:2]], **two)
        act = OPS["lora_glu"].call(wide, [up for (up,) in b[:2]], [scale for (scale,) in scaling[:2]], kind)
        return OPS["lora_linear"].call(act, weight[2], None, a[2], b[2], scaling[2], **last)

    tokens = s["batch"] * s["seq"]
    read, out = _bytes(*made.tensors()), _bytes(made.args[0])
    flops = 6.0 * tokens * (s["hidden"] * s["intermediate"] + s["rank"] * (s["hidden"] + s["intermediate"]))
    costs = {"bytes_moved": read + out, "flops": flops, "backward_bytes": read + 2 * out}
    # Gate and up again, and back through all three.
    costs["backward_flops"] = flops * 5 / 3
    # Stock code has another form of NF4 weights.
    eager = OPS["lora_mlp"].reference if nf4_weight else OPS["lora_mlp"].stock or OPS["lora_mlp"].reference

    others = {"(all tokens at once)": whole, **_recomputed(eager)}
    return Case(made.args, made.wanted, dict(made.kwargs), **costs, eager=eager, others=others)


def lora_mlp(s: Shape) -> Case:
    return _lora_mlp(s, nf4_weight=False)


def lora_mlp_nf4(s: Shape) -> Case:
    return _lora_mlp(s, nf4_weight=True)


def _quantised(out_features: int, in_features: int) -> tuple[torch.Tensor, Any]:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = _random(out_features, in_features, scale=in_features**-0.5)
    return functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)


def lora_linear_nf4(s: Shape) -> Case:
    x, a, b = _adapters(s)
    packed, state = _quantised(s["out_features"], s["in_features"])
    import bitsandbytes

    quant = [state.absmax, state.state2.code, state.offset, state.state2.absmax]
    kwargs = dict(quant=quant, shape=tuple(state.shape), dtype=DTYPE, lora_dtype=DTYPE)

    def eager(x: Any, packed: Any, bias: Any, a: Any, b: Any, scaling: Any, **_: Any) -> Any:
        y = bitsandbytes.matmul_4bit(x, packed.t(), quant_state=state)  # as Linear4bit does; then PEFT's
        for down, up, scale in zip(a, b, scaling, strict=True):
            y = y + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)) * scale
        return y

    cost = _linear_cost(s, [s["out_features"]], packed, state.absmax)
    others = {"(accumulated)": OPS["lora_linear"].variants["accumulated"][0]}
    return Case((x, packed, None, [a], [b], [1.0]), [x, a, b], kwargs, **cost, eager=eager, others=others)


def lora_linears_nf4(s: Shape) -> Case:
    one = [lora_linear_nf4(Shape(s.op, s.model, {**s.dims, "out_features": n}, s.tags)) for n in s["out_features"]]
    x, a, b = one[0].args[0], [case.args[3] for case in one], [case.args[4] for case in one]
    weight, states = (
        [case.args[1] for case in one],
        {name: [c.kwargs[name] for c in one] for name in ("quant", "shape")},
    )

    def eager(x: Any, weight: Any, bias: Any, a: Any, b: Any, scaling: Any, **_: Any) -> Any:
        each = zip(one, weight, a, b, scaling, strict=True)
        return tuple(c.eager(x, w, None, *thin) for c, w, *thin in each)  # type: ignore[misc]

    cost = _linear_cost(s, s["out_features"], *weight)
    others = {"(accumulated)": OPS["lora_linears"].variants["accumulated"][0]}
    wanted, kwargs = [x, *(t for (t,) in (*a, *b))], dict(**states, dtype=DTYPE, lora_dtype=DTYPE)
    return Case((x, weight, (), a, b, [[1.0]] * len(one)), wanted, kwargs, **cost, eager=eager, others=others)


def nf4_dequantize(s: Shape) -> Case:
    packed, state = _quantised(s["out_features"], s["in_features"])
    import bitsandbytes.functional as functional

    scales = (
        state.absmax,
        state.state2.code,
        state.offset,
        state.state2.absmax,
        state.blocksize,
        state.state2.blocksize,
    )
    moved = _bytes(packed, state.absmax) + s["out_features"] * s["in_features"] * DTYPE.itemsize
    others = {"bitsandbytes": lambda packed, *_: functional.dequantize_4bit(packed, state)}
    return Case((packed, *scales, tuple(state.shape), DTYPE), bytes_moved=moved, others=others)


class _Products(torch.autograd.Function):
    """The products that a loss and its gradients cannot do without, by cuBLAS, of the first ``tokens`` at once: the
    logits, and out of a matrix of their size what goes to the hidden states and, where it is trained, to the weight.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, tokens: int) -> torch.Tensor:
        logits = hidden[:tokens] @ weight.t()
        ctx.save_for_backward(hidden, weight, logits)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, logits = ctx.saved_tensors
        dh, tokens = torch.empty_like(hidden), logits.shape[0]  # of the other tokens nobody asks
        torch.mm(logits, weight, out=dh[:tokens])
        return dh, logits.t() @ hidden[:tokens] if ctx.needs_input_grad[1] else None, None


def linear_cross_entropy(s: Shape) -> Case:
    op = OPS["linear_cross_entropy"]
    case = plain(op, s)
    hidden, weight, _, labels = case.args
    tokens, every = int((labels != -100).sum()), labels.where(labels != -100, 0)
    case.bytes_moved, case.backward_bytes = _bytes(hidden, weight), 2 * _bytes(hidden) + _bytes(weight)
    # The logits; and through them back to the hidden states, and to a head that is trained.
    case.flops = case.backward_flops = 2.0 * tokens * s["hidden"] * s["vocab"]
    if s.get("trained"):
        case.backward_flops, case.backward_bytes = 2 * case.flops, case.backward_bytes + _bytes(weight)
    case.others = {f"({name})": call for name, (call, _) in op.variants.items()}
    case.others[PRODUCTS] = lambda hidden, weight, *_, **__: _Products.apply(hidden, weight, tokens)
    if s.get("ignored"):
        case.others[EVERY] = lambda hidden, weight, bias, _, **more: op.call(hidden, weight, bias, every, **more)
    return case


def linear_log_prob(s: Shape) -> Case:
    def eager(hidden: Any, weight: Any, bias: Any, labels: Any, softcap: float | None) -> Any:  # the first result alone
        logits = F.linear(hidden, weight, bias).float()
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        return -F.cross_entropy(logits, labels, reduction="none")

    case = linear_cross_entropy(s)
    # Without its logits, which a head that is trained needs for its gradient.
    case.eager, case.others = eager, _recomputed(eager) if s.get("trained") else {}
    return case


def attention(s: Shape) -> Case:
    case = plain(OPS["attention"], s)
    q, k, v = case.args
    window, softcap, chunk = case.kwargs["window"], case.kwargs["softcap"], case.kwargs.get("chunk", 0)
    order = torch.arange(s["seq"], device=DEVICE)
    mask = torch.ones(s["seq"], s["seq"], dtype=torch.bool, device=DEVICE).tril()
    if window:
        mask = mask.triu(1 - window)
    if chunk:
        mask &= order[:, None] // chunk == order // chunk
    if (found := case.kwargs.get("mask")) is not None:  # documents, padding
        start, _, _, keep, _ = found
        mask = mask & (order >= start[:, None, :, None])
        mask = mask if keep is None else mask & keep.bool()[:, None, None, :]
    # Keys that a query sees, on average.
    seen = min(window, s["seq"] / 2) if window else s["seq"] / 2
    if chunk or found is not None:
        seen = float(mask.sum(dtype=torch.int64)) / mask[..., 0].numel()
    flops = 4.0 * s["batch"] * s["heads"] * s["seq"] * seen * s["head_dim"]

    def repeated(q: Any, *heads: Any) -> Iterator[Any]:  # transformers' repeat_kv
        for x in heads:
            yield x[:, :, None].expand(-1, -1, q.shape[1] // x.shape[1], -1, -1).flatten(1, 2)

    def dense(q: Any, k: Any, v: Any, **_: Any) -> Any:
        return F.scaled_dot_product_attention(q, *repeated(q, k, v), attn_mask=mask)

    def written(q: Any, k: Any, v: Any, sinks: Any = None, **_: Any) -> Any:  # its eager attention: Gemma 2, gpt-oss
        k, v = repeated(q, k, v)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores = torch.tanh(scores / softcap) * softcap if softcap else scores
        scores = scores + torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
        return torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]] @ v

    case.bytes_moved, case.backward_bytes = 2 * _bytes(q) + _bytes(k, v), 4 * _bytes(q) + 2 * _bytes(k, v)
    case.flops, case.backward_flops = flops, 2.5 * flops  # the scores again, and dv, dp, dq, dk
    # transformers leaves the mask out where causality is all, but not while it is traced.
    case.traced = written if softcap or s.get("sinks") else dense
    case.eager = None if plainly_causal(s) else case.traced
    if not plainly_causal(s):
        # Of the same tokens, by whoever computes it fastest: what a mask that hides more, or a cap, is held against.
        plainly = OPS["attention"].call
        case.others = {"(plainly causal)": lambda q, k, v, **_: plainly(q, k, v, causal=True)}
    if s.get("hides") == "padding":
        keep = case.kwargs["mask"][3].to(torch.int64)
        left_out = attention_mask(keep, None, chunk, True)
        case.others["(skip_padding)"] = lambda q, k, v, **given: plainly(q, k, v, **{**given, "mask": left_out})
        positions = torch.cat([torch.arange(int(n), device=DEVICE) for n in keep.sum(1)])[None]
        positions = positions[:, : max(positions.numel() // 16 * 16, 1)]  # kernels are slower at odd lengths
        packed = {**case.kwargs, "mask": attention_mask(None, positions, chunk)}
        case.others["(as many tokens, packed)"] = lambda q, k, v, **_: _Packed.apply(q, k, v, packed, positions.numel())
    return case


class _Packed(torch.autograd.Function):
    """Attention without padding, of as many tokens as are real, out of the memory of q, k and v, whatever is in it; of
    their own gradients nothing is made.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, options: dict[str, Any], tokens: int) -> torch.Tensor:
        shapes = ((1, tokens, x.shape[1], x.shape[3]) for x in (q, k, v))
        flat = (x.detach().transpose(1, 2).reshape(-1) for x in (q, k, v))  # as projections lay it out: no copy
        ctx.leaves = [
            x[: math.prod(n)].view(n).transpose(1, 2).requires_grad_() for x, n in zip(flat, shapes, strict=True)
        ]
        with torch.enable_grad():
            ctx.out = OPS["attention"].call(*ctx.leaves, **options)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[None, ...]:
        torch.autograd.grad(ctx.out, ctx.leaves, g)
        return None, None, None, None, None


#: op → what makes its cases, one for each way it is called, where :func:`plain` does not say all.
MAKERS: dict[str, tuple[Callable[[Shape], Case], ...]] = {
    "rotary": (rotary,),
    "add_rms_norm": (add_rms_norm,),
    "lora_linear": (lora_linear, lora_linear_nf4),
    "lora_linears": (lora_linears, lora_linears_nf4),
    "lora_glu": (lora_glu,),
    "lora_stack": (lora_stack, lora_stack_nf4),
    "lora_mlp": (lora_mlp, lora_mlp_nf4),
    "nf4_dequantize": (nf4_dequantize,),
    "linear_cross_entropy": (linear_cross_entropy,),
    "linear_log_prob": (linear_log_prob,),
    "attention": (attention,),
}


def makers(op: Op) -> dict[str, Callable[[Shape], Case]]:
    """What makes an op's cases, by label."""
    return {m.__name__: m for m in MAKERS.get(op.name, ())} or {op.name: functools.partial(plain, op)}


def shapes_of(op: Op, **which: Any) -> list[Shape]:
    """The op's rows in the shapes list; those of its file, where it has none of its own (packed operands)."""
    name = op.name if any(s.op == op.name for s in SHAPES) else op.call.__module__.rpartition(".")[2]
    return shapes(name, **which)


def implementations(label: str, name: str, shape: Shape, case: Case) -> dict[str, Callable[..., Any]]:
    """Every implementation of this case, as functions of the op's arguments; ours first."""
    op = OPS[name]
    eager = case.eager or op.stock or op.reference
    compiled = {"inductor": torch.compile(case.traced or eager, dynamic=False)} if CUDA else {}
    others = {**case.others, **specialists(label, shape, CUDA)}
    return {"fastft": op.call, "eager": eager, **compiled, **others}


def check_same(runs: Mapping[str, Callable[..., Any]], op: Op, case: Case, found: dict[str, dict[str, Any]]) -> bool:
    """Put an error in the place of the times of what does not compute what the op's reference computes. False where
    the reference does not fit the device.
    """
    inputs = Inputs(case.args, case.kwargs)

    def result(run: Callable[..., Any]) -> list[torch.Tensor]:
        copied = inputs.copy()  # some write to their inputs
        outputs = run(*copied.args, **copied.kwargs)
        parts = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
        floats = [t for t in parts if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]
        return [t.detach() for t in floats]

    try:
        with torch.no_grad():
            exact = result(op.reference)
    except torch.OutOfMemoryError:  # it keeps all logits, or all scores, in fp32
        return False
    for name, figures in found.items():
        if "error" in figures or name.startswith("("):
            continue
        try:  # with gradients: without, Inductor would compile it anew
            off = max(_off(f, e) for f, e in zip(result(runs[name]), exact, strict=False))
        except Exception as error:
            found[name] = {"error": measure.say_error(error)}
            continue
        if not off < SAME:  # NaN is no result either
            found[name] = {"error": f"wrong result: ‖found − reference‖ / ‖reference‖ is {off:.2g}"}
    return True


def _off(found: torch.Tensor, exact: torch.Tensor) -> float:
    if found.shape != exact.shape:
        return float("inf")
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def measure_case(
    name: str,
    label: str,
    shape: Shape,
    case: Case,
    ceilings: Mapping[str, float] | None,
    profile: bool = False,
    rounds: int | None = None,
) -> Row:
    """One row of a result file. ``rounds``: samples of each implementation, at least."""
    runs = implementations(label, name, shape, case)
    least = measure.ROUNDS[0] if rounds is None else rounds
    found = measure.compare(
        runs,
        Inputs(case.args, case.kwargs, case.wanted, case.asked),
        rounds=(least, max(least, measure.ROUNDS[1])),
        profile=profile,
    )
    checked = check_same(runs, OPS[name], case, found)
    costs = {"forward": (case.bytes_moved, case.flops)}
    if case.backward_bytes:
        costs["backward"] = (case.backward_bytes, case.backward_flops)
    floors = {p: measure.floor_us(*cost, ceilings) for p, cost in costs.items()} if ceilings else {}
    if "backward" in floors:
        floors["full"] = floors["forward"] + floors["backward"]
    if ceilings:
        compute = floors["forward"] > measure.floor_us(case.bytes_moved, 0.0, ceilings)
    else:
        compute = case.flops > INTENSE * case.bytes_moved
    for figures in found.values():
        for phase, (moved, flops) in costs.items():
            if f"{phase}_us" in figures:
                figures[f"{phase}_GBps"] = round(moved / figures[f"{phase}_us"]["median"] / 1e3, 2)
                if flops:
                    figures[f"{phase}_TFLOPps"] = round(flops / figures[f"{phase}_us"]["median"] / 1e6, 3)
        reached = {p: round(us / figures[f"{p}_us"]["median"], 4) for p, us in floors.items() if f"{p}_us" in figures}
        if reached:
            figures["roofline"] = reached
    # What memory binds is also held against copies of as many bytes.
    copies = {} if compute or not ceilings else {p: measure.copy_us(moved) for p, (moved, _) in costs.items()}
    if not all(copies.values()):
        copies = {}
    elif "backward" in copies:
        copies["full"] = copies["forward"] + copies["backward"]
    return {
        "op": label,
        "shape": str(shape).split("-", 1)[-1],
        "model": shape.model,
        "dims": {k: list(v) if isinstance(v, tuple) else v for k, v in shape.dims.items()},
        "tags": sorted(shape.tags),
        "dtype": str(DTYPE).removeprefix("torch."),
        "bound": "compute" if compute else "memory",
        **{f"{p}_{what}": cost[i] for p, cost in costs.items() for i, what in enumerate(("bytes", "flops"))},
        "checked": checked,
        "floor_us": {p: round(us, 3) for p, us in floors.items()},
        "copy_us": {p: round(us, 3) for p, us in copies.items()},
        "implementations": found,
    }


Row = dict[str, Any]


def _cases(tag: str) -> Iterator[tuple[str, Callable[[Shape], Case], Shape, str]]:
    """(op, maker, shape, label): the first shape of every op, then the second of every one, and so on, so that a run
    that is stopped has something of each.
    """
    columns = []
    for name, op in sorted(OPS.items()):
        found = shapes_of(op, tag=tag)
        columns += [[(name, maker, s, label) for s in found] for label, maker in makers(op).items()]
    for i in range(max(map(len, columns))):
        yield from (column[i] for column in columns if i < len(column))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    tag = metafunc.config.getoption("--shapes-tag") or ("primary" if CUDA else "test")
    rows = [
        pytest.param(name, maker, s, label, id=f"{label}-{str(s).split('-', 1)[-1]}")
        for name, maker, s, label in _cases(tag)
    ]
    metafunc.parametrize(("name", "maker", "shape", "label"), rows)


def test_kernel(
    name: str,
    maker: Callable[[Shape], Case],
    shape: Shape,
    label: str,
    benchmark: Any,
    recorder: Any,
) -> None:
    recorder.in_time()
    torch.default_generator.manual_seed(0)
    torch.compiler.reset()  # Dynamo runs a function uncompiled, silently, once it met it in eight sizes
    try:
        case = maker(shape)
    except torch.OutOfMemoryError:
        pytest.skip("the arguments do not fit the device")
    if reason := OPS[name].supported(*case.args, **case.kwargs):
        pytest.skip(f"not supported: {reason}")
    row = measure_case(name, label, shape, case, recorder.ceilings(), recorder.profile, recorder.rounds)
    recorder.add(row)
    benchmark.extra_info["row"] = row
    # Others may fail on a shape; the op itself may not.
    assert "error" not in row["implementations"]["fastft"], row["implementations"]["fastft"]["error"]

    def synchronous() -> None:
        OPS[name].call(*case.args, **case.kwargs)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(synchronous, rounds=3, warmup_rounds=1)
