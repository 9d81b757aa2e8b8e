"""Is a variant right? ``fastft verify --variant`` asks it of every case, dtype and :class:`Way` to call the op.

A variant stands in a compiled graph where the op would, so it gets what the op gets there: views of wider tensors,
transposed ones, the stride-0 gradient of a sum, no tokens, the op's options; and it is traced with
fake tensors, where it can read no value. Its results must be what the op's are, by the error rule of
:mod:`fastft.compare`, the same in each of two runs, and what it was given must be as it was.
"""

from __future__ import annotations

import inspect
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastft import _torch_compat as compat
from fastft import compare
from fastft.autotune.cases import SMALL, Case, cases, small_cases
from fastft.autotune.variants import Variant
from fastft.fallback import said
from fastft.kernels._inputs import Inputs, New
from fastft.kernels._op import OPS, Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: A call with more numbers than these is made in one way only: the others are for its shape, and cost as much again.
MANY = 2**17

Lay = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """What was found of one call. ``inputs``: the way it was called; ``status``: ok, refused, wrong or failed;
    ``ratio``: the largest error over PyTorch's, where it is ok.
    """

    case: str
    dtype: str
    inputs: str
    status: str
    what: str
    ratio: float = 0.0


@dataclass(frozen=True)
class Way:
    """A way to call an op. ``lay`` puts an operand, ``gradient`` a gradient that comes back, into memory of its own;
    ``repeated``: whether two runs are compared too.
    """

    name: str
    inputs: Inputs
    lay: Lay
    gradient: Lay
    repeated: bool = False

    def fresh(self) -> Inputs:
        """The arguments, in memory that nobody else has."""
        return self.inputs.mapped(self.lay)


# --------------------------------------------------------------------------------------- where operands lie in memory


def _dense(t: torch.Tensor) -> torch.Tensor:
    return t.clone()


def _room(t: torch.Tensor, *shape: int) -> torch.Tensor:
    """Memory whose gaps must not be read: NaN shows in every result."""
    return t.new_full(shape, math.nan if t.is_floating_point() else 0)


def _chunk(t: torch.Tensor) -> torch.Tensor:
    """The second half of a tensor twice as wide, as ``chunk(2, -1)`` gives it."""
    return _room(t, *t.shape[:-1], 2 * t.shape[-1])[..., t.shape[-1] :].copy_(t) if t.dim() else t.clone()


def _spread(t: torch.Tensor) -> torch.Tensor:
    """Every second element: no axis is contiguous."""
    return _room(t, *t.shape, 2)[..., 0].copy_(t) if t.dim() else t.clone()


def _transposed(t: torch.Tensor) -> torch.Tensor:
    """The first axis is the contiguous one."""
    if t.dim() < 2:
        return t.clone()
    return t.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1)


def _summed(t: torch.Tensor) -> torch.Tensor:
    """The gradient that ``sum()`` gives: one 1 for all elements, stride 0."""
    return t.new_ones(()).expand(t.shape)


# ------------------------------------------------------------------------------------------------- how an op is called


def ways(op: Op, inputs: Inputs) -> Iterator[Way]:
    """All of them, from the arguments of a case."""
    yield Way("as a model makes them", inputs, _dense, _dense, repeated=True)
    if sum(t.numel() for t in _leaves(inputs)) > MANY:
        return
    yield Way("halves of wider tensors", inputs, _chunk, _chunk)
    yield Way("every second element", inputs, _spread, _spread)
    yield Way("transposed in memory", inputs, _transposed, _transposed)
    if inputs.wanted:
        yield Way("the gradient of a sum", inputs, _dense, _summed)
        if (trained := _trained(op, inputs)) is not None:
            yield Way("every operand trained", trained, _dense, _dense, repeated=True)
    if (poisoned := _poisoned(op, inputs)) is not None:
        yield Way("a NaN in the first operand", poisoned, _dense, _dense)
    for name, other in _options(op, inputs):
        yield Way(name, other, _dense, _dense)


def _trained(op: Op, inputs: Inputs) -> Inputs | None:
    """With gradients for all that the op has gradients for: a model is not always trained by adapters. None where
    these are wanted already.
    """
    every = inputs.copy()
    leaves = [t.requires_grad_() for t in _leaves(every) if t.is_floating_point()]
    if op.supported(*every.args, **every.kwargs) is not None:
        return None
    found = [t for t in _listed(op.call(*every.args, **every.kwargs)) if getattr(t, "requires_grad", False)]
    grads = torch.autograd.grad(found, leaves, [torch.ones_like(t) for t in found], allow_unused=True)
    able = [leaf for leaf, grad in zip(leaves, grads, strict=True) if grad is not None]
    if len(able) <= len(inputs.wanted):
        return None
    for leaf in leaves:
        leaf.requires_grad_(any(leaf is one for one in able))
    return Inputs(every.args, every.kwargs, able)


def _poisoned(op: Op, inputs: Inputs) -> Inputs | None:
    """With a NaN in the first number of the first operand, and no gradient wanted: there PyTorch's own keep 0 · NaN of
    what a mask has hidden. None where the op itself loses it (PyTorch's attention does at some sizes).
    """
    first = inputs.args[0]
    if not isinstance(first, torch.Tensor) or not first.is_floating_point() or not first.numel():
        return None
    copied = inputs.copy()
    with torch.no_grad():
        copied.args[0][(0,) * first.dim()] = math.nan
        ours, theirs = (_listed(call(*copied.args, **copied.kwargs)) for call in (op.call, op.reference))
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, torch.Tensor)]
    kept = all(torch.equal(a.isfinite(), b.isfinite()) for a, b in pairs)
    return Inputs(copied.args, copied.kwargs) if kept else None


def _options(op: Op, inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """With one option of the op's as it is not in the case: a flag the other way, no weight, an fp32 result, ignored
    labels; those that the op supports.
    """
    signature = inspect.signature(op.call)
    for name, parameter in signature.parameters.items():
        bound = signature.bind(*inputs.args, **inputs.kwargs)
        bound.apply_defaults()
        value, optional = bound.arguments.get(name), "None" in str(parameter.annotation)
        if isinstance(value, bool):
            bound.arguments[name], shown = not value, f"{name}={not value}"
        elif isinstance(value, torch.Tensor) and optional:
            bound.arguments[name], shown = None, f"{name}=None"
        elif value is None and "dtype" in str(parameter.annotation):
            bound.arguments[name], shown = torch.float32, f"{name}=float32"
        elif name == "labels" and isinstance(value, torch.Tensor) and value.numel():
            ignored = value.clone()
            ignored[::3] = bound.arguments.get("ignore_index", -100)
            bound.arguments[name], shown = ignored, "every third label ignored"
        else:
            continue
        other = Inputs(bound.args, bound.kwargs, inputs.wanted)
        left = {id(t) for t in _leaves(other)}
        if all(id(t) in left for t in inputs.wanted) and op.supported(*other.args, **other.kwargs) is None:
            yield shown, other


def empty_cases(op: str) -> list[Case]:
    """Calls without a token, of the first model that calls the op; none for an op that has no tokens."""
    for config, _, seq in SMALL:
        if found := [case for case in cases(config, 0, seq) if case.op == op]:
            new = New(torch.float32, "cpu")
            return [case for case in found if any(not t.numel() for t in _leaves(case.make(new)))]
    return []


# ---------------------------------------------------------------------------------------------------------- one call


@dataclass
class Ran:
    """What a call gave: results in order, gradients by operand, and what it wrote to that was not its own."""

    results: list[Any]
    gradients: dict[str, torch.Tensor | None] = field(default_factory=dict)
    written: list[str] = field(default_factory=list)

    def values(self) -> dict[str, torch.Tensor]:
        named = {f"result {i}": t for i, t in enumerate(self.results) if isinstance(t, torch.Tensor)}
        return {**named, **{f"gradient of {n}": g for n, g in self.gradients.items() if g is not None}}


def ran(op: Op, call: Callable[..., Any], inputs: Inputs, lay: Lay) -> Ran:
    """Forward, and backward where a gradient is wanted."""
    names = _names(op, inputs)
    given = {names[id(t)]: t for t in _leaves(inputs)}
    before = {name: _memory(t) for name, t in given.items()}
    with torch.enable_grad():
        one = Ran(_listed(call(*inputs.args, **inputs.kwargs)))
        one.written += [f"the forward writes to {name}" for name, t in given.items() if _changed(t, before[name])]
        able = {i: t for i, t in enumerate(one.results) if isinstance(t, torch.Tensor) and t.requires_grad}
        if not able or not inputs.wanted:
            return one
        coming = {f"the gradient of result {i}": lay(_gradient(i, t)) for i, t in able.items()}
        before |= {name: _memory(t) for name, t in coming.items()}
        grads = torch.autograd.grad([*able.values()], list(inputs.wanted), [*coming.values()], allow_unused=True)
    one.gradients = {names[id(t)]: g for t, g in zip(inputs.wanted, grads, strict=True)}
    if not one.written:
        both = {**given, **coming}.items()
        one.written += [f"the backward writes to {name}" for name, t in both if _changed(t, before[name])]
    return one


def _gradient(i: int, t: torch.Tensor) -> torch.Tensor:
    """For result ``i``: the same values whatever computed it, and in every dtype."""
    if _is_fake(t) or not t.dim():
        return torch.ones_like(t)
    generator = torch.Generator(t.device).manual_seed(i + 1)
    return torch.randn(t.shape, device=t.device, generator=generator).to(torch.bfloat16).to(t.dtype)


def _is_fake(t: torch.Tensor) -> bool:
    return isinstance(t, compat.FakeTensor)


def _memory(t: torch.Tensor) -> torch.Tensor | None:
    """The bytes that a tensor and its neighbours lie in."""
    if _is_fake(t):
        return None
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(t.detach().untyped_storage()).clone()


def _changed(t: torch.Tensor, before: torch.Tensor | None) -> bool:
    return before is not None and not torch.equal(_memory(t), before)  # type: ignore[arg-type]


def _listed(found: Any) -> list[Any]:
    return list(found) if isinstance(found, (tuple, list)) else [found]


def _leaves(inputs: Inputs) -> list[torch.Tensor]:
    """All tensors, each once (``Inputs.tensors`` tells them apart by address, and empty ones have none)."""
    found: dict[int, torch.Tensor] = {}

    def walk(x: Any) -> None:
        if isinstance(x, (list, tuple)):
            for one in x:
                walk(one)
        elif isinstance(x, torch.Tensor):
            found[id(x)] = x

    walk([inputs.args, list(inputs.kwargs.values())])
    return list(found.values())


def _names(op: Op, inputs: Inputs) -> dict[int, str]:
    """What the op's signature calls each tensor: ``gate``, ``a[0]``."""
    found: dict[int, str] = {}

    def walk(name: str, x: Any) -> None:
        if isinstance(x, (list, tuple)):
            for i, one in enumerate(x):
                walk(f"{name}[{i}]", one)
        elif isinstance(x, torch.Tensor):
            found.setdefault(id(x), name)

    for name, value in inspect.signature(op.call).bind(*inputs.args, **inputs.kwargs).arguments.items():
        walk(name, value)
    return found


def _faked(inputs: Inputs, mode: Any) -> Inputs:
    return inputs.mapped(mode.from_tensor)


def _exact(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same call in fp64."""
    wide = inputs.in_dtype(dtype, torch.float64)
    args, kwargs = compat.tree_map(
        lambda x: torch.float64 if isinstance(x, torch.dtype) else x, (list(wide.args), dict(wide.kwargs))
    )
    return Inputs(args, kwargs, wide.wanted)


# ---------------------------------------------------------------------------------------------------------- the verdict


def examine(variant: Variant, dtypes: Sequence[torch.dtype] = DTYPES, device: str = "cpu") -> Iterator[Row]:
    """All that is asked of a variant, one row for each call."""
    op = OPS[variant.op]
    for case in [*small_cases(op.name), *empty_cases(op.name)]:
        for dtype in dtypes:
            for way in ways(op, case.make(New(dtype, device))):
                name = way.name
                if not all(t.numel() for t in _leaves(way.inputs)):
                    name = "no tokens" if way.repeated else f"no tokens, {name}"
                row = _examined(op, variant, way, dtype)
                if row is not None:
                    yield Row(case.name, str(dtype).removeprefix("torch."), name, *row)


def _examined(op: Op, variant: Variant, way: Way, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """Status, what was found, and the ratio; None where the op itself does not take such a call."""
    mode = compat.fake_mode()
    fake = _faked(way.fresh(), mode)
    with mode:
        if op.supported(*fake.args, **fake.kwargs) is not None:
            return None
        try:
            if reason := variant.refuses(*fake.args, **fake.kwargs):
                return "refused", str(reason)
        except Exception as error:
            return "failed", f"its legality, on fake tensors: {_place(error, variant.call)}"
    try:
        judged, problems = judge(op, variant.call, way, dtype)
    except Exception as error:
        return "failed", _place(error, variant.call)
    wrong = [*problems, *(_said(c) for c in judged if not c.ok)]
    if wrong:
        return "wrong", "; ".join(wrong)
    # Where PyTorch makes no error at all, a rounding of ours has no ratio.
    worst = max((c.ratio for c in judged if 0.0 < c.torch_error < math.inf), default=0.0)
    return "ok", f"{len(judged)} values, at most {worst:.2f} times PyTorch's error", worst


def judge(op: Op, call: Callable[..., Any], way: Way, dtype: torch.dtype) -> tuple[list[compare.Comparison], list[str]]:
    """``call`` in the place of an op: the error rule for each value, against the reference in fp64 and beside it in the
    same dtype; and in words what else is wrong.
    """
    found = ran(op, call, way.fresh(), way.gradient)
    same = ran(op, op.reference, way.fresh(), way.gradient)
    # NF4's scales have no other form than fp32; its reference is exact in the dtype it gives.
    plain = op.name == "nf4_dequantize"
    exact = same if plain else ran(op, op.reference, _exact(way.inputs, dtype), way.gradient)
    problems = [*found.written, *_unlike(found, _traced(op, op.call, way))]
    try:
        problems += _untraced(found, _traced(op, call, way))
    except Exception as error:
        problems.append(_why_not_traced(error, call))
    if way.repeated:
        problems += _unrepeated(op, call, way)
    ours, theirs, true = found.values(), same.values(), exact.values()
    problems += [f"there is no {name}" for name in theirs if name.startswith("gradient") and name not in ours]
    length = min(max((n for t in _leaves(way.inputs) for n in t.shape), default=1), 2**20)
    judged = []
    for name, t in ours.items():
        if name not in theirs or t.shape != theirs[name].shape:
            continue
        if t.is_floating_point():
            judged.append(compare.compare(name, t, theirs[name], true[name], length=length))
        elif not torch.equal(t, theirs[name]):
            problems.append(f"{name} is not the reference's, element by element")
    return judged, problems


def _traced(op: Op, call: Callable[..., Any], way: Way) -> Ran:
    """The same with fake tensors, as torch.compile traces it."""
    mode = compat.fake_mode()
    fake = _faked(way.fresh(), mode)
    with mode:
        return ran(op, call, fake, way.gradient)


def _unlike(found: Ran, expected: Ran) -> Iterator[str]:
    """What the results are, beside what the op gives for fake tensors: their number, dtypes, shapes and devices."""
    if len(found.results) != len(expected.results):
        yield f"gives {len(found.results)} results, the op {len(expected.results)}"
        return
    for i, (t, like) in enumerate(zip(found.results, expected.results, strict=True)):
        if not isinstance(t, torch.Tensor) or not isinstance(like, torch.Tensor):
            if type(t) is not type(like) and not (isinstance(t, torch.Tensor) and isinstance(like, torch.Tensor)):
                yield f"result {i} is {type(t).__name__}, the op's {_kind(like)}"
            continue
        if (_form(t), t.device) != (_form(like), like.device):
            yield f"result {i} is {_form(t)} on {t.device}, the op's {_form(like)} on {like.device}"
        if like.requires_grad and not t.requires_grad:
            yield f"result {i} has no gradient, the op's has"


def _untraced(found: Ran, traced: Ran) -> Iterator[str]:
    """Where compiled code, which trusts the fake results of the trace, would be wrong about the real ones."""
    ours, fake = found.values(), traced.values()
    for name in sorted(ours.keys() | fake.keys()):
        # PyTorch's own backwards (layer_norm's) have other strides than they say.
        strides = name.startswith("result")
        shown = [_form(t[name], strides) if name in t else "nothing" for t in (ours, fake)]
        if shown[0] != shown[1]:
            yield f"{name} is {shown[0]}, but under fake tensors (as torch.compile traces it) {shown[1]}"


def _unrepeated(op: Op, call: Callable[..., Any], way: Way) -> Iterator[str]:
    """What differs between two runs, in the least bit, where PyTorch is asked for deterministic algorithms."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's own that have none: then the bits decide
            first, second = (ran(op, call, way.fresh(), way.gradient).values() for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    for name in first:
        if name not in second or not compare.bitwise(first[name], second[name]):
            yield f"{name} is not bit for bit the same in two runs"


def _kind(t: Any) -> str:
    return "Tensor" if isinstance(t, torch.Tensor) else type(t).__name__


def _form(t: torch.Tensor, strides: bool = False) -> str:
    """dtype and shape; the strides of axes along which there is a second element."""
    shown = f"{str(t.dtype).removeprefix('torch.')} {[*t.shape]}"
    steps = [s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1]
    return f"{shown} with strides {steps}" if strides and t.numel() else shown


def _said(wrong: compare.Comparison) -> str:
    if wrong.error == math.inf:
        return f"{wrong.name}: NaN or infinity stands in other places than in PyTorch's"
    return str(wrong)


def _why_not_traced(error: Exception, call: Callable[..., Any]) -> str:
    """A trace failed: why, in the words of who wrote the variant."""
    where = _place(error, call)
    if type(error).__name__ in ("DataDependentOutputException", "DynamicOutputShapeException"):
        return (
            "reads a tensor's values (.item(), float(), an `if`, nonzero), for which a GPU would wait and which "
            f"torch.compile cannot trace: {where}"
        )
    return f"cannot be traced with fake tensors, as torch.compile does: {where}"


def _place(error: Exception, call: Callable[..., Any]) -> str:
    """An exception in one line, and where in the variant's file it came from."""
    file = inspect.getsourcefile(call)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return said(error) + (f" (line {frames[-1].lineno} of {file})" if frames else "")


__all__ = ["DTYPES", "Row", "Way", "empty_cases", "examine", "judge", "ways"]
