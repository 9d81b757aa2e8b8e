"""The model's logits: what eager gives when they are read, and no memory when they are not."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from fastft.compare import assert_within
from fastft.judging import Wide
from fastft.kernels import linear_cross_entropy as loss_op

from ._families import VOCAB, batch, build
from ._training import compiled_step


def largest_allocation(run: object) -> int:
    """Bytes of the largest single allocation that torch's CPU allocator makes while ``run()`` runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()  # type: ignore[operator]
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    return max((e.nbytes() for e in events if e.name() == "[memory]"), default=0)


def compiled(model: torch.nn.Module, **options: object) -> torch.nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="fastft", options={"residual": "eager", "strict": True, **options})


def exactly(model: torch.nn.Module, **data: Any) -> Any:
    """The model's output in fp64, and its weights left in it: also where transformers casts to fp32."""
    with Wide(torch.float64, torch.float32):
        return model.double()(**data)


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_read_logits_are_eagers(name: str) -> None:
    data = batch("padding")
    wanted, exact = build(name)(**data), exactly(build(name), **data)
    got = compiled(build(name))(**data)
    assert_within("loss", got.loss, wanted.loss, exact.loss, length=VOCAB)
    assert got.logits.shape == wanted.logits.shape and got.logits.dtype == wanted.logits.dtype
    assert_within("logits", got.logits + 0, wanted.logits, exact.logits, length=VOCAB)
    assert torch.equal(got.logits.argmax(-1), wanted.logits.argmax(-1))


def test_a_loss_of_the_users_on_read_logits_has_eagers_gradients() -> None:
    data = batch("plain")
    gradients = []
    for call in (compiled, lambda model: model, lambda model: partial(exactly, model)):
        model = build("llama3")
        out = call(model)(**data)
        logits = out.logits if out.logits.dtype == torch.float64 else out.logits.float()
        (out.loss + 0.1 * logits.logsumexp(-1).square().mean()).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    ours, eager, exact = gradients
    for name, wanted in eager.items():
        assert_within(name, ours[name], wanted, exact[name], length=VOCAB)


@pytest.mark.parametrize("lora", [None, 0.0], ids=["full", "lora"])
def test_unread_logits_are_never_allocated(lora: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as large as [batch, seq, vocab] in any dtype is allocated in a step; reading the logits allocates it."""
    monkeypatch.setattr(loss_op, "CHUNK_BYTES", 16 * VOCAB * 4)
    # A vocabulary much wider than the MLP, and enough tokens that [tokens, vocab] is larger than any weight.
    data = batch("plain", rows=4, length=250)
    model = build("llama3", lora=lora)
    tokens = data["input_ids"].numel()
    head = model.get_output_embeddings()
    wide = 64 * VOCAB
    with torch.no_grad():
        head.weight = torch.nn.Parameter(torch.randn(wide, 64) * 0.02, requires_grad=lora is None)
    getattr(model, "get_base_model", lambda: model)().config.vocab_size = wide
    call = compiled(model)
    out = call(**data)
    out.loss.backward()

    def step() -> None:
        nonlocal out
        out = call(**data)
        out.loss.backward()

    half_precision_logits = tokens * wide * 2
    assert largest_allocation(step) < half_precision_logits
    assert largest_allocation(lambda: out.logits + 0) >= tokens * wide * 4


def test_without_gradients_logits_are_real() -> None:
    data = batch("plain")
    model = build("llama3").eval()
    with torch.no_grad():
        got = compiled(model)(**data)
        wanted = model(**data)
        exact = exactly(model, **data)
    assert type(got.logits) is torch.Tensor
    assert_within("logits", got.logits, wanted.logits, exact.logits, length=VOCAB)
    assert_within("loss", got.loss, wanted.loss, exact.loss, length=VOCAB)


def test_lazy_logits_can_be_switched_off() -> None:
    data = batch("plain")
    assert type(compiled(build("llama3"), lazy_logits=False)(**data).logits) is torch.Tensor
    loss, _, report = compiled_step(build("llama3"), data, lazy_logits=False)
    assert torch.isfinite(loss) and report.graphs == 1
