"""Whatever of fastft's own fails, training goes on and is right, the report says so, and ``strict`` raises.

:data:`DRILLS` has one row for each step that may fail; a new step without a drill fails
:func:`test_every_step_has_a_drill`.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis

import fastft
from fastft import _torch_compat as compat
from fastft import bridges, caches, fallback, reporting, rewrite
from fastft.bridges import _bridge, _tracing
from fastft.compare import assert_within
from fastft.compiler import transform
from fastft.fallback import Attempt, InternalError, causes
from fastft.judging import Wide, widened
from fastft.kernels import _op
from fastft.kernels.rms_norm import rms_norm
from fastft.options import Options
from fastft.patterns import tables
from fastft.patterns._match import Pattern, Table
from tests.backend.test_compiler import batch, llama, step

Patch = pytest.MonkeyPatch


class Boom(Exception):
    """What is raised in a drill."""


def boom(*args: Any, **kwargs: Any) -> Any:
    raise Boom("on purpose")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: Patch, tmp_path: Path) -> None:
    torch._dynamo.reset()
    reporting.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setattr(caches, "_EXCHANGED", {})
    compat.forget_loaded_code()


def right(model: torch.nn.Module, got: dict[str, torch.Tensor], seq: int = 12) -> None:
    """Loss and every gradient keep the error rule, beside eager's."""
    eager, exact = step(model, batch(seq)), step(copy.deepcopy(model).double(), batch(seq))
    assert got.keys() == eager.keys()
    for name, value in got.items():
        assert_within(name, value, eager[name], exact[name], length=64)


# --------------------------------------------------------------------------------------------------------- the injuries


def replaced(name: str, by: Any = boom) -> Callable[[Patch], None]:
    return lambda monkeypatch: monkeypatch.setattr(name, by)


def after(name: str) -> Callable[[Patch], None]:
    """It does its work, and then fails."""
    module, _, function = name.rpartition(".")
    stock = getattr(importlib.import_module(module), function)

    def fails(*args: Any, **kwargs: Any) -> Any:
        stock(*args, **kwargs)
        return boom()

    return replaced(name, fails)


def edited_tables(edit: Callable[[Table], Table], *names: str) -> Callable[[Patch], None]:
    def inject(monkeypatch: Patch) -> None:
        found = [edit(t) if t.name in names or not names else t for t in tables()]
        monkeypatch.setattr("fastft.rewrite.tables", lambda: found)

    return inject


class Raises(Pattern):
    """A pattern that fails on every node."""

    anchors = None

    def match(self, found: Any, bound: Any) -> Any:
        raise Boom("on purpose")


def bad_patterns(table: Table) -> Table:
    return dataclasses.replace(table, rows=(dataclasses.replace(table.rows[0], pattern=Raises()), *table.rows))


def bad_answers(table: Table) -> Table:
    return dataclasses.replace(table, rows=tuple(dataclasses.replace(row, build=boom) for row in table.rows))


def bad_seed(table: Table) -> Table:
    return dataclasses.replace(table, seed=boom)


def second_only(function: str) -> Callable[[Patch], None]:
    """The second call of a function of ``rewrite``'s fails, after it did its work."""

    def inject(monkeypatch: Patch) -> None:
        stock, calls = getattr(rewrite, function), []

        def fails(*args: Any) -> Any:
            result = stock(*args)
            calls.append(args)
            return boom() if len(calls) == 2 else result

        monkeypatch.setattr(rewrite, function, fails)

    return inject


def inductor_fails(times: int) -> Callable[[Patch], None]:
    """Inductor fails so often; then it is AOTAutograd alone, which is faster."""

    def inject(monkeypatch: Patch) -> None:
        left = [times]

        def compile_with_inductor(gm: Any, example_inputs: Any, *_: Any) -> Any:
            for node in gm.graph.nodes:
                if node.op == "call_function" and left[0] > 0:
                    node.args = ()  # a compiler may leave a graph in any state
            left[0] -= 1
            return boom() if left[0] >= 0 else compat.compile_with_aot_eager(gm, example_inputs)

        monkeypatch.setattr(compat, "compile_with_inductor", compile_with_inductor)

    return inject


def no_table_rules(monkeypatch: Patch) -> None:
    stock = Table.rules_for
    fails = lambda self, op: boom() if self.name == "rms_norm" else stock(self, op)  # noqa: E731
    monkeypatch.setattr(Table, "rules_for", fails)


def no_backward(monkeypatch: Patch) -> None:
    """Inductor's forward runs op by op, which is faster; its backward fails."""
    import torch._inductor.compile_fx as inductor

    def compile_fx_inner(gm: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("is_backward"):
            for node in gm.graph.nodes:
                node.args = () if node.op == "call_function" else node.args
            boom()
        return make_boxed_func(gm.forward)

    monkeypatch.setattr(inductor, "compile_fx_inner", compile_fx_inner)


def no_folder(monkeypatch: Patch) -> None:
    monkeypatch.setattr(caches, "unusable", lambda folder: "it is full")


#: Dropout is drawn as eager draws it.
EAGER = {"residual": "eager", "attention_dropout": False}
LEAN = EAGER | {"memory": "lean"}
INDUCTOR = {"residual": "inductor"}


def no_recording(patched: Patch) -> None:
    """As on a GPU, in the first step already."""
    patched.setattr("fastft.cuda_graphs._is_on", lambda kind, node: kind == "cuda")
    patched.setattr("fastft.cuda_graphs.Replayed._settled", lambda self, inputs: True)
    replaced("fastft.cuda_graphs.record")(patched)


@dataclasses.dataclass
class Drill:
    """``inject`` makes the step fail; ``norms``: how many of the three norms are replaced nevertheless."""

    inject: Callable[[Patch], None]
    norms: int = 3
    options: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(EAGER))


def no_second_plan(monkeypatch: Patch) -> None:
    """No plan fits the batch, and none can be made."""
    monkeypatch.setattr("fastft.memory.Planned._fitting", lambda self, sizes: self._compiled(sizes, None) or 0)
    monkeypatch.setattr("fastft._torch_compat.Moment.__enter__", boom)


DRILLS: dict[str, Drill] = {
    "sharing what is tuned": Drill(replaced("fastft.compiler.database.share")),
    "normalising": Drill(after("fastft.compiler.normalise"), norms=1),  # two are in the checkpointed layer
    "rewriting": Drill(after("fastft.compiler.rewrite"), norms=0),
    "leaving the logits out": Drill(after("fastft.compiler.drop_lazy")),
    "planning": Drill(after("fastft.compiler._plan")),
    "planning memory": Drill(replaced("fastft.memory.Memory._planned"), options=LEAN),
    "letting norms add": Drill(after("fastft.sums.into_norms"), options=LEAN),
    "compiling a leaner plan": Drill(no_second_plan, options=LEAN),
    "describing the graph": Drill(replaced("fastft.describing.described")),
    "table …": Drill(no_table_rules, norms=0),
    "seed of table …": Drill(edited_tables(bad_seed)),
    "rule …: matching": Drill(edited_tables(bad_patterns)),
    "rule …: its answer to a match": Drill(edited_tables(bad_answers, "rms_norm"), norms=0),
    "rule …: its variant": Drill(replaced("fastft.rewrite._take_variant"), norms=0),
    "rule …: making its rewrite": Drill(second_only("_relax_views")),
    "finding returned logits": Drill(after("fastft.rewrite._leave_out")),
    "taking out blocks that nobody reads": Drill(replaced("fastft.patterns.flex.forget_blocks")),
    "adding up work": Drill(replaced("fastft.rewrite._add_work")),
    "making lazy logits": Drill(replaced("fastft.outputs.lazy_logits")),
    "verifying": Drill(replaced("fastft.compiler.FirstStep"), options=EAGER | {"verify": "first_step"}),
    "finding a folder for compiled code": Drill(no_folder, norms=0, options=INDUCTOR),
    "compiling": Drill(inductor_fails(1), options=INDUCTOR),
    "compiling in an empty folder": Drill(inductor_fails(2), norms=0, options=INDUCTOR),
    "compiling a backward": Drill(no_backward, options=INDUCTOR),
    "recording a CUDA graph": Drill(no_recording, options=INDUCTOR | {"cuda_graphs": True}),
}
#: What happens when the backend is looked up, where there are no options yet.
AT_IMPORT = {"looking at torch's cache folders"}


def labels(source: str) -> set[str]:
    """What each ``Attempt`` in a file is called; ``…`` for what is filled in."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        if name not in ("Attempt", "step", "_trying"):
            continue
        what = node.args[name == "_trying"]
        if isinstance(what, ast.Constant):
            found.add(("rule …: " if name == "_trying" else "") + what.value)
        elif isinstance(what, ast.JoinedStr):
            found.add("".join(part.value if isinstance(part, ast.Constant) else "…" for part in what.values))
    return found - {"rule …: …"}


def test_every_step_has_a_drill() -> None:
    files = sorted(Path(fastft.__file__).parent.rglob("*.py"))
    assert set().union(*(labels(file.read_text()) for file in files)) == DRILLS.keys() | AT_IMPORT


# ----------------------------------------------------------------------------------------------------------- the drills


@pytest.mark.parametrize("what", DRILLS)
def test_training_goes_on(monkeypatch: Patch, caplog: pytest.LogCaptureFixture, what: str) -> None:
    drill = DRILLS[what]
    model = llama(layers=1, checkpointing=True, dropout=0.3)
    if drill.options.get("residual") != "eager":
        model = llama(layers=1)  # Inductor draws other dropout masks than eager
    call = torch.compile(model, backend="fastft", options=drill.options)
    with monkeypatch.context() as injured, caplog.at_level(logging.WARNING, "fastft"):
        drill.inject(injured)
        got = step(model, batch(), call)
    right(model, got)
    right(model, step(model, batch(), call))  # the next step too
    report = fastft.report()
    assert report.graphs == 1
    assert report.counts.get("rms_norm", 0) == drill.norms
    said = re.escape(what).replace("…", r"[\w.:]+") + r" failed, .*: (Boom: on purpose|NoFolder: .*it is full)"
    assert any(re.match(said, line) for line in report.errors), report.errors
    warnings = [record.getMessage() for record in caplog.records if record.name == "fastft"]
    assert warnings == report.errors  # each once
    assert "failed, " in str(report)


@pytest.mark.parametrize("what", sorted(DRILLS.keys() - {"compiling in an empty folder"}))
def test_strict_raises(monkeypatch: Patch, what: str) -> None:
    """With what was raised chained. (After strict compiling has failed, no other folder is tried.)"""
    drill = DRILLS[what]
    model = llama(layers=1)
    call = torch.compile(model, backend="fastft", options=drill.options | {"strict": True})
    drill.inject(monkeypatch)
    with pytest.raises(Exception) as caught:
        step(model, batch(), call)
    chain = list(causes(caught.value))
    assert any(isinstance(error, InternalError) for error in chain)
    assert isinstance(chain[-1], (Boom, caches.NoFolder))


@pytest.fixture(scope="module")
def captured() -> torch.fx.GraphModule:
    graphs = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(fx.GraphModule(gm, compat.copy_graph(gm.graph)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(llama(layers=1), backend=keep)(**batch())
    return graphs[0]


def transformed(captured: torch.fx.GraphModule, planned: bool) -> reporting.Report:
    done, options = reporting.Report(), Options(memory="fast") if planned else Options()
    transform(fx.GraphModule(captured, compat.copy_graph(captured.graph)), options, done)
    return done


@pytest.mark.parametrize("table", tables(), ids=lambda table: table.name)
def test_each_table(monkeypatch: Patch, captured: torch.fx.GraphModule, table: Table) -> None:
    """A rule that fails costs its own sites, and none of another rule's."""
    whole = transformed(captured, table.planned).counts
    edited_tables(bad_patterns, table.name)(monkeypatch)
    injured = transformed(captured, table.planned)
    assert injured.counts == whole
    assert [line.split(" failed")[0] for line in injured.errors] == [f"rule {table.rows[0].where}: matching"]
    edited_tables(bad_answers, table.name)(monkeypatch)
    injured = transformed(captured, table.planned)
    if table.name in whole:
        assert table.name not in injured.counts
        failed = {s.rule for s in injured.missed if s.reason == "failed: Boom: on purpose"}
        assert failed and all(any(f"rule {rule}: its answer" in line for line in injured.errors) for rule in failed)


@pytest.mark.parametrize("function", ["_tag", "_relax_views"])
def test_one_rewrite_is_taken_back(monkeypatch: Patch, captured: fx.GraphModule, function: str) -> None:
    """Before or after the users were moved over: the other sites are replaced, and this one's graph is as it was."""
    second_only(function)(monkeypatch)
    done = reporting.Report()
    gm = fx.GraphModule(captured, compat.copy_graph(captured.graph))
    transform(gm, Options(), done)
    assert len(done.errors) == 1 and "making its rewrite failed" in done.errors[0]
    (failed,) = [s for s in done.missed if s.reason == "failed: Boom: on purpose"]
    assert failed.node in {node.name for node in gm.graph.nodes}
    calls = [n for n in gm.graph.nodes if str(getattr(n.target, "__module__", "")).startswith("fastft.")]
    # A norm that hands its input on is one call, and two sites.
    assert len(calls) == sum(done.counts.values()) - done.counts["residual_norm"] > 5


@pytest.fixture
def no_driver(monkeypatch: Patch) -> None:
    """Ops launch their Triton kernels, on CPU tensors: Triton finds no driver for them."""
    pytest.importorskip("triton")
    monkeypatch.setattr(_op, "INTERPRET", True)
    monkeypatch.setattr(_op, "FAILED", {})
    monkeypatch.setattr(_op, "_RESCUE", False)


@pytest.mark.skipif(_op.INTERPRET or torch.cuda.is_available(), reason="kernels run here")
def test_a_kernel_that_cannot_run(no_driver: None, caplog: pytest.LogCaptureFixture, monkeypatch: Patch) -> None:
    """PyTorch runs in its place, forward and backward; the other ops are asked once each."""
    model = llama(layers=1)
    call = torch.compile(model, backend="fastft", options={"residual": "eager"})
    got = [step(model, batch(), call) for _ in range(2)]
    monkeypatch.setattr(_op, "INTERPRET", False)
    for one in got:
        right(model, one)
    report = fastft.report()
    assert {"rms_norm", "rms_norm_backward"} <= _op.FAILED.keys() and report.counts["rms_norm"] == 3
    assert all(f"kernel {name} failed, PyTorch runs in its place: {why}" in report.errors
               for name, why in _op.FAILED.items())  # fmt: skip
    assert len([r for r in caplog.records if r.name == "fastft"]) == len(_op.FAILED)


@pytest.mark.skipif(_op.INTERPRET or torch.cuda.is_available(), reason="kernels run here")
def test_a_kernel_that_cannot_run_under_strict_or_by_itself(no_driver: None) -> None:
    x = torch.randn(4, 8)
    for prepare in (lambda: None, lambda: _op.rescue(False)):
        prepare()
        with pytest.raises(Exception, match="driver"):
            rms_norm(x, None, 1e-6, 0.0)
    model = llama(layers=1)
    with pytest.raises(Exception, match="driver"):
        step(model, batch(), torch.compile(model, backend="fastft", options={"residual": "eager", "strict": True}))
    assert not _op.FAILED
    _op.rescue(True)
    rms_norm(x, None, 1e-6, 0.0)
    with pytest.raises(Exception, match=r"(?!.*driver)"):
        rms_norm(x, torch.ones(7), 1e-6, 0.0)  # wrong in PyTorch too: that is the error


def test_logits_that_cannot_be_lazy(monkeypatch: Patch) -> None:
    """They are computed, with their gradient."""
    monkeypatch.setattr("fastft.outputs.lazy_logits", boom)
    model = llama(layers=1)
    call = torch.compile(model, backend="fastft", options={"residual": "eager"})
    got, wanted = (
        (out.logits, torch.autograd.grad(out.logits.square().sum() + out.loss, list(model.parameters())))
        for out in (call(**batch()), model(**batch()))
    )
    torch.testing.assert_close(got, wanted)
    assert type(got[0]) is torch.Tensor


def test_a_failure_costs_no_recompilation_and_no_other_graph(monkeypatch: Patch) -> None:
    """The guards, and the graphs after it, are those of a graph that did not fail: also for other lengths."""
    model = llama(layers=1)
    call = torch.compile(model, backend="fastft", options=INDUCTOR)
    inductor_fails(2)(monkeypatch)
    for seq in (12, 17, 19):
        right(model, step(model, batch(seq), call), seq)
    assert [bool(r.errors) for r in fastft.reports()] == [True, False]  # the second is for any length
    assert "rms_norm" in fastft.reports()[1].counts


def test_no_stamp_for_the_caches(monkeypatch: Patch) -> None:
    """Without it nothing of ours is compiled: what torch's caches hold may be from other sources."""
    inductor_fails(0)(monkeypatch)
    monkeypatch.setattr("fastft.compiler.source_hash", boom)
    model = llama(layers=1)
    right(model, step(model, batch(), torch.compile(model, backend="fastft", options=INDUCTOR)))
    assert fastft.report().counts == {} and "compiling failed" in fastft.report().errors[0]


def test_what_does_not_compile_at_all_is_the_users(monkeypatch: Patch) -> None:
    """The error is torch's own, of the graph as it came, as without fastft."""
    inductor_fails(99)(monkeypatch)
    model = llama(layers=1)
    before = caches.INDUCTOR.folder
    with pytest.raises(Exception) as caught:
        step(model, batch(), torch.compile(model, backend="fastft", options=INDUCTOR))
    chain = list(causes(caught.value))
    assert isinstance(chain[-1], Boom) and not any(isinstance(error, InternalError) for error in chain)
    assert caches.INDUCTOR.folder == before


class Block(torch.nn.Module):
    """A norm and a product: quick for Inductor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 64))
        self.linear = torch.nn.Linear(64, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return self.linear(self.weight * (x * torch.rsqrt(variance + 1e-6)))


@pytest.mark.parametrize("backward", [False, True])
def test_inductor_fails_on_our_ops_only(monkeypatch: Patch, backward: bool) -> None:
    """What the real compiler does with a graph before it refuses it leaves nothing that the next one trips over."""
    import torch._inductor.compile_fx as inductor

    stock = inductor.compile_fx_inner

    def compile_fx_inner(gm: Any, *args: Any, **kwargs: Any) -> Any:
        ours = any("fastft" in str(n.target) for n in gm.graph.nodes) and kwargs.get("is_backward", False) == backward
        # Of what is not ours Inductor would write C++, which takes it long.
        return boom() if ours else stock(gm, *args, **kwargs) if backward else make_boxed_func(gm.forward)

    monkeypatch.setattr(inductor, "compile_fx_inner", compile_fx_inner)
    block = Block()
    call = torch.compile(block, backend="fastft")
    for size in (4, 6) if backward else (4,):  # the second is for any size
        x = torch.randn(size, 64, requires_grad=True)
        leaves = [x, *block.parameters()]
        loss = call(x).square().mean()
        static = len(fastft.reports()) == 1  # torch's own graphs for any size cannot be differentiated twice
        found = torch.autograd.grad(loss, leaves, retain_graph=static)
        assert not static or all(map(torch.equal, found, torch.autograd.grad(loss, leaves)))
        same = torch.autograd.grad(block(x).square().mean(), leaves)
        wide, wide_x = copy.deepcopy(block).double(), widened(x, torch.float64)
        with Wide(torch.float64, torch.float32):
            exact = torch.autograd.grad(wide(wide_x).square().mean(), [wide_x, *wide.parameters()])
        for i, (a, s, e) in enumerate(zip(found, same, exact, strict=True)):
            assert_within(f"gradient {i}", a, s, e, length=64)
    for report in fastft.reports():
        assert report.counts == ({"rms_norm": 1} if backward else {})
        assert len(report.errors) == (1 if backward else 2)
    assert backward or fastft.report().missed[0].reason == "failed: the graph with it could not be compiled"


# --------------------------------------------------------------------------------------------- what is not ours to keep


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(), MemoryError(), torch.OutOfMemoryError("full"), GeneratorExit()]
)
def test_passed_on(error: BaseException) -> None:
    errors: list[str] = []
    with pytest.raises(type(error)) as caught, Attempt("it", "nothing", errors, strict=True):
        raise error
    assert caught.value is error and not errors
    with pytest.raises(type(error)), Attempt("it", "nothing", errors):
        raise error


def test_what_dynamo_steers_by_is_passed_on() -> None:
    for strict in (False, True):
        with pytest.raises(TensorifyScalarRestartAnalysis), Attempt("it", "nothing", [], strict):
            raise TensorifyScalarRestartAnalysis(restart_reason="test")


def test_out_of_memory_inside_of_inductor_is_passed_on() -> None:
    from torch._inductor.exc import InductorError

    with pytest.raises(InductorError), Attempt("it", "nothing", []):
        raise InductorError(torch.OutOfMemoryError("CUDA out of memory."), None)


def test_ctrl_c_while_compiling(monkeypatch: Patch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastft.compiler.rewrite", interrupted)
    model = llama(layers=1)
    with pytest.raises(KeyboardInterrupt):
        step(model, batch(), torch.compile(model, backend="fastft", options={"residual": "eager"}))
    assert fastft.reports() == []


def test_one_line_for_each_step_however_often_it_fails() -> None:
    errors: list[str] = []
    for number in range(3):
        with Attempt("it", "nothing", errors) as attempt:
            raise ValueError(f"{number}\nand more")
        assert isinstance(attempt.failed, ValueError)
    assert errors == ["it failed, nothing: ValueError: 0"]
    assert fallback.said(ValueError()) == "ValueError"


# -------------------------------------------------------------------------------------------------------------- bridges


def test_at_import() -> None:
    """The backend can be imported whatever is wrong with the cache folders."""
    script = (
        "import fastft.caches, torch\n"
        "def fails(): raise OSError('on purpose')\n"
        "fastft.caches.secure = fails\n"
        "import fastft.compiler\n"
        "print('imported')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", check=False)
    assert done.stdout == "imported\n", done.stderr[-2000:]
    assert "looking at torch's cache folders failed" in done.stderr


@pytest.mark.parametrize("spec", bridges.TABLE, ids=lambda spec: spec.name)
def test_a_bridge_that_cannot_be_laid(monkeypatch: Patch, spec: Any, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(bridges, "_OUTCOMES", {spec.name: {}})
    monkeypatch.setattr(bridges, "check_version", lambda spec: None)
    monkeypatch.setattr(importlib.import_module(f"fastft.bridges.{spec.name}"), "apply", boom)
    bridges._apply(spec, ModuleType(spec.modules[0]))
    (row,) = [r for r in fastft.report().bridges if r.name == spec.name]
    assert row.status == "stayed out" and "Boom: on purpose" in row.reason and spec.otherwise in row.reason
    assert any(f"bridge {spec.name} stayed out" in message for message in caplog.messages)


def test_a_bridge_that_cannot_tell_who_is_tracing(monkeypatch: Patch, caplog: pytest.LogCaptureFixture) -> None:
    """It goes the library's own way."""
    monkeypatch.setattr(compat, "backend_in_trace", boom)
    monkeypatch.setattr(_tracing, "_SAID", [])

    def f(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if _tracing.tracing() else x * 3

    call = torch.compile(f, backend="eager")
    torch.testing.assert_close(call(torch.ones(2)), torch.full((2,), 3.0))
    assert sum("no bridge is used" in message for message in caplog.messages) == 1


def test_a_wrapper_that_cannot_be_taken_off(monkeypatch: Patch, caplog: pytest.LogCaptureFixture) -> None:
    from fastft.bridges import compiled_wrapper

    monkeypatch.setattr(compat, "wrapper_context", boom)
    wrapper = torch.compile(torch.nn.Linear(2, 2), backend="fastft")
    assert compiled_wrapper.unwrap(wrapper) is wrapper
    assert any("Boom" in message and "model.compile" in message for message in caplog.messages)
    assert any("a compiled model stays in its wrapper" in line for line in fastft.report().errors)
    _bridge.PROBLEMS.clear()
