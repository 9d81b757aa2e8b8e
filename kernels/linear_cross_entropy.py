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

Frozen head: a token's gradient is linear in its own incoming gradient g_t, so stage 3 runs in forward with g_t = 1 and
the backward only scales: dh_t = g_t u_t, where u_t = d log_prob_t / d h_t is kept as [tokens, hidden]. Two GEMMs in
all, where recomputing logits in backward takes three. u is of unit scale, so storing it in bf16 or fp16 costs one
relative rounding and no underflow.

Trainable head: dW needs g_t while dr is built, so forward keeps only m and l and backward computes each chunk's logits
again, with dW summed in fp32 over chunks. The gradients of the entropy, of lse and of the mean of z are computed
likewise, whatever the head; as it is
mostly asked for by nobody but a compiler that gives every output a gradient of zeros, the backward looks first.

Label smoothing and z-loss are sums of these: with g of each output, a token's gradient is ``g_log_prob [v = y] -
(g_log_prob - g_lse) p_v + g_mean / vocab`` (and the entropy's). The kernel knows one coefficient for [v = y] and p, so
it is given that of p; the mean's part is added to the buffer, and the label's entry is put right afterwards.

Same maths as ``torch.nn.functional.cross_entropy`` and as TRL's ``ChunkedLogProbFunction`` (outputs and their meaning).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import sympy
import torch
import torch.nn.functional as F

from fastft.kernels._config import Config, Space, crowded
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._linear_cross_entropy_triton import _backward_kernel, _forward_kernel
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

#: Most tokens in a chunk, and most bytes that its logits may take. With powers of two from 1024 on both products run at
#: the rate that they have for all tokens at once; others leave multiprocessors without a tile (1280 tokens of 5120
#: columns are 200 tiles, for an H100's 132), and fewer tokens read the weight too often.
CHUNK_TOKENS, CHUNK_BYTES = 2048, 512 * 2**20


def chunk_rows(tokens: int, vocab: int, itemsize: int) -> int:
    """Tokens in one chunk: a power of two within the limits above, or less, so that chunks are of about equal size and
    multiples of 128 rows (a GEMM tile).
    """
    most = min(max(CHUNK_BYTES // max(vocab * itemsize, 1), 1), CHUNK_TOKENS)
    most = 1 << most.bit_length() - 1
    if tokens <= most:
        return max(tokens, 1)
    even = math.ceil(tokens / math.ceil(tokens / most))
    return min(math.ceil(even / 128) * 128, most)


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
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        softcap: float | None,
        logit_scale: float,
        temperature: float,
    ) -> None:
        self.hidden, self.dtype = hidden, dtype
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.maths = (softcap, logit_scale, temperature)
        # The kernels are fp32 inside: fp64 runs in PyTorch on every device.
        self.triton = use_triton(hidden) and dtype != torch.float64
        tokens, vocab = hidden.shape[0], weight.shape[0]
        self.rows = chunk_rows(tokens, vocab, dtype.itemsize)
        # Rows are padded to whole 16-byte words: at an odd vocabulary cuBLAS and the kernels would take one element at
        # a time. Kernels read and write the padding too; what is in it reaches no result.
        stride = -(-vocab // 16) * 16
        self.buffer = torch.empty((min(self.rows, tokens), stride), dtype=dtype, device=hidden.device)[:, :vocab]
        self.constants = {
            "V": vocab,
            "STRIDE": stride,
            "SCALE": float(logit_scale),
            "SOFTCAP": float(softcap or 1.0),
            "HAS_SOFTCAP": softcap is not None,
            "INV_TEMPERATURE": 1.0 / temperature,
            **CONFIG(hidden.device, dtype, self.rows, vocab),
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


def _scored(labels: torch.Tensor, ignore_index: int) -> torch.Tensor | None:
    """Positions of the labels that count, when enough others (1 in 16) can be left out of every GEMM; else None.

    Waits for the GPU once, which costs far less than a GEMM over padding and prompts; not while a CUDA graph is
    recorded.
    """
    if _capturing(labels):
        return None
    keep = (labels != ignore_index).nonzero().squeeze(1)
    return keep if 16 * keep.shape[0] <= 15 * labels.shape[0] else None


def _forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    dtype: torch.dtype,
    entropy: bool,
    is_top1: bool,
    mean_logits: bool,
    log_sum_sq_probs: bool,
    unit_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    maths = (ignore_index, softcap, logit_scale, temperature, dtype)
    wanted = (entropy, is_top1, mean_logits, log_sum_sq_probs, unit_gradient)
    if not hidden.is_cuda:
        _check_labels(labels, weight.shape[0], ignore_index)
    keep = _scored(labels, ignore_index)
    if keep is None:
        return _forward_all(hidden, weight, bias, labels, *maths, *wanted)
    found = _forward_all(hidden[keep], weight, bias, labels[keep], *maths, *wanted)
    whole = _empty_outputs(hidden, dtype, *wanted)
    return tuple(w.zero_().index_copy_(0, keep, f) if w.shape[0] else w for w, f in zip(whole, found, strict=True))


def _forward_all(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    dtype: torch.dtype,
    entropy: bool,
    is_top1: bool,
    mean_logits: bool,
    log_sum_sq_probs: bool,
    unit_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    head = _Head(hidden, weight, bias, dtype, softcap, logit_scale, temperature)
    labels = labels.contiguous()
    outputs = _empty_outputs(hidden, dtype, entropy, is_top1, mean_logits, log_sum_sq_probs, unit_gradient)
    for chunk in head.chunks():
        logits = head.logits(chunk)
        # An output nobody asked for is empty; its kernel argument is never touched.
        parts = [x[chunk] if x.shape[0] else x for x in outputs[:7]]
        if head.triton:
            _forward_kernel[(logits.shape[0],)](
                logits,
                labels[chunk],
                *parts,
                IGNORE_INDEX=ignore_index,
                ENTROPY=entropy,
                IS_TOP1=is_top1,
                MEAN_LOGITS=mean_logits,
                LOG_SUM_SQ_PROBS=log_sum_sq_probs,
                GRADIENT=unit_gradient,
                **head.constants,
            )
        else:
            _forward_chunk(logits, labels[chunk], parts, ignore_index, *head.maths, unit_gradient)
        if unit_gradient:
            torch.mm(logits, head.weight, out=outputs[7][chunk])
    return outputs


def _forward_chunk(
    logits: torch.Tensor,
    labels: torch.Tensor,
    parts: list[torch.Tensor],
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    gradient: bool,
) -> None:
    """``_forward_kernel`` in PyTorch, for tensors that Triton does not take."""
    log_prob, top, log_sum, entropy, is_top1, mean_logits, log_sum_sq_probs = parts
    ignored = labels == ignore_index
    z, tanh = _transform(logits.to(log_prob.dtype), softcap, logit_scale, temperature)
    target = labels.masked_fill(ignored, 0)[:, None]
    largest = z.amax(-1)
    largest = largest.masked_fill_(largest == -math.inf, 0)
    log_z = (z - largest[:, None]).exp_().sum(-1).log_()
    log_p = (z - largest[:, None]).sub_(log_z[:, None])
    top.copy_(largest.masked_fill(ignored, 0))
    log_sum.copy_(log_z.masked_fill(ignored, 0))
    log_prob.copy_(log_p.gather(1, target).squeeze(1).masked_fill(ignored, 0))
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
        dr = p.neg_().scatter_add_(1, target, torch.ones_like(target, dtype=p.dtype)).mul_(logit_scale / temperature)
        if tanh is not None:
            dr.mul_(1 - tanh * tanh)
        logits.copy_(dr.masked_fill_(ignored[:, None], 0))


def _empty_outputs(
    hidden: torch.Tensor,
    dtype: torch.dtype,
    entropy: bool,
    is_top1: bool,
    mean_logits: bool,
    log_sum_sq_probs: bool,
    unit_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    """(log_prob, the largest z, the log of the sum over it, entropy, is_top1, mean_logits, log_sum_sq_probs, unit
    gradient), what is not asked for being empty.
    """
    tokens, wide = hidden.shape[0], _wide(dtype)

    def per_token(wanted: bool, kind: torch.dtype = wide) -> torch.Tensor:
        return hidden.new_empty((tokens if wanted else 0,), dtype=kind)

    return (
        per_token(True),
        per_token(True),
        per_token(True),
        per_token(entropy),
        per_token(is_top1, torch.bool),
        per_token(mean_logits),
        per_token(log_sum_sq_probs),
        hidden.new_empty((tokens if unit_gradient else 0, hidden.shape[1]), dtype=dtype),
    )


def _forward_fake(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    dtype: torch.dtype,
    entropy: bool,
    is_top1: bool,
    mean_logits: bool,
    log_sum_sq_probs: bool,
    unit_gradient: bool,
) -> tuple[torch.Tensor, ...]:
    return _empty_outputs(hidden, dtype, entropy, is_top1, mean_logits, log_sum_sq_probs, unit_gradient)


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


def _add_matmul(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b`` for an fp32 (fp64) ``total``, without rounding the product to the operands' dtype first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _backward(
    grad_log_prob: torch.Tensor | None,
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
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    others = [g for g in (grad_entropy, grad_mean_logits, grad_lse) if g is not None]
    if grad_log_prob is None and not _capturing(hidden) and not any(bool(g.any()) for g in others):
        # Waiting for the GPU once costs far less than the GEMMs.
        dh, dw, db = _empty_grads(hidden, weight, bias, need_hidden, need_weight, need_bias)
        return dh.zero_(), dw.zero_(), db.zero_()
    maths, need = (ignore_index, softcap, logit_scale, temperature, dtype), (need_hidden, need_weight, need_bias)
    keep = _scored(labels, ignore_index)
    if keep is None:
        whole = (hidden, weight, bias, labels, top, log_sum, entropy)
        return _backward_all(grad_log_prob, grad_entropy, grad_mean_logits, grad_lse, *whole, *maths, *need)
    incoming = (grad_log_prob, grad_entropy, grad_mean_logits, grad_lse)
    g_log_prob, g_entropy, g_mean, g_lse = (None if g is None else g[keep] for g in incoming)
    entropy = entropy[keep] if entropy.shape[0] else entropy
    picked = (hidden[keep], weight, bias, labels[keep], top[keep], log_sum[keep], entropy)
    dh, dw, db = _backward_all(g_log_prob, g_entropy, g_mean, g_lse, *picked, *maths, *need)
    return hidden.new_zeros(hidden.shape).index_copy_(0, keep, dh) if need_hidden else dh, dw, db


def _backward_all(
    grad_log_prob: torch.Tensor | None,
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
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    head = _Head(hidden, weight, bias, dtype, softcap, logit_scale, temperature)
    labels, wide = labels.contiguous(), _wide(dtype)
    incoming = (grad_log_prob, grad_entropy, grad_mean_logits, grad_lse)
    g_log_prob, g_entropy, g_mean, g_lse = (None if g is None else g.to(wide).contiguous() for g in incoming)
    # Of p and, in the kernel, of the label too.
    g_p = g_log_prob if g_lse is None else -g_lse if g_log_prob is None else g_log_prob - g_lse
    # The slope of a softcap is another for each logit: there the mean's part is no constant of its row.
    in_kernel = head.triton and (g_mean is None or softcap is None)
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else (0, hidden.shape[1]), dtype=dtype)
    grad_weight = hidden.new_zeros(weight.shape if need_weight else (0, weight.shape[1]), dtype=wide)
    grad_bias = hidden.new_zeros((weight.shape[0] if need_bias else 0,), dtype=wide)

    def part(x: torch.Tensor | None, chunk: slice) -> torch.Tensor:
        return top[chunk] if x is None or not x.shape[0] else x[chunk]

    for chunk in head.chunks():
        logits = head.logits(chunk)
        g_lp, g_ent, g_z, g_sum = (None if g is None else g[chunk] for g in (g_log_prob, g_entropy, g_mean, g_lse))
        grads, vocab = (g_lp, g_ent, g_z, g_sum), weight.shape[0]
        saved = (top[chunk], log_sum[chunk], part(entropy, chunk))
        if in_kernel:
            amended = g_mean is not None or g_lse is not None
            if amended:
                # The entry of each label, as a vocabulary of one.
                ignored = labels[chunk] == ignore_index
                at = labels[chunk].masked_fill(ignored, 0).clamp(0, vocab - 1)[:, None]
                entry, where = logits.gather(1, at), -ignored.long()
                _backward_chunk(entry, where, *saved, *grads, -1, vocab, *head.maths)
            _backward_kernel[(logits.shape[0], triton.cdiv(weight.shape[0], head.constants["BLOCK"]))](
                logits,
                labels[chunk],
                top[chunk],
                log_sum[chunk],
                part(entropy, chunk),
                part(g_p, chunk),
                part(g_entropy, chunk),
                IGNORE_INDEX=ignore_index,
                GRAD_LOG_PROB=g_p is not None,
                GRAD_ENTROPY=g_entropy is not None,
                **head.constants,
            )
            if amended:
                if g_z is not None:
                    each = g_z * (logit_scale / temperature / vocab)
                    logits += each.masked_fill(ignored, 0)[:, None]
                logits.scatter_(1, at, entry)
        else:
            _backward_chunk(logits, labels[chunk], *saved, *grads, ignore_index, vocab, *head.maths)
        if need_hidden:
            torch.mm(logits, head.weight, out=grad_hidden[chunk])
        if need_weight:
            # 0 times a NaN hidden state of an ignored token would be NaN in every row of dW.
            states = head.states(chunk).masked_fill((labels[chunk] == ignore_index)[:, None], 0)
            _add_matmul(grad_weight, logits.t(), states)
        if need_bias:
            grad_bias += logits.sum(0, dtype=wide)
    bias_dtype = weight.dtype if bias is None else bias.dtype
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias_dtype)


def _backward_chunk(
    logits: torch.Tensor,
    labels: torch.Tensor,
    top: torch.Tensor,
    log_sum: torch.Tensor,
    entropy: torch.Tensor,
    grad_log_prob: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    grad_mean_logits: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    ignore_index: int,
    vocab: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> None:
    """``_backward_kernel`` in PyTorch, and the gradients that it does not know."""
    ignored = labels == ignore_index
    z, tanh = _transform(logits.to(top.dtype), softcap, logit_scale, temperature)
    log_p = (z - top[:, None]) - log_sum[:, None]
    p = log_p.exp()
    dr = torch.zeros_like(p)
    if grad_log_prob is not None:
        dr.addcmul_(p, grad_log_prob[:, None], value=-1)
        dr.scatter_add_(1, labels.masked_fill(ignored, 0)[:, None], grad_log_prob[:, None])
    if grad_lse is not None:
        dr.addcmul_(p, grad_lse[:, None])
    if grad_mean_logits is not None:
        dr += grad_mean_logits[:, None] / vocab
    if grad_entropy is not None:
        dr -= grad_entropy[:, None] * (p * (log_p + entropy[:, None])).masked_fill_(p == 0, 0)
    dr *= logit_scale / temperature
    if tanh is not None:
        dr *= 1 - tanh * tanh
    logits.copy_(dr.masked_fill_(ignored[:, None], 0))


def _backward_fake(
    grad_log_prob: torch.Tensor | None,
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
    ignore_index: int,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    dtype: torch.dtype,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _empty_grads(hidden, weight, bias, need_hidden, need_weight, need_bias)


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_MATHS = "int ignore_index, float? softcap, float logit_scale, float temperature, ScalarType dtype"

_forward_op = raw_op(
    f"linear_log_prob({_HEAD}, {_MATHS}, bool entropy, bool is_top1, bool mean_logits, bool log_sum_sq_probs, "
    "bool unit_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = raw_op(
    "linear_log_prob_backward(Tensor? grad_log_prob, Tensor? grad_entropy, Tensor? grad_mean_logits, "
    f"Tensor? grad_lse, {_HEAD}, Tensor top, Tensor log_sum, Tensor entropy, {_MATHS}, bool need_hidden, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


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
        maths: tuple[int, float | None, float, float, torch.dtype],
        wanted: tuple[bool, bool, bool, bool],
        gradients: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        entropy_gradient, mean_logits_gradient = gradients[0] and wanted[0], gradients[1] and wanted[2]
        differentiable = (entropy_gradient, mean_logits_gradient, gradients[2])
        # With a gradient of lse or the mean, the unit gradient would be of no use: backward needs the logits anyway.
        frozen = need_hidden and not (need_weight or need_bias or any(differentiable[1:]))
        *outputs, unit = _forward_op(hidden, weight, bias, labels, *maths, *wanted, frozen)
        log_prob, top, log_sum, entropy, is_top1, mean_logits, log_sum_sq_probs = outputs
        lse = top + log_sum
        ctx.maths, ctx.frozen, ctx.hidden_dtype, ctx.differentiable = maths, frozen, hidden.dtype, differentiable
        if frozen and not entropy_gradient:
            ctx.save_for_backward(unit, labels)
        else:
            ctx.save_for_backward(unit, labels, hidden, weight, bias, top, log_sum, entropy)
        sometimes = zip((entropy, mean_logits, lse), differentiable, strict=True)
        ctx.mark_non_differentiable(is_top1, log_sum_sq_probs, *(x for x, wanted in sometimes if not wanted))
        return log_prob, entropy, is_top1, mean_logits, log_sum_sq_probs, lse

    @staticmethod
    def backward(
        ctx: Any, grad_log_prob: Any, grad_entropy: Any, _top1: Any, grad_mean: Any, _squares: Any, grad_lse: Any
    ) -> tuple[torch.Tensor | None, ...]:
        unit, labels, *rest = ctx.saved_tensors
        # Dynamo gives zeros even for what was marked as not differentiable.
        incoming = zip((grad_entropy, grad_mean, grad_lse), ctx.differentiable, strict=True)
        others = [g if wanted else None for g, wanted in incoming]
        grads: list[torch.Tensor | None] = [None, None, None]
        if ctx.frozen and grad_log_prob is not None:
            # Plain PyTorch, so that Inductor fuses the scaling with what follows. An ignored token's g may be inf or
            # NaN (a division by no tokens under "mean").
            g = grad_log_prob.masked_fill(labels == ctx.maths[0], 0)
            grads[0] = (unit * g[:, None]).to(ctx.hidden_dtype)
            grad_log_prob = None
        if any(g is not None for g in (grad_log_prob, *others)):
            hidden, weight, bias, top, log_sum, entropy = rest
            needs = ctx.needs_input_grad[:3]
            operands = (hidden, weight, bias, labels, top, log_sum, entropy)
            found = _backward_op(grad_log_prob, *others, *operands, *ctx.maths, *needs)
            more = [grad if need else None for grad, need in zip(found, needs, strict=True)]
            grads = [b if a is None else a if b is None else a + b for a, b in zip(grads, more, strict=True)]
        return *grads, None, None, None, None


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
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    maths = (ignore_index, softcap, logit_scale, temperature, _head_dtype(hidden, dtype))
    wanted = (entropy, is_top1, mean_logits, log_sum_sq_probs)
    if not torch.is_grad_enabled():
        # autograd.Function reports needs_input_grad even here, and would compute the gradient for nothing.
        log_prob, top, log_sum, *optional, _ = _forward_op(hidden, weight, bias, labels, *maths, *wanted, False)
        return LogProb._make((log_prob, *optional, top + log_sum))
    gradients = (entropy_gradient, mean_logits_gradient, lse_gradient)
    return LogProb(*_LinearLogProb.apply(hidden, weight, bias, labels, maths, wanted, gradients))


def _reduce(loss: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str) -> torch.Tensor:
    if reduction == "none":
        return loss
    total = loss.sum()
    # No valid token: 0 / 0 = NaN under "mean", as F.cross_entropy has it.
    return total if reduction == "sum" else total / (labels != ignore_index).sum()


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
    _check_loss(reduction, label_smoothing, z_loss)
    flat = labels.reshape(-1)
    found = linear_log_prob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        flat,
        ignore_index=ignore_index,
        softcap=softcap,
        logit_scale=logit_scale,
        mean_logits=label_smoothing > 0,
        mean_logits_gradient=label_smoothing > 0,
        lse_gradient=label_smoothing > 0 or z_loss > 0,
        dtype=dtype,
    )
    loss = -found.log_prob
    if label_smoothing:
        # The mean of -log p over the vocabulary is lse less the mean of z.
        loss = (1 - label_smoothing) * loss + label_smoothing * (found.lse - found.mean_logits)
    if z_loss:
        loss = loss + z_loss * found.lse.square()
    loss = _reduce(loss, flat, ignore_index, reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


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


def inputs(new: New, *, batch: int, seq: int, hidden: int, vocab: int, softcap: float | None) -> Inputs:
    """Hidden states [tokens, hidden], a frozen head [vocab, hidden], and labels, none of them ignored."""
    h, weight = new(batch * seq, hidden, grad=True), new(vocab, hidden, scale=hidden**-0.5)
    return Inputs((h, weight, None, new.integers(vocab, batch * seq)), {"softcap": softcap}, [h])


register(
    Op(
        name="linear_log_prob",
        call=linear_log_prob,
        reference=linear_log_prob_reference,
        supported=supported,
        raw=("linear_log_prob", "linear_log_prob_backward"),
        recompute=Recompute.KEEP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
    )
)
register(
    Op(
        name="linear_cross_entropy",
        call=linear_cross_entropy,
        reference=linear_cross_entropy_reference,
        supported=supported,
        raw=("linear_log_prob", "linear_log_prob_backward"),
        recompute=Recompute.KEEP,
        cost=cost,
        sizes=sizes,
        inputs=inputs,
    )
)
