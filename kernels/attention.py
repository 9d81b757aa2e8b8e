"""Scaled dot-product attention with a structured mask and un-repeated keys and values (grouped-query attention).

Maths, for each batch b, query head h and its key head h' = h // (Hq / Hk), with s = scale · q kᵀ::

    s ← softcap · tanh(s / softcap)     (softcap > 0)
    s ← −∞ where the mask hides         p = softmax(s)         out = p v

The mask is a conjunction; a query q and a key k (positions in the sequence) must pass every part:

* ``causal``: k ≤ q;
* ``window`` w > 0: k > q − w (Mistral, Gemma);
* ``chunk`` c > 0: ⌊(k − l) / c⌋ = ⌊(q − l) / c⌋, l being the sequence's left padding (Llama 4);
* ``padding`` ``[B, Sk]``: key k is no padding;
* ``positions`` ``[B, S]``: q and k lie in one document; a new one starts where ``diff(position_ids) != 1`` (packing);
* ``dense``, broadcastable to ``[B, Hq, Sq, Sk]``: boolean (True: visible), or additive.

A query that sees no key gives 0, as PyTorch's own attention does. Where hidden scores were set to one finite number
(``blind="filled"``), or had one added (``"added"``), softmax gives all keys the same weight, and it gives the mean of
all values. The two differ in whether a gradient reaches q and k from there.

``sinks`` ``[Hq]`` are learned scores, one for each head: they take part in the softmax and have no value (gpt-oss).
Dropout keeps a weight with probability 1 − p and divides it by that. Which ones are kept is a function of a seed and
of the weight's place (:func:`kept`), so that the backward draws the same again and nothing is saved.

Except for dense, and for padding between real tokens, every mask lets a query see one interval of keys: from
``start(q)``, which never decreases, to q itself or to the sequence's ``end``. So a key is seen by the queries before
``stop(k)``, which never decreases either. The kernels skip every tile outside these intervals and mask only tiles on
their edges: keys of padding cost nothing, and packed documents cost what they would cost apart. Queries of padding on
the right see what is before them, in PyTorch's attention as here: forward they cost what others do. No gradient comes
to them where the loss leaves them out, and what is behind the last query that has one is skipped in the backward.

What the padding mask and the positions hold is known on the device only: ``attention_mask`` looks once for a step, for
all layers. Of packed documents that is all: the CPU needs to know nothing about them, and waits for nothing. Of a
padding mask it says on the CPU which kind it is. That answer is on its way while the CPU launches what comes before the
first attention, which waits for it: an event of the step's very beginning, no synchronisation of what was launched
since. When padding hides nothing, attention is plainly causal and goes to cuDNN, which plain Triton does not match on
Hopper, unless sizes change so often that its plans for them are not worth their time; everything else goes to the
Triton kernels here. ``bench/kernels.py`` times both.

Backward, from the saved out and logsumexp L, with do the gradient of out (FlashAttention 2,
https://arxiv.org/abs/2307.08691, section 3.1)::

    p = exp(s − L)      dv = pᵀ do      dp = do vᵀ      δ = Σ_d do · out      ds = p (dp − δ)

With dropout's factors m (0 or 1 / (1 − p)), ``dv = (p m)ᵀ do`` and ``dp = m (do vᵀ)``: δ stays what it is, since
``Σ_k p dp`` is ``do · out`` again. A sink z has no value and therefore ``dz = −Σ exp(z − L) δ``, over all queries.

ds is taken times ``1 − tanh²(s / softcap)`` with a softcap; then ``dq = scale · ds k``, ``dk = scale · dsᵀ q``, summed
over the query heads of a key head. The probabilities are never in memory. dq has its own kernel, dk and dv another that
owns a tile of keys for all query heads of the group: no atomics.

Shapes: q ``[B, Hq, Sq, D]``, k ``[B, Hk, Sk, D]``, v ``[B, Hk, Sk, Dv]``, out ``[B, Hq, Sq, Dv]``, of any strides; out
and the gradients lie in memory as ``[B, S, H, D]``, which is what the projections around attention read and write.
Saved: q, k, v, out, and L, one fp32 number for each query and head. Whoever computes a forward, anyone can compute its
backward: who is taken may have changed (a size that now has a plan, a user's switches of PyTorch's attention).

Beside the op, its reference and its launches, which are here: ``_attention_mask.py`` has the mask and dropout's draw,
``_attention_routes.py`` what is supported and who computes a call, ``_attention_triton.py`` the Triton kernels, and
``_attention_pytorch.py`` what PyTorch computes in their place.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from fastft.kernels import _attention_pytorch as pytorch
from fastft.kernels._attention_mask import (
    LOWEST,
    Found,
    arrived,
    attention_mask,
    hide,
    kept,
    new_seed,
    seen_from,
    threshold,
    visible,
)
from fastft.kernels._attention_routes import (
    Call,
    Options,
    attention_flex,
    attention_sdpa,
    flex_supported,
    sdpa_supported,
    supported,
    varlen_supported,
)
from fastft.kernels._attention_triton import _delta_kernel, _dkdv_kernel, _dq_kernel, _forward_kernel
from fastft.kernels._config import SHARED_BYTES, Config, Space, crowded
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import INTERPRET, Cost, Op, Recompute, raw_op, register
from fastft.kernels._rows import SAME_SUMS, size
from fastft.kernels._triton import cdiv, next_power_of_2

# ---------------------------------------------------------------- reference


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: int = 0,
    chunk: int = 0,
    padding: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    dense: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    softcap: float = 0.0,
    mask: Found | None = None,
    sinks: torch.Tensor | None = None,
    blind: str = "zero",
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain PyTorch, differentiable; fp32 inside (fp64 for fp64). Arguments as :func:`attention`'s."""
    start = None
    if mask is not None:
        start, _, _, padding, _ = mask
        start, chunk = (start, 0) if start.shape[1] == q.shape[2] else (None, chunk)
    lengths = q.shape[2], k.shape[2]
    shown = visible(*lengths, q.device, causal=causal, window=window, chunk=chunk, padding=padding, positions=positions)
    if start is not None:
        shown = seen_from(start, k.shape[2]) if shown is None else shown & seen_from(start, k.shape[2])
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    s = pytorch.scores(
        q.to(compute),
        k.to(compute).repeat_interleave(group, 1),
        q.shape[-1] ** -0.5 if scale is None else scale,
        softcap,
    )[0]
    for hides in (shown, dense):
        if hides is None or hides.dtype != torch.bool or blind == "zero":
            s = hide(s, hides)
        elif blind == "filled":
            s = s.masked_fill(~hides, LOWEST)
        else:
            s = s + torch.zeros_like(hides, dtype=compute).masked_fill(~hides, LOWEST)
    if sinks is not None:
        s = torch.cat((s, sinks.to(compute)[:, None, None].expand(*s.shape[:-1], 1)), -1)
    p = torch.softmax(s, -1).masked_fill(s.amax(-1, keepdim=True) == -math.inf, 0.0)[..., : k.shape[2]]
    if dropout_p:
        batch, heads, q_length, k_length = p.shape
        keep = kept(new_seed(q) if seed is None else seed, batch, heads, q_length, k_length, dropout_p)
        p = torch.where(keep, p / (1 - dropout_p), 0.0)
    return (p @ v.to(compute).repeat_interleave(group, 1)).to(q.dtype)


# ---------------------------------------------------------------- configuration

#: Compute capabilities with 227 KiB of shared memory for a block (Hopper, data-centre Blackwell): for these are the
#: larger tiles.
ROOMY = {(9, 0), (10, 0), (10, 3)}


def _tiles(kernel: str, d: int, dtype: torch.dtype, roomy: bool) -> dict[str, int]:
    """Queries and keys in a tile, warps and pipeline stages of ``kernel`` ("forward", "dq", "dkdv").

    ``d``: size of a head, rounded up to a power of two. ``roomy``: whether the GPU is one of :data:`ROOMY`.
    """
    if INTERPRET:  # several tiles at the tests' small sizes
        m, n, warps, stages = 32, 16, 4, 1
    elif dtype == torch.float32:  # no tensor cores, and twice the shared memory
        m, n, warps, stages = (64, 64, 4, 1) if d <= 64 else (32, 32, 8, 1) if d <= 128 else (32, 16, 8, 1)
        if not roomy:
            m, n = (32, 16) if d <= 128 else (16, 16)
    elif not roomy:
        m, n, warps, stages = (64, 32, 4, 2) if d <= 128 else (32, 32, 8, 1)
    elif d > 128:
        m, n, warps, stages = {"forward": (128, 64, 8, 2), "dq": (64, 32, 4, 2), "dkdv": (64, 64, 8, 1)}[kernel]
    elif d > 64:
        m, n, warps, stages = {"forward": (64, 64, 4, 3), "dq": (64, 64, 4, 2), "dkdv": (32, 64, 4, 3)}[kernel]
    else:
        m, n, warps, stages = {"forward": (128, 64, 8, 3), "dq": (64, 64, 4, 3), "dkdv": (64, 64, 4, 3)}[kernel]
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


def _roomy(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in ROOMY


#: What a kernel's speed depends on besides device and dtype: batch × heads, and lengths; sizes of a head, rounded up to
#: powers of two; what of the mask it looks at.
_TOKENS = ("programs", "q_length", "k_length")
_SIZES = ("d", "d_v", "group", "causal", "window", "chunk", "start", "end", "holes", "dense", "softcap", "dropout")


def _space(kernel: str) -> Space:
    def heuristic(device: torch.device, dtype: torch.dtype, *sizes: Any) -> Config:
        return _tiles(kernel, max(sizes[3], sizes[4]), dtype, _roomy(device))

    def legal(config: Config, device: torch.device, dtype: torch.dtype, *sizes: Any) -> str | None:
        m, n, warps, stages = (config[name] for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
        both = sizes[3] + sizes[4]
        # Less than a fourth of a 16 x 32 tile for a warp.
        if m * n < 128 * warps:
            return f"{m} x {n} scores for {warps} warps"
        # What stays in shared memory, and what streams through it in `stages` steps.
        own, streamed = (n, m) if kernel == "dkdv" else (m, n)
        shared = (own + stages * streamed) * both * dtype.itemsize
        if shared > SHARED_BYTES:
            return f"{shared} bytes of shared memory; {SHARED_BYTES} there are"
        # Sums in fp32, and a tile of scores with its exponentials.
        sums = {"forward": own * sizes[4], "dq": own * sizes[3], "dkdv": own * both}[kernel]
        return crowded(sums + 2 * m * n, warps)

    values = {
        "BLOCK_M": (16, 32, 64, 128),
        "BLOCK_N": (16, 32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3, 4),
    }
    return Space(f"attention.{kernel}", values, heuristic, tokens=_TOKENS, sizes=_SIZES, legal=legal)


CONFIGS = {kernel: _space(kernel) for kernel in ("forward", "dq", "dkdv")}


# ---------------------------------------------------------------- launchers


def _bshd(b: int, h: int, s: int, d: int, like: torch.Tensor) -> torch.Tensor:
    """An uninitialised ``[b, h, s, d]`` that lies in memory as ``[b, s, h, d]``."""
    return like.new_empty((b, s, h, d)).transpose(1, 2)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """``x`` with elements of a head side by side, which the kernels read without a stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _or(x: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """``x``, or a pointer that the kernel does not look at."""
    return stand_in if x is None else x


def _constants(call: Call, kernel: str, q: torch.Tensor) -> dict[str, Any]:
    """What a kernel is specialised on."""
    d = next_power_of_2(max(call.d, 16))
    d_v = next_power_of_2(max(call.d_v, 16))
    dense = 0 if call.dense is None else 1 if call.dense.dtype == torch.bool else 2
    start, end = call.start is not None, call.keep is not None and not call.holes
    tiles = CONFIGS[kernel](
        q.device, q.dtype, call.batch * call.heads, call.q_length, call.k_length, d, d_v, call.group,
        call.causal, call.window, call.chunk, start, end, call.holes, dense, bool(call.softcap),
        bool(call.dropout_p),
    )  # fmt: skip
    own = {}
    if kernel != "forward":
        own["HAS_ASKED"] = _looks_at_gradients(call)
    else:
        own["HAS_SINKS"] = call.sinks is not None
        # e^±60, times many keys and a large v, is in reach of fp32 and of bf16; e^±10 of fp16.
        capped = 0 < call.softcap <= (10 if q.dtype == torch.float16 else 60)
        own["BOUNDED"] = capped and call.sinks is None and dense != 2
    return {
        "D": call.d, "DV": call.d_v, "GROUP": call.group,
        "CAUSAL": call.causal, "WINDOW": call.window, "CHUNK": call.chunk,
        "HAS_START": start, "HAS_END": end, "HAS_PADDING": call.holes, "DENSE": dense, "SOFTCAP": call.softcap,
        **own, "DROP": threshold(call.dropout_p), "KEPT": 1 / (1 - call.dropout_p),
        "BLOCK_D": d, "BLOCK_DV": d_v, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        **tiles,
    }  # fmt: skip


def _looks_at_gradients(call: Call) -> bool:
    """Whether the backward leaves out what comes behind the last query that has a gradient: where there is padding,
    which no loss is for, its queries have none.
    """
    return call.keep is not None


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if q.numel() == 0 or v.shape[2] * v.shape[3] == 0:  # nothing to compute, or nothing to see
        out, lse = _forward_fake(q, k, v, *mask)
        return out.zero_(), lse.fill_(math.inf)
    q, k, v = _unit(q), _unit(k), _unit(v)
    call = Call(q, k, v, *mask)
    if call.backend in pytorch.GIVEN:
        return pytorch.forward_given(call, q, k, v)
    out, lse = _forward_by(call, q, k, v, *_forward_fake(q, k, v, *mask))
    if call.means:  # queries of padding, which nobody looks at: the kernels need not know them
        mean = v.mean(2, keepdim=True, dtype=lse.dtype).repeat_interleave(call.group, 1)
        out.copy_(torch.where(_blind(lse), mean, out))
    return out, lse


def _blind(lse: torch.Tensor) -> torch.Tensor:
    """``[B, Hq, Sq, 1]``: the queries that saw no key."""
    return (lse == math.inf).unsqueeze(-1)


def _forward_by(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if call.backend == "cpu":
        return pytorch.forward_cpu(call, q, k, v, out, lse)
    if call.backend == "math":
        return pytorch.forward_math(call, q, k, v, out, lse)
    constants = _constants(call, "forward", q)
    tiles = cdiv(call.q_length, constants["BLOCK_M"])
    dense, dense_strides = call.dense_operand(q)
    _forward_kernel[(tiles * call.batch * call.heads,)](
        q, k, v, _or(call.start, q), _or(call.end, q), _or(call.keep, q), dense, _or(call.sinks, q), _or(call.seed, q),
        out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *dense_strides,
        call.heads, call.q_length, call.k_length, tiles, call.scale, **constants,
    )  # fmt: skip
    return out, lse


def _forward_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    b, h, s, _ = q.shape
    lse = q.new_empty((b, h, s), dtype=torch.promote_types(q.dtype, torch.float32))
    return _bshd(b, h, s, v.shape[3], q), lse


def _backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    want_q: bool,
    want_kv: bool,
    want_sinks: bool,
    *mask: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    results = do, q, k, v, out, lse, want_q, want_kv, want_sinks, *mask
    if out.numel() == 0 or k.shape[2] == 0 or not (want_q or want_kv or want_sinks):
        dq, dk, dv, dsinks = _backward_fake(*results)
        return dq.zero_(), dk.zero_(), dv.zero_(), dsinks.zero_()
    do, q, k, v = _unit(do), _unit(q), _unit(k), _unit(v)
    call = Call(q, k, v, *mask)
    if call.backend in pytorch.GIVEN:  # of calls without sinks
        grads = zip(pytorch.backward_given(call, do, q, k, v, out, lse), (want_q, want_kv, want_kv), strict=True)
        dq, dk, dv = (grad if want else q.new_empty(0) for grad, want in grads)
        return dq, dk, dv, q.new_empty(0)
    dq, dk, dv, dsinks = _backward_fake(*results)
    dq, dk, dv = _backward_by(call, do, q, k, v, out, lse, dq, dk, dv, dsinks)
    if call.means and want_kv:
        mean = torch.where(_blind(lse), do, 0.0).sum(2, keepdim=True, dtype=lse.dtype) / call.k_length
        dv.copy_(dv + pytorch.group_sum(mean, call.group))
    return dq, dk, dv, dsinks


def _backward_by(
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
    want_q, want_kv = dq.numel() > 0, dk.numel() > 0
    if call.backend == "cpu":
        return pytorch.backward_cpu(call, do, q, k, v, out, lse, dq, dk, dv)
    if call.backend == "math":
        return pytorch.backward_math(call, do, q, k, v, out, lse, dq, dk, dv, dsinks)
    start, stop, end, keep = (_or(t, q) for t in (call.start, call.stop, call.end, call.keep))
    dense, dense_strides = call.dense_operand(q)
    seed = _or(call.seed, q)
    delta = torch.empty_like(lse)
    block, sinks = 64, call.sinks is not None and dsinks.numel() > 0
    tiles = cdiv(call.q_length, block)
    partial = lse.new_empty((call.batch, call.heads, tiles) if sinks else 0)
    looks = _looks_at_gradients(call)
    asked = lse.new_empty((call.batch, call.heads, tiles), dtype=torch.int32) if looks else seed
    _delta_kernel[(tiles * call.batch * call.heads,)](
        do, out, lse, _or(call.sinks, q), delta, partial, asked,
        *do.stride()[:3], *out.stride()[:3], call.heads, call.q_length, tiles,
        DV=call.d_v, HAS_SINKS=sinks, HAS_ASKED=looks,
        BLOCK_DV=next_power_of_2(call.d_v), BLOCK_M=block, **SAME_SUMS,
    )  # fmt: skip
    if sinks:
        dsinks.copy_(partial.sum((0, 2)))
    if looks:
        asked = asked.amax(2)
    if want_q:
        constants = _constants(call, "dq", q)
        tiles = cdiv(call.q_length, constants["BLOCK_M"])
        _dq_kernel[(tiles * call.batch * call.heads,)](
            q, k, v, do, lse, delta, start, end, keep, asked, dense, seed, dq,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *dq.stride()[:3], *dense_strides,
            call.heads, call.q_length, call.k_length, tiles, call.scale, **constants,
        )  # fmt: skip
    if want_kv:
        constants = _constants(call, "dkdv", q)
        tiles = cdiv(call.k_length, constants["BLOCK_N"])
        _dkdv_kernel[(tiles * call.batch * k.shape[1],)](
            q, k, v, do, lse, delta, stop, end, keep, asked, dense, seed, dk, dv,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            *dense_strides, call.heads, call.q_length, call.k_length, tiles, call.scale, **constants,
        )  # fmt: skip
    return dq, dk, dv


def _backward_fake(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    want_q: bool,
    want_kv: bool,
    want_sinks: bool,
    *mask: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    def grad(x: torch.Tensor, want: bool) -> torch.Tensor:
        b, h, s, d = x.shape
        return _bshd(b, h, s, d, x) if want else x.new_empty(0)

    sinks = mask[6]
    dsinks = q.new_empty(0) if sinks is None or not want_sinks else torch.empty_like(sinks)
    return grad(q, want_q), grad(k, want_kv), grad(v, want_kv), dsinks


# ---------------------------------------------------------------- op

_MASK = (
    "Tensor? start, Tensor? stop, Tensor? end, Tensor? keep, Tensor? dense, Tensor? kind, Tensor? sinks, Tensor? seed, "
    "bool causal, SymInt window, SymInt chunk, float scale, float softcap, float dropout_p=0.0, "
    'str blind="zero", str route="auto"'
)
_raw = raw_op(f"attention(Tensor q, Tensor k, Tensor v, {_MASK}) -> (Tensor, Tensor)", _forward, _forward_fake)
_raw_backward = raw_op(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, bool want_q, bool want_kv, "
    f"bool want_sinks, {_MASK}) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, start, stop, end, keep, dense, kind, seed, *constants):
        mask = start, stop, end, keep, dense, kind, sinks, seed
        out, lse = _raw(q, k, v, *mask, *constants)
        ctx.save_for_backward(q, k, v, out, lse, *mask)
        ctx.constants = constants
        return out

    @staticmethod
    def backward(ctx, do):
        q, k, v, out, lse, *mask = ctx.saved_tensors
        want_q, want_k, want_v, want_sinks = ctx.needs_input_grad[:4]
        wanted = want_q, want_k or want_v, want_sinks
        dq, dk, dv, dsinks = _raw_backward(do, q, k, v, out, lse, *wanted, *mask, *ctx.constants)
        grads = zip((dq, dk, dv, dsinks), ctx.needs_input_grad, strict=False)
        return (*(grad if wanted else None for grad, wanted in grads), *(None,) * 15)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    window: int = 0,
    chunk: int = 0,
    padding: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    dense: torch.Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    softcap: float = 0.0,
    mask: Found | None = None,
    sinks: torch.Tensor | None = None,
    blind: str = "zero",
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """``softmax(mask(scale · q kᵀ)) v``, differentiable in q, k and v; see the module for the mask's parts.

    q: ``[B, Hq, Sq, D]``; k: ``[B, Hk, Sk, D]``, v: ``[B, Hk, Sk, Dv]``, with Hk dividing Hq; fp32, fp16 or bf16, all
    of one dtype. window, chunk: in tokens, 0 for none; these and positions need ``causal``. padding: ``[B, Sk]``,
    boolean or integer, nonzero for a real token. positions: ``[B, S]`` integers. dense: broadcastable to
    ``[B, Hq, Sq, Sk]``, boolean or additive, not differentiated. scale: 1/√D by default. Returns ``[B, Hq, Sq, Dv]``,
    which lies in memory as ``[B, Sq, Hq, Dv]``. mask: what :func:`attention_mask` returned for padding, positions and
    chunk, in place of the first two. sinks: ``[Hq]``, floating point, differentiable. dropout_p: from 0 to below 1.
    seed: int64 ``[1]``, which weights dropout drops; drawn from PyTorch's generator of the device by default. blind:
    what a query that sees no key gives, one of :data:`BLINDS`.
    """
    options = causal, window, chunk, padding, positions, dense, scale, dropout_p, softcap, mask, sinks, blind, seed
    return _attend("auto", q, k, v, Options(*options))


def _attend(route: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: Options) -> torch.Tensor:
    """:func:`attention` by :data:`ROUTES` (``route`` "auto"), by the kernels here ("triton") or by FlashAttention
    ("varlen").
    """
    mask, seed = o.mask, o.seed
    if mask is None and (o.padding is not None or o.positions is not None):
        mask = attention_mask(o.padding, o.positions, o.chunk)
    start, stop, end, keep, kind = mask or (None,) * 5
    scale = q.shape[-1] ** -0.5 if o.scale is None else o.scale
    if o.dropout_p and seed is None:
        seed = new_seed(q)
    return _Attention.apply(
        q, k, v, o.sinks, start, stop, end, keep, o.dense, kind, seed if o.dropout_p else None,
        o.causal, o.window, o.chunk, float(scale), float(o.softcap), float(o.dropout_p), o.blind, route,
    )  # fmt: skip


def attention_kernels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """:func:`attention` by the Triton kernels, also where cuDNN would take the call."""
    return _attend("triton", q, k, v, Options(**options))


def attention_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """:func:`attention` by FlashAttention for sequences of different lengths, as it comes with PyTorch, or as
    ``torch.nn.attention.activate_flash_attention_impl`` put it there (FlashAttention 3 and 4). Where
    :func:`varlen_supported`.
    """
    return _attend("varlen", q, k, v, Options(**options))


def cost(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Cost:
    """The forward's. A window counts as its own length, documents as one: their number is known at run time only."""
    o = Options(**options)
    b, h, s, d = (size(n) for n in q.shape)
    k_heads, k_length, d_v = (size(n) for n in (k.shape[1], k.shape[2], v.shape[3]))
    seen = k_length / 2 if o.causal else k_length
    for limit in (o.window, o.chunk):
        seen = sympy.Min(seen, limit) if limit else seen
    item = sympy.Integer(q.element_size())
    out = b * h * s * d_v * item
    moved = b * (h * s * d + k_heads * k_length * (d + d_v)) * item + out
    return Cost(2 * b * h * s * seen * (d + d_v), moved, out + b * h * s * 4)


# ---------------------------------------------------------------- calls


def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int, softcap: float) -> torch.Tensor:
    """What transformers calls where causality is the whole mask."""
    assert causal and not window and not softcap, "stock libraries spell this mask otherwise"
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """q, k and v of each kind of layer, causal. No scores have a cap: transformers' SDPA leaves a config's out, and its
    eager attention is no site.
    """
    heads = {"heads": model.heads, "kv_heads": model.kv_heads, "head_dim": model.head_dim}
    for window in model.windows:
        for hides in ("", "padding", "packing"):
            yield {**model.tokens, **heads, "window": window or None, "softcap": None, "hides": hides}


def document_lengths(tokens: int) -> list[int]:
    """Of documents that fill ``tokens``, drawn as other programs' benchmarks do: 512 ± 256 tokens each, the last one
    what is left. Always the same ones.
    """
    draw = random.Random(0)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(draw.randint(256, 768), left))
    return lengths


def padded_lengths(batch: int, seq: int) -> list[int]:
    """Of the sequences of a batch that is padded to ``seq``: two thirds of it ± one third; for 768 those of
    :func:`document_lengths`.
    """
    draw = random.Random(0)
    return [draw.randint(-(-seq // 3), seq) for _ in range(batch)]


def inputs(
    new: New,
    *,
    batch: int,
    seq: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    hides: str = "",
    chunk: int = 0,
    sinks: bool = False,
) -> Inputs:
    """q [batch, heads, seq, head_dim], k and v [batch, kv_heads, seq, head_dim]. ``hides``: what else the mask hides:
    "padding" at the end of sequences (:func:`padded_lengths`), to which no gradient comes; with "packing", the first
    document from the second; with "documents", those of :func:`document_lengths` from each other. ``chunk``: in tokens.
    ``sinks``: whether heads have them.
    """
    q, k, v = new.heads(batch, seq, head_dim, heads, kv_heads, kv_heads)
    options: dict[str, Any] = {"causal": True, "window": window or 0, "softcap": softcap or 0.0}
    order = torch.arange(seq, device=new.device)
    asked = None
    if hides == "padding":
        real = order < torch.tensor(padded_lengths(batch, seq), device=new.device)[:, None]
        asked = real[:, None, :, None]
        options["mask"] = attention_mask(real.to(torch.int64), None)
        arrived(options["mask"][4])  # whoever copies it has it whole
    elif hides == "packing":
        options["mask"] = attention_mask(None, (order % max(seq // 2, 1)).expand(batch, seq).contiguous())
    elif hides == "documents":
        positions = torch.cat([torch.arange(n) for n in document_lengths(seq)]).to(new.device)
        options["mask"] = attention_mask(None, positions.expand(batch, seq).contiguous())
    options |= {"chunk": chunk} if chunk else {}
    options |= {"sinks": new(heads)} if sinks else {}
    return Inputs((q, k, v), options, [q, k, v], asked)


OP = register(
    Op(
        name="attention",
        call=attention,
        reference=reference,
        supported=supported,
        raw=("attention_mask", "attention", "attention_backward"),
        recompute=Recompute.KEEP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
        stock=stock,
        variants={
            "triton": (attention_kernels, supported),
            "sdpa": (attention_sdpa, sdpa_supported),
            "varlen": (attention_varlen, varlen_supported),
            "flex": (attention_flex, flex_supported),
        },
        default="auto",  # by ROUTES
    )
)
