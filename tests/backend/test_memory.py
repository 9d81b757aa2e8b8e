"""``options={"memory": ...}`` on a tiny Llama: right at every level, what is saved is what was predicted, budgets hold
for batches of any size, and out of memory is no end.
"""

from __future__ import annotations

import contextlib
import math
import operator
import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

import fastft
from fastft import _torch_compat as compat
from fastft import costs, memory, offload, partitioner, reporting
from fastft.kernels import lora_mlp
from fastft.memory import MEASURED, Memory, Planned, layouts
from fastft.options import OptionError, Options, bytes_of
from fastft.partitioner import Walk, drop_views
from fastft.planner import (
    ALL,
    ALL_OFFLOADED,
    ATTENTION,
    ATTENTION_OFFLOADED,
    CHEAP,
    KEEP,
    MLP,
    MLP_OFFLOADED,
    OFFLOADED,
)
from tests.models import _families as families
from tests.models._training import Step, check_equal, compiled, step


def batch(seq: int = 24, size: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, families.VOCAB, (size, seq), generator=torch.Generator().manual_seed(seq))
    return {"input_ids": ids, "labels": ids}


def model(checkpointing: bool = False, lora: float | None = None, dropout: float = 0.0) -> torch.nn.Module:
    network = families.build("llama3", lora=lora, checkpointing=checkpointing)
    for module in network.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return network


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every plan have these levels."""

    def force(*levels: str) -> None:
        planned = Memory._planned

        def instead(self: Memory, cut: Any) -> Any:
            wanted = list(levels) * cut.count if len(levels) == 1 else list(levels)
            return cut.at(wanted).halves, self._plan(cut, wanted)

        monkeypatch.setattr(Memory, "_planned", instead if levels else planned)

    return force


def run(network: torch.nn.Module, data: dict[str, Any] | None = None, **options: Any) -> Step:
    return step(network, data or batch(), call=compiled(network, **options))


def same(got: Step, wanted: Step) -> None:
    """Bit for bit."""
    assert got[1].keys() == wanted[1].keys()
    assert torch.equal(got[0], wanted[0])
    for name, gradient in wanted[1].items():
        assert torch.equal(got[1][name], gradient), name


def saved_bytes(network: torch.nn.Module, call: Any) -> int:
    """Bytes that autograd saves for the backward, without those of weights and inputs."""
    data, found = batch(), {}
    theirs = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers(), *data.values())}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in theirs:
            found[storage.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = call(**data).loss
    loss.backward()
    return sum(found.values())


def the_plan() -> dict[str, Any]:
    (row,) = fastft.report().memory
    return row


# ------------------------------------------------------------------------------------------------------------- levels


@pytest.mark.parametrize(("checkpointing", "lora"), [(False, None), (True, 0.0)])
def test_every_level_computes_the_same(at: Any, checkpointing: bool, lora: float | None) -> None:
    network = model(checkpointing, lora)
    eager = step(network, batch())
    at(KEEP)
    wanted = run(network, memory="fast")
    check_equal(wanted, eager)
    kept, peaks = [], []
    mixed = ((ALL, KEEP), (ATTENTION, MLP)) if checkpointing else ()
    for levels in ((KEEP,), (CHEAP,), (MLP,), (ATTENTION,), (ALL,), *mixed):
        at(*levels)
        call = compiled(network, memory="fast", lazy_logits=False)  # which would keep hidden states for themselves
        same(step(network, batch(), call=call), wanted)
        row = the_plan()
        assert saved_bytes(network, call) == row["kept"], levels
        assert fastft.report().errors == []
        if len(levels) == 1:
            assert row["levels"] == {levels[0]: families.LAYERS}
            kept.append(row["kept"])
            peaks.append(row["predicted"])
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept)
    assert peaks[-1] < peaks[0]


OFFLOADING = (
    (ALL_OFFLOADED,),
    (ATTENTION_OFFLOADED,),
    (MLP_OFFLOADED,),
    (KEEP, ALL_OFFLOADED),
    (ATTENTION_OFFLOADED, MLP),
    (MLP_OFFLOADED, CHEAP),
)


@pytest.mark.parametrize("levels", OFFLOADING, ids=" / ".join)
def test_offloading_changes_nothing(at: Any, levels: tuple[str, ...]) -> None:
    network = model(checkpointing=len(levels) == 1, lora=0.3)
    at(*(OFFLOADED.get(level, level) for level in levels))
    options = {"memory": "fast", "host_memory": "1GiB", "lazy_logits": False}
    wanted = run(network, **options)
    before = the_plan()
    assert before["host"] == 0
    at(*levels)
    call = compiled(network, **options)
    same(step(network, batch(), call=call), wanted)
    row = the_plan()
    assert row["kept"] + row["host"] == before["kept"] and row["host"] > 0
    assert saved_bytes(network, call) == before["kept"]  # which does not ask where it is
    assert offload.STARTED == {}
    here = sum(len(free) for free in offload.POOL.free.values())
    same(step(network, batch(), call=call), wanted)
    assert sum(len(free) for free in offload.POOL.free.values()) == here  # buffers are used again


def test_what_is_offloaded_survives_a_second_backward(at: Any) -> None:
    network = model(lora=None)
    at(ALL_OFFLOADED)
    loss = compiled(network, memory="fast")(**batch()).loss
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    loss.backward()
    assert first and all(torch.equal(p.grad, first[n]) for n, p in network.named_parameters() if n in first)


def test_lean_offloads_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six layers, two are on the device at a time; and more host memory never makes a plan that needs more."""
    monkeypatch.setitem(families._SIZES, "num_hidden_layers", 6)
    network = model(checkpointing=True, lora=0.0)
    rows = {}
    for host in (0, 30_000, "1GiB"):
        check_equal(run(network, memory="lean", host_memory=host), step(network, batch()))
        rows[host] = the_plan()
    assert rows[0]["host"] == 0 and rows[30_000]["host"] <= 30_000 < rows["1GiB"]["host"]
    assert rows["1GiB"]["predicted"] < rows[30_000]["predicted"] <= rows[0]["predicted"]


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Both halves of graphs that tensors were moved in, and the regions of the forward's nodes."""
    made: list[Any] = []
    move = offload.offload

    def noted(forward: Any, backward: Any, moved: Any, landings: Any, regions: Any, turns: Any) -> None:
        move(forward, backward, moved, landings, regions, turns)
        made.append((forward, backward, regions))

    monkeypatch.setattr(offload, "offload", noted)
    return made


def named(half: torch.fx.GraphModule, op: Any) -> list[torch.fx.Node]:
    return [n for n in half.graph.nodes if n.target is op]


@pytest.mark.parametrize(
    ("checkpointing", "small", "little"), [(False, 16, 2**20), (True, 16, 2**20), (True, 15, 2**20), (True, 15, 768)]
)
def test_all_that_is_kept_up_to_the_mlp_is_offloaded(
    at: Any, moves: list[Any], monkeypatch: pytest.MonkeyPatch, checkpointing: bool, small: int, little: int
) -> None:
    """Of each layer its input, q, k, v, attention's result and the stream after it; also the logsumexp, a 16th of
    these and 768 bytes, where that is not both too small and too little. Nothing else stays.
    """
    monkeypatch.setattr(partitioner, "SMALL", small)
    monkeypatch.setattr(partitioner, "LITTLE", little)
    network = model(checkpointing=checkpointing)
    at(ALL_OFFLOADED)
    run(network, memory="fast")
    nothing = the_plan()["kept"]
    at(MLP_OFFLOADED)
    run(network, memory="fast")
    row = the_plan()
    stays = 4 if small < 16 and little > 768 else 0
    each_token = 64 + (64 + 32 + 32) + (64 + 4 - stays) + 64
    all_tokens = families.LAYERS * 2 * 24 * 4
    assert (row["kept"], row["host"]) == (nothing + all_tokens * stays, all_tokens * each_token)
    forward, backward, _ = moves[-1]
    moved = families.LAYERS * (6 if stays else 7)
    assert len(named(forward, offload.OFFLOAD)) == len(named(backward, offload.RELOAD)) == moved


@pytest.mark.parametrize("rate", [1e3, 1e15])
def test_a_copy_is_waited_for_when_it_is_done(
    at: Any, moves: list[Any], monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    """At the end of the region after its own, or, where the link takes longer, later: here with the loss."""
    monkeypatch.setitem(families._SIZES, "num_hidden_layers", 4)
    monkeypatch.setattr(memory, "HOST_BYTES_PER_SECOND", rate)
    network = model(checkpointing=True)
    at(MLP_OFFLOADED)
    check_equal(run(network, memory="fast"), step(network, batch()))
    forward, _, regions = moves[-1]
    order = {n: i for i, n in enumerate(forward.graph.nodes)}
    ends = [max(i for n, i in order.items() if regions.get(n.name) == r) for r in range(4)]
    (loss,) = (i for n, i in order.items() if n.target is torch.ops.fastft.linear_log_prob.default)
    waits = [order[n] for n in named(forward, offload.OFFLOAD_WAIT)]
    assert len(waits) == 4 * 7
    for r, end in enumerate(ends):  # the first layer's copies are waited for when the second ends
        after_it = [i for i in waits if end < i < (*ends, loss)[r + 1]]
        assert len(after_it) == (7 if rate > 1e9 and r else 0), r
    assert sum(i > loss for i in waits) == (7 if rate > 1e9 else 28)


def test_a_slow_link_needs_memory(at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on its way is on the device, and the plan knows."""
    monkeypatch.setitem(families._SIZES, "num_hidden_layers", 10)
    network = model(checkpointing=True, lora=0.0)
    peaks = []
    for rate in (1e15, 1e3):
        monkeypatch.setattr(memory, "HOST_BYTES_PER_SECOND", rate)
        at(MLP_OFFLOADED)
        peaks.append(fastft.explain(network, **batch(), options={"memory": "fast"}).memory[0]["predicted"])
    assert peaks[0] < peaks[1]


def test_moves_give_what_they_say() -> None:
    """Fake and real results are alike, of tensors of any strides, and there is one wait for each start."""
    for x in (torch.randn(3, 4), torch.randn(2, 3, 4, 5, dtype=torch.bfloat16).permute(0, 2, 1, 3), torch.ones(0, 2)):
        ticket = offload.OFFLOAD(x)
        host = offload.OFFLOAD_WAIT(ticket, x)
        back = offload.RELOAD_WAIT(offload.RELOAD(host, -1), host, -1)
        with compat.fake_mode() as mode:
            fake = mode.from_tensor(x)
            fake_host = offload.OFFLOAD_WAIT(offload.OFFLOAD(fake), fake)
            fake_back = offload.RELOAD_WAIT(offload.RELOAD(fake_host, -1), fake_host, -1)
        for real, said in ((host, fake_host), (back, fake_back)):
            assert (torch.equal(real, x) and real.data_ptr() != x.data_ptr()) or not x.numel()
            assert (real.shape, real.stride(), real.dtype) == (said.shape, said.stride(), said.dtype)
        with pytest.raises(KeyError):
            offload.OFFLOAD_WAIT(ticket, x)
    offload.OFFLOAD(torch.ones(2))
    offload.abandon()
    assert offload.STARTED == {}


def test_host_buffers_are_exact_and_used_again() -> None:
    pool = offload.Pool()
    x = torch.randn(3, 7, dtype=torch.bfloat16)
    one = pool.like(x)
    assert (one.shape, one.stride(), one.dtype) == (x.shape, x.stride(), x.dtype)
    assert one.untyped_storage().nbytes() == 42
    part, address = one[1:], one.data_ptr()
    del one
    assert pool.free == {}  # a view still has it
    two = pool.like(x)
    assert two.data_ptr() != address
    del part
    assert pool.like(x).data_ptr() == address
    assert pool.like(torch.ones(2)).untyped_storage().nbytes() == 8


def test_pinned_memory_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer over the limit is not pinned; buffers of other sizes that nobody uses make room first."""
    pinned: dict[int, int] = {}

    class Runtime:
        def cudaHostRegister(self, address: int, number: int, flags: int) -> int:
            pinned[address] = number
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            del pinned[address]
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    page = offload.PAGE
    pool = offload.Pool(limit=10 * page)
    kept = pool._made(6 * page - 1, pin=True)
    ((address, number),) = pinned.items()
    assert (pool.pinned, number, kept.numel()) == (6 * page - 1, 6 * page, 6 * page - 1)
    assert address == kept.data_ptr() and address % page == 0
    over = pool._made(6 * page, pin=True)
    assert (pool.pinned, list(pinned.values()), over.numel()) == (6 * page - 1, [6 * page], 6 * page)
    pool._back(6 * page - 1, kept)
    del kept
    other = pool._made(7 * page, pin=True)
    assert (pool.pinned, list(pinned.values()), pool.free) == (7 * page, [7 * page], {})
    del other
    assert (pool.pinned, pinned) == (0, {})


class Slow:
    """CUDA's runtime, which pins when it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.begun, self.threads = threading.Semaphore(0), threading.Semaphore(0), set[str]()
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def cudaHostRegister(self, address: int, number: int, flags: int) -> int:
        self.threads.add(threading.current_thread().name)
        self.begun.release()
        assert self.go.acquire(timeout=10)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0


def prepared(pool: offload.Pool) -> dict[int, int]:
    """How many buffers of each size there are, once whoever makes them is done."""
    if (thread := pool._preparing) is not None:
        thread.join(60)
    return {n: len(free) for n, free in pool.free.items()}


def test_buffers_are_pinned_beside_the_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are wanted, no more than the limit allows, and none that is there or was made meanwhile."""
    cuda, device = Slow(monkeypatch), torch.device("cuda", 0)
    pool = offload.Pool(limit=1000)
    pool.prepare([100, 100, 100, 60], device)
    assert cuda.begun.acquire(timeout=60) and pool.free == {}  # it is at the first, and nobody waits for it
    mine = [pool.like(torch.empty(n, dtype=torch.uint8)) for n in (100, 60)]
    cuda.go.release(9)
    assert prepared(pool) == {100: 2} and pool.pinned == 200 and cuda.threads == {"fastft-pins"}
    del mine
    assert prepared(pool) == {100: 3, 60: 1}
    pool.prepare([100] * 4 + [60], device)
    assert prepared(pool) == {100: 4, 60: 1} and pool.pinned == 300
    pool.prepare([500, 500], device)
    assert prepared(pool) == {100: 4, 60: 1, 500: 1} and pool.pinned == 800, "the limit"
    assert not any(pool.wanted.values()) and pool._preparing is None


def test_what_goes_wrong_beside_the_compilation_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Slow(monkeypatch)
    pool = offload.Pool(limit=1000)
    monkeypatch.setattr(pool, "_made", lambda number, pin: 1 / 0)
    pool.prepare([100], torch.device("cuda", 0))
    assert prepared(pool) == {} and "pinned as it is needed, not ahead: division by zero" in caplog.text
    assert pool._preparing is None


def test_what_is_prepared_is_what_the_plan_offloads(at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    made: list[int] = []
    monkeypatch.setattr(memory, "_device", lambda gm: torch.device("cuda", 0))
    monkeypatch.setattr(Memory, "_budget", lambda self: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    pool = offload.Pool()
    monkeypatch.setattr(pool, "prepare", lambda sizes, device: asked.append(list(sizes)))

    def buffer(number: int, pin: bool) -> torch.Tensor:
        made.append(number)
        return torch.empty(number, dtype=torch.uint8)

    monkeypatch.setattr(pool, "_made", buffer)
    monkeypatch.setattr(offload, "POOL", pool)
    at(MLP_OFFLOADED)
    network = model(checkpointing=True)
    run(network, memory="fast", host_memory="1GiB")
    assert len(asked) == 1 and made and Counter(asked[0]) == Counter(made)
    fastft.explain(network, **batch(), options={"memory": "fast", "host_memory": "1GiB"})
    assert len(asked) == 1, "a plan that nobody runs"


def test_dropout_is_drawn_once(at: Any) -> None:
    """What is recomputed draws the masks that the forward drew."""
    network = model(lora=0.3)
    at(KEEP)
    wanted = run(network, memory="fast")
    for level in (MLP, ALL):
        at(level)
        same(run(network, memory="fast"), wanted)


@pytest.mark.parametrize(("family", "again"), [("llama3", 0), ("qwen3", 2)])
def test_what_a_rotary_embedding_made_is_kept_in_place_of_what_it_turned(
    family: str, again: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its backward reads neither, and both are as large; but what a norm made before it is computed again anyway."""
    halves: list[torch.fx.GraphModule] = []
    planned = Memory._planned

    def instead(self: Memory, cut: Any) -> Any:
        halves[:] = cut.at([CHEAP] * cut.count).halves
        return planned(self, cut)

    monkeypatch.setattr(Memory, "_planned", instead)
    network = families.build(family, checkpointing=True)
    run(network, memory="fast", disable=["norm_rotary"])
    ops = [getattr(n.target, "_schema", None) for n in halves[1].graph.nodes]
    names = [schema.name.removeprefix("fastft::") for schema in ops if schema is not None]
    assert names.count("rotary") == again and names.count("rotary_backward") == 2
    assert names.count("rms_norm") > 0


def test_a_layers_input_is_all_that_is_kept_of_it(at: Any) -> None:
    network = model(checkpointing=True)
    at(ALL)
    run(network, memory="fast")
    one = 2 * 24 * 64 * 4
    kept = the_plan()["kept"]
    # Three streams (two inputs, the last norm's), the norm's rstd, tables, what the loss keeps: the head's gradient.
    assert 3 * one < kept - families.VOCAB * 64 * 4 < 5 * one
    at(ATTENTION)
    run(network, memory="fast")
    out_and_lse = families.LAYERS * 2 * 24 * 4 * (16 + 1) * 4
    assert the_plan()["kept"] - kept == out_and_lse


def test_views_of_nothing_new_are_dropped() -> None:
    joint = torch.fx.GraphModule({}, torch.fx.Graph())
    x = joint.graph.placeholder("x")
    same, flat = (joint.graph.call_function(torch.ops.aten.view.default, (x, shape)) for shape in ([4, 2], [8]))
    for node, shape in ((x, (4, 2)), (same, (4, 2)), (flat, (8,))):
        node.meta["val"] = torch.empty(shape, device="meta")
    read = [joint.graph.call_function(torch.ops.aten.neg.default, (node,)) for node in (same, flat)]
    joint.graph.output((*read, same))
    drop_views(joint)
    assert [node.args[0] for node in read] == [x, flat]
    assert next(iter(reversed(joint.graph.nodes))).args[0][-1] is same


def test_results_of_a_call_are_there_beside_its_operands() -> None:
    """Those of a call with several results, too, of which the graph has items."""
    one = torch.empty(8, 16, device="meta")

    def half(*inputs: str) -> tuple[torch.fx.GraphModule, Any]:
        made = torch.fx.GraphModule({}, torch.fx.Graph())

        def call(target: Any, *args: Any, several: bool = False) -> torch.fx.Node:
            node = made.graph.call_function(target, args)
            node.meta["val"] = (one, one) if several else one
            return node

        nodes = [made.graph.placeholder(name) for name in inputs]
        for node in nodes:
            node.meta["val"] = one
        return made, (nodes, call)

    forward, ((x,), call) = half("primals_1")
    gate, up = call(torch.ops.aten.neg.default, x), call(torch.ops.aten.abs.default, x)
    forward.graph.output((call(torch.ops.aten.mul.Tensor, gate, up), gate, up))
    backward, ((gate, up, dy), call) = half(gate.name, up.name, "tangents_1")
    both = call(torch.ops.fastft.glu_backward.default, dy, gate, up, "silu", True, True, several=True)
    grads = [call(operator.getitem, both, i) for i in range(2)]
    backward.graph.output((call(torch.ops.aten.add.Tensor, *grads),))
    assert Walk(forward, backward, 1, {}).peak({}) == 6 * 8 * 16 * 4  # with the forward's result, which the caller has

@pytest.mark.parametrize("recorded", [False, True])
def test_what_a_cuda_graph_keeps_stays(recorded: bool) -> None:
    """The backward frees one of two that are kept when it has read it; recorded, it has both to its end."""
    one = torch.empty(8, 16, device="meta")

    def half(inputs: list[str], targets: list[tuple[Any, list[int]]], results: list[int]) -> torch.fx.GraphModule:
        made = torch.fx.GraphModule({}, torch.fx.Graph())
        nodes = [made.graph.placeholder(name) for name in inputs]
        for target, of in targets:
            nodes.append(made.graph.call_function(target, tuple(nodes[i] for i in of)))
        for node in nodes:
            node.meta["val"] = one
        made.graph.output(tuple(nodes[i] for i in results))
        return made

    ops = torch.ops.aten
    forward = half(["primals_1"], [(ops.neg.default, [0]), (ops.abs.default, [0]), (ops.exp.default, [0])], [3, 1, 2])
    then = [(ops.sin.default, [0]), (ops.cos.default, [2]), (ops.add.Tensor, [3, 1])]
    walk = Walk(forward, half(["neg_default", "abs_default"], then, [4]), 1, {}, recorded=recorded)
    assert walk.peak({}) == (5 if recorded else 4) * 8 * 16 * 4
    assert walk.held({})[1] == Walk(forward, half(["neg_default", "abs_default"], then, [4]), 1, {}).held({})[1]


@pytest.mark.parametrize("recorded", [False, True])
def test_gradients_are_copied_to_a_cuda_graph(recorded: bool) -> None:
    """The one that the backward begins with is freed when it has been read; recorded, it and its copy stay."""
    one = torch.empty(8, 16, device="meta")

    def half(name: str, *targets: Any) -> torch.fx.GraphModule:
        made = torch.fx.GraphModule({}, torch.fx.Graph())
        node = made.graph.placeholder(name)
        for target in targets:
            node = made.graph.call_function(target, (node,))
        for node in made.graph.nodes:
            node.meta["val"] = one
        made.graph.output((node,))
        return made

    ops = torch.ops.aten
    backward = half("tangents_1", ops.sin.default, ops.cos.default, ops.exp.default)
    walk = Walk(half("primals_1", ops.neg.default), backward, 1, {}, recorded=recorded)
    assert walk.peak({}) == (5 if recorded else 3) * 8 * 16 * 4


@pytest.mark.parametrize(("last", "peak"), [("keeps", 100), ("frees", 0)])
def test_what_an_op_leaves_behind_is_there_later(monkeypatch: pytest.MonkeyPatch, last: str, peak: int) -> None:
    """From one step to the next, too; an MLP by slices frees it first."""
    takes = {torch.ops.aten.neg.default: (130, 100), torch.ops.aten.abs.default: (0, 0)}
    takes[torch.ops.aten.exp.default] = (40, 40) if last == "keeps" else (50, None)

    def of(node: torch.fx.Node, i: int) -> Any:
        number = takes.get(node.target, (0, 0))[i]  # type: ignore[arg-type]
        return None if number is None else lambda size: number

    monkeypatch.setattr("fastft.partitioner.scratch", lambda node: of(node, 0))
    monkeypatch.setattr("fastft.partitioner.lasting", lambda node: of(node, 1))
    halves, value = [], torch.empty(8, 16, device="meta")
    for targets in (("abs", "neg"), ("exp",)):
        half = torch.fx.GraphModule({}, torch.fx.Graph())
        node = half.graph.placeholder("primals_1")
        node.meta["val"] = value
        for target in targets:
            node = half.graph.call_function(getattr(torch.ops.aten, target).default, (node,))
            node.meta["val"] = value
        half.graph.output((node,))
        halves.append(half)
    lives = [live for _, live in Walk(*halves, 1, {})._lives({})]
    one = 8 * 16 * 4
    assert lives == [peak, one + peak, 2 * one + 130, one + 100, 2 * one + (100 if last == "keeps" else 50)]


def test_the_optimizer_keeps_two_tensors_like_each_trained_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        network = model().to(dtype)
        run(network, memory="fast")
        found[dtype] = the_plan()["predicted"]
        monkeypatch.setattr(memory, "ADAM_STATES", 0)
        run(network, memory="fast")
        found[dtype] -= the_plan()["predicted"]
        monkeypatch.undo()
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert found == {torch.float32: 8 * trained, torch.bfloat16: 4 * trained}


# ------------------------------------------------------------------------------------------------------------ budgets


def test_fast_lean_auto_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    network = model(checkpointing=True)
    found = {}
    for wanted, share in (("fast", 0.1), ("leaner", 0.1), ("lean", 0.0), ("auto", 0.1)):
        monkeypatch.setattr(memory, "LEAN_SHARE", share)
        run(network, memory=wanted.removesuffix("er"))
        found[wanted] = the_plan()
    assert found["fast"]["levels"] == {CHEAP: families.LAYERS}
    assert found["auto"]["levels"] == {KEEP: families.LAYERS}  # a CPU sets no limit
    lean, auto = found["lean"]["predicted"], found["auto"]["predicted"]
    assert lean < found["fast"]["predicted"] < auto
    slow = found["lean"]["seconds"]
    for budget in (auto, auto - 1, (lean + auto) // 2, lean):
        got = run(network, memory=budget)
        row = the_plan()
        assert lean <= row["predicted"] <= budget == row["budget"]
        assert row["seconds"] <= slow
    check_equal(got, step(network, batch()))
    assert row["levels"] == found["lean"]["levels"]


def test_lean_is_the_fastest_within_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the smallest peak, which it never exceeds by more, and which it has where it may not."""
    assert memory.LEAN_SHARE == 0.055
    monkeypatch.setitem(families._SIZES, "num_hidden_layers", 6)
    monkeypatch.setattr(memory, "HOST_BYTES_PER_SECOND", 1e14)
    network = model(checkpointing=True, lora=0.0)
    rows = []
    for share in (0.0, 0.1, 0.3):
        monkeypatch.setattr(memory, "LEAN_SHARE", share)
        options = {"memory": "lean", "host_memory": "1GiB", "strict": True}
        rows += fastft.explain(network, **batch(), options=options).memory
        assert rows[0]["predicted"] <= rows[-1]["predicted"] <= (1 + share) * rows[0]["predicted"]
    assert rows[0]["seconds"] > rows[1]["seconds"] > rows[2]["seconds"]
    assert MLP_OFFLOADED in rows[1]["levels"]
    free = (rows[0]["predicted"] + rows[2]["predicted"]) // 2
    monkeypatch.setattr(Memory, "_budget", lambda self: free)
    (row,) = fastft.explain(network, **batch(), options=options).memory
    assert row["predicted"] <= free and rows[0]["seconds"] > row["seconds"] > rows[2]["seconds"]


def _off_by(number: Callable[[memory.Plan], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts need so many bytes more than the formula says."""
    peak = memory.Plan.peak
    monkeypatch.setattr(memory.Plan, "peak", lambda plan, sizes: peak(plan, sizes) + number(plan))


def _leaner(plan: memory.Plan) -> int:
    """More the leaner it is, so that each round's correction is too small for the next one's choice."""
    return sum(level not in (KEEP, CHEAP) for level in plan.levels) * 20_000


@pytest.mark.parametrize("off", ["by more the leaner it is", "by a byte more than there is room"])
def test_a_formula_that_is_off_does_not_end_with_the_leanest(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte less in each round would be the same choice each time."""
    monkeypatch.setitem(families._SIZES, "num_hidden_layers", 6)
    network = model(checkpointing=True, lora=0.0)

    def planned(wanted: str | int) -> Any:
        report = fastft.explain(network, **batch(), options={"memory": wanted})
        assert report.timings["plan"] > 0
        return report.memory[0], report.errors

    (lean, _), (auto, _) = planned("lean"), planned("auto")
    budget = (lean["predicted"] + auto["predicted"]) // 2
    exact, errors = planned(budget)
    assert exact["seconds"] < lean["seconds"] and errors == []
    more = budget - exact["predicted"] + 1
    _off_by(_leaner if "leaner" in off else lambda _: more, monkeypatch)
    row, errors = planned(budget)
    assert row["predicted"] <= budget and exact["seconds"] < row["seconds"] < lean["seconds"] and errors == []
    monkeypatch.setattr(memory, "ROUNDS", 1)
    row, errors = planned(budget)
    assert row["seconds"] >= lean["seconds"]
    assert len(errors) == 1 and "no choice but the leanest was found" in errors[0]
    # After out of memory the limit is what is to be kept.
    monkeypatch.setattr(Memory, "_budget", lambda self: setattr(self, "limit", budget))
    _, (error,) = planned("auto")
    assert "no choice but the leanest was found" in error


def test_the_budget_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less a twentieth of the device; what torch's allocator has is free too."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 2**30)
    one = object.__new__(Memory)
    for wanted, budget in (("auto", 8), ("lean", 8), ("fast", None), ("5GiB", 5)):
        one.options = Options.of({"memory": wanted})
        one.device = torch.device("cuda", 0)
        assert one._budget() == (None if budget is None else budget * 2**30)
        one.device = None
        assert one._budget() == (5 * 2**30 if budget == 5 else None)


def test_what_cuda_graphs_keep_is_in_the_prediction() -> None:
    network, predicted = model(), []
    for recorded in (False, True):
        run(network, memory=10**12, residual="inductor", cuda_graphs=recorded)
        predicted.append(the_plan()["predicted"])
    assert predicted[0] < predicted[1]
    run(network, memory=predicted[1] - 1, residual="inductor", cuda_graphs=True)
    assert the_plan()["predicted"] < predicted[1]


def test_a_budget_that_is_too_small_is_reported() -> None:
    network = model()
    check_equal(run(network, memory="1KiB"), step(network, batch()))
    report = fastft.report()
    assert "which no plan keeps" in report.plan["memory"] and report.errors == []
    assert "predicted peak" in str(report)


def test_explain_has_the_plan_of_training() -> None:
    network = model()
    run(network, memory="lean", host_memory=0)
    trained = the_plan()
    report = fastft.explain(network, **batch(), options={"memory": "lean", "host_memory": 0})
    assert report.memory == [trained] == report.to_dict()["memory"]
    assert report.plan["memory"].startswith("lean: ")
    assert fastft.report().memory == [trained]  # nothing else was compiled


def test_the_command_line_explains_a_budget(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fastft.cli import app

    file = tmp_path / "config.json"
    families.FAMILIES["llama3"].build().config.to_json_file(file)
    asked = ["explain", str(file), "--lora", "0", "--dtype", "float32", "--memory"]
    done = CliRunner().invoke(app, [*asked, "lean"])
    assert done.exit_code == 0, done.output
    assert "plan: memory: lean: " in done.output and "predicted peak" in done.output
    wrong = CliRunner().invoke(app, [*asked, "12 Gb"])
    assert wrong.exit_code == 2 and "did you mean 'GB'?" in wrong.output


@pytest.mark.slow
def test_under_inductor(at: Any) -> None:
    network = model(checkpointing=True, lora=0.3)
    losses = []
    for level in (KEEP, ATTENTION_OFFLOADED, MLP_OFFLOADED):
        at(level)
        call = compiled(network, memory="fast", residual="inductor")
        losses.append(step(network, batch(), call=call))
        assert fastft.report().errors == []
    same(losses[1], losses[0])
    same(losses[2], losses[0])


def test_the_rates_of_copies_and_products_make_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is computed again is known by the ops' formulas."""
    monkeypatch.setattr(memory, "LEAN_SHARE", 0.0)
    network = model()
    at_hidden = 2 * 24 * 64
    run(network, memory="lean", host_memory=0)
    gemms = 2 * at_hidden * (64 + 2 * 32) * families.LAYERS  # at least q, k and v of both layers
    assert the_plan()["seconds"] >= gemms / 750e12


def test_the_devices_own_peak_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second call on: before, there was no step."""
    made = planned_calls(monkeypatch)
    network = model()
    call = compiled(network, memory="auto")
    step(network, batch(), call=call)
    monkeypatch.setattr(made[0].memory, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    assert "measured" not in the_plan()
    step(network, batch(), call=call)
    assert the_plan()["measured"] == 3 * 2**30
    assert "measured 3.00 GiB (the process's peak)" in str(fastft.report())


def test_unset_is_as_before() -> None:
    network = model(checkpointing=True)
    run(network)
    report = fastft.report()
    assert report.memory == [] and "memory" not in report.plan


def test_inference_needs_no_plan() -> None:
    network = model()
    call = compiled(network, memory="lean")
    with torch.no_grad():
        torch.testing.assert_close(call(**batch()).loss, network(**batch()).loss)
    assert fastft.report().memory == []


# -------------------------------------------------------------------------------------------------------- deep graphs


def test_a_deep_graph_is_cut_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with all levels at a time, and once by the plan; and a layer's numbers are those that it has where all
    layers have its level.
    """
    monkeypatch.setitem(families._SIZES, "num_hidden_layers", 16)
    cuts: list[Any] = []
    problems: list[Any] = []
    partition, problem_of = compat.partition, Memory._problem

    def counted(*args: Any) -> Any:
        cuts.append(partition(*args))
        return cuts[-1]

    def both(self: Memory, cut: Any) -> Any:
        problems.append(problem_of(self, cut))
        made, found = len(cuts), dict(cut.found)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "layouts", lambda kinds: [[level] * len(kinds) for level in MEASURED])
            problems.append(problem_of(self, cut))
        kept = cut.at([KEEP] * cut.count).walk
        del cuts[made:]
        cut.found = found
        assert set(kept.turns.values()) == set(range(cut.count + 1))
        return problems[0]

    monkeypatch.setattr(compat, "partition", counted)
    monkeypatch.setattr(Memory, "_problem", both)
    network = model(checkpointing=True, lora=0.0)
    report = fastft.explain(network, **batch(), options={"memory": "lean", "host_memory": "1GiB", "strict": True})
    assert report.errors == [] and sum(report.memory[0]["levels"].values()) == 16
    assert len(cuts) == 2
    quick, slow = problems
    # The link copies while layers compute, and while the loss does, which is at least its products.
    rate, tokens = memory.HOST_BYTES_PER_SECOND, 2 * 24
    assert (quick.piece, quick.link) == (tokens * 64 * 4, rate)
    assert quick.drained >= 2 * (2 * tokens * 64 * families.VOCAB) / 750e12 * rate
    assert all(c.drained >= 2 * tokens * 64 * 3 * 128 / 750e12 * rate for r in quick.regions for c in r.values())
    # A copy back of the last layer's has nothing to hide behind.
    copied = quick.regions[-1][ALL_OFFLOADED]
    waits = copied.seconds - quick.regions[-1][ALL].seconds
    assert waits == pytest.approx(copied.host / memory.HOST_BYTES_PER_SECOND)
    assert quick.regions[1][ALL_OFFLOADED].seconds - quick.regions[1][ALL].seconds < waits
    assert (quick.before, quick.after) == (slow.before, slow.after)
    assert quick.regions[1:] == slow.regions[1:]
    for level, choice in slow.regions[0].items():  # the first need not know its input's gradient
        known = quick.regions[0][level]
        assert choice.kept + choice.host <= known.kept + known.host and choice.held <= known.held


def test_cuts_that_would_be_in_vain_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for everything one is enough; with little, what all layers would need together is known without one."""
    monkeypatch.setitem(families._SIZES, "num_hidden_layers", 16)
    cuts, partition = [], compat.partition
    monkeypatch.setattr(compat, "partition", lambda *args: cuts.append(args) or partition(*args))
    network = model(checkpointing=True, lora=0.0)

    def planned(wanted: str | int) -> tuple[int, Any]:
        cuts.clear()
        report = fastft.explain(network, **batch(), options={"memory": wanted, "strict": True})
        assert report.errors == []
        return len(cuts), report.memory[0]

    (_, lean), (one, auto) = planned("lean"), planned("auto")
    assert one == 1 and planned(2 * auto["predicted"])[0] == 1
    few, tight = planned(lean["predicted"] * 21 // 20)
    assert few == 2 and lean["predicted"] <= tight["predicted"] <= tight["budget"] < auto["predicted"]


@pytest.mark.parametrize(
    ("kinds", "cuts"),
    [([0] * 80, 1), ([0] * 15, 1), ([0] * 12, 5), ([0] * 6, 5), ([0] * 2, 5), ([0, 1] * 16, 1), ([0] + [1] * 31, 5)],
)
def test_layouts_are_few(kinds: list[int], cuts: int) -> None:
    found = layouts(kinds)
    assert len(found) == cuts and {len(levels) for levels in found} == {len(kinds)}
    assert {level for levels in found for level in levels} == set(MEASURED)


# -------------------------------------------------------------------------------------------------- batches of any size


def planned_calls(monkeypatch: pytest.MonkeyPatch) -> list[Planned]:
    made: list[Planned] = []
    init = Planned.__init__

    def noted(self: Planned, *args: Any) -> None:
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(Planned, "__init__", noted)
    return made


def test_a_longer_batch_gets_a_leaner_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned_calls(monkeypatch)
    network = model(checkpointing=True)
    run(network, batch(48), memory="auto")
    budget = the_plan()["predicted"]  # what 48 tokens need without recomputation
    made.clear()
    torch._dynamo.reset()
    reporting.reset()
    call = torch.compile(
        network, backend="fastft", dynamic=True, options={"residual": "eager", "strict": True, "memory": budget}
    )
    for seq in (16, 40, 64, 16):
        check_equal(step(network, batch(seq), call=call), step(network, batch(seq)))
    (planned,) = made
    rows = fastft.report().memory
    assert [row["levels"].get(KEEP, 0) == families.LAYERS for row in rows] == [True, False]
    assert list(planned.serves.values()) == [0, 0, 1]
    assert rows[1]["predicted"] <= budget
    assert fastft.report().recompiles == 0
    sizes = {symbol: 0 for symbol in planned.memory.symbols.values()}
    assert sizes
    ((large, _),) = [(key, plan) for key, plan in planned.serves.items() if plan]
    grown = dict(zip(sizes, large, strict=True))
    assert planned.memory.plans[0].peak(grown) > budget >= planned.memory.plans[1].peak(grown)


def test_plans_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST_PLANS", 1)
    network = model(checkpointing=True)
    run(network, batch(16), memory="auto")
    budget = the_plan()["predicted"]
    torch._dynamo.reset()
    reporting.reset()
    call = torch.compile(
        network, backend="fastft", dynamic=True, options={"residual": "eager", "strict": True, "memory": budget}
    )
    for seq in (16, 64):
        check_equal(step(network, batch(seq), call=call), step(network, batch(seq)))
    assert len(fastft.report().memory) == 1
    assert "no plan is made after 1" in fastft.report().plan["memory"]


@pytest.fixture
def any_size(at: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Walk, list[sympy.Symbol]]:
    """The walk of a graph whose batch and length are symbols, and these: one layer is kept, one has its MLP by slices
    and leaves something behind before and after it.
    """

    def lasting(node: torch.fx.Node) -> Any:
        if node.target is not torch.ops.fastft.attention.default:
            return costs.lasting(node)
        rows = node.args[0].meta["val"].shape[2]
        return lambda size: 1000 * size(rows)

    monkeypatch.setattr(partitioner, "lasting", lasting)
    monkeypatch.setattr(lora_mlp, "FEWEST", 8)
    monkeypatch.setattr(lora_mlp, "SLICES", 3)
    made = planned_calls(monkeypatch)
    at(KEEP, ALL)
    torch._dynamo.reset()
    reporting.reset()
    options = {"residual": "eager", "strict": True, "memory": "fast"}
    torch.compile(model(checkpointing=True, lora=0.0), backend="fastft", dynamic=True, options=options)(**batch())
    (planned,) = made
    (plan,) = planned.memory.plans
    assert the_plan()["sliced"] == 1 and any(step.in_one_piece for step in plan.walk.steps)
    return plan.walk, list(planned.memory.symbols.values())


@pytest.mark.parametrize("recorded", [False, True])
def test_an_expression_is_evaluated_once_for_each_batch_size(
    any_size: Any, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for each tensor: batches of random lengths have a new size at every step."""
    walk, symbols = any_size
    walk.recorded = recorded
    walk.peak({symbol: 16 for symbol in symbols})
    found, subs = Counter[sympy.Basic](), sympy.Basic.subs

    def counted(e: sympy.Basic, *args: Any, **kwargs: Any) -> Any:
        found[e] += 1
        return subs(e, *args, **kwargs)

    monkeypatch.setattr(sympy.Basic, "subs", counted)
    walk.peak(sizes := {symbol: 20 for symbol in symbols})
    assert set(symbols) <= set(found) and set(found.values()) == {1}
    walk.held(sizes)
    assert set(found.values()) == {1}


def test_what_lives_is_what_a_plain_count_says(any_size: Any) -> None:
    """At every step, for any sizes, one after the other; a symbol that they lack is what it was when traced."""
    walk, symbols = any_size

    def counted(sizes: dict[sympy.Symbol, int], sliced: bool, stay: set[str]) -> list[int]:
        def size(n: Any) -> int:
            e = compat.size_expression(n).subs(sizes)
            return compat.size_hint(n) or 0 if e.free_symbols else int(e)

        number = {name: math.prod(map(size, t.shape)) * t.element_size() for name, t in walk.tensors.items()}
        assert walk.bytes_of(sizes) == number
        stays = 0
        for _ in range(2):  # the first step leaves something to the second
            found, there = [], set()
            for one in walk.steps:
                there.update(one.makes)
                own = one.lasting(size) if one.lasting else 0
                stays = max(stays, own) if one.lasting else 0
                scratch = (not sliced and one.in_one_piece) or one.scratch
                found.append(walk.rounded + sum(number[t] for t in there) + scratch(size) - own + stays)
                there -= {*one.frees} - stay
        return found

    draw, kept = random.Random(0), {*walk.saved, *walk.incoming}
    batches = [{symbol: draw.randint(2, 3000) for symbol in symbols} for _ in range(3)]
    peaks = set()
    for sizes in (*batches, batches[0], {symbols[-1]: 99}, {}):
        incoming = sum(n for name, n in walk.bytes_of(sizes).items() if name in walk.incoming)
        for sliced in (True, False):
            lives = [counted(sizes, sliced, stay) for stay in (set[str](), kept)]
            assert [live for _, live in walk._lives(sizes, sliced)] == lives[0]
            assert [live for _, live in walk._lives(sizes, sliced, frozenset(kept))] == lives[1]
            for walk.recorded, peak in ((False, max(lives[0])), (True, max(lives[1]) + incoming)):
                assert walk.peak(sizes, sliced) == peak
                peaks.add(peak)
    assert len(peaks) == 5 * 4  # each of these is another


# ------------------------------------------------------------------------------------------------------- out of memory


def fails(planned: Planned, times: int) -> list[int]:
    """The first plan runs out of memory so many times, at the end of its forward."""
    call, ran = planned.calls[0], []

    def once(*args: Any) -> Any:
        found = call(*args)
        ran.append(1)
        if len(ran) <= times:
            del found
            raise torch.OutOfMemoryError("CUDA out of memory. (a test's)")
        return found

    planned.calls[0] = once
    return ran


@pytest.mark.parametrize("wanted", ["fast", "1GiB"])
def test_out_of_memory_is_answered_by_a_leaner_plan(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    made = planned_calls(monkeypatch)
    network = model(checkpointing=True, lora=0.3)
    eager = step(network, batch())
    call = compiled(network, memory=wanted)
    step(network, batch(), call=call)
    wanted_step = step(network, batch(), call=call)
    ran = fails(made[0], 1)
    same(step(network, batch(), call=call), wanted_step)  # dropout is drawn as if nothing had been
    report = fastft.report()
    first, second = report.memory
    assert second["predicted"] <= 0.9 * first["predicted"]
    assert any("out of memory" in line for line in report.errors)
    same(step(network, batch(), call=call), wanted_step)
    assert len(ran) == 1 and len(report.memory) == 2  # these sizes stay with the leaner plan
    assert eager[1].keys() == wanted_step[1].keys()


def test_out_of_memory_with_the_leanest_plan_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    made = planned_calls(monkeypatch)
    monkeypatch.setattr(memory, "LEAN_SHARE", 0.0)
    network = model(checkpointing=True)
    call = compiled(network, memory="lean")
    step(network, batch(), call=call)
    fails(made[0], 9)
    with pytest.raises(torch.OutOfMemoryError, match="a test's"):
        step(network, batch(), call=call)
    assert len(fastft.report().memory) == 1


def test_out_of_memory_after_a_write_to_an_input_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph writes to is what its first call wrote to; that one is looked at in full."""
    made = planned_calls(monkeypatch)

    def written(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return (x * w).sin().sum()

    options = {"residual": "eager", "strict": True, "memory": "auto"}
    call = torch.compile(written, backend="fastft", options=options)
    x, w = torch.zeros(4), torch.ones(4, requires_grad=True)
    call(x, w).backward()
    known = made[0].written
    assert known is not None and len(known) == 1
    monkeypatch.setattr(Planned, "_leaner", lambda self, failed, sizes: failed)
    for times, written_to in ((1, known), (2, None)):
        made[0].written = written_to
        fails(made[0], 1)
        with pytest.raises(torch.OutOfMemoryError):
            call(x, w)
        assert torch.equal(x, torch.full((4,), 1.0 + times))


# -------------------------------------------------------------------------------------------------- what goes wrong


def test_versions_ask_no_class_of_tensors() -> None:
    """A model with 4-bit weights has hundreds of them, and each would be asked in Python, twice a step."""

    class Asked(torch.Tensor):
        asked = 0

        @classmethod
        def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
            cls.asked += 1
            return super().__torch_function__(*args, **kwargs)

    x = torch.zeros(2).as_subclass(Asked)
    Asked.asked = 0
    assert memory._versions([x, 3], None) == {0: 0} and Asked.asked == 0
    x.add_(1)
    assert memory._versions([x, 3, x], None) == {0: 1, 2: 1}
    assert memory._versions([x, 3, x], [2]) == {2: 1}


def test_planning_that_fails_recomputes_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Memory, cut: Any) -> Any:
        raise KeyError("planning is wrong")

    monkeypatch.setattr(Memory, "_planned", broken)
    network = model(checkpointing=True)
    check_equal(run(network, memory="lean", strict=False), step(network, batch()))
    (error,) = fastft.report().errors
    assert error.startswith("planning memory failed, layers are recomputed in full: KeyError")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [(5, 5), (0, 0), ("16GiB", 16 * 2**30), ("24 GB", 24 * 10**9), ("1.5KiB", 1536), ("7B", 7), (" 2 MiB ", 2**21)],
)
def test_bytes(text: Any, wanted: int) -> None:
    assert bytes_of("memory", text) == wanted
    assert Options.of({"memory": text, "host_memory": text}).memory == text


@pytest.mark.parametrize("text", ["12 Gb", "GiB", "-3GB", -3, True, 1.5, "lots", "", ["8GiB"]])
@pytest.mark.parametrize("option", ["memory", "host_memory"])
def test_what_is_no_number_of_bytes(option: str, text: Any) -> None:
    with pytest.raises(OptionError, match=f"option {option} is ") as caught:
        Options.of({option: text})
    assert "16GiB" in str(caught.value) and ("'lean'" in str(caught.value)) == (option == "memory")
    if text == "12 Gb":
        assert "did you mean 'GB'?" in str(caught.value)


def test_memory_and_recompute_are_not_both_given() -> None:
    with pytest.raises(OptionError, match="leave recompute out"):
        Options.of({"memory": "lean", "recompute": "never"})
