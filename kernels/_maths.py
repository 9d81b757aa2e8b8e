"""Functions of numbers that several kernel files call."""

from __future__ import annotations

from fastft.kernels._op import INTERPRET
from fastft.kernels._triton import jit, tl

#: The interpreter has no PTX.
_INTERPRET = tl.constexpr(INTERPRET)


@jit
def exp2(x):
    """2^x of fp32 ``x``; below 2^-126 it is 0, and not looked after: that takes three instructions of five."""
    if _INTERPRET:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@jit
def tanh(x, ROUNDED: tl.constexpr):
    """tanh of fp32 ``x``. ``ROUNDED``: where others round ``x`` and the result to bf16, an eighth of which the GPU's
    own instruction is off by (2⁻¹¹ of the result; Parallel Thread Execution ISA, ``tanh.approx.f32``). Of two halves
    (``.f16x2``) it is two instructions on sm_90, not one.
    """
    if ROUNDED and not _INTERPRET:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 2 * tl.sigmoid(2 * x) - 1
