"""What the ops of a graph compute: each op's own formula, evaluated for its operands, once for what is in the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

import fastft
from fastft import caches, costs, reporting
from fastft.costs import H100, rates_of, work_of
from fastft.kernels import load
from fastft.kernels._dense_weights import whole
from fastft.kernels._linear_cross_entropy_chunks import chunk_rows
from fastft.kernels._op import OPS, Cost
from fastft.kernels.lora_linear import JOINT
from fastft.kernels.lora_linear import OP as LORA_LINEAR
from fastft.reporting import Report, Work
from tests.kernels._samples import samples


class Net(torch.nn.Module):
    """A norm whose input goes around it, two linear layers that read it, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(64, eps=1e-6)
        self.gate, self.up = torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(64, 96, bias=False)
        self.down = torch.nn.Linear(96, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        y = self.norm(x)
        return self.down(F.silu(self.gate(y)) * self.up(y)) + x


def works(report: Report) -> list[Work]:
    return [s.work for s in report.sites if s.work is not None]


@pytest.mark.parametrize("name", sorted(load()))
def test_every_op_has_numbers(name: str) -> None:
    op = OPS[name]
    for sample in samples(op, n=2):
        work = work_of(op, op.call, sample.args, sample.kwargs, True, {})
        assert work.problem == "", sample.name
        assert work.flops > 0 and work.bytes_moved > 0, sample.name
        assert work_of(op, op.call, sample.args, sample.kwargs, False, {}).bytes_kept == 0


def test_layers_of_different_ranks_are_added_up() -> None:
    x, weights = torch.empty(3, 8, 16), [torch.empty(n, 16) for n in (4, 8, 12)]
    a = [[torch.empty(2, 16)], [], [torch.empty(1, 16), torch.empty(1, 16)]]
    work = work_of(JOINT, JOINT.call, (x, weights, [], a), {"dtype": torch.bfloat16}, True, {})
    assert JOINT.cost is not None and LORA_LINEAR.cost is not None
    two, none = JOINT.cost(24, (4, 12), 16, 2), LORA_LINEAR.cost(24, 8, 16)
    assert work.flops == two.flops + none.flops
    assert work.bytes_kept == two.bytes_kept
    assert work.bytes_moved == two.bytes_moved + none.bytes_moved


def test_layers_that_are_alike_are_evaluated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, stock = [], OPS["rms_norm"].cost
    assert stock is not None

    def counted(*args: Any, **kwargs: Any) -> Cost:
        asked.append(args)
        return stock(*args, **kwargs)

    monkeypatch.setitem(OPS, "rms_norm", dataclasses.replace(OPS["rms_norm"], cost=counted))
    report = fastft.explain(torch.nn.Sequential(*(torch.nn.RMSNorm(64, eps=1e-6) for _ in range(5))), torch.ones(2, 64))
    assert report.counts == {"rms_norm": 5}
    assert len(asked) == 1
    assert len({w.bytes_moved for w in works(report)}) == 1


def test_what_a_later_pattern_took_up_is_counted_there() -> None:
    report = fastft.explain(Net(), torch.randn(4, 64, requires_grad=True))
    assert report.counts == {"rms_norm": 1, "mlp": 1, "residual": 1, "residual_norm": 1}
    by_pattern = {s.pattern: s for s in report.sites}
    assert by_pattern["rms_norm"].work is None
    assert by_pattern["rms_norm"].into == "residual_norm at norm"
    # The norm once, in all.
    assert [w.op for w in works(report)] == ["glu", "lora_linear", "rms_norm"]
    assert sum(w.bytes_moved for w in works(report) if w.op == "rms_norm") == 4 * 64 * 8 + 4 * 4
    modules = {m.path: m for m in report.parts[0].modules}
    assert list(modules) == ["", "norm", "gate", "up", "down"]
    assert (modules["down"].left, modules["down"].into) == ({}, "residual")
    assert (modules["gate"].left, modules[""].left) == ({"linear": 1}, {"mul": 1})
    assert modules["gate"].work == Work("linear", 2 * 4 * 64 * 96, 4 * (4 * 64 + 64 * 96 + 4 * 96))


def test_nothing_is_kept_without_a_gradient() -> None:
    with torch.no_grad():
        report = fastft.explain(Net(), torch.randn(4, 64))
    assert works(report) and all(w.bytes_kept == 0 and w.bytes_moved > 0 for w in works(report))


def test_a_graph_for_any_length_counts_the_length_it_was_traced_with() -> None:
    x = torch.randn(6, 64, requires_grad=True)
    fixed = fastft.explain(Net(), x)
    torch._dynamo.mark_dynamic(x, 0, min=2, max=100)
    found = fastft.explain(Net(), x)
    assert works(found) == works(fixed) and works(found)
    assert found.parts[0].inputs == ["x [6, 64]"]


def test_numbers_leave_no_guard() -> None:
    reporting.reset()
    torch._dynamo.reset()
    call = torch.compile(Net(), backend="fastft", dynamic=True, options={"residual": "eager", "strict": True})
    for rows in (6, 7, 50):
        call(torch.randn(rows, 64))
    assert fastft.report().graphs == 1
    assert not any(w.problem for w in works(fastft.report()))


@pytest.mark.parametrize(
    ("cost", "problem"),
    [
        (None, "the op has no cost formula"),
        (lambda *args, **kwargs: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda *args, **kwargs: Cost(*[sympy.Symbol("n")] * 3), "the cost formula has no value for n"),
    ],
)
def test_a_formula_that_fails_costs_no_site(monkeypatch: pytest.MonkeyPatch, cost: Any, problem: str) -> None:
    monkeypatch.setitem(OPS, "rms_norm", dataclasses.replace(OPS["rms_norm"], cost=cost))
    report = fastft.explain(torch.nn.RMSNorm(64, eps=1e-6), torch.randn(4, 64), options={"strict": True})
    assert report.counts == {"rms_norm": 1} and report.errors == []
    assert works(report) == [Work("rms_norm", problem=problem)]


def test_a_graph_that_could_not_be_compiled_has_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    reporting.reset()
    torch._dynamo.reset()
    monkeypatch.setattr(caches, "unusable", lambda folder: "it is full")
    monkeypatch.setattr(caches, "_EXCHANGED", {})
    torch.compile(Net(), backend="fastft")(torch.randn(4, 64, requires_grad=True))
    report = fastft.report()
    assert report.counts == {} and len(report.missed) == 4
    assert not any(s.work or s.into for s in report.sites)
    assert {m.path: m.left for m in report.parts[0].modules}["down"] == {"linear": 1}


def test_rates() -> None:
    assert rates_of("NVIDIA H100 80GB HBM3") is H100
    assert rates_of("NVIDIA H100 PCIe") not in (H100, None)
    assert rates_of("cpu") is None
    work = Work("op", flops=75 * 10**9, bytes_moved=3 * 10**6)
    assert H100.seconds(work) == pytest.approx(1e-4) and H100.bound(work) == "compute"
    work = Work("op", flops=10**6, bytes_moved=3 * 10**9)
    assert H100.seconds(work) == pytest.approx(1e-3) and H100.bound(work) == "memory"


def test_caveats_are_of_ops() -> None:
    assert costs.CAVEATS.keys() - {"linear"} <= load().keys()
    assert costs.ADAPTERS.keys() <= load().keys()


# ----------------------------------------------------------------------------------------------------------- raw calls


def called(op: Any, *args: Any, result: Any = None) -> fx.Node:
    """A call in a graph, as AOTAutograd's is: tensors are nodes that have them as values."""
    graph = fx.Graph()

    def node(x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [node(one) for one in x]
        if not isinstance(x, torch.Tensor):
            return x
        new = graph.placeholder("x")
        new.meta["val"] = x
        return new

    call = graph.call_function(op, tuple(map(node, args)))
    call.meta["val"] = result
    return call


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_raw_calls_have_their_ops_formulas() -> None:
    q, k = meta(2, 8, 64, 16), meta(2, 4, 64, 16)
    mask = (*(None,) * 8, True, 0, 0, 0.25, 0.0)
    attention = called(torch.ops.fastft.attention.default, q, k, k, *mask, result=(q, q))
    work = costs.raw_work(attention, int, {})
    assert (work.flops, work.problem) == (2 * 2 * 8 * 64 * 32 * 32, "")
    x, w, b = meta(4, 64, 32), meta(48, 32), meta(48, 8)
    shape = (x, [w], [], [], [64, 64], [None], meta(256, 8), [1], [b], [None], [2.0], None, torch.bfloat16)
    linear = called(torch.ops.fastft.lora_linear.default, *shape, result=[meta(4, 64, 48)])
    assert costs.raw_work(linear, int, {}).flops == 2 * 256 * 48 * 32 + 2 * 256 * 8 * (48 + 32)
    mm = called(torch.ops.aten.mm.default, meta(3, 5), meta(5, 7), result=meta(3, 7))
    assert vars(costs.raw_work(mm, int, {})) == vars(Work("aten::mm", 2 * 3 * 5 * 7, 2 * (15 + 35 + 21)))
    maths = (None, meta(6, dtype=torch.int64), -100, None, 1.0, 1.0, 0.0, 0.0, torch.bfloat16, "chunks", *[False] * 4)
    for gradients in ((False, False), (True, False), (True, True)):  # of the hidden states, of the weight
        op = torch.ops.fastft.linear_log_prob.default
        work = costs.raw_work(called(op, meta(6, 5), meta(7, 5), *maths, *gradients, False), int, {})
        products = 1 + sum(gradients)
        assert (work.flops, work.bytes_moved) == (products * 2 * 6 * 5 * 7, products * 2 * (30 + 35 + 42))
    view = called(torch.ops.aten.view.default, meta(4, 4), [16], result=meta(16))
    assert costs.raw_work(view, int, {}).bytes_moved == 0


def forward_work(op: Any, n: int) -> Iterator[tuple[Work, Work]]:
    """What an op's samples compute: by its raw calls, and by its formula."""
    for sample in samples(op, n=n):
        values, tree = tree_flatten((sample.args, sample.kwargs))
        at = [i for i, x in enumerate(values) if isinstance(x, torch.Tensor)]

        def call(*tensors: torch.Tensor, values: list[Any] = values, at: list[int] = at, tree: Any = tree) -> Any:
            given = dict(zip(at, tensors, strict=True))
            args, kwargs = tree_unflatten([given.get(i, x) for i, x in enumerate(values)], tree)
            return op.call(*args, **kwargs)

        graph = make_fx(call, tracing_mode="fake")(*[values[i].detach() for i in at]).graph
        raw = [costs.raw_work(node, int, {}) for node in graph.nodes if node.op == "call_function"]
        yield costs.added(op.name, raw), costs.work_of(op, None, sample.args, sample.kwargs, False, {})


@pytest.mark.parametrize("name", sorted(load()))
def test_raw_calls_compute_what_the_formula_says(name: str) -> None:
    """Products count as such in a joint graph too: of an op without, twice the size is no more work for each byte."""
    op = load()[name]
    products = name.startswith(("attention", "lora_linear", "lora_mlp", "lora_stack"))
    for (raw, work), (_, large) in zip(forward_work(op, 1), forward_work(op, 4), strict=True):
        assert not raw.problem and not work.problem and raw.bytes_moved > 0
        if products:  # a rank takes whole columns
            assert work.flops <= raw.flops < 1.5 * work.flops
        elif not name.startswith("linear_"):  # a loss is never computed again
            assert large.flops / large.bytes_moved < 1.5 * work.flops / work.bytes_moved


def test_what_ops_take_for_themselves() -> None:
    maths = (-100, None, 1.0, 1.0, 0.0, 0.0, torch.bfloat16, "chunks", *[False] * 4, True, False, False)
    labels = meta(5000, dtype=torch.int64)
    loss = called(torch.ops.fastft.linear_log_prob.default, meta(5000, 64), meta(128256, 64), None, labels, *maths)
    assert costs.scratch(loss)(int) == chunk_rows(5000, 128256, 2, 64) * 128256 * 2
    head = (meta(5000, 4096), meta(128256, 4096), None, labels)
    loss = called(torch.ops.fastft.linear_log_prob.default, *head, *maths[:-2], True, False)
    saved = [meta(5000, dtype=torch.float32)] * 3
    options = (*maths[:8], True, True, False)
    backward = called(
        torch.ops.fastft.linear_log_prob_backward.default, saved[0], None, None, None, *head, *saved, *options
    )
    for trained in (loss, backward):  # half of the tokens: two chunks need no sum in fp32
        assert costs.scratch(trained)(int) == 2560 * 128256 * 2
    # Of more it is summed in fp32: the 1B with 16,384 tokens takes 1 GiB of logits, and as much for the sum.
    for tokens, dtype, own in ((8192, torch.bfloat16, 0), (16384, torch.bfloat16, 4), (16384, torch.float32, 0)):
        head = (meta(tokens, 2048), meta(128256, 2048, dtype=dtype), None, meta(tokens, dtype=torch.int64))
        loss = called(torch.ops.fastft.linear_log_prob.default, *head, *maths[:-2], True, False)
        assert costs.scratch(loss)(int) == 4096 * 128256 * 2 + 128256 * 2048 * own
        untrained = called(torch.ops.fastft.linear_log_prob.default, *head, *maths)
        assert costs.scratch(untrained)(int) == chunk_rows(tokens, 128256, 2, 2048) * 128256 * 2
    half = (meta(500, 64), meta(1000, 64, dtype=torch.float16), None, meta(500, dtype=torch.int64))
    loss = called(torch.ops.fastft.linear_log_prob.default, *half, *maths[:-2], True, False)
    saved = [meta(500, dtype=torch.float32)] * 3
    backward = called(
        torch.ops.fastft.linear_log_prob_backward.default, saved[0], None, None, None, *half, *saved, *options
    )
    logits = chunk_rows(500, 1000, 2, 64, True) * 1000 * 2
    assert [costs.scratch(n)(int) - logits for n in (loss, backward)] == [0, 1000 * 64 * 4]
    fused = (*maths[:7], "fused", *maths[8:])
    loss = called(torch.ops.fastft.linear_log_prob.default, meta(5000, 64), meta(128256, 64), None, labels, *fused)
    assert costs.scratch(loss)(int) == 28 * 5000 * 32, "seven numbers for each token and part of the vocabulary"
    x, packed = meta(4, 64, 32), meta(768, 1, dtype=torch.uint8)
    rest = ([None], None, [0], [], [], [], None, torch.bfloat16)
    for quant, wanted in (([packed], 48 * 32 * 2), ([], 0)):
        linear = called(torch.ops.fastft.lora_linear.default, x, [packed], quant, [48, 32], [64, 256], *rest)
        assert costs.scratch(linear)(int) == wanted
    assert costs.scratch(called(torch.ops.aten.mm.default, meta(3, 5), meta(5, 7)))(int) == 0


def test_dense_weights_stay_for_the_next_product() -> None:
    two, quant, a = [meta(768, 1, dtype=torch.uint8)] * 2, [meta(24)] * 2, [meta(3, 64), meta(3, 64)]
    where, dense = (two, quant, [8, 64, 16, 64], [64, 256] * 2), (8 + 16 + whole(6)) * 64 * 2
    stack = called(torch.ops.fastft.lora_stack.default, meta(4, 5, 64), *where, a)
    assert costs.lasting(stack)(int) == costs.scratch(stack)(int) == dense
    dy, b = [meta(4, 5, 8), meta(4, 5, 16)], [meta(8, 3), meta(16, 3)]
    rest = ([False] * 2, None, [1.0] * 2, torch.bfloat16, torch.bfloat16, True, True, *[[False] * 2] * 5)
    linears = called(torch.ops.fastft.lora_linear_backward.default, dy, None, *where, [1, 1], a, b, [None] * 2, *rest)
    assert costs.lasting(linears)(int) == dense < costs.scratch(linears)(int)  # the gradients side by side go
    labels = meta(500, dtype=torch.int64)
    maths = (-100, None, 1.0, 1.0, 0.0, 0.0, torch.bfloat16, "chunks", *[False] * 4, True, False, False)
    loss = called(torch.ops.fastft.linear_log_prob.default, meta(500, 64), meta(1000, 64), None, labels, *maths)
    assert costs.lasting(loss)(int) == 0 < costs.scratch(loss)(int)


def test_what_attention_takes_for_itself() -> None:
    """cuDNN's backward: 259 MiB for 4 x 2,048 tokens of 32 heads of 128 (2026-11-26-h100-kernels-attention.json)."""
    q, k = (torch.empty(4, 2048, heads, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2) for heads in (32, 8))
    lse = torch.empty(4, 32, 2048, device="meta")

    def scratch(q: torch.Tensor = q, causal: bool = True, window: int = 0, softcap: float = 0.0) -> int:
        mask = {"causal": causal, "window": window, "softcap": softcap, "chunk": 0, "scale": 0.1, "dropout_p": 0.0}
        schema = torch.ops.fastft.attention_backward.default._schema
        rest = [mask.get(a.name) for a in schema.arguments[9:]]
        call = called(torch.ops.fastft.attention_backward.default, q, q, k, k, q, lse, True, True, False, *rest)
        return costs.scratch(call)(int)

    assert scratch() == pytest.approx(259 * 2**20, rel=0.02)
    assert scratch(causal=False) == scratch(window=100) == scratch(softcap=30.0) == scratch(q.float()) == 0
    assert scratch(q.expand(4, 32, 2048, 128).repeat(64, 1, 1, 1)) == 0, "2³¹ numbers, which cuDNN is not asked for"


def test_what_products_of_several_layers_take_for_themselves() -> None:
    """All weights below each other, and A up to whole rows and the copied gradients where there is one product."""
    two, quant, a = [meta(768, 1, dtype=torch.uint8)] * 2, [meta(24)] * 2, [meta(3, 64), meta(3, 64)]
    dense = (8 + 16 + whole(6)) * 64 * 2
    where = (two, quant, [8, 64, 16, 64], [64, 256] * 2)
    stack = called(torch.ops.fastft.lora_stack.default, meta(4, 5, 64), *where, a)
    assert costs.scratch(stack)(int) == dense
    stack = called(torch.ops.fastft.lora_stack_backward.default, meta(4, 5, 32), None, *where, a, True, [True] * 2)
    assert costs.scratch(stack)(int) == dense
    stack = called(torch.ops.fastft.lora_stack.default, meta(4, 5, 64), [meta(8, 64)], [], [], [0, 0], [meta(3, 64)])
    assert costs.scratch(stack)(int) == 0
    dy, b = [meta(4, 5, 8), meta(4, 5, 16)], [meta(8, 3), meta(16, 3)]
    for together, own, wanted in (
        (True, [False] * 2, dense + 20 * (24 + whole(6)) * 2),
        (True, [False, True], (24 + whole(3)) * (64 + 20) * 2),
        (False, [False] * 2, 24 * 64 * 2),
    ):
        rest = (own, None, [1.0] * 2, torch.bfloat16, torch.bfloat16, together, True, *[[False] * 2] * 5)
        linears = called(
            torch.ops.fastft.lora_linear_backward.default, dy, None, *where, [1, 1], a, b, [None] * 2, *rest
        )
        assert costs.scratch(linears)(int) == wanted
    rest = ([None] * 2, None, [0, 0], [], [], [], None, torch.bfloat16)
    linears = called(torch.ops.fastft.lora_linear.default, meta(4, 5, 64), *where, *rest)
    assert costs.scratch(linears)(int) == 24 * 64 * 2
