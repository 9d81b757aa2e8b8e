"""What a user does with a compiled model beside the training step: everything gives what the uncompiled one gives."""

from __future__ import annotations

import copy

import pytest
import torch

import fastft
from fastft.compare import assert_within
from fastft.judging import Wide

from ._families import VOCAB, batch, build
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
    stock.load_state_dict(model.state_dict())  # from here on the same weights
    exactly = copy.deepcopy(stock).double().eval()
    model.eval()
    stock.eval()
    data = batch("padding", seed=50)
    with torch.no_grad():
        ours, wanted = model(**data), stock(**data)
        with Wide(torch.float64, torch.float32):
            exact = exactly(**data)
        assert_within("loss", ours.loss, wanted.loss, exact.loss, length=VOCAB)
        assert_within("logits", ours.logits, wanted.logits, exact.logits, length=VOCAB)
        with model.disable_adapter(), stock.disable_adapter(), exactly.disable_adapter():
            with Wide(torch.float64, torch.float32):
                off = exactly(**data).loss
            assert_within("loss without adapters", model(**data).loss, stock(**data).loss, off, length=VOCAB)
    prompt = data["input_ids"][:1]
    tokens = [one.generate(prompt, max_new_tokens=6, do_sample=False) for one in (model, stock)]
    assert torch.equal(*tokens)
    report = fastft.report()
    assert report.breaks == 0 and not report.errors and report.counts["lora"] > 0, str(report)
    # The merged weights are other numbers: PEFT rounds W + BA. This is about which weights are merged.
    torch.testing.assert_close(model.merge_and_unload()(**data).loss, wanted.loss, rtol=1e-3, atol=0)
