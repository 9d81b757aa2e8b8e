"""Checkpointed regions become part of the one flat graph, and train as they do uncompiled."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastft
from fastft import _torch_compat as compat
from fastft import reporting
from fastft.normalise import normalise
from fastft.partitioner import save_what_leaves


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    reporting.reset()
    torch.manual_seed(0)


def captured(function: Callable[..., Any], *inputs: Any, dynamic: bool | None = None) -> fx.GraphModule:
    """The Dynamo graph of a function."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=keep, dynamic=dynamic, fullgraph=True)(*inputs)
    (gm,) = graphs
    return gm


def flat(gm: fx.GraphModule) -> bool:
    return not any(compat.is_checkpoint(n.target) for n in gm.graph.nodes)


def tags(gm: fx.GraphModule) -> dict[str, Any]:
    """Region number of every op."""
    return {n.name: n.meta.get("ac_graph_id") for n in gm.graph.nodes if n.op in ("call_function", "call_method")}


W = torch.randn(4, 4)


def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.tanh(F.dropout(x @ w, 0.5))


@pytest.mark.parametrize("reentrant", [False, True])
def test_bodies_are_inlined_and_numbered(reentrant: bool) -> None:
    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x = x * 2
        for _ in range(3):
            x = checkpoint(layer, x, w, use_reentrant=reentrant)
        return x.sum()

    gm = captured(model, torch.randn(2, 4, requires_grad=True), W)
    assert normalise(gm) == {"checkpoints": 3, "kept": 0}
    assert flat(gm)
    ids = list(tags(gm).values())
    assert ids == [None] + [i for i in (1, 2, 3) for _ in range(3)] + [None]
    inside = [n for n in gm.graph.nodes if n.meta.get("ac_graph_id")]
    assert all(n.meta["recompute"] == compat.PREFER_RECOMPUTE for n in inside)
    assert all("example_value" in n.meta for n in inside)
    assert not any(n.op == "get_attr" for n in gm.graph.nodes)


def test_recompute_never_forgets_the_permission() -> None:
    gm = captured(lambda x: checkpoint(layer, x, W, use_reentrant=False), torch.randn(2, 4, requires_grad=True))
    assert normalise(gm, recompute=False)["checkpoints"] == 1
    assert flat(gm)
    assert set(tags(gm).values()) == {None}
    assert not any("recompute" in n.meta for n in gm.graph.nodes)


def test_what_leaves_a_region_is_saved() -> None:
    """And what it is a view or an item of; nothing else, and nothing that only its own region reads."""

    def body(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (x.sin() @ w).cos().chunk(2, -1)[1].t()

    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = checkpoint(body, x, w, use_reentrant=False)
        return x.sum()

    gm = captured(model, torch.randn(4, 4, requires_grad=True), torch.randn(4, 8))
    normalise(gm)
    save_what_leaves(gm.graph)
    inside = [n for n in gm.graph.nodes if "recompute" in n.meta]
    # Both regions end alike, the second before a sum that is in neither.
    assert [n.meta["recompute"] == compat.MUST_SAVE for n in inside] == [False, False, True, True, True, True] * 2


def test_several_outputs_one_of_them_an_input() -> None:
    def body(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return torch.tanh(x), y, torch.exp(x)

    def model(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b, c = checkpoint(body, x, y, use_reentrant=False)
        return a * b + c

    inputs = torch.randn(3, requires_grad=True), torch.randn(3)
    gm = captured(model, *inputs)
    normalise(gm)
    gm.recompile()
    assert flat(gm)
    torch.testing.assert_close(gm(*inputs)[0], model(*inputs))


def by_hand(result: Callable[[fx.Node], Any]) -> tuple[fx.GraphModule, fx.Node]:
    """A graph with one checkpointed region ``x → result(tanh(x))``; its users are up to the test."""
    body = fx.Graph()
    x = body.placeholder("x")
    body.output(result(body.call_function(torch.tanh, (x,))))
    root = torch.nn.Module()
    root.body = fx.GraphModule(torch.nn.Module(), body)
    graph = fx.Graph()
    a = graph.placeholder("a")
    call = graph.call_function(checkpoint_op(), (graph.get_attr("body"), a), {"use_reentrant": False})
    return fx.GraphModule(root, graph), call


def checkpoint_op() -> Any:
    return torch.ops.higher_order.tag_activation_checkpoint


def test_an_output_that_is_no_tuple() -> None:
    gm, call = by_hand(lambda tanh: tanh)
    gm.graph.output((gm.graph.call_method("mul", (call, call)), call))
    normalise(gm)
    gm.recompile()
    a = torch.randn(3)
    first, second = gm(a)
    torch.testing.assert_close(first, torch.tanh(a) ** 2)
    torch.testing.assert_close(second, torch.tanh(a))


def test_a_tuple_that_is_used_as_a_whole_and_outputs_that_are_no_tensors() -> None:
    gm, call = by_hand(lambda tanh: (tanh, None, 3))
    three = gm.graph.call_function(operator.getitem, (call, 2))
    nothing = gm.graph.call_function(operator.getitem, (call, -2))
    first = gm.graph.call_function(operator.getitem, (call, 0))
    gm.graph.output((gm.graph.call_function(operator.mul, (first, three)), nothing, call))
    normalise(gm)
    gm.recompile()
    a = torch.randn(3)
    product, none, whole = gm(a)
    torch.testing.assert_close(product, torch.tanh(a) * 3)
    assert none is None
    assert whole[1:] == (None, 3)


def test_a_region_inside_a_region() -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(F.dropout(x, 0.5))

    def outer(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(checkpoint(inner, x * 2, use_reentrant=False)) + 1

    def model(x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(outer, x, use_reentrant=False)
        return checkpoint(inner, x, use_reentrant=False)

    gm = captured(model, torch.randn(3, requires_grad=True))
    assert normalise(gm)["checkpoints"] == 3
    assert flat(gm)
    ids = list(tags(gm).values())
    assert None not in ids
    assert ids == sorted(ids)
    assert len(set(ids)) == 2  # the inner one belongs to the outer one, which is recomputed as a whole


def test_bodies_that_hold_bodies_of_their_own() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return 2 * ctx.saved_tensors[0] * grad

    def body(x: torch.Tensor) -> torch.Tensor:
        return Square.apply(torch.tanh(x))

    def model(x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):  # both bodies call theirs by the same name
            x = checkpoint(body, x, use_reentrant=False) + Square.apply(x)
        return x.sum()

    x = torch.randn(3, requires_grad=True)
    model(x).backward()
    wanted, x.grad = x.grad, None
    torch.compile(model, backend="fastft", options={"residual": "eager", "strict": True}, fullgraph=True)(x).backward()
    torch.testing.assert_close(x.grad, wanted)


def test_symbolic_sizes() -> None:
    def body(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (x.view(-1, x.shape[-1]) @ w).view(x.shape[0], x.shape[1], -1)

    gm = captured(
        lambda x: checkpoint(body, x, W, use_reentrant=False), torch.randn(2, 3, 4, requires_grad=True), dynamic=True
    )
    normalise(gm)
    gm.recompile()
    assert flat(gm)


class Net(torch.nn.Module):
    """Layers with dropout under checkpointing, as a transformer has them."""

    def __init__(self, reentrant: bool, context_fn: Any = None) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.options = {"use_reentrant": reentrant} | ({"context_fn": context_fn} if context_fn else {})

    def one(self, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x + F.dropout(torch.tanh(layer(F.dropout(x, 0.3))), 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for inner in self.layers:
            x = checkpoint(self.one, inner, x, **self.options)
        return x.square().sum()


def step(net: torch.nn.Module, x: torch.Tensor, call: Any = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    net.zero_grad()
    torch.manual_seed(1)
    loss = (net if call is None else call)(x)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize("recompute", ["asked", "never"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_under_checkpointing_has_eager_gradients(reentrant: bool, recompute: str) -> None:
    net = Net(reentrant)
    x = torch.randn(4, 8, requires_grad=True)
    wanted = step(net, x)
    options = {"residual": "eager", "strict": True, "recompute": recompute}
    got = step(net, x, torch.compile(net, backend="fastft", options=options))
    torch.testing.assert_close(got, wanted)
    report = fastft.report()
    assert (report.graphs, report.breaks) == (1, 0)
    assert report.plan["recompute"] == "3 checkpointed regions kept in full"


def save_matmuls(ctx: Any, target: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if "mm" in str(target) else CheckpointPolicy.PREFER_RECOMPUTE


def test_a_policy_of_the_users_is_left_alone() -> None:
    net = Net(False, functools.partial(create_selective_checkpoint_contexts, save_matmuls))
    x = torch.randn(4, 8, requires_grad=True)
    wanted = step(net, x)
    got = step(net, x, torch.compile(net, backend="fastft", options={"residual": "eager", "strict": True}))
    torch.testing.assert_close(got, wanted)
    assert fastft.report().plan["checkpoint policies"] == "3 regions with a policy of the user's are left as they are"


def test_kept_and_inlined_regions_are_counted_apart() -> None:
    context = functools.partial(create_selective_checkpoint_contexts, save_matmuls)

    def model(x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(torch.tanh, x, use_reentrant=False)
        return checkpoint(torch.exp, x, use_reentrant=False, context_fn=context)

    gm = captured(model, torch.randn(3, requires_grad=True))
    assert normalise(gm) == {"checkpoints": 1, "kept": 1}
    assert sum(compat.is_checkpoint(n.target) for n in gm.graph.nodes) == 1


@pytest.mark.slow
def test_inductor_draws_the_same_mask_again() -> None:
    # Inductor's masks are not eager's, so look at the mask itself: the gradient of dropout(x · w) is the output over x.
    def model(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x, w: F.dropout(x * w, 0.5), x, w, use_reentrant=False)

    x, w = torch.rand(256).add_(1).requires_grad_(), torch.rand(256) + 1
    options = {"strict": True}
    y = torch.compile(model, backend="fastft", options=options, fullgraph=True)(x, w)
    y.sum().backward()
    assert 0.3 < float((y == 0).float().mean()) < 0.7
    torch.testing.assert_close(x.grad * x, y)


class Scaled(torch.nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor, factor: float = 2.5) -> torch.Tensor:
        return F.dropout(x * (2.0 * self.scale), 0.0) * factor


def test_numbers_of_modules_are_constants_under_dynamic_sizes() -> None:
    """``dynamic=True`` makes an input of every float; another value is another graph, an argument's is not."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        normalise(gm)
        gm.recompile()
        graphs.append(gm)
        return gm.forward

    model, x = Scaled(0.75), torch.randn(3)
    call = torch.compile(model, backend=backend, dynamic=True)
    torch.testing.assert_close(call(x, 3.5), x * 1.5 * 3.5)
    assert next(n.args[1] for n in graphs[0].graph.nodes if n.target is operator.mul) == 1.5
    torch.testing.assert_close(call(x, 4.5), x * 1.5 * 4.5)
    assert len(graphs) == 1
    model.scale = 0.25
    torch.testing.assert_close(call(x, 4.5), x * 0.5 * 4.5)
    assert len(graphs) == 2


def test_a_number_that_keeps_changing_stays_an_input() -> None:
    count = 0

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        nonlocal count
        count += 1
        normalise(gm)
        gm.recompile()
        return gm.forward

    model, x = Scaled(0.75), torch.randn(3)
    call = torch.compile(model, backend=backend, dynamic=True)
    for i in range(12):
        model.scale = 0.3 + i
        torch.testing.assert_close(call(x), x * 2.0 * model.scale * 2.5)
    assert count == 5


@pytest.mark.parametrize("why", ["no_grad", "nothing requires a gradient"])
def test_a_graph_without_backward_may_draw_in_a_checkpoint(why: str) -> None:
    """Log-probabilities of a model in train mode: AOTAutograd refuses recomputed dropout where it computes forward."""
    w = W.clone().requires_grad_(why == "no_grad")
    call = torch.compile(
        lambda x: checkpoint(layer, x, w, use_reentrant=False),
        backend="fastft",
        options={"strict": True, "inductor": {"fallback_random": True}},
    )
    x = torch.randn(3, 4)
    with torch.set_grad_enabled(why != "no_grad"):
        torch.manual_seed(3)
        found = call(x)
    torch.manual_seed(3)
    torch.testing.assert_close(found, layer(x, W))


@pytest.mark.parametrize("recompute", ["asked", "never"])
def test_regions_are_tagged_as_the_option_says(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bool] = []

    def noted(gm: fx.GraphModule, *, recompute: bool, planned: bool) -> dict[str, int]:
        found.append(recompute)
        return normalise(gm, recompute=recompute, planned=planned)

    monkeypatch.setattr("fastft.compiler.normalise", noted)
    torch._dynamo.reset()
    options = {"residual": "eager", "strict": True, "recompute": recompute}
    call = torch.compile(lambda x: checkpoint(torch.tanh, x, use_reentrant=False), backend="fastft", options=options)
    call(torch.randn(2, 4, requires_grad=True)).sum().backward()
    torch._dynamo.reset()
    assert found == [recompute == "asked"]
