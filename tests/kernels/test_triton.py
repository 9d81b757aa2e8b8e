"""Launches that come again go to the compiled kernel that Triton found for the first of their kind, and only those."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import fastft.kernels
from bench.shapes import MODELS, SHAPES
from fastft.kernels import _triton
from fastft.kernels._config import SPACES
from fastft.kernels._op import INTERPRET, OPS
from fastft.kernels._triton import HAS_TRITON, jit, tl, triton
from tests.kernels._each import home_of

kept = pytest.mark.skipif(not HAS_TRITON or INTERPRET, reason="Triton's interpreter compiles nothing")


@jit
def _scaled(x_ptr, y_ptr, outer, factor, n, SHIFT: tl.constexpr, BLOCK: tl.constexpr = 64):
    col = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * outer + col, mask=col < n)
    tl.store(y_ptr + tl.program_id(0) * n + col, x * factor + SHIFT, mask=col < n)


@jit
def _plain(x_ptr, options, n):
    pass


class _Triton:
    """Stands in for ``JITFunction.run`` and for what it compiles: both note what they are given."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> _Triton:
        assert warmup is False
        self.asked.append((grid, args, constants))
        return self

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args: self.launched.append((grid, args))


@pytest.fixture
def stood_in() -> Iterator[_Triton]:
    found = _Triton()

    def run(kernel: Any, *args: Any, **given: Any) -> _Triton:
        return found.run(kernel, *args, **given)

    active = types.SimpleNamespace(get_current_device=lambda: 0)
    for kernel in (_scaled, _plain):
        kernel._launches.clear()
    with (
        mock.patch.object(triton.JITFunction, "run", run),
        mock.patch.object(_triton, "_run", run),
        mock.patch.object(triton.runtime.driver, "_active", active),
    ):
        yield found
    for kernel in (_scaled, _plain):
        kernel._launches.clear()


@kept
def test_a_launch_that_comes_again_is_not_looked_up(stood_in: _Triton) -> None:
    x = torch.zeros(8, 16)
    for _ in range(3):
        assert _scaled[(8,)](x, x, 16, 2.0, 16, BLOCK=64, SHIFT=1, num_warps=4) is stood_in
    assert stood_in.asked == [((8,), (x, x, 16, 2.0, 16), {"SHIFT": 1, "BLOCK": 64, "num_warps": 4})]
    # All parameters, in the order of the signature; a grid of three.
    assert stood_in.launched == 2 * [((8, 1, 1), (x, x, 16, 2.0, 16, 1, 64))]


@kept
def test_grid_and_values_are_those_of_the_launch(stood_in: _Triton) -> None:
    x, y = torch.zeros(8, 16), torch.ones(4, 16)
    _scaled[(8,)](x, x, 16, 2.0, 16, SHIFT=1)
    _scaled[(2, 3)](y, x, 16, 3.0, 16, SHIFT=1)
    assert stood_in.launched == [((2, 3, 1), (y, x, 16, 3.0, 16, 1, 64))]


@kept
@pytest.mark.parametrize(
    "other",
    [
        lambda x: ((x.flatten()[1:], x, 16, 2.0, 16), {}),  # not aligned
        lambda x: ((x.bfloat16(), x, 16, 2.0, 16), {}),
        lambda x: ((None, x, 16, 2.0, 16), {}),
        lambda x: ((x, x, 1, 2.0, 16), {}),
        lambda x: ((x, x, 2**31, 2.0, 16), {}),
        lambda x: ((x, x, True, 2.0, 16), {}),
        lambda x: ((x, x, 16, 2, 16), {}),
        lambda x: ((x, x, 16, 2.0, 16), {"SHIFT": 2}),
        lambda x: ((x, x, 16, 2.0, 16), {"num_warps": 8}),
        lambda x: (((x, x), x, 16, 2.0, 16), {}),
    ],
    ids=["alignment", "dtype", "None", "one", "wide", "bool", "int", "constant", "option", "tuple"],
)
def test_another_kind_of_launch_is_looked_up(stood_in: _Triton, other: Any) -> None:
    x = torch.zeros(8, 16)
    args, constants = other(x)
    for _ in range(2):
        _scaled[(8,)](x, x, 16, 2.0, 16, **{"SHIFT": 1, "num_warps": 4})
        _scaled[(8,)](*args, **{"SHIFT": 1, "num_warps": 4, **constants})
    assert len(stood_in.asked) == 2 and len(stood_in.launched) == 2


@kept
def test_tuples_are_told_apart_by_what_is_in_them(stood_in: _Triton) -> None:
    x = torch.zeros(8, 16)
    for options in ((x, 1), (x, 2), (x.half(), 1), (x.flatten()[1:], 1)):
        for _ in range(2):
            _plain[(1,)](x, options, 3)
    assert len(stood_in.asked) == 4 and len(stood_in.launched) == 4


@kept
def test_another_device_is_looked_up(stood_in: _Triton) -> None:
    x = torch.zeros(8)
    for device in (0, 1, 0, 1):
        with mock.patch.object(triton.runtime.driver.active, "get_current_device", lambda at=device: at):
            _plain[(1,)](x, 2, 3)
    assert len(stood_in.asked) == 2


@kept
def test_what_is_not_known_is_always_looked_up(stood_in: _Triton) -> None:
    x = torch.zeros(8)
    for _ in range(2):
        _plain[(1,)](x, "a string", 3)  # no rule for it
        _plain[(1,)](x, 2, 3, num_warps=[4])  # no hash
    assert len(stood_in.asked) == 4 and not stood_in.launched


@kept
def test_whoever_stands_in_for_triton_sees_every_launch(stood_in: _Triton) -> None:
    x = torch.zeros(8)
    _plain[(1,)](x, 2, 3)
    seen = []
    with mock.patch.object(triton.JITFunction, "run", lambda kernel, *args, **given: seen.append(args)):
        _plain[(1,)](x, 2, 3)
        _plain[(1,)](x, 4, 5)
    _plain[(1,)](x, 4, 5)
    assert seen == [(x, 2, 3), (x, 4, 5)]
    assert len(stood_in.asked) == 2, "what somebody else returned was kept"
    _plain.pre_run_hooks.append(lambda *args, **given: None)
    try:
        _plain[(1,)](x, 2, 3)
    finally:
        _plain.pre_run_hooks.clear()
    assert len(stood_in.asked) == 3, "hooks that run before a kernel are Triton's to call"


@kept
def test_no_more_are_kept_than_that(stood_in: _Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "MOST_LAUNCHES", 4)
    x = torch.zeros(8)
    for n in range(2, 12):
        _plain[(1,)](x, 2, n)
        assert len(_plain._launches) <= 4


@kept
def test_an_unknown_version_looks_everything_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(jit(_plain.fn)) is _triton.Kernel
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    assert type(jit(_plain.fn)) is triton.JITFunction


fastft.kernels.load()
#: A call of each op with kernels of its own, at some model's sizes.
AT = {s.op: s for s in SHAPES if s.get("seq") and s.model in MODELS
      and any(space.file.stem == home_of(OPS[s.op]) for space in SPACES.values())}  # fmt: skip


@kept
@pytest.mark.parametrize("op", AT)
def test_batches_of_other_lengths_are_computed_by_the_same_compiled_kernels(op: str) -> None:
    """Odd lengths, and ones that 2, 4 and 16 divide; ones of 16 tiles. A kernel that Triton compiled anew would stop a
    run for seconds, whenever the first such batch came. Attention has two of each.
    """
    from tests.kernels._launches import compiled

    found = {seq: compiled(replace(AT[op], dims={**AT[op].dims, "batch": 4, "seq": seq}))
             for seq in (787, 1034, 1432, 704, 1989, 2048)}  # fmt: skip
    for seq, kernels in found.items():
        first = found[704 if op == "attention" and seq % 16 == 0 else 787]
        assert kernels and kernels == first, seq


@pytest.mark.skipif(not torch.cuda.is_available(), reason="launches")
def test_on_a_gpu() -> None:
    """Alignment, a stride of 1, dtypes, shapes and factors, each twice; odd sizes."""
    big = torch.randn(3000, device="cuda")
    for _ in range(2):
        for dtype in (torch.float32, torch.bfloat16):
            for rows, n, outer, first in ((5, 33, 33, 0), (5, 33, 33, 1), (7, 48, 64, 0), (3, 16, 1, 3), (1, 1, 1, 0)):
                for factor in (2.0, 3.0, 2):
                    x = big.to(dtype)[first:]
                    y = torch.full((rows, n), 7.0, device="cuda", dtype=dtype)
                    _scaled[(rows,)](x, y, outer, factor, n, SHIFT=1)
                    want = torch.as_strided(x, (rows, n), (outer, 1)).float() * factor + 1
                    torch.testing.assert_close(y.float(), want.to(dtype).float(), rtol=1e-2, atol=1e-2)
