"""Attention's Triton kernels: the forward, and those of the backward. ``attention.py`` has the maths, and launches.

Both sides of the mask are bounded: a tile of queries walks over the keys from ``start`` of its first query to its last
query, a tile of keys over the queries from its first key to ``stop`` of its last one. Of each walk only the tiles on
the edges look at the mask.
"""

from __future__ import annotations

from fastft.kernels._maths import exp2, tanh
from fastft.kernels._triton import jit, tl

# ---------------------------------------------------------------- device functions


@jit
def _first_key(q, start_ptr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, HAS_START: tl.constexpr):
    """start(q): the first key that query q sees."""
    first = q * 0
    if HAS_START:
        first = tl.load(start_ptr + q)
    if WINDOW > 0:
        first = tl.maximum(first, q - (WINDOW - 1))
    if CHUNK > 0:
        first = tl.maximum(first, q // CHUNK * CHUNK)
    return first


@jit
def _past_query(k, stop_ptr, Sq, WINDOW: tl.constexpr, CHUNK: tl.constexpr, HAS_START: tl.constexpr):
    """stop(k): one past the last query that sees key k."""
    past = k * 0 + Sq
    if HAS_START:
        past = tl.load(stop_ptr + k)
    if WINDOW > 0:
        past = tl.minimum(past, k + WINDOW)
    if CHUNK > 0:
        past = tl.minimum(past, k // CHUNK * CHUNK + CHUNK)
    return past


@jit
def _softcap(s, scale, SOFTCAP: tl.constexpr, ROUNDED: tl.constexpr):
    """Raw products → scaled (and capped) scores in units of log₂e, and tanh(s / softcap)."""
    if SOFTCAP > 0:
        t = tanh(s * (scale / SOFTCAP), ROUNDED)
        return t * (SOFTCAP * 1.4426950408889634), t
    return s * (scale * 1.4426950408889634), s


@jit
def _in_twos(lse):
    """A natural logarithm, which all that compute attention leave and take, in units of log₂e, as scores are here."""
    return lse * 1.4426950408889634


@jit
def _load(at, mask, MASKED: tl.constexpr):
    """A tile, zero where ``mask`` is False; without looking at the mask where it is known to be True everywhere."""
    if MASKED:
        return tl.load(at, mask=mask, other=0.0)
    return tl.load(at)


@jit
def _kept(x, seed, rows, cols, head, DROP: tl.constexpr):
    """``x`` where dropout keeps a query and a key of a head, else 0: the same for whoever asks.

    ``DROP``: p in units of 2⁻³¹. Philox counts keys, queries and heads, and needs no order of asking; seven rounds of
    it pass every test that ten do. The factor 1 / (1 − p), ``KEPT``, is for sums in fp32: weights times it would be
    rounded for their product, the large ones of a query that sees few keys all to the same side.
    """
    zero = rows * 0 + cols * 0
    drawn, _, _, _ = tl.philox(seed, cols + zero, rows + zero, tl.cast(head, tl.int32) + zero, zero, 7)
    return tl.where((drawn >> 1).to(tl.int32) >= DROP, x, 0.0)


@jit
def _dense_mask(s, mask, DENSE: tl.constexpr):
    """Apply a tile of a dense mask: boolean (1) or additive (2)."""
    if DENSE == 1:
        s = tl.where(mask != 0, s, float("-inf"))
    if DENSE == 2:
        # finfo.min times log₂e would be −∞: a row that a finite mask hides everywhere keeps PyTorch's uniform weights.
        bias = mask.to(tl.float32)
        s += tl.where(bias == float("-inf"), float("-inf"), tl.maximum(bias * 1.4426950408889634, -1e38))
    return s


@jit
def _weights(s, lse, Sk, DENSE: tl.constexpr):
    """The forward's weights again, out of its scores and logsumexp."""
    p = exp2(s - lse)
    if DENSE == 2:  # of a row that is hidden everywhere: beside 1e38 the logarithm of a sum is lost
        p = tl.where(lse < -1e37, tl.where(s == float("-inf"), 0.0, 1.0 / Sk), p)
    return p


# ---------------------------------------------------------------- forward kernel


@jit
def _forward_tiles(
    acc, m_i, l_i, q, rows, first, lo, hi, k_ptr, v_ptr, keep_ptr, dense_ptr, seed, head, scale, Sk,
    k_s, v_s, dense_n, d, dv, D: tl.constexpr, DV: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, HAS_PADDING: tl.constexpr, DENSE: tl.constexpr, EDGE: tl.constexpr,
    DROP: tl.constexpr, BOUNDED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add keys lo..hi to a tile of queries. ``EDGE``: some pairs in there are outside the mask or the sequence.
    ``BOUNDED``: exp of no score, nor a sum of such, is too large or too small for fp32 or for v's dtype.
    """
    for n in range(lo, hi, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        inside = cols < Sk
        n64 = tl.cast(n, tl.int64)
        k_at = k_ptr + n64 * k_s + (d[:, None] + tl.arange(0, BLOCK_N)[None, :] * k_s)
        v_at = v_ptr + n64 * v_s + (dv[None, :] + tl.arange(0, BLOCK_N)[:, None] * v_s)
        k = _load(k_at, inside[None, :] & (d < D)[:, None], EDGE or BLOCK_D != D)
        v = _load(v_at, inside[:, None] & (dv < DV)[None, :], EDGE or BLOCK_DV != DV)
        s, _ = _softcap(tl.dot(q, k, input_precision=PRECISION), scale, SOFTCAP, q.dtype == tl.bfloat16)
        if DENSE:
            s = _dense_mask(
                s,
                tl.load(dense_ptr[:, None] + cols.to(tl.int64)[None, :] * dense_n, mask=inside[None, :], other=0),
                DENSE,
            )
        if HAS_PADDING:
            s = tl.where((tl.load(keep_ptr + cols, mask=inside, other=0) != 0)[None, :], s, float("-inf"))
        if EDGE:
            seen = inside[None, :] & (cols[None, :] >= first[:, None])
            if CAUSAL:
                seen = seen & (cols[None, :] <= rows[:, None])
            s = tl.where(seen, s, float("-inf"))
        if BOUNDED:  # by themselves, then, and not below their maximum
            p = exp2(s)
            l_i += tl.sum(p, 1)
        else:
            m_new = tl.maximum(m_i, tl.max(s, 1))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = exp2(s - m_safe[:, None])
            alpha = exp2(m_i - m_safe)
            l_i = l_i * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            m_i = m_new
        if DROP > 0:  # of what is added up, not of the sum that it is divided by
            p = _kept(p, seed, rows[:, None], cols[None, :], head, DROP)
        acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return acc, m_i, l_i


@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, keep_ptr, dense_ptr, sinks_ptr, seed_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, dense_b, dense_h, dense_m, dense_n,
    Hq, Sq, Sk, tiles, scale,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
    HAS_PADDING: tl.constexpr, DENSE: tl.constexpr, SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    DROP: tl.constexpr, KEPT: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    EDGES: tl.constexpr = HAS_START or WINDOW > 0 or CHUNK > 0
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    if CAUSAL:  # the longest rows first
        tile = tiles - 1 - tile
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
    m0 = tile * BLOCK_M
    rows = m0 + tl.arange(0, BLOCK_M)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    start_ptr += b * Sq
    keep_ptr += b * Sk
    if HAS_END:  # no query sees a key from there on
        Sk = tl.load(end_ptr + b)
    k_ptr += b * k_b + h // GROUP * k_h
    v_ptr += b * v_b + h // GROUP * v_h
    valid = rows < Sq
    at = rows.to(tl.int64)
    q = tl.load(
        q_ptr + b * q_b + h * q_h + at[:, None] * q_s + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0
    )
    dense_rows = dense_ptr + b * dense_b + h * dense_h + tl.minimum(at, Sq - 1) * dense_m

    seed = 0
    if DROP > 0:
        seed = tl.load(seed_ptr)
    clamped = tl.minimum(rows, Sq - 1)
    first = _first_key(clamped, start_ptr, WINDOW, CHUNK, HAS_START)
    lo = 0
    inner = 0
    hi = Sk
    outer = Sk // BLOCK_N * BLOCK_N
    if CAUSAL:
        hi = tl.minimum(Sk, m0 + BLOCK_M)
        outer = tl.minimum(Sk, m0 + 1) // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if HAS_SINKS:  # a score that every query has, and that no value belongs to
        m_i = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + h).to(tl.float32) * 1.4426950408889634
        l_i = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        m_i = tl.full([BLOCK_M], 0.0 if BOUNDED else float("-inf"), tl.float32)
        l_i = tl.zeros([BLOCK_M], tl.float32)
    # Keys in three runs: tiles on the left edge of the interval, those that every query sees whole, those on the right.
    if EDGES:
        lo = tl.maximum(_first_key(m0, start_ptr, WINDOW, CHUNK, HAS_START), 0) // BLOCK_N * BLOCK_N
        last = _first_key(tl.minimum(m0 + BLOCK_M, Sq) - 1, start_ptr, WINDOW, CHUNK, HAS_START)
        inner = tl.cdiv(tl.maximum(last, 0), BLOCK_N) * BLOCK_N
        acc, m_i, l_i = _forward_tiles(
            acc, m_i, l_i, q, rows, first, lo, tl.minimum(inner, hi),
            k_ptr, v_ptr, keep_ptr, dense_rows, seed, head, scale, Sk,
            k_s, v_s, dense_n, d, dv, D, DV, CAUSAL, SOFTCAP, HAS_PADDING, DENSE, True, DROP, BOUNDED,
            BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
        )  # fmt: skip
    acc, m_i, l_i = _forward_tiles(
        acc, m_i, l_i, q, rows, first, inner, outer, k_ptr, v_ptr, keep_ptr, dense_rows, seed, head, scale, Sk,
        k_s, v_s, dense_n, d, dv, D, DV, CAUSAL, SOFTCAP, HAS_PADDING, DENSE, False, DROP, BOUNDED,
        BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
    )  # fmt: skip
    acc, m_i, l_i = _forward_tiles(
        acc, m_i, l_i, q, rows, first, tl.maximum(inner, outer), hi,
        k_ptr, v_ptr, keep_ptr, dense_rows, seed, head, scale, Sk,
        k_s, v_s, dense_n, d, dv, D, DV, CAUSAL, SOFTCAP, HAS_PADDING, DENSE, True, DROP, BOUNDED,
        BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
    )  # fmt: skip

    # A query that saw no key: out = 0, and L = +∞ makes its p, and so its gradients, 0 in the backward.
    blind = l_i == 0.0
    acc = acc / tl.where(blind, 1.0, l_i)[:, None] * KEPT
    lse = tl.where(blind, float("inf"), (m_i + tl.log2(tl.where(blind, 1.0, l_i))) * 0.6931471805599453)
    tl.store(lse_ptr + head.to(tl.int64) * Sq + rows, lse, mask=valid)
    out_at = out_ptr + b * o_b + h * o_h + at[:, None] * o_s + dv[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (dv < DV)[None, :])


# ---------------------------------------------------------------- backward kernels


@jit
def _delta_kernel(
    do_ptr, out_ptr, lse_ptr, sinks_ptr, delta_ptr, dsinks_ptr, asked_ptr,
    do_b, do_h, do_s, o_b, o_h, o_s, Hq, Sq, tiles,
    DV: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_ASKED: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """δ = Σ_d do · out, one fp32 number for each query and head; −Σ p δ over the tile: of a sink's gradient; queries of
    the head up to the tile's last one that a gradient comes to (``asked``).
    """
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at = rows.to(tl.int64)
    dv = tl.arange(0, BLOCK_DV)
    mask = (rows < Sq)[:, None] & (dv < DV)[None, :]
    if HAS_ASKED or HAS_SINKS:
        lse = tl.load(lse_ptr + head.to(tl.int64) * Sq + rows, mask=rows < Sq, other=float("inf"))
    if HAS_ASKED:  # of a query that saw no key nothing is read: no weight of it is anything but 0
        mask = mask & (lse != float("inf"))[:, None]
    do = tl.load(do_ptr + b * do_b + h * do_h + at[:, None] * do_s + dv[None, :], mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + b * o_b + h * o_h + at[:, None] * o_s + dv[None, :], mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(do * out, 1)
    tl.store(delta_ptr + head.to(tl.int64) * Sq + rows, delta, mask=rows < Sq)
    if HAS_ASKED:
        asked = tl.sum((do != 0.0).to(tl.int32), 1) > 0
        tl.store(asked_ptr + tl.program_id(0), tl.max(tl.where(asked, rows + 1, 0), 0))
    if HAS_SINKS:
        p = exp2(_in_twos(tl.load(sinks_ptr + h).to(tl.float32)) - _in_twos(lse))
        tl.store(dsinks_ptr + tl.program_id(0), -tl.sum(p * delta, 0))


@jit
def _dq_tiles(
    dq, q, do, lse, delta, rows, first, lo, hi, k_ptr, v_ptr, keep_ptr, dense_ptr, seed, head, scale, Sk,
    k_s, v_s, dense_n, d, dv, D: tl.constexpr, DV: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, HAS_PADDING: tl.constexpr, DENSE: tl.constexpr, EDGE: tl.constexpr,
    DROP: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for n in range(lo, hi, BLOCK_N):
        cols = n + tl.arange(0, BLOCK_N)
        inside = cols < Sk
        n64 = tl.cast(n, tl.int64)
        k_at = k_ptr + n64 * k_s + (d[:, None] + tl.arange(0, BLOCK_N)[None, :] * k_s)
        v_at = v_ptr + n64 * v_s + (dv[:, None] + tl.arange(0, BLOCK_N)[None, :] * v_s)
        k = _load(k_at, inside[None, :] & (d < D)[:, None], EDGE or BLOCK_D != D)
        v = _load(v_at, inside[None, :] & (dv < DV)[:, None], EDGE or BLOCK_DV != DV)
        s, t = _softcap(tl.dot(q, k, input_precision=PRECISION), scale, SOFTCAP, q.dtype == tl.bfloat16)
        if DENSE:
            s = _dense_mask(
                s,
                tl.load(dense_ptr[:, None] + cols.to(tl.int64)[None, :] * dense_n, mask=inside[None, :], other=0),
                DENSE,
            )
        if HAS_PADDING:
            s = tl.where((tl.load(keep_ptr + cols, mask=inside, other=0) != 0)[None, :], s, float("-inf"))
        if EDGE:
            seen = inside[None, :] & (cols[None, :] >= first[:, None])
            if CAUSAL:
                seen = seen & (cols[None, :] <= rows[:, None])
            s = tl.where(seen, s, float("-inf"))
        dp = tl.dot(do, v, input_precision=PRECISION)
        if DROP > 0:
            dp = _kept(dp, seed, rows[:, None], cols[None, :], head, DROP) * KEPT
        ds = _weights(s, lse[:, None], Sk, DENSE) * (dp - delta[:, None])
        if SOFTCAP > 0:
            ds *= 1 - t * t
        dq += tl.dot(ds.to(k.dtype), tl.trans(k), input_precision=PRECISION)
    return dq


@jit
def _dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, start_ptr, end_ptr, keep_ptr, asked_ptr, dense_ptr, seed_ptr,
    dq_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dq_b, dq_h, dq_s, dense_b, dense_h, dense_m, dense_n,
    Hq, Sq, Sk, tiles, scale,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
    HAS_PADDING: tl.constexpr, HAS_ASKED: tl.constexpr, DENSE: tl.constexpr, SOFTCAP: tl.constexpr,
    DROP: tl.constexpr, KEPT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq of a tile of queries: walks over keys as the forward does."""
    EDGES: tl.constexpr = HAS_START or WINDOW > 0 or CHUNK > 0
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    b, h = (head // Hq).to(tl.int64), (head % Hq).to(tl.int64)
    m0 = tile * BLOCK_M
    rows = m0 + tl.arange(0, BLOCK_M)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    start_ptr += b * Sq
    keep_ptr += b * Sk
    if HAS_END:  # no query sees a key from there on
        Sk = tl.load(end_ptr + b)
    k_ptr += b * k_b + h // GROUP * k_h
    v_ptr += b * v_b + h // GROUP * v_h
    valid = rows < Sq
    at = rows.to(tl.int64)
    q = tl.load(
        q_ptr + b * q_b + h * q_h + at[:, None] * q_s + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0
    )
    do = tl.load(
        do_ptr + b * do_b + h * do_h + at[:, None] * do_s + dv[None, :],
        mask=valid[:, None] & (dv < DV)[None, :],
        other=0.0,
    )
    lse = _in_twos(tl.load(lse_ptr + head.to(tl.int64) * Sq + rows, mask=valid, other=float("inf")))
    delta = tl.load(delta_ptr + head.to(tl.int64) * Sq + rows, mask=valid, other=0.0)
    dense_rows = dense_ptr + b * dense_b + h * dense_h + tl.minimum(at, Sq - 1) * dense_m

    seed = 0
    if DROP > 0:
        seed = tl.load(seed_ptr)
    first = _first_key(tl.minimum(rows, Sq - 1), start_ptr, WINDOW, CHUNK, HAS_START)
    inner = 0
    hi = Sk
    outer = Sk // BLOCK_N * BLOCK_N
    if CAUSAL:
        hi = tl.minimum(Sk, m0 + BLOCK_M)
        outer = tl.minimum(Sk, m0 + 1) // BLOCK_N * BLOCK_N
    if HAS_ASKED:  # no gradient comes to these queries: padding behind the last token
        asked = tl.load(asked_ptr + head)
        hi = tl.where(m0 < asked, hi, 0)
        outer = tl.where(m0 < asked, outer, 0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if EDGES:
        lo = tl.maximum(_first_key(m0, start_ptr, WINDOW, CHUNK, HAS_START), 0) // BLOCK_N * BLOCK_N
        last = _first_key(tl.minimum(m0 + BLOCK_M, Sq) - 1, start_ptr, WINDOW, CHUNK, HAS_START)
        inner = tl.cdiv(tl.maximum(last, 0), BLOCK_N) * BLOCK_N
        dq = _dq_tiles(
            dq, q, do, lse, delta, rows, first, lo, tl.minimum(inner, hi),
            k_ptr, v_ptr, keep_ptr, dense_rows, seed, head, scale, Sk,
            k_s, v_s, dense_n, d, dv, D, DV, CAUSAL, SOFTCAP, HAS_PADDING, DENSE, True, DROP, KEPT,
            BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
        )  # fmt: skip
    dq = _dq_tiles(
        dq, q, do, lse, delta, rows, first, inner, outer, k_ptr, v_ptr, keep_ptr, dense_rows, seed, head, scale, Sk,
        k_s, v_s, dense_n, d, dv, D, DV, CAUSAL, SOFTCAP, HAS_PADDING, DENSE, False, DROP, KEPT,
        BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq = _dq_tiles(
        dq, q, do, lse, delta, rows, first, tl.maximum(inner, outer), hi,
        k_ptr, v_ptr, keep_ptr, dense_rows, seed, head, scale, Sk,
        k_s, v_s, dense_n, d, dv, D, DV, CAUSAL, SOFTCAP, HAS_PADDING, DENSE, True, DROP, KEPT,
        BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
    )  # fmt: skip
    dq_at = dq_ptr + b * dq_b + h * dq_h + at[:, None] * dq_s + d[None, :]
    tl.store(dq_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])


@jit
def _dkdv_tiles(
    dk, dv, k, v, cols, past, lo, hi, q_ptr, do_ptr, lse_ptr, delta_ptr, dense_ptr, seed, head, scale, Sq, Sk,
    q_s, do_s, dense_m, d, e, D: tl.constexpr, DV: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, DENSE: tl.constexpr, EDGE: tl.constexpr, ENDS: tl.constexpr,
    DROP: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add queries lo..hi of one head to a tile of keys; scores are kept transposed, [keys, queries]. ``EDGE``: some
    pairs in there are outside the mask; ``ENDS``: and some queries outside the sequence.
    """
    for m in range(lo, hi, BLOCK_M):
        rows = m + tl.arange(0, BLOCK_M)
        inside = rows < Sq
        m64 = tl.cast(m, tl.int64)
        q_at = q_ptr + m64 * q_s + (d[:, None] + tl.arange(0, BLOCK_M)[None, :] * q_s)
        do_at = do_ptr + m64 * do_s + (e[None, :] + tl.arange(0, BLOCK_M)[:, None] * do_s)
        q = _load(q_at, inside[None, :] & (d < D)[:, None], ENDS or BLOCK_D != D)
        do = _load(do_at, inside[:, None] & (e < DV)[None, :], ENDS or BLOCK_DV != DV)
        if ENDS:
            lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
            delta = tl.load(delta_ptr + rows, mask=inside, other=0.0)
        else:
            lse = tl.load(lse_ptr + rows)
            delta = tl.load(delta_ptr + rows)
        s, t = _softcap(tl.dot(k, q, input_precision=PRECISION), scale, SOFTCAP, q.dtype == tl.bfloat16)
        if DENSE:
            s = _dense_mask(
                s,
                tl.load(dense_ptr[:, None] + rows.to(tl.int64)[None, :] * dense_m, mask=inside[None, :], other=0),
                DENSE,
            )
        if EDGE:
            seen = rows[None, :] < past[:, None]
            if CAUSAL:
                seen = seen & (cols[:, None] <= rows[None, :])
            s = tl.where(seen, s, float("-inf"))
        p = _weights(s, _in_twos(lse)[None, :], Sk, DENSE)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if DROP > 0:
            dropped = _kept(p, seed, rows[None, :], cols[:, None], head, DROP)
            dv += tl.dot(dropped.to(do.dtype), do, input_precision=PRECISION)
            dp = _kept(dp, seed, rows[None, :], cols[:, None], head, DROP) * KEPT
        else:
            dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        if SOFTCAP > 0:
            ds *= 1 - t * t
        dk += tl.dot(ds.to(q.dtype), tl.trans(q), input_precision=PRECISION)
    return dk, dv


@jit
def _dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, stop_ptr, end_ptr, keep_ptr, asked_ptr, dense_ptr, seed_ptr,
    dk_ptr, dv_ptr,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    dense_b, dense_h, dense_m, dense_n, Hq, Sq, Sk, tiles, scale,
    D: tl.constexpr, DV: tl.constexpr, GROUP: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, HAS_START: tl.constexpr, HAS_END: tl.constexpr,
    HAS_PADDING: tl.constexpr, HAS_ASKED: tl.constexpr, DENSE: tl.constexpr, SOFTCAP: tl.constexpr,
    DROP: tl.constexpr, KEPT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys: walks over the queries that see them, in every query head of the group."""
    EDGES: tl.constexpr = HAS_START or WINDOW > 0 or CHUNK > 0
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles
    heads = Hq // GROUP
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    n0 = tile * BLOCK_N
    cols = n0 + tl.arange(0, BLOCK_N)
    d, e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    valid = cols < Sk
    at = cols.to(tl.int64)
    k = tl.load(
        k_ptr + b * k_b + h * k_h + at[:, None] * k_s + d[None, :], mask=valid[:, None] & (d < D)[None, :], other=0.0
    )
    v = tl.load(
        v_ptr + b * v_b + h * v_h + at[:, None] * v_s + e[None, :], mask=valid[:, None] & (e < DV)[None, :], other=0.0
    )
    stop_ptr += b * Sk

    seed = 0
    if DROP > 0:
        seed = tl.load(seed_ptr)
    past = _past_query(tl.minimum(cols, Sk - 1), stop_ptr, Sq, WINDOW, CHUNK, HAS_START)
    lo = 0
    inner = 0
    hi = Sq
    whole = Sq // BLOCK_M * BLOCK_M
    outer = whole
    if EDGES:
        hi = tl.minimum(Sq, _past_query(tl.minimum(n0 + BLOCK_N, Sk) - 1, stop_ptr, Sq, WINDOW, CHUNK, HAS_START))
        outer = tl.minimum(Sq, _past_query(n0, stop_ptr, Sq, WINDOW, CHUNK, HAS_START)) // BLOCK_M * BLOCK_M
    if HAS_END:
        end = tl.load(end_ptr + b)
        hi = tl.where(n0 < end, hi, 0)
        outer = tl.where(n0 < end, outer, 0)
    if CAUSAL:
        lo = n0 // BLOCK_M * BLOCK_M
        inner = tl.cdiv(n0 + BLOCK_N - 1, BLOCK_M) * BLOCK_M
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for g in range(GROUP):
        hq = h * GROUP + g
        q_at = q_ptr + b * q_b + hq * q_h
        do_at = do_ptr + b * do_b + hq * do_h
        lse_at = lse_ptr + (b * Hq + hq) * Sq
        delta_at = delta_ptr + (b * Hq + hq) * Sq
        dense_at = dense_ptr + b * dense_b + hq * dense_h + tl.minimum(at, Sk - 1) * dense_n
        past_full, past_last = outer, hi
        if HAS_ASKED:
            past_last = tl.minimum(hi, tl.load(asked_ptr + b * Hq + hq))
            past_full = tl.minimum(outer, past_last // BLOCK_M * BLOCK_M)
        # Queries in three runs, as the forward's keys: the diagonal, those that see the whole tile, the far edge, and
        # with it the sequence's end.
        if CAUSAL:
            dk, dv = _dkdv_tiles(
                dk, dv, k, v, cols, past, lo, tl.minimum(tl.minimum(inner, whole), past_last),
                q_at, do_at, lse_at, delta_at, dense_at, seed, b * Hq + hq, scale, Sq, Sk, q_s, do_s, dense_m, d, e,
                D, DV, CAUSAL, SOFTCAP, DENSE, True, False, DROP, KEPT, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION,
            )  # fmt: skip
        dk, dv = _dkdv_tiles(
            dk, dv, k, v, cols, past, inner, past_full,
            q_at, do_at, lse_at, delta_at, dense_at, seed, b * Hq + hq, scale, Sq, Sk, q_s, do_s, dense_m, d, e,
            D, DV, CAUSAL, SOFTCAP, DENSE, False, False, DROP, KEPT, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION,
        )  # fmt: skip
        dk, dv = _dkdv_tiles(
            dk, dv, k, v, cols, past, tl.maximum(tl.minimum(inner, whole), past_full), past_last,
            q_at, do_at, lse_at, delta_at, dense_at, seed, b * Hq + hq, scale, Sq, Sk, q_s, do_s, dense_m, d, e,
            D, DV, CAUSAL, SOFTCAP, DENSE, True, True, DROP, KEPT, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION,
        )  # fmt: skip
    dk *= scale
    dv *= KEPT
    # A hidden key reached no output: what was summed for it is not its gradient.
    if HAS_END:
        dk = tl.where((cols < end)[:, None], dk, 0.0)
        dv = tl.where((cols < end)[:, None], dv, 0.0)
    if HAS_PADDING:
        keep = (tl.load(keep_ptr + b * Sk + cols, mask=valid, other=0) != 0)[:, None]
        dk = tl.where(keep, dk, 0.0)
        dv = tl.where(keep, dv, 0.0)
    dk_at = dk_ptr + b * dk_b + h * dk_h + at[:, None] * dk_s + d[None, :]
    tl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=valid[:, None] & (d < D)[None, :])
    dv_at = dv_ptr + b * dv_b + h * dv_h + at[:, None] * dv_s + e[None, :]
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=valid[:, None] & (e < DV)[None, :])
