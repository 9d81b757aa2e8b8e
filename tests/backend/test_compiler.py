"""The whole backend on a tiny Llama: right with either residual, and right when something inside of it is not."""

from __future__ import annotations

import gc
import logging
import re
from typing import Any

import pytest
import torch
import transformers
from torch._inductor import compile_fx
from torch._inductor.utils import run_and_get_code

import fastft
from fastft import _torch_compat as compat
from fastft import reporting
from fastft.compiler import transform
from fastft.options import Options
from fastft.patterns._match import Match, Table, Var, row

VOCAB, LAYERS = 61, 2


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    reporting.reset()


def llama(layers: int = LAYERS, *, checkpointing: bool = False, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False, attention_dropout=dropout,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def batch(seq: int = 12, size: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCAB, (size, seq), generator=torch.Generator().manual_seed(seq))
    return {"input_ids": ids, "labels": ids}


def step(model: torch.nn.Module, data: dict[str, Any], call: Any = None) -> dict[str, torch.Tensor]:
    """Loss and every gradient of one step."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = (model if call is None else call)(**data).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def compiled(model: torch.nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="fastft", options={"residual": "eager", "strict": True} | options)


def close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        error = float((got[name] - wanted[name]).norm() / wanted[name].norm().clamp_min(1e-30))
        assert error <= 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_residual_eager(checkpointing: bool) -> None:
    model = llama(checkpointing=checkpointing)
    close(step(model, batch(), compiled(model)), step(model, batch()))
    report = fastft.report()
    assert report.counts["rms_norm"] == 2 * LAYERS + 1
    assert (report.graphs, report.breaks, report.recompiles, report.errors) == (1, 0, 0, [])
    assert report.timings.keys() == {"rewrite", "compile"}


@pytest.mark.slow
def test_residual_inductor() -> None:
    model = llama(layers=1, checkpointing=True)
    close(step(model, batch(), compiled(model, residual="inductor")), step(model, batch()))
    report = fastft.report()
    assert report.counts["rms_norm"] == 3
    assert report.plan["recompute"] == "1 checkpointed regions recomputed in backward"


@pytest.mark.parametrize("trained", ["all", "attention"])
def test_checkpointed_layers_are_recomputed_one_by_one(trained: str) -> None:
    """Also where a layer ends in an op with several results, a projection with the residual stream added."""
    model = llama(3, checkpointing=True)
    for name, p in model.named_parameters():
        p.requires_grad_(trained == "all" or "q_proj" in name or "embed" in name)
    halves: list[Any] = []

    def cut(*joint: Any) -> Any:
        halves[:] = compat.partition(*joint)
        return tuple(halves)

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        report = reporting.Report()
        assert transform(gm, Options(lazy_logits=False), report) is None and report.counts["residual"] == 6
        return compat.compile_with_aot_eager(gm, inputs, cut)

    close(step(model, batch(), torch.compile(model, backend=backend)), step(model, batch()))
    calls = [str(n.target).partition(".")[2] for n in halves[1].graph.nodes if "fastft.attention" in str(n.target)]
    assert calls == ["attention.default", "attention_backward.default"] * 3


def test_dropout_under_checkpointing() -> None:
    model = llama(checkpointing=True, dropout=0.3)
    close(step(model, batch(), compiled(model, attention_dropout=False)), step(model, batch()))
    assert {s.reason.partition(":")[0] for s in fastft.report().missed} == {"dropout"}


def test_the_ops_are_in_the_program() -> None:
    model = llama()
    call = compiled(model)
    step(model, batch(), call)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model, batch(), call)
    times = {event.key: event.count for event in profile.key_averages()}
    norms = 2 * LAYERS + 1
    assert times["fastft::rms_norm"] == times["fastft::rms_norm_backward"] == norms


def test_graphs_and_recompilations_are_counted() -> None:
    model = llama(layers=1)
    call = compiled(model)
    for seq in (12, 17):
        close(step(model, batch(seq), call), step(model, batch(seq)))
    report = fastft.report()
    assert (report.graphs, report.recompiles) == (2, 1)  # the second is for any length
    assert len(fastft.reports()) == 2
    assert [r.recompiles for r in fastft.reports()] == [0, 1]
    assert fastft.reports()[0].counts == fastft.reports()[1].counts


def test_training_goes_on_with_other_shapes_and_modes() -> None:
    model = llama(layers=1)
    call = compiled(model)
    with torch.no_grad():
        torch.testing.assert_close(call(**batch()).logits, model(**batch()).logits)
    model.eval()
    torch.testing.assert_close(call(**batch()).loss, model(**batch()).loss)
    model.train()
    close(step(model, batch(size=1), call), step(model, batch(size=1)))


def test_logits_are_lazy_unless_asked() -> None:
    model = llama(layers=1)
    wanted = model(**batch()).logits
    lazy = compiled(model)(**batch()).logits
    assert type(lazy) is not torch.Tensor
    torch.testing.assert_close(lazy + 0, wanted)
    assert any("logits" in s.notes for s in fastft.report().sites)
    torch._dynamo.reset()
    reporting.reset()
    plain = compiled(model, lazy_logits=False)(**batch()).logits
    assert type(plain) is torch.Tensor
    torch.testing.assert_close(plain, wanted)
    assert not any("logits" in s.notes for s in fastft.report().sites)


def test_disabled_patterns_are_left() -> None:
    model = llama(layers=1)
    close(step(model, batch(), compiled(model, disable="rms_norm")), step(model, batch()))
    assert "rms_norm" not in fastft.report().counts
    assert [s.status for s in fastft.report().sites if s.pattern == "rms_norm"] == ["skipped"] * 3


# -------------------------------------------------------------------------------------------- something inside is wrong


def broken(m: Match) -> None:
    raise KeyError("a rule of ours is wrong")


@pytest.fixture
def bad_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last table of all raises: after everything else was rewritten."""
    from fastft.patterns import tables

    bad = Table("bad", (row(Var("x"), broken),), lambda n: None)
    monkeypatch.setattr("fastft.rewrite.tables", lambda: [*tables(), bad])


FAILS = r"rule (test_compiler.py:\d+): its answer to a match failed, the site stays as it was: KeyError: 'a rule .*'"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_failing_rule_costs_its_sites_not_the_training(
    bad_rule: None, caplog: pytest.LogCaptureFixture, checkpointing: bool
) -> None:
    model = llama(layers=1, checkpointing=checkpointing, dropout=0.3)
    with caplog.at_level(logging.WARNING, "fastft"):
        got = step(model, batch(), compiled(model, strict=False, attention_dropout=False))
    close(got, step(model, batch()))
    report = fastft.report()
    (error,) = report.errors
    rule = re.fullmatch(FAILS, error)
    assert rule is not None
    assert [r.getMessage() for r in caplog.records if r.name == "fastft"] == [error]
    assert report.graphs == 1 and report.counts["rms_norm"] == 3
    bad = [s for s in report.sites if s.pattern == "bad"]
    assert bad and {(s.status, s.reason) for s in bad} == {("missed", "failed: KeyError: 'a rule of ours is wrong'")}
    assert {s.rule for s in bad} == {rule.group(1)}


def test_strict_raises(bad_rule: None) -> None:
    model = llama(layers=1)
    with pytest.raises(Exception, match="a rule of ours is wrong"):
        step(model, batch(), compiled(model))
    assert fastft.reports() == []


def test_a_graph_of_no_sites_compiles() -> None:
    call = torch.compile(lambda x: x * 2, backend="fastft", options={"residual": "eager", "strict": True})
    torch.testing.assert_close(call(torch.ones(3)), torch.full((3,), 2.0))
    assert fastft.report().graphs == 1
    assert fastft.report().sites == []


# -------------------------------------------------------------------------------------------------------------- explain


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.state_dict().items()}


@pytest.mark.parametrize("how", ["stock", "compiled", "compiled in place"])
def test_explain_says_what_training_would_do(how: str) -> None:
    model = llama(checkpointing=True)
    step(model, batch(), compiled(model))
    trained = fastft.report()
    reporting.reset()
    torch._dynamo.reset()
    model.zero_grad()
    before = weights(model)
    asked: Any = model
    if how == "compiled":
        asked = compiled(model)
    elif how == "compiled in place":
        model.compile(backend="fastft", options={"residual": "eager"})

    report = fastft.explain(asked, **batch())

    assert report.counts == trained.counts
    assert [vars(s) for s in report.sites] == [vars(s) for s in trained.sites]
    assert (report.graphs, report.breaks, report.errors) == (1, 0, [])
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert fastft.reports() == []  # nothing was compiled
    assert (model._compiled_call_impl is not None) == (how == "compiled in place")


def test_explain_names_breaks() -> None:
    class Breaks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 2
            torch._dynamo.graph_break()
            return x + 1

    report = fastft.explain(Breaks(), torch.ones(3))
    assert (report.graphs, report.breaks) == (2, 1)
    assert len(report.break_reasons) == 1
    assert fastft.report().breaks == 0  # none of them happened in training


def test_explain_has_the_backends_options() -> None:
    report = fastft.explain(llama(layers=1), **batch(), options={"fuel": 0})
    assert not report.counts
    assert {s.status for s in report.sites} == {"skipped"}
    with pytest.raises(ValueError, match="did you mean 'fuel'"):
        fastft.explain(llama(layers=1), **batch(), options={"fule": 0})


@pytest.mark.parametrize("collected", [True, False])
def test_nothing_is_collected_while_it_compiles(monkeypatch: pytest.MonkeyPatch, collected: bool) -> None:
    """Forward and backward; then as before, also when compiling raises."""
    seen, inner = [], compile_fx.compile_fx_inner
    monkeypatch.setattr(
        compile_fx, "compile_fx_inner", lambda *a, **k: (seen.append(gc.isenabled()), inner(*a, **k))[1]
    )
    before = gc.isenabled()
    (gc.enable if collected else gc.disable)()
    try:
        model = llama(1)
        with torch._inductor.config.patch(force_disable_caches=True):
            step(model, batch(), torch.compile(model, backend="fastft"))
        assert gc.isenabled() == collected and seen == [False, False]
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="option memory"):
            torch.compile(model, backend="fastft", options={"memory": "nothing"})(**batch())
        assert gc.isenabled() == collected
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("options", [{}, {"strict": True}, {"inductor": {"size_asserts": True}}], ids=str)
def test_asserts_about_sizes_are_for_strict(options: dict[str, Any]) -> None:
    """A deep model's are some thousand each step, of the host's time."""
    model, data = llama(), batch()
    call = torch.compile(model, backend="fastft", options=options)
    _, sources = run_and_get_code(lambda: call(**data).loss.backward())
    forward = next(source for source in sources if "fastft.lin" in source)
    # Once it is imported.
    assert (forward.count("assert_size_stride(") > 1) == bool(options), options
    close(step(model, data, call), step(model, data))


def test_explain_reports_a_failing_rule(bad_rule: None) -> None:
    report = fastft.explain(llama(layers=1), **batch())
    assert report.graphs == 1 and report.counts["rms_norm"] == 3
    assert len(report.errors) == 1 and re.fullmatch(FAILS, report.errors[0])
