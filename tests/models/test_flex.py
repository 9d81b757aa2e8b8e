"""Six families with FlexAttention, whole: every call is replaced, and the loss and every gradient are those of the same
model with a dense mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import flex_attention

from ._families import FAMILIES, batch, build
from ._training import check_equal, compiled_step, step


@pytest.fixture(autouse=True)
def trained_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention itself has no gradients there."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


def with_attention(name: str, implementation: str, checkpointing: bool = False) -> torch.nn.Module:
    model = build(name, checkpointing=checkpointing)
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["plain", "padding", "packing"])
def test_every_call_is_replaced_and_exact(name: str, kind: str) -> None:
    data = batch(kind)
    # transformers' SDPA leaves Gemma 2's cap out, FlexAttention has it.
    same = step(with_attention(name, "eager" if name == "gemma2" else "sdpa"), data)
    loss, grads, report = compiled_step(with_attention(name, "flex_attention"), data)
    assert report.counts == FAMILIES[name].sites(), str(report)
    assert report.graphs == 1 and report.breaks == 0 and not report.missed, str(report)
    assert all(s.notes.startswith("causal") for s in report.sites if s.pattern == "attention")
    check_equal((loss, grads), same)


def test_checkpointed() -> None:
    data = batch("packing")
    same = step(with_attention("mistral", "sdpa"), data)
    loss, grads, report = compiled_step(with_attention("mistral", "flex_attention", checkpointing=True), data)
    assert report.counts == FAMILIES["mistral"].sites() and not report.missed, str(report)
    check_equal((loss, grads), same)
