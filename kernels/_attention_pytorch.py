"""What computes attention where its Triton kernels do not: cuDNN and FlashAttention as they come with PyTorch, its
kernel for CPUs, and the formulas in PyTorch. ``_attention_routes.py`` says when; ``attention.py`` has the maths.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
import torch.nn.functional as F

from fastft.kernels._attention_mask import LOWEST, hide
from fastft.kernels._attention_routes import Call

# ---------------------------------------------------------------- on a GPU

#: Backends whose results are in memory of their own, so that none of ours is there beside it.
GIVEN = ("cudnn", "varlen")


def forward_given(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if call.backend == "cudnn":
        got, stats, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, call.causal, False, scale=call.scale
        )
        return _as_bshd(got), stats.reshape(call.batch, call.heads, call.q_length)
    lengths, options = _flash_arguments(call, q)
    got, stats, *_ = torch.ops.aten._flash_attention_forward(*map(_in_rows, (q, k, v)), *lengths, False, **options)
    return _out_of_rows(got, call.batch), stats.unflatten(1, (call.batch, -1)).transpose(0, 1).contiguous()


def backward_given(
    call: Call,
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> list[torch.Tensor]:
    if call.backend == "cudnn":
        seed = torch.empty((), dtype=torch.int64, device=q.device)  # of a dropout that is not there
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            _as_bshd(do), q, k, v, out, lse.unsqueeze(-1), seed, seed, None, None, None,
            call.q_length, call.k_length, 0.0, call.causal, scale=call.scale,
        )  # fmt: skip
        return [_as_bshd(grad) for grad in grads]
    lengths, options = _flash_arguments(call, q)
    # The random state of a dropout that is not there.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    rows = (*map(_in_rows, (do, q, k, v, out)), lse.transpose(0, 1).flatten(1).contiguous())
    grads = torch.ops.aten._flash_attention_backward(*rows, *lengths, *state, **options)
    return [_out_of_rows(grad, call.batch) for grad in grads]


def _as_bshd(x: torch.Tensor) -> torch.Tensor:
    """``x`` where it lies in memory as ``[B, S, H, D]``, itself; else such a copy."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """``[B, H, S, D]`` → ``[B · S, H, D]``."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _out_of_rows(x: torch.Tensor, batch: int) -> torch.Tensor:
    """``[B · S, H, D]`` → ``[B, H, S, D]``, which lies in memory as before."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


#: The last ``start`` that :func:`_cu_seqlens` was asked about, its version, and the answer.
_LAST: list[Any] = [lambda: None, 0, None]


def _cu_seqlens(call: Call, q: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Where documents begin in the rows of all sequences, int32 ``[documents + 1]``, and how long the longest is. Their
    number is a size, which the CPU has to wait for: once for all layers that are given one mask.
    """
    tokens = call.batch * call.q_length
    if call.start is None:
        return torch.arange(0, tokens + 1, call.q_length, dtype=torch.int32, device=q.device), call.q_length
    if _LAST[0]() is not call.start or _LAST[1] != call.start._version:
        order = torch.arange(call.q_length, dtype=torch.int32, device=q.device)
        (first,) = (call.start == order).flatten().nonzero(as_tuple=True)
        cu_seqlens = F.pad(first.to(torch.int32), (0, 1), value=tokens)
        _LAST[:] = weakref.ref(call.start), call.start._version, (cu_seqlens, int(cu_seqlens.diff().max()))
    return _LAST[2]  # type: ignore[no-any-return]


def _flash_arguments(call: Call, q: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What FlashAttention's forward and backward in PyTorch take alike: lengths, dropout, causality; scale, window."""
    cu_seqlens, longest = _cu_seqlens(call, q)
    window = {"window_size_left": call.window - 1, "window_size_right": 0}
    return (cu_seqlens, cu_seqlens, longest, longest, 0.0, not call.window), {"scale": call.scale, **window}


# ---------------------------------------------------------------- on a CPU


def forward_cpu(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    bias = call.bias(q) if not _only_causal(call) else None
    got, stats = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q,
        k.repeat_interleave(call.group, 1),
        v.repeat_interleave(call.group, 1),
        0.0,
        call.causal and bias is None,
        attn_mask=bias,
        scale=call.scale,
    )
    return out.copy_(got), lse.copy_(stats)


def backward_cpu(
    call: Call,
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    bias = call.bias(q) if not _only_causal(call) else None
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k.repeat_interleave(call.group, 1), v.repeat_interleave(call.group, 1), out, lse, 0.0,
        call.causal and bias is None, attn_mask=bias, scale=call.scale,
    )  # fmt: skip
    if dq.numel():
        dq.copy_(grads[0])
    if dk.numel():
        dk.copy_(group_sum(grads[1], call.group))
        dv.copy_(group_sum(grads[2], call.group))
    return dq, dk, dv


def _only_causal(call: Call) -> bool:
    """Causal from the first query and key, and nothing else: what PyTorch's own ``is_causal`` says."""
    bare = call.start is None and call.keep is None and call.dense is None and not (call.window or call.chunk)
    return bare and (not call.causal or call.q_length == call.k_length)


def group_sum(x: torch.Tensor, group: int) -> torch.Tensor:
    """``[B, Hq, S, D]`` → ``[B, Hk, S, D]``: the gradient of one key head is the sum over its query heads."""
    return x.unflatten(1, (-1, group)).sum(2, dtype=torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------- formulas


def scores(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores before the mask, and tanh(s / softcap), which their derivative needs."""
    s = (q @ k.transpose(-1, -2)) * scale
    if not softcap:
        return s, None
    tanh = torch.tanh(s / softcap)
    return tanh * softcap, tanh


def forward_math(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formulas of ``attention.py``, in PyTorch."""
    s, _ = _masked_scores(call, q, k, lse.dtype)
    every = s
    if call.sinks is not None:
        every = torch.cat((s, call.sinks.to(lse.dtype)[:, None, None].expand(*s.shape[:-1], 1)), -1)
    blind = every.amax(-1) == -math.inf
    lse.copy_(torch.logsumexp(every, -1).masked_fill(blind, math.inf))
    p = _dropped(_weights(call, s, lse), call.kept(), call.dropout_p)
    return out.copy_(p @ v.to(lse.dtype).repeat_interleave(call.group, 1)), lse


def backward_math(
    call: Call,
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    dsinks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The formulas of ``attention.py``, in PyTorch."""
    compute, keep = lse.dtype, call.kept()
    s, tanh = _masked_scores(call, q, k, compute)
    p = _weights(call, s, lse)
    do = do.to(compute)
    delta = (do * out.to(compute)).sum(-1, keepdim=True)
    dp = _dropped(do @ v.to(compute).repeat_interleave(call.group, 1).transpose(-1, -2), keep, call.dropout_p)
    ds = p * (dp - delta)
    if tanh is not None:
        ds = ds * (1 - tanh * tanh)
    if dq.numel():
        dq.copy_(ds @ k.to(compute).repeat_interleave(call.group, 1) * call.scale)
    if dk.numel():
        dk.copy_(group_sum(ds.transpose(-1, -2) @ q.to(compute), call.group) * call.scale)
        dv.copy_(group_sum(_dropped(p, keep, call.dropout_p).transpose(-1, -2) @ do, call.group))
    if call.sinks is not None and dsinks.numel():
        weight = torch.exp(call.sinks.to(compute)[:, None] - lse)
        dsinks.copy_(-(weight * delta.squeeze(-1)).sum((0, 2)))
    return dq, dk, dv


def _masked_scores(
    call: Call, q: torch.Tensor, k: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    s, tanh = scores(q.to(dtype), k.to(dtype).repeat_interleave(call.group, 1), call.scale, call.softcap)
    return hide(hide(s, call.mask(q.device)), call.dense), tanh


def _weights(call: Call, s: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The weights of scores ``[B, Hq, Sq, Sk]`` with logsumexp ``[B, Hq, Sq]``."""
    p, lse = torch.exp(s - lse.unsqueeze(-1)), lse.unsqueeze(-1)
    if call.dense is None or call.dense.dtype == torch.bool:
        return p
    # A finite mask that hides a row everywhere: beside such numbers the logarithm of a sum is lost.
    return torch.where((lse < LOWEST / 2) & (s > -math.inf), 1 / s.shape[-1], p)


def _dropped(x: torch.Tensor, keep: torch.Tensor | None, p: float) -> torch.Tensor:
    return x if keep is None else (x / (1 - p)).masked_fill(~keep, 0.0)
