"""Triton, or stand-ins that let a kernel file be imported where Triton is missing (CPU-only wheels, macOS).

Kernels are written once, at module level, as ``@jit def kernel(x_ptr, N: tl.constexpr)``. Without Triton they stay
plain functions that nobody calls: ``use_triton`` sends every tensor to the PyTorch body. Kernel files need ``from
__future__ import annotations``, so that no annotation is evaluated.
"""

from __future__ import annotations

from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
    jit = triton.jit
except ImportError:
    HAS_TRITON = False

    class _Missing:
        """Stands for a module that is not there: module-level constants still work, everything else says what is
        missing."""

        @staticmethod
        def constexpr(value: Any) -> Any:
            return value

        def __getattr__(self, name: str) -> Any:
            raise ImportError(f"fastft needs Triton for {name!r}: pip install triton (Linux), or run on the CPU")

    triton = tl = _Missing()  # type: ignore[assignment]

    def jit(fn: Any = None, **_: Any) -> Any:
        """``triton.jit`` without Triton: the function itself, with or without options."""
        return (lambda f: f) if fn is None else fn


__all__ = ["HAS_TRITON", "jit", "tl", "triton"]
