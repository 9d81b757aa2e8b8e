"""Is the compiled model right? ``fastft.verify`` asks for a model and a batch, ``options={"verify": "first_step"}`` for
every graph of a training run.

Both compute a step three times from the same random state: compiled, in eager, and exactly (in eager, but with every
floating-point number in fp32, or in fp64 where the model itself computes in fp32). The loss and every gradient must
keep the error rule of :mod:`fastft.compare`. When one does not, the first rewrite that makes it wrong is found by
bisection over the backend's fuel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from fastft import _torch_compat as compat
from fastft import reporting
from fastft.compare import Comparison, bitwise, compare, rounding
from fastft.lazy_logits import LazyLogits
from fastft.options import Options
from fastft.outputs import with_lazy
from fastft.reporting import MISSED, REPLACED, SKIPPED, Report, Site

log = logging.getLogger("fastft")

#: What is compared, by name: the loss or an output, and gradients.
Values = dict[str, torch.Tensor]

#: Words in Dynamo's names of inputs that belong to no path in the model.
_NO_PATH = {"L", "G", "self", "__dict__", "_modules", "_parameters", "_buffers", "_orig_mod"}

#: Rows that ``str()`` of a result shows; the others are counted, and all are in ``to_dict()``.
SHOWN = 40


class VerificationError(RuntimeError):
    """A compiled graph does not compute what the uncompiled one computes (raised under ``strict``)."""


@dataclass
class Verification:
    """What :func:`verify` found. ``ok``: every row is.

    ``rows``: the loss and each parameter's gradient. ``dtype``: the narrowest that the model computes in, ``exact``:
    the reference's. ``replaced``: sites by pattern. ``blame``: the first rewrite that made a value wrong, ``cause``:
    the same in words, or what else it is; empty unless something is wrong and was bisected.
    """

    rows: list[Comparison]
    dtype: torch.dtype
    exact: torch.dtype
    replaced: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    blame: Site | None = None
    cause: str = ""

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def wrong(self) -> list[Comparison]:
        """The rows that are not ok, worst first."""
        return [row for row in _worst_first(self.rows) if not row.ok]

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON (an infinite figure is None)."""
        rows = [
            {key: value if not isinstance(value, float) or math.isfinite(value) else None for key, value in row.items()}
            for row in ({**vars(row), "ratio": row.ratio, "ok": row.ok, "problems": row.problems} for row in self.rows)
        ]
        return {
            "ok": self.ok,
            "dtype": str(self.dtype).removeprefix("torch."),
            "exact": str(self.exact).removeprefix("torch."),
            "replaced": self.replaced,
            "rows": rows,
            "notes": self.notes,
            "blame": None if self.blame is None else vars(self.blame),
            "cause": self.cause,
        }

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        out = io.StringIO()
        console = Console(file=out, width=160, force_terminal=False)
        title = f"fastft: verify, {self.dtype} against {self.exact}".replace("torch.", "")
        table = Table(title=title, title_justify="left")
        for column in ("value", "error", "eager's", "ratio", "bound", "bias", "drift", "1 − cosine", "ok"):
            table.add_column(column, justify="left" if column in ("value", "ok") else "right", overflow="fold")
        shown = _worst_first(self.rows)[:SHOWN]
        for row in sorted(shown, key=lambda r: (r.name != "loss", r.ok)):
            figures = (row.error, row.torch_error, row.ratio, row.bound, row.bias, row.drift, 1 - row.cosine)
            forms = (".1e", ".1e", ".2f", ".1e", "+.1e", "+.1e", ".1e")
            cells = [format(figure, form) for figure, form in zip(figures, forms, strict=True)]
            table.add_row(Text(row.name), *cells, "ok" if row.ok else "WRONG")
        console.print(table)
        if len(self.rows) > len(shown):
            wrong = len(self.wrong) - sum(not row.ok for row in shown)
            console.print(f"{len(self.rows) - len(shown)} more rows, {wrong} of them wrong (to_dict() has all)")
        replaced = ", ".join(f"{pattern} ×{count}" for pattern, count in self.replaced.items()) or "no site"
        console.print(f"replaced: {replaced}", markup=False)
        for note in self.notes:
            console.print(f"note: {note}", markup=False)
        for row in self.wrong[:3]:
            console.print(f"WRONG: {row.name}: {'; '.join(row.problems)}", markup=False)
        if self.cause:
            console.print(f"cause: {self.cause}", markup=False)
        console.print("ok" if self.ok else "WRONG")
        return out.getvalue()


def _worst_first(rows: Sequence[Comparison]) -> list[Comparison]:
    return sorted(rows, key=lambda r: (r.ok, -r.error / r.bound if r.bound else 0.0))


def verify(
    model: torch.nn.Module,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    bisect: bool = True,
    **kwargs: Any,
) -> Verification:
    """Compare one training step of ``model(*args, **kwargs)`` compiled by fastft with eager: the loss and the gradient
    of every parameter that requires one, both beside an exact step.

    A single mapping (a batch) is spread as keyword arguments. The model must return a loss: ``.loss``, ``["loss"]``, a
    scalar, or a tuple that begins with one; otherwise ``ValueError``, as when no parameter requires a gradient.
    ``options`` are those of the backend. ``bisect``: when something is wrong, compile it again with fewer rewrites
    until the first wrong one is found (about log2 of their number times, with ``residual="eager"``).

    Dropout stays on. All three steps start from the same random state, and Inductor is told to draw as eager does
    (``fallback_random``); the exact step draws its masks in the model's own dtype.

    Costs, beside an ordinary step: a step in eager, and one in fp32 (fp64 for a model that computes in fp32), with a
    copy of all floating-point parameters and of their gradients in that dtype. The comparison runs on the CPU in fp64.

    Parameters, gradients, buffers, random state, modes and reports are left as they were. What torch compiled in this
    process before is compiled again at its next call, as after ``fastft.explain``.
    """
    if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
        kwargs, args = dict(args[0]), ()
    asked = dataclasses.replace(Options.of(options), verify="never")
    model = getattr(model, "_orig_mod", model)
    with _left_as_it_was(model), reporting.aside():
        one = TrainingStep(model, args, kwargs)
        eager = one.run(model)
        draws = _differ(one.state, _random_state())
        exact = one.exact()

        def judge(asked: Options) -> tuple[list[Comparison], list[Site]]:
            with _compiled(model, asked) as call:
                found = one.run(call)
                made = (site for report in reporting.reports() for site in report.sites)
                sites = [site for site in made if site.status == REPLACED]
            return _judge(found, eager, exact, one.dtype, _terms((args, kwargs))), sites

        rows, sites = judge(asked)
        result = Verification(rows, one.dtype, one.wide, dict(_count(sites)))
        if draws:
            result.notes.append("the model draws random numbers (dropout): all steps drew from the same random state")
        if not sites:
            result.notes.append("nothing was replaced: only Inductor's part was verified")
        if not result.ok and bisect:
            plain = dataclasses.replace(asked, residual="eager")

            def at(fuel: int | None) -> tuple[bool, list[Site]]:
                rows, sites = judge(dataclasses.replace(plain, fuel=fuel))
                return _still_wrong(rows, result.rows), sites

            result.blame, result.cause = _bisect(at, (True, sites) if asked == plain else at(None))
    return result


# ------------------------------------------------------------------------------------------------------------- one step


class TrainingStep:
    """One step of ``model(*args, **kwargs)``, computed by whatever is called, or exactly, always from the random state
    that it is made in.

    ``dtype``: the narrowest that the model computes in; ``wide``: the exact step's. ``ValueError`` when no parameter
    requires a gradient.
    """

    def __init__(self, model: torch.nn.Module, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> None:
        self.model, self.args, self.kwargs = model, args, dict(kwargs or {})
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("no parameter of this model requires a gradient: there is nothing to verify")
        self.dtype = _narrowest([*model.parameters(), *model.buffers()])
        self.wide = _wider(self.dtype)
        self.state = _random_state()

    def run(self, call: Callable[..., Any]) -> Values:
        """Loss and gradients when ``call`` (the model, or a compiled form of it) computes the loss."""
        _set_random_state(self.state)
        with torch.enable_grad():
            return _step(call, self.args, self.kwargs, self.trained)

    def exact(self) -> Values:
        """The same in ``wide``, without autocast."""
        _set_random_state(self.state)
        return _exact_step(self.model, self.args, self.kwargs, self.dtype, self.wide)


def _step(call: Callable[..., Any], args: Any, kwargs: Any, leaves: Mapping[str, torch.Tensor]) -> Values:
    """Loss and gradients, by name. Gradients are returned, not accumulated: no hook of an optimizer's fires."""
    loss = _loss(call(*args, **kwargs))
    grads = compat.gradients([loss], [torch.ones_like(loss)], list(leaves.values()))
    return {"loss": loss.detach(), **_named(leaves, grads)}


def _named(leaves: Mapping[str, torch.Tensor], grads: Sequence[torch.Tensor | None]) -> Values:
    """Gradients by name; zero where there is none."""
    pairs = zip(leaves.items(), grads, strict=True)
    return {name: torch.zeros_like(leaf) if grad is None else grad for (name, leaf), grad in pairs}


def _loss(output: Any) -> torch.Tensor:
    loss = output
    if isinstance(output, Mapping) and "loss" in output:
        loss = output["loss"]
    elif hasattr(output, "loss"):
        loss = output.loss
    elif isinstance(output, (tuple, list)) and output:
        loss = output[0]
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"the model returned {type(output).__name__} without a loss to differentiate: give it labels, or wrap it "
            "in a module that returns the loss"
        )
    return loss


class _Step(torch.nn.Module):
    """One step as a module's forward. The backward runs inside of it because a checkpointed layer is computed again
    there, and must find the same parameters.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: Any, kwargs: Any, leaves: Mapping[str, torch.Tensor]) -> Values:
        return _step(self.model, args, kwargs, leaves)


def _exact_step(model: torch.nn.Module, args: Any, kwargs: Any, dtype: torch.dtype, wide: torch.dtype) -> Values:
    """The step with parameters, buffers and inputs in ``wide``; the model's own are not touched."""
    step = _Step(model)
    widened = {
        name: _widened(tensor, wide)
        for name, tensor in (*step.named_parameters(), *step.named_buffers())
        if tensor.is_floating_point()
    }
    leaves = {name.removeprefix("model."): t for name, t in widened.items() if t.requires_grad}
    args, kwargs = compat.tree_map(
        lambda x: _widened(x, wide) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, (args, kwargs)
    )
    with torch.enable_grad(), Wide(wide, dtype):
        return torch.func.functional_call(step, widened, (args, kwargs, leaves))


def _widened(tensor: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    return tensor.detach().to(wide).requires_grad_(tensor.requires_grad)


class Wide(TorchFunctionMode):
    """Runs PyTorch code with ``wide`` in place of every narrower floating-point dtype that it names, without autocast,
    and with the dropout masks that it would draw in ``drawn``: the exact value of what the code means.
    """

    def __init__(self, wide: torch.dtype, drawn: torch.dtype) -> None:
        super().__init__()
        self.wide, self.drawn = wide, drawn
        self.outer: dict[str, bool] = {}

    def __enter__(self) -> Wide:
        self.outer = {kind: torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")}
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for kind, enabled in self.outer.items():
            torch.set_autocast_enabled(kind, enabled)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for kind in ("cuda", "cpu"):  # a region that was entered, whoever did: leaving it restores what was outside
            if torch.is_autocast_enabled(kind):
                torch.set_autocast_enabled(kind, False)
        if func in (torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.float):
            return args[0].to(self.wide, **kwargs)
        if func in (torch.nn.functional.dropout, torch.dropout):
            return self._dropout(*args, **kwargs)
        if func is not torch.Tensor.view:  # view(dtype) looks at the bits
            args, kwargs = compat.tree_map(self._dtype, (args, kwargs))
        return func(*args, **kwargs)

    def _dtype(self, x: Any) -> Any:
        narrower = isinstance(x, torch.dtype) and x.is_floating_point and x.itemsize < self.wide.itemsize
        return self.wide if narrower else x

    def _dropout(
        self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True
    ) -> torch.Tensor:
        if not (training and train) or p == 0.0:
            return input
        kept = torch.nn.functional.dropout(torch.ones_like(input, dtype=self.drawn), p) != 0
        return torch.where(kept, input / (1 - p) if p < 1 else input, 0.0)


def _narrowest(tensors: Sequence[Any]) -> torch.dtype:
    """The dtype that decides how exact the arithmetic is: the narrowest of the tensors' and autocast's. Storage formats
    of 8 bits and fewer are left aside: nothing is computed in them.
    """
    kinds = {t.dtype for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point() and t.dtype.itemsize > 1}
    for device in {t.device.type for t in tensors if isinstance(t, torch.Tensor)} & {"cpu", "cuda"}:
        if torch.is_autocast_enabled(device):
            kinds.add(torch.get_autocast_dtype(device))
    return max(kinds, key=lambda kind: torch.finfo(kind).eps, default=torch.float32)


def _wider(dtype: torch.dtype) -> torch.dtype:
    """What the exact step computes in."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def _terms(tree: Any) -> int:
    """Terms of the longest sum in a loss or a gradient, as far as data tell: their tokens (or rows)."""
    tensors: list[torch.Tensor] = []
    compat.tree_map(lambda x: tensors.append(x) if isinstance(x, torch.Tensor) else None, tree)
    return max((x[..., 0].numel() if x.is_floating_point() and x.dim() > 1 else x.numel() for x in tensors), default=1)


def _judge(found: Values, eager: Values, exact: Values, dtype: torch.dtype, terms: int) -> list[Comparison]:
    """The error rule for every value. A small gradient is a handful of roundings, and eager's may be small by luck: the
    upper quartile of eager's errors is allowed to each but the loss, which is no gradient.
    """
    rows = [compare(name, found[name], eager[name], exact[name], length=terms, dtype=dtype) for name in found]
    errors = [row.torch_error for row in rows if row.name != "loss" and math.isfinite(row.torch_error)]
    typical = statistics.quantiles(errors, n=4, method="inclusive")[2] if len(errors) > 1 else 0.0
    return [row.allowing(2 * typical + rounding(dtype, terms)) if row.name != "loss" else row for row in rows]


def _still_wrong(rows: Sequence[Comparison], before: Sequence[Comparison]) -> bool:
    """Whether a value that was wrong before is wrong now."""
    names = {row.name for row in before if not row.ok}
    return any(not row.ok and row.name in names for row in rows)


def _bisect(
    at: Callable[[int | None], tuple[bool, list[Site]]], with_all: tuple[bool, list[Site]]
) -> tuple[Site | None, str]:
    """The first rewrite that makes the values wrong. ``at(fuel)``: whether they are wrong with so many rewrites, all
    else run op by op, and the rewrites made; ``with_all``: the same for all of them.
    """
    wrong, sites = with_all
    if not wrong:
        return None, (
            "the rewrites are right, Inductor's code for the rest of the graph is not: options={'residual': 'eager'} "
            "leaves it out"
        )
    right, bad = 0, len([site for site in sites if _fuelled(site)])
    if at(0)[0]:
        return None, "no rewrite: the captured graph is wrong without any (FASTFT_BRIDGES=0 leaves out the bridges)"
    while bad - right > 1:
        middle = (right + bad) // 2
        if at(middle)[0]:
            bad = middle
        else:
            right = middle
    blame = [site for site in at(bad)[1] if _fuelled(site)][-1]
    where = f" in {blame.module}" if blame.module else ""
    return blame, (
        f"{blame.pattern}{where}, rule {blame.rule}: rewrite {bad} is the first wrong one; "
        f"options={{'disable': ['{blame.pattern}']}} leaves it out"
    )


def _fuelled(site: Site) -> bool:
    return not site.rule.startswith("bridges/")


def _count(sites: Sequence[Site]) -> dict[str, int]:
    return Report(sites=list(sites)).counts


# --------------------------------------------------------------------------------------------------- what is around it


@contextlib.contextmanager
def _compiled(model: torch.nn.Module, asked: Options) -> Iterator[Callable[..., Any]]:
    """The model compiled with fuel counted over all of its graphs; the reports of this compilation alone."""
    from fastft.compiler import fastft

    options = {f.name: getattr(asked, f.name) for f in dataclasses.fields(asked)}
    options["inductor"] = {"fallback_random": True, **asked.inductor}

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        call = fastft(gm, example_inputs, options=options)
        if options["fuel"] is not None:
            made = reporting.reports()[-1].sites
            options["fuel"] -= len([site for site in made if site.status == REPLACED and _fuelled(site)])
        return call

    torch._dynamo.reset()
    with reporting.aside():
        yield torch.compile(model, backend=backend)
    torch._dynamo.reset()


@contextlib.contextmanager
def _left_as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Give back buffers, random state and what ``model.compile()`` put in place; in between nothing is compiled."""
    state = _random_state()
    in_place = {m: m._compiled_call_impl for m in model.modules() if m._compiled_call_impl is not None}
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    try:
        for module in in_place:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in in_place.items():
            module._compiled_call_impl = call
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                if not bitwise(buffer, value):
                    buffer.copy_(value)
        _set_random_state(state)


def _random_state() -> list[torch.Tensor]:
    """The CPU's, then every GPU's."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


def _differ(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=False))


# ------------------------------------------------------------------------------------------- first step of every graph


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
        return cls(inputs, _narrowest(inputs), _terms(data), _random_state(), autocast)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """The random state and autocast of that step; the present random state is given back."""
        state = _random_state()
        with contextlib.ExitStack() as stack:
            for device, (enabled, dtype) in self.autocast.items():
                if device == "cpu" or torch.cuda.is_available():
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            _set_random_state(self.state)
            try:
                yield
            finally:
                _set_random_state(state)


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
            rows = _judge(got, eager, exact, taken.dtype, taken.terms)
            if all(row.ok for row in rows):
                return found, True

            def at(fuel: int | None) -> tuple[bool, list[Site]]:
                call, sites = self.rewritten(fuel)
                again = _tensors(self.rerun(call, taken))
                return _still_wrong(_judge(again, eager, exact, taken.dtype, taken.terms), rows), sites

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
            rows = _judge(found, eager, exact, taken.dtype, taken.terms)
            if all(row.ok for row in rows):
                worst = _worst_first(rows)[0]
                self.passed(f", {worst.error / worst.bound:.2f} of the allowed error at the worst of {len(rows)}")
                return found

            def at(fuel: int | None) -> tuple[bool, list[Site]]:
                call, sites = self.rewritten(fuel)
                again = self.differentiate(call, taken, seeds)
                return _still_wrong(_judge(again, eager, exact, taken.dtype, taken.terms), rows), sites

            self.failed(rows, at)
            return eager
        return found

    # ---------------------------------------------------------------------------------------------------- running it

    def leaves(self, taken: _Taken, wide: torch.dtype | None = None) -> tuple[Any, ...]:
        """The step's inputs, cut off from their history; in ``wide`` if that is given."""

        def leaf(x: Any) -> Any:
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                return x
            return _widened(x, wide) if wide else x.detach().requires_grad_(x.requires_grad) if x.requires_grad else x

        return tuple(leaf(x) for x in taken.inputs)

    def rerun(self, call: Callable[..., Any], taken: _Taken, *, exact: bool = False) -> tuple[Any, ...]:
        """Outputs without gradients."""
        wide = _wider(taken.dtype) if exact else None
        with torch.no_grad(), taken.again(), Wide(wide, taken.dtype) if wide else contextlib.nullcontext():
            return _outputs(call, self.leaves(taken, wide))

    def differentiate(
        self, call: Callable[..., Any], taken: _Taken, seeds: Mapping[int, torch.Tensor], *, exact: bool = False
    ) -> Values:
        wide = _wider(taken.dtype) if exact else None
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
        return _named(wanted, grads)

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
        worst = next(row for row in _worst_first(rows) if not row.ok)
        wrong = f"{worst.name}: {'; '.join(worst.problems)}"
        try:
            blame, cause = _bisect(at, at(None))
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
