"""How candidates are timed: in turns, on inputs that are not in the cache, with the launches out of the time.

On a GPU one sample is ``calls`` runs in a row, each on its own copy of the inputs, after the level-2 cache was filled
with something else. The runs are one CUDA graph where they can be captured (gaps between launches are Python's, not the
kernel's), else they are launched one by one. Events around them give microseconds a run. A candidate's time is the
median of its samples, its spread the distance between their quartiles as a share of it.

Candidates take turns, and every other round goes backwards, so that a clock that drifts, or a neighbour on the machine,
falls on all of them alike. ``bench/measure.py`` measures in the same way, whole ops beside other libraries'.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

#: A sample is so many µs long, of at most so many runs, on copies of at most so many bytes.
SAMPLE_US = 400.0
MOST_CALLS = 16
MOST_BYTES = 4 * 2**30
#: A run that is longer is not captured: its gaps are nothing, and a graph keeps all its memory. µs.
GRAPH_US = 4000.0

Clock = Callable[[], float]


def order_of(names: Sequence[str], turn: int) -> list[str]:
    """Who comes after whom in a turn: one turn there, the next one back, and then beginning with another. A GPU is
    slower after a long call, so nobody may come after the same one in every turn, or always after himself.
    """
    first = turn // 2 % max(len(names), 1)
    order = [*names[first:], *names[:first]]
    return order if turn % 2 == 0 else order[::-1]


def in_turns(
    labels: Sequence[str],
    sample: Callable[[str], float],
    *,
    rounds: tuple[int, int],
    seconds: float,
    clock: Clock = time.perf_counter,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Samples of every label, µs; and what those that failed said, who are asked no more. ``rounds``: at least, at
    most; between these, as many as fit in ``seconds``.
    """
    samples: dict[str, list[float]] = {label: [] for label in labels}
    failed: dict[str, str] = {}
    end = clock() + seconds
    for turn in range(rounds[1]):
        if turn >= rounds[0] and clock() >= end:
            break
        for label in order_of(labels, turn):
            if label in failed:
                continue
            try:
                samples[label].append(sample(label))
            except Exception as error:
                failed[label] = said(error)
    return {label: found for label, found in samples.items() if label not in failed}, failed


def median_and_spread(samples: Sequence[float]) -> tuple[float, float]:
    """The median, and the distance between the quartiles as a share of it; 0 of one sample."""
    median = statistics.median(samples)
    if len(samples) < 2 or median <= 0.0:
        return median, 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return median, (high - low) / median


def said(error: BaseException) -> str:
    """A failure in one line of printable characters."""
    line = " ".join(str(error).split())
    text = f"{type(error).__name__}: {line}"[:290]
    return "".join(c if c.isprintable() else "?" for c in text)


class Flush:
    """Drives everything out of the level-2 cache, by reading: written lines would be written back on others' time."""

    def __init__(self) -> None:
        self.buffer = torch.ones(3 * _l2_bytes() // 4, device="cuda")
        self.sink = torch.empty((), device="cuda")

    def __call__(self) -> None:
        torch.sum(self.buffer, 0, out=self.sink)


class Samples:
    """One run, sampled on a GPU: ``run(i)`` computes on the ``i``-th of ``copies`` copies of the inputs. ``pool``: the
    memory of its graph, which runs that are never looked at and never run at once can share.
    """

    def __init__(self, run: Callable[[int], Any], copies: int, pool: Any = None) -> None:
        self.run, self.pool = run, pool
        self.flush = Flush()
        for _ in range(2):
            once = self._timed(lambda: run(0))
        self.calls = max(1, min(math.ceil(SAMPLE_US / max(once, 1.0)), copies, MOST_CALLS))
        self.graph = self._captured() if once < GRAPH_US else None

    def __call__(self) -> float:
        self.flush()
        return self._timed(self._all if self.graph is None else self.graph.replay) / self.calls

    def _all(self) -> None:
        for i in range(self.calls):
            self.run(i)

    def _timed(self, what: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        what()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """None where a run cannot be captured: it waits for the GPU, or does not fit twice."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
                self._all()
            graph.replay()
            torch.cuda.synchronize()
            return graph
        except Exception:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            return None


def _l2_bytes() -> int:
    return getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 0) or 64 * 2**20


def copies_of(tensors: Iterable[torch.Tensor]) -> int:
    """How many copies of these inputs are rotated."""
    size = sum(t.numel() * t.element_size() for t in tensors)
    return int(max(1, min(MOST_CALLS, MOST_BYTES // max(size, 1))))
