"""Log-probabilities of labels, and their cross-entropy, under a language model's head, without its logits.

For token t with hidden state h_t [hidden], head W [vocab, hidden], b [vocab] and label y_t::

    r = dtype(W h_t + b)                                   the head's output, rounded as the linear layer rounds it
    z = softcap(scale * r) / temperature                   softcap(u) = c tanh(u / c), or u
    lse = log sum_v exp z_v        p_v = exp(z_v - lse)
    log_prob = z_y - lse           entropy = lse - sum_v p_v z_v

Everything after ``r`` is fp32 (fp64 for fp64 inputs), and z - lse is always (z - m) - l with m = max_v z_v and
l = log sum_v exp(z_v - m), which are kept apart: where the model is sure of a token, l is far below the spacing of
floating-point numbers at m, and m + l would have lost it, and with it 1 - p_y, the gradient. Backward::

    d log_prob / d z_v = [v = y] - p_v
    d entropy  / d z_v = -p_v (log p_v + entropy)
    d lse      / d z_v = p_v
    d mean_z   / d z_v = 1 / vocab
    d z / d r          = scale (1 - tanh^2(scale r / c)) / temperature
    dh = dr W              dW = sum_t dr_t h_t^T              db = sum_t dr_t

Stages, and what never exists: [tokens, vocab] does not, in any dtype. Tokens whose label is ignored (padding, prompts)
are left out; the others are taken in chunks whose logits fill one reused buffer: (1) cuBLAS writes the chunk's logits
into the buffer; (2) one Triton program per token reads them once for the online logsumexp, a second time, last ones
first (they are in L2 still), to overwrite them by the gradient; (3) cuBLAS multiplies the buffer by W.

Label smoothing (e) and z-loss (c, of lse squared) are of the same pass. With them ``log_prob`` is a token's score,
minus its loss::

    score = (1 - e) log_prob - e (lse - mean_z) - c lse^2
    d score / d z_v = (1 - e) [v = y] + e / vocab - (1 + 2 c lse) p_v

Frozen head: a token's gradient is linear in its own incoming gradient g_t, so stage 3 runs in forward with g_t = 1 and
the backward only scales: dh_t = g_t u_t, where u_t = d score_t / d h_t is kept as [tokens, hidden]. Two GEMMs in all,
where recomputing logits in backward takes three. u is of unit scale, so storing it in bf16 or fp16 costs one relative
rounding and no underflow.

Trainable head: under a sum or a mean over tokens every token has the same g, so dW and db of g = 1 come out of forward
too, and the backward scales: three GEMMs. Else dW needs g_t while dr is built, so forward keeps only m and l and
backward computes each chunk's logits again. dW is summed in fp32 over chunks, which are larger then: the buffer may
take what that sum takes, and where all tokens fit there is no sum. The gradients of the entropy, of lse and of the mean
of z are computed likewise, whatever the head; as they are mostly asked for by nobody but a compiler that gives every
output a gradient of zeros, the backward looks first. All of them are one sum for each logit, whose coefficients each
token has::

    d / d z_v = g_label [v = y] - g_p p_v + g_mean - g_entropy p_v (log p_v + entropy)
    g_label = (1 - e) g_score        g_p = (1 + 2 c lse) g_score - g_lse        g_mean = (e g_score + g_mean_z) / vocab

The variants ``fused`` and ``filtered`` are the same without a buffer: ``_linear_cross_entropy_fused.py``.

Same maths as ``torch.nn.functional.cross_entropy`` and as TRL's ``ChunkedLogProbFunction`` (outputs and their meaning).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import sympy
import torch
import torch.nn.functional as F

from fastft.kernels import _linear_cross_entropy_fused as fused
from fastft.kernels import _products as products
from fastft.kernels._config import Config, Space, crowded
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._linear_cross_entropy_triton import _backward_kernel, _forward_kernel, _scale_kernel
from fastft.kernels._op import Cost, Op, Reason, Recompute, check_dtypes, raw_op, register, use_triton
from fastft.kernels._triton import triton


class LogProb(NamedTuple):
    """Per-token results, each [tokens], 0 (False) where the label is ignored; an output that was not asked for is an
    empty tensor [0].

    ``log_prob`` and ``entropy`` are fp32 and differentiable, ``mean_logits`` (mean of z over the vocabulary) and
    ``lse`` are fp32, differentiable if that was asked for, ``log_sum_sq_probs`` (log sum p^2) is fp32 without gradient,
    ``is_top1`` is bool: z has its first maximum at the label. fp64 inputs give fp64 where this says fp32.
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    mean_logits: torch.Tensor
    log_sum_sq_probs: torch.Tensor
    lse: torch.Tensor


class _Maths(NamedTuple):
    """The constants of one call, as the raw ops take them; ``dtype`` is what the head multiplies in."""

    ignore_index: int
    softcap: float | None
    logit_scale: float
    temperature: float
    label_smoothing: float
    z_loss: float
    dtype: torch.dtype
    way: str


#: Ways to compute it: in chunks of logits; in tiles, without any; in tiles, without the small gradients.
WAYS = ("chunks", "fused", "filtered")


class _Wanted(NamedTuple):
    """Which of the forward's outputs are asked for."""

    entropy: bool
    is_top1: bool
    mean_logits: bool
    log_sum_sq_probs: bool
    unit_gradient: bool = False
    unit_weight: bool = False
    unit_bias: bool = False

    def flags(self) -> dict[str, bool]:
        """Constants of the kernels."""
        return {name.upper(): wanted for name, wanted in zip(self._fields[:4], self, strict=False)}


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What the maths after the GEMM runs in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _head_dtype(hidden: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype the head multiplies in: the caller's, else autocast's, else the hidden states' own (what ``F.linear``
    would do).
    """
    if dtype is not None:
        return dtype
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return hidden.dtype


# ------------------------------------------------------------------------------------------------------------ reference


def _transform(
    raw: torch.Tensor, softcap: float | None, logit_scale: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(z, tanh)`` of raw logits that are already in the wide dtype; tanh is None without a softcap."""
    z = raw * logit_scale if logit_scale != 1.0 else raw
    tanh = None
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z = tanh * softcap
    return (z / temperature if temperature != 1.0 else z), tanh


def linear_log_prob_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = False,
    is_top1: bool = False,
    mean_logits: bool = False,
    log_sum_sq_probs: bool = False,
    entropy_gradient: bool = True,
    mean_logits_gradient: bool = False,
    lse_gradient: bool = False,
    dtype: torch.dtype | None = None,
) -> LogProb:
    """:func:`linear_log_prob` in plain differentiable PyTorch, with all the logits at once."""
    dtype = _head_dtype(hidden, dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        raw = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(_wide(dtype))
    z, _ = _transform(raw, softcap, logit_scale, temperature)
    valid = labels != ignore_index
    # Ignored rows are replaced before any maths, so that a NaN in them reaches neither a value nor a gradient.
    z = z.masked_fill(~valid[:, None], 0.0)
    log_p = torch.log_softmax(z, dim=-1)
    target = labels.masked_fill(~valid, 0)[:, None]
    none = z.new_empty(0)

    def kept(x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(~valid, 0)

    p = log_p.exp()
    # An impossible token (p = 0, log p = -inf) adds nothing, to the value and to the gradient.
    ent = kept(-(p * log_p.masked_fill(p == 0, 0)).sum(-1)) if entropy else none
    return LogProb(
        log_prob=kept(log_p.gather(1, target).squeeze(1)),
        entropy=ent if entropy_gradient else ent.detach(),
        is_top1=kept(z.argmax(-1) == target.squeeze(1)) if is_top1 else none.bool(),
        mean_logits=kept((z if mean_logits_gradient else z.detach()).mean(-1)) if mean_logits else none,
        log_sum_sq_probs=kept((2 * log_p.detach()).logsumexp(-1)) if log_sum_sq_probs else none,
        lse=kept((z if lse_gradient else z.detach()).logsumexp(-1)),
    )


# -------------------------------------------------------------------------------------------------------- configuration

#: Most tokens in a chunk, and most bytes that its logits may take (0.6 GiB, less what else a call makes). With powers
#: of two from 1024 on both products run nearly at the rate that they have for all tokens at once; fewer tokens read the
#: weight too often.
CHUNK_TOKENS, CHUNK_BYTES = 2048, 600 * 2**20
#: Tokens and columns of a product's tile, and how many an H100 works on at a time. The last wave of a product should
#: have tiles for nearly all: what FULL of them have is as good as any, what less than FILLED have is worth other chunks
#: (3584 columns: 1024 tokens are 112 tiles, 1152 are 126; 5120: 2048 tokens are 2.4 waves, 1664 are 1.97).
TILE, WAVE, FILLED, FULL = (128, 256), 132, 0.9, 0.95
#: Under a head that is trained, logits may take this share of its gradient's bytes in fp32, which every chunk but the
#: first reads and writes.
TRAINED_SHARE = 1.0


def chunk_rows(tokens: int, vocab: int, itemsize: int, hidden: int = 0, trained: bool = False) -> int:
    """Tokens in one chunk: a power of two within the limits above; another multiple of a tile's rows near it where that
    saves a chunk, or fills a wave of the gradient's product, of ``hidden`` columns, that the power of two does not; or
    less, so that chunks are of about equal size. ``trained``: the head's weight has a gradient.
    """
    most = min(max(CHUNK_BYTES // max(vocab * itemsize, 1), 1), CHUNK_TOKENS)
    if trained:
        most = max(most, int(TRAINED_SHARE * hidden * 4 / itemsize))
    power = 1 << most.bit_length() - 1
    if tokens <= power:
        return max(tokens, 1)
    rows, nine = TILE[0], power * 9 // 8
    if not trained and power >= 8 * rows:
        near = [n for n in range(power * 3 // 4, min(nine, most) + 1, rows) if _filled(n, hidden) >= FULL]
        if near and _filled(power, hidden) < FILLED:
            return min(near[-1], tokens)
        if nine <= most and math.ceil(tokens / nine) < math.ceil(tokens / power):
            return min(nine, tokens)
    even = math.ceil(tokens / math.ceil(tokens / power))
    return min(math.ceil(even / rows) * rows, power)


def _filled(rows: int, columns: int) -> float:
    """The share of a GPU that a product's waves of tiles occupy."""
    tiles = math.ceil(rows / TILE[0]) * math.ceil(max(columns, 1) / TILE[1])
    return tiles / (math.ceil(tiles / WAVE) * WAVE)


def _row_config(vocab: int) -> dict[str, int]:
    """Columns that a program takes at a time, and its warps: 16 fp32 values a thread at real vocabularies. Few programs
    on a multiprocessor, so that less lies between a logit's two readings.
    """
    block = min(1 << max(vocab - 1, 1).bit_length(), 16384)
    return {"BLOCK": block, "num_warps": max(min(block // 512, 32), 1)}


def _legal(config: Config, device: torch.device, dtype: torch.dtype, rows: int, vocab: int) -> str | None:
    return crowded(4 * config["BLOCK"], config["num_warps"])


#: Of both kernels. How many tokens make a chunk is memory's to decide, and is not tuned.
CONFIG = Space(
    "linear_cross_entropy.rows",
    {"BLOCK": (1024, 2048, 4096, 8192, 16384, 32768), "num_warps": (2, 4, 8, 16, 32)},
    lambda device, dtype, rows, vocab: _row_config(vocab),
    tokens=("rows",),
    sizes=("vocab",),
    legal=_legal,
)


# ------------------------------------------------------------------------------------------------------------ launchers


class _Head:
    """The head of one call: its operands in the dtype it multiplies in, and the one buffer that every chunk's logits
    are written to.
    """

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, maths: _Maths, trained: bool
    ) -> None:
        self.hidden, self.dtype, self.maths = hidden, maths.dtype, maths
        _, self.weight, self.bias = _operands(hidden[:0], weight, bias, maths.dtype)
        # The kernels are fp32 inside: fp64 runs in PyTorch on every device.
        self.triton = use_triton(hidden) and self.dtype != torch.float64
        tokens, vocab = hidden.shape[0], weight.shape[0]
        self.rows = chunk_rows(tokens, vocab, self.dtype.itemsize, weight.shape[1], trained)
        # Rows are padded to whole 16-byte words: at an odd vocabulary cuBLAS and the kernels would take one element at
        # a time. Kernels read and write the padding too; what is in it reaches no result.
        stride = -(-vocab // 16) * 16
        self.buffer = torch.empty((min(self.rows, tokens), stride), dtype=self.dtype, device=hidden.device)[:, :vocab]
        self.constants = {
            "V": vocab,
            "STRIDE": stride,
            "IGNORE_INDEX": maths.ignore_index,
            **_of_logits(maths),
            **CONFIG(hidden.device, self.dtype, self.rows, vocab),
        }

    def chunks(self) -> list[slice]:
        tokens = self.hidden.shape[0]
        return [slice(start, min(start + self.rows, tokens)) for start in range(0, tokens, self.rows)]

    def states(self, chunk: slice) -> torch.Tensor:
        return self.hidden[chunk].to(self.dtype)

    def logits(self, chunk: slice) -> torch.Tensor:
        """The chunk's raw logits, in the buffer."""
        out = self.buffer[: chunk.stop - chunk.start]
        if self.bias is None:
            return torch.mm(self.states(chunk), self.weight.t(), out=out)
        return torch.addmm(self.bias, self.states(chunk), self.weight.t(), out=out)


class _HeadGradients:
    """What goes to the weight and to the bias, in ``dtype``s, added up over chunks in fp32 (fp64)."""

    def __init__(self, head: _Head, weight: torch.dtype | None, bias: torch.dtype | None) -> None:
        self.head, self.dtypes = head, (weight, bias)
        self.once = len(head.chunks()) == 1 and weight == head.dtype
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def add(self, logits: torch.Tensor, chunk: slice, labels: torch.Tensor | None) -> None:
        """The gradients of the chunk's ``logits``. ``labels``: None if all count."""
        weight, bias = self.dtypes
        if weight is not None:
            states = self.head.states(chunk)
            if labels is not None:
                # 0 times a NaN hidden state of an ignored token would be NaN in every row of dW.
                states = states.masked_fill((labels[chunk] == self.head.maths.ignore_index)[:, None], 0)
            if self.once:
                self.weight = products.mm(logits.t(), states)
            else:
                self.weight = _add_matmul(self.weight, logits.t(), states, _wide(self.head.dtype))
        if bias is not None:
            found = logits.sum(0, dtype=_wide(self.head.dtype))
            self.bias = found if self.bias is None else self.bias.add_(found)

    def found(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What nobody wants is empty, and zeros what no token is for."""
        parts, sizes = (self.weight, self.bias), ((*self.head.weight.shape,), (self.head.weight.shape[0],))
        results = []
        for part, dtype, size in zip(parts, self.dtypes, sizes, strict=True):
            if dtype is None:
                results.append(self.head.hidden.new_empty((0, *size[1:])))
            else:
                results.append(self.head.hidden.new_zeros(size, dtype=dtype) if part is None else part.to(dtype))
        return results[0], results[1]


def _of_logits(maths: _Maths) -> dict[str, Any]:
    """Constants of the kernels: how z is made of a raw logit."""
    return {
        "SCALE": float(maths.logit_scale),
        "SOFTCAP": float(maths.softcap or 1.0),
        "HAS_SOFTCAP": maths.softcap is not None,
        "INV_TEMPERATURE": 1.0 / maths.temperature,
    }


def _operands(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """In the dtype that the head multiplies in."""
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _in_tiles(hidden: torch.Tensor, maths: _Maths) -> bool:
    """Whether the kernels without a buffer run. Where Triton does not, the ways differ in nothing."""
    return maths.way != "chunks" and use_triton(hidden) and maths.dtype != torch.float64


def _check_labels(labels: torch.Tensor, vocab: int, ignore_index: int) -> None:
    """On the CPU, where looking costs no synchronisation, a label outside the vocabulary is an error, as in
    ``F.cross_entropy``.
    """
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= vocab))
    if bool(outside.any()):
        raise IndexError(
            f"label {int(labels[outside][0])} is out of bounds: labels must be in [0, {vocab}) or be ignore_index, "
            f"which is {ignore_index}"
        )


def _capturing(x: torch.Tensor) -> bool:
    """Whether a CUDA graph is being recorded: nothing may wait for the GPU then."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class _Scored:
    """How many labels count. Asked of a GPU when this is made, and waited for when it is wanted, which costs far less
    than a GEMM over padding and prompts: what is to be done on the CPU comes between. While a CUDA graph is recorded
    nobody can wait: all labels count then.
    """

    def __init__(self, labels: torch.Tensor, ignore_index: int) -> None:
        self.labels, self.counts = labels, labels != ignore_index
        self.all = False  # whether all count; known after :meth:`positions`
        self.number: torch.Tensor | None = None
        if not _capturing(labels):
            self.number = torch.empty((), dtype=torch.int64, pin_memory=labels.is_cuda)
            self.number.copy_(self.counts.sum(), non_blocking=True)
            self.event = torch.cuda.current_stream(labels.device).record_event() if labels.is_cuda else None

    def positions(self) -> torch.Tensor | None:
        """Those of the labels that count, when enough others (1 in 16) can be left out of every GEMM; else None."""
        if self.number is None:
            return None
        if self.event is not None:
            self.event.synchronize()
        number = int(self.number)
        self.all = number == self.labels.shape[0]
        if 16 * number > 15 * self.labels.shape[0]:
            return None
        return (~self.counts).sort(stable=True).indices[:number]


def _read(options: tuple[Any, ...]) -> tuple[_Maths, _Wanted]:
    """The forward's options. Without a buffer there is nothing that it could make the unit gradient of."""
    maths, wanted = _Maths(*options[:8]), _Wanted(*options[8:])
    if maths.way != "chunks":
        wanted = wanted._replace(unit_gradient=False, unit_weight=False, unit_bias=False)
    return maths, wanted


def _forward(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, ...]:
    maths, wanted = _read(options)
    if not hidden.is_cuda:
        _check_labels(labels, weight.shape[0], maths.ignore_index)
    scored = _Scored(labels, maths.ignore_index)
    run = _prepared(hidden, weight, bias, labels, maths, wanted)
    keep = scored.positions()
    if keep is None:
        return run(scored.all)
    del run  # and its buffer
    *found, unit_weight, unit_bias = _prepared(hidden[keep], weight, bias, labels[keep], maths, wanted)(True)
    whole = _empty_outputs(hidden, maths.dtype, wanted)
    each = (w.zero_().index_copy_(0, keep, f) if w.shape[0] else w for w, f in zip(whole, found, strict=True))
    return *each, unit_weight, unit_bias


def _prepared(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    maths: _Maths,
    wanted: _Wanted,
) -> Callable[[bool], tuple[torch.Tensor, ...]]:
    """Makes what all tokens take; the result computes, told whether all of them count."""
    labels = labels.contiguous()
    outputs = _empty_outputs(hidden, maths.dtype, wanted)
    if _in_tiles(hidden, maths):

        def in_tiles(_: bool) -> tuple[torch.Tensor, ...]:
            fused.forward(
                *_operands(hidden, weight, bias, maths.dtype),
                labels,
                outputs[:7],
                _of_logits(maths),
                ignore_index=maths.ignore_index,
                smoothing=float(maths.label_smoothing),
                z_loss=float(maths.z_loss),
                wanted=wanted.flags(),
            )
            return *outputs, *_empty_units(weight, bias, wanted)

        return in_tiles
    units = [unit.dtype if unit.shape[0] else None for unit in _empty_units(weight[:1], bias, wanted)]
    head = _Head(hidden, weight, bias, maths, wanted.unit_weight)
    gradients = _HeadGradients(head, *units)

    def in_chunks(every: bool) -> tuple[torch.Tensor, ...]:
        for chunk in head.chunks():
            logits = head.logits(chunk)
            # An output nobody asked for is empty; its kernel argument is never touched.
            parts = [x[chunk] if x.shape[0] else x for x in outputs[:7]]
            if head.triton:
                _forward_kernel[(logits.shape[0],)](
                    logits,
                    labels[chunk],
                    *parts,
                    SMOOTHING=float(maths.label_smoothing),
                    Z_LOSS=float(maths.z_loss),
                    **wanted.flags(),
                    GRADIENT=any(wanted[4:]),
                    **head.constants,
                )
            else:
                _forward_chunk(logits, labels[chunk], parts, maths, any(wanted[4:]))
            if wanted.unit_gradient:
                products.matmul_into(outputs[7][chunk], logits, head.weight)
            gradients.add(logits, chunk, None if every else labels)
        return *outputs, *gradients.found()

    return in_chunks


def _forward_chunk(
    logits: torch.Tensor, labels: torch.Tensor, parts: list[torch.Tensor], maths: _Maths, gradient: bool
) -> None:
    """``_forward_kernel`` in PyTorch, for tensors that Triton does not take."""
    score, top, log_sum, entropy, is_top1, mean_logits, log_sum_sq_probs = parts
    ignored, smoothing, vocab = labels == maths.ignore_index, maths.label_smoothing, logits.shape[1]
    z, tanh = _transform(logits.to(score.dtype), maths.softcap, maths.logit_scale, maths.temperature)
    target = labels.masked_fill(ignored, 0)[:, None]
    largest = z.amax(-1)
    largest = largest.masked_fill_(largest == -math.inf, 0)
    log_z = (z - largest[:, None]).exp_().sum(-1).log_()
    log_p = (z - largest[:, None]).sub_(log_z[:, None])
    top.copy_(largest.masked_fill(ignored, 0))
    log_sum.copy_(log_z.masked_fill(ignored, 0))
    lse, found = largest + log_z, log_p.gather(1, target).squeeze(1)
    if smoothing:
        found = (1 - smoothing) * found - smoothing * (lse - z.mean(-1))
    if maths.z_loss:
        found = found - maths.z_loss * lse * lse
    score.copy_(found.masked_fill(ignored, 0))
    if mean_logits.shape[0]:
        mean_logits.copy_(z.mean(-1).masked_fill(ignored, 0))
    if is_top1.shape[0]:
        is_top1.copy_((z.argmax(-1) == target.squeeze(1)).masked_fill(ignored, False))
    p = torch.exp(log_p)
    if entropy.shape[0]:
        entropy.copy_(-(p * log_p).masked_fill_(p == 0, 0).sum(-1).masked_fill(ignored, 0))
    if log_sum_sq_probs.shape[0]:
        log_sum_sq_probs.copy_((p * p).sum(-1).log().masked_fill(ignored, 0))
    if gradient:
        dr = p.neg_()
        if maths.z_loss:
            dr.mul_(1 + 2 * maths.z_loss * lse[:, None])
        dr.scatter_add_(1, target, torch.full_like(target, 1 - smoothing, dtype=p.dtype))
        if smoothing:
            dr.add_(smoothing / vocab)
        dr.mul_(maths.logit_scale / maths.temperature)
        if tanh is not None:
            dr.mul_(1 - tanh * tanh)
        logits.copy_(dr.masked_fill_(ignored[:, None], 0))


def _empty_outputs(hidden: torch.Tensor, dtype: torch.dtype, wanted: _Wanted) -> tuple[torch.Tensor, ...]:
    """(score, the largest z, the log of the sum over it, entropy, is_top1, mean_logits, log_sum_sq_probs, unit
    gradient), what is not asked for being empty.
    """
    tokens, wide = hidden.shape[0], _wide(dtype)

    def per_token(wanted: bool, kind: torch.dtype = wide) -> torch.Tensor:
        return hidden.new_empty((tokens if wanted else 0,), dtype=kind)

    return (
        per_token(True),
        per_token(True),
        per_token(True),
        per_token(wanted.entropy),
        per_token(wanted.is_top1, torch.bool),
        per_token(wanted.mean_logits),
        per_token(wanted.log_sum_sq_probs),
        hidden.new_empty((tokens if wanted.unit_gradient else 0, hidden.shape[1]), dtype=dtype),
    )


def _empty_units(weight: torch.Tensor, bias: torch.Tensor | None, wanted: _Wanted) -> tuple[torch.Tensor, torch.Tensor]:
    """The unit gradients of weight and bias: of all tokens together, so that fp16 could overflow."""

    def unit(wanted: bool, of: torch.Tensor, *size: int) -> torch.Tensor:
        dtype = torch.float32 if of.dtype == torch.float16 else of.dtype
        return weight.new_empty((weight.shape[0] if wanted else 0, *size), dtype=dtype)

    return unit(wanted.unit_weight, weight, weight.shape[1]), unit(wanted.unit_bias, weight if bias is None else bias)


def _forward_fake(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, ...]:
    maths, wanted = _read(options)
    return *_empty_outputs(hidden, maths.dtype, wanted), *_empty_units(weight, bias, wanted)


def _empty_grads(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias, what is not wanted being empty."""
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return (
        hidden.new_empty((hidden.shape[0] if need_hidden else 0, hidden.shape[1])),
        weight.new_empty((weight.shape[0] if need_weight else 0, weight.shape[1])),
        weight.new_empty((weight.shape[0] if need_bias else 0,), dtype=bias_dtype),
    )


def _add_matmul(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``total + a @ b`` in fp32 (fp64), in ``total``'s place, without rounding the product to the operands' dtype
    first. None: there is no total yet.
    """
    if a.dtype != dtype and not a.is_cuda:
        a, b = a.to(dtype), b.to(dtype)
    if a.dtype == dtype:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if total is None:
        return products.mm_single(a, b)
    if not products.sums_all(a, b):
        return total.add_(products.mm_single(a, b))
    return torch.addmm(total, a, b, out_dtype=dtype, out=total)


class _Coefficients(NamedTuple):
    """What each token multiplies the parts of its logits' gradients by, [tokens] each; None: that part is nobody's."""

    label: torch.Tensor | None
    p: torch.Tensor | None
    mean: torch.Tensor | None
    entropy: torch.Tensor | None

    def of(self, chunk: slice) -> _Coefficients:
        return _Coefficients(*(None if g is None else g[chunk] for g in self))

    def least(self, maths: _Maths) -> torch.Tensor | None:
        """Up to where a gradient of a logit is small beside its token's coefficients: 2^-12 of the largest in bf16, a
        32nd of the dtype's spacing. None: filter nothing.
        """
        sizes = [g for g in (self.label, self.p, self.entropy) if g is not None]
        if maths.way != "filtered" or not sizes:
            return None
        largest = torch.stack(sizes).abs().amax(0)
        return largest * (abs(maths.logit_scale / maths.temperature) * torch.finfo(maths.dtype).eps / 32)


def _coefficients(
    grads: tuple[torch.Tensor | None, ...], top: torch.Tensor, log_sum: torch.Tensor, vocab: int, maths: _Maths
) -> _Coefficients:
    """Out of the gradients of score, entropy, mean and lse."""
    wide = _wide(maths.dtype)
    g_score, g_entropy, g_mean, g_lse = (None if g is None else g.to(wide).contiguous() for g in grads)
    label = p = g_score
    if g_score is not None and maths.z_loss:
        p = g_score * (1 + 2 * maths.z_loss * (top + log_sum))
    if g_score is not None and maths.label_smoothing:
        label, smooth = g_score * (1 - maths.label_smoothing), g_score * maths.label_smoothing
        g_mean = smooth if g_mean is None else g_mean + smooth
    if g_lse is not None:
        p = -g_lse if p is None else p - g_lse
    return _Coefficients(label, p, None if g_mean is None else g_mean / vocab, g_entropy)


def _backward(
    grad_score: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    grad_mean_logits: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    top: torch.Tensor,
    log_sum: torch.Tensor,
    entropy: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    maths, need = _Maths(*options[:8]), options[8:]
    grads = (grad_score, grad_entropy, grad_mean_logits, grad_lse)
    if grad_score is None and not _capturing(hidden) and not any(bool(g.any()) for g in grads if g is not None):
        # Waiting for the GPU once costs far less than the GEMMs.
        dh, dw, db = _empty_grads(hidden, weight, bias, *need)
        return dh.zero_(), dw.zero_(), db.zero_()
    scored = _Scored(labels, maths.ignore_index)
    keep = scored.positions()
    if keep is None:
        return _backward_all(grads, hidden, weight, bias, labels, (top, log_sum, entropy), maths, scored.all, *need)
    picked = tuple(None if g is None else g[keep] for g in grads)
    saved = (top[keep], log_sum[keep], entropy[keep] if entropy.shape[0] else entropy)
    dh, dw, db = _backward_all(picked, hidden[keep], weight, bias, labels[keep], saved, maths, True, *need)
    return hidden.new_zeros(hidden.shape).index_copy_(0, keep, dh) if need[0] else dh, dw, db


def _backward_all(
    grads: tuple[torch.Tensor | None, ...],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    maths: _Maths,
    every: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = labels.contiguous()
    top, log_sum, entropy = saved
    coefficients = _coefficients(grads, top, log_sum, weight.shape[0], maths)
    bias_dtype = weight.dtype if bias is None else bias.dtype
    if _in_tiles(hidden, maths):
        dh, dw, db = fused.backward(
            *_operands(hidden, weight, bias, maths.dtype),
            labels,
            saved,
            coefficients,
            coefficients.least(maths),
            _of_logits(maths),
            ignore_index=maths.ignore_index,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
        )
        return dh.to(hidden.dtype), dw.to(weight.dtype), db.to(bias_dtype)
    head = _Head(hidden, weight, bias, maths, need_weight)
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else (0, hidden.shape[1]), dtype=maths.dtype)
    gradients = _HeadGradients(head, weight.dtype if need_weight else None, bias_dtype if need_bias else None)
    for chunk in head.chunks():
        logits, each = head.logits(chunk), coefficients.of(chunk)
        of_chunk = (top[chunk], log_sum[chunk], entropy[chunk] if entropy.shape[0] else top[chunk])
        if head.triton:
            _backward_kernel[(logits.shape[0], triton.cdiv(weight.shape[0], head.constants["BLOCK"]))](
                logits,
                labels[chunk],
                *of_chunk,
                *(top if g is None else g for g in each),
                LABEL=each.label is not None,
                P=each.p is not None,
                MEAN=each.mean is not None,
                ENTROPY=each.entropy is not None,
                **head.constants,
            )
        else:
            _backward_chunk(logits, labels[chunk], of_chunk, each, maths)
        if need_hidden:
            products.matmul_into(grad_hidden[chunk], logits, head.weight)
        gradients.add(logits, chunk, None if every else labels)
    return grad_hidden.to(hidden.dtype), *gradients.found()


def _backward_chunk(
    logits: torch.Tensor,
    labels: torch.Tensor,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    each: _Coefficients,
    maths: _Maths,
) -> None:
    """``_backward_kernel`` in PyTorch, for tensors that Triton does not take."""
    top, log_sum, entropy = saved
    ignored = labels == maths.ignore_index
    z, tanh = _transform(logits.to(top.dtype), maths.softcap, maths.logit_scale, maths.temperature)
    log_p = (z - top[:, None]) - log_sum[:, None]
    p = log_p.exp()
    dr = torch.zeros_like(p)
    if each.p is not None:
        dr.addcmul_(p, each.p[:, None], value=-1)
    if each.label is not None:
        dr.scatter_add_(1, labels.masked_fill(ignored, 0)[:, None], each.label[:, None])
    if each.mean is not None:
        dr += each.mean[:, None]
    if each.entropy is not None:
        dr -= each.entropy[:, None] * (p * (log_p + entropy[:, None])).masked_fill_(p == 0, 0)
    dr *= maths.logit_scale / maths.temperature
    if tanh is not None:
        dr *= 1 - tanh * tanh
    logits.copy_(dr.masked_fill_(ignored[:, None], 0))


def _backward_fake(
    grad_score: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    grad_mean_logits: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_grads(hidden, weight, bias, *rest[-3:])


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_MATHS = (
    "int ignore_index, float? softcap, float logit_scale, float temperature, float label_smoothing, float z_loss, "
    "ScalarType dtype, str way"
)

_forward_op = raw_op(
    f"linear_log_prob({_HEAD}, {_MATHS}, bool entropy, bool is_top1, bool mean_logits, bool log_sum_sq_probs, "
    "bool unit_gradient, bool unit_weight, bool unit_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = raw_op(
    "linear_log_prob_backward(Tensor? grad_score, Tensor? grad_entropy, Tensor? grad_mean_logits, "
    f"Tensor? grad_lse, {_HEAD}, Tensor top, Tensor log_sum, Tensor entropy, {_MATHS}, bool need_hidden, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


#: Numbers that a program of the scaling takes: 16 bytes for each of its 128 threads, four times.
SCALED = 4096


def _scale(unit: torch.Tensor, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not use_triton(unit) or torch.float64 in (unit.dtype, dtype) or not unit.is_contiguous() or unit.numel() == 0:
        return (unit * g.view(-1, *[1] * (unit.dim() - 1))).to(dtype)
    out = torch.empty_like(unit, dtype=dtype)
    columns = unit.numel() // g.shape[0]
    blocks = triton.cdiv(columns, SCALED)
    _scale_kernel[(g.shape[0] * blocks,)](unit, g.float(), out, columns, blocks, BLOCK=SCALED, num_warps=4)
    return out


_scale_op = raw_op(
    "linear_log_prob_scale(Tensor unit, Tensor g, ScalarType dtype) -> Tensor",
    _scale,
    lambda unit, g, dtype: torch.empty_like(unit, dtype=dtype),
)


def _untraced(x: torch.Tensor) -> bool:
    return type(x) is torch.Tensor


def _scaled(unit: torch.Tensor, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """unit · g, of one g for all or one for each row, in fp32 (fp64) and rounded once. PyTorch multiplies by one number
    on a GPU at a third of a copy's rate, and rounds it to a half-precision unit's dtype before. In a graph it is plain
    PyTorch, for Inductor to fuse with what follows; also under ``create_graph``.
    """
    g = g.reshape(-1)
    if _untraced(unit) and not torch.is_grad_enabled():
        return _scale_op(unit, g, dtype)
    return (unit * g.view(-1, *[1] * (unit.dim() - 1))).to(dtype)


# ----------------------------------------------------------------------------------------------- autograd and functions


class _LinearLogProb(torch.autograd.Function):
    """Frozen head: the unit gradient comes out of forward. Everything else backward computes from logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        maths: _Maths,
        wanted: _Wanted,
        gradients: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        entropy_gradient, mean_gradient = gradients[0] and wanted.entropy, gradients[1] and wanted.mean_logits
        differentiable = (entropy_gradient, mean_gradient, gradients[2])
        # With a gradient of lse or the mean, the unit gradient would be of no use: backward needs the logits anyway.
        frozen = need_hidden and not (need_weight or need_bias or any(differentiable[1:])) and maths.way == "chunks"
        *outputs, unit, _, _ = _forward_op(hidden, weight, bias, labels, *maths, *wanted._replace(unit_gradient=frozen))
        score, top, log_sum, entropy, is_top1, mean_logits, log_sum_sq_probs = outputs
        lse = top + log_sum
        ctx.maths, ctx.frozen, ctx.hidden_dtype, ctx.differentiable = maths, frozen, hidden.dtype, differentiable
        if frozen and not entropy_gradient:
            ctx.save_for_backward(unit, labels)
        else:
            ctx.save_for_backward(unit, labels, hidden, weight, bias, top, log_sum, entropy)
        sometimes = zip((entropy, mean_logits, lse), differentiable, strict=True)
        ctx.mark_non_differentiable(is_top1, log_sum_sq_probs, *(x for x, wanted in sometimes if not wanted))
        return score, entropy, is_top1, mean_logits, log_sum_sq_probs, lse

    @staticmethod
    def backward(
        ctx: Any, grad_score: Any, grad_entropy: Any, _top1: Any, grad_mean: Any, _squares: Any, grad_lse: Any
    ) -> tuple[torch.Tensor | None, ...]:
        unit, labels, *rest = ctx.saved_tensors
        # Dynamo gives zeros even for what was marked as not differentiable.
        incoming = zip((grad_entropy, grad_mean, grad_lse), ctx.differentiable, strict=True)
        others = [g if wanted else None for g, wanted in incoming]
        grads: list[torch.Tensor | None] = [None, None, None]
        if ctx.frozen and grad_score is not None:
            # An ignored token's g may be inf or NaN (a division by no tokens under "mean").
            g = grad_score.masked_fill(labels == ctx.maths.ignore_index, 0)
            grads[0] = _scaled(unit, g, ctx.hidden_dtype)
            grad_score = None
        if any(g is not None for g in (grad_score, *others)):
            hidden, weight, bias, top, log_sum, entropy = rest
            needs = ctx.needs_input_grad[:3]
            operands = (hidden, weight, bias, labels, top, log_sum, entropy)
            found = _backward_op(grad_score, *others, *operands, *ctx.maths, *needs)
            more = [grad if need else None for grad, need in zip(found, needs, strict=True)]
            grads = [b if a is None else a if b is None else a + b for a, b in zip(grads, more, strict=True)]
        return *grads, None, None, None, None


class _SumOfScores(torch.autograd.Function):
    """Trained head: one gradient for all tokens, so that the head's own comes out of forward with theirs."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        maths: _Maths,
    ) -> torch.Tensor:
        wanted = _Wanted(False, False, False, False, *ctx.needs_input_grad[:3])
        score, *_, unit, unit_weight, unit_bias = _forward_op(hidden, weight, bias, labels, *maths, *wanted)
        ctx.save_for_backward(labels, unit, unit_weight, unit_bias)
        ctx.ignore_index = maths.ignore_index
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return score.sum()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        labels, *units = ctx.saved_tensors
        # A division by no tokens under "mean" makes g inf or NaN, for nobody.
        counts = labels != ctx.ignore_index
        each = g.masked_fill(~counts, 0), *[g.masked_fill(~counts.any(), 0)] * 2
        found = zip(units, each, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return *(_scaled(unit, of, dtype) if need else None for unit, of, dtype, need in found), None, None


def _scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    maths: _Maths,
    wanted: _Wanted,
    gradients: tuple[bool, bool, bool] = (False, False, False),
) -> LogProb:
    """The op, with a token's score in the place of its log-probability. ``gradients``: whether entropy, mean and lse
    have one.
    """
    if torch.is_grad_enabled():
        return LogProb(*_LinearLogProb.apply(hidden, weight, bias, labels, maths, wanted, gradients))
    # autograd.Function reports needs_input_grad even here, and would compute the gradient for nothing.
    score, top, log_sum, *optional, _, _, _ = _forward_op(hidden, weight, bias, labels, *maths, *wanted)
    return LogProb._make((score, *optional, top + log_sum))


def _log_prob(
    way: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = False,
    is_top1: bool = False,
    mean_logits: bool = False,
    log_sum_sq_probs: bool = False,
    entropy_gradient: bool = True,
    mean_logits_gradient: bool = False,
    lse_gradient: bool = False,
    dtype: torch.dtype | None = None,
) -> LogProb:
    _check_logits(softcap, temperature)
    maths = _Maths(ignore_index, softcap, logit_scale, temperature, 0.0, 0.0, _head_dtype(hidden, dtype), way)
    wanted = _Wanted(entropy, is_top1, mean_logits, log_sum_sq_probs)
    return _scores(hidden, weight, bias, labels, maths, wanted, (entropy_gradient, mean_logits_gradient, lse_gradient))


def linear_log_prob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    entropy: bool = False,
    is_top1: bool = False,
    mean_logits: bool = False,
    log_sum_sq_probs: bool = False,
    entropy_gradient: bool = True,
    mean_logits_gradient: bool = False,
    lse_gradient: bool = False,
    dtype: torch.dtype | None = None,
) -> LogProb:
    """Per-token log-probability of ``labels`` under ``softcap(logit_scale * linear(hidden, weight, bias)) /
    temperature``.

    ``hidden`` [tokens, hidden], ``weight`` [vocab, hidden], ``bias`` [vocab] or None, ``labels`` int64 [tokens].
    ``dtype`` is what the head multiplies in and its logits are rounded to (default: as ``F.linear``, i.e. autocast's
    dtype or the hidden states' own); the maths after it is fp32. Returns :class:`LogProb`. ``entropy_gradient=False``
    makes the entropy a constant; ``mean_logits_gradient`` and ``lse_gradient`` make these two differentiable, for which
    a frozen head costs one more GEMM.

    Raises ``ValueError`` for a temperature or softcap that is not positive; ``IndexError`` on the CPU for a label
    outside [0, vocab) that is not ``ignore_index`` (on a GPU such a label gives NaN).
    """
    return _log_prob(
        "chunks",
        hidden,
        weight,
        bias,
        labels,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        temperature=temperature,
        entropy=entropy,
        is_top1=is_top1,
        mean_logits=mean_logits,
        log_sum_sq_probs=log_sum_sq_probs,
        entropy_gradient=entropy_gradient,
        mean_logits_gradient=mean_logits_gradient,
        lse_gradient=lse_gradient,
        dtype=dtype,
    )


def fused_log_prob(*args: Any, **options: Any) -> LogProb:
    """:func:`linear_log_prob` without a buffer of logits: its variant ``fused``."""
    return _log_prob("fused", *args, **options)


def filtered_log_prob(*args: Any, **options: Any) -> LogProb:
    """:func:`linear_log_prob` without a buffer of logits and without what small gradients add, its variant
    ``filtered``. The results are exact; the gradients are not: a gradient of a logit may be missing that is at most
    2^-12 (bf16; 2^-15 in fp16, 2^-28 in fp32) of its token's largest coefficient.
    """
    return _log_prob("filtered", *args, **options)


def _reduce(loss: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    if reduction == "none":
        return loss
    return _averaged(loss.sum(), labels, ignore_index, reduction)


def _averaged(total: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    # No valid token: 0 / 0 = NaN under "mean", as F.cross_entropy has it.
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


def _check_logits(softcap: float | None, temperature: float = 1.0) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")


def _check_loss(reduction: str, label_smoothing: float, z_loss: float) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0, got {label_smoothing}")
    if not z_loss >= 0.0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")


def linear_cross_entropy_reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """:func:`linear_cross_entropy` as transformers has it: the linear layer, ``.float()``, ``F.cross_entropy``."""
    _check_loss(reduction, label_smoothing, z_loss)
    dtype = _head_dtype(hidden, dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        raw = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(_wide(dtype))
    z, _ = _transform(raw, softcap, logit_scale, 1.0)
    z, flat = z.flatten(0, -2), labels.reshape(-1)
    loss = F.cross_entropy(z, flat, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
    if z_loss:
        squares = z.logsumexp(-1).square().masked_fill(flat == ignore_index, 0)
        loss = loss + z_loss * _reduce(squares, flat, ignore_index, reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


def _cross_entropy(
    way: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    _check_loss(reduction, label_smoothing, z_loss)
    _check_logits(softcap)
    flat, dtype = labels.reshape(-1), _head_dtype(hidden, dtype)
    maths = _Maths(ignore_index, softcap, logit_scale, 1.0, label_smoothing, z_loss, dtype, way)
    rows = hidden.reshape(-1, hidden.shape[-1])
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias))
    if trained and reduction != "none" and way == "chunks":
        return _averaged(-_SumOfScores.apply(rows, weight, bias, flat, maths), flat, ignore_index, reduction)
    score = _scores(rows, weight, bias, flat, maths, _Wanted(False, False, False, False)).log_prob
    loss = _reduce(-score, flat, ignore_index, reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``F.cross_entropy(softcap(logit_scale * linear(hidden, weight, bias)).float(), labels)`` without the logits.

    ``hidden`` [..., hidden], ``labels`` int64 [...], already shifted; the rest as in :func:`linear_log_prob`.
    ``reduction`` "mean" is over the labels that are not ``ignore_index`` (NaN when there is none), "sum" gives 0 then,
    "none" gives fp32 [...]. ``label_smoothing`` is that of ``F.cross_entropy``, ``z_loss`` the weight of lse squared,
    which is added to each token's loss. Raises ``ValueError`` for another reduction, a ``label_smoothing`` outside of
    [0, 1], a negative ``z_loss``.
    """
    return _cross_entropy(
        "chunks",
        hidden,
        weight,
        bias,
        labels,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        dtype=dtype,
    )


def fused_cross_entropy(*args: Any, **options: Any) -> torch.Tensor:
    """:func:`linear_cross_entropy` without a buffer of logits: its variant ``fused``."""
    return _cross_entropy("fused", *args, **options)


def filtered_cross_entropy(*args: Any, **options: Any) -> torch.Tensor:
    """:func:`linear_cross_entropy` without a buffer of logits and without what small gradients add, its variant
    ``filtered``: see :func:`filtered_log_prob`.
    """
    return _cross_entropy("filtered", *args, **options)


def supported(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, **options: Any
) -> Reason | None:
    """None, or why the head cannot be fused with its loss. Takes the arguments of either function; fake tensors will
    do.
    """
    # Storage dtypes: the GEMM runs in ``dtype``, so that hidden states and head may differ (fp32 weights under
    # autocast).
    if reason := check_dtypes(hidden, weight, bias):
        return reason
    dtype = options.get("dtype")
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16, torch.float64):
        return Reason("dtype", f"the head multiplies in {dtype}, not in float32, float16 or bfloat16")
    # A quantised or sharded head is not a [vocab, hidden] matrix that torch.mm takes.
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        return Reason("shape", f"the head's weight {tuple(weight.shape)} is not [vocab, {hidden.shape[-1]}]")
    # Class probabilities as targets need every log-probability, not one for each token.
    if labels.dtype != torch.int64:
        return Reason("labels", f"labels are {labels.dtype}; the loss is fused for int64 class indices")
    # The raw ops are registered for these two.
    if hidden.device.type not in ("cpu", "cuda"):
        return Reason("device", f"device {hidden.device.type!r} has no kernel; cuda and cpu have")
    if options.get("reduction", "mean") not in ("mean", "sum", "none"):
        return Reason("reduction", f"reduction {options['reduction']!r} is not 'mean', 'sum' or 'none'")
    return None


def filtered_supported(*args: Any, **options: Any) -> Reason | None:
    """As :func:`supported`, for the variant ``filtered``."""
    if reason := supported(*args, **options):
        return reason
    # What the mean gives a logit is below the threshold for all of them, and would be dropped.
    if options.get("label_smoothing") or options.get("mean_logits_gradient"):
        return Reason("filter", "label smoothing spreads its gradient over the vocabulary, and a filter drops that")
    return None


def cost(hidden: Any, weight: Any, bias: Any, labels: Any, **options: Any) -> Cost:
    """Cost of a frozen head's forward and backward together, in the symbols tokens N, hidden H and vocabulary V (bytes
    of bf16).

    FLOPs: two GEMMs. Moved: W twice for each chunk at least once, the logits written by one GEMM, read, overwritten and
    read by the other, hidden states and their gradient. Kept: the unit gradient and the labels.
    """
    N, H, V = sympy.symbols("N H V", integer=True, positive=True)
    return Cost(flops=4 * N * H * V, bytes_moved=2 * (2 * H * V + 4 * N * V + 4 * N * H), bytes_kept=2 * N * H + 8 * N)


# --------------------------------------------------------------------------------------------------------------- calls


def sizes(model: Model) -> Iterator[dict[str, Any]]:
    """The head."""
    yield {**model.tokens, "hidden": model.hidden, "vocab": model.vocab, "softcap": model.logit_softcap}


def inputs(
    new: New,
    *,
    batch: int,
    seq: int,
    hidden: int,
    vocab: int,
    softcap: float | None,
    trained: bool = False,
    ignored: float = 0.0,
) -> Inputs:
    """Hidden states [tokens, hidden], a head [vocab, hidden], frozen or ``trained``, and labels, of which the first of
    each sequence are ``ignored`` (a prompt's), as a share of its tokens.
    """
    h, weight = new(batch * seq, hidden, grad=True), new(vocab, hidden, scale=hidden**-0.5, grad=trained)
    labels = new.integers(vocab, batch * seq)
    labels.view(batch, seq)[:, : round(ignored * seq)] = -100
    return Inputs((h, weight, None, labels), {"softcap": softcap}, [h, weight] if trained else [h])


register(
    Op(
        name="linear_log_prob",
        call=linear_log_prob,
        reference=linear_log_prob_reference,
        supported=supported,
        raw=("linear_log_prob", "linear_log_prob_backward", "linear_log_prob_scale"),
        recompute=Recompute.KEEP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
        variants={"fused": (fused_log_prob, supported), "filtered": (filtered_log_prob, filtered_supported)},
        by_name_only=("filtered",),
    )
)
register(
    Op(
        name="linear_cross_entropy",
        call=linear_cross_entropy,
        reference=linear_cross_entropy_reference,
        supported=supported,
        raw=("linear_log_prob", "linear_log_prob_backward", "linear_log_prob_scale"),
        recompute=Recompute.KEEP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
        variants={"fused": (fused_cross_entropy, supported), "filtered": (filtered_cross_entropy, filtered_supported)},
        by_name_only=("filtered",),
    )
)
