"""The loss in chunks of logits: how many tokens make a chunk, the one buffer that every chunk's logits are written to,
and both walks over the chunks, each with its PyTorch body for tensors that Triton does not take.
``linear_cross_entropy.py`` has the maths, ``_linear_cross_entropy_triton.py`` the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fastft.kernels import _products as products
from fastft.kernels._config import Config, Space, crowded
from fastft.kernels._linear_cross_entropy_call import (
    Coefficients,
    Maths,
    Wanted,
    cast_operands,
    of_logits,
    transform,
    wide_dtype,
)
from fastft.kernels._linear_cross_entropy_triton import _backward_kernel, _forward_kernel
from fastft.kernels._op import use_triton
from fastft.kernels._triton import cdiv

# -------------------------------------------------------------------------------------------------------- configuration

#: Most tokens in a chunk, and most bytes that its logits may take (0.6 GiB, less what else a call makes). With powers
#: of two from 1024 on both products run nearly at the rate that they have for all tokens at once; fewer tokens read the
#: weight too often.
CHUNK_TOKENS, CHUNK_BYTES = 2048, 600 * 2**20
#: Tokens and columns of a product's tile, and how many an H100 works on at a time. The last wave of a product should
#: have tiles for nearly all: what FULL of them have is as good as any, what less than FILLED have is worth other chunks
#: (3584 columns: 1024 tokens are 112 tiles, 1152 are 126; 5120: 2048 tokens are 2.4 waves, 1664 are 1.97).
TILE, WAVE, FILLED, FULL = (128, 256), 132, 0.9, 0.95
#: Under a head that is trained, a chunk's logits may take this share of its gradient's bytes in fp32: what several
#: chunks are summed up in, which every one but the first reads and writes.
TRAINED_SHARE = 1.0


def chunk_rows(tokens: int, vocab: int, itemsize: int, hidden: int = 0, trained: bool = False) -> int:
    """Tokens in one chunk: a power of two within the limits above; another multiple of a tile's rows near it where that
    saves a chunk, or fills a wave of the gradient's product, of ``hidden`` columns, that the power of two does not; or
    less, so that chunks are of about equal size. ``trained``: the head's weight has a gradient. Then chunks are larger,
    but two at least.
    """
    most = min(max(CHUNK_BYTES // max(vocab * itemsize, 1), 1), CHUNK_TOKENS)
    power = 1 << most.bit_length() - 1
    if tokens <= power:
        return max(tokens, 1)
    rows = TILE[0]
    if trained:
        most = max(most, int(TRAINED_SHARE * hidden * 4 / itemsize))
        power = 1 << most.bit_length() - 1
        half = math.ceil(tokens / 2)
        power = min(power, half if half <= rows else math.ceil(half / rows) * rows)
    nine = power * 9 // 8
    if not trained and power >= 8 * rows:
        near = [n for n in range(power * 3 // 4, min(nine, most) + 1, rows) if _filled(n, hidden) >= FULL]
        if near and _filled(power, hidden) < FILLED:
            return min(near[-1], tokens)
        if nine <= most and math.ceil(tokens / nine) < math.ceil(tokens / power):
            return min(nine, tokens)
    even = math.ceil(tokens / math.ceil(tokens / power))
    return min(math.ceil(even / rows) * rows, power)


def pieces(rows: int) -> list[slice]:
    """The rows of a chunk in pieces of about equal size, whole tiles but for the last, of at most ``CHUNK_TOKENS``: a
    product with the weight takes a larger chunk, as a trained head's is, a piece at a time.
    """
    even = math.ceil(rows / math.ceil(rows / CHUNK_TOKENS))
    step = min(math.ceil(even / TILE[0]) * TILE[0], CHUNK_TOKENS)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


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
CONFIG.file = Path(__file__).with_name("linear_cross_entropy.py")  # of the op, whose variants are tuned

# ------------------------------------------------------------------------------------------------------------- the head


class _Piece(NamedTuple):
    """Tokens: where they are, their hidden states, not cast yet, and the rows that their logits are written to."""

    at: slice
    states: torch.Tensor
    logits: torch.Tensor


class _Chunk(NamedTuple):
    """The tokens of one chunk, and those of it that a product with the weight takes at a time."""

    at: slice
    states: torch.Tensor
    logits: torch.Tensor
    pieces: list[_Piece]


class _Head:
    """The head of one call: its operands in the dtype it multiplies in, the one buffer that every chunk's logits are
    written to, and the chunks, whose views are made once, and before anybody waits for the number of labels.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        maths: Maths,
        trained: bool,
    ) -> None:
        self.hidden, self.dtype, self.maths = hidden, maths.dtype, maths
        _, self.weight, self.bias = cast_operands(hidden[:0], weight, bias, maths.dtype)
        self.turned = self.weight.t()
        # The kernels are fp32 inside: fp64 runs in PyTorch on every device.
        self.triton = use_triton(hidden) and self.dtype != torch.float64
        tokens, vocab = hidden.shape[0], weight.shape[0]
        self.rows = chunk_rows(tokens, vocab, self.dtype.itemsize, weight.shape[1], trained)
        buffer = _empty_logits(hidden, vocab, min(self.rows, tokens), self.dtype)
        places = [slice(start, min(start + self.rows, tokens)) for start in range(0, tokens, self.rows)]
        self.chunks = [self._chunk(at, hidden[at], buffer[: at.stop - at.start]) for at in places]
        self.constants = {
            "V": vocab,
            "STRIDE": _stride(vocab),
            "IGNORE_INDEX": maths.ignore_index,
            **of_logits(maths),
            **CONFIG(hidden.device, self.dtype, self.rows, vocab),
        }

    @staticmethod
    def _chunk(at: slice, states: torch.Tensor, logits: torch.Tensor) -> _Chunk:
        parts = pieces(len(states))
        return _Chunk(at, states, logits, [_Piece(part, states[part], logits[part]) for part in parts])

    def logits(self, chunk: _Chunk) -> torch.Tensor:
        """The chunk's raw logits, in the buffer."""
        for _, states, logits in chunk.pieces:
            if self.bias is None:
                torch.mm(states.to(self.dtype), self.turned, out=logits)
            else:
                torch.addmm(self.bias, states.to(self.dtype), self.turned, out=logits)
        return chunk.logits

    def of_hidden(self, chunk: _Chunk, gradient: torch.Tensor, alpha: float = 1) -> None:
        """The hidden states' ``gradient``, of the chunk's tokens, from that of their logits, times ``alpha``."""
        for at, _, logits in chunk.pieces:
            products.mm_into(gradient[at], alpha, logits, self.weight)


def _empty_logits(hidden: torch.Tensor, vocab: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """A buffer, on the device of ``hidden``. Kernels read and write its rows' padding too; what is in it reaches no
    result.
    """
    return torch.empty((rows, _stride(vocab)), dtype=dtype, device=hidden.device)[:, :vocab]


def _stride(vocab: int) -> int:
    """Rows are padded to whole 16-byte words: at an odd vocabulary cuBLAS and the kernels would take one element at a
    time.
    """
    return -(-vocab // 16) * 16


class _HeadGradients:
    """What goes to the weight and to the bias, in ``dtype``s, added up over chunks in fp32 (fp64). Of two chunks the
    weight's is added up in its own dtype, if that is the logits': the first one's product is rounded to it, and then
    the sum is. Of more there would be a rounding for each, by which training was found to be biased (TRL).
    """

    def __init__(self, head: _Head, weight: torch.dtype | None, bias: torch.dtype | None) -> None:
        self.head, self.dtypes = head, (weight, bias)
        self.narrow = len(head.chunks) <= 2 and weight == head.dtype
        self.weight: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None

    def add(self, chunk: _Chunk, labels: torch.Tensor | None, alpha: float = 1) -> None:
        """What the chunk's logits' gradients give, times ``alpha``, the same for all chunks. ``labels``: the chunk's,
        None if all count.
        """
        (weight, bias), logits = self.dtypes, chunk.logits
        if weight is not None:
            states = chunk.states.to(self.head.dtype)
            if labels is not None:
                # 0 times a NaN hidden state of an ignored token would be NaN in every row of dW.
                states = states.masked_fill((labels == self.head.maths.ignore_index)[:, None], 0)
            if not self.narrow:
                self.weight = _add_matmul(self.weight, logits.t(), states, wide_dtype(self.head.dtype))
            elif self.weight is None:
                self.weight = products.mm_into(self._empty(), alpha, logits.t(), states)
            else:
                _add_rounded(self.weight, alpha, logits.t(), states)
        if bias is not None:
            found = logits.sum(0, dtype=wide_dtype(self.head.dtype))
            self.bias = found if self.bias is None else self.bias.add_(found)

    def _empty(self) -> torch.Tensor:
        return self.head.weight.new_empty(self.head.weight.shape)

    def found(self, alpha: float = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """What nobody wants is empty, and zeros what no token is for. ``alpha``: as each chunk was added."""
        parts, sizes = (self.weight, self.bias), ((*self.head.weight.shape,), (self.head.weight.shape[0],))
        results = []
        for part, dtype, size in zip(parts, self.dtypes, sizes, strict=True):
            if dtype is None:
                results.append(self.head.hidden.new_empty((0, *size[1:])))
            elif part is None:
                results.append(self.head.hidden.new_zeros(size, dtype=dtype))
            elif alpha == 1 or (part is self.weight and self.narrow):
                results.append(part.to(dtype))
            else:
                results.append(torch.mul(part, alpha, out=torch.empty_like(part, dtype=dtype)))
        return results[0], results[1]


def _add_rounded(total: torch.Tensor, alpha: float, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += alpha · a @ b`` of one dtype, summed up in fp32 (fp64) and rounded once."""
    if total.element_size() != 2 or (total.is_cuda and products.sums_all(a, b)):
        total.addmm_(a, b, beta=products.beta_for(total), alpha=alpha)
    else:
        total.copy_(products.mm_single(a, b).mul_(alpha).add_(total))


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


# -------------------------------------------------------------------------------------------------------------- forward


def prepared(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    outputs: tuple[torch.Tensor, ...],
    units: list[torch.dtype | None],
    maths: Maths,
    wanted: Wanted,
    begin: bool = False,
) -> Callable[[bool, float], tuple[torch.Tensor, ...]]:
    """Makes the buffer, and every view; the result computes, told whether all tokens count and what all unit gradients
    are to be multiplied by, and has the first product launched at once: the GPU has nothing to do until then.
    ``outputs``: what is written to, the last one the hidden states' unit gradient. ``units``: dtypes of the weight's
    and the bias's, which come behind them; None: not wanted. ``begin``: the first chunk's logits are made now.
    """
    head = _Head(hidden, weight, bias, maths, wanted.unit_weight)
    gradients = _HeadGradients(head, *units)
    # An output nobody asked for is empty; its kernel argument is never touched.
    walk = [(c, labels[c.at], [x[c.at] if x.shape[0] else x for x in outputs]) for c in head.chunks]

    for chunk in head.chunks[:begin]:
        head.logits(chunk)

    def in_chunks(every: bool, alpha: float) -> tuple[torch.Tensor, ...]:
        for i, (chunk, targets, (*parts, unit)) in enumerate(walk):
            logits = chunk.logits if i < begin else head.logits(chunk)
            if head.triton:
                _forward_kernel[(logits.shape[0],)](
                    logits,
                    targets,
                    *parts,
                    SMOOTHING=float(maths.label_smoothing),
                    Z_LOSS=float(maths.z_loss),
                    **wanted.flags(),
                    GRADIENT=wanted.gradient,
                    **head.constants,
                )
            else:
                _forward_chunk(logits, targets, parts, maths, wanted.gradient)
            if wanted.unit_gradient:
                head.of_hidden(chunk, unit, alpha)
            gradients.add(chunk, None if every else targets, alpha)
        return *outputs, *gradients.found(alpha)

    return in_chunks


def _forward_chunk(
    logits: torch.Tensor, labels: torch.Tensor, parts: list[torch.Tensor], maths: Maths, gradient: bool
) -> None:
    """``_forward_kernel`` in PyTorch, for tensors that Triton does not take."""
    score, top, log_sum, entropy, is_top1, mean_logits, log_sum_sq_probs = parts
    ignored, smoothing, vocab = labels == maths.ignore_index, maths.label_smoothing, logits.shape[1]
    z, tanh = transform(logits.to(score.dtype), maths.softcap, maths.logit_scale, maths.temperature)
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


# ------------------------------------------------------------------------------------------------------------- backward


def backward(
    coefficients: Coefficients,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    maths: Maths,
    every: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias, what is not wanted being empty. ``saved``: the largest z, the log of the
    sum over it, and the entropy. ``every``: whether all tokens count.
    """
    top, log_sum, entropy = saved
    bias_dtype = weight.dtype if bias is None else bias.dtype
    head = _Head(hidden, weight, bias, maths, need_weight)
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else (0, hidden.shape[1]), dtype=maths.dtype)
    gradients = _HeadGradients(head, weight.dtype if need_weight else None, bias_dtype if need_bias else None)
    for chunk in head.chunks:
        at, logits = chunk.at, head.logits(chunk)
        targets, each = labels[at], coefficients.of(at)
        of_chunk = (top[at], log_sum[at], entropy[at] if entropy.shape[0] else top[at])
        if head.triton:
            _backward_kernel[(logits.shape[0], cdiv(weight.shape[0], head.constants["BLOCK"]))](
                logits,
                targets,
                *of_chunk,
                *(top if g is None else g for g in each),
                LABEL=each.label is not None,
                P=each.p is not None,
                MEAN=each.mean is not None,
                ENTROPY=each.entropy is not None,
                **head.constants,
            )
        else:
            _backward_chunk(logits, targets, of_chunk, each, maths)
        if need_hidden:
            head.of_hidden(chunk, grad_hidden[at])
        gradients.add(chunk, None if every else targets)
    return grad_hidden.to(hidden.dtype), *gradients.found()


def _backward_chunk(
    logits: torch.Tensor,
    labels: torch.Tensor,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    each: Coefficients,
    maths: Maths,
) -> None:
    """``_backward_kernel`` in PyTorch, for tensors that Triton does not take."""
    top, log_sum, entropy = saved
    ignored = labels == maths.ignore_index
    z, tanh = transform(logits.to(top.dtype), maths.softcap, maths.logit_scale, maths.temperature)
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
