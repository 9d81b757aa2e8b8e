"""Tensors that the backward reads, moved to the host in the forward and back in time: ops, host buffers, and the pass
that puts the ops into the two halves of a cut graph.

A move is two ops: ``offload`` and ``reload`` start a copy on a stream beside the one that computes, and return a
ticket; ``offload_wait`` and ``reload_wait`` make the computing stream wait for it, and return the copy. What is copied
is an operand of the wait: neither Inductor nor the allocator gives its memory away before. All copies of a device are
on one stream, in order: a host buffer is free again when the tensor in it is gone, though its last copy may still be
running.

Buffers are of the exact size (torch's own allocator of pinned memory takes powers of two), are used again for tensors
of the same size, and are pinned up to a limit; what is over it is moved through memory that is not, more slowly.
Pinning takes half a second a GiB: a thread does it while the graph is compiled (:meth:`Pool.prepare`).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from fastft import _torch_compat as compat
from fastft.kernels._op import LIBRARY

log = logging.getLogger("fastft")

# --------------------------------------------------------------------------------------------------------- host buffers


#: Bytes.
PAGE = 4096


class Pool:
    """Host buffers by size. ``limit``: bytes of them that are pinned, at most; ``pinned``: that are now."""

    def __init__(self, limit: int = 0) -> None:
        self.limit, self.pinned = limit, 0
        self.free: dict[int, list[torch.Tensor]] = {}
        #: How many buffers of each size are still to be made by the thread of :meth:`prepare`.
        self.wanted: Counter[int] = Counter()
        self._preparing: threading.Thread | None = None
        self._lock = threading.RLock()  # a buffer may be unpinned wherever Python collects garbage

    def prepare(self, sizes: Iterable[int], device: torch.device) -> None:
        """Begin to pin buffers of these sizes in bytes, for tensors of ``device``, in a thread, within the limit; those
        that are needed before they are there are made as ever.
        """
        with self._lock:
            wanted = Counter(sizes)
            self.wanted = Counter({n: count - len(self.free.get(n, ())) for n, count in wanted.items()})
            if self._preparing is None:
                self._preparing = threading.Thread(target=self._prepare, args=(device,), name="fastft-pins")
                self._preparing.start()

    def _prepare(self, device: torch.device) -> None:
        try:
            with torch.cuda.device(device):
                while (number := self._next()) is not None:
                    self._back(number, self._made(number, pin=True))
        except Exception as error:
            log.warning("host memory is pinned as it is needed, not ahead: %s", error)
            with self._lock:
                self._preparing = None

    def _next(self) -> int | None:
        """The size of the next buffer to prepare; None, and nothing more is wanted, where there is none."""
        with self._lock:
            number = next((n for n, left in self.wanted.items() if left > 0), None)
            ends = not threading.main_thread().is_alive()
            if number is None or self.pinned + number > self.limit or ends:
                self.wanted.clear()
                self._preparing = None
                return None
            self.wanted[number] -= 1
            return number

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """A host tensor of the size, strides and dtype of ``x``, which is dense; its content is undefined."""
        number = max(x.numel(), 1) * x.element_size()
        base = self._taken(number)
        if base is None:
            base = self._made(number, x.is_cuda)
        # NumPy's view is what the tensor's memory belongs to: it goes when the tensor and all its views have gone.
        view = base.numpy()[:]
        weakref.finalize(view, self._back, number, base)
        return torch.from_numpy(view).view(x.dtype).as_strided(x.shape, x.stride())

    def _taken(self, number: int) -> torch.Tensor | None:
        """A buffer that waits; None where there is none, and the caller makes it in place of who prepares them."""
        with self._lock:
            if waiting := self.free.get(number):
                return waiting.pop()
            if self.wanted[number] > 0:
                self.wanted[number] -= 1
            return None

    def _back(self, number: int, base: torch.Tensor) -> None:
        with self._lock:
            self.free.setdefault(number, []).append(base)

    def _made(self, number: int, pin: bool) -> torch.Tensor:
        """A new buffer, pinned if there is room for it."""
        if not pin:
            return torch.empty(number, dtype=torch.uint8)
        if self.pinned + number > self.limit:
            for other in [n for n in list(self.free) if n != number]:
                self._drop(other)
        # CUDA pins whole pages, each once: this one's are its own.
        whole = -(-number // PAGE) * PAGE
        room = torch.empty(whole + PAGE, dtype=torch.uint8)
        start = -room.data_ptr() % PAGE
        base = room[start : start + number]
        with self._lock:
            pin = self.pinned + number <= self.limit
            self.pinned += number if pin else 0
        if pin:
            code = int(torch.cuda.cudart().cudaHostRegister(base.data_ptr(), whole, 0))
            if code == 0:
                weakref.finalize(base, self._unpinned, base.data_ptr(), number).atexit = False
            else:
                self._is_not(number)
                log.warning("host memory could not be pinned (CUDA error %d): offloading is slow", code)
        return base

    def _is_not(self, number: int) -> None:
        with self._lock:
            self.pinned -= number

    def _drop(self, number: int) -> None:
        with self._lock:
            waiting = self.free.pop(number, [])
        if waiting:
            torch.cuda.synchronize()  # a copy from one of them may still be running

    def _unpinned(self, address: int, number: int) -> None:
        torch.cuda.cudart().cudaHostUnregister(address)
        self._is_not(number)


POOL = Pool()

# ------------------------------------------------------------------------------------------------------------------ ops

#: Copies that were started: ticket → the copy, and the event after it (None where nothing is to be waited for).
STARTED: dict[int, tuple[torch.Tensor, torch.cuda.Event | None]] = {}
_NUMBERS = itertools.count()
_STREAMS: dict[int, torch.cuda.Stream] = {}


def _start(to: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Copy x; returns the ticket."""
    device = next((t.device for t in (to, x) if t.is_cuda), None)
    event = None
    if device is None:
        to.copy_(x)
    else:
        if device.index not in _STREAMS:
            _STREAMS[device.index] = torch.cuda.Stream(device)
        # Without the stream's context manager, which takes the host as long as all the rest.
        side, here = _STREAMS[device.index], torch.cuda.current_stream(device)
        side.wait_event(here.record_event())
        # Setting a stream makes its device the current one.
        other = device.index != compat.current_device()
        with torch.cuda.device(device) if other else contextlib.nullcontext():
            torch.cuda.set_stream(side)
            try:
                to.copy_(x, non_blocking=True)
                event = side.record_event()
            finally:
                torch.cuda.set_stream(here)
    number = next(_NUMBERS)
    STARTED[number] = to, event
    return torch.tensor([number])


def _wait(ticket: torch.Tensor, device: torch.device) -> torch.Tensor:
    found, event = STARTED.pop(int(ticket))
    if event is not None:
        torch.cuda.current_stream(device).wait_event(event)
    return found


def abandon() -> None:
    """Forget copies that nobody will wait for: a forward did not come to its end."""
    if any(event is not None for _, event in STARTED.values()):
        torch.cuda.synchronize()
    STARTED.clear()


def _device(number: int) -> torch.device:
    return torch.device("cpu") if number < 0 else torch.device("cuda", number)


def _offload(x: torch.Tensor) -> torch.Tensor:
    return _start(POOL.like(x), x)


def _offload_wait(ticket: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return _wait(ticket, x.device)


def _reload(host: torch.Tensor, device: int) -> torch.Tensor:
    return _start(_like(host, _device(device)), host)


def _reload_wait(ticket: torch.Tensor, host: torch.Tensor, device: int) -> torch.Tensor:
    return _wait(ticket, _device(device))


def _like(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)


def _ticket(*_: Any) -> torch.Tensor:
    return torch.empty(1, dtype=torch.int64)


def _define(schema: str, run: Any, fake: Any) -> Any:
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"fastft::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fastft, name).default


#: Start to copy x to the host; the copy.
OFFLOAD = _define("offload(Tensor x) -> Tensor", _offload, _ticket)
OFFLOAD_WAIT = _define(
    "offload_wait(Tensor ticket, Tensor x) -> Tensor", _offload_wait, lambda ticket, x: _like(x, torch.device("cpu"))
)
#: Start to copy to GPU number ``device`` (-1: a CPU); the copy.
RELOAD = _define("reload(Tensor host, int device) -> Tensor", _reload, _ticket)
RELOAD_WAIT = _define(
    "reload_wait(Tensor ticket, Tensor host, int device) -> Tensor",
    _reload_wait,
    lambda ticket, host, device: _like(host, _device(device)),
)

MOVES = OFFLOAD, OFFLOAD_WAIT, RELOAD, RELOAD_WAIT

# ----------------------------------------------------------------------------------------------------------------- pass


def can_move(node: fx.Node) -> bool:
    """Whether a saved tensor can be offloaded: the graph made it, it is dense, and no view of another one."""
    value = node.meta["val"]
    if node.op != "call_function" or not value.dim():
        return False
    order = sorted(range(value.dim()), key=lambda i: compat.size_hint(value.stride(i)) or 0, reverse=True)
    return bool(value.permute(order).is_contiguous())


def offload(
    forward: fx.GraphModule,
    backward: fx.GraphModule,
    moved: Mapping[str, int],
    landings: Mapping[str, int],
    regions: Mapping[str, int],
    turns: Mapping[str, int],
) -> None:
    """Let the saved tensors ``moved`` (name → region that reads them in the backward) wait on the host, in place.

    A tensor's copy to the host is waited for at the end of the region that ``landings`` has for it, or of the forward,
    if there is no such region; one back starts when the backward comes to the region after its own. ``regions``: of the
    forward's nodes; ``turns``: backward node → region whose turn it is.
    """
    nodes = {n.name: n for n in forward.graph.nodes}
    output = next(n for n in reversed(forward.graph.nodes) if n.op == "output")
    last = {regions[n.name]: n for n in forward.graph.nodes if n.name in regions}
    hosts: dict[fx.Node, fx.Node] = {}
    for name in moved:
        node = nodes[name]
        with forward.graph.inserting_after(node):
            ticket = _call(forward, OFFLOAD, node)
        after = max(last.get(landings[name], output.prev), ticket)
        with forward.graph.inserting_after(after):
            hosts[node] = _call(forward, OFFLOAD_WAIT, ticket, node)
    output.args = (tuple(hosts.get(n, n) if isinstance(n, fx.Node) else n for n in output.args[0]),)

    inputs = {n.name: n for n in backward.graph.nodes if n.op == "placeholder"}
    order = {n: i for i, n in enumerate(backward.graph.nodes)}
    begins = [n for n in backward.graph.nodes if n.op != "placeholder"]
    for name, region in sorted(moved.items(), key=lambda m: -m[1]):
        given = inputs[name]
        users = list(given.users)
        value = given.meta["val"]
        device = -1 if value.device.type == "cpu" else value.device.index or 0
        given.meta = {**given.meta, "val": hosts[nodes[name]].meta["val"]}
        given.meta.pop("tensor_meta", None)
        first = min(users, key=order.__getitem__)
        start = next((n for n in begins if turns.get(n.name, region) <= region + 1), first)
        if order[start] > order[first]:
            start = first
        with backward.graph.inserting_before(start):
            ticket = _call(backward, RELOAD, given, device)
        with backward.graph.inserting_before(first):
            there = _call(backward, RELOAD_WAIT, ticket, given, device)
        for user in users:
            user.replace_input_with(given, there)
    for half in (forward, backward):
        half.graph.lint()
        half.recompile()


def _call(half: fx.GraphModule, op: Any, *args: Any) -> fx.Node:
    """A new node, with its value."""
    node = half.graph.call_function(op, args)
    values = fx.map_arg(args, lambda n: n.meta["val"])
    tensor = next(v for v in values if isinstance(v, torch.Tensor) and v.dim() > 0)
    with tensor.fake_mode:  # type: ignore[attr-defined]
        node.meta["val"] = op(*values)
    return node


def has_offloads(graph: fx.Graph) -> bool:
    """Whether copies of ours are in a graph, whose order is to be kept."""
    return any(n.target in (OFFLOAD, RELOAD) for n in graph.nodes)


def bytes_free() -> int:
    """Bytes of host memory that are free; 0 where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0
