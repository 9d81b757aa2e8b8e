"""What a user does with a compiled model beside the training step: everything gives what the uncompiled one gives."""

from __future__ import annotations

import copy

import pytest
import torch

import fastft

from ._families import batch, build
from ._training import compiled


@pytest.mark.parametrize("name", ["llama3", "gemma3"])
def test_train_evaluate_generate_switch_and_merge(name: str) -> None:
    """Gradient accumulation over batches of different lengths, evaluation, generation, adapters off, merged weights."""
    model = build(name, lora=0.0)
    stock = copy.deepcopy(model)
    compiled(torch.nn.Linear(1, 1))  # forgets earlier graphs and reports
    model.compile(backend="fastft", options={"residual": "eager", "strict": True})
    losses: dict[str, list[float]] = {"ours": [], "stock": []}
    for which, one in (("ours", model), ("stock", stock)):
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)
        for update in range(4):
            for part in range(2):
                loss = one(**batch("padding", seed=2 * update + part, length=30 + update)).loss / 2
                loss.backward()
                losses[which].append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses["ours"] == pytest.approx(losses["stock"], rel=1e-4)
    model.eval()
    stock.eval()
    data = batch("padding", seed=50)
    with torch.no_grad():
        ours, wanted = model(**data), stock(**data)
        torch.testing.assert_close(ours.loss, wanted.loss, rtol=1e-4, atol=0)
        torch.testing.assert_close(ours.logits, wanted.logits, rtol=1e-3, atol=1e-3)
        with model.disable_adapter(), stock.disable_adapter():
            torch.testing.assert_close(model(**data).loss, stock(**data).loss, rtol=1e-4, atol=0)
    prompt = data["input_ids"][:1]
    tokens = [one.generate(prompt, max_new_tokens=6, do_sample=False) for one in (model, stock)]
    assert torch.equal(*tokens)
    report = fastft.report()
    assert report.breaks == 0 and not report.errors and report.counts["lora"] > 0, str(report)
    torch.testing.assert_close(model.merge_and_unload()(**data).loss, wanted.loss, rtol=1e-3, atol=0)
