"""What a call launches, as tuning finds it: by its default, by the other variants, and where a launch fails. PyTorch
on a CPU stands for the GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastft
import fastft.kernels
from fastft.autotune import database, store, tuning, variants
from fastft.autotune.cases import Case, cases, outputs
from fastft.kernels import _config
from fastft.kernels._config import Space, padded
from fastft.kernels._op import OPS, Cost

fastft.kernels.load()

SIZES = dict(hidden_size=8, intermediate_size=48, num_attention_heads=1, vocab_size=9, hidden_act="silu")
#: What the functions below launched with, by the name of their space.
LAUNCHED: dict[str, list[int]] = {}
#: Values of BLOCK with which a launch raises.
OUT_OF: dict[str, tuple[int, ...]] = {}


class Samples:
    """A run timed by the CPU's clock."""

    def __init__(self, run: Callable[[int], Any], copies: int, pool: Any) -> None:
        self.run = run

    def __call__(self) -> float:
        start = time.perf_counter()
        self.run(0)
        return 1e6 * (time.perf_counter() - start)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(store, "_PROBLEMS", {})
    monkeypatch.setattr(variants, "_USERS", {})
    monkeypatch.setattr(variants, "_OWN", {})
    monkeypatch.setattr(variants, "_LOADED", True)
    monkeypatch.setattr(_config, "SPACES", dict(_config.SPACES))
    monkeypatch.setattr(variants, "SPACES", _config.SPACES)
    monkeypatch.setattr(database, "device_kind", lambda device=None: "h100")
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    values = dict(
        is_available=True, synchronize=None, empty_cache=None, current_device=0, graph_pool_handle=None, Stream=stream,
        current_stream=stream, stream=contextlib.nullcontext(), set_device=None,
    )  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name, value in dict(
        Samples=Samples, copies_of=lambda _: 2, copy_bytes_per_us=lambda: 1e9, flops_per_us=lambda: 1e9
    ).items():
        monkeypatch.setattr(tuning, name, value)
    monkeypatch.setattr(tuning.GPU, "_inputs", lambda self, case: case.make(tuning.New(self.dtype, "cpu")))
    LAUNCHED.clear()
    OUT_OF.clear()
    database.forget()
    yield
    database.forget()


def calls(op: str) -> list[Case]:
    return [case for case in cases(SIZES, 1, 4) if case.op == op]


def space_of(kernel: str, **more: Any) -> Space:
    """A kernel whose block is 1, 2 or 4, by the heuristic 1."""
    made = Space(kernel, {"BLOCK": (1, 2, 4)}, lambda *_: {"BLOCK": 1}, tokens=("rows",), sizes=("n",), **more)
    LAUNCHED[kernel] = []
    return made


def launch(kernel: str, x: torch.Tensor) -> None:
    """What a launcher does, up to the launch."""
    block = _config.SPACES[kernel](x.device, x.dtype, x[..., 0].numel(), x.shape[-1])["BLOCK"]
    if block in OUT_OF.get(kernel, ()):
        raise RuntimeError("out of resource: shared memory")
    LAUNCHED[kernel].append(block)


class _SwiGLU(torch.autograd.Function):
    """SwiGLU, with a launch of one kernel in each direction."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, kernels: str) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        launch(f"{kernels}.forward", gate)
        return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        gate, up = (t.float() for t in ctx.saved_tensors)
        launch(f"{ctx.kernels}.backward", dys[0])
        s, dy = torch.sigmoid(gate), dys[0].float()
        dgate = dy * up * s * (1 + gate * (1 - s))
        return dgate.to(dys[0].dtype), (dy * gate * s).to(dys[0].dtype), None


def mine(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return _SwiGLU.apply(gate, up, "mine")


def other(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return _SwiGLU.apply(gate, up, "other")


def toy(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return _SwiGLU.apply(gate, up, "toy")


def refuses(gate: torch.Tensor, up: torch.Tensor, kind: str) -> str | None:
    return "no time today"


def spaces_of(name: str, **more: Any) -> tuple[Space, Space]:
    return space_of(f"{name}.forward", **more), space_of(f"{name}.backward", **more)


def register(name: str, function: Callable[..., Any], verified: bool = True, **more: Any) -> None:
    fastft.variants.register("glu", name, **more)(function)
    if verified:
        assert variants.note_verified(variants.get("glu", name), "h100", True) == ""


def tuned(*ops: str) -> list[tuning.Done]:
    found = [case for op in ops for case in calls(op)]
    return [*tuning.tune(found, tuning.GPU(torch.float32), rounds=(2, 2), seconds=0.0)]


def titles(found: list[tuning.Done]) -> list[tuple[str, str]]:
    return [(done.job.title, done.job.phase) for done in found]


def test_the_space_of_a_verified_variant_is_searched_before_the_variants_are_raced() -> None:
    register("mine", mine, space=spaces_of("mine"))
    found = tuned("glu")
    assert titles(found) == [
        ("mine.forward (variant mine of glu)", "forward"),
        ("mine.backward (variant mine of glu)", "backward"),
        ("variants of glu", ""),
    ]
    assert not any(done.error for done in found)
    for kernel, done in zip(("mine.forward", "mine.backward"), found, strict=False):
        assert set(LAUNCHED[kernel]) == {1, 2, 4}, "its call, not the default's, ran with every configuration"
        assert done.record is not None and done.record["tried"] == 3 and done.record["failures"] == {}
        assert database.user_store().get(done.job.name) == done.record


def test_what_is_tuned_of_a_variant_is_launched_in_the_race() -> None:
    forward, backward = spaces_of("mine")
    register("mine", mine, space=(forward, backward))
    key = (torch.device("cpu"), torch.float32, 4, 48)
    record = dict(config={"BLOCK": 4}, variant="", source="", us=1.0, heuristic_us=2.0, noise=0.01, tried=3)
    for space in (forward, backward):
        database.user_store().put(database.config_key(space, key, "h100"), {**record, "failures": {}})
    found = tuned("glu")
    assert [done.record is None for done in found] == [True, True, False]
    assert set(LAUNCHED["mine.forward"]) == set(LAUNCHED["mine.backward"]) == {4}


def test_variants_that_are_not_offered_are_not_run() -> None:
    register("mine", mine, verified=False, space=spaces_of("mine"))
    assert tuned("glu") == [] and not LAUNCHED["mine.forward"]
    register("other", other, space=spaces_of("other"), supported=refuses)
    assert tuned("glu") == [] and not LAUNCHED["other.forward"], "it refuses the call"


def test_only_spaces_that_a_variant_declares_are_searched() -> None:
    forward, _ = spaces_of("mine")
    register("mine", mine, space=forward)
    assert titles(tuned("glu"))[:2] == [("mine.forward (variant mine of glu)", "forward"), ("variants of glu", "")]


def test_what_the_default_launches_too_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = spaces_of("toy")
    monkeypatch.setitem(OPS, "glu", dataclasses.replace(OPS["glu"], call=toy))
    register("mine", toy, space=spaces)
    assert titles(tuned("glu")) == [
        ("toy.forward", "forward"),
        ("toy.backward", "backward"),
        ("variants of glu", ""),
    ]


def test_a_variant_of_ours_that_the_default_does_not_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As attention's kernels, where cuDNN computes the call."""
    spaces_of("toy")
    ours = {"toy": (toy, lambda *_: None)}
    monkeypatch.setitem(OPS, "glu", dataclasses.replace(OPS["glu"], call=plain, variants=ours))
    found = titles(tuned("glu"))
    assert found[:2] == [
        ("toy.forward (variant toy of glu)", "forward"),
        ("toy.backward (variant toy of glu)", "backward"),
    ]
    assert found[2:] == [("variants of glu", "")]


def plain(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    return torch.nn.functional.silu(gate) * up


def test_a_variant_that_raises_is_said_and_left_out() -> None:
    register("mine", mine, space=spaces_of("mine"))
    register("other", other, space=spaces_of("other"))
    OUT_OF["mine.forward"] = (1, 2, 4)
    found = tuned("glu")
    errors = {done.job.title: done.error for done in found if done.error}
    assert [*errors] == ["mine.forward (variant mine of glu)", "variant mine of glu"]
    assert all("out of resource: shared memory" in why for why in errors.values())
    assert errors["variant mine of glu"].startswith(calls("glu")[0].name), "of which call"
    raced = found[-1].record
    assert raced is not None and raced["tried"] == 2 and [*raced["failures"]] == ["mine"]


def test_a_space_that_is_asked_for_other_sizes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_config, "FAILED", {})
    bad = Space("mine.forward", {"BLOCK": (1, 2)}, lambda *_: {"BLOCK": 1}, sizes=("n",))  # one size; it gets two
    LAUNCHED["mine.forward"] = []
    LAUNCHED["mine.backward"] = []
    register("mine", mine, space=(bad, space_of("mine.backward")))
    found = tuned("glu")
    assert titles(found) == [
        ("mine.backward (variant mine of glu)", "backward"),
        ("variant mine of glu", ""),
        ("variants of glu", ""),
    ]
    assert "mine.forward was asked for" in found[1].error


# --------------------------------------------------------------------------------------------- launches that do not run


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """glu by another function, whose kernels run here."""
    spaces_of("toy")
    monkeypatch.setitem(OPS, "glu", dataclasses.replace(OPS["glu"], call=toy))


@pytest.mark.parametrize("kernel", ["toy.forward", "toy.backward"])
def test_where_the_heuristic_does_not_run_another_is_found(toys: None, kernel: str) -> None:
    OUT_OF[kernel] = (1,)
    found = tuned("glu")
    assert titles(found) == [("toy.forward", "forward"), ("toy.backward", "backward")], "what comes behind it, too"
    assert not any(done.error for done in found)
    (done,) = [done for done in found if done.job.space is _config.SPACES[kernel]]
    record = done.record
    assert record is not None and record["config"]["BLOCK"] in (2, 4)
    assert "out of resource" in record["failures"]["heuristic"] and record["heuristic_us"] == 0.0


def test_where_nothing_runs_the_other_calls_are_tuned(toys: None) -> None:
    OUT_OF["toy.forward"] = (1, 2, 4)
    register("mine", mine, space=spaces_of("mine"))
    found = tuned("glu", "rms_norm")
    errors = {done.job.title: done.error for done in found if done.error}
    assert [*errors] == ["toy.forward", "glu"] and "out of resource" in errors["glu"]
    assert [t for t, _ in titles(found)][2:] == [
        "mine.forward (variant mine of glu)",
        "mine.backward (variant mine of glu)",
        "variants of glu",
    ]


def test_inputs_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, toys: None) -> None:
    def make(self: tuning.GPU, case: Case) -> Any:
        if case.op == "rms_norm":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return case.make(tuning.New(self.dtype, "cpu"))

    monkeypatch.setattr(tuning.GPU, "_inputs", make)
    monkeypatch.setitem(SIZES, "rms_norm_eps", 1e-6)
    found = tuned("rms_norm", "glu")
    assert [(d.job.title, d.error) for d in found] == [
        *[("rms_norm", "OutOfMemoryError: CUDA out of memory")] * len(calls("rms_norm")),
        ("toy.forward", ""),
        ("toy.backward", ""),
    ]


@pytest.mark.parametrize("phase", ["forward", "backward", ""])
def test_runs_go_round_the_copies(phase: str) -> None:
    register("mine", mine, space=spaces_of("mine"))
    bench, read = bench_of("mine" if phase else "nobody", phase or "forward"), list[int]()

    def call(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
        read.append(gate.data_ptr())
        return mine(gate, up, kind)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: read.append(t.data_ptr()) or t):
        if phase == "backward":
            bench.forwards = [outputs(call, copied) for copied in bench.copies]
            read.clear()
        run = bench._run(call)
        for i, copied in enumerate(bench.copies):
            run(i)
            assert copied.args[0].data_ptr() in read
            read.clear()
    assert len({copied.args[0].data_ptr() for copied in bench.copies}) == 2


# -------------------------------------------------------------------------------------------------------- the roofline


def bench_of(name: str, phase: str = "forward") -> tuning._GPUBench:
    (case,) = calls("glu")
    space = _config.SPACES.get(f"{name}.{phase}")
    key = (torch.device("cpu"), torch.float32, 4, 48)
    job = tuning.Job(case, "x", phase if space else "", space, key if space else (), name if space else "")
    return tuning._GPUBench(job, case.make(tuning.New(torch.float32, "cpu")), torch.float32)


def test_the_bound_is_the_cost_times_what_tiles_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    register("mine", mine, space=spaces_of("mine", waste=lambda config, *key: (padded(48, 32 * config["BLOCK"]), 1.0)))
    work, moved = 8 * 4 * 48, 3 * 4 * 48 * 4  # of glu's cost
    monkeypatch.setattr(tuning, "copy_bytes_per_us", lambda: 1e3)
    monkeypatch.setattr(tuning, "flops_per_us", lambda: 1e9)
    bench = bench_of("mine")
    assert bench.floor_us("") == bench.floor_us("BLOCK=4") == pytest.approx(moved / 1e3), "memory takes the longer"
    monkeypatch.setattr(tuning, "flops_per_us", lambda: 1.0)
    assert bench.floor_us("") == pytest.approx(work), "whatever is chosen"
    assert [bench.floor_us(f"BLOCK={n}") for n in (1, 2, 4)] == pytest.approx([work * n / 48 for n in (64, 64, 128)])
    assert bench_of("mine", "backward").floor_us("BLOCK=4") is None, "costs are the forward's"


def test_without_a_word_of_the_space_nothing_is_left_out() -> None:
    register("mine", mine, space=spaces_of("mine"))
    bench = bench_of("mine")
    assert bench.floor_us("") is not None and bench.floor_us("BLOCK=4") is None


def test_a_kernel_that_another_op_lends_is_not_judged_by_the_cost_of_the_whole() -> None:
    spaces_of("lent", waste=lambda *_: (1e9, 1e9))
    register("mine", mine, space=spaces_of("mine"))
    bench = bench_of("mine")
    lent = dataclasses.replace(bench.job, space=_config.SPACES["lent.forward"])
    bench.job = lent
    assert bench.floor_us("BLOCK=4") is None


def test_a_variants_own_cost_counts(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "copy_bytes_per_us", lambda: 1e3)

    def twice(gate: torch.Tensor, up: torch.Tensor, kind: str) -> Cost:
        one = OPS["glu"].cost(gate, up, kind)  # type: ignore[misc]
        return Cost(one.flops, 2 * one.bytes_moved, one.bytes_kept)

    def wrong(*_: Any) -> Cost:
        raise RuntimeError("no idea")

    spaces = spaces_of("mine")
    register("mine", mine, space=spaces, cost=twice)
    ours = bench_of("nobody")
    assert ours.floor_us("mine") == pytest.approx(2 * ours.floor_us(""))  # type: ignore[operator]
    assert bench_of("mine").floor_us("") == ours.floor_us("mine")
    register("mine", mine, space=spaces, cost=wrong)
    assert bench_of("nobody").floor_us("mine") is None and "the cost of variant mine of glu" in caplog.text


def test_a_variant_that_refuses_the_call_is_not_raced() -> None:
    register("mine", mine, supported=refuses)
    assert bench_of("nobody").check("mine") == "it refuses the call: no time today"


def test_what_the_roofline_leaves_out_is_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    # By its cost, BLOCK=4 takes an hour.
    register("mine", mine, space=spaces_of("mine", waste=lambda config, *_: (config["BLOCK"] // 4 * 3.6e9 + 1.0, 1.0)))
    monkeypatch.setattr(tuning, "flops_per_us", lambda: 8.0 * 4 * 48)
    found = tuned("glu")
    record = found[0].record
    assert record is not None and record["skipped"] == {"roofline": 1} and record["tried"] == 2
    assert 4 not in LAUNCHED["mine.forward"] and 4 in LAUNCHED["mine.backward"]


def test_norms_say_what_their_tiles_pad() -> None:
    space, key = _config.SPACES["rms_norm.forward"], (torch.device("cpu"), torch.bfloat16, 10, 96)
    block = space.heuristic(*key)["BLOCK_N"]
    assert block == 128
    assert space.waste({"BLOCK_M": 4}, *key) == pytest.approx((12 / 10 * block / 96, 1.0))
    assert _config.SPACES["layer_norm.forward"].waste({"BLOCK_M": 2, "PIECES": 2}, *key) == pytest.approx((1.0, 1.0))
    assert _config.SPACES["glu.forward"].waste({"BLOCK": 8192}, *key[:2], 10, 96, "silu") is None
    assert (padded(10, 4), padded(8, 4), padded(0, 4)) == (1.2, 1.0, 1.0)
