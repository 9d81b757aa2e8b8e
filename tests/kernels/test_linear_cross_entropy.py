"""linear_log_prob and linear_cross_entropy: values and gradients against fp64, what is never allocated, odd labels,
TRL's own function.
"""

from __future__ import annotations

import collections
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastft
from bench.shapes import shapes
from fastft import _torch_compat as compat
from fastft.compare import assert_within
from fastft.judging import Wide
from fastft.kernels import _linear_cross_entropy_call as calls
from fastft.kernels import _linear_cross_entropy_chunks as chunks
from fastft.kernels import _linear_cross_entropy_fused as fused
from fastft.kernels import _op
from fastft.kernels import linear_cross_entropy as module
from fastft.kernels._linear_cross_entropy_call import WAYS as NAMES
from fastft.kernels._linear_cross_entropy_call import Scored
from fastft.kernels._linear_cross_entropy_chunks import chunk_rows
from fastft.kernels._op import INTERPRET
from fastft.kernels._triton import HAS_TRITON
from fastft.kernels.linear_cross_entropy import (
    LogProb,
    filtered_cross_entropy,
    filtered_log_prob,
    filtered_supported,
    fused_cross_entropy,
    fused_log_prob,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_log_prob,
    linear_log_prob_reference,
    supported,
)
from tests.kernels._check import strided
from tests.kernels._derivations import BOTH, Array, Derivation
from tests.kernels._expressions import EXP, LOG, TANH, ratio
from tests.kernels._fuzz import SIZES, WIDTHS, Draw, flags
from tests.kernels._samples import Named, New, Sample
from tests.mutation._mutant import Mutant

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALL = dict(entropy=True, is_top1=True, mean_logits=True, log_sum_sq_probs=True)
ADDED = [dict(label_smoothing=0.1), dict(z_loss=1e-2), dict(label_smoothing=0.3, z_loss=1e-3)]
SMOOTH = dict(mean_logits=True, mean_logits_gradient=True, lse_gradient=True)


class Way(NamedTuple):
    """The op and its variants."""

    name: str
    log_prob: Callable[..., Any]
    cross_entropy: Callable[..., Any]


WAYS = {
    "chunks": Way("chunks", linear_log_prob, linear_cross_entropy),
    "fused": Way("fused", fused_log_prob, fused_cross_entropy),
    "filtered": Way("filtered", filtered_log_prob, filtered_cross_entropy),
}


@pytest.fixture(params=["chunks", "fused"])
def way(request):
    return WAYS[request.param]


REAL_TILES = fused._tiles


def small_tiles(kernel, device, dtype, own, other):
    """Several tiles, and parts, at the sizes of these tests."""
    parts = {"forward": 4, "hidden": 2, "weight": 1}[kernel]
    tiles = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "PARTS": parts, "num_warps": 4}
    return tiles if kernel == "forward" else {**tiles, "BLOCK_H": 16}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, the last one shorter: 4 rows of 131 fp32 logits, under a trained head too."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * 131 * 4)
    monkeypatch.setattr(chunks, "TRAINED_SHARE", 0.0)
    monkeypatch.setattr(fused, "_tiles", small_tiles)
    monkeypatch.setattr(fused, "GROUP", 2)


@pytest.fixture(autouse=True)
def unforeseen(monkeypatch):
    """No test begins with what others before it have found."""
    monkeypatch.setattr(Scored, "streak", 0)


def inputs(dtype, device, tokens=13, hidden=24, vocab=131, bias=True, frozen=False):
    h = torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_()
    w = (torch.randn(vocab, hidden, device=device) / 3).to(dtype).requires_grad_(not frozen)
    b = torch.randn(vocab, device=device).to(dtype).requires_grad_(not frozen) if bias else None
    y = torch.randint(0, vocab, (tokens,), device=device)
    y[::4] = -100
    return h, w, b, y


def run(fn, tensors, labels, cotangents, **options):
    """Differentiable outputs and the gradient of every tensor that requires one."""
    leaves = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
    out = fn(*leaves, labels, **options)
    outs = [o for o in (out if isinstance(out, LogProb) else [out]) if o.requires_grad]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    grads = torch.autograd.grad(outs, wanted, [g.to(o.dtype) for g, o in zip(cotangents, outs, strict=False)])
    return out, list(grads)


def doubled(tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def check(fn, reference, tensors, labels, cotangents, **options):
    ours, grads = run(fn, tensors, labels, cotangents, **options)
    same, same_grads = run(reference, tensors, labels, cotangents, **options)
    exact, exact_grads = run(reference, doubled(tensors), labels, cotangents, **options)
    if not isinstance(ours, LogProb):
        ours, same, exact = [[o] for o in (ours, same, exact)]
    length = max(tensors[1].shape) * 4
    for i, (a, s, e) in enumerate(zip(ours, same, exact, strict=True)):
        assert (a.dtype, a.shape) == (s.dtype, s.shape)
        if a.dtype == torch.bool:
            assert torch.equal(a, s)
        elif a.numel():
            assert_within(f"output {i}", a, s, e, length=length)
    for name, a, s, e in zip("hwb", grads, same_grads, exact_grads, strict=False):
        assert a.dtype == s.dtype
        assert_within(f"d{name}", a, s, e, length=length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("maths", [{}, dict(softcap=3.0, logit_scale=0.7, temperature=1.3)], ids=["plain", "softcap"])
def test_log_prob(dtype, frozen, maths, device, way):
    h, w, b, y = inputs(dtype, device, frozen=frozen)
    cotangents = [torch.randn(len(y), device=device) for _ in range(2)]
    check(way.log_prob, linear_log_prob_reference, (h, w, b), y, cotangents, **maths, **ALL)
    y[::4] = 0  # no token is left out
    y[2] = -100
    check(way.log_prob, linear_log_prob_reference, (h, w, None), y, cotangents, **maths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("maths", [{}, dict(softcap=3.0, logit_scale=0.7, temperature=1.3)], ids=["plain", "softcap"])
def test_gradients_of_lse_and_mean_logits(dtype, frozen, maths, device, way):
    """Each alone, and all together, with labels that are left out, with none that is ignored, and with one that is."""
    h, w, b, y = inputs(dtype, device, tokens=17, frozen=frozen)
    for labels, ignore_index in (
        (y, -100),
        (y.clamp(min=0), -100),
        (y.clamp(min=0).index_fill(0, y[:1] * 0 + 2, 7), 7),
    ):
        one, none = torch.randn(len(y), device=device), torch.zeros(len(y), device=device)
        for cotangents, more in (
            ([none, one], dict(lse_gradient=True)),
            ([none, one], dict(mean_logits=True, mean_logits_gradient=True)),
            ([one, one * 2, -one, one / 3], dict(entropy=True, **SMOOTH)),
        ):
            options = dict(ignore_index=ignore_index, **maths, **more)
            check(way.log_prob, linear_log_prob_reference, (h, w, b), labels, cotangents, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", ADDED)
def test_label_smoothing_and_z_loss(options, reduction, frozen, dtype, device, way):
    h, w, b, y = inputs(dtype, device, frozen=frozen)
    cotangent = torch.randn(len(y) if reduction == "none" else (), device=device)
    for softcap in (None, 3.0):
        more = dict(reduction=reduction, softcap=softcap, **options)
        check(way.cross_entropy, linear_cross_entropy_reference, (h, w, b), y, [cotangent], **more)


@pytest.mark.parametrize("options", ADDED)
def test_a_frozen_head_is_one_pass_with_smoothing_and_z_loss(options, device, monkeypatch):
    h, w, b, y = inputs(torch.float32, device, frozen=True)
    loss = linear_cross_entropy(h, w, b, y, softcap=3.0, **options)
    monkeypatch.setattr(chunks, "_Head", None)  # a backward that computed logits again would fail here
    assert torch.autograd.grad(loss, h)[0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 1.0], ids=["chunks", "two chunks"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("trained", ["hwb", "wb", "hb", "w"])
def test_a_trained_head_is_one_pass_under_a_sum(trained, reduction, share, dtype, device, monkeypatch):
    """No logits in the backward, whoever has a gradient; and the same one as from all logits."""
    monkeypatch.setattr(chunks, "TRAINED_SHARE", share)
    monkeypatch.setattr(module, "_backward_op", None)
    tensors = [t.detach().requires_grad_(n in trained) for n, t in zip("hwb", inputs(dtype, device), strict=False)]
    y = inputs(dtype, device)[3]
    scale = [torch.tensor(3.0, device=device)]
    for labels in (y, y.abs()):  # with tokens that are left out, and without
        for options in ({}, dict(label_smoothing=0.1, z_loss=1e-2, softcap=3.0)):
            options |= {"reduction": reduction}
            check(
                linear_cross_entropy, linear_cross_entropy_reference, tensors, labels.clamp(max=130), scale, **options
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_large_chunk_is_multiplied_in_pieces(bias, reduction, dtype, device, monkeypatch):
    """Of two chunks of 20 tokens a product with the weight takes 5 at a time; the result is that of all at once."""
    monkeypatch.setattr(chunks, "TRAINED_SHARE", 100.0)
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 5)
    h, w, b, y = inputs(dtype, device, tokens=40, bias=bias)
    g = [torch.randn(40 if reduction == "none" else (), device=device)]
    check(linear_cross_entropy, linear_cross_entropy_reference, (h, w, b), y.clamp(min=0), g, reduction=reduction)
    with Largest() as seen:
        linear_cross_entropy(h, w, b, y.clamp(min=0), reduction=reduction).sum().backward()
    rows = [left[0] for left, right in seen.products if w.shape in (right, right[::-1])]
    # Without a gradient of the weight, which "none" leaves to the backward, chunks are of 4.
    assert rows == [4] * (10 if reduction == "none" else 0) + [5] * 16


def test_pieces(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_TOKENS", 2048)
    some = {1: [1], 2048: [2048], 4096: [2048, 2048], 2049: [1152, 897], 5000: [1792, 1792, 1416]}
    for rows, sizes in some.items():
        assert [piece.stop - piece.start for piece in chunks.pieces(rows)] == sizes
        assert [piece.start for piece in chunks.pieces(rows)] == [sum(sizes[:i]) for i in range(len(sizes))]


@pytest.mark.parametrize("share", [0.0, 100.0], ids=["chunks", "two chunks"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_logits_never_exist(reduction, share, device, monkeypatch):
    """Under a trained head as under a frozen one: not in forward, not in backward, and nothing of their size is kept,
    though half of them may be there at a time.
    """
    monkeypatch.setattr(chunks, "TRAINED_SHARE", share)
    h, w, b, y = inputs(torch.float32, device, tokens=40)
    kept, most, y = [], 20 if share else 4, y.clamp(min=0)
    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear_cross_entropy(h, w, b, y, reduction=reduction).sum().backward()
    rows = {shape[0] for shape in seen.shapes if shape[1:] == w.shape[:1]} - {24}  # the weight, turned
    assert max(rows) == most and not any(x.shape[1:] == w.shape[:1] for x in kept)


@pytest.mark.parametrize("tokens, sums", [(8, 0), (9, 0), (80, 0), (150, 0), (300, 2)])
def test_two_chunks_need_no_wide_sum(tokens, sums, device, monkeypatch):
    """What is as large as the weight is its gradient alone, in bf16, unless there are more chunks (of at most 128
    tokens: power of two of 5 times 24 fp32 numbers).
    """
    monkeypatch.setattr(chunks, "TRAINED_SHARE", 5.0)
    added, add = [], chunks._add_matmul
    monkeypatch.setattr(chunks, "_add_matmul", lambda total, *args: added.append(total) or add(total, *args))
    h, w, _, y = inputs(torch.bfloat16, device, tokens=tokens, bias=False)
    linear_cross_entropy(h, w, None, y.clamp(min=0))
    assert len(added) == sums + bool(sums)


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_that_a_constant_is_sent(create_graph, device, monkeypatch):
    """Of zeros, by Dynamo, to outputs that have none: a frozen head's unit gradient is all that there is."""
    monkeypatch.setattr(module, "_backward_op", None)
    h, w, _, y = inputs(torch.float32, device, tokens=40, bias=False, frozen=True)
    g = torch.randn(40, device=device, requires_grad=create_graph)
    found = linear_log_prob(h, w, None, y, entropy_gradient=False, **ALL)
    node, zeros = found.log_prob.grad_fn, torch.zeros(40, device=device)
    with torch.set_grad_enabled(create_graph):
        ours = node.apply(g, zeros, None, zeros, None, zeros)[0]
    exact, stock = (
        torch.autograd.grad(linear_log_prob_reference(*leaves, None, y).log_prob, leaves[0], g.detach())[0]
        for leaves in (doubled((h, w)), (h, w))
    )
    assert_within("dh", ours.detach(), stock, exact, length=131 * 4)
    if create_graph:
        dot = torch.autograd.grad(ours.square().sum(), g)[0] @ g
        torch.testing.assert_close(dot, 2 * ours.square().sum())


@pytest.mark.parametrize("tokens, sum_", [(1100, 1100), (2300, 1148)], ids=["one chunk", "two chunks"])
def test_sums_of_odd_sizes_have_all_their_terms(tokens, sum_, device, monkeypatch):
    """Every product over an odd vocabulary, or an odd number of tokens, is one that cuBLAS does not cut."""
    monkeypatch.setattr(chunks, "TRAINED_SHARE", 100.0)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2**30)
    sums, mm_single = [], chunks.products.mm_single
    monkeypatch.setattr(chunks.products, "mm_single", lambda a, b: sums.append(a.shape[1]) or mm_single(a, b))
    vocab = 1089
    h, w, _, y = inputs(torch.bfloat16, device, tokens=tokens, vocab=vocab, bias=False)
    y = y.clamp(min=0)
    cotangents = [torch.ones((), device=device)]
    check(linear_cross_entropy, linear_cross_entropy_reference, (h, w, None), y, cotangents)
    assert {sum_, vocab} <= {*sums}


def test_unit_gradients_of_a_head_do_not_overflow(device):
    """In fp16 a sum over tokens may be more than 65504, where the mean over them is not."""
    h = torch.full((1024, 4), 100.0, device=device, dtype=torch.float16)
    w = torch.zeros(33, 4, device=device, dtype=torch.float16, requires_grad=True)
    y = torch.zeros(1024, dtype=torch.int64, device=device)
    (found,) = torch.autograd.grad(linear_cross_entropy(h, w, None, y), w)
    assert found.dtype == torch.float16 and found.isfinite().all()
    (exact,) = torch.autograd.grad(linear_cross_entropy_reference(h, w, None, y), w)
    assert_within("dw", found, exact, exact.double())


def test_lse_and_mean_logits_are_constants_unless_asked_for(device):
    h, w, b, y = inputs(torch.float32, device)
    found = linear_log_prob(h, w, b, y, mean_logits=True)
    assert not found.lse.requires_grad and not found.mean_logits.requires_grad
    found = linear_log_prob(h, w, b, y, **SMOOTH)
    assert found.lse.requires_grad and found.mean_logits.requires_grad


@pytest.mark.parametrize("frozen", [True, False])
def test_log_prob_of_tokens_the_model_is_sure_of(frozen, device, way):
    """A loss of 0.002 from logits near 1000, whose neighbours in fp32 are 6e-5 apart: z - lse has few digits left."""
    h, w, b, y = inputs(torch.float32, device, frozen=frozen)
    y = y.clamp(min=0)
    with torch.no_grad():
        b += 1000
        h[:, 0], w[:, 0] = 4, 0
        y[:], w[7, 0] = 7, 3
    one, none = torch.ones(len(y), device=device), torch.zeros(len(y), device=device)
    for cotangents in ([one, none], [none, one]):
        check(way.log_prob, linear_log_prob_reference, (h, w, b), y, cotangents, **ALL)


@pytest.mark.parametrize("ignore_index", [-100, 130])
def test_ignored_tokens_are_left_out_of_every_gemm(ignore_index, device, monkeypatch, way):
    """Rows that enter the products are the tokens that count, in forward and in backward."""
    h, w, b, y = inputs(torch.float32, device)
    y = torch.where(y == -100, ignore_index, y.clamp(max=129))
    rows = []

    def counted(name, of, count):
        call = getattr(of, name)
        monkeypatch.setattr(of, name, lambda *args, **kwargs: rows.append(count(*args)) or call(*args, **kwargs))

    counted("logits", chunks._Head, lambda head, chunk: len(chunk.logits))
    counted("forward", fused, lambda hidden, *_: hidden.shape[0])
    counted("backward", fused, lambda hidden, *_: hidden.shape[0])
    way.log_prob(h, w, b, y, ignore_index=ignore_index, entropy=True).entropy.sum().backward()
    assert sum(rows) == 2 * int((y != ignore_index).sum())
    rows.clear()
    y = torch.full_like(y, ignore_index)
    way.cross_entropy(h, w, b, y, ignore_index=ignore_index, reduction="sum").backward()
    assert sum(rows) == 0


def test_the_gradient_of_an_fp32_weight_is_summed_in_fp32(device, monkeypatch):
    """Under autocast, chunk after chunk: no chunk's part of it is rounded to bf16."""
    h, w, _, y = inputs(torch.float32, device, tokens=64, bias=False)

    def gradient():
        loss = linear_cross_entropy(h, w, None, y, reduction="sum", dtype=torch.bfloat16)
        return torch.autograd.grad(loss, w)[0]

    in_many = gradient()
    for changed in ({"CHUNK_BYTES": 1 << 20}, {"TRAINED_SHARE": 99.0}):
        with monkeypatch.context() as patched:
            for name, value in changed.items():
                patched.setattr(chunks, name, value)
            in_one = gradient()
        assert in_one.dtype == torch.float32 and (in_many - in_one).norm() <= 1e-5 * in_one.norm()


def test_gradients_are_not_biased(device, way):
    """Over 300 steps of chunks in bf16: what rounding adds to a gradient averages out, and does not grow with steps."""
    steps, signed = 40 if INTERPRET else 300, []
    for _ in range(steps):
        h, w, _, y = inputs(torch.bfloat16, device, tokens=24, hidden=16, vocab=64, bias=False)
        wide = [t.detach().float().requires_grad_() for t in (h, w)]
        # Of tokens that count differently: one coefficient for all would be rounded to the same side at every step.
        g = torch.rand(len(y), device=device) + 0.5
        ours = torch.autograd.grad(way.cross_entropy(*wide, None, y, reduction="none", dtype=torch.bfloat16), wide, g)
        # Of the same rounded logits (what rounding them does to exp is biased in every implementation), in fp64.
        logits = F.linear(h, w).double().detach().requires_grad_()
        (dr,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="none"), [logits], g.double())
        exact = [dr @ w.detach().double(), dr.t() @ h.detach().double()]
        pairs = zip(ours, exact, strict=True)
        signed.append([float(((a - e) * e).sum() / e.square().sum()) for a, e in pairs])
    found = torch.tensor(signed)
    noise = found.std(0) / steps**0.5
    assert (found.mean(0).abs() <= 4 * noise + 1e-6).all(), (found.mean(0), noise)
    assert (found.std(0) < 1e-3).all(), "after 300 steps a bias of a fiftieth of bf16's rounding would show"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen, most, count", [(True, 16, 2), (False, 16, 2), (False, 8, 3)], ids=str)
def test_gradients_under_a_mean_are_not_biased(frozen, most, count, dtype, device, monkeypatch):
    """As above, of what comes out of the forward: unit gradients, whose label's part is 1 - p and no multiple. They are
    scaled by 1/24, which bf16 does not have. Under a trained head three chunks are summed up in fp32, and two of bf16
    in bf16.
    """
    monkeypatch.setattr(chunks, "CHUNK_BYTES", most * 64 * 2)
    assert -(-24 // chunks.chunk_rows(24, 64, 2, 16, trained=not frozen)) == count
    steps, signed = 40 if INTERPRET else 300, []
    for _ in range(steps):
        h, w, _, y = inputs(torch.bfloat16, device, tokens=24, hidden=16, vocab=64, bias=False)
        wide = [t.detach().to(dtype).requires_grad_(grad) for t, grad in ((h, True), (w, not frozen))]
        loss = linear_cross_entropy(*wide, None, y, dtype=torch.bfloat16)
        ours = torch.autograd.grad(loss, wide[: 2 - frozen])
        logits = F.linear(h, w).double().detach().requires_grad_()
        (dr,) = torch.autograd.grad(F.cross_entropy(logits, y), logits)
        exact = [dr @ w.detach().double(), dr.t() @ h.detach().double()]
        signed.append([float(((a - e) * e).sum() / e.square().sum()) for a, e in zip(ours, exact, strict=False)])
    found = torch.tensor(signed)
    noise = found.std(0) / steps**0.5
    # Rounded to bf16 twice, with one factor between: a sixteenth of a rounding need not average out.
    assert (found.mean(0).abs() <= 4 * noise + (1e-6 if dtype == torch.float32 else 2**-13)).all(), (
        found.mean(0),
        noise,
    )
    assert (found.std(0) < 1e-3).all()


@pytest.mark.parametrize("shape", shapes("linear_cross_entropy", tag="test"), ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(shape, reduction, device, way):
    h = torch.randn(shape["batch"], shape["seq"], shape["hidden"], device=device, requires_grad=True)
    w = torch.randn(shape["vocab"], shape["hidden"], device=device, requires_grad=shape["batch"] > 1)
    y = torch.randint(0, shape["vocab"], h.shape[:2], device=device)
    y[:, 0] = -100
    scalar = torch.tensor(0.3, device=device)
    cotangent = strided(torch.randn(y.shape, device=device)) if reduction == "none" else scalar
    options = dict(softcap=shape["softcap"], reduction=reduction)
    check(way.cross_entropy, linear_cross_entropy_reference, (h, w, None), y, [cotangent], **options)


@pytest.mark.parametrize("frozen", [True, False])
def test_like_stock_cross_entropy_when_every_label_is_ignored(frozen, device, way):
    h, w, b, y = inputs(torch.float32, device, frozen=frozen)
    y = torch.full_like(y, -100)
    wanted = [t for t in (h, w, b) if t.requires_grad]
    for reduction in ("mean", "sum"):
        loss = way.cross_entropy(h, w, b, y, reduction=reduction)
        stock = F.cross_entropy(F.linear(h, w, b), y, reduction=reduction)
        assert torch.equal(loss.isnan(), stock.isnan()) and (reduction == "mean" or loss == 0)
        # A trainer divides a sum by the number of labels itself.
        for grad in torch.autograd.grad(loss, wanted, torch.full_like(loss, 1.0 if reduction == "mean" else torch.inf)):
            assert not grad.any()


@pytest.mark.parametrize("left_out", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_ignored_tokens_poison_nothing(frozen, left_out, device, monkeypatch, way):
    if not left_out:
        monkeypatch.setattr(Scored, "positions", lambda self: None)
    h, w, b, y = inputs(torch.float32, device, frozen=frozen)
    bad = h.detach().clone()
    bad[y == -100] = float("nan")
    bad.requires_grad_()
    wanted = [t for t in (w, b) if t.requires_grad]
    clean, poisoned = (
        [(loss := way.cross_entropy(x, w, b, y)), *torch.autograd.grad(loss, [x, *wanted])] for x in (h, bad)
    )
    for a, e in zip(poisoned, clean, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("ignored", [1, 20])
def test_an_ignored_tokens_gradient_may_be_anything(ignored, frozen, device, way):
    """Left out of the products, or not."""
    h, w, b, y = inputs(torch.float32, device, tokens=40, frozen=frozen)
    y = y.clamp(min=0)
    y[torch.randperm(40, device=device)[:ignored]] = -100
    wanted = [t for t in (h, w, b) if t.requires_grad]
    g = torch.randn(40, device=device)
    odd = torch.where(y == -100, torch.tensor([torch.inf, torch.nan], device=device).repeat(20), g)
    found = way.log_prob(h, w, b, y).log_prob
    expected = torch.autograd.grad(found, wanted, g, retain_graph=True)
    for a, e in zip(torch.autograd.grad(found, wanted, strided(odd)), expected, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("share", [0.0, 100.0], ids=["chunks", "two chunks"])
@pytest.mark.parametrize("ignored", [1, 0])
def test_states_are_copied_where_a_label_is_ignored(ignored, share, device, monkeypatch):
    """Of a trained head, and few are: too few to leave them out of the products."""
    monkeypatch.setattr(chunks, "TRAINED_SHARE", share)
    h, w, b, y = inputs(torch.float32, device, tokens=40)
    y = y.clamp(min=0)
    y[:ignored] = -100
    clean = torch.autograd.grad(linear_cross_entropy(h, w, b, y), [w, b])
    bad = h.detach().clone()
    bad[:ignored] = float("nan")
    with Largest() as seen:
        found = torch.autograd.grad(linear_cross_entropy(bad, w, b, y), [w, b])
    assert all(torch.equal(f, c) for f, c in zip(found, clean, strict=True))
    assert any(shape[-1:] == h.shape[-1:] for shape in seen.filled) == bool(ignored)


@pytest.mark.parametrize("share", [0.0, 100.0], ids=["chunks", "two chunks"])
def test_no_tokens(share, device, way, monkeypatch):
    monkeypatch.setattr(chunks, "TRAINED_SHARE", share)
    h, w, b, y = inputs(torch.float32, device, tokens=0)
    assert way.cross_entropy(h, w, b, y).isnan()
    grads = torch.autograd.grad(way.cross_entropy(h, w, b, y, reduction="sum"), [h, w, b])
    assert [g.shape for g in grads] == [h.shape, w.shape, b.shape] and not any(g.any() for g in grads)
    grads = torch.autograd.grad(way.log_prob(h, w, None, y).log_prob.sum(), [h, w])
    assert [g.shape for g in grads] == [h.shape, w.shape] and not any(g.any() for g in grads)
    found = way.log_prob(h.detach(), w.detach(), None, y, **ALL)
    assert all(x.shape == (0,) for x in found)


@pytest.mark.parametrize("dtypes", list(itertools.product((torch.bfloat16, torch.float32), repeat=2)), ids=str)
@pytest.mark.parametrize(
    "shape, rows", [((5, 9001), 5), ((5, 9001), 1), ((4097,), 1), ((0, 7), 1), ((3, 0), 3)], ids=str
)
def test_scaled_units(shape, rows, dtypes, device):
    """One rounding, of the product with an fp32 number, which may be 1."""
    unit, g = torch.randn(shape, device=device).to(dtypes[0]), torch.rand(rows, device=device)
    g[1:2] = 1
    with torch.no_grad():
        found = module._scaled(unit, g if rows > 1 else g[0], dtypes[1])
    assert torch.equal(found, (unit.float() * g.view(-1, *[1] * (len(shape) - 1))).to(dtypes[1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape, rows", [((5, 9001), 5), ((5, 9001), 1), ((4097,), 1), ((70000,), 1)], ids=str)
def test_units_are_scaled_in_their_place(shape, rows, dtype, device, monkeypatch):
    """Where the graph is not kept; what is to be multiplied by 1 is left as it is, bit by bit."""
    monkeypatch.setattr(compat, "graph_is_retained", lambda: False)
    monkeypatch.setattr(module, "PROGRAMS", 3)
    unit, g = torch.randn(shape, device=device).to(dtype), torch.rand(rows, device=device)
    g[0] = 1 if rows > 1 else g[0]
    wanted = (unit.float() * g.view(-1, *[1] * (len(shape) - 1))).to(dtype)
    with torch.no_grad():
        found = module._scaled(unit, g, dtype)
        assert torch.equal(found, wanted)
        assert (found.data_ptr() == unit.data_ptr()) == module.use_triton(unit)
        if module.use_triton(unit):  # a NaN's other bits would not outlive a product
            kind, bits = (torch.int16, 0x7FA5) if dtype == torch.bfloat16 else (torch.int32, 0x7FA00005)
            odd = torch.full(shape, bits, device=device, dtype=kind)
            module._scaled(odd.view(dtype), torch.ones(rows, device=device), dtype)
            assert bool((odd == bits).all())


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batched_gradients(reduction, frozen, device):
    h, w, _, y = inputs(torch.float32, device, bias=False, frozen=frozen)
    wanted, gs = [h] if frozen else [h, w], torch.tensor([1.0, 0.3], device=device)
    loss = lambda: linear_cross_entropy(h, w, None, y, reduction=reduction)  # noqa: E731
    found = torch.autograd.grad(loss(), wanted, gs, is_grads_batched=True)
    for i, g in enumerate(gs):
        for a, e in zip(found, torch.autograd.grad(loss(), wanted, g), strict=True):
            torch.testing.assert_close(a[i], e)


def test_what_cannot_be_scaled_in_its_place(device, monkeypatch):
    """Under the backend PyTorch does it, from then on, and what the report reads says so; an op by itself raises."""
    monkeypatch.setattr(compat, "graph_is_retained", lambda: False)
    monkeypatch.setattr(module, "_in_triton", lambda *_: True)
    failed, tried = {}, []
    monkeypatch.setattr(_op, "FAILED", failed)

    class Fails:
        def __getitem__(self, grid):
            def launch(*_, **__):
                tried.append(grid)
                raise OSError("no C compiler")

            return launch

    monkeypatch.setattr(module, "_scale_kernel", Fails())
    unit, g = torch.randn(5, 7, device=device), torch.rand(1, device=device)
    with torch.no_grad():
        monkeypatch.setattr(_op, "_RESCUE", False)
        with pytest.raises(OSError, match="no C compiler"):
            module._scaled(unit, g, torch.float32)
        assert not failed
        monkeypatch.setattr(_op, "_RESCUE", True)
        monkeypatch.setattr(module, "_scale_op", lambda unit, g, dtype: module._times(unit, g, dtype))
        for _ in range(2):
            assert torch.equal(module._scaled(unit, g, torch.float32), unit * g)
    assert "no C compiler" in failed["linear_log_prob_scale"] and len(tried) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("share", [0.0, 100.0], ids=["chunks", "two chunks"])
def test_a_graph_that_is_kept_gives_the_same_gradients_again(share, reduction, dtype, device, monkeypatch):
    """Whether they are scaled or not; the last time in the place of what was kept."""
    monkeypatch.setattr(chunks, "TRAINED_SHARE", share)
    for g in (1.0, 0.3):
        h, w, b, y = inputs(dtype, device, tokens=40)
        loss = linear_cross_entropy(h, w, b, y, reduction=reduction)
        g = torch.tensor(g, device=device)
        kept = loss.grad_fn.saved_tensors
        first = torch.autograd.grad(loss, [h, w, b], g, retain_graph=True)
        assert not {x.data_ptr() for x in first} & {x.data_ptr() for x in kept}
        copies = [x.clone() for x in first]
        again = torch.autograd.grad(loss, [h, w, b], g)
        assert all(map(torch.equal, first, copies)) and all(map(torch.equal, again, copies))
        if module.use_triton(h):
            assert again[0].data_ptr() in {x.data_ptr() for x in kept}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("ignored", [0, 1, 13, 40])
@pytest.mark.parametrize("share", [0.0, 100.0], ids=["chunks", "two chunks"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mean_is_in_what_the_forward_keeps(dtype, share, ignored, recorded, device, monkeypatch):
    """Where the number of labels is known and 1 / n is no danger; else it is left to the backward."""
    monkeypatch.setattr(chunks, "TRAINED_SHARE", share)
    h, w, b, y = inputs(dtype, device, tokens=40)
    y = y.clamp(min=0)
    y[:ignored] = -100
    n = max(40 - ignored, 1)
    maths = (-100, None, 1.0, 1.0, 0.0, 0.0, dtype, "chunks")
    wanted = [False] * 4 + [True] * 3
    with monkeypatch.context() as patched:
        patched.setattr(calls, "capturing", lambda x: recorded)
        with torch.no_grad():
            *_, dh, dw, db, left = torch.ops.fastft.linear_log_prob(h, w, b, y, *maths, *wanted, True)
            *_, h1, w1, b1, nothing = torch.ops.fastft.linear_log_prob(h, w, b, y, *maths, *wanted)
    later = recorded or dtype == torch.float16
    assert nothing.shape == (0,) and left.tolist() == pytest.approx([-1 / n if later else 1.0])
    for found, unit in zip((dh, dw, db), (h1, w1, b1), strict=True):
        assert found.dtype == unit.dtype
        bound = 2e-2 if found.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(found.float() * left, unit.float() / -n, rtol=bound, atol=bound * 1e-2)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_gradient_of_the_scale(frozen, device, monkeypatch):
    h, w, _, y = inputs(torch.float32, device, frozen=frozen)
    g = torch.tensor(0.5, device=device, requires_grad=True)
    loss = linear_cross_entropy(h, w, None, y, reduction="sum")
    (dh,) = torch.autograd.grad(loss, h, g, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(dh.square().sum(), g)[0] * 0.25, dh.detach().square().sum())
    for share in () if frozen else (0.0, 100.0):  # many chunks, and two
        monkeypatch.setattr(chunks, "TRAINED_SHARE", share)
        loss = linear_cross_entropy(h, w, None, y, reduction="sum")
        (dw,) = torch.autograd.grad(loss, w, g, create_graph=True)
        torch.testing.assert_close(torch.autograd.grad(dw.square().sum(), g)[0] * 0.25, dw.detach().square().sum())


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("ignored", [0, 1, 13, 40])
def test_the_backward_of_a_trained_head_waits_for_nobody(ignored, recorded, device, monkeypatch):
    """The forward has counted the labels, and the same ones are left out: none where a CUDA graph was recorded."""
    monkeypatch.setattr(chunks, "TRAINED_SHARE", 100.0)
    h, w, _, y = inputs(torch.float32, device, tokens=40, bias=False)
    y = y.clamp(min=0)
    y[:ignored] = -100
    exact, stock = (
        torch.autograd.grad(linear_cross_entropy_reference(*leaves, None, y, reduction="sum"), leaves)
        for leaves in (doubled((h, w)), (h, w))
    )
    with torch.no_grad():
        h[:ignored] = float("nan")
    with monkeypatch.context() as patched:
        patched.setattr(calls, "capturing", lambda x: recorded)
        loss = linear_cross_entropy(h, w, None, y, reduction="sum")
    monkeypatch.setattr(module, "Scored", None)
    for name, a, s, e in zip("hw", torch.autograd.grad(loss, [h, w]), stock, exact, strict=True):
        assert_within(f"d{name}", a, s, e, length=131 * 4)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("share", [0.0, 100.0], ids=["chunks", "two chunks"])
def test_a_product_is_what_follows_the_wait(share, bias, device, monkeypatch):
    """Not even a view is made between them, while the GPU would have nothing to do."""
    monkeypatch.setattr(chunks, "TRAINED_SHARE", share)
    h, w, b, y = (None if t is None else t.detach() for t in inputs(torch.float32, device, bias=bias))
    called, real = [], Scored.positions
    monkeypatch.setattr(Scored, "positions", lambda self: (real(self), called.clear())[0])

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func._opname)
            return func(*args, **(kwargs or {}))

    maths = (-100, None, 1.0, 1.0, 0.0, 0.0, torch.float32, "chunks")
    with Noting():
        module._forward(h, w, b, y.clamp(min=0), *maths, *[False] * 4, True, True, False)
    assert called[0] == ("addmm" if bias else "mm")


class Answered:
    """An event of a device that may have none."""

    def synchronize(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@pytest.mark.parametrize("share", [0.0, 100.0], ids=["chunks", "two chunks"])
def test_a_product_begins_before_the_wait(share, device, monkeypatch):
    """From the third call in a row on that leaves nothing out; and where that is wrong, nothing comes of it."""
    monkeypatch.setattr(chunks, "TRAINED_SHARE", share)
    monkeypatch.setattr(Scored, "event", property(lambda self: Answered(), lambda self, value: None), raising=False)
    monkeypatch.setattr(Scored, "streak", 0)
    made, real = [], chunks._Head.logits
    monkeypatch.setattr(chunks._Head, "logits", lambda self, chunk: made.append(len(chunk.states)) or real(self, chunk))
    h, w, b, y = inputs(torch.float32, device, bias=not share)
    few, most = y.clamp(min=0), y.clone()
    most[: len(y) // 2] = -100
    begun = []
    waits = Scored.positions
    monkeypatch.setattr(Scored, "positions", lambda self: (begun.append(len(made)), waits(self))[1])
    for turn, labels in enumerate((few, few, few, most, few)):
        made.clear()
        own = [t for t in (h, w, b) if t is not None]
        same, exact = (
            torch.autograd.grad(linear_cross_entropy_reference(*leaves, labels), [t for t in leaves if t is not None])
            for leaves in ((h, w, b), doubled((h, w, b)))
        )
        found = torch.autograd.grad(linear_cross_entropy(h, w, b, labels), own)
        assert (begun[turn] > 0) == (turn in (2, 3)), turn
        assert sum(made) == (len(y) if turn != 3 else made[0] + int((most != -100).sum()))
        for name, a, s, e in zip("hwb", found, same, exact, strict=False):
            assert_within(f"d{name} of turn {turn}", a, s, e, length=131 * 4)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives, the shapes of what ``masked_fill`` gives, how many new
    tensors of a shape there are, the shapes that products multiply, and our ops that were called."""

    def __init__(self):
        super().__init__()
        self.numel, self.filled, self.shapes, self.products, self.ops = 0, set(), collections.Counter(), [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        bodies = {
            "linear_log_prob": module._forward,
            "linear_log_prob_backward": module._backward,
            "linear_log_prob_scale": module._scale,
        }
        if func.namespace == "fastft":
            self.ops.add(func._opname)
            with self:  # look inside
                return bodies[func._opname](*args)
        out = func(*args, **(kwargs or {}))
        if func._opname == "masked_fill":
            self.filled.add(out.shape)
        if func._opname in ("mm", "addmm"):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]  # another argument may be a dtype
            self.products.append(tuple(tuple(x.shape) for x in tensors[-2:]))
        given = {x.data_ptr() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)}
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
                self.shapes[x.shape] += x.data_ptr() not in given
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_largest_allocation_is_one_chunk(frozen, device, monkeypatch):
    # Triton's interpreter copies what a kernel reads; the PyTorch body is the one with temporaries to look for.
    for part in (module, chunks):
        monkeypatch.setattr(part, "use_triton", lambda x: x.is_cuda)
    h, w, b, y = inputs(torch.float32, device, tokens=40, hidden=4, frozen=frozen)
    with Largest() as seen:
        found = linear_log_prob(h, w, b, y, softcap=5.0, **ALL)
        (found.log_prob.sum() + found.entropy.sum()).backward()
    assert 40 * 131 > 4 * 144 == seen.numel  # rows of 131 are padded to 144


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(frozen, softcap, device, way):
    h, w, b, y = inputs(torch.float64, device, tokens=5, hidden=3, vocab=7, frozen=frozen)
    wanted = (h,) if frozen else (h, w, b)
    for more, outputs in ((dict(entropy=True), (0, 1)), (dict(entropy=True, **SMOOTH), (0, 1, 3, 5))):
        options = dict(softcap=softcap, logit_scale=1.2, temperature=0.8, **more)
        for fn in (way.log_prob, linear_log_prob_reference):

            def call(*t, fn=fn, options=options, outputs=outputs):
                found = fn(*t, *(w, b)[len(t) - 1 :], y, **options)
                return tuple(found[i] for i in outputs)

            assert torch.autograd.gradcheck(call, wanted)


def test_entropy_without_gradient(device, monkeypatch):
    h, w, b, y = inputs(torch.float32, device, frozen=True)
    found = linear_log_prob(h, w, b, y, entropy=True, entropy_gradient=False)
    assert not found.entropy.requires_grad and found.log_prob.requires_grad
    both = linear_log_prob(h, w, b, y, entropy=True)
    (expected,) = torch.autograd.grad(found.log_prob.sum(), h)
    monkeypatch.setattr(chunks, "_Head", None)  # a backward that computed logits again would fail here
    grads = [torch.ones_like(both.log_prob), torch.zeros_like(both.entropy)]
    (got,) = torch.autograd.grad([both.log_prob, both.entropy], h, grads)
    assert torch.equal(got, expected)


def test_only_what_is_asked_for(device, way):
    h, w, b, y = inputs(torch.float32, device)
    same, exact = (
        torch.autograd.grad(linear_cross_entropy_reference(*leaves, y), leaves)
        for leaves in ((h, w, b), doubled((h, w, b)))
    )
    for i, t in enumerate((h, w, b)):
        others = [x if x is t else x.detach() for x in (h, w, b)]
        (one,) = torch.autograd.grad(way.cross_entropy(*others, y), [t])
        assert_within("hwb"[i], one, same[i], exact[i], length=131)
    with torch.no_grad():
        found = way.log_prob(h, w, b, y)
    assert not found.log_prob.requires_grad and found.entropy.shape == (0,)


def test_repeats_bit_for_bit(device, way):
    h, w, b, y = inputs(torch.float16, device)
    first, second = (torch.autograd.grad(way.cross_entropy(h, w, b, y), [h, w, b]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_values_are_the_same_beside_their_gradient(device):
    """The gradient overwrites the logits, the label's too, while other warps still read: in 2 of 48 steps on a busy
    GPU one token's loss was wrong.
    """
    many = device == "cuda"
    tokens, vocab = (8192, 16000) if many else (40, 97)
    hidden = torch.randn(tokens, 64, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocab, 64, device=device, dtype=torch.bfloat16)
    labels = torch.randint(0, vocab, (tokens,), device=device)
    alone = linear_log_prob(hidden, weight, None, labels).log_prob
    hidden.requires_grad_()
    for _ in range(20 if many else 1):
        assert torch.equal(linear_log_prob(hidden, weight, None, labels).log_prob, alone)


def test_layouts(device, way):
    h, w, b, y = inputs(torch.float32, device)
    weights = torch.arange(13.0, device=device)
    same, exact = (
        torch.autograd.grad(linear_log_prob_reference(*leaves, y).log_prob, leaves[0], weights)[0]
        for leaves in ((h, w, b), doubled((h, w, b)))
    )
    turned = h.detach().t().contiguous().t().requires_grad_()
    both = torch.stack((y, y), 1)[:, 0]
    (got,) = torch.autograd.grad(way.log_prob(turned, strided(w), b, both).log_prob, turned, strided(weights))
    assert_within("dh", got, same, exact, length=131)


def test_labels_at_ties_and_impossible_tokens(device, way):
    h = torch.eye(3, device=device)
    w = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]], device=device)
    b = torch.tensor([0.0, 0.0, -torch.inf], device=device)
    found = way.log_prob(h, w, b, torch.tensor([0, 1, 0], device=device), entropy=True, is_top1=True)
    assert found.is_top1.tolist() == [True, False, True]  # argmax gives the first maximum
    half = torch.full((3,), 0.5, device=device).log()
    assert torch.allclose(found.log_prob, half) and torch.allclose(found.entropy, -half)
    h.requires_grad_()
    found = way.log_prob(h, w, b, torch.tensor([0, 1, 0], device=device), entropy=True)
    (grad,) = torch.autograd.grad((found.log_prob + found.entropy).sum(), h)
    assert grad.isfinite().all()


@pytest.mark.parametrize("impossible", [0, 40], ids=["", "first block impossible"])
def test_vocabulary_of_several_blocks(impossible, device, monkeypatch):
    monkeypatch.setattr(chunks, "_row_config", lambda vocab: {"BLOCK": 32, "num_warps": 1})
    h, w, b, y = inputs(torch.float32, device)
    with torch.no_grad():
        b += torch.linspace(0, 9, 131, device=device)  # the maximum moves from block to block
        b[:impossible] = -torch.inf
        y.clamp_(min=impossible).masked_fill_(torch.arange(13, device=device) % 3 == 0, -100)
    cotangents = [torch.randn(13, device=device) for _ in range(2)]
    wanted = dict(entropy=True, is_top1=True, log_sum_sq_probs=True, mean_logits=impossible == 0)
    check(linear_log_prob, linear_log_prob_reference, (h, w, b), y, cotangents, **wanted)
    check(linear_log_prob, linear_log_prob_reference, (h, w.detach(), b.detach()), y, cotangents, **wanted)


@pytest.mark.parametrize("maths", [{}, dict(logit_scale=-0.7), dict(softcap=3.0)], ids=["plain", "negative", "softcap"])
def test_vocabulary_without_padding(maths, device, monkeypatch):
    """What lies past the end of the last block is no logit, of rows too that no padding ends: all of them are small."""
    monkeypatch.setattr(chunks, "_row_config", lambda vocab: {"BLOCK": 32, "num_warps": 1})
    h, w, b, y = inputs(torch.float32, device, vocab=144)
    with torch.no_grad():
        b -= 20 * maths.get("logit_scale", 1.0)
    cotangents = [torch.randn(13, device=device) for _ in range(2)]
    wanted = dict(entropy=True, is_top1=True, log_sum_sq_probs=True, mean_logits=True, **maths)
    check(linear_log_prob, linear_log_prob_reference, (h, w, b), y, cotangents, **wanted)
    check(linear_log_prob, linear_log_prob_reference, (h, w.detach(), b.detach()), y, cotangents, **wanted)


def test_label_outside_the_vocabulary(device, way):
    h, w, b, y = inputs(torch.float32, device)
    y[1] = 131
    if device == "cpu":
        with pytest.raises(IndexError, match="label 131 is out of bounds"):
            way.cross_entropy(h, w, b, y)
    else:
        assert way.cross_entropy(h, w, b, y).isnan()


@pytest.mark.parametrize("options", [dict(softcap=0.0), dict(temperature=0.0), dict(temperature=float("nan"))])
def test_wrong_numbers(options, device):
    h, w, b, y = inputs(torch.float32, device)
    with pytest.raises(ValueError, match="must be positive"):
        linear_log_prob(h, w, b, y, **options)
    with pytest.raises(ValueError, match="reduction must be"):
        linear_cross_entropy(h, w, b, y, reduction="batchmean")


def test_autocast_is_what_the_linear_layer_would_do(device, way):
    h, w, b, y = inputs(torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        ours = way.cross_entropy(h, w, b, y)
        logits = F.linear(h, w, b)
        stock = F.cross_entropy(logits.float(), y)
    narrow = [t.detach().bfloat16() for t in (h, w, b)]
    exact = F.cross_entropy(F.linear(*(t.double() for t in narrow)), y)
    grads, stock_grads = (torch.autograd.grad(x, [h, w, b]) for x in (ours, stock))
    assert_within("loss", ours, stock, exact)
    assert [g.dtype for g in grads] == [torch.float32] * 3
    leaves = [t.detach().double().requires_grad_() for t in (h, w, b)]
    exact_grads = torch.autograd.grad(F.cross_entropy(F.linear(*leaves), y), leaves)
    for a, s, e in zip(grads, stock_grads, exact_grads, strict=True):
        assert_within("gradient", a, s, e)


@pytest.mark.skipif(INTERPRET or not HAS_TRITON, reason="compiles with Triton's compiler")
@pytest.mark.parametrize("vocab", [128256, 50257])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_kernels_compile_for_an_h100(vocab, softcap):
    from tests.kernels._hopper import compiling

    h, w = torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(vocab, 16, dtype=torch.bfloat16)
    y, g = torch.tensor([3, -100]), torch.zeros(2)
    maths = (-100, softcap, 1.0, 1.0, 0.1, 1e-4, torch.bfloat16, "chunks")
    with compiling(module) as kernels:
        _, *saved = torch.ops.fastft.linear_log_prob(h, w, None, y, *maths, *[True] * 6, False)[:4]
        torch.ops.fastft.linear_log_prob_backward(g, g, g, g, h, w, None, y, *saved, *maths, True, True, False)
    assert {k.metadata.name for k in kernels} == {"_forward_kernel", "_backward_kernel"}
    for kernel in kernels:
        assert "cubin" in kernel.asm and ".local" not in kernel.asm["ptx"]
        # 16 bytes a thread and load, at an odd vocabulary too.
        for access in ("ld", "st"):
            assert re.search(rf"{access}\.global\S*\.v4\.b32", kernel.asm["ptx"])


@pytest.mark.skipif(INTERPRET or not HAS_TRITON, reason="compiles with Triton's compiler")
def test_the_scaling_compiles_for_an_h100(monkeypatch):
    """With one branch around all of it, and 16 bytes a thread and load."""
    from tests.kernels._hopper import compiling

    monkeypatch.setattr(compat, "graph_is_retained", lambda: False)
    with compiling(module) as kernels, torch.no_grad():
        module._scaled(torch.zeros(1024, 4096, dtype=torch.bfloat16), torch.zeros(()), torch.bfloat16)
    (kernel,) = kernels
    assert kernel.metadata.name == "_scale_kernel"
    for access in ("ld", "st"):
        assert re.search(rf"{access}\.global\S*\.v4\.b32", kernel.asm["ptx"])


@pytest.mark.skipif(INTERPRET or not HAS_TRITON, reason="compiles with Triton's compiler")
@pytest.mark.parametrize("name", ["fused", "filtered"])
@pytest.mark.parametrize("vocab, softcap", [(128256, None), (50257, 30.0)])
def test_kernels_without_a_buffer_compile_for_an_h100(vocab, softcap, name, monkeypatch):
    from tests.kernels._hopper import compiling, stack_bytes

    monkeypatch.setattr(fused, "_tiles", REAL_TILES)
    h, w = torch.zeros(512, 1024, dtype=torch.bfloat16), torch.empty(vocab, 1024, dtype=torch.bfloat16)
    y, g = torch.zeros(512, dtype=torch.int64), torch.zeros(512)
    maths = (-100, softcap, 1.0, 1.0, 0.0, 0.0, torch.bfloat16, name)
    with compiling(module) as kernels:
        _, *saved = torch.ops.fastft.linear_log_prob(h, w, None, y, *maths, *[False] * 7)[:4]
        torch.ops.fastft.linear_log_prob_backward(g, None, None, None, h, w, None, y, *saved, *maths, True, True, False)
    names = [k.metadata.name for k in kernels]
    assert names == ["_fused_forward_kernel", "_join_kernel", "_fused_backward_kernel", "_fused_backward_kernel"]
    for kernel in (kernels[0], *kernels[2:]):
        assert "wgmma.mma_async" in kernel.asm["ptx"] and "cp.async.cg" in kernel.asm["ptx"]
    spilt = [stack_bytes(kernel) for kernel in kernels]
    # A softcap and a filter hold more than a tile of logits: once for each, beside products of that whole tile. Triton
    # 3.6 spills twice what later ones do.
    most = 128 if softcap is None and name == "fused" else 1024
    assert spilt[0] <= 16 and spilt[1] == 0 and max(spilt) <= most


@pytest.mark.skipif(INTERPRET or not HAS_TRITON, reason="launches are noted in place of Triton's")
@pytest.mark.parametrize("trained", [False, True])
def test_without_a_buffer_nothing_grows_with_tokens_times_vocabulary(trained, monkeypatch):
    from tests.kernels._launches import noting

    monkeypatch.setattr(fused, "_tiles", REAL_TILES)
    tokens, hidden, vocab = 1000, 8, 3000
    h, w, b, y = inputs(torch.bfloat16, "cpu", tokens=tokens, hidden=hidden, vocab=vocab, frozen=not trained)
    with noting(), Largest() as seen:
        found = fused_log_prob(h, w, b, y.clamp(min=0), softcap=5.0, **ALL)
        (found.log_prob.sum() + found.entropy.sum()).backward()
    # Seven numbers for each token and part of the vocabulary, a total of dh for each part, dW.
    parts = REAL_TILES("forward", torch.device("cpu"), torch.bfloat16, tokens, vocab)["PARTS"]
    totals = REAL_TILES("hidden", torch.device("cpu"), torch.bfloat16, tokens, vocab)["PARTS"]
    assert seen.numel <= max(7 * 32 * tokens, totals * tokens * hidden, vocab * hidden) < 10 * 32 * tokens
    assert parts <= 32 and totals <= 4


kernels_run = pytest.mark.skipif(not (INTERPRET or torch.cuda.is_available()), reason="PyTorch bodies filter nothing")


def _improbable(device):
    """Tiles of a vocabulary that the model knows well: the first 32 classes, 32 that are 2^-9 probable, and the others,
    below 2^-17. In fp32, of which the head makes bf16, so that gradients are not rounded.
    """
    h, w, b, y = inputs(torch.float32, device, tokens=13, vocab=160)
    with torch.no_grad():
        w /= 8
        b.zero_()
        b[32:64], b[64:] = -3, -12
        y[y != -100] %= 32
    return h, w, b, y


def _of_loss(fn, h, w, b, y, **options):
    return torch.autograd.grad(fn(h, w, b, y, reduction="sum", dtype=torch.bfloat16, **options), [h, w, b])


@kernels_run
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_filter_leaves_out_what_is_small_and_nothing_else(scale, device):
    h, w, b, y = _improbable(device)
    options = dict(logit_scale=scale, z_loss=1e-3)
    (dh, dw, db), (fh, fw, fb) = (
        _of_loss(fn, h, w, b, y, **options) for fn in (fused_cross_entropy, filtered_cross_entropy)
    )
    likely = 64 if scale == 1.0 else 32  # with logits thrice as far apart the second 32 are improbable too
    assert torch.equal(dw[:likely], fw[:likely]) and torch.equal(db, fb)
    assert dw[likely:].any() and not fw[likely:].any()
    assert not torch.equal(dh, fh)
    # Every gradient of a logit that is left out is below 2^-12 of its token's coefficient, which z-loss enlarges.
    lse = fused_log_prob(h, w, b, y, logit_scale=scale, dtype=torch.bfloat16).lse
    least = (1 + 2 * 1e-3 * lse).abs().clamp(min=1) * scale * 2**-12
    counts = y != -100
    assert ((dh - fh).abs() <= least[:, None] * w[likely:].abs().sum(0) + 1e-6)[counts].all()
    assert ((dw - fw).abs() <= (least[:, None] * h.abs())[counts].sum(0)).all()


@kernels_run
def test_a_filter_keeps_a_nan(device):
    h, w, b, y = _improbable(device)
    with torch.no_grad():
        h[1] = float("nan")
    one, other = (_of_loss(fn, h, w, b, y) for fn in (fused_cross_entropy, filtered_cross_entropy))
    for a, e in zip(other[:2], one[:2], strict=True):
        assert torch.equal(a.isnan(), e.isnan()) and a.isnan().any()


def test_a_filter_refuses_what_it_would_drop(device):
    h, w, b, y = inputs(torch.bfloat16, device)
    assert filtered_supported(h, w, b, y, softcap=3.0, z_loss=1e-4) is None
    assert filtered_supported(h, w, b, y, label_smoothing=0.1).code == "filter"
    assert filtered_supported(h, w, b, y, mean_logits_gradient=True).code == "filter"
    assert filtered_supported(h, w[:, :3], b, y).code == "shape"


@pytest.mark.parametrize("name", ["fused", "filtered"])
def test_a_graph_takes_the_variant_that_is_asked_for(name, device):
    h, w, b, y = inputs(torch.float32, device)
    y = y.clamp(min=0)
    before = len(fastft.reports())

    def loss(h, w, b):
        return F.cross_entropy(F.linear(h, w, b).float(), y)

    asked = {"variants": {"linear_cross_entropy": name}, "residual": "eager", "strict": True}
    found = torch.compile(loss, backend="fastft", options=asked)(h, w, b)
    (site,) = [s for report in fastft.reports()[before:] for s in report.sites if s.status == "replaced"]
    assert site.notes == f"variant {name}"
    assert torch.equal(found, WAYS[name].cross_entropy(h, w, b, y))


@pytest.mark.parametrize("share", [0.0, 100.0], ids=["chunks", "two chunks"])
@pytest.mark.parametrize(("frozen", "reduction"), [(True, "mean"), (False, "mean"), (False, "none")])
def test_compiles_as_opaque_ops(frozen, reduction, share, device, monkeypatch):
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    monkeypatch.setattr(chunks, "TRAINED_SHARE", share)
    h, w, b, y = inputs(torch.float32, device, frozen=frozen)
    wanted = [t for t in (h, w, b) if t.requires_grad]
    backend = AotEagerAndRecordGraphs()
    loss = functools.partial(linear_cross_entropy, softcap=4.0, reduction=reduction)
    compiled = torch.compile(lambda *t: loss(*t), backend=backend, fullgraph=True)
    g = torch.rand(13, device=device) if reduction == "none" else None
    ours, eager = (torch.autograd.grad(fn(h, w, b, y), wanted, g) for fn in (compiled, loss))
    torch.testing.assert_close(ours, eager, rtol=0, atol=0)
    text = [str(g.graph) for g in (*backend.fw_graphs, *backend.bw_graphs)]
    assert "fastft.linear_log_prob.default" in text[0]
    # The backward is a scaling, but of a trained head whose tokens have gradients of their own.
    assert ("fastft.linear_log_prob_backward" in text[1]) is (reduction == "none")
    assert "fastft.linear_log_prob_" not in text[1].replace("prob_backward", ""), "what scales is for Inductor to fuse"


@pytest.mark.parametrize("way", NAMES)
@pytest.mark.parametrize("bias", [True, False])
def test_raw_ops(bias, way, device):
    small = inputs(torch.float32, device, tokens=3, vocab=33, bias=bias)
    h, w, b, y = (t.detach() if t is not None else None for t in small)
    maths = (-100, 3.0, 0.7, 1.3, 0.1, 1e-2, torch.float16, way)
    for wanted in [(*[True] * 6, bias), (*[True] * 4, False, True, False), (False,) * 7]:
        torch.library.opcheck(torch.ops.fastft.linear_log_prob.default, (h, w, b, y, *maths, *wanted))
    _, *saved = torch.ops.fastft.linear_log_prob(h, w, b, y, *maths, True, *[False] * 6)[:4]
    g = torch.randn(len(y), device=device)
    all_, one = (True, True, bias), (True, False, False)
    nothing = torch.zeros_like(g)
    for *grads, need in [
        (g, None, None, None, one),
        (g, g, g, g, all_),
        (None, g, None, None, one),
        (None, None, g, None, all_),
        (None, nothing, nothing, nothing, all_),
    ]:
        arguments = (*grads, h, w, b, y, *saved, *maths, *need)
        torch.library.opcheck(torch.ops.fastft.linear_log_prob_backward.default, arguments)


def test_chunk_rows(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 600 * 2**20)
    assert chunk_rows(8192, 128256, 2, 4096) == chunk_rows(8192, 151936, 2, 4096) == 2048
    assert chunk_rows(8192, 262144, 2, 2560) == 1024
    # Gemma 2: 126 of 132 tiles where 1024 tokens have 112; phi-4: 1.97 waves where 2048 tokens have 2.4.
    assert chunk_rows(8192, 256000, 2, 3584) == 1152 and chunk_rows(8192, 100352, 2, 5120) == 1664
    assert chunk_rows(16384, 248320, 2, 2048) == 1152 and chunk_rows(8192, 248320, 2, 2048) == 1024  # a chunk less
    assert chunk_rows(1100, 256000, 2, 3584) == chunk_rows(1100, 248320, 2, 2048) == 1100
    assert chunk_rows(100, 128256, 2) == 100 and chunk_rows(0, 128256, 2) == 1
    for tokens in (1, 1000, 2100, 5000, 8192, 32768):
        for vocab in (97, 32000, 128256, 256000):
            for hidden in (0, 2048, 3584, 5120):
                rows = chunk_rows(tokens, vocab, 2, hidden)
                assert rows <= chunks.CHUNK_TOKENS and rows * vocab * 2 <= chunks.CHUNK_BYTES
                assert rows == tokens or rows % 128 == 0
    assert chunk_rows(2100, 128256, 2) == 1152  # two chunks of about the same size
    # With a gradient of the weight, what its fp32 sum takes, but half of the tokens at most, if not all of them fit.
    monkeypatch.setattr(chunks, "TRAINED_SHARE", 1.0)
    assert chunk_rows(8192, 128256, 2, 4096, True) == 4096 and chunk_rows(16384, 248320, 2, 2048, True) == 4096
    assert chunk_rows(8192, 128256, 2, 64, True) == 2048 and chunk_rows(8192, 128256, 4, 4096, True) == 4096
    assert chunk_rows(2100, 128256, 2, 4096, True) == 1152 and chunk_rows(2048, 128256, 2, 4096, True) == 2048
    for tokens in (2049, 5000, 8000, 16300):
        rows = chunk_rows(tokens, 128256, 2, 4096, True)
        assert rows % 128 == 0 and rows < tokens <= 2 * rows


@pytest.mark.parametrize(
    "change, code",
    [
        ({}, None),
        (dict(weight=torch.empty(131, 24, dtype=torch.uint8)), "dtype"),
        (dict(dtype=torch.float8_e4m3fn), "dtype"),
        (dict(weight=torch.empty(131, 23)), "shape"),
        (dict(weight=torch.empty(131 * 24, 1)), "shape"),
        (dict(labels=torch.empty(21)), "labels"),
        (dict(hidden=torch.empty(21, 24, device="meta")), "device"),
        (dict(reduction="batchmean"), "reduction"),
    ],
)
def test_supported(change, code):
    labels = torch.empty(21, dtype=torch.int64)
    arguments = dict(hidden=torch.empty(21, 24), weight=torch.empty(131, 24), bias=None, labels=labels)
    reason = supported(**{**arguments, **change})
    assert (reason and reason.code) == code


@pytest.mark.parametrize("maths", [{}, dict(softcap=3.0, logit_scale=0.7, temperature=1.3)], ids=["plain", "softcap"])
def test_like_trl(maths, device, way):
    trl = pytest.importorskip("trl.kernels.chunked_logprob")
    h, w, b, y = inputs(torch.float32, device)
    y = y.clamp(min=0)
    weights = torch.randn(2, len(y), device=device)
    names = ("log_prob", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

    def stock(h, w, b):
        return trl.ChunkedLogProbFunction.apply(
            h, w, b, y, maths.get("temperature", 1.0), 32, maths.get("softcap"), maths.get("logit_scale", 1.0)
        )

    def ours(h, w, b):
        found = way.log_prob(h, w, b, y, **maths, **ALL)
        return [getattr(found, name) for name in names]

    def values(fn, *leaves):
        log_prob, entropy, *rest = fn(*leaves)
        grads = torch.autograd.grad((log_prob * weights[0] + entropy * weights[1]).sum(), leaves)
        return [log_prob, entropy, *rest, *grads]

    with Wide(torch.float64, torch.float32):  # TRL names fp32
        exact = values(stock, *doubled((h, w, b)))
    for name, a, s, e in zip(
        (*names, "dh", "dw", "db"), values(ours, h, w, b), values(stock, h, w, b), exact, strict=True
    ):
        if name == "is_top1":
            assert torch.equal(a.bool(), e.bool())
        else:
            assert_within(name, a, s, e, length=131)


# ----------------------------------------------------------------------------------- for the tests that go over all ops


def _head_sample(new: New, n: int, frozen: bool = False, bias: bool = True) -> tuple[Any, ...]:
    labels = new.integers(7 * n, 4 * n)
    labels[::3] = -100
    weight = new(7 * n, 6, grad=not frozen, scale=0.5)
    return new(4 * n, 6), weight, new(7 * n, grad=not frozen) if bias else None, labels


def _log_prob_samples(new: New, n: int) -> Named:
    everything = {"entropy": True, "is_top1": True, "mean_logits": True, "log_sum_sq_probs": True}
    maths = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3}
    yield "trainable head", _head_sample(new, n), {**maths, **everything}
    yield "frozen head", _head_sample(new, n, frozen=True), {**maths, **everything}
    yield "frozen head, plain", _head_sample(new, n, frozen=True, bias=False), {}
    yield "trainable head, plain", _head_sample(new, n, bias=False), {}
    yield "lse and mean", _head_sample(new, n), {**maths, **SMOOTH}


def _cross_entropy_samples(new: New, n: int) -> Named:
    yield "trainable head", _head_sample(new, n, bias=False), {"softcap": 5.0}
    yield "frozen head", _head_sample(new, n, frozen=True), {"reduction": "sum"}
    yield "each token", _head_sample(new, n), {"reduction": "none", "logit_scale": 0.5}
    yield "smoothed", _head_sample(new, n, frozen=True), {"label_smoothing": 0.1, "z_loss": 1e-2}


SAMPLES = {"linear_cross_entropy": _cross_entropy_samples, "linear_log_prob": _log_prob_samples}


def _head_case(d: Draw) -> tuple[Any, ...]:
    tokens, hidden, vocab = d(SIZES), d(WIDTHS), d(st.integers(1, 140))
    labels = d.integers(vocab, tokens)
    kind = d(st.sampled_from(("some", "some", "all", "none", "one class")))
    if kind == "some":
        labels[torch.rand(tokens, generator=d.generator) < 0.5] = -100
    elif kind == "all":
        labels[:] = -100
    elif kind == "one class":
        labels[:] = vocab - 1
    frozen = d(flags)
    weight = d.tensor(vocab, hidden, scale=hidden**-0.5, grad=not frozen)
    bias = d.maybe(lambda: d.tensor(vocab, grad=not frozen))
    return d.tensor(tokens, hidden, grad=True), weight, bias, labels


def _maths_case(d: Draw) -> dict[str, Any]:
    return {"softcap": d(st.sampled_from((None, 5.0))), "logit_scale": d(st.sampled_from((1.0, 0.25)))}


def _cross_entropy_case(d: Draw) -> Sample:
    added = {"label_smoothing": d(st.sampled_from((0.0, 0.0, 0.1))), "z_loss": d(st.sampled_from((0.0, 0.0, 1e-2)))}
    reduction = {"reduction": d(st.sampled_from(("mean", "sum", "none")))}
    head = _head_case(d)
    if head[1].shape[0] == 1:  # of one class p - 1 is 0, and the parts of what is added cancel, but for their rounding
        added = dict.fromkeys(added, 0.0)
    return Sample("", head, {**_maths_case(d), **reduction, **added})


def _log_prob_case(d: Draw) -> Sample:
    wanted = {name: d(flags) for name in ("entropy", "mean_logits", "log_sum_sq_probs")}
    return Sample("", _head_case(d), {**_maths_case(d), "temperature": d(st.sampled_from((1.0, 1.5))), **wanted})


FUZZ = {"linear_cross_entropy": _cross_entropy_case, "linear_log_prob": _log_prob_case}


LABELS = [2, -100, 0]


def _logits(h: Array, w: Array, b: Array | None, cap: Any, scale: str, temperature: str) -> Array:
    z = ratio(scale) * (h @ w.T + (0 if b is None else b))
    z = ratio(cap) * TANH(z / ratio(cap)) if cap else z
    return z / ratio(temperature)


def _of_tokens(z: Array, function: Callable[[Array, int], Any]) -> Array:
    values = [function(row, label) if label >= 0 else sympy.Integer(0) for row, label in zip(z, LABELS, strict=True)]
    return np.array(values, dtype=object)


def _probabilities(row: Array) -> Array:
    return EXP(row) / np.sum(EXP(row))


HEAD = {"h": (3, 2), "w": (3, 2), "b": (3,)}


def _log_prob_derivations() -> list[Derivation]:
    def formula(h: Array, w: Array, b: Array | None = None, **maths: Any) -> list[Array]:
        z = _logits(h, w, b, **maths)
        return [
            _of_tokens(z, lambda row, y: row[y] - sympy.log(np.sum(EXP(row)))),
            _of_tokens(z, lambda row, y: -np.sum(_probabilities(row) * LOG(_probabilities(row)))),
            _of_tokens(z, lambda row, y: np.sum(row) / len(row)),
            _of_tokens(z, lambda row, y: sympy.log(np.sum(_probabilities(row) ** 2))),
            _of_tokens(z, lambda row, y: sympy.log(np.sum(EXP(row)))),
        ]

    def without_a_buffer(fn: Any, *operands: Any, **maths: Any) -> list[Any]:
        return call(fused_log_prob if fn is linear_log_prob else fn, *operands, **maths)

    def call(fn: Any, h: Any, w: Any, b: Any = None, **maths: Any) -> list[Any]:
        everything = {"entropy": True, "mean_logits": True, "log_sum_sq_probs": True}
        found = fn(h, w, b, torch.tensor(LABELS), **everything, **maths)
        return [found.log_prob, found.entropy, found.mean_logits, found.log_sum_sq_probs, found.lse]

    plain = {"cap": None, "scale": "1", "temperature": "1"}
    capped = {"cap": 3, "scale": "0.7", "temperature": "1.25"}
    maths = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.25}
    return [
        Derivation("plain", HEAD, call, functools.partial(formula, **plain), outputs=2),
        Derivation(
            "rows of logits",
            {"h": (3, 1), "w": (3, 1)},
            call,
            functools.partial(formula, **plain),
            frozen=("h",),
            outputs=2,
            simplify=BOTH,
        ),
        Derivation(
            "softcap, scale, temperature",
            HEAD,
            functools.partial(call, **maths),
            functools.partial(formula, **capped),
            outputs=2,
        ),
        Derivation(
            "frozen head",
            {"h": (3, 1), "w": (3, 1)},
            functools.partial(call, **maths),
            functools.partial(formula, **capped),
            frozen=("w",),
            outputs=2,
        ),
        Derivation(
            "without a buffer of logits",
            HEAD,
            functools.partial(without_a_buffer, **maths),
            functools.partial(formula, **capped),
            outputs=2,
        ),
        Derivation(
            "frozen head, constant entropy",
            {"h": (3, 1), "w": (3, 1)},
            functools.partial(call, entropy_gradient=False, **maths),
            functools.partial(formula, **capped),
            frozen=("w",),
            outputs=1,
            kept=True,
        ),
    ]


def _cross_entropy_derivations() -> list[Derivation]:
    def derive(
        name: str,
        reduction: str,
        cap: int | None = None,
        smoothing: float = 0,
        z_loss: float = 0,
        ours: Any = linear_cross_entropy,
        **rest: Any,
    ) -> Derivation:
        def token(row: Array, y: int) -> Any:
            lse = sympy.log(np.sum(EXP(row)))
            smooth, square = ratio(str(smoothing)), ratio(str(z_loss))
            return (1 - smooth) * (lse - row[y]) + smooth * (lse - np.sum(row) / len(row)) + square * lse**2

        def formula(h: Array, w: Array, b: Array) -> list[Array]:
            z = _logits(h, w, b, cap, "0.5", "1")
            loss = _of_tokens(z, token)
            total = np.sum(loss)
            return [loss if reduction == "none" else total if reduction == "sum" else total / 2]

        def call(fn: Any, h: Any, w: Any, b: Any) -> Any:
            softcap = None if cap is None else float(cap)
            options = {"reduction": reduction, "label_smoothing": float(smoothing), "z_loss": float(z_loss)}
            fn = ours if fn is linear_cross_entropy else fn
            return fn(h, w, b, torch.tensor(LABELS), softcap=softcap, logit_scale=0.5, **options)

        return Derivation(name, HEAD, call, formula, **rest)

    return [
        derive("mean", "mean"),
        derive("each token, softcap", "none", 2),
        derive("sum, frozen head", "sum", frozen=("w", "b"), simplify=BOTH),
        derive("label smoothing", "mean", smoothing=0.25, kept=True),
        derive("label smoothing and z-loss, frozen head", "sum", smoothing=0.25, z_loss=0.5, frozen=("w", "b")),
        derive("without a buffer of logits", "sum", smoothing=0.25, z_loss=0.5, ours=fused_cross_entropy),
    ]


DERIVATIONS = {"linear_cross_entropy": _cross_entropy_derivations, "linear_log_prob": _log_prob_derivations}

SMALL_TILES = {
    "chunks._row_config": lambda vocab: {"BLOCK": 2, "num_warps": 1},
    "chunks.chunk_rows": lambda *_: 1,
    "SCALED": 2,
    "_untraced": lambda x: True,
    "fused._tiles": lambda kernel, *_: {
        "BLOCK_M": 2,
        "BLOCK_N": 2,
        "BLOCK_K": 2,
        "PARTS": 1 if kernel == "weight" else 2,
        **({} if kernel == "forward" else {"BLOCK_H": 1}),
    },
}

MUTANTS = (
    Mutant(
        "cross-entropy: what was begun is made once more",
        "kernels/_linear_cross_entropy_chunks.py",
        "chunk.logits if i < begin else head.logits(chunk)",
        "head.logits(chunk)",
        "tests/kernels/test_linear_cross_entropy.py -k begins_before",
    ),
    Mutant(
        "cross-entropy: a product begins whatever was found before",
        "kernels/_linear_cross_entropy_call.py",
        "self.event is not None and Scored.streak > 1",
        "self.event is not None",
        "tests/kernels/test_linear_cross_entropy.py -k begins_before",
    ),
    Mutant(
        "cross-entropy: a product begins after labels that were left out",
        "kernels/_linear_cross_entropy_call.py",
        "Scored.streak + 1 if found is None else 0",
        "Scored.streak + 1",
        "tests/kernels/test_linear_cross_entropy.py -k begins_before",
    ),
    Mutant(
        "cross-entropy: a unit is scaled by a number of its dtype",
        "kernels/linear_cross_entropy.py",
        "unit, g.float(), out, columns,",
        "unit, g.to(unit.dtype).float(), out, columns,",
        "tests/kernels/test_linear_cross_entropy.py -k test_scaled_units",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: no gradient of the scale",
        "kernels/linear_cross_entropy.py",
        "    if not _untraced(unit) or torch.is_grad_enabled():",
        "    if not _untraced(unit):",
        "tests/kernels/test_linear_cross_entropy.py -k test_the_gradient_of_the_scale",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: chunks that leave a wave half empty",
        "kernels/_linear_cross_entropy_chunks.py",
        "        if near and _filled(power, hidden) < FILLED:",
        "        if False:",
        "tests/kernels/test_linear_cross_entropy.py -k test_chunk_rows",
    ),
    Mutant(
        "cross-entropy: larger chunks that are no fewer",
        "kernels/_linear_cross_entropy_chunks.py",
        "if nine <= most and math.ceil(tokens / nine) < math.ceil(tokens / power):",
        "if nine <= most:",
        "tests/kernels/test_linear_cross_entropy.py -k test_chunk_rows",
    ),
    Mutant(
        "cross-entropy: lse's gradient at the label",
        "kernels/_linear_cross_entropy_call.py",
        "    label = p = g_score\n",
        "    label = p = g_score if g_lse is None or g_score is None else g_score - g_lse\n",
        "tests/kernels/test_linear_cross_entropy.py -k gradients_of_lse",
    ),
    Mutant(
        "cross-entropy: the mean's gradient of each logit is the whole",
        "kernels/_linear_cross_entropy_call.py",
        "None if g_mean is None else g_mean / vocab",
        "g_mean",
        "tests/kernels/test_linear_cross_entropy.py -k gradients_of_lse",
    ),
    Mutant(
        "cross-entropy: the mean's gradient forgotten in the kernel",
        "kernels/_linear_cross_entropy_triton.py",
        "        gradient += g_mean\n",
        "        gradient += 0.0\n",
        "tests/kernels/test_linear_cross_entropy.py -k gradients_of_lse",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: smoothing takes the label's whole part, trainable head",
        "kernels/_linear_cross_entropy_call.py",
        "g_score * (1 - maths.label_smoothing), g_score * maths.label_smoothing",
        "g_score, g_score * maths.label_smoothing",
        "tests/kernels/test_linear_cross_entropy.py::test_label_smoothing_and_z_loss[chunks-options0-none-False-dtype0]",
    ),
    Mutant(
        "cross-entropy: z-loss of p without lse, trainable head",
        "kernels/_linear_cross_entropy_call.py",
        "p = g_score * (1 + 2 * maths.z_loss * (top + log_sum))",
        "p = g_score * (1 + 2 * maths.z_loss)",
        "tests/kernels/test_linear_cross_entropy.py::test_label_smoothing_and_z_loss[chunks-options1-none-False-dtype0]",
    ),
    Mutant(
        "cross-entropy: smoothing takes the label's whole part, frozen head",
        "kernels/_linear_cross_entropy_triton.py",
        "V, SMOOTHING, Z_LOSS) + (1.0 - SMOOTHING)",
        "V, SMOOTHING, Z_LOSS) + 1.0",
        "tests/kernels/test_linear_cross_entropy.py -k smoothing",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: smoothing without the others' part, frozen head",
        "kernels/_linear_cross_entropy_triton.py",
        "        gradient += SMOOTHING / V\n",
        "        gradient += 0.0\n",
        "tests/kernels/test_linear_cross_entropy.py -k smoothing",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: z-loss without its gradient, frozen head",
        "kernels/_linear_cross_entropy_triton.py",
        "p = (1.0 + 2.0 * Z_LOSS * lse) * p",
        "p = (1.0 + 0.0 * lse) * p",
        "tests/kernels/test_linear_cross_entropy.py::test_label_smoothing_and_z_loss[chunks-options1-mean-True-dtype0]",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: z-loss without its gradient, frozen head, in PyTorch",
        "kernels/_linear_cross_entropy_chunks.py",
        "            dr.mul_(1 + 2 * maths.z_loss * lse[:, None])\n",
        "            pass\n",
        "tests/kernels/test_linear_cross_entropy.py::test_label_smoothing_and_z_loss[chunks-options1-mean-True-dtype0]",
    ),
    Mutant(
        "cross-entropy: smoothing without the others' part, frozen head, in PyTorch",
        "kernels/_linear_cross_entropy_chunks.py",
        "            dr.add_(smoothing / vocab)\n",
        "            pass\n",
        "tests/kernels/test_linear_cross_entropy.py -k smoothing",
    ),
    Mutant(
        "cross-entropy: with smoothing a frozen head is computed twice",
        "kernels/linear_cross_entropy.py",
        "frozen = need_hidden and not (",
        "frozen = need_hidden and not maths.label_smoothing and not (",
        "tests/kernels/test_linear_cross_entropy.py -k one_pass",
    ),
    Mutant(
        "cross-entropy: a trained head's logits only where hidden states have a gradient",
        "kernels/_linear_cross_entropy_chunks.py",
        "targets, parts, maths, wanted.gradient)",
        "targets, parts, maths, wanted.unit_gradient)",
        "tests/kernels/test_linear_cross_entropy.py -k under_a_sum",
    ),
    Mutant(
        "cross-entropy: a trained head's logits only where hidden states have a gradient, in the kernel",
        "kernels/_linear_cross_entropy_chunks.py",
        "GRADIENT=wanted.gradient",
        "GRADIENT=wanted.unit_gradient",
        "tests/kernels/test_linear_cross_entropy.py -k under_a_sum",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: a trained head's part of a token that does not count",
        "kernels/linear_cross_entropy.py",
        "*[g.masked_fill(~counts.any(), 0)] * 2",
        "*[g] * 2",
        "tests/kernels/test_linear_cross_entropy.py -k every_label_is_ignored",
    ),
    Mutant(
        "cross-entropy: the last tokens of an odd number left to cuBLAS",
        "kernels/_linear_cross_entropy_chunks.py",
        "self.weight = products.mm_into(self._empty(), alpha, logits.t(), states)",
        "self.weight = alpha * torch.mm(logits.t(), states)",
        "tests/kernels/test_linear_cross_entropy.py -k odd_sizes",
    ),
    Mutant(
        "cross-entropy: fp16 sums of a trained head overflow",
        "kernels/linear_cross_entropy.py",
        "torch.float32 if of.dtype == torch.float16 else of.dtype",
        "of.dtype",
        "tests/kernels/test_linear_cross_entropy.py -k do_not_overflow",
    ),
    Mutant(
        "cross-entropy: an fp32 head's gradient rounded where it is one product",
        "kernels/_linear_cross_entropy_chunks.py",
        "<= 2 and weight == head.dtype",
        "<= 2",
        "tests/kernels/test_linear_cross_entropy.py -k summed_in_fp32",
    ),
    Mutant(
        "cross-entropy: a trained head's logits again in the backward",
        "kernels/linear_cross_entropy.py",
        'if trained and reduction != "none" and way == "chunks":',
        'if trained and reduction == "sum" and way == "chunks":',
        "tests/kernels/test_linear_cross_entropy.py -k under_a_sum",
    ),
    Mutant(
        "cross-entropy: lse's gradient with the sign of the log-probability's",
        "kernels/_linear_cross_entropy_call.py",
        "p = -g_lse if p is None else p - g_lse",
        "p = -g_lse if p is None else p + g_lse",
        "tests/kernels/test_linear_cross_entropy.py -k gradients_of_lse",
    ),
    Mutant(
        "cross-entropy: a frozen head keeps its unit gradient for lse",
        "kernels/linear_cross_entropy.py",
        "(need_weight or need_bias or any(differentiable[1:]))",
        "(need_weight or need_bias)",
        "tests/kernels/test_linear_cross_entropy.py -k gradients_of_lse",
    ),
    Mutant(
        "cross-entropy: label smoothing adds to the whole loss",
        "kernels/_linear_cross_entropy_chunks.py",
        "found = (1 - smoothing) * found - smoothing * (lse - z.mean(-1))",
        "found = found - smoothing * (lse - z.mean(-1))",
        "tests/kernels/test_linear_cross_entropy.py -k smoothing",
    ),
    Mutant(
        "cross-entropy: z-loss of lse, not of its square",
        "kernels/_linear_cross_entropy_chunks.py",
        "found = found - maths.z_loss * lse * lse",
        "found = found - maths.z_loss * lse",
        "tests/kernels/test_linear_cross_entropy.py::test_label_smoothing_and_z_loss[chunks-options1-mean-True-dtype0]",
    ),
    Mutant(
        "cross-entropy: the label's logit read after it was overwritten",
        "kernels/_linear_cross_entropy_triton.py",
        "            # The label's logit is overwritten too: not before every warp has read it.\n"
        "            tl.debug_barrier()\n",
        "",
        "tests/kernels/test_hopper.py -k labels_logit",
    ),
    Mutant(
        "cross-entropy: the label's gradient written before its column's",
        "kernels/_linear_cross_entropy_triton.py",
        "takes three instructions of ten.\n            tl.debug_barrier()\n",
        "takes three instructions of ten.\n",
        "tests/kernels/test_hopper.py -k labels_logit",
    ),
    Mutant(
        "cross-entropy: what is past the end counts as a logit of 0",
        "kernels/_linear_cross_entropy_triton.py",
        'PAST: tl.constexpr = -float("inf") if CLEAN else 0.0',
        "PAST: tl.constexpr = 0.0",
        "tests/kernels/test_linear_cross_entropy.py -k without_padding",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: what is past the end is -inf times a negative scale",
        "kernels/_linear_cross_entropy_triton.py",
        "STRIDE == V and SCALE > 0 and not HAS_SOFTCAP",
        "STRIDE == V and not HAS_SOFTCAP",
        "tests/kernels/test_linear_cross_entropy.py -k without_padding",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: what is past the end is the cap",
        "kernels/_linear_cross_entropy_triton.py",
        "STRIDE == V and SCALE > 0 and not HAS_SOFTCAP",
        "STRIDE == V and SCALE > 0",
        "tests/kernels/test_linear_cross_entropy.py -k without_padding",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: gradient without the label",
        "kernels/_linear_cross_entropy_triton.py",
        "V, SMOOTHING, Z_LOSS) + (1.0 - SMOOTHING)",
        "V, SMOOTHING, Z_LOSS)",
        'tests/kernels/test_linear_cross_entropy.py -k "log_prob or cross_entropy"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy: sum not rescaled",
        "kernels/_linear_cross_entropy_triton.py",
        "sums_e = sums_e * rescale + tl.sum(e, axis=1)",
        "sums_e = sums_e + tl.sum(e, axis=1)",
        "tests/kernels/test_linear_cross_entropy.py::test_vocabulary_of_several_blocks[]",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: threads' sums added as they are",
        "kernels/_linear_cross_entropy_triton.py",
        "sum_e = tl.sum(sums_e * rescale, axis=0)",
        "sum_e = tl.sum(sums_e, axis=0)",
        'tests/kernels/test_linear_cross_entropy.py -k "several_blocks or log_prob"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy: entropy: threads' sums added as they are",
        "kernels/_linear_cross_entropy_triton.py",
        "sum_ez = tl.sum((sums_ez + sums_e * shift) * rescale, axis=0)",
        "sum_ez = tl.sum(sums_ez * rescale, axis=0)",
        'tests/kernels/test_linear_cross_entropy.py -k "several_blocks or log_prob"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy: squares: threads' sums added as they are",
        "kernels/_linear_cross_entropy_triton.py",
        "sum_ee = tl.sum(sums_ee * rescale * rescale, axis=0)",
        "sum_ee = tl.sum(sums_ee * rescale, axis=0)",
        'tests/kernels/test_linear_cross_entropy.py -k "several_blocks or log_prob"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy: softcap's slope forgotten",
        "kernels/_linear_cross_entropy_chunks.py",
        "        if tanh is not None:\n            dr.mul_(1 - tanh * tanh)\n",
        "",
        "tests/kernels/test_linear_cross_entropy.py::test_log_prob[chunks-softcap-True-dtype0]",
    ),
    Mutant(
        "cross-entropy: scale forgotten in backward",
        "kernels/_linear_cross_entropy_chunks.py",
        "    dr *= maths.logit_scale / maths.temperature\n",
        "",
        "tests/kernels/test_linear_cross_entropy.py::test_log_prob[chunks-softcap-True-dtype0]",
    ),
    Mutant(
        "cross-entropy: mean over all tokens",
        "kernels/linear_cross_entropy.py",
        "total / (labels != ignore_index).sum()",
        "total / labels.numel()",
        "tests/kernels/test_linear_cross_entropy.py::test_label_smoothing_and_z_loss[chunks-options0-mean-True-dtype0]",
    ),
    Mutant(
        "cross-entropy: ignore_index is always -100",
        "kernels/_linear_cross_entropy_call.py",
        "        self.counts = labels != ignore_index",
        "        self.counts = labels != -100",
        "tests/kernels/test_linear_cross_entropy.py::test_ignored_tokens_are_left_out_of_every_gemm[chunks-130]",
    ),
    Mutant(
        "cross-entropy: dW of the last chunk only",
        "kernels/_linear_cross_entropy_chunks.py",
        "_add_matmul(self.weight, logits.t(), states",
        "_add_matmul(None, logits.t(), states",
        'tests/kernels/test_linear_cross_entropy.py -k "log_prob or cross_entropy"',
    ),
    Mutant(
        "cross-entropy: dW rounded chunk by chunk",
        "kernels/_linear_cross_entropy_chunks.py",
        "if total is None else total.addmm_(a, b)",
        "if total is None else total.add_((a @ b).bfloat16())",
        'tests/kernels/test_linear_cross_entropy.py -k "log_prob or cross_entropy"',
    ),
    Mutant(
        "cross-entropy: entropy without its expectation",
        "kernels/_linear_cross_entropy_triton.py",
        "tl.store(entropy_ptr + row, log_sum - sum_ez / sum_e)",
        "tl.store(entropy_ptr + row, log_sum - sum_ez)",
        'tests/kernels/test_linear_cross_entropy.py -k "log_prob or cross_entropy"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy: an ignored token's gradient",
        "kernels/_linear_cross_entropy_triton.py",
        "gradient = tl.where(label == IGNORE_INDEX, 0.0, gradient * slope)",
        "gradient = gradient * slope",
        "tests/kernels/test_linear_cross_entropy.py::test_gradients_of_lse_and_mean_logits[chunks-plain-True-dtype0]",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: the largest logit swallows the log of the sum, value",
        "kernels/_linear_cross_entropy_triton.py",
        "score = (z_label - base) - log_sum",
        "score = z_label - (base + log_sum)",
        "tests/kernels/test_linear_cross_entropy.py -k sure_of",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: the largest logit swallows the log of the sum, gradient in forward",
        "kernels/_linear_cross_entropy_triton.py",
        "p = _exp((z - base) - log_sum)",
        "p = _exp(z - (base + log_sum))",
        "tests/kernels/test_linear_cross_entropy.py -k sure_of",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: the largest logit swallows the log of the sum, gradient in backward",
        "kernels/_linear_cross_entropy_triton.py",
        "log_p = (z - top) - log_sum",
        "log_p = z - (top + log_sum)",
        "tests/kernels/test_linear_cross_entropy.py -k sure_of",
        interpret=True,
    ),
    Mutant(
        "cross-entropy: the largest logit swallows the log of the sum, value in PyTorch",
        "kernels/_linear_cross_entropy_chunks.py",
        "log_p = (z - largest[:, None]).sub_(log_z[:, None])",
        "log_p = z - (largest + log_z)[:, None]",
        "tests/kernels/test_linear_cross_entropy.py -k sure_of",
    ),
    Mutant(
        "cross-entropy: the largest logit swallows the log of the sum, gradient in PyTorch",
        "kernels/_linear_cross_entropy_chunks.py",
        "log_p = (z - top[:, None]) - log_sum[:, None]",
        "log_p = z - (top + log_sum)[:, None]",
        "tests/kernels/test_linear_cross_entropy.py -k sure_of",
    ),
    Mutant(
        "cross-entropy, fused: sum not rescaled",
        "kernels/_linear_cross_entropy_fused.py",
        "sum_e = sum_e * rescale + tl.sum(e, axis=1)",
        "sum_e = sum_e + tl.sum(e, axis=1)",
        'tests/kernels/test_linear_cross_entropy.py -k "fused and test_log_prob"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy, fused: parts' sums added as they are",
        "kernels/_linear_cross_entropy_fused.py",
        "sum_e = tl.sum(sums_e * rescale, axis=0)",
        "sum_e = tl.sum(sums_e, axis=0)",
        'tests/kernels/test_linear_cross_entropy.py -k "fused and test_log_prob"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy, fused: entropy: parts' sums added as they are",
        "kernels/_linear_cross_entropy_fused.py",
        "sum_ez = tl.sum((sums_ez + sums_e * shift) * rescale, axis=0)",
        "sum_ez = tl.sum(sums_ez * rescale, axis=0)",
        'tests/kernels/test_linear_cross_entropy.py -k "fused and test_log_prob"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy, fused: columns past the end count",
        "kernels/_linear_cross_entropy_fused.py",
        "        if V % BLOCK_N != 0:\n",
        "        if V % BLOCK_N == BLOCK_N:\n",
        'tests/kernels/test_linear_cross_entropy.py -k "fused and test_log_prob"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy, fused: the mean counts columns past the end",
        "kernels/_linear_cross_entropy_fused.py",
        "sum_z += tl.sum(tl.where((columns < V)[None, :], z, 0.0), axis=1)",
        "sum_z += tl.sum(z, axis=1)",
        'tests/kernels/test_linear_cross_entropy.py -k "fused and test_log_prob"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy, fused: the bias is forgotten in backward",
        "kernels/_linear_cross_entropy_fused.py",
        "            r += tl.load(bias_ptr + at_column).to(tl.float32)\n",
        "            r += 0.0\n",
        'tests/kernels/test_linear_cross_entropy.py -k "fused and test_log_prob"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy, fused: a total of the last tile only",
        "kernels/_linear_cross_entropy_fused.py",
        "tl.load(to, mask=mask, other=0.0) + more",
        "more",
        'tests/kernels/test_linear_cross_entropy.py -k "fused and test_log_prob"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy, fused: a total of one part only",
        "kernels/_linear_cross_entropy_fused.py",
        "total[0] if parts == 1 else total.sum(0)",
        "total[0]",
        'tests/kernels/test_linear_cross_entropy.py -k "fused and test_log_prob"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy, fused: tiles of the last group are mixed up",
        "kernels/_linear_cross_entropy_fused.py",
        "side = tl.minimum(tiles - first, GROUP)",
        "side = GROUP",
        'tests/kernels/test_linear_cross_entropy.py -k "fused and test_log_prob"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy, fused: an ignored token's gradient",
        "kernels/_linear_cross_entropy_fused.py",
        "(column < V) & (label != -1), dr",
        "(column < V), dr",
        "tests/kernels/test_linear_cross_entropy.py::test_ignored_tokens_poison_nothing[fused-True-False]",
        interpret=True,
    ),
    Mutant(
        "cross-entropy, fused: an ignored token's hidden state",
        "kernels/_linear_cross_entropy_fused.py",
        "walked = (other < others) & (tl.load(labels_ptr + other_at) != -1)",
        "walked = other < others",
        "tests/kernels/test_linear_cross_entropy.py::test_ignored_tokens_poison_nothing[fused-False-False]",
        interpret=True,
    ),
    Mutant(
        "cross-entropy, fused: ignore_index is always -100 in backward",
        "kernels/_linear_cross_entropy_fused.py",
        "masked_fill(labels == ignore_index, -1)",
        "masked_fill(labels == -100, -1)",
        'tests/kernels/test_linear_cross_entropy.py -k "fused and gradients_of_lse"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy, fused: a unit gradient that nobody computes",
        "kernels/linear_cross_entropy.py",
        ' and maths.way == "chunks"\n',
        "\n",
        'tests/kernels/test_linear_cross_entropy.py -k "fused and gradcheck"',
    ),
    Mutant(
        "cross-entropy, fused: the largest logit swallows the log of the sum, value",
        "kernels/_linear_cross_entropy_fused.py",
        "score = (z_label - base) - log_sum",
        "score = z_label - lse",
        'tests/kernels/test_linear_cross_entropy.py -k "fused and sure_of"',
        interpret=True,
    ),
    Mutant(
        "cross-entropy, filtered: a NaN is small",
        "kernels/_linear_cross_entropy_fused.py",
        "small = tl.where(tl.abs(dr) <= tl.load(least_ptr + token), 0, 1)",
        "small = tl.where(tl.abs(dr) > tl.load(least_ptr + token), 1, 0)",
        "tests/kernels/test_linear_cross_entropy.py -k keeps_a_nan",
        interpret=True,
    ),
    Mutant(
        "cross-entropy, filtered: a tile with something small is dropped",
        "kernels/_linear_cross_entropy_fused.py",
        "counted = tl.max(tl.max(small, axis=1), axis=0)",
        "counted = tl.min(tl.min(small, axis=1), axis=0)",
        "tests/kernels/test_linear_cross_entropy.py -k leaves_out",
        interpret=True,
    ),
    Mutant(
        "cross-entropy, filtered: the threshold is the rounding itself",
        "kernels/_linear_cross_entropy_call.py",
        "torch.finfo(maths.dtype).eps / 32",
        "torch.finfo(maths.dtype).eps",
        "tests/kernels/test_linear_cross_entropy.py -k leaves_out",
        interpret=True,
    ),
    Mutant(
        "cross-entropy, filtered: nothing is",
        "kernels/_linear_cross_entropy_fused.py",
        "FILTERED=least is not None",
        "FILTERED=False",
        "tests/kernels/test_linear_cross_entropy.py -k leaves_out",
        interpret=True,
    ),
    Mutant(
        "cross-entropy, filtered: smoothing is dropped silently",
        "kernels/linear_cross_entropy.py",
        'if options.get("label_smoothing") or options',
        "if options",
        "tests/kernels/test_linear_cross_entropy.py -k refuses_what",
    ),
    Mutant(
        "cross-entropy: a gradient that is a little small at every step",
        "kernels/_linear_cross_entropy_chunks.py",
        "    dr *= maths.logit_scale / maths.temperature\n",
        "    dr *= maths.logit_scale / maths.temperature * 0.9995\n",
        "tests/kernels/test_linear_cross_entropy.py -k not_biased",
    ),
    *(
        Mutant(
            f"cross-entropy, a trained head: {name}",
            f"kernels/{file}.py",
            old,
            new,
            f"tests/kernels/test_linear_cross_entropy.py -k '{test}'",
        )
        for name, file, old, new, test in (
            (
                "all logits at a time",
                "_linear_cross_entropy_chunks",
                "power = min(power, half if half <= rows else math.ceil(half / rows) * rows)",
                "pass",
                "all_logits_never",
            ),
            (
                "a mean's share of the weight's gradient is forgotten in the second chunk",
                "_linear_cross_entropy_chunks",
                "beta=products.beta_for(total), alpha=alpha)",
                "beta=products.beta_for(total))",
                "keeps",
            ),
            (
                "a mean's share of the weight's gradient, summed up in fp32, is forgotten",
                "_linear_cross_entropy_chunks",
                "            elif alpha == 1 or (part is self.weight and self.narrow):\n",
                "            elif part is self.weight:\n",
                "keeps",
            ),
            (
                "a mean's share of the hidden states' gradient is forgotten",
                "_linear_cross_entropy_chunks",
                "products.mm_into(gradient[at], alpha, logits, self.weight)",
                "products.mm_into(gradient[at], 1, logits, self.weight)",
                "keeps",
            ),
            (
                "a mean's share is said to be there where nobody knew it",
                "linear_cross_entropy",
                "torch.ones_like(left) if known else",
                "torch.ones_like(left) if True else",
                "keeps",
            ),
            (
                "what the backward still has to multiply by is left out",
                "linear_cross_entropy",
                "g = g * left.reshape(()) if ctx.mean else -g",
                "g = g if ctx.mean else -g",
                "one_pass_under_a_sum",
            ),
            (
                "a mean's share is rounded into fp16",
                "linear_cross_entropy",
                " and maths.dtype != torch.float16",
                "",
                "keeps",
            ),
            (
                "a large chunk is multiplied as one",
                "_linear_cross_entropy_chunks",
                "return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]",
                "return [slice(0, rows)]",
                "pieces",
            ),
            (
                "a piece in the place of another",
                "_linear_cross_entropy_chunks",
                "products.mm_into(gradient[at], alpha, logits, self.weight)",
                "products.mm_into(gradient[at], alpha, chunk.logits[: len(logits)], self.weight)",
                "in_pieces",
            ),
            (
                "two chunks are summed up in fp32",
                "_linear_cross_entropy_chunks",
                "self.narrow = len(head.chunks) <= 2 and",
                "self.narrow = len(head.chunks) <= 1 and",
                "two_chunks_need",
            ),
            (
                "many chunks are summed up in bf16",
                "_linear_cross_entropy_chunks",
                "self.narrow = len(head.chunks) <= 2 and",
                "self.narrow =",
                "two_chunks_need",
            ),
            (
                "the second chunk's product in the first one's place",
                "_linear_cross_entropy_chunks",
                "            elif self.weight is None:\n",
                "            elif True:\n",
                "one_pass_under_a_sum",
            ),
            (
                "g of ignored tokens",
                "linear_cross_entropy",
                "g = grad_score.masked_fill(labels == ctx.maths.ignore_index, 0)",
                "g = grad_score + 0",
                "may_be_anything",
            ),
        )
    ),
    *(
        Mutant(f"cross-entropy: {name}", f"kernels/{file}.py", old, new, tests, True)
        for name, file, old, new, tests in (
            (
                "a graph that is kept is written to",
                "linear_cross_entropy",
                "last = not compat().graph_is_retained() and",
                "last =",
                "tests/kernels/test_linear_cross_entropy.py -k gradients_again",
            ),
            (
                "units are scaled in their place by several gradients",
                "linear_cross_entropy",
                " and compat().has_storage(g)",
                "",
                "tests/kernels/test_linear_cross_entropy.py -k batched_gradients",
            ),
            (
                "what cannot be scaled in its place is tried again each time",
                "linear_cross_entropy",
                '    if failed("linear_log_prob_scale"):\n',
                "    if False:\n",
                "tests/kernels/test_linear_cross_entropy.py -k cannot_be_scaled",
            ),
            (
                "units are scaled in one step of several",
                "_linear_cross_entropy_triton",
                "for block in range(first, blocks, programs):",
                "for block in range(first, programs, programs):",
                "tests/kernels/test_linear_cross_entropy.py -k in_their_place",
            ),
            (
                "units are scaled by another row's gradient",
                "_linear_cross_entropy_triton",
                "    g = tl.load(g_ptr + row)\n",
                "    g = tl.load(g_ptr)\n",
                "tests/kernels/test_linear_cross_entropy.py -k test_scaled_units",
            ),
            (
                "units that are multiplied by 1 are not written where they were asked for",
                "_linear_cross_entropy_triton",
                "    if (g != 1.0) | (not IN_PLACE):",
                "    if g != 1.0:",
                "tests/kernels/test_linear_cross_entropy.py -k test_scaled_units",
            ),
            (
                "units that are multiplied by 1 are written",
                "_linear_cross_entropy_triton",
                "    if (g != 1.0) | (not IN_PLACE):",
                "    if True:",
                "tests/kernels/test_linear_cross_entropy.py -k in_their_place",
            ),
        )
    ),
    Mutant(
        "cross-entropy: views are made after the wait",
        "kernels/_linear_cross_entropy_chunks.py",
        "torch.mm(states.to(self.dtype), self.turned,",
        "torch.mm(states.to(self.dtype), self.weight.t(),",
        "tests/kernels/test_linear_cross_entropy.py -k follows_the_wait",
    ),
    Mutant(
        "cross-entropy: all labels count",
        "kernels/_linear_cross_entropy_call.py",
        "        self.all = self.number == self.counts.shape[0]\n",
        "        self.all = True\n",
        "tests/kernels/test_linear_cross_entropy.py -k copied_where",
    ),
    Mutant(
        "cross-entropy, fused: ignored tokens are computed too",
        "kernels/linear_cross_entropy.py",
        "_prepared(hidden[keep], weight, bias, labels[keep], maths, wanted)(True, alpha)\n",
        "_prepared(hidden, weight, bias, labels, maths, wanted)(True, alpha)\n"
        "        found = [x[keep] if len(x) else x for x in found]\n",
        "tests/kernels/test_linear_cross_entropy.py -k left_out_of_every_gemm",
    ),
)
