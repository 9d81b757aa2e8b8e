"""Items of a tuple that nobody reads are no use of it."""

from __future__ import annotations

import operator

import torch
from torch import fx

from fastft.normalise import normalise


def test_unread_items_are_dropped() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    pair = graph.call_function(torch.chunk, (x, 2))
    first = graph.call_function(operator.getitem, (pair, 0))
    graph.call_function(operator.getitem, (pair, 1))
    graph.output((first,))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    normalise(gm)
    assert list(pair.users) == [first]
