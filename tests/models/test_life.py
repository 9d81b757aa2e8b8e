"""What a user does with a compiled model beside the training step: everything gives what the uncompiled one gives."""

from __future__ import annotations

import copy
import random

import pytest
import torch

import fastft
from fastft.compare import assert_within
from fastft.judging import Wide

from ._families import VOCAB, batch, build
from ._training import check_equal, compiled, step


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


@pytest.mark.parametrize("kind, memory", [("plain", None), ("plain", "auto"), ("padding", "lean")])
def test_fifty_batches_of_random_sizes(kind: str, memory: str | None) -> None:
    """At most three graphs, all of them there after the third batch; and the losses are eager's."""
    model = build("llama3", lora=0.0, checkpointing=True)
    call = compiled(model, **({} if memory is None else {"memory": memory}))
    draw = random.Random(0)
    for i in range(50):
        data = batch(kind, rows=draw.randint(2, 5), length=draw.randint(20, 90), seed=i)
        loss, grads = step(model, data, call=call)
        if i == 2:
            first = fastft.report()
        if i % 10 == 9:
            check_equal((loss, grads), step(model, data))
    report = fastft.report()
    assert report.graphs == first.graphs <= 3 and report.recompiles == first.recompiles < 3, str(report)
    assert report.breaks == 0 and not report.errors, str(report)


@pytest.mark.parametrize("memory", [None, "auto"])
def test_dynamic_sizes_are_one_graph_from_the_start(memory: str | None) -> None:
    model = build("llama3", lora=0.0, checkpointing=True)
    options = {"residual": "eager", "strict": True} | ({} if memory is None else {"memory": memory})
    compiled(torch.nn.Linear(1, 1))  # forgets earlier graphs and reports
    call = torch.compile(model, backend="fastft", dynamic=True, options=options)
    for seed, (rows, length) in enumerate(((3, 37), (2, 48), (4, 64), (3, 51))):
        data = batch("padding", rows=rows, length=length, seed=seed)
        check_equal(step(model, data, call=call), step(model, data))
    report = fastft.report()
    assert (report.graphs, report.recompiles, report.breaks) == (1, 0, 0) and not report.errors, str(report)


@pytest.mark.parametrize("memory", [None, "auto"])
def test_full_fine_tuning_with_adam_in_8_bits(memory: str | None) -> None:
    """bitsandbytes' optimizer beside the compiled model: every weight is trained as it is beside the uncompiled one."""
    optimizers = pytest.importorskip("bitsandbytes.optim")
    model = build("llama3", checkpointing=True)
    stock = copy.deepcopy(model)
    start = {name: p.detach().clone() for name, p in stock.named_parameters()}
    call = compiled(model, **({} if memory is None else {"memory": memory}))
    losses: list[list[float]] = []
    for one in (call, stock):
        # The smallest tensors whose state is in 8 bits have 4,096 numbers as a rule; these models' have fewer.
        optimizer = optimizers.AdamW8bit(one.parameters(), lr=1e-3, min_8bit_size=256)
        losses.append([])
        for seed in range(8):
            loss = one(**batch(seed=seed)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        states = [s["state1"].dtype for s in optimizer.state.values()]
        assert states.count(torch.uint8) > len(states) / 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[1][-1] < losses[1][0]
    for name, p in model.named_parameters():
        moved = (stock.get_parameter(name) - start[name]).norm()
        assert moved > 0 and (p - stock.get_parameter(name)).norm() < 0.1 * moved, name
    report = fastft.report()
    assert report.breaks == 0 and report.recompiles == 0 and not report.errors, str(report)
