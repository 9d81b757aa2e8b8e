"""A norm hands its input on to those who read it later, so that their gradients are added in its backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.autotune import database, variants
from fastft.kernels._op import OPS
from fastft.kernels.layer_norm import layer_norm
from fastft.kernels.rms_norm import rms_norm
from tests.autotune import _mine
from tests.patterns._sites import check_site, rewritten

X, W = (2, 5, 16), (16,)


def leaves(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (16,), w, 1e-6)


def passing(graph: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [n for n in graph.graph.nodes if n.target in (rms_norm, layer_norm) and n.kwargs.get("pass_through")]


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_a_block(kind: str) -> None:
    def block(x, w):
        y = norm(x, w) if kind == "rms_norm" else F.layer_norm(x, (16,), w, None, 1e-6)
        return x + y.sin()

    graph = check_site(block, *leaves(X, W), counts={kind: 1, "residual_norm": 1})
    (node,) = passing(graph)
    assert set(graph.graph.find_nodes(op="placeholder")[0].users) == {node}, "x is read through the norm alone"


@pytest.mark.parametrize("kind", ["rms_norm", "layer_norm"])
def test_a_norm_by_another_variant(kind: str) -> None:
    """It takes the same arguments as the op, and hands its input on too."""

    def block(x, w):
        y = norm(x, w) if kind == "rms_norm" else F.layer_norm(x, (16,), w, None, 1e-6)
        return x + y.sin()

    x, w = leaves(X, W)
    result, report, graph = rewritten(block, x, w, variants={kind: "reference"})
    assert report.counts == {kind: 1, "residual_norm": 1} and not report.missed, str(report)
    assert {s.notes for s in report.sites} == {"variant reference"}
    (node,) = (n for n in graph.graph.nodes if n.kwargs.get("pass_through"))
    assert node.target is fastft.variants.get(kind, "reference").call
    found = torch.autograd.grad(result.sum(), (x, w))
    torch.testing.assert_close(found, torch.autograd.grad(block(x, w).sum(), (x, w)))


@pytest.mark.parametrize("chosen", ["explicit", "tuned"])
@pytest.mark.parametrize("why", ["refused", "not done"])
def test_a_variant_that_does_not_hand_its_input_on(
    why: str, chosen: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It stays the norm's variant, and the report says what that cost."""
    monkeypatch.setattr(variants, "_USERS", {})
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path))
    legal = _mine.without_pass_through if why == "refused" else None
    fastft.variants.register("rms_norm", "mine", supported=legal)(_mine.bare_rms_norm)
    x, w = leaves(X, W)
    if chosen == "tuned":
        mine = fastft.variants.get("rms_norm", "mine")
        record = {"config": {}, "variant": "mine", "source": mine.source[:12], "us": 1.0, "heuristic_us": 2.0}
        monkeypatch.setattr(database, "device_kind", lambda device=None: "h100")
        _, key = variants.site_key(OPS["rms_norm"], (x, w, 1e-6), {})
        database.user_store().put(key, {**record, "noise": 0.0, "tried": 2, "failures": {}})
    database.forget()
    options = {"variants": {"rms_norm": "mine"}} if chosen == "explicit" else {}
    try:
        result, report, graph = rewritten(lambda x, w: x + norm(x, w).sin(), x, w, **options)
    finally:
        database.forget()
    assert report.counts == {"rms_norm": 1}, str(report)
    (missed,) = report.missed
    assert missed.pattern == "residual_norm"
    if why == "refused":
        assert missed.reason.startswith("variant: variant mine, which was chosen for ")
        assert missed.reason.endswith("does not do that: nothing is handed on")
    else:
        assert missed.reason.startswith("outputs: "), missed.reason
    assert [n.target for n in graph.graph.nodes if "rms_norm" in n.name] == [_mine.bare_rms_norm]
    torch.testing.assert_close(result, x + norm(x, w).sin())


def test_two_roundings_are_one() -> None:
    """dx in bf16: of the exact sum, where autograd adds what was rounded already."""
    x, w = leaves((64, 16), W, dtype=torch.bfloat16)

    def block(x, w):
        return norm(x, w), x * 1.0

    outputs, report, _ = rewritten(block, x, w)
    assert report.counts == {"rms_norm": 1, "residual_norm": 1}
    grads = [torch.randn_like(o) for o in outputs]
    (dx,) = torch.autograd.grad(outputs, x, grads)
    wide, w = x.detach().double().requires_grad_(), w.detach().double()
    (exact,) = torch.autograd.grad(block(wide, w), wide, [g.double() for g in grads])
    once = (exact.bfloat16().double() - exact).norm()
    assert (dx.double() - exact).norm() <= 1.02 * once


def test_layers_one_after_another() -> None:
    """The stream goes through all norms; the last one's stream ends there."""

    def layers(x, *weights):
        for w in weights:
            x = x + norm(x, w).sin()
        return norm(x, weights[0])

    check_site(layers, *leaves(X, W, W, W), counts={"rms_norm": 4, "residual_norm": 3})


def test_parallel_norms() -> None:
    """GPT-NeoX: two norms of one input. The first hands it to the second, which hands it on."""

    def block(x, w, v):
        first, second = norm(x, w), norm(x, v)
        return x + first.sin() + second.cos()

    graph = check_site(block, *leaves(X, W, W), counts={"rms_norm": 2, "residual_norm": 2})
    first, second = passing(graph)
    assert second.args[0].args[0] is first


def test_read_before_the_norm() -> None:
    """Who reads x earlier keeps on doing so: its gradient is added outside."""

    def block(x, w):
        early = x.exp()
        return early * norm(x, w) + x

    check_site(block, *leaves(X, W), counts={"rms_norm": 1, "residual_norm": 1})


def test_the_input_is_an_output_too() -> None:
    def block(x, w):
        x = x.sin()
        return norm(x, w), x

    check_site(block, *leaves(X, W), counts={"rms_norm": 1})

    def and_more(x, w):
        x = x.sin()
        return norm(x, w) + x, x

    check_site(and_more, *leaves(X, W), counts={"rms_norm": 1, "residual_norm": 1})


def left(fn: Any, *args: torch.Tensor) -> list[str]:
    """Reasons of a graph in which no norm hands its input on."""
    _, report, graph = rewritten(fn, *args)
    assert "residual_norm" not in report.counts and not passing(graph)
    return [site.reason for site in report.missed if site.pattern == "residual_norm"]


def test_no_gradient_comes_back() -> None:
    """A frozen input, or one that others read without a gradient."""
    x, w = leaves(X, W)
    assert left(lambda x, w: x + norm(x, w), x.detach(), w) == []
    assert left(lambda x, w: norm(x, w) * x.detach(), x, w) == []
    assert left(norm, x, w) == []


def test_a_norm_without_gradients() -> None:
    """What a norm under ``no_grad`` handed on would be cut off from x. Found by the graph fuzz."""

    def block(x, w):
        with torch.no_grad():
            y = norm(x, w)
        return x * 0.5 + y

    x, w = leaves(X, W)
    assert left(block, x, w) == []
    result, _, _ = rewritten(block, x, w)
    (dx,) = torch.autograd.grad(result.sum(), x)
    assert torch.equal(dx, torch.full_like(dx, 0.5))


def test_written_in_place() -> None:
    """A stream that is written to after the norm: a view of it would not do."""

    def block(x, w):
        x = x.sin()
        y = norm(x, w).sin()
        x.add_(1.0)
        return x + y

    x, w = leaves(X, W)
    _, report, graph = rewritten(block, x, w)
    assert "residual_norm" not in report.counts and not passing(graph)


def test_checkpointed_regions() -> None:
    """Handed on inside of a region that is recomputed, not out of it."""

    def block(x, w):
        return x + norm(x, w).sin()

    def whole(x, w):
        return checkpoint(block, x.sin(), w, use_reentrant=False).cos()

    check_site(whole, *leaves(X, W), counts={"rms_norm": 1, "residual_norm": 1})

    def out_of_it(x, w):
        x = x.sin()
        return checkpoint(norm, x, w, use_reentrant=False) + x

    (reason,) = left(out_of_it, *leaves(X, W))
    assert "checkpointed region" in reason
