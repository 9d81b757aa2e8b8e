"""Outputs that leave the graph and come back as lazy tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from fastft.lazy_logits import lazy_logits
from fastft.outputs import At, drop_lazy, with_lazy


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What lazy_logits was called with."""
    seen: list[dict[str, Any]] = []

    def spy(**operands: Any) -> torch.Tensor:
        seen.append(operands)
        return lazy_logits(**operands)

    monkeypatch.setattr("fastft.outputs.lazy_logits", spy)
    return seen


def head(*, return_hidden: bool = False) -> tuple[fx.GraphModule, fx.Node, dict[str, Any]]:
    """(ids, x, weight) → (loss, logits[, hidden]): the logits node, and what it can be computed from."""
    graph = fx.Graph()
    graph.placeholder("length")  # Dynamo hands symbolic sizes over as inputs too
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    hidden = graph.call_function(torch.tanh, (x,))
    logits = graph.call_function(torch._C._nn.linear, (hidden, weight))
    loss = graph.call_method("sum", (hidden,))
    graph.output((loss, logits, *([hidden] if return_hidden else [])))
    return fx.GraphModule(torch.nn.Module(), graph), logits, {"hidden": hidden, "weight": weight, "bias": None}


def inputs() -> tuple[int, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 2, torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)


def test_nothing_to_do() -> None:
    gm, _, _ = head()
    before = gm.code
    assert drop_lazy(gm, {}) is None
    gm.recompile()
    assert gm.code == before


@pytest.mark.parametrize("return_hidden", [False, True])
def test_the_graph_no_longer_computes_them(calls: list[Any], return_hidden: bool) -> None:
    gm, logits, operands = head(return_hidden=return_hidden)
    n, x, weight = inputs()
    wanted = gm(n, x, weight)
    lazy = drop_lazy(gm, {logits: operands})
    gm.graph.lint()
    gm.recompile()
    assert lazy is not None
    assert not any(node.target is torch._C._nn.linear for node in gm.graph.nodes)
    assert lazy.outputs == len(wanted)
    assert lazy.plans == ((1, {"hidden": At("output", 2), "weight": At("input", 2), "bias": None}),)
    assert len(gm(n, x, weight)) == 3  # hidden states are returned once, whether or not somebody else wants them

    got = with_lazy(gm, lazy)(n, x, weight)
    assert isinstance(got, tuple)
    assert len(got) == len(wanted)
    torch.testing.assert_close(got[0], wanted[0])
    assert calls[0]["weight"] is weight
    assert got[1].shape == (2, 3, 5)
    torch.testing.assert_close(got[1] + 0, wanted[1])


def test_gradients_flow_through_both() -> None:
    gm, logits, operands = head()
    n, x, weight = inputs()

    def gradients(call: Any) -> list[torch.Tensor]:
        loss, out = call(n, x, weight)[:2]
        return list(torch.autograd.grad(loss + out.square().mean(), (x, weight)))

    wanted = gradients(gm)
    lazy = drop_lazy(gm, {logits: operands})
    gm.recompile()
    assert lazy is not None
    torch.testing.assert_close(gradients(with_lazy(gm, lazy)), wanted)


def test_the_same_output_twice(calls: list[Any]) -> None:
    gm, logits, operands = head()
    output = next(n for n in gm.graph.nodes if n.op == "output")
    output.args = ((logits, output.args[0][0], logits),)
    lazy = drop_lazy(gm, {logits: operands})
    gm.recompile()
    assert lazy is not None
    assert [position for position, _ in lazy.plans] == [0, 2]
    got = with_lazy(gm, lazy)(*inputs())
    assert got[0].shape == got[2].shape == (2, 3, 5)
    assert got[1].shape == ()


def test_logits_that_the_graph_itself_needs_stay_in_it() -> None:
    gm, logits, operands = head()
    output = next(n for n in gm.graph.nodes if n.op == "output")
    with gm.graph.inserting_before(output):
        best = gm.graph.call_method("argmax", (logits, -1))
    output.args = ((*output.args[0], best),)
    lazy = drop_lazy(gm, {logits: operands})
    gm.graph.lint()
    assert lazy is not None
    assert logits in gm.graph.nodes
    assert logits not in output.args[0]


def test_boxed_callables_may_free_their_arguments(calls: list[Any]) -> None:
    gm, logits, operands = head()
    lazy = drop_lazy(gm, {logits: operands})
    gm.recompile()
    assert lazy is not None

    def greedy(*args: Any) -> Any:
        return list(gm(*args))  # Inductor returns a list

    arguments = inputs()
    with_lazy(greedy, lazy)(*arguments)
    assert calls[0]["weight"] is arguments[2]
