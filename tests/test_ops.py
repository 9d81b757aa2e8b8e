"""Every op has all that an op must have."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fastft.kernels
from bench.shapes import SHAPES
from fastft import offload
from fastft.kernels._op import OPS, Op, Recompute, register
from tests.kernels._each import home_of, own_tests
from tests.kernels._samples import Sample, differentiable, samples

ROOT = Path(__file__).resolve().parents[1]
ops = pytest.mark.parametrize("op", fastft.kernels.load().values(), ids=lambda op: op.name)


def parameters(function: object) -> list[str]:
    """Names of a function's own parameters."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]  # type: ignore[arg-type]


@ops
def test_has_all_its_parts(op: Op) -> None:
    for part in (op.call, op.reference, op.supported, op.cost):
        assert callable(part), op.name
    assert isinstance(op.recompute, Recompute)
    assert op.raw, "no raw op"


@ops
def test_call_is_a_module_level_function(op: Op) -> None:
    # torch's caches know it by its qualified name.
    module = inspect.getmodule(op.call)
    assert module is not None
    assert getattr(module, op.call.__name__) is op.call
    assert op.call.__doc__


@ops
def test_reference_takes_the_same_arguments(op: Op) -> None:
    assert parameters(op.reference) == parameters(op.call)


@ops
def test_raw_ops_are_functional_and_in_the_dispatcher(op: Op) -> None:
    for name in op.raw:
        schema = getattr(torch.ops.fastft, name.removeprefix("fastft::")).default._schema
        assert not schema.is_mutable
        assert all(r.alias_info is None for r in schema.returns)


@ops
def test_has_tests(op: Op) -> None:
    tests = own_tests(home_of(op))
    assert (ROOT / tests).is_file(), f"there is no {tests}"
    assert op.name in (ROOT / tests).read_text(encoding="utf-8"), f"{tests} has no {op.name}"


@ops
def test_has_shapes(op: Op) -> None:
    # Variants of an op that stand in its file (packed operands) are measured at its shapes.
    names = {op.name, home_of(op)}
    assert any(s.op in names for s in SHAPES), f"no row of bench/shapes.py is for {op.name}"


@ops
def test_opening_docstring(op: Op) -> None:
    # The maths and the shapes stand at the top of each file.
    doc = inspect.getmodule(op.call).__doc__ or ""  # type: ignore[union-attr]
    assert "[" in doc, "the module's docstring gives no shapes"


class Recorder(TorchDispatchMode):
    """Keeps every call of a raw op that passes by."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[object, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "fastft":
            assert not kwargs, f"{func} is called with keywords"
            self.calls.append((func, tree_map_only(torch.Tensor, torch.Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


def run(op: Op, sample: Sample) -> None:
    """Forward, and backward where there is one."""
    outs = [out for out in sample.outputs(op.call) if out.requires_grad]
    if outs:
        torch.autograd.grad(outs, sample.leaves(), [torch.randn_like(out) for out in outs])


@ops
def test_opcheck_of_every_raw_op(op: Op) -> None:
    # The arguments are those that the op itself passes to its raw ops, forward and backward.
    with Recorder() as recorder:
        for sample in samples(op):
            run(op, sample)
    for func, args in recorder.calls:
        torch.library.opcheck(func, args)
    missing = set(op.raw) - {func._opname for func, _ in recorder.calls}
    assert not missing, f"none of the SAMPLES for {op.name} in {own_tests(home_of(op))} calls {sorted(missing)}"


@ops
def test_gradcheck_of_reference_and_backward(op: Op) -> None:
    # In fp64 an op's body is PyTorch, with the backward derived by hand.
    for sample in samples(op, torch.float64) if differentiable(op) else ():
        leaves = sample.leaves()
        for fn in (op.reference, op.call):

            def outputs(*tensors, sample=sample, fn=fn):  # type: ignore[no-untyped-def]
                return tuple(out for out in sample.outputs(fn, tensors) if out.requires_grad)

            assert outputs(*leaves), f"no output of {fn.__qualname__} has a gradient ({sample.name})"
            assert torch.autograd.gradcheck(outputs, leaves), f"{fn.__qualname__}, {sample.name}"


@ops
def test_an_op_without_a_backward_gives_no_gradient(op: Op) -> None:
    for sample in samples(op):
        assert bool(sample.leaves()) == differentiable(op), sample.name
        assert any(out.requires_grad for out in sample.outputs(op.call)) == differentiable(op), sample.name


def test_every_registered_raw_op_belongs_to_an_op() -> None:
    """All but those that move tensors, and compute nothing."""
    ours = {name.removeprefix("fastft::") for op in OPS.values() for name in op.raw}
    ours |= {op.name().removeprefix("fastft::") for op in offload.MOVES}
    named = {s.name.removeprefix("fastft::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastft::")}
    assert named <= ours, f"in no Op's raw: {sorted(named - ours)}"


def test_a_name_is_taken_once() -> None:
    op = next(iter(OPS.values()))
    with pytest.raises(ValueError, match=f"an op named '{op.name}' is registered already, by fastft.kernels"):
        register(op)
