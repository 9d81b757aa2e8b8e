"""The best that others have for an op: Liger, quack, cut-cross-entropy, and PyTorch's own kernels.

A row of :data:`SPECIALISTS` says whose implementation of which op it is, the package it needs, and what makes it for a
shape: a function of the op's own arguments, or None where the library does not do that shape. Only libraries' public
functions are called, with their defaults. A package that cannot be imported is named in :data:`MISSING`, with the
reason, and its implementations are left out. What PEFT and bitsandbytes run is in ``bench/kernels.py``: that is eager.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench.shapes import Shape

Run = Callable[..., Any]

#: package → why it cannot be imported; filled as packages are asked for.
MISSING: dict[str, str] = {}
_FOUND: set[str] = set()


@dataclass(frozen=True)
class Specialist:
    """``op`` as the makers of ``bench/kernels.py`` name it; ``name`` as tables do."""

    op: str
    name: str
    package: str
    build: Callable[[Shape], Run | None]
    cuda_only: bool = True


def importable(package: str) -> bool:
    """Whether ``package`` can be imported here; if not, :data:`MISSING` says why."""
    if package in _FOUND:
        return True
    if package not in MISSING:
        try:
            importlib.import_module(package)
        except Exception as error:  # an import may fail in any way: a CUDA library, another torch
            MISSING[package] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        else:
            _FOUND.add(package)
    return package in _FOUND


def specialists(op: str, shape: Shape, cuda: bool) -> dict[str, Run]:
    """name → function of ``op``'s arguments. One that cannot be made raises, when it is called, what kept it back."""
    found: dict[str, Run] = {}
    for row in SPECIALISTS:
        if row.op != op or (row.cuda_only and not cuda) or not importable(row.package):
            continue
        try:
            run = row.build(shape)
        except Exception as error:
            run = _raising(error)
        if run is not None:
            found[row.name] = run
    return found


def _raising(error: Exception) -> Run:
    def run(*args: Any, **kwargs: Any) -> Any:
        raise error

    return run


# -- norms -------------------------------------------------------------------------------------------------------------


def _liger_rms_norm(s: Shape) -> Run:
    from liger_kernel.ops import LigerRMSNormFunction

    mode = "gemma" if s["offset"] else "llama"
    return lambda x, weight, eps, offset: LigerRMSNormFunction.apply(x, weight, eps, offset, mode)


def _quack_rms_norm(s: Shape) -> Run:
    from quack import rmsnorm

    return lambda x, weight, eps, offset: rmsnorm(x, weight, eps=eps, weight_offset=offset)


def _torch_rms_norm(s: Shape) -> Run | None:
    if s["offset"]:
        return None
    return lambda x, weight, eps, offset: F.rms_norm(x, x.shape[-1:], weight, eps)


def _liger_layer_norm(s: Shape) -> Run:
    from liger_kernel.ops import LigerLayerNormFunction

    return lambda x, weight, bias, eps: LigerLayerNormFunction.apply(x, weight, bias, eps)


# -- gated MLPs --------------------------------------------------------------------------------------------------------


def _liger_glu(s: Shape) -> Run | None:
    from liger_kernel.ops import LigerGELUMulFunction, LigerSiLUMulFunction

    function = {"silu": LigerSiLUMulFunction, "gelu_tanh": LigerGELUMulFunction}.get(s["activation"])
    return None if function is None else lambda gate, up, kind: function.apply(gate, up)


def _liger_glu_packed(s: Shape) -> Run | None:
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction, LigerGELUMulFunction

    if s["activation"] == "silu":
        # Its backward gives a gradient of rows, whatever it was given.
        return lambda gate_up, kind: LigerFusedGateUpSiLUMulFunction.apply(gate_up.flatten(0, -2)).view(
            *gate_up.shape[:-1], -1
        )
    if s["activation"] == "gelu_tanh":
        return lambda gate_up, kind: LigerGELUMulFunction.apply(*gate_up.chunk(2, -1))
    return None


# -- rotary ------------------------------------------------------------------------------------------------------------


def _liger_rotary(s: Shape) -> Run:
    from liger_kernel.ops import LigerRopeFunction

    return lambda q, k, cos, sin, rotary_dim: LigerRopeFunction.apply(q, k, cos, sin)


# -- the loss ----------------------------------------------------------------------------------------------------------


def _liger_loss(reduction: str) -> Callable[[Shape], Run]:
    def build(s: Shape) -> Run:
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

        def run(hidden: Any, weight: Any, bias: Any, labels: Any, softcap: float | None) -> Any:
            # class weights, ignored label, z-loss, label smoothing: none
            loss = LigerFusedLinearCrossEntropyFunction.apply(
                hidden, weight, labels, bias, None, -100, 0.0, 0.0, reduction, softcap
            )[0]
            return loss if reduction == "mean" else -loss

        return run

    return build


def _cut_cross_entropy(reduction: str) -> Callable[[Shape], Run]:
    def build(s: Shape) -> Run:
        from cut_cross_entropy import linear_cross_entropy

        def run(hidden: Any, weight: Any, bias: Any, labels: Any, softcap: float | None) -> Any:
            loss = linear_cross_entropy(hidden, weight, labels, softcap=softcap, reduction=reduction)
            return loss if reduction == "mean" else -loss

        return run

    return build


def _quack_loss(s: Shape) -> Run | None:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    if s["softcap"]:
        return None
    return lambda hidden, weight, bias, labels, softcap: chunked_linear_cross_entropy(
        hidden, weight, labels, reduction="mean"
    )


# -- attention ---------------------------------------------------------------------------------------------------------


def plainly_causal(s: Shape) -> bool:
    """No soft cap, and no window that is shorter than the sequence."""
    return not s["softcap"] and not (s["window"] and s["window"] < s["seq"])


def _sdpa(backend: str) -> Callable[[Shape], Run | None]:
    def build(s: Shape) -> Run | None:
        if not plainly_causal(s):
            return None
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def run(q: Any, k: Any, v: Any, **mask: Any) -> Any:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        return run

    return build


def _flex_attention(s: Shape) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window, cap = s["window"], s["softcap"]

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (q - k < window) if window else q >= k

    def capped(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return cap * torch.tanh(score / cap)

    mask = create_block_mask(seen, None, None, s["seq"], s["seq"], device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v, **_: compiled(
        q, k, v, score_mod=capped if cap else None, block_mask=mask, enable_gqa=s["heads"] != s["kv_heads"]
    )


SPECIALISTS: tuple[Specialist, ...] = (
    Specialist("rms_norm", "Liger", "liger_kernel", _liger_rms_norm),
    Specialist("rms_norm", "quack", "quack", _quack_rms_norm),
    Specialist("rms_norm", "F.rms_norm", "torch", _torch_rms_norm, cuda_only=False),
    Specialist("layer_norm", "Liger", "liger_kernel", _liger_layer_norm),
    Specialist("glu", "Liger", "liger_kernel", _liger_glu),
    Specialist("glu_packed", "Liger", "liger_kernel", _liger_glu_packed),
    Specialist("rotary", "Liger", "liger_kernel", _liger_rotary),
    Specialist("linear_cross_entropy", "Liger", "liger_kernel", _liger_loss("mean")),
    Specialist("linear_cross_entropy", "cut-cross-entropy", "cut_cross_entropy", _cut_cross_entropy("mean")),
    Specialist("linear_cross_entropy", "quack", "quack", _quack_loss),
    Specialist("linear_log_prob", "Liger", "liger_kernel", _liger_loss("none")),
    Specialist("linear_log_prob", "cut-cross-entropy", "cut_cross_entropy", _cut_cross_entropy("none")),
    Specialist("attention", "SDPA cuDNN", "torch", _sdpa("CUDNN_ATTENTION")),
    Specialist("attention", "SDPA flash", "torch", _sdpa("FLASH_ATTENTION")),
    Specialist("attention", "FlexAttention", "torch", _flex_attention),
)
