"""The ways of handing over a model: each trains compiled, with the losses and gradients of the uncompiled run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")
trl = pytest.importorskip("trl", minversion="1.16")

from transformers import Trainer, TrainingArguments  # noqa: E402

import fastft  # noqa: E402
from tests.trainers import _tiny as tiny  # noqa: E402
from tests.trainers.conftest import Calls  # noqa: E402

WAYS = ("in place", "wrapper", "string")
#: RMSNorms of the tiny model: two for each layer, one at the end.
NORMS = 2 * tiny.LAYERS + 1


def compiled(model: Any, way: str) -> Any:
    """``model`` as a user would hand it over; ``"string"`` and ``"eager"`` hand over the model itself."""
    if way == "in place":
        model.compile(backend="fastft")
    return torch.compile(model, backend="fastft") if way == "wrapper" else model


def lora() -> Any:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=tiny.TARGETS, init_lora_weights=False)


def hf_trainer(folder: Path, way: str, positional: bool = False) -> tiny.Run:
    """transformers' Trainer, full fine-tuning."""
    run = tiny.Run()
    model = compiled(tiny.llama(), way)
    more = {"torch_compile_backend": "fastft"} if way == "string" else {}
    args = TrainingArguments(**tiny.arguments(folder, **more))
    rest = {"train_dataset": tiny.dataset(labels=True), "callbacks": [tiny.Watch(run)]}
    trainer = Trainer(model, args, **rest) if positional else Trainer(model=model, args=args, **rest)
    trainer.train()
    return run


def sft_trainer(folder: Path, way: str, adapter: str = "config", positional: bool = False, **more: Any) -> tiny.Run:
    """TRL's SFTTrainer with its defaults (so: checkpointing) and LoRA: ``adapter`` says who makes the PEFT model."""
    run = tiny.Run()
    torch.manual_seed(1)
    model: Any = tiny.llama()
    if adapter == "before":
        model = peft.get_peft_model(model, lora())
    model = compiled(model, way)
    if adapter == "after":
        model = peft.get_peft_model(model, lora())
    if way == "string":
        more["torch_compile_backend"] = "fastft"
    args = trl.SFTConfig(**tiny.arguments(folder, **{"bf16": False, **more}))
    rest = {
        "train_dataset": tiny.dataset(),
        "processing_class": tiny.tokenizer(),
        "callbacks": [tiny.Watch(run)],
        "peft_config": lora() if adapter == "config" else None,
    }
    trainer = trl.SFTTrainer(model, args, **rest) if positional else trl.SFTTrainer(model=model, args=args, **rest)
    trainer.train()
    return run


@functools.cache
def eager(kind: str, folder: Path, **more: Any) -> tiny.Run:
    return hf_trainer(folder, "eager") if kind == "hf" else sft_trainer(folder, "eager", **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


def same(run: tiny.Run, reference: tiny.Run, relative: float = 1e-5) -> None:
    assert len(run.losses) == tiny.STEPS
    assert run.losses == pytest.approx(reference.losses, rel=relative)
    assert run.gradients.keys() == reference.gradients.keys() and run.gradients
    for name, gradient in run.gradients.items():
        exact = reference.gradients[name]
        assert (gradient - exact).norm() <= relative * exact.norm().clamp_min(1e-12), name


def trained_compiled(calls: Calls, graphs: int = 1) -> fastft.Report:
    """Every step went through compiled graphs in which sites were replaced, and no graph was split."""
    report = fastft.report()
    assert calls.count == tiny.STEPS, str(report)
    assert report.graphs == graphs, str(report)
    assert report.breaks == 0, str(report)
    assert report.counts.get("rms_norm") == NORMS * graphs, str(report)
    return report


def test_own_loop(calls: Calls) -> None:
    batch = torch.randint(0, tiny.VOCAB, (2, tiny.SEQ), generator=torch.Generator().manual_seed(0))
    results = []
    for way in ("eager", "wrapper"):
        model = compiled(tiny.llama(), way)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = tiny.Run()
        for _ in range(tiny.STEPS):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            tiny.Watch(run).on_pre_optimizer_step(None, None, None, model=model)
            optimizer.step()
            optimizer.zero_grad()
            run.losses.append(loss.item())
        results.append(run)
    same(results[1], results[0])
    trained_compiled(calls)


@pytest.mark.parametrize("way", WAYS)
def test_trainer(calls: Calls, folder: Path, way: str) -> None:
    same(hf_trainer(folder, way, positional=way == "wrapper"), eager("hf", folder))
    trained_compiled(calls)


@pytest.mark.parametrize("way", WAYS)
def test_sft_trainer_makes_the_peft_model(calls: Calls, folder: Path, way: str) -> None:
    same(sft_trainer(folder, way, positional=way == "wrapper"), eager("sft", folder))
    trained_compiled(calls)


@pytest.mark.parametrize("adapter", ["before", "after"])
@pytest.mark.parametrize("way", ["in place", "wrapper"])
def test_sft_trainer_is_given_a_peft_model(calls: Calls, folder: Path, way: str, adapter: str) -> None:
    same(sft_trainer(folder, way, adapter=adapter), eager("sft", folder, adapter="before"))
    trained_compiled(calls)


def test_without_the_bridges_trl_would_not_be_compiled(calls: Calls, folder: Path) -> None:
    # What the bridge is for: the same hand-over with another backend's wrapper is not touched, and nothing is compiled.
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    run = tiny.Run()
    args = trl.SFTConfig(**tiny.arguments(folder, bf16=False))
    trainer = trl.SFTTrainer(
        torch.compile(tiny.llama(), backend=counter),
        args,
        train_dataset=tiny.dataset(),
        processing_class=tiny.tokenizer(),
        callbacks=[tiny.Watch(run)],
    )
    trainer.train()
    assert counter.frame_count == 0 and len(run.losses) == tiny.STEPS
