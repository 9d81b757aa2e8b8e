"""Halves that are recorded and replayed. Without a GPU a recording is pretended: ``replay`` computes once more, from
the inputs where they were, and writes to the outputs where they were. ``tests/kernels/test_cuda_graphs.py`` has the
real ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

import fastft
from fastft import _torch_compat as compat
from fastft import cuda_graphs
from fastft.cuda_graphs import Graphs, Replayed, refusal
from fastft.options import OptionError, Options
from tests.models import _families as families
from tests.models._training import compiled

pytestmark = pytest.mark.filterwarnings("ignore:Memory efficient kernel")


def pretend(call: Any, inputs: list[Any], pool: Any) -> tuple[Any, Any, Any]:
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]
    drawn = torch.get_rng_state()
    result = call(list(inputs))

    def write(to: Any, of: Any) -> None:
        for old, new in zip(to, of, strict=True):
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.data.copy_(new)  # which autograd does not see

    # A recording computes nothing: a backward may write to what was kept for it, and dropout draws.
    write(inputs, before)
    torch.set_rng_state(drawn)
    return result, lambda: write(result, call(list(inputs))), pool or object()


def noted_halves(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """Those that are made from now on."""
    found: list[Replayed] = []
    init = Replayed.__init__

    def noted(self: Replayed, *args: Any) -> None:
        init(self, *args)
        found.append(self)

    monkeypatch.setattr(Replayed, "__init__", noted)
    return found


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[Replayed]:
    """Everything counts as on a GPU."""
    monkeypatch.setattr(cuda_graphs, "record", pretend)
    monkeypatch.setattr(cuda_graphs, "_is_on", lambda kind, node: kind == "cuda")
    return noted_halves(monkeypatch)


def network(lora: float = 0.0) -> torch.nn.Module:
    return families.build("llama3", lora=lora, checkpointing=True)


def batch(i: int, size: tuple[int, int] = (2, 24)) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, families.VOCAB, size, generator=torch.Generator().manual_seed(i))
    return {"input_ids": ids, "labels": ids}


def call_of(model: torch.nn.Module, **options: Any) -> Any:
    return compiled(model, residual="inductor", **options)


def train(model: torch.nn.Module, call: Any, steps: int, accumulated: int = 1) -> list[float]:
    """Losses of steps of SGD; each is of ``accumulated`` batches."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=0.5), []
    torch.manual_seed(0)
    for i in range(steps):
        for j in range(accumulated):
            loss = call(**batch(i * accumulated + j)).loss
            loss.backward()
            losses.append(loss)
        optimizer.step()
        optimizer.zero_grad()
    return [float(loss) for loss in losses]  # at the end: each is the user's to keep


# ------------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("memory", [None, "lean", "fast"])
def test_losses_are_those_of_kernels_one_by_one(halves: list[Replayed], memory: str | None, dropout: float) -> None:
    options = {} if memory is None else {"memory": memory}
    model = network(dropout)
    wanted = train(model, call_of(model, **options), 6)
    assert not halves
    model = network(dropout)
    got = train(model, call_of(model, cuda_graphs=True, **options), 6)
    assert got == wanted and len(set(wanted)) == 6
    forward, backward = halves
    # The first call says where inputs are.
    assert (forward.replayed, forward.missed, backward.replayed, backward.missed) == (5, 0, 5, 0)
    plan = fastft.report().plan
    assert plan["CUDA graph of the forward"].startswith("replayed; 388 bytes of inputs copied a step")
    assert plan["CUDA graph of the backward"] == "replayed; 12292 bytes of inputs copied a step"


def test_gradients_that_are_accumulated_are_not_written_over(halves: list[Replayed]) -> None:
    model = network()
    wanted = train(model, call_of(model), 4, accumulated=3)
    model = network()
    assert train(model, call_of(model, cuda_graphs=True), 4, accumulated=3) == wanted
    forward, backward = halves
    assert forward.replayed and backward.replayed and forward.missed and backward.missed


def test_two_forwards_before_a_backward(halves: list[Replayed]) -> None:
    def gradients(call: Any, model: torch.nn.Module) -> list[torch.Tensor]:
        found = []
        for i in range(4):
            losses = [call(**batch(2 * i + j)).loss for j in range(2)]
            for loss in losses:
                model.zero_grad()
                loss.backward()
                found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            del loss, losses
            model.zero_grad()
        return found

    model = network()
    wanted = gradients(call_of(model), model)
    got = gradients(call_of(model, cuda_graphs=True), model)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    assert halves[0].replayed and halves[0].missed


def test_logits_that_are_kept_stay_what_they_were(halves: list[Replayed]) -> None:
    model = network()
    call = call_of(model, cuda_graphs=True, lazy_logits=False)
    kept = []
    for i in range(4):
        outputs = call(**batch(i))
        outputs.loss.backward()
        model.zero_grad()
        kept.append(outputs)
    plain = call_of(model, lazy_logits=False)
    for i, outputs in enumerate(kept):
        assert torch.equal(outputs.logits, plain(**batch(i)).logits)


def test_a_small_result_of_the_users_own_does_not_hinder(halves: list[Replayed]) -> None:
    model = network()
    call = call_of(model, cuda_graphs=True)
    kept = [call(**batch(0)).loss.detach() for _ in range(4)]
    assert len({float(x) for x in kept}) == 1 and len({x.data_ptr() for x in kept}) == 4
    assert (halves[0].replayed, halves[0].missed) == (3, 0)


def test_parameters_that_move(halves: list[Replayed]) -> None:
    model = network()
    call = call_of(model, cuda_graphs=True)
    weight = next(p for p in model.parameters() if p.requires_grad)

    def loss(call: Any) -> float:
        found = call(**batch(0)).loss
        found.backward()
        model.zero_grad()
        return float(found.detach())

    before = [loss(call) for _ in range(4)][-1]
    assert (halves[0].replayed, halves[1].replayed) == (3, 3)
    weight.data = weight.data * 2
    moved = loss(call)
    assert moved == loss(call_of(model)) != before


# ------------------------------------------------------------------------------------------------------------ one half


def half(backward: bool = False, fixed: tuple[int, ...] = (0,), visible: tuple[int, ...] = (0,)) -> compat.Half:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output((graph.call_function(torch.add, (x, y)),))
    return compat.Half(graph, backward, fixed, frozenset(visible))


class Alone:
    """One half by itself: ``weight`` stays, ``x`` is given each time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: Any, **of: Any) -> None:
        monkeypatch.setattr(cuda_graphs, "record", pretend)
        monkeypatch.setattr(cuda_graphs, "_is_on", lambda kind, node: kind == "cuda")
        self.done = fastft.Report()
        self.graphs = Graphs(self.done, strict=False)
        self.weight = torch.ones(4)
        self.run = self.graphs(half(**of))(call)

    def __call__(self, *x: Any) -> Any:
        inputs = [self.weight, *x]
        result = self.run(inputs)
        assert self.run.replay is None or not inputs or self.run.missed  # it takes them, as what it stands for does
        return result

    @property
    def said(self) -> str:
        return str(self.done.plan["CUDA graph of the forward"])


def add(inputs: list[Any]) -> tuple[Any, ...]:
    return (inputs[0] + inputs[1],)


def test_results_for_the_user_are_copied_if_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Alone(monkeypatch, add)
    results = [one(torch.full((4,), float(i)))[0] for i in range(4)]
    assert [float(x[0]) for x in results] == [1, 2, 3, 4] and one.run.missed == 0


@pytest.mark.parametrize("copied", [True, False])
def test_large_results_are_copied_once_somebody_holds_them(monkeypatch: pytest.MonkeyPatch, copied: bool) -> None:
    monkeypatch.setattr(cuda_graphs, "SMALL", 15)
    monkeypatch.setattr(cuda_graphs, "MOST_COPIED", 16 if copied else 15)
    one = Alone(monkeypatch, add)
    results = [one(torch.full((4,), float(i)))[0] for i in range(3)]
    assert [float(x[0]) for x in results] == [1, 2, 3]
    assert (one.run.replayed, one.run.missed) == (1, 1)  # the third call finds the second's result in use
    results.clear()
    results = [one(torch.full((4,), float(i)))[0] for i in range(4)]
    assert [float(x[0]) for x in results] == [1, 2, 3, 4]
    assert (one.run.replayed, one.run.missed) == ((5, 1) if copied else (2, 4))


def test_what_is_kept_for_a_backward_is_not_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Alone(monkeypatch, add, visible=())
    kept = [one(torch.full((4,), float(i)))[0] for i in range(3)]
    assert [float(x[0]) for x in kept] == [1, 2, 3] and (one.run.replayed, one.run.missed) == (1, 1)
    address = kept[1].data_ptr()
    del kept
    assert one(torch.full((4,), 3.0))[0].data_ptr() == address and one.run.replayed == 2


@pytest.mark.parametrize("retained", [True, False])
def test_a_loss_that_is_held_holds_nothing_once_its_backward_ran(
    monkeypatch: pytest.MonkeyPatch, retained: bool
) -> None:
    monkeypatch.setattr(compat, "graph_is_retained", lambda: retained)
    one = Alone(monkeypatch, add, visible=())
    backward = one.graphs(half(backward=True, visible=()))(lambda inputs: (inputs[1] * 2,))
    one(torch.zeros(4))
    kept = one(torch.zeros(4))[0]
    backward([one.weight, torch.zeros(4)])  # another one's
    assert one.run.pending
    backward([one.weight, kept])
    one(torch.ones(4))
    assert one.run.missed == retained and float(kept[0]) == (1 if retained else 2)


def test_views_of_a_result_count(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Alone(monkeypatch, add, visible=())
    one(torch.zeros(4))
    view = one(torch.ones(4))[0][1:2]
    one(torch.zeros(4))
    assert one.run.missed == 1 and float(view) == 2


def test_inputs_that_come_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that is kept for the backward is the caller's own; a batch is where it was copied to."""
    one = Alone(monkeypatch, lambda inputs: (inputs[0] + inputs[1], inputs[0], inputs[1], 7, None), visible=(0,))
    one(torch.zeros(4))
    given = torch.full((4,), 5.0)
    _, weight, x, number, none = one(given)
    assert weight is one.weight and torch.equal(x, given) and x.data_ptr() != given.data_ptr()
    assert number == 7 and none is None
    one(torch.zeros(4))
    assert one.run.missed == 1 and float(x[0]) == 5  # what is kept of the batch is not written over either
    view = Alone(monkeypatch, lambda inputs: (inputs[0] + inputs[1], inputs[0][:2]), visible=(0,))
    held = [view(torch.zeros(4))[1] for _ in range(4)]
    assert view.run.missed == 0 and all(x.data_ptr() == view.weight.data_ptr() for x in held)


def test_too_much_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MOST_MOVED", 15)
    one = Alone(monkeypatch, add)
    for _ in range(4):
        one(torch.zeros(4))
    assert one.run.replay is None and one.said == "not recorded: 16 bytes of inputs would be copied a step, over 15"


def test_what_stays_must_have_stayed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Alone(monkeypatch, add)
    kept = []
    for _ in range(3):
        kept.append(one.weight)
        one.weight = torch.ones(4)
        one(torch.zeros(4))
    assert one.run.replay is None
    one(torch.zeros(4))
    assert one.run.replay is not None
    one.weight = torch.full((4,), 3.0)
    assert float(one(torch.ones(4))[0][0]) == 4 and one.run.missed == 1


def test_numbers_and_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Alone(monkeypatch, lambda inputs: (inputs[0][: inputs[1].shape[0]] + inputs[1] * inputs[2],))
    for _ in range(2):
        assert float(one(torch.ones(4), 2)[0][0]) == 3
    assert float(one(torch.ones(4), 3)[0][0]) == 4 and one.run.missed == 1
    assert one(torch.ones(2), 2)[0].shape == (2,) and one.run.missed == 2
    assert float(one(torch.ones(4), 2)[0][0]) == 3 and one.run.replayed == 2
    assert one.said == "replayed; 16 bytes of inputs copied a step; not where batches are of several sizes"


def test_halves_that_nobody_wrapped_are_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs on several GPUs."""
    monkeypatch.setattr(compat, "on_one_gpu", lambda inputs: False)
    model = network()
    train(model, call_of(model, cuda_graphs=True), 1)
    assert fastft.report().plan["CUDA graph of the forward"] == "not recorded: no half was compiled for one GPU alone"


def test_given_up_where_it_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Alone(monkeypatch, add)
    for _ in range(2):
        one(torch.zeros(4))
    for i in range(cuda_graphs.PATIENCE + 1):
        assert one.run.replay is not None
        one(torch.full((4 - i % 2,), 1.0)[:1])
    assert one.run.replay is not None and one.run.missed == cuda_graphs.PATIENCE + 1
    one(torch.zeros(1))
    assert one.run.replay is None and not one.run.places and not one.run.results and one.graphs.pool is None
    assert one.said == "given up: batches are of several sizes"
    for i in range(3):
        assert float(one(torch.full((4,), float(i)))[0][0]) == 1 + i
    assert one.run.replay is None


@pytest.mark.parametrize("error", [RuntimeError("operation not permitted"), torch.OutOfMemoryError("no room")])
def test_a_recording_that_fails(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    one = Alone(monkeypatch, add)

    def broken(call: Any, inputs: list[Any], pool: Any) -> Any:
        call(list(inputs))
        raise error

    monkeypatch.setattr(cuda_graphs, "record", broken)
    for i in range(4):
        assert float(one(torch.full((4,), float(i)))[0][0]) == 1 + i
    memory = isinstance(error, torch.OutOfMemoryError)
    assert one.said == f"given up: {'out of memory while it was recorded' if memory else 'it could not be recorded'}"
    assert bool(one.done.errors) is not memory


def test_out_of_memory_beside_what_was_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is given back, for whoever tries again."""

    def call(inputs: list[Any]) -> tuple[Any, ...]:
        if inputs[1].shape[0] == 1:
            raise torch.OutOfMemoryError("no room")
        return add(inputs)

    one = Alone(monkeypatch, call)
    for _ in range(2):
        one(torch.zeros(4))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        one(torch.zeros(1))
    assert one.run.replay is None and one.said == "given up: out of memory beside them"
    assert float(one(torch.zeros(4))[0][0]) == 1
    # Others' too, whoever is short of it; what was not recorded may still be.
    two, three = Alone(monkeypatch, add), Alone(monkeypatch, add)
    for _ in range(2):
        two(torch.zeros(4))
    cuda_graphs.release("enough")
    assert two.said == "given up: enough" and three.said == "not recorded yet" and two.graphs.pool is None


def test_a_backward_waits_for_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it reads is in one place, and on the host the same, only where the forward is replayed."""
    one = Alone(monkeypatch, lambda inputs: (*add(inputs), inputs[0]), visible=())
    backward = one.graphs(half(backward=True, fixed=(0, 1), visible=()))(lambda inputs: (inputs[0] * inputs[1],))
    elsewhere = torch.zeros(4)
    for _ in range(3):
        backward([elsewhere, one.weight])
    assert backward.replay is None
    for _ in range(3):
        one(torch.zeros(4))
        backward([elsewhere, one.weight])
    assert one.run.replay is not None and backward.replay is None
    backward([*one(torch.zeros(4))])
    assert backward.replay is not None
    first = Alone(monkeypatch, add, visible=())
    early = first.graphs(half(backward=True, visible=()))(add)
    for _ in range(2):
        kept = first(torch.zeros(4))[0]
        assert early.replay is None
        early([kept, torch.zeros(4)])
    assert early.replay is not None


def test_a_forward_waits_for_what_its_backward_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are in one pool: gradients may lie where the forward has what it needs for a moment."""
    one = Alone(monkeypatch, lambda inputs: (*add(inputs), inputs[0]))
    backward = one.graphs(half(backward=True, visible=()))(add)
    for _ in range(2):
        one(torch.zeros(4))
        backward([one.weight, torch.zeros(4)])
    gradient = backward([one.weight, torch.zeros(4)])[0]
    assert backward.replayed == 2
    one(torch.zeros(4))
    assert one.run.missed == 1
    del gradient
    one(torch.zeros(4))
    assert one.run.missed == 1


# ------------------------------------------------------------------------------------------------------------- refused


def graph_of(function: Any, *values: torch.Tensor) -> compat.Half:
    """A half whose nodes have fake values, of ``function(graph, inputs)``."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(len(values))]
    for node, value in zip(inputs, values, strict=True):
        node.meta["val"] = value
    graph.output((function(graph, inputs),))
    return compat.Half(graph, False, (), frozenset())


def on(device: str, *shape: int) -> torch.Tensor:
    with compat.fake_mode():
        return torch.empty(shape, device=device)


def calls(target: Any, value: torch.Tensor | None = None) -> Any:
    def function(graph: fx.Graph, inputs: list[fx.Node]) -> fx.Node:
        node = graph.call_function(target, tuple(inputs))
        node.meta["val"] = value
        return node

    return function


ATEN = torch.ops.aten


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: graph_of(calls(ATEN.relu.default), on("cuda", 2)), ""),
        (lambda: graph_of(calls(ATEN.relu.default), on("cpu", 2)), "nothing that it reads is on a GPU"),
        (lambda: graph_of(calls(ATEN.mul.Tensor), on("cuda", 2), on("cpu")), "x1 is on the host"),
        (lambda: graph_of(calls(ATEN.copy_.default), on("cuda", 2), on("cuda", 2)), "it writes to its input x0"),
        (lambda: graph_of(calls(ATEN.nonzero.default), on("cuda", 2)), "aten.nonzero.default: dynamic_output_shape"),
        (lambda: graph_of(calls(ATEN._local_scalar_dense.default), on("cuda")), "data_dependent_output"),
        (lambda: graph_of(calls(ATEN._to_copy.default, on("cpu", 2)), on("cuda", 2)), "computes on the host"),
        (lambda: graph_of(calls(torch.ops._c10d_functional.wait_tensor.default), on("cuda", 2)), "other processes"),
    ],
)
def test_refusal(made: Any, reason: str) -> None:
    found = refusal(made())
    assert reason in found and bool(reason) == bool(found)


def test_what_was_offloaded_is_read_in_a_backward() -> None:
    made = graph_of(calls(torch.ops.fastft.reload.default), on("cuda", 2), on("cpu", 2))
    assert refusal(made) == "x1 is on the host"
    assert refusal(made._replace(backward=True)) == ""


def test_on_a_cpu_it_is_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    wanted = train(model, call_of(model), 3)
    model = network()
    assert train(model, call_of(model, cuda_graphs=True), 3) == wanted
    plan = fastft.report().plan
    assert plan["CUDA graph of the forward"] == "not recorded: nothing that it reads is on a GPU"
    assert plan["CUDA graph of the backward"] == "not recorded: nothing that it reads is on a GPU"


def test_options() -> None:
    assert Options.of(None, "reduce-overhead") == Options.of({"cuda_graphs": True})
    both = Options.of(None, "max-autotune")
    assert both.cuda_graphs and both.inductor == {"max_autotune": True}
    eager = {"residual": "eager"}
    for mode, options in ((None, {**eager, "cuda_graphs": True}), ("reduce-overhead", eager)):
        with pytest.raises(OptionError, match=r'residual="eager" and cuda_graphs=True.*leave one of them out'):
            Options.of(options, mode)
    with pytest.raises(OptionError, match="option cuda_graphs is 1; it is True or False"):
        Options.of({"cuda_graphs": 1})
