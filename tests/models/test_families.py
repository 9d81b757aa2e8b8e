"""Six families, whole: every site replaced, and the loss and every gradient within the error rule."""

from __future__ import annotations

import pytest
import torch

import fastft
from fastft import reporting

from ._families import ATTENTIONS, DROPOUT, FAMILIES, batch, build
from ._training import check_equal, check_rule, compiled, compiled_step, step


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["plain", "padding", "packing"])
def test_every_site_is_replaced_and_exact(name: str, kind: str) -> None:
    """fp32, full fine-tuning: the replaced sites equal the module counts, and everything is within 1e-5 of eager."""
    data = batch(kind)
    eager = step(build(name), data)
    loss, grads, report = compiled_step(build(name), data)
    assert report.counts == FAMILIES[name].sites(), str(report)
    assert not report.missed, str(report)
    check_equal((loss, grads), eager)


@pytest.mark.parametrize("name, skipped", [("mistral", True), ("qwen3", True), ("gemma2", False)])
def test_padding_that_is_skipped(name: str, skipped: bool) -> None:
    """With ``skip_padding`` the loss and every gradient are eager's; hidden states of padding are others."""
    data = batch("padding")
    data["attention_mask"][0, :5] = 0
    data["labels"][0, :6] = -100
    model = build(name)
    if name == "gemma2":  # it hides scores by a finite number, of which a softmax makes a mean
        model.set_attn_implementation("eager")
    eager = step(model, data)
    call = compiled(model, skip_padding=True)
    check_equal(step(model, data, call=call), eager)
    report = fastft.report()
    said = "skipped" if skipped else "computed: a layer is not causal, or hides scores by a finite number"
    assert report.plan["padding"].startswith("queries of padding") and report.plan["padding"].endswith(said), (
        report.plan
    )
    with torch.no_grad():
        rows, stock = (m(**data, output_hidden_states=True).hidden_states[1] for m in (call, model))
    real = data["attention_mask"].bool()
    real[0, :5] = True  # the first tokens, which see nothing in either
    assert (rows - stock)[real].abs().max() <= 1e-5 * stock.abs().max()
    assert bool((rows - stock)[~real].abs().max() > 1e-3 * stock.abs().max()) == skipped


def test_padding_is_computed_where_it_is_verified() -> None:
    call = compiled(build("mistral"), skip_padding=True, verify="first_step")
    call(**batch("padding")).loss.backward()
    assert fastft.report().plan["padding"] == "computed: verify compares with eager" and not fastft.report().errors


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("kind", ["plain", "padding", "packing"])
def test_attention_of_other_kinds(name: str, kind: str) -> None:
    """Sinks, caps and narrow values: the same for families that have them."""
    data = batch(kind)
    eager = step(build(name), data)
    loss, grads, report = compiled_step(build(name), data)
    assert report.counts == ATTENTIONS[name].sites() and report.graphs == 1, str(report)
    assert not report.missed, str(report)
    assert not any("dense" in s.notes for s in report.sites), str(report)
    check_equal((loss, grads), eager)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_of_other_kinds_in_bf16(name: str) -> None:
    """With checkpointing, padded on the left too: errors at most twice bf16 eager's against fp32."""
    batches = [batch("padding", seed=seed) for seed in range(4)]
    for data in batches:  # the first row's first tokens
        data["attention_mask"][0, :5] = 0
        data["labels"][0, :6] = -100
    exact = [step(build(name, dtype=torch.bfloat16).float(), data, seed) for seed, data in enumerate(batches)]
    model = build(name, dtype=torch.bfloat16, checkpointing=True)
    eager = [step(model, data, seed) for seed, data in enumerate(batches)]
    call = compiled(model)
    ours = [step(model, data, seed, call) for seed, data in enumerate(batches)]
    assert fastft.report().counts == ATTENTIONS[name].sites(), str(fastft.report())
    check_rule(ours, eager, exact, tokens=int((batches[0]["labels"] != -100).sum()))


@pytest.mark.parametrize("residual", ["eager", "inductor"])
def test_attention_dropout(residual: str) -> None:
    """A seed says what is dropped, and what a checkpoint computes again drops the same."""
    data = batch("padding")
    found = []
    for checkpointing in (False, True):
        model = build(DROPOUT.name, checkpointing=checkpointing)
        options = {"residual": residual} | ({"inductor": {"fallback_random": True}} if residual == "inductor" else {})
        call = compiled(model, **options)
        first, again, other = (step(model, data, seed, call) for seed in (0, 0, 1))
        assert fastft.report().counts == DROPOUT.sites() and not fastft.report().missed, str(fastft.report())
        check_equal(again, first)
        assert abs(float(other[0] - first[0])) > 1e-4
        found.append(first)
    check_equal(found[1], found[0])


#: Kind of batch, checkpointing, dropout: each half has every pair of values of any two of the three (and no more: all
#: eight for every family would take twice as long); both have all eight.
_HALVES = (
    [("padding", False, 0.0), ("padding", True, 0.1), ("packing", False, 0.1), ("packing", True, 0.0)],
    [("padding", False, 0.1), ("padding", True, 0.0), ("packing", False, 0.0), ("packing", True, 0.1)],
)


def _cases(first: int) -> pytest.MarkDecorator:
    """A half for every family, in turn, from ``first``."""
    cases = [(name, *case) for i, name in enumerate(FAMILIES) for case in _HALVES[(first + i) % 2]]
    ids = [f"{name}-{kind}{'-checkpointing' * checkpointing}-{dropout}" for name, kind, checkpointing, dropout in cases]
    return pytest.mark.parametrize(("name", "kind", "checkpointing", "dropout"), cases, ids=ids)


@_cases(0)
def test_lora_in_fp32(name: str, kind: str, checkpointing: bool, dropout: float) -> None:
    """fp32 LoRA: loss and gradients within 1e-5 of eager's with the same dropout masks. Each family has every pair of
    kind, checkpointing and dropout, the families together all combinations."""
    data = batch(kind)
    eager = step(build(name, lora=dropout, checkpointing=checkpointing), data)
    loss, grads, report = compiled_step(build(name, lora=dropout, checkpointing=checkpointing), data)
    assert report.graphs == 1 and report.breaks == 0 and not report.missed, str(report)
    assert report.counts == FAMILIES[name].sites(dropout, checkpointing), str(report)
    check_equal((loss, grads), eager)


@_cases(1)
def test_lora_in_bf16(name: str, kind: str, checkpointing: bool, dropout: float) -> None:
    """bf16 LoRA: errors at most twice bf16 eager's against fp32, from the same rounded weights and dropout masks. Each
    family has every pair of kind, checkpointing and dropout; the combinations that it lacks are in test_lora_in_fp32.
    """
    batches = [batch(kind, seed=seed) for seed in range(4)]
    reference = build(name, lora=dropout, dtype=torch.bfloat16).float()
    exact = [step(reference, data, seed) for seed, data in enumerate(batches)]
    model = build(name, lora=dropout, dtype=torch.bfloat16, checkpointing=checkpointing)
    eager = [step(model, data, seed) for seed, data in enumerate(batches)]
    call = compiled(model)
    ours = [step(model, data, seed, call) for seed, data in enumerate(batches)]
    report = fastft.report()
    assert report.graphs == 1 and report.breaks == 0 and not report.missed, str(report)
    assert report.counts == FAMILIES[name].sites(dropout, checkpointing), str(report)
    check_rule(ours, eager, exact, tokens=int((batches[0]["labels"] != -100).sum()))


@pytest.mark.parametrize(
    ("name", "kind", "dropout"),
    [
        ("llama3", "padding", 0.1),
        ("mistral", "packing", 0.0),
        ("qwen3", "plain", None),
        ("gemma2", "packing", 0.1),
        ("gemma3", "padding", 0.0),
        ("phi4", "plain", 0.1),
    ],
)
def test_through_inductor(name: str, kind: str, dropout: float | None) -> None:
    """Checkpointing, dropout, padding and packing with everything compiled: what training really runs. ``dropout``
    None: full fine-tuning.
    """
    batches = [batch(kind, seed=seed) for seed in range(3)]
    reference = build(name, lora=dropout, dtype=torch.bfloat16).float()
    exact = [step(reference, data, seed) for seed, data in enumerate(batches)]
    model = build(name, lora=dropout, dtype=torch.bfloat16, checkpointing=True)
    eager = [step(model, data, seed) for seed, data in enumerate(batches)]
    call = compiled(model, residual="inductor", inductor={"fallback_random": True})  # eager's dropout masks
    ours = [step(model, data, seed, call) for seed, data in enumerate(batches)]
    assert fastft.report().counts == FAMILIES[name].sites(dropout, True), str(fastft.report())
    check_rule(ours, eager, exact, tokens=int((batches[0]["labels"] != -100).sum()))


@pytest.mark.parametrize("name", FAMILIES)
def test_dynamic_sizes(name: str) -> None:
    """``dynamic=True`` makes inputs of ε and scalings too: every site is replaced all the same, in one graph."""
    model = build(name, lora=0.0)
    torch._dynamo.reset()
    reporting.reset()
    call = torch.compile(model, backend="fastft", options={"residual": "eager", "strict": True}, dynamic=True)
    for length in (24, 31):
        data = batch("padding", length=length)
        eager = step(model, data)
        check_equal(step(model, data, call=call), eager)
    report = fastft.report()
    assert report.graphs == 1 and report.counts == FAMILIES[name].sites(lora=0.0), str(report)
