"""The loss's Triton kernels over rows of logits: forward, with the gradient written over them, and backward.
``linear_cross_entropy.py`` has the maths, and with ``_linear_cross_entropy_chunks.py`` the launches.
"""

from __future__ import annotations

from fastft.kernels._maths import exp2, tanh
from fastft.kernels._triton import jit, tl


@jit
def _exp(x):
    """exp of fp32 ``x``, or 0."""
    return exp2(x * 1.4426950408889634)


@jit
def _z_of(
    z,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INV_TEMPERATURE: tl.constexpr,
    ROUNDED: tl.constexpr,
):
    """z and d z / d r of raw logits, in fp32. ``ROUNDED``: to bf16."""
    slope = SCALE * INV_TEMPERATURE
    if SCALE != 1.0 and not (HAS_SOFTCAP and ROUNDED):
        z = z * SCALE
    if HAS_SOFTCAP:
        if ROUNDED:
            t = tanh(z * (SCALE / SOFTCAP), True)
            slope = slope - slope * (t * t)
        else:
            # tanh |u| = (1 - e) / (1 + e) with e = exp(-2 |u|), which cannot overflow, and is exact for small u; and
            # 1 - tanh^2 u = 4 e / (1 + e)^2, without the cancellation of 1 - t t near the cap.
            u = z / SOFTCAP
            e = tl.exp(-2.0 * tl.abs(u))
            inverse = 1.0 / (1.0 + e)
            t = (1.0 - e) * inverse
            t = tl.where(u < 0, -t, t)
            slope = slope * (4.0 * e * inverse * inverse)
        z = t * SOFTCAP
    if INV_TEMPERATURE != 1.0:
        z = z * INV_TEMPERATURE
    return z, slope


@jit
def _load_z(
    logits_ptr,
    offsets,
    mask,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INV_TEMPERATURE: tl.constexpr,
    EVICT: tl.constexpr,
    OTHER: tl.constexpr = 0.0,
):
    """z and d z / d r of the logits at ``offsets``; a logit that is masked is ``OTHER``."""
    raw = tl.load(logits_ptr + offsets, mask=mask, other=OTHER, eviction_policy=EVICT).to(tl.float32)
    return _z_of(raw, SCALE, SOFTCAP, HAS_SOFTCAP, INV_TEMPERATURE, logits_ptr.dtype.element_ty == tl.bfloat16)


@jit
def _unlabelled(z, base, log_sum, lse, V: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr):
    """d score / d z of what is not the label."""
    p = _exp((z - base) - log_sum)
    if Z_LOSS != 0.0:
        p = (1.0 + 2.0 * Z_LOSS * lse) * p
    gradient = -p
    if SMOOTHING != 0.0:
        gradient += SMOOTHING / V
    return gradient


@jit
def _forward_kernel(
    logits_ptr,  # [rows, V], each row STRIDE long, overwritten by d score / d r when GRADIENT
    labels_ptr,  # int64 [rows]
    score_ptr,
    top_ptr,
    log_sum_ptr,
    entropy_ptr,
    is_top1_ptr,
    mean_logits_ptr,
    log_sum_sq_probs_ptr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INV_TEMPERATURE: tl.constexpr,
    SMOOTHING: tl.constexpr,
    Z_LOSS: tl.constexpr,
    ENTROPY: tl.constexpr,
    IS_TOP1: tl.constexpr,
    MEAN_LOGITS: tl.constexpr,
    LOG_SUM_SQ_PROBS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program is one token. An ignored token's logits are not even read, only its gradient is set to zero.
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * STRIDE
    if label == IGNORE_INDEX:
        tl.store(score_ptr + row, 0.0)
        tl.store(top_ptr + row, 0.0)
        tl.store(log_sum_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        if IS_TOP1:
            tl.store(is_top1_ptr + row, 0)
        if MEAN_LOGITS:
            tl.store(mean_logits_ptr + row, 0.0)
        if LOG_SUM_SQ_PROBS:
            tl.store(log_sum_sq_probs_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                offsets = start + tl.arange(0, BLOCK)
                zero = tl.zeros((BLOCK,), tl.float32)
                tl.store(logits_ptr + offsets, zero.to(logits_ptr.dtype.element_ty), mask=offsets < STRIDE)
    else:
        # Every thread goes through its own columns alone: sums are kept for each run of WIDE columns, one load's.
        WIDE: tl.constexpr = BLOCK if BLOCK < 8 else 8
        RUNS: tl.constexpr = BLOCK // WIDE
        columns = tl.arange(0, RUNS)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
        # Without padding, and where -inf stays that, what is loaded past the end is -inf and needs no second mask.
        CLEAN: tl.constexpr = STRIDE == V and SCALE > 0 and not HAS_SOFTCAP
        PAST: tl.constexpr = -float("inf") if CLEAN else 0.0
        tops = tl.full((RUNS,), -float("inf"), tl.float32)
        before = tl.full((), -float("inf"), tl.float32)
        sums_e = tl.zeros((RUNS,), tl.float32)
        sums_ez = tl.zeros((RUNS,), tl.float32)
        sums_ee = tl.zeros((RUNS,), tl.float32)
        sums_z = tl.zeros((RUNS,), tl.float32)
        for start in range(0, V, BLOCK):
            offsets = start + columns
            mask = offsets < V
            z, _ = _load_z(
                logits_ptr, offsets, offsets < STRIDE, SCALE, SOFTCAP, HAS_SOFTCAP, INV_TEMPERATURE, "evict_last", PAST
            )
            if MEAN_LOGITS or SMOOTHING != 0.0:
                sums_z += tl.sum(tl.where(mask, z, 0.0), axis=1)
            if not CLEAN:
                z = tl.where(mask, z, -float("inf"))
            if IS_TOP1:
                before = tl.maximum(before, tl.max(tl.max(tl.where(offsets < label, z, -float("inf")), axis=1), axis=0))
            new = tl.maximum(tops, tl.max(z, axis=1))
            # A run of -inf alone must not give exp(-inf + inf).
            base = tl.where(new == -float("inf"), 0.0, new)
            rescale = _exp(tops - base)
            e = _exp(z - base[:, None])
            if ENTROPY:
                # Of e (z - base): all of one sign, so that a small entropy is no difference of large numbers.
                shift = tl.where(tops == -float("inf"), 0.0, tops - base)
                terms = tl.where(e > 0, e * (z - base[:, None]), 0.0)
                sums_ez = (sums_ez + sums_e * shift) * rescale + tl.sum(terms, axis=1)
            sums_e = sums_e * rescale + tl.sum(e, axis=1)
            if LOG_SUM_SQ_PROBS:
                sums_ee = sums_ee * rescale * rescale + tl.sum(e * e, axis=1)
            tops = new
        largest = tl.max(tops, axis=0)
        base = tl.where(largest == -float("inf"), 0.0, largest)
        rescale = tl.exp(tops - base)
        sum_e = tl.sum(sums_e * rescale, axis=0)
        log_sum = tl.log(sum_e)
        # A label outside the vocabulary reads nothing and gives NaN: loud, and without a device-side assertion.
        inside = (label >= 0) & (label < V)
        z_label, slope_label = _load_z(logits_ptr, label, inside, SCALE, SOFTCAP, HAS_SOFTCAP, INV_TEMPERATURE, "")
        z_label = tl.where(inside, z_label, float("nan"))
        score = (z_label - base) - log_sum
        mean = tl.sum(sums_z, axis=0) / V
        lse = base + log_sum
        if SMOOTHING != 0.0:
            score = (1.0 - SMOOTHING) * score - SMOOTHING * (lse - mean)
        if Z_LOSS != 0.0:
            score -= Z_LOSS * lse * lse
        tl.store(score_ptr + row, score)
        tl.store(top_ptr + row, base)
        tl.store(log_sum_ptr + row, log_sum)
        if ENTROPY:
            shift = tl.where(tops == -float("inf"), 0.0, tops - base)
            sum_ez = tl.sum((sums_ez + sums_e * shift) * rescale, axis=0)
            tl.store(entropy_ptr + row, log_sum - sum_ez / sum_e)
        if IS_TOP1:
            tl.store(is_top1_ptr + row, ((z_label >= largest) & (z_label > before)).to(tl.int8))
        if MEAN_LOGITS:
            tl.store(mean_logits_ptr + row, mean)
        if LOG_SUM_SQ_PROBS:
            sum_ee = tl.sum(sums_ee * rescale * rescale, axis=0)
            tl.store(log_sum_sq_probs_ptr + row, tl.log(sum_ee) - 2.0 * log_sum)
        if GRADIENT:
            # The label's logit is overwritten too: not before every warp has read it.
            tl.debug_barrier()
            for i in range(0, (V + BLOCK - 1) // BLOCK):
                offsets = ((V - 1) // BLOCK - i) * BLOCK + columns
                z, slope = _load_z(
                    logits_ptr, offsets, offsets < STRIDE, SCALE, SOFTCAP, HAS_SOFTCAP, INV_TEMPERATURE, "evict_first"
                )
                gradient = _unlabelled(z, base, log_sum, lse, V, SMOOTHING, Z_LOSS) * slope
                gradient = gradient.to(logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + offsets, gradient, mask=offsets < STRIDE, eviction_policy="evict_first")
            # The label's own, over what its column got: to look for it everywhere takes three instructions of ten.
            tl.debug_barrier()
            gradient = _unlabelled(z_label, base, log_sum, lse, V, SMOOTHING, Z_LOSS) + (1.0 - SMOOTHING)
            tl.store(logits_ptr + label, (gradient * slope_label).to(logits_ptr.dtype.element_ty), mask=inside)


@jit
def _gradient(
    z,
    top,
    log_sum,
    entropy,
    at_label,
    g_label,
    g_p,
    g_mean,
    g_entropy,
    LABEL: tl.constexpr,
    P: tl.constexpr,
    MEAN: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """d loss / d z, from what each token multiplies the parts by."""
    log_p = (z - top) - log_sum
    p = _exp(log_p)
    gradient = tl.zeros(p.shape, tl.float32)
    if LABEL:
        gradient += tl.where(at_label, g_label, 0.0)
    if P:
        gradient -= g_p * p
    if MEAN:
        gradient += g_mean
    if ENTROPY:
        gradient -= g_entropy * tl.where(p > 0, p * (log_p + entropy), 0.0)
    return gradient


@jit
def _backward_kernel(
    logits_ptr,  # [rows, V], each row STRIDE long, overwritten by d loss / d r
    labels_ptr,  # int64 [rows]
    top_ptr,
    log_sum_ptr,
    entropy_ptr,
    g_label_ptr,
    g_p_ptr,
    g_mean_ptr,
    g_entropy_ptr,
    V: tl.constexpr,
    STRIDE: tl.constexpr,
    IGNORE_INDEX: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INV_TEMPERATURE: tl.constexpr,
    LABEL: tl.constexpr,
    P: tl.constexpr,
    MEAN: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits_ptr += row * STRIDE
    label = tl.load(labels_ptr + row)
    z, slope = _load_z(logits_ptr, offsets, offsets < STRIDE, SCALE, SOFTCAP, HAS_SOFTCAP, INV_TEMPERATURE, "")
    top, log_sum = tl.load(top_ptr + row), tl.load(log_sum_ptr + row)
    # What nobody asked for is not read into any result: its pointer is another's.
    entropy = tl.load(entropy_ptr + row)
    g_label, g_p = tl.load(g_label_ptr + row), tl.load(g_p_ptr + row)
    g_mean, g_entropy = tl.load(g_mean_ptr + row), tl.load(g_entropy_ptr + row)
    gradient = _gradient(
        z, top, log_sum, entropy, offsets == label, g_label, g_p, g_mean, g_entropy, LABEL, P, MEAN, ENTROPY
    )
    # An ignored token contributes nothing, whatever its logits or its incoming gradient are.
    gradient = tl.where(label == IGNORE_INDEX, 0.0, gradient * slope)
    tl.store(logits_ptr + offsets, gradient.to(logits_ptr.dtype.element_ty), mask=offsets < STRIDE)


@jit
def _scale_kernel(
    unit_ptr,  # [rows, columns]
    g_ptr,  # fp32 [rows]
    out_ptr,  # [rows, columns]
    columns,
    blocks,
    programs,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = unit · g, rounded once. ``programs``: of each row. ``IN_PLACE``: out is unit, of which a row whose g is 1
    is not touched.
    """
    row = (tl.program_id(0) // programs).to(tl.int64)
    g = tl.load(g_ptr + row)
    if (g != 1.0) | (not IN_PLACE):
        unit_ptr += row * columns
        out_ptr += row * columns
        first = (tl.program_id(0) % programs).to(tl.int64)
        for block in range(first, blocks, programs):
            at = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(unit_ptr + at, mask=at < columns, other=0.0).to(tl.float32) * g
            tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=at < columns)
