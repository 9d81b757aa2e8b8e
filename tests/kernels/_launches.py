"""What the kernels are launched with at the sizes of ``bench/shapes.py``: block sizes, warps, stages, grid.

Nothing runs: tensors have no memory, and a launch is noted in place of being made. An H100 is assumed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.shapes import Shape
from fastft.kernels import (
    attention,
    glu,
    layer_norm,
    linear_cross_entropy,
    lora_glu,
    nf4,
    norm_rotary,
    rms_norm,
    rotary,
)
from fastft.kernels._config import SPACES, forget
from fastft.kernels._inputs import New
from fastft.kernels._linear_cross_entropy_call import Maths, Wanted
from fastft.kernels._op import OPS, Op
from tests.kernels._each import home_of, homes, parts
from tests.kernels._hopper import H100

#: What a configuration decides, by the names that kernels give it.
CONFIGURED = (
    *("BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_Q", "BLOCK_K", "BLOCK_H"),
    *("GROUPS", "PARTS", "num_warps", "num_stages"),
)

Launch = dict[str, Any]


@contextlib.contextmanager
def noting() -> Iterator[list[Launch]]:
    """Within, launches are noted (``kernel``, ``grid`` and what is configured) and not made."""
    found: list[Launch] = []

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        given = {name: kwargs[name] for name in CONFIGURED if name in kwargs}
        found.append({"kernel": self.__name__, "grid": list(grid), **given})

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", note))
        for module in (part for home in homes() for part in parts(home)):
            if hasattr(module, "use_triton"):
                stack.enter_context(mock.patch.object(module, "use_triton", lambda x: True))
        for module in (rms_norm, layer_norm, norm_rotary, linear_cross_entropy.fused):
            stack.enter_context(mock.patch.object(module, "processors", lambda device: 132))
        stack.enter_context(mock.patch.object(attention, "_roomy", lambda device: True))
        stack.enter_context(mock.patch.object(nf4, "_levels", lambda device: torch.empty(16, device=device)))
        stack.callback(forget)
        forget()  # what heuristics say of another device
        yield found


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(s: Shape, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Forward's and backward's launches at one of ``bench/shapes.py``'s sizes; none for ops without Triton kernels."""
    with noting() as found:
        _launch(s, dtype)
    return found


def _launch(s: Shape, dtype: torch.dtype) -> None:
    if s.op in _RUN:
        _RUN[s.op](s, dtype)
    elif any(space.file.stem == home_of(OPS[s.op]) for space in SPACES.values()):
        _call(OPS[s.op], s, dtype)


def compiled(s: Shape, dtype: torch.dtype = torch.bfloat16) -> set[tuple[str, ...]]:
    """What Triton compiles kernels for at these sizes, without constants: a kernel's name, and of each argument its
    type and what is known of it (a pointer that is aligned, an integer that 16 divides, or that is 1).
    """
    found: set[tuple[str, ...]] = set()

    def note(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        *_, binder = self.create_binder()
        _, specialization, _ = binder(*args, **kwargs)
        found.add((self.__name__, *(str(what) for what in specialization if what[0] != "constexpr")))

    with noting(), mock.patch.object(driver, "_active", H100()), mock.patch.object(JITFunction, "run", note):
        _launch(s, dtype)
    return found


class Blank(New):
    """Tensors that nobody has written to: their memory is only reserved."""

    def __call__(self, *shape: int, grad: bool = False, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype).requires_grad_(grad)


def _call(op: Op, s: Shape, dtype: torch.dtype) -> None:
    """As the op's file makes its calls."""
    inputs = op.inputs(Blank(dtype, "cpu"), **s.dims)
    out = op.call(*inputs.args, **inputs.kwargs)
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.grad(outs, list(inputs.wanted), list(map(torch.empty_like, outs)))


def _rms_norm(s: Shape, dtype: torch.dtype) -> None:
    x, w = _empty(s["batch"], s["seq"], s["hidden"], dtype=dtype), _empty(s["hidden"], dtype=dtype)
    y, r = rms_norm._forward(x, w, s["eps"], s["offset"], None)
    for want_dweight in (True, False):
        rms_norm._backward(y, x, w, r, None, s["offset"], True, want_dweight)


def _layer_norm(s: Shape, dtype: torch.dtype) -> None:
    x, w = _empty(s["batch"], s["seq"], s["hidden"], dtype=dtype), _empty(s["hidden"], dtype=dtype)
    y, m, r = layer_norm._forward(x, w, w, s["eps"], None)
    for want in (True, False):
        layer_norm._backward(y, x, w, m, r, None, True, want, want)


def _glu(s: Shape, dtype: torch.dtype) -> None:
    both = _empty(s["batch"], s["seq"], 2 * s["intermediate"], dtype=dtype)
    y = glu._packed_forward(both, s["activation"], True)
    glu._packed_backward(y, both, s["activation"], True)
    glu._backward(y, glu._forward(y, y, s["activation"]), y, s["activation"], True, True)


def _rotary(s: Shape, dtype: torch.dtype) -> None:
    q, k = (
        _empty(s["batch"], s["seq"], s[n], s["head_dim"], dtype=dtype).transpose(1, 2) for n in ("heads", "kv_heads")
    )
    table = _empty(1, s["seq"], s["rotary_dim"], dtype=dtype)
    rotary._forward(q, k, table, table, "half", None, s["rotary_dim"], 2)
    rotary._backward(q, None, table, table, "half", dtype, s["rotary_dim"], 2)


def _norm_rotary(s: Shape, dtype: torch.dtype) -> None:
    q, k = (
        _empty(s["batch"], s["seq"], s[n], s["head_dim"], dtype=dtype).transpose(1, 2) for n in ("heads", "kv_heads")
    )
    weight, table = _empty(s["head_dim"], dtype=dtype), _empty(1, s["seq"], s["rotary_dim"], dtype=dtype)
    operands = q, k, weight, weight, table, table
    _, _, q_r, k_r = norm_rotary._forward(*operands, s["eps"], s["offset"], "half", None, s["rotary_dim"], 2)
    for want_dweight in (True, False):
        rest = s["offset"], "half", s["rotary_dim"], 2, True, want_dweight
        norm_rotary._backward(q, k, *operands, q_r, k_r, *rest)


def _attention(s: Shape, dtype: torch.dtype) -> None:
    q, k, v = (
        _empty(s["batch"], s["seq"], s[n], s["head_dim"], dtype=dtype).transpose(1, 2)
        for n in ("heads", "kv_heads", "kv_heads")
    )
    mask = (None,) * 8, True, s["window"] or 0, 0, 0.1, s["softcap"] or 0.0
    out, lse = attention._forward(q, k, v, *mask[0], *mask[1:])
    attention._backward(out, q, k, v, out, lse, True, True, False, *mask[0], *mask[1:])


def _linear_cross_entropy(s: Shape, dtype: torch.dtype) -> None:
    tokens = s["batch"] * s["seq"]
    hidden, weight = _empty(tokens, s["hidden"], dtype=dtype), _empty(s["vocab"], s["hidden"], dtype=dtype)
    labels = _empty(tokens, dtype=torch.int64)
    wanted = Wanted(True, False, False, False, True)
    for way in ("chunks", "fused"):
        maths = Maths(-100, s["softcap"], 1.0, 1.0, 0.0, 0.0, dtype, way)
        _, top, *_ = linear_cross_entropy._prepared(hidden, weight, None, labels, maths, wanted)(True, 1)
    grads, saved = (top, None, None, None), (top, top, top)
    linear_cross_entropy._backward_all(grads, hidden, weight, None, labels, saved, maths, True, True, True, False)


def _lora_glu(s: Shape, dtype: torch.dtype) -> None:
    n, rank = s["intermediate"], s["rank"]
    wide, b = _empty(s["batch"], s["seq"], 2 * n + 2 * rank, dtype=dtype), [_empty(n, rank, dtype=torch.float32)] * 2
    y = lora_glu._forward(wide, b, (2.0, 2.0), s["activation"])
    lora_glu._backward(y, wide, b, (2.0, 2.0), s["activation"], True, (False, False))


def _nf4(s: Shape, dtype: torch.dtype) -> None:
    n, k = s["out_features"], s["in_features"]
    scales = _empty(-(-n * k // 64), dtype=torch.float32)
    packed = _empty((n * k + 1) // 2, 1, dtype=torch.uint8)
    nf4.dequantize_into([_empty(n, k, dtype=dtype)], [packed], [(scales, None, None, None)], (64, 256))


_RUN = {
    "attention": _attention,
    "glu": _glu,
    "layer_norm": _layer_norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "lora_glu": _lora_glu,
    "nf4": _nf4,
    "norm_rotary": _norm_rotary,
    "rms_norm": _rms_norm,
    "rotary": _rotary,
}
