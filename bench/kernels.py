"""Kernel times beside PyTorch's: every registered op, at the sizes of ``bench/shapes.py``.

    pytest bench/kernels.py --benchmark-json=kernels.json
    pytest bench/kernels.py -k "llama-3.1-8b and rms_norm" --shapes-tag primary

On a GPU the shapes tagged ``primary`` run in bf16, on a CPU the ones tagged ``test`` in fp32 (which shows that the
benchmark works, not how fast anything is). For each op, shape and implementation, one row: microseconds of the forward
(with what it keeps for the backward) and of forward and backward together, as the GPU's own clock has them
(``triton.testing.do_bench``: median, level-2 cache flushed), and what that is in GB/s and TFLOP/s of the fewest bytes
and operations a forward needs. Implementations: the op, its reference in eager PyTorch and under Inductor, and what
stock libraries run instead where that is another program. Gradients are those of LoRA training: weights are frozen.

Ops are found through ``fastft.kernels.load()``. One that has no row in :data:`MAKERS` fails here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastft.kernels
from bench.shapes import Shape, shapes

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
OPS = fastft.kernels.load()


@dataclass
class Case:
    """One call: arguments, the tensors whose gradients are wanted, what the forward must move and compute at the least.

    ``others``: implementations beside op, reference and Inductor, as functions of nothing.
    """

    args: Sequence[Any]
    wanted: Sequence[torch.Tensor] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    bytes_moved: float = 0.0
    flops: float = 0.0
    others: dict[str, Callable[[], Any]] = field(default_factory=dict)


def _random(*size: int, grad: bool = False, dtype: torch.dtype = DTYPE, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*size, device=DEVICE, dtype=torch.float32) * scale).to(dtype).requires_grad_(grad)


def _bytes(*tensors: torch.Tensor) -> float:
    return float(sum(t.numel() * t.element_size() for t in tensors))


def rms_norm(s: Shape) -> Case:
    x, weight = _random(s["batch"], s["seq"], s["hidden"], grad=True), _random(s["hidden"])
    return Case((x, weight, s["eps"], s["offset"]), [x], bytes_moved=2 * _bytes(x))


def layer_norm(s: Shape) -> Case:
    x, weight, bias = _random(s["batch"], s["seq"], s["hidden"], grad=True), _random(s["hidden"]), _random(s["hidden"])
    return Case((x, weight, bias, s["eps"]), [x], bytes_moved=2 * _bytes(x))


def glu(s: Shape) -> Case:
    gate, up = (_random(s["batch"], s["seq"], s["intermediate"], grad=True) for _ in range(2))
    return Case((gate, up, s["activation"]), [gate, up], bytes_moved=3 * _bytes(gate))


def glu_packed(s: Shape) -> Case:
    gate_up = _random(s["batch"], s["seq"], 2 * s["intermediate"], grad=True)
    return Case((gate_up, s["activation"]), [gate_up], bytes_moved=1.5 * _bytes(gate_up))


def rotary(s: Shape) -> Case:
    # As transformers has them: views of the projections' [batch, seq, heads, head_dim].
    q, k = (
        _random(s["batch"], s["seq"], s[n], s["head_dim"], grad=True).transpose(1, 2) for n in ("heads", "kv_heads")
    )
    angle = torch.rand(1, s["seq"], s["rotary_dim"] // 2, device=DEVICE).repeat(1, 1, 2)
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    return Case((q, k, cos, sin), [q, k], dict(rotary_dim=s["rotary_dim"]), bytes_moved=2 * _bytes(q, k))


def _adapters(s: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """x, A, B (fp32, as PEFT keeps them), and the operations of one product with the weight and the adapter."""
    x = _random(s["batch"], s["seq"], s["in_features"], grad=True)
    a = _random(s["rank"], s["in_features"], grad=True, dtype=torch.float32, scale=s["in_features"] ** -0.5)
    b = _random(s["out_features"], s["rank"], grad=True, dtype=torch.float32, scale=0.02)
    sizes = s["in_features"] * s["out_features"] + s["rank"] * (s["in_features"] + s["out_features"])
    return x, a, b, 2.0 * s["batch"] * s["seq"] * sizes


def lora_linear(s: Shape) -> Case:
    x, a, b, flops = _adapters(s)
    weight = _random(s["out_features"], s["in_features"], scale=s["in_features"] ** -0.5)
    kwargs = dict(dtype=DTYPE, lora_dtype=DTYPE)  # under bf16 autocast
    out = x.numel() // s["in_features"] * s["out_features"] * x.element_size()
    others = {"base linear alone": lambda: F.linear(x, weight)}
    return Case((x, weight, None, [a], [b], [1.0]), [x, a, b], kwargs, _bytes(x, weight) + out, flops, others)


def _joint_adapters(s: Shape) -> tuple[torch.Tensor, list[list[torch.Tensor]], list[list[torch.Tensor]], float]:
    """x, each layer's A and B, the operations: as :func:`_adapters`, for layers that share x."""
    each = [_adapters(Shape(s.op, s.model, {**s.dims, "out_features": n}, s.tags)) for n in s["out_features"]]
    return each[0][0], [[a] for _, a, _, _ in each], [[b] for _, _, b, _ in each], sum(flops for *_, flops in each)


def lora_linears(s: Shape) -> Case:
    x, a, b, flops = _joint_adapters(s)
    weight = [_random(n, s["in_features"], scale=s["in_features"] ** -0.5) for n in s["out_features"]]
    kwargs = dict(dtype=DTYPE, lora_dtype=DTYPE)
    out = x.numel() // s["in_features"] * sum(s["out_features"]) * x.element_size()
    wanted = [x, *(t for pair in zip(a, b, strict=True) for (t,) in pair)]
    scaling = [[1.0]] * len(weight)

    def apart() -> list[torch.Tensor]:
        op = OPS["lora_linear"].call
        return [op(x, w, None, *thin, **kwargs) for w, *thin in zip(weight, a, b, scaling, strict=True)]

    others = {"one after the other": apart, "base linears alone": lambda: [F.linear(x, w) for w in weight]}
    return Case((x, weight, (), a, b, scaling), wanted, kwargs, _bytes(x, *weight) + out, flops, others)


def _quantised(out_features: int, in_features: int) -> tuple[torch.Tensor, Any]:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = _random(out_features, in_features, scale=in_features**-0.5)
    return functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)


def lora_linear_nf4(s: Shape) -> Case:
    x, a, b, flops = _adapters(s)
    packed, state = _quantised(s["out_features"], s["in_features"])
    quant = [state.absmax, state.state2.code, state.offset, state.state2.absmax]
    kwargs = dict(quant=quant, shape=tuple(state.shape), dtype=DTYPE, lora_dtype=DTYPE)
    out = x.numel() // s["in_features"] * s["out_features"] * x.element_size()
    return Case((x, packed, None, [a], [b], [1.0]), [x, a, b], kwargs, _bytes(x, packed) + out, flops)


def nf4_dequantize(s: Shape) -> Case:
    import bitsandbytes.functional as functional

    packed, state = _quantised(s["out_features"], s["in_features"])
    scales = (
        state.absmax,
        state.state2.code,
        state.offset,
        state.state2.absmax,
        state.blocksize,
        state.state2.blocksize,
    )
    moved = _bytes(packed, state.absmax) + s["out_features"] * s["in_features"] * DTYPE.itemsize
    others = {"bitsandbytes": lambda: functional.dequantize_4bit(packed, state)}
    return Case((packed, *scales, tuple(state.shape), DTYPE), bytes_moved=moved, others=others)


def linear_cross_entropy(s: Shape) -> Case:
    tokens = s["batch"] * s["seq"]
    hidden = _random(tokens, s["hidden"], grad=True)
    weight = _random(s["vocab"], s["hidden"], scale=s["hidden"] ** -0.5)
    labels = torch.randint(0, s["vocab"], (tokens,), device=DEVICE)
    moved, flops = _bytes(hidden, weight), 2.0 * tokens * s["hidden"] * s["vocab"]
    return Case((hidden, weight, None, labels), [hidden], dict(softcap=s["softcap"]), moved, flops)


def attention(s: Shape) -> Case:
    q, k, v = (
        _random(s["batch"], s["seq"], s[n], s["head_dim"], grad=True).transpose(1, 2)
        for n in ("heads", "kv_heads", "kv_heads")
    )
    window, softcap = s["window"] or 0, s["softcap"] or 0.0
    seen = min(window, s["seq"] / 2) if window else s["seq"] / 2
    flops = 4.0 * s["batch"] * s["heads"] * s["seq"] * seen * s["head_dim"]
    others: dict[str, Callable[[], Any]] = {}
    if not softcap:
        # What stock transformers runs while it is traced: a dense mask.
        mask = torch.ones(s["seq"], s["seq"], dtype=torch.bool, device=DEVICE).tril()
        if window:
            mask = mask.triu(1 - window)
        others["SDPA, dense mask"] = lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    if not softcap and not window:
        others["SDPA, causal"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    kwargs = dict(causal=True, window=window, softcap=softcap)
    return Case((q, k, v), [q, k, v], kwargs, 2 * _bytes(q) + _bytes(k, v), flops, others)


#: op → (the op whose shapes it takes, what makes its arguments), one for each way it is called.
MAKERS: dict[str, list[tuple[str, Callable[[Shape], Case]]]] = {
    "rms_norm": [("rms_norm", rms_norm)],
    "layer_norm": [("layer_norm", layer_norm)],
    "glu": [("glu", glu)],
    "glu_packed": [("glu", glu_packed)],
    "rotary": [("rotary", rotary)],
    "lora_linear": [("lora_linear", lora_linear), ("lora_linear", lora_linear_nf4)],
    "lora_linears": [("lora_linears", lora_linears)],
    "nf4_dequantize": [("nf4", nf4_dequantize)],
    "linear_cross_entropy": [("linear_cross_entropy", linear_cross_entropy)],
    "linear_log_prob": [("linear_cross_entropy", linear_cross_entropy)],
    "attention": [("attention", attention)],
}


def _calls(name: str, case: Case) -> dict[str, Callable[[], Any]]:
    """Every implementation of this case, as functions of nothing."""
    op = OPS[name]
    compiled = torch.compile(op.reference, dynamic=False) if CUDA else op.reference
    return {
        "fastft": lambda: op.call(*case.args, **case.kwargs),
        "eager": lambda: op.reference(*case.args, **case.kwargs),
        **({"inductor": lambda: compiled(*case.args, **case.kwargs)} if CUDA else {}),
        **case.others,
    }


def _first(result: Any) -> tuple[torch.Tensor, ...]:
    """The differentiable tensors of a result."""
    parts = (result,) if isinstance(result, torch.Tensor) else tuple(result)
    return tuple(t for t in parts if isinstance(t, torch.Tensor) and t.requires_grad)


def _microseconds(run: Callable[[], Any]) -> float:
    """Median time of ``run``."""
    if CUDA:
        from triton.testing import do_bench

        return 1e3 * do_bench(run, warmup=10, rep=60, return_mode="median")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    tag = metafunc.config.getoption("--shapes-tag") or ("primary" if CUDA else "test")
    rows = []
    for name in sorted(OPS):
        for family, maker in MAKERS.get(name, [(name, None)]):
            found = shapes(family, tag=tag) if maker else [None]
            label = maker.__name__ if maker and maker.__name__ != family else name
            rows += [pytest.param(name, maker, s, id=f"{label}-{str(s).split('-', 1)[-1]}") for s in found]
    metafunc.parametrize(("name", "maker", "shape"), rows)


def test_kernel(
    name: str, maker: Callable[[Shape], Case] | None, shape: Shape | None, benchmark: Any, record_property: Any
) -> None:
    assert maker is not None and shape is not None, (
        f"op {name!r} has no row in MAKERS of bench/kernels.py: say how its arguments are made"
    )
    torch.manual_seed(0)
    torch.compiler.reset()  # Dynamo runs a function uncompiled, silently, once it met it in eight sizes
    try:
        case = maker(shape)
    except torch.OutOfMemoryError:
        pytest.skip("the arguments do not fit the device")
    if reason := OPS[name].supported(*case.args, **case.kwargs):
        pytest.skip(f"not supported: {reason}")
    calls = _calls(name, case)
    table: dict[str, Any] = {}
    for implementation, call in calls.items():
        try:
            table[implementation] = _times(call, case)
        except torch.OutOfMemoryError:
            table[implementation] = {"error": "out of memory"}
            torch.cuda.empty_cache()
        except Exception as error:
            # Others may fail on a shape; the op itself may not.
            if implementation == "fastft":
                raise
            table[implementation] = {"error": f"{type(error).__name__}: {error}"[:200]}
    assert "error" not in table["fastft"], f"the op ran out of memory: {table['fastft']}"
    benchmark.extra_info.update(op=name, shape=str(shape), device=_device_name(), times=table)
    record_property(
        "times", {"label": f"{name} {str(shape).split('-', 1)[-1]}", "maker": maker.__name__, "times": table}
    )

    def synchronous() -> None:
        calls["fastft"]()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(synchronous, rounds=3, warmup_rounds=1)


def _times(call: Callable[[], Any], case: Case) -> dict[str, float]:
    forward = _microseconds(call)
    found = {"forward_us": round(forward, 2)}
    if case.bytes_moved:
        found["forward_GBps"] = round(case.bytes_moved / forward / 1e3, 1)
    if case.flops:
        found["forward_TFLOPps"] = round(case.flops / forward / 1e6, 1)
    outputs = _first(call())
    if case.wanted and outputs:
        gradients = [torch.randn_like(o) for o in outputs]

        def both() -> None:
            torch.autograd.grad(_first(call()), case.wanted, gradients, allow_unused=True)

        found["both_us"] = round(_microseconds(both), 2)
    return found


def _device_name() -> str:
    return torch.cuda.get_device_name() if CUDA else "cpu"
