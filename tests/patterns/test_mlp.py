"""Gated MLP rules: both operand orders, separate and fused projections, every activation; look-alikes are not
touched."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fastft.kernels.glu import glu, glu_packed
from tests.patterns._sites import check_site, rewritten


def written_gelu(g):
    return 0.5 * g * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (g + 0.044715 * torch.pow(g, 3.0))))


ACTIVATIONS = {
    "silu": F.silu,
    "nn.SiLU": torch.nn.SiLU(),
    "silu written out": lambda g: g * torch.sigmoid(g),
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "nn.GELU": torch.nn.GELU(approximate="tanh"),
    "gelu_new": written_gelu,
}
ORDERS = {"act(gate) * up": lambda f, g, u: f(g) * u, "up * act(gate)": lambda f, g, u: u * f(g)}


def weights(*shapes, dtype=torch.float32):
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_two_projections(order, activation, dtype):
    def mlp(x, w_gate, w_up):
        return ORDERS[order](ACTIVATIONS[activation], F.linear(x, w_gate), F.linear(x, w_up))

    x, w_gate, w_up = weights((2, 3, 8), (12, 8), (12, 8), dtype=dtype)
    graph = check_site(mlp, x, w_gate, w_up, counts={"mlp": 1})
    assert glu in {n.target for n in graph.graph.nodes}


def chunked(h):
    return h.chunk(2, dim=-1)


SPLITS = {
    "chunk": chunked,
    "torch.chunk": lambda h: torch.chunk(h, 2, 2),
    "split": lambda h: h.split(12, dim=-1),
    "split in a list": lambda h: torch.split(h, [12, 12], dim=-1),
    "slices": lambda h: (h[..., :12], h[..., 12:]),
    "slices by axis": lambda h: (h[:, :, :12], h[:, :, 12:24]),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("split", SPLITS)
def test_one_projection(split, gate_first, order):
    def mlp(x, w):
        first, second = SPLITS[split](F.linear(x, w))
        return ORDERS[order](F.silu, *((first, second) if gate_first else (second, first)))

    graph = check_site(mlp, *weights((2, 3, 8), (24, 8)), counts={"mlp": 1})
    assert glu_packed in {n.target for n in graph.graph.nodes}


OTHER_PARTS = {
    "thirds": lambda h: torch.chunk(h, 3, dim=-1)[:2],
    "uneven slices": lambda h: (h[..., 2:12], h[..., 12:22]),
    "every second": lambda h: (h[..., 0::2], h[..., 1::2]),
    "halves of the rows": lambda h: torch.chunk(h, 2, dim=1),
    "one half twice": lambda h: (chunked(h)[0], chunked(h)[0]),
}


@pytest.mark.parametrize("parts", OTHER_PARTS)
def test_other_parts_are_read_where_they_are(parts):
    def mlp(h):
        g, u = OTHER_PARTS[parts](h)
        return F.silu(g) * u

    graph = check_site(mlp, *weights((2, 4, 24)), counts={"mlp": 1})
    assert glu in {n.target for n in graph.graph.nodes}


LOOK_ALIKES = {
    "a scalar": lambda g, u: F.silu(g) * 2.0,
    "a row": lambda g, u: F.silu(g) * u[:1, :1],
    "relu": lambda g, u: F.relu(g) * u,
    "a sum": lambda g, u: F.silu(g) + u,
    "in place": lambda g, u: F.silu(g).mul_(u),
}


@pytest.mark.parametrize("spelling", LOOK_ALIKES)
def test_look_alikes_are_left(spelling):
    g, u = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    result, report, _ = rewritten(LOOK_ALIKES[spelling], g, u)
    assert not report.counts, str(report)
    assert torch.equal(result, LOOK_ALIKES[spelling](g, u))


def test_an_activation_that_is_used_twice_is_left_with_a_reason():
    def twice(g, u):
        a = F.silu(g)
        return a * u, a

    _, report, _ = rewritten(twice, torch.randn(2, 8), torch.randn(2, 8))
    assert not report.counts
    assert any(s.pattern == "mlp" and "also used" in s.reason for s in report.missed), str(report)


def test_mixed_dtypes_are_left_with_a_reason():
    _, report, _ = rewritten(lambda g, u: F.silu(g) * u, torch.randn(2, 8).bfloat16(), torch.randn(2, 8))
    assert not report.counts
    assert any(s.pattern == "mlp" and "dtype" in s.reason for s in report.missed), str(report)
