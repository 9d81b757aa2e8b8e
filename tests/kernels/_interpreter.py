"""Repairs of Triton's interpreter, for tests only: bf16, which Triton 3.6 and 3.7 compute as if its bits were 16-bit
integers; and what it does again and again, most of its time.

The interpreter keeps a bf16 value as uint16. Loads, stores and the exact widening to fp32 are right; what is wrong is
every other cast (narrowing truncates), arithmetic and comparisons between bf16 values, and ``tl.dot``. The repair
widens bf16 operands to fp32, computes as before and rounds to nearest even, as a GPU does. Reductions over bf16, which
no kernel here has, raise.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle


def _is_bf16(value: TensorHandle) -> bool:
    return value.dtype.scalar == tl.bfloat16 and value.data.dtype == np.uint16


def _widen(value: TensorHandle) -> TensorHandle:
    if not _is_bf16(value):
        return value
    return TensorHandle((value.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _bf16(data: np.ndarray) -> TensorHandle:
    """fp32 → bf16, to nearest even; NaN stays NaN."""
    single = np.ascontiguousarray(data, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(single), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def _through_fp32(method):
    """``method(self, *operands, ...)`` on widened operands; a floating result goes back to bf16 when an operand was
    bf16."""

    def run(self, *args):
        if not any(isinstance(a, TensorHandle) and _is_bf16(a) for a in args):
            return method(self, *args)
        result = method(self, *(_widen(a) if isinstance(a, TensorHandle) else a for a in args))
        if result.data.dtype == np.bool_:
            return TensorHandle(result.data, tl.int1)
        return _bf16(result.data) if result.dtype.scalar == tl.float32 else result

    return run


def _cast(self, src, dst_type):
    if dst_type.scalar == tl.bfloat16:
        return _bf16(_widen(src).data)
    return TensorHandle(_widen(src).data.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)


def _patched_once(patch_lang):
    """``patch_lang``, for a function that sees no more of the language than is patched: looking at all of its members
    again, for each call of one kernel function by another, is most of the interpreter's time.
    """
    patched: set = set()

    def patch(fn):
        seen = {value for value in fn.__globals__.values() if value is tl or value is tl.core}
        if seen and seen <= patched:
            return interpreter._LangPatchScope()  # with nothing to restore
        scope = patch_lang(fn)
        seen -= patched
        patched.update(seen)
        restore = scope.restore

        def restored():
            restore()
            patched.difference_update(seen)

        scope.restore = restored
        return scope

    return patch


def _remembered(get_np_dtype):
    """``get_np_dtype``, which makes a table of all dtypes at each call."""
    found: dict = {}

    def get(dtype):
        name = dtype.scalar.name
        if name not in found:
            found[name] = get_np_dtype(dtype)
        return found[name]

    return get


def repair() -> None:
    """Patch the interpreter of this process; harmless to call twice."""
    if getattr(InterpreterBuilder, "bf16_repaired", False):
        return
    convert, dot, check = (
        InterpreterBuilder.create_fp_to_fp,
        InterpreterBuilder.create_dot,
        ReduceScanOpInterface.check_tensor,
    )

    def fp_to_fp(self, src, dst_type, rounding_mode):
        both = {src.dtype.scalar, dst_type.scalar}
        if tl.bfloat16 in both and all(t.primitive_bitwidth > 8 for t in both):
            return _cast(self, src, dst_type)
        return convert(self, src, dst_type, rounding_mode)

    def check_tensor(self, values):
        if any(isinstance(v, tl.core.tensor) and v.dtype == tl.bfloat16 for v in values):
            raise NotImplementedError("reduce bf16 after a cast to fp32: the interpreter would add its bits")
        check(self, values)

    InterpreterBuilder.cast_impl = _cast
    InterpreterBuilder.create_fp_to_fp = fp_to_fp
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, _widen(a), _widen(b), *rest)
    InterpreterBuilder.get_bf16 = lambda self, value: _bf16(np.array([value]))
    for name in ("binary_op", "ternary_op", "unary_op", "create_fma"):
        setattr(InterpreterBuilder, name, _through_fp32(getattr(InterpreterBuilder, name)))
    ReduceScanOpInterface.check_tensor = check_tensor
    interpreter._patch_lang = _patched_once(interpreter._patch_lang)
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype)
    # Each sum of integers is computed twice, in 64 bits too, for an assertion that is made with TRITON_DEBUG only.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    InterpreterBuilder.bf16_repaired = True
