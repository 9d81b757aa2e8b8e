"""Tuning the shapes of a model on this machine's GPU: what ``fastft tune`` runs. Training never does.

One key after the other; each is written when it is done, so that a run can be stopped at any time, and goes on where it
was when it is started again.
"""

from __future__ import annotations

import contextlib
import functools
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
from fastft.autotune.timing import Samples, copies_of, said
from fastft.kernels._config import Config, Space, listening
from fastft.kernels._inputs import Inputs, New
from fastft.kernels._op import OPS

FORWARD, BACKWARD = "forward", "backward"
#: Threads that compile.
COMPILERS = 8


@dataclass(frozen=True)
class Job:
    """One record to make: a kernel (``space``, at ``key``) that ``phase`` of a case launches; or, without a space, the
    variants of the case's op.
    """

    case: Case
    name: str
    phase: str = ""
    space: Space | None = None
    key: tuple[Any, ...] = ()


class Device(Protocol):
    """What tuning needs of a machine."""

    kind: str

    def jobs(self, case: Case) -> list[Job]:
        """What there is to tune about a call."""

    def bench(self, job: Job) -> contextlib.AbstractContextManager[Bench]:
        """How the candidates of one job run."""


@dataclass(frozen=True)
class Done:
    """What became of a job. ``record``: None where it was known, or ``error`` says why there is none."""

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
    started: Callable[[int], None] = lambda jobs: None,
    **limits: Any,
) -> Iterator[Done]:
    """Tune what these calls launch. No job is begun after ``budget`` seconds; what has a record is passed over, unless
    ``again``. ``started`` is told how many jobs there are.
    """
    end = clock() + budget
    store = database.user_store()
    jobs: dict[str, Job] = {}
    for case in cases:
        for job in device.jobs(case):
            jobs.setdefault(job.name, job)
    started(len(jobs))
    for name, job in jobs.items():
        if not again and store.get(name) is not None:
            yield Done(job)
            continue
        if clock() >= end:
            return
        try:
            with device.bench(job) as bench:
                record = _race(job, bench, device.kind, limits)
        except TuningError as error:
            yield Done(job, error=str(error))
            continue
        except torch.OutOfMemoryError as error:
            yield Done(job, error=said(error))
            continue
        store.put(name, record)
        database.forget()
        yield Done(job, record)


def _race(job: Job, bench: Bench, kind: str, limits: Mapping[str, Any]) -> dict[str, Any]:
    if job.space is not None:
        return search(job.space, job.key, bench, **limits)
    done = race([v.name for v in offered(job.case.op, kind)], bench, **limits)
    winner = variants.get(job.case.op, done.best or OPS[job.case.op].default)
    return to_record(done, {}, winner.name, winner.source)


def offered(op: str, kind: str) -> list[variants.Variant]:
    """The variants that are raced against the default: those that passed ``fastft verify --variant`` on such a device
    (ours are tested). Not the reference: it is there to be compared with.
    """
    default = fastft.kernels.load()[op].default
    return [v for v in variants.listed(op) if v.name not in (default, "reference") and variants.verified(v, kind)]


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

    def jobs(self, case: Case) -> list[Job]:
        """Runs the call once."""
        op, inputs = OPS[case.op], self._inputs(case)
        if op.supported(*inputs.args, **inputs.kwargs) is not None:
            return []
        with listening() as asked:
            found = outputs(op.call, inputs)
            forward = {(space, key) for space, keys in asked.items() for key in keys}
            able = [t for t in found if t.requires_grad]
            if able and inputs.wanted:
                torch.autograd.grad(able, list(inputs.wanted), gradients_for(found), allow_unused=True)
            both = [(space, key) for space, keys in asked.items() for key in keys]
        torch.cuda.synchronize()
        made = []
        for space, key in both:
            phase = FORWARD if (space, key) in forward else BACKWARD
            made.append(Job(case, database.config_key(space, key, self.kind), phase, space, key))
        if offered(case.op, self.kind):
            _, name = variants.site_key(op, inputs.args, inputs.kwargs)
            made.append(Job(case, name))
        return made

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


class _GPUBench:
    """Candidates of one job: configurations of its kernel, or variants of its op."""

    def __init__(self, job: Job, inputs: Inputs, dtype: torch.dtype) -> None:
        self.job, self.inputs, self.op = job, inputs, OPS[job.case.op]
        self.copies = [inputs.copy() for _ in range(copies_of(inputs.tensors()))]
        self.samples: dict[str, Samples] = {}
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
        if self.job.space is None:
            yield variants.get(self.op.name, label or self.op.default).call
            return
        with self.job.space.using(parsed(label) or self.job.space.chosen(*self.job.key)):
            yield self.op.call

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

    def floor_us(self) -> float | None:
        """By the op's cost, for a forward whose bytes it can say."""
        if self.job.phase != FORWARD or self.op.cost is None:
            return None
        try:
            moved = float(self.op.cost(*self.inputs.args, **self.inputs.kwargs).bytes_moved)
        except Exception:  # a formula in symbols
            return None
        return moved / copy_bytes_per_us()


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
