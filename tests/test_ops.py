"""Every op has all that an op must have."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

import fastft.kernels
from bench.shapes import SHAPES
from fastft.kernels._op import OPS, Op, Recompute, register

KERNEL_TESTS = Path(__file__).parent / "kernels"
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
    home = op.call.__module__.rsplit(".", 1)[-1]
    tests = [KERNEL_TESTS / f"test_{name}.py" for name in (op.name, home)]
    assert any(t.is_file() and op.name in t.read_text(encoding="utf-8") for t in tests), f"no {tests[0].name}"


@ops
def test_has_shapes(op: Op) -> None:
    # Variants of an op that stand in its file (packed operands) are measured at its shapes.
    names = {op.name, op.call.__module__.rsplit(".", 1)[-1]}
    assert any(s.op in names for s in SHAPES), f"no row of bench/shapes.py is for {op.name}"


@ops
def test_opening_docstring(op: Op) -> None:
    # The maths and the shapes stand at the top of each file.
    doc = inspect.getmodule(op.call).__doc__ or ""  # type: ignore[union-attr]
    assert "[" in doc, "the module's docstring gives no shapes"


def test_every_registered_raw_op_belongs_to_an_op() -> None:
    ours = {name.removeprefix("fastft::") for op in OPS.values() for name in op.raw}
    named = {s.name.removeprefix("fastft::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("fastft::")}
    assert named <= ours, f"in no Op's raw: {sorted(named - ours)}"


def test_a_name_is_taken_once() -> None:
    op = next(iter(OPS.values()))
    with pytest.raises(ValueError, match=f"an op named '{op.name}' is registered already, by fastft.kernels"):
        register(op)
