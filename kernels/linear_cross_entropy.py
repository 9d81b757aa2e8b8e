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
are left out; the others are taken in chunks whose logits fill one reused buffer: (1) cuBLAS writes the chunk's
logits into the buffer; (2) one Triton program per token reads them once for the online logsumexp, a second time, last
ones first (they are in L2 still), to overwrite them by the gradient; (3) cuBLAS multiplies the buffer by W.

Label smoothing (e) and z-loss (c, of lse squared) are of the same pass. With them ``log_prob`` is a token's score,
minus its loss::

    score = (1 - e) log_prob - e (lse - mean_z) - c lse^2
    d score / d z_v = (1 - e) [v = y] + e / vocab - (1 + 2 c lse) p_v

Frozen head: a token's gradient is linear in its own incoming gradient g_t, so stage 3 runs in forward with g_t = 1 and
the backward only scales: dh_t = g_t u_t, where u_t = d score_t / d h_t is kept as [tokens, hidden]. Two GEMMs in all,
where recomputing logits in backward takes three. u is of unit scale, so storing it in bf16 or fp16 costs one relative
rounding and no underflow.

Trainable head: under a sum or a mean over tokens every token has the same g, so dW and db come out of forward too, and
the backward scales: three GEMMs. Under a mean they have its 1 / n, before they are rounded, where the host knows n (not
in fp16, where it could underflow): the backward's g is 1 then as a rule, and what it finds to be multiplied by 1 it
leaves as it is. Else dW needs g_t while dr is built, so forward keeps only m and l and backward computes each chunk's
logits again: four GEMMs. dW is summed in fp32 over chunks, which are larger then: the buffer may take what that sum
takes. Where two are enough there is no such sum: the second product is added to the first in the weight's dtype, two
roundings in all. The gradients of the entropy, of lse and of the mean of z are likewise, whatever the head; as they are
mostly asked for by nobody but a compiler that gives every output a gradient of zeros, the backward looks first. All of
them are one sum for each logit, whose coefficients each token has::

    d / d z_v = g_label [v = y] - g_p p_v + g_mean - g_entropy p_v (log p_v + entropy)
    g_label = (1 - e) g_score        g_p = (1 + 2 c lse) g_score - g_lse        g_mean = (e g_score + g_mean_z) / vocab

The variants ``fused`` and ``filtered`` are the same without a buffer.

Same maths as ``torch.nn.functional.cross_entropy`` and as TRL's ``ChunkedLogProbFunction`` (outputs and their meaning).

Beside the functions, their references and the raw ops, which are here: ``_linear_cross_entropy_chunks.py`` has the way
in chunks of logits, ``_linear_cross_entropy_triton.py`` its kernels, ``_linear_cross_entropy_fused.py`` the variants,
and ``_linear_cross_entropy_call.py`` what all of them are told of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import sympy
import torch
import torch.nn.functional as F

from fastft.kernels import _linear_cross_entropy_chunks as chunks
from fastft.kernels import _linear_cross_entropy_fused as fused
from fastft.kernels._inputs import Inputs, Model, New
from fastft.kernels._linear_cross_entropy_call import (
    Maths,
    Scored,
    Wanted,
    capturing,
    cast_operands,
    coefficients,
    of_logits,
    transform,
    wide_dtype,
)
from fastft.kernels._linear_cross_entropy_triton import _scale_kernel
from fastft.kernels._op import (
    Cost,
    Op,
    Reason,
    Recompute,
    check_dtypes,
    compat,
    failed,
    raw_op,
    register,
    rescued,
    use_triton,
)
from fastft.kernels._rows import processors
from fastft.kernels._triton import cdiv


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
        raw = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(
            wide_dtype(dtype)
        )
    z, _ = transform(raw, softcap, logit_scale, temperature)
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


# ------------------------------------------------------------------------------------------------------------ launchers


def _in_tiles(hidden: torch.Tensor, maths: Maths) -> bool:
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


def _read(options: tuple[Any, ...]) -> tuple[Maths, Wanted]:
    """The forward's options. Without a buffer there is nothing that it could make the unit gradient of."""
    maths, wanted = Maths(*options[:8]), Wanted(*options[8:])
    if maths.way != "chunks":
        wanted = wanted._replace(unit_gradient=False, unit_weight=False, unit_bias=False)
    return maths, wanted


def _forward(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, ...]:
    maths, wanted = _read(options)
    if not hidden.is_cuda:
        _check_labels(labels, weight.shape[0], maths.ignore_index)
    scored = Scored(labels, maths.ignore_index)
    run = _prepared(hidden, weight, bias, labels, maths, wanted, begin=scored.foreseen())
    keep = scored.positions()
    # Products are multiplied by a number that the host knows before they are rounded. In fp16 1 / n could underflow.
    known = wanted.mean and scored.number is not None and maths.dtype != torch.float16
    alpha = -1 / max(scored.number or 0, 1) if known else 1
    if keep is None:
        results = run(scored.all, alpha)
    else:
        del run  # and its buffer
        *found, unit_weight, unit_bias = _prepared(hidden[keep], weight, bias, labels[keep], maths, wanted)(True, alpha)
        whole = _empty_outputs(hidden, maths.dtype, wanted)
        each = (w.zero_().index_copy_(0, keep, f) if w.shape[0] else w for w, f in zip(whole, found, strict=True))
        results = *each, unit_weight, unit_bias
    left = _empty_left(hidden, maths.dtype, wanted)
    if wanted.mean:
        left.copy_(torch.ones_like(left) if known else -1 / scored.counts.sum().clamp(min=1))
    return *results, left


def _prepared(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    maths: Maths,
    wanted: Wanted,
    begin: bool = False,
) -> Callable[[bool, float], tuple[torch.Tensor, ...]]:
    """Makes what all tokens take; the result computes, told whether all of them count, and what unit gradients are to
    be multiplied by. ``begin``: with the first product.
    """
    labels = labels.contiguous()
    outputs = _empty_outputs(hidden, maths.dtype, wanted)
    if _in_tiles(hidden, maths):

        def in_tiles(_: bool, __: float) -> tuple[torch.Tensor, ...]:
            fused.forward(
                *cast_operands(hidden, weight, bias, maths.dtype),
                labels,
                outputs[:7],
                of_logits(maths),
                ignore_index=maths.ignore_index,
                smoothing=float(maths.label_smoothing),
                z_loss=float(maths.z_loss),
                wanted=wanted.flags(),
            )
            return *outputs, *_empty_units(weight, bias, wanted)

        return in_tiles
    units = [unit.dtype if unit.shape[0] else None for unit in _empty_units(weight[:1], bias, wanted)]
    return chunks.prepared(hidden, weight, bias, labels, outputs, units, maths, wanted, begin)


def _empty_outputs(hidden: torch.Tensor, dtype: torch.dtype, wanted: Wanted) -> tuple[torch.Tensor, ...]:
    """(score, the largest z, the log of the sum over it, entropy, is_top1, mean_logits, log_sum_sq_probs, unit
    gradient), what is not asked for being empty.
    """
    tokens, wide = hidden.shape[0], wide_dtype(dtype)

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


def _empty_units(weight: torch.Tensor, bias: torch.Tensor | None, wanted: Wanted) -> tuple[torch.Tensor, torch.Tensor]:
    """The unit gradients of weight and bias: of all tokens together, so that fp16 could overflow."""

    def unit(wanted: bool, of: torch.Tensor, *size: int) -> torch.Tensor:
        dtype = torch.float32 if of.dtype == torch.float16 else of.dtype
        return weight.new_empty((weight.shape[0] if wanted else 0, *size), dtype=dtype)

    return unit(wanted.unit_weight, weight, weight.shape[1]), unit(wanted.unit_bias, weight if bias is None else bias)


def _empty_left(hidden: torch.Tensor, dtype: torch.dtype, wanted: Wanted) -> torch.Tensor:
    """What unit gradients are still to be multiplied by, to be those of the mean."""
    return hidden.new_empty((int(wanted.mean),), dtype=wide_dtype(dtype))


def _forward_fake(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, ...]:
    maths, wanted = _read(options)
    units = _empty_units(weight, bias, wanted)
    return *_empty_outputs(hidden, maths.dtype, wanted), *units, _empty_left(hidden, maths.dtype, wanted)


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
    maths, need = Maths(*options[:8]), options[8:]
    grads = (grad_score, grad_entropy, grad_mean_logits, grad_lse)
    if grad_score is None and not capturing(hidden) and not any(bool(g.any()) for g in grads if g is not None):
        # Waiting for the GPU once costs far less than the GEMMs.
        dh, dw, db = _empty_grads(hidden, weight, bias, *need)
        return dh.zero_(), dw.zero_(), db.zero_()
    scored = Scored(labels, maths.ignore_index)
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
    maths: Maths,
    every: bool,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = labels.contiguous()
    factors = coefficients(grads, *saved[:2], weight.shape[0], maths)
    bias_dtype = weight.dtype if bias is None else bias.dtype
    if _in_tiles(hidden, maths):
        dh, dw, db = fused.backward(
            *cast_operands(hidden, weight, bias, maths.dtype),
            labels,
            saved,
            factors,
            factors.least(maths),
            of_logits(maths),
            ignore_index=maths.ignore_index,
            need_hidden=need_hidden,
            need_weight=need_weight,
            need_bias=need_bias,
        )
        return dh.to(hidden.dtype), dw.to(weight.dtype), db.to(bias_dtype)
    needs = (need_hidden, need_weight, need_bias)
    return chunks.backward(factors, hidden, weight, bias, labels, saved, maths, every, *needs)


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
    "bool unit_gradient, bool unit_weight, bool unit_bias, bool mean=False) -> (Tensor, Tensor, Tensor, Tensor, "
    "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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


#: Numbers that a program of the scaling takes at a time: 16 bytes for each of its 128 threads, four times; and programs
#: for each processor where they go on in steps.
SCALED, PROGRAMS = 4096, 16


def _times(unit: torch.Tensor, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """unit · g in plain PyTorch, of one g for all or one for each row."""
    return (unit * g.view(-1, *[1] * (unit.dim() - 1))).to(dtype)


def _in_triton(unit: torch.Tensor, dtype: torch.dtype) -> bool:
    return use_triton(unit) and torch.float64 not in (unit.dtype, dtype) and unit.is_contiguous() and unit.numel() > 0


def _launch_scale(unit: torch.Tensor, g: torch.Tensor, out: torch.Tensor) -> None:
    columns = unit.numel() // g.shape[0]
    blocks = cdiv(columns, SCALED)
    programs = min(blocks, cdiv(PROGRAMS * processors(unit.device), g.shape[0]))
    _scale_kernel[(g.shape[0] * programs,)](
        unit, g.float(), out, columns, blocks, programs, IN_PLACE=out is unit, BLOCK=SCALED, num_warps=4
    )


def _scale_in_place(unit: torch.Tensor, g: torch.Tensor) -> bool:
    """unit *= g; False if that could not be done. No op of the dispatcher: those write to nothing that they are given.
    """
    if failed("linear_log_prob_scale"):
        return False
    try:
        _launch_scale(unit, g, unit)
    except Exception as error:  # nothing was launched
        if not rescued("linear_log_prob_scale", error):
            raise
        return False
    return True


def _scale(unit: torch.Tensor, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not _in_triton(unit, dtype):
        return _times(unit, g, dtype)
    out = torch.empty_like(unit, dtype=dtype)
    _launch_scale(unit, g, out)
    return out


_scale_op = raw_op(
    "linear_log_prob_scale(Tensor unit, Tensor g, ScalarType dtype) -> Tensor",
    _scale,
    lambda unit, g, dtype: torch.empty_like(unit, dtype=dtype),
)


def _untraced(x: torch.Tensor) -> bool:
    """Whether x is computed now. Dynamo has it that what it traces is of the type of tensors."""
    return type(x) is torch.Tensor and not torch.compiler.is_compiling()


def _scaled(unit: torch.Tensor, g: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """unit · g, of one g for all or one for each row, in fp32 (fp64) and rounded once. PyTorch multiplies by one number
    on a GPU at a third of a copy's rate, and rounds it to a half-precision unit's dtype before. In ``unit``'s place
    where nobody will ask for that again. In a graph it is plain PyTorch, for Inductor to fuse with what follows; also
    under ``create_graph``.
    """
    g = g.reshape(-1)
    if not _untraced(unit) or torch.is_grad_enabled():
        return _times(unit, g, dtype)
    # A backward runs on the device of its tensors.
    last = not compat().graph_is_retained() and compat().has_storage(g)
    in_place = last and unit.dtype == dtype and _in_triton(unit, dtype) and _scale_in_place(unit, g)
    return unit if in_place else _scale_op(unit, g, dtype)


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
        maths: Maths,
        wanted: Wanted,
        gradients: tuple[bool, bool, bool],
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        entropy_gradient, mean_gradient = gradients[0] and wanted.entropy, gradients[1] and wanted.mean_logits
        differentiable = (entropy_gradient, mean_gradient, gradients[2])
        # With a gradient of lse or the mean, the unit gradient would be of no use: backward needs the logits anyway.
        frozen = need_hidden and not (need_weight or need_bias or any(differentiable[1:])) and maths.way == "chunks"
        wanted = wanted._replace(unit_gradient=frozen)
        *outputs, unit, _, _, _ = _forward_op(hidden, weight, bias, labels, *maths, *wanted)
        score, top, log_sum, entropy, is_top1, mean_logits, log_sum_sq_probs = outputs
        lse = top + log_sum
        ctx.maths, ctx.hidden_dtype, ctx.differentiable = maths, hidden.dtype, differentiable
        ctx.frozen = frozen
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
        needs = ctx.needs_input_grad[:3]
        grads: list[torch.Tensor | None] = [None, None, None]
        if ctx.frozen and grad_score is not None:
            # An ignored token's g may be inf or NaN (a division by no tokens under "mean").
            g = grad_score.masked_fill(labels == ctx.maths.ignore_index, 0)
            grads[0], grad_score = _scaled(unit, g, ctx.hidden_dtype), None
        if any(g is not None for g in (grad_score, *others)):
            hidden, weight, bias, top, log_sum, entropy = rest
            operands = (hidden, weight, bias, labels, top, log_sum, entropy)
            found = _backward_op(grad_score, *others, *operands, *ctx.maths, *needs)
            more = [grad if need else None for grad, need in zip(found, needs, strict=True)]
            grads = [b if a is None else a if b is None else a + b for a, b in zip(grads, more, strict=True)]
        return *grads, None, None, None, None


class _Loss(torch.autograd.Function):
    """Trained head, the sum of its losses or their ``mean``: one gradient for all tokens, so that the head's own comes
    out of forward with theirs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        maths: Maths,
        mean: bool,
    ) -> torch.Tensor:
        wanted = Wanted(False, False, False, False, *ctx.needs_input_grad[:3])._replace(mean=mean)
        score, *_, unit, unit_weight, unit_bias, left = _forward_op(hidden, weight, bias, labels, *maths, *wanted)
        ctx.save_for_backward(labels, left, unit, unit_weight, unit_bias)
        ctx.ignore_index, ctx.mean = maths.ignore_index, mean
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        # No valid token: 0 / 0 = NaN under "mean", as F.cross_entropy has it.
        return -score.sum() / (labels != maths.ignore_index).sum() if mean else -score.sum()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        labels, left, *units = ctx.saved_tensors
        # A division by no tokens under "mean" makes g inf or NaN, for nobody.
        counts = labels != ctx.ignore_index
        g = g * left.reshape(()) if ctx.mean else -g
        each = g.masked_fill(~counts, 0), *[g.masked_fill(~counts.any(), 0)] * 2
        found: list[torch.Tensor | None] = []
        for i, (unit, of, dtype) in enumerate(zip(units, each, ctx.dtypes, strict=True)):
            found.append(_scaled(unit, of, dtype) if ctx.needs_input_grad[i] else None)
        return *found, None, None, None


def _scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    maths: Maths,
    wanted: Wanted,
    gradients: tuple[bool, bool, bool] = (False, False, False),
) -> LogProb:
    """The op, with a token's score in the place of its log-probability. ``gradients``: whether entropy, mean and lse
    have one.
    """
    if torch.is_grad_enabled():
        return LogProb(*_LinearLogProb.apply(hidden, weight, bias, labels, maths, wanted, gradients))
    # autograd.Function reports needs_input_grad even here, and would compute the gradient for nothing.
    score, top, log_sum, *optional, _, _, _, _ = _forward_op(hidden, weight, bias, labels, *maths, *wanted)
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
    maths = Maths(ignore_index, softcap, logit_scale, temperature, 0.0, 0.0, _head_dtype(hidden, dtype), way)
    wanted = Wanted(entropy, is_top1, mean_logits, log_sum_sq_probs)
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
    total = loss.sum()
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
        raw = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)).to(
            wide_dtype(dtype)
        )
    z, _ = transform(raw, softcap, logit_scale, 1.0)
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
    maths = Maths(ignore_index, softcap, logit_scale, 1.0, label_smoothing, z_loss, dtype, way)
    rows = hidden.reshape(-1, hidden.shape[-1])
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (weight, bias))
    if trained and reduction != "none" and way == "chunks":
        return _Loss.apply(rows, weight, bias, flat, maths, reduction == "mean")
    score = _scores(rows, weight, bias, flat, maths, Wanted(False, False, False, False)).log_prob
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
