"""Launches that come again go to the compiled kernel that Triton found for the first of their kind, and only those."""

from __future__ import annotations

import contextlib
import tempfile
import threading
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import fastft.kernels
from bench.shapes import MODELS, SHAPES
from fastft.kernels import _attention_triton, _triton
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


@jit
def _first(x_ptr, y_ptr, outer, Sq, Sk, tiles, BLOCK: tl.constexpr = 64):
    """The first Sq columns, Sk of them copied."""
    col = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0) // tiles
    tl.store(y_ptr + row * Sq + col, tl.load(x_ptr + row * outer + col, mask=col < Sk, other=0.0), mask=col < Sq)


class _Triton:
    """Stands in for ``JITFunction.run`` and for what it compiles: both note what they are given."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.compiled: list[tuple[Any, ...]] = []
        self.ready = threading.Event()
        self.ready.set()
        self.launched: list[tuple[Any, ...]] = []

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> _Triton:
        if warmup:
            assert threading.current_thread() is not threading.main_thread()
            self.ready.wait(10)
            self.compiled.append((args, constants))
            return self
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
    for kernel in (_scaled, _plain, _first):
        kernel._launches.clear()
    _first._lengths.clear()
    with (
        mock.patch.object(triton.JITFunction, "run", run),
        mock.patch.object(_triton, "_run", run),
        mock.patch.object(triton.runtime.driver, "_active", active),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
    ):
        yield found
    beside()
    for kernel in (_scaled, _plain, _first):
        kernel._launches.clear()
    _first._lengths.clear()


def beside() -> None:
    """Wait for threads that compile."""
    for thread in threading.enumerate():
        if thread.name == _triton.BESIDE:
            thread.join()


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
def test_where_lengths_change_a_thread_compiles_for_the_other_sort(stood_in: _Triton) -> None:
    """Once, when a second length of one sort comes; by another constant, dtype or stride anew."""

    def seen(*lengths: int, x: torch.Tensor | None = None, outer: int = 32, **constants: Any) -> list[Any]:
        before, x = len(stood_in.compiled), torch.zeros(64) if x is None else x
        for n in lengths:
            _first[(1,)](x, x, outer, n, n, -(-n // 4), **constants)
        beside()
        return [(*args[2:], args[0].dtype, given) for args, given in stood_in.compiled[before:]]

    assert seen(33, 33) == [], "lengths that stay"
    assert seen(34) == [(32, 16, 16, 9, torch.float32, {})]
    assert seen(35, 61, 48, 64) == [], "tiles that 16 divides are no other kind"
    assert seen(48, 64, BLOCK=32) == [(32, 17, 17, 16, torch.float32, {"BLOCK": 32})]
    assert seen(33, 48, BLOCK=16) == [], "both sorts have come by themselves"
    assert len(seen(33, 34, x=torch.zeros(64).half())) == len(seen(33, 34, outer=33)) == 1
    assert not any(args[0].data_ptr() or args[0].numel() for args, _ in stood_in.compiled), "what holds memory"


@kept
def test_a_launch_waits_for_what_is_compiled_beside_it(stood_in: _Triton) -> None:
    x, order = torch.zeros(64), []
    stood_in.ready.clear()
    _first[(1,)](x, x, 64, 33, 33, 1)
    _first[(1,)](x, x, 64, 34, 34, 1)
    _first[(1,)](x, x, 64, 35, 35, 1)
    assert len(stood_in.asked) == 3 and not stood_in.compiled, "what needs the one that is there waits for nothing"

    def launch() -> None:
        _first[(1,)](x, x, 64, 48, 48, 1)
        order.append(len(stood_in.compiled))

    other = threading.Thread(target=launch)
    other.start()
    other.join(0.2)
    assert other.is_alive()
    stood_in.ready.set()
    other.join(60)
    assert order == [1] and len(stood_in.asked) == 4


@kept
def test_what_cannot_be_compiled_beside_says_so_where_it_is_launched(stood_in: _Triton, capsys: Any) -> None:
    x = torch.zeros(64)
    with mock.patch.object(stood_in, "compiled", None):
        _first[(1,)](x, x, 64, 33, 33, 1)
        _first[(1,)](x, x, 64, 34, 34, 1)
        beside()
    assert capsys.readouterr().err == ""
    fails = mock.patch.object(stood_in, "run", mock.Mock(side_effect=RuntimeError("no room")))
    with fails, pytest.raises(RuntimeError, match="no room"):
        _first[(1,)](x, x, 64, 48, 48, 1)


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


@kept
@pytest.mark.parametrize("hides", ["", "padding", "packing"])
@pytest.mark.parametrize("lengths", [(787, 1034, 704), (704, 2048, 1989)], ids=str)
def test_what_is_compiled_beside_is_what_attention_needs_next(lengths: tuple[int, ...], hides: str) -> None:
    """By Triton's own rule: of all kernels of both directions, for the sort of lengths that has not come."""
    from tests.kernels._hopper import H100
    from tests.kernels._launches import Blank, noting

    found: list[tuple[bool, tuple[str, ...]]] = []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        *_, binder = self.create_binder()
        bound, specialization, _ = binder(*args, **constants)
        given = [*map(str, specialization), *(str(bound[p.name]) for p in self.params if p.is_constexpr)]
        found.append((warmup, (self.__name__, *given)))

    kernels = [value for value in vars(_attention_triton).values() if isinstance(value, _triton.Kernel)]
    with (
        noting(),
        mock.patch.object(triton.runtime.driver, "_active", H100()),
        mock.patch.object(triton.JITFunction, "run", note),
        mock.patch.object(_triton, "_run", note),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
    ):
        for kernel in kernels:
            kernel._launches.clear()
            kernel._lengths.clear()
        ran = []
        for seq in lengths:
            before = len(found)
            dims = {**AT["attention"].dims, "seq": seq, "hides": hides}
            inputs = OPS["attention"].inputs(Blank(torch.bfloat16, "cpu"), **dims)
            out = OPS["attention"].call(*inputs.args, **inputs.kwargs)
            torch.autograd.grad(out, list(inputs.wanted), torch.empty_like(out))
            beside()
            ran.append({given for warmup, given in found[before:] if not warmup})
        for kernel in kernels:
            kernel._launches.clear()
            kernel._lengths.clear()
    assert len(ran[0]) == 4 and ran[0] == ran[1] and not ran[0] & ran[2]
    assert {given for warmup, given in found if warmup} == ran[2]


@contextlib.contextmanager
def counting() -> Iterator[list[str]]:
    """The names of the threads in which Triton compiles, with an empty cache."""
    found: list[str] = []

    def compiled(*, cache_hit: bool, **_: Any) -> None:
        assert not cache_hit
        found.append(threading.current_thread().name)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_CACHE_DIR", folder)
        patched.setattr(triton.knobs.compilation, "listener", compiled)
        for kept_ in (_first.device_caches, _first._launches, _first._lengths):
            kept_.clear()
        yield found
        beside()
        for kept_ in (_first.device_caches, _first._launches, _first._lengths):
            kept_.clear()


@kept
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's compiler, in place of a GPU")
def test_triton_finds_what_was_compiled_beside() -> None:
    from tests.kernels._hopper import H100

    run, x = triton.JITFunction.run, torch.zeros(64)

    def compiles(kernel: Any, *args: Any, warmup: bool, **given: Any) -> Any:
        return run(kernel, *args, warmup=True, **given)

    with (
        counting() as found,
        mock.patch.object(triton.runtime.driver, "_active", H100()),
        mock.patch.object(triton.JITFunction, "run", compiles),
        mock.patch.object(_triton, "_run", compiles),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
    ):
        for n in (33, 34, 48, 64):
            _first[(1,)](x, x, 64, n, n, 1)
    assert found == ["MainThread", _triton.BESIDE]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="launches")
def test_lengths_that_change_on_a_gpu() -> None:
    x = torch.randn(5, 64, device="cuda")
    with counting() as found:
        for n in (33, 34, 48, 64, 35, 16):
            y = torch.full((5, n), 7.0, device="cuda")
            _first[(5,)](x, y, 64, n, n, 1)
            assert torch.equal(y, x[:, :n])
    assert found == ["MainThread", _triton.BESIDE]


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
