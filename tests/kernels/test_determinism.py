"""Repeats are bit-equal: every op, values and gradients, with other memory under it and whatever the allocator left
there; no kernel has an atomic.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fastft.kernels
from fastft.kernels._op import INTERPRET, Op
from tests.kernels._samples import Sample, samples

# cuBLAS asks for a workspace of fixed size where deterministic algorithms are demanded; it looks once in a process.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

ops = pytest.mark.parametrize("op", fastft.kernels.load().values(), ids=lambda op: op.name)
devices = pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() and not INTERPRET else [])])
#: The interpreter takes its time, and fp16 takes no other way through a kernel than bf16.
DTYPES = [torch.float32, torch.bfloat16, *([] if INTERPRET else [torch.float16])]
SOURCES = sorted(Path(fastft.kernels.__path__[0]).glob("*.py"))


@pytest.fixture(params=[False, True], ids=["", "deterministic algorithms"])
def demanded(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Without and with ``torch.use_deterministic_algorithms(True)``, which also fills new memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


def churn(device: str, turn: int) -> list[torch.Tensor]:
    """Put pressure on the allocator: blocks of odd sizes full of NaN, every other one freed, the rest returned."""
    largest = 2**22 if device == "cuda" else 2**13
    sizes = [(turn * 7919 + 104729 * i) % largest + 1 for i in range(24)]
    return [torch.full((n,), float("nan"), device=device) for n in sizes][turn % 2 :: 2]


def once(op: Op, sample: Sample) -> list[torch.Tensor]:
    """Outputs and gradients; the incoming gradients are the same at every call."""
    outs = sample.outputs(op.call)
    wanted = [out for out in outs if out.requires_grad]
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(out.shape, generator=generator).to(out) for out in wanted]
    return [*outs, *(torch.autograd.grad(wanted, sample.leaves(), grads) if wanted else ())]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, with −0 apart from 0 and NaN equal to itself."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    a, b = a.detach().contiguous(), b.detach().contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(width), b.view(width))


@ops
@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_repeats_bit_for_bit(op: Op, dtype: torch.dtype, device: str, demanded: bool) -> None:
    n = 300 if device == "cuda" else 2 if INTERPRET else 20
    for sample in samples(op, dtype, device, n):
        first = once(op, sample)
        assert not any(t.is_floating_point() and not t.isfinite().all() for t in first), sample.name
        kept = []
        for turn in range(1 if INTERPRET else 4):
            kept.append(churn(device, turn))
            moved = sample.copied()
            assert all(a.data_ptr() != b.data_ptr() for a, b in zip(sample.leaves(), moved.leaves(), strict=True))
            again = once(op, moved)
            different = [i for i, (a, b) in enumerate(zip(first, again, strict=True)) if not same_bits(a, b)]
            assert not different, f"{op.name}, {sample.name}: values {different} differ in repeat {turn}"


@ops
@devices
def test_demanding_determinism_changes_nothing(op: Op, device: str) -> None:
    """What needs no other algorithm, and reads no memory that nobody wrote, has the same bits under the demand."""
    if device == "cuda" and op.name == "attention":
        pytest.skip("attention leaves cuDNN under the demand")
    for sample in samples(op, torch.float32, device, n=1):
        free = once(op, sample)
        torch.use_deterministic_algorithms(True)
        try:
            bound = once(op, sample)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(same_bits(a, b) for a, b in zip(free, bound, strict=True)), sample.name


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_atomics_in_kernels(source: Path) -> None:
    tree = ast.parse(source.read_text(encoding="utf-8"))
    names = [(n.attr, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    names += [(n.value, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    atomics = [f"{source.name}:{line}" for name, line in names if name.startswith("atomic_")]
    assert not atomics, f"atomics add in the order in which programs happen to finish: {', '.join(atomics)}"


def test_every_op_stands_in_one_of_these_sources() -> None:
    named = {f"{op.call.__module__.rpartition('.')[2]}.py" for op in fastft.kernels.load().values()}
    assert named and named <= {path.name for path in SOURCES}
