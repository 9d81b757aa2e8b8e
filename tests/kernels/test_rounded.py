"""A compiled graph rounds its adapters together: what its ops get, and that nothing else is taken for one of them."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch

from fastft.kernels import _dense_weights
from fastft.kernels._dense_weights import Rounded, cast, stacked
from fastft.kernels.lora_glu import _rounded
from fastft.kernels.lora_linear import _stack

HALF = torch.bfloat16


@pytest.fixture
def adapters(device: str) -> list[torch.Tensor]:
    return [torch.randn(n, k, device=device) for n, k in ((4, 16), (8, 16), (24, 4), (2, 8), (3, 5))]


def asks(inputs: list[Any]) -> dict[str, Any]:
    """What ops ask for of a graph's inputs, two ranks of A and three B."""
    a, b, c, d, odd = inputs[:5]
    return {
        "cast": cast(c, HALF),
        "stack": _stack([a, b], HALF),
        "each": _rounded([c, d], HALF),
        "half": cast(d, torch.float16),
        "odd": cast(odd, HALF),
        "a part": cast(c[:2], HALF),
        "made inside": cast(a * 2, HALF),
        "as it is": cast(c, torch.float32),
    }


def check(found: dict[str, Any], inputs: list[Any]) -> None:
    a, b, c, d, odd = inputs[:5]
    wanted = {
        "cast": c.to(HALF),
        "stack": torch.cat([a, b]).to(HALF),
        "each": [c.to(HALF), d.to(HALF)],
        "half": d.half(),
        "odd": odd.to(HALF),
        "a part": c[:2].to(HALF),
        "made inside": (a * 2).to(HALF),
        "as it is": c,
    }
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        got = found[name]
        for one, other in zip(got, want, strict=True) if name == "each" else [(got, want)]:
            assert one.dtype == other.dtype and one.is_contiguous() and torch.equal(one, other), name


def test_what_ops_get(adapters: list[torch.Tensor]) -> None:
    graph = Rounded(asks)
    for _ in range(3):
        check(graph(adapters), adapters)
        for t in adapters:  # in place, and as an optimizer outside of PyTorch would: nobody is told
            t.data.normal_()
    moved = [t.clone() for t in adapters]
    check(graph(moved), moved)
    check(Rounded(asks)(adapters), adapters)


def test_rounded_once_for_all(adapters: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second call on an op makes what is no input, or no adapter; the rest is two launches, one a dtype.
    Wherever the adapters are."""
    graph = Rounded(asks)
    for _ in range(2):
        graph(adapters)
    adapters = [t.clone() for t in adapters]
    made, stock = [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: made.append(len(of)) or stock(to, of))
    ops, original = [], _dense_weights.once

    def once(how: str, of: Any, dtype: torch.dtype, make: Any) -> Any:
        return original(how, of, dtype, lambda: ops.append(how) or make())

    monkeypatch.setattr(_dense_weights, "once", once)
    for module in ("lora_linear", "lora_glu"):
        monkeypatch.setattr(f"fastft.kernels.{module}.once", once)
    check(graph(adapters), adapters)
    assert ops == ["cast"] * 3  # the odd one, the part, and what was made inside
    assert made == [5, 1]  # c, a, b, c, d; and d


def test_others_of_as_many_columns(device: str) -> None:
    """What is stacked lies together, whatever else has its width."""
    a, b, other = (torch.randn(n, 16, device=device) for n in (4, 8, 6))
    graph = Rounded(lambda inputs: (cast(inputs[2], HALF), _stack(list(inputs[:2]), HALF), cast(inputs[1], HALF)))
    for _ in range(2):
        found = graph([a, b, other])
        assert all(map(torch.equal, found, (t.to(HALF) for t in (other, torch.cat([a, b]), b))))


def test_the_first_call_says_what_is_asked_for(adapters: list[torch.Tensor]) -> None:
    graph = Rounded(lambda inputs: cast(inputs[2], HALF))
    graph([*adapters, 3, None])
    (plan,) = graph.plans
    assert plan.of == [2] and plan.dtype == HALF
    assert graph([*adapters, 3, None]).equal(adapters[2].to(HALF))


def test_nothing_is_kept(adapters: list[torch.Tensor]) -> None:
    graph = Rounded(asks)
    graph(adapters)
    gone = weakref.ref(graph(adapters)["cast"])
    gc.collect()
    assert gone() is None and _dense_weights._call.get() is None


def test_an_address_is_nobody_elses(device: str) -> None:
    """A compiled graph lets its inputs go when it has read them; what takes their place is not taken for them."""

    def graph(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        first = cast(inputs[0], HALF)
        shape = inputs[0].shape
        inputs.clear()
        others = [torch.full(shape, float(i), device=device) for i in range(1, 9)]
        return [first, *(cast(other, HALF) for other in others)]

    run = Rounded(graph)
    for _ in range(3):
        found = run([torch.zeros(64, 64, device=device)])
        assert [float(t.mean()) for t in found] == list(range(9))


def test_a_call_that_raises_leaves_nothing(adapters: list[torch.Tensor]) -> None:
    def broken(inputs: list[Any]) -> None:
        cast(inputs[0], HALF)
        raise torch.OutOfMemoryError("a test's")

    graph = Rounded(broken)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            graph(adapters)
        assert _dense_weights._call.get() is None and graph.plans is None


def test_in_a_thread_of_autograds(adapters: list[torch.Tensor]) -> None:
    graph = Rounded(asks)
    graph(adapters)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(graph(adapters)))
    thread.start()
    thread.join()
    check(found[0], adapters)


@pytest.mark.parametrize("ranks", [(8,), (8, 16)], ids=str)
def test_below_a_dense_copy_are_the_rounded_ones(ranks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy of them all, where they are there already."""
    weight, *thin = (torch.randn(n, 16) for n in (24, *ranks))
    launched: list[int] = []
    together = torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: launched.append(len(of)) or together(to, of))

    def graph(inputs: list[torch.Tensor]) -> torch.Tensor:
        with stacked(inputs[:1], (), (), (), inputs[1:], torch.bfloat16) as dense:
            return dense.clone()

    call, wanted = Rounded(graph), torch.cat([weight, *thin]).bfloat16()
    for _ in range(3):
        assert torch.equal(call([weight, *thin]), wanted)
    assert launched == [len(ranks)] * 3  # in the graph, then before it
    assert call.plans
    thin[0].mul_(2)  # as an optimizer does
    assert torch.equal(call([weight, *thin]), torch.cat([weight, *thin]).bfloat16())
    call.plans = []
    assert torch.equal(call([weight, *thin]), torch.cat([weight, *thin]).bfloat16())
