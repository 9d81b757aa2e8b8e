"""How kernels are timed: implementations in turns, inputs out of the cache, the launches out of the time.

What a time is, on a GPU. An implementation runs ``calls`` times in a row, each call on its own copy of the inputs and
of the outputs' gradients, so none finds them in the level-2 cache; the cache is flushed before, by reading something
else. A GPU slows down after tens of milliseconds of products. So a long call is a sample by itself, however short its
backward is, and comes after the same 90 ms of products, whoever came before. Forwards run first, backwards after them,
as in training, where every layer's forward lies between the two. Both are CUDA graphs where they can be captured and
are short (gaps between launches are Python's, not the kernel's); else they are launched one by one. Device events
around them give one sample: microseconds a call.

Implementations take turns: every round takes one sample of each, and every other round goes through them backwards,
so that a clock that drifts, or a neighbour on the machine, falls on all of them alike. A time is the median of its
samples, and its spread the distance between their quartiles.

On a CPU a sample is one call by the wall clock.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bench.files import spread
from fastft import _torch_compat as compat
from fastft.autotune.timing import order_of
from fastft.kernels._inputs import Inputs

#: A sample of a shorter phase than this many µs repeats the call, at most so many times, on copies of so many bytes.
SAMPLE_US = 400.0
MOST_CALLS = 32
MOST_BYTES = 3 * 2**30
#: Longer than this many µs, forward and backward together, the gaps between launches are nothing, and a graph's own
#: memory is much.
GRAPH_US = 4000.0
#: Rounds of one comparison: at least, at most; between these, as many as fit in so many seconds.
ROUNDS = (7, 25)
SECONDS = 1.5

Phases = dict[str, float]  # phase → µs


# -- samples in turns --------------------------------------------------------------------------------------------------


def interleave(
    samplers: Mapping[str, Callable[[], Phases]],
    *,
    rounds: tuple[int, int] = ROUNDS,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, dict[str, list[float]]], dict[str, Exception]]:
    """Samples of every one of ``samplers`` by phase, taken in turns; and what those that failed raised.

    One that raises is asked no more; the others go on.
    """
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in samplers}
    failed: dict[str, Exception] = {}
    least, most = rounds
    end = clock() + seconds
    for round_ in range(most):
        if round_ >= least and clock() >= end:
            break
        for name in order_of(list(samplers), round_):
            if name in failed:
                continue
            try:
                found = samplers[name]()
            except Exception as error:
                failed[name] = error
                del samples[name]
                continue
            for phase, value in found.items():
                samples[name].setdefault(phase, []).append(value)
    return samples, failed


# -- inputs ------------------------------------------------------------------------------------------------------------


def differentiable(result: Any) -> list[torch.Tensor]:
    """The tensors of a result that have a gradient."""
    parts = (result,) if isinstance(result, torch.Tensor) else tuple(result)
    return [t for t in parts if isinstance(t, torch.Tensor) and t.requires_grad]


class Gradients:
    """Random gradients of a call's outputs, made once for each layout, since implementations can share them. Two
    outputs of one layout have one each: of a tensor that is read as both, the second reading would find it in a cache.
    ``asked``: as in :class:`fastft.kernels._inputs.Inputs`.
    """

    def __init__(self, asked: torch.Tensor | None = None, seed: int = 0) -> None:
        self.asked = asked
        self.generators: dict[torch.device, torch.Generator] = {}
        self.made: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        self.seed = seed

    def of(self, outputs: Sequence[torch.Tensor], index: int) -> list[torch.Tensor]:
        """The ``index``-th gradients for ``outputs``: as these are laid out, and 1 for a loss, as by ``backward()``."""
        return [self._of(place, output, index) for place, output in enumerate(outputs)]

    def _of(self, place: int, output: torch.Tensor, index: int) -> torch.Tensor:
        key = (place, output.shape, output.stride(), output.dtype, output.device)
        sets = self.made.setdefault(key, [])
        while len(sets) <= index:
            sets.append(self._new(output))
        return sets[index]

    def _new(self, output: torch.Tensor) -> torch.Tensor:
        gradient = torch.empty_like(output, requires_grad=False)
        if output.dim() == 0:
            return gradient.fill_(1.0)
        # A generator of its own: a graph whose capture fails leaves the default one unusable.
        if output.device not in self.generators:
            self.generators[output.device] = torch.Generator(output.device).manual_seed(self.seed)
        values = torch.randn(output.shape, device=output.device, generator=self.generators[output.device])
        gradient.copy_(values)
        # What has another batch is no result of the call, but stands beside it for comparison.
        asks = self.asked is not None and self.asked.shape[0] == output.shape[0]
        return gradient.masked_fill_(~self.asked, 0.0) if asks else gradient  # type: ignore[operator]


def _backward(
    outputs: Sequence[torch.Tensor], inputs: Inputs, gradients: Sequence[torch.Tensor]
) -> tuple[torch.Tensor | None, ...]:
    return torch.autograd.grad(outputs, list(inputs.wanted), list(gradients), allow_unused=True)


# -- CPU ---------------------------------------------------------------------------------------------------------------


class WallClock:
    """Samples of one implementation by a clock: one forward, one backward."""

    def __init__(self, run: Callable[..., Any], inputs: Inputs, clock: Callable[[], float] = time.perf_counter) -> None:
        self.run, self.inputs, self.clock = run, inputs, clock
        self.gradients = Gradients(inputs.asked)

    def __call__(self) -> Phases:
        start = self.clock()
        result = self.run(*self.inputs.args, **self.inputs.kwargs)
        forward = 1e6 * (self.clock() - start)
        outputs = differentiable(result)
        if not (self.inputs.wanted and outputs):
            return {"forward_us": forward}
        gradients = self.gradients.of(outputs, 0)
        start = self.clock()
        _backward(outputs, self.inputs, gradients)
        backward = 1e6 * (self.clock() - start)
        return {"forward_us": forward, "backward_us": backward, "full_us": forward + backward}


# -- CUDA --------------------------------------------------------------------------------------------------------------


def _l2_bytes() -> int:
    return getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0) or 64 * 2**20


class Flush:
    """Drives everything out of the level-2 cache, by reading: written lines would be written back on others' time."""

    def __init__(self) -> None:
        self.buffer = torch.ones(3 * _l2_bytes() // 4, device="cuda")
        self.sink = torch.empty((), device="cuda")

    def __call__(self) -> None:
        torch.sum(self.buffer, 0, out=self.sink)


class Heat:
    """Keeps the device busy with products: how fast it then is does not depend on who came before."""

    #: 60 products of so many rows and columns take an H100 90 ms.
    SIZE, PRODUCTS = 8192, 60

    def __init__(self) -> None:
        self.operands: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self) -> None:
        if self.operands is None:
            x = torch.ones(self.SIZE, self.SIZE, device="cuda", dtype=torch.bfloat16)
            self.operands = x.normal_(), torch.empty_like(x)
        x, out = self.operands
        for _ in range(self.PRODUCTS):
            torch.mm(x, x, out=out)


@dataclass
class Prepared:
    """What one implementation's first calls showed."""

    run: Callable[..., Any]
    first_call_s: float
    kept_bytes: int
    extra_bytes: int
    forward_us: float
    backward_us: float  # 0: there is none
    writes: bool  # it overwrites its inputs, or its outputs' gradients
    capturable: bool
    calls: int


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """address → bytes."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def _tensors(result: Any) -> list[torch.Tensor]:
    parts = (result,) if isinstance(result, torch.Tensor) else tuple(result)
    return [t for t in parts if isinstance(t, torch.Tensor)]


def prepare(run: Callable[..., Any], master: Inputs, gradients: Gradients) -> Prepared:
    """Call an implementation for the first times, on a copy of ``master``, on the current stream."""
    probe = master.copy()
    torch.cuda.synchronize()
    start = time.perf_counter()
    outputs = differentiable(run(*probe.args, **probe.kwargs))
    both = bool(outputs and master.wanted)
    dys = gradients.of(outputs, 0) if both else []
    before = [d.clone() for d in dys]
    if both:
        _backward(outputs, probe, dys)
    torch.cuda.synchronize()
    first_call_s = time.perf_counter() - start
    del outputs

    pairs = [*zip(probe.tensors(), master.tensors(), strict=True), *zip(dys, before, strict=True)]
    writes = not all(torch.equal(now, then) for now, then in pairs)

    def restore() -> None:
        if writes:
            with torch.no_grad():
                for now, then in pairs:
                    now.detach().copy_(then)

    restore()
    torch.cuda.synchronize()
    gc.collect()  # what is nobody's any more would be freed while this is measured, and hide as many bytes
    before_bytes = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run(*probe.args, **probe.kwargs)
    held = torch.cuda.memory_allocated() - before_bytes
    given, out = _storages([*probe.tensors(), *dys]), _storages(_tensors(result))
    kept = held - sum(size for address, size in out.items() if address not in given)
    if both:
        found = _backward(differentiable(result), probe, dys)
        out |= _storages(t for t in found if t is not None)
        del found
    extra = torch.cuda.max_memory_allocated() - before_bytes
    extra -= sum(size for address, size in out.items() if address not in given)
    size = sum(_storages(_tensors(result)).values())
    del result
    restore()

    capturable = True
    try:
        torch.cuda.set_sync_debug_mode("error")
        outputs = differentiable(run(*probe.args, **probe.kwargs))
        if both:
            _backward(outputs, probe, dys)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        capturable = False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    restore()

    samples = []
    for _ in range(2):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        outputs = differentiable(run(*probe.args, **probe.kwargs))
        marks[1].record()
        if both:
            _backward(outputs, probe, dys)
        marks[2].record()
        torch.cuda.synchronize()
        samples.append([1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(marks)])
        del outputs
        restore()
    forward_us, backward_us = (min(s[i] for s in samples) for i in range(2))
    if not both:
        backward_us = 0.0

    each = sum(_storages(probe.tensors()).values()) + 2 * size + max(kept, 0)
    shorter = min(forward_us, backward_us) if both else forward_us
    calls = max(1, min(math.ceil(SAMPLE_US / max(shorter, 1.0)), MOST_CALLS, int(MOST_BYTES // max(each, 1))))
    if forward_us + backward_us >= GRAPH_US:
        calls, capturable = 1, False
    return Prepared(run, first_call_s, max(kept, 0), max(extra, 0), forward_us, backward_us, writes, capturable, calls)


class DeviceClock:
    """Samples of one implementation by the device's events; see the module's docstring."""

    def __init__(
        self,
        prepared: Prepared,
        master: Inputs,
        copies: Sequence[Inputs],
        gradients: Gradients,
        flush: Callable[[], None],
        heat: Callable[[], None],
    ) -> None:
        self.prepared, self.master, self.flush, self.heat = prepared, master, flush, heat
        self.copies = copies[: prepared.calls]
        self.both = prepared.backward_us > 0
        self.gradients = gradients
        self.outputs: list[list[torch.Tensor]] = []
        self.dys: list[list[torch.Tensor]] = []
        self.pristine: list[torch.Tensor] = []
        self.graphs: list[torch.cuda.CUDAGraph] = []
        self.timed = "events"
        if prepared.capturable:
            try:
                self._capture()
                self.timed = "graph"
            except Exception:  # a library that synchronises where torch does not see it; out of memory
                self.graphs, self.outputs = [], []
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        if self.both and not self.dys:
            outputs = differentiable(self._one(self.copies[0]))
            self._set_gradients(outputs)
            del outputs

    def _one(self, inputs: Inputs) -> Any:
        return self.prepared.run(*inputs.args, **inputs.kwargs)

    def _set_gradients(self, outputs: Sequence[torch.Tensor]) -> None:
        self.dys = [self.gradients.of(outputs, i) for i in range(len(self.copies))]
        self.pristine = [d.clone() for d in self.dys[0]] if self.prepared.writes else []

    def _forwards(self) -> None:
        self.outputs = [differentiable(self._one(c)) if self.both else _tensors(self._one(c)) for c in self.copies]

    def _backwards(self) -> None:
        for outputs, inputs, dys in zip(self.outputs, self.copies, self.dys, strict=True):
            _backward(outputs, inputs, dys)

    def _capture(self) -> None:
        stream = torch.cuda.current_stream()
        if self.both:  # gradients are made before: what a capture allocates is the graph's
            outputs = differentiable(self._one(self.copies[0]))
            self._set_gradients(outputs)
            del outputs
            self._restore()
        forward = torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, stream=stream):
            self._forwards()
        graphs = [forward]
        if self.both:
            backward = torch.cuda.CUDAGraph()
            with torch.cuda.graph(backward, pool=forward.pool(), stream=stream):
                self._backwards()
            graphs.append(backward)
        self.graphs = graphs

    def _restore(self) -> None:
        """What an implementation overwrites (SwiGLU's gate and up by their gradients, say) is put back for the next."""
        if not self.prepared.writes:
            return
        with torch.no_grad():
            for inputs in self.copies:
                for now, then in zip(inputs.tensors(), self.master.tensors(), strict=True):
                    now.detach().copy_(then)
            for dys in self.dys:
                for now, then in zip(dys, self.pristine, strict=True):
                    now.copy_(then)

    def __call__(self, between: Callable[[], Any] = lambda: None) -> Phases:
        """One sample. ``between`` is called before and after each phase."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        if self.prepared.forward_us + self.prepared.backward_us >= GRAPH_US:
            self.heat()
        self.flush()
        between()
        marks[0].record()
        if self.graphs:
            self.graphs[0].replay()
        else:
            self._forwards()
        marks[1].record()
        between()
        if self.both:
            self.flush()
            between()
            marks[2].record()
            if self.graphs:
                self.graphs[1].replay()
            else:
                self._backwards()
            marks[3].record()
            between()
        torch.cuda.synchronize()
        if not self.graphs:
            self.outputs = []
        self._restore()
        forward = 1e3 * marks[0].elapsed_time(marks[1]) / len(self.copies)
        if not self.both:
            return {"forward_us": forward}
        backward = 1e3 * marks[2].elapsed_time(marks[3]) / len(self.copies)
        return {"forward_us": forward, "backward_us": backward, "full_us": forward + backward}


def profiled(clock: DeviceClock) -> list[dict[str, Any]]:
    """The kernels of one more sample, as they ran: ``phase``, ``name``, ``us``, and ``after_us``, how long nothing had
    run before. The profiler itself makes gaps.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        clock(between=lambda: compat.spin(1))
    ran = [
        (e.time_range.start, e.time_range.end, e.name) for e in profiler.events() if e.device_type == DeviceType.CUDA
    ]
    return by_phase(ran)


def by_phase(ran: Iterable[tuple[float, float, str]]) -> list[dict[str, Any]]:
    """Of ``(start, end, name)`` in µs, what ran between the first spinning kernel and the second, and between the third
    and the fourth: :func:`profiled`'s rows.
    """
    rows: list[dict[str, Any]] = []
    seen, last = 0, 0.0
    for start, end, name in sorted(ran):
        if compat.SPIN in name:
            seen, last = seen + 1, end
        elif seen in (1, 3):
            phase = "forward" if seen == 1 else "backward"
            after = max(start - last, 0.0)
            rows.append({"phase": phase, "name": name, "us": round(end - start, 2), "after_us": round(after, 2)})
            last = max(last, end)
    return rows


# -- both --------------------------------------------------------------------------------------------------------------


def say_error(error: BaseException) -> str:
    """What a table's cell says of a failure."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def compare(
    implementations: Mapping[str, Callable[..., Any]],
    master: Inputs,
    *,
    rounds: tuple[int, int] = ROUNDS,
    seconds: float = SECONDS,
    profile: bool = False,
) -> dict[str, dict[str, Any]]:
    """Times of ``implementations`` of one call, functions of ``master``'s arguments, as JSON-ready figures.

    Each gets ``forward_us`` and, where there are gradients, ``backward_us`` and ``full_us`` (:func:`spread`); on a GPU
    also ``kept_bytes`` (what the forward allocates and still holds when it returns, besides its outputs),
    ``extra_bytes`` (the most that forward and backward allocate at a time, less their outputs and gradients),
    ``first_call_s`` (seconds of the first forward and backward, compilation included), ``calls`` (in a sample) and
    ``timed`` (``graph`` or ``events``); with ``profile``, ``kernels`` (:func:`profiled`). One that raises gets
    ``error`` instead.
    """
    cuda = any(t.is_cuda for t in master.tensors())
    found: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    with _side_stream() if cuda else _nothing():
        samplers = (_device_samplers if cuda else _wall_samplers)(implementations, master, found, failed)
        samples, raised = interleave(samplers, rounds=rounds, seconds=seconds)
        for name, sampler in samplers.items():
            if profile and isinstance(sampler, DeviceClock) and name in samples:
                found[name]["kernels"] = profiled(sampler)
        samplers.clear()
        failed.update({name: say_error(error) for name, error in raised.items()})
        raised.clear()  # their tracebacks hold tensors
    if cuda:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
    for name, phases in samples.items():
        found.setdefault(name, {}).update({phase: spread(values) for phase, values in phases.items()})
    return {n: {"error": failed[n]} if n in failed else found[n] for n in implementations}


def _wall_samplers(
    implementations: Mapping[str, Callable[..., Any]],
    master: Inputs,
    found: dict[str, dict[str, Any]],
    failed: dict[str, str],
) -> dict[str, Callable[[], Phases]]:
    samplers: dict[str, Callable[[], Phases]] = {}
    for name, run in implementations.items():
        sampler = WallClock(run, master.copy())
        try:
            sampler()
        except Exception as error:
            failed[name] = say_error(error)
        else:
            found[name] = {"timed": "wall clock"}
            samplers[name] = sampler
    return samplers


def _device_samplers(
    implementations: Mapping[str, Callable[..., Any]],
    master: Inputs,
    found: dict[str, dict[str, Any]],
    failed: dict[str, str],
) -> dict[str, Callable[[], Phases]]:
    gradients, flush, heat = Gradients(master.asked), Flush(), Heat()
    ready: dict[str, Prepared] = {}
    for name, run in implementations.items():
        try:
            ready[name] = prepare(run, master, gradients)
        except Exception as error:
            failed[name] = say_error(error)
            torch.cuda.synchronize()  # raises what makes every later call fail too
            torch.cuda.empty_cache()
    copies = [master.copy() for _ in range(max((p.calls for p in ready.values()), default=0))]
    samplers: dict[str, Callable[[], Phases]] = {}
    for name, prepared in ready.items():
        try:
            clock = DeviceClock(prepared, master, copies, gradients, flush, heat)
            clock()
        except Exception as error:
            failed[name] = say_error(error)
            torch.cuda.empty_cache()
            continue
        samplers[name] = clock
        found[name] = {
            "timed": clock.timed,
            "calls": prepared.calls,
            "first_call_s": round(prepared.first_call_s, 3),
            "kept_bytes": prepared.kept_bytes,
            "extra_bytes": prepared.extra_bytes,
        }
    return samplers


@contextmanager
def _side_stream() -> Iterator[None]:
    """Graphs are captured on a stream that is not the default one, and their autograd graph must be made there too."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


# -- the device's own ceilings -----------------------------------------------------------------------------------------


def ceilings() -> dict[str, float] | None:
    """What the device can do, measured: GB/s of a copy (bytes read and written), TFLOP/s of a bf16 product of
    8192 × 8192 matrices. None on a CPU.
    """
    if not torch.cuda.is_available():
        return None
    generator = torch.Generator("cuda").manual_seed(0)
    source = torch.randn(2**28, device="cuda", generator=generator)  # 1 GiB
    target = torch.empty_like(source)
    copy = _median_us(functools.partial(target.copy_, source))
    size = source.numel() * source.element_size()
    del source, target
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", generator=generator).bfloat16() for _ in range(2))
    product = _median_us(functools.partial(torch.mm, a, b))
    return {"copy_GBps": round(2 * size / copy / 1e3, 1), "matmul_TFLOPps": round(2 * n**3 / product / 1e6, 1)}


def copy_us(bytes_moved: float) -> float | None:
    """Microseconds of a copy that reads and writes so many bytes together, sampled as :func:`compare` samples. A small
    one does not come near the rate of :func:`ceilings`: it is as long as the GPU needs to get going and to drain. None
    where it does not fit.
    """
    source = torch.empty(max(1, int(bytes_moved) // 2), dtype=torch.uint8, device="cuda")
    found = compare({"copy": torch.clone}, Inputs((source,)), rounds=(5, 15), seconds=0.3)["copy"]
    return None if "error" in found else float(found["forward_us"]["median"])


def _median_us(run: Callable[[], Any], repeats: int = 15) -> float:
    times = []
    for i in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def floor_us(bytes_moved: float, flops: float, ceilings: Mapping[str, float]) -> float:
    """The least microseconds that so many bytes and operations take on a device with these ceilings."""
    return max(bytes_moved / ceilings["copy_GBps"] / 1e3, flops / ceilings["matmul_TFLOPps"] / 1e6)
