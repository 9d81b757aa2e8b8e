"""Sums of the residual stream that a planned forward's norms compute: which ones, and the same numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import fastft
import fastft.kernels
from fastft import memory, sums
from fastft.planner import LEVELS
from tests.models import _families as families
from tests.models._training import compiled, step

fastft.kernels.load()
ops, aten = torch.ops.fastft, torch.ops.aten
LAYERS = 2


def run(network: torch.nn.Module, **options: Any) -> list[torch.Tensor]:
    ids = torch.randint(1, families.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    call = compiled(network, **{"memory": "fast", "lazy_logits": False, **options})
    loss, gradients = step(network, {"input_ids": ids, "labels": ids}, call=call)[:2]
    return [loss, *(gradients[name] for name in sorted(gradients))]


def said() -> str | None:
    return fastft.report().plan.get("sums")


@pytest.mark.parametrize("level", LEVELS)
def test_the_same_numbers_at_every_level(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sums a layer; what is offloaded leaves as it is made."""

    def instead(self: memory.Memory, cut: Any) -> Any:
        levels = [level] * cut.count
        return cut.at(levels).halves, self._plan(cut, levels)

    monkeypatch.setattr(memory.Memory, "_planned", instead)
    network = families.build("llama3", lora=0.0, checkpointing=True)
    found = run(network, host_memory="1GiB")
    assert said() == f"{2 * LAYERS} are computed by the norms that read them"
    monkeypatch.setattr(sums, "into_norms", lambda forward: 0)
    wanted = run(network, host_memory="1GiB")
    assert said() is None
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma2"])
def test_other_families(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = families.build(family, lora=0.0, checkpointing=True)
    found = run(network)
    assert said() is not None
    monkeypatch.setattr(sums, "into_norms", lambda forward: 0)
    assert all(map(torch.equal, found, run(network)))


def test_where_products_add_there_are_none() -> None:
    run(families.build("llama3", checkpointing=True))
    assert said() is None and fastft.report().counts["residual"] == 2 * LAYERS


# ------------------------------------------------------------------------------------------------- which sums, and why


def graph(make: Callable[..., Any], **dtypes: torch.dtype) -> fx.GraphModule:
    """``make(graph, x, y, w)``, of [2, 3, 8] and of [8], as it is behind a cut: results of ours are ``x`` and ``y``."""
    g, mode = fx.Graph(), FakeTensorMode()

    def value(node: fx.Node) -> Any:
        if node.op == "placeholder":
            return torch.empty((8,) if node.name == "w" else (2, 3, 8), dtype=dtypes.get(node.name, torch.float32))
        args = fx.map_arg(node.args, lambda n: n.meta["val"])
        return node.target(*args, **node.kwargs)  # type: ignore[operator]

    inputs = [g.placeholder(name) for name in "xyw"]
    g.output(make(g, *inputs))
    with mode:
        for node in g.nodes:
            if node.op != "output":
                node.meta["val"] = value(node)
    return fx.GraphModule({}, g)


def norm(g: fx.Graph, x: fx.Node, w: fx.Node) -> tuple[fx.Node, fx.Node]:
    both = g.call_function(ops.rms_norm.default, (x, w, 1e-6, 0.0, None))
    return tuple(g.call_function(operator.getitem, (both, i)) for i in range(2))  # type: ignore[return-value]


def plain(g: fx.Graph, x: fx.Node, y: fx.Node, w: fx.Node) -> Any:
    total = g.call_function(aten.add.Tensor, (x, y))
    return (*norm(g, total, w), total)


def read_later(g: fx.Graph, x: fx.Node, y: fx.Node, w: fx.Node) -> Any:
    total = g.call_function(aten.add.Tensor, (x, y))
    out = norm(g, total, w)
    return (*out, g.call_function(aten.mul.Tensor, (total, out[0])))


def behind_an_op_of_ours(g: fx.Graph, x: fx.Node, y: fx.Node, w: fx.Node) -> Any:
    made = g.call_function(ops.glu.default, (x, y, "silu"))
    return plain(g, x, g.call_function(aten.view.default, (made, [2, 3, 8])), w)


def two_in_a_row(g: fx.Graph, x: fx.Node, y: fx.Node, w: fx.Node) -> Any:
    out, _, total = plain(g, x, y, w)
    made = g.call_function(ops.glu.default, (out, out, "silu"))
    return plain(g, total, made, w)


def with_a_factor(g: fx.Graph, x: fx.Node, y: fx.Node, w: fx.Node) -> Any:
    total = g.call_function(aten.add.Tensor, (x, y), {"alpha": 2})
    return norm(g, total, w)


def of_a_number(g: fx.Graph, x: fx.Node, y: fx.Node, w: fx.Node) -> Any:
    return norm(g, g.call_function(aten.add.Tensor, (x, 1.0)), w)


def of_one_row(g: fx.Graph, x: fx.Node, y: fx.Node, w: fx.Node) -> Any:
    return norm(g, g.call_function(aten.add.Tensor, (x, w)), w)


def pointwise(g: fx.Graph, x: fx.Node, y: fx.Node, w: fx.Node) -> Any:
    return plain(g, x, g.call_function(aten.mul.Tensor, (y, 2.0)), w)


def read_before(g: fx.Graph, x: fx.Node, y: fx.Node, w: fx.Node) -> Any:
    total = g.call_function(aten.add.Tensor, (x, y))
    other = g.call_function(aten.mul.Tensor, (total, 2.0))
    return (*norm(g, total, w), other)


def read_before_by_another_norm(g: fx.Graph, x: fx.Node, y: fx.Node, w: fx.Node) -> Any:
    total = g.call_function(aten.add.Tensor, (x, y))
    other = g.call_function(aten.native_layer_norm.default, (total, [8], None, None, 1e-6))
    return (g.call_function(operator.getitem, (other, 0)), *norm(g, total, w))


def weight_that_is_computed(g: fx.Graph, x: fx.Node, y: fx.Node, w: fx.Node) -> Any:
    total = g.call_function(aten.add.Tensor, (x, y))
    return norm(g, total, g.call_function(aten.mul.Tensor, (w, 2.0)))


def other_layout(g: fx.Graph, x: fx.Node, y: fx.Node, w: fx.Node) -> Any:
    rows = (g.call_function(aten.slice.Tensor, (t, 1, 0, 1)) for t in (x, y))
    return plain(g, *(g.call_function(aten.expand.default, (row, [2, 3, 8])) for row in rows), w)


def results(module: fx.GraphModule, **dtypes: torch.dtype) -> list[torch.Tensor]:
    shapes = {"x": (2, 3, 8), "y": (2, 3, 8), "w": (8,)}
    torch.manual_seed(0)
    return list(module(*(torch.randn(s).to(dtypes.get(n, torch.float32)) for n, s in shapes.items())))


@pytest.mark.parametrize(
    "make, number",
    [(plain, 1), (read_later, 1), (behind_an_op_of_ours, 1), (two_in_a_row, 2)]
    + [(make, 0) for make in (with_a_factor, of_a_number, of_one_row, pointwise, read_before, other_layout)]
    + [(weight_that_is_computed, 0), (read_before_by_another_norm, 0)],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_which_sums(make: Callable[..., Any], number: int) -> None:
    module = graph(make)
    wanted = results(module)
    assert sums.into_norms(module) == number
    targets = [n.target for n in module.graph.nodes]
    assert targets.count(ops.add_rms_norm.default) == number
    assert (aten.add.Tensor in targets) == (number == 0)
    assert all("val" in n.meta for n in module.graph.nodes if n.op != "output")
    assert all(map(torch.equal, wanted, results(module)))


def test_a_sum_of_two_dtypes_stays() -> None:
    assert sums.into_norms(graph(plain, y=torch.bfloat16)) == 0
    assert sums.into_norms(graph(plain, x=torch.bfloat16, y=torch.bfloat16)) == 1
