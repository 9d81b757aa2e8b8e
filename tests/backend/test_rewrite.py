"""What may be replaced and what may not, with tables made up for the purpose, on graphs built by hand."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from fastft import _torch_compat as compat
from fastft.kernels._inputs import Inputs
from fastft.kernels._op import Op, Reason, Recompute
from fastft.options import Options
from fastft.patterns._match import Match, Rewrite, Table, Var, down, number, op, row, see, through
from fastft.reporting import MISSED, REPLACED, SKIPPED, Site
from fastft.rewrite import Rewritten, module_path, rewrite, sweep
from tests.patterns._graphs import Build

x = Var("x")
TANH2 = op("tanh", x) * number("c")


def scaled_tanh(x: torch.Tensor, c: float = 2.0) -> torch.Tensor:
    return torch.tanh(x) * c


def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tanh(x), torch.exp(x)


def no_seed(node: fx.Node) -> str | None:
    return None


def tanh_seed(node: fx.Node) -> str | None:
    return "a tanh" if see(node).op == "tanh" else None


def build_tanh(m: Match) -> Rewrite | Reason | None:
    return Rewrite(scaled_tanh, (through(m["x"], "noop"), m["c"]))


def table(build: Callable[[Match], Any] = build_tanh, pattern: Any = TANH2, seed: Any = no_seed) -> Table:
    return Table("scaled_tanh", (row(pattern, build),), seed)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rewritten]:
    """Rewrite a graph with these tables only."""

    def run(gm: fx.GraphModule, *tables: Table, **options: Any) -> Rewritten:
        monkeypatch.setattr("fastft.rewrite.tables", lambda: list(tables) or [table()])
        return rewrite(gm, Options(**options), compat.fake_mode_of(gm))

    return run


@pytest.fixture
def g() -> Build:
    torch.manual_seed(0)
    return Build()


def tanh2(g: Build, a: fx.Node, c: float = 2.0) -> fx.Node:
    return g.call("mul", g.call(torch.tanh, a), c)


def count(gm: fx.GraphModule, target: Any) -> int:
    return sum(n.target is target for n in gm.graph.nodes)


def run(gm: fx.GraphModule, *inputs: torch.Tensor) -> Any:
    """Through fresh copies: a graph that writes to its inputs must not see the last run's."""
    return gm(*(i.detach().clone().requires_grad_(i.requires_grad) for i in inputs))


def status(done: Rewritten) -> list[tuple[str, str]]:
    return [(s.status, s.reason.split(":")[0]) for s in done.sites]


def reason(done: Rewritten) -> str:
    (site,) = done.sites
    assert site.status == MISSED
    return site.reason


# ------------------------------------------------------------------------------------------------------- what is made


def test_replaces_and_removes(g: Build, use: Any) -> None:
    a = g.input(3)
    gm = g.module(g.call(torch.sigmoid, tanh2(g, a)))
    t = torch.randn(3)
    before = run(gm, t)
    done = use(gm)
    assert status(done) == [(REPLACED, "")]
    assert done.sites[0].rule.startswith("test_rewrite.py:")
    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [scaled_tanh, torch.sigmoid]
    torch.testing.assert_close(run(gm, t), before)


def test_the_new_node_knows_where_it_comes_from(g: Build, use: Any) -> None:
    a = g.input(3)
    node = tanh2(g, a)
    node.meta |= {"nn_module_stack": {"k": ("L['self'].layers[3].mlp", object)}, "recompute": "tag", "ac_graph_id": 7}
    gm = g.module(node)
    done = use(gm)
    (new,) = [n for n in gm.graph.nodes if n.target is scaled_tanh]
    assert new.meta["example_value"].shape == (3,)
    assert (new.meta["recompute"], new.meta["ac_graph_id"]) == ("tag", 7)
    assert done.sites[0].module == module_path(new) == "layers.3.mlp"


@pytest.mark.parametrize("kind", list(Recompute))
def test_cheap_ops_are_recomputed(g: Build, use: Any, kind: Recompute) -> None:
    kernel = Op("scaled_tanh", scaled_tanh, scaled_tanh, lambda *a: None, (), kind, lambda model: (), Inputs)
    gm = g.module(tanh2(g, g.input(3)))
    use(gm, table(lambda m: Rewrite(scaled_tanh, (m["x"], m["c"]), kernel=kernel)))
    (new,) = [n for n in gm.graph.nodes if n.target is scaled_tanh]
    assert (new.meta.get("recompute") == compat.PREFER_RECOMPUTE) == (kind is Recompute.CHEAP)


def test_a_cheap_op_stays_in_its_region(g: Build, use: Any) -> None:
    """What the user's checkpoint recomputes is recomputed with its layer."""
    kernel = Op("scaled_tanh", scaled_tanh, scaled_tanh, lambda *a: None, (), Recompute.CHEAP, lambda model: (), Inputs)
    node = tanh2(g, g.input(3))
    node.meta |= {"recompute": "the region's", "ac_graph_id": 7}
    gm = g.module(node)
    use(gm, table(lambda m: Rewrite(scaled_tanh, (m["x"], m["c"]), kernel=kernel)))
    (new,) = [n for n in gm.graph.nodes if n.target is scaled_tanh]
    assert (new.meta["recompute"], new.meta["ac_graph_id"]) == ("the region's", 7)


def test_several_outputs(g: Build, use: Any) -> None:
    a = g.input(3)
    tanh, exp = g.call(torch.tanh, a), g.call(torch.exp, a)
    gm = g.module(g.call("mul", exp, 2.0), tanh)
    t = torch.randn(3)
    before = run(gm, t)

    def build(m: Match) -> Rewrite:
        return Rewrite(both, (m["x"],), outputs=(tanh, exp))

    done = use(gm, table(build, op("exp", x)))
    assert status(done) == [(REPLACED, "")]
    assert (count(gm, both), count(gm, torch.tanh), count(gm, torch.exp)) == (1, 0, 0)
    torch.testing.assert_close(run(gm, t), before)


def test_a_free_intermediate_may_have_other_users(g: Build, use: Any) -> None:
    a = g.input(3, dtype=torch.bfloat16)
    wide = g.call("float", a)
    other = g.call("clone", wide)
    gm = g.module(tanh2(g, other), g.call(torch.sigmoid, wide), g.call(torch.exp, other))
    assert status(use(gm)) == [(REPLACED, "")]


def test_views_below_follow_new_strides(g: Build, use: Any) -> None:
    def transposed(x: torch.Tensor, c: float) -> torch.Tensor:
        return (torch.tanh(x) * c).mT.contiguous().mT

    a = g.input(2, 3, 4)
    node = tanh2(g, a)
    gm = g.module(g.call("view", node, 6, 4))
    t = torch.randn(2, 3, 4)
    before = run(gm, t)
    done = use(gm, table(lambda m: Rewrite(transposed, (m["x"], m["c"]))))
    assert status(done) == [(REPLACED, "")]
    torch.testing.assert_close(run(gm, t), before)  # view() would raise on these strides


class _Keeps(torch.autograd.Function):
    """2 tanh(x), returned as a view and kept for the backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(y := (torch.tanh(x) * 2.0).view(x.shape))
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return dy * (2.0 - y.square() / 2.0)


def kept(x: torch.Tensor) -> torch.Tensor:
    return _Keeps.apply(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("way", ["itself", "a view"])
def test_a_result_that_is_written_to_is_copied_first(g: Build, use: Any, way: str) -> None:
    a = g.input(2, 3, grad=True)
    node = tanh2(g, a)
    gm = g.module(g.call("add_", node if way == "itself" else g.call("view", node, 6), 1.0))
    t = torch.randn(2, 3, requires_grad=True)
    before = run(gm, t)
    done = use(gm, table(lambda m: Rewrite(kept, (m["x"],))))
    assert status(done) == [(REPLACED, "")] and count(gm, torch.clone) == 1
    torch.testing.assert_close(run(gm, t), before)
    (after,) = gm(t)
    (grad,) = torch.autograd.grad(after.sum(), t)
    torch.testing.assert_close(grad, 2 * (1 - torch.tanh(t) ** 2).detach())


def test_a_write_through_a_view_needs_the_same_strides(g: Build, use: Any) -> None:
    """``view`` would become ``reshape``, and a write to that does not reach the result."""

    def transposed(x: torch.Tensor, c: float) -> torch.Tensor:
        return (torch.tanh(x) * c).mT.contiguous().mT

    node = tanh2(g, g.input(2, 3, 4))
    g.call("add_", g.call("view", node, 6, 4), 1.0)
    gm = g.module(node)
    assert reason(use(gm, table(lambda m: Rewrite(transposed, (m["x"], m["c"]))))).startswith("in_place:")


# -------------------------------------------------------------------------------------------------- what is left alone


def test_an_intermediate_that_escapes(g: Build, use: Any) -> None:
    inner = g.call(torch.tanh, g.input(3))
    gm = g.module(g.call("mul", inner, 2.0), inner)
    done = use(gm)
    assert reason(done) == "escapes: the intermediate tanh is also used by output"
    assert count(gm, scaled_tanh) == 0


def test_an_intermediate_that_may_escape(g: Build, use: Any) -> None:
    inner = g.call(torch.tanh, g.input(3))
    gm = g.module(g.call("mul", inner, 2.0), inner)
    done = use(gm, table(lambda m: Rewrite(scaled_tanh, (m["x"], m["c"]), may_escape=frozenset({inner}))))
    assert status(done) == [(REPLACED, "")]
    assert (count(gm, scaled_tanh), count(gm, torch.tanh)) == (1, 1)


WRITES: list[Callable[[Build, fx.Node, fx.Node], Any]] = [
    lambda g, a, inner: g.call("add_", inner, 1.0),
    lambda g, a, inner: g.call(operator.iadd, inner, 1.0),
    lambda g, a, inner: g.call(operator.setitem, inner, 0, 1.0),
    lambda g, a, inner: g.call("zero_", g.call("view", inner, 3, 1)),
    lambda g, a, inner: g.call(
        "zero_", g.call("narrow", inner, 0, 0, 1)
    ),  # a view that the canonical names do not have
    lambda g, a, inner: g.call("zero_", g.call("detach", inner)),
    lambda g, a, inner: g.call(torch.exp, a, out=inner),
    lambda g, a, inner: g.call(torch.nn.functional.dropout, inner, 0.5, True, True),
    lambda g, a, inner: g.call("add_", a, 1.0),  # the op would read a after it was written to
    lambda g, a, inner: g.call(operator.setitem, g.call("unsqueeze", a, 0), 0, 1.0),
]


@pytest.mark.parametrize("write", WRITES)
def test_an_in_place_op_in_between(g: Build, use: Any, write: Any) -> None:
    a = g.input(3)
    inner = g.call(torch.tanh, a)
    written = write(g, a, inner)
    gm = g.module(g.call("mul", inner, 2.0), written)
    done = use(gm, table(lambda m: Rewrite(scaled_tanh, (m["x"], m["c"]), may_escape=frozenset({inner}))))
    assert reason(done).startswith("in_place: ")
    assert count(gm, scaled_tanh) == 0


def test_a_copy_that_is_written_to_is_not_looked_through(g: Build, use: Any) -> None:
    a = g.input(3)
    copy = g.call("clone", a)
    g.call("add_", copy, 1.0)
    gm = g.module(tanh2(g, copy))
    t = torch.randn(3)
    before = run(gm, t)
    done = use(gm)
    torch.testing.assert_close(run(gm, t), before)  # of a alone it would be tanh(a), without the 1
    assert reason(done).startswith("in_place: add_")


def test_views_are_known_by_the_graph_too(g: Build, use: Any) -> None:
    # Of an inlined region, values outside may have other fake memory than those inside that they are views of.
    a = g.input(3)
    inner = g.call(torch.tanh, a)
    view = g.call("view", inner, 3, 1)
    view.meta["example_value"] = view.meta["example_value"].clone()
    written = g.call("add_", view, 1.0)
    gm = g.module(g.call("mul", inner, 2.0), written)
    done = use(gm, table(lambda m: Rewrite(scaled_tanh, (m["x"], m["c"]), may_escape=frozenset({inner}))))
    assert reason(done).startswith("in_place: add_")


def test_writes_elsewhere_do_not_matter(g: Build, use: Any) -> None:
    a, b = g.input(3), g.input(3)
    first = g.call("add_", a, 1.0)  # before anything is read
    inner = g.call(torch.tanh, a)
    other = g.call("mul_", b, 2.0)  # other memory
    node = g.call("mul", inner, 2.0)
    after = g.call("sub_", a, 1.0)  # after everything was read
    gm = g.module(node, first, other, after)
    t = [torch.randn(3), torch.randn(3)]
    before = run(gm, *t)
    assert status(use(gm)) == [(REPLACED, "")]
    torch.testing.assert_close(run(gm, *t), before)


def test_a_gradient_that_was_cut_in_the_middle(g: Build, use: Any) -> None:
    a, b = g.input(3, grad=True), g.input(3, grad=True)
    with torch.no_grad():
        inner = g.call(torch.tanh, a)
    gm = g.module(g.call("mul", inner, b))
    done = use(gm, table(lambda m: Rewrite(torch.mul, (m["x"], m["y"])), op("tanh", x) * Var("y")))
    assert reason(done).startswith("no_grad: no gradient flows through tanh")


def test_no_gradient_at_all_is_fine(g: Build, use: Any) -> None:
    with torch.no_grad():
        gm = g.module(tanh2(g, g.input(3, grad=True)))
        done = use(gm)
    assert status(done) == [(REPLACED, "")]
    (new,) = [n for n in gm.graph.nodes if n.target is scaled_tanh]
    assert not new.meta["example_value"].requires_grad


@pytest.mark.parametrize("whole", [False, True], ids=["cut inside", "the site is in no_grad"])
def test_a_result_without_gradient(g: Build, use: Any, whole: bool) -> None:
    """Nothing after the cut requires a gradient either: the op must not bring one back."""
    a = g.input(3, grad=True)
    g.call(torch._C._set_grad_enabled, False)
    tanh = g.call(torch.tanh, a)
    if not whole:
        g.call(torch._C._set_grad_enabled, True)
    product = g.call("mul", tanh, 2.0)
    torch.set_grad_enabled(True)
    gm = g.module(product)
    done = use(gm)
    assert status(done) == ([(REPLACED, "")] if whole else [(MISSED, "no_grad")])
    (result,) = run(gm, torch.randn(3, requires_grad=True))
    torch.set_grad_enabled(True)
    assert not result.requires_grad


def test_an_output_that_is_used_too_early(g: Build, use: Any) -> None:
    a = g.input(3)
    tanh = g.call(torch.tanh, a)
    early = g.call(torch.sigmoid, tanh)
    exp = g.call(torch.exp, a)
    gm = g.module(early, exp)
    done = use(gm, table(lambda m: Rewrite(both, (m["x"],), outputs=(tanh, exp)), op("exp", x)))
    assert reason(done) == "order: tanh is used before exp is computed"


def test_an_operand_that_comes_too_late(g: Build, use: Any) -> None:
    a = g.input(3)
    node = tanh2(g, a)
    late = g.call(torch.exp, a)
    gm = g.module(node, late)
    done = use(gm, table(lambda m: Rewrite(scaled_tanh, (late, 2.0))))
    assert reason(done) == "order: exp is computed after mul"


@pytest.mark.parametrize(
    ("target", "code"),
    [
        (lambda x, c: (torch.tanh(x) * c)[:2], "shape: mul has shape (3,), the op gives (2,)"),
        (lambda x, c: (torch.tanh(x) * c)[None], "shape: "),
        (lambda x, c: (torch.tanh(x) * c).double(), "dtype: mul is torch.float32, the op gives torch.float64"),
        (lambda x, c: (torch.tanh(x) * c).to("meta"), "device: mul is on cpu, the op gives meta"),
        (lambda x, c: (x, x), "kind: mul is Tensor, the op gives tuple"),
        (lambda x, c: x @ torch.zeros(7), "op_failed: <lambda> on fake tensors: RuntimeError"),
    ],
)
def test_a_wrong_op_is_caught(g: Build, use: Any, target: Any, code: str) -> None:
    gm = g.module(tanh2(g, g.input(3)))
    t = torch.randn(3)
    before = run(gm, t)
    done = use(gm, table(lambda m: Rewrite(target, (m["x"], m["c"]))))
    assert reason(done).startswith(code)
    torch.testing.assert_close(run(gm, t), before)


def test_too_few_results_are_caught(g: Build, use: Any) -> None:
    a = g.input(3)
    tanh, exp = g.call(torch.tanh, a), g.call(torch.exp, a)
    gm = g.module(tanh, exp)
    done = use(gm, table(lambda m: Rewrite(torch.tanh, (m["x"],), outputs=(tanh, exp)), op("exp", x)))
    assert reason(done) == "outputs: the op does not give 2 results"


# ------------------------------------------------------------------------------------------------ reasons and switches


def test_a_rules_reason_is_reported_and_parts_of_the_site_are_no_sites(g: Build, use: Any) -> None:
    gm = g.module(tanh2(g, g.input(3)))
    done = use(gm, table(lambda m: Reason("dtype", "not for this dtype"), seed=tanh_seed))
    assert reason(done) == "dtype: not for this dtype"


def test_a_rule_that_passes_leaves_the_seed(g: Build, use: Any) -> None:
    gm = g.module(tanh2(g, g.input(3)))
    done = use(gm, table(lambda m: None, seed=tanh_seed))
    assert reason(done) == "no rule fits: a tanh"
    assert not done.sites[0].rule


def test_a_later_rule_may_take_what_an_earlier_one_refused(g: Build, use: Any) -> None:
    rules = (row(TANH2, lambda m: Reason("no", "not I")), row(TANH2, build_tanh))
    gm = g.module(tanh2(g, g.input(3)))
    assert status(use(gm, Table("scaled_tanh", rules, no_seed))) == [(REPLACED, "")]


def test_parts_of_a_refused_site_stay_open_when_a_smaller_one_is_taken(g: Build, use: Any) -> None:
    # The first rule knows the whole, refuses, and the second takes the outer half: the inner half is a site too.
    whole = op("tanh", op("tanh", x) * 2.0) * 2.0
    rules = (row(whole, lambda m: Reason("no", "not I")), row(TANH2, build_tanh))
    gm = g.module(tanh2(g, tanh2(g, g.input(3))))
    assert status(use(gm, Table("scaled_tanh", rules, no_seed))) == [(REPLACED, "")] * 2
    assert count(gm, scaled_tanh) == 2


@pytest.mark.parametrize("fuel", [0, 1, 2, 3, None])
def test_fuel(g: Build, use: Any, fuel: int | None) -> None:
    a = g.input(3)
    gm = g.module(*(tanh2(g, a, float(c)) for c in range(2, 5)))
    t = torch.randn(3)
    before = run(gm, t)
    done = use(gm, fuel=fuel)
    made = 3 if fuel is None else min(fuel, 3)
    assert count(gm, scaled_tanh) == made
    assert status(done) == [(REPLACED, "")] * made + [(SKIPPED, "out of fuel")] * (3 - made)
    torch.testing.assert_close(run(gm, t), before)


def test_fuel_is_not_burnt_by_what_was_refused(g: Build, use: Any) -> None:
    a = g.input(3)
    good = tanh2(g, a)
    inner = g.call(torch.tanh, a)
    gm = g.module(good, g.call("mul", inner, 3.0), inner)  # the last one, tried first, escapes
    done = use(gm, fuel=1)
    assert sorted(s.status for s in done.sites) == [MISSED, REPLACED]


def test_disabled_patterns(g: Build, use: Any) -> None:
    gm = g.module(tanh2(g, g.input(3)))
    done = use(gm, table(seed=tanh_seed), disable=("scaled_tanh",))
    assert [(s.status, s.node) for s in done.sites] == [(SKIPPED, "mul")]
    assert "disable" in done.sites[0].reason
    assert count(gm, scaled_tanh) == 0


def test_a_later_table_moves_what_a_lazy_output_is_made_of(g: Build, use: Any) -> None:
    a = g.input(3)
    hidden = tanh2(g, a)
    logits = g.call("mul", g.call(torch.exp, hidden), 3.0)
    gm = g.module(g.call("sum", logits), logits)

    def build(m: Match) -> Rewrite:
        (total,) = [u for u in m.anchor.users if u.op == "call_method"]
        lazy = {m.anchor: {"hidden": m["x"], "scale": 3.0}}
        inside, kept = frozenset({total, m.anchor}), frozenset({m.anchor})
        return Rewrite(lazy_sum, (m["x"],), outputs=(total,), inside=inside, may_escape=kept, lazy=lazy)

    first = Table("first", (row(op("exp", x) * 3.0, build),), no_seed)
    done = use(gm, first, table())
    (operands,) = done.lazy.values()
    (new,) = [n for n in gm.graph.nodes if n.target is scaled_tanh]
    assert operands == {"hidden": new, "scale": 3.0}


def lazy_sum(x: torch.Tensor) -> torch.Tensor:
    return (torch.exp(x) * 3.0).sum()


def test_a_rounded_anchor(g: Build, use: Any) -> None:
    def build(m: Match) -> Rewrite:
        return Rewrite(rounded_tanh, (m["x"], m["c"]))

    gm = g.module(g.call("bfloat16", tanh2(g, g.input(3))))
    done = use(gm, table(build, down(TANH2)))
    assert status(done) == [(REPLACED, "")]
    assert next(n.target for n in gm.graph.nodes if n.op != "placeholder") is rounded_tanh


def rounded_tanh(x: torch.Tensor, c: float) -> torch.Tensor:
    return scaled_tanh(x, c).bfloat16()


# --------------------------------------------------------------------------------------------------------------- sweep


def test_sweep_erases_what_nobody_uses(g: Build) -> None:
    a = g.input(3)
    last = g.call(torch.exp, g.call(torch.tanh, a))
    gm = g.module(a)
    sweep(gm.graph, last)
    assert [n.op for n in gm.graph.nodes] == ["placeholder", "output"]


def test_sweep_never_erases_effects(g: Build) -> None:
    a = g.input(3)
    written = g.call("add_", g.call("clone", a), 1.0)
    used = g.call(torch.tanh, a)
    last = g.call("mul", g.call(torch.exp, written), used)
    gm = g.module(used)
    sweep(gm.graph, last)
    assert written in gm.graph.nodes
    assert used in gm.graph.nodes
    assert last not in gm.graph.nodes


def test_sweep_leaves_autocast_and_grad_mode() -> None:
    graph = fx.Graph()
    enter = graph.call_function(compat.autocast_nodes()[0], ("cpu", torch.bfloat16, True, True))
    off = graph.call_function(torch._C._set_grad_enabled, (False,))
    checked = graph.call_function(torch._assert, (True, "never"))
    for node in (enter, off, checked):
        sweep(graph, node)
    assert len(graph.nodes) == 3


@pytest.mark.parametrize(
    ("recorded", "path"),
    [
        ("L['self'].model.layers[0].mlp", "model.layers.0.mlp"),
        ("L['self']._modules['model']._modules['layers']._modules['0']._modules['mlp']", "model.layers.0.mlp"),
        ("L['self']._orig_mod.model", "model"),
        ("L['self'].__dict__['_modules']['model']", "model"),
        ("L['self']", ""),
    ],
)
def test_module_paths(recorded: str, path: str) -> None:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"outer": ("L['self']", object), "inner": (recorded, object)}
    assert module_path(node) == path


def test_no_module_path() -> None:
    assert module_path(fx.Graph().placeholder("x")) == ""


def test_sites_are_plain_records() -> None:
    assert vars(Site("p", "m", MISSED))["reason"] == ""
