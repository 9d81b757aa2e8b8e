"""The model's logits: what eager gives when they are read, and no memory when they are not."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fastft
from fastft.compare import assert_within
from fastft.judging import Wide
from fastft.kernels import _linear_cross_entropy_chunks as chunks
from fastft.lazy_logits import LazyLogits

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


# -- called without labels: the caller has a loss of its own (label smoothing, compute_loss_func, a loop)


def own_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Label smoothing and z-loss of shifted logits."""
    z, labels = logits[:, :-1].float(), labels[:, 1:].clamp(min=0)
    log_p = F.log_softmax(z, dim=-1)
    loss = -0.9 * log_p.gather(-1, labels.unsqueeze(-1)).mean() - 0.1 * log_p.mean(-1).mean()
    return loss + 1e-2 * z.logsumexp(-1).square().mean()


def without_labels(data: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in data.items() if k != "labels"}


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_a_loss_of_the_callers_has_eagers_gradients(name: str) -> None:
    data = batch("plain")
    results = []
    for call in (compiled, lambda model: model, lambda model: partial(exactly, model)):
        model = build(name)
        logits = call(model)(**without_labels(data)).logits
        assert isinstance(logits, LazyLogits) is (not results)
        with Wide(torch.float64, torch.float32) if len(results) == 2 else nullcontext():
            loss = own_loss(logits, data["labels"])
        loss.backward()
        results.append({"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters()}})
    ours, eager, exact = results
    for what, wanted in eager.items():
        assert_within(what, ours[what], wanted, exact[what], length=VOCAB)


def test_it_says_that_returned_logits_are_lazy() -> None:
    compiled(build("llama3"))(**without_labels(batch("plain")))
    assert [s.notes for s in fastft.reports()[-1].sites if s.pattern == "lazy_logits"] == ["computed when read"]


@pytest.mark.parametrize("options", [{"lazy_logits": False}, {"disable": ["linear_cross_entropy"]}, {"fuel": 0}])
def test_returned_logits_that_are_real(options: dict[str, Any]) -> None:
    call = compiled(build("llama3"), **options)
    assert type(call(**without_labels(batch("plain"))).logits) is torch.Tensor


class Embedded(torch.nn.Module):
    def __init__(self, out: int = 40, read: bool = False, written: bool = False) -> None:
        super().__init__()
        self.embed, self.head, self.read, self.written = (
            torch.nn.Embedding(40, 8),
            torch.nn.Linear(8, out),
            read,
            written,
        )

    def forward(self, ids: torch.Tensor) -> Any:
        x = self.embed(ids) * 2
        z = self.head(x)
        if self.written:
            x.add_(1)
        return (z, z.square().mean()) if self.read else (z, x)


@pytest.mark.parametrize(
    "change, lazy", [({}, True), ({"out": 41}, False), ({"read": True}, False), ({"written": True}, False)]
)
def test_which_outputs_are_a_language_models_logits(change: dict[str, Any], lazy: bool) -> None:
    """Those of as many classes as there are tokens, which nothing else reads."""
    torch.manual_seed(0)
    model, ids = Embedded(**change), torch.randint(0, 40, (2, 3))
    wanted, (got, _) = model(ids)[0], compiled(model)(ids)
    assert isinstance(got, LazyLogits) is lazy
    assert torch.equal(got + 0, wanted)


@pytest.mark.parametrize("labels", [True, False], ids=["fused", "by the caller"])
@pytest.mark.parametrize("lora", [None, 0.0], ids=["full", "lora"])
def test_unread_logits_are_never_allocated(lora: float | None, labels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as large as [batch, seq, vocab] in any dtype is allocated in a step; reading the logits allocates it.
    Neither by a loss of the caller's, a number a token.
    """
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 16 * VOCAB * 4)
    monkeypatch.setattr(chunks, "TRAINED_SHARE", 0.0)
    # A vocabulary much wider than the MLP, and enough tokens that [tokens, vocab] is larger than any weight.
    data = batch("plain", rows=4, length=250)
    model = build("llama3", lora=lora)
    tokens = data["input_ids"].numel()
    head = model.get_output_embeddings()
    wide = 64 * VOCAB
    with torch.no_grad():
        for layer in (head, model.get_input_embeddings()):
            layer.weight = torch.nn.Parameter(torch.randn(wide, 64) * 0.02, requires_grad=lora is None)
    getattr(model, "get_base_model", lambda: model)().config.vocab_size = wide
    call = compiled(model)
    given = data if labels else without_labels(data)

    def step() -> None:
        nonlocal out
        out = call(**given)
        (out.loss if labels else own_loss(out.logits, data["labels"])).backward()

    out = None
    step()

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
