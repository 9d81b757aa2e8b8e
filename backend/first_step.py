"""``options={"verify": "first_step"}``: every compiled graph is compared with eager when it first runs, with the data
it runs on. A graph that is wrong runs op by op from then on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from fastft import _torch_compat as compat
from fastft.compare import Comparison, bitwise
from fastft.judging import (
    Values,
    VerificationError,
    Wide,
    by_name,
    first_wrong,
    narrowest,
    random_state,
    set_random_state,
    still_wrong,
    terms_of,
    verdicts,
    widened,
    wider,
    worst_first,
)
from fastft.lazy_logits import LazyLogits
from fastft.options import Options
from fastft.outputs import with_lazy
from fastft.reporting import MISSED, REPLACED, SKIPPED, Report, Site

log = logging.getLogger("fastft")

#: Words in Dynamo's names of inputs that belong to no path in the model.
_NO_PATH = {"L", "G", "self", "__dict__", "_modules", "_parameters", "_buffers", "_orig_mod"}


def uncompiled(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a Dynamo graph that runs op by op, as eager does: gradient checkpointing included, which the
    higher-order op that it was traced to does not do when it is simply run.
    """
    copied = fx.GraphModule(gm, compat.copy_graph(gm.graph))
    for node in copied.graph.nodes:
        if compat.is_checkpoint(node.target):
            node.target, node.kwargs = _checkpointed, {}
    copied.recompile()
    return copied


def _checkpointed(body: fx.GraphModule, *args: Any) -> Any:
    policy = body.meta.get("_checkpoint_context_fn")
    return checkpoint(body, *args, use_reentrant=False, **({"context_fn": policy} if policy is not None else {}))


@dataclass
class _Taken:
    """One step of one graph: where it started from. ``dtype``: the narrowest it computes in; ``terms``: of its longest
    sum.
    """

    inputs: tuple[Any, ...]
    dtype: torch.dtype
    terms: int
    state: list[torch.Tensor]
    autocast: dict[str, tuple[bool, torch.dtype]]

    @classmethod
    def now(cls, inputs: tuple[Any, ...]) -> _Taken:
        autocast = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")}
        data = [x for x in inputs if not isinstance(x, torch.nn.Parameter)]
        return cls(inputs, narrowest(inputs), terms_of(data), random_state(), autocast)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The random state and autocast of that step; the present random state is given back."""
        state = random_state()
        with contextlib.ExitStack() as stack:
            for device, (enabled, dtype) in self.autocast.items():
                if device == "cpu" or torch.cuda.is_available():
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            set_random_state(self.state)
            try:
                yield
            finally:
                set_random_state(state)


class FirstStep:
    """Stands for a compiled graph and compares its first step with the graph as it came, until there is a verdict.

    Outputs are compared when the graph is called, gradients in its backward, from the gradients that arrive there. A
    graph that fails runs ``plain`` from that moment on: already the values of this step are eager's.
    """

    def __init__(self, compiled: Callable[..., Any], plain: fx.GraphModule, done: Report, options: Options) -> None:
        self.compiled, self.done, self.options = compiled, done, options
        self.source, self.plain = plain, uncompiled(plain)
        inputs = [node for node in plain.graph.nodes if node.op == "placeholder"]
        paths = [_path(node) for node in inputs]
        self.names = [p if paths.count(p) == 1 else n.name for p, n in zip(paths, inputs, strict=True)]
        self.verdict: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        if self.verdict is not None:
            return self.verdict(*args)
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in args):
            return _Checked.apply(self, *args)
        found, right = self.outputs(_Taken.now(args))
        if right and self.verdict is None:
            self.passed()
        return found

    def outputs(self, taken: _Taken) -> tuple[tuple[Any, ...], bool]:
        """The outputs that this step is to have, and whether the compiled graph's are right."""
        versions = _versions(taken.inputs)
        found = _outputs(self.compiled, taken.inputs)
        if self.verdict is not None:
            return found, True
        if _versions(taken.inputs) != versions:
            self.gave_up("it writes to its inputs, so it cannot be run again on the same ones")
            return found, True
        with self.reported():
            got = _tensors(found)
            eager = _tensors(self.rerun(self.plain, taken))
            if all(bitwise(got[name], eager[name]) for name in eager):
                return found, True
            exact = _tensors(self.rerun(self.plain, taken, exact=True))
            rows = verdicts(got, eager, exact, taken.dtype, taken.terms)
            if all(row.ok for row in rows):
                return found, True

            def at(fuel: int | None) -> tuple[bool, list[Site]]:
                call, sites = self.rewritten(fuel)
                again = _tensors(self.rerun(call, taken))
                return still_wrong(verdicts(again, eager, exact, taken.dtype, taken.terms), rows), sites

            self.failed(rows, at)
            with taken.again():
                return _outputs(self.plain, taken.inputs), False
        return found, True

    def gradients(self, taken: _Taken, found: Values, seeds: Mapping[int, torch.Tensor]) -> Values:
        """The gradients that this step is to have, from the compiled graph's ``found`` and the gradients of its outputs
        (``seeds``, by position).
        """
        with self.reported():
            eager = self.differentiate(self.plain, taken, seeds)
            if not all(torch.isfinite(g).all() for g in eager.values()):
                return found  # a loss scale that is still too large: this step says nothing, the next one will
            if all(bitwise(found[name], eager[name]) for name in eager):
                self.passed()
                return found
            exact = self.differentiate(self.plain, taken, seeds, exact=True)
            rows = verdicts(found, eager, exact, taken.dtype, taken.terms)
            if all(row.ok for row in rows):
                worst = worst_first(rows)[0]
                self.passed(f", {worst.error / worst.bound:.2f} of the allowed error at the worst of {len(rows)}")
                return found

            def at(fuel: int | None) -> tuple[bool, list[Site]]:
                call, sites = self.rewritten(fuel)
                again = self.differentiate(call, taken, seeds)
                return still_wrong(verdicts(again, eager, exact, taken.dtype, taken.terms), rows), sites

            self.failed(rows, at)
            return eager
        return found

    # ---------------------------------------------------------------------------------------------------- running it

    def leaves(self, taken: _Taken, wide: torch.dtype | None = None) -> tuple[Any, ...]:
        """The step's inputs, cut off from their history; in ``wide`` if that is given."""

        def leaf(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                return x
            return widened(x, wide) if wide else x.detach().requires_grad_(x.requires_grad) if x.requires_grad else x

        return tuple(leaf(x) for x in taken.inputs)

    def rerun(self, call: Callable[..., Any], taken: _Taken, *, exact: bool = False) -> tuple[Any, ...]:
        """Outputs without gradients."""
        wide = wider(taken.dtype) if exact else None
        with torch.no_grad(), taken.again(), Wide(wide, taken.dtype) if wide else contextlib.nullcontext():
            return _outputs(call, self.leaves(taken, wide))

    def differentiate(
        self, call: Callable[..., Any], taken: _Taken, seeds: Mapping[int, torch.Tensor], *, exact: bool = False
    ) -> Values:
        wide = wider(taken.dtype) if exact else None
        leaves = self.leaves(taken, wide)
        with torch.enable_grad(), taken.again(), Wide(wide, taken.dtype) if wide else contextlib.nullcontext():
            return self.pull(_outputs(call, leaves), leaves, seeds)

    def pull(self, outputs: tuple[Any, ...], leaves: tuple[Any, ...], seeds: Mapping[int, torch.Tensor]) -> Values:
        """Gradients of ``leaves`` by name, from those of ``outputs`` by position."""
        wanted = {
            name: leaf
            for name, leaf in zip(self.names, leaves, strict=True)
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad
        }
        ends = {i: seed for i, seed in seeds.items() if outputs[i].requires_grad}
        grads = compat.gradients(
            [outputs[i] for i in ends],
            [seed.to(outputs[i].dtype) for i, seed in ends.items()],
            list(wanted.values()),
        )
        return by_name(wanted, grads)

    def rewritten(self, fuel: int | None) -> tuple[Callable[..., Any], list[Site]]:
        """The graph with so many rewrites, run op by op, and the rewrites."""
        from fastft.compiler import transform

        gm, one = fx.GraphModule(self.source, compat.copy_graph(self.source.graph)), Report()
        lazy = transform(gm, dataclasses.replace(self.options, fuel=fuel), one)
        sites = [site for site in one.sites if site.status == REPLACED]
        return (with_lazy(gm.forward, lazy) if lazy is not None else gm.forward), sites

    # ------------------------------------------------------------------------------------------------- how it came out

    def passed(self, how: str = "") -> None:
        self.verdict = self.compiled
        self.done.plan["verify"] = f"first step right{how}"

    def gave_up(self, why: str) -> None:
        self.verdict = self.compiled
        self.done.plan["verify"] = f"first step not verified: {why}"
        log.warning("fastft could not verify a graph: %s", why)

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """The check must not stop training: what fails in it is said, and the graph stays compiled."""
        try:
            yield
        except VerificationError:
            raise
        except Exception as error:
            if self.options.strict:
                raise
            self.gave_up(f"{type(error).__name__}: {error}")

    def failed(self, rows: list[Comparison], at: Callable[[int | None], tuple[bool, list[Site]]]) -> None:
        """Leave the graph uncompiled, and name the rewrite in the report and in a warning (``strict``: raise)."""
        self.verdict = self.plain
        worst = next(row for row in worst_first(rows) if not row.ok)
        wrong = f"{worst.name}: {'; '.join(worst.problems)}"
        try:
            blame, cause = first_wrong(at, at(None))
        except Exception as error:
            blame, cause = None, f"not found, {type(error).__name__}: {error}"
        self.done.sites = [self.site(site, blame, wrong) for site in self.done.sites]
        self.done.plan["verify"] = "first step wrong, the graph runs uncompiled"
        message = f"a compiled graph is wrong and runs uncompiled from now on: {wrong}. Cause: {cause}"
        self.done.errors.append(f"verify: {message}")
        if self.options.strict:
            raise VerificationError(message)
        log.warning("fastft: %s", message)

    def site(self, site: Site, blame: Site | None, wrong: str) -> Site:
        if site.status != REPLACED:
            return site
        if blame is not None and (site.pattern, site.node) == (blame.pattern, blame.node):
            return dataclasses.replace(site, status=MISSED, reason=f"verify: {wrong}")
        return dataclasses.replace(site, status=SKIPPED, reason="verify: its graph was wrong and runs uncompiled")


class _Checked(torch.autograd.Function):
    """The compiled graph's step as one node, in whose backward its gradients can be compared with eager's."""

    @staticmethod
    def forward(ctx: Any, check: FirstStep, *args: Any) -> tuple[Any, ...]:
        taken = _Taken.now(args)
        leaves = check.leaves(taken)
        with torch.enable_grad():
            outputs, right = check.outputs(dataclasses.replace(taken, inputs=leaves))
        ctx.check, ctx.taken, ctx.leaves, ctx.outputs, ctx.right = check, taken, leaves, outputs, right
        ctx.set_materialize_grads(False)
        given = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in outputs)
        constant = [
            x for x, out in zip(given, outputs, strict=True) if isinstance(out, torch.Tensor) and not out.requires_grad
        ]
        ctx.mark_non_differentiable(*constant)
        return given

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        check: FirstStep = ctx.check
        seeds = {i: c for i, c in enumerate(cotangents) if c is not None}
        with torch.enable_grad():
            grads = check.pull(ctx.outputs, ctx.leaves, seeds)
            ctx.outputs = None
            if ctx.right and check.verdict is None:
                grads = check.gradients(ctx.taken, grads, seeds)
        return None, *(grads.get(name) for name in check.names)


def _path(node: fx.Node) -> str:
    """A graph input's path in the model (``model.norm.weight``); its name in the graph when it has none."""
    words = [quoted or word for quoted, word in re.findall(r"(\w+)'\]|(\w+)", compat.input_source(node))]
    return ".".join(w for w in words if w not in _NO_PATH) or node.name


def _outputs(call: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a graph returns; logits that would be computed when read are read."""
    return tuple(x + 0 if isinstance(x, LazyLogits) else x for x in call(*inputs))


def _tensors(outputs: Sequence[Any]) -> Values:
    """The floating-point outputs by name."""
    return {
        f"output {i}": x.detach()
        for i, x in enumerate(outputs)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
    }


def _versions(inputs: Sequence[Any]) -> list[int]:
    """Changes when an input is written to."""
    return [x._version for x in inputs if isinstance(x, torch.Tensor) and not x.is_inference()]
