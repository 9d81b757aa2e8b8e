"""Functions of numbers that several kernel files call."""

from __future__ import annotations

from fastft.kernels._op import INTERPRET
from fastft.kernels._triton import jit, tl

#: The interpreter has no PTX.
_INTERPRET = tl.constexpr(INTERPRET)


#: Two at a time: the special function units are what a softcap's scores wait for, and take two halves in one turn.
_TANH = tl.constexpr("""{
    .reg .b32 both;
    .reg .b16 first, second;
    cvt.rn.f16x2.f32 both, $3, $2;
    tanh.approx.f16x2 both, both;
    mov.b32 {first, second}, both;
    cvt.f32.f16 $0, first;
    cvt.f32.f16 $1, second;
}""")


@jit
def tanh(x, ROUNDED: tl.constexpr):
    """tanh of fp32 ``x``. ``ROUNDED``: where others round ``x`` and the result to bf16, by the GPU's own instruction,
    which rounds both to 11 bits and is off by 2⁻¹¹ at most (Parallel Thread Execution ISA, ``tanh.approx.f16x2``).
    """
    if ROUNDED and not _INTERPRET:
        return tl.inline_asm_elementwise(_TANH, "=f,=f,f,f", [x], dtype=tl.float32, is_pure=True, pack=2)
    return 2 * tl.sigmoid(2 * x) - 1
