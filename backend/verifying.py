"""Is the compiled model right? ``fastft.verify`` asks for a model and a batch (:mod:`fastft.first_step` for every graph
of a training run).

A step is computed three times from the same random state: compiled, in eager, and exactly (in eager, but with every
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fastft import _torch_compat as compat
from fastft import reporting
from fastft.compare import Comparison, bitwise
from fastft.judging import (
    Values,
    Wide,
    by_name,
    differ,
    first_wrong,
    fuelled,
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
from fastft.options import Options
from fastft.reporting import REPLACED, Report, Site

log = logging.getLogger("fastft")

#: Rows that ``str()`` of a result shows; the others are counted, and all are in ``to_dict()``.
SHOWN = 40


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
        return [row for row in worst_first(self.rows) if not row.ok]

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
            "blame": None if self.blame is None else self.blame.to_dict(),
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
        shown = worst_first(self.rows)[:SHOWN]
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

    Dropout stays on; attention that drops weights is left as it is, since the op would draw others. All three steps
    start from the same random state, and Inductor is told to draw as eager does (``fallback_random``); the exact step
    draws its masks in the model's own dtype.

    Costs, beside an ordinary step: a step in eager, and one in fp32 (fp64 for a model that computes in fp32), with a
    copy of all floating-point parameters and of their gradients in that dtype. The comparison runs on the CPU in fp64.

    Parameters, gradients, buffers, random state, modes and reports are left as they were. What torch compiled in this
    process before is compiled again at its next call, as after ``fastft.explain``.
    """
    if len(args) == 1 and not kwargs and isinstance(args[0], Mapping):
        kwargs, args = dict(args[0]), ()
    asked = dataclasses.replace(Options.of(options), verify="never", attention_dropout=False, skip_padding=False)
    model = getattr(model, "_orig_mod", model)
    with _left_as_it_was(model), reporting.aside():
        one = TrainingStep(model, args, kwargs)
        eager = one.run(model)
        draws = differ(one.state, random_state())
        exact = one.exact()

        left: set[str] = set()

        def judge(asked: Options) -> tuple[list[Comparison], list[Site]]:
            with _compiled(model, asked) as call:
                found = one.run(call)
                made = [site for report in reporting.reports() for site in report.sites]
                sites = [site for site in made if site.status == REPLACED]
                left.update(site.reason for site in made if site.reason.startswith("dropout:"))
            return verdicts(found, eager, exact, one.dtype, terms_of((args, kwargs))), sites

        rows, sites = judge(asked)
        result = Verification(rows, one.dtype, one.wide, dict(_count(sites)))
        if draws:
            result.notes.append("the model draws random numbers (dropout): all steps drew from the same random state")
        if left:
            result.notes.append(f"attention that drops weights was left as it is ({'; '.join(sorted(left))})")
        if not sites:
            result.notes.append("nothing was replaced: only Inductor's part was verified")
        if not result.ok and bisect:
            plain = dataclasses.replace(asked, residual="eager")

            def at(fuel: int | None) -> tuple[bool, list[Site]]:
                rows, sites = judge(dataclasses.replace(plain, fuel=fuel))
                return still_wrong(rows, result.rows), sites

            result.blame, result.cause = first_wrong(at, (True, sites) if asked == plain else at(None))
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
        self.dtype = narrowest([*model.parameters(), *model.buffers()])
        self.wide = wider(self.dtype)
        self.state = random_state()

    def run(self, call: Callable[..., Any]) -> Values:
        """Loss and gradients when ``call`` (the model, or a compiled form of it) computes the loss."""
        set_random_state(self.state)
        with torch.enable_grad():
            return _step(call, self.args, self.kwargs, self.trained)

    def exact(self) -> Values:
        """The same in ``wide``, without autocast."""
        set_random_state(self.state)
        return _exact_step(self.model, self.args, self.kwargs, self.dtype, self.wide)


def _step(call: Callable[..., Any], args: Any, kwargs: Any, leaves: Mapping[str, torch.Tensor]) -> Values:
    """Loss and gradients, by name. Gradients are returned, not accumulated: no hook of an optimizer's fires."""
    loss = _loss(call(*args, **kwargs))
    grads = compat.gradients([loss], [torch.ones_like(loss)], list(leaves.values()))
    return {"loss": loss.detach(), **by_name(leaves, grads)}


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
    substitutes = {
        name: widened(tensor, wide)
        for name, tensor in (*step.named_parameters(), *step.named_buffers())
        if tensor.is_floating_point()
    }
    leaves = {name.removeprefix("model."): t for name, t in substitutes.items() if t.requires_grad}
    args, kwargs = compat.tree_map(
        lambda x: widened(x, wide) if isinstance(x, torch.Tensor) and x.is_floating_point() else x, (args, kwargs)
    )
    with torch.enable_grad(), Wide(wide, dtype):
        return torch.func.functional_call(step, substitutes, (args, kwargs, leaves))


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
            options["fuel"] -= len([site for site in made if site.status == REPLACED and fuelled(site)])
        return call

    torch._dynamo.reset()
    with reporting.aside():
        yield torch.compile(model, backend=backend)
    torch._dynamo.reset()


@contextlib.contextmanager
def _left_as_it_was(model: torch.nn.Module) -> Iterator[None]:
    """Give back buffers, random state and what ``model.compile()`` put in place; in between nothing is compiled."""
    state = random_state()
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
        set_random_state(state)
