"""Triton, or stand-ins that let a kernel file be imported where Triton is missing (CPU-only wheels, macOS).

Kernels are written once, at module level, as ``@jit def kernel(x_ptr, N: tl.constexpr)``. Without Triton they stay
plain functions that nobody calls: ``use_triton`` sends every tensor to the PyTorch body. Kernel files need ``from
__future__ import annotations``, so that no annotation is evaluated.

``kernel[grid](…)`` finds the compiled kernel of a launch anew each time, argument by argument, which takes Triton
longer than the launch itself. A step of training repeats its launches to the last stride, so :class:`Kernel` keeps what
was found. A small model's step, and one that offloads, waits for the host: what is in the way of a launch counts.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Hashable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
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


#: The versions whose rules are known by which a launch gets a compiled kernel of its own: a tensor's dtype and whether
#: it is aligned, an integer's size, divisibility and whether it is 1 (NVIDIA's backend). Others look it up themselves.
KNOWN = ((3, 6), (3, 7))
#: Kinds of launches that are kept for one kernel; all are dropped beyond (a run where every batch has another length).
MOST_LAUNCHES = 4096
#: The name of threads that compile beside the run (``bench/running.py`` knows its beginning).
BESIDE = "fastft-compiles"
#: Bytes to which Triton asks whether a tensor is aligned.
ALIGNED = 16
#: Parameters that count tokens, or blocks of them. For an integer that 16 divides Triton compiles a kernel of its own,
#: which knows what is aligned. Rows are by their widths and strides, which a model fixes; of these, which differ from
#: batch to batch, it is told nothing, or a run would stop for seconds at its first length of either sort.
COUNTS = ("rows", "tokens", "seq", "blocks", "tiles", "owned", "others")
#: Attention's lengths, of which it is told: without it the kernel of dk and dv has too few registers. So such a kernel
#: is compiled twice; beside the run, where lengths are seen to change (:class:`Kernel`).
LENGTHS = ("Sq", "Sk")


class _Unkept(Exception):
    """An argument of a type whose rules are not known."""


def _kind(argument: Any) -> Hashable:
    """All of an argument that decides which compiled kernel takes it, or more: of an integer its value."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype if argument.data_ptr() % ALIGNED == 0 else (argument.dtype, "unaligned")
    if isinstance(argument, tuple):
        return tuple(a if type(a) is int else _kind(a) for a in argument)
    if isinstance(argument, float):
        return float
    if argument is None or isinstance(argument, bool):
        return (argument,)  # a tuple: True is 1 otherwise
    raise _Unkept


def _sort(n: int, counts: bool = False) -> Hashable:
    """All of an integer that decides which compiled kernel takes it. ``counts``: of one of :data:`COUNTS`."""
    return n % ALIGNED == 0 and not counts, n == 1, -(2**31) <= n < 2**31


def _blank(argument: Any) -> Any:
    """An argument that is as good for the compiler, without a tensor's memory."""
    if isinstance(argument, torch.Tensor) and argument.data_ptr() % ALIGNED == 0:
        return torch.empty(0, dtype=argument.dtype, device="meta")
    return argument


if HAS_TRITON:
    _run = triton.JITFunction.run

    class Kernel(triton.JITFunction):  # type: ignore[type-arg]
        """A kernel that keeps, for each kind of launch, the compiled kernel that Triton found for it, and launches that
        one when such a launch comes again.

        Of lengths (:data:`LENGTHS`) there are two sorts, those that 16 divides and the others, and Triton compiles for
        each when it first comes, which stops a run for seconds. So once a kernel has been launched at two lengths, both
        of one sort, a thread compiles it for the other; a launch that needs it before it is there waits for it. (Under
        a dense mask, whose strides are lengths too, what the thread compiles is not what the launch will need.)

        Where another ``run`` stands in for Triton's (whoever counts launches, or compiles only), all go through it.
        Options that Triton reads from the environment (``TRITON_DEBUG``) are those of a kind's first launch.
        """

        def __init__(self, fn: Any) -> None:
            super().__init__(fn, do_not_specialize_on_alignment=COUNTS)
            self._launches: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}
            #: Where the lengths are; kind of launch but for its lengths → those of the first, and who compiles it for
            #: the other sort, once somebody does.
            self._at = [at for at, name in enumerate(self.arg_names) if name in LENGTHS]
            self._lengths: dict[Hashable, tuple[list[int], threading.Thread | None]] = {}

        def __getitem__(self, grid: Any) -> Any:
            return functools.partial(self._launch, grid)

        def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> Any:
            if triton.JITFunction.run is not _run or self.pre_run_hooks:
                return self.run(*args, grid=grid, warmup=False, **constants)
            try:
                device = triton.runtime.driver.active.get_current_device()
                key = (device, *[a if type(a) is int else _kind(a) for a in args], *constants.items())
                kept = self._launches.get(key)
            except (_Unkept, TypeError):  # TypeError: a constant that has no hash
                return self.run(*args, grid=grid, warmup=False, **constants)
            if kept is None:
                if self._at:
                    self._see(device, args, grid, constants)
                compiled = self.run(*args, grid=grid, warmup=False, **constants)
                if len(self._launches) >= MOST_LAUNCHES:
                    self._launches.clear()
                self._launches[key] = compiled, self._behind(len(args), constants)
                return compiled
            compiled, behind = kept
            compiled[(*grid, 1, 1)[:3]](*args, *behind)
            return compiled

        def _behind(self, count: int, constants: dict[str, Any]) -> tuple[Any, ...]:
            """The values of all parameters behind the first ``count``, in the order of the signature."""
            behind = list(self.signature.parameters.values())[count:]
            return tuple(constants.get(p.name, p.default) for p in behind)

        def _see(self, device: int, args: tuple[Any, ...], grid: Any, constants: dict[str, Any]) -> None:
            """Note the lengths of a launch: compile for the other sort, or wait for it, where that is due."""
            lengths = [args[at] for at in self._at]
            sorts = [*map(_sort, lengths)]
            rest = [(a, p.name in COUNTS) for p, a in zip(self.params, args, strict=False) if p.name not in LENGTHS]
            kind = device, *[_sort(a, n) if type(a) is int else _kind(a) for a, n in rest], *constants.items()
            if len(self._lengths) >= MOST_LAUNCHES:
                self._lengths.clear()
            first, thread = self._lengths.setdefault(kind, (lengths, None))
            if sorts != [*map(_sort, first)]:
                if thread is not None:
                    thread.join()
            elif thread is None and lengths != first:
                other = ALIGNED + 1 if first[0] % ALIGNED == 0 else ALIGNED
                given = [other if at in self._at else _blank(a) for at, a in enumerate(args)]
                thread = threading.Thread(target=self._compile, args=(device, given, grid, constants), name=BESIDE)
                self._lengths[kind] = first, thread
                thread.start()

        def _compile(self, device: int, args: list[Any], grid: Any, constants: dict[str, Any]) -> None:
            # What cannot be compiled says so when it is launched.
            with contextlib.suppress(Exception), torch.cuda.device(device):
                self.run(*args, grid=grid, warmup=True, **constants)


def cdiv(n: int, d: int) -> int:
    """⌈n / d⌉. Triton's own is for kernels too, and asks of each argument whether it is a constant of one."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more, for n ≥ 1."""
    return 1 << (n - 1).bit_length()


def jit(fn: Any) -> Any:
    """``triton.jit``; without Triton the function itself."""
    if not HAS_TRITON:
        return fn
    stock = triton.jit(fn, do_not_specialize_on_alignment=COUNTS)
    known = tuple(int(part) for part in triton.__version__.split(".")[:2]) in KNOWN and torch.version.hip is None
    # Triton's interpreter is another class.
    return Kernel(fn) if known and type(stock) is triton.JITFunction else stock


__all__ = ["HAS_TRITON", "cdiv", "jit", "next_power_of_2", "tl", "triton"]
