"""What every op's file is made of: raw ops in the dispatcher, and one record that says all there is to know about the
op.

The life of an op, in the order its file has it: the maths, the reference, the Triton kernels, the two raw ops
(``torch.ops.fastft.<name>`` and
``torch.ops.fastft.<name>_backward``), the ``autograd.Function`` that joins them, the differentiable function that a
rewritten graph calls, and the :class:`Op` record.

Raw ops are functional (no argument is written to), return what the backward needs as explicit outputs, and are opaque
to Inductor. They are defined with ``torch.library.Library``, whose calls cost less than those of
``torch.library.custom_op``.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import functools
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from fastft.kernels._inputs import Inputs, Model

log = logging.getLogger("fastft")

LIBRARY = torch.library.Library("fastft", "FRAGMENT")

#: True when Triton runs kernels in its interpreter, on CPU tensors: how the tests run the kernels themselves without
#: a GPU.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


#: Raw op → why its Triton kernel does not run in this process: its PyTorch body does.
FAILED: dict[str, str] = {}
_PLAIN: contextvars.ContextVar[bool] = contextvars.ContextVar("plain", default=False)
_RESCUE = False


def rescue(wanted: bool) -> None:
    """Whether an op whose kernel raises (it cannot be compiled for this GPU, needs more shared memory than there is,
    no C compiler is found) runs its PyTorch body instead, from then on. The backend sets this unless ``strict``; ops
    that are called by themselves raise.
    """
    global _RESCUE
    _RESCUE = wanted


def use_triton(x: torch.Tensor) -> bool:
    """Whether an op's body launches its Triton kernel for ``x`` (CUDA, or the interpreter) or runs its reference (any
    other CPU tensor, and where the kernel failed).
    """
    return (x.is_cuda or INTERPRET) and not _PLAIN.get()


@functools.cache
def compat() -> Any:
    """What torch does not promise to keep. Loaded with the first call: Dynamo comes along."""
    from fastft import _torch_compat

    return _torch_compat


def raw_op(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define ``torch.ops.fastft.<name>`` from ``schema`` (``"rms_norm(Tensor x, ...) -> (Tensor, Tensor)"``).

    ``run`` is the body on every device; ambient autocast is switched off inside it, since it would turn fp32 maths
    into bf16 silently. ``fake`` gives the outputs' shapes, dtypes and strides. Returns the op's default overload.
    """
    name = schema.split("(", 1)[0].strip()

    @functools.wraps(run)
    def body(*args: Any) -> Any:
        # bitsandbytes' weights are of a class that Python is asked about whatever is done with them.
        with compat().plain_tensors():
            return placed(args)

    def placed(args: tuple[Any, ...]) -> Any:
        first = next((a for a in args if isinstance(a, torch.Tensor)), None)
        device = "cpu" if first is None else first.device.type
        autocast = torch.is_autocast_enabled(device)
        there = first is None or not first.is_cuda or first.get_device() == compat().current_device()
        if there and not autocast:
            return guarded(first, args)
        with contextlib.ExitStack() as stack:
            if first is not None and not there:
                # Triton launches on the current device, which need not be the tensors' (a model split over several).
                stack.enter_context(torch.cuda.device(first.device))
            if autocast:
                stack.enter_context(torch.autocast(device, enabled=False))
            return guarded(first, args)

    def guarded(first: torch.Tensor | None, args: tuple[Any, ...]) -> Any:
        if name not in FAILED:
            try:
                return run(*args)
            except Exception as error:
                if not (first is not None and use_triton(first) and rescued(name, error)):
                    raise
        # An op is functional: what a kernel left half done is in tensors that nobody has seen.
        token = _PLAIN.set(True)
        try:
            return run(*args)
        finally:
            _PLAIN.reset(token)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, body, "CPU")
    LIBRARY.impl(name, body, "CUDA")
    torch.library.register_fake(f"fastft::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fastft, name).default


def failed(name: str) -> bool:
    """Whether an op's kernel does not run in this process."""
    return name in FAILED


def rescued(name: str, error: Exception) -> bool:
    """Note that an op's kernel failed; False where its exception is to be raised."""
    from fastft.fallback import is_ours, said

    if not _RESCUE or not is_ours(error):
        return False
    FAILED[name] = said(error)
    log.warning("kernel %s failed, PyTorch runs in its place: %s", name, FAILED[name], exc_info=error)
    return True


@dataclass(frozen=True)
class Reason:
    """Why a site was left as it was. ``code`` is stable and short (``"dtype"``); ``text`` is one sentence for a
    person, with what was found.
    """

    code: str
    text: str

    def __str__(self) -> str:
        return self.text


class Recompute(enum.Enum):
    """What the backward should do about an op's outputs when the user allows no recomputation of whole layers."""

    CHEAP = "cheap"  # memory-bound: computing it again costs less than keeping it
    KEEP = "keep"  # matmuls, attention: keep what it saved


@dataclass(frozen=True)
class Cost:
    """Sympy expressions in the op's own symbols. FLOPs; bytes read and written; bytes kept for the backward."""

    flops: sympy.Expr
    bytes_moved: sympy.Expr
    bytes_kept: sympy.Expr


@dataclass(frozen=True)
class Op:
    """Everything about one op.

    ``call`` is what a rewritten graph calls: differentiable, functional, a module-level function (torch's caches find
    it by its name).
    ``reference`` has the same signature and plain PyTorch inside: what tests and benchmarks compare with.
    ``supported`` takes the same arguments (fake tensors will do) and returns None, or the :class:`Reason` the op
    cannot run.
    ``cost`` takes the same arguments too, or sympy symbols where its docstring says so.
    ``sizes(model)``: the sizes with which training such a model calls it; none if it does not.
    ``inputs(new, **sizes)``: the arguments of such a call. Benchmarks and tuning make their calls by these two.
    ``stock``: what stock libraries run in its place, where that is not spelled as the reference is; it takes the
    arguments that ``inputs`` makes, and rounds where they round.
    ``variants``: more ways to compute it, beside ``call`` and ``reference``: name → what is called, and its legality.
    ``default``: the name of ``call`` among the variants. ``by_name_only``: those that are never taken unless they are
    asked for, as they are not exact.
    """

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    supported: Callable[..., Reason | None]
    raw: tuple[str, ...]
    recompute: Recompute
    sizes: Callable[[Model], Iterable[dict[str, Any]]]
    inputs: Callable[..., Inputs]
    cost: Callable[..., Cost] | None = None
    stock: Callable[..., Any] | None = None
    variants: dict[str, tuple[Callable[..., Any], Callable[..., Reason | None]]] = field(default_factory=dict)
    default: str = "triton"
    by_name_only: tuple[str, ...] = ()


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Enter ``op`` in the registry; a name can be taken once."""
    if op.name in OPS:
        raise ValueError(f"an op named {op.name!r} is registered already, by {OPS[op.name].call.__module__}")
    OPS[op.name] = op
    return op


def check_dtypes(*tensors: torch.Tensor | None, allowed: Sequence[torch.dtype] = ()) -> Reason | None:
    """A ``dtype`` reason when a tensor's dtype is not one the kernels know (default: fp32, fp16, bf16; fp64 runs on
    the CPU's reference).
    """
    known = tuple(allowed) or (torch.float32, torch.float16, torch.bfloat16)
    for t in tensors:
        if t is None or t.dtype in known or (t.dtype == torch.float64 and t.device.type == "cpu"):
            continue
        return Reason(
            "dtype", f"dtype {t.dtype} is not one of {', '.join(str(d).removeprefix('torch.') for d in known)}"
        )
    return None
