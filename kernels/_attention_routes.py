"""Who computes a call of attention: what the op takes, whom it asks in which order, and who else there is to be asked
for by name. ``attention.py`` has the maths, ``_attention_pytorch.py`` the calls of PyTorch's kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastft.kernels._attention_mask import (
    BLIND,
    BLINDS,
    HOLES,
    LOWEST,
    PLAIN,
    Found,
    arrived,
    attention_mask,
    hide,
    kept,
    seen_from,
    visible,
)
from fastft.kernels._op import Reason, check_dtypes, use_triton
from fastft.kernels._triton import HAS_TRITON

# ---------------------------------------------------------------- what the op takes

#: Widest head the kernels hold in registers and shared memory: Gemma's 256.
MAX_D = 256


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


# ---------------------------------------------------------------- who computes it by default


class Call:
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
        found = HOLES | BLIND if kind is None else arrived(kind)
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
                self.dense = torch.zeros_like(shown, dtype=torch.float32).masked_fill_(~shown, LOWEST)
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
        return seen_from(self.start, self.k_length) if mask is None else mask & seen_from(self.start, self.k_length)

    def bias(self, q: torch.Tensor) -> torch.Tensor | None:
        """The whole mask as an additive one of q's dtype, ``[B or 1, Hq or 1, Sq, Sk]``."""
        mask = self.mask(q.device)
        if mask is None and self.dense is None:
            return None
        return hide(hide(q.new_zeros((1, 1, self.q_length, self.k_length)), mask), self.dense)

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


def _on_gpu(q: torch.Tensor) -> bool:
    """Whether kernels for GPUs run in this call: ours, and those that come with PyTorch."""
    return q.is_cuda and use_triton(q)


class Route(NamedTuple):
    """Who computes a call, what it takes, and why it is asked at this place."""

    backend: str
    takes: Callable[[Call, torch.Tensor, torch.Tensor, torch.Tensor], bool]
    why: str


class Plans:
    """Whether cuDNN's plan for a size is worth making.

    cuDNN compiles a plan for every new size, forward and backward, before it computes anything, and keeps it for this
    process alone. Where every batch has another length that is at every step, and may take longer than the step. So a
    size without a plan is computed by our kernel, which loses less, and gets one as soon as what was lost so is what
    the plan takes: in all at most twice what had to be lost. The first sizes of a kind (heads, dtype, causality) have
    theirs at once, since most runs have no others: the size that all batches have, and that of the last.
    What is decided depends on which sizes there were, and how often, never on a clock.
    """

    #: Seconds that a plan takes, both directions together, in a step of training; seconds that our kernel needs more
    #: than cuDNN's in either direction, for each FLOP of the forward. ``bench/plans.py`` measures them; what is decided
    #: depends on their quotient alone.
    PLAN, LOST = 0.2, 2e-15
    #: Sizes of a kind that have a plan at once; sizes without one that are counted, before all are counted anew.
    AT_ONCE, COUNTED = 2, 4096

    def __init__(self) -> None:
        #: Kind → the sizes that have a plan, and seconds lost so far to the others.
        self._kinds: dict[Hashable, tuple[set[Hashable], dict[Hashable, float]]] = {}

    def worth(self, call: Call, q: torch.Tensor) -> bool:
        """Whether cuDNN computes this call, which counts."""
        kind = q.device, q.dtype, call.heads, call.group, call.d, call.d_v, call.causal
        planned, lost = self._kinds.setdefault(kind, (set(), {}))
        size = call.batch, call.q_length, call.k_length
        if size in planned:
            return True
        if q.is_cuda and torch.cuda.is_current_stream_capturing():  # where nothing can be compiled
            return False
        seen = call.q_length * call.k_length / (2 if call.causal else 1)
        so_far = lost.pop(size, 0.0) + self.LOST * 2 * call.batch * call.heads * seen * (call.d + call.d_v)
        if so_far >= self.PLAN or len(planned) < self.AT_ONCE:
            planned.add(size)
            return True
        if len(lost) >= self.COUNTED:
            lost.clear()
        lost[size] = so_far
        return False

    def said(self) -> str:
        """For the report; empty where every size has a plan."""
        planned = sum(len(sizes) for sizes, _ in self._kinds.values())
        others = sum(len(sizes) for _, sizes in self._kinds.values())
        said = f"cuDNN has plans for {planned} sizes; {others} did not come often enough for one, and are computed"
        return f"{said} by Triton's kernel" if others else ""


PLANS = Plans()

#: Who computes what by default: the first that takes a call. What is not measured to be faster on an H100 is a variant
#: (``varlen``, ``sdpa``), and becomes a default by a row here: ``Route("varlen", lambda call, q, k, v: ..., "...")``.
ROUTES = (
    Route(
        "cudnn",
        lambda call, q, k, v: call.bare and _on_gpu(q) and _cudnn_takes(q, k, v, call.causal) and PLANS.worth(call, q),
        "nothing is hidden but by causality: 520 to 620 TFLOP/s forward, which plain Triton does not reach on Hopper; "
        "for sizes that come often enough to pay for its plan",
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


# ---------------------------------------------------------------- who computes it when asked for by name


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
