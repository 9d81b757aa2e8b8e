"""Compiled halves recorded as CUDA graphs (``options={"cuda_graphs": True}``): a step's forward and backward are then a
launch each, where the host launches hundreds of kernels, and small models wait for it.

A half is recorded in the first call that finds what it reads where the call before did: parameters, and what the other
half kept for it. Other inputs (a batch) are copied to where they were then. What it makes lies in memory of the graphs'
own, at the same place in every step, and is handed out as it is; copied are small results (the loss), and all results
(hidden states that a user keeps, gradients that are accumulated) once somebody was found to hold them for longer than a
step. A half runs kernel by kernel, as without this option, while

* what its last replay made is still needed: the forward of a step whose backward is to come;
* a batch has another size, or something that it reads has moved.

Where that is most of the time, the graphs are given up, and their memory with them.

While a graph is recorded nobody can wait for the GPU, so that what ops ask of it (how many labels count, whether there
is padding) has the answer that is right for any batch: ignored labels and padding cost as much as others.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fastft import _torch_compat as compat
from fastft import offload
from fastft.fallback import Attempt
from fastft.reporting import Report

#: The report's row of a half.
ROW = "CUDA graph of the {}"
#: Bytes of inputs that may be copied in each call: of a batch, and of the gradients that a backward begins with (those
#: of the hidden states, which are zeros where only the loss is used: 64 MiB of 8,192 tokens of an 8B).
MOST_MOVED = 2**28
#: A forward's result of at most so many bytes is copied in any case.
SMALL = 2**20
#: Bytes of results that are copied since somebody holds them.
MOST_COPIED = 2**29
#: A graph is given up if calls that could not be replayed are so many more than the others.
PATIENCE = 8


def record(call: compat.Call, inputs: Sequence[Any], pool: Any) -> tuple[Any, Callable[[], None], Any]:
    """Record ``call(inputs)`` as a CUDA graph, in the memory of ``pool`` (None: a new one): what it returned, what
    replays it, and the pool. Nothing is computed by it.
    """
    device = next(x.device for x in inputs if isinstance(x, torch.Tensor) and x.is_cuda)
    graph = torch.cuda.CUDAGraph()
    if device.index not in _STREAMS:  # PyTorch has one for all devices
        _STREAMS[device.index] = torch.cuda.Stream(device)
    # Other threads (a data loader's that pins memory) may do what they do.
    with torch.cuda.graph(graph, pool=pool, stream=_STREAMS[device.index], capture_error_mode="thread_local"):
        result = call(list(inputs))

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return result, replay, graph.pool()


_STREAMS: dict[int, torch.cuda.Stream] = {}
#: Those that there are.
_ALL: weakref.WeakSet[Graphs] = weakref.WeakSet()


def release(reason: str) -> None:
    """Give up all CUDA graphs: their memory is needed."""
    for graphs in list(_ALL):
        if any(one.replay is not None for one in graphs.halves):
            graphs.give_up(reason)


class Graphs:
    """The CUDA graphs of one compiled graph's halves, in one pool of memory: what a half needs for a moment, the other
    one uses again. ``graphs(half)(call)`` stands for the half's ``call(inputs)``.
    """

    def __init__(self, done: Report, strict: bool) -> None:
        self.done, self.strict = done, strict
        self.halves: list[Replayed] = []
        self.pool: Any = None
        _ALL.add(self)
        done.plan[ROW.format("forward")] = "not recorded: no half was compiled for one GPU alone"

    def __call__(self, half: compat.Half) -> Callable[[compat.Call], compat.Call]:
        if reason := refusal(half):
            self.say(half, f"not recorded: {reason}")
            return lambda call: call
        self.say(half, "not recorded yet")

        def replayed(call: compat.Call) -> compat.Call:
            self.halves.append(Replayed(call, half, self))
            return self.halves[-1]

        return replayed

    def kept_at(self) -> set[int]:
        """Where the recorded forward's outputs are in every step. (What is on the host is even the same in all.)"""
        outputs = [x for one in self.halves if not one.half.backward for _, x in one.outputs]
        return {x.data_ptr() for x in outputs if isinstance(x, torch.Tensor)}

    def say(self, half: compat.Half, what: str) -> None:
        """In the report, of a half."""
        self.done.plan[ROW.format("backward" if half.backward else "forward")] = what

    def begins(self, inputs: Sequence[Any]) -> None:
        """A backward begins: perhaps that of the last forward that was replayed, and its last one."""
        for one in self.halves:
            if one.pending and not compat.graph_is_retained():
                kept = {storage._cdata for storage, _ in one.kept}
                one.pending = not any(isinstance(x, torch.Tensor) and compat.storage_of(x) in kept for x in inputs)

    def give_up(self, reason: str) -> None:
        """Both halves run kernel by kernel from here on; the memory is free again."""
        for one in self.halves:
            one.forget()
            self.say(one.half, f"given up: {reason}")
        self.halves, self.pool = [], None


class Replayed:
    """A compiled half, ``call(inputs)``, that is recorded and replayed. As that does, it empties ``inputs``."""

    def __init__(self, call: compat.Call, half: compat.Half, graphs: Graphs) -> None:
        self.call, self.half, self.graphs = call, half, graphs
        self.fixed: list[int] = []
        self.addresses: list[int] | None = None
        self.forget()

    def forget(self) -> None:
        """Forget what was recorded."""
        self.replay: Callable[[], None] | None = None
        #: What the report says of it.
        self.row = ""
        #: Inputs that are copied: where they are among the inputs, and where they were when it was recorded.
        self.moved: list[int] = []
        self.places: list[torch.Tensor] = []
        #: Inputs that are no tensors.
        self.numbers: dict[int, Any] = {}
        #: Of each output: the input that it is, and what it is otherwise.
        self.outputs: list[tuple[int | None, Any]] = []
        #: Storages of what was made, with how many hold them when nobody else does: results; and what is kept for the
        #: backward.
        self.results: list[tuple[Any, int]] = []
        self.kept: list[tuple[Any, int]] = []
        #: Whether the backward of the last replay is to come.
        self.pending = False
        self.copies = False
        self.replayed = self.missed = 0

    def __call__(self, inputs: Any) -> Any:
        if self not in self.graphs.halves:
            return self._plain(inputs)
        if self.half.backward:
            self.graphs.begins(inputs)
        if self.replay is None:
            if not self._settled(inputs) or not self._recorded(inputs):
                return self._plain(inputs)
        elif reason := self._obstacle(inputs):
            self.missed += 1
            if reason not in self.row:
                self.row += f"; not where {reason}"
                self.graphs.say(self.half, self.row)
            if self.missed > self.replayed + PATIENCE:
                self.graphs.give_up(reason)
            return self._plain(inputs)
        return self._replay(inputs)

    def _plain(self, inputs: Any) -> Any:
        """Kernel by kernel."""
        try:
            return self.call(inputs)
        except torch.OutOfMemoryError:
            release("out of memory beside them")
            raise

    def _settled(self, inputs: Sequence[Any]) -> bool:
        """Whether all that stays in one place is where it was in the call before, and the rest is little."""
        self.fixed = [i for i in self.half.fixed if isinstance(inputs[i], torch.Tensor)]
        before, self.addresses = self.addresses, [inputs[i].data_ptr() for i in self.fixed]
        if before is None:
            return False
        # All that a backward reads its forward gave it, parameters too. That has moved if it was recorded just now.
        stays = self.graphs.kept_at().issuperset(self.addresses) if self.half.backward else before == self.addresses
        fixed = set(self.fixed)
        others = [x for i, x in enumerate(inputs) if i not in fixed and isinstance(x, torch.Tensor)]
        moved = sum(x.nbytes for x in others)
        if moved > MOST_MOVED:
            much = f"{moved} bytes of inputs would be copied a step, over {MOST_MOVED}"
            self.graphs.say(self.half, f"not recorded: {much}")
        return stays and moved <= MOST_MOVED

    def _recorded(self, inputs: Sequence[Any]) -> bool:
        """Record it, with ``inputs`` as they are. False: that failed, and will not be tried again."""
        graphs, fixed = self.graphs, set(self.fixed)
        reason = "it could not be recorded"
        try:
            with Attempt(
                "recording a CUDA graph", "kernels are launched one by one", graphs.done.errors, graphs.strict
            ):
                held = list(inputs)
                for i, x in enumerate(inputs):
                    if not isinstance(x, torch.Tensor):
                        self.numbers[i] = x
                    elif i not in fixed:
                        self.moved.append(i)
                        held[i] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
                        self.places.append(held[i])
                result, replay, graphs.pool = record(self.call, held, graphs.pool)
                self._describe(list(result), held)
                self.results = [(storage, compat.holders(storage)) for storage, _ in self.results]
                self.kept = [(storage, compat.holders(storage)) for storage, _ in self.kept]
                self.replay = replay
                self.row = f"replayed; {sum(x.nbytes for x in self.places)} bytes of inputs copied a step"
                graphs.say(self.half, self.row)
                return True
        except torch.OutOfMemoryError:  # the plain half needs less
            reason = "out of memory while it was recorded"
        offload.abandon()
        graphs.give_up(reason)
        return False

    def _describe(self, result: Sequence[Any], held: Sequence[Any]) -> None:
        """Note what each output is, and which memory is of the graph's own."""
        of_inputs = {id(held[i]): i for i in self.fixed}
        elsewhere = {compat.storage_of(held[i]) for i in self.fixed}
        results: dict[int, Any] = {}
        kept: dict[int, Any] = {}
        for i, x in enumerate(result):
            self.outputs.append((of_inputs.get(id(x)), x))
            if isinstance(x, torch.Tensor) and id(x) not in of_inputs and compat.storage_of(x) not in elsewhere:
                storage = x.untyped_storage()
                (results if self._is_result(i) else kept)[storage._cdata] = storage
        self.results = [(storage, 0) for storage in results.values()]
        self.kept = [(storage, 0) for storage in kept.values()]

    def _is_result(self, i: int) -> bool:
        """Whether an output leaves the graph: a gradient, or one for the user."""
        return self.half.backward or i in self.half.visible

    def _obstacle(self, inputs: Sequence[Any]) -> str:
        """Why it cannot be replayed now; empty if it can."""
        if [inputs[i].data_ptr() for i in self.fixed] != self.addresses:
            return "what it reads is elsewhere than in the step before"
        if any(inputs[i] != x for i, x in self.numbers.items()):
            return "batches are of several sizes"
        if any(inputs[i].shape != x.shape for i, x in zip(self.moved, self.places, strict=True)):
            return "batches are of several sizes"
        # What a backward made may lie where the forward keeps what it needs for a moment.
        halves = [self] if self.half.backward else self.graphs.halves
        if any(half.results_are_held() for half in halves):
            return "results of the step before are still in use"
        return "a backward is to come" if self._is_awaited() else ""

    def results_are_held(self) -> bool:
        """Whether anybody holds a result of the last replay; if so, they are copied from now on."""
        held = not all(map(_alone, self.results))
        self.copies |= held and sum(storage.nbytes() for storage, _ in self.results) <= MOST_COPIED
        return held

    def _is_awaited(self) -> bool:
        """Whether what the last replay kept is to be read by a backward. (AOTAutograd holds it for as long as somebody
        holds the loss.)
        """
        return self.pending and not all(map(_alone, self.kept))

    def _replay(self, inputs: Any) -> tuple[Any, ...]:
        if self.moved:
            torch._foreach_copy_(self.places, [inputs[i] for i in self.moved])
        assert self.replay is not None
        self.replay()
        self.replayed += 1
        self.pending = bool(self.kept)
        results = []
        for i, (of, x) in enumerate(self.outputs):
            if of is not None:
                x = inputs[of]
            elif isinstance(x, torch.Tensor):
                copied = self.copies or (not self.half.backward and x.nbytes <= SMALL)
                x = x.clone() if copied and self._is_result(i) else x.detach()
            results.append(x)
        inputs.clear()
        return tuple(results)


def _alone(made: tuple[Any, int]) -> bool:
    storage, alone = made
    return compat.holders(storage) == alone


def refusal(half: compat.Half) -> str:
    """Why a half is not recorded; empty if it can be."""
    inputs = [n for n in half.graph.nodes if n.op == "placeholder"]
    if not any(_is_on("cuda", n) for n in inputs):
        return "nothing that it reads is on a GPU"
    for node in half.graph.nodes:
        name = str(node.target)
        if node.op == "placeholder":
            # What kernels' launches depend on is read when it is recorded, and never again. Of what the forward made,
            # that is the same in all steps that are replayed.
            if _is_on("cpu", node) and not (half.backward and all(_is_ours(user) for user in node.users)):
                return f"{node.name} is on the host"
        elif node.op != "call_function":
            continue
        elif node.target is torch.ops.aten.copy_.default and node.args[0] in inputs:
            return f"it writes to its input {node.args[0]}"
        elif tags := _HINDERING & set(getattr(node.target, "tags", ())):
            return f"{name}: {', '.join(sorted(tag.name for tag in tags))}"
        elif name.startswith("_c10d_functional"):
            return f"{name} waits for other processes"
        elif _is_on("cpu", node) and not (_is_ours(node) or node.target is operator.getitem):
            return f"{name} computes on the host"
    return ""


_HINDERING = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.cudagraph_unsafe}


def _is_on(kind: str, node: fx.Node) -> bool:
    values = node.meta.get("val")
    return any(
        isinstance(x, torch.Tensor) and x.device.type == kind
        for x in (values if isinstance(values, (list, tuple)) else [values])
    )


def _is_ours(node: fx.Node) -> bool:
    return str(node.target).startswith("fastft.")
