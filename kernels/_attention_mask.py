"""Attention's mask: which keys a query sees, densely and as intervals, what is found out about it once for a step, and
which weights dropout keeps. ``attention.py`` has the maths.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from fastft.kernels._op import raw_op

#: What :func:`attention_mask` finds out: start, stop, end, keep, kind.
Found = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None", "torch.Tensor | None", torch.Tensor]

#: Kinds of mask: real tokens between which lies padding; nothing hidden; padding on the left and right only, or none.
HOLES, PLAIN, INTERVALS = 0, 1, 2
#: Added to a kind: some query may see no key, be the window as long as it may.
BLIND = 4

#: What a query that sees no key gives: 0, or the mean of all values.
BLINDS = ("zero", "filled", "added")
#: As good as −∞ beside any score, and finite.
LOWEST = torch.finfo(torch.float32).min

# ---------------------------------------------------------------- densely


def visible(
    q_length: int,
    k_length: int,
    device: torch.device | str,
    *,
    causal: bool = False,
    window: int = 0,
    chunk: int = 0,
    padding: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The mask as a dense boolean ``[B or 1, 1, Sq, Sk]``, True where a query sees a key; None when all see all."""
    q = torch.arange(q_length, device=device)[:, None]
    k = torch.arange(k_length, device=device)[None, :]
    parts = []
    if causal:
        parts.append((k <= q)[None])
    if window:
        parts.append((k > q - window)[None])
    if chunk:
        left = 0 if padding is None else (padding.to(torch.int64).cumsum(-1) == 0).sum(-1)[:, None, None]
        parts.append(
            torch.div(k[None] - left, chunk, rounding_mode="floor")
            == torch.div(q[None] - left, chunk, rounding_mode="floor")
        )
    if padding is not None:
        parts.append(padding.to(torch.bool)[:, None, :])
    if positions is not None:
        document = _documents(positions).cumsum(-1)
        parts.append(document[:, :, None] == document[:, None, :])
    return functools.reduce(torch.logical_and, parts)[:, None] if parts else None


def seen_from(start: torch.Tensor, k_length: int) -> torch.Tensor:
    """``[B, Sq]`` first keys → ``[B, 1, Sq, Sk]``, True from there on."""
    return torch.arange(k_length, device=start.device) >= start[:, None, :, None]


def _documents(positions: torch.Tensor) -> torch.Tensor:
    """``[B, S]`` position_ids → True at the first token of every document but the first."""
    return torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1


def hide(s: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return s
    return s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)


# ---------------------------------------------------------------- once for a step

#: Address of a kind of mask → the event behind the copy that brings it from the device.
_COMING: dict[int, Any] = {}


def _sent(found: torch.Tensor) -> torch.Tensor:
    """``found``, int8 ``[]`` on a GPU, on the CPU: with what holds for every mask until it arrives."""
    kind = torch.empty((), dtype=torch.int8, pin_memory=True).fill_(HOLES | BLIND)
    kind.copy_(found, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    _COMING[kind.data_ptr()] = event
    return kind


def arrived(kind: torch.Tensor) -> int:
    """The kind of mask, when it is there."""
    event = _COMING.pop(kind.data_ptr(), None)
    if event is not None:
        event.synchronize()
    return int(kind)


def _mask(
    padding: torch.Tensor | None, positions: torch.Tensor | None, chunk: int, skip: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    start, stop, end, keep, kind = _mask_fake(padding, positions, chunk)
    batch, length = start.shape
    if start.numel() == 0:
        return start, stop, end, keep, kind.fill_(PLAIN)
    order = torch.arange(length, device=start.device)
    left: torch.Tensor | int = 0
    first = torch.zeros_like(start, dtype=torch.int64)
    plain = whole = torch.ones((), dtype=torch.bool, device=start.device)
    sighted = torch.ones((), dtype=torch.bool, device=start.device)
    if positions is not None:
        new = _documents(positions)
        plain = ~new.any()
        first = torch.where(new, order, 0).cummax(-1).values
    if padding is not None:
        real = padding.to(torch.bool)
        keep.copy_(real)
        left = (real.cumsum(-1) == 0).sum(-1, keepdim=True)
        last = torch.where(real, order + 1, 0).amax(-1)
        end.copy_(last)
        plain = plain & real.all()
        whole = (real.sum(-1) == (last - left[:, 0]).clamp_min(0)).all()
        first = torch.maximum(first, left)
        # Padding on the right sees what is before it, unless a chunk or a document of its own hides that.
        sighted = ~left.any() & whole if positions is None and not chunk else real.all()
    if chunk:
        first = torch.maximum(first, torch.div(order - left, chunk, rounding_mode="floor") * chunk + left)
    if skip and padding is not None:
        first = torch.where(order >= last[:, None], length, first)
        sighted = sighted & (last == length).all()
    start.copy_(first)
    stop.copy_(torch.searchsorted(start, order.to(torch.int32).expand(batch, -1).contiguous(), right=True))
    # Documents alone: every query sees an interval that it is in itself.
    if padding is None:
        return start, stop, end, keep, kind.fill_(INTERVALS)
    # Under CUDA graph capture the answer cannot be waited for: the kernels then look at every key's padding.
    if start.is_cuda and torch.cuda.is_current_stream_capturing():
        return start, stop, end, keep, kind.fill_(HOLES | BLIND)
    found = torch.where(plain, PLAIN, torch.where(whole, INTERVALS, HOLES)) + torch.where(sighted, 0, BLIND)
    found = found.to(torch.int8)
    return start, stop, end, keep, _sent(found) if start.is_cuda else kind.copy_(found)


def _mask_fake(
    padding: torch.Tensor | None, positions: torch.Tensor | None, chunk: int, skip: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shown = positions if positions is not None else padding
    assert shown is not None, "attention_mask needs a padding mask or position ids"
    batch, length = shown.shape
    start, stop = (shown.new_empty((batch, length), dtype=torch.int32) for _ in range(2))
    end = shown.new_empty((0 if padding is None else batch,), dtype=torch.int32)
    keep = shown.new_empty((0, 0) if padding is None else (batch, length), dtype=torch.uint8)
    return start, stop, end, keep, torch.empty((), dtype=torch.int8, device="cpu")


_raw_mask = raw_op(
    "attention_mask(Tensor? padding, Tensor? positions, SymInt chunk, bool skip=False) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mask,
    _mask_fake,
)


def attention_mask(
    padding: torch.Tensor | None, positions: torch.Tensor | None, chunk: int = 0, skip: bool = False
) -> Found:
    """What the values of a padding mask ``[B, S]`` and of position_ids ``[B, S]`` say, for all layers of a step.

    start: first key that each query sees, chunks included, int32 ``[B, S]``; stop: one past the last query that sees
    each key, likewise. end: one past the last real token, int32 ``[B]``, and keep: padding as uint8 ``[B, S]``; both
    None without padding. kind: int8 ``[]`` on the CPU, one of HOLES, PLAIN, INTERVALS, with BLIND where queries may see
    no key. Without padding it is INTERVALS. With padding on a GPU it is on its way, and the first attention of the step
    waits for it. ``skip``: queries of padding behind the last token of their sequence see no key, where without it they
    see all before them, so that they cost nothing forward either.
    """
    start, stop, end, keep, kind = _raw_mask(padding, positions, chunk, skip)
    return (start, stop, None, None, kind) if padding is None else (start, stop, end, keep, kind)


def document_positions(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """position_ids ``[1, tokens]`` of documents that lie one after another: document i from ``cu_seqlens[i]`` up to,
    not with, ``cu_seqlens[i + 1]``. cu_seqlens: integer ``[documents + 1]``, from 0 on. What comes after the last of
    them counts as one more document.
    """
    order = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, order, right=True) - 1
    return (order - cu_seqlens[document]).unsqueeze(0)


# ---------------------------------------------------------------- dropout


def new_seed(like: torch.Tensor) -> torch.Tensor:
    """A seed for :func:`kept`, int64 ``[1]``, drawn from PyTorch's generator of the device of ``like``."""
    return torch.randint(2**62, (1,), device=like.device)


#: Philox 4 × 32 (Salmon et al. 2011): what a round multiplies by, and what it adds to the key.
_ROUND, _KEY, _LOW = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 0xFFFFFFFF


def kept(seed: torch.Tensor, batch: int, heads: int, q_length: int, k_length: int, p: float) -> torch.Tensor:
    """Where dropout keeps a weight: boolean ``[batch, heads, q_length, k_length]``, as the kernels have it.

    seed: int64 ``[1]``. p: probability of dropping, below 1.
    """
    device = seed.device
    key, query, head = (torch.arange(n, device=device) for n in (k_length, q_length, batch * heads))
    c0, c1, c2 = key[None, None, :], query[None, :, None], head[:, None, None]
    c3 = torch.zeros((), dtype=torch.int64, device=device)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(7):
        a, b = c0 * _ROUND[0], c2 * _ROUND[1]  # modulo 2⁶⁴: their high words are right all the same
        c0, c2 = ((b >> 32) & _LOW) ^ c1 ^ k0, ((a >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = b & _LOW, a & _LOW
        k0, k1 = (k0 + _KEY[0]) & _LOW, (k1 + _KEY[1]) & _LOW
    drawn = (c0 >> 1).expand(batch * heads, q_length, k_length)
    return (drawn >= threshold(p)).view(batch, heads, q_length, k_length)


def threshold(p: float) -> int:
    """``p`` in units of 2⁻³¹."""
    return round(p * 2**31)
