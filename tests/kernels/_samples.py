"""Inputs of every op, for tests that go over all ops: one provider an op, named variants of its arguments.

An op without a provider fails the meta-tests (``tests/test_ops.py``), so that a new op cannot be left out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastft.kernels import glu, rotary
from fastft.kernels._op import Op

Named = Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Sample:
    """Arguments of one call of an op; the tensors among them that require a gradient are its leaves."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def leaves(self) -> list[torch.Tensor]:
        return [t for t in tree_flatten((self.args, self.kwargs))[0] if isinstance(t, torch.Tensor) and t.requires_grad]

    def copied(self) -> Sample:
        """The same values and strides at other addresses, as new leaves."""
        values, tree = tree_flatten((self.args, self.kwargs))
        copies = [
            t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in values
        ]
        return Sample(self.name, *tree_unflatten(copies, tree))

    def outputs(self, fn: Callable[..., Any], leaves: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """What ``fn`` returns, as a list; with ``leaves`` in the place of the sample's own."""
        values, tree = tree_flatten((self.args, self.kwargs))
        given = iter(self.leaves() if leaves is None else leaves)
        wanted = [isinstance(t, torch.Tensor) and t.requires_grad for t in values]
        args, kwargs = tree_unflatten([next(given) if w else v for v, w in zip(values, wanted, strict=True)], tree)
        out = fn(*args, **kwargs)
        return list(out) if isinstance(out, tuple) else [out]


class _New:
    """Makes the tensors of a sample: random, in one dtype, on one device."""

    def __init__(self, dtype: torch.dtype, device: str) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, grad: bool = True, scale: float = 1.0) -> torch.Tensor:
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return t.to(self.device, self.dtype).requires_grad_(grad)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=self.generator).to(self.device)


def _rms_norm(new: _New, n: int) -> Named:
    yield "llama", (new(3, n, 5 * n), new(5 * n), 1e-6), {}
    yield "gemma", (new(2, 3, n, 4).transpose(1, 2), new(4), 1e-5, 1.0), {}
    yield "weightless", (new(2, 7 * n), None, 1e-6), {}
    yield "residual stream", (new(2, n, 5), new(5), 1e-6), {"pass_through": True}


def _layer_norm(new: _New, n: int) -> Named:
    yield "affine", (new(3, n, 5 * n), new(5 * n), new(5 * n), 1e-5), {}
    yield "biasless", (new(2, 3, n, 4).transpose(1, 2), new(4), None, 1e-5), {}
    yield "plain", (new(2, 7 * n), None, None, 1e-5), {}
    yield "residual stream", (new(2, n, 5), new(5), new(5), 1e-5), {"pass_through": True}


def _glu(new: _New, n: int) -> Named:
    for kind in glu.KINDS:
        yield kind, (new(2, n, 5, scale=2.0), new(2, n, 5), kind), {}


def _glu_packed(new: _New, n: int) -> Named:
    for kind in glu.KINDS:
        yield kind, (new(2, n, 10, scale=2.0), kind), {}
    yield "up first", (new(2, n, 10), "silu", False), {}


def _rotary(new: _New, n: int) -> Named:
    for style in rotary.STYLES:
        q, k = new(1, 3 * n, 2, 6).transpose(1, 2), new(1, 3 * n, 1, 6).transpose(1, 2)
        yield style, (q, k, new(1, 3 * n, 3, grad=False), new(1, 3 * n, 3, grad=False), style), {}
    tables = new(2, n, 4, grad=False), new(2, n, 4, grad=False)
    yield "part of a head, q alone", (new(2, 2, n, 6), None, *tables, "half", None, 4), {}
    yield "sequence first", (new(2, n, 2, 4), new(2, n, 1, 4), *tables), {"seq_dim": 1}


def _nf4(new: _New, n: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and states of NF4 weights [2n, 64], by the arguments' names of ``nf4_dequantize``."""
    packed = new.integers(256, 64 * n, 1).to(torch.uint8)
    scales = torch.rand(2 * n, generator=new.generator).to(new.device)
    yield "single", {"packed": packed, "quant": (scales,)}
    code = torch.rand(256, generator=new.generator).to(new.device)
    offset = torch.tensor(0.01, device=new.device)
    second = torch.rand(-(-2 * n // 2), generator=new.generator).to(new.device)
    yield "double", {"packed": packed, "quant": (new.integers(256, 2 * n).to(torch.uint8), code, offset, second)}


def _nf4_dequantize(new: _New, n: int) -> Named:
    for name, state in _nf4(new, n):
        quant = (*state["quant"], None, None, None)[:4]
        yield name, (state["packed"], *quant, 64, 2, (2 * n, 64), new.dtype), {}


def _attention(new: _New, n: int) -> Named:
    s = 5 * n

    def qkv(d_v: int = 4) -> tuple[torch.Tensor, ...]:
        return tuple(new(2, s, heads, d).transpose(1, 2) for heads, d in ((2, 4), (1, 4), (1, d_v)))

    left = torch.ones(2, s, dtype=torch.int64)
    left[1, : s // 2] = 0
    holes = left.clone()
    holes[0, 1::3] = 0
    packed = torch.cat([torch.arange(s // 2), torch.arange(s - s // 2)]).expand(2, s)
    left, holes, packed = (t.to(new.device) for t in (left, holes, packed))
    yield "causal", qkv(), {"causal": True}
    yield "window, left padding", qkv(), {"causal": True, "window": 3, "padding": left}
    yield "holes, wide values", qkv(6), {"causal": True, "padding": holes}
    yield "packed, softcap", qkv(), {"causal": True, "positions": packed, "softcap": 2.0}
    yield "chunk", qkv(), {"causal": True, "chunk": 3, "scale": 0.3}
    yield "boolean mask", qkv(), {"dense": new(2, 1, s, s, grad=False) > -1}
    yield "additive mask, softcap", qkv(), {"dense": new(1, 2, s, s, grad=False), "softcap": 3.0}


def _head(new: _New, n: int, frozen: bool = False, bias: bool = True) -> tuple[Any, ...]:
    labels = new.integers(7 * n, 4 * n)
    labels[::3] = -100
    weight = new(7 * n, 6, grad=not frozen, scale=0.5)
    return new(4 * n, 6), weight, new(7 * n, grad=not frozen) if bias else None, labels


def _linear_log_prob(new: _New, n: int) -> Named:
    everything = {"entropy": True, "is_top1": True, "mean_logits": True, "log_sum_sq_probs": True}
    maths = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3}
    yield "trainable head", _head(new, n), {**maths, **everything}
    yield "frozen head", _head(new, n, frozen=True), {**maths, **everything}
    yield "frozen head, plain", _head(new, n, frozen=True, bias=False), {}


def _linear_cross_entropy(new: _New, n: int) -> Named:
    yield "trainable head", _head(new, n, bias=False), {"softcap": 5.0}
    yield "frozen head", _head(new, n, frozen=True), {"reduction": "sum"}
    yield "each token", _head(new, n), {"reduction": "none", "logit_scale": 0.5}


def _adapters(new: _New, n_out: int, k: int, *ranks: int) -> tuple[Any, ...]:
    a = [new(r, k, scale=k**-0.5) for r in ranks]
    return a, [new(n_out, r, scale=r**-0.5) for r in ranks], [2.0, 0.7][: len(ranks)]


def _lora_linear(new: _New, n: int) -> Named:
    x = new(2, 2 * n, 6)
    yield "plain", (x, new(5, 6), new(5)), {}
    yield "lora", (x, new(5, 6, grad=False), None, *_adapters(new, 5, 6, 2)), {}
    yield "two adapters", (x, new(5, 6), new(5), *_adapters(new, 5, 6, 2, 3)), {"b_bias": [new(5), None]}
    own = [new(2, 2 * n, 6), None]
    yield "own inputs", (x, new(5, 6, grad=False), new(5, grad=False), *_adapters(new, 5, 6, 1, 2)), {"x_lora": own}
    yield "residual", (x, new(5, 6)), {"residual": new(2, 2 * n, 5)}
    if new.dtype != torch.float64:  # NF4 weights have no fp64 form
        for name, state in _nf4(new, n):
            quant = {"quant": state["quant"], "shape": (2 * n, 64), "blocksize2": 2}
            yield f"NF4, {name}", (new(2, 3, 64), state["packed"], None, *_adapters(new, 2 * n, 64, 2)), quant


def _lora_linears(new: _New, n: int) -> Named:
    def layers(*n_out: int, k: int = 6) -> tuple[list[Any], ...]:
        a, b, scaling = zip(*(_adapters(new, m, k, 2) for m in n_out), strict=True)
        return list(a), list(b), list(scaling)

    x = new(2, 2 * n, 6)
    yield "dense", (x, [new(5, 6), new(4, 6, grad=False)], [new(5), None], *layers(5, 4)), {}
    yield "no adapters", (x, [new(5, 6), new(4, 6), new(3, 6)]), {}
    if new.dtype != torch.float64:
        states = [state for _, state in _nf4(new, n)]
        for name, state in zip(("single", "double"), states, strict=True):
            quant = {"quant": [state["quant"]] * 2, "shape": [(2 * n, 64)] * 2}
            quant |= {"blocksize": [64, 64], "blocksize2": [2, 2]}
            yield f"NF4, {name}", (new(2, 3, 64), [state["packed"]] * 2, [], *layers(2 * n, 2 * n, k=64)), quant


PROVIDERS: dict[str, Callable[[_New, int], Named]] = {
    "attention": _attention,
    "glu": _glu,
    "glu_packed": _glu_packed,
    "layer_norm": _layer_norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "linear_log_prob": _linear_log_prob,
    "lora_linear": _lora_linear,
    "lora_linears": _lora_linears,
    "nf4_dequantize": _nf4_dequantize,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
}


def samples(op: Op, dtype: torch.dtype = torch.float32, device: str = "cpu", n: int = 1) -> list[Sample]:
    """Variants of ``op``'s arguments, all supported; the same numbers at every call. ``n`` multiplies the sizes."""
    if op.name not in PROVIDERS:
        raise LookupError(f"no samples of {op.name}: give tests/kernels/_samples.py a provider for it")
    found = [Sample(*named) for named in PROVIDERS[op.name](_New(dtype, device), n)]
    for sample in found:
        reason = op.supported(*sample.args, **sample.kwargs)
        assert reason is None, f"the sample {sample.name!r} of {op.name} is not supported: {reason}"
    return found


def differentiable(op: Op) -> bool:
    """Whether the op has a backward of its own."""
    return any(name.endswith("_backward") for name in op.raw)
