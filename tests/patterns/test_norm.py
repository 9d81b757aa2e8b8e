"""Norm rules: every spelling is replaced and computes the same; look-alikes are not touched."""

from __future__ import annotations

import pytest
import torch

from tests.patterns._sites import check_site, rewritten

EPS = 1e-6


def normalised(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


#: The orderings of RMSNorm, as functions of x, a weight and x's dtype.
RMS_NORMS = {
    "cast, then weight (Llama)": lambda x, w: w * normalised(x.to(torch.float32)).to(x.dtype),
    "weight, then cast (gpt-oss)": lambda x, w: (w * normalised(x.to(torch.float32))).to(x.dtype),
    "1 + weight (Gemma)": lambda x, w: (normalised(x.float()) * (1.0 + w.float())).type_as(x),
    "weight + 1": lambda x, w: (normalised(x.float()) * (w.float() + 1)).type_as(x),
    "swapped (Llama 4)": lambda x, w: normalised(x.float()).type_as(x) * w,
    "square and sqrt": lambda x, w: (x.float() / torch.sqrt(x.float().square().mean(-1, True) + EPS)).to(x.dtype) * w,
    "power of -1/2 (Gemma 3n)": lambda x, w: (
        (x.float() * torch.pow(x.float().pow(2).mean(-1, keepdim=True) + EPS, -0.5)).type_as(x) * w
    ),
    "torch.mean": lambda x, w: w * (x * torch.rsqrt(EPS + torch.mean(torch.square(x), dim=[-1], keepdim=True))),
    "x * x": lambda x, w: w * (x * torch.rsqrt((x.float() * x.float()).mean(-1, keepdim=True) + EPS)).to(x.dtype),
    "nn.RMSNorm": lambda x, w: torch.nn.functional.rms_norm(x, (16,), w, EPS),
    "nn.RMSNorm, default eps": lambda x, w: torch.nn.functional.rms_norm(x, (16,), w),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", RMS_NORMS)
def test_rms_norm(spelling, dtype):
    x = torch.randn(2, 3, 16, dtype=dtype, requires_grad=True)
    w = torch.randn(16, dtype=dtype, requires_grad=True)
    check_site(RMS_NORMS[spelling], x, w, counts={"rms_norm": 1})


@pytest.mark.parametrize("spelling", ["cast, then weight (Llama)", "weight, then cast (gpt-oss)"])
def test_weight_in_another_dtype(spelling):
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(16, requires_grad=True)
    check_site(RMS_NORMS[spelling], x, w, counts={"rms_norm": 1})


def test_without_weight():
    x = torch.randn(2, 3, 4, 16, dtype=torch.bfloat16, requires_grad=True)
    check_site(lambda x: normalised(x.float()).type_as(x), x, counts={"rms_norm": 1})


def test_heads_of_a_projection():
    """q_norm: the norm is over heads, and its result is transposed afterwards."""
    w = torch.randn(8, requires_grad=True)

    def q_norm(x, w):
        return RMS_NORMS["cast, then weight (Llama)"](x.view(2, 3, 2, 8), w).transpose(1, 2)

    check_site(q_norm, torch.randn(2, 3, 16, requires_grad=True), w, counts={"rms_norm": 1})


def test_reads_the_tensor_before_its_upcast():
    x = torch.randn(2, 3, 16, dtype=torch.bfloat16)
    graph = check_site(RMS_NORMS["cast, then weight (Llama)"], x, torch.ones(16).bfloat16(), counts={"rms_norm": 1})
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "placeholder", "call_function", "output"]


@pytest.mark.parametrize("spelling", ["1 + weight (Gemma)", "weight + 1"])
def test_one_plus_weight_is_added_in_the_kernel(spelling):
    """No vector of 1 + w is made: the op reads the parameter itself."""
    x, w = torch.randn(2, 3, 16, dtype=torch.bfloat16), torch.randn(16, dtype=torch.bfloat16, requires_grad=True)
    graph = check_site(RMS_NORMS[spelling], x, w, counts={"rms_norm": 1})
    (site,) = (n for n in graph.graph.nodes if n.op == "call_function")
    assert site.args[1].op == "placeholder" and site.args[3] == 1.0


def test_a_product_with_another_vector_is_not_a_weight():
    """``x̂ · v`` with v of one element: the weightless norm is replaced, the product stays."""
    x, v = torch.randn(2, 3, 16, requires_grad=True), torch.randn(1, requires_grad=True)
    check_site(lambda x, v: normalised(x) * v, x, v, counts={"rms_norm": 1})


LAYER_NORMS = {
    "nn.LayerNorm": lambda x, w: torch.nn.functional.layer_norm(x, (16,), w, w, 1e-5),
    "no bias": lambda x, w: torch.nn.functional.layer_norm(x, (16,), w, None, 1e-5),
    "no weight": lambda x, w: torch.nn.functional.layer_norm(x, (16,)) * w,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spelling", LAYER_NORMS)
def test_layer_norm(spelling, dtype):
    x = torch.randn(2, 3, 16, dtype=dtype, requires_grad=True)
    w = torch.randn(16, dtype=dtype, requires_grad=True)
    check_site(LAYER_NORMS[spelling], x, w, counts={"layer_norm": 1})


def test_layer_norm_written_out():
    """Cohere's spelling."""

    def norm(x, w):
        h = x.to(torch.float32)
        mean = h.mean(-1, keepdim=True)
        variance = (h - mean).pow(2).mean(-1, keepdim=True)
        return (w.to(torch.float32) * ((h - mean) * torch.rsqrt(variance + 1e-5))).to(x.dtype)

    x = torch.randn(2, 3, 16, dtype=torch.bfloat16, requires_grad=True)
    w = torch.randn(16, dtype=torch.bfloat16, requires_grad=True)
    check_site(norm, x, w, counts={"layer_norm": 1})


def test_layer_norm_over_two_axes_is_left_with_a_reason():
    x = torch.randn(2, 3, 16)
    result, report, _ = rewritten(lambda x: torch.nn.functional.layer_norm(x, (3, 16)), x)
    assert torch.equal(result, torch.nn.functional.layer_norm(x, (3, 16)))
    assert [s.reason for s in report.missed] and "last axis alone" in report.missed[0].reason


def escaping(x, w):
    root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return w * (x * root), root


LOOK_ALIKES = {
    "another axis": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + EPS)),
    "a sum": lambda x, w: w * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS)),
    "another tensor's moment": lambda x, w: w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + EPS)),
    "a cube": lambda x, w: w * (x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + EPS)),
    "an intermediate escapes": escaping,
}


@pytest.mark.parametrize("spelling", LOOK_ALIKES)
def test_look_alikes_are_left(spelling):
    x, w = torch.randn(2, 3, 16), torch.randn(16)
    result, report, _ = rewritten(LOOK_ALIKES[spelling], x, w)
    assert not report.counts, str(report)
    expected = LOOK_ALIKES[spelling](x, w)
    ours, theirs = (r if isinstance(r, tuple) else (r,) for r in (result, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_is_left_is_in_the_report():
    _, report, _ = rewritten(escaping, torch.randn(2, 3, 16), torch.randn(16))
    assert [s.pattern for s in report.missed] == ["rms_norm"], "one site, one row"
    assert "also used" in report.missed[0].reason


@pytest.mark.parametrize("trained", [False, True])
def test_a_norm_whose_gradient_is_cut_is_left(trained):
    """x̂ under ``no_grad``; with a frozen weight the result requires no gradient at all."""

    def fn(x, w):
        with torch.no_grad():
            x_hat = normalised(x)
        return w * x_hat

    result, report, _ = rewritten(fn, torch.randn(2, 16, requires_grad=True), torch.ones(16, requires_grad=trained))
    assert not report.counts and report.missed[0].reason.startswith("no_grad:")
    assert result.requires_grad == trained
