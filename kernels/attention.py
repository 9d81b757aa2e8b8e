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
the right see what is before them, in PyTorch's attention as here, and cost what others do.

What the padding mask and the positions hold is known on the device only: ``attention_mask`` looks once for a step, for
all layers. Of packed documents that is all: the CPU needs to know nothing about them, and waits for nothing. Of a
padding mask it says on the CPU which kind it is. That answer is on its way while the CPU launches what comes before the
first attention, which waits for it: an event of the step's very beginning, no synchronisation of what was launched
since. When padding hides nothing, attention is plainly causal and goes to cuDNN, which plain Triton does not match on
Hopper; everything else goes to the Triton kernels here. ``bench/kernels.py`` times both.

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
Saved: q, k, v, out, and one fp32 number for each query and head.
"""

from __future__ import annotations

import functools
import math
import random
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
import torch
import torch.nn.functional as F

from fastft.kernels._attention_triton import _delta_kernel, _dkdv_kernel, _dq_kernel, _forward_kernel
from fastft.kernels._config import SHARED_BYTES, Config, Space, crowded
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._op import INTERPRET, Cost, Op, Reason, Recompute, check_dtypes, raw_op, register, use_triton
from fastft.kernels._rows import SAME_SUMS, size
from fastft.kernels._triton import HAS_TRITON, triton

#: What :func:`attention_mask` finds out: start, stop, end, keep, kind.
Found = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None", "torch.Tensor | None", torch.Tensor]


@dataclass(frozen=True)
class Options:
    """What :func:`attention` takes beside q, k and v, with its names, order and defaults."""

    causal: bool = False
    window: int = 0
    chunk: int = 0
    padding: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    dense: torch.Tensor | None = None
    scale: float | None = None
    dropout_p: float = 0.0
    softcap: float = 0.0
    mask: Found | None = None
    sinks: torch.Tensor | None = None
    blind: str = "zero"
    seed: torch.Tensor | None = None


#: Kinds of mask: real tokens between which lies padding; nothing hidden; padding on the left and right only, or none.
HOLES, PLAIN, INTERVALS = 0, 1, 2
#: Added to a kind: some query may see no key, be the window as long as it may.
BLIND = 4

#: What a query that sees no key gives: 0, or the mean of all values.
BLINDS = ("zero", "filled", "added")
#: As good as −∞ beside any score, and finite.
_LOWEST = torch.finfo(torch.float32).min

# ---------------------------------------------------------------- reference


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


def _from(start: torch.Tensor, k_length: int) -> torch.Tensor:
    """``[B, Sq]`` first keys → ``[B, 1, Sq, Sk]``, True from there on."""
    return torch.arange(k_length, device=start.device) >= start[:, None, :, None]


def _documents(positions: torch.Tensor) -> torch.Tensor:
    """``[B, S]`` position_ids → True at the first token of every document but the first."""
    return torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1


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
        shown = _from(start, k.shape[2]) if shown is None else shown & _from(start, k.shape[2])
    compute = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    s = _scores(
        q.to(compute),
        k.to(compute).repeat_interleave(group, 1),
        q.shape[-1] ** -0.5 if scale is None else scale,
        softcap,
    )[0]
    for hides in (shown, dense):
        if hides is None or hides.dtype != torch.bool or blind == "zero":
            s = _hide(s, hides)
        elif blind == "filled":
            s = s.masked_fill(~hides, _LOWEST)
        else:
            s = s + torch.zeros_like(hides, dtype=compute).masked_fill(~hides, _LOWEST)
    if sinks is not None:
        s = torch.cat((s, sinks.to(compute)[:, None, None].expand(*s.shape[:-1], 1)), -1)
    p = torch.softmax(s, -1).masked_fill(s.amax(-1, keepdim=True) == -math.inf, 0.0)[..., : k.shape[2]]
    if dropout_p:
        batch, heads, q_length, k_length = p.shape
        keep = kept(new_seed(q) if seed is None else seed, batch, heads, q_length, k_length, dropout_p)
        p = torch.where(keep, p / (1 - dropout_p), 0.0)
    return (p @ v.to(compute).repeat_interleave(group, 1)).to(q.dtype)


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
    return (drawn >= _threshold(p)).view(batch, heads, q_length, k_length)


def _threshold(p: float) -> int:
    """``p`` in units of 2⁻³¹."""
    return round(p * 2**31)


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores before the mask, and tanh(s / softcap), which their derivative needs."""
    s = (q @ k.transpose(-1, -2)) * scale
    if not softcap:
        return s, None
    tanh = torch.tanh(s / softcap)
    return tanh * softcap, tanh


def _hide(s: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return s
    return s.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else s + mask.to(s.dtype)


# ---------------------------------------------------------------- configuration

#: Widest head the kernels hold in registers and shared memory: Gemma's 256.
MAX_D = 256


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


def _as_bshd(x: torch.Tensor) -> torch.Tensor:
    """``x`` with the memory layout of :func:`_bshd`; itself when it has it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """``[B, H, S, D]`` → ``[B · S, H, D]``."""
    return x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _out_of_rows(x: torch.Tensor, batch: int) -> torch.Tensor:
    """``[B · S, H, D]`` → ``[B, H, S, D]``, which lies in memory as before."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """``x`` with elements of a head side by side, which the kernels read without a stride."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _or(x: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """``x``, or a pointer that the kernel does not look at."""
    return stand_in if x is None else x


class _Call:
    """What forward and backward work out from the same arguments: the mask left at run time, and who computes it."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        start: torch.Tensor | None,
        stop: torch.Tensor | None,
        end: torch.Tensor | None,
        keep: torch.Tensor | None,
        dense: torch.Tensor | None,
        kind: torch.Tensor | None,
        sinks: torch.Tensor | None,
        seed: torch.Tensor | None,
        causal: bool,
        window: int,
        chunk: int,
        scale: float,
        softcap: float,
        dropout_p: float = 0.0,
        blind: str = "zero",
        route: str = "auto",
    ) -> None:
        self.batch, self.heads, self.q_length, self.d = q.shape
        self.k_length, self.d_v = k.shape[2], v.shape[3]
        self.group = self.heads // k.shape[1]
        self.causal, self.scale, self.softcap = causal, scale, softcap
        self.sinks, self.seed, self.dropout_p = None if sinks is None else sinks.contiguous(), seed, dropout_p
        found = HOLES | BLIND if kind is None else _arrived(kind)
        sighted, found = not found & BLIND, found % BLIND
        if found == PLAIN:
            start = stop = keep = None
        # Keys of another sequence (an encoder's) have padding, and nothing else that is counted along the queries.
        elif start is not None and start.shape[1] != self.q_length:
            start = stop = None
            found = HOLES
        # start and stop have the chunks in them; a window or chunk as long as the sequence hides nothing.
        self.chunk = 0 if start is not None or chunk >= self.k_length else chunk
        self.window = 0 if window >= self.k_length else window
        self.start, self.stop, self.end, self.keep, self.dense = start, stop, end, keep, dense
        self.holes = keep is not None and found == HOLES
        #: Whether a query that sees no key, where there can be one, gives the mean of all values: afterwards.
        self.means = False
        if blind != "zero" and sinks is None and not (keep is None and dense is None):
            self.means = blind == "filled"
            # A gradient of scores that are not looked at: where there are such queries, all scores are.
            if blind == "added" and keep is not None and not (sighted and not self.window):
                shown = self.mask(q.device)
                assert shown is not None
                self.dense = torch.zeros_like(shown, dtype=torch.float32).masked_fill_(~shown, _LOWEST)
                self.causal, self.window, self.chunk, self.holes = False, 0, 0, False
                start = keep = self.start = self.stop = self.keep = None
        dense, causal = self.dense, self.causal
        bare = start is None and keep is None and dense is None and not (self.window or self.chunk)
        # What no attention of PyTorch's knows, or draws as we do.
        biased = dense is not None and dense.dtype != torch.bool
        own = bool(softcap or dropout_p or sinks is not None or blind != "zero" or biased)
        #: Whether causality is all that hides, if anything does.
        self.bare = bare and not own
        if route == "varlen" and _on_gpu(q):
            self.backend = "varlen"
        elif not use_triton(q) or q.dtype == torch.float64:
            self.backend = "math" if own or self.d != self.d_v or q.is_cuda else "cpu"
        elif route == "triton":
            self.backend = "triton"
        else:
            self.backend = next(r.backend for r in ROUTES if r.takes(self, q, k, v))

    def mask(self, device: torch.device) -> torch.Tensor | None:
        """The structured part, dense and boolean, ``[B or 1, 1, Sq, Sk]``."""
        mask = visible(
            self.q_length,
            self.k_length,
            device,
            causal=self.causal,
            window=self.window,
            chunk=self.chunk,
            padding=self.keep,
        )
        if self.start is None:
            return mask
        return _from(self.start, self.k_length) if mask is None else mask & _from(self.start, self.k_length)

    def bias(self, q: torch.Tensor) -> torch.Tensor | None:
        """The whole mask as an additive one of q's dtype, ``[B or 1, Hq or 1, Sq, Sk]``."""
        mask = self.mask(q.device)
        if mask is None and self.dense is None:
            return None
        return _hide(_hide(q.new_zeros((1, 1, self.q_length, self.k_length)), mask), self.dense)

    def constants(self, kernel: str, q: torch.Tensor) -> dict[str, Any]:
        """What a kernel is specialised on."""
        d = triton.next_power_of_2(max(self.d, 16))
        d_v = triton.next_power_of_2(max(self.d_v, 16))
        dense = 0 if self.dense is None else 1 if self.dense.dtype == torch.bool else 2
        start, end = self.start is not None, self.keep is not None and not self.holes
        tiles = CONFIGS[kernel](
            q.device, q.dtype, self.batch * self.heads, self.q_length, self.k_length, d, d_v, self.group,
            self.causal, self.window, self.chunk, start, end, self.holes, dense, bool(self.softcap),
            bool(self.dropout_p),
        )  # fmt: skip
        forward = {}
        if kernel == "forward":
            forward["HAS_SINKS"] = self.sinks is not None
            # e^±60, times many keys and a large v, is in reach of fp32 and of bf16; e^±10 of fp16.
            capped = 0 < self.softcap <= (10 if q.dtype == torch.float16 else 60)
            forward["BOUNDED"] = capped and self.sinks is None and dense != 2
        return {
            "D": self.d, "DV": self.d_v, "GROUP": self.group,
            "CAUSAL": self.causal, "WINDOW": self.window, "CHUNK": self.chunk,
            "HAS_START": start, "HAS_END": end, "HAS_PADDING": self.holes, "DENSE": dense, "SOFTCAP": self.softcap,
            **forward, "DROP": _threshold(self.dropout_p), "KEPT": 1 / (1 - self.dropout_p),
            "BLOCK_D": d, "BLOCK_DV": d_v, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
            **tiles,
        }  # fmt: skip

    def dense_operand(self, q: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The dense mask as a kernel reads it (booleans as bytes), and its strides over ``[B, Hq, Sq, Sk]``."""
        if self.dense is None:
            return q, (0, 0, 0, 0)
        dense = self.dense.expand(self.batch, self.heads, self.q_length, self.k_length)
        return (dense.view(torch.uint8) if dense.dtype == torch.bool else dense), dense.stride()

    def kept(self) -> torch.Tensor | None:
        """Dropout's factors, ``[B, Hq, Sq, Sk]``: see :func:`kept`."""
        if not self.dropout_p or self.seed is None:
            return None
        return kept(self.seed, self.batch, self.heads, self.q_length, self.k_length, self.dropout_p)


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


def _arrived(kind: torch.Tensor) -> int:
    """The kind of mask, when it is there."""
    event = _COMING.pop(kind.data_ptr(), None)
    if event is not None:
        event.synchronize()
    return int(kind)


def _dropped(x: torch.Tensor, keep: torch.Tensor | None, p: float) -> torch.Tensor:
    return x if keep is None else (x / (1 - p)).masked_fill(~keep, 0.0)


def _on_gpu(q: torch.Tensor) -> bool:
    """Whether kernels for GPUs run in this call: ours, and those that come with PyTorch."""
    return q.is_cuda and use_triton(q)


class Route(NamedTuple):
    """Who computes a call, what it takes, and why it is asked at this place."""

    backend: str
    takes: Callable[[_Call, torch.Tensor, torch.Tensor, torch.Tensor], bool]
    why: str


#: Who computes what by default: the first that takes a call. What is not measured to be faster on an H100 is a variant
#: (``varlen``, ``sdpa``), and becomes a default by a row here: ``Route("varlen", lambda call, q, k, v: ..., "...")``.
ROUTES = (
    Route(
        "cudnn",
        lambda call, q, k, v: call.bare and _on_gpu(q) and _cudnn_takes(q, k, v, call.causal),
        "nothing is hidden but by causality: 520 to 620 TFLOP/s forward, which plain Triton does not reach on Hopper",
    ),
    Route("triton", lambda *_: True, "skips what the mask hides, tile by tile, and knows every mask, cap and sink"),
)


def _cudnn_takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> bool:
    """Whether cuDNN computes this call: PyTorch's own checks of device, shapes, versions and the user's switches."""
    # Head sizes that its backward knows; the forward knows more.
    d, d_v = q.shape[-1], v.shape[-1]
    if q.dtype == torch.float32 or not (max(d, d_v) <= 128 or (d, d_v) in ((192, 128), (256, 256))):
        return False
    # Its backward promises no order of summation.
    if torch.are_deterministic_algorithms_enabled():
        return False
    # Its dq is wrong beyond (torch 2.11, H100: tests/gpu/test_large.py).
    if max(q.numel(), k.numel(), v.numel()) >= 2**31:
        return False
    with torch.enable_grad():  # asked for training: the backward has limits of its own
        q = q.detach().requires_grad_()
        params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, q.shape[1] != k.shape[1])
        return torch.backends.cuda.can_use_cudnn_attention(params)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if q.numel() == 0 or v.shape[2] * v.shape[3] == 0:  # nothing to compute, or nothing to see
        out, lse = _forward_fake(q, k, v, *mask)
        return out.zero_(), lse.fill_(math.inf)
    q, k, v = _unit(q), _unit(k), _unit(v)
    call = _Call(q, k, v, *mask)
    if call.backend in GIVEN:
        return _forward_given(call, q, k, v)
    out, lse = _forward_by(call, q, k, v, *_forward_fake(q, k, v, *mask))
    if call.means:  # queries of padding, which nobody looks at: the kernels need not know them
        mean = v.mean(2, keepdim=True, dtype=lse.dtype).repeat_interleave(call.group, 1)
        out.copy_(torch.where(_blind(lse), mean, out))
    return out, lse


def _blind(lse: torch.Tensor) -> torch.Tensor:
    """``[B, Hq, Sq, 1]``: the queries that saw no key."""
    return (lse == math.inf).unsqueeze(-1)


#: Backends whose results are in memory of their own, so that none of ours is there beside it.
GIVEN = ("cudnn", "varlen")


def _forward_given(call: _Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if call.backend == "cudnn":
        got, stats, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, call.causal, False, scale=call.scale
        )
        return _as_bshd(got), stats.reshape(call.batch, call.heads, call.q_length)
    lengths, options = _flash_arguments(call, q)
    got, stats, *_ = torch.ops.aten._flash_attention_forward(*map(_in_rows, (q, k, v)), *lengths, False, **options)
    return _out_of_rows(got, call.batch), stats.unflatten(1, (call.batch, -1)).transpose(0, 1).contiguous()


def _forward_by(
    call: _Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if call.backend == "cpu":
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
    if call.backend == "math":
        return _forward_math(call, q, k, v, out, lse)
    constants = call.constants("forward", q)
    tiles = triton.cdiv(call.q_length, constants["BLOCK_M"])
    dense, dense_strides = call.dense_operand(q)
    _forward_kernel[(tiles * call.batch * call.heads,)](
        q, k, v, _or(call.start, q), _or(call.end, q), _or(call.keep, q), dense, _or(call.sinks, q), _or(call.seed, q),
        out, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], *dense_strides,
        call.heads, call.q_length, call.k_length, tiles, call.scale, **constants,
    )  # fmt: skip
    return out, lse


#: The last ``start`` that :func:`_cu_seqlens` was asked about, its version, and the answer.
_LAST: list[Any] = [lambda: None, 0, None]


def _cu_seqlens(call: _Call, q: torch.Tensor) -> tuple[torch.Tensor, int]:
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


def _flash_arguments(call: _Call, q: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What FlashAttention's forward and backward in PyTorch take alike: lengths, dropout, causality; scale, window."""
    cu_seqlens, longest = _cu_seqlens(call, q)
    window = {"window_size_left": call.window - 1, "window_size_right": 0}
    return (cu_seqlens, cu_seqlens, longest, longest, 0.0, not call.window), {"scale": call.scale, **window}


def _only_causal(call: _Call) -> bool:
    """Causal from the first query and key, and nothing else: what PyTorch's own ``is_causal`` says."""
    bare = call.start is None and call.keep is None and call.dense is None and not (call.window or call.chunk)
    return bare and (not call.causal or call.q_length == call.k_length)


def _forward_math(
    call: _Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formulas of the module's docstring, in PyTorch."""
    s, _ = _masked_scores(call, q, k, lse.dtype)
    every = s
    if call.sinks is not None:
        every = torch.cat((s, call.sinks.to(lse.dtype)[:, None, None].expand(*s.shape[:-1], 1)), -1)
    blind = every.amax(-1) == -math.inf
    lse.copy_(torch.logsumexp(every, -1).masked_fill(blind, math.inf))
    p = _dropped(_weights(call, s, lse), call.kept(), call.dropout_p)
    return out.copy_(p @ v.to(lse.dtype).repeat_interleave(call.group, 1)), lse


def _weights(call: _Call, s: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The weights of scores ``[B, Hq, Sq, Sk]`` with logsumexp ``[B, Hq, Sq]``."""
    p, lse = torch.exp(s - lse.unsqueeze(-1)), lse.unsqueeze(-1)
    if call.dense is None or call.dense.dtype == torch.bool:
        return p
    # A finite mask that hides a row everywhere: beside such numbers the logarithm of a sum is lost.
    return torch.where((lse < _LOWEST / 2) & (s > -math.inf), 1 / s.shape[-1], p)


def _masked_scores(
    call: _Call, q: torch.Tensor, k: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    s, tanh = _scores(q.to(dtype), k.to(dtype).repeat_interleave(call.group, 1), call.scale, call.softcap)
    return _hide(_hide(s, call.mask(q.device)), call.dense), tanh


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
    call = _Call(q, k, v, *mask)
    if call.backend in GIVEN:  # of calls without sinks
        grads = zip(_backward_given(call, do, q, k, v, out, lse), (want_q, want_kv, want_kv), strict=True)
        dq, dk, dv = (grad if want else q.new_empty(0) for grad, want in grads)
        return dq, dk, dv, q.new_empty(0)
    dq, dk, dv, dsinks = _backward_fake(*results)
    dq, dk, dv = _backward_by(call, do, q, k, v, out, lse, dq, dk, dv, dsinks)
    if call.means and want_kv:
        mean = torch.where(_blind(lse), do, 0.0).sum(2, keepdim=True, dtype=lse.dtype) / call.k_length
        dv.copy_(dv + _group_sum(mean, call.group))
    return dq, dk, dv, dsinks


def _backward_given(
    call: _Call,
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


def _backward_by(
    call: _Call,
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
        bias = call.bias(q) if not _only_causal(call) else None
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k.repeat_interleave(call.group, 1), v.repeat_interleave(call.group, 1), out, lse, 0.0,
            call.causal and bias is None, attn_mask=bias, scale=call.scale,
        )  # fmt: skip
        if want_q:
            dq.copy_(grads[0])
        if want_kv:
            dk.copy_(_group_sum(grads[1], call.group))
            dv.copy_(_group_sum(grads[2], call.group))
        return dq, dk, dv
    if call.backend == "math":
        return _backward_math(call, do, q, k, v, out, lse, dq, dk, dv, dsinks)
    start, stop, end, keep = (_or(t, q) for t in (call.start, call.stop, call.end, call.keep))
    dense, dense_strides = call.dense_operand(q)
    seed = _or(call.seed, q)
    delta = torch.empty_like(lse)
    block, sinks = 64, call.sinks is not None and dsinks.numel() > 0
    tiles = triton.cdiv(call.q_length, block)
    partial = lse.new_empty((call.batch, call.heads, tiles) if sinks else 0)
    _delta_kernel[(tiles * call.batch * call.heads,)](
        do, out, lse, _or(call.sinks, q), delta, partial,
        *do.stride()[:3], *out.stride()[:3], call.heads, call.q_length, tiles,
        DV=call.d_v, HAS_SINKS=sinks, BLOCK_DV=triton.next_power_of_2(call.d_v), BLOCK_M=block, **SAME_SUMS,
    )  # fmt: skip
    if sinks:
        dsinks.copy_(partial.sum((0, 2)))
    if want_q:
        constants = call.constants("dq", q)
        tiles = triton.cdiv(call.q_length, constants["BLOCK_M"])
        _dq_kernel[(tiles * call.batch * call.heads,)](
            q, k, v, do, lse, delta, start, end, keep, dense, seed, dq,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *dq.stride()[:3], *dense_strides,
            call.heads, call.q_length, call.k_length, tiles, call.scale, **constants,
        )  # fmt: skip
    if want_kv:
        constants = call.constants("dkdv", q)
        tiles = triton.cdiv(call.k_length, constants["BLOCK_N"])
        _dkdv_kernel[(tiles * call.batch * k.shape[1],)](
            q, k, v, do, lse, delta, stop, end, keep, dense, seed, dk, dv,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
            *dense_strides, call.heads, call.q_length, call.k_length, tiles, call.scale, **constants,
        )  # fmt: skip
    return dq, dk, dv


def _group_sum(x: torch.Tensor, group: int) -> torch.Tensor:
    """``[B, Hq, S, D]`` → ``[B, Hk, S, D]``: the gradient of one key head is the sum over its query heads."""
    return x.unflatten(1, (-1, group)).sum(2, dtype=torch.promote_types(x.dtype, torch.float32))


def _backward_math(
    call: _Call,
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
    """The formulas of the module's docstring, in PyTorch."""
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
        dk.copy_(_group_sum(ds.transpose(-1, -2) @ q.to(compute), call.group) * call.scale)
        dv.copy_(_group_sum(_dropped(p, keep, call.dropout_p).transpose(-1, -2) @ do, call.group))
    if call.sinks is not None and dsinks.numel():
        weight = torch.exp(call.sinks.to(compute)[:, None] - lse)
        dsinks.copy_(-(weight * delta.squeeze(-1)).sum((0, 2)))
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


def _mask(
    padding: torch.Tensor | None, positions: torch.Tensor | None, chunk: int
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
    padding: torch.Tensor | None, positions: torch.Tensor | None, chunk: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shown = positions if positions is not None else padding
    assert shown is not None, "attention_mask needs a padding mask or position ids"
    batch, length = shown.shape
    start, stop = (shown.new_empty((batch, length), dtype=torch.int32) for _ in range(2))
    end = shown.new_empty((0 if padding is None else batch,), dtype=torch.int32)
    keep = shown.new_empty((0, 0) if padding is None else (batch, length), dtype=torch.uint8)
    return start, stop, end, keep, torch.empty((), dtype=torch.int8, device="cpu")


# ---------------------------------------------------------------- op

_MASK = (
    "Tensor? start, Tensor? stop, Tensor? end, Tensor? keep, Tensor? dense, Tensor? kind, Tensor? sinks, Tensor? seed, "
    "bool causal, SymInt window, SymInt chunk, float scale, float softcap, float dropout_p=0.0, "
    'str blind="zero", str route="auto"'
)
_raw_mask = raw_op(
    "attention_mask(Tensor? padding, Tensor? positions, SymInt chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _mask,
    _mask_fake,
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


def attention_mask(padding: torch.Tensor | None, positions: torch.Tensor | None, chunk: int = 0) -> Found:
    """What the values of a padding mask ``[B, S]`` and of position_ids ``[B, S]`` say, for all layers of a step.

    start: first key that each query sees, chunks included, int32 ``[B, S]``; stop: one past the last query that sees
    each key, likewise. end: one past the last real token, int32 ``[B]``, and keep: padding as uint8 ``[B, S]``; both
    None without padding. kind: int8 ``[]`` on the CPU, one of HOLES, PLAIN, INTERVALS, with BLIND where queries may see
    no key. Without padding it is INTERVALS. With padding on a GPU it is on its way, and the first attention of the step
    waits for it.
    """
    start, stop, end, keep, kind = _raw_mask(padding, positions, chunk)
    return (start, stop, None, None, kind) if padding is None else (start, stop, end, keep, kind)


def document_positions(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """position_ids ``[1, tokens]`` of documents that lie one after another: document i from ``cu_seqlens[i]`` up to,
    not with, ``cu_seqlens[i + 1]``. cu_seqlens: integer ``[documents + 1]``, from 0 on. What comes after the last of
    them counts as one more document.
    """
    order = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, order, right=True) - 1
    return (order - cu_seqlens[document]).unsqueeze(0)


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


# ---------------------------------------------------------------- variants


def attention_kernels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """:func:`attention` by the kernels of this file, also where cuDNN would take the call."""
    return _attend("triton", q, k, v, Options(**options))


def attention_sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """:func:`attention` by PyTorch's own ``scaled_dot_product_attention``, where :func:`sdpa_supported`."""
    o = Options(**options)
    return torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=o.dense,
        dropout_p=o.dropout_p,
        is_causal=o.causal,
        scale=o.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def sdpa_supported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Reason | None:
    """None, or why PyTorch's own attention cannot compute this call."""
    o = Options(**options)
    if reason := supported(q, k, v, **options):
        return reason
    # Its mask is dense or causal.
    if o.window or o.chunk or o.padding is not None or o.positions is not None or o.mask is not None:
        return Reason("mask", "scaled_dot_product_attention knows a causal mask and a dense one, and this is another")
    if o.causal and o.dense is not None:
        return Reason("mask", "scaled_dot_product_attention takes a causal mask or a dense one, not both")
    if o.dense is not None and o.dense.dtype not in (torch.bool, q.dtype):
        return Reason("mask", f"the mask is {o.dense.dtype}: scaled_dot_product_attention takes bool or {q.dtype}")
    if o.softcap:
        return Reason("softcap", "scaled_dot_product_attention caps no scores")
    if o.sinks is not None:
        return Reason("sinks", "scaled_dot_product_attention has no sinks")
    if o.seed is not None:
        return Reason("dropout", "scaled_dot_product_attention draws its dropout itself, and takes no seed")
    if o.blind != "zero" and o.dense is not None:
        return Reason("mask", "scaled_dot_product_attention gives 0 for a query that sees no key, not the mean")
    return None


def attention_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """:func:`attention` by FlashAttention for sequences of different lengths, as it comes with PyTorch, or as
    ``torch.nn.attention.activate_flash_attention_impl`` put it there (FlashAttention 3 and 4). Where
    :func:`varlen_supported`.
    """
    return _attend("varlen", q, k, v, Options(**options))


def varlen_supported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Reason | None:
    """None, or why FlashAttention for sequences of different lengths cannot compute this call."""
    o = Options(**options)
    if reason := supported(q, k, v, **options):
        return reason
    # Sequences, and a window in each.
    if not o.causal or o.dense is not None or (o.chunk and o.positions is None and o.mask is None):
        return Reason("mask", "varlen_attn knows documents, a window and causality, and this mask is another")
    if o.padding is not None or (o.mask is not None and o.mask[3] is not None):
        return Reason("mask", "varlen_attn knows no padding between documents")
    if o.softcap:
        return Reason("softcap", "varlen_attn caps no scores")
    if o.sinks is not None:
        return Reason("sinks", "varlen_attn has no sinks")
    if o.dropout_p:
        return Reason("dropout", "varlen_attn has no dropout")
    if q.dtype not in (torch.float16, torch.bfloat16):
        return Reason("dtype", f"varlen_attn takes fp16 and bf16, not {q.dtype}")
    if q.shape[3] != v.shape[3] or q.shape[3] % 8 or q.shape[3] > 256:
        return Reason(
            "head_size", f"varlen_attn takes heads of one size, by 8 up to 256, not {q.shape[3]}, {v.shape[3]}"
        )
    if q.device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return Reason("device", "PyTorch has FlashAttention on CUDA only, where it was built with it")
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return Reason("device", "FlashAttention needs a GPU of compute capability 8.0 or more")
    return None


#: Where FlexAttention trains.
FLEX_DEVICES = ("cuda",)
#: What its call is given: that the logsumexp is kept, which its backward reads, and what PyTorch sets by itself.
_FLEX_OPTIONS = {
    "BACKEND": "AUTO", "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False,
    "WRITE_DQ": True, "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False,
}  # fmt: skip


def attention_flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """:func:`attention` by PyTorch's FlexAttention, where :func:`flex_supported`. Its call goes into the graph that is
    compiled; outside of one it is compiled by itself, since it computes all scores where nobody compiles it.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    o = Options(**options)
    mask = o.mask
    if mask is None and (o.padding is not None or o.positions is not None):
        mask = attention_mask(o.padding, o.positions, o.chunk)
    start, _, _, keep, _ = mask or (None,) * 5
    if start is not None and start.shape[1] != q.shape[2]:  # keys of another sequence
        start = None
    found = {name: t for name, t in (("start", start), ("keep", keep)) if t is not None}

    def shown(b: Any, h: Any, i: Any, j: Any, *given: torch.Tensor) -> Any:
        known = dict(zip(found, given, strict=True))
        seen = j <= i if o.causal else j >= 0
        seen = seen & (j > i - o.window) if o.window else seen
        seen = seen & (j // o.chunk == i // o.chunk) if o.chunk and start is None else seen
        seen = seen & (j >= known["start"][b, i]) if "start" in known else seen
        return seen & (known["keep"][b, j] != 0) if "keep" in known else seen

    def capped(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return o.softcap * torch.tanh(score / o.softcap) if o.softcap else score

    scale, tensors = q.shape[-1] ** -0.5 if o.scale is None else o.scale, tuple(found.values())
    batch = q.shape[0] if found else None
    blocks = create_block_mask(
        lambda b, h, i, j: shown(b, h, i, j, *tensors), batch, None, q.shape[2], k.shape[2], q.device
    )
    if type(q) in (torch.Tensor, torch.nn.Parameter):  # in no graph
        return _compiled_flex()(q, k, v, capped, blocks, scale, q.shape[1] != k.shape[1])  # type: ignore[no-any-return]
    made = (*blocks.as_tuple()[:-1], shown)
    return torch.ops.higher_order.flex_attention(q, k, v, capped, made, scale, _FLEX_OPTIONS, (), tensors)[0]  # type: ignore[no-any-return]


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_supported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Reason | None:
    """None, or why FlexAttention cannot compute this call."""
    o = Options(**options)
    if reason := supported(q, k, v, **options):
        return reason
    if o.dense is not None:
        return Reason("mask", "FlexAttention computes its mask, and is given no dense one here")
    if o.blind != "zero" and (o.padding is not None or (o.mask is not None and o.mask[3] is not None)):
        return Reason("mask", "FlexAttention gives 0 for a query that sees no key, not the mean")
    if o.sinks is not None:
        return Reason("sinks", "FlexAttention has no sinks")
    if o.dropout_p:
        return Reason("dropout", "FlexAttention has no dropout")
    if min(q.shape[3], v.shape[3]) < 16:
        return Reason("head_size", f"heads of {q.shape[3]} and {v.shape[3]}: FlexAttention's have 16 or more")
    if q.device.type not in FLEX_DEVICES:
        return Reason("device", "FlexAttention has gradients on CUDA only")
    return None


def supported(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Reason | None:
    """None, or why this call cannot run as the op."""
    o = Options(**options)
    # fp32, fp16 and bf16 kernels; one dtype goes into a tile product.
    if reason := check_dtypes(q, k, v):
        return reason
    if not q.dtype == k.dtype == v.dtype:
        return Reason("dtype", f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}: they must have one dtype")
    if not all(t.dim() == 4 for t in (q, k, v)):
        return Reason(
            "shape", f"q, k and v have {q.dim()}, {k.dim()} and {v.dim()} axes: [batch, heads, seq, head] is needed"
        )
    if q.device.type not in ("cpu", "cuda"):
        return Reason("device", f"device {q.device.type} has no kernel: cpu and cuda have")
    # A whole number of query heads shares a key head.
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1]:
        return Reason(
            "shape", f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads and {v.shape[1]} value heads"
        )
    if q.shape[0] != k.shape[0] or q.shape[0] != v.shape[0] or q.shape[3] != k.shape[3] or k.shape[2] != v.shape[2]:
        return Reason("shape", f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    # A head is kept whole, in registers and shared memory.
    if q.is_cuda and max(q.shape[3], v.shape[3]) > MAX_D:
        return Reason("head_size", f"heads of {q.shape[3]} and {v.shape[3]}: at most {MAX_D} fit the kernel")
    # What is left is divided by 1 − p.
    if not 0 <= o.dropout_p < 1:
        return Reason("dropout", f"attention dropout is {o.dropout_p}: from 0 to below 1 is supported")
    if o.seed is not None and (o.seed.dtype != torch.int64 or o.seed.shape != (1,) or o.seed.device != q.device):
        return Reason(
            "dropout", f"the seed is {o.seed.dtype} {tuple(o.seed.shape)} on {o.seed.device}: int64 [1] is needed"
        )
    # What is computed afterwards has no dropout; a dense mask that adds says itself what it adds.
    if o.blind not in BLINDS:
        return Reason("mask", f"blind is {o.blind!r}: one of {', '.join(BLINDS)} is supported")
    if o.blind == "filled" and o.dropout_p:
        return Reason("dropout", "queries that see no key are to give a mean, which dropout is not drawn for")
    if o.blind == "added" and o.dense is not None:
        return Reason("mask", "a dense mask is to be added to a structured one that adds: one of both is supported")
    # A sink is one number for each head.
    if o.sinks is not None and (tuple(o.sinks.shape) != (q.shape[1],) or (reason := check_dtypes(o.sinks))):
        return Reason("sinks", f"sinks are {o.sinks.dtype} {tuple(o.sinks.shape)}: one for each of {q.shape[1]} heads")
    # Positions of queries and keys are counted from the same token.
    structured = o.causal or o.window or o.chunk or o.positions is not None
    if structured and q.shape[2] != k.shape[2]:
        return Reason("shape", f"{q.shape[2]} queries see {k.shape[2]} keys: a structured mask needs as many")
    # Without causality what a query sees is no interval that ends at itself.
    if not o.causal and (o.window or o.chunk or o.positions is not None):
        return Reason("mask", "a window, chunk or packed mask that is not causal has no kernel")
    if o.padding is not None and tuple(o.padding.shape) != (k.shape[0], k.shape[2]):
        return Reason("shape", f"padding is {tuple(o.padding.shape)}: [batch, seq] is {(k.shape[0], k.shape[2])}")
    if o.positions is not None and tuple(o.positions.shape) != (q.shape[0], q.shape[2]):
        return Reason("shape", f"positions are {tuple(o.positions.shape)}: [batch, seq] is {(q.shape[0], q.shape[2])}")
    # A learned bias (T5, ALiBi with a gradient) would need its own gradient.
    if o.dense is not None and o.dense.requires_grad:
        return Reason("mask", "the additive mask requires a gradient, and the kernels give none")
    if o.dense is not None and not (o.dense.dtype == torch.bool or o.dense.dtype.is_floating_point):
        return Reason("mask", f"the mask is {o.dense.dtype}: boolean or floating point is needed")
    # CUDA without Triton (Windows wheels): PyTorch's own attention stays.
    if q.is_cuda and not HAS_TRITON:
        return Reason("triton", "Triton is not installed: pip install triton")
    return None


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
    "padding" at the end of the last sequence; with "packing", the first document from the second; with "documents",
    those of :func:`document_lengths` from each other. ``chunk``: in tokens. ``sinks``: whether heads have them.
    """
    q, k, v = new.heads(batch, seq, head_dim, heads, kv_heads, kv_heads)
    options: dict[str, Any] = {"causal": True, "window": window or 0, "softcap": softcap or 0.0}
    order = torch.arange(seq, device=new.device)
    if hides == "padding":
        padding = torch.ones(batch, seq, dtype=torch.int64, device=new.device)
        padding[-1:] = order < max(seq - seq // 4, 1)
        options["mask"] = attention_mask(padding, None)
        _arrived(options["mask"][4])  # whoever copies it has it whole
    elif hides == "packing":
        options["mask"] = attention_mask(None, (order % max(seq // 2, 1)).expand(batch, seq).contiguous())
    elif hides == "documents":
        positions = torch.cat([torch.arange(n) for n in document_lengths(seq)]).to(new.device)
        options["mask"] = attention_mask(None, positions.expand(batch, seq).contiguous())
    options |= {"chunk": chunk} if chunk else {}
    options |= {"sinks": new(heads)} if sinks else {}
    return Inputs((q, k, v), options, [q, k, v])


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
