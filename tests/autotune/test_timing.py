"""A sample on a GPU: cold inputs, a graph where it can be captured, µs of one run. A made-up GPU with a cache."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastft.autotune import timing
from fastft.autotune.timing import Samples

#: µs of a run whose inputs are in the cache, and are not.
WARM, COLD = 10.0, 30.0


class Device:
    """Stands in for ``torch.cuda``. Time passes where a run says so. A copy of the inputs is in the cache once it was
    read; a flush drives all of them out. A graph remembers what ran while it was captured, and does it again.
    """

    def __init__(self) -> None:
        self.us, self.flushed, self.replayed = 0.0, 0, 0
        self.cached: set[int] = set()
        self.captured: list[Callable[[], None]] | None = None
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = device.us

            def synchronize(self) -> None:
                assert device.captured is None, "a synchronisation reached the capture"

            def elapsed_time(self, end: Any) -> float:
                return (end.at - self.at) / 1e3

        class Graph:
            def replay(self) -> None:
                device.replayed += 1
                for work in self.works:
                    work()

        @contextlib.contextmanager
        def graph(made: Any, pool: Any, stream: Any) -> Any:
            assert (pool, stream) == ("pool", "side stream")
            self.captured = []
            try:
                yield
                made.works = self.captured
            finally:
                self.captured = None

        self.cuda = SimpleNamespace(
            Event=Event, CUDAGraph=Graph, graph=graph, synchronize=lambda: None, empty_cache=lambda: None,
            current_stream=lambda: "side stream",
        )  # fmt: skip

    def work(self, does: Callable[[], None]) -> None:
        """What is launched, or captured."""
        does() if self.captured is None else self.captured.append(does)

    def read(self, copy: int) -> None:
        def does() -> None:
            self.us += WARM if copy in self.cached else COLD
            self.cached.add(copy)

        self.work(does)

    def flush(self) -> None:
        self.flushed += 1
        self.cached.clear()
        self.us += 1000.0  # it is in nobody's time


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    for name, value in vars(made.cuda).items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "Flush", lambda: made.flush)
    return made


def test_every_sample_is_of_cold_inputs(device: Device) -> None:
    sample = Samples(device.read, 16, "pool")
    assert [sample() for _ in range(3)] == pytest.approx([COLD] * 3), "each run of it, in each of them"
    assert sample.calls == 16 and len(device.cached) == 16, "each run has a copy of its own"
    assert device.flushed == 3


def test_a_sample_is_one_graph(device: Device) -> None:
    sample = Samples(device.read, 16, "pool")
    assert sample.graph is not None
    before = device.replayed
    sample()
    sample()
    assert device.replayed == before + 2


def test_a_run_that_waits_for_the_device_is_launched_not_captured(device: Device) -> None:
    def run(copy: int) -> None:
        if device.captured is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        device.read(copy)

    sample = Samples(run, 4, "pool")
    assert sample.graph is None and sample() == pytest.approx(COLD) and not device.replayed
    assert device.cached == {0, 1, 2, 3} and device.flushed == 1


def slow(device: Device, us: float) -> Callable[[int], None]:
    def run(copy: int) -> None:
        device.work(lambda: setattr(device, "us", device.us + us))

    return run


def test_a_sample_has_as_many_runs_as_make_it_long_enough(device: Device) -> None:
    assert Samples(slow(device, 150.0), 16, "pool").calls == math.ceil(timing.SAMPLE_US / 150.0)
    assert Samples(slow(device, 1.0), 16, "pool").calls == 16
    assert Samples(slow(device, 1.0), 3, "pool").calls == 3, "no more than there are copies"
    long = Samples(slow(device, timing.GRAPH_US + 1.0), 16, "pool")
    assert long.calls == 1 and long.graph is None, "a graph would keep all its memory"
    assert long() == pytest.approx(timing.GRAPH_US + 1.0)


def test_a_flush_reads_more_than_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, read = 1024, []
    monkeypatch.setattr(timing, "_l2_bytes", lambda: cache)
    for name in ("ones", "empty"):
        stock = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *shape, device, stock=stock: stock(*shape))
    stock_sum = torch.sum
    monkeypatch.setattr(torch, "sum", lambda t, *a, **k: read.append(t.nbytes) or stock_sum(t, *a, **k))
    flush = timing.Flush()
    flush()
    assert len(read) == 1 and read[0] >= 2 * cache


def test_copies() -> None:
    one = torch.empty(1024)
    assert timing.copies_of([one]) == timing.MOST_CALLS and timing.copies_of([]) == timing.MOST_CALLS
    wide = torch.empty(timing.MOST_BYTES // 12, device="meta")
    assert timing.copies_of([wide]) == 3, "4 GiB of them at the most"
    assert timing.copies_of([wide] * 9) == 1
