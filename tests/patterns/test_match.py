"""The matcher, on graphs built by hand: no model, no kernel."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from fastft.patterns._match import Match, Pattern, Rule, Table, Var, alt, cast, const, down, number, op, rank, row
from tests.patterns._graphs import Build

x, y, w = Var("x"), Var("y"), Var("w", lambda n: rank(n) == 1)


def matches(pattern: Pattern, node: Any) -> list[Match]:
    return list(row(pattern, lambda m: None).tries(node))


def only(pattern: Pattern, node: Any) -> Match:
    """The first match; every other one must bind the same."""
    found = matches(pattern, node)
    assert found, "no match"
    assert all(m.names == found[0].names for m in found)
    return found[0]


@pytest.fixture
def g() -> Build:
    return Build()


def test_binds_and_consumes(g: Build) -> None:
    a = g.input(2, 3)
    inner = g.call(torch.tanh, a)
    outer = g.call(torch.sigmoid, inner)
    m = only(op("sigmoid", op("tanh", x)), outer)
    assert m.anchor is outer
    assert m["x"] is a
    assert m.inside == {outer, inner}
    assert m.get("nothing", 7) == 7
    with pytest.raises(KeyError):
        m["nothing"]


def test_another_op_does_not_match(g: Build) -> None:
    a = g.input(3)
    assert not matches(op("sigmoid", op("tanh", x)), g.call(torch.sigmoid, g.call(torch.exp, a)))
    assert not matches(op("sigmoid", op("tanh", x)), g.call(torch.sigmoid, a))


@pytest.mark.parametrize("spelled", [operator.mul, torch.mul, "mul"])
def test_commutative_ops_match_in_both_orders(g: Build, spelled: Any) -> None:
    a, weight = g.input(2, 3), g.input(3)
    pattern = w * op("tanh", x)
    for order in ((weight, g.call(torch.tanh, a)), (g.call(torch.tanh, a), weight)):
        m = only(pattern, g.call(spelled, *order))
        assert m["x"] is a
        assert m["w"] is weight


def test_other_ops_do_not_commute(g: Build) -> None:
    a, weight = g.input(2, 3), g.input(3)
    t = g.call(torch.tanh, a)
    assert matches(op("sub", op("tanh", x), w), g.call(torch.sub, t, weight))
    assert not matches(op("sub", op("tanh", x), w), g.call(torch.sub, weight, t))


def test_backtracks_over_nested_orders(g: Build) -> None:
    # (a · tanh b) · (c · tanh a): which product is which follows only from the inner ones.
    a, b, c = g.input(3), g.input(3), g.input(3)
    left = g.call("mul", g.call(torch.tanh, b), a)
    right = g.call("mul", c, g.call(torch.tanh, a))
    pattern = (Var("p") * op("tanh", Var("q"))) * (Var("r") * op("tanh", Var("p")))
    for node in (g.call("mul", left, right), g.call("mul", right, left)):
        m = only(pattern, node)
        assert (m["p"], m["q"], m["r"]) == (a, b, c)


def test_every_way_to_fit_is_tried(g: Build) -> None:
    a, b = g.input(3), g.input(3)
    found = matches(x * y, g.call("mul", a, b))
    assert {(m["x"], m["y"]) for m in found} == {(a, b), (b, a)}


def test_same_var_twice_is_the_same_node(g: Build) -> None:
    a, b = g.input(3), g.input(3)
    pattern = x * op("sigmoid", x)
    assert only(pattern, g.call("mul", g.call(torch.sigmoid, a), a))["x"] is a
    assert not matches(pattern, g.call("mul", g.call(torch.sigmoid, a), b))


def test_same_number_twice(g: Build) -> None:
    a = g.input(3)
    pattern = op("tanh", x * number("c")) * number("c")
    assert only(pattern, g.call("mul", g.call(torch.tanh, g.call("mul", a, 3.0)), 3.0))["c"] == 3.0
    assert not matches(pattern, g.call("mul", g.call(torch.tanh, g.call("mul", a, 3.0)), 4.0))


def test_underscore_binds_nothing(g: Build) -> None:
    a, b = g.input(3), g.input(3)
    m = only(op("sub", Var("_"), Var("_")), g.call("sub", a, b))
    assert not m.names


def test_numbers_and_constants(g: Build) -> None:
    a, b = g.input(3), g.input(3)
    assert only(op("add", x, number("eps")), g.call("add", a, 1e-6))["eps"] == 1e-6
    assert not matches(op("sub", x, number("eps")), g.call("sub", a, b))
    assert not matches(op("sub", x, number("flag")), g.call("sub", g.call("float", a), b))
    assert only(const(1.0) + x, g.call("add", a, 1.0))["x"] is a
    assert not matches(const(1.0) + x, g.call("add", a, 2.0))
    # A plain number in a pattern is a constant.
    assert only(2.0 * x, g.call("mul", a, 2.0))["x"] is a
    assert only(x + 2.0, g.call("add", a, 2.0))["x"] is a


def test_missing_operands(g: Build) -> None:
    a = g.input(3)
    node = g.call(torch.tanh, a)
    assert matches(op("tanh"), node)  # operands beyond the given ones are not looked at
    assert not matches(op("tanh", x, y), node)


def test_noops_are_looked_through(g: Build) -> None:
    a = g.input(2, 3)
    inner = g.call(torch.tanh, a)
    same = g.call("to", inner, torch.float32)
    whole = g.call(operator.getitem, g.call("contiguous", same), (slice(None),))
    outer = g.call(torch.sigmoid, g.call(operator.mul, whole, 1.0))
    m = only(op("sigmoid", op("tanh", x)), outer)
    assert m["x"] is a
    assert {inner, same, whole} < m.inside  # they are part of the site


def test_a_noop_is_no_anchor(g: Build) -> None:
    inner = g.call(torch.tanh, g.input(3))
    assert not matches(op("tanh", x), g.call("contiguous", inner))
    assert matches(op("tanh", x), inner)


def test_casts_only_where_the_pattern_has_them(g: Build) -> None:
    a = g.input(3)
    inner = g.call(torch.tanh, a)
    narrow = g.call("bfloat16", inner)
    outer = g.call(torch.sigmoid, narrow)
    assert not matches(op("sigmoid", op("tanh", x)), outer)
    m = matches(op("sigmoid", cast(op("tanh", x))), outer)[0]
    assert m["x"] is a
    assert narrow in m.inside
    twice = g.call(torch.sigmoid, g.call("float", narrow))
    assert matches(op("sigmoid", cast(op("tanh", x))), twice)[0]["x"] is a
    assert matches(op("sigmoid", cast(op("tanh", x))), g.call(torch.sigmoid, inner))[0]["x"] is a  # including none


def test_cast_offers_the_nearest_node_first(g: Build) -> None:
    a = g.input(3, dtype=torch.bfloat16)
    wide = g.call("float", a)
    found = matches(op("tanh", cast(x)), g.call(torch.tanh, wide))
    assert [m["x"] for m in found] == [wide, a]


def test_down_takes_the_rounding_with_it(g: Build) -> None:
    a = g.input(3)
    inner = g.call(torch.tanh, a)
    narrow = g.call("bfloat16", inner)
    m = only(down(op("tanh", x)), narrow)
    assert m.anchor is narrow
    assert m.inside == {inner, narrow}
    assert only(down(op("tanh", x)), inner).anchor is inner


def test_down_leaves_a_cast_that_is_not_the_only_use(g: Build) -> None:
    inner = g.call(torch.tanh, g.input(3))
    narrow = g.call("bfloat16", inner)
    g.call(torch.sigmoid, inner)
    assert not matches(down(op("tanh", x)), narrow)


def test_down_leaves_a_widening_cast(g: Build) -> None:
    wide = g.call("float", g.call(torch.tanh, g.input(3, dtype=torch.bfloat16)))
    assert not matches(down(op("tanh", x)), wide)


def test_alternatives(g: Build) -> None:
    a = g.input(3)
    pattern = alt(op("tanh", x), op("exp", x))
    assert pattern.anchors == {"tanh", "exp"}
    assert only(pattern, g.call(torch.tanh, a))["x"] is a
    assert only(pattern, g.call(torch.exp, a))["x"] is a
    assert not matches(pattern, g.call(torch.sigmoid, a))
    assert alt(op("tanh", x), x).anchors is None
    # Alternatives deep inside are tried until the rest fits too.
    b = g.input(3)
    deep = op("mul", alt(x, op("tanh", x)), op("exp", x))
    found = matches(deep, g.call("mul", g.call(torch.tanh, b), g.call(torch.exp, b)))
    assert [m["x"] for m in found] == [b]


def test_in_place_is_never_the_functional_op(g: Build) -> None:
    a = g.input(3)
    written = g.call("mul_", a, 2.0)
    assert not matches(op("mul", x, y), written)
    assert not matches(op("tanh", op("mul", x, y)), g.call(torch.tanh, written))
    summed = g.call(operator.iadd, g.call("clone", a), 1.0)
    assert not matches(op("add", x, y), summed)


def test_var_predicates_narrow(g: Build) -> None:
    matrix, vector = g.input(2, 3), g.input(3)
    assert [m["w"] for m in matches(x * w, g.call("mul", matrix, vector))] == [vector]
    assert not matches(x * w, g.call("mul", matrix, matrix))


def test_a_row_knows_where_it_stands() -> None:
    here = row(op("tanh", x), lambda m: None)
    line = Path(__file__).read_text().splitlines().index('    here = row(op("tanh", x), lambda m: None)') + 1
    assert here.where == f"test_match.py:{line}"


def test_tables_dispatch_on_the_anchor() -> None:
    rows: tuple[Rule, ...] = (
        row(op("tanh", x), lambda m: None),
        row(down(op("exp", x)), lambda m: None),
        row(cast(x), lambda m: None),
    )
    table = Table("test", rows, lambda n: None)
    assert table.rules_for("tanh") == [rows[0], rows[2]]
    assert table.rules_for("cast") == [rows[1], rows[2]]
    assert table.rules_for("unknown") == [rows[2]]


def test_match_leaves_the_graph_as_it_was(g: Build) -> None:
    a = g.input(3)
    node = g.call("mul", g.call(torch.tanh, a), a)
    gm = g.module(node)
    before = gm.code
    for n in gm.graph.nodes:
        if isinstance(n, fx.Node) and n.op != "output":
            matches(x * op("tanh", x), n)
    gm.recompile()
    assert gm.code == before
