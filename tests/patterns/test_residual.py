"""A linear layer and the residual stream it is added to are one product; anything else that is added is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fastft
from fastft.autotune import variants
from fastft.kernels.lora_linear import lora_linear
from tests.autotune import _mine
from tests.patterns._sites import check_site, rewritten


def leaves(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(size, generator=generator) * 0.3).to(dtype).requires_grad_() for size in sizes]


X, W, Z = (2, 5, 16), (8, 16), (2, 5, 8)


def count(graph: torch.fx.GraphModule) -> int:
    return sum(n.target is lora_linear for n in graph.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ["stream first", "layer first"])
def test_either_order(order: str, dtype: torch.dtype) -> None:
    def block(x, w, z):
        y = F.linear(x.sin(), w)
        return (z + y if order == "stream first" else y + z).cos()

    graph = check_site(block, *leaves(X, W, Z, dtype=dtype), counts={"residual": 1})
    assert count(graph) == 1


@pytest.mark.parametrize("weight", ["dense", "nf4"])
def test_a_layer_by_another_variant(weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the residual stream up as the op does."""
    monkeypatch.setattr(variants, "_USERS", {})
    fastft.variants.register("lora_linear", "mine")(_mine.lora_linear)
    w, z = (t.detach() for t in leaves((64, 64), (2, 5, 64)))
    x = torch.linspace(-1, 2, 640).view(2, 5, 64)
    if weight == "nf4":
        functional = pytest.importorskip("bitsandbytes.functional")
        w, state = functional.quantize_4bit(w, quant_type="nf4")

    def block(x, w, z):
        dense = functional.dequantize_4bit(w, state) if weight == "nf4" else w
        return z + F.linear(x.sin(), dense)

    result, report, graph = rewritten(block, x, w, z, variants={"lora_linear": "mine"})
    assert report.counts == {"residual": 1, **({"nf4": 1} if weight == "nf4" else {})}, str(report)
    assert not report.missed, str(report)
    (node,) = (n for n in graph.graph.nodes if n.target is _mine.lora_linear)
    assert node.kwargs["residual"] is not None
    torch.testing.assert_close(result, block(x, w, z))


def test_one_rounding() -> None:
    """The sum is exact until it is rounded to bf16, where eager rounds the layer's result first."""
    x, w, z = (t.detach() for t in leaves((64, 16), (8, 16), (64, 8), dtype=torch.bfloat16))
    result, report, _ = rewritten(lambda x, w, z: z + F.linear(x, w), x, w, z)
    assert report.counts == {"residual": 1}
    exact = z.double() + F.linear(x.double(), w.double())
    assert torch.equal(result, exact.to(torch.bfloat16))
    assert not torch.equal(z + F.linear(x, w), exact.to(torch.bfloat16))


def test_a_stream_through_several_layers() -> None:
    """The stream goes on to be read by others; each layer adds to what the one before it gave."""

    def blocks(x, w1, w2, w3):
        x = x + F.linear(x.sin(), w1)
        x = x + F.linear(F.silu(x), w2)
        return x + F.linear(x.cos(), w3)

    sizes = (16, 16)
    check_site(blocks, *leaves(X, sizes, sizes, sizes), counts={"residual": 3})


def test_parallel_layers() -> None:
    """Of two layers that are added, one takes the other's result up."""

    def block(x, w, v, z):
        return z + F.linear(x.sin(), w) + F.linear(x.cos(), v)

    check_site(block, *leaves(X, W, W, Z), counts={"residual": 2})

    def two(x, w, v):
        return F.linear(x.sin(), w) + F.linear(x.cos(), v)

    check_site(two, *leaves(X, W, W), counts={"residual": 1})


def test_through_dropout_that_is_off() -> None:
    """Phi's residual dropout, at p = 0 or in evaluation."""

    def block(x, w, z):
        return z + F.dropout(F.linear(x.sin(), w), 0.0)

    check_site(block, *leaves(X, W, Z), counts={"residual": 1})
    assert left(lambda x, w, z: z + F.dropout(F.linear(x, w), 0.1), *leaves(X, W, Z)) == []


def test_nf4() -> None:
    functional, bnb = pytest.importorskip("bitsandbytes.functional"), pytest.importorskip("bitsandbytes")
    x, z = leaves((2, 5, 64), (2, 5, 16))
    weight = leaves((16, 64))[0].detach()
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)

    def block(x, z):
        return z + bnb.matmul_4bit(x.sin(), packed.t(), quant_state=state)

    weight = functional.dequantize_4bit(packed, state).double()

    def exact(x, z):
        return z + F.linear(x.sin(), weight)

    graph = check_site(block, x, z, counts={"nf4": 1, "residual": 1}, exact=exact)
    assert count(graph) == 1


def left(fn: Any, *args: torch.Tensor) -> list[str]:
    """Reasons of a graph in which no sum is replaced."""
    _, report, _ = rewritten(fn, *args)
    assert "residual" not in report.counts
    return [site.reason for site in report.missed if site.pattern == "residual"]


def test_what_is_no_residual_stream() -> None:
    """A bias, an embedding of positions: what broadcasts is left alone. So is a layer that somebody else reads too."""
    x, w, z = leaves(X, W, Z)
    (bias, positions) = leaves((8,), (5, 8))
    assert left(lambda x, w, bias: F.linear(x, w) + bias, x, w, bias) == []
    assert left(lambda x, w, p: F.linear(x, w) + p, x, w, positions) == []
    assert left(lambda x, w: F.linear(x, w) + 1.0, x, w) == []
    assert left(lambda x, w, z: (z + (y := F.linear(x, w))) * y, x, w, z) == []
    assert left(lambda x, w: (y := F.linear(x, w)) + y, x, w) == []


def test_a_third_term_stays_outside() -> None:
    """With a bias or an adapter the sum takes two roundings in any case."""
    x, w, z, bias = leaves(X, W, Z, (8,))
    assert left(lambda x, w, z, bias: z + F.linear(x, w, bias), x, w, z, bias) == []
    a, b = leaves((3, 16), (8, 3))

    def adapted(x, w, z, a, b):
        return z + (F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0)

    check_site(adapted, x, w, z, a, b, counts={"lora": 1})


def test_another_dtype() -> None:
    x, w, z = leaves(X, W, Z)
    (reason,) = left(lambda x, w, z: z + F.linear(x, w), x.bfloat16(), w.bfloat16(), z)
    assert "torch.bfloat16 is added to torch.float32" in reason


def test_scaled_sum_is_left() -> None:
    """``torch.add(z, y, alpha=2)`` is another sum."""
    x, w, z = leaves(X, W, Z)
    assert left(lambda x, w, z: torch.add(z, F.linear(x, w), alpha=2.0), x, w, z) == []


def test_a_layer_that_is_recomputed_and_a_sum_that_is_not() -> None:
    def block(x, w):
        return F.linear(F.silu(x), w)

    def step(x, w, z):
        return (z + checkpoint(block, x, w, use_reentrant=False)).sin()

    (reason,) = left(step, *leaves(X, W, Z))
    assert "recomputed" in reason

    def whole(x, w, z):
        return z + F.linear(F.silu(x), w)

    check_site(
        lambda *args: checkpoint(whole, *args, use_reentrant=False).sin(), *leaves(X, W, Z), counts={"residual": 1}
    )
