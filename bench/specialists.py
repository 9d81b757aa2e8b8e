"""The best that others have for an op: Liger, quack, cut-cross-entropy, TRL, and PyTorch's own kernels.

A row of :data:`SPECIALISTS` says whose implementation of which op it is, the package it needs, and what makes it for a
shape: a function of the op's own arguments, or None where the library does not do that shape. Only libraries' public
functions are called, with their defaults. A package that cannot be imported is named in :data:`MISSING`, with the
reason, and its implementations are left out. What PEFT and bitsandbytes run is in ``bench/kernels.py``: that is eager.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench.shapes import Shape
from fastft.kernels.attention import document_lengths, padded_lengths

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


def _liger_add_rms_norm(s: Shape) -> Run:
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    mode = "gemma" if s["offset"] else "llama"
    return lambda x, residual, weight, eps, offset: LigerFusedAddRMSNormFunction.apply(
        x, residual, weight, eps, offset, mode, False
    )


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


def _trl_loss(reduction: str) -> Callable[[Shape], Run]:
    """TRL's chunked head as ``SFTTrainer`` calls it: the tokens that count, in chunks of its own width. For its loss
    the trainer asks for the entropy and the first maximum too, to log them; here only for what the op gives.
    """

    def build(s: Shape) -> Run:
        from trl.kernels import ChunkedLogProbFunction
        from trl.trainer import utils

        columns = utils._CHUNKED_LOGPROB_CHUNK_SIZE

        def run(hidden: Any, weight: Any, bias: Any, labels: Any, softcap: float | None) -> Any:
            counted = labels != -100
            of = (hidden[counted], weight, bias, labels[counted])
            found = ChunkedLogProbFunction.apply(*of, 1.0, columns, softcap, 1.0, ("log_probs",))[0]
            if reduction == "mean":
                return -found.sum() / counted.sum().clamp(min=1)
            return found.new_zeros(labels.shape).masked_scatter(counted, found)

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
    """No soft cap, no sinks, nothing hidden but by causality: no window or chunk that is shorter than the sequence."""
    limits = (s["window"], s.get("chunk"))
    more = s["softcap"] or s.get("sinks") or s.get("hides")
    return not more and not any(limit and limit < s["seq"] for limit in limits)


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
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    window, cap, chunk, hides = s["window"], s["softcap"], s.get("chunk"), s.get("hides")
    lengths = torch.tensor(document_lengths(s["seq"]), device="cuda")
    documents = torch.arange(len(lengths), device="cuda").repeat_interleave(lengths)
    real = torch.tensor(padded_lengths(s["batch"], s["seq"]), device="cuda")

    def seen(b: Any, h: Any, q: Any, k: Any) -> Any:
        shown = q >= k
        shown = shown & (q - k < window) if window else shown
        shown = shown & (q // chunk == k // chunk) if chunk else shown
        shown = shown & (documents[q] == documents[k]) if hides == "documents" else shown
        return shown & (k < real[b]) if hides == "padding" else shown

    def capped(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return cap * torch.tanh(score / cap)

    batch = s["batch"] if hides == "padding" else None
    mask = create_block_mask(seen, batch, None, s["seq"], s["seq"], device="cuda")

    def attend(q: Any, k: Any, v: Any, sinks: Any) -> Any:
        more = {} if sinks is None else {"return_aux": AuxRequest(lse=True)}
        score_mod = capped if cap else None
        found = flex_attention(q, k, v, score_mod, mask, enable_gqa=s["heads"] != s["kv_heads"], **more)
        if sinks is None:
            return found
        out, aux = found  # a sink takes its part of the sum
        return out * torch.sigmoid(aux.lse - sinks[:, None]).unsqueeze(-1).to(out.dtype)

    compiled = torch.compile(attend, dynamic=False)
    return lambda q, k, v, sinks=None, **_: compiled(q, k, v, sinks)


def _varlen(s: Shape) -> tuple[torch.Tensor, int, tuple[int, int]] | None:
    """What FlashAttention needs to know of sequences of different lengths: where they begin, the longest, the window;
    None where it does not do this shape.
    """
    if s["softcap"] or s.get("sinks") or s.get("hides") not in (None, "", "documents"):
        return None
    lengths = document_lengths(s["seq"]) if s.get("hides") else [s["seq"]]
    if chunk := s.get("chunk"):
        lengths = [min(chunk, n - at) for n in lengths for at in range(0, n, chunk)]
    ends = torch.tensor(lengths * s["batch"]).cumsum(0)
    begins = F.pad(ends, (1, 0)).to("cuda", torch.int32)
    return begins, max(lengths), ((s["window"] or 0) - 1, 0)


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def _varlen_flash(s: Shape) -> Run | None:
    from torch.nn.attention.varlen import varlen_attn

    if (found := _varlen(s)) is None:
        return None
    begins, longest, window = found
    known = inspect.signature(varlen_attn).parameters  # torch 2.11 and 2.13 have others
    more: dict[str, Any] = {"window_size": window} if "window_size" in known else {"is_causal": True}
    if "window_size" not in known and s["window"]:
        return None
    more |= {"enable_gqa": True} if "enable_gqa" in known else {}

    def run(q: Any, k: Any, v: Any, **mask: Any) -> Any:
        out = varlen_attn(*map(_in_rows, (q, k, v)), begins, begins, longest, longest, **more)
        return out.unflatten(0, (q.shape[0], -1)).transpose(1, 2)

    return run


def _flash_3(s: Shape) -> Run | None:
    from flash_attn_interface import flash_attn_varlen_func

    if (found := _varlen(s)) is None:
        return None
    begins, longest, window = found

    def run(q: Any, k: Any, v: Any, **mask: Any) -> Any:
        lengths = dict(cu_seqlens_q=begins, cu_seqlens_k=begins, max_seqlen_q=longest, max_seqlen_k=longest)
        out = flash_attn_varlen_func(*map(_in_rows, (q, k, v)), **lengths, causal=True, window_size=window)
        out = out[0] if isinstance(out, tuple) else out
        return out.unflatten(0, (q.shape[0], -1)).transpose(1, 2)

    return run


SPECIALISTS: tuple[Specialist, ...] = (
    Specialist("rms_norm", "Liger", "liger_kernel", _liger_rms_norm),
    Specialist("rms_norm", "quack", "quack", _quack_rms_norm),
    Specialist("rms_norm", "F.rms_norm", "torch", _torch_rms_norm, cuda_only=False),
    Specialist("add_rms_norm", "Liger", "liger_kernel", _liger_add_rms_norm),
    Specialist("layer_norm", "Liger", "liger_kernel", _liger_layer_norm),
    Specialist("glu", "Liger", "liger_kernel", _liger_glu),
    Specialist("glu_packed", "Liger", "liger_kernel", _liger_glu_packed),
    Specialist("rotary", "Liger", "liger_kernel", _liger_rotary),
    Specialist("linear_cross_entropy", "Liger", "liger_kernel", _liger_loss("mean")),
    Specialist("linear_cross_entropy", "cut-cross-entropy", "cut_cross_entropy", _cut_cross_entropy("mean")),
    Specialist("linear_cross_entropy", "TRL", "trl", _trl_loss("mean")),
    Specialist("linear_cross_entropy", "quack", "quack", _quack_loss),
    Specialist("linear_log_prob", "Liger", "liger_kernel", _liger_loss("none")),
    Specialist("linear_log_prob", "cut-cross-entropy", "cut_cross_entropy", _cut_cross_entropy("none")),
    Specialist("linear_log_prob", "TRL", "trl", _trl_loss("none")),
    Specialist("attention", "SDPA cuDNN", "torch", _sdpa("CUDNN_ATTENTION")),
    Specialist("attention", "SDPA flash", "torch", _sdpa("FLASH_ATTENTION")),
    Specialist("attention", "FlexAttention", "torch", _flex_attention),
    Specialist("attention", "varlen flash", "torch.nn.attention.varlen", _varlen_flash),
    Specialist("attention", "FlashAttention 3", "flash_attn_interface", _flash_3),
)
