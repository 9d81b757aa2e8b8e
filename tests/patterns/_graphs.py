"""fx graphs built by hand, node by node, as Dynamo would have left them: each node knows its value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx


class Build:
    """A graph in the making. Values are real tensors: what a rule reads of them is what it reads of fake ones."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def input(self, *shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> fx.Node:
        """An input of the graph, with random numbers."""
        name = f"input_{sum(n.op == 'placeholder' for n in self.graph.nodes)}"
        last = [n for n in self.graph.nodes if n.op == "placeholder"]
        after = self.graph.inserting_after(last[-1]) if last else self.graph.inserting_before(None)
        with after:
            node = self.graph.placeholder(name)
        node.meta["example_value"] = torch.randn(shape).to(dtype).requires_grad_(grad)
        return node

    def call(self, target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A method (by name) or function, run on the values right away."""
        method = isinstance(target, str)
        node = (self.graph.call_method if method else self.graph.call_function)(target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), lambda n: n.meta["example_value"])
        run = getattr(values[0], target) if method else target
        node.meta["example_value"] = run(*(values[1:] if method else values), **named)
        return node

    def module(self, *outputs: Any) -> fx.GraphModule:
        """The graph that gives ``outputs``."""
        self.graph.output(tuple(outputs))
        return fx.GraphModule(torch.nn.Module(), self.graph)
