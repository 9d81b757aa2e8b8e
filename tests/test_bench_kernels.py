"""How kernels are timed, and what becomes of a competitor that is missing or fails. No GPU: its clock is made up here,
and what is asked of ``torch.cuda`` is answered by a stand-in that counts µs.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import cli, files, kernels, measure, specialists, tables
from bench.shapes import REAL, REAL_SIZES, SHAPES, Shape, shapes
from fastft.kernels._inputs import New
from fastft.kernels.lora_mlp import tokens_of_slice

ROOT = Path(__file__).resolve().parents[1]


# -- samples in turns


def recording(log: list[str], **us: float) -> dict[str, Callable[[], dict[str, float]]]:
    """Samplers that note their turn; a time that grows with every turn of anybody is a clock that drifts."""

    def sampler(name: str) -> Callable[[], dict[str, float]]:
        def sample() -> dict[str, float]:
            log.append(name)
            return {"forward_us": us[name] * (1 + 0.01 * len(log))}

        return sample

    return {name: sampler(name) for name in us}


def test_implementations_take_turns():
    log: list[str] = []
    samples, failed = measure.interleave(recording(log, a=10.0, b=10.0, c=10.0), rounds=(6, 6), seconds=math.inf)
    assert "".join(log) == "abccbabcaacbcabbac" and not failed
    # A drift of 1 % a sample falls on all alike: one after the other, the last would seem 8 % slower than the first.
    medians = {name: files.spread(of["forward_us"])["median"] for name, of in samples.items()}
    assert max(medians.values()) / min(medians.values()) < 1.01


def test_rounds_end_with_the_time_but_not_before_the_least():
    now = iter(range(100))

    def clock() -> float:
        return float(next(now))

    log: list[str] = []
    measure.interleave(recording(log, a=1.0), rounds=(3, 50), seconds=1.0, clock=clock)
    assert len(log) == 3
    log.clear()
    measure.interleave(recording(log, a=1.0), rounds=(1, 50), seconds=5.0, clock=clock)
    assert 3 < len(log) < 10


def test_one_that_fails_later_is_out_and_the_others_go_on():
    def failing() -> dict[str, float]:
        raise RuntimeError("out of luck")

    log: list[str] = []
    samples, failed = measure.interleave({**recording(log, a=1.0), "b": failing}, rounds=(3, 3), seconds=1.0)
    assert list(samples) == ["a"] and len(samples["a"]["forward_us"]) == 3
    assert str(failed["b"]) == "out of luck"


def test_wall_clock_splits_forward_and_backward():
    now = SimpleNamespace(us=0.0)

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            now.us += 30
            return x * 2

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            now.us += 50
            return g * 2

    x = torch.randn(3, requires_grad=True)
    sampler = measure.WallClock(Slow.apply, measure.Inputs([x], {}, [x]), clock=lambda: now.us / 1e6)
    assert sampler() == pytest.approx({"forward_us": 30.0, "backward_us": 50.0, "full_us": 80.0})


def test_copies_keep_strides_gradients_and_sharing():
    x = torch.randn(2, 3, 4, requires_grad=True).transpose(0, 1)
    ids = torch.arange(3)
    copied = measure.Inputs([x, [x, None], ids, 1.0], {"kind": "silu"}, [x]).copy()
    y, (again, none), more, number = copied.args
    assert y is again is copied.wanted[0] and y is not x and y.is_leaf and y.requires_grad
    assert y.stride() == x.stride() and torch.equal(y, x) and none is None and number == 1.0
    assert torch.equal(more, ids) and more.data_ptr() != ids.data_ptr() and copied.kwargs == {"kind": "silu"}


# -- a GPU, made up


class Device:
    """Stands in for ``torch.cuda``. Time passes where an implementation says so (:meth:`work`); a graph remembers how
    much passed while it was captured, and lets it pass again when it is replayed.
    """

    def __init__(self) -> None:
        self.us, self.strict, self.allocated, self.most, self.flushed, self.heated = 0.0, False, 0, 0, 0, 0
        self.capturing: list[Any] = []
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.us

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) / 1e3

        class Graph:
            def __init__(self) -> None:
                self.us = 0.0

            def pool(self) -> str:
                return "pool"

            def replay(self) -> None:
                device.us += self.us

        @contextlib.contextmanager
        def graph(captured: Any, pool: Any = None, stream: Any = None) -> Any:
            assert stream == "side stream"
            before, self.capturing = self.us, [captured]
            yield
            captured.us, self.us, self.capturing = self.us - before, before, []

        self.cuda = SimpleNamespace(
            Event=Event,
            CUDAGraph=Graph,
            graph=graph,
            synchronize=lambda: None,
            empty_cache=lambda: None,
            memory_allocated=lambda: self.allocated,
            reset_peak_memory_stats=lambda: setattr(self, "most", self.allocated),
            max_memory_allocated=lambda: self.most,
            current_stream=lambda: "side stream",
            set_sync_debug_mode=lambda mode: setattr(self, "strict", mode == "error"),
        )

    def work(self, us: float) -> None:
        self.us += us

    def allocates(self, size: int) -> None:
        self.allocated += size
        self.most = max(self.most, self.allocated)

    def synchronise(self) -> None:
        if self.strict:
            raise RuntimeError("called a synchronizing CUDA operation")
        assert not self.capturing, "a synchronisation reached the capture"

    def flush(self) -> None:
        self.flushed += 1

    def heat(self) -> None:
        self.heated += 1
        self.us += 1e6  # on nobody's time
        self.work(1000)  # it is in nobody's time


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    for name, value in vars(device.cuda).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(measure, "Flush", lambda: device.flush)
    monkeypatch.setattr(measure, "Heat", lambda: device.heat)
    return device


def doubling(device: Device, forward: float, backward: float, **does: bool) -> Callable[..., Any]:
    """2x, in ``forward`` and ``backward`` µs, which may overwrite its input, its gradient, or wait for the device."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            device.work(forward)
            if does.get("waits"):
                device.synchronise()
            if does.get("overwrites"):
                x.data.zero_()
            device.allocates(96 + 24)  # what it keeps, and the output: 6 fp32 numbers
            return x.detach() * 2

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            device.work(backward)
            if does.get("overwrites"):
                g.zero_()
            device.allocates(500 + 24)  # what it needs for a moment, and the gradient
            device.allocates(-500 - 24 - 96 - 24)
            return g * 2

    return Function.apply


def on_device(runs: dict[str, Callable[..., Any]]) -> tuple[dict[str, Any], dict[str, Any], dict[str, str], Any]:
    x = torch.arange(1.0, 7.0, requires_grad=True)
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    samplers = measure._device_samplers(runs, measure.Inputs([x], {}, [x]), found, failed)
    samples, _ = measure.interleave(samplers, rounds=(3, 3), seconds=1.0)
    return samples, found, failed, samplers


def test_device_times_are_of_the_call_alone(device):
    samples, found, failed, samplers = on_device({"a": doubling(device, 30.0, 50.0), "b": doubling(device, 80.0, 9.0)})
    assert not failed
    assert samples["a"]["forward_us"] == pytest.approx([30.0] * 3)
    assert samples["a"]["backward_us"] == pytest.approx([50.0] * 3)
    assert samples["b"]["full_us"] == pytest.approx([89.0] * 3)
    assert found["a"]["timed"] == found["b"]["timed"] == "graph"
    assert found["a"]["calls"] == math.ceil(measure.SAMPLE_US / 30)  # 400 µs of the shorter phase, each on its own copy
    assert len({c.args[0].data_ptr() for c in samplers["a"].copies}) == found["a"]["calls"]
    assert found["a"]["kept_bytes"] == 96
    assert found["a"]["extra_bytes"] == 96 + 500  # at a time, besides the output and the gradient
    assert device.flushed == 2 * 2 * (1 + 3)  # before every forward and every backward


def test_memory_is_of_the_call_alone(device):
    """Whatever a cycle of references holds of what ran before, which Python frees at some time."""

    class Before:
        def __init__(self) -> None:
            self.cycle = self
            device.allocates(1000)

        def __del__(self) -> None:
            device.allocates(-1000)

    call, calls = doubling(device, 30.0, 50.0), itertools.count()

    def collected(x: torch.Tensor) -> Any:
        if next(calls):
            gc.collect()
        return call(x)

    gc.disable()
    try:
        Before()
        _, found, failed, _ = on_device({"a": collected})
    finally:
        gc.enable()
    assert not failed and (found["a"]["kept_bytes"], found["a"]["extra_bytes"]) == (96, 96 + 500)


def test_what_waits_for_the_device_or_takes_long_is_launched_not_replayed(device):
    samples, found, failed, _ = on_device(
        {
            "waits": doubling(device, 30.0, 50.0, waits=True),
            "long": doubling(device, 3000.0, 3000.0),
            "long forward": doubling(device, 6000.0, 5.0),
        }
    )
    assert not failed and found["waits"]["timed"] == found["long"]["timed"] == "events"
    assert samples["waits"]["full_us"] == pytest.approx([80.0] * 3)
    assert found["long"]["calls"] == found["long forward"]["calls"] == 1
    assert samples["long"]["full_us"] == pytest.approx([6000.0] * 3)
    assert device.heated == 2 * (1 + 3)  # before each sample of the long ones


def test_what_is_overwritten_is_put_back(device):
    _, _, failed, samplers = on_device(
        {"overwrites": doubling(device, 30.0, 50.0, overwrites=True), "b": doubling(device, 30.0, 50.0)}
    )
    assert not failed and samplers["overwrites"].prepared.writes and not samplers["b"].prepared.writes
    for clock in samplers.values():
        assert all(torch.equal(c.args[0], torch.arange(1.0, 7.0)) for c in clock.copies)
        assert all(d.abs().sum() > 0 for (d,) in clock.dys)


def test_a_failure_on_the_device_is_one_implementation_s(device):
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    samples, found, failed, _ = on_device({"broken": broken, "b": doubling(device, 30.0, 50.0)})
    assert failed == {"broken": "out of memory"} and list(samples) == list(found) == ["b"]


def test_a_profile_is_of_the_call_alone():
    spin = f"void at::cuda::{measure.compat.SPIN}(long)"
    ran = [
        (0.0, 30.0, "heat"),
        (31.0, 32.0, spin),
        (35.0, 45.0, "product"),
        (47.0, 48.5, "row"),
        (49.0, 50.0, spin),
        (50.0, 60.0, "flush"),
        (60.0, 61.0, spin),
        (61.0, 65.0, "scale"),
        (66.0, 67.0, spin),
        (70.0, 80.0, "restore"),
    ]
    rows = measure.by_phase(reversed(ran))
    assert [(r["phase"], r["name"], r["us"], r["after_us"]) for r in rows] == [
        ("forward", "product", 10.0, 3.0),
        ("forward", "row", 1.5, 2.0),
        ("backward", "scale", 4.0, 0.0),
    ]
    row = row_of()
    assert not [t for t in tables.kernel_tables({"device": {"name": "G"}, "rows": [row]}) if "kernels" in t.title]
    row["implementations"]["fastft"]["kernels"] = [*rows, rows[0]]
    (grid,) = [t for t in tables.kernel_tables({"device": {"name": "G"}, "rows": [row]}) if "kernels" in t.title]
    assert grid.rows[:2] == [
        ["fastft", "", "all, and between them", "4", "26 + 8"],
        ["", "forward", "product", "2", "20.0"],
    ]


def test_floors():
    ceilings = {"copy_GBps": 1000.0, "matmul_TFLOPps": 100.0}
    assert measure.floor_us(2e6, 0.0, ceilings) == pytest.approx(2.0)
    assert measure.floor_us(2e6, 4e8, ceilings) == pytest.approx(4.0)


# -- competitors


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specialists, "MISSING", {})
    monkeypatch.setattr(specialists, "_FOUND", set())


def row_of(rounds: int | None = None, **shape: Any) -> dict[str, Any]:
    s = Shape("rms_norm", "odd", {"batch": 2, "seq": 3, "hidden": 16, "eps": 1e-6, "offset": 0.0, **shape})
    case = kernels.plain(kernels.OPS["rms_norm"], s)
    return kernels.measure_case("rms_norm", "rms_norm", s, case, None, rounds=rounds)


def test_more_samples_can_be_asked_for(monkeypatch, clean, tmp_path):
    with_specialists(monkeypatch)
    figures = [v for v in row_of(rounds=27)["implementations"]["fastft"].values() if isinstance(v, dict)]
    assert {f["samples"] for f in figures if "samples" in f} == {27}
    command = [sys.executable, "-m", "pytest", str(ROOT / "bench" / "kernels.py"), "--rounds", "0"]
    done = subprocess.run(command, env={**os.environ, "PYTHONSAFEPATH": "1"}, capture_output=True, text=True)
    assert done.returncode == 4 and "--rounds is 0: a median is of 1 sample or more" in done.stderr


def with_specialists(monkeypatch: pytest.MonkeyPatch, *rows: tuple[str, str, Callable[..., Any]]) -> None:
    made = [specialists.Specialist("rms_norm", name, package, run, cuda_only=False) for name, package, run in rows]
    monkeypatch.setattr(specialists, "SPECIALISTS", tuple(made))


def test_a_missing_competitor_has_no_column_and_is_named_once(monkeypatch, clean):
    from bench.tables import kernel_tables

    right = lambda s: lambda x, w, eps, offset: torch.nn.functional.rms_norm(x, x.shape[-1:], w, eps)  # noqa: E731
    with_specialists(monkeypatch, ("absent", "no_such_package_here", right), ("present", "torch", right))
    row = row_of()
    assert set(row["implementations"]) == {"fastft", "eager", "present"}
    assert "no_such_package_here" in specialists.MISSING
    result = {"rows": [row, row], "device": {"name": "cpu"}, "ceilings": None, "missing": specialists.MISSING}
    shown = [table.html() for table in kernel_tables(result)]
    assert "absent" not in "".join(shown) and "present" in "".join(shown)
    assert sum("no_such_package_here" in table for table in shown) == 1
    assert "no_such_package_here" in shown[-1]
    assert "kept MiB" not in shown[0] and "first call s" not in shown[0]  # of a CPU they say nothing


def test_a_competitor_that_raises_is_an_error_cell(monkeypatch, clean):
    def raises(x: Any, w: Any, eps: float, offset: float) -> Any:
        raise ValueError("hidden sizes of 16\n are too small")

    def unbuildable(s: Shape) -> Any:
        raise ImportError("cannot import name 'RMSNorm'")

    with_specialists(monkeypatch, ("raises", "torch", lambda s: raises), ("old", "torch", unbuildable))
    found = row_of()["implementations"]
    assert found["raises"] == {"error": "ValueError: hidden sizes of 16 are too small"}
    assert found["old"] == {"error": "ImportError: cannot import name 'RMSNorm'"}
    assert found["fastft"]["full_us"]["median"] > 0


@pytest.mark.parametrize("wrong", [lambda x: x * 1.0, lambda x: x[:1], lambda x: x * math.nan])
def test_a_competitor_with_another_result_gets_no_time(monkeypatch, clean, wrong):
    from bench.tables import best_other

    with_specialists(monkeypatch, ("wrong", "torch", lambda s: lambda x, w, eps, offset: wrong(x)))
    row = row_of()
    assert row["implementations"]["wrong"]["error"].startswith("wrong result: ")
    best = best_other(row)
    assert best is not None and best[0] == "eager"


def test_competitors_are_those_of_the_list(clean):
    ops = {label for op in kernels.OPS.values() for label in (op.name, *kernels.makers(op))}
    assert {row.op for row in specialists.SPECIALISTS} <= ops
    names = [(row.op, row.name) for row in specialists.SPECIALISTS]
    assert len(set(names)) == len(names)


# -- calls


@pytest.mark.parametrize(
    ("op", "forward", "backward"), [("rms_norm", 2, 3), ("add_rms_norm", 4, 4), ("glu", 3, 5), ("glu_packed", 3, 5)]
)
def test_what_a_call_moves(op, forward, backward):
    """In multiples of one tensor of the op's results: every tensor in and every result out."""
    (s, *_) = [s for s in kernels.shapes_of(kernels.OPS[op], tag="test") if s["batch"] == 2]
    (make,) = kernels.makers(kernels.OPS[op]).values()
    case = make(s)
    one = kernels._bytes(case.wanted[0]) / (2 if op == "glu_packed" else 1)
    weight = kernels._bytes(case.args[-3]) if "norm" in op else 0
    assert (case.bytes_moved, case.backward_bytes) == (forward * one + weight, backward * one + weight)


def test_padding_stands_beside_as_many_tokens_packed():
    dims = {"batch": 3, "seq": 24, "heads": 4, "kv_heads": 2, "head_dim": 16, "window": None, "softcap": None}
    case = kernels.attention(kernels.Shape("attention", "m", {**dims, "hides": "padding"}))
    lengths = case.kwargs["mask"][3].sum(1).tolist()
    lengths[-1] -= sum(lengths) % 16
    packed = case.others["(as many tokens, packed)"]
    out = packed(*case.args, **case.kwargs)
    assert out.shape == (1, 4, sum(lengths), 16)
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], 16)[: sum(lengths)].transpose(0, 1) for x in case.args)
    parts = zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)
    exact = [kernels.OPS["attention"].reference(*(x[None] for x in part), causal=True) for part in parts]
    torch.testing.assert_close(out, torch.cat(exact, 2))
    found = measure.compare({"packed": packed}, measure.Inputs(case.args, case.kwargs, case.wanted, case.asked))
    assert "error" not in found["packed"] and found["packed"]["backward_us"]["median"] > 0


@pytest.mark.parametrize("s", shapes("attention", tag="attention"), ids=str)
def test_attention_of_every_kind_is_the_same_everywhere(s):
    """At the sizes of the list divided by 64: the op, what stock libraries run, and the pairs that are counted."""
    small = {name: s[name] // 64 for name in ("batch", "seq", "window", "chunk") if s.get(name)}
    dims = {**s.dims, **small, "batch": s["batch"], "heads": 4, "kv_heads": 2, "head_dim": 16}
    case = kernels.attention(kernels.Shape("attention", s.model, dims))
    op = kernels.OPS["attention"]
    assert op.supported(*case.args, **case.kwargs) is None
    exact = op.reference(*case.args, **case.kwargs)
    plainly = specialists.plainly_causal(kernels.Shape("attention", s.model, dims))
    assert (case.eager is None) == plainly == (not case.others)
    runs = [op.call, *filter(None, (case.eager, case.traced))]
    for run in runs if not plainly else [*runs, op.stock]:
        torch.testing.assert_close(run(*case.args, **case.kwargs), exact, rtol=1e-4, atol=1e-5)
    pairs = case.flops / (4 * 4 * 16)
    all_pairs = dims["batch"] * dims["seq"] ** 2 / 2
    assert (pairs == all_pairs) if plainly or s["softcap"] or s.get("sinks") else (0 < pairs < 1.1 * all_pairs)


@pytest.mark.parametrize("s", shapes("linear_cross_entropy", tag="loss"), ids=str)
def test_losses_are_the_same_everywhere(s):
    """At small sizes: the op, what stock libraries run, TRL's head; and what a loss's products alone have to be."""
    pytest.importorskip("trl")
    dims = {**s.dims, "seq": 6, "hidden": 16, "vocab": 37}
    small = Shape(s.op, s.model, dims)
    case = kernels.linear_cross_entropy(small)
    hidden, weight, bias, labels = case.args
    counted = 1 - s.get("ignored", 0.0)
    assert int((labels != -100).sum()) == counted * len(labels)
    assert case.flops == 2 * counted * len(labels) * 16 * 37
    assert len(case.wanted) == case.backward_flops / case.flops == (2 if s.get("trained") else 1)
    op = kernels.OPS[s.op]
    runs = [op.reference, op.call, specialists._trl_loss("mean")(small)]
    found = [(loss := run(*case.args, **case.kwargs), *torch.autograd.grad(loss, case.wanted)) for run in runs]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)
    log_prob = specialists._trl_loss("none")(small)(*case.args, **case.kwargs)
    torch.testing.assert_close(log_prob, op.reference(*case.args, **case.kwargs, reduction="none").neg())

    products = case.others[tables.PRODUCTS](*case.args, **case.kwargs)
    used = hidden[: round(counted * len(labels))].detach()
    wanted = [used @ weight.mT @ weight, (used @ weight.mT).mT @ used][: len(case.wanted)]
    grads = torch.autograd.grad(products, case.wanted)
    assert [g.shape for g in grads] == [t.shape for t in case.wanted]
    torch.testing.assert_close([grads[0][: len(used)], *grads[1:]], [w.detach() for w in wanted])
    assert (tables.EVERY in case.others) == bool(s.get("ignored"))
    if s.get("ignored"):
        every = case.others[tables.EVERY](*case.args, **case.kwargs)
        exact = op.call(hidden, weight, bias, labels.where(labels >= 0, 0), **case.kwargs)
        assert torch.equal(every, exact) and not torch.equal(every, found[0][0])


def test_lengths_of_flash_attention(monkeypatch):
    """Sequences, documents and chunks of them begin where the op's mask says so."""
    for row in shapes("attention", tag="attention"):
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "to", lambda self, device, dtype=None: self.int())
            found = specialists._varlen(row)
        if row["softcap"] or row.get("sinks") or row.get("hides") == "padding":
            assert found is None
            continue
        begins, longest, window = found
        lengths = begins.diff()
        assert int(begins[-1]) == row["batch"] * row["seq"] and int(lengths.max()) == longest
        assert longest <= (row.get("chunk") or row["seq"]) and window == ((row["window"] or 0) - 1, 0)
        assert (
            len(lengths) == row["batch"] * (1 if not row.get("chunk") else row["seq"] // row["chunk"]) or row["hides"]
        )


def test_documents_are_of_512_tokens_or_about():
    from fastft.kernels.attention import document_lengths

    lengths = document_lengths(8192)
    assert sum(lengths) == 8192 and lengths == document_lengths(8192)
    assert all(256 <= n <= 768 for n in lengths[:-1]) and 400 < sum(lengths[:-1]) / len(lengths[:-1]) < 620


def test_documents_apart_are_the_packed_ones():
    """A batch that is padded, so that what it takes can be held against what it takes packed."""
    from fastft.kernels.attention import document_lengths, inputs, padded_lengths

    *lengths, rest = document_lengths(8192)
    assert padded_lengths(15, 768)[:-1] == lengths and abs(padded_lengths(15, 768)[-1] - rest) < 8
    dims = dict(heads=1, kv_heads=1, head_dim=16, window=None, softcap=None, hides="padding")
    made = inputs(New(torch.float32, "cpu"), batch=3, seq=9, **dims)
    gradients = measure.Gradients(made.asked)
    [gradient] = gradients.of([made.args[0]], 0)
    assert (gradient != 0).all(-1)[:, 0].sum(1).tolist() == padded_lengths(3, 9)
    assert gradients.of([made.args[0]], 1)[0].ne(gradient).any()
    assert inputs(New(torch.float32, "cpu"), batch=3, seq=9, **dims | {"hides": ""}).asked is None
    assert made.copy().asked is made.asked


def test_each_output_has_a_gradient_of_its_own():
    """Of two results of one layout too; the next implementation gets the same ones."""
    gradients = measure.Gradients()
    outputs = [torch.zeros(3, 5), torch.zeros(3, 5)]
    first, second = gradients.of(outputs, 0)
    assert first.data_ptr() != second.data_ptr() and first.ne(second).any()
    again = gradients.of([torch.ones(3, 5), torch.ones(3, 5)], 0)
    assert [g.data_ptr() for g in again] == [first.data_ptr(), second.data_ptr()]


def test_an_op_without_rows_of_its_own_has_those_of_its_file():
    assert {s.op for s in kernels.shapes_of(kernels.OPS["glu_packed"])} == {"glu"}
    assert {s.op for s in kernels.shapes_of(kernels.OPS["nf4_dequantize"])} == {"nf4"}
    assert {s.op for s in kernels.shapes_of(kernels.OPS["lora_linears"])} == {"lora_linears"}


# -- shapes


def test_every_op_has_real_sizes():
    assert set(REAL) <= {s.model for s in SHAPES}
    for op in {s.op for s in SHAPES}:
        real = shapes(op, tag="real")
        assert len(real) == REAL_SIZES >= 6, op
        assert len({tuple(v for k, v in s.dims.items() if k != "eps") for s in real}) == REAL_SIZES, op
    assert sum("primary" in s.tags for s in SHAPES) < 150  # what runs by default stays small


def test_slices_of_an_mlp_have_rows():
    """Those that its backward is cut into: half of the tokens of 4 × 2048, and fewer."""
    found = {(s.op, s["batch"] * s["seq"]) for s in shapes(tag="slices")}
    assert found == set(itertools.product(("glu", "lora_glu", "lora_stack"), (2048, 3072, 4096)))
    assert tokens_of_slice(4 * 2048, 14336, 2) == 4096


def test_a_run_that_is_stopped_has_something_of_every_op():
    cases = list(kernels._cases("real"))
    labels = [label for *_, label in cases]
    first = len(set(labels))
    assert len(set(labels[:first])) == first and len(cases) == first * REAL_SIZES


# -- the whole command


def test_pytest_collects_the_folder_and_writes_both_files(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(ROOT / "bench"),
        "-p",
        "no:cacheprovider",
        "-k",
        "rms_norm and not add and 1x1x8",
    ]
    command += ["--benchmark-json", str(tmp_path / "benchmark.json"), "--result", str(tmp_path / "kernels.json")]
    # Among pytest-xdist's workers, pytest-benchmark would measure nothing.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rms_norm: µs, forward and backward" in done.stdout
    own, benchmarks = (files.load(tmp_path / f"{name}.json") for name in ("kernels", "benchmark"))
    assert own.kind == benchmarks.kind == "kernels" and own.rows == benchmarks.rows and len(own.rows) == 2
    assert own.data["schema"] == files.SCHEMA and own.versions["torch"] and own.data["argv"][0] == "pytest"
    figure = own.rows[0]["implementations"]["fastft"]["full_us"]
    assert figure["min"] <= figure["q1"] <= figure["median"] <= figure["q3"] <= figure["max"]
    assert not list(tmp_path.glob(".kernels.json*"))  # what a stopped write would leave


@pytest.mark.parametrize(("code", "status"), [(0, 0), (1, 1), (4, 2), (5, 2)])
def test_kernels_runs_pytest_on_the_file(monkeypatch, code, status, tmp_path, capsys):
    seen: list[Any] = []

    def run(command: list[str], env: dict[str, str]) -> Any:
        seen.extend(command)
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    arguments = ["kernels", "-k", "rms_norm", "--shapes-tag", "real", "--budget", "60", "--out", "k.json", "--profile"]
    arguments += ["--rounds", "25"]
    assert cli.main([*arguments, "-x"]) == status
    assert {str(ROOT / "bench" / "kernels.py"), "-x", "--profile"} <= {*seen} and "--empty-caches" not in seen
    given = {"-k": "rms_norm", "--shapes-tag": "real", "--result": str(tmp_path / "k.json"), "--rounds": "25"}
    for option, value in given.items():
        assert seen[seen.index(option) + 1] == value
    assert ("no case has that name" in capsys.readouterr().err) == (code == 5)


def test_a_row_is_json():
    row = row_of(offset=1.0)
    assert json.loads(json.dumps(row)) == row
    assert {"op", "shape", "dims", "dtype", "bound", "forward_bytes", "backward_bytes"} <= set(row)
