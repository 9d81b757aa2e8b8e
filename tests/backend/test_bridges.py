"""Each bridge: does what it is for, stays out of what it does not know, and leaves other backends and eager alone."""

from __future__ import annotations

import enum
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.backends.registry import _COMPILER_FNS
from torch.utils.checkpoint import checkpoint

from fastft import _torch_compat as compat
from fastft import autoload, bridges
from fastft.bridges import _bridge, _tracing
from fastft.bridges._bridge import NotNeeded, StayOut

pytest.importorskip("transformers")
pytest.importorskip("peft")


class Recorder:
    """A backend that keeps the graphs it is given and runs them through AOTAutograd, as Inductor would."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.options: list[Any] = []

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any], **kwargs: Any) -> Any:
        from torch._dynamo.backends.debugging import aot_eager

        self.graphs.append(gm)
        self.options.append(kwargs)
        return aot_eager(gm, example_inputs)

    def calls(self, name: str) -> int:
        """How many nodes of all graphs call a function of this name."""
        nodes = (
            n for g in self.graphs for m in g.modules() if isinstance(m, torch.fx.GraphModule) for n in m.graph.nodes
        )
        return sum(getattr(n.target, "__name__", "") == name for n in nodes)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """Stands in for fastft, under its name."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    bridges.install()
    recorder = Recorder()
    monkeypatch.setitem(_COMPILER_FNS, "fastft", recorder)
    yield recorder
    torch._dynamo.reset()


@pytest.fixture
def other() -> Recorder:
    """Somebody else's backend."""
    return Recorder()


def breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


# ------------------------------------------------------------------------------------------- the table and the switches


def test_every_row_of_the_table_has_a_file_and_a_row_in_the_report() -> None:
    folder = Path(bridges.__file__).parent
    files = {p.stem for p in folder.glob("[a-z]*.py")}
    assert files == {spec.name for spec in bridges.TABLE}
    rows = bridges.rows()
    assert [r.name for r in rows] == [spec.name for spec in bridges.TABLE]
    assert all(r.reason and r.status in ("installed", "stayed out", "switched off", "not needed") for r in rows)


def test_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFT_BRIDGES", "-trl_head, -peft_hook")
    monkeypatch.setattr(bridges, "_OUTCOMES", {})
    monkeypatch.setattr(bridges, "_REFUSED", {"trl_head", "peft_hook"})
    asked: list[str] = []
    monkeypatch.setattr(bridges, "when_imported", lambda module, callback: asked.append(module))
    bridges.install()
    assert "trl.trainer.utils" not in asked and "peft.mixed_model" not in asked and "peft.utils.integrations" in asked
    assert {r.name for r in bridges.rows() if r.status == "switched off"} == {"trl_head", "peft_hook"}
    monkeypatch.setenv("FASTFT_BRIDGES", "0")
    assert {r.status for r in bridges.rows()} == {"switched off"}


def test_laying_a_bridge_leaves_the_random_numbers() -> None:
    """Importing PEFT after a seed was set and fastft was loaded must not change what is drawn next."""
    script = (
        "import torch\n"
        "import fastft.compiler\n"
        "torch.manual_seed(0); expected = torch.rand(3)\n"
        "torch.manual_seed(0)\n"
        "import peft, transformers.trainer, trl.trainer.utils\n"
        "assert torch.equal(torch.rand(3), expected)\n"
        "assert all(row.status == 'installed' for row in fastft.bridges.rows()), fastft.bridges.rows()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]


def test_switched_off_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(bridges, "_TOLD", set())
    monkeypatch.setattr(bridges, "_REFUSED", {"compiled_wrapper"})
    monkeypatch.setenv("FASTFT_BRIDGES", "-compiled_wrapper")
    bridges.install("accelerate_backend")  # what runs at every import of torch says nothing
    assert not caplog.messages
    for _ in range(2):
        bridges.install()
    assert len(caplog.messages) == 1 and "a wrapper is refused" in caplog.messages[0]


#: Each way is tried; a line for each says how it went.
TRIED = """
import torch, transformers, trl, peft
from torch import compile
{before}
def model():
    config = dict(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
def in_place(m):
    m.compile(backend="fastft")
    return m
for way in {ways}:
    try:
        eval(way)
    except Exception as error:
        print("tried:", type(error).__name__, " ".join(str(error).split()))
    else:
        print("tried: no error")
"""
#: A class that the bridge does not know.
CHANGED = """
def init(self, network, args=None): pass
transformers.Trainer.__init__ = init
"""
OURS = "compile(model(), backend='fastft')"
ON_CPU = "trl.SFTConfig(use_cpu=True, bf16=False)"
WRAPPER = "was given a torch.compile wrapper"


def tried(ways: list[str], switch: str, before: str = "") -> list[str]:
    """In a process of its own: a switch is one from its start."""
    script, environment = TRIED.format(before=before, ways=ways), {**os.environ, "FASTFT_BRIDGES": switch}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [line.removeprefix("tried: ") for line in done.stdout.splitlines() if line.startswith("tried: ")]


def test_a_way_that_cannot_work_says_which_one_does() -> None:
    wrong = {
        f"transformers.Trainer({OURS})": f"RuntimeError Trainer {WRAPPER}",
        f"trl.SFTTrainer({OURS}, {ON_CPU})": f"RuntimeError Trainer {WRAPPER}",
        f"trl.SFTTrainer(model={OURS}, args={ON_CPU})": f"RuntimeError Trainer {WRAPPER}",
        f"peft.get_peft_model({OURS}, peft.LoraConfig())": f"RuntimeError PeftModel {WRAPPER}",
    }
    right = ["transformers.Trainer(in_place(model()))", "transformers.Trainer(compile(model(), backend='eager'))"]
    by_name = "transformers.TrainingArguments(use_cpu=True, torch_compile_backend='fastft')"
    last = {f"transformers.Trainer(model(), {by_name})": "ValueError accelerate does not know"}  # it sets a variable
    *found, one = tried([*wrong, *right, *last], "-compiled_wrapper,-accelerate_backend")
    assert found[len(wrong) :] == ["no error"] * 2
    for said, error in zip([*found[: len(wrong)], one], [*wrong.values(), *last.values()], strict=True):
        assert said.startswith(error) and "FASTFT_BRIDGES switches it off" in said, said
        assert "model.compile(backend='fastft')" in said


def test_so_does_one_whose_bridge_stayed_out() -> None:
    (said,) = tried([f"transformers.Trainer({OURS})"], "", CHANGED)
    assert said.startswith(f"RuntimeError Trainer {WRAPPER}") and "model.compile(backend='fastft')" in said
    assert "self, network, ... where self, model, ... was expected" in said


def test_what_is_refused() -> None:
    from fastft.bridges import compiled_wrapper

    class Trainer:
        def __init__(self, model: Any, ref_model: Any = None) -> None:
            self.model = model

        def call_model_init(self, make: Any) -> Any:
            return make()

    library = ModuleType("transformers.trainer")
    library.Trainer = Trainer  # type: ignore[attr-defined]
    compiled_wrapper.refuse(library, "it is gone")

    class Later(Trainer):
        def __init__(self, model: Any, ref_model: Any = None) -> None:
            raise AssertionError("it is refused before anything is done with it")

    ours, others = (torch.compile(torch.nn.Linear(2, 2), backend=b) for b in ("fastft", "eager"))
    for make in (
        lambda: Trainer(ours),
        lambda: Trainer(others, ref_model=ours),
        lambda: Trainer([others, (ours,)]),
        lambda: Later(model=ours),
        lambda: Trainer(others).call_model_init(lambda: ours),
    ):
        with pytest.raises(RuntimeError, match=r"it is gone.*model.compile\(backend='fastft'\)"):
            make()
    assert Trainer(others).model is others and Trainer(ours._orig_mod).model is ours._orig_mod


def test_a_refusal_that_fails_is_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft import reporting

    monkeypatch.setattr(_bridge, "PROBLEMS", problems := {})
    monkeypatch.setattr(bridges, "PROBLEMS", problems)
    spec = next(s for s in bridges.TABLE if s.name == "compiled_wrapper")
    bridges._refuse(spec, ModuleType("transformers.trainer"), "it is gone")
    (line,) = reporting.report().errors
    assert line.startswith("bridge compiled_wrapper: what cannot work without it is no error: StayOut:")


@pytest.mark.parametrize("value", ["-trl_hed", "trl_head", "-trl_head;"])
def test_a_wrong_switch_names_the_nearest(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FASTFT_BRIDGES", value)
    with pytest.raises(ValueError, match="did you mean '-trl_head'"):
        bridges.install()


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (StayOut("it changed"), "stayed out", "it changed"),
        (NotNeeded("it learned"), "not needed", "it learned"),
        (KeyError("x"), "stayed out", "KeyError: 'x'"),
    ],
)
def test_a_bridge_never_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, status: str, reason: str
) -> None:
    def apply(module: ModuleType) -> None:
        raise error

    from fastft.bridges import trl_head

    monkeypatch.setattr(trl_head, "apply", apply)
    monkeypatch.setattr(bridges, "_OUTCOMES", {"trl_head": {}})
    monkeypatch.setattr(bridges, "check_version", lambda spec: None)
    spec = next(s for s in bridges.TABLE if s.name == "trl_head")
    bridges._apply(spec, ModuleType("trl.trainer.utils"))
    if status == "stayed out":
        reason += f"; {spec.otherwise}"
    assert next(r for r in bridges.rows() if r.name == "trl_head") == bridges.Bridge("trl_head", status, reason)
    assert ("trl_head stayed out" in caplog.text) == (status == "stayed out")


def test_version_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = _bridge.Spec("x", modules=(), library="somelibrary", oldest="1.16", does="", otherwise="")
    library = ModuleType("somelibrary")
    monkeypatch.setitem(sys.modules, "somelibrary", library)
    for version in ("1.16.0", "1.16rc1", "1.17.0.dev0", "2.0+cu130"):
        library.__version__ = version  # type: ignore[attr-defined]
        _bridge.check_version(spec)
    library.__version__ = "1.15.0"  # type: ignore[attr-defined]
    with pytest.raises(StayOut, match=r"needs somelibrary >= 1.16, found 1.15.0"):
        _bridge.check_version(spec)
    library.__version__ = "unknown"  # type: ignore[attr-defined]
    with pytest.raises(StayOut, match="could be read"):
        _bridge.check_version(spec)


def test_one_module_of_several_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = {"transformers.modeling_utils": ("installed", "does"), "peft.mixed_model": ("stayed out", "it changed")}
    monkeypatch.setattr(bridges, "_OUTCOMES", {"peft_hook": outcomes})
    row = next(r for r in bridges.rows() if r.name == "peft_hook")
    assert row.status == "stayed out" and "peft.mixed_model: it changed (installed in the other 1 module" in row.reason


# --------------------------------------------------------------------------------------------------- the import hook


def test_when_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somemodule_of_ours.py").write_text("seen = []\nvalue = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[int] = []
    for _ in range(2):
        autoload.when_imported("somemodule_of_ours", lambda m: seen.append(m.value))
    assert seen == []
    import somemodule_of_ours  # type: ignore[import-not-found]

    # Both run, once, after the module's body; the module shows no trace, and the hook is gone if nothing else waits.
    assert seen == [1, 1]
    assert type(somemodule_of_ours.__spec__.loader).__name__ == "SourceFileLoader"
    assert "somemodule_of_ours" not in autoload._FINDER.waiting
    autoload.when_imported("somemodule_of_ours", lambda m: seen.append(2))
    assert seen == [1, 1, 2]
    sys.modules.pop("somemodule_of_ours")


def test_a_module_that_fails_to_import_fails_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebroken_module.py").write_text("raise KeyError('own')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    seen: list[ModuleType] = []
    autoload.when_imported("somebroken_module", seen.append)
    for _ in range(2):
        with pytest.raises(KeyError, match="own"):
            import somebroken_module  # type: ignore[import-not-found]  # noqa: F401
    with pytest.raises(ModuleNotFoundError):
        autoload.when_imported("somemodule_that_is_nowhere", seen.append)
        import somemodule_that_is_nowhere  # type: ignore[import-not-found]  # noqa: F401
    assert not seen
    autoload._FINDER.waiting.pop("somebroken_module")
    autoload._FINDER.waiting.pop("somemodule_that_is_nowhere")


# ------------------------------------------------------------------------------------------------- whose trace it is


def test_tracing_is_true_for_fastft_only(ours: Recorder, other: Recorder) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if _tracing.tracing() else x - 1

    x = torch.zeros(2)
    assert f(x)[0] == -1
    assert torch.compile(f, backend=other)(x)[0] == -1
    assert torch.compile(f, backend="fastft")(x)[0] == 1
    assert torch.compile(f, backend="fastft", options={"fuel": 1})(x)[0] == 1
    assert torch.compile(f, backend="eager")(x)[0] == -1
    assert f(x)[0] == -1
    assert breaks() == 0


def test_is_fastft(ours: Recorder) -> None:
    from fastft.compiler import fastft

    split = DDPOptimizer(bucket_bytes_cap=1 << 25, backend_compile_fn=fastft).compile_fn
    assert _tracing.is_fastft(split) and _tracing.is_fastft(functools.partial(fastft, mode=None))
    assert _tracing.is_fastft("fastft") and _tracing.is_fastft(ours) and _tracing.is_fastft(fastft)
    assert not any(map(_tracing.is_fastft, ("inductor", None, print, torch.compile)))


# ------------------------------------------------------------------------------------------------ accelerate_backend


def test_accelerate_backend() -> None:
    from accelerate.utils import DynamoBackend

    from fastft.bridges import accelerate_backend

    bridges.install()
    assert DynamoBackend("FASTFT") is DynamoBackend["FASTFT"] is DynamoBackend.FASTFT
    assert DynamoBackend.FASTFT in list(DynamoBackend) and DynamoBackend.FASTFT.value == "FASTFT"
    with pytest.raises(ValueError):
        DynamoBackend("FASTFD")
    with pytest.raises(NotNeeded):
        accelerate_backend.apply(sys.modules["accelerate.utils.dataclasses"])


def test_accelerate_backend_stays_out() -> None:
    from fastft.bridges import accelerate_backend

    for backends in (
        enum.Enum("DynamoBackend", {"NO": "NO"}),
        enum.Enum("DynamoBackend", {"NO": "no"}, type=str),
        object(),
    ):
        module = ModuleType("accelerate.utils.dataclasses")
        module.DynamoBackend = backends  # type: ignore[attr-defined]
        with pytest.raises(StayOut):
            accelerate_backend.apply(module)
    with pytest.raises(StayOut, match="has no DynamoBackend"):
        accelerate_backend.apply(ModuleType("accelerate.utils.dataclasses"))


# -------------------------------------------------------------------------------------------------- compiled_wrapper


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + 1


@pytest.fixture
def trainers() -> ModuleType:
    """A module like ``transformers.trainer``, with a subclass from before the bridge, as TRL's are."""
    module = ModuleType("transformers.trainer")

    class Trainer:
        def __init__(self, model: Any = None, args: Any = None, model_init: Any = None) -> None:
            self.model, self.model_init = model, model_init

        def call_model_init(self, trial: Any = None) -> Any:
            return self.model_init()

    class SFTTrainer(Trainer):
        def __init__(self, model: Any, ref_model: Any = None, **kwargs: Any) -> None:
            self.seen, self.ref_model = model, ref_model
            super().__init__(model=model, **kwargs)

    module.Trainer, module.SFTTrainer = Trainer, SFTTrainer  # type: ignore[attr-defined]
    return module


def test_wrapper_is_compiled_in_place(ours: Recorder, trainers: ModuleType) -> None:
    from fastft.bridges import compiled_wrapper

    compiled_wrapper.apply(trainers)

    class Late(trainers.SFTTrainer):  # type: ignore[misc, name-defined]
        def __init__(self, extra: int, model: Any, **kwargs: Any) -> None:
            super().__init__(model, **kwargs)

    def wrapped() -> Any:
        return torch.compile(Model(), backend="fastft", options={"fuel": 3}, dynamic=False)

    for make in (
        lambda m: trainers.Trainer(m),
        lambda m: trainers.Trainer(model=m),
        lambda m: trainers.SFTTrainer(m),
        lambda m: trainers.SFTTrainer(model=m, args=1),
        lambda m: Late(1, m),
        lambda m: Late(extra=1, model=m),
    ):
        wrapper = wrapped()
        trainer = make(wrapper)
        assert trainer.model is wrapper._orig_mod
        assert getattr(trainer, "seen", trainer.model) is wrapper._orig_mod
        before = len(ours.graphs)
        trainer.model(torch.ones(2, 4))
        assert len(ours.graphs) == before + 1
        assert ours.options[-1] == {"options": {"fuel": 3}}
        torch._dynamo.reset()
    both = trainers.SFTTrainer(wrapped(), ref_model=[wrapped(), 3])
    assert isinstance(both.ref_model[0], Model) and both.ref_model[1] == 3
    late = trainers.Trainer(model_init=wrapped)
    assert isinstance(late.call_model_init(), Model)


def test_other_wrappers_and_models_are_left(ours: Recorder, other: Recorder, trainers: ModuleType) -> None:
    from fastft.bridges import compiled_wrapper

    compiled_wrapper.apply(trainers)
    for model in (
        torch.compile(torch.nn.Linear(4, 4), backend=other),
        torch.compile(torch.nn.Linear(4, 4), backend="fastft", disable=True),
        torch.nn.Linear(4, 4),
        "a-model-id",
        None,
    ):
        assert trainers.Trainer(model).model is model


def test_wrapper_stays_out(trainers: ModuleType) -> None:
    from fastft.bridges import compiled_wrapper

    class Trainer:
        def __init__(self, args: Any, model: Any) -> None: ...

    trainers.Trainer = Trainer  # type: ignore[attr-defined]
    with pytest.raises(StayOut, match="self, args"):
        compiled_wrapper.apply(trainers)


def test_wrapper_given_to_peft(ours: Recorder) -> None:
    import peft

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    adapted = peft.get_peft_model(torch.compile(model, backend="fastft"), peft.LoraConfig(r=2, target_modules=["0"]))
    assert adapted.base_model.model is model
    adapted(torch.ones(2, 4))
    assert len(ours.graphs) == 1 and breaks() == 0


# --------------------------------------------------------------------------------------------------------- peft_hook


class Embedded(torch.nn.Module):
    """A frozen embedding under the hook that transformers registers, then a checkpointed layer that is trained."""

    def __init__(self, hook: Callable[..., Any], reentrant: bool, broken: bool) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(8, 4).requires_grad_(False)
        self.layer = torch.nn.Linear(4, 4)
        self.embedding.register_forward_hook(hook)
        self.reentrant, self.broken = reentrant, broken

    def body(self, x: torch.Tensor) -> torch.Tensor:
        if self.broken:
            torch._dynamo.graph_break()
        return torch.tanh(self.layer(x))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return checkpoint(self.body, x, use_reentrant=self.reentrant).sum() + x.detach().sum()


def transformers_hook() -> Callable[..., Any]:
    """The closure that ``enable_input_require_grads`` registers."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    model = transformers.LlamaForCausalLM(config)
    model.enable_input_require_grads()
    (hook,) = model.get_input_embeddings()._forward_hooks.values()
    return hook


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_hook_gives_gradients_in_every_form_of_checkpointing(ours: Recorder, reentrant: bool, broken: bool) -> None:
    torch.manual_seed(0)
    model = Embedded(transformers_hook(), reentrant, broken)
    ids = torch.arange(6)
    expected = model(ids)
    expected.backward()
    wanted = model.layer.weight.grad
    model.zero_grad()
    loss = torch.compile(model, backend="fastft")(ids)
    loss.backward()
    assert wanted is not None and wanted.norm() > 0
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.layer.weight.grad, wanted)
    assert model.embedding.weight.grad is None
    if not broken:
        assert len(ours.graphs) == 1 and breaks() == 0
        assert ours.calls("with_grad") == 1


def test_hook_does_nothing_new_elsewhere(ours: Recorder, other: Recorder) -> None:
    model = Embedded(transformers_hook(), False, False)
    seen: list[bool] = []
    model.embedding.register_forward_hook(lambda m, i, output: seen.append(output.requires_grad))
    model(torch.arange(6)).backward()
    assert seen == [True]
    torch.compile(model, backend=other)(torch.arange(6)).backward()
    assert other.calls("with_grad") == 0
    # Without gradients wanted, or with an embedding that is trained, there is nothing to do.
    with torch.no_grad():
        torch.compile(model, backend="fastft")(torch.arange(6))
    model.embedding.requires_grad_(True)
    torch.compile(model, backend="fastft")(torch.arange(6)).backward()
    assert ours.calls("with_grad") == 0
    assert model.embedding.weight.grad is not None


def test_hooks_registered_before_the_bridge_are_reached() -> None:
    from fastft.bridges import peft_hook

    module = ModuleType("transformers.modeling_utils")
    code = (
        "class PreTrainedModel:\n"
        "    def enable_input_require_grads(self):\n"
        "        def make_inputs_require_grads(module, input, output):\n"
        "            output.requires_grad_(True)\n"
        "        return make_inputs_require_grads\n"
    )
    exec(code, module.__dict__)
    early = module.PreTrainedModel().enable_input_require_grads()
    assert peft_hook.is_known_hook(early.__code__)
    peft_hook.apply(module)
    late = module.PreTrainedModel().enable_input_require_grads()
    assert not peft_hook.is_known_hook(early.__code__) and early.__code__ is late.__code__
    x = torch.zeros(2)
    assert early(None, None, x) is None and x.requires_grad


@pytest.mark.parametrize(
    "body",
    [
        "output.requires_grad_(True); print(output)",
        "return output.requires_grad_(True).clone()",
        "output.requires_grad_(flag)",
    ],
)
def test_hook_stays_out(body: str) -> None:
    from fastft.bridges import peft_hook

    module = ModuleType("transformers.modeling_utils")
    code = (
        "class PreTrainedModel:\n"
        "    def enable_input_require_grads(self, flag=True):\n"
        "        def make_inputs_require_grads(module, input, output):\n"
        f"            {body}\n"
        "        return make_inputs_require_grads\n"
    )
    exec(code, module.__dict__)
    with pytest.raises(StayOut, match="does not just call"):
        peft_hook.apply(module)


# ---------------------------------------------------------------------------------------------------------- trl_head


@pytest.fixture
def head() -> Iterator[ModuleType]:
    # What the bridge allows Dynamo stays: it may have been installed for the process, which is done once.
    yield with_head()


def with_head() -> ModuleType:
    """The two names of ``trl.trainer.utils``, as on CUDA, where TRL masks by a boolean index; with the bridge."""
    pytest.importorskip("trl", minversion="1.16")
    import trl.trainer.utils as stock
    from trl.kernels import ChunkedLogProbFunction

    from fastft.bridges import trl_head

    module = ModuleType("trl.trainer.utils")
    module._ChunkedLogProbFunction = ChunkedLogProbFunction  # type: ignore[attr-defined]
    module._use_triton = lambda device: True  # type: ignore[attr-defined]
    module.add_fused_lm_head = stock.add_fused_lm_head  # type: ignore[attr-defined]
    trl_head.apply(module)
    return module


def fused(module: ModuleType, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **maths: Any) -> Any:
    """The middle of TRL's ``_fused_forward``."""
    mask = labels != -100
    compact = module._use_triton(hidden.device)
    outputs = ("log_probs", "entropy", "is_top1")
    per_token = module._ChunkedLogProbFunction.apply(
        hidden[mask] if compact else hidden.reshape(-1, hidden.size(-1)),
        weight,
        None,
        labels[mask] if compact else labels.clamp(min=0).reshape(-1),
        maths.get("temperature", 1.0),
        8,
        maths.get("softcap"),
        maths.get("scale", 1.0),
        outputs,
    )
    if compact:
        per_token = (None if x is None else x.new_zeros(mask.shape).masked_scatter(mask, x) for x in per_token)
    else:
        per_token = (None if x is None else x.view(mask.shape).masked_fill(~mask, 0) for x in per_token)
    log_probs, entropy, _, mean_logits, is_top1 = per_token
    assert mean_logits is None
    return -log_probs.sum() / mask.sum() - 0.1 * entropy.sum(), log_probs, entropy, is_top1


@pytest.mark.parametrize("maths", [{}, {"temperature": 0.7, "softcap": 5.0, "scale": 0.5}])
def test_head(ours: Recorder, other: Recorder, head: ModuleType, maths: dict[str, float]) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8), torch.randn(20, 8)
    labels = torch.randint(0, 20, (2, 5))
    labels[0, :2] = -100
    results = []
    for backend in (None, "fastft", other):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        run = fused if backend is None else torch.compile(fused, backend=backend)
        loss, *rest = run(head, h, w, labels, **maths)
        loss.backward()
        results.append((loss, *rest, h.grad, w.grad))
        if backend == "fastft":
            assert len(ours.graphs) == 1 and breaks() == 0 and ours.calls("linear_log_prob") == 1
    for eager, compiled in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    # Another backend sees what TRL wrote: a boolean index and mm(out=).
    assert breaks() > 0 and other.calls("linear_log_prob") == 0


def test_the_function_that_trl_puts_into_a_model_may_be_compiled_often() -> None:
    """RLOO's step needs nine graphs of it; torch stops at eight, and would train uncompiled. More than we ask for
    stays.
    """
    for limit, expected in ((8, 32), (64, 64)):
        with torch._dynamo.config.patch(recompile_limit=limit):
            with_head()
            assert torch._dynamo.config.recompile_limit == expected


def test_head_under_autocast(ours: Recorder, head: ModuleType) -> None:
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(1, 5, 8), torch.randn(20, 8), torch.randint(0, 20, (1, 5))
    with torch.autocast("cpu", torch.bfloat16):
        eager = fused(head, hidden, weight, labels)
        compiled = torch.compile(fused, backend="fastft")(head, hidden, weight, labels)
    assert [x.dtype for x in eager] == [x.dtype for x in compiled]
    for theirs, mine in zip(eager[1:3], compiled[1:3], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)
    (node,) = (n for n in ours.graphs[0].graph.nodes if getattr(n.target, "__name__", "") == "linear_log_prob")
    assert node.kwargs["dtype"] == torch.bfloat16


def test_head_stays_out(head: ModuleType) -> None:
    from trl.kernels import ChunkedLogProbFunction

    from fastft.bridges import trl_head

    class OtherArguments(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any) -> Any: ...

    class OtherMaths(ChunkedLogProbFunction):
        @staticmethod
        def forward(
            ctx,
            hidden,
            weight,
            bias,
            targets,
            temperature,
            chunk_size,
            final_logit_softcapping=None,
            logit_scale=1.0,
            outputs=(),
        ):  # type: ignore[no-untyped-def]
            log_prob, *rest = ChunkedLogProbFunction.forward(
                ctx,
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                2 * logit_scale,
                outputs,
            )
            return (log_prob, *rest)

    with pytest.raises(StayOut, match="takes ctx, hidden, weight where"):
        trl_head.check(OtherArguments, head)
    with pytest.raises(StayOut, match="log_probs are not what fastft computes"):
        trl_head.check(OtherMaths, head)

    def add_fused_lm_head(model: Any) -> None:
        """Always masks, as TRL 1.15 does."""

    head.add_fused_lm_head = add_fused_lm_head  # type: ignore[attr-defined]
    with pytest.raises(StayOut, match="add_fused_lm_head has no"):
        trl_head.check(ChunkedLogProbFunction, head)


# --------------------------------------------------------------------------------------------------------- peft_dora


class Checkpointed(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def quantised(linear: torch.nn.Linear) -> torch.nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    return layer.to("cpu")


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_dora(ours: Recorder, nf4: bool, checkpointed: bool) -> None:
    import peft

    torch.manual_seed(0)
    linear: torch.nn.Module = torch.nn.Linear(64, 64, bias=False)
    if nf4:
        linear = quantised(linear)  # type: ignore[arg-type]
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model: torch.nn.Module = peft.get_peft_model(torch.nn.Sequential(linear, torch.nn.Tanh()), config)
    if checkpointed:
        model = Checkpointed(model)
    x = torch.randn(3, 64)
    expected = model(x).sum()
    expected.backward()
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any("magnitude" in n for n in wanted)
    model.zero_grad()
    loss = torch.compile(model, backend="fastft")(x).sum()
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name])
    assert len(ours.graphs) == 1 and breaks() == 0


def test_dora_is_stock_elsewhere(ours: Recorder, other: Recorder) -> None:
    from peft.utils.integrations import dequantize_module_weight

    bridges.install()
    layer = torch.nn.Linear(4, 4)
    assert dequantize_module_weight(layer) is layer.weight
    layer.W_q = 1  # type: ignore[assignment]
    layer.dequantize = lambda: "HQQ"  # type: ignore[assignment]
    assert dequantize_module_weight(layer) == "HQQ"
    torch.compile(lambda m: dequantize_module_weight(m) + 1, backend=other)(torch.nn.Linear(4, 4))
    # torch 2.11 traces the test of the weight's type that later versions break at.
    assert breaks() > 0 or compat.version() < (2, 12)


def test_a_dora_cache_that_holds_something_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft.bridges import peft_dora

    emptied: list[object] = []
    monkeypatch.setitem(peft_dora._STOCK, "_cache_clear", emptied.append)
    monkeypatch.setattr(peft_dora, "tracing", lambda: True)
    empty, full = SimpleNamespace(_dora_cache={}), SimpleNamespace(_dora_cache={"weight": 1})
    peft_dora.clear(empty)
    peft_dora.clear(full)
    assert emptied == [full]
    monkeypatch.setattr(peft_dora, "tracing", lambda: False)
    peft_dora.clear(empty)
    assert emptied == [full, empty]


def test_dora_stays_out() -> None:
    from fastft.bridges import peft_dora

    module = ModuleType("peft.utils.integrations")
    module.dequantize_module_weight = lambda module: module.weight.clone()  # type: ignore[attr-defined]
    with pytest.raises(StayOut, match="as it is"):
        peft_dora.apply(module)
    module.dequantize_module_weight = lambda module, dtype=None: module.weight  # type: ignore[attr-defined]
    with pytest.raises(StayOut, match="plain function of module"):
        peft_dora.apply(module)
    dora = ModuleType("peft.tuners.lora.dora")

    class DoraLinearLayer:
        def _cache_clear(self) -> None:
            self._dora_cache: dict[str, Any] = {}

    dora.DoraLinearLayer = DoraLinearLayer  # type: ignore[attr-defined]
    with pytest.raises(StayOut, match="empty _dora_cache"):
        peft_dora.apply(dora)


# ------------------------------------------------------------------------------------------------- transformers_flex


def _flex_model(attention: str = "flex_attention") -> torch.nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlamaConfig(**sizes, attn_implementation=attention)
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.mark.parametrize("padded", [None, False, True])
def test_flex_mask(ours: Recorder, padded: bool | None) -> None:
    """One graph, whatever the padding; the mask hides what the stock one hides."""
    from transformers import masking_utils

    model, ids = _flex_model(), torch.arange(20).view(2, 10)
    mask = None if padded is None else torch.ones(2, 10, dtype=torch.int64)
    if mask is not None and padded:
        mask[1, 7:] = 0
    # Outside of a graph transformers compiles FlexAttention by itself.
    wanted = _flex_model("sdpa")(ids, attention_mask=mask).logits
    found = torch.compile(model, backend="fastft")(ids, attention_mask=mask).logits
    assert len(ours.graphs) == 1 and breaks() == 0
    torch.testing.assert_close(found, wanted)
    made = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["flex_attention"]
    assert made is masking_utils.flex_attention_mask and made.__wrapped__ is not made


def test_flex_mask_is_stock_elsewhere(ours: Recorder, other: Recorder) -> None:
    torch.compile(_flex_model(), backend=other)(torch.arange(20).view(2, 10))
    assert breaks() > 0 and len(other.graphs) > 1


def test_flex_mask_stays_out() -> None:
    from transformers import masking_utils

    from fastft.bridges import transformers_flex

    module = ModuleType("transformers.masking_utils")
    stock = masking_utils.flex_attention_mask.__wrapped__
    parts = {name: getattr(masking_utils, name) for name in transformers_flex._PARTS}
    module.__dict__.update(parts, ALL_MASK_ATTENTION_FUNCTIONS={"flex_attention": stock})
    module.flex_attention_mask = lambda *args, **kwargs: None  # type: ignore[attr-defined]
    with pytest.raises(StayOut, match="fast_all any more"):
        transformers_flex.apply(module)
    module.flex_attention_mask = stock  # type: ignore[attr-defined]
    module.ALL_MASK_ATTENTION_FUNCTIONS = {"flex_attention": lambda: None}  # type: ignore[attr-defined]
    with pytest.raises(StayOut, match="somebody else"):
        transformers_flex.apply(module)
