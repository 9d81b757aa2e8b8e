"""One canonical view, whatever the spelling; and nothing that writes to memory is ever taken for a functional op."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fastft.patterns import _see
from fastft.patterns._see import UNKNOWN, in_place, is_noop, is_widening, same_size, see, through, written
from tests.patterns._graphs import Build

bf16, fp16, fp32, fp64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@pytest.fixture
def g() -> Build:
    return Build()


@pytest.mark.parametrize("name", ["mul", "add", "sub", "div"])
def test_arithmetic_has_one_spelling(g: Build, name: str) -> None:
    x, y = g.input(3), g.input(3)
    operators = {"div": operator.truediv}
    for spelled in (operators.get(name, getattr(operator, name, None)), getattr(torch, name), name):
        assert see(g.call(spelled, x, y)) == (name, (x, y))
    assert see(g.call(getattr(torch, name), x, other=y)) == (name, (x, y))
    assert see(g.call(getattr(torch, name), input=x, other=y)) == (name, (x, y))
    assert see(g.call(name, x, 2.0)) == (name, (x, 2.0))


def test_reflected_operands_are_swapped_back(g: Build) -> None:
    x = g.input(3)
    assert see(g.call("__rmul__", x, 2.0)) == ("mul", (2.0, x))
    assert see(g.call("__radd__", x, 2.0)) == ("add", (2.0, x))


def test_arguments_that_change_the_meaning_make_it_unknown(g: Build) -> None:
    x, y = g.input(3), g.input(3)
    assert see(g.call(torch.add, x, y, alpha=2)) is UNKNOWN
    assert see(g.call(torch.div, x, y, rounding_mode="floor")) is UNKNOWN
    assert see(g.call("mean", x, axis=-1)) is UNKNOWN  # dim under numpy's name: not a mean over everything
    assert see(g.call("mean", x, -1, True, dtype=fp64)) is UNKNOWN
    assert see(g.call("view", x, torch.int32)) is UNKNOWN  # the bits read anew
    assert see(g.call("sum", x)) is UNKNOWN


@pytest.mark.parametrize(
    ("method", "args", "kwargs"),
    [
        ("to", (bf16,), {}),
        ("to", (), {"dtype": bf16}),
        ("to", ("cpu", bf16), {}),
        ("bfloat16", (), {}),
        ("type", (bf16,), {}),
    ],
)
def test_casts(g: Build, method: str, args: Any, kwargs: Any) -> None:
    x = g.input(3)
    assert see(g.call(method, x, *args, **kwargs)) == ("cast", (x, bf16))


def test_cast_like_another_tensor_and_to_a_device_only(g: Build) -> None:
    x, y = g.input(3), g.input(3, dtype=fp16)
    assert see(g.call("type_as", x, y)) == ("cast", (x, fp16))
    assert see(g.call("to", x, y)) == ("cast", (x, fp16))
    here = see(g.call("to", x, "cpu"))
    assert here == ("cast", (x, fp32))
    assert is_noop(here)
    other = g.call("to", x, device="meta")
    assert see(other) is UNKNOWN
    assert see(g.call("type", x)) is UNKNOWN  # a string


def test_powers(g: Build) -> None:
    x = g.input(3)
    for spelled in (operator.pow, torch.pow, "pow"):
        assert see(g.call(spelled, x, 2)) == ("square", (x,))
        assert see(g.call(spelled, x, -0.5)) == ("rsqrt", (x,))
        assert see(g.call(spelled, x, 0.5)) == ("sqrt", (x,))
        assert see(g.call(spelled, x, 3)) == ("pow", (x, 3))
    assert see(g.call(torch.pow, 2, x)) == ("pow", (2, x))
    assert see(g.call("square", x)) == see(g.call(torch.square, x)) == ("square", (x,))


def test_mean_over_the_last_dimension(g: Build) -> None:
    x = g.input(2, 3)
    for node in (
        g.call("mean", x, -1, keepdim=True),
        g.call("mean", x, -1, True),
        g.call("mean", x, 1, keepdim=True),
        g.call("mean", x, (-1,), keepdim=True),
        g.call(torch.mean, x, dim=[-1], keepdim=True),
    ):
        assert see(node) == ("mean_last", (x,))
    assert see(g.call("mean", x, -1)) == ("mean", (x, -1, False))
    assert see(g.call("mean", x, 0, keepdim=True)) == ("mean", (x, 0, True))
    assert see(g.call("mean", x)) == ("mean", (x, None, False))


def test_views(g: Build) -> None:
    x = g.input(2, 3)
    for node in (
        g.call("view", x, 3, 2),
        g.call("view", x, (3, 2)),
        g.call("reshape", x, 3, 2),
        g.call(torch.reshape, x, (3, 2)),
    ):
        assert see(node) == ("view", (x, (3, 2)))
    assert see(g.call("transpose", x, 0, 1)) == see(g.call(torch.transpose, x, 0, 1)) == ("transpose", (x, 0, 1))
    assert see(g.call("permute", x, 1, 0)) == see(g.call(torch.permute, x, (1, 0))) == ("permute", (x, (1, 0)))
    parts = g.call(torch.chunk, x, 3, dim=-1)
    assert see(parts) == ("chunk", (x, 3, -1))
    assert see(g.call(operator.getitem, parts, 0)) == ("getitem", (parts, 0))
    assert see(g.call(operator.getitem, x, 0)) == ("index", (x, 0))


def test_functional_calls_have_their_defaults(g: Build) -> None:
    x, w = g.input(2, 3), g.input(3)
    assert see(g.call(F.silu, x)) == see(g.call(F.silu, x, inplace=False)) == ("silu", (x,))
    assert see(g.call(F.gelu, x)).op == "gelu"
    assert see(g.call(F.gelu, x, approximate="tanh")) == ("gelu_tanh", (x,))
    assert see(g.call(F.layer_norm, x, (3,), w)) == ("layer_norm", (x, (3,), w, None, 1e-5))
    assert see(g.call(F.dropout, x, 0.1)) == ("dropout", (x, 0.1, True))
    assert see(g.call(F.linear, x, g.input(4, 3))).args[2] is None


def test_what_is_no_call_of_ours(g: Build) -> None:
    x = g.input(3)
    assert see(x) == ("input", (x,))
    assert see(3.0) is see(None) is UNKNOWN


IN_PLACE: list[tuple[str | Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = [
    ("mul_", (2.0,), {}),
    ("__iadd__", (1.0,), {}),
    ("clamp_", (0,), {}),
    ("requires_grad_", (False,), {}),
    (operator.iadd, (1.0,), {}),
    (operator.imul, (2.0,), {}),
    (operator.setitem, (0, 1.0), {}),
    (F.silu, (), {"inplace": True}),
    (F.silu, (True,), {}),
    (F.dropout, (0.5, True, True), {}),  # as Dynamo leaves nn.Dropout(inplace=True): by position
    (F.relu_, (), {}),
    (torch.relu_, (), {}),
    (torch.ops.aten.add_.Tensor, (1.0,), {}),
]


@pytest.mark.parametrize(("target", "args", "kwargs"), IN_PLACE)
def test_in_place(g: Build, target: Any, args: Any, kwargs: Any) -> None:
    x = g.input(3)
    node = g.call(target, x, *args, **kwargs)
    assert in_place(node)
    assert written(node) == (x,)
    assert see(node).op == "in_place"


def test_out_and_schemas_say_what_is_written(g: Build) -> None:
    x, y = g.input(3), g.input(3)
    assert written(g.call(torch.mul, x, 2.0, out=y)) == (y,)
    assert written(g.call(torch.ops.aten.mul.out, x, x, out=y)) == (y,)
    assert written(g.call("copy_", y, x)) == (y,)


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (F.dropout, (0.5, True, False), {}),
        (F.silu, (), {"inplace": False}),
        (torch.ops.aten.add.Tensor, (1.0,), {}),
        ("__add__", (1.0,), {}),
        (torch.mul, (2.0,), {"out": None}),
    ],
)
def test_functional(g: Build, target: Any, args: Any, kwargs: Any) -> None:
    assert not in_place(g.call(target, g.input(3), *args, **kwargs))


def test_in_place_operators_on_numbers_write_to_nothing(g: Build) -> None:
    length = g.call("size", g.input(3), 0)
    assert not in_place(g.call(operator.iadd, length, 1))


@pytest.mark.parametrize(
    ("before", "after", "exact"),
    [
        (bf16, fp32, True),
        (fp16, fp32, True),
        (fp32, fp32, True),
        (fp32, bf16, False),
        (fp16, bf16, False),
        (bf16, fp16, False),
        (torch.bool, bf16, True),
        (torch.int32, torch.int64, True),
        (torch.int64, fp32, False),  # 2**24 + 1
        (fp32, torch.int64, False),
    ],
)
def test_widening_is_exact(g: Build, before: torch.dtype, after: torch.dtype, exact: bool) -> None:
    assert is_widening(see(g.call("to", g.input(3, dtype=before), after))) is exact


def test_noops(g: Build) -> None:
    x = g.input(2, 3)
    for node in (
        g.call("contiguous", x),
        g.call("clone", x, memory_format=torch.contiguous_format),
        g.call("float", x),
        g.call(F.dropout, x, 0.0),
        g.call(F.dropout, x, 0.5, False),
        g.call(operator.getitem, x, (Ellipsis,)),
        g.call(operator.getitem, x, (slice(0, None), slice(None, None, 1))),
        g.call(operator.mul, x, 1.0),
        g.call(operator.add, x, 0),
    ):
        assert is_noop(see(node)), node.format_node()
        assert through(node, "noop") is x


def test_not_noops(g: Build) -> None:
    x, whole = g.input(2, 3), g.input(3, dtype=torch.int64)
    for node in (
        g.call("bfloat16", x),
        g.call(F.dropout, x, 0.1),
        g.call(operator.getitem, x, 0),
        g.call(operator.getitem, x, (Ellipsis, None)),
        g.call(operator.getitem, x, (slice(1, None),)),
        g.call(operator.mul, x, 2.0),
        g.call(operator.add, x, 1),
        g.call(operator.mul, whole, 1.0),  # becomes fp32
        g.call("mul_", x, 1.0),
    ):
        assert not is_noop(see(node)), node.format_node()


def test_through_stops_where_it_was_told_to(g: Build) -> None:
    x = g.input(2, 3, dtype=bf16)
    wide = g.call("float", x)
    narrow = g.call("half", wide)
    last = g.call("contiguous", narrow)
    assert through(last, "noop") is narrow
    assert through(last, "noop", "widen") is narrow  # fp32 → fp16 rounds
    assert through(wide, "noop", "widen") is x
    assert through(last, "noop", "cast") is x
    assert through(3.0, "noop") == 3.0


def test_metadata_of_nodes_and_of_others(g: Build) -> None:
    x = g.input(2, 3, dtype=bf16, grad=True)
    assert (_see.dtype(x), _see.shape(x), _see.rank(x), _see.requires_grad(x)) == (bf16, (2, 3), 2, True)
    assert (_see.dtype(1.0), _see.shape(1.0), _see.requires_grad(None)) == (None, (), False)


def test_symbolic_sizes_are_compared_without_a_guard() -> None:
    env = ShapeEnv()
    sizes = [env.create_unbacked_symint() for _ in range(2)]
    assert same_size(sizes[0], sizes[0] + 0)
    assert not same_size(sizes[0], sizes[1])
    assert same_size(4, 4)
    assert not same_size(4, 5)
    assert not same_size(4, sizes[0])
    assert not env.guards
