"""Functions of numbers that several kernel files call."""

from __future__ import annotations

from fastft.kernels._op import INTERPRET
from fastft.kernels._triton import jit, tl

#: The interpreter has no PTX.
_INTERPRET = tl.constexpr(INTERPRET)


@jit
def tanh(x, ROUNDED: tl.constexpr):
    """tanh of fp32 ``x``. ``ROUNDED``: where others round ``x`` and the result to bf16, an eighth of which the GPU's
    own instruction is off by (2⁻¹¹ of the result; Parallel Thread Execution ISA, ``tanh.approx.f32``).
    """
    if ROUNDED and not _INTERPRET:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return 2 * tl.sigmoid(2 * x) - 1
