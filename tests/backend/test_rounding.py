"""Adapters in fp32, as PEFT keeps them, are rounded together when a compiled graph is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastft import _torch_compat as compat
from fastft import compiler, costs, partitioner
from fastft.kernels._dense_weights import Rounded
from fastft.partitioner import Walk
from tests.models import _families as families
from tests.models._training import Step, check_equal, compiled, step


def network() -> torch.nn.Module:
    """Two layers with adapters of rank 8, multiples of 16 bytes in half precision."""
    return families.build("llama3", lora=0.0, checkpointing=True)


def adapters(model: torch.nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Rounded]:
    found: list[Rounded] = []

    class Noted(Rounded):
        def __init__(self, call: Any) -> None:
            super().__init__(call)
            found.append(self)

    monkeypatch.setattr(compiler, "Rounded", Noted)
    return found


def run(model: torch.nn.Module, call: Any) -> Step:
    ids = torch.randint(1, families.VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return step(model, {"input_ids": ids, "labels": ids}, call=call)


@pytest.mark.parametrize("memory", [None, "lean", "fast"])
def test_of_a_model(made: list[Rounded], memory: str | None) -> None:
    model = network()
    call = compiled(model, residual="inductor", **({} if memory is None else {"memory": memory}))
    first = run(model, call)
    check_equal(run(model, call), first, 0.0)
    forward, backward = made
    assert forward.plans and backward.plans
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(1.5)  # as an optimizer does that PyTorch does not see
    changed = run(model, call)
    assert not torch.equal(changed[0], first[0])
    forward.plans, backward.plans = [], []  # now each op rounds its own
    check_equal(run(model, call), changed, 0.0)


def test_not_over_several_gpus(made: list[Rounded], monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is split has adapters on each of its GPUs; they are not copied together."""
    with FakeTensorMode():
        first, second = torch.empty(2, device="cuda:0"), torch.empty(2, device="cuda:1")
        host = torch.empty(2)
    assert compat.on_one_gpu([first, first, host, 3]) and compat.on_one_gpu([host]) and compat.on_one_gpu([])
    assert not compat.on_one_gpu([first, host, second])
    monkeypatch.setattr(compat, "on_one_gpu", lambda inputs: False)
    model = network()
    call = compiled(model, residual="inductor", memory="lean")
    check_equal(run(model, call), run(model, call), 0.0)
    assert not made


def test_their_bytes_are_in_the_predicted_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[Walk] = []
    init = Walk.__init__

    def noted(self: Walk, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        walks.append(self)

    monkeypatch.setattr(Walk, "__init__", noted)
    model = network()
    run(model, compiled(model, memory="lean"))
    assert walks
    for walk in walks:
        peak, number = walk.peak({}), walk.rounded
        assert number == 2 * adapters(model)
        walk.rounded = 0
        assert walk.peak({}) == peak - number


def test_no_bytes_where_nothing_is_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without autocast the adapters' own dtype is the products'."""
    found: list[int] = []
    monkeypatch.setattr(partitioner, "rounded", lambda graph: found.append(costs.rounded(graph)) or found[-1])
    model = network()
    ids = torch.ones(2, 24, dtype=torch.int64)
    step(model, {"input_ids": ids, "labels": ids}, call=compiled(model, memory="lean"))
    assert found and not any(found)
