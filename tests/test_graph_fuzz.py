"""Random networks of the spellings that people write (tests/_spellings.py), compiled by fastft beside eager.

A case runs three times from the same parameters, inputs and random state: compiled (``strict``, so that every
exception is one), in eager, and exactly (fp32 for bf16, fp64 for fp32). Outputs and all gradients are judged by the
error rule (docs/numerics.md), so that a rewrite of something that only looks like a site shows as a wrong number. Each
family's test counts the rewrites and demands that its kernels were reached.

``pytest tests/test_graph_fuzz.py --hypothesis-profile long`` is the long mode, with new cases at every run. A failure
prints the case: ``check(Case(...))`` runs it again.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastft
from fastft import _torch_compat as compat
from fastft import reporting
from fastft.compare import Comparison, compare, relative_error, rounding
from fastft.judging import Wide
from fastft.lazy_logits import LazyLogits
from tests import _spellings as sp
from tests._spellings import BF16, F32, Case, Inputs, Layer, Network, Sizes

Values = dict[str, torch.Tensor]

# ------------------------------------------------------------------------------------------------------------ judgement


class Wrong(AssertionError):
    """A value is not as exact as it must be."""


def values(case: Case, call: Callable[..., Any], network: Network, given: Inputs) -> Values:
    """Outputs, and the gradients of everything that requires one from random ones of the outputs, by name."""
    torch.manual_seed(case.seed)
    with torch.set_grad_enabled(case.mode != "no_grad"):
        outputs = [t + 0 if isinstance(t, LazyLogits) else t for t in call(given)]
        found = {f"output {i}": t for i, t in enumerate(outputs)}
        leaves = {name: p for name, p in network.named_parameters() if p.requires_grad}
        leaves |= {"x": given.x} if given.x.requires_grad else {}
        generator = torch.Generator().manual_seed(case.seed + 2)
        seeds = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in outputs]
        ends = [(t, seed) for t, seed in zip(outputs, seeds, strict=True) if t.requires_grad]
        if ends and leaves:
            grads = compat.gradients([t for t, _ in ends], [seed for _, seed in ends], list(leaves.values()))
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
                found[f"∂{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


def nudged(network: Network, given: Inputs, case: Case, seed: int) -> tuple[Network, Inputs]:
    """Every number moved by up to a rounding of the case's dtype, at random; none for seed 0."""
    generator = torch.Generator().manual_seed(seed)

    def moved(t: torch.Tensor) -> torch.Tensor:
        if not seed or not t.is_floating_point():
            return t
        step = torch.finfo(case.narrowest).eps * (2 * torch.rand(t.shape, generator=generator) - 1)
        return (t.detach().double() * (1 + step)).to(t.dtype).requires_grad_(t.requires_grad)

    twin = copy.deepcopy(network)
    for parameter in twin.parameters():
        parameter.data = moved(parameter.data)
    return twin, Inputs(*map(moved, given))


def exactly(case: Case, network: Network, given: Inputs) -> Values:
    """The same in the wider dtype."""
    wide = torch.float64 if case.narrowest == F32 else F32

    def widened(t: torch.Tensor) -> torch.Tensor:
        return t.detach().to(wide).requires_grad_(t.requires_grad) if t.is_floating_point() else t

    twin = copy.deepcopy(network)
    for parameter in twin.parameters():
        parameter.data = widened(parameter.data)
    with Wide(wide, case.narrowest):
        return values(case, twin, twin, Inputs(*map(widened, given)))


def judged(case: Case, ours: Values, eager: Values, network: Network, given: Inputs) -> list[Comparison]:
    """The values that do not keep the error rule.

    A few numbers are a handful of roundings, and eager's may be small by luck: what the upper quartile of eager's
    errors allows is allowed to each (as in fastft.verify), and what its largest error is on inputs that are almost
    the same.
    """
    exact = exactly(case, network, given)
    s = case.sizes
    length = max(s.batch * s.seq, s.width, s.inner, s.vocab, s.heads * s.head)
    rows = {
        name: compare(name, ours[name], eager[name], true, length=length, dtype=case.narrowest)
        for name, true in exact.items()
    }
    errors = [row.torch_error for row in rows.values() if row.torch_error < 1.0]
    typical = statistics.quantiles(errors, n=4, method="inclusive")[2] if len(errors) > 1 else 0.0
    least = 2 * typical + rounding(case.narrowest, length)
    wrong = [name for name, row in rows.items() if not row.error <= max(row.bound, least)]
    if not wrong:
        return []
    luck = {name: rows[name].torch_error for name in wrong}
    for seed in range(1, 9):
        almost = nudged(network, given, case, seed)
        theirs, truth = values(case, almost[0], *almost), exactly(case, *almost)
        for name in wrong:
            luck[name] = max(luck[name], relative_error(theirs[name], truth[name]))
    # What cancels (a gradient that is zero in theory) is as exact as what it is made of: inputs, weights and the
    # outputs' gradients are numbers around one, logits around ten.
    largest = max((float(t.detach().double().norm()) for t in exact.values() if t.isfinite().all()), default=0.0)
    floor = rounding(case.narrowest, length) * max(largest, 10.0 if case.loss is not None else 1.0)
    found = []
    for name in wrong:
        row = rows[name].allowing(least + 2 * luck[name])
        off = float((ours[name].detach().double() - exact[name].detach().double()).norm())
        # Of a value that eager gets no digit of (behind a saturated softmax) nothing can be demanded.
        if not row.error <= row.bound and not off <= floor and luck[name] < 0.1:
            found.append(row)
    return found


def check(case: Case, residual: str = "eager") -> Counter[str] | None:
    """Compile a case and judge it; returns its rewrites by pattern, None when it does not run without us either."""
    network, given = Network(case), sp.inputs(case)
    before = [t.detach().clone() for t in given]
    try:
        eager = values(case, network, network, given)
    except RuntimeError:  # what autograd needs was written to
        return None
    options: dict[str, Any] = {"residual": residual, "strict": True}
    if residual == "inductor":
        options["inductor"] = {"fallback_random": True}

    # Sizes that are used inside and outside of a checkpoint are more than Dynamo copes with.
    dynamic = case.dynamic and not any("checkpoint" in layer.around for layer in case.layers)

    def compiled(**how: Any) -> Values:
        torch._dynamo.reset()
        return values(case, torch.compile(network, fullgraph=True, dynamic=dynamic, **how), network, given)

    with reporting.aside():
        try:
            ours = compiled(backend="fastft", options=options)
        except Exception:
            try:
                compiled(backend="aot_eager")
            except Exception:  # Dynamo or AOTAutograd fails by itself
                return None
            raise
        report = fastft.report()
    assert not report.errors, str(report)
    assert report.graphs == 1
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), "an input was written to"
    for name, same in eager.items():
        got = ours[name]
        assert (got.dtype, got.shape) == (same.dtype, same.shape), f"{name}: {got.dtype} {tuple(got.shape)}\n{report}"
        # One op for q and k gives both a gradient function; what must not have a gradient shows in the gradients.
        assert got.requires_grad or not same.requires_grad, f"{name} requires no gradient\n{report}"
    wrong = judged(case, ours, eager, network, given)
    if wrong:
        raise Wrong("\n".join([*map(str, wrong), str(report), f"check({case!r})"]))
    return Counter(report.counts)


# ---------------------------------------------------------------------------------------------------------- composition


class Draw(random.Random):
    """Choices from one number. Hypothesis's own would be variations of few networks: five of six of its examples are
    made by copying parts of the one before.
    """

    def rarely(self, make: Callable[[], Any], otherwise: Any = "", chance: float = 0.2) -> Any:
        return make() if self.random() < chance else otherwise

    def flag(self, chance: float = 0.5) -> bool:
        return self.random() < chance

    def of(self, spelled: Any, /, *, twisted: float = 0.5, **given: Any) -> Any:
        """A spelling with what is given, and the rest of its choices drawn; ``twisted``: the chance of a twist."""
        for name, values in spelled.CHOICES.items():
            if name == "twist":
                given.setdefault(name, self.rarely(lambda of=values: self.choice(of), "", twisted))
            given.setdefault(name, self.choice(values))
        return spelled(**given)

    def eps(self) -> float:
        return self.choice((1e-6, 1e-5, 0.01, 0.3))

    # ---------------------------------------------------------------------------------------------------------- blocks

    def rms_norm(self, **given: Any) -> sp.RMSNorm:
        glue = self.rarely(lambda: self.choice(list(sp.GLUE)))
        return self.of(sp.RMSNorm, **{"eps": self.eps(), "fp32": self.flag(0.2), "glue": glue, **given})

    def layer_norm(self, **given: Any) -> sp.LayerNorm:
        flags = {"weight": self.flag(0.7), "bias": self.flag(), "fp32": self.flag(0.2)}
        return self.of(sp.LayerNorm, **{"eps": self.eps(), **flags, **given})

    def norm(self) -> sp.Block:
        return self.rms_norm() if self.flag(0.6) else self.layer_norm()

    def adapter(self, **given: Any) -> sp.Adapter:
        drawn = {
            "rank": self.choice((1, 2, 3, 8)),
            "scale": self.choice((1.0, 2.0, 0.7071)),
            "fp32": self.flag(),
            "dropout": self.choice((0.0, 0.0, 0.25)),
            "bias": self.flag(0.3),
            "shared": self.flag(0.2),
        }
        return self.of(sp.Adapter, twisted=0.3, **{**drawn, **given})

    def linear(self, lora: float = 0.3) -> sp.Linear:
        if not self.flag(lora):
            return sp.Linear(bias=self.flag(0.3))
        adapters = tuple(self.adapter() for _ in range(self.choice((1, 1, 1, 2))))
        return self.of(sp.Linear, twisted=0.2, bias=self.flag(0.3), adapters=adapters, shared=self.flag(0.2))

    def projection(self, lora: float = 0.5) -> sp.Projection:
        return sp.Projection(self.linear(lora))

    def mlp(self, lora: float | None = None, **given: Any) -> sp.MLP:
        lora = self.choice((0.0, 1.0)) if lora is None else lora
        linears = {name: self.linear(lora) for name in ("gate", "up", "down")}
        packed = self.rarely(lambda: self.choice(sp.MLP.CHOICES["packed"]), "", 0.5)
        return self.of(sp.MLP, **{**linears, "packed": packed, "swapped": self.flag(), **given})

    def rotary(self, **given: Any) -> sp.Rotary:
        tables = self.rarely(lambda: self.choice(sp.Rotary.CHOICES["tables"]), "batch", 0.6)
        return self.of(sp.Rotary, **{"tables": tables, "fp32": self.flag(), "upcast": self.flag(0.3), **given})

    def attention(self, turned: float = 0.3, lora: float | None = None, **given: Any) -> sp.Attention:
        lora = self.choice((0.0, 0.0, 1.0)) if lora is None else lora
        drawn = {
            **{name: self.linear(lora) for name in "qkvo"},
            "qk_norm": self.rarely(self.rms_norm, None),
            "rotary": self.rarely(self.rotary, None, turned),
            "spelling": self.choice(("sdpa", "sdpa", "sdpa", "sdpa", "written")),
            "scale": self.choice((None, 0.5, 1.0)),
            "seq_first": self.flag(0.3),
        }
        return self.of(sp.Attention, twisted=0.3, **{**drawn, **given})

    def loss(self, **given: Any) -> sp.Loss:
        drawn = {
            "head": self.linear(0.15),
            "spelling": self.rarely(lambda: self.choice(sp.Loss.CHOICES["spelling"]), "cross_entropy", 0.6),
            "softcap": self.choice((0.0, 0.0, 0.7, 5.0, 30.0)),
            "scale": self.choice((1.0, 1.0, 0.5, 4.0)),
            "upcast": self.flag(),
        }
        return self.of(sp.Loss, **{**drawn, **given})

    def any(self) -> sp.Block:
        return self.choice((self.norm, self.projection, self.mlp, self.attention))()

    # -------------------------------------------------------------------------------------------------------- networks

    def layer(self, block: sp.Block) -> Layer:
        glue = self.rarely(lambda: self.choice(list(sp.GLUE)), "", 0.4)
        around = self.rarely(lambda: self.choice(Layer.CHOICES["around"]), "", 0.5)
        return self.of(Layer, block=block, glue=glue, around=around, times=2 if self.flag(0.1) else 1)

    def sizes(self) -> Sizes:
        kv_heads = self.choice((1, 2, 3))
        return Sizes(
            batch=self.choice((1, 2, 3)),
            seq=self.choice((1, 2, 5, 8, 17)),
            width=self.choice((1, 2, 8, 16, 31, 33)),
            inner=self.choice((1, 5, 16, 24)),
            heads=kv_heads * self.choice((1, 1, 2, 3)),
            kv_heads=kv_heads,
            head=self.choice((4, 8, 12, 16, 7)),
            vocab=self.choice((2, 7, 32, 50)),
            window=self.choice((1, 2, 3, 20)),
        )

    def case(self, family: str) -> Case:
        if family in FAMILIES:
            blocks = [FAMILIES[family][0](self), *(self.any() for _ in range(self.choice((0, 0, 1))))]
        else:
            blocks = [self.any() for _ in range(self.choice((2, 3)))]
        self.shuffle(blocks)
        return Case(
            layers=tuple(self.layer(block) for block in blocks),
            loss=self.rarely(self.loss, None, 1.0 if family == "loss" else 0.2),
            sizes=self.sizes(),
            dtype=self.choice((F32, F32, BF16)),
            start=self.choice(("x", "x", "x", "x, frozen", "ids")),
            mode="train" if self.flag(0.8) else "no_grad",
            frozen=self.choice((0.0, 0.0, 0.5, 1.0)),
            dynamic=self.flag(0.2),
            size=self.choice((1.0, 1.0, 0.05, 6.0)),
            seed=self.randrange(2**16),
        )


#: Family → its block, and the patterns that its test must have replaced somewhere.
FAMILIES: dict[str, tuple[Callable[[Draw], Any], tuple[str, ...]]] = {
    "norm": (Draw.norm, ("rms_norm", "layer_norm")),
    "rotary": (lambda d: d.attention(1.0, 0.0), ("rotary", "attention")),
    "mlp": (Draw.mlp, ("mlp",)),
    "attention": (Draw.attention, ("attention",)),
    "lora": (lambda d: d.projection(1.0) if d.flag(0.6) else d.attention(0.0, 1.0), ("lora",)),
    "loss": (lambda d: d.rms_norm() if d.flag(0.3) else d.projection(), ("linear_cross_entropy",)),
}


def each(family: str) -> Iterator[Case]:
    """Every choice that a family's blocks have, once: small networks, all else as in no near miss."""
    d = Draw(len(family))

    def one(make: Callable[..., Any], of: Any, **given: Any) -> Iterator[Any]:
        plain = {"twist": ""} if "twist" in of.CHOICES else {}
        for name, values in of.CHOICES.items():
            for value in values:
                yield make(**{**plain, **given, name: value})

    blocks: Iterator[Any] = iter(())
    if family == "norm":
        blocks = itertools.chain(one(d.rms_norm, sp.RMSNorm, glue=""), one(d.layer_norm, sp.LayerNorm))
    elif family == "rotary":
        turned = one(d.rotary, sp.Rotary, tables="batch")
        blocks = (d.attention(lora=0.0, rotary=r, qk_norm=None, spelling="sdpa", twist="") for r in turned)
    elif family == "mlp":
        blocks = one(functools.partial(d.mlp, 0.0), sp.MLP, activation="silu", packed="")
    elif family == "attention":
        blocks = one(functools.partial(d.attention, lora=0.0), sp.Attention, qk_norm=None, rotary=None, spelling="sdpa")
    elif family == "lora":
        adapters = one(d.adapter, sp.Adapter, shared=False)
        blocks = itertools.chain(
            (sp.Projection(sp.Linear(adapters=(a,))) for a in adapters),
            (sp.Projection(sp.Linear(adapters=(sp.Adapter(),), twist=t)) for t in sp.Linear.CHOICES["twist"]),
        )
    elif family == "loss":
        losses = one(d.loss, sp.Loss, head=sp.Linear(), spelling="cross_entropy", returns="", softcap=0.0)
        yield from (Case((Layer(sp.RMSNorm()),), loss, start="ids", seed=i) for i, loss in enumerate(losses))
    else:
        layers = one(functools.partial(Layer, sp.MLP(down=sp.Linear(adapters=(sp.Adapter(),)))), Layer)
        yield from (Case((layer,), seed=i) for i, layer in enumerate(layers))
    sizes = Sizes(heads=4, kv_heads=2)
    yield from (Case((Layer(block, "before"),), sizes=sizes, seed=i) for i, block in enumerate(blocks))


def cases(family: str) -> Any:
    return st.integers(0, 2**62).map(lambda number: Draw(number).case(family))


def simplest(case: Case, error: Exception, residual: str) -> Case:
    """The case with everything at its default that need not be otherwise for it to fail in this way."""

    def fails(case: Case) -> bool:
        try:
            check(case, residual)
        except Exception as other:
            return type(other) is type(error)
        return False

    def simpler(what: Any) -> Iterator[Any]:
        if isinstance(what, tuple):
            yield from (what[:i] + what[i + 1 :] for i in range(len(what)))
            yield from ((*what[:i], one, *what[i + 1 :]) for i, item in enumerate(what) for one in simpler(item))
        elif isinstance(what, sp.Spelling):
            for field in fields(what):
                now = getattr(what, field.name)
                if now != field.default and field.default is not MISSING:
                    yield replace(what, **{field.name: field.default})
                yield from (replace(what, **{field.name: one}) for one in simpler(now))

    while (found := next((c for c in simpler(case) if fails(c)), None)) is not None:
        case = found
    return case


# ---------------------------------------------------------------------------------------------------------------- tests


def run(family: str, count: int, residual: str = "eager", first: Sequence[Case] = ()) -> tuple[int, Counter[str]]:
    """How many networks of a family ran, ``first`` and others, and in how many of them each pattern was replaced."""
    reached: Counter[str] = Counter()
    done = 0

    def judge(case: Case) -> None:
        nonlocal done
        try:
            found = check(case, residual)
        except Exception as error:
            raise AssertionError(f"as simple as it gets: check({simplest(case, error, residual)!r})") from error
        if found is not None:
            reached.update(found.keys())
            done += 1

    for case in first:
        judge(case)
    settings(max_examples=count)(given(cases(family))(judge))()
    return done, reached


@pytest.mark.parametrize("family", [*FAMILIES, "any"])
def test_networks(family: str, record_property: Callable[[str, object], None]) -> None:
    done, reached = run(family, max(settings().max_examples // 20, 1), first=list(each(family)))
    record_property("graphs", {"cases": done, **reached})
    missing = set(FAMILIES[family][1] if family in FAMILIES else ()) - reached.keys()
    assert not missing, f"never replaced in {done} networks: {', '.join(sorted(missing))}"


@pytest.mark.parametrize("family", ["norm", "mlp", "lora"])
def test_networks_with_inductor(family: str, record_property: Callable[[str, object], None]) -> None:
    """A few: C++ is compiled for each."""
    done, reached = run(family, max(settings().max_examples // 240, 1), "inductor")
    record_property("graphs", {"cases": done, **reached})
