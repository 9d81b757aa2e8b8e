"""Six families, whole: every site replaced, and the loss and every gradient within the error rule."""

from __future__ import annotations

import pytest
import torch

from ._families import FAMILIES, batch, build
from ._training import check, compiled_step, step


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", ["plain", "padding", "packing"])
def test_every_site_is_replaced_and_exact(name: str, kind: str) -> None:
    """fp32, full fine-tuning: the replaced sites equal the module counts, and everything is within 1e-5 of eager."""
    data = batch(kind)
    eager = step(build(name), data)
    loss, grads, report = compiled_step(build(name), data)
    assert report.counts == FAMILIES[name].sites(), str(report)
    assert not report.missed, str(report)
    check((loss, grads), eager, eager, relative=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_in_bf16(name: str, checkpointing: bool, dropout: float) -> None:
    """bf16 LoRA: each error at most twice that of bf16 eager against fp32, from the same rounded weights and the same dropout."""
    data = batch("padding")
    reference = build(name, lora=dropout, dtype=torch.bfloat16).float()
    exact = step(reference, data)
    eager = step(build(name, lora=dropout, dtype=torch.bfloat16, checkpointing=checkpointing), data)
    loss, grads, report = compiled_step(build(name, lora=dropout, dtype=torch.bfloat16, checkpointing=checkpointing), data)
    assert report.counts == FAMILIES[name].sites(lora=True), str(report)
    check((loss, grads), eager, exact, tokens=int((data["labels"] != -100).sum()))
