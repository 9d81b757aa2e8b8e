"""The loss without a buffer of logits: products and softmax in one kernel. ``linear_cross_entropy.py`` has the maths.

Stages, with tiles of tokens and of the vocabulary: (1) a program takes a tile of tokens, walks over a part of the
vocabulary, and keeps for each token what the logsumexp and the other results need; (2) a small kernel joins the parts;
(3) in backward one launch walks over the vocabulary for dh and one over the tokens for dW and db. Both compute each
tile of logits again, turn it into its gradient in registers, and add its product with the rows they walk over to an
fp32 total. That total is in global memory (a row of h or W is longer than registers), and only one program adds to
a row of it, in one order: results repeat bit for bit. Every launch is of one kernel, which is told whose rows are its
own: dh = dr W and dW = dr^T h are the same sum with h and W, and with tokens and vocabulary, in each other's place.

What never exists: logits, in any number. Beside the results and their fp32 totals (of dh one for each of at most
:data:`MOST_TOTALS` parts of the vocabulary), a call takes 28 bytes for each token and part. What it costs: in backward
two products for each of dh and dW, and a total that is read and written once for each tile it walks over. Large
products are faster with cuBLAS: this is for where the buffer does not fit.

Filtered: a tile of dr that is below ``least`` everywhere is multiplied by nothing. The logits of most of a vocabulary
are improbable for most tokens once a model is trained, and then this is most tiles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastft.kernels._config import SHARED_BYTES, Config, Space, crowded, padded
from fastft.kernels._linear_cross_entropy_triton import _gradient, _z_of
from fastft.kernels._rows import processors
from fastft.kernels._triton import cdiv, jit, tl

# -------------------------------------------------------------------------------------------------------- configuration

#: Tiles of the kernel's own rows that run side by side: they share what they walk over in L2, and their own rows stay.
GROUP = 16
#: Parts of the vocabulary at most: of the forward, and of dh, whose every part is a total [tokens, hidden] of its own.
MOST_PARTS, MOST_TOTALS = 32, 4


def _parts(programs: int, most: int, enough: float) -> int:
    """How many programs share a row's walk: a power of two that makes about ``enough`` programs."""
    parts = 1
    while 2 * parts <= most and programs * parts * 2 <= enough:
        parts *= 2
    return parts


def _tiles(kernel: str, device: torch.device, dtype: torch.dtype, own: int, other: int) -> Config:
    if dtype.itemsize > 2:  # no tensor cores
        m, n, k, h, warps, stages = 64, 64, 32, 32, 4, 2
    elif device.type == "cuda" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        m, n, k, h, warps, stages = 128, 128, 32, 32, 8, 3  # 100 KB of shared memory
    elif kernel != "weight":
        # A total of dh is read and written for each tile of the vocabulary: wide ones are worth narrow products.
        m, n, k, h, warps, stages = 128, 256, 64, 32, 8, 3
    else:
        m, n, k, h, warps, stages = 128, 128, 64, 64, 8, 3
    m, n = (min(size, max(16, 1 << max(rows - 1, 1).bit_length())) for size, rows in ((m, own), (n, other)))
    warps = 4 if m * n <= 64 * 64 else warps
    tiles, wide = -(-own // m), processors(device)
    parts = {
        "forward": _parts(tiles, min(MOST_PARTS, -(-other // n)), 4 * wide),
        "hidden": _parts(tiles, min(MOST_TOTALS, -(-other // n)), 1.1 * wide),
        "weight": 1,
    }[kernel]
    return {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "PARTS": parts, "num_warps": warps, "num_stages": stages,
        **({} if kernel == "forward" else {"BLOCK_H": h}),
    }  # fmt: skip


def _space(kernel: str) -> Space:
    own_tokens = kernel != "weight"

    def heuristic(device: torch.device, dtype: torch.dtype, rows: int, vocab: int, hidden: int) -> Config:
        own, other = (rows, vocab) if own_tokens else (vocab, rows)
        return _tiles(kernel, device, dtype, own, other)

    def legal(config: Config, device: torch.device, dtype: torch.dtype, rows: int, vocab: int, hidden: int) -> Any:
        m, n, k, warps = (config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps"))
        h = config.get("BLOCK_H", 0)
        if m * n < 512 * warps:
            return f"{m} x {n} logits for {warps} warps"
        streamed = max((m + n) * k, n * h)
        if (shared := config["num_stages"] * streamed * dtype.itemsize) > SHARED_BYTES:
            return f"{shared} bytes of shared memory; {SHARED_BYTES} there are"
        # A tile of fp32 logits with what it turns into; or dr, and its product beside the total.
        return crowded(max(1.5 * m * n, m * n * dtype.itemsize / 4 + 2 * m * h), warps)

    def waste(config: Config, device: torch.device, dtype: torch.dtype, rows: int, vocab: int, hidden: int) -> Any:
        own, other = (rows, vocab) if own_tokens else (vocab, rows)
        tile = padded(own, config["BLOCK_M"]) * padded(other, config["BLOCK_N"]) * padded(hidden, config["BLOCK_K"])
        return tile, 1.0

    values: dict[str, tuple[int, ...]] = {
        "BLOCK_M": (16, 32, 64, 128, 256),
        "BLOCK_N": (16, 32, 64, 128, 256),
        "BLOCK_K": (32, 64, 128),
        "PARTS": {"forward": (1, 2, 4, 8, 16, 32), "hidden": (1, 2, 4), "weight": (1,)}[kernel],
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    }
    if kernel != "forward":
        values["BLOCK_H"] = (32, 64, 128)
    name = f"linear_cross_entropy.fused_{kernel}"
    space = Space(name, values, heuristic, tokens=("rows",), sizes=("vocab", "hidden"), legal=legal, waste=waste)
    space.file = Path(__file__).with_name("linear_cross_entropy.py")  # of the op, whose variants are tuned
    return space


CONFIGS = {kernel: _space(kernel) for kernel in ("forward", "hidden", "weight")}


# ------------------------------------------------------------------------------------------------------- Triton kernels


@jit
def _tile_of(tiles, GROUP: tl.constexpr, PARTS: tl.constexpr):
    """Which tile of rows, and which part of the walk, a program has: GROUP tiles, with all their parts, after one
    another.
    """
    program = tl.program_id(0)
    first = program // (GROUP * PARTS) * GROUP
    side = tl.minimum(tiles - first, GROUP)
    within = program % (GROUP * PARTS)
    return first + within % side, within // side


@jit
def _product(
    a_ptr, b_ptr, a_rows, b_rows, a_stride, b_stride,
    H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of a times rows of b, few of each, [BLOCK_M, BLOCK_N] in fp32."""
    k = tl.arange(0, BLOCK_K)
    a_at = a_ptr + (a_rows[:, None] * a_stride + k[None, :])
    b_at = b_ptr + (b_rows[None, :] * b_stride + k[:, None])
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, H, BLOCK_K):
        if H % BLOCK_K == 0:
            a, b = tl.load(a_at + start), tl.load(b_at + start)
        else:
            inside = start + k < H
            a = tl.load(a_at + start, mask=inside[None, :], other=0.0)
            b = tl.load(b_at + start, mask=inside[:, None], other=0.0)
        total += tl.dot(a, b, input_precision=PRECISION)
    return total


@jit
def _fused_forward_kernel(
    hidden_ptr,  # [tokens, H]
    weight_ptr,  # [V, H]
    bias_ptr,  # [V]
    labels_ptr,  # int64 [tokens]
    partial_ptr,  # fp32 [7, PARTS, tokens]: top, sum e, z of the label, sum e z, sum z, sum e^2, largest z before it
    tokens, hidden_stride, weight_stride,
    V: tl.constexpr, H: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr, INV_TEMPERATURE: tl.constexpr,
    ENTROPY: tl.constexpr, IS_TOP1: tl.constexpr, MEAN: tl.constexpr, LOG_SUM_SQ_PROBS: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile, part = _tile_of(tl.cdiv(tokens, BLOCK_M), GROUP, PARTS)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows and columns past the end are the last one again, and left out of every result.
    at = tl.minimum(rows, tokens - 1)
    label = tl.load(labels_ptr + at)
    hidden_ptr += tl.cast(tile * BLOCK_M, tl.int64) * hidden_stride
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    before = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    sum_e = tl.zeros((BLOCK_M,), tl.float32)
    sum_ez = tl.zeros((BLOCK_M,), tl.float32)
    sum_ee = tl.zeros((BLOCK_M,), tl.float32)
    sum_z = tl.zeros((BLOCK_M,), tl.float32)
    of_label = tl.zeros((BLOCK_M,), tl.float32)
    EACH: tl.constexpr = ((V + BLOCK_N - 1) // BLOCK_N + PARTS - 1) // PARTS * BLOCK_N
    for start in range(part * EACH, tl.minimum((part + 1) * EACH, V), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        column = tl.minimum(columns, V - 1)
        z = _product(
            hidden_ptr,
            weight_ptr + tl.cast(start, tl.int64) * weight_stride,
            at - tile * BLOCK_M,
            column - start,
            hidden_stride,
            weight_stride,
            H,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        if HAS_BIAS:
            z += tl.load(bias_ptr + column).to(tl.float32)[None, :]
        z = z.to(hidden_ptr.dtype.element_ty).to(tl.float32)
        z, _ = _z_of(z, SCALE, SOFTCAP, HAS_SOFTCAP, INV_TEMPERATURE, hidden_ptr.dtype.element_ty == tl.bfloat16)
        if MEAN:
            sum_z += tl.sum(tl.where((columns < V)[None, :], z, 0.0), axis=1)
        if V % BLOCK_N != 0:
            z = tl.where((columns < V)[None, :], z, -float("inf"))
        of_label += tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), axis=1)
        if IS_TOP1:
            before = tl.maximum(before, tl.max(tl.where(columns[None, :] < label[:, None], z, -float("inf")), axis=1))
        new = tl.maximum(top, tl.max(z, axis=1))
        # A row of -inf alone must not give exp(-inf + inf).
        base = tl.where(new == -float("inf"), 0.0, new)
        rescale = tl.exp(top - base)
        e = tl.exp(z - base[:, None])
        if ENTROPY:
            # Of e (z - base): all of one sign, so that a small entropy is no difference of large numbers.
            shift = tl.where(top == -float("inf"), 0.0, top - base)
            terms = tl.where(e > 0, e * (z - base[:, None]), 0.0)
            sum_ez = (sum_ez + sum_e * shift) * rescale + tl.sum(terms, axis=1)
        sum_e = sum_e * rescale + tl.sum(e, axis=1)
        if LOG_SUM_SQ_PROBS:
            sum_ee = sum_ee * rescale * rescale + tl.sum(e * e, axis=1)
        top = new
    mask = rows < tokens
    to = partial_ptr + (part.to(tl.int64) * tokens + rows)
    each = tl.cast(tokens, tl.int64) * PARTS
    tl.store(to, top, mask=mask)
    tl.store(to + each, sum_e, mask=mask)
    tl.store(to + 2 * each, of_label, mask=mask)
    if ENTROPY:
        tl.store(to + 3 * each, sum_ez, mask=mask)
    if MEAN:
        tl.store(to + 4 * each, sum_z, mask=mask)
    if LOG_SUM_SQ_PROBS:
        tl.store(to + 5 * each, sum_ee, mask=mask)
    if IS_TOP1:
        tl.store(to + 6 * each, before, mask=mask)


@jit
def _join_kernel(
    partial_ptr, labels_ptr,
    score_ptr, top_ptr, log_sum_ptr, entropy_ptr, is_top1_ptr, mean_logits_ptr, log_sum_sq_probs_ptr,
    tokens,
    V: tl.constexpr, IGNORE_INDEX: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    ENTROPY: tl.constexpr, IS_TOP1: tl.constexpr, MEAN_LOGITS: tl.constexpr, LOG_SUM_SQ_PROBS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = rows < tokens
    each = tl.cast(tokens, tl.int64) * PARTS
    label = tl.load(labels_ptr + rows, mask=mask, other=IGNORE_INDEX)
    counts = label != IGNORE_INDEX
    parts = tl.arange(0, PARTS)[:, None].to(tl.int64)
    at, there = partial_ptr + (parts * tokens + rows[None, :]), mask[None, :]
    tops, sums_e = tl.load(at, mask=there, other=0.0), tl.load(at + each, mask=there, other=1.0)
    top = tl.max(tops, axis=0)
    base = tl.where(top == -float("inf"), 0.0, top)
    rescale = tl.exp(tops - base[None, :])
    sum_e = tl.sum(sums_e * rescale, axis=0)
    log_sum = tl.log(sum_e)
    lse = base + log_sum
    # A label outside the vocabulary reads nothing and gives NaN: loud, and without a device-side assertion.
    z_label = tl.sum(tl.load(at + 2 * each, mask=there, other=0.0), axis=0)
    z_label = tl.where((label >= 0) & (label < V), z_label, float("nan"))
    score = (z_label - base) - log_sum
    if MEAN_LOGITS or SMOOTHING != 0.0:
        mean = tl.sum(tl.load(at + 4 * each, mask=there, other=0.0), axis=0) / V
        if SMOOTHING != 0.0:
            score = (1.0 - SMOOTHING) * score - SMOOTHING * (lse - mean)
        if MEAN_LOGITS:
            tl.store(mean_logits_ptr + rows, tl.where(counts, mean, 0.0), mask=mask)
    if Z_LOSS != 0.0:
        score -= Z_LOSS * lse * lse
    tl.store(score_ptr + rows, tl.where(counts, score, 0.0), mask=mask)
    tl.store(top_ptr + rows, tl.where(counts, base, 0.0), mask=mask)
    tl.store(log_sum_ptr + rows, tl.where(counts, log_sum, 0.0), mask=mask)
    if ENTROPY:
        shift = tl.where(tops == -float("inf"), 0.0, tops - base[None, :])
        sums_ez = tl.load(at + 3 * each, mask=there, other=0.0)
        sum_ez = tl.sum((sums_ez + sums_e * shift) * rescale, axis=0)
        tl.store(entropy_ptr + rows, tl.where(counts, log_sum - sum_ez / sum_e, 0.0), mask=mask)
    if LOG_SUM_SQ_PROBS:
        sums_ee = tl.load(at + 5 * each, mask=there, other=1.0)
        squares = tl.log(tl.sum(sums_ee * rescale * rescale, axis=0)) - 2.0 * log_sum
        tl.store(log_sum_sq_probs_ptr + rows, tl.where(counts, squares, 0.0), mask=mask)
    if IS_TOP1:
        before = tl.max(tl.load(at + 6 * each, mask=there, other=0.0), axis=0)
        first = (z_label >= top) & (z_label > before) & counts
        tl.store(is_top1_ptr + rows, first.to(tl.int8), mask=mask)


@jit
def _fused_backward_kernel(
    own_ptr,  # [owned, H]: hidden states for dh, the weight for dW
    other_ptr,  # [others, H]: the other one
    bias_ptr,  # [V]
    labels_ptr,  # int32 [tokens], as what follows; -1: ignored
    top_ptr, log_sum_ptr, entropy_ptr, g_label_ptr, g_p_ptr, g_mean_ptr, g_entropy_ptr,
    least_ptr,  # below this a token's dr is nothing, if it is so in a whole tile
    total_ptr,  # fp32 [PARTS, owned, H], zeros
    sums_ptr,  # fp32 [owned]: of dr over the others
    owned, others, own_stride, other_stride,
    V: tl.constexpr, H: tl.constexpr, HAS_BIAS: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr, INV_TEMPERATURE: tl.constexpr,
    LABEL: tl.constexpr, P: tl.constexpr, MEAN: tl.constexpr, ENTROPY: tl.constexpr,
    OWN_TOKENS: tl.constexpr, PRODUCT: tl.constexpr, SUMS: tl.constexpr, FILTERED: tl.constexpr,
    GROUP: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    tile, part = _tile_of(tl.cdiv(owned, BLOCK_M), GROUP, PARTS)
    own = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    own_at = tl.minimum(own, owned - 1)
    own_ptr += tl.cast(tile * BLOCK_M, tl.int64) * own_stride
    total_ptr += (part.to(tl.int64) * owned + tile * BLOCK_M) * H
    h = tl.arange(0, BLOCK_H)[None, :]
    sums = tl.zeros((BLOCK_M,), tl.float32)
    each = tl.cdiv(tl.cdiv(others, BLOCK_N), PARTS) * BLOCK_N
    for start in range(part * each, tl.minimum((part + 1) * each, others), BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        other_at = tl.minimum(other, others - 1)
        from_ptr = other_ptr + tl.cast(start, tl.int64) * other_stride
        r = _product(
            own_ptr,
            from_ptr,
            own_at - tile * BLOCK_M,
            other_at - start,
            own_stride,
            other_stride,
            H,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        if OWN_TOKENS:
            token, column, there = own_at[:, None], other[None, :], (own < owned)[:, None]
            at_column = other_at[None, :]
            walked = other < others
        else:
            token, column, there = other_at[None, :], own[:, None], (other < others)[None, :]
            at_column = own_at[:, None]
            # 0 times a NaN hidden state of an ignored token would be NaN in every row of dW.
            walked = (other < others) & (tl.load(labels_ptr + other_at) != -1)
        if HAS_BIAS:
            r += tl.load(bias_ptr + at_column).to(tl.float32)
        r = r.to(own_ptr.dtype.element_ty).to(tl.float32)
        z, slope = _z_of(r, SCALE, SOFTCAP, HAS_SOFTCAP, INV_TEMPERATURE, own_ptr.dtype.element_ty == tl.bfloat16)
        label = tl.load(labels_ptr + token)
        # What nobody asked for is not read into any result: its pointer is another's.
        dr = _gradient(
            z,
            tl.load(top_ptr + token),
            tl.load(log_sum_ptr + token),
            tl.load(entropy_ptr + token),
            column == label,
            tl.load(g_label_ptr + token),
            tl.load(g_p_ptr + token),
            tl.load(g_mean_ptr + token),
            tl.load(g_entropy_ptr + token),
            LABEL,
            P,
            MEAN,
            ENTROPY,
        )
        # An ignored token contributes nothing, whatever its logits or its incoming gradient are.
        dr = tl.where(there & (column < V) & (label != -1), dr * slope, 0.0)
        if SUMS:
            sums += tl.sum(dr, axis=1)
        if PRODUCT:
            counted = 1
            if FILTERED:
                # NaN is not below anything.
                small = tl.where(tl.abs(dr) <= tl.load(least_ptr + token), 0, 1)
                counted = tl.max(tl.max(small, axis=1), axis=0)
            if counted > 0:
                narrow = dr.to(other_ptr.dtype.element_ty)
                from_at = from_ptr + ((other_at - start)[:, None] * other_stride + h)
                to_at = total_ptr + ((own - tile * BLOCK_M)[:, None] * H + h)
                for first in range(0, H, BLOCK_H):
                    inside = first + h < H
                    b = tl.load(from_at + first, mask=walked[:, None] & inside, other=0.0)
                    more = tl.dot(narrow, b, input_precision=PRECISION)
                    to, mask = to_at + first, (own < owned)[:, None] & inside
                    tl.store(to, tl.load(to, mask=mask, other=0.0) + more, mask=mask)
                # What one thread has stored another may load for the next tile.
                tl.debug_barrier()
    if SUMS:
        tl.store(sums_ptr + own, sums, mask=own < owned)


# ------------------------------------------------------------------------------------------------------------ launchers


def scratch(tokens: int, hidden: int, backward: bool) -> int:
    """Bytes that a call takes at most beside its results (and, in backward, the fp32 total of dW)."""
    return 4 * tokens * hidden * MOST_TOTALS if backward else 28 * tokens * MOST_PARTS


def _rows_of(x: torch.Tensor) -> torch.Tensor:
    """With rows that are contiguous, and few of which are within 32 bits."""
    return x if x.stride(1) == 1 and x.stride(0) < 2**22 else x.contiguous()


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    outputs: tuple[torch.Tensor, ...],
    constants: dict[str, Any],
    *,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    wanted: dict[str, bool],
) -> None:
    """Write the seven results [tokens] of ``linear_log_prob``'s forward. ``hidden`` [tokens, H], ``weight`` [V, H],
    ``bias`` [V] are of one dtype; ``constants``: of the logits; ``wanted``: which results are, by the kernel's names.
    """
    (tokens, width), vocab = hidden.shape, weight.shape[0]
    if not tokens:
        return
    hidden, weight = _rows_of(hidden), _rows_of(weight)
    config = CONFIGS["forward"](hidden.device, hidden.dtype, tokens, vocab, width)
    parts = config["PARTS"]
    partial = torch.empty((7, parts, tokens), dtype=torch.float32, device=hidden.device)
    _fused_forward_kernel[(cdiv(tokens, config["BLOCK_M"]) * parts,)](
        hidden,
        weight,
        hidden if bias is None else bias,
        labels,
        partial,
        tokens,
        hidden.stride(0),
        weight.stride(0),
        V=vocab,
        H=width,
        HAS_BIAS=bias is not None,
        ENTROPY=wanted["ENTROPY"],
        IS_TOP1=wanted["IS_TOP1"],
        MEAN=wanted["MEAN_LOGITS"] or smoothing != 0.0,
        LOG_SUM_SQ_PROBS=wanted["LOG_SUM_SQ_PROBS"],
        GROUP=GROUP,
        PRECISION=_precision(hidden.dtype),
        **constants,
        **config,
    )
    _join_kernel[(cdiv(tokens, 128),)](
        partial,
        labels,
        *outputs,
        tokens,
        V=vocab,
        IGNORE_INDEX=ignore_index,
        SMOOTHING=smoothing,
        Z_LOSS=z_loss,
        PARTS=parts,
        BLOCK=128,
        **wanted,
    )


def backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    each: tuple[torch.Tensor | None, ...],
    least: torch.Tensor | None,
    constants: dict[str, Any],
    *,
    ignore_index: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias in fp32, what is not wanted being empty. ``saved``: top, log_sum and
    entropy, ``each``: what a token multiplies the parts of its gradient by, ``least``: below what it is nothing
    (None: nowhere), [tokens] each.
    """
    (tokens, width), vocab = hidden.shape, weight.shape[0]
    hidden, weight = _rows_of(hidden), _rows_of(weight)
    # Half the registers, where a program has a label for each of its columns. One that nothing has: -2.
    outside = (labels < 0) | (labels >= vocab)
    labels = labels.masked_fill(outside, -2).masked_fill(labels == ignore_index, -1).to(torch.int32)
    top, log_sum, entropy = saved
    tables = (top, log_sum, entropy if entropy.shape[0] else top, *(top if g is None else g for g in each))
    flags = dict(zip(("LABEL", "P", "MEAN", "ENTROPY"), (g is not None for g in each), strict=True))

    def launch(kernel: str, product: bool, sums: bool) -> tuple[torch.Tensor, torch.Tensor]:
        of_tokens = kernel == "hidden"
        own, other = (hidden, weight) if of_tokens else (weight, hidden)
        config = CONFIGS[kernel](hidden.device, hidden.dtype, tokens, vocab, width)
        parts = config["PARTS"]
        total = hidden.new_zeros((parts, own.shape[0] if product else 0, width), dtype=torch.float32)
        added = hidden.new_zeros((vocab if sums else 0,), dtype=torch.float32)
        if tokens and (product or sums):
            _fused_backward_kernel[(cdiv(own.shape[0], config["BLOCK_M"]) * parts,)](
                own,
                other,
                hidden if bias is None else bias,
                labels,
                *tables,
                top if least is None else least,
                total,
                added,
                own.shape[0],
                other.shape[0],
                own.stride(0),
                other.stride(0),
                V=vocab,
                H=width,
                HAS_BIAS=bias is not None,
                OWN_TOKENS=of_tokens,
                PRODUCT=product,
                SUMS=sums,
                FILTERED=least is not None,
                GROUP=GROUP,
                PRECISION=_precision(hidden.dtype),
                **flags,
                **constants,
                **config,
            )
        return total[0] if parts == 1 else total.sum(0), added

    grad_hidden, _ = launch("hidden", need_hidden, False)
    return grad_hidden, *launch("weight", need_weight, need_bias)


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"
