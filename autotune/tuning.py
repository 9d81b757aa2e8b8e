"""Tuning the shapes of a model on this machine's GPU: what ``fastft tune`` runs. Training never does.

One call after the other, and of each one key after the other. Each is written when it is done, so that a run can be
stopped at any time, and goes on where it was when it is started again. What fails is said and left out.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import fastft.kernels
from fastft.autotune import database, variants
from fastft.autotune.cases import Case, Truth, gradients_for, outputs, results
from fastft.autotune.search import Bench, TuningError, race, search, to_record
from fastft.autotune.store import StoreError
from fastft.autotune.timing import Samples, copies_of, said
from fastft.kernels._config import Config, Space, listening
from fastft.kernels._inputs import Inputs, New
from fastft.kernels._op import OPS

log = logging.getLogger("fastft")

FORWARD, BACKWARD = "forward", "backward"
#: Threads that compile: ptxas and LLVM work outside of Python's lock.
COMPILERS = os.cpu_count() or 8


@dataclass(frozen=True)
class Job:
    """One record to make: a kernel (``space``, at ``key``) that ``phase`` of a case launches when ``variant`` (empty:
    the default) computes it; or, without a space, the variants of the case's op.
    """

    case: Case
    name: str
    phase: str = ""
    space: Space | None = None
    key: tuple[Any, ...] = ()
    variant: str = ""

    @property
    def title(self) -> str:
        """What it is about, for a person."""
        op = f"variant {self.variant} of {self.case.op}" if self.variant else self.case.op
        if self.space is not None:
            return f"{self.space.kernel} ({op})" if self.variant else self.space.kernel
        return f"variants of {op}" if self.name else op


class Device(Protocol):
    """What tuning needs of a machine."""

    kind: str

    def jobs(self, case: Case) -> Iterator[Job | Done]:
        """What there is to tune about a call, each when those before it are done; and what could not be found out."""

    def bench(self, job: Job) -> contextlib.AbstractContextManager[Bench]:
        """How the candidates of one job run."""


@dataclass(frozen=True)
class Done:
    """What became of a job. ``record``: None where it was known, or ``error`` says why there is none. A job without a
    name is a call of which could not be found out what it launches.
    """

    job: Job
    record: dict[str, Any] | None = None
    error: str = ""


def tune(
    cases: Sequence[Case],
    device: Device,
    *,
    budget: float = float("inf"),
    again: bool = False,
    clock: Callable[[], float] = time.monotonic,
    reached: Callable[[int], None] = lambda cases: None,
    **limits: Any,
) -> Iterator[Done]:
    """Tune what these calls launch. No job is begun after ``budget`` seconds; what has a record is passed over, unless
    ``again``. ``reached`` is told how many of the cases are done.
    """
    end = clock() + budget
    store = database.user_store()
    met: set[str] = set()
    for number, case in enumerate(cases):
        reached(number)
        for job in _jobs(device, case):
            if isinstance(job, Done):
                yield job
            elif job.name not in met:
                met.add(job.name)
                if not again and store.get(job.name) is not None:
                    yield Done(job)
                    continue
                if clock() >= end:
                    return
                yield _tuned(job, device, limits)
    reached(len(cases))


def _jobs(device: Device, case: Case) -> Iterator[Job | Done]:
    """A call that cannot be looked at stops no other."""
    try:
        yield from device.jobs(case)
    except Exception as error:
        yield Done(Job(case, ""), error=said(error))


def _tuned(job: Job, device: Device, limits: Mapping[str, Any]) -> Done:
    store = database.user_store(strict=True)
    if why := store.refuses(job.name):
        return Done(job, error=f"not measured, for it could not be kept: {why}")
    try:
        with device.bench(job) as bench:
            record = _race(job, bench, device.kind, limits)
    except Exception as error:
        return Done(job, error=str(error) if isinstance(error, TuningError) else said(error))
    try:
        store.put(job.name, record)
    except (StoreError, ValueError) as error:
        return Done(job, error=f"measured, and could not be kept: {error}")
    database.forget()
    return Done(job, record)


def _race(job: Job, bench: Bench, kind: str, limits: Mapping[str, Any]) -> dict[str, Any]:
    if job.space is not None:
        return search(job.space, job.key, bench, **limits)
    done = race([v.name for v in offered(job.case.op, kind)], bench, **limits)
    winner = variants.get(job.case.op, done.best or OPS[job.case.op].default)
    return to_record(done, {}, winner.name, winner.source)


def offered(op: str, kind: str) -> list[variants.Variant]:
    """The variants that are raced against the default: those that passed ``fastft verify --variant`` on such a device
    (ours are tested). Not the reference: it is there to be compared with. Nor what is not exact.
    """
    one = fastft.kernels.load()[op]
    left = (one.default, "reference", *one.by_name_only)
    return [v for v in variants.listed(op) if v.name not in left and variants.verified(v, kind)]


# ------------------------------------------------------------------------------------------------------------------ GPU


class GPU:
    """This process's current CUDA device."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("tuning needs a CUDA GPU, and torch sees none here")
        fastft.kernels.load()
        self.dtype, self.kind = dtype, database.device_kind()

    def _inputs(self, case: Case) -> Inputs:
        return case.make(New(self.dtype, "cuda"))

    def jobs(self, case: Case) -> Iterator[Job | Done]:
        """Runs the call once as it is, and once with each other variant that is offered: the kernels of all of them are
        tuned before the variants are raced.
        """
        op, inputs = OPS[case.op], self._inputs(case)
        if op.supported(*inputs.args, **inputs.kwargs) is not None:
            return
        others = [v for v in offered(op.name, self.kind) if v.refuses(*inputs.args, **inputs.kwargs) is None]
        _, name = variants.site_key(op, inputs.args, inputs.kwargs)
        del inputs  # jobs need the memory
        met: set[str] = set()
        for variant in (variants.get(op.name, op.default), *others):
            while True:
                found, error = self._launched(case, variant)
                new = [job for job in found if job.name not in met]
                met |= {job.name for job in new}
                yield from new
                if not error:
                    break
                # What stopped it may be a heuristic that does not run here, and the search has found another since:
                # then there is more that it launches.
                if not new:
                    named = "" if variant.name == op.default else variant.name
                    yield Done(Job(case, "", variant=named), error=f"{case.name}: {error}")
                    break
        if others:
            yield Job(case, name)

    def _launched(self, case: Case, variant: variants.Variant) -> tuple[list[Job], str]:
        """The kernels that a variant launches, of another than the default those of the spaces that it declares; and
        what stopped it before it had launched them all.
        """
        default, error = variant.name == OPS[case.op].default, ""
        forward: dict[tuple[Space, tuple[Any, ...]], None] | None = None
        with listening() as asked:
            try:
                inputs = self._inputs(case)
                found = outputs(variant.call, inputs)
                forward = _pairs(asked)
                able = [t for t in found if t.requires_grad]
                if able and inputs.wanted:
                    torch.autograd.grad(able, list(inputs.wanted), gradients_for(found), allow_unused=True)
                torch.cuda.synchronize()
            except Exception as raised:
                error = said(raised)
        if error:
            torch.cuda.empty_cache()
        made = []
        for space, key in _pairs(asked):
            if default or space in variant.spaces:
                phase = FORWARD if forward is None or (space, key) in forward else BACKWARD
                try:
                    name = database.config_key(space, key, self.kind)
                except Exception as raised:  # a user's kernel asks with other sizes than its space names
                    error = f"{space.kernel} was asked for {key}: {said(raised)}"
                    continue
                made.append(Job(case, name, phase, space, key, "" if default else variant.name))
        return made, error

    @contextlib.contextmanager
    def bench(self, job: Job) -> Iterator[Bench]:
        # Graphs are captured on a stream that is not the default one, and their autograd graph is made there too.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            made = _GPUBench(job, self._inputs(job.case), self.dtype)
            try:
                yield made
            finally:
                made.close()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _pairs(asked: Mapping[Space, Mapping[tuple[Any, ...], None]]) -> dict[tuple[Space, tuple[Any, ...]], None]:
    return {(space, key): None for space, keys in asked.items() for key in keys}


class _GPUBench:
    """Candidates of one job: configurations of its kernel, or variants of its op."""

    def __init__(self, job: Job, inputs: Inputs, dtype: torch.dtype) -> None:
        self.job, self.inputs, self.op = job, inputs, OPS[job.case.op]
        self.copies = [inputs.copy() for _ in range(copies_of(inputs.tensors()))]
        self.samples: dict[str, Samples] = {}
        self.works: dict[str, tuple[float, float] | None] = {}
        self.pool = torch.cuda.graph_pool_handle()
        #: What the forwards gave, for all candidates of a backward's kernel: it changes nothing about them.
        self.forwards: list[list[torch.Tensor]] = []
        try:
            self.truth: Truth | None = Truth(self.op, inputs, dtype, torch.float32 if dtype != torch.float32 else dtype)
        except torch.OutOfMemoryError:  # it keeps all logits, or all scores
            torch.cuda.empty_cache()
            self.truth = None
        self.first: dict[str, torch.Tensor] | None = None

    def close(self) -> None:
        self.samples.clear()
        self.forwards.clear()
        self.copies.clear()

    @contextlib.contextmanager
    def _as(self, label: str) -> Iterator[Callable[..., Any]]:
        """Within, the op (or variant) of a label."""
        call = self._variant(label).call
        if self.job.space is None:
            yield call
            return
        with self.job.space.using(parsed(label) or self.job.space.chosen(*self.job.key)):
            yield call

    def _variant(self, label: str) -> variants.Variant:
        """The variant that a label runs."""
        name = self.job.variant if self.job.space is not None else label
        return variants.get(self.op.name, name or self.op.default)

    def compile(self, labels: Sequence[str]) -> None:
        if self.job.space is None:
            return
        here = torch.cuda.current_device()
        with ThreadPoolExecutor(COMPILERS, initializer=torch.cuda.set_device, initargs=(here,)) as pool:
            for start in range(0, len(labels), COMPILERS):  # a launch's arguments hold memory
                noted: list[Callable[[], Any]] = []
                for label in labels[start : start + COMPILERS]:
                    with contextlib.suppress(Exception), _noting(noted), self._as(label) as call:
                        results(call, self.inputs, backward=self.job.phase == BACKWARD)
                for one in [pool.submit(compiles) for compiles in noted]:
                    one.exception()  # it fails again when it is checked

    def check(self, label: str) -> str | None:
        if (reason := self._variant(label).refuses(*self.inputs.args, **self.inputs.kwargs)) is not None:
            return f"it refuses the call: {reason}"
        with self._as(label) as call:
            found = results(call, self.copies[0], backward=self.job.phase != FORWARD)
        if self.truth is None:
            if self.first is None:
                self.first = found
            truth = self.first
            wrong = [
                n for n, t in found.items() if not torch.allclose(t.float(), truth[n].float(), rtol=0.02, atol=0.02)
            ]
            return f"another result than the first that ran: {', '.join(wrong)}" if wrong else None
        return next((str(c) for c in self.truth.compare(found) if not c.ok), None)

    def sample(self, label: str) -> float:
        with self._as(label) as call:
            if label not in self.samples:
                self.samples[label] = Samples(self._run(call), len(self.copies), self.pool)
            return self.samples[label]()

    def _run(self, call: Callable[..., Any]) -> Callable[[int], Any]:
        """A run on one of the copies: the forward, the backward, or (variants) both."""
        if self.job.phase == FORWARD:
            return lambda i: outputs(call, self.copies[i]) and None
        dys: list[torch.Tensor] = []

        def backward(found: list[torch.Tensor], i: int) -> None:
            able = [t for t in found if t.requires_grad]
            if not dys:
                dys.extend(gradients_for(found))
            if able and self.copies[i].wanted:
                torch.autograd.grad(able, list(self.copies[i].wanted), dys, retain_graph=True, allow_unused=True)

        if self.job.phase == BACKWARD:
            self.forwards = self.forwards or [outputs(call, copied) for copied in self.copies]
            return lambda i: backward(self.forwards[i], i)
        return lambda i: backward(outputs(call, self.copies[i]), i)

    def floor_us(self, label: str) -> float | None:
        """By the variant's cost, which is of the forward, and by what the space says that a configuration wastes."""
        variant, space = self._variant(label), self.job.space
        if self.job.phase == BACKWARD:
            return None
        more: tuple[float, float] | None = (1.0, 1.0)
        if label and space is not None:
            # A kernel that an op borrows does a part of what the op's cost counts.
            more = space.waste(parsed(label) or {}, *self.job.key) if space in variant.spaces else None
        work = None if more is None else self._work(variant)
        if more is None or work is None:
            return None
        return max(work[0] * more[0] / flops_per_us(), work[1] * more[1] / copy_bytes_per_us())

    def _work(self, variant: variants.Variant) -> tuple[float, float] | None:
        """A variant's FLOPs and bytes. A user's that does not say them has those of the op, as the least there is to
        do.
        """
        if variant.name not in self.works:
            formula, found = variant.cost or self.op.cost, None
            if formula is not None:
                try:
                    cost = formula(*self.inputs.args, **self.inputs.kwargs)
                    found = float(cost.flops), float(cost.bytes_moved)
                except Exception as error:  # ours: a formula that takes sizes, or answers in symbols
                    if not variant.ours:
                        log.warning("the cost of variant %s of %s: %s", variant.name, variant.op, said(error))
            self.works[variant.name] = found
        return self.works[variant.name]


def parsed(label: str) -> Config | None:
    """The configuration that :func:`shown` made a label of; None of the empty label."""
    return {name: int(value) for name, _, value in (one.partition("=") for one in label.split())} or None


@functools.cache
def copy_bytes_per_us() -> float:
    """Bytes that the device reads and writes in a µs, measured by copying 512 MiB."""
    source = torch.empty(2**27, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return 2 * source.numel() * source.element_size() / min(times)


def flops_per_us() -> float:
    """FLOPs that the device does in a µs at the most; no end of them where its kind is not known."""
    from fastft.costs import rates_of

    rates = rates_of(torch.cuda.get_device_name())
    return math.inf if rates is None else rates.tflops * 1e6


@contextlib.contextmanager
def _noting(noted: list[Callable[[], Any]]) -> Iterator[None]:
    """Within, launches are not made: what would compile each of them is noted."""
    from triton.runtime.jit import JITFunction

    stock: Any = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        noted.append(functools.partial(stock, self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = stock


__all__ = ["GPU", "Device", "Done", "Job", "offered", "parsed", "tune"]
