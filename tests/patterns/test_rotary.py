"""Rotary rules: transformers' own functions are replaced, q and k together; look-alikes are not touched."""

from __future__ import annotations

import importlib

import pytest
import torch

from fastft.kernels.rotary import rotary
from tests.patterns._sites import check_site, rewritten

pytest.importorskip("transformers")
B, S, D = 2, 5, 16


def hf(family, name="apply_rotary_pos_emb"):
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)


LLAMA, ROTATE_HALF = hf("llama"), hf("llama", "rotate_half")


def qk(dtype=torch.float32, seq_first=False, dim=D):
    shape = (lambda n: (B, S, n, dim)) if seq_first else (lambda n: (B, n, S, dim))
    return [torch.randn(shape(n), dtype=dtype, requires_grad=True) for n in (4, 2)]


def angles(width, layout="halves", batch=B):
    """cos and sin as the family's own embedding makes them: each angle twice, by halves or by neighbours, or once."""
    angle = torch.randn(batch, S, width if layout == "once" else width // 2)
    if layout == "halves":
        angle = torch.cat((angle, angle), dim=-1)
    elif layout == "neighbours":
        angle = angle.repeat_interleave(2, dim=-1)
    return angle.cos(), angle.sin()


#: family → its function, the width of its tables, their layout.
FAMILIES = {
    "llama": (hf("llama"), D, "halves"),
    "phi3": (hf("phi3"), 12, "halves"),
    "phi3, whole head": (hf("phi3"), D, "halves"),
    "gpt_neox": (hf("gpt_neox"), D, "halves"),
    "gpt_oss": (hf("gpt_oss"), D // 2, "once"),
    "deepseek_v3": (hf("deepseek_v3", "apply_rotary_pos_emb_interleave"), D, "halves"),
    "cohere": (hf("cohere"), D, "neighbours"),
    "glm": (hf("glm"), 12, "halves"),
}


def launches(graph):
    return [n for n in graph.graph.nodes if n.target is rotary]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, B])
def test_families(family, batch):
    fn, width, layout = FAMILIES[family]
    graph = check_site(fn, *qk(), *angles(width, layout, batch), counts={"rotary": 1})
    assert len(launches(graph)) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_bf16(family):
    fn, width, layout = FAMILIES[family]
    cos, sin = (t.bfloat16() for t in angles(width, layout))
    check_site(fn, *qk(torch.bfloat16), cos, sin, counts={"rotary": 1})


def test_half_precision_heads_and_fp32_tables():
    """Under autocast q and k are bf16 and the tables fp32: the result is fp32, as promotion makes it."""
    check_site(hf("llama"), *qk(torch.bfloat16), *angles(D), counts={"rotary": 1})


def test_each_tensor_with_a_copy_of_the_same_tables():
    """GPT-J turns k and q apart, and repeats the tables for each."""
    fn = hf("gptj")

    def both(q, k, cos, sin):
        return fn(k, sin, cos), fn(q, sin, cos)

    graph = check_site(both, *qk(seq_first=True), *angles(D // 2, "once"), counts={"rotary": 1})
    assert len(launches(graph)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_complex(dtype):
    fn = hf("llama4", "apply_rotary_emb")
    polar = torch.polar(torch.ones(B, S, D // 2), torch.randn(B, S, D // 2))
    graph = check_site(fn, *qk(dtype, seq_first=True), polar, counts={"rotary": 1})
    assert len(launches(graph)) == 1


def test_heads_after_the_sequence():
    """``unsqueeze_dim=2``: q and k as [batch, seq, heads, D]."""

    def fn(q, k, cos, sin):
        return LLAMA(q, k, cos, sin, unsqueeze_dim=2)

    check_site(fn, *qk(seq_first=True), *angles(D), counts={"rotary": 1})


def test_layers_are_not_paired_with_each_other():
    """Two layers share their tables; q of the second depends on k of the first."""

    def layers(q, k, cos, sin):
        for _ in range(2):
            q, k = LLAMA(q, k, cos, sin)
            q, k = q + k.mean(1, keepdim=True), k + q.mean(1, keepdim=True)
        return q, k

    graph = check_site(layers, *qk(), *angles(D), counts={"rotary": 2})
    assert len(launches(graph)) == 2


def test_one_tensor_with_its_own_tables():
    """k turned by other tables than q: two launches."""

    def turned(x, cos, sin):
        return x * cos.unsqueeze(1) + ROTATE_HALF(x) * sin.unsqueeze(1)

    def apart(q, k, cos, sin, other_cos, other_sin):
        return turned(q, cos, sin), turned(k, other_cos, other_sin)

    tables, others = angles(D), [t.flip(1) for t in angles(D)]
    graph = check_site(apart, *qk(), *tables, *others, counts={"rotary": 2})
    assert len(launches(graph)) == 2


def test_result_used_between_q_and_k():
    """q's result is needed before k is turned: they cannot share a launch, and each has its own."""

    def chained(q, k, cos, sin):
        c, s = cos.unsqueeze(1), sin.unsqueeze(1)

        q = q * c + ROTATE_HALF(q) * s
        k = k + q.mean()
        return q, k * c + ROTATE_HALF(k) * s

    graph = check_site(chained, *qk(), *angles(D), counts={"rotary": 2})
    assert len(launches(graph)) == 2


LOOK_ALIKES = {
    "the other sign": lambda x, c, s: x * c + torch.cat((x[..., 8:], -x[..., :8]), dim=-1) * s,
    "quarters": lambda x, c, s: x * c + torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * s,
    "a difference": lambda x, c, s: x * c - torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * s,
    "another tensor": lambda x, c, s: x * c + torch.cat((-(x + 1)[..., 8:], (x + 1)[..., :8]), dim=-1) * s,
    "swapped tables": lambda x, c, s: torch.cat(
        (x[..., :8] * c[..., :8] - x[..., 8:] * s[..., :8], x[..., 8:] * s[..., :8] + x[..., :8] * c[..., :8]), dim=-1
    ),
    "another axis": lambda x, c, s: x * c + torch.cat((-x[:, 2:], x[:, :2]), dim=1) * s,
}


@pytest.mark.parametrize("spelling", LOOK_ALIKES)
def test_look_alikes_are_left(spelling):
    x, (cos, sin) = torch.randn(B, 4, S, D), (t[:, None] for t in angles(D))
    result, report, _ = rewritten(LOOK_ALIKES[spelling], x, cos, sin)
    assert not report.counts, str(report)
    assert torch.equal(result, LOOK_ALIKES[spelling](x, cos, sin))


def test_tables_that_learn_are_left_with_a_reason():
    cos, sin = (t.requires_grad_() for t in angles(D))
    _, report, _ = rewritten(hf("llama"), *qk(), cos, sin)
    assert not report.counts
    assert any("requires a gradient" in s.reason for s in report.missed), str(report)


@pytest.mark.parametrize("style", ["half", "apart"])
def test_tables_of_each_head_are_left(style):
    """``[heads, seq, D]`` is broadcast over the batch, also where there are as many sequences as heads."""

    def half(q, cos, sin):
        return q * cos + ROTATE_HALF(q) * sin

    def apart(q, cos, sin):
        first, second = q.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    q, angle = torch.randn(B, B, S, D), torch.randn(B, S, D if style == "half" else D // 2)
    fn = half if style == "half" else apart
    result, report, _ = rewritten(fn, q, angle.cos(), angle.sin())
    assert not report.counts, str(report)
    assert torch.equal(result, fn(q, angle.cos(), angle.sin()))
